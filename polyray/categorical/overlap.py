"""Which core-tokens does a neuron share with those that drive it?

Place in the flow: after connect. The tokens that are core-tokens of a neuron and of one of its precursors are a
taken-cluster: a category which the neuron takes over, one sub-dimension of its own.

Source: arXiv 2505.07831; the hypergeometric p is ours.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from scipy import sparse, stats
from torch import Tensor

MIN_TOKENS = 6
"""A taken-cluster counts with this many tokens or more, as in the paper."""
MIN_CLUSTERS = 3
"""A neuron qualifies with this many counted taken-clusters or more, as in the paper."""
_CHUNK = 4_000_000
"""Shared tokens looked for at a time: bounds the working memory to about 200 MB."""


class Overlap(NamedTuple):
    """Taken-clusters of N targets and their P precursors."""

    taken: Bool[Tensor, "N P C"]
    """Which of the target's core-tokens the precursor has too."""
    size: Int64[Tensor, "N P"]
    """How many these are; 0 where there is no precursor."""
    p: Float64[Tensor, "N P"]
    """Probability that two random sets of core-tokens share as many or more; NaN where there is no precursor."""


def overlap(
    core: Int64[Tensor, "N C"], before: Int64[Tensor, "M C"], precursors: Int64[Tensor, "N P"], n_tokens: int
) -> Overlap:
    """Common core-tokens of every target and each of its precursors.

    Args:
        core: core-tokens of the targets; −1 is none.
        before: core-tokens of all neurons of the layer before.
        precursors: −1 is none.
        n_tokens: T, how many tokens core-tokens were chosen from.

    Returns:
        `Overlap`; p is the upper tail of the hypergeometric distribution of T tokens.
    """
    n, n_core = core.shape
    taken = torch.zeros(n, precursors.shape[1], n_core, dtype=torch.bool)
    if before.numel():
        ordered = before.sort(1).values
        width = max(1, _CHUNK // max(taken[:1].numel(), 1))
        for part in (slice(s, s + width) for s in range(0, n, width)):
            theirs = ordered[precursors[part].clamp(min=0)]
            ours = core[part, None, :].expand(-1, precursors.shape[1], -1).contiguous()
            at = torch.searchsorted(theirs, ours).clamp(max=theirs.shape[2] - 1)
            there = (theirs.gather(2, at) == ours) & (ours >= 0)
            taken[part] = there & (precursors[part] >= 0)[:, :, None]
    size = taken.sum(2)
    n_ours = (core >= 0).sum(1)[:, None]
    n_theirs = (before >= 0).sum(1)[precursors.clamp(min=0)] if len(before) else torch.zeros_like(precursors)
    known = precursors >= 0
    p = torch.full(size.shape, torch.nan, dtype=torch.float64)
    p[known] = hypergeometric(size[known], n_ours.expand_as(size)[known], n_theirs[known], n_tokens)
    return Overlap(taken, size, p)


def hypergeometric(
    shared: Int64[Tensor, " n"], ours: Int64[Tensor, " n"], theirs: Int64[Tensor, " n"], n_tokens: int
) -> Float64[Tensor, " n"]:
    """P(two random sets of these sizes out of n_tokens share `shared` or more)."""
    cases, which = torch.stack([shared, ours, theirs], 1).unique(dim=0, return_inverse=True)
    k, a, b = cases.numpy().T
    return torch.from_numpy(np.minimum(stats.hypergeom.sf(k - 1, n_tokens, a, b), 1.0))[which]


def qualify(
    size: Int64[Tensor, "N P"], min_tokens: int = MIN_TOKENS, min_clusters: int = MIN_CLUSTERS
) -> tuple[Bool[Tensor, "N P"], Bool[Tensor, " N"]]:
    """Which taken-clusters count, and which neurons have enough of them."""
    counted = size >= min_tokens
    return counted, counted.sum(1) >= min_clusters


def all_sizes(core: Int64[Tensor, "N C"], before: Int64[Tensor, "M C"], n_tokens: int) -> NDArray[np.int32]:
    """How many core-tokens every target shares with every neuron of the layer before [N, M]."""
    ours, theirs = (_membership(x, n_tokens) for x in (core, before))
    return np.asarray((ours @ theirs.T).todense(), dtype=np.int32)


def _membership(core: Int64[Tensor, "N C"], n_tokens: int) -> sparse.csr_matrix:
    tokens = core.numpy()
    row, at = np.nonzero(tokens >= 0)
    ones = np.ones(len(row), dtype=np.int32)
    return sparse.csr_matrix((ones, (row, tokens[row, at])), shape=(len(tokens), n_tokens))
