"""Window and extract: boxes against receptive fields found by gradients, patches against sets in plain Python."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from psi.samples import EDGE_LAYERS, FakeProbe, edge_subject, images_of, noise_pictures, science, subject_of
from torch import nn

from polyray import columns
from polyray.config import Science
from polyray.errors import ConfigError, DataError
from polyray.kernels import random
from polyray.models.vision import Subject
from polyray.probes.images import open_probe
from polyray.psi.extract import ImageFrame, extract, from_patch_ids, layer_boxes, max_examples, patch_ids, window
from polyray.psi.mine import distinct_images, index, merge, mine

pytestmark = pytest.mark.usefixtures("one_thread")

PX = 32


@given(data=st.data(), px=st.integers(8, 2048))
@settings(max_examples=100, deadline=None)
def test_patch_ids_and_back(data: st.DataObject, px: int) -> None:
    n = data.draw(st.integers(1, 5))
    example = np.array([data.draw(st.integers(0, max_examples(px) - 1)) for _ in range(n)])
    box = np.zeros((n, 4), dtype=np.int64)
    for row in box:
        for axis in (0, 1):
            low, high = sorted((data.draw(st.integers(0, px - 1)), data.draw(st.integers(0, px - 1))))
            row[axis], row[axis + 2] = low, high + 1
    ids = patch_ids(example, box, px)
    assert (ids >= 0).all()
    back_example, back_box = from_patch_ids(ids, px)
    assert np.array_equal(back_example, example)
    assert np.array_equal(back_box, box)


@pytest.mark.parametrize("px", [8, 224, 2048])
def test_as_many_images_as_fit_can_be_numbered(px: int) -> None:
    most = max_examples(px)
    whole = np.array([[0, 0, px, px]])
    corner = np.array([[px - 1, px - 1, px, px]])
    for box in (whole, corner):
        assert patch_ids(np.array([most - 1]), box, px)[0] > 0
        with pytest.raises(ConfigError, match=f"{most + 1} images at input_px {px}"):
            patch_ids(np.array([most]), box, px)
    assert most * px**4 < 2**63 <= (most + 1) * px**4


def test_patches_are_ordered_by_image() -> None:
    box = np.array([[0, 0, 8, 8], [7, 7, 8, 8], [3, 0, 5, 1]])
    first, second = (patch_ids(np.full(3, e), box, 8) for e in (4, 5))
    assert first.max() < second.min()
    assert len(set(first)) == 3


class Stack(nn.Module):
    """Linear convolutions of positive taps, one neuron each: gradients are the same for every image."""

    def __init__(self, *shapes: tuple[list[float], int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i, (taps, stride, padding) in enumerate(shapes):
            conv = nn.Conv2d(1 if i else 3, 1, len(taps), stride=stride, padding=padding, bias=False)
            with torch.no_grad():
                conv.weight.copy_(torch.outer(torch.tensor(taps), torch.tensor(taps)).expand_as(conv.weight))
            self.layers.append(conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.layers:
            x = conv(x)
        return x


def shallow() -> Stack:
    """Kernels 3 and 3, strides 2 and 1: receptive field of 7 px, [2p − 3, 2p + 4) at position p."""
    return Stack(([1.0, 2.0, 1.0], 2, 1), ([1.0, 3.0, 1.0], 1, 1))


def deep() -> Stack:
    """Kernels 7, 7, 7, strides 1, 2, 2: a receptive field of 31 px, nearly the whole image."""
    return Stack(([1.0] * 7, 1, 3), ([1.0] * 7, 2, 3), ([1.0] * 7, 2, 3))


def setting(**extract: Any) -> Science:
    return science(subject={"input_px": PX, "micro_batch": 4}, extract={"n_sample": 6, **extract})


def window_row(subject: Subject, chosen: Science, name: str, n_images: int = 10) -> dict[str, Any]:
    probe = FakeProbe(noise_pictures(n_images, PX), ["x"] * n_images)
    info = subject.readouts.layers([name])[0]
    row: dict[str, Any] = window(subject, probe, chosen, images_of(probe.labels), info, info.width).to_pylist()[0]
    return row


def seen_by(module: nn.Module, position: int) -> tuple[int, int, int, int]:
    """Pixels that move the output at a position: bounding box of the input gradient."""
    x = torch.zeros(1, 3, PX, PX, requires_grad=True)
    out = module(x).flatten(2)
    (gradient,) = torch.autograd.grad(out[0, :, position].sum(), x)
    ys, xs = torch.nonzero(gradient[0].abs().sum(0), as_tuple=True)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@pytest.mark.parametrize("network", [shallow, deep])
@pytest.mark.parametrize("last", [0, 1])
def test_theoretical_boxes_are_the_receptive_fields(network: Any, last: int) -> None:
    module = network()
    row = window_row(subject_of(module, PX), setting(window="theoretical"), f"layers.{last}")
    part = nn.Sequential(*module.layers[: last + 1])
    n_positions = row["grid_h"] * row["grid_w"]
    boxes = layer_boxes(row, np.arange(n_positions), PX)
    assert [tuple(b) for b in boxes.tolist()] == [seen_by(part, p) for p in range(n_positions)]
    assert row["side_px"] == row["swap_side_px"] == row["receptive_px"]


@pytest.mark.parametrize("kernel", [41, 63])
def test_a_receptive_field_beyond_the_image_is_clipped_where_it_lies(kernel: int) -> None:
    """Of 41 px the corners see most of the image, of 63 px every position sees all of it."""
    module = Stack(([1.0] * kernel, 4, kernel // 2))
    row = window_row(subject_of(module, PX), setting(window="theoretical"), "layers.0")
    n_positions = row["grid_h"] * row["grid_w"]
    boxes = layer_boxes(row, np.arange(n_positions), PX)
    assert [tuple(b) for b in boxes.tolist()] == [seen_by(module.layers[0], p) for p in range(n_positions)]


def naive_side(energy: NDArray[np.float64], center: float, share: float) -> int:
    """Side of the smallest square of whole pixels around a centre that holds a share of the energy."""
    n = len(energy)
    for side in range(1, 2 * n + 1):
        low = int(np.floor(center - side / 2 + 0.5))
        inside = [i for i in range(n) if low <= i < low + side]
        if sum(energy[y, x] for y in inside for x in inside) >= share * energy.sum() * (1 - 1e-9):
            return side
    raise AssertionError("no side holds that much")


@pytest.mark.parametrize(("energy", "swap_energy"), [(0.9, 0.5), (0.99, 0.2), (0.6, 0.05)])
def test_effective_sides_hold_their_share_of_the_energy(energy: float, swap_energy: float) -> None:
    row = window_row(subject_of(shallow(), PX), setting(energy=energy, swap_energy=swap_energy), "layers.1")
    # Position p of the second layer sees the first one's p − 1 + j through tap b, and that pixel 2(p − 1 + j) − 1 + i.
    weight = np.zeros(PX)
    p = row["grid_w"] // 2
    for j, b in enumerate([1, 3, 1]):
        for i, a in enumerate([1, 2, 1]):
            weight[2 * (p - 1 + j) - 1 + i] += a * b
    center = 2 * p + 0.5
    assert row["center_x_px"] + p * row["stride_px"] == center
    by_hand = np.outer(weight, weight) ** 2
    assert row["side_px"] == naive_side(by_hand, center, energy)
    assert row["swap_side_px"] == naive_side(by_hand, center, swap_energy)
    assert (row["window"], row["receptive_px"]) == ("effective", 7)


def test_uniform_energy_needs_the_whole_window() -> None:
    row = window_row(subject_of(Stack(([1.0] * 4, 4, 0)), PX), setting(), "layers.0")
    assert (row["side_px"], row["swap_side_px"]) == (4, 3)  # 2 × 2 of 4 × 4 hold a quarter, 3 × 3 nine sixteenths


def test_a_layer_that_no_pixel_moves_is_seen_whole() -> None:
    module = Stack(([0.0] * 3, 2, 1))
    row = window_row(subject_of(module, PX), setting(), "layers.0")
    assert row["side_px"] == row["swap_side_px"] == PX


class Opposites(nn.Module):
    """Two neurons of the same energy, whose sum sees only the rim of a window and whose difference only its core."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(3, 2, 9, stride=4, padding=4, bias=False)
        core = torch.zeros(9, 9)
        core[3:6, 3:6] = 1.0
        rim = 1 - core
        rim *= (core.square().sum() / rim.square().sum()).sqrt()
        with torch.no_grad():
            self.read.weight[0] = rim + core
            self.read.weight[1] = rim - core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x)


