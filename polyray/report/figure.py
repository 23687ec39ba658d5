"""Figure: a sweep at a glance, from the dataset alone.

Which question it answers: *how does polysemanticity change with depth, and what do the most polysemantic neurons
respond to?* Place in the flow: after the last stage; `polyray run` writes it to OUT/summary.png.
"""

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

from polyray.dataset import Dataset
from polyray.report.summary import AUROC_AGAINST, layer_table

N_CARDS = 6
N_CLUSTERS = 4
N_BEFORE, N_AFTER = 52, 18
"""Letters of a snippet that are shown before its peak and behind it."""
_COLOURS = {"paper": "#7f7f7f", "selective": "#1f77b4", "specific": "#d62728"}


def draw(dataset: Dataset, path: Path) -> Path:
    """Draws the figure of a finished sweep.

    Left: AUROC of log_psi, real against null neurons, by layer and preset, with 95 % intervals, and the share of
    neurons with specific p below 0.05. Right: the neurons of highest log_psi under `specific`, a row a cluster, its
    name and its prototypes.

    Args:
        dataset: the sweep.
        path: where the PNG goes; replaced where it exists.

    Returns:
        The path.

    Raises:
        StoreError: the sweep has not come to its summary yet.
    """
    records = [r for r in layer_table(dataset) if r["layer"] is not None]
    figure = plt.figure(figsize=(13.5, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.75], squeeze=False)[0]
    upper, lower = left.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    _auroc(upper, records)
    _shares(lower, dataset, records)
    _cards(right, dataset)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _auroc(axes: Axes, records: list[dict[str, Any]]) -> None:
    x = np.arange(len(records))
    for preset, kind in AUROC_AGAINST.items():
        value, low, high = (
            np.array([np.nan if r["auroc"][preset][c] is None else r["auroc"][preset][c] for r in records])
            for c in ("value", "low", "high")
        )
        axes.fill_between(x, low, high, color=_COLOURS[preset], alpha=0.15, linewidth=0)
        axes.plot(x, value, "o-", color=_COLOURS[preset], markersize=4, label=f"{preset}, against {kind}")
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set_ylabel("AUROC of log ψ\nreal against null neurons")
    axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.02)
    axes.legend(fontsize=8, loc="lower right")


def _shares(axes: Axes, dataset: Dataset, records: list[dict[str, Any]]) -> None:
    rows = dataset["neurons"].to_table(columns=["layer", "specific_p", "specific_S_p"])
    x = np.arange(len(records))
    for offset, column, label, colour in (
        (-0.2, "specific_S_p", "S alone", "#f4a582"),
        (0.2, "specific_p", "S, Q and D", "#d62728"),
    ):
        shares = []
        for r in records:
            p = rows.filter(pc.equal(rows["layer"], r["layer"]))[column].drop_null().to_numpy()
            shares.append(float((p < 0.05).mean()) if len(p) else np.nan)
        axes.bar(x + offset, shares, width=0.38, color=colour, label=label)
    axes.axhline(0.05, color="black", linewidth=0.6, linestyle=":")
    axes.set_ylabel("share of neurons with\nspecific p < 0.05")
    axes.set_xticks(x, [r["layer"] for r in records], rotation=40, ha="right", fontsize=8)
    axes.legend(fontsize=8)


def _cards(figure: Figure, dataset: Dataset) -> None:
    neurons = dataset["neurons"].to_table(columns=["layer", "neuron", "specific_log_psi", "specific_p", "k"])
    neurons = neurons.filter(pc.is_valid(neurons["specific_log_psi"]))
    order = [("specific_log_psi", "descending"), ("layer", "ascending"), ("neuron", "ascending")]
    best = neurons.take(pc.sort_indices(neurons, sort_keys=order)).slice(0, N_CARDS).to_pylist()
    figure.suptitle("highest log ψ under specific: a row a cluster, its name and its prototypes", fontsize=10)
    if not best:
        return
    for spot, neuron in zip(figure.subfigures(2, N_CARDS // 2, squeeze=False).flat, best, strict=False):
        where = (pc.field("layer") == neuron["layer"]) & (pc.field("neuron") == neuron["neuron"])
        clusters = dataset["clusters"].to_table(filter=where).sort_by("cluster")
        _card(spot, neuron, clusters)


def _card(figure: Figure, neuron: dict[str, Any], clusters: pa.Table) -> None:
    title = (
        f"{neuron['layer']} · {neuron['neuron']}   log ψ {neuron['specific_log_psi']:.2f}, p {neuron['specific_p']:.3f}"
    )
    figure.suptitle(title, fontsize=8.5, fontweight="bold")
    for axes, row in zip(figure.subplots(N_CLUSTERS, 1), [*clusters.to_pylist(), *[None] * N_CLUSTERS], strict=False):
        axes.axis("off")
        if row is None:
            continue
        texts = [t for t in row.get("snippets") or [] if t is not None]
        if texts:
            axes.text(0, 1, "\n".join(map(shown_text, texts)), fontsize=5.5, va="top", parse_math=False, clip_on=True)
        pictures = [np.asarray(Image.open(io.BytesIO(t))) for t in row["thumbnails"] or [] if t is not None]
        if pictures:
            axes.imshow(np.concatenate(pictures, axis=1))
        axes.set_title(f"{shown_text(row['name'])}  ({row['size']})", fontsize=7.5, pad=2, parse_math=False)


def shown_text(text: str) -> str:
    """A snippet on one line: what is far from its peak left out, spaces single, letters that the font lacks as □."""
    before, mark, rest = text.partition("«")
    if mark:
        peak, end, after = rest.partition("»")
        text = f"{_end(before)}«{peak[:N_BEFORE]}{end}{after if len(after) <= N_AFTER else after[:N_AFTER] + '…'}"
    else:
        text = textwrap.shorten(text, 2 * N_BEFORE, placeholder="…")
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in " ".join(_printable(text).split()))


def _end(text: str) -> str:
    return text if len(text) <= N_BEFORE else "…" + text[-N_BEFORE:]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
