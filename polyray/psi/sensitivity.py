"""Sensitivity: how far do the scores hang on one choice?

Which question it answers: *would the same neurons stand out with another K, seed, k_range, vocabulary or encoder?*
Place in the flow: after the sweep; compares a sweep's neurons with those of a variant in which one thing is changed,
over the neurons that both scored. The figures:

    spearman           rank correlation of a score: of log_psi and of each component's z by preset, of S, Q and D raw
    same_k_frac        share of neurons that fall into as many clusters
    adjusted_rand      mean adjusted Rand index of a neuron's clusters, over the examples that both cluster
    n_called_base      neurons called (q < alpha) in the sweep, among those that both scored
    n_called           the same in the variant
    called_flip_frac   share of neurons that one of the two calls and the other does not
    D_flip_frac        share of neurons for which p of D under `specific` crosses 0.05

Intervals resample neurons; what neurons share (the null draws, the pool) stays as it is, so they say nothing of that.
Source: arXiv 2508.16950, section 5, which gives a Spearman correlation of about 0.21 when the text head changes; the
intervals and the other figures are ours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyray import columns
from polyray.config import Science
from polyray.errors import StoreError
from polyray.kernels import random
from polyray.schema import COMPONENTS, PRESETS

MIN_NEURONS = 3
"""Fewer have no rank correlation worth the name."""
LEVEL = 0.95
BEYOND = 0.05
"""A component's p below this is beyond chance."""
_CHUNK = 500_000
"""Random numbers drawn at a time: bounds the working memory of a bootstrap."""


