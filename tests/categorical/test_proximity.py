"""Proximity of whole layers: naive figures, ragged and impossible neurons, and reasons for all that is missing."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from polyray.categorical import proximity as stage
from polyray.categorical.proximity import Settings, centred, proximity

SETTINGS = Settings(seed=0, layer=5, n_permutations=199)


def layer(N: int = 6, T: int = 300, C: int = 100, P: int = 5, d: int = 8) -> tuple[torch.Tensor, ...]:
    """Core-tokens, taken-clusters, embeddings."""
    g = torch.Generator().manual_seed(0)
    core = torch.stack([torch.randperm(T, generator=g)[:C] for _ in range(N)])
    return core, torch.rand(N, P, C, generator=g) < 0.2, torch.randn(T, d, generator=g)


def naive(core: list[int], taken: list[list[int]], x: np.ndarray) -> list[float]:
    """Dimensional proximity of each core-token to clusters of tokens."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return [
        float(np.mean([np.mean([unit[t] @ unit[s] for s in cluster if s != t]) for cluster in taken])) for t in core
    ]


def test_figures_of_a_layer_are_the_naive_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    core, taken, embeddings = layer()
    taken[0, 1] = False
    taken[0, 1, :5] = True  # too small to count
    found = proximity(core, taken, embeddings, SETTINGS)
    for j in (0, 3):
        clusters = [[int(core[j, c]) for c in range(100) if taken[j, p, c]] for p in range(5)]
        clusters = [c for c in clusters if len(c) >= 6]
        assert found.n_counted[j] == len(clusters) == (4 if j == 0 else 5)
        values = naive(core[j].tolist(), clusters, embeddings.double().numpy())
        assert found.dimensional[j].numpy() == pytest.approx(values, abs=1e-10)
        assert found.scores.difference[j] == pytest.approx(np.mean(values[:10]) - np.mean(values[-10:]), abs=1e-10)
        deciles = np.reshape(values, (10, 10))
        assert found.scores.deciles[j].numpy() == pytest.approx(deciles.mean(1), abs=1e-10)
        assert found.scores.h[j] == pytest.approx(stats.kruskal(*deciles).statistic, abs=1e-6)
        tau = stats.kendalltau(-np.arange(10), deciles.mean(1)).statistic
        assert found.scores.tau[j] == pytest.approx(tau, abs=1e-12)
        assert found.reason[j] is None
        assert found.rank[j] == len(clusters)
        assert found.condition[j] >= 1
    monkeypatch.setattr(stage, "_CHUNK", 1)
    again = proximity(core, taken, embeddings, SETTINGS)
    assert torch.equal(again.dimensional, found.dimensional)
    for a, b in zip(again.scores[:5], found.scores[:5], strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)), "chunks change nothing"


def test_ragged_neurons_are_scored_by_what_they_have() -> None:
    core, taken, embeddings = layer()
    whole = proximity(core, taken, embeddings, SETTINGS)
    core[1, 63:] = -1
    taken[1, :, 63:] = False
    taken[1, :, :6] = True
    core[2, 15:] = -1
    taken[2, :, 15:] = False
    taken[2, :, :6] = True
    core[3, 8:] = -1
    taken[3, :, 8:] = False
    taken[3, :, :6] = True
    found = proximity(core, taken, embeddings, SETTINGS)
    clusters = [[int(core[1, c]) for c in range(63) if taken[1, p, c]] for p in range(5)]
    values = naive(core[1, :63].tolist(), clusters, embeddings.double().numpy())
    assert found.dimensional[1, :63].numpy() == pytest.approx(values, abs=1e-10)
    assert found.dimensional[1, 63:].isnan().all()
    assert found.scores.difference[1] == pytest.approx(np.mean(values[:10]) - np.mean(values[-10:]), abs=1e-10)
    assert found.reason[[0, 1]].tolist() == [None, None]
    assert found.reason[[2, 3]].tolist() == ["fewer than 20 core-tokens"] * 2
    assert found.scores.difference[[2, 3]].isnan().all()
    assert not found.scores.tau[2].isnan(), "15 tokens make deciles"
    assert found.scores.tau[3].isnan(), "8 do not"
    assert torch.equal(found.dimensional[0], whole.dimensional[0])


def test_what_cannot_be_scored_says_why() -> None:
    core, taken, embeddings = layer()
    taken[0] = False
    taken[1, 2:] = False
    embeddings[core[2, 50]] = 0.0
    core[3] = -1
    taken[3] = False
    found = proximity(core, taken, embeddings, SETTINGS)
    assert found.reason[[0, 1, 3]].tolist() == ["fewer than 3 taken-clusters of 6 tokens or more"] * 3
    assert found.reason[2] == "the embedding of a core-token is zero or not finite"
    assert found.scores.difference[:4].isnan().all()
    assert (found.rank[[0, 1, 2, 3]] == -1).all()
    for j in (4, 5):
        has_it = bool((core[j] == core[2, 50]).any())
        assert (found.reason[j] is not None) == has_it == math.isnan(found.scores.difference[j])


def test_identical_embeddings_differ_by_nothing() -> None:
    core, taken, _ = layer()
    found = proximity(core, taken, torch.ones(300, 4), SETTINGS)
    assert (found.scores.difference == 0).all()
    assert found.scores.p.isnan().all()
    assert found.scores.tau.isnan().all()
    assert found.scores.first.isnan().all()
    assert (found.rank == 1).all()
    assert [r is None for r in found.reason] == [True] * 6


def test_fewer_tokens_than_core_tokens() -> None:
    core, taken, embeddings = layer(T=40, C=40)
    padded = torch.cat([core, torch.full((6, 60), -1)], 1)
    found = proximity(padded, torch.cat([taken, torch.zeros(6, 5, 60, dtype=torch.bool)], 2), embeddings, SETTINGS)
    plain = proximity(core, taken, embeddings, SETTINGS)
    assert torch.equal(found.scores.difference.nan_to_num(9), plain.scores.difference.nan_to_num(9))
    assert not plain.scores.difference.isnan().all()


def test_a_neuron_does_not_depend_on_its_layer_mates() -> None:
    core, taken, embeddings = layer()
    whole = proximity(core, taken, embeddings, SETTINGS)
    part = proximity(core[2:4], taken[2:4], embeddings, SETTINGS)
    for a, b in zip(whole.scores[:5], part.scores[:5], strict=True):
        assert torch.equal(a[2:4].nan_to_num(9.0), b.nan_to_num(9.0))


def test_centred_embeddings_have_no_mean() -> None:
    _, _, embeddings = layer()
    assert centred(embeddings + 3).mean(0).abs().max() < 1e-6
