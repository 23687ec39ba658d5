"""Draw: what would the scores be by chance? Null draws, and null neurons, through the neurons' own code.

Draws are made once for what they depend on: `rotation` on the number of examples and the dimension, `pool` and
`one_concept` on the layer, `shuffle_text` on k and the vocabulary. A neuron then costs one clustering instead of
B + 1. Source: arXiv 2508.16950, section 3.6, for `rotation` and `shuffle_text`; the other two are ours.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyray import columns
from polyray.config import Science
from polyray.kernels import cluster, random, scores, statistics
from polyray.psi.cluster import CHUNK, score, score_rows
from polyray.psi.space import Space


def pool_draws(data: Space, n: int, items: Tensor, seed: int, stream: int, layer: int) -> Tensor:
    """n distinct pool patches for each item, uniformly: the pool's rows of smallest random bits, [G, n].

    Of equal bits (1 in 2^32) the lower row goes first.
    """
    size = torch.arange(len(data.pool))
    order = torch.argsort(random.bits(seed, stream, layer, items[:, None], size, n), dim=1, stable=True)
    return order[:, :n]


def n_anchors(n_pool: int) -> int:
    """How many patches of a pool one_concept draws around: half of them; the others are for null neurons."""
    return (n_pool + 1) // 2


def anchors(data: Space, seed: int, half: int, layer: int) -> Tensor:
    """The pool's rows around which one_concept draws (half 0) or null neurons (half 1) lie, in a random order.

    The pool is split at random, so that no null neuron is a draw that it is compared with.
    """
    order = torch.argsort(random.bits(seed, random.DRAW_CONCEPT, layer, torch.arange(len(data.pool))), stable=True)
    return order[half::2]


def concept_draws(data: Space, n: int, items: Tensor, seed: int, half: int, layer: int) -> Tensor:
    """The n pool patches nearest to a random pool patch (itself among them) for each item, [G, n].

    Items take the anchors of their half in order, and start again when there are no more. The pool's images are
    distinct, so the draw's are. Of equally near patches the lower row goes first.
    """
    around = anchors(data, seed, half, layer)
    similarity = data.pool_similarity(around[items % len(around)])
    return torch.argsort(similarity, dim=1, descending=True, stable=True)[:, :n]


def draw(kind: str, n: int, draws: range, layer: int, science: Science, data: Space) -> pa.Table:
    """Null draws of n examples each, scored as a neuron is.

    Args:
        kind: pool or one_concept.
        n: examples in a draw.
        draws: indices of the draws.
        layer: counter word of the layer.
        science: the sweep's settings.
        data: the layer's vectors.

    Returns:
        Rows of `nulls`. Where the pool has fewer than n patches there are none, and there are no more one_concept
        draws than anchors: another draw around the same patch would be counted as evidence of its own.
    """
    stream, choose = _POOLED[kind][0], _POOLED[kind][2]
    tables = []
    stop = draws.stop if n <= len(data.pool) else draws.start
    if kind == "one_concept":
        stop = min(stop, len(anchors(data, science.seed, stream, layer)))
    for start in range(draws.start, stop, CHUNK):
        items = torch.arange(start, min(start + CHUNK, stop))
        at = choose(data, n, items, science.seed, stream, layer)
        gram = data.gram_of(at)
        labels = torch.from_numpy(data.pool_label)[at]
        r = score(gram, data.pool_text[at], labels, items, layer, random.KMEANS_DRAW[kind], science, data, with_p=False)
        z = statistics.z_score(r.Q, r.Q_mean, r.Q_std)
        tables.append(
            columns.table(
                "nulls",
                {
                    "kind": [kind] * len(items),
                    "n_used": [n] * len(items),
                    "draw": items.numpy(),
                    "S": r.clustering.S.numpy(),
                    "k": r.clustering.k.numpy(),
                    "Q": r.Q.numpy(),
                    "Q_z": z.numpy(),
                    "D": r.D.numpy(),
                },
            )
        )
    return columns.concat("nulls", tables)


def permuted_draws(n: int, draws: range, layer: int, science: Science, data: Space) -> pa.Table:
    """Null draws of S of n distinct pool patches each, every vector's coordinates permuted in a way of its own.

    Norms and the values within a vector stay; which coordinates go together is lost. Rows of `nulls`, none where the
    pool has fewer than n patches.
    """
    c = science.cluster
    tables = []
    stop = draws.stop if n <= len(data.pool) else draws.start
    for start in range(draws.start, stop, CHUNK):
        items = torch.arange(start, min(start + CHUNK, stop))
        at = pool_draws(data, n, items, science.seed, random.DRAW_DIMS, layer)
        vectors = data.geometry_of(data.pool[at.numpy()])
        rows, dims = torch.arange(n)[:, None], torch.arange(vectors.shape[2])[None, :]
        for i, item in enumerate(items.tolist()):
            bits = random.bits(science.seed, random.PERMUTE_DIMS, layer, item, rows, dims)
            order = torch.argsort(bits, dim=1, stable=True)
            vectors[i] = vectors[i].gather(1, order)
        stream = random.KMEANS_DRAW["permute_dims"]
        r = cluster.cluster(vectors, c.k_range, c.n_init, c.max_iter, science.seed, items, stream, layer)
        tables.append(_silhouettes("permute_dims", n, items, r))
    return columns.concat("nulls", tables)


def _silhouettes(kind: str, n: int, items: Tensor, r: cluster.Clustering) -> pa.Table:
    """Rows of `nulls` of draws that have S alone."""
    none = [None] * len(items)
    known = {"kind": [kind] * len(items), "n_used": [n] * len(items), "draw": items.numpy()}
    return columns.table("nulls", known | {"S": r.S.numpy(), "k": r.k.numpy(), "Q": none, "Q_z": none, "D": none})


def rotation_draws(n: int, draws: range, science: Science, d: int) -> pa.Table:
    """Null draws of n Haar-random directions in d dimensions: the paper's null of S, which no layer enters."""
    c = science.cluster
    tables = []
    for start in range(draws.start, draws.stop, CHUNK):
        items = torch.arange(start, min(start + CHUNK, draws.stop))
        vectors = random.directions(science.seed, random.DRAW_ROTATION, items, n, d, word=n)
        stream = random.KMEANS_DRAW["rotation"]
        r = cluster.cluster(vectors, c.k_range, c.n_init, c.max_iter, science.seed, items, stream)
        tables.append(_silhouettes("rotation", n, items, r))
    return columns.concat("nulls", tables)


