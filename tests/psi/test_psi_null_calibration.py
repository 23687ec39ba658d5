"""The proof of calibration: sets that are drawn as the null says get p-values that are super-uniform.

Fresh sets come from other seeds, or are null neurons, and go through the same code as neurons. All is decided by seeds,
so that these tests pass or fail alike everywhere.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from psi.samples import column, concepts, science, space_of, unit
from scipy import stats

from polyray.config import Science
from polyray.kernels import cluster as kmeans
from polyray.kernels import random
from polyray.psi import cluster
from polyray.psi.calibrate import POOLED, calibrated, nulls
from polyray.psi.cluster import score
from polyray.psi.draw import draw, null_neurons, rotation_draws, shuffle_text
from polyray.psi.space import Space

pytestmark = pytest.mark.usefixtures("one_thread")

N = 24
B = 250
M = 250
LAYER = 5
KS = (2, 3, 4)
LEVELS = (0.05, 0.1, 0.2, 0.5)


class World(NamedTuple):
    """A pool, its null draws by kind, and fresh sets by kind: null neurons, and draws of another seed."""

    chosen: Science
    data: Space
    draws: dict[str, pa.Table]
    null_neurons: dict[str, pa.Table]
    other_seed: dict[str, pa.Table]


@pytest.fixture(scope="module")
def world() -> World:
    chosen = science(calibrate={"B": B})
    x, label, prompts = concepts(600, 15, d=16, noise=0.7, n_prompts=60)
    data = space_of(x, label, prompts)
    other = chosen.model_copy(update={"seed": 12345})
    kinds = POOLED.values()
    labels = np.zeros((M, N), dtype=np.int64)
    draws = {kind: draw(kind, N, range(B), LAYER, chosen, data) for kind in kinds}
    beside = {kind: null_neurons(kind, np.arange(M), N, labels, LAYER, chosen, data) for kind in kinds}
    # A sweep's label permutations are one sample that all its sets share, and whose error moves all of them alike:
    # the fresh sets have to share it too.
    with pytest.MonkeyPatch.context() as patch:
        known = cluster.label_permutations
        patch.setattr(cluster, "label_permutations", lambda _, n, B: known(chosen.seed, n, B))
        fresh = {kind: draw(kind, N, range(M), LAYER, other, data) for kind in kinds}
    return World(chosen, data, draws, beside, fresh)


def naive_p(raw: NDArray[np.float64], null: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([(1 + (null >= r - 1e-9).sum()) / (len(null) + 1) for r in raw])


def error(level: float, n_draws: int, n_fresh: int) -> float:
    """Four standard deviations of a rejection rate: both the draws and the fresh sets are samples."""
    return 4 * float(np.sqrt(level * (1 - level) * (1 / n_draws + 1 / n_fresh)))


def assert_calibrated(
    raw: NDArray[np.float64], null: NDArray[np.float64], p: NDArray[np.float64] | None = None
) -> None:
    """Super-uniform p, and raw scores of one distribution."""
    p = naive_p(raw, null) if p is None else p
    for level in LEVELS:
        rate = float((p <= level).mean())
        assert rate <= level + error(level, len(null), len(raw)), (level, rate)
    assert stats.ks_2samp(raw, null).pvalue > 0.01


@pytest.mark.parametrize("score_name", ["S", "Q_z", "D"])
def test_fresh_sets_of_another_seed(world: World, score_name: str) -> None:
    """Of the pool alone: another seed's one_concept sets lie around many of the same anchors, and would be the same."""
    null = column(world.draws["pool"], score_name)
    assert len(set(null)) > 100
    assert_calibrated(column(world.other_seed["pool"], score_name), null)


@pytest.mark.parametrize(("preset", "kind"), POOLED.items())
def test_null_neurons_under_the_preset_that_draws_as_they_do(world: World, preset: str, kind: str) -> None:
    """Through `calibrated`: S and Q are exchangeable with the draws, and the conjunctive p is super-uniform."""
    fresh = world.null_neurons[kind]
    assert len(fresh) == M
    found = calibrated(fresh, nulls(world.draws[kind]), world.chosen)
    assert_calibrated(column(fresh, "S"), column(world.draws[kind], "S"), found[f"{preset}_S_p"])
    Q_z = (column(fresh, "Q") - column(fresh, "Q_mean")) / column(fresh, "Q_std")
    assert_calibrated(Q_z, column(world.draws[kind], "Q_z"), found[f"{preset}_Q_p"])
    assert_calibrated(column(fresh, "D"), column(world.draws[kind], "D"), found[f"{preset}_D_p"])
    np.testing.assert_allclose(found[f"{preset}_S_p"], naive_p(column(fresh, "S"), column(world.draws[kind], "S")))
    for level in LEVELS:
        rate = float((found[f"{preset}_p"] <= level).mean())
        assert rate <= level, (level, rate)
    z = np.stack([found[f"{preset}_{c}_z"] for c in "SQD"])
    assert np.abs(z.mean(1)).max() < 4 * np.sqrt(2 / M)
    assert np.abs(z.std(1) - 1).max() < 0.25


