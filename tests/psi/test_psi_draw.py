"""Draw: who is drawn, how often, and whether a draw is scored as a neuron is."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from psi.samples import column, concepts, science, space_of, unit
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from polyray.config import Science
from polyray.kernels import cluster as kmeans
from polyray.kernels import random
from polyray.psi import draw as stage
from polyray.psi.cluster import Scored, label_permutations, score
from polyray.psi.draw import draw, null_neurons, permuted_draws, rotation_draws, shuffle_text
from polyray.psi.space import Space

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = 11
N = 24
POOLED = ["pool", "one_concept"]


@pytest.fixture(scope="module")
def world() -> tuple[Science, Space]:
    """A pool of 130 patches with a space of their own for text, and 20 patches that are not of the pool."""
    x, label, prompts = concepts(150, 6)
    text = x[:, :7] + 0.3 * np.random.default_rng(5).normal(size=(150, 7))
    return science(), space_of(x, label, prompts[:, :7], text, n_pool=130)


class Watched:
    """Stands in for `score` and remembers every set that goes through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.labels: list[NDArray[np.int64]] = []
        self.text: list[NDArray[np.float32]] = []
        self.grams: list[NDArray[np.float64]] = []
        self.streams: set[int] = set()
        monkeypatch.setattr(stage, "score", self)

    def __call__(
        self,
        gram: Any,
        text: Any,
        labels: Any,
        item: Any,
        layer: int,
        stream: int,
        chosen: Science,
        data: Space,
        with_p: bool = True,
    ) -> Scored:
        self.grams += list(gram.numpy())
        self.text += list(text.numpy())
        self.labels += list(labels.numpy())
        self.streams.add(stream)
        return score(gram, text, labels, item, layer, stream, chosen, data, with_p)

    def members(self, data: Space) -> list[list[int]]:
        """Which pool patches each set holds, known by their text vectors."""
        known = {v.tobytes(): i for i, v in enumerate(data.pool_text.numpy())}
        return [[known[v.tobytes()] for v in t] for t in self.text]


def no_labels(n_neurons: int) -> NDArray[np.int64]:
    return np.zeros((n_neurons, N), dtype=np.int64)


