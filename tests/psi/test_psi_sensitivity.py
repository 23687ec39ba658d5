"""Sensitivity: rank correlations, their intervals, agreement of clusters, and which neurons change sides."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from polyray.config import Science
from polyray.errors import StoreError
from polyray.psi import sensitivity
from polyray.psi.sensitivity import Variation, adjusted_rand, cluster_matrix, compare, spearman
from polyray.schema import COMPONENTS, PRESETS, TABLES

WHAT = Variation("K-50-0", "K", "50")


def science(n_bootstrap: int = 200, seed: int = 0) -> Science:
    return Science.model_validate(
        {
            "subject": {"name": "x"},
            "probe": {"kind": "generated"},
            "encoder": {"kind": "standin"},
            "seed": seed,
            "calibrate": {"n_bootstrap": n_bootstrap},
        }
    )


# Spearman


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("n", [3, 10, 300])
def test_spearman_is_scipys_ties_included(n: int, decimals: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(0, 2, n)
    y = (x + rng.normal(0, 2, n)).round(decimals)
    x = x.round(decimals)
    expected = stats.spearmanr(x, y).statistic
    np.testing.assert_allclose(spearman(x, y), expected, rtol=1e-12)
    assert spearman(x, x**3) == pytest.approx(1.0, abs=1e-12)
    assert spearman(x, -np.exp(x)) == pytest.approx(-1.0, abs=1e-12)


def test_spearman_leaves_out_neurons_that_lack_a_score() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 40))
    x[[0, 5]], y[[5, 7, 9]] = np.nan, np.nan
    both = ~(np.isnan(x) | np.isnan(y))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x[both], y[both]).statistic, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1, 2], [2, 1]),
        ([1, 2, 3, math.nan], [math.nan, 2, 1, 4]),
        ([1, 1, 1, 1], [1, 2, 3, 4]),
        ([1, 2, 3, 4], [0.1, 0.1, 0.1, 0.1]),
        ([math.nan] * 5, [1, 2, 3, 4, 5]),
    ],
)
def test_spearman_of_too_few_or_constant_scores_is_missing(x: list[float], y: list[float]) -> None:
    assert math.isnan(spearman(np.array(x, dtype=float), np.array(y, dtype=float)))


def test_resampled_spearman_is_that_of_the_repeated_neurons() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, (2, 25)).astype(float)
    times = torch.cat(list(sensitivity._resamples(25, 40, 7, 3)))
    assert times.shape == (40, 25)
    assert (times.sum(1) == 25).all()
    got = sensitivity._weighted_spearman(times, sensitivity._places(x), sensitivity._places(y))
    for rho, row in zip(got.tolist(), times.long().numpy(), strict=True):
        expected = stats.spearmanr(np.repeat(x, row), np.repeat(y, row)).statistic
        assert rho == pytest.approx(expected, rel=1e-12)


def test_resamples_are_the_same_in_whatever_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat(list(sensitivity._resamples(11, 30, 0, 5)))
    monkeypatch.setattr(sensitivity, "_CHUNK", 33)
    chunks = list(sensitivity._resamples(11, 30, 0, 5))
    assert len(chunks) == 10
    assert torch.equal(torch.cat(chunks), whole)
    assert not torch.equal(torch.cat(list(sensitivity._resamples(11, 30, 1, 5))), whole)
    assert not torch.equal(torch.cat(list(sensitivity._resamples(11, 30, 0, 6))), whole)
    # Each neuron is drawn as often as every other: 330 draws of 11 neurons, 30 each.
    assert stats.chisquare(whole.sum(0).numpy()).pvalue > 1e-3


def rho_and_interval(x: NDArray[np.float64], y: NDArray[np.float64], seed: int = 0) -> dict[str, Any]:
    rows, _ = compare(WHAT, ["a"], neurons(S=x), neurons(S=y), np.full(len(x), np.nan), science(200, seed))
    (row,) = figures(rows, "spearman", layer=None, preset=None, score="S")
    return row


def test_interval_covers_the_true_correlation_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    pearson = 0.6
    true = 6 / np.pi * np.arcsin(pearson / 2)  # Spearman of a bivariate normal
    covered, widths = 0, []
    for i in range(60):
        x, y = rng.multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], 80).T
        row = rho_and_interval(x, y, i)
        assert row["low"] <= row["estimate"] <= row["high"]
        covered += row["low"] <= true <= row["high"]
        widths.append(row["high"] - row["low"])
    # 95 % of 60 are 57; three standard deviations of a binomial are 5.
    assert covered >= 51
    # Fieller's standard error for rho = 0.58 and n = 80 gives a width of about 0.31.
    assert 0.2 < np.median(widths) < 0.42


# Agreement of clusters


def test_adjusted_rand_is_scikit_learns() -> None:
    rng = np.random.default_rng(4)
    a = rng.integers(0, 3, (50, 24))
    b = np.where(rng.random((50, 24)) < 0.6, a, rng.integers(0, 5, (50, 24)))
    b[:5] = 2 - a[:5]
    a[10:20, -4:], b[15:25, :3] = -1, -1
    got = adjusted_rand(a, b)
    for i in range(50):
        both = (a[i] >= 0) & (b[i] >= 0)
        assert got[i] == pytest.approx(adjusted_rand_score(a[i][both], b[i][both]), abs=1e-12)
    np.testing.assert_allclose(got[:5], 1.0)


def test_adjusted_rand_at_its_ends() -> None:
    a = np.array([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1], [-1, -1, 0, 1], [0, -1, -1, -1]])
    b = np.array([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0], [0, 1, -1, -1], [2, 1, 1, 0]])
    got = adjusted_rand(a, b)
    assert got[:3].tolist() == [1.0, 1.0, 0.0]
    assert np.isnan(got[3])
    assert got[4] == 1.0
    assert adjusted_rand(np.zeros((0, 4), dtype=int), np.zeros((0, 4), dtype=int)).shape == (0,)


def test_cluster_matrix_puts_every_example_at_its_rank() -> None:
    rows = pa.table(
        {
            "neuron": pa.array([2, 2, 2, 5, 5, 9], pa.int32()),
            "rank": pa.array([0, 1, 2, 1, 0, 0], pa.int32()),
            "cluster": pa.array([1, None, 0, 2, 1, 3], pa.int16()),
        }
    )
    got = cluster_matrix(rows, np.array([2, 3, 5]))
    assert got.tolist() == [[1, -1, 0], [-1, -1, -1], [1, 2, -1]]
    assert cluster_matrix(rows.slice(0, 0), np.array([2, 3])).shape == (2, 0)


def test_agreement_is_over_the_ranks_that_both_have() -> None:
    def rows(clusters: list[int]) -> pa.Table:
        return pa.table({"neuron": [0] * len(clusters), "rank": list(range(len(clusters))), "cluster": clusters})

    got = sensitivity.agreement(rows([0, 0, 1, 1, 1, 0]), rows([1, 1, 0, 0]), np.array([0, 1]))
    assert got[0] == 1.0
    assert np.isnan(got[1])


# Rows


def neurons(layers: dict[str, int] | None = None, **given: Any) -> pa.Table:
    """Rows of `neurons` with q and called; what is not given is a fixed random score."""
    rng = np.random.default_rng(0)
    layers = layers or {"a": len(next(iter(given.values())))}
    n = sum(layers.values())
    values: dict[str, Any] = {c: rng.standard_normal(n) for c in COMPONENTS}
    values |= {f"{p}_{c}_z": rng.standard_normal(n) for p in PRESETS for c in COMPONENTS}
    values |= {f"{p}_log_psi": rng.standard_normal(n) for p in PRESETS}
    values |= {"status": ["ok"] * n, "k": rng.integers(2, 5, n), "specific_p": rng.random(n)}
    values |= {"specific_D_p": rng.random(n), "q": rng.random(n), "called": [False] * n}
    values["layer"] = [name for name, size in layers.items() for _ in range(size)]
    values["neuron"] = [i for size in layers.values() for i in range(size)]
    values |= given
    types = {f.name: f.type for f in TABLES["neurons"].schema}
    return pa.table({c: pa.array(v, type=types.get(c), from_pandas=True) for c, v in values.items()})


def figures(rows: pa.Table, metric: str, **where: Any) -> list[dict[str, Any]]:
    return [r for r in rows.to_pylist() if r["metric"] == metric and all(r[c] == v for c, v in where.items())]


def test_every_score_has_a_row_for_each_layer_and_the_sweep() -> None:
    layers = {"a": 30, "b": 20}
    base, varied = neurons(layers), neurons(layers, S=np.random.default_rng(9).standard_normal(50))
    rows, by_layer = compare(WHAT, ["b", "a"], base, varied, np.full(50, 0.5), science())
    assert rows.schema.equals(TABLES["sensitivity"].schema)
    found = figures(rows, "spearman")
    asked = {(p, s) for p in PRESETS for s in ("log_psi", *COMPONENTS)} | {(None, c) for c in COMPONENTS}
    assert {(r["preset"], r["score"]) for r in found} == asked
    assert len(found) == 3 * len(asked)
    assert {(r["layer"], r["n"]) for r in found} == {("a", 30), ("b", 20), (None, 50)}
    for r in found:
        expected = 1.0
        if (r["preset"], r["score"]) == (None, "S"):
            here = np.array([r["layer"] in (None, x) for x in base["layer"].to_pylist()])
            expected = stats.spearmanr(base["S"].to_numpy()[here], varied["S"].to_numpy()[here]).statistic
        assert r["estimate"] == pytest.approx(expected, abs=1e-12)
    assert {(r["variant"], r["vary"], r["value"]) for r in rows.to_pylist()} == {tuple(WHAT)}
    assert list(by_layer) == ["b", "a"]
    assert [len(t) for t in by_layer.values()] == [20, 30]
    (rand,) = figures(rows, "adjusted_rand", layer=None)
    assert (rand["estimate"], rand["low"], rand["high"], rand["n"]) == (0.5, 0.5, 0.5, 50)


def test_only_neurons_scored_in_both_count() -> None:
    n = 40
    x, y = np.random.default_rng(5).standard_normal((2, n))
    status, other = ["ok"] * n, ["ok"] * n
    status[3], other[4], other[5] = "excluded", "failed", "excluded"
    x[7] = np.nan
    base = neurons(S=x, status=status)
    varied = neurons(S=y, status=other)
    rows, by_layer = compare(WHAT, ["a"], base, varied, np.full(n, np.nan), science())
    (row,) = figures(rows, "spearman", layer="a", preset=None, score="S")
    both = [i for i in range(n) if i not in (3, 4, 5, 7)]
    assert row["n"] == len(both)
    assert row["estimate"] == pytest.approx(stats.spearmanr(x[both], y[both]).statistic, rel=1e-12)
    (same,) = figures(rows, "same_k_frac", layer="a")
    assert (same["n"], same["estimate"]) == (n - 3, 1.0)
    (rand,) = figures(rows, "adjusted_rand", layer="a")
    assert (rand["n"], rand["estimate"], rand["low"]) == (0, None, None)
    assert by_layer["a"]["neuron"].to_pylist() == [i for i in range(n) if i not in (4, 5)]


def test_calls_and_flips_are_counted() -> None:
    k, other_k = [2, 2, 3, 4], [2, 3, 3, 2]
    base = neurons(k=k, called=[True, True, False, None], specific_D_p=[0.01, 0.2, 0.049, 0.5])
    varied = neurons(k=other_k, called=[True, False, False, True], specific_D_p=[0.05, 0.3, 0.01, np.nan])
    rows, _ = compare(WHAT, ["a"], base, varied, np.array([1, 0, 0.5, np.nan]), science())

    def estimate(metric: str) -> tuple[float, int]:
        (row,) = figures(rows, metric, layer=None)
        return row["estimate"], row["n"]

    assert estimate("same_k_frac") == (0.5, 4)
    assert estimate("adjusted_rand") == (0.5, 3)
    assert estimate("n_called_base") == (2.0, 4)
    assert estimate("n_called") == (2.0, 4)
    assert estimate("called_flip_frac") == (pytest.approx(1 / 3), 3)
    assert estimate("D_flip_frac") == (pytest.approx(1 / 3), 3)


@pytest.mark.parametrize(
    ("vary", "expected"),
    [("prompts", ["name-sensitive", None, "name-sensitive", None, None]), ("encoder", None), ("K", [None] * 5)],
)
def test_name_sensitive_is_who_changes_sides_under_other_names(vary: str, expected: list[str | None] | None) -> None:
    base = neurons(specific_D_p=[0.01, 0.2, 0.05, 0.001, np.nan])
    varied = neurons(specific_D_p=[0.05, 0.3, 0.04, 0.049, 0.01])
    _, by_layer = compare(Variation("v", vary, "x"), ["a"], base, varied, np.full(5, np.nan), science())
    expected = ["name-sensitive", None, "name-sensitive", None, None] if expected is None else expected
    assert by_layer["a"]["diagnosis"].to_pylist() == expected
    assert by_layer["a"].schema.equals(TABLES["sensitivity_neurons"].schema)
    assert by_layer["a"]["D_p"].to_pylist() == [0.05, 0.3, 0.04, 0.049, 0.01]


def test_two_neurons_or_none_have_no_correlation() -> None:
    for n in (0, 2):
        base = neurons({"a": n})
        rows, _ = compare(WHAT, ["a"], base, base, np.full(n, np.nan), science())
        for row in figures(rows, "spearman"):
            assert (row["estimate"], row["low"], row["high"], row["n"]) == (None, None, None, n)


def test_a_constant_score_has_no_correlation_and_the_others_have() -> None:
    rows, _ = compare(WHAT, ["a"], neurons(S=np.zeros(9)), neurons(S=np.arange(9.0)), np.zeros(9), science())
    (row,) = figures(rows, "spearman", layer=None, preset=None, score="S")
    assert (row["estimate"], row["low"], row["high"], row["n"]) == (None, None, None, 9)
    (row,) = figures(rows, "spearman", layer=None, preset=None, score="Q")
    assert row["estimate"] == pytest.approx(1.0)


def test_other_neurons_are_refused() -> None:
    with pytest.raises(StoreError, match="other neurons"):
        compare(WHAT, ["a"], neurons({"a": 3}), neurons({"a": 4}), np.zeros(3), science())
