"""What do all neurons come to, and how sure is that?

Place in the flow: last; it needs every layer. Figures are means over the neurons that qualify: the share with a
positive difference, the share with a small p, the first component, and tau over the deciles of their mean dimensional
proximity, each beside its controls.

Neurons are not independent: those of one layer read the same residual stream, and those that share core-tokens, in
whatever layer, share the embeddings that decide. The interval therefore resamples layers and token groups, crossed: a
neuron counts as often as its layer times as often as its token group was drawn. Of one layer, only token groups are
resampled. This is conservative where the two do not matter. Wilson's interval beside it is as if neurons were
independent.

Source: arXiv 2505.07831; Owen 2007, "The pigeonhole bootstrap" (resampling of crossed factors).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from polyray.categorical.controls import Control
from polyray.categorical.overlap import MIN_CLUSTERS
from polyray.categorical.proximity import Proximity, Scores
from polyray.kernels import proximity as kernel
from polyray.kernels import random
from polyray.kernels.statistics import resample_counts, wilson

N_TOKEN_GROUPS = 64
"""Token groups: few enough to have several neurons each in a small layer, enough to be resampled."""
N_ITER = 25
"""Most Lloyd iterations behind the token groups, which need not converge."""
ALPHA = 0.05
"""A Kruskal-Wallis p below it counts as small."""
WEAK_COMPONENT = 0.5
"""The paper's break condition for the first component."""
DEEP = 10
"""The paper's break condition: correlation absent beyond this layer."""

FEW_CLUSTERS, WEAK, DEFICIENT = "few_taken_clusters", "weak_first_component", "rank_deficient"
ABSENT, ABSENT_DEEP = "correlation_absent", "correlation_absent_beyond_layer_10"


@dataclass(frozen=True)
class LayerScores:
    """The qualifying neurons of one layer."""

    index: int
    """The layer's index."""
    group: Int64[Tensor, " G"]
    """Token group of every neuron, as of `neuron_groups`."""
    scores: Scores
    controls: Mapping[str, Control]


class Figure(NamedTuple):
    """A figure with its 95 % interval, NaN where there is none: of one token group, or of no neuron."""

    value: float
    low: float
    high: float


class Row(NamedTuple):
    """One condition in one layer, or in the sweep: the neurons as they are, or a control of them."""

    layer: int | None
    """None: all layers."""
    condition: str
    """"actual", or the name of a control."""
    n: int
    """Qualifying neurons with a difference in this condition."""
    n_groups: int
    """Token groups among them."""
    positive: Figure
    """Share with a positive difference (a mean over draws)."""
    wilson: Figure
    """The same with an interval as if neurons were independent, from the nearest whole number of them."""
    difference: Figure
    """Mean difference."""
    gap: Figure
    """Share of positive differences of the actual neurons less that of the condition, paired by neuron; 0 of itself."""
    remaining: Figure
    """What the condition leaves of the excess of that share over one half: 1 all, 0 none, below 0 the reverse."""
    tau: Figure
    """Kendall's tau-b of activation and mean dimensional proximity over deciles, pooled over neurons and draws."""
    kruskal: Figure
    """Share with a small p."""
    first: Figure
    """Mean share of the first component."""
    requalifying: float
    """Share of neurons that would qualify by the clusters of this condition."""
    verdict: str
    """What the control says: `verdict_of`; empty for the actual neurons."""


def summarise(layers: Sequence[LayerScores], seed: int, n_bootstrap: int = 2000) -> list[Row]:
    """Every condition in every layer, then in the sweep.

    Args:
        layers: in order; all with the same controls.
        seed: the sweep's seed.
        n_bootstrap: resamples behind an interval.
    """
    rows = [row for layer in layers for row in _rows([layer], layer.index, seed, n_bootstrap)]
    return rows + _rows(layers, None, seed, n_bootstrap)


