"""k-means and silhouette of many small sets at once, on their Gram matrices.

Which question it answers: *into how many groups does a neuron's set of examples fall?* Place in the flow: cluster,
and every null draw. With unit vectors all distances follow from the n × n Gram matrix, so a set costs the same
whatever the encoder's dimension, all restarts and all k run in one batched product per Lloyd iteration, and null
draws from a pool only gather entries of the pool's Gram matrix.

A set's result depends on nothing but itself, to the bit; see `kernels.lloyd` for how.

Source: arXiv 2508.16950, section 3.3; k-means++ of Arthur & Vassilvitskii 2007 with greedy candidates, drawn by
inverse CDF from counter-based uniforms.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from polyray.kernels import random
from polyray.kernels.lloyd import Runs, around_seeds, fixed_point, iterate, spare_bits

N_CANDIDATES = 4
"""Candidates per k-means++ step, at most four (the words of one Philox call); scikit-learn tries 2 + log k."""
CHUNK_BYTES = 56 << 20
"""Working memory of `cluster_gram` in bytes beside its result: so many sets are clustered at a time (at least one).

With the default settings these are 70 sets of 100; fewer at a time would cost more in calls than caches would save.
"""
GRAM_BYTES = 4 << 20
"""Working memory of `gram` in bytes beside its result (at least one set's)."""
_FAR = 1e300
"""Stands for an infinite distance where 0 times it must be 0."""


class Clustering(NamedTuple):
    """Clusterings of G sets of n vectors for every k of the range."""

    k: Int64[Tensor, " G"]
    """The k of highest mean silhouette (the smaller on a tie); 1 where no k is possible."""
    S: Float64[Tensor, " G"]
    """Its mean silhouette, −1 to 1; 0 where no k is possible."""
    labels: Int64[Tensor, "G n"]
    """Cluster of every vector, 0 the largest cluster (ties: the one with the first vector)."""
    labels_by_k: Int64[Tensor, "G n_k n"]
    """The same for every k; −1 where that k is not possible."""
    S_by_k: Float64[Tensor, "G n_k"]
    """Mean silhouette for every k; NaN where that k is not possible."""
    inertia_by_k: Float64[Tensor, "G n_k"]
    """Sum of squared distances to the cluster centres for every k; NaN where that k is not possible."""


def gram(vectors: Float[Tensor, "G n d"]) -> Float64[Tensor, "G n n"]:
    """Inner products within each set, in float64: near-duplicates keep their small distances.

    Beside the result at most `GRAM_BYTES` of memory are used, or one set in float64.
    """
    n_sets, n, d = vectors.shape
    out = torch.empty(n_sets, n, n, dtype=torch.float64, device=vectors.device)
    for part in _parts(n_sets, GRAM_BYTES // (8 * n * d + 1)):
        x = vectors[part].double()
        torch.bmm(x, x.transpose(1, 2), out=out[part])
        del x  # before the next one is made
    return out


def _parts(n_sets: int, width: int) -> Iterator[slice]:
    """Slices of at most `width` sets, at least one set wide; one empty slice where there are no sets."""
    width = max(1, width)
    return (slice(start, start + width) for start in range(0, max(n_sets, 1), width))


def _squared(gram: Float64[Tensor, "G n n"]) -> Float64[Tensor, "G n n"]:
    """Squared distances; what rounding leaves between equal vectors (about 1e-16, whose root would be 1e-8) is 0."""
    norm = gram.diagonal(dim1=1, dim2=2)
    squared = (gram * -2.0).add_(norm[:, :, None]).add_(norm[:, None, :])
    return torch.nn.functional.threshold(squared, 1e-14, 0.0, inplace=True)


def distances(gram: Float[Tensor, "G n n"]) -> Float64[Tensor, "G n n"]:
    """Euclidean distances from Gram matrices; 0 on the diagonal."""
    return _squared(gram.double()).sqrt_()


def cluster(
    vectors: Float[Tensor, "G n d"],
    k_range: tuple[int, int],
    n_init: int,
    max_iter: int,
    seed: int,
    item: Int64[Tensor, " G"],
    stream: int = random.KMEANS_REAL,
    layer: int = 0,
) -> Clustering:
    """`cluster_gram` on the Gram matrices of the given vectors."""
    return cluster_gram(gram(vectors), k_range, n_init, max_iter, seed, item, stream, layer)


def cluster_gram(
    gram: Float64[Tensor, "G n n"],
    k_range: tuple[int, int],
    n_init: int,
    max_iter: int,
    seed: int,
    item: Int64[Tensor, " G"],
    stream: int = random.KMEANS_REAL,
    layer: int = 0,
) -> Clustering:
    """k-means for every k, the best of n_init restarts each, and the k of highest mean silhouette.

    Args:
        gram: inner products of each set, float64.
        k_range: smallest and largest k.
        n_init: restarts; the seeds of a restart are nested, so k + 1 starts from the seeds of k and one more.
        max_iter: most Lloyd iterations.
        seed: the sweep's seed.
        item: counter word of each set; a set's result depends on it and on its own vectors only.
        stream: what the sets are (`random.KMEANS_*`).
        layer: counter word of the layer.

    Returns:
        `Clustering`. A k above the number of distinct vectors is not possible. Sets with NaN or infinite entries
        have no possible k. A zero vector is a vector like any other.
    """
    runs = Runs(range(k_range[0], k_range[1] + 1), n_init)
    width = CHUNK_BYTES // bytes_per_set(gram.shape[1], k_range, n_init)
    parts = [
        _cluster_chunk(gram[part], runs, max_iter, seed, item[part], stream, layer) for part in _parts(len(gram), width)
    ]
    return Clustering(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def bytes_per_set(n: int, k_range: tuple[int, int], n_init: int) -> int:
    """Working memory of one set.

    Five n × n matrices in float64; as many as seven of memberships in float32, a column for every cluster of every
    run; and eight in float64, a column for every cluster of one run of each k.
    """
    n_columns = n_init * sum(range(k_range[0], k_range[1] + 1))
    return 8 * 5 * n * n + 4 * 7 * n * n_columns + 8 * 8 * n * (k_range[1] - k_range[0] + 1) * k_range[1]


def _cluster_chunk(
    gram: Tensor, runs: Runs, max_iter: int, seed: int, item: Tensor, stream: int, layer: int
) -> Clustering:
    n = gram.shape[1]
    ks = torch.tensor(list(runs.ks), device=gram.device)
    finite = torch.isfinite(gram.sum((1, 2)))
    if not bool(finite.all()):
        gram = torch.where(finite[:, None, None], gram, 0.0)
    squared = _squared(gram)
    single = squared.float()
    n_distinct = torch.where(finite, _n_distinct(squared, single), 0)
    possible = ks[None, :] <= n_distinct[:, None]

    seeds = _plus_plus(single, runs.ks[-1], runs.n_init, seed, item, stream, layer)
    labels, inertia = _lloyd(gram, seeds, runs, n_distinct, max_iter)
    member = _member(labels, runs.ks[-1])
    S = _silhouette(squared.sqrt_(), member)
    labels = _largest_first(labels, member)
    choice = torch.where(possible, S, -torch.inf).argmax(1)
    any_k = possible.any(1)
    kept = labels.gather(1, choice[:, None, None].expand(-1, 1, n)).squeeze(1)
    return Clustering(
        torch.where(any_k, ks[choice], 1),
        torch.where(any_k, S.gather(1, choice[:, None]).squeeze(1), 0.0),
        torch.where(any_k[:, None], kept, 0),
        torch.where(possible[:, :, None], labels, -1),
        torch.where(possible, S, torch.nan),
        torch.where(possible, inertia, torch.nan),
    )


def _n_distinct(squared: Float64[Tensor, "G n n"], single: Float[Tensor, "G n n"]) -> Int64[Tensor, " G"]:
    """How many vectors of each set have no equal before them; `single` is the same in float32, as scratch space."""
    n_sets, n, _ = squared.shape
    single.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    equal = torch.nonzero(single.amin((1, 2)) == 0).flatten()
    single.diagonal(dim1=1, dim2=2).zero_()
    n_distinct = torch.full((n_sets,), n, device=squared.device)
    if len(equal):  # rare, so that only these sets are looked at closely
        n_distinct[equal] = n - (squared[equal] == 0).tril(-1).any(2).sum(1)
    return n_distinct


def _plus_plus(
    squared: Tensor, k_max: int, n_init: int, seed: int, item: Tensor, stream: int, layer: int
) -> Int64[Tensor, "G R k_max"]:
    """Greedy k-means++ seeds: of N_CANDIDATES drawn by inverse CDF, the one that lowers the potential most."""
    n_sets, n, _ = squared.shape
    rows = squared.view(-1, n)
    first_row = torch.arange(n_sets, device=squared.device)[:, None] * n
    word = torch.arange(n_init * k_max, device=squared.device).view(n_init, k_max)
    draws = random.uniform4(seed, stream, item[:, None, None], layer, word, n)[..., :N_CANDIDATES]  # [G, R, k, C]

    seeds = [(draws[:, :, 0, 0] * n).long().clamp_(max=n - 1)]
    potential = rows[first_row + seeds[0]]  # [G, R, n]
    for step in range(1, k_max):
        cdf = potential.double().cumsum_(2)
        trial = torch.searchsorted(cdf, draws[:, :, step] * cdf[:, :, -1:], right=True).clamp_(max=n - 1)  # [G, R, C]
        lowered = rows[first_row[:, :, None] + trial]
        torch.minimum(lowered, potential[:, :, None], out=lowered)
        pick = lowered.sum(3).argmin(2, keepdim=True)
        seeds.append(trial.gather(2, pick).squeeze(2))
        potential = lowered.gather(2, pick[..., None].expand(-1, -1, 1, n)).squeeze(2)
    return torch.stack(seeds, dim=2)


def _lloyd(gram: Tensor, seeds: Tensor, runs: Runs, n_distinct: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Labels [G, n_k, n] and inertia [G, n_k] of the best restart for every k.

    All restarts of all k run at once in float32; the best of each k is then carried on in float64, which settles
    vectors that lie too close together for float32.
    """
    n_sets, n, _ = gram.shape
    # Centred, the Gram matrix says the same about distances, and fewer digits are lost.
    mean = gram.mean(2)
    centred = gram.sub(mean[:, :, None]).sub_((mean - mean.mean(1, keepdim=True))[:, None, :])
    largest = centred.diagonal(dim1=1, dim2=2).amax(1)
    largest = torch.where(largest > 0, largest, 1.0)
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    centred = fixed_point(centred.div_(unit[:, None, None]), largest / unit, 2 * spare_bits(n))
    small = fixed_point(centred.float(), (largest / unit).float(), spare_bits(n))

    reachable = runs.ks_of_runs(gram.device) <= n_distinct[:, None]  # [G, runs]
    wanted = runs.per_column(reachable)
    member, inertia = iterate(small, around_seeds(small, seeds, runs, wanted), runs, wanted, max_iter)
    best = inertia.view(n_sets, len(runs.ks), runs.n_init).argmin(2)
    one = Runs(runs.ks, 1)
    run = best + torch.arange(len(runs.ks), device=gram.device) * runs.n_init
    column = torch.cat([run[:, :w] + c for w, c in zip(one.widths, runs.columns, strict=True)], dim=1)
    chosen = member.gather(1, column[:, :, None].expand(-1, -1, n)).double()
    member, inertia = iterate(centred, chosen, one, one.per_column(reachable[:, :: runs.n_init]), max_iter)
    labels = torch.zeros_like(member[:, : one.n_runs])
    for j, block in enumerate(member.split(one.widths, dim=1)):
        labels[:, : one.widths[j]].add_(block, alpha=j)
    return labels.long().flip(1), (inertia * unit[:, None]).flip(1)


def _member(labels: Int64[Tensor, "G n_k n"], n_clusters: int) -> Float64[Tensor, "G n_k c n"]:
    """1 where a vector is in a cluster, else 0."""
    return (labels[:, :, None, :] == torch.arange(n_clusters, device=labels.device)[:, None]).double()


def _largest_first(labels: Int64[Tensor, "G n_k n"], member: Float64[Tensor, "G n_k c n"]) -> Int64[Tensor, "G n_k n"]:
    """Numbers clusters by descending size, ties by their first vector."""
    n = labels.shape[2]
    first = (member * torch.arange(n, 0, -1, device=labels.device)).amax(3)  # n less its place, 0 if there is none
    key = member.sum(3) * (n + 1) + first
    rank = (key[:, :, None, :] > key[:, :, :, None]).sum(3)
    return rank.gather(2, labels)


def _silhouette(distances: Float64[Tensor, "G n n"], member: Float64[Tensor, "G n_k c n"]) -> Float64[Tensor, "G n_k"]:
    """Mean silhouettes; the distances are rounded to a fixed point in place (an error below 1e-11 of the largest)."""
    distances = fixed_point(distances, distances.amax((1, 2)), spare_bits(member.shape[3]))
    total = torch.bmm(member.flatten(1, 2), distances).view(member.shape)
    count = member.sum(3, keepdim=True)
    own = (total * member).sum(2)
    own_count = (count * member).sum(2)
    inside = own / (own_count - 1).clamp_(min=1)
    excluded = _FAR * (member + (count == 0))
    outside = total.div_(count.clamp(min=1)).add_(excluded).amin(2)
    larger = torch.maximum(inside, outside)
    value = torch.where((larger > 0) & (outside < _FAR), (outside - inside) / larger, 0.0)
    return torch.where(own_count > 1, value, 0.0).mean(2)


def silhouette(distances: Float[Tensor, "G n n"], labels: Int[Tensor, "G n"], n_clusters: int) -> Float64[Tensor, " G"]:
    """Mean silhouette of each set.

    Args:
        distances: distances within each set.
        labels: cluster of every vector, 0 to n_clusters − 1; clusters may be empty.
        n_clusters: number of cluster labels.

    Returns:
        Mean silhouette, −1 to 1, exact to about 1e-11. A vector alone in its cluster counts 0; so does every vector
        where there is only one cluster, and a vector at distance 0 from everything. NaN or infinite distances give
        NaN or nonsense for their own set only.

    Source: Rousseeuw 1987.
    """
    return _silhouette(distances.double().clone(), _member(labels.long()[:, None, :], n_clusters))[:, 0]
