"""Pictures with one coloured square, neurons that measure its colour, and what each must say of any swap.

A neuron's value at a position is a mean over 8 × 8 pixels, the box that is swapped 16 × 16 around them, and the square
is that box: so what is in the box decides the value, wherever in it the mean is taken.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from psi.samples import FakeProbe, layer_info, layer_row, science, subject_of
from torch import Tensor, nn

from polyray.config import Science
from polyray.models.layers import LayerInfo
from polyray.models.vision import Subject
from polyray.psi.hosts import Examples, Peaks, boxes, window
from polyray.psi.swap import Picture, Views

PX, SIDE, STRIDE, GRID = 64, 16, 4, 15
A_ALONE, A_OR_B = 0, 1
GREY = (100, 100, 100)
FILL = np.array([120, 100, 90], dtype=np.uint8)
"""A little red, so that the baseline is not 0."""


class Detectors(nn.Module):
    """How much redder than green, A, or greener than red, B, 8 × 8 pixels are: neurons A and max(A, B)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Conv2d(3, 2, 8, stride=STRIDE, bias=False)
        with torch.no_grad():
            self.mean.weight.zero_()
            self.mean.weight[0, 0] = self.mean.weight[1, 1] = 1 / 64
            self.mean.weight[0, 1] = self.mean.weight[1, 0] = -1 / 64

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.mean(x)).split(1, 1)
        return torch.cat([a, torch.maximum(a, b)], 1)


INFO: LayerInfo = layer_info(
    "0", 2, grid_h=GRID, grid_w=GRID, positive_only=True, center_x_px=4.0, center_y_px=4.0, stride_px=float(STRIDE)
)
LAYER: dict[str, Any] = layer_row(INFO, SIDE)


def settings(**sections: Any) -> Science:
    """A sweep with four hosts of each neuron."""
    swap = {"n_hosts": 4} | sections.pop("swap", {})
    return science(swap=swap, **sections)


def detectors(micro_batch: int = 8) -> Subject:
    return subject_of(nn.Sequential(Detectors()), PX, micro_batch)


def box_of(position: int) -> list[int]:
    """The box around a position, in pixels."""
    return boxes(LAYER, window(LAYER, PX, 1.0), np.array([position]), PX)[0].tolist()


def picture(colour: tuple[int, int, int], position: int) -> Picture:
    """A grey picture with a square in the box of a position."""
    out = np.full((PX, PX, 3), GREY, dtype=np.uint8)
    x0, y0, x1, y1 = box_of(position)
    out[y0:y1, x0:x1] = colour
    return out


def value(neuron: int, colour: Any) -> float:
    """What a neuron says of 8 × 8 pixels of a colour."""
    red, green, _ = (float(c) / 255 for c in colour)
    return max(red - green, 0.0) if neuron == A_ALONE else abs(red - green)


class Scene(NamedTuple):
    """Pictures, their squares' colours, and which of them are a neuron's examples or random images."""

    pictures: list[Picture]
    colours: list[tuple[int, int, int]]
    examples: Examples
    peaks: Peaks

    def views(self, chosen: Science, unreadable: tuple[int, ...] = ()) -> Views:
        return Views(self.probe(unreadable), chosen)

    def probe(self, unreadable: tuple[int, ...] = ()) -> FakeProbe:
        return FakeProbe(self.pictures, ["x"] * len(self.pictures), unreadable)


def scene(neuron: int, clusters: list[list[tuple[int, int, int]]], n_random: int = 12, seed: int = 0) -> Scene:
    """Squares of given colours, cluster by cluster, at places anywhere; then random images of one colour all over."""
    rng = np.random.default_rng(seed)
    colours = [colour for cluster in clusters for colour in cluster]
    n = len(colours)
    position = rng.integers(0, GRID * GRID, n + n_random)
    randoms = [tuple(int(c) for c in rng.integers(90, 130, 3)) for _ in range(n_random)]
    pictures = [picture(c, int(p)) for c, p in zip(colours, position, strict=False)]
    pictures += [np.full((PX, PX, 3), colour, dtype=np.uint8) for colour in randoms]
    cluster = np.repeat(np.arange(len(clusters)), [len(c) for c in clusters])
    activation = np.array([max(value(neuron, c), value(neuron, GREY)) for c in colours], dtype=np.float32)
    return Scene(
        pictures,
        [*colours, *randoms],  # type: ignore[list-item]
        Examples(np.arange(n), position[:n], cluster, activation.astype(np.float64)),
        Peaks(np.arange(n, n + n_random), position[n:]),
    )


def means(shown: Picture) -> NDArray[np.float64]:
    """Both neurons' values at every position [2, positions], in plain NumPy."""
    cells = shown.astype(np.float64).reshape(PX // STRIDE, STRIDE, PX // STRIDE, STRIDE, 3).mean((1, 3)) / 255
    windows = (cells[:-1, :-1] + cells[1:, :-1] + cells[:-1, 1:] + cells[1:, 1:]) / 4
    a, b = windows[..., 0] - windows[..., 1], windows[..., 1] - windows[..., 0]
    return np.stack([np.maximum(a, 0).ravel(), np.maximum(np.maximum(a, b), 0).ravel()])


def by_hand(row: dict[str, Any], pictures: list[Picture], fill: NDArray[np.uint8]) -> Picture:
    """What a row of swaps shows, drawn with Pillow after the table's own description of the conditions."""
    out = Image.fromarray(pictures[row["host_example"]])
    box, place = (tuple(row[p + c] for c in ("x0", "y0", "x1", "y1")) for p in ("", "place_"))
    filled = {"baseline": [box], "shuffled_position": [box], "ablate_elsewhere": [place]}
    for target in filled.get(row["condition"], []):
        out.paste(tuple(fill.tolist()), target)
    if row["source_example"] is not None:
        patch = Image.fromarray(pictures[row["source_example"]])
        patch = patch.crop(tuple(row["source_" + c] for c in ("x0", "y0", "x1", "y1")))
        target = place if row["condition"] == "shuffled_position" else box
        size = (target[2] - target[0], target[3] - target[1])
        out.paste(patch.resize(size, Image.Resampling.BILINEAR), target[:2])
    return np.asarray(out)
