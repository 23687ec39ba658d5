"""Scores: real against null neurons, by depth, and the three components against each other.

Place in the flow: the middle of the report of a PSI sweep. Source of the figures: arXiv 2508.16950, figure 2 and
table 1; the other presets, the other nulls and the intervals are ours.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyray.report.charts import Hexes, Series, dots, hexagons, lines
from polyray.report.content import Block, Figure, Missing, Panel, Prose, Section, Table
from polyray.report.plain import NOTHING, count, interval, number, p_value, percent, visible
from polyray.report.source import Source, layer_name
from polyray.report.summary import AUROC_AGAINST
from polyray.schema import NULL_KINDS, PRESETS

FEWEST_BINS, MOST_BINS = 16, 48
"""Bins of a density: the more neurons, the more."""
N_ACROSS = 18
"""Hexagons from left to right of a plane: few enough that a table of them can be read."""
MOST_ROWS = 3000
"""Most rows of a folded table; the dataset has the rest."""
CHANCE = 3 * math.log(0.5)
"""log ψ where no component is beyond chance."""
SCORES = ("log_psi", "S", "Q", "D", "S*Q")
_SCORE = {"log_psi": "log ψ", "S": "Ŝ alone", "Q": "Q̂ alone", "D": "D̂ alone", "S*Q": "Ŝ·Q̂"}
_KIND = {"real": "real neurons", "rotation": "null: rotation", "pool": "null: pool", "one_concept": "null: one concept"}
_ASKS = {
    "paper": "what the paper asks: is this beyond random directions, labels and names?",
    "selective": "is the neuron selective at all, beside random patches of its layer?",
    "specific": "does it respond to more than one thing, beside patches of one concept?",
}
_PLANES = (("S", "Q"), ("S", "D"), ("Q", "D"))
SIGNS = {"all three": "dot", "same concept, two classes": "ring", "low-level split": "vee"}
"""Sign of a hexagon most of whose neurons have the pattern."""


def left_off(n: int, table: str) -> str:
    """What a note says of rows that are left out of a table with so many: nothing where there are none."""
    return "" if n <= MOST_ROWS else f" These are the first {count(MOST_ROWS)} of {count(n)} rows; {table} has all."


def distributions(source: Source) -> Section:
    """log_psi of real against null neurons, under each preset."""
    title = "log ψ of real against null neurons"
    if not source.has("neurons"):
        return Section("log-psi", title, [Missing("No neuron is calibrated yet.")])
    panels, tables, summary = [], [], []
    for preset in PRESETS:
        moments = {
            r["kind"]: r
            for r in source.rows(
                f"SELECT kind, count(*) AS n, quantile_cont(v, [0.005, 0.25, 0.5, 0.75]) AS at FROM {_log_psi(preset)} "
                "GROUP BY kind"
            )
        }
        summary += [_moments(preset, kind, moments.get(kind)) for kind in _KIND]
        if not moments:
            continue
        low = min(0.99 * CHANCE, *(r["at"][0] for r in moments.values()))
        n_bins = _bins_for(min(r["n"] for r in moments.values()))
        width = -low / n_bins
        counts = {kind: np.zeros(n_bins, np.int64) for kind in _KIND if kind in moments}
        # log_psi is at most 0; what is below the axis is left out of the picture, and counted in the table.
        for r in source.rows(
            f"SELECT kind, least(floor((v - $low) / $width), {n_bins - 1})::INT AS bin, count(*) AS n "
            f"FROM {_log_psi(preset)} WHERE v >= $low GROUP BY ALL",
            {"low": low, "width": width},
        ):
            counts[r["kind"]][r["bin"]] = r["n"]
        centres = [low + (i + 0.5) * width for i in range(n_bins)]
        series = [Series(_KIND[k], (c / (moments[k]["n"] * width)).tolist()) for k, c in counts.items()]
        told = f"Density of log psi under {preset}: " + "; ".join(
            f"{_KIND[k]}, median {number(moments[k]['at'][2], 2)}" for k in counts
        )
        axes = (f"log ψ, {preset}", "share of neurons per unit of log ψ")
        svg = lines(centres, series, *axes, told, (0.0, None), CHANCE, (low, 0.0))
        panels.append(Panel(f"{preset}: {_ASKS[preset]}", told, svg))
        tables.append(_bins(preset, low, width, counts, moments))
    if not panels:
        return Section("log-psi", title, [Missing("No neuron has a calibrated score: see what was left out, and why.")])
    caption = (
        "A line for the real neurons, and one for each kind of null neuron, each of area 1. Where real neurons lie to "
        "the right of a kind of null neuron, they are more than that null; where two lines cover each other, nothing "
        f"tells them apart. The dashed line is chance ({number(CHANCE, 2)}): no component beyond its null. The lowest "
        "half per cent is cut off. What answers a preset's question is the null of its own: rotation for paper, pool "
        "for selective, one concept for specific."
    )
    heads = ("preset and kind", "neurons", "lower quartile", "median", "upper quartile")
    table = Table("log ψ by preset and kind of neuron", heads, summary)
    figure = Figure("log-psi", "Density of log ψ under each preset", caption, panels, [table, *tables])
    return Section("log-psi", title, [figure])


def _log_psi(preset: str) -> str:
    """A query of kind and log_psi of all neurons that have one."""
    column = f"{preset}_log_psi"
    return (
        f"(SELECT kind, v FROM (SELECT 'real' AS kind, {column} AS v FROM neurons WHERE status = 'ok' "
        f"UNION ALL SELECT kind, {column} AS v FROM null_neurons) WHERE v IS NOT NULL AND NOT isnan(v))"
    )


def _bins_for(n: int) -> int:
    return min(MOST_BINS, max(FEWEST_BINS, round(4 * n ** (1 / 3))))


def _moments(preset: str, kind: str, found: dict[str, Any] | None) -> list[str]:
    cells = ["0", NOTHING, NOTHING, NOTHING] if found is None else [
        count(found["n"]), *(number(x, 3) for x in found["at"][1:])
    ]  # fmt: skip
    return [f"{preset}, {_KIND[kind]}", *cells]


def _bins(
    preset: str, low: float, width: float, counts: dict[str, NDArray[np.int64]], moments: dict[str, Any]
) -> Table:
    below = ["below", *(count(moments[k]["n"] - int(c.sum())) for k, c in counts.items())]
    rows = [
        [f"{number(low + i * width, 2)} to {number(low + (i + 1) * width, 2)}", *(count(c[i]) for c in counts.values())]
        for i in range(len(next(iter(counts.values()))))
    ]
    heads = ["log ψ", *(_KIND[k] for k in counts)]
    return Table(f"Neurons by log ψ, {preset}", heads, [below, *rows])


# AUROC and ablations


def aurocs(source: Source) -> Section:
    """AUROC of log_psi and of its ablations, real against null neurons."""
    title = "AUROC and ablations"
    rows = source.in_order(source.rows("SELECT * FROM layer_summary WHERE metric = 'auroc'"))
    if not rows:
        return Section("auroc", title, [Missing(unsummarised(source, "AUROC"))])
    of = {(r["layer"], r["preset"], r["null_kind"], r["score"]): r for r in rows}
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    names = [layer_name(x) for x in layers]

    def series(name: str, keys: list[tuple[Any, ...]]) -> Series:
        found = [of.get(k, {}) for k in keys]
        value, low, high = ([r.get(c) for r in found] for c in ("value", "low", "high"))
        return Series(name, value, low, high)

    by_layer = [
        series(f"{preset}, against {kind.replace('_', ' ')}", [(x, preset, kind, "log_psi") for x in layers])
        for preset, kind in AUROC_AGAINST.items()
    ]
    told = "AUROC of log psi by layer, each preset against its own null; the numbers are in the table below"
    panels = [Panel("log ψ by layer", told, dots(names, by_layer, "AUROC", told, 0.5, (None, 1.0)))]
    for preset in PRESETS:
        marks = [series(kind.replace("_", " "), [(None, preset, kind, s) for s in SCORES]) for kind in NULL_KINDS]
        told = f"AUROC of log psi and its ablations over the whole sweep, preset {preset}, against each kind of null"
        svg = dots([_SCORE[s] for s in SCORES], marks, f"AUROC, {preset}", told, 0.5, (None, 1.0))
        panels.append(Panel(f"Ablations, {preset}, whole sweep", told, svg))
    short = [[layer_name(x), *(_auroc(of.get((x, p, k, "log_psi"))) for p, k in AUROC_AGAINST.items())] for x in layers]
    heads = ["layer", *(f"{p}, against {k.replace('_', ' ')}" for p, k in AUROC_AGAINST.items())]
    note = "A dash: too few neurons of either kind."
    main = Table("AUROC of log ψ, real against null neurons, with bootstrap 95 % intervals", heads, short, note)
    full = [
        [layer_name(r["layer"]), r["preset"], r["null_kind"].replace("_", " "), _SCORE.get(r["score"], r["score"]),
         _auroc(r), count(r["n"])]
        for r in sorted(rows, key=lambda r: r["layer"] is not None)
        if r["layer"] is None or r["null_kind"] == AUROC_AGAINST.get(r["preset"])
    ]  # fmt: skip
    every = Table(
        "AUROC of every score: of layers against the preset's own null, of the sweep against every kind",
        ("layer", "preset", "against", "score", "AUROC (95 % interval)", "n"), full[:MOST_ROWS], n_text=4,
        note="n: the smaller of the two sides. The table layer_summary has every kind by layer too."
        + left_off(len(full), "layer_summary"),
    )  # fmt: skip
    caption = (
        "A mark is the probability that a real neuron has the higher score than a null neuron; its line is the "
        "bootstrap 95 % interval; 0.5, dashed, is chance. Layers in order of depth from the top. An ablation leaves "
        "components out: where one does as well as log ψ, the others add nothing against that null. Random directions "
        "are the floor of S and random names the ceiling of D, so that rotation says little of either; discoveries "
        "rest on specific against one concept."
    )
    figure = Figure("auroc", "How well real neurons are told from null ones", caption, panels, [every])
    return Section("auroc", title, [figure, main])


def _auroc(row: dict[str, Any] | None) -> str:
    return NOTHING if row is None else interval(row["value"], row["low"], row["high"])


def unsummarised(source: Source, what: str) -> str:
    """Why there is no figure that needs all layers."""
    if source.dataset.is_finished:
        return f"There is no {what}: the sweep has no row of it."
    return f"There is no {what} yet: it is made by the last stages, which need every layer."


# Depth


def depth(source: Source) -> Section:
    """Does polysemanticity change with depth?"""
    title = "Depth"
    if not source.has("neurons"):
        return Section("depth", title, [Missing("No neuron is calibrated yet.")])
    columns = ", ".join(
        f"quantile_cont({p}_log_psi, [0.25, 0.5, 0.75]) FILTER (NOT isnan({p}_log_psi)) AS {p}" for p in PRESETS
    )
    rows = source.in_order(source.rows(f"SELECT layer, {columns} FROM neurons WHERE status = 'ok' GROUP BY layer"))
    rows = [r for r in rows if any(r[p] is not None for p in PRESETS)]
    if not rows:
        return Section("depth", title, [Missing("No neuron has a calibrated score.")])
    panels = []
    for preset in PRESETS:
        at = [r[preset] or [None] * 3 for r in rows]
        quartiles = Series("median, quartiles", [q[1] for q in at], [q[0] for q in at], [q[2] for q in at])
        told = f"Median and quartiles of log psi by layer under {preset}; the numbers are in the table below"
        svg = dots([layer_name(r["layer"]) for r in rows], [quartiles], f"log ψ, {preset}", told, CHANCE)
        panels.append(Panel(preset, told, svg))
    cells = [[layer_name(r["layer"]), *(_quartiles(r[p]) for p in PRESETS)] for r in rows]
    quarters = Table("Median log ψ by layer (quartiles of the neurons)", ("layer", *PRESETS), cells)
    caption = (
        "A mark is the median over a layer's scored neurons, its line reaches from the lower to the upper quartile of "
        "the neurons (it is no interval of confidence). Layers in order of depth from the top. The dashed line is "
        f"chance ({number(CHANCE, 2)})."
    )
    figure = Figure("depth", "log ψ by layer", caption, panels, [quarters])
    return Section("depth", title, [figure, *_trends(source)])


def _quartiles(at: list[float] | None) -> str:
    return NOTHING if at is None else f"{number(at[1], 2)} ({number(at[0], 2)} to {number(at[2], 2)})"


def _trends(source: Source) -> list[Block]:
    rows = source.in_order(
        source.rows(
            "SELECT * FROM layer_summary WHERE metric IN ('depth_tau', 'depth_tau_p', 'step_median', 'step_p') "
            "ORDER BY preset, score"
        )
    )
    if not rows:
        n = len(source.layers)
        why = (
            "There is one layer only, so that there is no trend with depth."
            if n == 1
            else unsummarised(source, "trend")
        )
        return [Missing(why)]
    of = {(r["layer"], r["metric"], r["preset"], r["score"]): r for r in rows}

    def cells(layer: str | None, metric: str, p: str, preset: str, score: str) -> list[str]:
        figure = of.get((layer, metric, preset, score), {})
        low, high = figure.get("low"), figure.get("high")
        sure = of.get((layer, p, preset, score), {})
        return [interval(figure.get("value"), low, high), p_value(sure.get("value"))]

    scores = ("log_psi", "S", "Q", "D")
    taus = [
        [f"{preset}, {_SCORE[s]}", *cells(None, "depth_tau", "depth_tau_p", preset, s)]
        for preset in PRESETS
        for s in scores
    ]
    steps = [
        [layer_name(x), preset, *cells(x, "step_median", "step_p", preset, "log_psi")]
        for x in source.layers
        for preset in PRESETS
        if (x, "step_median", preset, "log_psi") in of
    ]
    note = (
        "Kendall's tau-b of depth and score over all neurons, −1 to 1; above 0: scores rise with depth. p takes "
        "neurons for independent, which those of one layer are not: go by tau and its interval."
    )
    found: list[Block] = [Table("Do scores rise with depth?", ("score", "tau (95 % interval)", "p"), taus, note)]
    heads = ("layer", "preset", "difference (95 % interval)", "p")
    caption = "Median log ψ of a layer less that of the layer before"
    note = (
        "p: Mann and Whitney's test, one-sided: is the later layer above? It takes neurons for independent, and asks "
        "of all ranks rather than of the medians." + left_off(len(steps), "layer_summary")
    )
    found.append(Table(caption, heads, steps[:MOST_ROWS], note, n_text=2, folded=True))
    return found


# S, Q and D


def components(source: Source) -> Section:
    """S, Q and D against each other, with the diagnosed regions."""
    title = "S, Q and D against each other"
    if not source.has("neurons"):
        return Section("components", title, [Missing("No neuron is calibrated yet.")])
    columns = "specific_S_z AS s, specific_Q_z AS q, specific_D_z AS d"
    diagnosed = source.has("neuron_summary")
    frame = source.table(
        f"SELECT {columns}, specific_p < 0.05 AS conjunction, {'diagnosis' if diagnosed else 'NULL::VARCHAR'} AS said "
        f"FROM {'neurons_with_summary' if diagnosed else 'neurons'} WHERE status = 'ok' AND specific_p IS NOT NULL "
        "AND NOT isnan(specific_S_z) AND NOT isnan(specific_Q_z) AND NOT isnan(specific_D_z)"
    )
    if not frame.num_rows:
        return Section("components", title, [Missing("No neuron has a calibrated score.")])
    z = {c: frame[c.lower()].to_numpy() for c in ("S", "Q", "D")}
    patterns = {"all three": frame["conjunction"].to_numpy(zero_copy_only=False).astype(bool)}
    said = frame["said"].combine_chunks().dictionary_encode()
    words = said.dictionary.to_pylist()
    codes = said.indices.fill_null(-1).to_numpy()
    for name in ("same concept, two classes", "low-level split"):
        having = [i for i, word in enumerate(words) if name in word.split("; ")]
        patterns[name] = np.isin(codes, having)
    panels, rows = [], []
    for a, b in _PLANES:
        limits = _limits(z[a], z[b])
        found = _hexes(z[a], z[b], patterns, limits)
        told = (
            f"{frame.num_rows} neurons by z of {a} and z of {b} under specific, in hexagons; the table has their counts"
        )
        svg = hexagons(Hexes([(x, y, n, sign) for x, y, n, sign, _ in found], _width(limits)), f"z of {a}, specific",
                       f"z of {b}, specific", told, limits)  # fmt: skip
        panels.append(Panel(f"{b} against {a}", told, svg))
        rows += [
            [f"{a}, {b}", number(x, 2), number(y, 2), count(n), *(count(of[p]) for p in SIGNS)]
            for x, y, n, _, of in found
        ]
    caption = (
        "Each neuron's z under the preset specific: how many standard deviations of the one-concept null its score "
        "lies above that null's mean; 0, dashed, is the mean. The stronger the colour of a hexagon, the more neurons "
        "(by the logarithm). A sign says what more than half of a hexagon's neurons are: a dot, S, Q and D all beyond "
        "chance (p < 0.05); a ring, “same concept, two classes” (Q beyond chance, D not); a V, “low-level split” (S "
        "beyond chance, Q and D not). The outermost half per cent on each side is drawn at the edge."
    )
    if not diagnosed:
        caption += " Diagnoses are not made yet, so that there are dots alone."
    heads = ("plane", "z across", "z up", "neurons", "all three", "same concept, two classes", "low-level split")
    hexes = Table("Neurons of every hexagon, by its centre", heads, rows)
    figure = Figure("components", "Three planes of three components", caption, panels, [hexes])
    return Section("components", title, [figure, *_diagnoses(source, diagnosed)])


def _limits(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float, float]:
    ends = []
    for values in (x, y):
        low, high = np.quantile(values, [0.005, 0.995])
        room = max(0.04 * (high - low), 0.25)
        ends += [float(min(low, 0) - room), float(max(high, 0) + room)]
    return ends[0], ends[1], ends[2], ends[3]


def _width(limits: tuple[float, float, float, float]) -> float:
    return (limits[1] - limits[0]) / (N_ACROSS + 1)


def _hexes(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    patterns: dict[str, NDArray[np.bool_]],
    limits: tuple[float, float, float, float],
) -> list[tuple[float, float, int, str | None, dict[str, int]]]:
    """Centre, neurons, sign and neurons of each pattern of every hexagon that holds any.

    The plane is a square on the page, so that both axes are taken in units of their own length; the centres of hexagons
    are two grids, one shifted by half a step.
    """
    x0, x1, y0, y1 = limits
    across = (x.clip(x0, x1) - x0) / (x1 - x0) * (N_ACROSS + 1) - 0.5
    up = ((y.clip(y0, y1) - y0) / (y1 - y0) * (N_ACROSS + 1) - 0.5) / math.sqrt(3)
    near = [(np.round(across - h), np.round(up - h), h) for h in (0.0, 0.5)]
    far = [(across - a - h) ** 2 + 3 * (up - b - h) ** 2 for a, b, h in near]
    first = far[0] <= far[1]
    twice_a = np.where(first, 2 * near[0][0], 2 * near[1][0] + 1).astype(np.int64)
    twice_b = np.where(first, 2 * near[0][1], 2 * near[1][1] + 1).astype(np.int64)
    keys, index = np.unique(np.stack([twice_a, twice_b], axis=1), axis=0, return_inverse=True)
    index = index.reshape(-1)
    n = np.bincount(index, minlength=len(keys))
    of = {name: np.bincount(index[mask], minlength=len(keys)) for name, mask in patterns.items()}
    found = []
    for i, (a, b) in enumerate(keys.tolist()):
        sign = next((SIGNS[p] for p in SIGNS if 2 * of[p][i] > n[i]), None)
        centre_x = x0 + (a / 2 + 0.5) / (N_ACROSS + 1) * (x1 - x0)
        centre_y = y0 + (b / 2 * math.sqrt(3) + 0.5) / (N_ACROSS + 1) * (y1 - y0)
        found.append((centre_x, centre_y, int(n[i]), sign, {p: int(c[i]) for p, c in of.items()}))
    return found


def _diagnoses(source: Source, diagnosed: bool) -> list[Block]:
    asked = "SELECT specific_S_p < 0.05 AS s, specific_Q_p < 0.05 AS q, specific_D_p < 0.05 AS d, count(*) AS n FROM"
    beyond = source.rows(
        f"{asked} neurons WHERE status = 'ok' AND specific_p IS NOT NULL GROUP BY ALL ORDER BY n DESC, 1, 2, 3"
    )
    nulls = {
        (r["s"], r["q"], r["d"]): r["n"]
        for r in source.rows(f"{asked} null_neurons WHERE kind = 'one_concept' AND specific_p IS NOT NULL GROUP BY ALL")
    }
    whole, n_null = sum(r["n"] for r in beyond), sum(nulls.values())

    def by_chance(*patterns: tuple[bool | None, bool | None, bool | None]) -> str:
        """Share of the null neurons that have one of some patterns, None for whatever a component does."""
        hits = sum(n for of, n in nulls.items() if any(all(a is None or a == b for a, b in zip(p, of, strict=True))
                                                       for p in patterns))  # fmt: skip
        return percent(hits / n_null) if n_null else NOTHING

    def yes(value: bool | None) -> str:
        return NOTHING if value is None else "yes" if value else "no"

    rows = [
        [yes(r["s"]), yes(r["q"]), yes(r["d"]), count(r["n"]), percent(r["n"] / whole),
         by_chance((r["s"], r["q"], r["d"]))]
        for r in beyond
    ]  # fmt: skip
    note = (
        "A component is beyond chance where its p under specific is below 0.05, not corrected. Beside it the share of "
        f"the {count(n_null)} null neurons of one concept of which the same is true."
    )
    heads = ("S beyond chance", "Q beyond chance", "D beyond chance", "neurons", "share", "null neurons")
    found: list[Block] = [Table("Which components are beyond chance", heads, rows, note, n_text=3)]
    if not diagnosed:
        return [*found, Missing("Diagnoses are made by the last stages, which need every layer.")]
    named = source.rows(
        "SELECT name, count(*) AS n FROM (SELECT unnest(string_split(diagnosis, '; ')) AS name FROM neuron_summary) "
        "GROUP BY name ORDER BY n DESC, name"
    )
    if not named:
        return [*found, Prose("No neuron has a diagnosis.")]
    total = source.rows("SELECT count(*) AS n FROM neuron_summary")[0]["n"]
    scored = {"low-level split": by_chance((True, False, False)),
              "same concept, two classes": by_chance((None, True, False))}  # fmt: skip
    cells = [
        [visible(r["name"]), count(r["n"]), percent(r["n"] / total), scored.get(r["name"], NOTHING)] for r in named
    ]
    note = (
        "Of all neurons; one neuron may have several. Dead, constant and too few examples are excluded neurons. The "
        "two that rest on p have the share of null neurons of one concept beside them: so many have it by chance."
    )
    return [*found, Table("Diagnoses", ("diagnosis", "neurons", "share", "null neurons"), cells, note)]