def test_more_sample_images_give_a_better_energy() -> None:
    """Core and rim hold half of the energy each, so that a box with 0.32 of it is the core, 3 px wide."""
    sides = []
    for seed in range(6):
        chosen = science(
            seed=seed, subject={"input_px": PX, "micro_batch": 4}, extract={"n_sample": 200, "swap_energy": 0.32}
        )
        sides.append(window_row(subject_of(Opposites(), PX), chosen, "read", 200)["swap_side_px"])
    assert set(sides) == {3}


def test_the_sample_is_fixed_and_skips_what_cannot_be_read() -> None:
    chosen, subject = setting(), subject_of(nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU()), PX)
    info = subject.readouts.layers(["0"])[0]
    pictures = noise_pictures(10, PX)
    hashes = [int(random.bits(chosen.seed, random.WINDOW_SAMPLE, 0, e)) for e in range(10)]
    sample = sorted(range(10), key=lambda e: hashes[e])[:6]
    probe = FakeProbe(pictures, ["x"] * 10)
    row = window(subject, probe, chosen, images_of(probe.labels), info, 4)
    assert sorted(probe.n_reads) == sorted(sample)
    others = [e for e in range(10) if e not in sample]
    partly = FakeProbe(pictures, ["x"] * 10, unreadable=others)
    assert window(subject, partly, chosen, images_of(probe.labels), info, 4).equals(row)
    window(subject, FakeProbe(pictures, ["x"] * 10, unreadable=sample[1:]), chosen, images_of(probe.labels), info, 4)
    with pytest.raises(DataError, match="window sample"):
        window(subject, FakeProbe(pictures, ["x"] * 10, unreadable=sample), chosen, images_of(probe.labels), info, 4)


