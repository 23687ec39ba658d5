"""Which question it answers: *what does a drawn texture look like?*

Place in the flow: `generated` picks from `TEXTURES` and finishes what is drawn here (light, blur, noise). Every
function draws one square picture from a random generator: colours, scale, angle and place vary, the pattern stays.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from polyray.probes.drawing import TURN, Field, cells, cover, grid, mix, noise, palette, plane, polar, saw, tones

Texture = Callable[[Generator, int], Field]
"""Draws RGB of shape [px, px, 3], 0 to 1 (beyond is cut off later), from a generator and a side in pixels."""


def _bands(rng: Generator, u: Field, pixel: float | Field) -> Field:
    low, high = palette(rng, 2)
    return mix(low, high, cover(rng.uniform(0.15, 0.32) - np.abs(saw(u)), pixel))


def horizontal_stripes(rng: Generator, px: int) -> Field:
    _, v, pixel = plane(rng, px, (3.5, 10), 7)
    return _bands(rng, v, pixel)


def vertical_stripes(rng: Generator, px: int) -> Field:
    u, _, pixel = plane(rng, px, (3.5, 10), 7)
    return _bands(rng, u, pixel)


def diagonal_stripes(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (3.5, 10), 12)
    return _bands(rng, (u + (v if rng.random() < 0.5 else -v)) * np.sqrt(0.5), pixel)


def checkerboard(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (2.5, 6), 25)
    a, b = (np.clip((np.abs(saw(w)) - 0.25) / pixel * 2, -1, 1) for w in (u, v))
    low, high = palette(rng, 2)
    return mix(low, high, 0.5 + 0.5 * a * b)


def polka_dots(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (3.5, 7), 45)
    if rng.random() < 0.5:
        u = u + 0.5 * (np.floor(v) % 2)
    low, high = palette(rng, 2)
    return mix(low, high, cover(rng.uniform(0.2, 0.38) - np.hypot(saw(u), saw(v)), pixel))


def grid_lines(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (4, 9), 20)
    low, high = palette(rng, 2)
    line = 0.5 - rng.uniform(0.04, 0.1)
    return mix(low, high, cover(np.maximum(np.abs(saw(u)), np.abs(saw(v))) - line, pixel))


def brick_wall(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (5, 8), 6)
    u = u / rng.uniform(1.9, 2.6) + 0.5 * (np.floor(v) % 2)
    brick, mortar = tones(
        rng,
        ((0.62, 0.27, 0.2), (0.8, 0.77, 0.72)),
        ((0.5, 0.2, 0.15), (0.62, 0.58, 0.54)),
        ((0.76, 0.55, 0.38), (0.45, 0.42, 0.4)),
        ((0.55, 0.53, 0.5), (0.85, 0.84, 0.8)),
    )
    each = rng.uniform(-0.12, 0.12, (16, 16))[np.floor(v).astype(int) % 16, np.floor(u).astype(int) % 16]
    joint = rng.uniform(0.4, 0.44)
    depth = np.minimum(joint - np.abs(saw(v)), (0.5 - (0.5 - joint) / 2 - np.abs(saw(u))) * 2)
    grain = noise(rng, px, (px / 3, px / 3)) * 0.15 - 0.075
    return mix(mortar, brick + (each + grain)[:, :, None], cover(depth, pixel))


def honeycomb(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (4, 8), 30)
    row = np.sqrt(3)
    a = saw(u), saw(v / row) * row
    b = saw(u + 0.5), saw(v / row + 0.5) * row
    nearer = np.hypot(*a) < np.hypot(*b)
    x, y = (np.abs(np.where(nearer, p, q)) for p, q in zip(a, b, strict=True))
    rim = 0.5 - np.maximum(x, x / 2 + y * row / 2)
    wall, cell = (
        palette(rng, 2)
        if rng.random() < 0.4
        else tones(rng, ((0.95, 0.75, 0.25), (0.5, 0.28, 0.05)), ((0.35, 0.2, 0.05), (0.95, 0.7, 0.15)))
    )
    shade = mix(cell * 0.75, cell, np.clip(rim * 3, 0, 1))
    return shade + (wall - shade) * (1 - cover(rim - rng.uniform(0.05, 0.1), pixel))[:, :, None]


def wavy_lines(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (4, 8), 90)
    return _bands(rng, u + rng.uniform(0.35, 0.6) * np.sin(TURN * v * rng.uniform(0.25, 0.45)), pixel * 1.4)


def zigzag(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (4, 8), 20)
    if rng.random() < 0.5:
        u, v = v, u
    return _bands(rng, u + rng.uniform(1.2, 2) * np.abs(saw(v * rng.uniform(0.5, 0.8))), pixel * 1.6)


def concentric_circles(rng: Generator, px: int) -> Field:
    radius, _ = polar(rng, px)
    n = rng.uniform(5, 11)
    return _bands(rng, radius * n + rng.random(), n / px)


def spiral(rng: Generator, px: int) -> Field:
    radius, turn = polar(rng, px)
    n, arms = rng.uniform(3.5, 6), rng.integers(1, 3) * rng.choice([-1, 1])
    return _bands(rng, radius * n + arms * turn + rng.random(), n / px)


def sunburst(rng: Generator, px: int) -> Field:
    radius, turn = polar(rng, px)
    n = rng.integers(7, 17)
    return _bands(rng, turn * n + rng.random(), n / px / TURN / np.maximum(radius, 0.5 / px))


def plaid(rng: Generator, px: int) -> Field:
    u, v, _ = plane(rng, px, (1.6, 3), 10)
    colours = palette(rng, 4)
    widths = rng.choice([1, 1, 2, 3, 5], 7)
    half = np.repeat(rng.permutation(np.arange(7) % 4), widths)
    sett = colours[np.concatenate([half, half[::-1]])]
    warp, weft = (sett[np.floor((w % 1) * len(sett)).astype(int) % len(sett)] for w in (u, v))
    return 0.5 * (warp + weft)


def fish_scales(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (4, 7), 12)
    rim_colour, scale = palette(rng, 2)
    distance, found = np.full((px, px), 0.6), np.zeros((px, px), bool)
    # Rows half a scale apart; the upper row lies over the lower one.
    for up in (2, 1, 0, -1):
        row = np.floor(v * 2) - up
        d = np.hypot(saw(u + 0.5 * (row % 2)), v - row / 2)
        hit = ~found & (d < 0.56)
        distance, found = np.where(hit, d, distance), found | hit
    shade = scale * (1.1 - 0.55 * (distance / 0.56) ** 2)[:, :, None]
    return shade + (rim_colour - shade) * cover(distance - rng.uniform(0.47, 0.5), pixel)[:, :, None]


def wood_grain(rng: Generator, px: int) -> Field:
    dark, light = tones(
        rng,
        ((0.4, 0.24, 0.12), (0.66, 0.45, 0.26)),
        ((0.55, 0.36, 0.2), (0.84, 0.66, 0.44)),
        ((0.22, 0.13, 0.08), (0.42, 0.27, 0.17)),
        ((0.5, 0.22, 0.12), (0.7, 0.38, 0.22)),
    )
    x, _ = grid(px)
    ring = rng.uniform(5, 10) * x + rng.uniform(2.5, 5) * noise(rng, px, (2.5, 0.8), 2)
    fibre = noise(rng, px, (px / 2, 3))
    picture = mix(light, dark, (ring - np.floor(ring)) ** 1.5 * 0.8 + 0.3 * fibre)
    return picture if rng.random() < 0.5 else picture.transpose(1, 0, 2)


def marble(rng: Generator, px: int) -> Field:
    stone, vein = tones(
        rng,
        ((0.93, 0.92, 0.9), (0.42, 0.42, 0.45)),
        ((0.85, 0.73, 0.68), (0.5, 0.32, 0.28)),
        ((0.12, 0.13, 0.14), (0.8, 0.78, 0.72)),
        ((0.3, 0.48, 0.4), (0.85, 0.9, 0.84)),
    )
    u, _, _ = plane(rng, px, (0.8, 1.8), 90)
    wave = u + rng.uniform(1.5, 2.5) * noise(rng, px, (3, 3), 4)
    line = (1 - np.abs(np.sin(np.pi * wave))) ** rng.uniform(3, 6)
    cloud = 0.35 * noise(rng, px, (4, 4), 3) ** 2
    return mix(stone, vein, np.clip(line + cloud, 0, 1))


def television_static(rng: Generator, px: int) -> Field:
    dot = int(rng.integers(1, 3))
    n = -(-px // dot)
    gray = rng.random((n, n, 1)) ** rng.uniform(0.7, 1.5)
    colour = rng.uniform(0, 0.25) * (rng.random((n, n, 3)) - 0.5)
    return np.repeat(np.repeat(gray + colour, dot, axis=0), dot, axis=1)[:px, :px]


def clouds(rng: Generator, px: int) -> Field:
    sky, white = tones(
        rng,
        ((0.25, 0.5, 0.85), (0.97, 0.97, 0.98)),
        ((0.45, 0.66, 0.9), (0.92, 0.93, 0.95)),
        ((0.4, 0.45, 0.52), (0.82, 0.83, 0.85)),
        ((0.85, 0.5, 0.4), (0.98, 0.88, 0.75)),
    )
    puff = noise(rng, px, (rng.uniform(2, 4), rng.uniform(3, 5)), 5)
    _, y = grid(px)
    return mix(sky, white, np.clip((puff - rng.uniform(0.38, 0.5)) * 4.5, 0, 1)) + 0.08 * y[:, :, None]


def cracked_ground(rng: Generator, px: int) -> Field:
    clay, crack = tones(
        rng,
        ((0.66, 0.53, 0.4), (0.2, 0.14, 0.1)),
        ((0.78, 0.7, 0.6), (0.33, 0.26, 0.2)),
        ((0.55, 0.36, 0.26), (0.14, 0.08, 0.06)),
        ((0.55, 0.54, 0.52), (0.15, 0.15, 0.15)),
    )
    n = rng.uniform(3.5, 6.5)
    depth, cell, _, _ = cells(rng, px, n)
    depth = depth + 0.12 * (noise(rng, px, (px / 5, px / 5)) - 0.5)
    shade = rng.uniform(-0.07, 0.07, cell.max() + 1)[cell] + 0.16 * (noise(rng, px, (px / 4, px / 4), 2) - 0.5)
    return mix(crack, clay, cover(depth - rng.uniform(0.035, 0.06), 2 * n / px)) + shade[:, :, None]


def stained_glass(rng: Generator, px: int) -> Field:
    n = rng.uniform(3, 5.5)
    depth, cell, du, dv = cells(rng, px, n)
    hue = TURN * rng.random((cell.max() + 1, 1))
    glass = 0.5 + rng.uniform(0.3, 0.5, hue.shape) * np.cos(hue + TURN * np.array([0, 1 / 3, 2 / 3]))
    glow = 1.15 - 0.4 * np.hypot(du, dv)
    lead = np.full(3, rng.uniform(0.02, 0.1))
    return lead + (glass[cell] * glow[:, :, None] - lead) * cover(depth - rng.uniform(0.05, 0.08), n / px)[:, :, None]


def leopard_spots(rng: Generator, px: int) -> Field:
    fur, middle, spot = tones(
        rng,
        ((0.85, 0.66, 0.36), (0.68, 0.44, 0.18), (0.12, 0.08, 0.05)),
        ((0.92, 0.8, 0.58), (0.76, 0.55, 0.3), (0.2, 0.12, 0.07)),
        ((0.8, 0.78, 0.74), (0.6, 0.58, 0.54), (0.14, 0.14, 0.14)),
    )
    n = rng.uniform(5, 8)
    _, cell, du, dv = cells(rng, px, n)
    wobble = 0.18 * (noise(rng, px, (3 * n, 3 * n)) - 0.5)
    radius = np.hypot(du, dv) + wobble
    gap = np.cos(np.arctan2(dv, du) - TURN * rng.random(cell.max() + 1)[cell]) > 0.75
    ring = cover(0.11 - np.abs(radius - 0.28), n / px) * ~gap
    picture = mix(fur, middle, cover(0.28 - radius, n / px))
    return picture + (spot - picture) * ring[:, :, None] + 0.08 * (noise(rng, px, (px / 2, px / 2)) - 0.5)[:, :, None]


def zebra_stripes(rng: Generator, px: int) -> Field:
    black, white = tones(rng, ((0.07, 0.06, 0.06), (0.94, 0.93, 0.9)), ((0.14, 0.1, 0.08), (0.9, 0.85, 0.76)))
    u, _, pixel = plane(rng, px, (4, 6.5), 90)
    warp = rng.uniform(2, 3.5) * noise(rng, px, (2, 2), 2)
    # Stripes that swell, taper and end: the threshold wanders as well as the phase.
    width = 0.25 + 0.4 * (noise(rng, px, (4, 4)) - 0.5)
    return mix(white, black, cover(width - np.abs(saw(u + warp)), 1.5 * pixel))


def camouflage(rng: Generator, px: int) -> Field:
    layers = tones(
        rng,
        ((0.32, 0.36, 0.2), (0.5, 0.46, 0.3), (0.2, 0.22, 0.13), (0.3, 0.2, 0.12)),
        ((0.76, 0.66, 0.5), (0.6, 0.48, 0.34), (0.86, 0.8, 0.68), (0.44, 0.34, 0.24)),
        ((0.55, 0.57, 0.58), (0.34, 0.36, 0.38), (0.78, 0.79, 0.8), (0.15, 0.16, 0.17)),
        ((0.3, 0.42, 0.24), (0.42, 0.55, 0.3), (0.16, 0.26, 0.16), (0.62, 0.6, 0.42)),
    )
    n = rng.uniform(3.5, 6)
    picture = np.broadcast_to(layers[0], (px, px, 3))
    for layer in layers[1:]:
        blot = noise(rng, px, (n, n), 3) - rng.uniform(0.53, 0.58)
        picture = picture + (layer - picture) * cover(blot, 0.03)[:, :, None]
    return picture


def maze(rng: Generator, px: int) -> Field:
    u, v, pixel = plane(rng, px, (6, 10), 6)
    wall, floor = palette(rng, 2)
    row, column = np.floor(v).astype(int) % 16, np.floor(u).astype(int) % 16
    leaning = np.where(rng.random((16, 16))[row, column] < 0.5, 1, -1)
    a, b = saw(u) * leaning, saw(v)
    # One diagonal of every cell is a wall; its ends reach into the corners of the neighbours.
    line = np.abs(a - b) * np.sqrt(0.5)
    return mix(floor, wall, cover(rng.uniform(0.12, 0.17) - line, pixel))


def confetti(rng: Generator, px: int) -> Field:
    ground = palette(rng, 2)[0] if rng.random() < 0.6 else np.full(3, rng.choice([0.06, 0.95]))
    scale = 3
    image = Image.new("RGB", (px * scale, px * scale), tuple((ground * 255).astype(int)))
    draw = ImageDraw.Draw(image)
    n = int(rng.integers(70, 130))
    middle, angle = rng.uniform(-0.03, 1.03, (n, 2)), TURN * rng.random(n)
    length, breadth = rng.uniform(0.025, 0.05, n), rng.uniform(0.012, 0.03, n)
    hue = TURN * rng.random((n, 1)) + TURN * np.array([0, 1 / 3, 2 / 3])
    colour = np.clip((0.55 + 0.5 * np.cos(hue)) * 255, 0, 255).astype(int)
    along = np.stack([np.cos(angle), np.sin(angle)], axis=1) * length[:, None]
    across = np.stack([-np.sin(angle), np.cos(angle)], axis=1) * breadth[:, None]
    corners = middle[:, None] + np.stack([along + across, along - across, -along - across, across - along], axis=1)
    for piece, fill in zip(corners * px * scale, colour, strict=True):
        draw.polygon([tuple(corner) for corner in piece.tolist()], fill=tuple(fill.tolist()))
    return np.asarray(image.reduce(scale), dtype=np.float64) / 255


def basket_weave(rng: Generator, px: int) -> Field:
    u, v, _ = plane(rng, px, (4, 7), 20)
    dark, light = (
        palette(rng, 2)
        if rng.random() < 0.4
        else tones(rng, ((0.3, 0.18, 0.08), (0.8, 0.6, 0.36)), ((0.22, 0.2, 0.16), (0.86, 0.8, 0.66)))
    )
    upright = (np.floor(u) + np.floor(v)) % 2 == 0
    across, along = (np.where(upright, saw(p), saw(q)) for p, q in ((u, v), (v, u)))
    strand = saw((across + 0.5) * rng.integers(2, 4)) * 2
    bulge = (1 - strand**2) ** 0.5 * (1 - 1.6 * along**2)
    return mix(dark, light, np.clip(bulge, 0, 1))


def color_gradient(rng: Generator, px: int) -> Field:
    x, y = grid(px)
    colours = palette(rng, int(rng.integers(2, 4)))
    if rng.random() < 0.3:
        radius, _ = polar(rng, px)
        way = radius * rng.uniform(1.1, 1.6)
    else:
        angle = TURN * rng.random()
        way = 0.5 + rng.uniform(0.7, 1) * (np.cos(angle) * x + np.sin(angle) * y)
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(way, stops, channel) for channel in colours.T], axis=2)


TEXTURES: dict[str, Texture] = {
    "horizontal stripes": horizontal_stripes,
    "vertical stripes": vertical_stripes,
    "diagonal stripes": diagonal_stripes,
    "checkerboard": checkerboard,
    "polka dots": polka_dots,
    "grid lines": grid_lines,
    "brick wall": brick_wall,
    "honeycomb": honeycomb,
    "wavy lines": wavy_lines,
    "zigzag": zigzag,
    "concentric circles": concentric_circles,
    "spiral": spiral,
    "sunburst": sunburst,
    "plaid": plaid,
    "fish scales": fish_scales,
    "wood grain": wood_grain,
    "marble": marble,
    "television static": television_static,
    "clouds": clouds,
    "cracked ground": cracked_ground,
    "stained glass": stained_glass,
    "leopard spots": leopard_spots,
    "zebra stripes": zebra_stripes,
    "camouflage": camouflage,
    "maze": maze,
    "confetti": confetti,
    "basket weave": basket_weave,
    "color gradient": color_gradient,
}
"""Label -> drawing function."""
