"""Proximity against naive loops, SciPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from torch import Tensor

from polyray.kernels import proximity as kernel
from polyray.kernels import random


def some(G: int = 3, n: int = 24, P: int = 4, d: int = 7, T: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [T, d], tokens [G, n], clusters [G, P, n]."""
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(T, d, generator=g) + 0.3
    tokens = torch.stack([torch.randperm(T, generator=g)[:n] for _ in range(G)])
    return embeddings, tokens, torch.rand(G, P, n, generator=g) < 0.4


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def test_proximity_is_the_naive_double_loops() -> None:
    embeddings, tokens, clusters = some()
    clusters[0, 0] = False
    clusters[1, 2] = False
    clusters[1, 2, 5] = True  # a cluster of one token
    near = kernel.proximity(kernel.cosines(embeddings, tokens, tokens), clusters)
    x = embeddings.double().numpy()
    for g in range(3):
        for t in range(24):
            for p in range(4):
                others = [s for s in range(24) if clusters[g, p, s] and s != t]
                found = float(near[g, t, p])
                if not others:
                    assert math.isnan(found)
                    continue
                expected = np.mean([cosine(x[tokens[g, t]], x[tokens[g, s]]) for s in others])
                assert found == pytest.approx(expected, abs=1e-11)
    assert math.isnan(near[1, 5, 2])
    assert not near[1, 6, 2].isnan()
    assert near[0, :, 0].isnan().all()


def test_proximity_to_other_tokens_leaves_none_out() -> None:
    embeddings, tokens, clusters = some()
    others = tokens.flip(0)[:, :20]
    near = kernel.proximity(kernel.cosines(embeddings, tokens, others), clusters[:, :, :20], own=False)
    x = embeddings.double().numpy()
    expected = np.mean([cosine(x[tokens[1, 3]], x[others[1, s]]) for s in range(20) if clusters[1, 2, s]])
    assert near[1, 3, 2] == pytest.approx(expected, abs=1e-11)


