"""Cluster: S against scikit-learn's silhouette, Q against its NMI, D and names against loops over prompts."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from psi.samples import concepts, images_of, science, space_of, unit
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from polyray import columns
from polyray.config import Science
from polyray.kernels import cluster as kmeans
from polyray.kernels import random
from polyray.psi import cluster, space
from polyray.psi.cluster import Clustered, Examples, cluster_neurons, label_permutations, n_used, score, sizes
from polyray.psi.space import Space

pytestmark = pytest.mark.usefixtures("one_thread")

KS = (2, 3, 4)
N = 24


def naive_names(text: NDArray[np.float64], assigned: NDArray[np.int64], prompts: NDArray[np.float64]) -> list[int]:
    """The prompt nearest to the mean of each cluster's text-aligned vectors."""
    return [int((prompts @ unit(text[assigned == c].mean(0))).argmax()) for c in range(assigned.max() + 1)]


def naive_distance(names: list[int], prompts: NDArray[np.float64]) -> float:
    """Mean over pairs of clusters of 1 − cosine between their names."""
    return float(np.mean([1 - prompts[a] @ prompts[b] for a, b in itertools.combinations(names, 2)]))


@pytest.fixture(scope="module")
def world() -> tuple[Science, Space, NDArray[np.float64], NDArray[np.int64]]:
    """Vectors of 150 patches in a space of their own for text, and their labels."""
    x, label, prompts = concepts(150, 6)
    text = x[:, :7] + 0.3 * np.random.default_rng(5).normal(size=(150, 7))
    return science(), space_of(x, label, prompts[:, :7], text), x, label


def random_sets(n_sets: int, seed: int = 0) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(150, N, replace=False) for _ in range(n_sets)])


def scored(world: Any, at: NDArray[np.int64], labels: NDArray[np.int64] | None = None) -> cluster.Scored:
    chosen, data, _, label = world
    y = torch.from_numpy(label[at] if labels is None else labels)
    gram = kmeans.gram(data.geometry_of(at))
    return score(gram, data.text_of(at), y, torch.arange(len(at)), 7, random.KMEANS_REAL, chosen, data)


def test_scores_of_a_set_are_those_of_scikit_learn_and_of_loops(world: Any) -> None:
    chosen, data, _, label = world
    at = random_sets(12)
    found = scored(world, at)
    prompts = data.vocabulary.numpy().astype(np.float64)
    permutations = label_permutations(chosen.seed, N, chosen.calibrate.B).numpy()
    assert len(permutations) == 60
    assert (np.sort(permutations, axis=1) == np.arange(N)).all()
    for g, rows in enumerate(at):
        x, text = (unit(v[rows]) for v in (data.geometry, data.text))
        by_k = [found.clustering.labels_by_k[g, i].numpy() for i in range(len(KS))]
        assert [len(set(a)) for a in by_k] == list(KS)
        silhouettes = [silhouette_score(x, a) for a in by_k]
        best = int(np.argmax(silhouettes))
        kept = found.clustering.labels[g].numpy()
        assert int(found.clustering.k[g]) == KS[best]
        assert np.array_equal(kept, by_k[best])
        assert float(found.clustering.S[g]) == pytest.approx(silhouettes[best], abs=1e-6)

        y = label[rows]
        Q = normalized_mutual_info_score(y, kept, average_method="arithmetic")
        a, b = (np.repeat(np.arange(c.max() + 1), np.sort(np.bincount(c))[::-1]) for c in (kept, y))
        null = np.array([normalized_mutual_info_score(a, b[p], average_method="arithmetic") for p in permutations])
        assert float(found.Q[g]) == pytest.approx(Q, abs=1e-9)
        assert float(found.Q_mean[g]) == pytest.approx(null.mean(), abs=1e-9)
        assert float(found.Q_std[g]) == pytest.approx(null.std(), abs=1e-9)
        assert float(found.Q_p[g]) == pytest.approx((1 + (null >= Q - 1e-9).sum()) / (len(null) + 1))

        distance = naive_distance(naive_names(text, kept, prompts), prompts)
        assert float(found.D[g]) == pytest.approx(distance, abs=1e-6)
    assert len(set(found.clustering.k.tolist())) > 1, "every set kept the same k: the choice was not tried"


def test_labels_that_all_agree_say_nothing(world: Any) -> None:
    found = scored(world, random_sets(2), np.full((2, N), 3))
    for value, expected in ((found.Q, 0.0), (found.Q_mean, 0.0), (found.Q_std, 0.0), (found.Q_p, 1.0)):
        assert value.tolist() == [expected] * 2


