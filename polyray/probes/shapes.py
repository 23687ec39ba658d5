"""Which question it answers: *what does a drawn shape look like?*

Place in the flow: `generated` picks from `SHAPES`. A shape is a list of outlines in a unit frame (x rightwards, y
downwards, about −1 to 1) that are painted one after the other, outlines marked as holes cutting out. Size, place,
angle, proportions, colours and the background vary; the silhouette stays.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from polyray.probes.drawing import TURN, Field, cover, grid, mix, noise, plane, saw

_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Shape:
    """Outlines [n, 2] of what is filled and of what is cut out again, and how far it may be turned, in degrees."""

    filled: tuple[Field, ...]
    holes: tuple[Field, ...] = ()
    turn: float = 180.0


def _polygon(*points: tuple[float, float]) -> Field:
    return np.array(points, dtype=np.float64)


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 1.0) -> Field:
    """Part of an ellipse from `start` to `stop` in turns, clockwise from the right."""
    angle = TURN * np.linspace(start, stop, 64)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _circle(x: float, y: float, radius: float) -> Field:
    return _ellipse(x, y, radius, radius)


def _regular(n: int, inner: float | None = None) -> Field:
    """Regular polygon with a corner on top; with an inner radius a star of n points."""
    radii = np.ones(n) if inner is None else np.tile([1.0, inner], n)
    angle = TURN * np.arange(len(radii)) / len(radii) - TURN / 4
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], axis=1)


def _heart() -> Field:
    t = TURN * np.linspace(0, 1, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 16


def _crescent() -> Field:
    outer = _ellipse(0, 0, 1, 1, 0.12, 0.88)
    inner = _ellipse(0.35, 0, 0.73, 0.73, 0.9, 0.1)
    first, last = outer[0], outer[-1]
    inner[0], inner[-1] = last, first
    return np.concatenate([outer, inner])


def _gear(teeth: int) -> Field:
    angle = TURN * (np.arange(4 * teeth) - 0.5) / (4 * teeth)
    radius = np.tile([1.0, 1.0, 0.74, 0.74], teeth)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _teardrop() -> Field:
    t = TURN * np.linspace(0, 1, 64)
    return np.stack([0.72 * np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)], axis=1)


_PETALS = tuple(_circle(0.58 * np.cos(a), 0.58 * np.sin(a), 0.4) for a in TURN * np.arange(5) / 5)

SHAPES: dict[str, Shape] = {
    "circle": Shape((_circle(0, 0, 0.95),)),
    "square": Shape((_polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),), turn=12),
    "triangle": Shape((_regular(3),)),
    "star": Shape((_regular(5, 0.42),)),
    "plus sign": Shape(
        (
            _polygon((-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)),
            _polygon((-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)),
        ),
        turn=12,
    ),
    "heart": Shape((_heart(),), turn=25),
    "crescent moon": Shape((_crescent(),), turn=180),
    "ring": Shape((_circle(0, 0, 0.95),), (_circle(0, 0, 0.55),)),
    "arrow": Shape((_polygon((-1, -0.2), (0.15, -0.2), (0.15, -0.62), (1, 0), (0.15, 0.62), (0.15, 0.2), (-1, 0.2)),)),
    "hexagon": Shape((_regular(6),)),
    "diamond": Shape((_polygon((0, -1), (0.6, 0), (0, 1), (-0.6, 0)),), turn=15),
    "semicircle": Shape((_ellipse(0, -0.45, 1, 1, 0, 0.5),)),
    "flower": Shape(_PETALS, (_circle(0, 0, 0.24),)),
    "gear": Shape((_gear(9),), (_circle(0, 0, 0.3),)),
    "lightning bolt": Shape(
        (_polygon((0.2, -1), (-0.55, 0.15), (-0.08, 0.15), (-0.25, 1), (0.55, -0.25), (0.06, -0.25), (0.5, -1)),),
        turn=20,
    ),
    "teardrop": Shape((_teardrop(),), turn=20),
    "house": Shape(
        (
            _polygon((0, -0.95), (1, -0.1), (-1, -0.1)),
            _polygon((-0.75, -0.15), (0.75, -0.15), (0.75, 0.85), (-0.75, 0.85)),
        ),
        (
            _polygon((-0.15, 0.35), (0.15, 0.35), (0.15, 0.85), (-0.15, 0.85)),
            _polygon((0.35, 0.1), (0.58, 0.1), (0.58, 0.35), (0.35, 0.35)),
            _polygon((-0.58, 0.1), (-0.35, 0.1), (-0.35, 0.35), (-0.58, 0.35)),
        ),
        turn=10,
    ),
    "fish": Shape(
        (_ellipse(0.2, 0, 0.8, 0.48), _polygon((-0.4, 0), (-1, -0.5), (-0.85, 0), (-1, 0.5))),
        (_circle(0.62, -0.12, 0.09),),
        turn=25,
    ),
    "smiley face": Shape(
        (_circle(0, 0, 0.95),),
        (
            _ellipse(-0.34, -0.25, 0.13, 0.2),
            _ellipse(0.34, -0.25, 0.13, 0.2),
            np.concatenate([_ellipse(0, 0.1, 0.6, 0.55, 0.03, 0.47), _ellipse(0, 0.1, 0.6, 0.3, 0.47, 0.03)]),
        ),
        turn=15,
    ),
    "key": Shape(
        (
            _circle(-0.58, 0, 0.42),
            _polygon((-0.3, -0.12), (1, -0.12), (1, 0.12), (-0.3, 0.12)),
            _polygon((0.8, 0), (1, 0), (1, 0.42), (0.8, 0.42)),
            _polygon((0.45, 0), (0.63, 0), (0.63, 0.34), (0.45, 0.34)),
        ),
        (_circle(-0.62, 0, 0.2),),
    ),
}
"""Label -> shape."""


def silhouette(rng: Generator, px: int, shape: Shape) -> Field:
    """Share of every pixel that the shape covers, at a random place, size, angle and proportion.

    Args:
        rng: the picture's generator.
        px: side of the picture in pixels.
        shape: what is drawn.

    Returns:
        Coverage of shape [px, px], 0 to 1; the shape lies wholly within the picture.
    """
    angle = np.radians(rng.uniform(-shape.turn, shape.turn))
    size = rng.uniform(0.24, 0.42) * np.array([rng.uniform(0.88, 1), rng.uniform(0.88, 1)])
    if rng.random() < 0.5:
        size[0] = -size[0]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outlines = [(outline * size) @ turn for outline in (*shape.filled, *shape.holes)]
    reach = np.abs(np.concatenate(outlines)).max(axis=0)
    middle = 0.5 + rng.uniform(-1, 1, 2) * np.maximum(0.49 - reach, 0)
    image = Image.new("L", (px * _SUPERSAMPLE, px * _SUPERSAMPLE))
    draw = ImageDraw.Draw(image)
    for i, outline in enumerate(outlines):
        # Pillow puts whole numbers on pixel centres.
        corners = (middle + outline) * px * _SUPERSAMPLE - 0.5
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=255 if i < len(shape.filled) else 0)
    return np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float64) / 255


def draw_shape(rng: Generator, px: int, shape: Shape) -> Field:
    """A shape in one colour before a background of another lightness: RGB of shape [px, px, 3], 0 to 1."""
    light, dark = rng.uniform(0.68, 0.95), rng.uniform(0.08, 0.36)
    behind, front = (light, dark) if rng.random() < 0.5 else (dark, light)
    picture = _background(rng, px, behind)
    colour = _colour(rng, front, rng.uniform(0.1, 0.4))
    fill = colour + rng.uniform(0, 0.12) * (noise(rng, px, (6, 6), 2) - 0.5)[:, :, None]
    return picture + (fill - picture) * silhouette(rng, px, shape)[:, :, None]


def _colour(rng: Generator, light: float, chroma: float) -> Field:
    hue = TURN * rng.random() + TURN * np.array([0, 1 / 3, 2 / 3])
    return np.clip(light + chroma * np.cos(hue), 0, 1)


def _background(rng: Generator, px: int, light: float) -> Field:
    """A plain or faintly textured ground of about the given lightness."""
    ground = _colour(rng, light, rng.uniform(0, 0.25))
    other = np.clip(ground + rng.uniform(0.06, 0.16) * rng.choice([-1, 1]), 0, 1)
    u, v, pixel = plane(rng, px, (5, 11), 180)
    match int(rng.integers(6)):
        case 0:
            share = noise(rng, px, (3, 3), 3)
        case 1:
            share = cover(0.25 - np.abs(saw(u)), pixel)
        case 2:
            share = cover(0.25 - np.hypot(saw(u), saw(v)), pixel)
        case 3:
            x, y = grid(px)
            share = 0.5 + x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
        case 4:
            share = noise(rng, px, (px / 3, px / 3))
        case _:
            share = np.zeros((px, px))
    return mix(ground, other, share)
