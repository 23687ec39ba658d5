"""How near are a neuron's tokens to the clusters that it shares with the neurons before it?

Place in the flow: proximity and its controls. A neuron has n core-tokens, in descending order of activation, and up to
P clusters of tokens; all neurons of a batch have the same n. Everything follows from cosines between input embeddings.
They are rounded to a fixed point, so that sums over tokens are exact in any order and two equal embeddings have a
cosine of exactly 1.

Source: arXiv 2505.07831. The deciles' null, the orientation of tau, the component's signs and the rank's tolerance are
choices of ours, stated where they are made.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from scipy.stats import rankdata
from torch import Tensor

from polyray.kernels.statistics import total

N_GROUPS = 10
"""Groups of equal size into which the tokens fall by activation: deciles."""
FIXED = 2.0**40
"""Cosines are multiples of 1 / FIXED = 9e-13: a sum of 2^12 of them fits float64's 53 bits exactly."""
FLAT = 1e-10
"""Variance and eigenvalues below this share of the largest possible (variance: of 1) are rounding of the cosines."""
TIE = 1e-9
"""A permuted statistic this close below the observed one counts as reaching it."""
_CHUNK = 4_000_000
"""Numbers held at a time by the permutation null of tied rows."""


def cosines(
    embeddings: Float[Tensor, "T d"], rows: Int64[Tensor, "G n"], columns: Int64[Tensor, "G m"]
) -> Float64[Tensor, "G n m"]:
    """Cosine of the embeddings of every row token with every column token of the same neuron.

    Args:
        embeddings: one vector a token.
        rows: indices of tokens; −1 is none.
        columns: likewise.

    Returns:
        Multiples of 1 / FIXED; NaN where an embedding is zero or not finite, and where there is no token.
    """
    a = _unit(embeddings, rows)
    b = a if columns is rows else _unit(embeddings, columns)
    return (a @ b.transpose(1, 2)).mul_(FIXED).round_().div_(FIXED)


def _unit(embeddings: Tensor, tokens: Tensor) -> Float64[Tensor, "G n d"]:
    x = embeddings[tokens.clamp(min=0)].double()
    length = x.norm(dim=2)
    defined = (tokens >= 0) & (length > 0) & length.isfinite()
    return x.div_(torch.where(defined, length, torch.nan)[:, :, None])


def proximity(
    cosine: Float64[Tensor, "G n m"], clusters: Bool[Tensor, "G P m"], own: bool = True
) -> Float64[Tensor, "G n P"]:
    """Mean cosine of each token with the tokens of each cluster other than itself.

    Args:
        cosine: of each row token with the tokens of which the clusters are made.
        clusters: which of these each cluster has.
        own: whether column i stands for the same token as row i, which is then left out for that row.

    Returns:
        −1 to 1; NaN where the cluster has no other token, and where a cosine that is needed is NaN.
    """
    n = torch.arange(cosine.shape[1], device=cosine.device)
    member = clusters.double().transpose(1, 2)
    n_others = clusters.sum(2)[:, None, :].double()
    if own:
        cosine = cosine.clone()
        cosine[:, n, n] = 0.0
        n_others = n_others - member
    undefined = n_others == 0
    missing = cosine.isnan()
    if missing.any():
        undefined = undefined | ((missing.double() @ member) > 0)
        cosine = cosine.nan_to_num(0.0)
    return torch.where(undefined, torch.nan, cosine @ member / n_others.clamp(min=1))


def dimensional(near: Float64[Tensor, "G n P"], counted: Bool[Tensor, "G P"]) -> Float64[Tensor, "G n"]:
    """Dimensional proximity: mean proximity of each token to the counted clusters to which it has one.

    NaN where it has none.
    """
    known = counted[:, None, :] & ~near.isnan()
    n_known = known.sum(2)
    mean = total(torch.where(known, near, 0.0)) / n_known.clamp(min=1)
    return torch.where(n_known > 0, mean, torch.nan)


def difference(values: Float64[Tensor, "G n"], n_ends: int) -> Float64[Tensor, " G"]:
    """Mean of the first n_ends values less that of the last n_ends, of which those that are NaN do not count.

    Returns:
        NaN where n < 2 n_ends, which would compare a token with itself, and where all values of an end are NaN.
    """
    if values.shape[1] < 2 * n_ends:
        return torch.full((len(values),), torch.nan, dtype=torch.float64)
    return _mean(values[:, :n_ends]) - _mean(values[:, values.shape[1] - n_ends :])


def _mean(values: Float64[Tensor, "G n"]) -> Float64[Tensor, " G"]:
    known = ~values.isnan()
    n = known.sum(1)
    return torch.where(n > 0, total(torch.where(known, values, 0.0)) / n.clamp(min=1), torch.nan)