def test_one_rotation_of_all_vectors_changes_no_score(world: Any) -> None:
    """A common rotation keeps every distance, so it is no null of S."""
    chosen, data, x, label = world
    at = random_sets(3)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(x.shape[1],) * 2))[0]
    vectors = torch.from_numpy(unit(x)[at])
    turned = vectors @ torch.from_numpy(rotation)
    item, y, text = torch.arange(3), torch.from_numpy(label[at]), data.text_of(at)
    a, b = (score(kmeans.gram(v), text, y, item, 7, random.KMEANS_REAL, chosen, data) for v in (vectors, turned))
    assert torch.equal(a.clustering.labels, b.clustering.labels)
    torch.testing.assert_close(a.clustering.S, b.clustering.S, atol=1e-12, rtol=0)
    torch.testing.assert_close(a.D, b.D, atol=0, rtol=0)


@given(K=st.integers(4, 300), k_min=st.integers(4, 300), n=st.integers(0, 400))
def test_sizes_of_example_sets(K: int, k_min: int, n: int) -> None:
    k_min = min(k_min, K)
    offered = sizes(K, k_min)
    assert (offered[0], offered[-1]) == (K, k_min)
    assert all(a > b for a, b in itertools.pairwise(offered))
    assert all(b >= 0.8 * a - 1 for a, b in itertools.pairwise(offered)), "at most a fifth is lost"
    used = n_used(n, K, k_min)
    fitting = [s for s in offered if s <= n]
    assert used == (max(fitting) if fitting else None)
    assert (used is None) == (n < k_min)


def tables(
    ids: NDArray[np.int64], geometry: NDArray[np.float64], text: NDArray[np.float64] | None, missing: list[int]
) -> pa.Table:
    """Rows of `embeddings`; patches at the places named have no vector."""

    def listed(vectors: NDArray[np.float64]) -> list[Any]:
        return [None if i in missing else v.astype(np.float16).tolist() for i, v in enumerate(vectors)]

    half = pa.list_(pa.float16())
    return columns.table(
        "embeddings",
        {
            "patch_id": ids,
            "geometry": pa.array(listed(geometry), half),
            "text": pa.nulls(len(ids), half) if text is None else pa.array(listed(text), half),
        },
    )


def pool_rows(ids: list[int], examples: list[int], labels: list[str]) -> pa.Table:
    n = len(ids)
    return columns.table(
        "pool",
        {
            "pool_idx": np.arange(n),
            "example": examples,
            "neuron": [0] * n,
            "position": [0] * n,
            "label": labels,
            "patch_id": ids,
        },
    )


def vocabulary_rows(vectors: NDArray[np.float64]) -> pa.Table:
    return columns.table(
        "vocabulary",
        {
            "prompt_idx": np.arange(len(vectors)),
            "prompt": [f"p{i}" for i in range(len(vectors))],
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        },
    )


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("same_space", [False, True])
def test_a_space_gathers_what_a_layer_needs(standardise: bool, same_space: bool) -> None:
    rng = np.random.default_rng(3)
    ids = 5 + 3 * np.arange(20)
    geometry = 4 + rng.normal(size=(20, 5)) * np.array([1, 10, 0.1, 3, 0])
    text = None if same_space else rng.normal(size=(20, 2))
    geometry[11] = 0.0  # no direction
    missing = [2, 7]
    parts = [tables(ids[a:b], geometry[a:b], text if text is None else text[a:b], []) for a, b in ((0, 2),)]
    parts.append(tables(ids[2:15], geometry[2:15], text if text is None else text[2:15], [0, 5]))
    parts.append(tables(ids[15:], geometry[15:], text if text is None else text[15:], []))
    wanted_at = [0, 2, 3, 4, 7, 8, 9, 11, 13, 16, 18]
    pool_at = [3, 7, 9, 11, 13, 18]
    labels = [f"class {i % 4}" for i in range(20)]
    images = images_of(labels)
    data = space.space(
        iter([parts[2], parts[0], parts[1]]),
        ids[wanted_at],
        pool_rows(ids[pool_at].tolist(), pool_at, [labels[i] for i in pool_at]),
        vocabulary_rows(unit(rng.normal(size=(6, 5 if same_space else 2)))),
        images,
        standardise,
    )
    assert data.ids.tolist() == ids[wanted_at].tolist()
    assert [i for i, good in zip(wanted_at, data.good, strict=True) if not good] == [*missing, 11]
    kept = [i for i in pool_at if i not in (*missing, 11)]
    assert data.ids[data.pool].tolist() == ids[kept].tolist()
    assert [images.labels[c] for c in data.pool_label] == [labels[i] for i in kept]

    half = geometry.astype(np.float16).astype(np.float64)
    centre, scale = np.zeros(5), np.ones(5)
    if standardise:
        centre, scale = half[kept].mean(0), half[kept].std(0)
        scale[4] = 1.0  # a constant coordinate stays where it is
    usable = [i for i in wanted_at if data.good[data.rows(ids[[i]])[0]]]
    expected = unit((half[usable] - centre) / scale)
    np.testing.assert_allclose(data.geometry_of(data.rows(ids[usable])).numpy(), expected, atol=2e-5)
    aligned = unit(half[usable]) if text is None else unit(text[usable].astype(np.float16))
    np.testing.assert_allclose(data.text_of(data.rows(ids[usable])).numpy(), aligned, atol=1e-5)
    of_pool = unit((half[kept] - centre) / scale)
    everywhere = torch.arange(len(of_pool))
    np.testing.assert_allclose(data.pool_similarity(everywhere).numpy(), of_pool @ of_pool.T, atol=1e-5)
    np.testing.assert_allclose(data.gram_of(everywhere[None])[0].numpy(), of_pool @ of_pool.T, atol=1e-5)

    others = space.with_vectors(data, iter(parts[::-1]), ids[[1, 2, 4, 5, 17]])
    assert others.good.tolist() == [True, False, True, True, True]
    expected = unit((half[[1, 4, 5, 17]] - centre) / scale)
    np.testing.assert_allclose(others.geometry_of(others.rows(ids[[1, 4, 5, 17]])).numpy(), expected, atol=2e-5)
    both = ids[[4]]
    for of in (data, others):
        assert of.geometry_of(of.rows(both)).equal(data.geometry_of(data.rows(both)))
        assert of.text_of(of.rows(both)).equal(data.text_of(data.rows(both)))
    assert len(others.pool) == len(others.pool_label) == 0