Extracted = tuple[Science, list[dict[str, Any]], dict[str, pa.Table], dict[str, pa.Table], list[str]]


@pytest.fixture(scope="module")
def edge() -> Extracted:
    """EdgeNet's layers, mined rows, pool peaks and labels."""
    chosen = science()
    subject, probe = edge_subject(chosen), open_probe(chosen.probe)
    rows, _ = index(probe, range(80))
    images = distinct_images(rows)
    infos = subject.readouts.layers(EDGE_LAYERS)
    neurons = {info.name: np.arange(info.width) for info in infos}
    found = mine(subject, probe, chosen, images, infos, neurons, range(80))
    mined = {info.name: merge([found.parts[info.name]], chosen, info)[0] for info in infos}
    layers = [window(subject, probe, chosen, images, info, info.width).to_pylist()[0] for info in infos]
    return chosen, layers, mined, found.pool_peaks, probe.labels


def naive_box(layer: dict[str, Any], position: int, px: int) -> tuple[int, int, int, int]:
    """A square of the layer's side around the position's centre, clipped to the image."""
    row, col = divmod(position, layer["grid_w"])
    centre = (
        layer["center_x_px"] + col * layer["stride_px"],
        layer["center_y_px"] + row * layer["stride_px"],
    )
    low = [int(np.floor(c - layer["side_px"] / 2 + 0.5)) for c in centre]
    x0, y0 = (max(v, 0) for v in low)
    x1, y1 = (min(v + layer["side_px"], px) for v in low)
    return x0, y0, x1, y1


def test_boxes_hold_the_centre_of_their_peak(edge: Extracted) -> None:
    chosen, layers, *_ = edge
    px = chosen.subject.input_px
    for layer in layers:
        n = layer["grid_h"] * layer["grid_w"]
        boxes = layer_boxes(layer, np.arange(n), px)
        assert [tuple(b) for b in boxes.tolist()] == [naive_box(layer, p, px) for p in range(n)]
        col, row = np.arange(n) % layer["grid_w"], np.arange(n) // layer["grid_w"]
        for axis, cell in ((0, col), (1, row)):
            centre = (layer["center_x_px"], layer["center_y_px"])[axis] + layer["stride_px"] * cell
            assert (boxes[:, axis] <= centre).all()
            assert (centre < boxes[:, axis + 2]).all()
    assert len({layer["side_px"] for layer in layers}) > 2
    assert all(layer["swap_side_px"] <= layer["side_px"] for layer in layers)


def test_every_patch_is_filed_once_under_the_first_layer_that_needs_it(edge: Extracted) -> None:
    chosen, layers, mined, peaks, labels = edge
    px = chosen.subject.input_px
    images = images_of(labels)
    patches, pools = extract(layers, mined, peaks, images, ImageFrame(px))
    seen: set[tuple[int, ...]] = set()
    shared = 0
    for layer in layers:
        name = layer["layer"]
        needed = {
            (e, *naive_box(layer, p, px))
            for row in mined[name].to_pylist()
            if row["status"] == "ok"
            for e, p in zip(row["example"], row["position"], strict=True)
        }
        needed |= {(r["example"], *naive_box(layer, r["position"], px)) for r in peaks[name].to_pylist()}
        filed = [tuple(r.values()) for r in patches[name].drop_columns(["patch_id"]).to_pylist()]
        assert set(filed) == needed - seen
        assert len(filed) == len(set(filed))
        ids = columns.numbers(patches[name], "patch_id")
        assert (np.diff(ids) > 0).all()
        assert np.array_equal(ids, patch_ids(np.array([f[0] for f in filed]), np.array([f[1:] for f in filed]), px))
        shared += len(needed & seen)
        seen |= needed

        pool = pools[name].to_pylist()
        assert [r["pool_idx"] for r in pool] == list(range(len(pool)))
        assert [r["example"] for r in pool] == sorted(r["example"] for r in peaks[name].to_pylist())
        for r in pool:
            box = naive_box(layer, r["position"], px)
            assert r["patch_id"] == patch_ids(np.array([r["example"]]), np.array([box]), px)[0]
            assert r["label"] == labels[r["example"]]
    assert shared > 0, "no two layers share a patch: filing under the first was not tried"


def test_no_patch_is_cut_for_a_neuron_that_is_not_scored(edge: Extracted) -> None:
    chosen, layers, mined, peaks, labels = edge
    name = "capped"
    layer = [row for row in layers if row["layer"] == name]
    assert set(mined[name]["status"].to_pylist()) == {"ok", "excluded"}
    assert {len(r["example"]) for r in mined[name].to_pylist() if r["status"] == "excluded"} == {30}
    patches, _ = extract(
        layer, mined, {name: peaks[name].slice(0, 0)}, images_of(labels), ImageFrame(chosen.subject.input_px)
    )
    scored = {e for r in mined[name].to_pylist() if r["status"] == "ok" for e in r["example"]}
    assert set(patches[name]["example"].to_pylist()) == scored
