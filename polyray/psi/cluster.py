"""Cluster: how many things, do they follow the labels, do their names mean different things?

One code path scores real neurons, null neurons and null draws: the same k selection, the same Q, the same names.
Source: arXiv 2508.16950, sections 3.3 to 3.5.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyray import columns
from polyray.config import Science
from polyray.kernels import cluster, random, scores, statistics
from polyray.psi.mine import Images
from polyray.psi.space import Space

CHUNK = 64
"""Neurons scored together; the kernels bound their own memory, so that this one bounds the vectors gathered."""
N_PERMUTATIONS = 1000
"""Label permutations behind the mean and standard deviation of Q, at most B.

They have a relative error of 2 % in the standard deviation, and every neuron, null neuron and draw takes the same
estimate, so that these stay exchangeable however rough it is: B may be 100,000 without as many permutations a draw.
"""
SHRINK = 0.8
"""Ratio between neighbouring sizes of example sets, see `n_used`."""
N_PROTOTYPES = 4
N_NAMES = 5


def sizes(K: int, k_min: int) -> list[int]:
    """Sizes of example sets that are scored, descending from K to k_min in steps of a fifth."""
    out = [K]
    while out[-1] > k_min:
        out.append(max(k_min, int(out[-1] * SHRINK)))
    return out


def n_used(n_examples: int, K: int, k_min: int) -> int | None:
    """How many of a neuron's top examples are clustered.

    Null draws must have as many examples as the neuron. A neuron with fewer than K is cut to the next smaller of a
    few sizes, so that a layer needs a handful of sets of draws, not one for every count. (A deviation: the method's
    neuron would use all it has.)

    Returns:
        The largest of `sizes` that is at most n_examples; None below k_min.
    """
    return next((size for size in sizes(K, k_min) if size <= n_examples), None)


class Scored(NamedTuple):
    """Raw scores of G sets of examples."""

    clustering: cluster.Clustering
    Q: Tensor
    Q_mean: Tensor
    Q_std: Tensor
    Q_p: Tensor
    """Of Q among its label permutations (at most `N_PERMUTATIONS`); NaN where it was not asked for."""
    two_means: Tensor
    """1 − cosine between the centres of two clusters; NaN where two are not possible."""
    D: Tensor
    """Name distance of the kept clusters; 0 where no k is possible."""


@lru_cache(maxsize=16)
def label_permutations(seed: int, n: int, B: int) -> Tensor:
    """The B label permutations that every set of n examples shares; fewer are the first ones of more."""
    return random.permutations(seed, random.PERMUTE, n, B, n)


def score(
    gram: Tensor,
    text: Tensor,
    labels: Tensor,
    item: Tensor,
    layer: int,
    stream: int,
    science: Science,
    data: Space,
    with_p: bool = True,
) -> Scored:
    """S, Q and D of sets of examples: one path for neurons, null neurons and null draws.

    Args:
        gram: inner products of each set's geometry vectors [G, n, n], float64.
        text: text-aligned unit vectors [G, n, t].
        labels: class codes [G, n].
        item: counter word of each set.
        layer: counter word of the layer.
        stream: `random.KMEANS_*`.
        science: the sweep's settings.
        data: for the vocabulary.
        with_p: whether Q's p-value from the label permutations is wanted, which null draws do not need.
    """
    c = science.cluster
    result = cluster.cluster_gram(gram, c.k_range, c.n_init, c.max_iter, science.seed, item, stream, layer)
    Q = scores.nmi(result.labels, labels)
    permutations = label_permutations(science.seed, gram.shape[1], min(science.calibrate.B, N_PERMUTATIONS))
    Q_p = torch.full_like(Q, torch.nan)
    if with_p:
        null = scores.permuted_nmi(result.labels, labels, permutations)
        Q_p, (Q_mean, Q_std) = statistics.p_value(Q, null), statistics.moments(null)
    else:
        Q_mean, Q_std = scores.permuted_moments(result.labels, labels, permutations)
    name, _ = scores.name_clusters(text, result.labels, c.k_range[1], data.vocabulary)
    D = scores.name_distance(name.squeeze(-1), data.similarity)
    return Scored(result, Q, Q_mean, Q_std, Q_p, _two_means(gram, result, science), D)


def _two_means(gram: Tensor, result: cluster.Clustering, science: Science) -> Tensor:
    if science.cluster.k_range[0] > 2:
        return torch.full((len(gram),), torch.nan, dtype=torch.float64)
    return scores.center_distance(gram, result.labels_by_k[:, 0])


class Examples(NamedTuple):
    """A neuron's usable examples: those whose patch has a vector, best first."""

    neuron: int
    rank: NDArray[np.int64]
    rows: NDArray[np.int64]
    label: NDArray[np.int64]
    n_used: int | None


def score_rows(
    kind: str, neurons: Sequence[int], n: int, n_labels: Sequence[int], result: Scored
) -> dict[str, list[object] | NDArray[np.float64]]:
    """Columns of `scores` for sets that were scored."""
    return {
        "kind": [kind] * len(neurons),
        "neuron": list(neurons),
        "status": ["ok"] * len(neurons),
        "reason": [None] * len(neurons),
        "n_used": [n] * len(neurons),
        "n_labels": list(n_labels),
        "S": result.clustering.S.numpy(),
        "k": result.clustering.k.tolist(),
        "Q": result.Q.numpy(),
        "Q_mean": result.Q_mean.numpy(),
        "Q_std": result.Q_std.numpy(),
        "Q_p": result.Q_p.numpy(),
        "two_means": result.two_means.numpy(),
        "D": result.D.numpy(),
    }