@pytest.mark.parametrize("kind", POOLED)
def test_a_draw_is_scored_as_a_neuron_is(world: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    watched = Watched(monkeypatch)
    rows = draw(kind, N, range(3, 22), LAYER, chosen, data).to_pylist()
    assert [r["draw"] for r in rows] == list(range(3, 22))
    prompts = data.vocabulary.numpy().astype(np.float64)
    permutations = label_permutations(chosen.seed, N, chosen.calibrate.B).numpy()
    for row, members in zip(rows, watched.members(data), strict=True):
        assert (row["kind"], row["n_used"], len(set(members))) == (kind, N, N)
        x, text = (unit(v[members]) for v in (data.geometry, data.text))
        y = data.pool_label[members]
        item = torch.tensor([row["draw"]])
        again = kmeans.cluster(
            torch.from_numpy(x)[None], (2, 4), 4, 50, chosen.seed, item, random.KMEANS_DRAW[kind], LAYER
        )
        by_k = again.labels_by_k[0].numpy()
        silhouettes = [silhouette_score(x, a) for a in by_k]
        kept = by_k[int(np.argmax(silhouettes))]
        assert row["S"] == pytest.approx(max(silhouettes), abs=1e-6)
        assert row["k"] == kept.max() + 1
        Q = normalized_mutual_info_score(y, kept)
        a, b = (np.repeat(np.arange(c.max() + 1), np.sort(np.bincount(c))[::-1]) for c in (kept, y))
        null = np.array([normalized_mutual_info_score(a, b[p]) for p in permutations])
        assert row["Q"] == pytest.approx(Q, abs=1e-9)
        assert row["Q_z"] == pytest.approx(0 if null.std() < 1e-6 else (Q - null.mean()) / null.std(), abs=1e-6)
        names = [int((prompts @ unit(text[kept == c].mean(0))).argmax()) for c in range(row["k"])]
        pairs = [1 - prompts[a] @ prompts[b] for a, b in itertools.combinations(names, 2)]
        assert row["D"] == pytest.approx(np.mean(pairs), abs=1e-6)


@pytest.mark.parametrize("kind", POOLED)
def test_ranges_of_draws_change_no_draw(world: Any, kind: str) -> None:
    chosen, data = world
    whole = draw(kind, N, range(0, 40), LAYER, chosen, data)
    parts = [draw(kind, N, r, LAYER, chosen, data) for r in (range(0, 5), range(5, 23), range(23, 40))]
    joined = pa.concat_tables(parts)
    exact = ["kind", "n_used", "draw", "S", "k", "Q", "D"]
    assert joined.select(exact).equals(whole.select(exact))
    np.testing.assert_allclose(column(joined, "Q_z"), column(whole, "Q_z"), rtol=1e-9, atol=1e-12)


def test_pool_draws_are_distinct_and_uniform(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    watched = Watched(monkeypatch)
    n_draws = 600
    draw("pool", N, range(n_draws), LAYER, chosen, data)
    members = watched.members(data)
    assert all(len(set(m)) == N for m in members)
    n_pool = len(data.pool)
    times = np.bincount(np.concatenate(members), minlength=n_pool)
    assert len(times) == n_pool, "nothing from outside the pool"
    # Within a draw nothing repeats, so counts vary less than a multinomial's: by (n_pool − N)/(n_pool − 1).
    statistic = ((times - times.mean()) ** 2 / times.mean()).sum() * (n_pool - 1) / (n_pool - N)
    assert 0.001 < stats.chi2(n_pool - 1).sf(statistic) < 0.999
    # Pairs are together as often as independent draws would have them.
    half = np.zeros((n_draws, n_pool))
    half[np.arange(n_draws)[:, None], members] = 1
    together = (half.T @ half)[np.triu_indices(n_pool, 1)]
    expected = n_draws * N * (N - 1) / (n_pool * (n_pool - 1))
    assert together.mean() == pytest.approx(expected)
    assert together.var() == pytest.approx(expected, rel=0.15), "Poisson, or nearly so"


def nearest(data: Space, anchor: int, n: int) -> set[int]:
    x = unit(data.geometry[data.pool])
    return set(np.argsort(np.linalg.norm(x - x[anchor], axis=1), kind="stable")[:n].tolist())


def test_concept_draws_are_the_neighbours_of_a_patch(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    n_pool = len(data.pool)
    watched = Watched(monkeypatch)
    draw("one_concept", N, range(65), LAYER, chosen, data)
    null_neurons("one_concept", np.arange(65), N, no_labels(65), LAYER, chosen, data)
    anchors = []
    for members in watched.members(data):
        assert set(members) == nearest(data, members[0], N), "a draw's first member is its anchor"
        assert len(set(members)) == N
        anchors.append(members[0])
    assert sorted(anchors[:65] + anchors[65:]) == list(range(n_pool)), "every patch is an anchor, of one side only"


def test_there_are_no_more_concept_draws_than_anchors(world: Any) -> None:
    chosen, data = world
    rows = draw("one_concept", N, range(60, 500), LAYER, chosen, data)
    assert rows["draw"].to_pylist() == list(range(60, 65)), "half of the pool's 130 patches"
    assert len(draw("one_concept", N, range(65, 500), LAYER, chosen, data)) == 0
    assert len(draw("pool", N, range(65, 85), LAYER, chosen, data)) == 20


def test_anchors_are_drawn_uniformly(world: Any) -> None:
    _, data = world
    times = np.zeros(len(data.pool))
    n_seeds = 300
    for seed in range(n_seeds):
        at = stage.concept_draws(data, 4, torch.arange(20), seed, 0, LAYER)
        assert len(set(at[:, 0].tolist())) == 20
        times[at[:, 0].numpy()] += 1
    n_pool = len(times)
    statistic = ((times - times.mean()) ** 2 / times.mean()).sum() * (n_pool - 1) / (n_pool - 20)
    assert 0.001 < stats.chi2(n_pool - 1).sf(statistic) < 0.999


def silhouette_of_sklearn(x: NDArray[np.float64], seed: int) -> float:
    """The largest mean silhouette over k of scikit-learn's k-means."""
    found = [KMeans(k, n_init=4, random_state=seed).fit_predict(x) for k in (2, 3, 4)]
    return max(float(silhouette_score(x, a)) for a in found)


def test_rotation_draws_are_scores_of_random_directions() -> None:
    chosen, d, n_draws = science(), 6, 150
    rows = rotation_draws(N, range(n_draws), chosen, d)
    rng = np.random.default_rng(0)
    independent = [silhouette_of_sklearn(unit(rng.normal(size=(N, d))), i) for i in range(n_draws)]
    assert stats.ks_2samp(column(rows, "S"), independent).pvalue > 0.01
    assert {(r["kind"], r["n_used"], r["Q"], r["Q_z"], r["D"]) for r in rows.to_pylist()} == {
        ("rotation", N, None, None, None)
    }
    wider = column(rotation_draws(N, range(n_draws), chosen, 48), "S")
    assert stats.ks_2samp(column(rows, "S"), wider).pvalue < 1e-6, "it depends on the dimension"
    joined = pa.concat_tables([rotation_draws(N, r, chosen, d) for r in (range(0, 20), range(20, n_draws))])
    assert joined.equals(rows)


def test_permuted_draws_shuffle_each_vector_s_coordinates(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    seen: list[NDArray[np.float32]] = []
    known = stage.cluster.cluster

    def watched(vectors: torch.Tensor, *rest: Any) -> Any:
        seen.extend(vectors.numpy().copy())
        return known(vectors, *rest)

    monkeypatch.setattr(stage.cluster, "cluster", watched)
    rows = permuted_draws(N, range(0, 40), LAYER, chosen, data)
    pool = unit(data.geometry[data.pool])
    ordered = {tuple(np.sort(v).round(4)): i for i, v in enumerate(pool)}
    moved, together, members = [], [], []
    for x, row in zip(seen, rows.to_pylist(), strict=True):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
        at = [ordered[tuple(np.sort(v.astype(np.float64)).round(4))] for v in x]
        assert len(set(at)) == N, "distinct patches of the pool, their coordinates and no others"
        members += at
        place = np.argsort(np.argsort(x, 1), 1) - np.argsort(np.argsort(pool[at], 1), 1)
        moved.append((place != 0).mean())
        together.append((place == place[:1]).all(1).sum())
        assert row["S"] == pytest.approx(max(silhouettes_of_kmeans(x)), abs=0.1)
    assert np.mean(moved) == pytest.approx(1 - 1 / 12, abs=0.02)
    assert max(together) == 1, "no two vectors are permuted alike"
    assert set(members) == set(range(len(pool)))
    assert {(r["kind"], r["n_used"], r["Q"], r["Q_z"], r["D"]) for r in rows.to_pylist()} == {
        ("permute_dims", N, None, None, None)
    }
    assert rows["draw"].to_pylist() == list(range(40))
    joined = [permuted_draws(N, r, LAYER, chosen, data) for r in (range(0, 5), range(5, 40))]
    assert pa.concat_tables(joined).equals(rows)
    other = column(permuted_draws(N, range(40), LAYER + 1, chosen, data), "S")
    assert not np.isin(other, column(rows, "S")).any()
    few = dataclasses.replace(data, pool=data.pool[:23], pool_label=data.pool_label[:23])
    assert len(permuted_draws(N, range(5), LAYER, chosen, few)) == 0


def silhouettes_of_kmeans(x: NDArray[np.floating]) -> list[float]:
    """Mean silhouette at each k of scikit-learn's k-means."""
    labels = [KMeans(k, n_init=4, random_state=0).fit_predict(x) for k in (2, 3, 4)]
    return [float(silhouette_score(x, a)) for a in labels]


def test_shuffle_text_takes_distinct_prompts_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    n_prompts, B = 7, 2000
    names: list[NDArray[np.int64]] = []
    known = stage.scores.name_distance

    def watched(index: Any, similarity: Any) -> Any:
        names.append(index.numpy())
        return known(index, similarity)

    monkeypatch.setattr(stage.scores, "name_distance", watched)
    v = unit(np.random.default_rng(3).normal(size=(n_prompts, 5)))
    rows = shuffle_text(science(calibrate={"B": B}), torch.from_numpy(v @ v.T))
    assert [len(x) for x in names] == [B] * 3
    for k, drawn in zip((2, 3, 4), names, strict=True):
        of_k = rows.filter(pa.compute.equal(rows["k"], k)).to_pylist()
        assert [r["draw"] for r in of_k] == list(range(B))
        assert all(len(set(row)) == k for row in drawn.tolist())
        for row, chosen_names in zip(of_k[:200], drawn[:200], strict=True):
            pairs = [1 - v[a] @ v[b] for a, b in itertools.combinations(chosen_names, 2)]
            assert row["D"] == pytest.approx(np.mean(pairs))
        ordered = list(itertools.permutations(range(n_prompts), k))
        times = np.zeros(len(ordered))
        place = {p: i for i, p in enumerate(ordered)}
        for chosen_names in drawn.tolist():
            times[place[tuple(chosen_names)]] += 1
        assert stats.chisquare(times).pvalue > 0.001, "every ordered choice is as likely"
    assert {(r["n_used"], r["S"], r["Q"]) for r in rows.to_pylist()} == {(None, None, None)}


def test_more_clusters_than_prompts_have_no_draws() -> None:
    rows = shuffle_text(science(), torch.eye(3, dtype=torch.float64))
    assert set(rows["k"].to_pylist()) == {2, 3}


@pytest.mark.parametrize("kind", ["rotation", *POOLED])
def test_a_null_neuron_stands_beside_its_neuron(world: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    watched = Watched(monkeypatch)
    neurons = np.array([2, 3, 7, 31, *range(40, 60)])
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (len(neurons), 19))
    rows = null_neurons(kind, neurons, 19, labels, LAYER, chosen, data).to_pylist()
    assert [r["neuron"] for r in rows] == neurons.tolist()
    assert {(r["kind"], r["status"], r["n_used"]) for r in rows} == {(kind, "ok", 19)}
    assert {len(g) for g in watched.grams} == {19}
    if kind == "rotation":
        assert np.array_equal(watched.labels, labels), "the labels are the neuron's own"
    for row, seen in zip(rows, watched.labels, strict=True):
        assert row["n_labels"] == len(set(seen.tolist()))
    alone = null_neurons(kind, neurons[3:4], 19, labels[3:4], LAYER, chosen, data).to_pylist()[0]
    expected = rows[3] | {"Q_std": pytest.approx(rows[3]["Q_std"], rel=1e-12)}
    assert alone == expected, "its score does not depend on its company"


def test_a_rotation_null_neuron_is_made_of_haar_directions(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    watched = Watched(monkeypatch)
    neurons = np.arange(60)
    null_neurons("rotation", neurons, N, no_labels(60), LAYER, chosen, data)
    grams, text = np.array(watched.grams), np.array(watched.text)
    np.testing.assert_allclose(grams[:, np.arange(N), np.arange(N)], 1.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1.0, atol=1e-6)
    above = np.triu_indices(N, 1)
    for d, cosine in ((12, grams[:, *above]), (7, (text @ text.transpose(0, 2, 1))[:, *above])):
        # The cosine of two Haar directions: (1 + c)/2 follows Beta((d − 1)/2, (d − 1)/2).
        expected = stats.beta((d - 1) / 2, (d - 1) / 2)
        assert stats.kstest((1 + cosine.ravel()[::7]) / 2, expected.cdf).pvalue > 0.001
    own = (text @ text.transpose(0, 2, 1))[:, *above].ravel()
    assert abs(np.corrcoef(grams[:, *above].ravel(), own)[0, 1]) < 0.03, "geometry and text are drawn apart"

    same = dataclasses.replace(data, text=None, vocabulary=torch.from_numpy(unit(np.eye(12, 12))).float())
    again = Watched(monkeypatch)
    null_neurons("rotation", neurons[:4], N, no_labels(4), LAYER, chosen, same)
    for gram, t in zip(again.grams, again.text, strict=True):
        np.testing.assert_allclose(t @ t.T, gram, atol=1e-6)


@pytest.mark.parametrize("kind", ["rotation", *POOLED])
def test_draws_null_neurons_layers_and_seeds_share_nothing(
    world: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, data = world
    other = chosen.model_copy(update={"seed": 1})
    found = {
        "draws": rotation_draws(N, range(20), chosen, 12)
        if kind == "rotation"
        else draw(kind, N, range(20), LAYER, chosen, data),
        "null neurons": null_neurons(kind, np.arange(20), N, no_labels(20), LAYER, chosen, data),
        "another layer": null_neurons(kind, np.arange(20), N, no_labels(20), LAYER + 1, chosen, data),
        "another seed": null_neurons(kind, np.arange(20), N, no_labels(20), LAYER, other, data),
    }
    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        same = np.isin(column(first, "S"), column(second, "S")).sum()
        # Two layers, or two seeds, may take the same of 130 anchors; the same seed and layer never does.
        allowed = 12 if kind == "one_concept" and {a, b} != {"draws", "null neurons"} else 0
        assert same <= allowed, (a, b)


def test_a_pool_smaller_than_the_set_gives_no_draws(world: Any) -> None:
    chosen, data = world
    few = dataclasses.replace(data, pool=data.pool[:23], pool_label=data.pool_label[:23])
    for kind in POOLED:
        assert len(draw(kind, N, range(5), LAYER, chosen, few)) == 0
        assert len(null_neurons(kind, np.arange(5), N, no_labels(5), LAYER, chosen, few)) == 0
    assert len(null_neurons("rotation", np.arange(5), N, no_labels(5), LAYER, chosen, few)) == 5


def test_each_one_concept_null_neuron_has_an_anchor_of_its_own(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = world
    n_anchors = len(data.pool) // 2
    neurons = np.arange(n_anchors - 3, n_anchors + 4)
    rows = null_neurons("one_concept", neurons, N, no_labels(len(neurons)), LAYER, chosen, data)
    assert rows["neuron"].to_pylist() == neurons[:3].tolist()
    # Places count, not indices: a selection of late neurons has null neurons too.
    watched = Watched(monkeypatch)
    moved = null_neurons("one_concept", neurons, N, no_labels(len(neurons)), LAYER, chosen, data, np.arange(7))
    assert moved["neuron"].to_pylist() == neurons.tolist()
    assert len({tuple(sorted(m)) for m in watched.members(data)}) == 7
