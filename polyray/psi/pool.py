"""Pool: which peaks of which random images does mining keep beside the neurons' own?

Place in the flow: part of mine. Two kinds: each layer's *pool*, one random neuron's peak in each of many images, which
the null draws are made of; and, for patch swaps, every neuron's peak in a few images, from which random patches are
drawn.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import Science
from polyray.kernels import random
from polyray.models.layers import LayerInfo


class Responses(NamedTuple):
    """What the swept neurons of a layer say of some images."""

    examples: NDArray[np.int64]
    """The images [n]."""
    response: torch.Tensor
    """Maximum over positions [n, C]."""
    position: torch.Tensor
    """Raster index of the peak [n, C]."""

    def of(self, wanted: NDArray[np.int64]) -> "Responses":
        """Those of wanted images alone."""
        rows = np.flatnonzero(np.isin(self.examples, wanted))
        at = torch.from_numpy(rows)
        return Responses(self.examples[rows], self.response[at], self.position[at])

    def counts(self, info: LayerInfo) -> torch.Tensor:
        """Whether the neuron has a peak in the image at all [n, C]: a corner of an empty map is none."""
        return torch.isfinite(self.response) & ((self.response > 0) | (not info.positive_only))


def smallest_hashes(seed: int, stream: int, word: int, examples: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """n of the examples drawn uniformly without replacement: those of smallest random bits, ascending."""
    hashes = random.bits(seed, stream, word, torch.from_numpy(examples)).numpy()
    order = np.lexsort((examples, hashes))
    return np.sort(examples[order[:n]])


def pool_neurons(science: Science, info: LayerInfo, responses: Responses) -> NDArray[np.int64]:
    """The neuron whose peak each image gives to the layer's pool.

    Drawn uniformly among the neurons for which the image counts at all: a neuron that does not fire on it has no peak
    there, and a corner of its empty map would be a patch that no neuron's examples can hold.

    Args:
        science: the sweep's settings.
        info: the layer.
        responses: of the swept neurons to the images.

    Returns:
        Column of the neuron for each image, −1 where no neuron fires.
    """
    counts = responses.counts(info)
    able = counts.sum(1)
    examples = torch.from_numpy(responses.examples)
    u = random.uniform(science.seed, random.POOL_NEURON, random.layer_word(info.name), examples)
    nth = torch.minimum((u * able).long(), able - 1)
    reached = counts.long().cumsum(1) == nth[:, None] + 1
    return torch.where(able > 0, (reached & counts).int().argmax(1), -1).numpy()


def pool_peaks(science: Science, info: LayerInfo, neurons: NDArray[np.int64], responses: Responses) -> pa.Table:
    """Rows of `pool_peaks` of images drawn for the pool: where a random neuron of the layer peaks in each."""
    column = pool_neurons(science, info, responses)
    rows = np.flatnonzero(column >= 0)
    column = column[rows]
    return columns.table(
        "pool_peaks",
        {
            "example": responses.examples[rows],
            "neuron": neurons[column],
            "position": responses.position.numpy()[rows, column],
        },
    )


def swap_peaks(info: LayerInfo, responses: Responses) -> pa.Table:
    """Rows of `swap_peaks`: where every swept neuron peaks in images drawn for patch swaps."""
    n, width = responses.position.shape
    unfired = ~responses.counts(info).numpy().ravel()
    flat = pa.array(responses.position.numpy().ravel(), type=pa.int32(), mask=unfired)
    offsets = pa.array(np.arange(n + 1) * width, type=pa.int32())
    return columns.table(
        "swap_peaks", {"example": responses.examples, "position": pa.ListArray.from_arrays(offsets, flat)}
    )
