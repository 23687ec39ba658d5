"""Language: proximity and activation, beside their controls, of a categorical sweep.

Place in the flow: the middle of the report of a categorical sweep. Source of the figures: arXiv 2505.07831; controls,
intervals and verdicts are ours.
"""

from typing import Any

from polyray.report import categorical
from polyray.report.charts import Series, dots, lines
from polyray.report.content import Block, Facts, Figure, Missing, Panel, Prose, Section, Table
from polyray.report.headline import CONTROLS
from polyray.report.plain import NOTHING, count, interval, number, percent, percent_interval, visible
from polyray.report.scores import MOST_ROWS, left_off, unsummarised
from polyray.report.source import Source, layer_name

CONDITIONS = CONTROLS | {
    "order_same_frequency": "order, equal frequency",
    "members": "other core-tokens",
    "members_same_activation": "the same, equal activation",
    "strangers": "clusters a token is not in",
    "whole_core": "all core-tokens, one cluster",
    "embeddings_same_frequency": "embeddings swapped",
    "directions": "random directions",
    "centre_removed": "mean direction removed",
}
"""Controls in the order in which they are shown; others come after them under their own names."""
_ASKS = {
    "order": "activation order permuted: does the order matter at all?",
    "precursors_matched": "clusters with neurons that are no precursors, of about the same sizes: does it take the "
    "connections?",
    "precursors_random": "clusters with random neurons that are no precursors, whatever their size",
    "tokens_same_frequency": "each taken token by one as frequent that is no core-token: does it take core-tokens?",
    "order_same_frequency": "order permuted among core-tokens of about equal frequency: is it more than frequency?",
    "members": "each taken token by another core-token of the neuron: does it take these tokens?",
    "members_same_activation": "the same, by one of the same decile of activation",
    "strangers": "proximity to the clusters that a token is not in: does it take membership?",
    "whole_core": "all core-tokens as the one cluster: does it take clusters?",
    "embeddings_same_frequency": "each token's embedding by that of another as frequent: does it take its meaning?",
    "directions": "the tokens of highest mean along a random direction of the embeddings: does it take a network?",
    "centre_removed": "the core-tokens' mean direction taken out of their embeddings: is it more than one dimension?",
}
"""What each control breaks, and asks; see categorical/controls.py."""
_VERDICTS = (
    "what is left of the share's excess over one half; kept: more than half of it, gone: less than half, at 95 %; "
    "undecided: neither is shown"
)


def _named(condition: str) -> str:
    return "as it is" if condition == categorical.ACTUAL else CONDITIONS.get(condition, visible(condition))


def deciles(source: Source) -> Section:
    """Dimensional proximity by decile of activation."""
    title = "Proximity by activation decile"
    if not source.has("proximity"):
        return Section("deciles", title, [Missing("No neuron has a proximity yet.")])
    layers = _deciles(source, "proximity", "layer", "difference IS NOT NULL")
    if not layers:
        return Section("deciles", title, [Missing("No neuron qualifies: none has enough taken-clusters.")])
    # A control's list has ten entries for each of its draws.
    drawn = (
        "control IN ('order', 'tokens_same_frequency', 'precursors_random')" if source.has("proximity_controls") else ""
    )
    broken = _deciles(source, "proximity_controls", "control", drawn, quartiles=False) if drawn else []
    whole = next(r for r in layers if r["name"] is None)
    at = list(range(1, 11))
    series = [_series("as it is, with quartiles of the neurons", whole)]
    series += [_series(_named(r["name"]), r) for r in broken if r["name"] is not None]
    ends = [x for r in [*layers, *broken] for c in ("mean", "low", "high") for x in r[c] if x is not None]
    limits = (min(ends), max(ends))
    told = "Mean dimensional proximity by decile of activation, over the whole sweep and under three controls"
    axes = ("decile of activation, 1 the highest", "mean cosine to the taken-clusters")
    panels = [Panel("Whole sweep, beside controls", told, lines(at, series, *axes, told, limits))]
    for r in source.in_order([{"layer": r["name"]} | r for r in layers if r["name"] is not None])[:_MOST_PANELS]:
        told = f"Mean dimensional proximity by decile of activation in {layer_name(r['layer'])}"
        panels.append(Panel(layer_name(r["layer"]), told, lines(at, [_series("", r)], *axes, told, limits)))
    rows = [[_place(r["name"]), count(r["n"]), *(number(x) for x in r["mean"])] for r in _ends_with_whole(layers)]
    rows += [[_named(r["name"]), count(r["n"]), *(number(x) for x in r["mean"])] for r in broken if r["name"]]
    table = Table("Mean dimensional proximity by decile of activation", ("where", "neurons", *map(str, at)), rows)
    caption = (
        "A neuron's core-tokens in ten groups by activation, the strongest first; dimensional proximity is a token's "
        "mean cosine to the other tokens of the taken-clusters. The line is the mean over the neurons that qualify, "
        "the band their quartiles. A line that falls from left to right says: the higher the activation, the nearer. "
        "Where a control falls as steeply, what it breaks does not matter."
    )
    if len(layers) - 1 > _MOST_PANELS:
        caption += f" Only the first {_MOST_PANELS} layers are drawn; all are in the table."
    return Section("deciles", title, [Figure("deciles", "The higher the nearer?", caption, panels, [table])])