def groups_of(n: int, n_groups: int = N_GROUPS) -> Int64[Tensor, " n"]:
    """The group of each rank, 0 the highest activation; sizes differ by at most one.

    Raises:
        ValueError: fewer ranks than groups.
    """
    if n < n_groups:
        raise ValueError(f"{n} ranks make no {n_groups} groups")
    return torch.arange(n) * n_groups // n


def group_means(values: Float64[Tensor, "G n"], group: Int64[Tensor, " n"]) -> Float64[Tensor, "G k"]:
    """Mean of the values of each group that are not NaN; NaN where there is none."""
    return torch.stack([_mean(values[:, group == i]) for i in range(int(group[-1]) + 1)], dim=1)


class OrderNull(NamedTuple):
    """What chance makes of the groups: permutations of the order of the values, shared by all rows."""

    group: Int64[Tensor, " n"]
    """The group of each place."""
    permuted: Int64[Tensor, "B n"]
    """The same under each permutation."""
    untied: Float64[Tensor, " B"]
    """H under each permutation, ascending, of values without ties: it depends on ranks alone, so all rows share it."""


def order_null(group: Int64[Tensor, " n"], permutations: Int64[Tensor, "B n"]) -> OrderNull:
    """The permutation null of `kruskal`."""
    n = len(group)
    permuted = group[permutations]
    ranks = torch.arange(2, 2 * n + 1, 2, dtype=torch.float64)
    return OrderNull(group, permuted, _h(ranks[None, :], permuted)[0].sort().values)


