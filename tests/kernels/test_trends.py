"""Trends over depth against SciPy, resample by resample."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from polyray.kernels import trends
from polyray.kernels.trends import N_RESAMPLES, depth_tau, step


def layers_of(sizes: list[int], rise: float, decimals: int, seed: int = 0) -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(rise * i, 1, n).round(decimals) for i, n in enumerate(sizes)]


def resampled(layers: list[NDArray[np.float64]], seed: int, words: list[int]) -> list[list[NDArray[np.float64]]]:
    """The layers of every resample."""
    drawn = [trends._resamples(len(x), seed, w) for x, w in zip(layers, words, strict=True)]
    return [[x[d[r]] for x, d in zip(layers, drawn, strict=True)] for r in range(N_RESAMPLES)]


def naive_tau(layers: list[NDArray[np.float64]]) -> float:
    depth = np.repeat(np.arange(len(layers)), [len(x) for x in layers])
    return float(stats.kendalltau(depth, np.concatenate(layers)).statistic)


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("sizes", [[30, 20], [9, 25, 4, 12], [10, 0, 12], [2, 1]])
def test_tau_and_its_interval_are_scipys(sizes: list[int], decimals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, words = layers_of(sizes, 0.4, decimals), [5, 6, 7, 8][: len(sizes)]
    found = depth_tau(layers, 3, words)
    depth = np.repeat(np.arange(len(sizes)), sizes)
    expected = stats.kendalltau(depth, np.concatenate(layers), method="asymptotic")
    assert found.value == pytest.approx(expected.statistic, abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    taus = [naive_tau(r) for r in resampled(layers, 3, words)]
    low, high = np.nanquantile(taus, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    monkeypatch.setattr(trends, "_CHUNK", 60)
    trends._resamples.cache_clear()
    assert depth_tau(layers, 3, words) == found, "chunks change nothing"


def test_tau_knows_up_from_down() -> None:
    up, none, down = (depth_tau(layers_of([60, 60, 60], rise, 12), 0, [1, 2, 3]) for rise in (1.0, 0.0, -1.0))
    assert up.low > 0.3
    assert up.p < 1e-9
    assert none.low < 0 < none.high
    assert none.p > 0.01
    assert down.high < -0.3


def test_the_interval_of_tau_covers_what_it_should() -> None:
    truth = depth_tau(layers_of([4000, 4000], 0.5, 12, seed=1), 0, [1, 2]).value
    hits = 0
    for i in range(120):
        found = depth_tau(layers_of([40, 40], 0.5, 12, seed=2 + i), i, [1, 2])
        hits += found.low <= truth <= found.high
    assert 0.87 <= hits / 120 <= 0.99


def test_the_step_between_two_layers() -> None:
    earlier, later = layers_of([31, 44], 0.8, 1)
    found = step(earlier, later, 4, (9, 2))
    assert found.value == pytest.approx(np.median(later) - np.median(earlier))
    assert found.p == pytest.approx(stats.mannwhitneyu(later, earlier, alternative="greater").pvalue, rel=1e-9)
    differences = [np.median(b) - np.median(a) for a, b in resampled([earlier, later], 4, [9, 2])]
    assert (found.low, found.high) == tuple(np.quantile(differences, [0.025, 0.975]))
    back = step(later, earlier, 4, (2, 9))
    assert back.value == -found.value
    assert back.p > 0.9 > 0.05 > found.p


def test_resamples_are_uniform_and_of_their_own_for_each_layer() -> None:
    a, b, c = trends._resamples(50, 0, 1), trends._resamples(50, 0, 2), trends._resamples(50, 1, 1)
    assert a.shape == (N_RESAMPLES, 50)
    assert stats.chisquare(np.bincount(a.ravel(), minlength=50)).pvalue > 0.001
    assert all((x == y).mean() < 0.05 for x, y in ((a, b), (a, c), (b, c)))


def test_what_cannot_be_compared_is_nan() -> None:
    some = np.array([1.0, 2.0])
    none = np.zeros(0)
    for found in (
        depth_tau([some], 0, [1]),
        depth_tau([some, none], 0, [1, 2]),
        depth_tau([none, none], 0, [1, 2]),
        depth_tau([np.ones(3), np.ones(4)], 0, [1, 2]),
        depth_tau([np.ones(1), np.zeros(1)], 0, [1, 2]),
        step(none, some, 0, (1, 2)),
        step(some, none, 0, (1, 2)),
    ):
        assert all(map(math.isnan, found))
