"""Signed-rank p against SciPy and all sign flips; intervals of means against a plain loop and SciPy."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from kernels.memory import peak_bytes
from scipy import stats

from polyray.kernels import effects, random
from polyray.kernels.effects import N_EXACT, mean_interval, signed_rank_p


def f64(x) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, dtype=np.float64))


def flipped(d: np.ndarray) -> tuple[float, float]:
    """P(W+ >= observed) and P(W+ <= observed) by going through all sign flips."""
    ranks = np.where(d == 0, 0.0, stats.rankdata(np.abs(d)))
    flips = np.array(list(itertools.product([0, 1], repeat=len(d)))) @ ranks
    observed = ranks[d > 0].sum()
    return float((flips >= observed).mean()), float((flips <= observed).mean())


def both(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return signed_rank_p(f64(d)).numpy(), signed_rank_p(f64(d), two_sided=True).numpy()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_p_is_the_share_of_all_sign_flips(n: int, decimals: int) -> None:
    # With no decimals there are many ties and zeros, with nine there are none.
    d = np.random.default_rng(n).normal(0.5, 1, (11, n)).round(decimals)
    one, two = both(d)
    assert one.dtype == two.dtype == np.float64
    for row, p, q in zip(d, one, two, strict=True):
        as_large, as_small = flipped(row)
        assert p == as_large
        assert q == min(1.0, 2 * min(as_large, as_small))


@pytest.mark.parametrize("n", [4, 7, 20, 49, 50])
def test_without_ties_p_is_scipys(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1, (9, n))
    one, two = both(d)
    for got, side in ((one, "greater"), (two, "two-sided")):
        expected = [stats.wilcoxon(row, alternative=side, method="exact").pvalue for row in d]
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("n", [51, 80, 503])
@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_of_many_pairs_p_is_scipys_approximation(n: int, decimals: int) -> None:
    d = np.random.default_rng(n).normal(0.1, 1, (9, n)).round(decimals)
    one, two = both(d)
    for got, side in ((one, "greater"), (two, "two-sided")):
        expected = [
            stats.wilcoxon(row, zero_method="pratt", correction=False, method="asymptotic", alternative=side).pvalue
            for row in d
        ]
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_the_approximation_begins_where_the_exact_p_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    d = np.random.default_rng(0).normal(0.2, 1, (40, N_EXACT)).round(1)
    exact = both(d)
    monkeypatch.setattr(effects, "N_EXACT", 0)
    for got, expected in zip(both(d), exact, strict=True):
        assert (got != expected).all()
        np.testing.assert_allclose(got, expected, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("n", [1, 3, N_EXACT])
def test_the_smallest_p_is_exact(n: int) -> None:
    d = np.arange(1.0, n + 1)
    one, two = both(np.stack([d, -d]))
    assert one.tolist() == [2.0**-n, 1.0]
    assert two.tolist() == [2.0 ** (1 - n)] * 2
    # Zeros take ranks, but no flip of theirs counts.
    one, _ = both(np.concatenate([d[:-1], [0.0]])[None])
    assert one.tolist() == [2.0 ** (1 - n)]


@pytest.mark.parametrize("n", [1, 6, N_EXACT, N_EXACT + 1, 300])
def test_nothing_but_zeros_is_no_evidence(n: int) -> None:
    one, two = both(np.zeros((2, n)))
    assert one.tolist() == two.tolist() == [1.0, 1.0]


def test_no_pairs_and_no_rows() -> None:
    for two_sided in (False, True):
        assert signed_rank_p(torch.zeros(3, 0), two_sided).tolist() == [1.0] * 3
        assert signed_rank_p(torch.zeros(0, 5), two_sided).shape == (0,)
        assert signed_rank_p(torch.zeros(0, 0), two_sided).shape == (0,)


@pytest.mark.parametrize("n", [7, 60])
def test_missing_and_infinite_differences(n: int) -> None:
    d = np.random.default_rng(1).normal(0.5, 1, (5, n))
    expected = both(d)
    holed = d.copy()
    holed[2, 3] = math.nan
    for got, whole in zip(both(holed), expected, strict=True):
        assert np.isnan(got).tolist() == [False, False, True, False, False]
        np.testing.assert_array_equal(np.delete(got, 2), np.delete(whole, 2))
    # An infinite difference ranks as one that is merely larger than all others.
    for sign in (-1, 1):
        large, infinite = d.copy(), d.copy()
        large[:, 4], infinite[:, 4] = 99.0 * sign, math.inf * sign
        for got, whole in zip(both(infinite), both(large), strict=True):
            np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("n", [6, 20, 55])
@pytest.mark.parametrize("decimals", [0, 9])
def test_p_of_a_row_depends_on_the_row_alone(n: int, decimals: int) -> None:
    d = f64(np.random.default_rng(2).normal(0.2, 1, (64, n)).round(decimals))
    for two_sided in (False, True):
        p = signed_rank_p(d, two_sided)
        assert torch.equal(signed_rank_p(d.flip(0), two_sided).flip(0), p)
        assert torch.equal(signed_rank_p(d.flip(1), two_sided), p)
        assert torch.equal(signed_rank_p(3.0 * d.T.contiguous().T, two_sided), p)
        assert torch.equal(torch.cat([signed_rank_p(row[None], two_sided) for row in d]), p)


def test_single_precision_is_ranked_as_it_is() -> None:
    d = torch.from_numpy(np.random.default_rng(3).normal(0.2, 1, (8, 12)).astype(np.float32))
    assert torch.equal(signed_rank_p(d), signed_rank_p(d.double()))


@pytest.mark.parametrize("n", [4, 7])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("sizes", ["distinct", "tied", "zeros"])
def test_p_is_super_uniform_over_all_signs(n: int, two_sided: bool, sizes: str) -> None:
    size = {"distinct": np.arange(1, n + 1), "tied": np.arange(n) // 2 + 1, "zeros": np.arange(n) // 2}[sizes]
    signs = np.array(list(itertools.product([-1, 1], repeat=n)))
    p = signed_rank_p(f64(signs * size), two_sided).numpy()
    for value in np.unique(p):
        assert (p <= value).mean() <= value
        if not two_sided:
            assert (p <= value).mean() == value


@pytest.mark.parametrize("n", [12, 90])
@pytest.mark.parametrize("decimals", [0, 9])
def test_p_is_super_uniform_under_symmetric_noise(n: int, decimals: int) -> None:
    d = np.random.default_rng(n).standard_t(3, (20_000, n)).round(decimals)
    for p in both(d):
        for level in (0.01, 0.05, 0.2, 0.5):
            error = 4 * math.sqrt(level * (1 - level) / 20_000)
            assert (p <= level).mean() <= level + error
            if decimals:
                # Without ties all rows have one distribution, and p is no smaller than it has to be: its size is the
                # largest value that p can take up to this level. With ties every row has values of its own.
                assert (p <= level).mean() >= p[p <= level].max() - error
    assert (signed_rank_p(f64(d + 1.5)).numpy() < 0.05).mean() > 0.9


def naive_interval(row: np.ndarray, n_bootstrap: int, seed: int, words: tuple[int, ...], level: float) -> list[float]:
    n = len(row)
    means = []
    for r in range(n_bootstrap):
        u = random.uniform(seed, random.SWAP_BOOTSTRAP, torch.arange(n), 2 * r, *words).numpy()
        means.append(row[(u * n).astype(int)].mean())
    return [row.mean(), *np.quantile(means, [(1 - level) / 2, (1 + level) / 2])]


@pytest.mark.parametrize(("G", "n"), [(5, 3), (3, 7), (4, 4), (2, 61)])
@pytest.mark.parametrize(("words", "level"), [((), 0.95), ((9,), 0.8), ((3, 1), 0.5)])
def test_mean_interval_is_the_plain_loop(G: int, n: int, words: tuple[int, ...], level: float) -> None:
    values = np.random.default_rng(n).normal(2, 1, (G, n))
    got = mean_interval(f64(values), 40, 5, *words, level=level)
    assert all(x.dtype == torch.float64 and x.shape == (G,) for x in got)
    expected = [naive_interval(row, 40, 5, words, level) for row in values]
    np.testing.assert_allclose(torch.stack(got, 1).numpy(), expected, rtol=1e-12)


def test_mean_interval_is_scipys_bootstrap() -> None:
    values = np.random.default_rng(4).exponential(1, (3, 25))
    _, low, high = mean_interval(f64(values), 20_000, 0)
    for i, row in enumerate(values):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = stats.bootstrap((row,), np.mean, n_resamples=20_000, method="percentile", rng=i)
        assert low[i].item() == pytest.approx(reference.confidence_interval.low, abs=0.02)
        assert high[i].item() == pytest.approx(reference.confidence_interval.high, abs=0.02)


def test_mean_interval_covers_the_truth() -> None:
    """Rows are independent values under the same resamples; of 40 values the interval is hardly too narrow."""
    values = np.random.default_rng(5).normal(0.7, 1, (3_000, 40))
    _, low, high = mean_interval(f64(values), 500, 0)
    covered = ((low <= 0.7) & (high >= 0.7)).double().mean().item()
    assert 0.92 < covered < 0.96


def test_words_and_seed_name_the_resamples() -> None:
    values = f64(np.random.default_rng(6).standard_normal((2, 9)))
    first = torch.stack(mean_interval(values, 100, 3, 1, 2))
    assert torch.equal(torch.stack(mean_interval(values, 100, 3, 1, 2)), first)
    for seed, words in ((4, (1, 2)), (3, (1, 3)), (3, (2, 1))):
        other = torch.stack(mean_interval(values, 100, seed, *words))
        assert torch.equal(other[0], first[0])
        assert (other[1:] != first[1:]).any()


@pytest.mark.parametrize("n", [1, 2, 7, 64, 333])
def test_interval_of_a_row_depends_on_the_row_alone(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = f64(np.random.default_rng(n).standard_normal((37, n)))
    whole = torch.stack(mean_interval(values, 57, 2, 3))
    single = [torch.stack(mean_interval(row[None], 57, 2, 3)) for row in values]
    assert torch.equal(torch.cat(single, 1), whole)
    assert torch.equal(torch.stack(mean_interval(values.flip(0), 57, 2, 3)).flip(1), whole)
    assert torch.equal(torch.stack(mean_interval(values.T.contiguous().T, 57, 2, 3)), whole)
    for chunk in (1, 10 * n, 57 * n + 1, 100 * n):
        monkeypatch.setattr(effects, "_CHUNK", chunk)
        assert torch.equal(torch.stack(mean_interval(values, 57, 2, 3)), whole)


def test_mean_interval_at_its_ends() -> None:
    for x in mean_interval(torch.zeros(3, 0), 20, 0):
        assert x.shape == (3,)
        assert x.isnan().all()
    assert all(x.shape == (0,) for x in mean_interval(torch.zeros(0, 4), 20, 0))
    single = f64([[0.1], [-7.3], [1e9]])
    assert all(torch.equal(x, single[:, 0]) for x in mean_interval(single, 20, 0))
    assert all(x.tolist() == [0.0, 0.0] for x in mean_interval(torch.zeros(2, 6), 20, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 6])
def test_a_value_that_is_not_finite_leaves_no_interval(value: float, n: int) -> None:
    values = f64(np.random.default_rng(7).standard_normal((3, n)))
    whole = mean_interval(values, 30, 0)
    values[1, 0] = value
    for got, expected in zip(mean_interval(values, 30, 0), whole, strict=True):
        assert got[1].isnan()
        assert torch.equal(got[::2], expected[::2])


def test_memory_is_bounded() -> None:
    """Means of all resamples of all rows would take 160 MB, their products with the counts 1.1 GB."""
    values = f64(np.random.default_rng(8).standard_normal((20_000, 7)))
    assert peak_bytes(lambda: mean_interval(values, 1_000, 0)) < 25e6