def verdict_of(actual: Figure, remaining: Figure) -> str:
    """What a control says of the effect, at 95 %.

    Args:
        actual: share of positive differences of the actual neurons.
        remaining: what the control leaves of its excess over one half.

    Returns:
        "no effect": the share is not shown to be above one half; "kept": more than half of the excess remains; "gone":
        less than half does; "undecided": neither is shown.
    """
    if not actual.low > 0.5:
        return "no effect"
    if remaining.low > 0.5:
        return "kept"
    return "gone" if remaining.high < 0.5 else "undecided"


def _rows(layers: Sequence[LayerScores], index: int | None, seed: int, n_bootstrap: int) -> list[Row]:
    if not layers:
        return []
    group = torch.cat([layer.group for layer in layers]).numpy()
    layer_of = np.repeat(np.arange(len(layers)), [len(layer.group) for layer in layers])
    actual = _values([layer.scores for layer in layers], None)
    rows = [_row(index, "actual", actual, actual, group, layer_of, math.nan, seed, n_bootstrap)]
    for name in layers[0].controls:
        some = [layer.controls[name] for layer in layers]
        again = np.concatenate([c.qualifies.double().mean(0).numpy() for c in some])
        share = float(again.mean()) if len(again) else math.nan
        own = _values([c.scores for c in some], 0)
        row = _row(index, name, own, actual, group, layer_of, share, seed, n_bootstrap)
        rows.append(row._replace(verdict=verdict_of(rows[0].positive, row.remaining)))
    return rows


class _Values(NamedTuple):
    """One entry a neuron, means over draws; NaN where it has none."""

    positive: NDArray[np.float64]
    difference: NDArray[np.float64]
    kruskal: NDArray[np.float64]
    first: NDArray[np.float64]
    deciles: NDArray[np.float64]


def _values(scores: Sequence[Scores], draws: int | None) -> _Values:
    def each(of: Sequence[Tensor]) -> NDArray[np.float64]:
        return np.concatenate([(x if draws is None else x.nanmean(draws)).numpy() for x in of])

    positive = [torch.where(s.difference.isnan(), torch.nan, (s.difference > kernel.TIE).double()) for s in scores]
    small = [torch.where(s.p.isnan(), torch.nan, (s.p < ALPHA).double()) for s in scores]
    return _Values(
        each(positive), each([s.difference for s in scores]), each(small), each([s.first for s in scores]),
        each([s.deciles for s in scores]),
    )  # fmt: skip


def _row(
    index: int | None,
    condition: str,
    own: _Values,
    actual: _Values,
    group: NDArray[np.int64],
    layer_of: NDArray[np.int64],
    requalifying: float,
    seed: int,
    n_bootstrap: int,
) -> Row:
    gap = actual.positive - own.positive
    paired = np.where(np.isnan(own.positive), np.nan, actual.positive)
    columns = np.column_stack([own.positive, own.difference, gap, own.kruskal, own.first, paired, own.deciles])
    # A decile counts only in neurons that have all of them, so that all deciles are of the same neurons.
    columns[np.isnan(own.deciles).any(1), 6:] = np.nan
    means, drawn = _resampled(columns, group, layer_of, seed, n_bootstrap)
    tau = float(kernel.tau(torch.from_numpy(means[None, 6:]))[0])
    taus = kernel.tau(torch.from_numpy(drawn[:, 6:])).numpy()
    there = ~np.isnan(own.positive)
    positive, difference, apart, kruskal, first = (_figure(means[i], drawn[:, i]) for i in range(5))
    n = int(there.sum())
    remaining = _figure(float(_remaining(means[2:3], means[5:6])[0]), _remaining(drawn[:, 2], drawn[:, 5]))
    return Row(
        index, condition, n, len(np.unique(group[there])), positive,
        Figure(positive.value, *wilson(round(float(own.positive[there].sum())), n)), difference, apart, remaining,
        _figure(tau, taus), kruskal, first, requalifying, "",
    )  # fmt: skip


