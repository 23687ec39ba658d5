"""Window and extract: which part of the image does a neuron see at its peak?

Source: arXiv 2508.16950, section 3.2; Luo et al. 2016 for the effective window, which is our deviation: a theoretical
receptive field is mostly empty, a box that holds most of the input-gradient energy is what the neuron sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import Science
from polyray.errors import ConfigError, DataError
from polyray.kernels import random, windows
from polyray.models.layers import LayerInfo
from polyray.models.vision import Subject
from polyray.probes.images import ProbeSet, view
from polyray.psi.mine import Images
from polyray.psi.pool import smallest_hashes

ENERGY_BATCH = 4
"""Images per backward pass: gradients keep every activation, so far fewer fit than in mining."""


def window(
    subject: Subject, probe: ProbeSet, science: Science, images: Images, info: LayerInfo, n_neurons: int
) -> pa.Table:
    """The sides of a layer's boxes, measured once on a fixed sample of images.

    Returns:
        The layer's row of `layers`. `theoretical` takes the receptive field for both sides. Sides may be larger
        than the input: boxes are clipped to it where they lie.
    """
    if science.extract.window == "theoretical":
        # Twice the input's side covers it from every position, the corners too.
        side = swap_side = info.receptive_px or 2 * science.subject.input_px
    else:
        energy = _energy(subject, probe, science, images, info)
        center_x = info.center_x_px + info.stride_px * (info.grid_w // 2)
        center_y = info.center_y_px + info.stride_px * (info.grid_h // 2)
        side, swap_side = (
            windows.central_side(energy, center_x, center_y, share)
            for share in (science.extract.energy, science.extract.swap_energy)
        )
    return columns.layer_row(info, n_neurons, science.extract.window, side, swap_side=swap_side, grid_w=info.grid_w)


def _energy(subject: Subject, probe: ProbeSet, science: Science, images: Images, info: LayerInfo) -> torch.Tensor:
    sample = smallest_hashes(science.seed, random.WINDOW_SAMPLE, 0, images.distinct, science.extract.n_sample)
    views = []
    for example in sample.tolist():
        try:
            views.append(view(probe.read(example), science.subject.input_px, science.subject.resize))
        except DataError:
            continue  # it has its row since `index`, or will have one from `mine`
    if not views:
        raise DataError("no image of the window sample can be read any more; is the probe set still there?")
    total = torch.zeros(science.subject.input_px, science.subject.input_px, dtype=torch.float64)
    for start in range(0, len(views), ENERGY_BATCH):
        batch = subject.prepare(np.stack(views[start : start + ENERGY_BATCH]))
        # Other signs for every batch: their mean over the sample is what the energy converges to.
        signs = int(random.bits(science.seed, random.WINDOW_SIGNS, random.layer_word(info.name), start))
        total += subject.readouts.input_energy(batch, info.name, signs).cpu().double()
    return total


def patch_ids(example: NDArray[np.int64], box: NDArray[np.int64], input_px: int) -> NDArray[np.int64]:
    """Identity of a patch: image and box in one integer, so that equal patches are the same wherever they arise.

    Args:
        example: images.
        box: x0, y0, x1, y1 with at least one pixel in each direction.
        input_px: side of the subject's input.

    Raises:
        ConfigError: the largest image index does not fit beside boxes of this input size into 63 bits.
    """
    if len(example) and int(example.max()) >= max_examples(input_px):
        raise ConfigError(
            f"{int(example.max()) + 1} images at input_px {input_px} are too many to number patches; "
            f"at most {max_examples(input_px)} fit. Lower subject.input_px or split the probe set."
        )
    ids = example.astype(np.int64)
    for part in (box[:, 0], box[:, 1], box[:, 2] - 1, box[:, 3] - 1):
        ids = ids * input_px + part
    return ids


def max_examples(input_px: int) -> int:
    """How many images can be numbered beside the boxes of an input of this side."""
    return (2**63 - 1) // input_px**4


def from_patch_ids(ids: NDArray[np.int64], input_px: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image and box of each patch: the inverse of `patch_ids`."""
    rest, parts = ids, []
    for extra in (1, 1, 0, 0):
        rest, part = np.divmod(rest, input_px)
        parts.append(part + extra)
    return rest, np.stack(parts[::-1], axis=1)


