"""k-means and silhouette of many small sets at once, on their Gram matrices.

Which question it answers: *into how many groups does a neuron's set of examples fall?* Place in the flow: cluster,
and every null draw. With unit vectors all distances follow from the n × n Gram matrix, so a set costs the same
whatever the encoder's dimension, all restarts and all k run in one batched product per Lloyd iteration, and null
draws from a pool only gather entries of the pool's Gram matrix.

A set's result depends on nothing but itself, to the bit: the matrices that are multiplied are rounded to a fixed
point, so that sums over members are exact in whatever order a library, a batch or a device takes them.

Source: arXiv 2508.16950, section 3.3; k-means++ of Arthur & Vassilvitskii 2007 with greedy candidates, drawn by
inverse CDF from counter-based uniforms.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from polyray.kernels import random

N_CANDIDATES = 4
"""Candidates per k-means++ step, at most four (the words of one Philox call); scikit-learn tries 2 + log k."""
CHUNK_BYTES = 48 << 20
"""Working memory in bytes: so many sets are clustered at a time that it suffices (at least one)."""
GRAM_BYTES = 8 << 20
"""The same for the float64 copies of vectors."""
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
    return out


def _parts(n_sets: int, width: int) -> Iterator[slice]:
    """Slices of at most `width` sets, at least one set wide; one empty slice where there are no sets."""
    width = max(1, width)
    return (slice(start, start + width) for start in range(0, max(n_sets, 1), width))


def _squared(gram: Float64[Tensor, "G n n"]) -> Float64[Tensor, "G n n"]:
    """Squared distances; what rounding leaves between equal vectors (about 1e-16, whose root would be 1e-8) is 0."""
    norm = gram.diagonal(dim1=1, dim2=2)
    squared = (gram * -2.0).add_(norm[:, :, None]).add_(norm[:, None, :])
    return torch.nn.functional.threshold_(squared, 1e-14, 0.0)


def distances(gram: Float[Tensor, "G n n"]) -> Float64[Tensor, "G n n"]:
    """Euclidean distances from Gram matrices; 0 on the diagonal."""
    return _squared(gram.double()).sqrt_()


def _fixed_point(x: Tensor, largest: Tensor, spare: int) -> Tensor:
    """Rounds each set's matrix, in place, to a fixed point: a sum of 2^spare of its entries is exact.

    Nothing then depends on the order in which a library adds them up. The unit is 2^(spare − 53) (float32: 24) of the
    power of two above the set's largest entry.
    """
    digits = 53 if x.dtype == torch.float64 else 24
    bits = digits - max(spare, 2)
    _, exponent = torch.frexp(largest)
    # Adding and subtracting 1.5 · 2^(digits − 1) units drops everything below a unit.
    carry = torch.ldexp(torch.full_like(largest, 1.5), exponent + (digits - 1 - bits)).to(x.dtype)[:, None, None]
    return x.add_(carry).sub_(carry)


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
    runs = _Runs(range(k_range[0], k_range[1] + 1), n_init)
    width = CHUNK_BYTES // bytes_per_set(gram.shape[1], k_range, n_init)
    parts = [
        _cluster_chunk(gram[part], runs, max_iter, seed, item[part], stream, layer)
        for part in _parts(len(gram), width)
    ]
    return Clustering(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def bytes_per_set(n: int, k_range: tuple[int, int], n_init: int) -> int:
    """Working memory of one set: five n × n matrices in float64, and four of memberships in float32."""
    n_columns = n_init * sum(range(k_range[0], k_range[1] + 1))
    return 8 * 5 * n * n + 4 * 4 * n * n_columns + 8 * 8 * n * (k_range[1] - k_range[0] + 1) * k_range[1]


class _Runs:
    """Where the clusters of all runs (a restart of a k) are among the columns of one matrix of memberships.

    Runs are ordered by descending k, so that the runs that have a cluster j are the first `widths[j]`. Columns are
    ordered by cluster, then run: no column is wasted on a cluster that its run does not have, and a reduction over
    the clusters of a run is a few elementwise operations on contiguous blocks.
    """

    def __init__(self, ks: range, n_init: int) -> None:
        self.ks = ks
        self.n_init = n_init
        self.n_runs = len(ks) * n_init
        self.widths = [n_init * sum(k > j for k in ks) for j in range(ks[-1])]
        self.columns = [sum(self.widths[:j]) for j in range(ks[-1])]

    def ks_of_runs(self, device: torch.device) -> Int64[Tensor, " runs"]:
        return torch.tensor([k for k in reversed(self.ks) for _ in range(self.n_init)], device=device)

    def per_column(self, of_run: Tensor) -> Tensor:
        """[G, runs] repeated for every cluster that each run has: [G, columns]."""
        return torch.cat([of_run[:, :width] for width in self.widths], dim=1)


def _cluster_chunk(
    gram: Tensor, runs: _Runs, max_iter: int, seed: int, item: Tensor, stream: int, layer: int
) -> Clustering:
    n_sets, n, _ = gram.shape
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


def _lloyd(gram: Tensor, seeds: Tensor, runs: _Runs, n_distinct: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
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
    centred = _fixed_point(centred.div_(unit[:, None, None]), largest / unit, 2 * _bits(n))
    small = _fixed_point(centred.float(), (largest / unit).float(), _bits(n))

    reachable = runs.ks_of_runs(gram.device) <= n_distinct[:, None]  # [G, runs]
    wanted = runs.per_column(reachable)
    member, inertia = _iterate(small, _around_seeds(small, seeds, runs, wanted), runs, wanted, max_iter)
    best = inertia.view(n_sets, len(runs.ks), runs.n_init).argmin(2)
    one = _Runs(runs.ks, 1)
    run = best + torch.arange(len(runs.ks), device=gram.device) * runs.n_init
    column = torch.cat([run[:, :w] + c for w, c in zip(one.widths, runs.columns, strict=True)], dim=1)
    chosen = member.gather(1, column[:, :, None].expand(-1, -1, n)).double()
    member, inertia = _iterate(centred, chosen, one, one.per_column(reachable[:, :: runs.n_init]), max_iter)
    labels = torch.zeros_like(member[:, : one.n_runs])
    for j, block in enumerate(member.split(one.widths, dim=1)):
        labels[:, : one.widths[j]].add_(block, alpha=j)
    return labels.long().flip(1), (inertia * unit[:, None]).flip(1)


def _bits(n: int) -> int:
    """Bits by which a sum of n numbers is longer than they are."""
    return math.ceil(math.log2(max(n, 2)))


def _around_seeds(gram: Tensor, seeds: Tensor, runs: _Runs, wanted: Tensor) -> Tensor:
    """Memberships [G, columns, n] of the clusters around the vectors that are the seeds."""
    n_sets, n, _ = gram.shape
    column = [seeds[:, None, :, j].expand(-1, w // runs.n_init, -1).flatten(1) for j, w in enumerate(runs.widths)]
    at = torch.cat(column, dim=1)  # [G, columns]
    norm = gram.diagonal(dim1=1, dim2=2)
    rows = (at + n * torch.arange(n_sets, device=gram.device)[:, None]).flatten()
    score = gram.reshape(-1, n).index_select(0, rows).view(n_sets, -1, n)
    score.sub_(0.5 * norm.gather(1, at)[:, :, None])
    _assign(score, torch.empty_like(score[:, : runs.n_runs]), norm, wanted, runs)
    return score


def _iterate(gram: Tensor, member: Tensor, runs: _Runs, wanted: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Lloyd iterations in the Gram matrix's precision; sets of which no vector moves any more drop out.

    Args:
        gram: fixed-point Gram matrices [G, n, n], entries at most 1.
        member: 1 where a vector is in a cluster, else 0, [G, columns, n].
        runs: what the columns are.
        wanted: whether the set has enough distinct vectors for the k of the column's run, [G, columns].
        max_iter: most iterations.

    Returns:
        Memberships [G, columns, n] and inertia [G, runs].
    """
    n_sets, _, n = member.shape
    norm = gram.diagonal(dim1=1, dim2=2).contiguous()
    final = torch.empty_like(member)
    inertia = torch.empty(n_sets, runs.n_runs, dtype=torch.float64, device=gram.device)
    active = torch.arange(n_sets, device=gram.device)
    # Fresh memory costs more than the arithmetic on it: the large tensors take turns.
    score, product, spare = torch.empty_like(member), torch.empty_like(member), torch.empty_like(gram)
    best = torch.empty_like(member[:, : runs.n_runs])
    count = member.sum(2)  # [A, columns]
    for iteration in range(max_iter):
        share = count.clamp(min=1.0).reciprocal_()
        torch.bmm(member, gram, out=score)
        half = torch.mul(member, score, out=product).sum(2).mul_(share).mul_(share).mul_(0.5)
        half.masked_fill_(count == 0, torch.inf)
        # <x, c> − |c|² / 2: the larger, the nearer is centre c.
        score.mul_(share[:, :, None]).sub_(half[:, :, None])
        count = _assign(score, best, norm, wanted, runs)
        member, old = score, member
        still = torch.mul(old, member, out=product).sum((1, 2)) == n * runs.n_runs
        if iteration == max_iter - 1:
            still = torch.ones_like(still)
        done = torch.nonzero(still).flatten()
        if len(done):
            where = active[done]
            final[where] = member[done]
            inertia[where] = (norm.sum(1)[:, None] - 2 * best.sum(2))[done].double()
            left = torch.nonzero(~still).flatten()
            n_left = len(left)
            if not n_left:
                break
            active, norm, count, wanted = active[left], norm[left], count[left], wanted[left]
            spare, gram = gram, torch.index_select(gram, 0, left, out=spare[:n_left])
            old, member = member, torch.index_select(member, 0, left, out=old[:n_left])
            product, best = product[:n_left], best[:n_left]
        score = old[: len(member)]
    return final, inertia


