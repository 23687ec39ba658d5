"""Shares, intervals and verdicts: hand-made layers, naive resamples, coverage."""

import math

import numpy as np
import pytest
import torch

from polyray.categorical import summary as stage
from polyray.categorical.controls import Control
from polyray.categorical.proximity import Proximity, Scores
from polyray.categorical.summary import (
    Figure,
    LayerScores,
    layer_diagnosis,
    neuron_diagnoses,
    neuron_groups,
    summarise,
    token_groups,
    verdict_of,
)
from polyray.kernels import random
from polyray.kernels.statistics import resample_counts, wilson


def scores(rng: np.random.Generator, shift: float, *shape: int) -> Scores:
    difference = torch.from_numpy(rng.normal(shift, 1, shape))
    deciles = torch.from_numpy(rng.normal(0, 1, (*shape, 10)) + shift * np.linspace(0.5, -0.5, 10))
    p, first = (torch.from_numpy(rng.uniform(size=shape)) for _ in range(2))
    return Scores(difference, p, p, deciles, p, first, p)


def layers(sizes: tuple[int, ...] = (30, 17), shift: float = 0.8, seed: int = 0) -> list[LayerScores]:
    rng = np.random.default_rng(seed)
    return [
        LayerScores(
            i + 1, torch.from_numpy(rng.integers(0, 9, n)), scores(rng, shift, n),
            {"order": Control("order", scores(rng, 0, 3, n), torch.from_numpy(rng.uniform(size=(3, n)) < 0.5))},
        )
        for i, n in enumerate(sizes)
    ]  # fmt: skip


def test_figures_are_means_over_neurons() -> None:
    some = layers()
    some[0].scores.difference[4] = math.nan
    rows = summarise(some, 0, 50)
    assert [(r.layer, r.condition) for r in rows] == [(1, "actual"), (1, "order"), (2, "actual"), (2, "order"),
                                                      (None, "actual"), (None, "order")]  # fmt: skip
    actual, order = rows[0], rows[1]
    d = some[0].scores.difference.numpy()
    known = ~np.isnan(d)
    assert actual.n == 29
    assert actual.positive.value == pytest.approx((d[known] > 0).mean())
    assert actual.wilson[1:] == wilson(int((d > 0).sum()), 29)
    assert actual.difference.value == pytest.approx(d[known].mean())
    assert actual.kruskal.value == pytest.approx(float((some[0].scores.p < 0.05).double().mean()))
    assert actual.first.value == pytest.approx(float(some[0].scores.first.mean()))
    assert actual.gap == (0, 0, 0)
    assert actual.verdict == ""
    share = (some[0].controls["order"].scores.difference > 0).double().mean(0).numpy()
    assert order.positive.value == pytest.approx(share.mean())
    assert order.gap.value == pytest.approx(((d > 0) - share)[known].mean())
    assert order.remaining.value == pytest.approx((share[known].mean() - 0.5) / ((d[known] > 0).mean() - 0.5))
    assert order.requalifying == pytest.approx(float(some[0].controls["order"].qualifies.double().mean()))
    pooled = rows[4]
    both = np.concatenate([d[known], some[1].scores.difference.numpy()])
    assert pooled.positive.value == pytest.approx((both > 0).mean())
    assert pooled.n == 29 + 17


def test_tau_is_of_pooled_deciles() -> None:
    some = layers((40,), shift=3.0)
    (actual, _), pooled = summarise(some, 0, 50)[:2], some[0].scores.deciles.mean(0)
    expected = np.mean(
        [float(pooled[i] > pooled[j]) - float(pooled[i] < pooled[j]) for i in range(10) for j in range(i + 1, 10)]
    )
    assert actual.tau.value == pytest.approx(expected)
    assert actual.tau.low <= actual.tau.value <= actual.tau.high


def test_intervals_are_those_of_naive_crossed_resamples() -> None:
    some = layers()
    row = summarise(some, 7, 60)[4]
    group = np.concatenate([x.group.numpy() for x in some])
    layer = np.repeat([0, 1], [30, 17])
    groups = np.unique(group)
    hit = np.concatenate([(x.scores.difference > 0).numpy() for x in some])
    times = resample_counts(len(groups), range(60), 7, random.PROXIMITY_BOOTSTRAP, 0, ()).numpy()
    layer_times = resample_counts(2, range(60), 7, random.PROXIMITY_BOOTSTRAP, 1, ()).numpy()
    shares = []
    for b in range(60):
        drawn = [
            hit[u]
            for u in range(47)
            for _ in range(int(times[b, np.searchsorted(groups, group[u])]) * int(layer_times[b, layer[u]]))
        ]
        shares.append(np.mean(drawn))
    assert row.positive[1:] == pytest.approx(np.quantile(shares, [0.025, 0.975]))


