"""Cards: the neurons with the most certain polysemanticity, with what they respond to.

Place in the flow: last of the findings in a report. Pictures are those that the dataset holds; where it holds none, the
card says so and why.
"""

import base64
from typing import Any

from polyray.report.content import Card, Cards, Group, Missing, Prose, Section, Snippet
from polyray.report.plain import NOTHING, count, number, p_value, percent, visible
from polyray.report.source import Source, layer_name

N_CARDS = 24
N_PICTURES = 4
N_SNIPPETS = 3
N_TOKENS = 12
N_GROUPS = 6
"""Most neurons, pictures and texts of a cluster, tokens of a list, and clusters of a neuron."""
MOST_BYTES = 3_000_000
"""Bytes of all pictures together: keeps the page small where thumbnails are large."""
MOST_BYTES_EACH = 64_000
_JPEG = b"\xff\xd8\xff"
_LETTERS = 90
"""Letters of a snippet that are shown on either side of its peak."""

_BEST = (
    "SELECT layer, neuron, k, n_used, S, Q AS nmi, D, specific_log_psi AS log_psi, specific_p AS p, specific_S_z AS "
    "s_z, specific_Q_z AS q_z, specific_D_z AS d_z, {summary} FROM {table} WHERE status = 'ok' AND specific_p IS NOT "
    "NULL AND NOT isnan(specific_log_psi) ORDER BY specific_p, specific_log_psi DESC, layer, neuron LIMIT $n"
)


def cards(source: Source) -> Section:
    """The section of either method."""
    return _language(source) if source.is_categorical else _psi(source)


def _psi(source: Source) -> Section:
    title = "Neurons with the most certain polysemanticity"
    summarised = source.has("neuron_summary")
    nothing = "NULL AS fdr_q, NULL AS called, NULL AS diagnosis"
    summary = "fdr_q, called, diagnosis" if summarised else nothing
    table = "neurons_with_summary" if summarised else "neurons"
    best = source.rows(_BEST.format(summary=summary, table=table), {"n": N_CARDS})
    if not best:
        return Section("cards", title, [Missing("No neuron has a p under specific yet, so that none can be ranked.")])
    verdicts = {
        (r["layer"], r["neuron"]): r["causal"]
        for r in source.rows(
            "SELECT layer, neuron, causal FROM effects WHERE scope = 'neuron' AND kind = 'real' "
            "AND contrast = 'aligned-random' AND list_contains($neurons, neuron)",
            {"neurons": [r["neuron"] for r in best]},
        )
    }
    pictures = _Pictures(source)
    made = []
    for r in best:
        key = r["layer"], r["neuron"]
        clusters = source.rows(
            "SELECT * FROM clusters WHERE layer = ? AND neuron = ? ORDER BY cluster", [r["layer"], r["neuron"]]
        )
        groups = _few([_cluster(c, pictures) for c in clusters[:N_GROUPS]], len(clusters))
        groups = groups or [Group("no clusters", "", missing="Its clusters are not in the dataset.")]
        made.append(
            Card(f"{layer_name(r['layer'])} · {r['neuron']}", _facts(r, key in verdicts, verdicts.get(key)), groups)
        )
    said = (
        f"The {len(made)} neurons of smallest p under specific, and among equal p (the smallest is a floor, one over "
        "the one-concept draws and one) of highest log ψ. A row for each cluster: its name, the prompt nearest to it, "
        "with the cosine; how many of the neuron's examples it holds; their most frequent label; and its prototypes. "
        "A name is the nearest of a list, not a finding: look at the pictures or texts. Being here is no discovery. "
    )
    n_called = sum(r["called"] is True for r in best)
    said += f"Called at q < {source.alpha} are {n_called} of them." if summarised else "q is not made yet."
    return Section("cards", title, [Prose(said), Cards(made)])


def _facts(r: dict[str, Any], swapped: bool, causal: bool | None) -> list[tuple[str, str]]:
    verdict = {True: "yes", False: "no", None: "no verdict"}[causal] if swapped else "not swapped"
    return [
        ("log ψ", number(r["log_psi"], 2)),
        ("p", p_value(r["p"])),
        ("q", p_value(r["fdr_q"])),
        ("S, Q, D", ", ".join(number(r[c], 2) for c in ("S", "nmi", "D"))),
        ("their z", ", ".join(number(r[c], 1) for c in ("s_z", "q_z", "d_z"))),
        ("causal", verdict),
        ("diagnosis", visible(r["diagnosis"])),
    ]


def _few(groups: list[Group], n: int) -> list[Group]:
    """Groups, and how many there are beside them."""
    rest = n - len(groups)
    return [*groups, Group(f"and {rest} further", "")] if rest else groups


