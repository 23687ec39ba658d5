"""Which question it answers: *what are drawn pictures made of?*

Place in the flow: a leaf under `textures`, `shapes` and `generated`: colours, coordinates, noise and antialiasing.
Fields are float64, since single precision would let a pixel differ between machines.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Field = NDArray[np.float64]
"""One value per pixel, shape [px, px]; or RGB, 0 to 1, of shape [px, px, 3]."""

TURN = 2 * np.pi


def palette(rng: Generator, n: int) -> Field:
    """`n` colours of any hue with evenly spaced lightness in random order, so that no two melt into each other."""
    light = np.linspace(rng.uniform(0.08, 0.3), rng.uniform(0.72, 0.95), n)
    hue = TURN * (rng.random() + rng.uniform(-0.25, 0.25, n))
    chroma = rng.uniform(0.05, 0.35, n)
    wheel = np.cos(hue[:, None] + TURN * np.array([0, 1 / 3, 2 / 3]))
    return rng.permutation(np.clip(light[:, None] + chroma[:, None] * wheel, 0, 1))


def tones(rng: Generator, *choices: tuple[tuple[float, float, float], ...]) -> Field:
    """One of several named sets of colours, each colour a little off."""
    chosen = np.array(choices[rng.integers(len(choices))])
    return np.clip(chosen + rng.uniform(-0.06, 0.06, chosen.shape), 0, 1)


def mix(low: Field, high: Field, share: Field) -> Field:
    """Colour between two, `share` from 0 (low) to 1 (high) per pixel."""
    return low + (high - low) * share[:, :, None]


def grid(px: int) -> tuple[Field, Field]:
    """Pixel centres, rightwards and downwards, from −0.5 to 0.5 across the picture."""
    axis = (np.arange(px) + 0.5) / px - 0.5
    return np.broadcast_to(axis, (px, px)), np.broadcast_to(axis[:, None], (px, px))


def plane(rng: Generator, px: int, periods: tuple[float, float], tilt: float) -> tuple[Field, Field, float]:
    """Coordinates of a plane pattern: (u, v, pixel), one unit a period, turned by up to `tilt` degrees either way.

    `pixel` is the width of a pixel in the same unit, for `cover`.
    """
    x, y = grid(px)
    n, angle = rng.uniform(*periods), np.radians(rng.uniform(-tilt, tilt))
    u = n * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 64)
    v = n * (np.cos(angle) * y - np.sin(angle) * x) + rng.uniform(0, 64)
    return u, v, n / px


def polar(rng: Generator, px: int) -> tuple[Field, Field]:
    """Radius (0.5 = half a picture) and angle in turns around a centre near the middle."""
    x, y = grid(px)
    x, y = x - rng.uniform(-0.2, 0.2), y - rng.uniform(-0.2, 0.2)
    return np.hypot(x, y), np.arctan2(y, x) / TURN


def cover(depth: Field, pixel: float | Field) -> Field:
    """Share of a pixel inside an outline, from its signed depth below it: antialiasing over one pixel."""
    return np.clip(0.5 + depth / pixel, 0, 1)


def saw(u: Field) -> Field:
    """Distance to the middle of the period, signed: −0.5 to 0.5."""
    return u - np.floor(u) - 0.5


def noise(rng: Generator, px: int, cells: tuple[float, float], octaves: int = 1) -> Field:
    """Smooth value noise in 0 to 1, `cells` bumps from left to right and from top to bottom, halved per octave."""
    total, weight = np.zeros((px, px)), 0.0
    for octave in range(octaves):
        scale = 2.0**octave
        axes = [_smooth_axis(px, n * scale, rng.random()) for n in cells]
        (left, along), (top, down) = axes
        lattice = rng.random((top[-1] + 2, left[-1] + 2))
        rows = lattice[top] + (lattice[top + 1] - lattice[top]) * down[:, None]
        total += (rows[:, left] + (rows[:, left + 1] - rows[:, left]) * along) / scale
        weight += 1 / scale
    return total / weight


def _smooth_axis(px: int, cells: float, offset: float) -> tuple[NDArray[np.intp], Field]:
    place = (np.arange(px) + 0.5) / px * cells + offset
    cell = np.floor(place)
    t = place - cell
    return cell.astype(np.intp), t * t * (3 - 2 * t)


def cells(rng: Generator, px: int, n: float) -> tuple[Field, NDArray[np.intp], Field, Field]:
    """Voronoi cells of jittered points, about `n` across.

    Returns:
        Depth below the nearest edge in periods, index of the cell, and offset (u, v) from the cell's point.
    """
    x, y = grid(px)
    u, v = n * (x + 0.5) + 2, n * (y + 0.5) + 2
    size = int(np.ceil(n)) + 4
    jitter = rng.uniform(0.1, 0.9, (size, size, 2))
    column, row = np.floor(u).astype(np.intp), np.floor(v).astype(np.intp)
    first = np.full((px, px), np.inf)
    second, index = first.copy(), np.zeros((px, px), np.intp)
    points = (jitter + np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=2)).reshape(-1, 2)
    for down in (-1, 0, 1):
        for along in (-1, 0, 1):
            candidate = (row + down) * size + column + along
            squared = (u - points[candidate, 0]) ** 2 + (v - points[candidate, 1]) ** 2
            index = np.where(squared < first, candidate, index)
            second = np.minimum(second, np.maximum(first, squared))
            first = np.minimum(first, squared)
    du, dv = u - points[index, 0], v - points[index, 1]
    return (np.sqrt(second) - np.sqrt(first)) / 2, index, du, dv