def examples_of(neuron: int, rows: NDArray[np.int64], label: NDArray[np.int64], chosen: Science) -> Examples:
    """Examples whose patch is row i of the space and whose rank is their place."""
    m = chosen.mine
    return Examples(neuron, np.arange(len(rows)), rows, label[rows], n_used(len(rows), m.K, m.k_min))


@pytest.fixture(scope="module")
def several(world: Any) -> tuple[list[Examples], Clustered]:
    """Neurons of 30, 24, 20, 12 and 11 examples, one of equal vectors, and what clustering makes of them."""
    chosen, data, _, label = world
    rng = np.random.default_rng(8)
    neurons = [
        examples_of(n, rng.choice(150, size, replace=False), label, chosen)
        for n, size in ((3, 30), (0, 24), (8, 20), (5, 12), (6, 11), (17, 30), (2, 26))
    ]
    neurons.append(examples_of(11, np.full(24, 4), label, chosen))
    images = images_of([f"c{i}" for i in label])
    return neurons, cluster_neurons(neurons, "layer", chosen, images, data)


def test_every_neuron_gets_its_row(world: Any, several: Any) -> None:
    _, data, _, label = world
    neurons, found = several
    rows = {r["neuron"]: r for r in found.scores.to_pylist()}
    assert sorted(rows) == sorted(e.neuron for e in neurons)
    assert (rows[6]["status"], rows[6]["S"]) == ("excluded", None)
    assert rows[6]["reason"].startswith("too few examples: 11 of at least 12")
    assert (rows[11]["status"], rows[11]["reason"].split(":")[0]) == ("excluded", "identical examples")
    assert {rows[n]["n_used"] for n in (3, 0, 17, 2)} == {24}
    assert (rows[8]["n_used"], rows[5]["n_used"]) == (19, 12)
    for e in neurons:
        row = rows[e.neuron]
        if row["status"] != "ok":
            assert all(row[c] is None for c in ("n_used", "n_labels", "S", "k", "Q", "Q_mean", "Q_std", "Q_p", "D"))
            continue
        n = row["n_used"]
        used, assigned = e.rows[:n], found.cluster_of[e.neuron]
        assert assigned.shape == (len(e.rows),)
        assert (assigned[n:] == -1).all(), "examples beyond those clustered belong to no cluster"
        x, text = (unit(v[used]) for v in (data.geometry, data.text))
        assert row["S"] == pytest.approx(silhouette_score(x, assigned[:n]), abs=1e-6)
        assert row["k"] == len(set(assigned[:n]))
        assert row["Q"] == pytest.approx(normalized_mutual_info_score(label[used], assigned[:n]), abs=1e-9)
        prompts = data.vocabulary.numpy().astype(np.float64)
        assert row["D"] == pytest.approx(naive_distance(naive_names(text, assigned[:n], prompts), prompts), abs=1e-6)
        assert row["n_labels"] == len(set(label[used]))


