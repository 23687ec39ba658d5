"""Swaps: what patch swaps came to, as a table and a figure, from the dataset alone.

Place in the flow: after the last stage of a sweep with patch swaps; `polyray run` prints the one and writes the other
to OUT/swaps.png.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyarrow.compute as pc
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from polyray.dataset import Dataset
from polyray.report import gallery
from polyray.report.summary import series, shown
from polyray.schema import CONTRASTS

SHARES = ("causal", "causal_specific", "null_p05")
_HEADS = {
    "aligned-random": "aligned − random",
    "aligned-random_place": "aligned − random place",
    "aligned-shuffled_position": "aligned − shuffled position",
    "aligned-non_aligned": "aligned − non-aligned",
    "non_aligned-random": "non-aligned − random",
    "ablate_elsewhere-baseline": "ablate elsewhere − baseline",
}
COLUMNS = ("layer", "neurons", "box", *_HEADS.values(), "causal", "and specific", "null p < 0.05")
CAPTION = (
    "Patch swaps: the box around the peak of a neuron's own examples is replaced by a patch of the same cluster "
    "(aligned), of another cluster of the neuron (non-aligned), of a random image at its peak (random) or anywhere "
    "(random place); or it is filled (baseline), with the aligned patch elsewhere (shuffled position, compared at "
    "the peak); or kept, and as much elsewhere filled (ablate elsewhere). Differences in standard deviations of the "
    "neuron's top responses: mean over neurons, bootstrap 95 % interval. box: side in px; reduced: cut to "
    "swap.max_frac. causal: share of neurons that at least two clusters drive (aligned − random above 0 at q < "
    "0.05); and specific: that also have p of S < 0.05 under specific, since two clusters of one concept drive a "
    "neuron too. null p < 0.05: share of null neurons, where aligned and non-aligned do not differ. Below the "
    "layers: the sweep by quartile of specific log ψ, and by share of the image in the box."
)
N_STRIPS = 3
N_ROWS = 3
"""Strips beside the figure, and the most clusters of each."""
_COLOURS = ("#d62728", "#ff7f0e", "#9467bd", "#1f77b4", "#2ca02c", "#7f7f7f")
_INTERVAL = ("mean", "low", "high")
_FIGURES = (*_INTERVAL, "mean_sd", "low_sd", "high_sd", "p", "q", "n")


def records(dataset: Dataset) -> list[dict[str, Any]]:
    """One record for each layer in order of depth, the sweep, and the sweep's splits by log_psi and by box.

    Returns:
        layer (None for the sweep), split, n (neurons with hosts; of a split, those with a difference), box (side_px as
        the window asks for, shown_px the longest that there is, reduced: share of hosts where it is; None but for
        layers), contrasts by name, the shares causal, causal_specific and null_p05 and the distances null_ks and
        null_small, each with its row's figures. Missing figures are None.
    """
    depth = {r["layer"]: r for r in dataset["layers"].to_table().to_pylist()}
    layers = sorted(depth, key=lambda layer: depth[layer]["depth"])
    table = dataset["effects"].to_table(filter=~pc.field("scope").isin(["cluster", "neuron"]))
    rows = {(r["layer"], r["kind"], r["split"], r["contrast"]): r for r in table.to_pylist()}
    boxes = _boxes(dataset)
    splits = sorted({split for layer, _, split, _ in rows if layer is None and split != "all"}, key=_by_log_psi_first)
    found = []
    for layer, split in [*((x, "all") for x in layers), (None, "all"), *((None, s) for s in splits)]:
        contrasts = {c: _figures(rows.get((layer, "real", split, c))) for c in CONTRASTS}
        whole = sum(b["n"] for x, b in boxes.items() if layer in (None, x))
        found.append(
            {
                "layer": layer,
                "split": split,
                "n": whole if split == "all" else contrasts[CONTRASTS[0]]["n"],
                "box": None if layer is None else _box_of(depth[layer], boxes.get(layer)),
                "contrasts": contrasts,
                "causal": _figures(rows.get((layer, "real", split, "causal"))),
                "causal_specific": _figures(rows.get((layer, "real", split, "causal_specific"))),
                "null_p05": _figures(rows.get((layer, "null", split, "null_p05"))),
                "null_ks": _figures(rows.get((layer, "null", split, "null_ks"))),
                "null_small": _figures(rows.get((layer, "null", split, "null_small"))),
            }
        )
    return found


def _box_of(layer: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    seen = {c: None if found is None else found[c] for c in ("shown_px", "reduced")}
    return {"side_px": layer["swap_side_px"]} | seen


def _by_log_psi_first(split: str) -> tuple[bool, str]:
    return not split.startswith("log_psi"), split


def _figures(row: dict[str, Any] | None) -> dict[str, Any]:
    return dict.fromkeys(_FIGURES) | {"n": 0} if row is None else {c: row[c] for c in _FIGURES}


def _boxes(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Neurons with hosts, longest side of a host's box, and share of hosts where it is reduced, by layer."""
    where = (pc.field("kind") == "real") & (pc.field("condition") == "baseline")
    rows = dataset["swaps"].to_table(["layer", "neuron", "x0", "y0", "x1", "y1", "reduced"], where)
    side = pc.max_element_wise(pc.subtract(rows["x1"], rows["x0"]), pc.subtract(rows["y1"], rows["y0"]))
    rows = rows.append_column("side", side).append_column("cut", pc.cast(rows["reduced"], "float64"))
    asked = [("neuron", "count_distinct"), ("side", "max"), ("cut", "mean")]
    of = rows.group_by("layer").aggregate(asked).to_pylist()
    return {
        r["layer"]: {"n": r["neuron_count_distinct"], "shown_px": r["side_max"], "reduced": r["cut_mean"]} for r in of
    }


