"""Label agreement and names against scikit-learn and plain loops."""

import itertools

import numpy as np
import pytest
import torch
from kernels.memory import peak_bytes
from scipy.spatial.distance import cosine
from sklearn.metrics import normalized_mutual_info_score

from polyray.kernels import scores
from polyray.kernels.scores import center_distance, name_clusters, name_distance, nmi, permuted_moments, permuted_nmi


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_method(a: np.ndarray, b: np.ndarray) -> float:
    """scikit-learn's, but 0 where a side has a single label, as the method defines Q."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return float(normalized_mutual_info_score(a, b, average_method="arithmetic"))


@pytest.mark.parametrize(
    ("G", "n", "n_a", "n_b"), [(2, 3, 2, 5), (5, 30, 6, 2), (4, 4, 4, 4), (6, 100, 6, 200), (3, 100, 5, 1000)]
)
def test_nmi_is_scikit_learns(G: int, n: int, n_a: int, n_b: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.integers(0, n_a, (G, n)), rng.integers(0, n_b, (G, n))
    got = nmi(torch.from_numpy(a), torch.from_numpy(b))
    assert got.dtype == torch.float64
    assert got.shape == (G,)
    expected = [by_method(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(nmi(torch.from_numpy(b), torch.from_numpy(a)).numpy(), expected, atol=1e-12)


def test_nmi_at_its_ends() -> None:
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    cases = [
        (a, a, 1.0),
        (a, torch.tensor([7, 7, 3, 3, 9, 9]), 1.0),
        (a, torch.tensor([0, 1, 0, 1, 0, 1]), 0.0),
        (a, torch.zeros(6, dtype=torch.int64), 0.0),
        (torch.ones(6, dtype=torch.int64), a, 0.0),
        (torch.zeros(6, dtype=torch.int64), torch.full((6,), 4), 0.0),
        (torch.arange(6), torch.arange(6).flip(0), 1.0),
    ]
    got = nmi(torch.stack([c[0] for c in cases]), torch.stack([c[1] for c in cases]))
    np.testing.assert_allclose(got.numpy(), [c[2] for c in cases], atol=1e-12)
    assert got[[3, 4, 5]].tolist() == [0.0, 0.0, 0.0]
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert nmi(nothing, nothing).tolist() == [0.0, 0.0]


def test_nmi_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(3)
    a, b = torch.from_numpy(rng.integers(0, 4, (6, 40))), torch.from_numpy(rng.integers(0, 9, (6, 40)))
    b[2] += 500
    whole = nmi(a, b)
    for g in range(6):
        assert torch.equal(nmi(a[g : g + 1], b[g : g + 1]), whole[g : g + 1])


def by_size(labels: np.ndarray) -> np.ndarray:
    """The labeling sorted into classes of descending size: the order in which `permuted_nmi` permutes."""
    sizes = np.sort(np.unique(labels, return_counts=True)[1])[::-1]
    return np.repeat(np.arange(len(sizes)), sizes)


def shuffles(rng: np.random.Generator, n: int, B: int) -> np.ndarray:
    return np.stack([rng.permutation(n) for _ in range(B)])


@pytest.mark.parametrize(("G", "n", "B"), [(2, 5, 3), (3, 40, 25), (4, 4, 4), (6, 100, 30), (2, 300, 12)])
def test_permuted_nmi_is_nmi_of_permuted_labels(G: int, n: int, B: int) -> None:
    rng = np.random.default_rng(G)
    clusters, labels = rng.integers(-1, 3, (G, n)), rng.integers(0, 3 + n // 2, (G, n)) * 1000
    labels[0] = 5
    clusters[1] = 2
    permutations = shuffles(rng, n, B)
    got = permuted_nmi(torch.from_numpy(clusters), torch.from_numpy(labels), torch.from_numpy(permutations))
    assert got.dtype == torch.float64
    expected = [[by_method(by_size(clusters[g]), by_size(labels[g])[p]) for p in permutations] for g in range(G)]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    assert (got[:2] == 0).all()


def test_over_all_permutations_it_is_the_distribution_of_the_labels_as_they_are() -> None:
    rng = np.random.default_rng(2)
    clusters, labels = rng.integers(0, 3, (3, 6)), rng.integers(0, 4, (3, 6))
    permutations = np.array(list(itertools.permutations(range(6))))
    got = permuted_nmi(torch.from_numpy(clusters), torch.from_numpy(labels), torch.from_numpy(permutations))
    for g in range(3):
        expected = nmi(torch.from_numpy(clusters[g]).expand(720, -1), torch.from_numpy(labels[g][permutations]))
        # The same tables of counts have the same NMI to the bit, so that ties are ties.
        assert torch.equal(got[g].sort().values, expected.sort().values)


def test_the_identity_among_the_permutations_gives_nmi_of_sorted_labelings() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 3, (4, 30)), rng.integers(0, 200, (4, 30))
    got = permuted_nmi(torch.from_numpy(a), torch.from_numpy(b), torch.arange(30)[None])
    ordered = (torch.from_numpy(np.stack([by_size(row) for row in side])) for side in (a, b))
    assert torch.equal(got[:, 0], nmi(*ordered))


def test_permuted_nmi_does_not_depend_on_batch_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    clusters = torch.from_numpy(np.stack([rng.integers(0, k, 60) for k in (2, 3, 6, 6, 1, 20)]))
    labels = torch.from_numpy(np.stack([rng.integers(0, k, 60) for k in (200, 2, 30, 1000, 5, 10)]))
    permutations = torch.from_numpy(shuffles(rng, 60, 157))
    whole, moments = permuted_nmi(clusters, labels, permutations), permuted_moments(clusters, labels, permutations)
    for g in range(6):
        one = slice(g, g + 1)
        assert torch.equal(permuted_nmi(clusters[one], labels[one], permutations), whole[one])
        alone = permuted_moments(clusters[one], labels[one], permutations)
        assert all(torch.equal(a, m[one]) for a, m in zip(alone, moments, strict=True))
    np.testing.assert_allclose(moments[0].numpy(), whole.numpy().mean(1), rtol=1e-12)
    np.testing.assert_allclose(moments[1].numpy(), whole.numpy().std(1), rtol=1e-9)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(scores, "TABLE_BYTES", 2 * 61 * 61 * 10)
    assert torch.equal(permuted_nmi(clusters, labels, permutations), whole)
    chunked = permuted_moments(clusters, labels, permutations)
    assert all(torch.equal(a, m) for a, m in zip(chunked, moments, strict=True))


@pytest.mark.parametrize(("n_clusters", "n_classes"), [(1, 1), (6, 20), (6, 200), (40, 40)])
def test_memory_stays_within_its_bounds(n_clusters: int, n_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(13)
    clusters = torch.from_numpy(rng.integers(0, n_clusters, (60, 100)))
    labels = torch.from_numpy(rng.integers(0, n_classes, (60, 100)))
    permutations = torch.from_numpy(shuffles(rng, 100, 400))
    monkeypatch.setattr(scores, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(scores, "TABLE_BYTES", 3 << 20)
    small = 60 * 100 * 8 * 12  # class sizes and what they are found with
    bound = (1 << 20) + (3 << 20) + small
    assert peak_bytes(lambda: permuted_nmi(clusters, labels, permutations)) < bound + 60 * 400 * 8
    assert peak_bytes(lambda: permuted_moments(clusters, labels, permutations)) < bound + (1 << 20)


def test_permutations_changed_in_place_are_not_taken_for_the_old_ones() -> None:
    rng = np.random.default_rng(12)
    clusters, labels = torch.from_numpy(rng.integers(0, 3, (1, 20))), torch.from_numpy(rng.integers(0, 4, (1, 20)))
    permutations = torch.from_numpy(shuffles(rng, 20, 9))
    first = permuted_nmi(clusters, labels, permutations)
    permutations.copy_(permutations.flip(0))
    assert torch.equal(permuted_nmi(clusters, labels, permutations), first.flip(1))


@pytest.mark.parametrize(("n", "B"), [(1, 4), (2, 1), (12, 1), (12, 0)])
def test_permuted_nmi_of_odd_inputs(n: int, B: int) -> None:
    """One label, as many labels as examples, both, a single permutation, and none."""
    rng = np.random.default_rng(n)
    sides = [np.zeros(n, dtype=int), np.arange(n), rng.integers(0, 2, n)]
    clusters, labels = (np.stack(x) for x in zip(*itertools.product(sides, sides), strict=True))
    permutations = np.stack([np.arange(n)] * B) if B else np.zeros((0, n), dtype=int)
    got = permuted_nmi(*(torch.from_numpy(x) for x in (clusters, labels, permutations)))
    expected = [[by_method(by_size(c), by_size(y)) for _ in range(B)] for c, y in zip(clusters, labels, strict=True)]
    np.testing.assert_allclose(got.numpy(), np.reshape(expected, (9, B)), atol=1e-12)
    mean, std = permuted_moments(*(torch.from_numpy(x) for x in (clusters, labels, permutations)))
    if B:
        np.testing.assert_allclose(mean.numpy(), got.numpy().mean(1), atol=1e-12)
        assert (std < 1e-12).all()
    else:
        assert mean.isnan().all()
        assert std.isnan().all()


def test_permuted_nmi_of_no_rows_and_of_rows_of_no_length() -> None:
    nothing = torch.zeros(0, 5, dtype=torch.int64)
    permutations = torch.arange(5)[None].expand(3, -1)
    assert permuted_nmi(nothing, nothing, permutations).shape == (0, 3)
    assert permuted_moments(nothing, nothing, permutations)[0].shape == (0,)
    short = torch.zeros(2, 0, dtype=torch.int64)
    assert permuted_nmi(short, short, torch.zeros(3, 0, dtype=torch.int64)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("G", "n", "t", "k", "V", "top"),
    [(2, 11, 5, 3, 7, 2), (3, 40, 16, 6, 50, 5), (4, 4, 4, 4, 4, 4), (1, 5, 3, 2, 9, 1)],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_name_clusters_finds_the_nearest_prompts(G: int, n: int, t: int, k: int, V: int, top: int, dtype: type) -> None:
    rng = np.random.default_rng(V)
    text = unit(rng.standard_normal((G, n, t))).astype(dtype)
    vocabulary = unit(rng.standard_normal((V, t))).astype(dtype)
    labels = rng.integers(0, k, (G, n))
    labels[0][labels[0] == k - 1] = 0
    index, cosine = name_clusters(
        torch.from_numpy(text), torch.from_numpy(labels), k, torch.from_numpy(vocabulary), top
    )
    assert index.shape == cosine.shape == (G, k, top)
    tolerance = 1e-10 if dtype is np.float64 else 1e-5
    for g in range(G):
        for c in range(k):
            members = text[g][labels[g] == c].astype(np.float64)
            if len(members) == 0:
                assert (index[g, c] == -1).all()
                assert cosine[g, c].isnan().all()
                continue
            mean = members.mean(0)
            cosines = vocabulary.astype(np.float64) @ mean / np.linalg.norm(mean)
            order = np.argsort(-cosines)[:top]
            assert index[g, c].tolist() == order.tolist()
            np.testing.assert_allclose(cosine[g, c].numpy(), cosines[order], atol=tolerance)
    assert (index[0, k - 1] == -1).all()


def test_negative_labels_belong_to_no_cluster_and_the_first_of_equal_prompts_wins() -> None:
    rng = np.random.default_rng(6)
    text = torch.from_numpy(unit(rng.standard_normal((1, 9, 4))))
    prompts = unit(rng.standard_normal((5, 4)))
    vocabulary = torch.from_numpy(np.concatenate([prompts, prompts]))
    labels = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1, -1]])
    index, cosine = name_clusters(text, labels, 3, vocabulary, 2)
    for c in range(2):
        mean = text[0, labels[0] == c].mean(0).numpy()
        best = int((prompts @ mean).argmax())
        assert index[0, c].tolist() == [best, best + 5]
        assert cosine[0, c].tolist() == pytest.approx([prompts[best] @ mean / np.linalg.norm(mean)] * 2)
    assert index[0, 2].tolist() == [-1, -1]
    assert cosine[0, 2].isnan().all()


@pytest.mark.parametrize("top", [1, 4])
@pytest.mark.parametrize(("G", "t", "V"), [(25, 8, 30), (9, 512, 203)])
def test_names_do_not_depend_on_the_batch(G: int, t: int, V: int, top: int) -> None:
    rng = np.random.default_rng(7)
    text = torch.from_numpy(unit(rng.standard_normal((G, 20, t))).astype(np.float32))
    vocabulary = torch.from_numpy(unit(rng.standard_normal((V, t))).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 3, (G, 20)))
    index, cosine = name_clusters(text, labels, 3, vocabulary, top)
    for g in range(G):
        alone, alone_cosine = name_clusters(text[g : g + 1], labels[g : g + 1], 3, vocabulary, top)
        assert torch.equal(alone[0], index[g])
        assert torch.equal(alone_cosine[0], cosine[g])


def test_names_without_prompts_or_sets_or_direction() -> None:
    text, labels = torch.ones(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    index, cosine = name_clusters(text, labels, 2, torch.zeros(0, 3))
    assert index.tolist() == [[[-1], [-1]]] * 2
    assert cosine.isnan().all()
    assert name_distance(index.squeeze(-1), torch.zeros(0, 0)).tolist() == [0.0, 0.0]
    assert [x.shape for x in name_clusters(text[:0], labels[:0], 2, torch.ones(4, 3))] == [(0, 2, 1)] * 2
    index, cosine = name_clusters(0 * text, labels, 1, torch.ones(4, 3))
    assert index.tolist() == [[[0]]] * 2
    assert cosine.tolist() == [[[0.0]]] * 2


@pytest.mark.parametrize(("G", "k", "V", "t"), [(2, 3, 5, 4), (6, 6, 6, 6), (20, 5, 40, 7)])
def test_name_distance_is_the_mean_over_pairs(G: int, k: int, V: int, t: int) -> None:
    rng = np.random.default_rng(G)
    vocabulary = unit(rng.standard_normal((V, t)))
    index = rng.integers(-1, V, (G, k))
    index[0] = [-1, *rng.permutation(V)[: k - 1]]
    got = name_distance(torch.from_numpy(index), torch.from_numpy(vocabulary @ vocabulary.T))
    assert got.dtype == torch.float64
    for g in range(G):
        names = [i for i in index[g] if i >= 0]
        pairs = [1 - vocabulary[a] @ vocabulary[b] for i, a in enumerate(names) for b in names[:i]]
        assert got[g].item() == pytest.approx(np.mean(pairs) if pairs else 0, abs=1e-12)


def test_name_distance_at_its_ends() -> None:
    vocabulary = torch.eye(3, dtype=torch.float64)
    vocabulary[2] = -vocabulary[0]
    index = torch.tensor([[0, 1, -1], [0, 0, 0], [0, 2, -1], [0, -1, -1], [-1, -1, -1], [-1, 1, 1], [0, 0, 1]])
    expected = [1, 0, 2, 0, 0, 0, 2 / 3]
    np.testing.assert_allclose(name_distance(index, vocabulary @ vocabulary.T).numpy(), expected, atol=1e-12)


def test_a_name_is_at_distance_0_from_itself_whatever_rounding_says() -> None:
    similarity = torch.full((3, 3), 0.25) + 0.7499999 * torch.eye(3)
    got = name_distance(torch.tensor([[1, 1, -1], [2, 2, 2], [0, 0, 1]]), similarity)
    assert got.dtype == torch.float64
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2].item() == pytest.approx(2 * 0.75 / 3, abs=1e-12)


def test_center_distance_is_the_cosine_between_centres() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, 9, 6)) + 0.5
    labels = rng.integers(0, 2, (4, 9))
    labels[1, :3] = 2  # belongs to neither
    found = center_distance(torch.from_numpy(x @ x.transpose(0, 2, 1)), torch.from_numpy(labels))
    for g in range(4):
        a, b = (x[g][labels[g] == c].mean(0) for c in (0, 1))
        assert float(found[g]) == pytest.approx(cosine(a, b), abs=1e-12)


def test_center_distance_of_one_cluster_or_a_zero_centre_is_nan() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    gram = (x @ x.T)[None].repeat(2, 1, 1)
    assert torch.isnan(center_distance(gram, torch.tensor([[0, 0, 0], [0, 0, 1]]))).tolist() == [True, True]
