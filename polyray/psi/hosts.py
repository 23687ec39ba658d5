"""Hosts: who takes part in a neuron's patch swaps, and where?

Place in the flow: first half of swap; `psi/swap.py` shows the pictures that follow. Everything is a function of the
seed and the neuron, so that any swap can be drawn again. Source: arXiv 2508.16950, section 5.3. Ours: hosts spread
over all clusters; no example in two roles, so that differences between hosts are independent of each other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from polyray.config import Science
from polyray.kernels import random, windows
from polyray.psi.extract import layer_boxes

Ints = NDArray[np.int64]

NONE = -1
"""Index where there is nobody for a role."""
_KINDS = {"real": 0, "null": 1}


def swapped(science: Science, layer: str, neurons: Ints) -> Ints:
    """The neurons of a layer whose patches are swapped: all, or `swap.n_neurons` of them drawn uniformly, ascending.

    Drawn before it is known which can be scored: those that cannot have no swaps and are not replaced.
    """
    return _drawn(science, layer, neurons, None if science.swap is None else science.swap.n_neurons)


def null_swapped(science: Science, layer: str, neurons: Ints) -> Ints:
    """The swapped neurons beside which a null neuron stands: `swap.n_null` drawn uniformly, ascending."""
    return _drawn(science, layer, swapped(science, layer, neurons), 0 if science.swap is None else science.swap.n_null)


def _drawn(science: Science, layer: str, neurons: Ints, n: int | None) -> Ints:
    word = random.layer_word(layer)
    hashes = random.bits(science.seed, random.SWAP_NEURON, word, torch.from_numpy(neurons)).numpy()
    return np.sort(neurons[np.lexsort((neurons, hashes))[:n]])


class Examples(NamedTuple):
    """Clustered examples of a neuron: distinct images."""

    example: Ints
    """Image [n]."""
    position: Ints
    """Raster index of the peak [n]."""
    cluster: Ints
    """Cluster, from 0 [n]."""
    activation: NDArray[np.float64]
    """Response of the intact image [n]; NaN where it is not known."""


class Peaks(NamedTuple):
    """Where a neuron peaks in the images from which random patches are drawn."""

    example: Ints
    """Image [R]."""
    position: Ints
    """Raster index of the peak [R]; `NONE` where the neuron does not fire."""


class Roles(NamedTuple):
    """Who does what in each of n swaps of a neuron: indices, `NONE` where there is nobody."""

    host: Ints
    """Into the examples."""
    aligned: Ints
    """Donor of the host's cluster, into the examples."""
    other: Ints
    """Donor of another cluster, into the examples."""
    random: Ints
    """Random image, into the peaks."""


def roles(examples: Examples, peaks: Peaks, n_hosts: int, seed: int, layer: str, neuron: int, kind: str) -> Roles:
    """Draws hosts and donors.

    The members of each cluster stand in random order; hosts come first, as many aligned donors next. A host takes for
    its donor of another cluster the first of all those left that nobody took, and none when they are used up: one donor
    set against many hosts would make their differences one and the same, and one that is an aligned donor elsewhere
    would count on both sides. So no example has two roles, and examples whose labels mean nothing are exchangeable
    between roles, which is the null of aligned − non_aligned. Random images are none of the examples in a role.

    Args:
        examples: the neuron's clustered examples.
        peaks: where it peaks in random images.
        n_hosts: hosts wanted; a cluster of m members has at most m // 2, since every host needs a donor.
        seed: the sweep's seed.
        layer: name of the layer.
        neuron: index of the neuron.
        kind: real or null.

    Returns:
        Roles of at most n_hosts hosts, cluster by cluster; none where no cluster has two members.
    """
    words = (random.layer_word(layer), neuron, _KINDS[kind])
    order = np.argsort(_bits(seed, random.SWAP_ROLE, words, examples.example), kind="stable")
    members = [order[examples.cluster[order] == c] for c in range(int(examples.cluster.max(initial=-1)) + 1)]
    n_of = _spread([len(m) // 2 for m in members], n_hosts)
    left = order[~np.isin(order, np.concatenate([m[: 2 * n] for m, n in zip(members, n_of, strict=True)] or [order]))]
    host, aligned = (
        np.concatenate([np.zeros(0, np.int64), *(m[i * n : (i + 1) * n] for m, n in zip(members, n_of, strict=True))])
        for i in (0, 1)
    )
    other = np.full(len(host), NONE, dtype=np.int64)
    # One host of every cluster after the other, so that none has all that are left.
    turn = np.argsort(np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in n_of)]), kind="stable")
    free = left.tolist()
    for i in turn.tolist():
        cluster = examples.cluster[host[i]]
        first = next((d for d in free if examples.cluster[d] != cluster), None)
        if first is not None:
            free.remove(first)
            other[i] = first
    used = examples.example[np.concatenate([host, aligned, other[other != NONE]])]
    return Roles(host, aligned, other, _random_images(len(host), used, peaks, seed, words))


def _spread(most: Sequence[int], n: int) -> list[int]:
    """n hosts spread over clusters as evenly as what each can have allows, the first ones first."""
    found = [0] * len(most)
    while sum(found) < n and found != list(most):
        for c in range(len(most)):
            if found[c] < most[c] and sum(found) < n:
                found[c] += 1
    return found