def _assign(score: Tensor, best: Tensor, norm: Tensor, wanted: Tensor, runs: _Runs) -> Tensor:
    """Turns scores into memberships in place, and puts the largest score of every run and vector into `best`.

    Returns:
        Sizes of the clusters [G, columns].
    """
    blocks = score.split(runs.widths, dim=1)
    best.copy_(blocks[0])
    for block in blocks[1:]:
        part = best[:, : block.shape[1]]
        torch.maximum(part, block, out=part)
    for block in blocks:
        block.eq_(best[:, : block.shape[1]])
    count = score.sum(2)
    odd = (count.sum(1) != score.shape[2] * runs.n_runs) | ((count == 0) & wanted).any(1)
    if bool(odd.any()):
        count = _repair(score, norm[:, None] - 2 * best, wanted, runs)
    return count


def _repair(member: Tensor, residual: Tensor, wanted: Tensor, runs: _Runs) -> Tensor:
    """Settles in place what is rare: of equally near centres the first wins, and clusters that ran empty are refilled.

    An empty cluster is given the vector farthest from its own centre, unless that is alone in its cluster.

    Returns:
        Sizes of the clusters [G, columns].
    """
    blocks = member.split(runs.widths, dim=1)
    taken = torch.zeros_like(residual)
    for block in blocks:
        part = taken[:, : block.shape[1]]
        block.mul_(1 - part)
        part.add_(block)
    # float32 leaves about this much where a vector is its own centre; float64 takes whatever is farthest.
    least = 2.0**-12 if member.dtype == torch.float32 else -torch.inf
    for _ in blocks:
        count = member.sum(2)
        empty = (count == 0) & wanted
        which = torch.full(residual.shape[:2], -1, device=member.device)
        company = torch.zeros_like(residual)
        for j in reversed(range(len(blocks))):
            c, w = runs.columns[j], runs.widths[j]
            which[:, :w].masked_fill_(empty[:, c : c + w], j)
            company[:, :w].addcmul_(blocks[j], count[:, c : c + w, None])
        distance, farthest = residual.masked_fill(company < 2, -torch.inf).max(2)
        sets, run = torch.nonzero((which >= 0) & (distance > least), as_tuple=True)
        if not len(sets):
            break
        vector, cluster = farthest[sets, run], which[sets, run]
        residual[sets, run, vector] = -torch.inf  # where it is now it stays
        for j, (c, w) in enumerate(zip(runs.columns, runs.widths, strict=True)):
            has = run < w
            member[sets[has], c + run[has], vector[has]] = (cluster[has] == j).to(member.dtype)
    return member.sum(2)


def _member(labels: Int64[Tensor, "G n_k n"], n_clusters: int) -> Float64[Tensor, "G n_k c n"]:
    """1 where a vector is in a cluster, else 0."""
    return (labels[:, :, None, :] == torch.arange(n_clusters, device=labels.device)[:, None]).double()


def _largest_first(
    labels: Int64[Tensor, "G n_k n"], member: Float64[Tensor, "G n_k c n"]
) -> Int64[Tensor, "G n_k n"]:
    """Numbers clusters by descending size, ties by their first vector."""
    n = labels.shape[2]
    first = (member * torch.arange(n, 0, -1, device=labels.device)).amax(3)  # n less its place, 0 if there is none
    key = member.sum(3) * (n + 1) + first
    rank = (key[:, :, None, :] > key[:, :, :, None]).sum(3)
    return rank.gather(2, labels)


def _silhouette(distances: Float64[Tensor, "G n n"], member: Float64[Tensor, "G n_k c n"]) -> Float64[Tensor, "G n_k"]:
    """Mean silhouettes; the distances are rounded to a fixed point in place (an error below 1e-11 of the largest)."""
    n_sets, n_k, n_clusters, n = member.shape
    distances = _fixed_point(distances, distances.amax((1, 2)), _bits(n))
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
