"""Planted: what the census recovered of neurons of known truth, as a table and a figure, from the dataset alone.

Place in the flow: after the last stage of a sweep with planted neurons; `polyray run` prints the one and writes the
other to OUT/planted.png.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from polyray.dataset import Dataset
from polyray.schema import PLANTED_KINDS

COLUMNS = (
    "layer",
    "kind",
    "purity",
    "balance",
    "n ≥ 0.95",
    "p_S < 0.05",
    "p < 0.05",
    "AUROC log ψ",
    "AUROC two means",
    "k right",
    "names hit",
)
PURE = 0.95
"""Least purity of the neurons that are tabled: below it the truth itself is not true."""
_COLOURS = dict(zip(PLANTED_KINDS, ("#1f77b4", "#d62728", "#ff7f0e", "#9467bd", "#2ca02c", "#7f7f7f"), strict=True))
_SCORES = (
    ("paper", "log_psi"),
    ("selective", "log_psi"),
    ("specific", "log_psi"),
    ("specific", "S"),
    ("specific", "Q"),
    ("specific", "D"),
    ("specific", "S*Q"),
    (None, "two_means"),
)
_ORDER = {"mono": 1, "order2": 2, "order3": 3, "siblings": 2, "unequal": 2}


class Figures:
    """Rows of `planted_summary`, to be asked for.

    Args:
        dataset: a sweep with planted neurons.
    """

    def __init__(self, dataset: Dataset) -> None:
        depth = {r["layer"]: r["depth"] for r in dataset["layers"].to_table().to_pylist()}
        self.layers = sorted(depth, key=lambda layer: depth[layer])
        rows = dataset["planted_summary"].to_table().to_pylist()
        keys = ("layer", "metric", "kind", "min_purity", "preset", "score")
        self.purities = sorted({r["min_purity"] for r in rows})
        self.ks = sorted({int(r["score"]) for r in rows if r["metric"] == "k_frac"})
        self._rows = {tuple(r[k] for k in keys): r for r in rows}

    def get(
        self, layer: str, metric: str, kind: str, least: float, preset: str | None = None, score: str | None = None
    ) -> dict[str, Any]:
        """One figure: value, low, high, n; all but n None where there is none."""
        nothing = {"value": None, "low": None, "high": None, "n": 0}
        return self._rows.get((layer, metric, kind, least, preset, score), nothing)


def records(dataset: Dataset) -> list[dict[str, Any]]:
    """One record for each layer and kind: what `COLUMNS` says, for the neurons of purity at least 0.95.

    Purity and balance are means over all scored neurons of the kind. AUROCs are against monosemantic neurons. For
    noise, which has no purity, p is of all its neurons.
    """
    figures = Figures(dataset)
    found = []
    for layer in figures.layers:
        for kind in PLANTED_KINDS:
            least = 0.0 if kind == "noise" else PURE

            def get(metric: str, preset: str | None = None, score: str | None = None) -> dict[str, Any]:
                return figures.get(layer, metric, kind, least, preset, score)  # noqa: B023 - called at once

            found.append(
                {
                    "layer": layer,
                    "kind": kind,
                    "purity": figures.get(layer, "purity", kind, 0.0)["value"],
                    "balance": figures.get(layer, "balance", kind, 0.0)["value"],
                    "n": get("p05_frac", "specific", "p")["n"],
                    "p05_S": get("p05_frac", "specific", "S"),
                    "p05": get("p05_frac", "specific", "p"),
                    "auroc": get("auroc", "specific", "log_psi"),
                    "auroc_two_means": get("auroc", None, "two_means"),
                    "k_right": get("k_frac", score=str(_ORDER[kind]))["value"] if _ORDER.get(kind, 1) > 1 else None,
                    "name_hit": get("name_hit_frac")["value"],
                }
            )
    return found


def cells(record: dict[str, Any]) -> list[str]:
    """A record as text, in the order of `COLUMNS`."""

    def plain(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def with_interval(figure: dict[str, Any]) -> str:
        if figure["value"] is None:
            return ""
        interval = "" if figure["low"] is None else f" [{figure['low']:.2f}, {figure['high']:.2f}]"
        return f"{figure['value']:.3f}{interval}"

    return [
        record["layer"],
        record["kind"],
        plain(record["purity"]),
        plain(record["balance"]),
        str(record["n"]),
        with_interval(record["p05_S"]),
        with_interval(record["p05"]),
        with_interval(record["auroc"]),
        with_interval(record["auroc_two_means"]),
        plain(record["k_right"]),
        plain(record["name_hit"]),
    ]


def draw(dataset: Dataset, path: Path) -> Path:
    """Draws the figure of a sweep with planted neurons: a row for each layer.

    Left: share of neurons with p of S below 0.05 under `specific` (size for mono, power for the others), by least
    purity, with 95 % intervals. Middle: AUROC of each score, orders 2 and 3 against mono, all neurons and the pure
    ones. Right: clusters found, by kind, of the pure ones.

    Args:
        dataset: the sweep.
        path: where the PNG goes; replaced where it exists.

    Returns:
        The path.
    """
    figures = Figures(dataset)
    n = len(figures.layers)
    figure, axes = plt.subplots(n, 3, figsize=(13.5, 0.6 + 3.4 * n), layout="constrained", squeeze=False)
    for row, layer in zip(axes, figures.layers, strict=True):
        _power(row[0], figures, layer)
        _aurocs(row[1], figures, layer)
        _confusion(row[2], figures, layer)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _power(axes: Axes, figures: Figures, layer: str) -> None:
    for kind in PLANTED_KINDS[:-1]:
        rows = [figures.get(layer, "p05_frac", kind, least, "specific", "S") for least in figures.purities]
        kept = [(x, r) for x, r in zip(figures.purities, rows, strict=True) if r["value"] is not None and r["n"] >= 5]
        if kept:
            x = [a for a, _ in kept]
            low, high = ([r[c] for _, r in kept] for c in ("low", "high"))
            axes.fill_between(x, low, high, color=_COLOURS[kind], alpha=0.12)
            axes.plot(x, [r["value"] for _, r in kept], "o-", color=_COLOURS[kind], markersize=4, label=kind)
    axes.axhline(0.05, color="black", linewidth=0.6, linestyle=":")
    axes.set(
        xlim=(-0.03, 1.0), ylim=(-0.03, 1.03), xlabel="purity at least", ylabel="share with p of S < 0.05", title=layer
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _aurocs(axes: Axes, figures: Figures, layer: str) -> None:
    x = np.arange(len(_SCORES))
    for offset, least, label in ((-0.2, 0.0, "all"), (0.2, PURE, f"purity ≥ {PURE}")):
        rows = [figures.get(layer, "auroc", "order2+3", least, preset, score) for preset, score in _SCORES]
        value, low, high = (
            np.array([np.nan if r[c] is None else r[c] for r in rows], dtype=float) for c in ("value", "low", "high")
        )
        spread = np.stack([value - low, high - value]).clip(0)
        axes.errorbar(x + offset, value, spread, fmt="o", markersize=4, capsize=2, label=label)
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    names = [score if preset is None else f"{preset}\n{score}" for preset, score in _SCORES]
    axes.set_xticks(x, names, rotation=55, ha="right", fontsize=7)
    axes.set(ylim=(min(0.4, axes.get_ylim()[0]), 1.02), ylabel="AUROC", title="orders 2 and 3 against mono")
    axes.legend(fontsize=7, loc="lower left")


def _confusion(axes: Axes, figures: Figures, layer: str) -> None:
    ks = figures.ks
    kinds = PLANTED_KINDS[:-1]
    shares = [[figures.get(layer, "k_frac", kind, PURE, score=str(k))["value"] or 0.0 for k in ks] for kind in kinds]
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, of_kind in enumerate(shares):
        for j, share in enumerate(of_kind):
            if share:
                axes.text(j, i, f"{share:.2f}", ha="center", va="center", fontsize=8, color="w" if share > 0.6 else "k")
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set(xlabel="clusters found", title=f"k, purity ≥ {PURE}")
