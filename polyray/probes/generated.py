"""Which question it answers: *which pictures can be shown where no data can be had?*

Place in the flow: one of the sources behind `polyray.probes.images.open_probe`. Every picture is a function of seed,
class and index alone, drawn anew whenever it is read; nothing is stored.

Source: the counter-based generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) as NumPy implements it.
"""

import hashlib
import json

import numpy as np
from numpy.random import Generator, Philox

from polyray.config import Generated
from polyray.errors import DataError
from polyray.probes.drawing import TURN, Field, grid
from polyray.probes.pixels import Pixels
from polyray.probes.probe_set import ProbeSet
from polyray.probes.shapes import SHAPES, draw_shape
from polyray.probes.textures import TEXTURES

VERSION = 1
"""Goes up with every change of what is drawn; part of the digest and of every picture's random key."""

# Textures and shapes take turns in proportion, so that the first few classes hold both.
CLASSES = tuple(
    label
    for _, label in sorted(
        ((i + 0.5) / len(kind), label) for kind in (TEXTURES, SHAPES) for i, label in enumerate(kind)
    )
)


class GeneratedSet(ProbeSet):
    """Drawn textures and shapes, class by class.

    Raises:
        DataError: the seed has more than 64 bits.
    """

    kind = "generated"

    def __init__(self, config: Generated) -> None:
        if config.seed >= 2**64:
            raise DataError(f"probe.seed must be below 2**64, got {config.seed}.")
        self._config = config
        self.name = "drawn textures and shapes"
        self.notes = ["drawn, not photographed: a network trained on photographs sees them off its own distribution"]
        classes = CLASSES[: config.n_classes]
        self.labels = [label for label in classes for _ in range(config.n_per_class)]
        self.names = [f"{label} {index}" for label in classes for index in range(config.n_per_class)]

    def read(self, example: int) -> Pixels:
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        number, index = divmod(example, self._config.n_per_class)
        return draw(self._config.seed, number, index, self._config.image_px)

    def digest(self) -> str:
        """SHA-256 over the parameters, `VERSION`, the labels and the pixels of the first picture of every class.

        The pixels tell apart two releases of NumPy or Pillow that draw differently.
        """
        config = self._config.model_dump()
        parameters = {**config, "version": VERSION, "classes": CLASSES[: self._config.n_classes]}
        digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
        for number in range(self._config.n_classes):
            digest.update(self.read(number * self._config.n_per_class).tobytes())
        return digest.hexdigest()


def draw(seed: int, number: int, index: int, px: int) -> Pixels:
    """Draws one picture.

    Args:
        seed: seed of the set, below 2**64.
        number: class, an index into `CLASSES`.
        index: picture of the class, from 0.
        px: side in pixels.

    Returns:
        RGB of shape [px, px, 3], a function of the arguments alone.
    """
    # Philox counts up in the first counter word; class and index stand in the highest, so no two pictures meet.
    words = np.array([0, 0, index, number, seed, VERSION], dtype=np.uint64)
    rng = Generator(Philox(counter=words[:4], key=words[4:]))
    label = CLASSES[number]
    picture = draw_shape(rng, px, SHAPES[label]) if label in SHAPES else TEXTURES[label](rng, px)
    return _photograph(rng, picture)


def _photograph(rng: Generator, picture: Field) -> Pixels:
    """Uneven light, blur and noise, as a camera would add; then 8 bits."""
    px = len(picture)
    x, y = grid(px)
    angle, slope = TURN * rng.random(), rng.uniform(0, 0.35)
    light = rng.uniform(0.8, 1.1) * (1 + slope * (np.cos(angle) * x + np.sin(angle) * y))
    picture = picture * light[:, :, None]
    if rng.random() < 0.4:
        picture = _blur(picture)
    picture = picture + rng.uniform(0, 0.05) * rng.standard_normal((px, px, 3))
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def _blur(picture: Field) -> Field:
    """Binomial blur, (1, 2, 1)/4 along both axes, edges repeated."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16
