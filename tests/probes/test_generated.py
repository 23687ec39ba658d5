"""Drawn pictures: pure functions of seed, class and index, varied within a class, distinct between classes."""

import numpy as np
import pytest
from numpy.random import Generator, Philox
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler

from polyray.config import Generated
from polyray.errors import DataError
from polyray.probes import generated
from polyray.probes.drawing import cells, cover, noise, palette, saw
from polyray.probes.generated import CLASSES, draw
from polyray.probes.images import ProbeSet, open_probe, pixel_hash
from polyray.probes.shapes import SHAPES, Shape, silhouette
from polyray.probes.textures import TEXTURES

SQUARE = Shape((np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),), turn=5)


def opened(**rest: object) -> ProbeSet:
    return open_probe(Generated.model_validate({"kind": "generated", **rest}))


def rng(key: int) -> Generator:
    return Generator(Philox(key=key))


def gradient_energy(rgb: np.ndarray) -> tuple[float, float]:
    """Mean squared difference between horizontal and between vertical neighbours."""
    gray = rgb.astype(float).mean(axis=2)
    return float((np.diff(gray, axis=1) ** 2).mean()), float((np.diff(gray, axis=0) ** 2).mean())


def test_classes() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 48
    assert set(CLASSES) == {*TEXTURES, *SHAPES}
    assert {c in SHAPES for c in CLASSES[:4]} == {True, False}
    assert all(label == label.lower() and label.replace(" ", "").isalpha() for label in CLASSES)


def test_order_and_labels() -> None:
    probe = opened(n_classes=3, n_per_class=2, image_px=64)
    assert probe.labels == [c for c in CLASSES[:3] for _ in range(2)]
    assert probe.names[:3] == [f"{CLASSES[0]} 0", f"{CLASSES[0]} 1", f"{CLASSES[1]} 0"]
    assert {k: v for k, v in probe.describe().items() if k != "notes"} == {
        "kind": "generated",
        "name": "drawn textures and shapes",
        "n": 6,
        "n_classes": 3,
    }
    for example in (-1, 6):
        with pytest.raises(IndexError):
            probe.read(example)


@pytest.mark.parametrize("px", [64, 77, 128])
def test_every_class_draws_every_size(px: int) -> None:
    probe = opened(n_per_class=1, image_px=px)
    for example in range(48):
        rgb = probe.read(example)
        assert rgb.shape == (px, px, 3)
        assert rgb.dtype == np.uint8
        assert rgb.max() > rgb.min()


def test_pictures_depend_on_seed_class_and_index_alone() -> None:
    few, many = opened(n_classes=5, n_per_class=2), opened(n_classes=48, n_per_class=7)
    backwards = {i: few.read(i) for i in reversed(range(10))}
    for number in range(5):
        for index in range(2):
            expected = draw(0, number, index, 96)
            assert np.array_equal(backwards[number * 2 + index], expected)
            assert np.array_equal(many.read(number * 7 + index), expected)


def test_no_two_pictures_are_the_same() -> None:
    seeds = (0, 1, 2**64 - 2, 2**64 - 1)
    hashes = [pixel_hash(draw(seed, number, index, 64)) for seed in seeds for number in range(48) for index in range(2)]
    assert len(set(hashes)) == 4 * 48 * 2


def test_the_stream_of_a_picture_reaches_no_other() -> None:
    """Class and index stand in counter words that drawing never reaches; the first word counts the draws."""
    raw = Philox(counter=[0, 0, 3, 7], key=[5, 1])
    draws = raw.random_raw(8)
    shifted = Philox(counter=[1, 0, 3, 7], key=[5, 1]).random_raw(4)
    assert np.array_equal(draws[4:], shifted)


def test_digest() -> None:
    base = opened(n_classes=4, n_per_class=3, image_px=64).digest()
    assert opened(n_classes=4, n_per_class=3, image_px=64).digest() == base
    others = [{"seed": 1}, {"n_classes": 5}, {"n_per_class": 4}, {"image_px": 65}]
    digests = [opened(**{"n_classes": 4, "n_per_class": 3, "image_px": 64, **other}).digest() for other in others]
    assert len({base, *digests}) == 5


def test_digest_sees_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = opened(n_classes=4, n_per_class=3, image_px=64)
    digests = {probe.digest()}
    monkeypatch.setattr(generated, "VERSION", 2)
    digests.add(probe.digest())
    monkeypatch.setattr(generated, "VERSION", 1)
    monkeypatch.setitem(TEXTURES, CLASSES[0], lambda rng, px: np.zeros((px, px, 3)))
    digests.add(probe.digest())
    assert len(digests) == 3


def test_a_seed_beyond_64_bits_is_refused() -> None:
    assert opened(n_classes=2, n_per_class=1, seed=2**64 - 1).read(0).shape == (96, 96, 3)
    with pytest.raises(DataError, match=r"probe\.seed must be below 2\*\*64, got 18446744073709551616"):
        opened(seed=2**64)


