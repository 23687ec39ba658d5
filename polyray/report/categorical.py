"""Categorical: what the census of a language model came to, as a table and a figure, from the dataset alone.

Place in the flow: after the last stage; `polyray run` prints the one and writes the other to OUT/categorical.png. No
headline stands without its controls.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from polyray.dataset import Dataset
from polyray.report.summary import series, shown

ACTUAL = "actual"
METHOD = ("order", "precursors_matched", "precursors_random", "tokens_same_frequency")
"""The controls of the method: activation order permuted; other precursors, of matched overlap and at random; taken
tokens replaced by others as frequent."""
COLUMNS = (
    "layer",
    "neurons",
    "qualify",
    "positive",
    "order permuted",
    "precursors matched",
    "precursors random",
    "tokens replaced",
    "tau",
    "p < 0.05",
    "first comp.",
    "diagnosis",
)
CAPTION = (
    "qualify: neurons with enough taken-clusters. positive: share of them whose core-tokens of highest activation are "
    "nearer to the taken-clusters than those of lowest, with a 95 % interval that resamples layers and token groups; "
    "then the same share with one thing broken: what does not lower it is not what the effect depends on. tau: of "
    "activation decile and mean proximity, pooled. p: Kruskal-Wallis over deciles. first comp.: mean share of the "
    "first principal component. All conditions, with intervals and verdicts: table categorical."
)
_COLOURS = (
    "#d62728",
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)


def records(dataset: Dataset) -> list[dict[str, Any]]:
    """One record for each layer in order, and a last one, `layer` None, for the sweep: `conditions` has the rows of
    `categorical` by condition."""
    rows = dataset["categorical"].to_table().to_pylist()
    layers = sorted({r["layer"] for r in rows if r["layer"] is not None}, key=lambda name: int(name.rpartition(".")[2]))
    found = []
    for layer in [*layers, None]:
        of = {r["condition"]: r for r in rows if r["layer"] == layer}
        if of:
            found.append({"layer": layer, "n_neurons": of[ACTUAL]["n_neurons"], "conditions": of})
    return found


def cells(record: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of `COLUMNS`."""
    of = record["conditions"]
    actual = of[ACTUAL]
    return [
        record["layer"] or "all",
        f"{record['n_neurons']:,}",
        f"{actual['n']:,}",
        _interval(actual, "positive"),
        *(_interval(of.get(name), "positive") for name in METHOD),
        _interval(actual, "tau"),
        shown(actual["kruskal"], 2),
        shown(actual["first"], 2),
        actual["diagnosis"] or "",
    ]


def _interval(row: dict[str, Any] | None, name: str) -> str:
    if row is None:
        return "–"
    value, low, high = (shown(row[name + end], 2) for end in ("", "_low", "_high"))
    return value if row[name + "_low"] is None else f"{value} ({low}–{high})"


def draw(dataset: Dataset, path: Path) -> Path:
    """Draws the share of positive differences by layer, of the neurons as they are and under every control.

    Args:
        dataset: the sweep.
        path: where the PNG goes; replaced where it exists.

    Returns:
        The path.
    """
    found = [r for r in records(dataset) if r["layer"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.5, 5.2), layout="constrained", width_ratios=[1, 1.3])
    names = list(found[0]["conditions"]) if found else []
    first = [ACTUAL, *(n for n in METHOD if n in names)]
    _shares(left, found, first, "the controls of the method")
    _shares(right, found, [ACTUAL, *sorted(set(names) - set(first))], "further controls")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _shares(axes: Axes, found: list[dict[str, Any]], names: list[str], title: str) -> None:
    x = np.arange(len(found))
    for i, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        rows = [r["conditions"].get(name, {}) for r in found]
        value, low, high = (series(rows, "positive" + end) for end in ("", "_low", "_high"))
        at = x + (i - (len(names) - 1) / 2) * 0.07
        label = name.replace("_", " ")
        axes.vlines(at, low, high, color=colour, linewidth=1.2)
        axes.plot(at, value, "o-" if name == ACTUAL else "o", color=colour, markersize=4, linewidth=1, label=label)
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set_xticks(x, [r["layer"] for r in found])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share with a positive difference")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, ncols=2)
