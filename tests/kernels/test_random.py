"""Counter-based randomness: known answers, a plain-Python Philox, SciPy's tests, and no trace of batch or order."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from polyray.kernels.random import bits, directions, layer_word, normal, permutations, philox, tie_hash, uniform

MASK = 0xFFFFFFFF


def naive_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. 2011 write it, one counter at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & MASK, (first >> 32) ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([MASK] * 4, [MASK] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_random123s_known_answers(counter: list[int], key: list[int], answer: str) -> None:
    words = philox(torch.tensor(counter), torch.tensor(key))
    assert " ".join(f"{int(w):08x}" for w in words) == answer
    assert " ".join(f"{w:08x}" for w in naive_philox(counter, key)) == answer


def test_philox_equals_the_plain_one_over_broadcast_counters_and_keys() -> None:
    rng = np.random.default_rng(0)
    counter = torch.from_numpy(rng.integers(0, 2**32, (2, 3, 5, 4)))
    key = torch.from_numpy(rng.integers(0, 2**32, (3, 1, 2)))
    words = philox(counter, key)
    assert words.dtype == torch.int64
    assert words.shape == (2, 3, 5, 4)
    for i, j, m in itertools.product(range(2), range(3), range(5)):
        assert words[i, j, m].tolist() == naive_philox(counter[i, j, m].tolist(), key[j, 0].tolist())


@pytest.mark.parametrize("draw", [bits, uniform, normal])
def test_a_value_is_a_function_of_its_counters_alone(draw) -> None:
    a, b = torch.arange(2)[:, None, None] + 7, torch.arange(3)[:, None] + 1000
    c, d = torch.arange(5) + 3, 2**32 - 1
    batch = draw(11, 4, a, b, c, d)
    assert batch.shape == (2, 3, 5)
    for i, j, m in itertools.product(range(2), range(3), range(5)):
        alone = draw(11, 4, 7 + i, 1000 + j, 3 + m, d)
        assert alone.shape == ()
        assert batch[i, j, m].item() == alone.item()

    index = torch.arange(1001)
    order = torch.from_numpy(np.random.default_rng(1).permutation(1001))
    straight = draw(11, 4, index)
    assert torch.equal(draw(11, 4, index[order]), straight[order])
    assert torch.equal(torch.cat([draw(11, 4, index[:13]), draw(11, 4, index[13:])]), straight)
    assert torch.equal(draw(11, 4, index[::7]), straight[::7])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = normal(0, 0, torch.arange(10))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(normal(0, 0, torch.arange(10)), first)


def test_every_seed_stream_and_word_matters() -> None:
    base = (3, 5, 7, 11, 13, 17)
    others = [tuple(v + (i == j) for j, v in enumerate(base)) for i in range(len(base))]
    swapped = [(5, 3, 7, 11, 13, 17), (3, 5, 11, 7, 13, 17)]
    values = {uniform(*args).item() for args in [base, *others, *swapped]}
    assert len(values) == 9


def test_bits_are_32_and_each_is_fair() -> None:
    n = 100_000
    words = bits(1, 2, torch.arange(n))
    assert words.dtype == torch.int64
    assert words.min() >= 0
    assert words.max() < 2**32
    ones = np.array([((words >> b) & 1).sum().item() for b in range(32)])
    p = stats.binomtest(int(ones[np.abs(ones - n / 2).argmax()]), n).pvalue
    assert p * 32 > 1e-3


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 9)])
def test_uniform_and_normal_have_their_distributions(seed: int, stream: int) -> None:
    n = 100_000
    u = uniform(seed, stream, torch.arange(n))
    x = normal(seed, stream, torch.arange(n))
    assert u.dtype == x.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    assert torch.isfinite(x).all()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 4):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 4 / n**0.5


def test_neighbouring_seeds_streams_and_words_are_uncorrelated() -> None:
    n = 50_000
    i = torch.arange(n)
    columns = [normal(0, 0, i), normal(1, 0, i), normal(0, 1, i), normal(0, 0, i, 1), normal(0, 0, 1, i)]
    r = np.corrcoef(np.stack([c.numpy() for c in columns]))
    off = r[~np.eye(len(columns), dtype=bool)]
    assert np.abs(off).max() < 4.5 / n**0.5


def test_normals_of_a_long_vector_point_everywhere() -> None:
    x = normal(4, 2, torch.arange(2000)[:, None], torch.arange(8)).numpy()
    covariance = np.cov(x.T)
    assert np.abs(covariance - np.eye(8)).max() < 5 * (2 / 2000) ** 0.5
    assert np.abs(x.mean(0)).max() < 4.5 / 2000**0.5


@pytest.mark.parametrize("d", [2, 3, 5, 64])
def test_directions_are_haar(d: int) -> None:
    """Any coordinate squared, and any squared cosine of two of them, is Beta(1/2, (d − 1)/2) with a fair sign."""
    x = directions(0, 30, torch.arange(200), 10, d).double().numpy()
    assert x.shape == (200, 10, d)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-6)
    law = stats.beta(0.5, (d - 1) / 2)
    cosines = np.einsum("gd,gd->g", x[:, 0], x[:, 1])
    for sample in [x[:, :, 0].ravel(), x[:, :, d - 1].ravel(), cosines, (x[:-1, 2] * x[1:, 2]).sum(-1)]:
        assert stats.kstest(np.clip(sample, -1, 1) ** 2, law.cdf).pvalue > 1e-3
        assert stats.binomtest(int((sample > 0).sum()), len(sample)).pvalue > 1e-3
    second = np.einsum("gnd,gne->de", x, x) / 2000
    assert np.abs(second - np.eye(d) / d).max() < 6 / 2000**0.5 / d**0.5


def test_directions_are_a_function_of_their_counters_alone() -> None:
    items = torch.tensor([4, 0, 900, 2**31])
    whole = directions(3, 5, items, 6, 10)
    assert whole.shape == (4, 6, 10)
    for g in range(4):
        assert torch.equal(directions(3, 5, items[g : g + 1], 6, 10)[0], whole[g])
    assert torch.equal(directions(3, 5, items.flip(0), 6, 10).flip(0), whole)
    assert torch.equal(directions(3, 5, items, 4, 10), whole[:, :4])
    others = [(4, 5, 0), (3, 6, 0), (3, 5, 1)]
    for seed, stream, word in others:
        assert not torch.isclose(directions(seed, stream, items, 6, 10, word), whole).all(-1).any()
    assert len({tuple(v) for v in whole.flatten(0, 1).tolist()}) == 24


def test_layer_words_are_words_of_the_name_alone() -> None:
    names = [f"layer{i}.{j}.conv{m}" for i in range(1, 5) for j in range(6) for m in range(1, 4)]
    words = [layer_word(name) for name in names]
    assert all(isinstance(w, int) and 0 <= w < 2**32 for w in words)
    assert len(set(words)) == len(names)
    assert [layer_word(name) for name in reversed(names)] == words[::-1]


@pytest.mark.parametrize(("n", "B"), [(2, 3), (5, 2), (4, 4), (1, 3), (100, 50)])
def test_permutations_are_permutations(n: int, B: int) -> None:
    rows = permutations(0, 1, n, B, 3)
    assert rows.shape == (B, n)
    assert rows.dtype == torch.int64
    assert torch.equal(rows.sort(1).values, torch.arange(n).expand(B, n))


def test_permutation_b_does_not_depend_on_how_many_are_drawn() -> None:
    many = permutations(5, 1, 30, 200, 9)
    assert torch.equal(permutations(5, 1, 30, 7, 9), many[:7])
    assert torch.equal(permutations(5, 1, 30, 200, 9), many)
    assert not torch.equal(permutations(5, 1, 30, 200, 10), many)
    assert not torch.equal(permutations(6, 1, 30, 200, 9), many)
    assert len({tuple(r) for r in many.tolist()}) == 200


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_permutation_is_equally_likely(n: int) -> None:
    rows = permutations(2, 6, n, 6000)
    counts = {p: 0 for p in itertools.permutations(range(n))}
    for row in rows.tolist():
        counts[tuple(row)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_places_of_long_permutations_are_uniform() -> None:
    rows = permutations(3, 6, 50, 4000)
    table = np.stack([np.bincount(rows[:, place], minlength=50) for place in range(50)])
    chi2 = ((table - 80) ** 2 / 80).sum()
    p = stats.chi2.cdf(chi2, 49 * 49)
    assert 1e-3 < p < 1 - 1e-3


@pytest.mark.parametrize(("seed", "layer", "neuron"), [(0, 0, 0), (0, 0, 1), (7, 3, 2047), (2**32 - 1, 40, 22_719)])
def test_tie_hash_is_a_bijection_of_the_example(seed: int, layer: int, neuron: int) -> None:
    hashed = tie_hash(seed, layer, torch.tensor(neuron), torch.arange(50_001))
    assert hashed.dtype == torch.int64
    assert hashed.min() >= 0
    assert hashed.max() < 2**32
    assert hashed.unique().numel() == 50_001
    assert stats.kstest(hashed.double().numpy() / 2**32, "uniform").pvalue > 1e-3

    far = tie_hash(seed, layer, torch.tensor(neuron), torch.arange(2**31 - 20_001, 2**31 - 1))
    assert torch.cat([hashed, far]).unique().numel() == 70_001


def test_tie_hash_is_the_same_in_every_shape() -> None:
    neurons, examples = torch.tensor([4, 0, 9]), torch.tensor([10, 2, 77, 5, 100_000])
    batch = tie_hash(1, 2, neurons[:, None], examples)
    assert batch.shape == (3, 5)
    for i, j in itertools.product(range(3), range(5)):
        assert tie_hash(1, 2, neurons[i], examples[j]).item() == batch[i, j].item()
    flat = tie_hash(1, 2, neurons.repeat_interleave(5), examples.repeat(3))
    assert torch.equal(flat, batch.flatten())


@pytest.mark.parametrize("what", ["seed", "layer", "neuron"])
def test_tie_orders_of_neighbours_are_unrelated(what: str) -> None:
    """The m smallest of n under two hashes overlap as two random subsets do, and whole orders do not correlate."""
    n, m, n_orders = 3000, 150, 60
    examples = torch.arange(n)
    orders = []
    for i in range(n_orders):
        key = {"seed": 0, "layer": 0, "neuron": 0, what: i}
        orders.append(tie_hash(key["seed"], key["layer"], torch.tensor(key["neuron"]), examples).numpy())
    ranks = np.stack(orders).argsort(1).argsort(1)
    kept = (ranks < m).astype(float)
    pairs = np.triu_indices(n_orders, 1)
    overlap = (kept @ kept.T)[pairs]
    law = stats.hypergeom(n, m, m)
    assert abs(overlap.mean() - law.mean()) < 5 * law.std() / len(overlap) ** 0.5
    assert 0.8 < overlap.var() / law.var() < 1.25
    r = np.corrcoef(ranks)[pairs]
    assert np.abs(r).max() < 5 / n**0.5