def unscored(kind: str, neuron: int, status: str, reason: str) -> pa.Table:
    """The row of `scores` of a neuron that could not be scored."""
    empty = {c: [None] for c in ("n_used", "n_labels", "S", "k", "Q", "Q_mean", "Q_std", "Q_p", "two_means", "D")}
    return columns.table(
        "scores", {"kind": [kind], "neuron": [neuron], "status": [status], "reason": [reason], **empty}
    )


class Clustered(NamedTuple):
    """Rows of a range of neurons."""

    scores: pa.Table
    clusters: pa.Table
    cluster_of: dict[int, NDArray[np.int64]]
    """Cluster of each of a scored neuron's kept examples, −1 where it was not clustered."""


def cluster_neurons(
    examples: Sequence[Examples], layer: str, science: Science, images: Images, data: Space
) -> Clustered:
    """Scores neurons and names their clusters.

    Args:
        examples: usable examples of each neuron, with vectors.
        layer: name of the layer.
        science: the sweep's settings.
        images: the probe set's labels.
        data: the layer's vectors.

    Returns:
        Rows of `scores` and `clusters` (thumbnails and snippets null: whoever has the images fills them in). A neuron
        left with fewer than k_min usable examples, or whose vectors are all equal, is excluded with that reason.
    """
    word = random.layer_word(layer)
    rows: list[pa.Table] = []
    found: list[pa.Table] = []
    cluster_of: dict[int, NDArray[np.int64]] = {}
    by_size: dict[int, list[Examples]] = {}
    for e in examples:
        if e.n_used is None:
            reason = f"too few examples: {len(e.rows)} of at least {science.mine.k_min} have a vector"
            rows.append(unscored("real", e.neuron, "excluded", reason))
        else:
            by_size.setdefault(e.n_used, []).append(e)
    for n in sorted(by_size):
        for start in range(0, len(by_size[n]), CHUNK):
            chunk = by_size[n][start : start + CHUNK]
            at = np.stack([e.rows[:n] for e in chunk])
            labels = torch.from_numpy(np.stack([e.label[:n] for e in chunk]))
            text = data.text_of(at)
            gram = cluster.gram(data.geometry_of(at))
            item = torch.tensor([e.neuron for e in chunk])
            result = score(gram, text, labels, item, word, random.KMEANS_REAL, science, data)
            possible = result.clustering.k > 1
            keep = torch.nonzero(possible).flatten().tolist()
            for i in torch.nonzero(~possible).flatten().tolist():
                rows.append(unscored("real", chunk[i].neuron, "excluded", "identical examples: nothing to cluster"))
            if not keep:
                continue
            kept = Scored(cluster.Clustering(*(x[keep] for x in result.clustering)), *(x[keep] for x in result[1:]))
            neurons = [chunk[i].neuron for i in keep]
            n_labels = [len(set(labels[i].tolist())) for i in keep]
            rows.append(columns.table("scores", score_rows("real", neurons, n, n_labels, kept)))
            for j, i in enumerate(keep):
                e = chunk[i]
                assigned = kept.clustering.labels[j]
                found.append(_clusters(e, assigned, gram[i], text[i], images, data))
                whole = np.full(int(e.rank.max()) + 1, -1, dtype=np.int64)
                whole[e.rank[:n]] = assigned.numpy()
                cluster_of[e.neuron] = whole
    return Clustered(columns.concat("scores", rows), columns.concat("clusters", found), cluster_of)


def _clusters(e: Examples, labels: Tensor, gram: Tensor, text: Tensor, images: Images, data: Space) -> pa.Table:
    """Rows of `clusters` of one neuron."""
    k = int(labels.max()) + 1
    top = min(N_NAMES, len(data.prompts))
    names, cosine = scores.name_clusters(text[None], labels[None], k, data.vocabulary, top)
    members = [torch.nonzero(labels == c).flatten() for c in range(k)]
    prototypes, label, share = [], [], []
    for m in members:
        # Nearest to the centre = largest mean inner product with the cluster, for unit vectors.
        closeness = gram[m][:, m].mean(1)
        nearest = m[torch.argsort(closeness, descending=True, stable=True)[:N_PROTOTYPES]]
        prototypes.append([int(data.ids[r]) for r in e.rows[nearest.numpy()]])
        codes = np.bincount(e.label[m.numpy()])
        label.append(images.labels[int(codes.argmax())])
        share.append(float(codes.max() / codes.sum()))
    return columns.table(
        "clusters",
        {
            "neuron": [e.neuron] * k,
            "cluster": list(range(k)),
            "size": [len(m) for m in members],
            "name": [data.prompts[i] for i in names[0, :, 0].tolist()],
            "name_score": cosine[0, :, 0].double().numpy(),
            "names": [[data.prompts[i] for i in row] for row in names[0].tolist()],
            "label": label,
            "label_frac": share,
            "prototypes": prototypes,
            "thumbnails": [None] * k,
            "snippets": [None] * k,
        },
    )
