"""z, p, log PSI, false discovery rates and AUROC against SciPy, statsmodels, scikit-learn and plain loops."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from polyray.kernels import random, statistics
from polyray.kernels.statistics import (
    auroc,
    auroc_interval,
    benjamini_hochberg,
    benjamini_yekutieli,
    conjunctive_p,
    log_psi,
    moments,
    p_value,
    total,
    wilson,
    z_score,
)


def f64(x) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, dtype=np.float64))


def test_z_score() -> None:
    raw, mean, std = [1.0, 2.0, 3.0, 3.0, 0.0], [0.0, 2.5, 1.0, 1.0, 0.0], [2.0, 0.1, 9.9e-7, 0.0, 1.1e-6]
    expected = [0.5, -5.0, 0.0, 0.0, 0.0]
    got = z_score(f64(raw), f64(mean), f64(std))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    grid = z_score(f64(np.arange(6).reshape(2, 3)), f64(np.ones((2, 3))), f64(np.full((2, 3), 2)))
    np.testing.assert_allclose(grid.numpy(), (np.arange(6).reshape(2, 3) - 1) / 2, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (2, 5), (4, 4), (2, 3, 9)])
def test_moments_have_the_denominator_of_the_number_of_draws(shape: tuple[int, ...]) -> None:
    null = 100 + np.random.default_rng(9).standard_normal(shape)
    mean, std = moments(f64(null))
    assert mean.dtype == std.dtype == torch.float64
    np.testing.assert_allclose(mean.numpy(), null.mean(-1), rtol=1e-13)
    np.testing.assert_allclose(std.numpy(), null.std(-1), rtol=1e-9)
    # Scores arrive as float32 from some nulls: their moments are taken in float64 all the same.
    single = null.astype(np.float32)
    mean, std = moments(torch.from_numpy(single))
    np.testing.assert_allclose(mean.numpy(), single.astype(np.float64).mean(-1), rtol=1e-13)
    np.testing.assert_allclose(std.numpy(), single.astype(np.float64).std(-1), rtol=1e-9)


def test_moments_at_their_ends() -> None:
    mean, std = moments(f64([[0.3] * 9, [0.1] * 9]))
    np.testing.assert_allclose(mean.numpy(), [0.3, 0.1], rtol=1e-15)
    assert (std < 1e-12).all()
    mean, std = moments(torch.zeros(2, 0, dtype=torch.float64))
    assert mean.isnan().all()
    assert std.isnan().all()


@pytest.mark.parametrize("B", [1, 2, 7, 1000, 1001])
def test_moments_do_not_depend_on_the_batch(B: int) -> None:
    null = f64(np.random.default_rng(B).standard_normal((37, B)))
    mean, std = moments(null)
    wide = torch.cat([null, null], 1)[:, :B]
    for i in range(37):
        for row in (null[i], null[i : i + 1], wide[i], null.T.contiguous()[:, i]):
            assert [m.item() for m in moments(row)] == [mean[i].item(), std[i].item()]
    np.testing.assert_allclose(total(null).numpy(), [math.fsum(row) for row in null.tolist()], atol=1e-12)


def test_a_single_draw_is_a_constant_null() -> None:
    mean, std = moments(f64([[0.25], [-1.0]]))
    assert (mean.tolist(), std.tolist()) == ([0.25, -1.0], [0.0, 0.0])
    assert p_value(f64([9.0, -9.0]), f64([0.25])).tolist() == [1.0, 1.0]
    assert z_score(f64([9.0]), mean[:1], std[:1]).tolist() == [0.0]


def naive_p(raw: float, null: np.ndarray) -> float:
    if null.std() < 1e-6:
        return 1.0
    return (1 + sum(v >= raw - 1e-9 for v in null)) / (len(null) + 1)


@pytest.mark.parametrize(("G", "B"), [(2, 3), (5, 40), (6, 6)])
@pytest.mark.parametrize("decimals", [1, 12])
def test_p_value_is_the_naive_count(G: int, B: int, decimals: int) -> None:
    rng = np.random.default_rng(B)
    raw = rng.standard_normal(G).round(decimals)
    shared, own = rng.standard_normal(B).round(decimals), rng.standard_normal((G, B)).round(decimals)
    own[0] = 0.25
    got = p_value(f64(raw), f64(shared))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), [naive_p(r, shared) for r in raw], rtol=1e-14)
    np.testing.assert_allclose(
        p_value(f64(raw), f64(own)).numpy(), [naive_p(r, v) for r, v in zip(raw, own, strict=True)], rtol=1e-14
    )


def test_p_value_counts_ties_up_to_1e_9() -> None:
    null = f64([0.5 - 2e-9, 0.5 - 5e-10, 0.5, 0.5 + 5e-10, 0.1, 0.9, 0.2])
    assert p_value(f64([0.5]), null).tolist() == pytest.approx([5 / 8])
    assert p_value(f64([2.0, -1.0]), null).tolist() == pytest.approx([1 / 8, 1.0])


def test_a_constant_null_says_nothing() -> None:
    assert p_value(f64([5.0, 0.0, -5.0]), f64([0.3] * 9)).tolist() == [1.0] * 3
    assert p_value(f64([5.0]), f64(0.3 + 1e-8 * np.arange(9))).tolist() == [1.0]
    spread = 0.3 + 1e-4 * np.arange(9)
    both = p_value(f64([5.0, 5.0]), f64(np.stack([[0.3] * 9, spread])))
    assert both.tolist() == pytest.approx([1.0, 0.1])
    assert p_value(f64([5.0, 0.0]), f64([])).tolist() == [1.0, 1.0]


def test_a_missing_score_is_never_significant() -> None:
    null = np.random.default_rng(10).standard_normal(19)
    for draws in (f64(null), f64(np.stack([null, null]))):
        p = p_value(f64([np.nan, 0.0]), draws)
        assert p[0].isnan() or p[0] == 1
        assert p[1].item() == pytest.approx(naive_p(0.0, null))


def test_p_is_exactly_uniform_under_exchangeability() -> None:
    values = np.random.default_rng(0).standard_normal(25)
    null = np.stack([np.delete(values, i) for i in range(25)])
    p = p_value(f64(values), f64(null))
    np.testing.assert_allclose(np.sort(p.numpy()), np.arange(1, 26) / 25, rtol=1e-14)


def test_p_is_super_uniform_with_ties() -> None:
    values = np.random.default_rng(1).integers(0, 5, 40).astype(float)
    null = np.stack([np.delete(values, i) for i in range(40)])
    p = np.sort(p_value(f64(values), f64(null)).numpy())
    assert (p >= np.arange(1, 41) / 40 - 1e-12).all()
    for value in np.unique(p):
        assert (p <= value + 1e-12).mean() <= value + 1e-12


def exact_log_psi(*z: float) -> float:
    with localcontext() as context:
        context.prec = 400
        return float(sum((1 / (1 + (-Decimal(v)).exp())).ln() for v in z))


def test_log_psi_is_the_log_of_the_product_of_sigmoids() -> None:
    z = np.random.default_rng(2).normal(0, 5, (3, 50))
    got = log_psi(*(f64(row) for row in z))
    assert got.dtype == torch.float64
    product = special.expit(z.astype(np.longdouble)).prod(0)
    np.testing.assert_allclose(got.numpy(), np.log(product).astype(float), rtol=1e-12)
    np.testing.assert_allclose(got.numpy(), [exact_log_psi(*column) for column in z.T], rtol=1e-12)
    zero = f64([0.0])
    assert log_psi(zero, zero, zero).item() == pytest.approx(3 * math.log(0.5), rel=1e-15)


def test_log_psi_does_not_saturate() -> None:
    z = [30.0, 40.0, 100.0, 200.0, 201.0]
    got = log_psi(f64(z), f64(z), f64(z))
    assert (got < 0).all()
    assert (got.diff() > 0).all()
    np.testing.assert_allclose(got.numpy(), [exact_log_psi(v, v, v) for v in z], rtol=1e-12)
    low = log_psi(f64([-900.0]), f64([200.0]), f64([0.0])).item()
    assert low == pytest.approx(-900 + math.log(0.5), rel=1e-14)


def test_log_psi_of_single_precision_z_is_taken_in_float64() -> None:
    z = torch.tensor([60.0, -3.5, 110.0], dtype=torch.float32)
    got = log_psi(z, z, z)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), [exact_log_psi(v, v, v) for v in z.tolist()], rtol=1e-12)


def test_conjunctive_p_is_the_largest() -> None:
    p = np.random.default_rng(3).random((2, 5, 3))
    np.testing.assert_array_equal(conjunctive_p(f64(p)).numpy(), p.max(-1))
    square = np.random.default_rng(4).random((3, 3))
    np.testing.assert_array_equal(conjunctive_p(f64(square)).numpy(), square.max(-1))


def p_families() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [
        rng.random(50),
        np.concatenate([rng.random(30) * 1e-3, rng.random(70)]),
        rng.integers(1, 11, 60) / 10,
        np.ones(7),
        np.full(9, 1 / 1001),
        np.array([0.03]),
        np.array([0.0, 1.0, 0.5]),
        np.sort(rng.random(20))[::-1].copy(),
    ]


@pytest.mark.parametrize("p", p_families())
@pytest.mark.parametrize(("adjust", "method"), [(benjamini_hochberg, "fdr_bh"), (benjamini_yekutieli, "fdr_by")])
def test_q_is_statsmodels(p: np.ndarray, adjust, method: str) -> None:
    expected = multipletests(p, method=method)[1]
    got = adjust(f64(p))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)

    holes = np.full(2 * len(p) + 1, np.nan)
    holes[1::2] = p
    with_holes = adjust(f64(holes)).numpy()
    assert np.isnan(with_holes[::2]).all()
    np.testing.assert_allclose(with_holes[1::2], expected, rtol=1e-12)


@pytest.mark.parametrize("adjust", [benjamini_hochberg, benjamini_yekutieli])
def test_q_of_nothing(adjust) -> None:
    assert adjust(f64([])).shape == (0,)
    assert adjust(f64([np.nan, np.nan])).isnan().all()


@pytest.mark.parametrize(("n_pos", "n_neg"), [(2, 3), (50, 20), (7, 7), (1, 1)])
@pytest.mark.parametrize("decimals", [0, 12])
def test_auroc_is_scikit_learns(n_pos: int, n_neg: int, decimals: int) -> None:
    rng = np.random.default_rng(n_pos)
    pos, neg = rng.normal(0.5, 1, n_pos).round(decimals), rng.normal(0, 1, n_neg).round(decimals)
    truth = [1] * n_pos + [0] * n_neg
    assert auroc(f64(pos), f64(neg)) == pytest.approx(roc_auc_score(truth, np.concatenate([pos, neg])), abs=1e-12)


def test_auroc_at_its_ends() -> None:
    assert auroc(f64([2.0, 3.0]), f64([0.0, 1.0, 1.5])) == 1
    assert auroc(f64([0.0]), f64([1.0, 2.0])) == 0
    assert auroc(f64([4.0, 4.0]), f64([4.0, 4.0, 4.0])) == 0.5
    assert math.isnan(auroc(f64([]), f64([1.0])))
    assert math.isnan(auroc(f64([1.0]), f64([])))
    # Differences that float32 cannot see still rank.
    assert auroc(f64([-1e-60, -1e-70]), f64([-1e-50, -1e-40])) == 1


def test_auroc_interval_is_deterministic_and_its_words_matter() -> None:
    rng = np.random.default_rng(6)
    pos, neg = f64(rng.normal(0.7, 1, 33)), f64(rng.normal(0, 1, 21))
    first = auroc_interval(pos, neg, 200, 3, 1, 2)
    torch.manual_seed(1)
    assert auroc_interval(pos, neg, 200, 3, 1, 2) == first
    assert auroc_interval(pos, neg, 200, 4, 1, 2) != first
    assert auroc_interval(pos, neg, 200, 3, 1, 3) != first
    assert 0 <= first[0] < auroc(pos, neg) < first[1] <= 1


def test_auroc_interval_is_scipys_bootstrap() -> None:
    rng = np.random.default_rng(7)
    pos, neg = rng.normal(0.7, 1, 80), rng.normal(0, 1, 50)

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        ranks = stats.rankdata(np.concatenate([a, b], axis), axis=axis)
        return (ranks[..., :80].sum(axis) - 80 * 81 / 2) / (80 * 50)

    reference = stats.bootstrap((pos, neg), statistic, n_resamples=2500, method="percentile", rng=rng)
    low, high = auroc_interval(f64(pos), f64(neg), 2500, 0)
    assert low == pytest.approx(reference.confidence_interval.low, abs=0.01)
    assert high == pytest.approx(reference.confidence_interval.high, abs=0.01)


def test_auroc_interval_covers_the_truth() -> None:
    truth = stats.norm.cdf(0.8 / 2**0.5)
    rng = np.random.default_rng(8)
    hits = 0
    for i in range(100):
        low, high = auroc_interval(f64(rng.normal(0.8, 1, 30)), f64(rng.normal(0, 1, 35)), 80, 0, i)
        hits += low <= truth <= high
    assert 0.87 <= hits / 100 <= 0.99


def test_chunks_of_resamples_change_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    pos, neg = f64(rng.normal(0.3, 1, 41).round(1)), f64(rng.normal(0, 1, 30).round(1))
    whole = auroc_interval(pos, neg, 57, 2, 3)
    for size in (1, 100, 700):
        monkeypatch.setattr(statistics, "_CHUNK", size)
        assert auroc_interval(pos, neg, 57, 2, 3) == whole


def test_auroc_interval_is_the_quantiles_of_resampled_values() -> None:
    """Resample by resample, with scikit-learn; many ties."""
    rng = np.random.default_rng(10)
    pos, neg = rng.normal(0.3, 1, 19).round(1), rng.normal(0, 1, 14).round(1)
    values = []
    for r in range(25):
        drawn = [
            x[(random.uniform(4, random.BOOTSTRAP, torch.arange(len(x)), 2 * r + side, 8) * len(x)).long().numpy()]
            for side, x in enumerate((pos, neg))
        ]
        values.append(roc_auc_score([1] * 19 + [0] * 14, np.concatenate(drawn)))
    expected = np.quantile(values, [0.025, 0.975])
    assert auroc_interval(f64(pos), f64(neg), 25, 4, 8) == pytest.approx(tuple(expected), abs=1e-12)


def test_auroc_interval_at_its_ends() -> None:
    assert auroc_interval(f64([2.0, 3.0, 4.0]), f64([0.0, 1.0]), 50, 0) == (1.0, 1.0)
    assert all(math.isnan(v) for v in auroc_interval(f64([]), f64([1.0]), 50, 0))
    assert all(math.isnan(v) for v in auroc_interval(f64([1.0]), f64([]), 50, 0))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 12), (3, 7), (12, 12), (450, 1000)])
def test_wilson_is_statsmodels(hits: int, n: int) -> None:
    assert wilson(hits, n) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


def test_wilson_of_nothing() -> None:
    assert all(math.isnan(v) for v in wilson(0, 0))