def test_sums_do_not_depend_on_the_order_of_tokens() -> None:
    embeddings, tokens, clusters = some(n=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    near = kernel.proximity(kernel.cosines(embeddings, tokens, tokens), clusters)
    again = kernel.proximity(kernel.cosines(embeddings, tokens[:, order], tokens[:, order]), clusters[:, :, order])
    assert torch.equal(near[:, order], again)
    alone = kernel.proximity(kernel.cosines(embeddings, tokens[1:2], tokens[1:2]), clusters[1:2])
    assert torch.equal(near[1:2], alone)


def test_embeddings_without_a_direction_have_no_cosine() -> None:
    embeddings, tokens, clusters = some()
    embeddings[tokens[0, 0]] = 0.0
    embeddings[tokens[0, 1]] = math.inf
    tokens[0, 2] = -1
    cosines = kernel.cosines(embeddings, tokens[:1], tokens[:1])
    assert cosines[0, :3].isnan().all()
    assert not cosines[0, 3:, 3:].isnan().any()
    clusters[0, 0] = False
    clusters[0, 0, [3, 4]] = True
    clusters[0, 1, :] = False
    clusters[0, 1, [0, 4]] = True
    near = kernel.proximity(cosines, clusters[:1])
    assert near[0, :3].isnan().all(), "a token without a direction is near to nothing"
    assert not near[0, 5:, 0].isnan().any()
    assert near[0, 5:, 1].isnan().all(), "nor is anything near to a cluster that has one"


def test_dimensional_proximity_is_the_mean_over_counted_clusters_that_have_one() -> None:
    near = torch.tensor([[[0.1, 0.4, 9.0], [math.nan, 0.2, 9.0], [math.nan, math.nan, 9.0]]], dtype=torch.float64)
    found = kernel.dimensional(near, torch.tensor([[True, True, False]]))[0]
    assert found[0] == pytest.approx(0.25)
    assert found[1] == pytest.approx(0.2)
    assert found[2].isnan()


def test_difference_of_the_ends() -> None:
    values = torch.arange(12, dtype=torch.float64).flip(0)[None, :]
    assert kernel.difference(values, 3)[0] == pytest.approx(10 - 1)
    assert kernel.difference(values, 6)[0] == pytest.approx(6)
    assert kernel.difference(values, 7)[0].isnan(), "the ends would share tokens"
    values[0, 1] = math.nan
    assert kernel.difference(values, 3)[0] == pytest.approx(10 - 1)
    assert kernel.group_means(values, kernel.groups_of(12))[0, :2].tolist() == [11, 9]
    values[0, :3] = math.nan
    assert kernel.difference(values, 3)[0].isnan()


@pytest.mark.parametrize("n", [10, 23, 100])
def test_groups_are_of_equal_size(n: int) -> None:
    group = kernel.groups_of(n)
    sizes = torch.bincount(group)
    assert len(sizes) == 10
    assert sizes.max() - sizes.min() <= 1
    assert (group.diff() >= 0).all()
    with pytest.raises(ValueError, match="9 ranks"):
        kernel.groups_of(9)


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_kruskal_is_scipys_and_its_p_that_of_all_its_permutations(decimals: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(np.linspace(0.8, 0, 30), 1, (5, 30)).round(decimals)
    values[3] = 1.0
    values[4, 2] = math.nan
    group = kernel.groups_of(30)
    null = kernel.order_null(group, random.permutations(0, random.PROXIMITY_ORDER, 30, 199))
    h, p = kernel.kruskal(torch.from_numpy(values), null)
    for g in range(3):
        assert h[g] == pytest.approx(stats.kruskal(*(values[g][group == k] for k in range(10))).statistic, abs=1e-9)
    assert h[3:].isnan().all()
    assert p[3:].isnan().all()
    for g in range(3):
        # Without ties any values serve: those of the shared null are the ranks themselves.
        row = values[g] if len(np.unique(values[g])) < 30 else np.arange(30)
        permuted = [stats.kruskal(*(row[null.permuted[b] == k] for k in range(10))).statistic for b in range(199)]
        assert p[g] == pytest.approx((1 + sum(x >= h[g] - 1e-9 for x in permuted)) / 200)


def test_kruskals_p_is_calibrated() -> None:
    rng = np.random.default_rng(1)
    null = kernel.order_null(kernel.groups_of(40), random.permutations(0, random.PROXIMITY_ORDER, 40, 4999))
    h, p = kernel.kruskal(torch.from_numpy(rng.normal(size=(2000, 40))), null)
    # Rows share one null, so that their p are uniform but for what that null's own draws leave.
    assert stats.ks_2samp(h.numpy(), null.untied.numpy()).pvalue > 0.001
    assert abs(float((p < 0.05).double().mean()) - 0.05) < 0.02


def test_tau_is_scipys_and_points_up_with_activation() -> None:
    rng = np.random.default_rng(0)
    means = np.vstack([rng.normal(size=(6, 10)), rng.integers(0, 3, (6, 10))])
    found = kernel.tau(torch.from_numpy(means))
    for row, t in zip(means, found, strict=True):
        assert t == pytest.approx(stats.kendalltau(-np.arange(10), row, variant="b").statistic, abs=1e-12)
    assert kernel.tau(torch.arange(10.0, 0, -1, dtype=torch.float64)[None])[0] == 1
    assert kernel.tau(torch.ones(1, 10, dtype=torch.float64)).isnan().all()


def test_first_component_is_scikit_learns() -> None:
    embeddings, tokens, clusters = some(G=4, n=30, P=5)
    near = kernel.proximity(kernel.cosines(embeddings, tokens, tokens), clusters)
    counted = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    near[1, :, 1] = math.nan  # not counted
    found = kernel.first_component(near, counted)
    for g in range(3):
        pca = PCA().fit(near[g][:, counted[g]].numpy())
        assert found.share[g] == pytest.approx(pca.explained_variance_ratio_[0], abs=1e-9)
        loadings = pca.components_[0] * np.sign(pca.components_[0].sum())
        assert found.loadings[g][counted[g]].numpy() == pytest.approx(loadings, abs=1e-6)
        n_up = int((loadings > 0).sum())
        assert found.agreeing[g] == pytest.approx(max(n_up, len(loadings) - n_up) / len(loadings))
        assert found.loadings[g][~counted[g]].isnan().all()
    assert found.share[3].isnan(), "one cluster has no component"
    near[0, 3, 2] = math.nan
    assert kernel.first_component(near, counted).share[0].isnan()


def test_basis_has_numpys_rank_and_condition() -> None:
    embeddings, tokens, clusters = some(G=4, n=30, P=4, d=6)
    clusters[1, 3] = clusters[1, 0]
    clusters[2, :, :2] = True
    counted = torch.ones(4, 4, dtype=torch.bool)
    counted[2, 1] = False
    found = kernel.basis(kernel.cosines(embeddings, tokens, tokens), clusters, counted)
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1).numpy()
    for g in range(4):
        rows = np.stack([unit[tokens[g][clusters[g, p]]].mean(0) for p in range(4) if counted[g, p]])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        assert found.rank[g] == np.linalg.matrix_rank(rows)
        if g == 1:
            assert found.rank[g] == 3
            assert found.condition[g].isnan()
        else:
            assert found.condition[g] == pytest.approx(np.linalg.cond(rows), rel=1e-5)


def test_without_centre_is_projection() -> None:
    embeddings, tokens, _ = some()
    cosines = kernel.without_centre(kernel.cosines(embeddings, tokens, tokens))
    x = torch.nn.functional.normalize(embeddings[tokens[1]].double(), dim=1)
    w = torch.nn.functional.normalize(x.mean(0), dim=0)
    rest = torch.nn.functional.normalize(x - (x @ w)[:, None] * w, dim=1)
    assert torch.allclose(cosines[1], rest @ rest.T, atol=1e-9)
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    opposite = kernel.cosines(pair, torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert torch.equal(kernel.without_centre(opposite), opposite), "no mean direction: nothing to take out"


def test_identical_embeddings_have_figures_without_variance() -> None:
    _, tokens, clusters = some()
    clusters[:, :, :8] = True
    same = torch.tensor([[0.1, 0.2, 0.3]]).expand(50, 3)
    cosines = kernel.cosines(same, tokens, tokens)
    assert (cosines == 1).all()
    near = kernel.proximity(cosines, clusters)
    counted = torch.ones(3, 4, dtype=torch.bool)
    values = kernel.dimensional(near, counted)
    assert (values == 1).all()
    assert (kernel.difference(values, 10) == 0).all()
    null = kernel.order_null(kernel.groups_of(24), random.permutations(0, random.PROXIMITY_ORDER, 24, 19))
    assert kernel.kruskal(values, null)[1].isnan().all()
    assert kernel.tau(kernel.group_means(values, null.group)).isnan().all()
    assert kernel.first_component(near, counted).share.isnan().all()
    found = kernel.basis(cosines, clusters, counted)
    assert (found.rank == 1).all()
    assert found.condition.isnan().all()
    assert kernel.without_centre(cosines).isnan().all()
