"""Gallery: what the subject was shown of one neuron and what it answered, from the dataset alone.

Place in the flow: after a sweep with patch swaps; `report/swaps.py` shows some strips, a notebook any.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from PIL import Image

from polyray.dataset import Dataset
from polyray.errors import StoreError, nearest
from polyray.schema import SWAP_CONDITIONS

WIDTH_INCHES = 9.6
ROW_INCHES = 1.72
"""Width of a strip, and height of one host's pictures with what stands above and under them."""


class Strip:
    """What was shown of a neuron: the first host of each of its clusters under every condition.

    Args:
        dataset: a sweep with patch swaps.
        layer: name of the layer.
        neuron: index of the neuron in it.

    Raises:
        StoreError: the sweep has no such layer, or the neuron was not swapped.
    """

    def __init__(self, dataset: Dataset, layer: str, neuron: int) -> None:
        self.layer, self.neuron = layer, neuron
        where = (pc.field("layer") == layer) & (pc.field("neuron") == neuron)
        columns = ["host", "condition", "status", "reason", "cluster", "response", "effect_sd", "picture", "reduced"]
        rows = dataset["swaps"].to_table(columns, where & (pc.field("kind") == "real")).to_pylist()
        if not rows:
            raise StoreError(_absent(dataset, layer, neuron))
        pictured = sorted({r["host"] for r in rows if r["picture"] is not None})
        by_host = {h: {r["condition"]: r for r in rows if r["host"] == h} for h in pictured}
        self.hosts = list(by_host.values())
        """By condition, for each host with pictures."""
        self.reduced = any(r["reduced"] for r in rows)
        clusters = dataset["clusters"].to_table(["cluster", "name", "size"], where).to_pylist()
        self.names = {r["cluster"]: f"{r['name']} ({r['size']})" for r in clusters}
        found = dataset["neurons"].to_table(["specific_log_psi"], where).to_pylist()
        self.log_psi = found[0]["specific_log_psi"] if found else None
        verdict = where & (pc.field("scope") == "neuron") & (pc.field("contrast") == "aligned-random")
        judged = dataset["effects"].to_table(["causal"], verdict & (pc.field("kind") == "real")).to_pylist()
        self.causal = judged[0]["causal"] if judged else None


def _absent(dataset: Dataset, layer: str, neuron: int) -> str:
    layers = dataset["layers"].to_table(["layer"])["layer"].to_pylist()
    if layer not in layers:
        return f"the sweep has no layer {layer!r}.{nearest(layer, layers)}"
    where = (pc.field("layer") == layer) & (pc.field("kind") == "real")
    known = sorted(set(dataset["swaps"].to_table(["neuron"], where)["neuron"].to_pylist()))
    if not known:
        return f"nothing was swapped in layer {layer!r} of {str(dataset.path)!r}: does its config set swap?"
    near = min(known, key=lambda n: (abs(n - neuron), n))
    return f"neuron {neuron} of layer {layer!r} was not swapped; {len(known)} were, the nearest in number is {near}."


def strip(dataset: Dataset, layer: str, neuron: int) -> Figure:
    """One row for the first host of each cluster: the host and what was done to it, with what the neuron answered.

    Under each picture stand the response and, in brackets, the effect in standard deviations of the neuron's top
    responses: the response less that to the baseline.

    Args:
        dataset: a sweep with patch swaps.
        layer: name of the layer.
        neuron: index of the neuron in it.

    Returns:
        A figure that belongs to the caller.

    Raises:
        StoreError: the sweep has no such layer, or the neuron was not swapped.
    """
    found = Strip(dataset, layer, neuron)
    figure = Figure(figsize=(WIDTH_INCHES, 0.3 + max(1, len(found.hosts)) * ROW_INCHES), layout="constrained")
    draw_on(figure, found, found.hosts)
    return figure


def draw_strip(dataset: Dataset, layer: str, neuron: int, path: Path) -> Path:
    """Writes `strip` to a PNG and returns its path; replaced where it exists."""
    strip(dataset, layer, neuron).savefig(path, dpi=130)
    return path


def draw_on(figure: FigureBase, found: Strip, hosts: Sequence[dict[str, Any]]) -> None:
    """Draws some of a strip's hosts on a figure or part of one."""
    score = "" if found.log_psi is None else f"   log ψ {found.log_psi:.2f}"
    verdict = {True: "causal", False: "not causal", None: "no verdict"}[found.causal]
    cut = ", box reduced" if found.reduced else ""
    figure.suptitle(f"{found.layer} · {found.neuron}{score}, {verdict}{cut}", fontsize=9, fontweight="bold")
    if not hosts:
        return
    for part, host in zip(figure.subfigures(len(hosts), 1, squeeze=False).flat, hosts, strict=True):
        cluster = next(iter(host.values()))["cluster"]
        name = found.names.get(cluster, "")  # a prompt may hold dollar signs
        part.suptitle(f"cluster {cluster}: {name}", fontsize=8, x=0.01, ha="left", parse_math=False)
        for axes, condition in zip(part.subplots(1, len(SWAP_CONDITIONS)), SWAP_CONDITIONS, strict=True):
            _cell(axes, condition, host.get(condition))


def _cell(axes: Axes, condition: str, row: dict[str, Any] | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(condition.replace("_", " "), fontsize=6.5, pad=2)
    axes.set_xlim(-0.5, 63.5)
    axes.set_ylim(63.5, -0.5)
    axes.set_aspect("equal", anchor="N")
    if row is not None and row["picture"] is not None:
        axes.imshow(np.asarray(Image.open(io.BytesIO(row["picture"]))), extent=(-0.5, 63.5, 63.5, -0.5))
    else:
        axes.set_facecolor("#eeeeee")
    if row is None or row["status"] != "ok":
        words = "not shown" if row is None else f"{row['status'].replace('_', ' ')}: {row['reason'] or 'no reason'}"
        text = axes.text(31.5, 31.5, textwrap.fill(words, 19), fontsize=6, ha="center", va="center", parse_math=False)
        text.set_clip_on(True)
        text.set_in_layout(False)
        return
    response = "–" if row["response"] is None else f"{row['response']:.2f}"
    effect = "" if row["effect_sd"] is None else f" ({round(row['effect_sd'], 1) + 0.0:+.1f})"
    axes.set_xlabel(response + effect, fontsize=6.5, labelpad=2)
