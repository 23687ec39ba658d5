"""k-means and silhouette of many small sets at once, on their Gram matrices.

Which question it answers: *into how many groups does a neuron's set of examples fall?* Place in the flow: cluster,
and every null draw. With unit vectors all distances follow from the n × n Gram matrix, so a set costs the same
whatever the encoder's dimension, all restarts and all k run in one batched product per Lloyd iteration, and null
draws from a pool only gather entries of the pool's Gram matrix.

Source: arXiv 2508.16950, section 3.3; k-means++ of Arthur & Vassilvitskii 2007 with greedy candidates, drawn by
inverse CDF from counter-based uniforms.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from polyray.kernels import random

N_CANDIDATES = 3
"""Candidates per k-means++ step; scikit-learn's 2 + log k gives 2 or 3 for k up to 6."""
_CHUNK_ELEMENTS = 6_000_000
"""Assignment-matrix elements in flight: bounds the working memory to about 200 MB."""


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
    """Inner products within each set, in float64: near-duplicates keep their small distances."""
    vectors = vectors.double()
    return vectors @ vectors.transpose(1, 2)


def distances(gram: Float[Tensor, "G n n"]) -> Float64[Tensor, "G n n"]:
    """Euclidean distances from Gram matrices; 0 on the diagonal."""
    gram = gram.double()
    norm = gram.diagonal(dim1=1, dim2=2)
    squared = (norm[:, :, None] + norm[:, None, :] - 2 * gram).clamp(min=0)
    # Rounding leaves about 1e-16 between equal vectors, whose root would be 1e-8: call that 0.
    return torch.where(squared < 1e-14, 0.0, squared).sqrt()


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
        have no possible k.
    """
    ks = torch.arange(k_range[0], k_range[1] + 1, device=gram.device)
    n = gram.shape[1]
    per_item = max(1, n * n_init * len(ks) * int(k_range[1]))
    width = max(1, _CHUNK_ELEMENTS // per_item)
    parts = [
        _cluster_chunk(gram[g : g + width], ks, n_init, max_iter, seed, item[g : g + width], stream, layer)
        for g in range(0, max(len(gram), 1), width)
    ]
    return Clustering(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _cluster_chunk(
    gram: Tensor, ks: Tensor, n_init: int, max_iter: int, seed: int, item: Tensor, stream: int, layer: int
) -> Clustering:
    n = gram.shape[1]
    k_max = int(ks[-1])
    finite = torch.isfinite(gram).flatten(1).all(1)
    gram = torch.where(finite[:, None, None], gram, 0.0)
    dist = distances(gram)
    first = torch.arange(n, device=gram.device)
    duplicate = ((dist == 0) & (first[None, None, :] < first[None, :, None])).any(2)
    n_distinct = torch.where(finite, (~duplicate).sum(1), 0)
    possible = ks[None, :] <= n_distinct[:, None]

    seeds = _plus_plus(dist.square(), k_max, n_init, seed, item, stream, layer)
    labels, inertia = _lloyd(gram, seeds, ks, max_iter)
    labels = _largest_first(labels, k_max)
    S = _silhouette_by_k(dist, labels, k_max)
    nan = torch.nan
    S_by_k = torch.where(possible, S, nan)
    choice = torch.where(possible, S, -torch.inf).argmax(1)
    any_k = possible.any(1)
    kept = labels.gather(1, choice[:, None, None].expand(-1, 1, n)).squeeze(1)
    return Clustering(
        torch.where(any_k, ks[choice], 1),
        torch.where(any_k, S.gather(1, choice[:, None]).squeeze(1), 0.0),
        torch.where(any_k[:, None], kept, 0),
        torch.where(possible[:, :, None], labels, -1),
        S_by_k,
        torch.where(possible, inertia, nan),
    )


def _plus_plus(
    squared: Tensor, k_max: int, n_init: int, seed: int, item: Tensor, stream: int, layer: int
) -> Int64[Tensor, "G R k_max"]:
    """Greedy k-means++ seeds: of N_CANDIDATES drawn by inverse CDF, the one that lowers the potential most."""
    n_sets, n, _ = squared.shape
    squared = squared.float()
    restart = torch.arange(n_init, device=squared.device)
    candidate = torch.arange(N_CANDIDATES, device=squared.device)
    set_idx = torch.arange(n_sets, device=squared.device)

    def draws(step: int) -> Tensor:
        word = (restart[None, :, None] * k_max + step) * N_CANDIDATES + candidate[None, None, :]
        return random.uniform(seed, stream, item[:, None, None], layer, word, n)

    chosen = (draws(0)[:, :, 0] * n).long().clamp(max=n - 1)
    seeds = [chosen]
    potential = squared[set_idx[:, None], chosen]  # [G, R, n]
    for step in range(1, k_max):
        cdf = potential.double().cumsum(2)
        target = draws(step) * cdf[:, :, -1:]
        trial = torch.searchsorted(cdf, target, right=True).clamp(max=n - 1)  # [G, R, C]
        lowered = torch.minimum(potential[:, :, None, :], squared[set_idx[:, None, None], trial])
        pick = lowered.sum(3).argmin(2)
        seeds.append(trial.gather(2, pick[:, :, None]).squeeze(2))
        potential = lowered.gather(2, pick[:, :, None, None].expand(-1, -1, 1, n)).squeeze(2)
    return torch.stack(seeds, dim=2)


def _lloyd(gram: Tensor, seeds: Tensor, ks: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Labels [G, n_k, n] and inertia [G, n_k] of the best restart for every k.

    All restarts of all k run at once in float32; the best of each k is then carried on in float64, which settles
    vectors that lie too close together for float32.
    """
    n_sets, n, _ = gram.shape
    n_init, k_max = seeds.shape[1:]
    # Centred and scaled, the Gram matrix says the same about distances, and fewer digits are lost.
    mean = gram.mean(2, keepdim=True)
    centred = gram - mean - mean.transpose(1, 2) + mean.mean(1, keepdim=True)
    spread = centred.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    centred = centred / spread[:, None, None]
    small = centred.float()

    # The first assignment is to the seeds themselves.
    allowed = torch.arange(k_max, device=gram.device) < ks[:, None]  # [n_k, k_max]
    norm = small.diagonal(dim1=1, dim2=2)
    to_seed = small.gather(2, seeds.flatten(1)[:, None, :].expand(-1, n, -1)).view(n_sets, n, n_init, k_max)
    cost = norm.gather(1, seeds.flatten(1)).view(n_sets, 1, n_init, k_max) - 2 * to_seed
    labels = cost[:, :, None].masked_fill(~allowed[:, None], torch.inf).argmin(4).flatten(2)  # [G, n, n_k · R]

    labels, inertia = _iterate(small, labels, allowed.repeat_interleave(n_init, 0), max_iter)
    best = inertia.view(n_sets, len(ks), n_init).argmin(2)
    labels = labels.view(n_sets, n, len(ks), n_init).gather(3, best[:, None, :, None].expand(-1, n, -1, 1)).squeeze(3)
    labels, inertia = _iterate(centred, labels, allowed, max_iter)
    return labels.transpose(1, 2), inertia * spread[:, None]