def _random_images(n: int, used: Ints, peaks: Peaks, seed: int, words: tuple[int, int, int]) -> Ints:
    """A random image for each of n hosts, none of those used; again from the start where there are too few."""
    order = np.argsort(_bits(seed, random.SWAP_RANDOM, words, peaks.example), kind="stable")
    order = order[~np.isin(peaks.example[order], used)]
    return order[np.arange(n) % len(order)] if len(order) else np.full(n, NONE)


def null_examples(examples: Examples, peaks: Peaks, seed: int, layer: str, neuron: int) -> Examples:
    """Random images in which the neuron fires, under its own cluster labels permuted: at most as many as it has."""
    fired = np.flatnonzero(peaks.position != NONE)
    word = random.layer_word(layer)
    order = fired[np.argsort(_bits(seed, random.SWAP_NULL, (word, neuron, 0), peaks.example[fired]), kind="stable")]
    order = order[: len(examples.cluster)]
    of = np.arange(len(examples.cluster))
    shuffled = np.argsort(_bits(seed, random.SWAP_NULL_LABELS, (word, neuron, 0), of), kind="stable")
    labels = np.sort(examples.cluster)[shuffled][: len(order)]
    return Examples(peaks.example[order], peaks.position[order], labels, np.full(len(order), np.nan))


class Window(NamedTuple):
    """The box that is swapped in a layer."""

    side: int
    """Side before clipping to the image, in pixels."""
    step: int
    """Pixels between places where such a box may lie: 1, or the side of a patch of a token grid."""
    reduced: bool
    """The layer's window is larger than `swap.max_frac` allows."""


def window(layer: Mapping[str, Any], input_px: int, max_frac: float) -> Window:
    """The box that is swapped in a layer, given its row of `layers`.

    Tokens see whole patches: their box is an odd number of patches, on their grid, at least one.
    """
    limit = max(1, math.floor(max_frac * input_px))
    side = min(layer["swap_side_px"], limit)
    stride = layer["stride_px"]
    step = 1
    if layer["layout"] == "tokens" and stride >= 1 and stride == int(stride) and layer["center_x_px"] == stride / 2:
        step = int(stride)
        side = step * max(1, (side // step - 1) // 2 * 2 + 1)
    return Window(side, step, layer["swap_side_px"] > limit)


def boxes(layer: Mapping[str, Any], at: Window, position: Ints, input_px: int) -> Ints:
    """Boxes around positions of a layer, clipped to the image: x0, y0, x1, y1 [n, 4]."""
    return layer_boxes({**layer, "side_px": at.side}, position, input_px)


class Places(NamedTuple):
    """Where each swap of a neuron takes place: boxes x0, y0, x1, y1 [n, 4], `NONE` where there is none."""

    box: Ints
    """Around the host's peak."""
    aligned: Ints
    other: Ints
    random: Ints
    """Around the donors' peaks, in the donors."""
    random_place: Ints
    """Somewhere in the random image, as large as the host's box."""
    elsewhere: Ints
    """Somewhere in the host, as large as its box and disjoint from it."""


def places(
    examples: Examples,
    peaks: Peaks,
    cast: Roles,
    layer: Mapping[str, Any],
    at: Window,
    science: Science,
    neuron: int,
    kind: str,
) -> Places:
    """Draws where patches come from and go to.

    A random image in which the neuron does not fire has no peak: the place is drawn uniformly among all positions,
    since the corner of an empty map would be a patch unlike any other.
    """
    input_px, seed, name = science.subject.input_px, science.seed, layer["layer"]
    words = (random.layer_word(name), neuron, _KINDS[kind])
    n = len(cast.host)
    hosts = torch.arange(n)
    around = lambda position: boxes(layer, at, position, input_px)  # noqa: E731

    def of_donors(chosen: Ints) -> Ints:
        found = around(examples.position[chosen])
        found[chosen == NONE] = NONE
        return found

    position = peaks.position[cast.random] if len(peaks.position) else np.full(n, NONE)
    u = random.uniform(seed, random.SWAP_UNFIRED, *words, hosts).numpy()
    anywhere = (u * (layer["grid_h"] * layer["grid_w"])).astype(np.int64)
    box = around(examples.position[cast.host])
    nobody = cast.random == NONE
    random_box = around(np.where(position == NONE, anywhere, position))
    width, height = (torch.from_numpy(box[:, b] - box[:, a]) for a, b in ((0, 2), (1, 3)))
    spot = random.uniform4(seed, random.SWAP_PLACE, *words, hosts)[:, :2]
    random_place = windows.random_places(width, height, input_px, spot, at.step).numpy()
    random_box[nobody] = random_place[nobody] = NONE
    u_elsewhere = random.uniform(seed, random.SWAP_ELSEWHERE, *words, hosts)
    elsewhere = windows.disjoint_places(torch.from_numpy(box), input_px, u_elsewhere, at.step).numpy()
    return Places(box, of_donors(cast.aligned), of_donors(cast.other), random_box, random_place, elsewhere)


def _bits(seed: int, stream: int, words: tuple[int, int, int], items: Ints) -> Ints:
    return random.bits(seed, stream, *words, torch.from_numpy(np.ascontiguousarray(items))).numpy()
