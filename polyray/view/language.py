"""Language: everything that a categorical sweep says of one neuron of a language model.

Which question it answers: *which tokens does this neuron respond to, what is it built from, and does its activation
follow its taken-clusters?* Place in the flow: as `neuron.py`, for the other method.
"""

from typing import Any

from polyray.report.catalog import Catalog
from polyray.view import charts
from polyray.view.index import Index

N_IN_CONTEXT = 8
"""First core-tokens that are shown where they first stand in the corpus."""
N_CONTEXTS = 2000
"""Contexts that are looked through for them."""
N_AROUND = 8
"""Tokens shown on each side."""
N_TARGETS = 12
_CONTROLS = ("order", "precursors_matched", "precursors_random", "tokens_same_frequency")
"""The controls of the method, as report/categorical.py has them."""


def neuron(catalog: Catalog, index: Index, layer: str, number: int) -> dict[str, Any] | None:
    """What a page of a neuron shows; None where no table has the neuron.

    Returns:
        core (core-tokens with means), in_context, precursors with their taken-clusters, targets (neurons of the next
        layer that it is a precursor of), proximity with its curve, clamps.
    """
    at: Any = {"layer": layer, "neuron": number}
    core = catalog.at("core_tokens", **at)
    found = catalog.at("proximity", **at)
    if not core and not found:
        return None
    tokens = list((core[0]["tokens"] if core else None) or [])
    means = list((core[0]["means"] if core else None) or [])
    largest = max((abs(m) for m in means if m is not None), default=0.0) or 1.0
    place = index.layers.index(layer)
    before = index.layers[place - 1] if place else None
    after = index.layers[place + 1] if place + 1 < len(index.layers) else None
    proximity = found[0] if found else None
    return {
        "layer": layer,
        "neuron": number,
        "core": [
            {"token": t, "text": index.texts.get(t), "mean": m, "length": round(100 * abs(m or 0.0) / largest, 2)}
            for t, m in zip(tokens, means, strict=False)
        ],
        "status": core[0] if core else None,
        "in_context": _in_context(catalog, index, tokens[:N_IN_CONTEXT]),
        "before": before,
        "after": after,
        "precursors": _precursors(catalog, index, at),
        "targets": _targets(catalog, after, number),
        "proximity": proximity,
        "curve": _curve(catalog, at, proximity),
        "clamps": sorted(catalog.at("clamps", **at), key=lambda r: r["quantile"]),
    }


def _precursors(catalog: Catalog, index: Index, at: Any) -> list[dict[str, Any]]:
    taken = {r["rank"]: r for r in catalog.at("taken_clusters", **at)}
    rows = sorted(catalog.at("connections", **at), key=lambda r: r["rank"])
    out = []
    for r in rows:
        of = taken.get(r["rank"], {})
        texts = [index.texts.get(t) for t in of.get("tokens") or []]
        out.append(r | {"size": of.get("size"), "p": of.get("p"), "counted": of.get("counted"), "texts": texts})
    return out


def _targets(catalog: Catalog, after: str | None, number: int) -> list[dict[str, Any]]:
    if after is None:
        return []
    found = catalog.at("connections", ["neuron", "rank", "weight"], layer=after, precursor=number)
    return sorted(found, key=lambda r: (r["rank"], -r["weight"]))[:N_TARGETS]


def _curve(catalog: Catalog, at: Any, proximity: dict[str, Any] | None) -> dict[str, Any] | None:
    """Mean proximity by decile of activation, beside the means of the controls' draws."""
    if proximity is None or not proximity["deciles"]:
        return None
    lines: dict[str, list[float | None]] = {"actual": list(proximity["deciles"])}
    for r in sorted(catalog.at("proximity_controls", ["control", "deciles"], **at), key=lambda r: r["control"]):
        deciles = r["deciles"] or []
        if r["control"] in _CONTROLS and deciles:
            lines[r["control"]] = [_mean(deciles[i::10]) for i in range(10)]
    return charts.curves(lines)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _in_context(catalog: Catalog, index: Index, tokens: list[int]) -> list[dict[str, Any]]:
    """Where tokens stand first, of the contexts that are looked through."""
    if not tokens:
        return []
    found = catalog.rows(
        "WITH near AS (SELECT tokens, documents, first_document, context FROM contexts "
        f"ORDER BY first_document, context LIMIT {N_CONTEXTS}), "
        "wanted AS (SELECT unnest($tokens::INTEGER[]) AS token) "
        "SELECT token, min_by(tokens[greatest(1, pos - $around):pos + $around], (first_document, context)) AS pieces, "
        "min_by(least(pos, $around + 1), (first_document, context)) AS place, "
        "min_by(documents[pos], (first_document, context)) AS document "
        "FROM (SELECT token, tokens, documents, first_document, context, list_position(tokens, token) AS pos "
        "FROM near, wanted WHERE list_contains(tokens, token)) GROUP BY token",
        {"tokens": tokens, "around": N_AROUND},
    )
    of = {r["token"]: r for r in found}
    documents = [r["document"] for r in found if r["document"] is not None]
    names = {r["document"]: r["name"] for r in catalog.at("documents", ["document", "name"], document=documents)}
    shown = []
    for t in tokens:
        r = of.get(t)
        pieces: list[tuple[str | None, bool]] = []
        if r is not None:
            pieces = [(index.texts.get(x), i == r["place"] - 1) for i, x in enumerate(r["pieces"])]
        name = names.get(r["document"]) if r is not None else None
        shown.append({"token": t, "text": index.texts.get(t), "pieces": pieces, "document": name})
    return shown