def kruskal(values: Float64[Tensor, "G n"], null: OrderNull) -> tuple[Float64[Tensor, " G"], Float64[Tensor, " G"]]:
    """Kruskal and Wallis's H of the groups and its p by permutation of the order of the values.

    Args:
        values: one row a test.
        null: groups and permutations; a row with ties has a null of its own from the same permutations.

    Returns:
        (H corrected for ties, p = (1 + #{H of a permutation >= H}) / (B + 1)); NaN where all values are equal or one
        is NaN.

    Source:
        Kruskal & Wallis 1952; `scipy.stats.kruskal` is the same H.
    """
    n, n_permutations = values.shape[1], len(null.permuted)
    missing = values.isnan().any(1)
    # Doubled midranks are whole numbers.
    ranks = torch.from_numpy(2 * rankdata(torch.where(missing[:, None], 0.0, values).numpy(), axis=1))
    h = _h(ranks, null.group[None, :])[:, 0]
    p = torch.full_like(h, torch.nan)
    untied = ((ranks.square().sum(1) - 2.0 * n * (n + 1) * (2 * n + 1) / 3).abs() < 0.5) & ~missing
    p[untied] = (1 + n_permutations - torch.searchsorted(null.untied, h[untied] - TIE)).double()
    tied = torch.nonzero(~untied & ~missing & ~h.isnan()).flatten()
    for some in tied.split(max(1, _CHUNK // (n_permutations + 1))):
        p[some] = (1 + (_h(ranks[some], null.permuted) >= h[some, None] - TIE).sum(1)).double()
    return torch.where(missing, torch.nan, h), p / (n_permutations + 1)


def _h(ranks: Float64[Tensor, "G n"], groups: Int64[Tensor, "B n"]) -> Float64[Tensor, "G B"]:
    """H of each row of doubled midranks under each assignment to groups; NaN where all ranks are equal."""
    n = ranks.shape[1]
    centred = ranks - (n + 1)
    total_squares = centred.square().sum(1)
    between = torch.zeros(len(ranks), len(groups), dtype=torch.float64)
    for i in range(int(groups.max()) + 1):
        member = (groups == i).double()
        between += (centred @ member.T).square() / member.sum(1).clamp(min=1)
    return torch.where(total_squares[:, None] > 0, (n - 1) * between / total_squares[:, None], torch.nan)


def tau(means: Float64[Tensor, "G k"]) -> Float64[Tensor, " G"]:
    """Kendall's tau-b of activation and mean proximity over groups, of which group 0 has the highest activation.

    Means closer than 1 / FIXED are tied. 1 where proximity rises with every step of activation; NaN where all means
    are tied or one is NaN.
    """
    k = means.shape[1]
    first, second = torch.triu_indices(k, k, 1)
    gap = means[:, first] - means[:, second]
    sign = torch.where(gap.abs() < 1 / FIXED, 0.0, gap.sign())
    n_untied = sign.abs().sum(1)
    found = sign.sum(1) / (n_untied * len(first)).sqrt()
    return torch.where((n_untied > 0) & ~means.isnan().any(1), found, torch.nan)


def without_centre(cosine: Float64[Tensor, "G n n"]) -> Float64[Tensor, "G n n"]:
    """Cosines once the mean direction of the n tokens is taken out of all of them.

    Args:
        cosine: of n tokens with each other.

    Returns:
        Multiples of 1 / FIXED; NaN of a token with nothing beside the mean direction (n = 1; all embeddings equal), and
        where a cosine is NaN. Where the unit embeddings add up to nothing there is no such direction, and all stays.
    """
    along = cosine.sum(2)
    whole = along.sum(1)[:, None, None]  # n² times the squared length of the mean
    centre = along[:, :, None] * along[:, None, :] / whole.clamp(min=FLAT)
    rest = cosine - torch.where(whole < FLAT, 0.0, centre)  # NaN stays NaN
    length = rest.diagonal(dim1=1, dim2=2)
    length = torch.where(length > FLAT, length, torch.nan).sqrt()
    return ((rest / (length[:, :, None] * length[:, None, :])) * FIXED).round_().div_(FIXED)


class Component(NamedTuple):
    """First principal component of the (token × cluster) matrix of each neuron."""

    share: Float64[Tensor, " G"]
    """Its share of the variance, 1/P to 1; NaN with fewer than two clusters or no variance."""
    agreeing: Float64[Tensor, " G"]
    """Share of the clusters whose loading has the sign that most loadings have, 0.5 to 1 (a loading of 0 has none)."""
    loadings: Float64[Tensor, "G P"]
    """Of length 1 and with a sum of at least 0; NaN where the cluster is not counted."""


def first_component(near: Float64[Tensor, "G n P"], counted: Bool[Tensor, "G P"]) -> Component:
    """Principal components of proximity, tokens as observations, clusters as variables (centred, not scaled).

    The paper does not say whether variables were scaled; they are cosines of one kind, so they are not.
    A neuron with a NaN proximity to a counted cluster has none.
    """
    used = torch.where(counted[:, None, :], near, 0.0)
    missing = used.isnan().any(2).any(1)
    used = used.nan_to_num(0.0)
    centred = used - used.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred / max(near.shape[1], 1))
    variance = values.clamp(min=0).sum(1)
    defined = ~missing & (variance > FLAT**2) & (counted.sum(1) >= 2)
    first = vectors[:, :, -1]
    first = torch.where(first.sum(1, keepdim=True) < 0, -first, first)
    n_up, n_down = (((first * s) > 1e-9).logical_and(counted).sum(1).double() for s in (1, -1))
    agreeing = torch.maximum(n_up, n_down) / counted.sum(1).clamp(min=1)
    return Component(
        torch.where(defined, values[:, -1] / variance.clamp(min=1e-300), torch.nan),
        torch.where(defined, agreeing, torch.nan),
        torch.where(defined[:, None] & counted, first, torch.nan),
    )


class Basis(NamedTuple):
    """The sub-dimensions of each neuron as vectors: the unit mean embedding of each counted cluster."""

    rank: Int[Tensor, " G"]
    """Rank; −1 where it cannot be told."""
    condition: Float64[Tensor, " G"]
    """Largest over smallest singular value; NaN where the rank is less than the number of clusters."""


def basis(cosine: Float64[Tensor, "G n n"], clusters: Bool[Tensor, "G P n"], counted: Bool[Tensor, "G P"]) -> Basis:
    """Rank and condition number of the clusters' mean directions, from the cosines of their tokens.

    A singular value below sqrt(FLAT) = 1e-5 of the largest is 0: equal clusters, and what differs by less than the
    rounding of cosines shows. A mean direction of length 0 (tokens that cancel) adds no rank.
    """
    member = (clusters & counted[:, :, None]).double()
    used = (member.sum(1)[:, :, None] > 0) & (member.sum(1)[:, None, :] > 0)
    missing = (cosine.isnan() & used).any(2).any(1)
    gram = member @ torch.where(used, cosine, 0.0).nan_to_num(0.0) @ member.transpose(1, 2)
    length = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    solid = length > 1e-5 * clusters.sum(2)
    scale = torch.where(solid, 1 / length.clamp(min=1e-300), 0.0)
    values = torch.linalg.eigvalsh(gram * scale[:, :, None] * scale[:, None, :])
    largest = values[:, -1:] if values.shape[1] else values
    rank = ((values > FLAT * largest) & (largest > 0)).sum(1)
    n_counted = counted.sum(1)
    # Clusters that do not count are rows of zeros: their eigenvalues are the smallest.
    smallest = values.gather(1, (counted.shape[1] - n_counted).clamp(max=counted.shape[1] - 1)[:, None])[:, 0]
    full = ~missing & (rank == n_counted) & (n_counted > 0)
    condition = torch.where(full, (largest[:, 0] / smallest.clamp(min=1e-300)).sqrt(), torch.nan)
    return Basis(torch.where(missing, -1, rank).to(torch.int32), condition)