def layer_boxes(layer: Mapping[str, Any], position: NDArray[np.int64], input_px: int) -> NDArray[np.int64]:
    """Boxes that are embedded for positions of a layer, given its row of `layers`."""
    return windows.boxes(
        torch.from_numpy(np.ascontiguousarray(position)),
        layer["grid_w"],
        layer["center_x_px"],
        layer["center_y_px"],
        layer["stride_px"],
        layer["side_px"],
        input_px,
    ).numpy()


def layer_patches(
    layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64], input_px: int
) -> NDArray[np.int64]:
    """Patch of each (image, position) of a layer."""
    return patch_ids(example, layer_boxes(layer, position, input_px), input_px)


class Frame(Protocol):
    """What of an example stands for a peak, and how such patches are numbered."""

    def boxes(
        self, layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Box of each (example, position) of a layer, given its row of `layers`: x0, y0, x1, y1."""

    def patches(
        self, layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Number of each patch: equal boxes of an example have the same, whatever the layer."""

    def of_patches(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Example and box of each patch."""


@dataclass(frozen=True)
class ImageFrame:
    """Boxes of images, in pixels of the subject's input."""

    input_px: int

    def boxes(
        self, layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """`layer_boxes`."""
        return layer_boxes(layer, position, self.input_px)

    def patches(
        self, layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """`layer_patches`."""
        return layer_patches(layer, example, position, self.input_px)

    def of_patches(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`from_patch_ids`."""
        return from_patch_ids(ids, self.input_px)


def extract(
    layers: Sequence[Mapping[str, Any]],
    mined: Mapping[str, pa.Table],
    pool_peaks: Mapping[str, pa.Table],
    images: Images,
    frame: Frame,
) -> tuple[dict[str, pa.Table], dict[str, pa.Table]]:
    """Every (image, box) that any neuron or pool needs, once.

    Args:
        layers: rows of `layers`, in order of depth.
        mined: rows of `mined` by layer.
        pool_peaks: rows of `pool_peaks` by layer.
        images: the probe set's labels.
        frame: what stands for a peak.

    Returns:
        Rows of `patches`, each filed under the first layer that needs it, and rows of `pool`, by layer.
    """
    known = np.zeros(0, dtype=np.int64)
    patches: dict[str, pa.Table] = {}
    pools: dict[str, pa.Table] = {}
    for layer in layers:
        name = layer["layer"]
        scored = mined[name].filter(pa.compute.equal(mined[name]["status"], "ok"))
        example, position = (
            scored[c].combine_chunks().flatten().to_numpy().astype(np.int64) for c in ("example", "position")
        )
        peaks = pool_peaks[name].sort_by("example")
        pool_example, pool_position = (columns.numbers(peaks, c).astype(np.int64) for c in ("example", "position"))
        own = frame.patches(layer, example, position)
        pool_ids = frame.patches(layer, pool_example, pool_position)
        needed = np.unique(np.concatenate([own, pool_ids]))
        new = np.setdiff1d(needed, known, assume_unique=True)
        known = np.union1d(known, new)
        patch_example, box = frame.of_patches(new)
        patches[name] = columns.table(
            "patches",
            {"patch_id": new, "example": patch_example}
            | {c: box[:, i] for i, c in enumerate(("x0", "y0", "x1", "y1"))},
        )
        pools[name] = columns.table(
            "pool",
            {
                "pool_idx": np.arange(len(peaks)),
                "example": pool_example,
                "neuron": peaks["neuron"],
                "position": pool_position,
                "label": [images.labels[c] for c in images.label_of[pool_example]],
                "patch_id": pool_ids,
            },
        )
    return patches, pools
