"""Label agreement and names against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from polyray.kernels.scores import name_clusters, name_distance, nmi, permuted_nmi


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
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(nmi(torch.from_numpy(b), torch.from_numpy(a)).numpy(), expected, atol=1e-10)


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
        torch.testing.assert_close(nmi(a[g : g + 1], b[g : g + 1]), whole[g : g + 1], atol=1e-14, rtol=0)


@pytest.mark.parametrize(("G", "n", "B"), [(2, 5, 3), (3, 40, 25), (4, 4, 4)])
def test_permuted_nmi_is_nmi_of_permuted_labels(G: int, n: int, B: int) -> None:
    rng = np.random.default_rng(G)
    clusters, labels = rng.integers(0, 3, (G, n)), rng.integers(0, 7, (G, n))
    labels[0] = 5
    clusters[1] = 2
    permutations = np.stack([rng.permutation(n) for _ in range(B)])
    got = permuted_nmi(torch.from_numpy(clusters), torch.from_numpy(labels), torch.from_numpy(permutations))
    assert got.dtype == torch.float64
    expected = np.array([[by_method(clusters[g], labels[g][p]) for p in permutations] for g in range(G)])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)
    assert (got[:2] == 0).all()


def test_the_identity_among_the_permutations_gives_nmi() -> None:
    rng = np.random.default_rng(5)
    a, b = torch.from_numpy(rng.integers(0, 3, (4, 30))), torch.from_numpy(rng.integers(0, 200, (4, 30)))
    got = permuted_nmi(a, b, torch.arange(30)[None])
    torch.testing.assert_close(got[:, 0], nmi(a, b), atol=1e-12, rtol=0)


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


def test_names_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(7)
    text = torch.from_numpy(unit(rng.standard_normal((5, 20, 8))))
    vocabulary = torch.from_numpy(unit(rng.standard_normal((30, 8))))
    labels = torch.from_numpy(rng.integers(0, 3, (5, 20)))
    index, cosine = name_clusters(text, labels, 3, vocabulary, 4)
    for g in range(5):
        alone, alone_cosine = name_clusters(text[g : g + 1], labels[g : g + 1], 3, vocabulary, 4)
        assert torch.equal(alone[0], index[g])
        torch.testing.assert_close(alone_cosine[0], cosine[g], atol=1e-12, rtol=0)


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
