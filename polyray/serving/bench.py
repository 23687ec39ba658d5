"""Bench: the network under study, ready for single swaps.

Which question it answers: *what does the neuron say of this image with that patch in it?* Place in the flow: what an
actor of the service holds; knows neither Ray nor pages. It does what `psi/swap.py` does for a condition that pastes
into the host's box, with the parts of it that make the pictures and ask the network, so that the numbers are those of
the table `swaps` wherever that has the same swap.
"""

import io
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from polyray.config import Config, parse_any
from polyray.errors import ConfigError, DataError, ModelError
from polyray.models.encoders import scaled
from polyray.models.vision import Subject, load_subject
from polyray.overlay import base_of, opened
from polyray.probes.images import open_probe, pixel_hash, view
from polyray.psi import hosts, mine, plant, swap
from polyray.psi_text_config import PsiTextConfig
from polyray.settings import SwapConfig
from polyray.store import Store
from polyray.view.pictures import probe_of
from polyray.view.trying import Answer, Place, Question, Seen

Picture = NDArray[np.uint8]

_QUALITY = 92
"""Of pictures in which an edge may be what matters."""
PATCH_PX = 96
"""Longest side at which a patch is shown by itself."""


class Bench:
    """The subject of a run and its probe set.

    Args:
        out: the dataset.
        probe: where the probe set lies, if not where the run's config says.

    Raises:
        StoreError: there is no dataset.
        DataError: the run has no images, or the probe set is not to be had.
        ModelError: the network cannot be built here, or is not the one that was swept.
    """

    def __init__(self, out: str, probe: str | None = None) -> None:
        store = opened(out)
        config = vision_config(store.run)
        self._science = config.science
        self._swap = self._science.swap or SwapConfig()
        self.notes: list[str] = []
        self._probe = open_probe(probe_of(self._science.probe, probe))
        here = self._science.numerics
        torch.set_num_threads(here.threads)
        if here.device == "cuda" and not torch.cuda.is_available():
            here = here.model_copy(update={"device": "cpu"})
            self.notes.append("the run was made on a GPU, this is a CPU: the last digits may differ")
        torch.use_deterministic_algorithms(here.device == "cuda", warn_only=True)
        if (made := store.run["provenance"].get("torch")) != (found := version("torch")):
            self.notes.append(f"the run was made with torch {made}, this is {found}: the last digits may differ")
        self._subject = _checked(load_subject(self._science.subject, here, self._science.plant), store.run)
        self._infos = {info.name: info for info in self._subject.readouts.layers(self._subject.selection)}
        table = store.read("images")
        images = mine.distinct_images(table)
        if self._science.plant is not None:
            images = plant.mined_half(images, int(base_of(store).run["config"]["science"]["seed"]))
            _install(self._subject, store, list(self._infos))
        self._fill = swap.fill_colour(table, images)

    def answer(self, question: Question) -> Answer:
        """What the neuron says of a host before, with its box filled, and with the patch in the box.

        A host whose peak the dataset does not hold is asked first where the neuron peaks; one in which it does not
        fire has none, and the box lies in its middle.

        Raises:
            DataError: an image cannot be read, or is not the one that the run saw.
            ModelError: the layer is not as the dataset has it.
        """
        layer = dict(question.layer)
        name, notes = layer["layer"], list(self.notes)
        self._require_layer(layer, question)
        host, donor = self._view(question.host), self._view(question.donor)
        at = hosts.window(layer, self._science.subject.input_px, self._swap.max_frac)
        if at.reduced:
            notes.append("the box is smaller than what the neuron sees, since swap.max_frac bounds it")
        position = question.host.position
        if position is None:
            position, note = self._peak(host, layer, question.neuron)
            notes += note
        if question.donor.position is None:
            raise DataError("the dataset does not say where the neuron peaks in the image of the patch.")
        box, source_box = (
            [int(x) for x in hosts.boxes(layer, at, np.array([p]), self._science.subject.input_px)[0]]
            for p in (position, question.donor.position)
        )
        shown = [
            host,
            swap.compose("baseline", host, box, self._fill),
            swap.compose("aligned", host, box, self._fill, (donor, source_box)),
        ]
        before, baseline, after = self._seen(shown, name, question.neuron, position)
        return Answer(
            before,
            baseline,
            after,
            _shown_patch(donor, source_box),
            _four(box),
            _four(source_box),
            self._science.subject.input_px,
            position,
            swap.spread_of(np.array(question.activation, dtype=np.float64)),
            tuple(notes),
        )

    def _require_layer(self, layer: Mapping[str, Any], question: Question) -> None:
        info = self._infos.get(layer["layer"])
        if info is None or (info.grid_h, info.grid_w, info.width) != tuple(
            layer[c] for c in ("grid_h", "grid_w", "width")
        ):
            raise ModelError(f"the network here has no layer {layer['layer']!r} of the shape that the run saw.")
        if not 0 <= question.neuron < info.width:
            raise ModelError(f"layer {layer['layer']!r} has neurons 0 to {info.width - 1}, got {question.neuron}.")

    def _view(self, place: Place) -> Picture:
        """What the subject sees of an image, which must hold the pixels that the run saw."""
        if not 0 <= place.example < len(self._probe):
            raise DataError(f"the probe set here has {len(self._probe)} images, and no image {place.example}.")
        try:
            pixels = self._probe.read(place.example)
        except DataError as e:
            raise DataError(f"image {place.example} cannot be read: {e}") from e
        if pixel_hash(pixels) != place.pixel_hash:
            raise DataError(f"image {place.example} of the probe set here is not the one that the run saw.")
        return view(pixels, self._science.subject.input_px, self._science.subject.resize)

    def _peak(self, host: Picture, layer: Mapping[str, Any], neuron: int) -> tuple[int, list[str]]:
        name = layer["layer"]
        response, position = self._subject.responses(host[None], [name])[name]
        value = float(response[0, neuron])
        if math.isfinite(value) and (value > 0 or not self._infos[name].positive_only):
            return int(position[0, neuron]), []
        middle = (layer["grid_h"] // 2) * layer["grid_w"] + layer["grid_w"] // 2
        return middle, ["the neuron does not fire in this image, so that it has no peak: the box lies in the middle"]

    def _seen(self, shown: list[Picture], layer: str, neuron: int, position: int) -> list[Seen]:
        found: list[Seen] = []
        for start in range(0, len(shown), self._subject.micro_batch):
            batch = shown[start : start + self._subject.micro_batch]
            of, at = (np.full(len(batch), x, dtype=np.int64) for x in (neuron, position))
            answers = self._subject.responses_at(np.stack(batch), layer, of, at)
            for picture, response, peak in zip(batch, *(x.tolist() for x in answers), strict=True):
                found.append(Seen(_finite(response), _finite(peak), _jpeg(picture)))
        return found


def vision_config(run: Mapping[str, Any]) -> Config:
    """The config of a run over images.

    Raises:
        DataError: it is of another kind, or unknown to this version.
    """
    try:
        config = parse_any(run["config"])
    except ConfigError as e:
        raise DataError(f"the run's config is none that this version knows: {e}") from e
    if not isinstance(config, Config) or isinstance(config, PsiTextConfig):
        raise DataError("a run over texts has no images, and so no patches to swap.")
    return config


def _checked(subject: Subject, run: Mapping[str, Any]) -> Subject:
    """The subject, if it has the weights that were swept."""
    swept = run["provenance"]["subject"]["weights_digest"]
    if subject.digest != swept:
        raise ModelError(
            f"the weights here are others than those that were swept: their digest is {subject.digest}, run.json says "
            f"{swept}. Have subject.weights of the run's config lead to the same file here."
        )
    return subject


def _install(subject: Subject, store: Store, layers: list[str]) -> None:
    plant.install(subject, {layer: store.read("planted", layer) for layer in layers})


def _shown_patch(donor: Picture, box: list[int]) -> bytes:
    x0, y0, x1, y1 = box
    patch = donor[y0:y1, x0:x1]
    larger = PATCH_PX / max(patch.shape[:2])
    height, width = (max(1, round(n * larger)) for n in patch.shape[:2])
    return _jpeg(scaled(torch.from_numpy(np.ascontiguousarray(patch)), height, width).numpy())


def _four(box: list[int]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    return x0, y0, x1, y1


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _jpeg(picture: Picture) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="JPEG", quality=_QUALITY, subsampling=0)
    return out.getvalue()