class _Pictures:
    """Thumbnails as addresses, as far as there is room for them.

    Args:
        source: says why there are none.
    """

    def __init__(self, source: Source) -> None:
        self._left = MOST_BYTES
        off = source.setting("extract", "thumbnails") is False or source.setting("extract", "snippets") is False
        self.why_none = (
            "No pictures or texts: the sweep was asked to store none (extract.thumbnails, extract.snippets)."
            if off
            else "No pictures or texts of this cluster are in the dataset."
        )

    def of(self, thumbnails: list[bytes | None] | None) -> tuple[list[str], str]:
        """Addresses of a cluster's pictures, and what is missing of them."""
        held = [t for t in thumbnails or [] if t is not None][:N_PICTURES]
        good = [t for t in held if t.startswith(_JPEG) and len(t) <= MOST_BYTES_EACH]
        missing = f"Not shown, being no JPEG of a thumbnail's size: {len(held) - len(good)}." if good != held else ""
        fitting = []
        for t in good:
            if len(t) > self._left:
                missing = "There is no room left on this page for its pictures."
                break
            self._left -= len(t)
            fitting.append("data:image/jpeg;base64," + base64.b64encode(t).decode())
        return fitting, missing


def _cluster(row: dict[str, Any], pictures: _Pictures) -> Group:
    shown, missing = pictures.of(row["thumbnails"])
    texts = [snippet(t) for t in (row["snippets"] or [])[:N_SNIPPETS] if t is not None]
    if not shown and not texts:
        missing = missing or pictures.why_none
    label = f"{visible(row['label'], 60)} {percent(row['label_frac'], 0)}" if row["label"] is not None else NOTHING
    examples = f"{count(row['size'])} {'example' if row['size'] == 1 else 'examples'}"
    facts = f"{examples} · cosine {number(row['name_score'], 2)} · label {label}"
    return Group(visible(row["name"], 80), facts, shown, texts, missing=missing)


def snippet(text: str) -> Snippet:
    """A stored text, cut around the peak that stands between « and »."""
    before, mark, rest = text.partition("«")
    peak, end, after = rest.partition("»")
    if not (mark and end):
        return Snippet(visible(text, 2 * _LETTERS), "", "")
    before = before if len(before) <= _LETTERS else "…" + before[-_LETTERS:]
    return Snippet(visible(before), visible(peak, _LETTERS), visible(after, _LETTERS))


# Language neurons


def _language(source: Source) -> Section:
    title = "Neurons whose activation follows proximity most certainly"
    best = source.rows(
        "SELECT * EXCLUDE (deciles, dimensional) FROM proximity WHERE status = 'ok' AND p IS NOT NULL "
        "AND difference IS NOT NULL AND NOT isnan(difference) ORDER BY p, difference DESC, layer, neuron LIMIT $n",
        {"n": N_CARDS},
    )
    if not best:
        why = "No neuron qualifies yet: none has enough taken-clusters and a p."
        return Section("cards", title, [Missing(why)])
    words = _Words(source)
    made = []
    for r in best:
        key = [r["layer"], r["neuron"]]
        core = source.rows("SELECT tokens, means FROM core_tokens WHERE layer = ? AND neuron = ?", key)
        taken = source.rows(
            "SELECT precursor, size, p, tokens FROM taken_clusters WHERE layer = ? AND neuron = ? AND counted "
            "ORDER BY rank",
            key,
        )
        groups = [_core(c, words) for c in core[:1]]
        groups += _few([_taken(t, words) for t in taken[: N_GROUPS - 1]], len(taken))
        groups = groups or [Group("no tokens", "", missing="Its core-tokens are not in the dataset.")]
        facts = [
            ("difference", number(r["difference"])),
            ("Kruskal-Wallis p", p_value(r["p"])),
            ("tau", number(r["tau"], 2)),
            ("first component", percent(r["first"])),
            ("taken-clusters", count(r["n_clusters"])),
            ("diagnosis", visible(r["diagnosis"]).replace("_", " ")),
        ]
        made.append(Card(f"{layer_name(r['layer'])} · {r['neuron']}", facts, groups))
    said = (
        f"The {len(made)} neurons of smallest Kruskal-Wallis p (which has a floor, 1/(n+1) of its permutations) and "
        "among equal p of largest difference. The first row: core-tokens, those of highest mean activation, the "
        "strongest first. Each further row: a taken-cluster, the core-tokens shared with one precursor. Leading spaces "
        "belong to tokens. See the controls before reading categories into them."
    )
    return Section("cards", title, [Prose(said), Cards(made)])


class _Words:
    """Tokens as text, asked for as they are needed.

    Args:
        source: whose table `tokens` says them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._known: dict[int, str] = {}

    def of(self, tokens: list[int]) -> list[str]:
        """Texts of token ids; of one that the table lacks its number."""
        wanted = [t for t in tokens if t not in self._known]
        if wanted:
            for r in self._source.rows(
                "SELECT token, text FROM tokens WHERE list_contains($wanted, token)", {"wanted": wanted}
            ):
                self._known[r["token"]] = visible(r["text"], 40)
        return [self._known.get(t, f"#{t}") for t in tokens]


def _core(row: dict[str, Any], words: _Words) -> Group:
    tokens, means = row["tokens"] or [], row["means"] or []
    facts = (
        f"{count(len(tokens))} tokens, mean activation {number(means[0], 2)} to {number(means[-1], 2)}" if means else ""
    )
    return Group("core-tokens", facts, tokens=words.of(tokens[:N_TOKENS]), missing="" if tokens else "It has none.")


def _taken(row: dict[str, Any], words: _Words) -> Group:
    facts = f"{count(row['size'])} tokens, hypergeometric p {p_value(row['p'])}"
    return Group(f"shared with precursor {row['precursor']}", facts, tokens=words.of((row["tokens"] or [])[:N_TOKENS]))
