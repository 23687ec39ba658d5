"""Do scores rise from layer to layer?

Place in the flow: summarise. Source: arXiv 2508.16950, section 5, where the last layer is more polysemantic than the
one before; rank correlation, intervals and p are ours. Kendall's tau against depth is the trend test of Jonckheere
and Terpstra (1952, 1954) as a correlation.

Every p and interval here treats neurons as units that are drawn independently. Neurons of one layer are not: they
share images, a pool and null draws, and several may read the same feature. So a p says less than it seems to, and
tau and the difference of medians, not p, say how strong a trend is.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from polyray.kernels import random

N_RESAMPLES = 200
"""Bootstrap resamples behind an interval; layers stay as large as they are."""
_CHUNK = 2_000_000
"""Counts held at a time: bounds the working memory of a bootstrap to about 50 MB."""

Values = NDArray[np.float64]


class Trend(NamedTuple):
    """A figure with its 95 % bootstrap interval and p; NaN where it cannot be computed."""

    value: float
    low: float
    high: float
    p: float


_NOTHING = Trend(math.nan, math.nan, math.nan, math.nan)


def depth_tau(layers: Sequence[Values], seed: int, words: Sequence[int]) -> Trend:
    """Kendall's tau-b of depth and score over all neurons: do scores rise with depth?

    Args:
        layers: scores of each layer's neurons, in order of depth; layers may be empty.
        seed: the sweep's seed.
        words: a counter word for each layer, which names its resamples.

    Returns:
        tau, −1 to 1 (of few layers it stays below 1, since neurons of a layer tie in depth), and its two-sided
        asymptotic p. NaN where fewer than two layers have scores, all scores agree, or there are fewer than three.
    """
    depth = np.repeat(np.arange(len(layers)), [len(x) for x in layers])
    score = np.concatenate([*layers, np.zeros(0)])
    values, rank = np.unique(score, return_inverse=True)
    if len(score) < 3 or len(values) < 2 or len(np.unique(depth)) < 2:
        return _NOTHING
    found = stats.kendalltau(depth, rank, variant="b", method="asymptotic")
    ranks = np.split(rank, np.cumsum([len(x) for x in layers])[:-1])
    drawn = [_resamples(len(x), seed, word) for x, word in zip(layers, words, strict=True)]
    taus = []
    width = max(1, _CHUNK // len(values))
    for start in range(0, N_RESAMPLES, width):
        chunk = [r[d[start : start + width]] for r, d in zip(ranks, drawn, strict=True)]
        taus.append(_taus(chunk, len(values)))
    return Trend(float(found.statistic), *_interval(np.concatenate(taus)), float(found.pvalue))


def _taus(layers: Sequence[NDArray[np.int64]], n_ranks: int) -> Values:
    """tau-b of each of R resamples, from the ranks drawn in every layer [R, n]; NaN where all ranks agree."""
    n_rows = len(layers[0])
    at = np.arange(n_rows)[:, None]
    times = np.zeros((n_rows, n_ranks), dtype=np.int32)  # how often each rank was drawn in the layers so far
    agreement = np.zeros(n_rows)
    n = 0
    for drawn in layers:
        if n and drawn.shape[1]:
            upto = times.cumsum(1, dtype=np.int32)
            not_above = upto[at, drawn]
            agreement += (2 * not_above - times[at, drawn] - n).sum(1)
        np.add.at(times, (at, drawn), 1)
        n += drawn.shape[1]
    pairs = n * (n - 1) / 2
    tied_depth = sum(d.shape[1] * (d.shape[1] - 1) / 2 for d in layers)
    tied_score = (times * (times - 1.0)).sum(1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return agreement / np.sqrt((pairs - tied_depth) * (pairs - tied_score))


def step(earlier: Values, later: Values, seed: int, words: tuple[int, int]) -> Trend:
    """Difference of the medians of two layers' scores: is the later layer above the earlier one?

    Args:
        earlier: scores of the earlier layer's neurons.
        later: scores of the later layer's neurons.
        seed: the sweep's seed.
        words: counter words of the two layers.

    Returns:
        Median of the later minus that of the earlier, and the p of Mann and Whitney's test, one-sided for the later
        being above. NaN where a layer has no scores.
    """
    if not len(earlier) or not len(later):
        return _NOTHING
    below, above = (
        np.median(x[_resamples(len(x), seed, word)], axis=1) for x, word in zip((earlier, later), words, strict=True)
    )
    p = stats.mannwhitneyu(later, earlier, alternative="greater", method="asymptotic").pvalue
    return Trend(float(np.median(later) - np.median(earlier)), *_interval(above - below), float(p))


def _interval(values: Values) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975]).tolist()
    return low, high


@lru_cache(maxsize=128)
def _resamples(n: int, seed: int, word: int) -> NDArray[np.int32]:
    """Which of a layer's n neurons each resample draws [N_RESAMPLES, n]; the same for every score."""
    resample, neuron = torch.arange(N_RESAMPLES)[:, None], torch.arange(n)[None, :]
    rows = max(1, _CHUNK // (8 * max(n, 1)))
    parts = [
        (random.uniform(seed, random.TREND, neuron, resample[r : r + rows], word) * n).int().clamp(max=max(n - 1, 0))
        for r in range(0, N_RESAMPLES, rows)
    ]
    return torch.cat(parts).numpy()
