"""From raw scores and null draws to z, p, q and AUROC.

Which question it answers: *how far beyond chance is this, and how sure is that?* Place in the flow: calibrate,
summarise. All of it in float64. Source: method of arXiv 2508.16950, section 3.6, with p and q added.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.stats import binomtest
from torch import Tensor

from polyray.kernels import random

CONSTANT_STD = 1e-6
"""Below this standard deviation a null is constant and the component says nothing."""
TIE = 1e-9
"""A null draw this close below the raw score counts as reaching it."""


_CHUNK = 250_000
"""Random numbers drawn at a time: bounds the working memory of a bootstrap."""


def z_score(raw: Float[Tensor, "*n"], mean: Float[Tensor, "*n"], std: Float[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
    """(raw − mean) / std in float64; 0 where the null is constant (std < 1e-6)."""
    raw, mean, std = (t.double() for t in (raw, mean, std))
    return torch.where(std < CONSTANT_STD, 0.0, (raw - mean) / std.clamp(min=CONSTANT_STD))


def total(x: Float[Tensor, "*g n"]) -> Float[Tensor, "*g"]:
    """Sum over the last axis, 0 where it is empty, by adding the second half to the first.

    These are elementwise additions in an order of their own, so that a row's bits depend on the row alone; those of
    torch.sum depend on the shape of the batch and on the device.
    """
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        first = x[..., :half].clone()
        first[..., : n - half] += x[..., half:]
        x = first
    return x[..., 0]


def moments(null: Float[Tensor, "*g B"]) -> tuple[Float64[Tensor, "*g"], Float64[Tensor, "*g"]]:
    """Mean and standard deviation (denominator B) over the last axis, with bits that depend on the row alone.

    NaN where B is 0 and where a draw is NaN.
    """
    null = null.double()
    n_draws = null.shape[-1]
    mean = total(null) / n_draws
    return mean, (total((null - mean[..., None]).square()) / n_draws).sqrt()


def p_value(raw: Float[Tensor, " G"], null: Float[Tensor, " B"] | Float[Tensor, "G B"]) -> Float64[Tensor, " G"]:
    """One-sided p with the add-one estimator, (1 + #{null >= raw − 1e-9}) / (B + 1).

    Args:
        raw: scores.
        null: draws shared by all scores, or one row a score.

    Returns:
        p in [1/(B+1), 1]; 1 where the null is constant (std < 1e-6) or empty; NaN where the score is.
    """
    raw, null = raw.double(), null.double()
    n_draws = null.shape[-1]
    if n_draws == 0:
        return torch.where(torch.isnan(raw), torch.nan, 1.0).double()
    if null.ndim == 1:
        ordered = null.sort().values
        reached = n_draws - torch.searchsorted(ordered, raw - TIE, side="left")
    else:
        reached = (null >= (raw - TIE)[:, None]).sum(-1)
    constant = moments(null)[1] < CONSTANT_STD
    p = torch.where(constant, 1.0, (1.0 + reached.double()) / (n_draws + 1.0))
    return torch.where(torch.isnan(raw), torch.nan, p)


def log_psi(z_s: Float[Tensor, "*n"], z_q: Float[Tensor, "*n"], z_d: Float[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
    """log of PSI = sum of log sigmoid(z), float64: keeps the ranking where the product saturates at 1."""
    return sum(
        (torch.nn.functional.logsigmoid(z.double()) for z in (z_q, z_d)),
        start=torch.nn.functional.logsigmoid(z_s.double()),
    )


def conjunctive_p(p: Float[Tensor, "*n c"]) -> Float64[Tensor, "*n"]:
    """Intersection-union p over the last axis, the largest: super-uniform under the null, not uniform."""
    return p.double().amax(-1)


def benjamini_hochberg(p: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """False-discovery q-values; NaN entries are left out of the family and stay NaN.

    Source: Benjamini & Hochberg 1995.
    """
    p = p.double()
    q = torch.full_like(p, torch.nan)
    tested = torch.nonzero(~torch.isnan(p)).flatten()
    m = len(tested)
    if m == 0:
        return q
    order = tested[torch.argsort(p[tested], stable=True)]
    ratio = p[order] * m / torch.arange(1, m + 1, dtype=torch.float64, device=p.device)
    q[order] = ratio.flip(0).cummin(0).values.flip(0).clamp(max=1.0)
    return q


def benjamini_yekutieli(p: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """q-values valid under any dependence: BH times the harmonic number of the family's size, at most 1.

    Source: Benjamini & Yekutieli 2001.
    """
    m = int((~torch.isnan(p)).sum())
    harmonic = math.fsum(1.0 / i for i in range(1, m + 1))
    return (benjamini_hochberg(p) * harmonic).clamp(max=1.0)


def auroc(positive: Float[Tensor, " a"], negative: Float[Tensor, " b"]) -> float:
    """Probability that a positive score is above a negative one, ties counting half; NaN if either is empty."""
    if not len(positive) or not len(negative):
        return math.nan
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double(), side="left")
    not_above = torch.searchsorted(ordered, positive.double(), side="right")
    return float((below + not_above).double().mean() / (2 * len(negative)))


@lru_cache(maxsize=256)
def resample_counts(n: int, resamples: range, seed: int, stream: int, side: int, words: tuple[int, ...]) -> Tensor:
    """How often each of n values is drawn in each of these resamples, int16 [len(resamples), n].

    The same for all values of one comparison, so that the last 256 chunks of 2 × `_CHUNK` bytes (128 MB) are kept.

    Args:
        n: values, at least 1.
        resamples: which resamples.
        seed: the sweep's seed.
        stream: what they are for, a number of `random`.
        side: 0 or 1, for comparisons of two sets of values.
        words: up to two further counter words.
    """
    r = torch.tensor(resamples)[:, None]
    u = random.uniform(seed, stream, torch.arange(n)[None, :], 2 * r + side, *words)
    drawn = (u * n).long().clamp(max=n - 1) + n * torch.arange(len(resamples))[:, None]
    return torch.bincount(drawn.flatten(), minlength=n * len(resamples)).view(-1, n).short()


def auroc_interval(
    positive: Float[Tensor, " a"],
    negative: Float[Tensor, " b"],
    n_bootstrap: int,
    seed: int,
    *words: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `auroc`, both sides resampled.

    Args:
        positive: scores of the positive class.
        negative: scores of the negative class.
        n_bootstrap: resamples.
        seed: the sweep's seed.
        words: up to two counter words that name the interval.
        level: coverage aimed at.

    Returns:
        (low, high); (NaN, NaN) if either side is empty. Resamples are taken in chunks: less than 0.5 GB are
        needed up to 250,000 scores, of which 128 MB stay for the next score of the same comparison.
    """
    a, b = len(positive), len(negative)
    if not a or not b:
        return math.nan, math.nan
    positive, place_a = positive.double().sort()
    negative, place_b = negative.double().sort()
    left, right = (torch.searchsorted(negative, positive, side=side) for side in ("left", "right"))
    values = torch.empty(n_bootstrap, dtype=torch.float64)
    rows = max(1, _CHUNK // max(a, b))
    for start in range(0, n_bootstrap, rows):
        chunk = range(start, min(start + rows, n_bootstrap))
        # NumPy's take along an axis is several times faster than torch's.
        times_a = resample_counts(a, chunk, seed, random.BOOTSTRAP, 0, words).numpy().take(place_a, axis=1)
        times_b = resample_counts(b, chunk, seed, random.BOOTSTRAP, 1, words).numpy().take(place_b, axis=1)
        below = np.pad(times_b.cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))
        # Whole numbers below 2^53: the sum is exact in any order.
        reached = (below.take(left, axis=1) + below.take(right, axis=1)).astype(np.float64)
        values[chunk.start : chunk.stop] = torch.from_numpy((times_a * reached).sum(1) / (2.0 * a * b))
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, hits of n; (NaN, NaN) if n is 0.

    Source: Wilson 1927.
    """
    if n == 0:
        return math.nan, math.nan
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