def _remaining(gap: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 − gap / excess of the actual share over one half; NaN where there is no excess."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(actual > 0.5, 1 - gap / (actual - 0.5), np.nan)


def _figure(value: float, drawn: NDArray[np.float64]) -> Figure:
    known = drawn[~np.isnan(drawn)]
    if math.isnan(value) or not len(known):
        return Figure(float(value), math.nan, math.nan)
    low, high = np.quantile(known, [0.025, 0.975]).tolist()
    return Figure(float(value), low, high)


def _resampled(
    columns: NDArray[np.float64], group: NDArray[np.int64], layer_of: NDArray[np.int64], seed: int, n_bootstrap: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of each column over the neurons that have it [k], and in each resample [B, k]; NaN of one token group."""
    groups, at = np.unique(group, return_inverse=True)
    n_layers = int(layer_of.max(initial=-1)) + 1
    shape = (n_layers * len(groups), columns.shape[1])
    cell = layer_of * len(groups) + at
    known = ~np.isnan(columns)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, cell, np.where(known, columns, 0.0))
    np.add.at(counts, cell, known)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.sum(0) / counts.sum(0)
        if len(groups) < 2:
            return means, np.full((n_bootstrap, shape[1]), np.nan)
        draws = range(n_bootstrap)
        times = resample_counts(len(groups), draws, seed, random.PROXIMITY_BOOTSTRAP, 0, ()).double().numpy()
        layers = np.ones((n_bootstrap, 1))
        if n_layers > 1:
            layers = resample_counts(n_layers, draws, seed, random.PROXIMITY_BOOTSTRAP, 1, ()).double().numpy()
        weights = (layers[:, :, None] * times[:, None, :]).reshape(n_bootstrap, -1)
        return means, (weights @ sums) / (weights @ counts)


def token_groups(embeddings: Float[Tensor, "T d"], seed: int, n_groups: int = N_TOKEN_GROUPS) -> Int64[Tensor, " T"]:
    """Groups of tokens of similar embedding, by k-means on the directions of the centred embeddings.

    Args:
        embeddings: of the kept tokens; one that is zero or not finite goes to some group.
        seed: the sweep's seed; first centres are tokens drawn at random.
        n_groups: at most so many groups.
    """
    x = torch.nan_to_num(embeddings.double(), 0.0, 0.0, 0.0)
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    hashed = random.bits(seed, random.PROXIMITY_GROUPS, torch.arange(len(x)))
    centres = x[hashed.argsort(stable=True)[:n_groups]]
    group = torch.full((len(x),), -1)
    for _ in range(N_ITER):
        nearest = (x @ centres.T).argmax(1)
        if torch.equal(nearest, group):
            break
        group = nearest
        moved = torch.zeros_like(centres).index_add_(0, group, x)
        centres = torch.where(moved.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(moved, dim=1), centres)
    return group


def neuron_groups(core: Int64[Tensor, "G C"], token_group: Int64[Tensor, " T"]) -> Int64[Tensor, " G"]:
    """The token group that most core-tokens of each neuron are in; of equal ones that of smaller number."""
    n_groups = int(token_group.max()) + 1
    of_token = torch.where(core >= 0, token_group[core.clamp(min=0)], n_groups)
    counts = torch.zeros(len(core), n_groups + 1, dtype=torch.int64)
    counts.scatter_add_(1, of_token, torch.ones_like(of_token))
    return counts[:, :n_groups].argmax(1)


def neuron_diagnoses(proximity: Proximity, min_clusters: int = MIN_CLUSTERS) -> list[list[str]]:
    """Failure signatures of every neuron, by name; none for most."""
    few = (proximity.n_counted < min_clusters).numpy()
    weak = (proximity.scores.first < WEAK_COMPONENT).numpy()
    deficient = ((proximity.rank >= 0) & (proximity.rank < proximity.n_counted)).numpy()
    names = (FEW_CLUSTERS, WEAK, DEFICIENT)
    return [
        [n for n, is_so in zip(names, each, strict=True) if is_so] for each in zip(few, weak, deficient, strict=True)
    ]


def layer_diagnosis(actual: Row) -> str | None:
    """Whether the correlation is absent in a layer: its share of positive differences is not shown to be above 1/2.

    None also where nothing can be said, since no interval is known.
    """
    if math.isnan(actual.positive.low) or actual.positive.low > 0.5:
        return None
    return ABSENT_DEEP if actual.layer is not None and actual.layer > DEEP else ABSENT