def test_clusters_are_described(world: Any, several: Any) -> None:
    _, data, _, label = world
    neurons, found = several
    prompts = data.vocabulary.numpy().astype(np.float64)
    listed = found.clusters.to_pylist()
    assert {r["neuron"] for r in listed} == set(found.cluster_of) == {0, 2, 3, 5, 8, 17}
    for e in neurons:
        if e.neuron not in found.cluster_of:
            continue
        rows = [r for r in listed if r["neuron"] == e.neuron]
        assigned = found.cluster_of[e.neuron]
        n = int((assigned >= 0).sum())
        x, text = (unit(v[e.rows[:n]]) for v in (data.geometry, data.text))
        assert [r["cluster"] for r in rows] == list(range(assigned.max() + 1))
        assert all(a["size"] >= b["size"] for a, b in itertools.pairwise(rows))
        assert sum(r["size"] for r in rows) == n
        for r in rows:
            members = np.flatnonzero(assigned == r["cluster"])
            assert r["size"] == len(members)
            cosines = prompts @ unit(text[members].mean(0))
            nearest = np.argsort(-cosines)[:5]
            assert r["names"] == [data.prompts[i] for i in nearest]
            assert r["name"] == r["names"][0]
            assert r["name_score"] == pytest.approx(cosines.max(), abs=1e-6)
            counts = Counter(f"c{label[i]}" for i in e.rows[members])
            assert counts[r["label"]] == max(counts.values())
            assert r["label_frac"] == pytest.approx(max(counts.values()) / len(members))
            distance = np.linalg.norm(x[members] - x[members].mean(0), axis=1)
            near = members[np.argsort(distance)][:4]
            assert r["prototypes"] == data.ids[e.rows[near]].tolist()
            assert r["thumbnails"] is None


def test_examples_without_a_vector_leave_a_gap(world: Any) -> None:
    """Ranks 1 and 4 have no vector: the next ones take their place, and they belong to no cluster."""
    chosen, data, _, label = world
    rows = np.arange(40, 68)
    rank = np.delete(np.arange(30), [1, 4])
    e = Examples(9, rank, rows, label[rows], n_used(28, 24, 12))
    found = cluster_neurons([e], "layer", chosen, images_of([f"c{i}" for i in label]), data)
    assigned = found.cluster_of[9]
    assert found.scores["n_used"].to_pylist() == [24]
    assert np.flatnonzero(assigned >= 0).tolist() == rank[:24].tolist()
    whole = cluster_neurons(
        [examples_of(9, rows[:24], label, chosen)], "layer", chosen, images_of([f"c{i}" for i in label]), data
    )
    assert found.scores.equals(whole.scores)


def rows_of(rows: pa.Table, neuron: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [r for r in rows.to_pylist() if r["neuron"] == neuron]
    for r in found:
        if r.get("Q_std") is not None:
            # torch.std of one row sums in another order than of several.
            r["Q_std"] = pytest.approx(r["Q_std"], rel=1e-12)
    return found


def test_a_neuron_s_rows_do_not_depend_on_its_company(world: Any, several: Any) -> None:
    chosen, data, _, label = world
    neurons, found = several
    images = images_of([f"c{i}" for i in label])
    rng = np.random.default_rng(4)
    company = [examples_of(100 + i, rng.choice(150, 24, replace=False), label, chosen) for i in range(20)]
    crowd = cluster_neurons([*company, *reversed(neurons)], "layer", chosen, images, data)
    for e in neurons:
        alone = cluster_neurons([e], "layer", chosen, images, data)
        for other in (found, crowd):
            assert rows_of(other.scores, e.neuron) == alone.scores.to_pylist()
            assert rows_of(other.clusters, e.neuron) == alone.clusters.to_pylist()


def test_three_things_are_found_whatever_the_layer_s_name(world: Any) -> None:
    """Restarts are counted by layer, neuron and seed; scores of well separated sets do not hang on them."""
    chosen, _, _, _ = world
    rng = np.random.default_rng(0)
    x = np.repeat(np.eye(3, 12), 8, axis=0) + 0.01 * rng.normal(size=(24, 12))
    label = np.repeat([0, 1, 2], 8)
    data = space_of(x, label, np.eye(12))
    images = images_of(["a", "b", "c"] * 8)
    rows = [
        cluster_neurons([examples_of(1, np.arange(24), label, chosen)], layer, chosen, images, data).scores
        for layer in ("one", "two")
    ]
    assert rows[0].equals(rows[1])
    row = rows[0].to_pylist()[0]
    assert row["k"] == 3
    assert row["Q"] == pytest.approx(1.0)
    assert row["D"] == pytest.approx(1.0), "the three names are orthogonal"
    assert row["S"] > 0.9