_MOST_PANELS = 12


def _ends_with_whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda r: r["name"] is None)


def _place(name: str | None) -> str:
    return layer_name(name)


def _deciles(source: Source, table: str, by: str, where: str, quartiles: bool = True) -> list[dict[str, Any]]:
    """Mean and quartiles over neurons of their ten deciles, by layer or control; `name` None is of all.

    A neuron's draws count as one: their mean. Ten columns are made of the list first, since a row for each of its
    entries would be many times as much.
    """
    columns = ", ".join(
        f"list_avg([x FOR x IN deciles[{d}:len(deciles):10] IF NOT isnan(x)]) AS d{d}" for d in range(1, 11)
    )
    asked = [f"avg(d{d}) AS m{d}" for d in range(1, 11)]
    asked += [f"quantile_cont(d{d}, [0.25, 0.75]) AS q{d}" for d in range(1, 11)] if quartiles else []
    found = source.rows(
        f"SELECT {by} AS name, count(*) AS n, {', '.join(asked)} FROM (SELECT {by}, {columns} FROM {table} "
        f"WHERE {where}) GROUP BY GROUPING SETS (({by}), ()) ORDER BY name"
    )
    rows = []
    for r in found:
        if r["n"]:
            ends = [r.get(f"q{d}") or (None, None) for d in range(1, 11)]
            mean = [r[f"m{d}"] for d in range(1, 11)]
            rows.append(
                {
                    "name": r["name"],
                    "n": r["n"],
                    "mean": mean,
                    "low": [e[0] for e in ends],
                    "high": [e[1] for e in ends],
                }
            )
    return rows


def _series(name: str, row: dict[str, Any]) -> Series:
    return Series(name, row["mean"], row["low"], row["high"])


# Beside the controls


