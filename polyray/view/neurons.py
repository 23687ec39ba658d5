"""Neurons: rows of the table, answers of the search, and who resembles whom by name.

Place in the flow: asks `index.py` what `asked.py` means; `app.py` shows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyray.view.asked import Asked, preset_of
from polyray.view.columns import STATUSES
from polyray.view.index import N_TOP_TOKENS, Index

N_NEIGHBOURS = 12
_CHUNK = 20_000
"""Rows that an export holds at a time."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Page:
    """Some rows of many."""

    rows: list[dict[str, Any]]
    n: int
    """How many there are."""
    first: int
    """Number of the first one shown, from 1."""
    n_pages: int


def page(index: Index, asked: Asked) -> Page:
    """The neurons that an address asks for; a page past the end is the last one."""
    where, values = asked.condition(index)
    # Rows are numbered first and read afterwards: far down a sort then moves numbers alone.
    source = f"SELECT rowid AS row, {asked.sorted_by(index)} AS key FROM {index.neurons} WHERE {where}"
    order = f"key {'DESC' if asked.is_descending(index) else 'ASC'} NULLS LAST, row"
    cut = _cut(index.ask, source, "row", "count(*) AS n", order, values, asked.page, asked.per)
    chosen = np.array([r["row"] for r in cut.rows], np.int64)
    return Page(rows(index, chosen, preset_of(asked, index.kind)), cut.counts["n"], cut.first, cut.n_pages)


