"""Boxes, the side that holds a share of the energy and places elsewhere, against plain arithmetic."""

import math

import numpy as np
import pytest
import torch

from polyray.kernels.windows import boxes, central_side, disjoint_places, random_places


def start(center: float, side: int) -> int:
    """First pixel of a run of `side` pixels around `center` (the left edge of pixel i lies at i), halves up."""
    return math.floor(center - side / 2 + 0.5)


def naive_side(energy: np.ndarray, center_x: float, center_y: float, share: float) -> int:
    H, W = energy.shape
    for side in range(1, 4 * max(H, W)):
        x0, y0 = start(center_x, side), start(center_y, side)
        inside = sum(
            energy[y, x] for y in range(max(y0, 0), min(y0 + side, H)) for x in range(max(x0, 0), min(x0 + side, W))
        )
        if inside >= share * energy.sum():
            return side
    raise AssertionError("no square holds the share")


@pytest.mark.parametrize(("H", "W"), [(5, 9), (12, 7), (10, 10)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_central_side_is_the_smallest_that_holds_the_share(H: int, W: int, share: float) -> None:
    rng = np.random.default_rng(H)
    for center_x, center_y in [(W / 2, H / 2), (2.5, 3.5), (3.0, 2.0), (0.5, H - 0.5), (2.3, 3.9)]:
        energy = rng.integers(0, 50, (H, W)).astype(np.float64) + 0.125
        got = central_side(torch.from_numpy(energy), center_x, center_y, share)
        assert got == naive_side(energy, center_x, center_y, share), (center_x, center_y)


def test_central_side_of_known_energies() -> None:
    spike = np.zeros((9, 9))
    spike[4, 4] = 3.0
    assert central_side(torch.from_numpy(spike), 4.5, 4.5, 0.9) == 1
    ring = np.zeros((9, 9))
    ring[1, 4] = ring[4, 1] = ring[7, 4] = ring[4, 7] = 1.0
    assert central_side(torch.from_numpy(ring), 4.5, 4.5, 0.9) == 7
    assert central_side(torch.ones(10, 10, dtype=torch.float64), 5.0, 5.0, 0.35) == 6
    assert central_side(torch.ones(10, 10, dtype=torch.float64), 5.0, 5.0, 0.999) == 10


def test_energy_that_says_nothing_gives_the_whole_image() -> None:
    for value in (0.0, math.nan, math.inf):
        assert central_side(torch.full((5, 9), value, dtype=torch.float64), 4.5, 2.5, 0.5) == 9


def test_more_energy_needs_no_smaller_side_and_the_scale_is_nothing() -> None:
    energy = torch.from_numpy(np.random.default_rng(1).random((16, 16)) ** 8)
    sides = [central_side(energy, 8.0, 8.0, share) for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)]
    assert sides == sorted(sides)
    assert central_side(1e-6 * energy, 8.0, 8.0, 0.5) == sides[2]


@pytest.mark.parametrize("center", [(8.0, 8.0), (6.5, 9.5), (7.25, 8.0)])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_boxes_cut_what_central_side_measured(center: tuple[float, float], share: float) -> None:
    """The box of position 0 holds the share, and no smaller one does."""
    energy = torch.from_numpy(np.random.default_rng(2).integers(1, 30, (16, 16)).astype(np.float64))

    def held(side: int) -> float:
        x0, y0, x1, y1 = boxes(torch.tensor([0]), 1, *center, 1.0, side, 16)[0].tolist()
        return (energy[y0:y1, x0:x1].sum() / energy.sum()).item()

    side = central_side(energy, *center, share)
    assert held(side) >= share
    assert all(held(s) < share for s in range(1, side))


@pytest.mark.parametrize(
    ("grid_h", "grid_w", "center_x", "center_y", "stride", "side", "input_px"),
    [
        (2, 3, 5.0, 5.0, 10.0, 6, 40),
        (7, 7, 16.0, 16.0, 32.0, 75, 224),
        (5, 3, 1.5, 2.5, 4.0, 3, 24),
        (14, 14, 7.75, 8.25, 16.0, 38, 224),
        (3, 5, 0.5, 0.5, 1.0, 1, 5),
        (4, 2, 3.3, 2.7, 5.5, 4, 30),
        (2, 2, 16.0, 16.0, 32.0, 200, 64),
    ],
)
def test_boxes_are_plain_arithmetic(
    grid_h: int, grid_w: int, center_x: float, center_y: float, stride: float, side: int, input_px: int
) -> None:
    position = torch.from_numpy(np.random.default_rng(0).permutation(grid_h * grid_w))
    got = boxes(position, grid_w, center_x, center_y, stride, side, input_px)
    assert got.shape == (grid_h * grid_w, 4)
    assert not got.is_floating_point()
    for p, box in zip(position.tolist(), got.tolist(), strict=True):
        row, column = divmod(p, grid_w)
        x0, y0 = start(center_x + stride * column, side), start(center_y + stride * row, side)
        expected = [max(x0, 0), max(y0, 0), min(x0 + side, input_px), min(y0 + side, input_px)]
        assert box == expected, (row, column)


def test_boxes_are_within_the_image_and_never_empty() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        input_px, grid_w = int(rng.integers(8, 60)), int(rng.integers(1, 9))
        center = rng.uniform(-20, 80, 2)
        side, stride = int(rng.integers(1, 90)), float(rng.uniform(0, 20))
        position = torch.from_numpy(rng.integers(0, grid_w * 9, 20))
        x0, y0, x1, y1 = boxes(position, grid_w, *center.tolist(), stride, side, input_px).T
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 <= input_px).all()
        assert (y1 <= input_px).all()
        assert (x1 - x0 >= 1).all()
        assert (y1 - y0 >= 1).all()
        assert (x1 - x0 <= side).all()
        assert (y1 - y0 <= side).all()