def controls(source: Source) -> Section:
    """Share of positive differences beside its controls, and what they leave of it."""
    title = "Positive share beside its controls"
    records = categorical.records(source.dataset) if source.has("categorical") else []
    if not records:
        return Section("controls", title, [Missing(unsummarised(source, "share of positive differences"))])
    whole = records[-1]["conditions"]
    names = [categorical.ACTUAL, *(c for c in CONDITIONS if c in whole)]
    names += sorted(set(whole) - set(names))
    labels = [_named(c) for c in names]
    told = "Share of positive differences over the whole sweep as it is and under every control; numbers in the table"
    shares = Series("", *([whole[c]["positive" + e] for c in names] for e in ("", "_low", "_high")))
    panels = [
        Panel("Whole sweep", told, dots(labels, [shares], "share with a positive difference", told, 0.5, (None, 1.0)))
    ]
    left = names[1:]
    told = "What each control leaves of the excess over one half"
    remaining = Series("", *([whole[c]["remaining" + e] for c in left] for e in ("", "_low", "_high")))
    svg = dots([_named(c) for c in left], [remaining], "left of the effect: 1 all, 0 none", told, 1.0)
    panels.append(Panel("What a control leaves", told, svg))
    layers = [r for r in records if r["layer"] is not None]
    first = [c for c in (categorical.ACTUAL, *CONTROLS) if c in whole]
    told = "Share of positive differences by layer, as it is and under the controls of the method; numbers in the table"
    series = [_by_layer(_named(c), layers, c, "positive") for c in first]
    names_of = [layer_name(r["layer"]) for r in layers]
    svg = dots(names_of, series, "share with a positive difference", told, 0.5, (None, 1.0))
    panels.append(Panel("By layer, beside the method's controls", told, svg))
    in_turn = sorted(records, key=lambda r: r["layer"] is not None)
    rows = [_line(r["layer"], c, r["conditions"][c]) for r in in_turn for c in names if c in r["conditions"]]
    heads = ("where", "condition", "n", "positive (95 % interval)", "left of the effect", "tau", "first component",
             "verdict")  # fmt: skip
    note = (
        f"Verdict: {_VERDICTS}. n: qualifying neurons with a difference in the condition. Intervals resample layers "
        "and token groups, since neurons that share tokens are not independent. A dash: the figure does not exist "
        "there (with one cluster there is no second component; of one token group there is no interval)."
        + left_off(len(rows), "categorical")
    )
    every = Table("Every condition", heads, rows[:MOST_ROWS], note, n_text=2, last_is_text=True)
    caption = (
        "A difference is positive when the core-tokens of highest activation are nearer to the taken-clusters than "
        "those of lowest. The first row is the neurons as they are; in each other row one thing is broken, over the "
        "same neurons. Near 0.5, dashed, nothing is left; as high as the first row: the effect does not depend on what "
        "was broken. Lines are 95 % intervals."
    )
    broken = Facts([(_named(c), _ASKS.get(c, "see categorical/controls.py")) for c in left])
    figure = Figure("controls", "As it is, and with one thing broken", caption, panels, [every])
    return Section("controls", title, [figure, Prose("What each control breaks, and asks:"), broken])


def _by_layer(label: str, layers: list[dict[str, Any]], condition: str, name: str) -> Series:
    rows = [r["conditions"].get(condition, {}) for r in layers]
    return Series(label, *([r.get(name + e) for r in rows] for e in ("", "_low", "_high")))


def _line(layer: str | None, condition: str, row: dict[str, Any]) -> list[str]:
    def figure(name: str) -> str:
        return interval(row[name], row[name + "_low"], row[name + "_high"], 2)

    positive = percent_interval(row["positive"], row["positive_low"], row["positive_high"])
    verdict = NOTHING if row["verdict"] is None else visible(row["verdict"])
    return [layer_name(layer), _named(condition), count(row["n"]), positive, figure("remaining") if
            condition != categorical.ACTUAL else NOTHING, figure("tau"), figure("first"), verdict]  # fmt: skip


# tau, components, signatures

_BESIDE = (categorical.ACTUAL, "order", "precursors_random")


