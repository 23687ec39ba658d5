"""Taken-clusters against sets, and their p against SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from polyray.categorical.overlap import all_sizes, overlap, qualify


def cores(N: int, C: int, T: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(T, generator=g)[:C] for _ in range(N)])


def test_taken_clusters_are_intersections(monkeypatch: pytest.MonkeyPatch) -> None:
    core, before = cores(5, 20, 60, 0), cores(7, 20, 60, 1)
    core[2, 15:] = -1
    before[3, 12:] = -1
    precursors = torch.tensor([[0, 1, 3], [3, 2, -1], [6, 3, 5], [-1, -1, -1], [4, 0, 1]])
    found = overlap(core, before, precursors, 60)
    for j in range(5):
        for p in range(3):
            i = int(precursors[j, p])
            theirs = set(before[i].tolist()) - {-1} if i >= 0 else set()
            assert found.taken[j, p].tolist() == [t in theirs for t in core[j].tolist()]
            if i < 0:
                assert found.p[j, p].isnan()
                continue
            n, K = int((core[j] >= 0).sum()), len(theirs)
            k = len(theirs & set(core[j].tolist()))
            assert found.size[j, p] == k
            assert found.p[j, p] == pytest.approx(stats.hypergeom.sf(k - 1, 60, K, n), abs=1e-12)
    sizes = all_sizes(core, before, 60)
    assert sizes.shape == (5, 7)
    assert [sizes[0, 0], sizes[2, 3]] == [int(found.size[0, 0]), int(found.size[2, 1])]
    monkeypatch.setattr("polyray.categorical.overlap._CHUNK", 61)
    assert torch.equal(overlap(core, before, precursors, 60).taken, found.taken)


def test_p_is_super_uniform_for_random_sets() -> None:
    n = 400
    p = overlap(cores(n, 30, 100, 0), cores(n, 30, 100, 1), torch.arange(n)[:, None], 100).p[:, 0].numpy()
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) <= level + 3 * np.sqrt(level * (1 - level) / n)
    assert p.min() < 0.05


def test_equal_cores_overlap_wholly_and_all_tokens_are_no_surprise() -> None:
    core = cores(2, 10, 10, 0)
    found = overlap(core, core, torch.tensor([[0], [1]]), 10)
    assert found.taken.all()
    assert found.p.tolist() == [[1.0], [1.0]]


def test_no_layer_before() -> None:
    found = overlap(cores(2, 10, 30, 0), torch.zeros(0, 10, dtype=torch.int64), torch.full((2, 3), -1), 30)
    assert not found.taken.any()
    assert found.p.isnan().all()
    assert not qualify(found.size)[1].any()


def test_qualifying_takes_three_clusters_of_six() -> None:
    counted, enough = qualify(torch.tensor([[6, 6, 6, 0], [5, 6, 60, 5], [0, 0, 0, 0]]))
    assert counted.tolist() == [[True, True, True, False], [False, True, True, False], [False] * 4]
    assert enough.tolist() == [True, False, False]
    assert qualify(torch.tensor([[3, 4]]), min_tokens=3, min_clusters=2)[1].all()