@pytest.mark.parametrize("index", range(12))
def test_stripes_run_as_their_labels_say(index: int) -> None:
    across, down = gradient_energy(draw(0, CLASSES.index("horizontal stripes"), index, 96))
    assert down > 3 * across
    across, down = gradient_energy(draw(0, CLASSES.index("vertical stripes"), index, 96))
    assert across > 3 * down
    across, down = gradient_energy(draw(0, CLASSES.index("diagonal stripes"), index, 96))
    assert 1 / 3 < across / down < 3


@pytest.mark.parametrize(
    ("label", "share"),
    [
        ("circle", np.pi * 0.95**2),
        ("square", 1.7**2),
        ("triangle", 3 * np.sqrt(3) / 4),
        ("hexagon", 3 * np.sqrt(3) / 2),
        ("diamond", 1.2),
        ("ring", np.pi * (0.95**2 - 0.55**2)),
        ("semicircle", np.pi / 2),
        ("plus sign", 2 * 1.9 * 0.6 - 0.6**2),
    ],
)
def test_silhouettes_have_the_area_of_their_shape(label: str, share: float) -> None:
    """The same generator gives every shape the same size, so that areas are in the proportion of the outlines."""
    areas = [(silhouette(rng(i), 128, SHAPES[label]).mean(), silhouette(rng(i), 128, SQUARE).mean()) for i in range(20)]
    for area, square in areas:
        assert area / square == pytest.approx(share / 4, rel=0.02)
    assert max(areas)[0] > 1.4 * min(areas)[0]


@pytest.mark.parametrize("label", SHAPES)
def test_silhouettes_lie_within_the_picture(label: str) -> None:
    places = []
    for i in range(30):
        mask = silhouette(rng(i), 64, SHAPES[label])
        assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) < 0.5
        assert mask.max() == 1
        places.append(np.argwhere(mask > 0.5).mean(axis=0))
    assert np.std(places, axis=0).min() > 2


def test_pictures_of_a_class_vary() -> None:
    for number, label in enumerate(CLASSES):
        pictures = np.stack([draw(0, number, index, 64) for index in range(8)]).astype(float)
        colour = pictures.mean(axis=(1, 2))
        assert np.std(colour, axis=0).max() > 8, label
        spread = np.abs(pictures[:, None] - pictures[None]).mean(axis=(2, 3, 4))
        assert spread[~np.eye(8, dtype=bool)].min() > 8, label


def test_classes_are_told_apart_by_their_spectrum() -> None:
    """A linear classifier on the power spectrum of 32 × 32 grays and on colour statistics, far above chance (1/48)."""
    features, labels = [], []
    for number in range(48):
        for index in range(12):
            image = Image.fromarray(draw(0, number, index, 64))
            gray = np.asarray(image.convert("L").reduce(2), dtype=float)
            spectrum = np.log1p(np.abs(np.fft.rfft2(gray - gray.mean())))
            features.append(np.concatenate([spectrum.ravel(), np.asarray(image, dtype=float).std(axis=(0, 1))]))
            labels.append(number)
    scaled = StandardScaler().fit_transform(features)
    accuracy = cross_val_score(LogisticRegression(max_iter=200, C=0.01), scaled, labels, cv=3).mean()
    assert accuracy > 0.4


def test_palette_keeps_lightness_apart() -> None:
    for key in range(50):
        light = np.sort(palette(rng(key), 3).mean(axis=1))
        assert np.diff(light).min() > 0.1


def test_noise_is_smooth_and_bounded() -> None:
    field = noise(rng(0), 96, (4, 4), 1)
    assert 0 <= field.min() < 0.3
    assert 0.7 < field.max() <= 1
    # The steepest slope of a smoothstep between lattice values 0 and 1 is 1.5 per cell.
    assert np.abs(np.diff(field, axis=1)).max() <= 1.5 * 4 / 96


def test_cells_against_a_search_over_all_points() -> None:
    n, px = 4.0, 48
    depth, index, du, dv = cells(rng(3), px, n)
    # Where two pixels share a cell, they share its point; no pixel is nearer to another cell's point.
    u, v = np.meshgrid(n * (np.arange(px) + 0.5) / px, n * (np.arange(px) + 0.5) / px)
    points = {}
    for cell in np.unique(index):
        at = index == cell
        pu, pv = (u - du)[at], (v - dv)[at]
        assert np.ptp(pu) < 1e-9
        assert np.ptp(pv) < 1e-9
        points[cell] = (pu[0], pv[0])
    distances = np.stack([np.hypot(u - pu, v - pv) for pu, pv in points.values()])
    assert np.allclose(distances.min(axis=0), np.hypot(du, dv))
    assert depth.min() >= 0


def test_cover_and_saw() -> None:
    assert cover(np.array([-1.0, -0.05, 0.0, 0.05, 1.0]), 0.2).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert saw(np.array([0.0, 0.25, 0.5, 0.75, 1.0, -0.25])).tolist() == [-0.5, -0.25, 0, 0.25, -0.5, 0.25]