def components(source: Source) -> Section:
    """tau and the first principal component by layer, and the failure signatures."""
    title = "Tau, components and failure signatures"
    records = categorical.records(source.dataset) if source.has("categorical") else []
    blocks: list[Block] = []
    if records:
        names = [layer_name(r["layer"]) for r in records]
        panels = []
        for name, axis, reference in (("tau", "Kendall's tau", 0.0), ("first", "share of the first component", 0.5)):
            series = [_by_layer(_named(c), records, c, name) for c in _BESIDE]
            told = f"{axis} by layer, as it is and under two controls; the numbers are in the table below"
            panels.append(Panel(axis, told, dots(names, series, axis, told, reference, (None, 1.0))))
        rows = [
            [name, *(_cell(r, c, x) for x in ("tau", "first") for c in _BESIDE),
             visible(r["conditions"][categorical.ACTUAL]["diagnosis"] or "")]
            for name, r in zip(names, records, strict=True)
        ]  # fmt: skip
        heads = ("layer", "tau", "tau, order permuted", "tau, random precursors", "first component",
                 "first, order permuted", "first, random precursors", "diagnosis")  # fmt: skip
        table = Table("Tau and the first component by layer", heads, rows, last_is_text=True)
        caption = (
            "Left: rank correlation of activation decile and mean proximity, pooled over the neurons; 1: each decile "
            "is nearer than the one below. With ten deciles it is near 1 as soon as there is any trend, which is why "
            "it stands beside its controls. Right: share of the first principal component of the (token × "
            "taken-cluster) matrix, mean over neurons; below 0.5, dashed, the paper's own account would fail. "
            "Permuting the order cannot change the component."
        )
        blocks.append(Figure("tau", "Tau and the first component", caption, panels, [table]))
    else:
        blocks.append(Missing(unsummarised(source, "tau or first component")))
    blocks += _signatures(source)
    return Section("components", title, blocks)


def _cell(record: dict[str, Any], condition: str, name: str) -> str:
    row = record["conditions"].get(condition)
    return NOTHING if row is None else interval(row[name], row[name + "_low"], row[name + "_high"], 2)


def _signatures(source: Source) -> list[Block]:
    if not source.has("proximity"):
        return []
    rows = source.rows(
        "SELECT name, count(*) AS n, sum(CASE WHEN status = 'ok' THEN 1 ELSE 0 END)::BIGINT AS n_ok FROM (SELECT "
        "status, unnest(string_split(diagnosis, '; ')) AS name FROM proximity) GROUP BY name ORDER BY n DESC, name"
    )
    whole = source.rows("SELECT count(*) AS n FROM proximity")[0]["n"]
    cells = [
        [visible(r["name"]).replace("_", " "), count(r["n"]), percent(r["n"] / whole), count(r["n_ok"])] for r in rows
    ]
    note = "Of all neurons swept; those with few taken-clusters do not qualify, so that nothing else is known of them."
    heads = ("signature", "neurons", "share", "of them qualify")
    found: list[Block] = [Table("Failure signatures of neurons", heads, cells, note)] if cells else []
    return [*found, *_clamps(source)]


def _clamps(source: Source) -> list[Block]:
    if not source.has("clamps"):
        return []
    rows = source.rows(
        "SELECT quantile, count(*) AS n, avg(kl) AS kl, avg(control_kl) AS control_kl, "
        "avg(CASE WHEN kl > control_kl THEN 1.0 WHEN kl <= control_kl THEN 0.0 END) AS above, "
        "avg(list_avg([abs(x[1]) / nullif(x[2], 0) FOR x IN list_zip(change, deviation)])) AS moved, "
        "avg(list_avg([abs(x[1]) / nullif(x[2], 0) FOR x IN list_zip(control_change, deviation)])) "
        "AS control_moved FROM clamps WHERE status = 'ok' GROUP BY quantile ORDER BY quantile"
    )
    cells = [
        [number(r["quantile"], 2), count(r["n"]), number(r["moved"]), number(r["control_moved"]), number(r["kl"], 5),
         number(r["control_kl"], 5), percent(r["above"])]
        for r in rows
    ]  # fmt: skip
    heads = ("held at quantile", "neurons", "fed neurons move, sd", "the same, control held", "KL, nats", "KL, control",
             "KL above control's")  # fmt: skip
    note = (
        "A neuron is held at a quantile of its own distribution at its core-tokens; the control is a random neuron of "
        "equal scale. Means over neurons and those that they feed of the absolute value of the mean change, in "
        "standard deviations of the one that is fed, and of the divergence of the output distribution; a dash: the "
        "model has no head."
    )
    return [Table("Clamps: what holding a neuron does", heads, cells, note)] if cells else []
