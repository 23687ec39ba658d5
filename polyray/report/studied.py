"""Studied: patch swaps, planted neurons and sensitivity, where a sweep has them.

Place in the flow: after the scores in the report of a PSI sweep; the numbers are the records of the console's tables.
"""

from typing import Any

from polyray.report import planted, sensitivity
from polyray.report.charts import Series, dots
from polyray.report.content import Block, Figure, Missing, Panel, Prose, Section, Table
from polyray.report.papers import PSI_SWAP
from polyray.report.plain import NOTHING, count, interval, number, p_value, percent, percent_interval, visible
from polyray.report.scores import MOST_ROWS, left_off
from polyray.report.source import SWEEP, Source, layer_name
from polyray.schema import CONTRASTS, PLANTED_BALANCE, PLANTED_KINDS

_HEADS = {
    "aligned-random": "aligned − random",
    "aligned-random_place": "aligned − random place",
    "aligned-shuffled_position": "aligned − shuffled position, at the peak",
    "aligned-non_aligned": "aligned − non-aligned",
    "non_aligned-random": "non-aligned − random",
    "ablate_elsewhere-baseline": "specificity: ablate elsewhere − baseline",
}
_NO_SWAPS = "This sweep has no patch swaps: science.swap asks for them. Whether clusters drive a neuron was not asked."


def causes(source: Source) -> Section:
    """Patch-swap contrasts and the share of causally polysemantic neurons."""
    title = "Is it causal? Patch swaps"
    if not source.has("effects"):
        asked = source.setting("swap") is not None
        why = "Patch swaps are not summed up yet: their last stage has not run." if asked else _NO_SWAPS
        return Section("swaps", title, [Missing(why)])
    records = source.swapped
    places = [r for r in records if r["split"] == "all"]
    drawn = [r for r in places if any(f["mean_sd"] is not None for f in r["contrasts"].values())]
    if not drawn:
        why = "No neuron has two conditions to compare: nothing could be swapped, or nothing was left to be compared."
        return Section("swaps", title, [Missing(why)])
    names = [layer_name(r["layer"]) for r in drawn]
    panels = []
    for contrast in CONTRASTS:
        at = [r["contrasts"][contrast] for r in drawn]
        series = Series(_HEADS[contrast], *([f[c + "_sd"] for f in at] for c in ("mean", "low", "high")))
        told = f"{_HEADS[contrast]} by layer, in standard deviations; the numbers are in the table below"
        axis = "difference, in sd of the top responses"
        panels.append(Panel(_HEADS[contrast], told, dots(names, [series], axis, told, 0.0)))
    caption = (
        "The box around the peak of a neuron's own example is filled (baseline), or replaced by a patch of another "
        "example of the same cluster (aligned), of another cluster (non-aligned), of a random image at the neuron's "
        "peak (random) or anywhere (random place); or the aligned patch is put elsewhere (shuffled position), or as "
        "much is filled elsewhere (ablate elsewhere). A mark is the mean over neurons of the difference in response, "
        "in standard deviations of the neuron's top responses, with its bootstrap 95 % interval; right of the dashed "
        "0 the first of the two gives the larger response. Intervals take neurons for independent, which they are not "
        "quite."
    )
    figure = Figure("swaps", "What a patch does, by contrast", caption, panels, [_contrasts(records)])
    blocks: list[Block] = [figure, _causal_figure(places), _null_check(places[-1])]
    reasons = source.rows(
        "SELECT reason, count(*) AS n FROM effects WHERE scope = 'neuron' AND kind = 'real' AND contrast = "
        "'aligned-random' AND reason IS NOT NULL GROUP BY reason ORDER BY n DESC, reason LIMIT 10"
    )
    if reasons:
        cells = [[visible(r["reason"]), count(r["n"])] for r in reasons]
        blocks.append(Table("Swapped neurons without a verdict", ("reason", "neurons"), cells))
    return Section("swaps", title, blocks)


def _place(record: dict[str, Any]) -> str:
    if record["layer"] is not None:
        return layer_name(record["layer"])
    return SWEEP if record["split"] == "all" else visible(record["split"]).replace("log_psi", "log ψ")