@dataclass(frozen=True)
class _Cut:
    """A page of what a query finds."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    first: int
    n_pages: int


def _cut(
    ask: Callable[[str, Mapping[str, object]], list[dict[str, Any]]],
    source: str,
    kept: str,
    counted: str,
    order: str,
    values: Mapping[str, object],
    page: int,
    per: int,
) -> _Cut:
    """Some rows of a query and how many it has, found in one go; a page past the end is the last one."""
    found = f"WITH found AS MATERIALIZED ({source}), counts AS (SELECT {counted} FROM found)"
    one = f"{found} SELECT {kept}, counts.* FROM found, counts ORDER BY {order} LIMIT {per}"

    start = (page - 1) * per
    rows = ask(f"{one} OFFSET {start}", values)
    counts = rows[0] if rows else ask(f"{found} SELECT * FROM counts", values)[0]
    n_pages = max(1, -(-counts["n"] // per))
    if page > n_pages:
        start = (n_pages - 1) * per
        rows = ask(f"{one} OFFSET {start}", values)
    return _Cut(rows, {c: int(counts[c]) for c in ("n", "n_neurons") if c in counts}, start + 1, n_pages)


def rows(index: Index, chosen: Rows, preset: str) -> list[dict[str, Any]]:
    """Neurons by their rows in the index, in that order.

    Returns:
        row, layer, neuron, status, reason, diagnosis, the kind's columns by key, and names: of clusters, largest first,
        or of the first core-tokens.
    """
    numbers: dict[str, object] = {"rows": [int(i) for i in chosen]}
    columns = ", ".join(f'n.{c.of(preset)} AS "c_{c.key}"' for c in index.kind.columns)
    tokens = ", n.tokens" if index.is_categorical else ""
    found = index.ask(
        f"SELECT n.rowid AS row, layer_id, neuron, status, reason, diagnosis, {columns}{tokens} "
        f"FROM {index.neurons} n SEMI JOIN (SELECT unnest($rows::BIGINT[]) AS row) wanted ON n.rowid = wanted.row",
        numbers,
    )
    names = _names(index, numbers)
    of = {}
    for r in found:
        shown = {c.key: r[f"c_{c.key}"] for c in index.kind.columns}
        shown |= {"row": r["row"], "layer": index.layers[r["layer_id"]], "neuron": r["neuron"]}
        shown |= {"status": STATUSES[r["status"]], "reason": _text(index.reasons, r["reason"])}
        shown["diagnosis"] = _text(index.diagnoses, r["diagnosis"])
        shown["names"] = [index.texts.get(t) for t in r["tokens"]] if index.is_categorical else names.get(r["row"], [])
        of[r["row"]] = shown
    return [of[int(i)] for i in chosen]


def _names(index: Index, numbers: dict[str, Any]) -> dict[int, list[str | None]]:
    if index.is_categorical:
        return {}
    found = index.ask(
        f"SELECT row, list(name ORDER BY cluster) AS names FROM {index.clusters} c "
        "SEMI JOIN (SELECT unnest($rows::BIGINT[]) AS row) wanted ON c.row = wanted.row GROUP BY row",
        numbers,
    )
    return {r["row"]: [index.texts.get(name) for name in r["names"]] for r in found}


def _text(texts: Sequence[str], number: int | None) -> str | None:
    return None if number is None else texts[number]


def all_rows(index: Index, asked: Asked) -> Iterator[Rows]:
    """Rows of all neurons that an address asks for, whatever its page, some at a time."""
    where, values = asked.condition(index)
    ordered = f"SELECT rowid::INTEGER AS row FROM {index.neurons} WHERE {where} ORDER BY {asked.order(index)}"
    chosen = index.numbers(ordered, values)["row"].to_numpy()
    for start in range(0, len(chosen), _CHUNK):
        yield chosen[start : start + _CHUNK]


@dataclass(frozen=True)
class Found:
    """What a search by concept has found."""

    rows: list[dict[str, Any]]
    """As `rows` gives them, with cluster, size, name, name_score, label, label_frac and how (0 the same, 1 a word
    begins with it, 2 anywhere); of language sweeps with token and rank."""
    n: int
    n_neurons: int
    n_pages: int
    first: int


def search(index: Index, words: str, by: str, at: int, per: int, preset: str) -> Found:
    """Clusters by name or label, the nearest match first; of a language sweep neurons by core-token.

    Args:
        index: what is searched.
        words: what is looked for, in any case.
        by: `name`, `label` or `any`.
        at: page, from 1.
        per: clusters on a page.
        preset: for the numbers beside them.
    """
    matches = index.matching(words)
    values: dict[str, object] = {"texts": list(matches), "how": list(matches.values())}
    matched = "(SELECT unnest($texts::INTEGER[]) AS text, unnest($how::INTEGER[]) AS how)"
    if index.is_categorical:
        source = (
            "SELECT n.rowid AS row, c.text AS name, t.how AS how, c.rank AS rank, n.top_mean AS score FROM "
            "(SELECT layer, neuron, unnest(tokens) AS text, unnest(range(len(tokens))) AS rank FROM core_tokens) c "
            f"JOIN {matched} t ON c.text = t.text JOIN {index.layer_numbers} l ON c.layer = l.layer "
            f"JOIN {index.neurons} n ON n.layer_id = l.layer_id AND n.neuron = c.neuron"
        )
        order, kept = "how, rank, score DESC NULLS LAST, row", "row, name, how, rank"
    else:
        source = _clusters(index, by, matched)
        order = "how, score DESC NULLS LAST, row, cluster"
        kept = "row, cluster, size, name, name_score, label, label_frac, how"
    counted = "count(*) AS n, count(DISTINCT row) AS n_neurons"
    cut = _cut(index.rows, source, kept, counted, order, values, at, per)
    found = cut.rows
    unique = np.unique(np.array([r["row"] for r in found], np.int64))
    about = dict(zip(unique.tolist(), rows(index, unique, preset), strict=True))
    for r in found:
        r["name"] = index.texts.get(r["name"])
        if "label" in r:
            r["label"] = index.texts.get(r["label"])
        r["others"] = _without(about[r["row"]]["names"], r["name"])
    n, n_neurons = cut.counts["n"], cut.counts["n_neurons"]
    return Found([about[r["row"]] | r for r in found], n, n_neurons, cut.n_pages, cut.first)


def _without(names: list[str | None], name: str | None) -> list[str | None]:
    """Names but one, once."""
    left = list(names)
    if name in left:
        left.remove(name)
    return left


def _clusters(index: Index, by: str, matched: str) -> str:
    """Clusters whose name or label matches, or either: then once, by the better of the two."""
    columns = "row, cluster, size, name, name_score, label, label_frac"
    if by != "any":
        score = {"name": "name_score", "label": "label_frac"}[by]
        return f"SELECT {columns}, how, {score} AS score FROM {index.clusters} c JOIN {matched} t ON c.{by} = t.text"
    # Whatever matches by its label, and what does by its name alone: either way few rows are looked at twice.
    return (
        f"SELECT {columns}, least(n.how, l.how) AS how, "
        "greatest(CASE WHEN n.how IS NOT NULL THEN name_score END, label_frac) AS score "
        f"FROM {index.clusters} c JOIN {matched} l ON c.label = l.text LEFT JOIN {matched} n ON c.name = n.text "
        f"UNION ALL SELECT {columns}, n.how, name_score AS score "
        f"FROM {index.clusters} c JOIN {matched} n ON c.name = n.text ANTI JOIN {matched} l ON c.label = l.text"
    )


def neighbours(index: Index, row: int, preset: str) -> list[dict[str, Any]]:
    """Neurons whose clusters have the same names, or that have the same first core-tokens: those that share most first.

    Returns:
        As `rows` gives them, with shared: the names that both have.
    """
    if index.is_categorical:
        own = index.ask(f"SELECT tokens FROM {index.neurons} WHERE rowid = ?", [row])[0]["tokens"]
        found = index.ask(
            f"SELECT rowid AS row, list_intersect(tokens, $own::INTEGER[]) AS shared FROM {index.neurons} "
            "WHERE rowid <> $row AND list_has_any(tokens, $own::INTEGER[]) "
            f"ORDER BY len(shared) DESC, row LIMIT {N_NEIGHBOURS}",
            {"own": own[:N_TOP_TOKENS], "row": row},
        )
    else:
        # The sum of scores breaks ties: a name that fits well says more than one that happens to be the nearest.
        found = index.ask(
            f"SELECT row, list(DISTINCT name) AS shared, sum(name_score) AS score FROM {index.clusters} "
            f"WHERE row <> $row AND name IN (SELECT name FROM {index.clusters} WHERE row = $row) "
            f"GROUP BY row ORDER BY len(shared) DESC, score DESC, row LIMIT {N_NEIGHBOURS}",
            {"row": row},
        )
    about = rows(index, np.array([r["row"] for r in found], np.int64), preset)
    return [
        a | {"shared": sorted(index.texts.get(t) or "" for t in r["shared"])} for a, r in zip(about, found, strict=True)
    ]


def beside(index: Index, row: int) -> list[dict[str, Any] | None]:
    """The neurons before and after one, over layers; None at the ends."""
    found: list[dict[str, Any] | None] = []
    for other in (row - 1, row + 1):
        at = index.ask(f"SELECT layer_id, neuron FROM {index.neurons} WHERE rowid = ?", [other])
        found.append({"layer": index.layers[at[0]["layer_id"]], "neuron": at[0]["neuron"]} if at else None)
    return found


def nearest_neuron(index: Index, layer: str, neuron: int) -> int | None:
    """The neuron of a layer that is nearest in number."""
    found = index.ask(
        f"SELECT neuron FROM {index.neurons} WHERE layer_id = ? ORDER BY abs(neuron::BIGINT - ?), neuron LIMIT 1",
        [index.layers.index(layer), neuron],
    )
    return int(found[0]["neuron"]) if found else None