class Variation(NamedTuple):
    """What is varied, as the rows say it."""

    variant: str
    vary: str
    value: str


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's rank correlation, equal values at their mean rank.

    Args:
        x: scores [n]; NaN where there is none.
        y: scores of the same neurons.

    Returns:
        −1 to 1 over the neurons that have both; NaN where those are fewer than three, or either is constant.
    """
    both = ~(np.isnan(x) | np.isnan(y))
    if both.sum() < MIN_NEURONS:
        return math.nan
    whole = torch.ones(1, int(both.sum()), dtype=torch.float64)
    return float(_weighted_spearman(whole, _places(x[both]), _places(y[both])))


class _Places(NamedTuple):
    """Where values stand among themselves: all that ranks under any weights need."""

    order: Tensor
    left: Tensor
    """How many values are smaller."""
    right: Tensor
    """How many values are at most as large."""


def _places(values: NDArray[np.float64]) -> _Places:
    x = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    ordered, order = x.sort()
    left, right = (torch.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    return _Places(order, left, right)


def _centred_ranks(times: Tensor, total: Tensor, at: _Places) -> Tensor:
    """Mean rank of each value less the mean of all ranks, where value i is there `times[r, i]` times: [R, n]."""
    below = torch.cat([times.new_zeros(len(times), 1), times[:, at.order].cumsum(1)], dim=1)
    return (below[:, at.left] + below[:, at.right] - total) / 2


def _weighted_spearman(times: Tensor, x: _Places, y: _Places) -> Tensor:
    """Spearman of each resample [R]; NaN where either is constant in it.

    Twice a rank is a whole number, so that sums are exact and a constant score has a variance of exactly 0.
    """
    total = times.sum(1, keepdim=True)
    a, b = _centred_ranks(times, total, x), _centred_ranks(times, total, y)
    weighted = times * a
    product = (weighted * a).sum(1).sqrt() * (times * b * b).sum(1).sqrt()
    rho = (weighted * b).sum(1) / product
    return torch.where(product > 0, rho.clamp(-1, 1), torch.nan)


def _resamples(n: int, n_bootstrap: int, seed: int, word: int) -> Iterator[Tensor]:
    """How often each of n neurons is drawn, a few resamples at a time: float64 [R, n]."""
    rows = max(1, _CHUNK // n)
    for start in range(0, n_bootstrap, rows):
        r = torch.arange(start, min(start + rows, n_bootstrap))[:, None]
        u = random.uniform(seed, random.BOOTSTRAP_NEURONS, torch.arange(n)[None, :], r, word)
        drawn = (u * n).long().clamp(max=n - 1)
        yield torch.zeros_like(u).scatter_add_(1, drawn, torch.ones_like(u))


def adjusted_rand(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Adjusted Rand index of pairs of clusterings, over the examples that both cluster.

    Args:
        a: clusters from 0, a row a neuron [N, n]; −1 where an example was not clustered.
        b: the other clustering of the same examples.

    Returns:
        [N], at most 1, 0 expected by chance; 1 where both put all examples into one cluster or each into its own;
        NaN where no example is clustered in both. Source: Hubert and Arabie 1985.
    """
    shared = (a >= 0) & (b >= 0)
    k_a, k_b = int(a.max(initial=0)) + 1, int(b.max(initial=0)) + 1
    cell = (np.arange(len(a))[:, None] * k_a + a) * k_b + b
    table = np.bincount(cell[shared], minlength=len(a) * k_a * k_b).reshape(len(a), k_a, k_b).astype(np.float64)

    def pairs(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return (counts * (counts - 1) / 2).sum(tuple(range(1, counts.ndim)))

    together, of_a, of_b = pairs(table), pairs(table.sum(2)), pairs(table.sum(1))
    n = shared.sum(1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = of_a * of_b / (n * (n - 1) / 2)
        index = (together - expected) / ((of_a + of_b) / 2 - expected)
    # One cluster each, or all examples alone: nothing is left to chance, and both agree.
    index[np.isnan(index)] = 1.0
    return np.where(n > 0, index, np.nan)


def cluster_matrix(examples: pa.Table, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cluster of every neuron's examples by rank [N, ranks], −1 where there is none.

    Args:
        examples: a layer's rows of `examples`: neuron, rank, cluster.
        neurons: neurons in ascending order; those without rows are all −1.
    """
    rank = columns.numbers(examples, "rank").astype(np.int64)
    out = np.full((len(neurons), int(rank.max(initial=-1)) + 1), -1, dtype=np.int64)
    cluster = np.nan_to_num(columns.floats(examples, "cluster"), nan=-1).astype(np.int64)
    neuron = columns.numbers(examples, "neuron").astype(np.int64)
    known = np.isin(neuron, neurons)
    out[np.searchsorted(neurons, neuron[known]), rank[known]] = cluster[known]
    return out


def agreement(base: pa.Table, varied: pa.Table, neurons: NDArray[np.int64]) -> NDArray[np.float64]:
    """`adjusted_rand` of a layer's neurons from both datasets' rows of `examples`; NaN where one has no clusters."""
    a, b = cluster_matrix(base, neurons), cluster_matrix(varied, neurons)
    n = min(a.shape[1], b.shape[1])
    return adjusted_rand(a[:, :n], b[:, :n])


def compare(
    what: Variation,
    layers: Sequence[str],
    base: pa.Table,
    varied: pa.Table,
    rand: NDArray[np.float64],
    science: Science,
) -> tuple[pa.Table, dict[str, pa.Table]]:
    """Rows of `sensitivity`, and of `sensitivity_neurons` by layer.

    Args:
        what: the variation.
        layers: names in order of depth.
        base: the sweep's rows of `neurons` with `layer`, `q` and `called`.
        varied: the variant's; the same neurons in the same order.
        rand: adjusted Rand index of each neuron, NaN where there is none.
        science: the sweep's settings: seed and number of resamples.

    Raises:
        StoreError: the two do not hold the same neurons.
    """
    if not base.select(["layer", "neuron"]).equals(varied.select(["layer", "neuron"])):
        raise StoreError(f"variant {what.variant!r} holds other neurons than the sweep; `polyray verify` says more.")
    scored_base, scored = (_is(rows, "status", "ok") for rows in (base, varied))
    layer_of = base["layer"].to_numpy(zero_copy_only=False)
    rows: list[dict[str, object]] = []
    groups: list[str | None] = [*layers, None]
    for group in groups:
        here = scored_base & scored & (True if group is None else layer_of == group)
        rows += _figures(group, base.filter(pa.array(here)), varied.filter(pa.array(here)), rand[here], science)
    names = ("layer", "metric", "preset", "score", "estimate", "low", "high", "n")
    said = {c: [v] * len(rows) for c, v in what._asdict().items()}
    table = columns.table("sensitivity", said | {c: [r[c] for r in rows] for c in names})
    flipped = scored_base & scored & (_flip(*(_beyond(t) for t in (base, varied))) == 1)
    flipped &= what.vary in ("prompts", "encoder")
    by_layer = {
        layer: _neuron_rows(
            what,
            varied.filter(pa.array(scored & (layer_of == layer))),
            rand[scored & (layer_of == layer)],
            flipped[scored & (layer_of == layer)],
        )
        for layer in layers
    }
    return table, by_layer


def _neuron_rows(what: Variation, varied: pa.Table, rand: NDArray[np.float64], flipped: NDArray[np.bool_]) -> pa.Table:
    return columns.table(
        "sensitivity_neurons",
        {c: [v] * len(varied) for c, v in what._asdict().items()}
        | {
            "neuron": varied["neuron"],
            "k": varied["k"],
            "log_psi": varied["specific_log_psi"],
            "p": varied["specific_p"],
            "D_p": varied["specific_D_p"],
            "q": varied["q"],
            "called": varied["called"],
            "adjusted_rand": rand,
            "diagnosis": ["name-sensitive" if f else None for f in flipped],
        },
    )


Statistic = Callable[[Tensor], Tensor]
"""From how often each neuron is there [R, n] to a figure of each resample [R]."""
_Figure = tuple[str, str | None, str | None, Statistic | None, int]
"""Metric, preset, score, how to compute it (None where it cannot be), neurons behind it."""


def _figures(
    layer: str | None, base: pa.Table, varied: pa.Table, rand: NDArray[np.float64], science: Science
) -> list[dict[str, object]]:
    """Every figure of a layer's neurons, or of the sweep's, all from the same resamples."""
    statistics: list[_Figure] = []
    for against in PRESETS:
        statistics.append(_rank_correlation(base, varied, against, "log_psi", f"{against}_log_psi"))
        statistics += [_rank_correlation(base, varied, against, c, f"{against}_{c}_z") for c in COMPONENTS]
    statistics += [_rank_correlation(base, varied, None, c, c) for c in COMPONENTS]
    called_base, called = _truth(base, "called"), _truth(varied, "called")
    shares: list[tuple[str, str | None, NDArray[np.float64]]] = [
        ("same_k_frac", None, (columns.floats(base, "k") == columns.floats(varied, "k")).astype(np.float64)),
        ("adjusted_rand", None, rand),
        ("called_flip_frac", "specific", _flip(called_base, called)),
        ("D_flip_frac", "specific", _flip(_beyond(base), _beyond(varied))),
    ]
    for name, asked, values in shares:
        there = ~np.isnan(values)
        statistics.append((name, asked, None, _mean(values) if there.any() else None, int(there.sum())))

    n = len(base)
    drawn: list[list[Tensor]] = [[] for _ in statistics]
    word = random.layer_word(layer or "")
    for times in _resamples(n, science.calibrate.n_bootstrap, science.seed, word) if n else ():
        for found, (_, _, _, statistic, _) in zip(drawn, statistics, strict=True):
            if statistic is not None:
                found.append(statistic(times))
    rows: list[dict[str, object]] = []
    for found, (metric, preset, score, statistic, n_both) in zip(drawn, statistics, strict=True):
        estimate = low = high = math.nan
        if statistic is not None:
            estimate = float(statistic(torch.ones(1, n, dtype=torch.float64)))
            low, high = _interval(torch.cat(found))
        rows.append(_row(layer, metric, preset, score, estimate, low, high, n_both))
    for name, calls in (("n_called_base", called_base), ("n_called", called)):
        rows.append(_row(layer, name, "specific", None, float(np.nansum(calls)), math.nan, math.nan, n))
    return rows


def _rank_correlation(base: pa.Table, varied: pa.Table, preset: str | None, score: str, column: str) -> _Figure:
    x, y = columns.floats(base, column), columns.floats(varied, column)
    both = ~(np.isnan(x) | np.isnan(y))
    n = int(both.sum())
    if math.isnan(spearman(x, y)):
        return "spearman", preset, score, None, n
    at, places = torch.from_numpy(np.flatnonzero(both)), (_places(x[both]), _places(y[both]))
    return "spearman", preset, score, lambda times: _weighted_spearman(times[:, at], *places), n


def _mean(values: NDArray[np.float64]) -> Statistic:
    there = torch.from_numpy((~np.isnan(values)).astype(np.float64))
    filled = torch.from_numpy(np.nan_to_num(values))
    return lambda times: (times @ filled) / (times @ there)


def _interval(values: Tensor) -> tuple[float, float]:
    """Percentiles over the resamples that have a figure; NaN where none has."""
    values = values[~values.isnan()]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _row(
    layer: str | None,
    metric: str,
    preset: str | None,
    score: str | None,
    estimate: float,
    low: float,
    high: float,
    n: int,
) -> dict[str, object]:
    row: dict[str, object] = {"layer": layer, "metric": metric, "preset": preset, "score": score, "n": n}
    figures = (("estimate", estimate), ("low", low), ("high", high))
    return row | {c: None if math.isnan(x) else x for c, x in figures}


def _is(rows: pa.Table, column: str, value: object) -> NDArray[np.bool_]:
    return np.array([v == value for v in rows[column].to_pylist()], dtype=bool)


def _truth(rows: pa.Table, column: str) -> NDArray[np.float64]:
    """1 for true, 0 for false, NaN where it is not known."""
    return np.array([np.nan if v is None else float(v) for v in rows[column].to_pylist()], dtype=np.float64)


def _beyond(rows: pa.Table) -> NDArray[np.float64]:
    """1 where the names differ beyond chance, 0 where not, NaN where D has no p."""
    p = columns.floats(rows, "specific_D_p")
    return np.where(np.isnan(p), np.nan, p < BEYOND)


def _flip(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where one is true and the other is not, 0 where they agree, NaN where either is not known."""
    return np.abs(a - b)