def _iterate(gram: Tensor, labels: Tensor, allowed: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Lloyd iterations of runs [G, n, runs] in the Gram matrix's precision; sets that have converged drop out.

    A cluster that runs empty is moved onto the vector farthest from its own centre.
    """
    n_sets, _, runs = labels.shape
    k_max = allowed.shape[1]
    norm = gram.diagonal(dim1=1, dim2=2)  # [G, n]
    inertia = torch.zeros(n_sets, runs, dtype=torch.float64, device=gram.device)
    active = torch.arange(n_sets, device=gram.device)
    for _ in range(max_iter):
        member = torch.nn.functional.one_hot(labels[active], k_max).to(gram.dtype)  # [A, n, runs, k]
        g = gram if len(active) == n_sets else gram[active]
        product = (g @ member.flatten(2)).view(member.shape)
        count = member.sum(1)  # [A, runs, k]
        inverse = 1.0 / count.clamp(min=1.0)
        self_term = (member * product).sum(1) * inverse * inverse
        cost = (product * inverse[:, None]).mul_(-2).add_(self_term[:, None])
        cost = cost.masked_fill((count == 0)[:, None], torch.inf)
        value, new = cost.min(3)
        residual = value + norm[active][:, :, None]
        empty = (count == 0) & allowed
        if bool(empty.any()):
            new = _refill(new, residual, empty)
        inertia[active] = residual.double().sum(1)
        moved = (new != labels[active]).flatten(1).any(1)
        labels[active] = new
        active = active[moved]
        if not len(active):
            break
    return labels, inertia


def _refill(labels: Tensor, residual: Tensor, empty: Tensor) -> Tensor:
    """Gives each run's first empty cluster the vector farthest from its centre (the next ones follow later)."""
    sets, runs = torch.nonzero(empty.any(2), as_tuple=True)
    which = empty[sets, runs].int().argmax(1)
    farthest = residual[sets, :, runs].argmax(1)
    labels = labels.clone()
    labels[sets, farthest, runs] = which
    return labels


def _largest_first(labels: Int64[Tensor, "G n_k n"], k_max: int) -> Int64[Tensor, "G n_k n"]:
    """Numbers clusters by descending size, ties by their first vector."""
    n = labels.shape[2]
    member = torch.nn.functional.one_hot(labels, k_max)
    size = member.sum(2)
    first = torch.where(member.bool(), torch.arange(n, device=labels.device)[:, None], n).amin(2)
    order = torch.argsort(-size * (n + 1) + first, dim=2, stable=True)
    rank = torch.empty_like(order).scatter_(2, order, torch.arange(k_max, device=labels.device).expand_as(order))
    return rank.gather(2, labels)


def _silhouette_by_k(dist: Tensor, labels: Tensor, k_max: int) -> Float64[Tensor, "G n_k"]:
    n_sets, n_k, n = labels.shape
    member = torch.nn.functional.one_hot(labels, k_max).double()  # [G, n_k, n, k]
    total = (dist @ member.permute(0, 2, 1, 3).flatten(2)).view(n_sets, n, n_k, k_max).permute(0, 2, 1, 3)
    count = member.sum(2)[:, :, None, :]  # [G, n_k, 1, k]
    own = (total * member).sum(3)
    own_count = (count * member).sum(3)
    inside = own / (own_count - 1).clamp(min=1)
    others = torch.where((member > 0) | (count == 0), torch.inf, total / count.clamp(min=1))
    outside = others.amin(3)
    larger = torch.maximum(inside, outside)
    value = torch.where((larger > 0) & torch.isfinite(outside), (outside - inside) / larger, 0.0)
    return torch.where(own_count > 1, value, 0.0).mean(2)


def silhouette(distances: Float[Tensor, "G n n"], labels: Int[Tensor, "G n"], n_clusters: int) -> Float64[Tensor, " G"]:
    """Mean silhouette of each set.

    Args:
        distances: distances within each set.
        labels: cluster of every vector, 0 to n_clusters − 1; clusters may be empty.
        n_clusters: number of cluster labels.

    Returns:
        Mean silhouette, −1 to 1. A vector alone in its cluster counts 0; so does every vector where there is only
        one cluster, and a vector at distance 0 from everything.

    Source: Rousseeuw 1987.
    """
    return _silhouette_by_k(distances.double(), labels.long()[:, None, :], n_clusters)[:, 0]