def _contrasts(records: list[dict[str, Any]]) -> Table:
    rows = []
    for r in sorted(records, key=lambda r: r["layer"] is not None):
        for contrast in CONTRASTS:
            f = r["contrasts"][contrast]
            rows.append([_place(r), _HEADS[contrast], interval(f["mean_sd"], f["low_sd"], f["high_sd"], 2),
                         interval(f["mean"], f["low"], f["high"], 2), p_value(f["p"]), p_value(f["q"]),
                         count(f["n"])])  # fmt: skip
    note = (
        "n: neurons. p: Wilcoxon's signed-rank test of the neurons' means; q: by Benjamini and Hochberg within the "
        "contrast. The whole sweep comes first, then the sweep by quartile of specific log ψ and by share of the "
        "image in the box, then the layers. A dash: no neuron has a difference, or its spread is not known."
        + left_off(len(rows), "effects")
    )
    heads = ("where", "contrast", "in sd (95 % interval)", "raw response (95 % interval)", "p", "q", "n")
    return Table("Every contrast", heads, rows[:MOST_ROWS], note, n_text=2)


def _causal_figure(places: list[dict[str, Any]]) -> Figure:
    names = [layer_name(r["layer"]) for r in places]
    labels = {"causal": "causally polysemantic", "causal_specific": "… and more than one concept (p of S)"}
    series = [
        Series(label, *([r[c][end] for r in places] for end in ("mean", "low", "high"))) for c, label in labels.items()
    ]
    series.append(Series("null neurons, aligned − non-aligned, p < 0.05", [r["null_p05"]["mean"] for r in places]))
    told = "Share of causally polysemantic neurons by layer; the numbers are in the table below"
    svg = dots(names, series, "share of neurons", told, 0.05, (0.0, 1.0))
    rows = [
        [name, *(percent_interval(*(r[c][e] for e in ("mean", "low", "high"))) for c in labels),
         percent(r["null_p05"]["mean"]), count(r["n"]), count(r["causal"]["n"]), count(r["null_p05"]["n"])]
        for name, r in zip(names, places, strict=True)
    ]  # fmt: skip
    heads = (
        "layer",
        *labels.values(),
        "null neurons, aligned − non-aligned, p < 0.05",
        "swapped",
        "with a verdict",
        "null neurons",
    )
    note = "A dash: no neuron has a verdict, which takes two clusters with five hosts each."
    table = Table("Causally polysemantic neurons", heads, rows, note)
    caption = (
        "A neuron is causally polysemantic when at least two of its clusters drive it: aligned − random above 0 at q "
        "< 0.05. Two clusters of one concept drive a neuron too; the second mark therefore asks for p of S below 0.05 "
        "under specific as well, and is the one to quote. Null neurons check the tests and not the verdict, which has "
        "no null: there aligned and non-aligned are the same thing, and the share with p < 0.05 of that contrast "
        "should be near 0.05, dashed."
    )
    panel = Panel("Share by layer", told, svg)
    return Figure("causal", "Causally polysemantic neurons", caption, [panel], [table])


def _null_check(whole: dict[str, Any]) -> Prose:
    ks, small = whole["null_ks"], whole["null_small"]
    if ks["mean"] is None:
        return Prose("There are no null neurons of the swap, so that its p were not checked.")
    return Prose(
        f"Null check over {count(ks['n'])} null neurons: the Kolmogorov-Smirnov distance of their p from uniform is "
        f"{number(ks['mean'])} (p {p_value(ks['p'])}); how far p are too small, {number(small['mean'])} "
        f"(p {p_value(small['p'])}). The paper gives {PSI_SWAP} for aligned against controls, in raw units of another "
        "network, which do not compare."
    )