def simulated(rng: np.random.Generator, n_layers: int, n_groups: int, spread: float) -> list[LayerScores]:
    """Neurons whose token groups and layers have a say in the sign of their difference."""
    of_group, of_layer = rng.normal(0, spread, n_groups), rng.normal(0, spread, n_layers)
    out = []
    for i in range(n_layers):
        group = rng.integers(0, n_groups, 60)
        made = scores(rng, 0.5, 60)
        moved = made.difference + torch.from_numpy(of_group[group] + of_layer[i])
        out.append(LayerScores(i, torch.from_numpy(group), made._replace(difference=moved), {}))
    return out


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_the_interval_covers_where_layers_and_groups_matter(spread: float) -> None:
    rng = np.random.default_rng(0)
    # P(0.5 + two effects + noise > 0)
    truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(1 + 2 * spread**2) / math.sqrt(2)))
    hits = independent = 0
    for i in range(100):
        row = summarise(simulated(rng, 12, 24, spread), i, 200)[-1]
        hits += row.positive.low <= truth <= row.positive.high
        independent += row.wilson.low <= truth <= row.wilson.high
    assert hits >= 84
    if spread:
        assert independent < 60, "neurons are not independent, and Wilson's interval is too narrow"


def test_one_group_or_no_neuron_has_no_interval() -> None:
    some = layers((12,))
    some[0].group[:] = 3
    row = summarise(some, 0, 50)[0]
    assert not math.isnan(row.positive.value)
    assert math.isnan(row.positive.low)
    assert row.n_groups == 1
    assert layer_diagnosis(row) is None
    empty = summarise(layers((0, 20)), 0, 50)
    assert empty[0].n == 0
    assert math.isnan(empty[0].positive.value)
    assert math.isnan(empty[0].tau.value)
    assert math.isnan(empty[1].requalifying)
    assert empty[4].n == 20
    assert summarise([], 0) == []


def test_verdicts() -> None:
    def figure(low: float) -> Figure:
        return Figure(low + 0.1, low, low + 0.2)

    assert verdict_of(figure(0.6), figure(0.6)) == "kept"
    assert verdict_of(figure(0.6), figure(0.2)) == "gone"
    assert verdict_of(figure(0.6), figure(-1.0)) == "gone"
    assert verdict_of(figure(0.6), figure(0.4)) == "undecided"
    assert verdict_of(figure(0.4), figure(0.6)) == "no effect"
    assert verdict_of(figure(math.nan), figure(math.nan)) == "no effect"
    rows = summarise(layers((300,), shift=1.5), 0, 200)
    assert rows[1].verdict == "gone"
    assert abs(rows[1].remaining.value) < 0.2
    kept = layers((300,), shift=1.5)
    scored = kept[0].scores
    same = Scores(*(x[None] for x in scored))
    again = summarise(
        [LayerScores(1, kept[0].group, scored, {"same": Control("same", same, same.p[:, :] < 2)})], 0, 200
    )
    assert again[1].remaining == (1, 1, 1)
    assert again[1].verdict == "kept"


def test_layer_diagnosis() -> None:
    strong, weak = (summarise(layers((60,), shift), 0, 200)[0] for shift in (3.0, 0.0))
    assert layer_diagnosis(strong) is None
    assert layer_diagnosis(weak) == "correlation_absent"
    assert layer_diagnosis(weak._replace(layer=11)) == "correlation_absent_beyond_layer_10"
    assert layer_diagnosis(weak._replace(layer=10)) == "correlation_absent"


def test_neuron_diagnoses() -> None:
    rng = np.random.default_rng(0)
    made = scores(rng, 0, 4)._replace(first=torch.tensor([0.9, 0.3, math.nan, 0.8]).double())
    some = Proximity(
        made, torch.zeros(4, 9), torch.zeros(4, 5), torch.tensor([3, 2, -1, 2], dtype=torch.int32),
        torch.zeros(4), torch.tensor([3, 3, 2, 2]), np.full(4, None, dtype=object),
    )  # fmt: skip
    assert neuron_diagnoses(some) == [
        [], ["weak_first_component", "rank_deficient"], ["few_taken_clusters"], ["few_taken_clusters"],
    ]  # fmt: skip


def test_token_groups_are_the_clusters() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 400)
    embeddings = torch.from_numpy(rng.normal(0, 1, (5, 20))[truth] * 3 + rng.normal(0, 0.3, (400, 20)) + 7)
    found = token_groups(embeddings, 3, 12)
    assert found.shape == (400,)
    for g in found.unique().tolist():
        assert len(set(truth[found.numpy() == g])) == 1
    assert torch.equal(found, token_groups(embeddings, 3, 12))
    assert len(token_groups(embeddings[:4], 0, 64).unique()) <= 4
    embeddings[0] = math.nan
    assert token_groups(embeddings, 3, 12).shape == (400,)


def test_a_neuron_is_of_the_group_of_most_of_its_core_tokens() -> None:
    token_group = torch.tensor([0, 0, 1, 1, 1, 2])
    core = torch.tensor([[0, 1, 2, -1], [2, 3, 0, 5], [0, 2, -1, -1], [5, -1, -1, -1]])
    assert neuron_groups(core, token_group).tolist() == [0, 1, 0, 2]


def test_chance_differences_are_not_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    some = layers((10,))
    some[0].scores.difference[:] = 1e-13
    assert summarise(some, 0, 20)[0].positive.value == 0, "rounding is no difference"
    monkeypatch.setattr(stage.kernel, "TIE", 0.0)
    assert summarise(some, 0, 20)[0].positive.value == 1