def test_boxes_of_no_positions() -> None:
    assert boxes(torch.zeros(0, dtype=torch.int64), 7, 4.0, 4.0, 8.0, 5, 56).shape == (0, 4)


def all_places(box: list[int], input_px: int, step: int) -> list[tuple[int, ...]]:
    """Every box of this size on the box's own lattice that shares no pixel with it."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    inside = {(x, y) for x in range(x0, x1) for y in range(y0, y1)}
    return [
        (x, y, x + w, y + h)
        for y in range(y0 % step, input_px - h + 1, step)
        for x in range(x0 % step, input_px - w + 1, step)
        if inside.isdisjoint((i, j) for i in range(x, x + w) for j in range(y, y + h))
    ]


@pytest.mark.parametrize(("input_px", "step"), [(5, 1), (6, 1), (9, 2), (12, 4), (10, 3), (7, 4)])
def test_disjoint_places_are_all_places_with_equal_chances(input_px: int, step: int) -> None:
    rng = np.random.default_rng(input_px)
    taken = []
    for _ in range(60):
        (x0, x1), (y0, y1) = (sorted(rng.choice(input_px + 1, 2, replace=False).tolist()) for _ in range(2))
        taken.append([x0, y0, x1, y1])
    n_none = 0
    for box in taken:
        expected = all_places(box, input_px, step)
        if not expected:
            n_none += 1
            u = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
            assert disjoint_places(torch.tensor([box] * 3), input_px, u, step).tolist() == [[-1] * 4] * 3
            continue
        # Two values of u in each of as many equal bins as there are places: every place twice, from one bin.
        n = len(expected)
        u = (torch.arange(n, dtype=torch.float64)[:, None] + torch.tensor([0.001, 0.999])) / n
        got = disjoint_places(torch.tensor([box] * (2 * n)), input_px, u.flatten(), step)
        assert got.dtype == torch.int64
        first, second = ([tuple(b) for b in got[side::2].tolist()] for side in (0, 1))
        assert first == second
        assert sorted(first) == sorted(expected), box
    assert 0 < n_none < 60


def test_disjoint_places_of_many_boxes_at_once() -> None:
    rng = np.random.default_rng(4)
    corner, size = rng.integers(0, 14, (200, 2)), rng.integers(1, 90, (200, 2))
    box = torch.from_numpy(16 * np.concatenate([corner, corner], 1))
    box[:, 2:] = (box[:, 2:] + torch.from_numpy(size)).clamp(max=224)
    u = torch.from_numpy(rng.random(200))
    got = disjoint_places(box, 224, u, 16)
    assert (got >= 0).all()
    assert (got <= 224).all()
    assert torch.equal(got[:, 2:] - got[:, :2], box[:, 2:] - box[:, :2])
    assert (got[:, :2] % 16 == 0).all()
    assert ((got[:, :2] >= box[:, 2:]) | (got[:, 2:] <= box[:, :2])).any(1).all()
    singles = [disjoint_places(b[None], 224, v[None], 16) for b, v in zip(box, u, strict=True)]
    assert torch.equal(torch.cat(singles), got)
    assert torch.equal(disjoint_places(box.int(), 224, u, 16), got)


def test_no_place_beside_a_box_in_the_middle_or_the_whole_image() -> None:
    box = torch.tensor([[0, 0, 10, 10], [3, 3, 7, 7], [0, 0, 10, 5], [1, 0, 6, 10], [4, 4, 8, 8]])
    u = torch.full((5,), 0.5, dtype=torch.float64)
    nowhere = [-1] * 4
    assert disjoint_places(box, 10, u).tolist() == [nowhere, nowhere, [0, 5, 10, 10], nowhere, [6, 0, 10, 4]]
    assert disjoint_places(box, 10, u, 5).tolist() == [nowhere, nowhere, [0, 5, 10, 10], nowhere, nowhere]
    # The ends of what a uniform draw can give.
    for end in (2.0**-53, 1 - 2.0**-53):
        got = disjoint_places(box[2:3], 10, torch.tensor([end], dtype=torch.float64))
        assert got.tolist() == [[0, 5, 10, 10]]
    assert disjoint_places(torch.zeros(0, 4, dtype=torch.int64), 10, torch.zeros(0, dtype=torch.float64)).shape == (
        0,
        4,
    )


@pytest.mark.parametrize(
    ("width", "height", "input_px", "step"), [(2, 3, 7, 1), (4, 1, 12, 4), (5, 3, 13, 4), (6, 6, 6, 1), (1, 2, 9, 2)]
)
def test_random_places_are_all_places_with_equal_chances(width: int, height: int, input_px: int, step: int) -> None:
    lefts, tops = (range(0, input_px - side + 1, step) for side in (width, height))
    expected = [[x, y, x + width, y + height] for x in lefts for y in tops]
    for part in (0.001, 0.999):
        u = [[(i + part) / len(lefts), (j + part) / len(tops)] for i in range(len(lefts)) for j in range(len(tops))]
        n = len(u)
        got = random_places(
            torch.full((n,), width), torch.full((n,), height), input_px, torch.tensor(u, dtype=torch.float64), step
        )
        assert got.dtype == torch.int64
        assert got.tolist() == expected


def test_random_places_of_sizes_that_do_not_fit() -> None:
    width, height = torch.tensor([8, 9, 8, 3]), torch.tensor([8, 2, 20, 8])
    u = torch.full((4, 2), 0.99, dtype=torch.float64)
    assert random_places(width, height, 8, u).tolist() == [[0, 0, 8, 8], [-1] * 4, [-1] * 4, [5, 0, 8, 8]]
    assert random_places(width[:0], height[:0], 8, u[:0]).shape == (0, 4)