def plants(source: Source) -> Section | None:
    """What the census recovered of planted neurons; None where none were planted."""
    if source.setting("plant") is None and not source.has("planted_summary"):
        return None
    title = "Does it find what was planted?"
    if not source.has("planted_summary"):
        return Section("planted", title, [Missing("What was planted is not summed up yet.")])
    records = planted.records(source.dataset)
    figures = planted.Figures(source.dataset)
    panels, curves = [], []
    for layer in figures.layers:
        rows = [r for r in records if r["layer"] == layer]
        shares = [
            Series(what, *([r[c][e] for r in rows] for e in ("value", "low", "high")))
            for c, what in (("p05_S", "p of S < 0.05"), ("p05", "conjunctive p < 0.05"))
        ]
        told = (
            f"Share of significant planted neurons of {layer_name(layer)} by kind; the numbers are in the table below"
        )
        svg = dots([r["kind"] for r in rows], shares, "share of neurons", told, 0.05, (0.0, 1.0))
        panels.append(Panel(f"{layer_name(layer)}: size (mono) and power", told, svg))
        kinds = [r for r in rows if r["auroc"]["value"] is not None]
        marks = [
            Series(what, *([r[c][e] for r in kinds] for e in ("value", "low", "high")))
            for c, what in (("auroc", "log ψ, specific"), ("auroc_two_means", "distance of two centres"))
        ]
        told = f"AUROC of planted kinds against mono in {layer_name(layer)}; the numbers are in the table below"
        svg = dots([r["kind"] for r in kinds], marks, "AUROC against mono", told, 0.5, (None, 1.0))
        panels.append(Panel(f"{layer_name(layer)}: told from mono", told, svg))
        for kind in PLANTED_KINDS[:-1]:
            for least in figures.purities:
                f = figures.get(layer, "p05_frac", kind, least, "specific", "S")
                curves.append([layer_name(layer), kind, number(least, 2),
                               percent_interval(f["value"], f["low"], f["high"]), count(f["n"])])  # fmt: skip
    caption = (
        f"Planted neurons are of known truth; those whose top examples are at least {planted.PURE:.0%} of their "
        f"classes count, and show them evenly: with a balance of at least {PLANTED_BALANCE:g}, of unequal ones both "
        "(noise: all). Left: share that is significant under specific: for mono, one concept, it is the size of the "
        "test and should be near 0.05, dashed; for order2 and order3 it is power. Right: probability that a neuron of "
        "the kind scores above a monosemantic one, with 95 % intervals."
    )
    cells = [[layer_name(r["layer"]), *planted.cells(r)[1:]] for r in records]
    main = Table("Planted neurons", planted.COLUMNS, cells, _PLANTED_NOTE, n_text=2)
    heads = ("layer", "kind", "purity at least", "share with p of S < 0.05", "n")
    note = (
        f"Above purity 0 a neuron of several classes counts only with a balance of at least {PLANTED_BALANCE:g}, an "
        "unequal one with both classes." + left_off(len(curves), "planted_summary")
    )
    every = Table("Significance by purity", heads, curves[:MOST_ROWS], note, n_text=2)
    return Section("planted", title, [Figure("planted", "Size and power", caption, panels, [every]), main])


_PLANTED_NOTE = (
    "purity, balance: means over all neurons of the kind; n ≥ 0.95: those that are as pure, and balanced. Intervals "
    "are of 95 %. An empty cell: the figure does not apply to the kind, or no neuron is pure enough."
)


def hangs_on(source: Source) -> Section | None:
    """Sensitivity to choices; None where nothing was varied."""
    records = sensitivity.variant_table(source.dataset)
    if not records:
        return None
    names = [visible(f"{r['vary']} = {r['value']}", 60) for r in records]
    series = [
        Series(name, *([r["spearman"].get(name, {}).get(c) for r in records] for c in ("estimate", "low", "high")))
        for name in sensitivity.SCORES
    ]
    told = "Spearman correlation of scores with the sweep's, by variant; the numbers are in the table below"
    svg = dots(names, series, "Spearman's correlation with the sweep", told, sensitivity.PAPER_TEXT_HEAD, (None, 1.0))
    rows = [
        [name, *(_correlation(r, score) for score in sensitivity.SCORES),
         *(_estimate(r, c) for c in ("same_k_frac", "adjusted_rand", "called_flip_frac", "D_flip_frac")),
         " → ".join(_whole(r, c) for c in ("n_called_base", "n_called")), count(r["n"])]
        for name, r in zip(names, records, strict=True)
    ]  # fmt: skip
    heads = ("variant", *sensitivity.SCORES, "same k", "Rand", "called by one alone", "D crosses 0.05", "called", "n")
    table = Table("Sensitivity, whole sweep", heads, rows, sensitivity.CAPTION)
    caption = (
        "A row for each variant: the sweep scored again with one thing changed. A mark is the rank correlation of a "
        "score with the sweep's, over the neurons that both scored, with its bootstrap 95 % interval. Read another "
        "seed first: it says how much mere chance changes. The dashed line is what the paper gives for another text "
        f"head ({sensitivity.PAPER_TEXT_HEAD})."
    )
    panel = Panel("Rank correlation with the sweep", told, svg)
    figure = Figure("sensitivity", "What the scores hang on", caption, [panel], [table])
    return Section("sensitivity", "What the result hangs on", [figure])


def _correlation(record: dict[str, Any], score: str) -> str:
    found = record["spearman"].get(score, {})
    return interval(found.get("estimate"), found.get("low"), found.get("high"), 2)


def _estimate(record: dict[str, Any], name: str) -> str:
    return number(record.get(name, {}).get("estimate"), 2)


def _whole(record: dict[str, Any], name: str) -> str:
    value = record.get(name, {}).get("estimate")
    return NOTHING if value is None else count(value)