def cells(record: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of `COLUMNS`."""
    name = record["layer"] or ("all" if record["split"] == "all" else record["split"])
    return [
        name.replace("log_psi", "log ψ"),
        str(record["n"]),
        _box(record["box"]),
        *(_interval(record["contrasts"][c]) for c in _HEADS),
        *(shown(record[c]["mean"], 2) for c in SHARES),
    ]


def section(record: dict[str, Any]) -> str:
    """Lines of one section of the table share this: layers, the sweep, its quartiles, its boxes."""
    return "layers" if record["layer"] is not None else str(record["split"]).split(" ")[0]


def _box(box: dict[str, Any] | None) -> str:
    if box is None or box["shown_px"] is None:
        return ""
    return f"{box['shown_px']}, reduced" if box["reduced"] else str(box["shown_px"])


def _interval(figures: dict[str, Any]) -> str:
    mean, low, high = (shown(figures[c], 2) for c in ("mean_sd", "low_sd", "high_sd"))
    return mean if figures["low_sd"] is None else f"{mean} ({low}–{high})"


def draw(dataset: Dataset, path: Path) -> Path:
    """Draws the figure of a sweep with patch swaps.

    Left: each contrast in standard deviations by layer, mean over neurons with a 95 % interval, and the shares of
    causal neurons. Right: what was shown of a few neurons, those of highest log_psi under `specific` among the causal
    ones (among all swapped ones where none is causal).

    Args:
        dataset: the sweep.
        path: where the PNG goes; replaced where it exists.

    Returns:
        The path.
    """
    layers = [r for r in records(dataset) if r["layer"] is not None]
    strips = [gallery.Strip(dataset, *key) for key in striking(dataset, N_STRIPS)]
    rows = [min(N_ROWS, len(s.hosts)) for s in strips]
    height = max(7.0, 0.4 * len(rows) + gallery.ROW_INCHES * sum(rows))
    figure = plt.figure(figsize=(7 + gallery.WIDTH_INCHES * bool(strips), height), layout="constrained")
    left: FigureBase = figure
    if strips:
        left, right = figure.subfigures(1, 2, width_ratios=[7, gallery.WIDTH_INCHES], squeeze=False)[0]
        parts = right.subfigures(len(strips), 1, height_ratios=[0.3 + n for n in rows], squeeze=False).flat
        for part, strip, n in zip(parts, strips, rows, strict=True):
            gallery.draw_on(part, strip, strip.hosts[:n])
    upper, lower = left.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _contrasts(upper, layers)
    _shares(lower, layers)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def striking(dataset: Dataset, n: int) -> list[tuple[str, int]]:
    """Layer and index of the n causal neurons of highest specific_log_psi; of all swapped ones where none is causal.

    Neurons without pictures are left out.
    """
    where = (pc.field("scope") == "neuron") & (pc.field("kind") == "real") & (pc.field("contrast") == "aligned-random")
    verdicts = dataset["effects"].to_table(["layer", "neuron", "causal"], where).to_pylist()
    pictured = pc.is_valid(pc.field("picture")) & (pc.field("condition") == "host")
    seen = dataset["swaps"].to_table(["layer", "neuron"], pictured)
    known = set(zip(seen["layer"].to_pylist(), seen["neuron"].to_pylist(), strict=True))
    scores = dataset["neurons"].to_table(["layer", "neuron", "specific_log_psi"]).to_pylist()
    score = {(r["layer"], r["neuron"]): r["specific_log_psi"] for r in scores}
    keys = [(r["layer"], r["neuron"]) for r in verdicts if r["causal"]]
    keys = keys or [(r["layer"], r["neuron"]) for r in verdicts]
    ranked = [k for k in keys if k in known and score.get(k) is not None]
    return sorted(ranked, key=lambda k: (-score[k], k))[:n]


def _contrasts(axes: Axes, layers: list[dict[str, Any]]) -> None:
    x = np.arange(len(layers))
    for i, (contrast, colour) in enumerate(zip(CONTRASTS, _COLOURS, strict=True)):
        mean, low, high = (series([r["contrasts"][contrast] for r in layers], c + "_sd") for c in _INTERVAL)
        at = x + (i - (len(CONTRASTS) - 1) / 2) * 0.12
        axes.vlines(at, low, high, color=colour, linewidth=1.3)
        axes.plot(at, mean, "o", color=colour, markersize=4, label=_HEADS[contrast])
    axes.axhline(0, color="black", linewidth=0.6, linestyle=":")
    for edge in x[:-1] + 0.5:
        axes.axvline(edge, color="#dddddd", linewidth=0.6)
    # Early layers, whose top responses hardly vary, would press all others flat.
    axes.set_yscale("symlog", linthresh=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("difference, in sd of the neuron's top responses")
    axes.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def _shares(axes: Axes, layers: list[dict[str, Any]]) -> None:
    x = np.arange(len(layers))
    for offset, name, label, colour in (
        (-0.2, "causal", "causal: two clusters drive it", "#f4a582"),
        (0.2, "causal_specific", "… and more than one concept", "#d62728"),
    ):
        mean, low, high = (series([r[name] for r in layers], c) for c in _INTERVAL)
        axes.bar(x + offset, mean, width=0.38, color=colour, label=label)
        axes.vlines(x + offset, low, high, color="black", linewidth=0.8)
    null = series([r["null_p05"] for r in layers], "mean")
    axes.plot(x, null, "D", color="black", markersize=4, clip_on=False, label="null neurons with p < 0.05")
    axes.axhline(0.05, color="black", linewidth=0.6, linestyle=":")
    axes.set_ylabel("share of neurons")
    axes.set_ylim(0, 1)
    axes.set_xticks(x, [r["layer"] for r in layers], rotation=40, ha="right", fontsize=8)
    axes.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