def test_a_null_of_another_question_is_no_null_of_this_one(world: World) -> None:
    """The tests above have power: sets of one concept are no pool sets, and the other way round."""
    pool, concept = (column(world.draws[kind], "S") for kind in ("pool", "one_concept"))
    assert stats.ks_2samp(pool, concept).pvalue < 1e-6
    assert stats.ks_2samp(*(column(world.draws[kind], "D") for kind in ("pool", "one_concept"))).pvalue < 1e-6


def test_random_directions_under_the_paper_s_null(world: World) -> None:
    """Haar directions with labels that say nothing: S is exchangeable with `rotation`, Q with its permutations."""
    chosen, data = world.chosen, world.data
    labels = np.random.default_rng(7).integers(0, 4, (M, N))
    fresh = null_neurons("rotation", np.arange(M), N, labels, LAYER, chosen, data)
    shared = pa.concat_tables(
        [rotation_draws(N, range(B), chosen, data.geometry.shape[1]), shuffle_text(chosen, data.similarity)]
    )
    found = calibrated(fresh, nulls(shared), chosen)
    assert_calibrated(column(fresh, "S"), column(shared, "S")[:B], found["paper_S_p"])
    for level in LEVELS:
        assert (found["paper_Q_p"] <= level).mean() <= level + error(level, B, M)
        assert (found["paper_p"] <= level).mean() <= level
    assert stats.kstest(found["paper_Q_z"], "norm").statistic < 0.15


def test_independently_drawn_sets_follow_the_pool_s_draws(world: World) -> None:
    """Sets that NumPy draws, scored alone, are of the draws' distribution."""
    chosen, data = world.chosen, world.data
    rng = np.random.default_rng(3)
    at = np.stack([rng.choice(len(data.pool), N, replace=False) for _ in range(M)])
    vectors = torch.from_numpy(unit(data.geometry[at]))
    y = torch.from_numpy(data.pool_label[at])
    r = score(kmeans.gram(vectors), data.pool_text[at], y, torch.arange(M), LAYER + 1, random.KMEANS_REAL, chosen, data)
    rows = world.draws["pool"]
    assert_calibrated(r.clustering.S.numpy(), column(rows, "S"))
    assert_calibrated(((r.Q - r.Q_mean) / r.Q_std).numpy(), column(rows, "Q_z"))
    assert_calibrated(r.D.numpy(), column(rows, "D"))


def concept_p(n_worlds: int, n_pool: int, n_draws: int) -> NDArray[np.float64]:
    """p of S of the null neurons of small worlds, which have half of the pool as anchors of draws."""
    found: list[Any] = []
    for seed in range(n_worlds):
        chosen = science(calibrate={"B": 2}, cluster={"k_range": [2, 3], "n_init": 1}, seed=seed)
        x, label, prompts = concepts(n_pool, 3, seed=seed, d=8)
        data = space_of(x, label, prompts)
        draws = draw("one_concept", 8, range(n_draws), LAYER, chosen, data)
        fresh = null_neurons(
            "one_concept", np.arange(n_pool // 2), 8, np.zeros((n_pool // 2, 8), dtype=np.int64), LAYER, chosen, data
        )
        found.append(calibrated(fresh, nulls(draws), chosen)["specific_S_p"])
    return np.concatenate(found)


def test_more_draws_than_anchors_make_no_smaller_p() -> None:
    p = concept_p(40, 20, 100)
    assert (p <= 0.02).mean() <= 0.02 + 4 * np.sqrt(0.02 * 0.98 / len(p))


def test_as_many_draws_as_anchors_are_calibrated() -> None:
    p = concept_p(40, 40, 20)
    for level in LEVELS:
        assert (p <= level).mean() <= level + error(level, 20 * 40, len(p)), level