def shuffle_text(science: Science, similarity: Tensor) -> pa.Table:
    """Name distances of k distinct random prompts, B draws for every k: the paper's null of D.

    Args:
        similarity: cosines between prompts [V, V]. A k above V has no draws.
    """
    B = science.calibrate.B
    n_prompts = len(similarity)
    tables = []
    for k in range(science.cluster.k_range[0], science.cluster.k_range[1] + 1):
        if k > n_prompts:
            continue
        u = random.uniform(science.seed, random.DRAW_TEXT, torch.arange(B)[:, None], torch.arange(k)[None, :], k)
        names = _distinct(u, n_prompts)
        D = scores.name_distance(names, similarity)
        none = [None] * B
        tables.append(
            columns.table(
                "nulls",
                {
                    "kind": ["shuffle_text"] * B,
                    "n_used": none,
                    "draw": np.arange(B),
                    "S": none,
                    "k": [k] * B,
                    "Q": none,
                    "Q_z": none,
                    "D": D.numpy(),
                },
            )
        )
    return columns.concat("nulls", tables)


def _distinct(u: Tensor, size: int) -> Tensor:
    """k distinct indices below size from k uniforms, by Fisher-Yates on the places left."""
    k = u.shape[1]
    chosen = torch.empty(u.shape, dtype=torch.long)
    for j in range(k):
        pick = (u[:, j] * (size - j)).long().clamp(max=size - j - 1)
        earlier = chosen[:, :j].sort(1).values
        for i in range(j):
            pick = pick + (pick >= earlier[:, i]).long()
        chosen[:, j] = pick
    return chosen


def null_neurons(
    kind: str,
    neurons: NDArray[np.int64],
    n: int,
    labels: NDArray[np.int64],
    layer: int,
    science: Science,
    data: Space,
    places: NDArray[np.int64] | None = None,
) -> pa.Table:
    """Null neurons that stand beside real ones, from draws with seeds of their own.

    Args:
        kind: rotation (labels kept, geometry and text vectors replaced by Haar directions), pool or one_concept.
        neurons: the real neurons beside which they stand.
        n: examples clustered, the same as theirs.
        labels: class codes of the real neurons' examples [G, n], used by rotation.
        layer: counter word of the layer.
        science: the sweep's settings.
        data: the layer's vectors.
        places: their places among the layer's neurons that are swept; by default their indices.

    Returns:
        Rows of `scores`; none where the pool has fewer than n patches. Each one_concept null neuron has an anchor of
        its own: beside neurons whose place is beyond the last anchor stands none.
    """
    places = neurons if places is None else places
    if kind == "one_concept":
        able = places < len(anchors(data, science.seed, _POOLED[kind][1], layer))
        neurons, labels, places = neurons[able], labels[able], places[able]
    tables = []
    for start in range(0, len(neurons), CHUNK):
        part = neurons[start : start + CHUNK]
        items = torch.from_numpy(part)
        if kind == "rotation":
            # A word of the layer keeps the directions of neuron i apart between layers.
            d = data.geometry.shape[1]
            vectors = random.directions(science.seed, random.NULL_ROTATION, items, n, d, word=layer)
            t = data.vocabulary.shape[1]
            text = (
                vectors
                if data.text is None
                else random.directions(science.seed, random.NULL_ROTATION_TEXT, items, n, t, word=layer)
            )
            gram = cluster.gram(vectors)
            y = torch.from_numpy(labels[start : start + CHUNK])
        elif n <= len(data.pool):
            place = torch.from_numpy(places[start : start + CHUNK])
            at = _POOLED[kind][2](data, n, place, science.seed, _POOLED[kind][1], layer)
            gram = data.gram_of(at)
            text = data.pool_text[at]
            y = torch.from_numpy(data.pool_label)[at]
        else:
            continue
        r = score(gram, text, y, items, layer, random.KMEANS_NULL[kind], science, data)
        n_labels = [len(set(row.tolist())) for row in y]
        rows = columns.table("scores", score_rows(kind, part.tolist(), n, n_labels, r))
        tables.append(rows.filter(pa.array((r.clustering.k > 1).numpy())))
    return columns.concat("scores", tables)


_Choose = Callable[[Space, int, Tensor, int, int, int], Tensor]
_POOLED: dict[str, tuple[int, int, _Choose]] = {
    "pool": (random.DRAW_POOL, random.NULL_POOL, pool_draws),
    "one_concept": (0, 1, concept_draws),
}
"""What keeps draws and null neurons apart (streams, halves of the anchors), and how examples are chosen."""
