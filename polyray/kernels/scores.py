"""Q and D: do clusters follow class labels, and do their names mean different things?

Place in the flow: cluster, and every null draw. Source: arXiv 2508.16950, sections 3.4 and 3.5.
"""

import math
import weakref
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from polyray.kernels import statistics

CHUNK_BYTES = 16 << 20
"""Working memory in bytes of `permuted_nmi` beside its result and its table, and once more of `permuted_moments`."""
TABLE_BYTES = 64 << 20
"""Most bytes of prefix tables that are kept; of larger ones a part is made at a time."""
_CELL_BYTES, _DRAW_BYTES = 16, 80
"""Bytes in flight for a cell of one permutation (counts, index and c log c), and for the permutation's NMI."""
NAME_ROWS = 16
"""Clusters that are compared with the vocabulary at a time, always as many: a product of another shape would round
otherwise. The working memory of `name_clusters` is so many cosines with every prompt, beside its result."""


def _n_log_n(n: int, device: torch.device) -> Float64[Tensor, " m"]:
    """c log c for c = 0 … n, in units so large that every sum over the cells of n examples is exact in any order."""
    counts = torch.arange(n + 1, dtype=torch.float64, device=device)
    unit = 2.0 ** (math.frexp(n * math.log(n + 1))[1] - 52)
    return (torch.xlogy(counts, counts) / unit).round() * unit


def _nmi_from_sums(joint: Tensor, a: Tensor, b: Tensor, n: int) -> Tensor:
    """NMI from Σ c log c over the cells and both margins; entropy = log n − Σ c log c / n."""
    log_n = math.log(n)
    h_a, h_b = log_n - a / n, log_n - b / n
    mutual = log_n + (joint - a - b) / n
    mean = (h_a + h_b) / 2
    informative = (h_a > 1e-12) & (h_b > 1e-12)
    return torch.where(informative, mutual / mean.clamp(min=1e-12), 0.0).clamp(0.0, 1.0)


