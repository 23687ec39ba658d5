"""Is the mean paired difference above 0?

Place in the flow: swap. What a swap does to a neuron is a difference on the same host, so hosts are paired, and there
are often few of them: the test is exact for up to `N_EXACT` pairs.

Source: Wilcoxon 1945; Pratt 1959 for zeros; Cureton 1967 for the normal approximation with zeros and ties.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import rankdata
from torch import Tensor

from polyray.kernels import random
from polyray.kernels.statistics import resample_counts, total

N_EXACT = 50
"""Up to this many pairs p is exact: all 2^50 sign flips are counted in int64, and their share is exact in float64."""
_CHUNK = 250_000
"""Products of value and count held at a time: bounds the working memory of a bootstrap, and fits a core's cache."""


def signed_rank_p(differences: Float[Tensor, "G n"], two_sided: bool = False) -> Float64[Tensor, " G"]:
    """p of Wilcoxon's signed-rank test of each row: are paired differences symmetric about 0?

    W+ is the sum of the midranks of |d| where d > 0. Zeros take part in the ranking and then drop out (Pratt), and p
    is conditional on them and on ties. For n <= `N_EXACT` it is the share of all 2^n sign flips with a W+ at least as
    large, which is super-uniform under the null: P(p <= a) <= a. With m differences other than 0 it is a multiple of
    2^-m, so few pairs reach no small p however large they are: 2^-4 = 0.0625 is the smallest of four. For larger n it
    is the normal approximation with corrections for ties and zeros and none for continuity, which is not exactly
    super-uniform, least of all where few differences are other than 0.

    Args:
        differences: paired differences, one row a test; tied where they are equal as float64. An infinite one has the
            largest rank, like any other that is larger than the rest.
        two_sided: against differences on either side, min(1, 2 min(p of W+ as large, p of W+ as small)); otherwise
            against differences above 0.

    Returns:
        p in (0, 1], by bits a function of the row alone; 1 where there are no differences or all are 0, NaN where one
        is NaN.

    Source:
        `scipy.stats.wilcoxon(zero_method="pratt", correction=False)` is the same, less exact p with ties and zeros.
    """
    d = differences.double().numpy()
    if d.size == 0:
        return torch.ones(len(d), dtype=torch.float64)
    missing = np.isnan(d).any(axis=1)
    d = np.where(missing[:, None], 0.0, d)
    # Doubled, midranks are whole numbers: no sum below depends on its order.
    ranks = np.where(d == 0, 0.0, 2 * rankdata(np.abs(d), axis=1)).astype(np.int64)
    as_large, as_small = (_exact if d.shape[1] <= N_EXACT else _normal)(ranks, d > 0)
    p = np.minimum(1.0, 2 * np.minimum(as_large, as_small)) if two_sided else as_large
    return torch.from_numpy(np.where(missing, np.nan, p))


_Tails = tuple[NDArray[np.float64], NDArray[np.float64]]


def _exact(ranks: NDArray[np.int64], positive: NDArray[np.bool_]) -> _Tails:
    """P(W+ >= observed) and P(W+ <= observed) under all sign flips, from doubled midranks [G, n], 0 for zeros."""
    n_rows, n = ranks.shape
    observed = (ranks * positive).sum(1)
    # Rows with the same ties and zeros share one distribution: there is a single one of all rows without any. As
    # bytes (a doubled rank is at most 100) rows are told apart much faster than as arrays.
    ordered = np.sort(ranks, axis=1).astype(np.uint8)
    _, first, which = np.unique(ordered.view(f"V{n}")[:, 0], return_index=True, return_inverse=True)
    by_set = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[by_set], np.arange(len(first) + 1))
    as_large, as_small = np.empty(n_rows), np.empty(n_rows)
    for i, row in enumerate(first):
        flips = np.zeros(ranks[row].sum() + 1, dtype=np.int64)  # how many give each doubled W+
        flips[0] = 1
        for rank in ordered[row].tolist():
            # A zero's rank of 0 doubles every count: 2^n flips in all.
            flips[rank:] += flips[: len(flips) - rank]
        rows = by_set[starts[i] : starts[i + 1]]
        not_above = flips.cumsum()[observed[rows]]
        as_small[rows] = not_above
        as_large[rows] = 2**n - not_above + flips[observed[rows]]
    return as_large / 2.0**n, as_small / 2.0**n


def _normal(ranks: NDArray[np.int64], positive: NDArray[np.bool_]) -> _Tails:
    """Likewise, as if W+ were normal with the mean and variance that it has under all sign flips."""
    # Of the sum of signed ranks the mean is 0 and the variance the sum of squares, whatever the ties and zeros.
    signed = np.where(positive, ranks, -ranks).sum(1)
    spread = np.sqrt(np.square(ranks).sum(1).astype(np.float64))
    z = signed / np.where(spread == 0, 1.0, spread)
    return np.where(spread == 0, 1.0, ndtr(-z)), np.where(spread == 0, 1.0, ndtr(z))


def mean_interval(
    values: Float[Tensor, "G n"], n_bootstrap: int, seed: int, *words: int, level: float = 0.95
) -> tuple[Float64[Tensor, " G"], Float64[Tensor, " G"], Float64[Tensor, " G"]]:
    """Mean of each row and its percentile bootstrap interval, from the same resamples for every row.

    Of few values such an interval is too narrow: it takes their spread for the population's, a factor of about
    sqrt(1 − 1/n).

    Args:
        values: one row a mean.
        n_bootstrap: resamples, at least 1.
        seed: the sweep's seed.
        words: up to two counter words that name the resamples.
        level: coverage aimed at.

    Returns:
        (mean, low, high), by bits a function of the row alone, quantiles interpolated linearly. All NaN where there
        are no values and where one is NaN or infinite; of one value all three are that value.
    """
    values = values.double()
    n_rows, n = values.shape
    if n == 0:
        mean, low, high = torch.full((3, n_rows), math.nan, dtype=torch.float64)
        return mean, low, high
    values = torch.where(values.isfinite().all(1, keepdim=True), values, math.nan)
    bounds = torch.empty(2, n_rows, dtype=torch.float64)
    tail = (1 - level) / 2
    width = min(n_bootstrap, max(1, _CHUNK // n))
    rows = max(1, _CHUNK // (width * n))
    for start in range(0, n_rows, rows):
        some = values[start : start + rows].T
        means = torch.empty(some.shape[1], n_bootstrap, dtype=torch.float64)
        for r in range(0, n_bootstrap, width):
            chunk = range(r, min(r + width, n_bootstrap))
            times = resample_counts(n, chunk, seed, random.SWAP_BOOTSTRAP, 0, words).T.double()
            # Summed over the axis that is outermost in memory: `total` is fast there however few values there are.
            drawn = some[:, :, None] * times[:, None, :]
            means[:, chunk.start : chunk.stop] = total(drawn.permute(1, 2, 0)) / n
        # NumPy selects where torch sorts.
        bounds[:, start : start + rows] = torch.from_numpy(np.quantile(means.numpy(), [tail, 1 - tail], axis=1))
    return total(values) / n, bounds[0], bounds[1]
