"""Plant: neurons of known truth, from linear probes on one half of the images.

Which question it answers: *what would a neuron look like that responds to one class, to two, to three?* Place in the
flow: before window, and only where the config asks for it. Probes are fitted on one half of every class; everything
after this stage sees the other half alone. Ours; the paper has no planted neurons.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from polyray import columns
from polyray.config import Science
from polyray.errors import DataError
from polyray.kernels import random
from polyray.models.encoders import Encoder
from polyray.models.planted import N_PARTS, Weights, planted_name
from polyray.models.vision import Subject
from polyray.probes.images import ProbeSet, view
from polyray.psi.mine import Failure, Images
from polyray.schema import PLANTED_KINDS

N_MAPS = 40
"""Images of a class whose whole feature maps are kept, to see how large its evidence gets: mean and deviation of a
maximum, for which this many will do."""
MIN_FIT = 10
"""Fewest images of a class on which its evidence is fitted and scaled."""
SHRINK = 0.1
"""Share of the mean variance added to every direction's: pulls noisy directions of the covariance towards a sphere."""
N_TRIALS = 50
"""Random choices of classes looked at for every neuron of a kind that is chosen at random."""
FAR = 1 / 3
"""Pairs of classes whose similarity lies in this lowest share are far apart."""


class Split(NamedTuple):
    """The two halves of the probe set."""

    fit: NDArray[np.int64]
    """Images on which probes are fitted, ascending."""
    mapped: NDArray[np.int64]
    """Those of them whose whole feature map is kept, ascending."""
    mined: NDArray[np.int64]
    """Images that are mined, ascending."""