def _codes(labels: Int[Tensor, "G n"]) -> Int64[Tensor, "G n"]:
    """Labels of each row as 0 … L−1."""
    ordered, order = labels.sort(1)
    code = torch.zeros_like(order)
    code[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    return torch.empty_like(code).scatter_(1, order, code)


def _sizes(codes: Int64[Tensor, "G n"]) -> Int64[Tensor, "G n"]:
    """How often each code occurs, descending, then zeros."""
    return torch.zeros_like(codes).scatter_add_(1, codes, torch.ones_like(codes)).sort(1, descending=True).values


def nmi(a: Int[Tensor, "G n"], b: Int[Tensor, "G n"]) -> Float64[Tensor, " G"]:
    """Normalised mutual information (arithmetic mean of the entropies) of two labelings of each row.

    Returns:
        0 to 1; 0 where either side has a single label (there is nothing to agree on), and for rows of length 0.
    """
    n = a.shape[1]
    if n == 0:
        return torch.zeros(len(a), dtype=torch.float64, device=a.device)
    table = _n_log_n(n, a.device)
    code_a, code_b = _codes(a), _codes(b)
    of_joint, of_a, of_b = (table[_sizes(c)].sum(1) for c in (_codes(code_a * n + code_b), code_a, code_b))
    return _nmi_from_sums(of_joint, of_a, of_b, n)


def permuted_nmi(
    clusters: Int[Tensor, "G n"], labels: Int[Tensor, "G n"], permutations: Int64[Tensor, "B n"]
) -> Float64[Tensor, "G B"]:
    """NMI of clusters and permuted labels, for every row and permutation.

    Under permutation only the sizes of clusters and classes matter. So every row is first put into one order: its
    examples sorted by the size of their cluster, its labels by the size of their class, both descending; then the
    labels are permuted. The distribution over all permutations is that of the row as it is; the value for a given
    permutation is not. In that order a count of the contingency table is a difference of four entries of
    P[i, j, b] = #{i' < i: permutations[b, i'] < j}, a table that all rows share. Clusters and classes of one member
    have no count above 1, so that they add nothing to Σ c log c.

    Args:
        clusters: cluster of every example, any integers.
        labels: class label of every example, any integers.
        permutations: permutations of 0 … n−1, the same for all rows, n at most 32,767.

    Returns:
        float64 [G, B] as `nmi`, with bits that depend on the row alone. `nmi` of a row and its value here are equal
        to the bit wherever the contingency tables have the same counts. At most `CHUNK_BYTES` + `TABLE_BYTES` of
        memory are used beside the result, except that one permutation of one row may need more.
    """
    n_rows, n = clusters.shape
    out = torch.zeros(n_rows, len(permutations), dtype=torch.float64, device=clusters.device)
    if n == 0 or not len(permutations):
        return out
    table = _n_log_n(n, clusters.device)
    sizes = [_sizes(_codes(side)) for side in (clusters, labels)]
    a, b = (table[side].sum(1, keepdim=True) for side in sizes)
    shared = [torch.where(side > 1, side, 0) for side in sizes]
    n_shared = torch.stack([(side > 0).sum(1) for side in shared], dim=1)  # [G, 2]
    # Neighbours in this order need tables of similar size.
    order = torch.argsort(n_shared[:, 0] * n + n_shared[:, 1])
    edges = [torch.nn.functional.pad(side[order].cumsum(1), (1, 0)) for side in shared]
    counts = n_shared[order].tolist()
    for start, prefix in _prefix_tables(permutations, n):
        width = prefix.shape[1]
        for rows in _row_chunks(counts, width):
            n_c, n_y = (max(row[side] for row in counts[rows]) for side in (0, 1))
            at = edges[0][rows, : n_c + 1, None] * (n + 1) + edges[1][rows, None, : n_y + 1]
            step = max(1, min(width, CHUNK_BYTES // (at.numel() * _CELL_BYTES + len(at) * _DRAW_BYTES)))
            for first in range(0, width, step):
                part = prefix[:, first : first + step]
                below = part.index_select(0, at.flatten()).view(*at.shape, part.shape[1])
                within = below[:, 1:] - below[:, :-1]
                count = (within[:, :, 1:] - within[:, :, :-1]).int()
                joint = table.index_select(0, count.flatten()).view(len(at), n_c * n_y, part.shape[1]).sum(1)
                here = slice(start + first, start + first + part.shape[1])
                out[order[rows], here] = _nmi_from_sums(joint, a[order[rows]], b[order[rows]], n)
    return out


def _row_chunks(counts: list[list[int]], n_draws: int) -> Iterator[slice]:
    """Slices of rows whose padded contingency tables fit into `CHUNK_BYTES`, at least one row each."""
    start = 0
    while start < len(counts):
        stop, n_c, n_y = start, 0, 0
        while stop < len(counts):
            n_c, n_y = max(n_c, counts[stop][0]), max(n_y, counts[stop][1])
            needed = (stop + 1 - start) * n_draws * ((n_c + 1) * (n_y + 1) * _CELL_BYTES + _DRAW_BYTES)
            if needed > CHUNK_BYTES and stop > start:
                break
            stop += 1
        yield slice(start, stop)
        start = stop


_kept: list[tuple[weakref.ref[Tensor], int, Tensor]] = []
"""Whole tables of permutations that are still in use, oldest first."""


def _prefix_tables(permutations: Int64[Tensor, "B n"], n: int) -> Iterator[tuple[int, Tensor]]:
    """P of `permuted_nmi` as [(n + 1)², b] for successive permutations, with the first permutation's index."""
    dtype = torch.uint8 if n <= 255 else torch.int16
    width = max(1, TABLE_BYTES // ((n + 1) ** 2 * dtype.itemsize) // 2)  # while one is made, a second one is there
    if len(permutations) > width:
        for start in range(0, len(permutations), width):
            yield start, _prefix_table(permutations[start : start + width], n, dtype)
        return
    for known, version, table in _kept:
        if known() is permutations and version == permutations._version:
            yield 0, table
            return
    table = _prefix_table(permutations, n, dtype)
    _kept.append((weakref.ref(permutations), permutations._version, table))
    _kept[:] = [entry for entry in _kept if entry[0]() is not None]
    while len(_kept) > 1 and sum(entry[2].nbytes for entry in _kept) > TABLE_BYTES:
        _kept.pop(0)
    yield 0, table


def _prefix_table(permutations: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    below = torch.zeros(n + 1, n + 1, len(permutations), dtype=dtype, device=permutations.device)
    limit = torch.arange(n + 1, device=permutations.device)[:, None]
    for i, image in enumerate(permutations.T):
        torch.add(below[i], image < limit, out=below[i + 1])
    return below.view((n + 1) ** 2, -1)


def permuted_moments(
    clusters: Int[Tensor, "G n"], labels: Int[Tensor, "G n"], permutations: Int64[Tensor, "B n"]
) -> tuple[Float64[Tensor, " G"], Float64[Tensor, " G"]]:
    """Mean and standard deviation (denominator B) of `permuted_nmi` over the permutations.

    Returns:
        Two float64 [G] with bits that depend on the row alone; NaN where there are no permutations. `CHUNK_BYTES`
        more than for `permuted_nmi` suffice, or five times one row's values.
    """
    width = max(1, CHUNK_BYTES // (5 * 8 * max(1, len(permutations))))
    parts = [
        statistics.moments(permuted_nmi(clusters[g : g + width], labels[g : g + width], permutations))
        for g in range(0, max(len(clusters), 1), width)
    ]
    mean, std = (torch.cat(moment) for moment in zip(*parts, strict=True))
    return mean, std


def center_distance(gram: Float[Tensor, "G n n"], labels: Int[Tensor, "G n"]) -> Float64[Tensor, " G"]:
    """1 − cosine between the centres of two clusters: the polysemanticity score of Dreyer et al. 2025 on 2-means.

    Args:
        gram: inner products within each set.
        labels: 0 or 1; other values belong to neither cluster.

    Returns:
        0 to 2; NaN where a cluster is empty or its centre is zero.

    Source: "Mechanistic understanding and validation of large AI models with SemanticLens" (2025), polysemanticity.
    """
    member = torch.stack([labels == 0, labels == 1], dim=1).double()  # [G, 2, n]
    inner = member @ gram.double() @ member.transpose(1, 2)
    a, b, across = inner[:, 0, 0], inner[:, 1, 1], inner[:, 0, 1]
    norm = (a.clamp(min=0) * b.clamp(min=0)).sqrt()
    return torch.where(norm > 0, 1.0 - across / norm.clamp(min=1e-300), torch.nan)


def name_clusters(
    text: Float[Tensor, "G n t"],
    labels: Int[Tensor, "G n"],
    n_clusters: int,
    vocabulary: Float[Tensor, "V t"],
    top: int = 1,
) -> tuple[Int64[Tensor, "G c top"], Float[Tensor, "G c top"]]:
    """The prompts nearest to each cluster's mean text-aligned vector.

    Args:
        text: text-aligned unit vectors of every example.
        labels: cluster of every example; negative ones belong to no cluster.
        n_clusters: number of clusters.
        vocabulary: unit text embeddings of the prompts.
        top: how many prompts, at most V.

    Returns:
        Indices into the vocabulary and their cosines, nearest first; −1 and NaN for an empty cluster, and for every
        cluster where there are no prompts. Of equal prompts the first wins. A cluster whose vectors add up to 0 is at
        cosine 0 from all of them.
    """
    if not len(vocabulary):
        shape = (len(text), n_clusters, top)
        return labels.new_full(shape, -1).long(), text.new_full(shape, torch.nan)
    member = (labels[:, None, :] == torch.arange(n_clusters, device=labels.device)[None, :, None]).to(text.dtype)
    mean = torch.nn.functional.normalize(member @ text, dim=-1).flatten(0, 1)  # [G · c, t]
    prompts = vocabulary.to(text.dtype).T
    best = [_nearest(mean[row : row + NAME_ROWS], prompts, top) for row in range(0, len(mean), NAME_ROWS)]
    shape = (*member.shape[:2], top)
    index = torch.cat([i for i, _ in best]).view(shape) if best else labels.new_zeros(shape).long()
    value = torch.cat([v for _, v in best]).view(shape) if best else text.new_zeros(shape)
    empty = (member.sum(-1) == 0)[..., None]
    return torch.where(empty, -1, index), torch.where(empty, torch.nan, value)


def _nearest(mean: Tensor, prompts: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Index and cosine of the prompts nearest to up to `NAME_ROWS` means."""
    padded = torch.nn.functional.pad(mean, (0, 0, 0, NAME_ROWS - len(mean)))
    cosine = (padded @ prompts)[: len(mean)]
    if top == 1:
        value, index = cosine.max(-1, keepdim=True)
        return index, value
    index = torch.argsort(cosine, dim=-1, descending=True, stable=True)[:, :top]
    return index, cosine.gather(-1, index)


def name_distance(index: Int64[Tensor, "G k"], similarity: Float[Tensor, "V V"]) -> Float64[Tensor, " G"]:
    """D: mean over pairs of clusters of 1 − cosine between their names.

    Args:
        index: name of each cluster; −1 for none.
        similarity: cosines between the prompts' text embeddings.

    Returns:
        0 to 2; 0 where two clusters of the same name are all there is, or fewer than two names.
    """
    if not len(similarity):
        return torch.zeros(len(index), dtype=torch.float64, device=index.device)
    named = index >= 0
    safe = index.clamp(min=0)
    distance = 1.0 - similarity[safe[:, :, None], safe[:, None, :]].double()
    k = index.shape[1]
    upper = torch.ones(k, k, dtype=torch.bool, device=index.device).triu(1)
    pair = named[:, :, None] & named[:, None, :] & upper
    same = safe[:, :, None] == safe[:, None, :]
    total = torch.where(pair & ~same, distance, 0.0).sum((1, 2))
    return total / pair.sum((1, 2)).clamp(min=1)