def split(images: Images, seed: int) -> Split:
    """Cuts every class into two random halves; of an odd number the larger is mined."""
    hashes = random.bits(seed, random.PLANT_SPLIT, torch.from_numpy(images.distinct)).numpy()
    label = images.label_of[images.distinct]
    order = np.lexsort((images.distinct, hashes, label))
    counts = np.bincount(label, minlength=len(images.labels))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    half = np.repeat(counts // 2, counts)
    examples = images.distinct[order]
    parts = (rank < half, rank < np.minimum(half, N_MAPS), rank >= half)
    return Split(*(np.sort(examples[chosen]) for chosen in parts))


def mined_half(images: Images, seed: int) -> Images:
    """The images that stages after this one see."""
    return images._replace(distinct=split(images, seed).mined)


def features(
    subject: Subject, probe: ProbeSet, science: Science, images: Images, examples: range
) -> tuple[dict[str, pa.Table], list[Failure]]:
    """What the fitting half of a range of images is like on each layer that is planted on.

    Args:
        subject: the network, with its plants.
        probe: the probe set.
        science: the sweep's settings.
        images: all distinct readable images.
        examples: the range.

    Returns:
        Rows of `plant_features` by layer of planted neurons, and one failure for each image that cannot be read.
    """
    if subject.plants is None:
        raise ValueError("nothing is planted on this subject")
    halves = split(images, science.seed)
    wanted = halves.fit[(halves.fit >= examples.start) & (halves.fit < examples.stop)]
    done: list[int] = []
    failed: list[Failure] = []
    mean: dict[str, list[NDArray[np.float32]]] = {layer: [] for layer in subject.plants.layers}
    whole: dict[str, list[NDArray[np.float16] | None]] = {layer: [] for layer in subject.plants.layers}
    pending: list[tuple[int, NDArray[np.uint8]]] = []

    def forward() -> None:
        if not pending or subject.plants is None:
            return
        n = len(pending)
        batch = np.stack([v for _, v in pending])[np.minimum(np.arange(subject.micro_batch), n - 1)]
        for layer, x in subject.plants.maps(subject.prepare(batch)).items():
            maps = x[:n].float().flatten(2).cpu()
            mean[layer] += list(maps.mean(2).numpy())
            kept = np.isin([e for e, _ in pending], halves.mapped)
            whole[layer] += [m.half().numpy().ravel() if k else None for m, k in zip(maps, kept, strict=True)]
        done.extend(e for e, _ in pending)
        pending.clear()

    for example in wanted.tolist():
        try:
            pending.append((example, view(probe.read(example), subject.input_px, science.subject.resize)))
        except DataError as e:
            failed.append((None, "image", example, str(e)))
        if len(pending) == subject.micro_batch:
            forward()
    forward()
    rows = {
        planted_name(layer): columns.table(
            "plant_features", {"example": done, "mean": mean[layer], "map": whole[layer]}
        )
        for layer in subject.plants.layers
    }
    return rows, failed


class Probe(NamedTuple):
    """Evidence for every class as linear functions of a feature vector."""

    weight: NDArray[np.float64]
    """[classes, channels]."""
    bias: NDArray[np.float64]
    """[classes]."""


def linear_probe(x: NDArray[np.float64], y: NDArray[np.int64], n_classes: int) -> Probe:
    """Linear discriminants: how much likelier a vector is under a class's mean than under the mean of all.

    Args:
        x: feature vectors [n, channels].
        y: class of each, 0 to n_classes − 1, none of them empty.
        n_classes: classes.

    Returns:
        Discriminants (μ_c − μ)ᵀ Σ⁻¹ (x − (μ_c + μ)/2) with the within-class covariance Σ, shrunk towards a sphere.

    Source: Fisher 1936; shrinkage as in Friedman 1989.
    """
    one_hot = np.eye(n_classes)[y]
    mean = (one_hot.T @ x) / one_hot.sum(0)[:, None]
    centre = mean.mean(0)
    residual = x - mean[y]
    covariance = residual.T @ residual / len(x)
    # Channels that never differ carry no evidence, and must not make the matrix singular.
    covariance += np.eye(x.shape[1]) * max(SHRINK * covariance.trace() / x.shape[1], np.finfo(np.float64).tiny)
    weight = np.linalg.solve(covariance, (mean - centre).T).T
    return Probe(weight, -(weight * (mean + centre) / 2).sum(1))


def standardised(probe: Probe, maps: Sequence[NDArray[np.float64]], y: NDArray[np.int64]) -> Probe:
    """Scales each class's evidence so that its largest value over an image of that class has mean 0, deviation 1.

    Without it the class with the largest spread would fill the top examples of every neuron that it has a part in.

    Args:
        probe: from `linear_probe`.
        maps: feature maps [channels, positions].
        y: their classes.
    """
    weight, bias = probe.weight.copy(), probe.bias.copy()
    for c in range(len(bias)):
        largest = np.array([(weight[c] @ m).max() + bias[c] for m, of in zip(maps, y, strict=True) if of == c])
        deviation = max(float(largest.std()), 1e-12)
        bias[c] = (bias[c] - largest.mean()) / deviation
        weight[c] /= deviation
    return Probe(weight, bias)


def groups(similarity: NDArray[np.float64], n: int, seed: int, word: int) -> dict[str, list[tuple[int, ...]]]:
    """Which classes each planted neuron responds to.

    Args:
        similarity: cosines between the class names' text vectors [classes, classes].
        n: neurons of each kind.
        seed: the sweep's seed.
        word: counter word of the layer.

    Returns:
        By kind, n distinct groups: `mono` single classes, `order2`, `unequal` and `order3` groups whose pairs are all
        in the lowest third of similarity, `siblings` the n most similar pairs, `noise` empty groups. Groups of
        different kinds come from one random order of the classes, and often share some.

    Raises:
        DataError: there are not so many groups of a kind.
    """
    n_classes = len(similarity)
    upper = np.triu_indices(n_classes, 1)
    limit = np.quantile(similarity[upper], FAR) if len(upper[0]) else -1.0
    order = random.permutations(seed, random.PLANT_CLASSES, n_classes, max(N_TRIALS * n, 1000), word).numpy()

    def far(size: int, skip: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for row in order[:, :size].tolist():
            group = tuple(sorted(row))
            apart = all(similarity[a, b] <= limit for a, b in itertools.combinations(group, 2))
            if len(group) == size and apart and group not in skip:
                found[group] = None
        return list(found)

    order2 = far(2, set())[:n]
    nearest = np.argsort(-similarity[upper], kind="stable")[:n]
    found: dict[str, list[tuple[int, ...]]] = {
        "mono": [(int(c),) for c in order[0][:n]],
        "order2": order2,
        "order3": far(3, set())[:n],
        "siblings": [(int(upper[0][i]), int(upper[1][i])) for i in nearest],
        "unequal": far(2, set(order2))[:n],
        "noise": [()] * n,
    }
    for kind, chosen in found.items():
        if len(chosen) < n:
            raise DataError(
                f"science.plant: {n_classes} classes give only {len(chosen)} groups of kind {kind!r}, not {n}; lower "
                "plant.per_kind or show more classes."
            )
    return found


def rarer(science: Science, n_common: int, n_rare: int) -> float:
    """By how much `unequal` lowers the evidence for its second class, in deviations of an image's largest evidence.

    So much that of the top K one in 1 + rarity is of the rare class, where evidence is normal and purity is 1.
    """
    K, rarity = science.mine.K, science.plant.rarity if science.plant else 1.0
    common = min(K * rarity / (rarity + 1) / n_common, 0.999)
    rare = min(K / (rarity + 1) / n_rare, 0.999)
    return float(norm.isf(rare) - norm.isf(common))


def class_rows(encoder: Encoder, images: Images) -> pa.Table:
    """Rows of `plant_classes`: the text vectors of the class names."""
    return columns.table(
        "plant_classes", {"label": images.labels, "embedding": list(encoder.encode_prompts(images.labels).numpy())}
    )


def fit(rows: pa.Table, layer: str, science: Science, images: Images, text: NDArray[np.float64]) -> pa.Table:
    """Fits the planted neurons of one layer.

    Args:
        rows: the layer's rows of `plant_features`, by example.
        layer: the layer of planted neurons.
        science: the sweep's settings.
        images: all distinct readable images.
        text: unit text vectors of the class names [classes, t], in the order of `images.labels`.

    Returns:
        Rows of `planted`. Classes with fewer than `MIN_FIT` images to fit on or K to mine take no part.

    Raises:
        DataError: too few classes for the neurons asked for.
    """
    if science.plant is None:
        raise ValueError("nothing is to be planted")
    mean = columns.padded(rows["mean"], 0).astype(np.float64)
    label = images.label_of[columns.numbers(rows, "example")]
    n_mined = np.bincount(images.label_of[split(images, science.seed).mined], minlength=len(images.labels))
    has_map = rows["map"].is_valid().to_numpy(zero_copy_only=False)
    n_fitted = np.bincount(label[has_map], minlength=len(images.labels))
    present = np.flatnonzero((n_fitted >= MIN_FIT) & (n_mined >= science.mine.K))
    known = np.isin(label, present)
    y = np.searchsorted(present, label)
    mapped = rows.filter(pa.array(has_map & known))
    maps = [np.array(m, dtype=np.float64).reshape(mean.shape[1], -1) for m in mapped["map"].to_pylist()]
    probe = linear_probe(mean[known], y[known], len(present))
    probe = standardised(probe, maps, y[has_map & known])
    word = random.layer_word(layer)
    chosen = groups(text[present] @ text[present].T, science.plant.per_kind, science.seed, word)
    deviation = mean[known].std(0)
    out: dict[str, list[object]] = {c: [] for c in ("neuron", "kind", "planted_order", "classes", "weight", "bias")}
    for neuron, (kind, classes) in enumerate((k, group) for k in PLANTED_KINDS for group in chosen[k]):
        if classes:
            # The last class stands in for those that are missing: the largest of two equal values is that value.
            parts = [*classes, *[classes[-1]] * (N_PARTS - len(classes))]
            weight, bias = probe.weight[parts], probe.bias[parts].copy()
        else:
            direction = random.normal(
                science.seed, random.PLANT_NOISE, word, neuron, torch.arange(mean.shape[1])
            ).numpy()
            direction = np.where(deviation > 0, direction / np.where(deviation > 0, deviation, 1.0), 0.0)
            weight = np.repeat(direction[None], N_PARTS, 0)
            bias = np.repeat(-(direction @ mean[known].mean(0)), N_PARTS)
        if kind == "unequal":
            bias[1:] -= rarer(science, *n_mined[present[list(classes)]].tolist())
        values = (neuron, kind, len(classes), [images.labels[present[c]] for c in classes], weight.ravel(), bias)
        for column, value in zip(out, values, strict=True):
            out[column].append(value)
    return columns.table("planted", out)


def weights(planted: pa.Table) -> Weights:
    """What to install in a layer's planted neurons, from its rows of `planted`."""
    rows = planted.sort_by("neuron")
    bias = torch.from_numpy(columns.padded(rows["bias"], 0).astype(np.float32))
    weight = torch.from_numpy(columns.padded(rows["weight"], 0).astype(np.float32)).view(len(rows), N_PARTS, -1)
    return Weights(weight.transpose(0, 1), bias.T)


def install(subject: Subject, planted: Mapping[str, pa.Table]) -> None:
    """Gives the planted neurons of a subject their weights.

    Args:
        subject: the network, with its plants.
        planted: rows of `planted` by layer of planted neurons.
    """
    if subject.plants is None:
        raise ValueError("nothing is planted on this subject")
    for layer in subject.plants.layers:
        if planted_name(layer) in planted:  # else none of its neurons is swept
            subject.plants.neurons(layer).install(weights(planted[planted_name(layer)]))
