"""Top examples and histograms against a sort in plain Python."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from polyray.kernels.random import tie_hash
from polyray.kernels.topk import BIN_EDGES, histogram, top_examples

SEED, LAYER = 3, 8


def naive_top(
    responses: torch.Tensor, positions: torch.Tensor, examples: torch.Tensor, n_keep: int, neurons: torch.Tensor
) -> list[tuple[list[int], list[float], list[int], int]]:
    """Per neuron: examples, responses, positions of the kept, and how many left out equal the last kept."""
    rows = []
    for c, neuron in enumerate(neurons):
        own = examples if examples.ndim == 1 else examples[:, c]
        hashes = tie_hash(SEED, LAYER, neuron, own.clamp(min=0)).tolist()
        ranked = sorted(
            (-r, h, example, position)
            for r, h, example, position in zip(
                responses[:, c].tolist(), hashes, own.tolist(), positions[:, c].tolist(), strict=True
            )
            if math.isfinite(r) and example >= 0
        )
        kept, left = ranked[:n_keep], ranked[n_keep:]
        n_equal = sum(row[0] == kept[-1][0] for row in left) if kept else 0
        rows.append(([k[2] for k in kept], [-k[0] for k in kept], [k[3] for k in kept], n_equal))
    return rows


def check_top(responses: torch.Tensor, n_keep: int, examples: torch.Tensor | None = None, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    N, C = responses.shape
    positions = torch.from_numpy(rng.integers(0, 49, (N, C)))
    if examples is None:
        examples = torch.from_numpy(rng.permutation(10 * N)[:N])
    neurons = torch.from_numpy(rng.permutation(5 * C)[:C])
    top = top_examples(responses, positions, examples, n_keep, SEED, LAYER, neurons)
    m = min(n_keep, N)
    assert top.example.shape == top.response.shape == top.position.shape == (C, m)
    assert top.n_equal_cut.shape == (C,)
    for c, (example, response, position, n_equal) in enumerate(
        naive_top(responses, positions, examples, n_keep, neurons)
    ):
        n = len(example)
        assert top.example[c].tolist() == example + [-1] * (m - n)
        assert top.response[c, :n].tolist() == response
        assert top.response[c, n:].isnan().all()
        assert top.position[c].tolist() == position + [-1] * (m - n)
        assert top.n_equal_cut[c].item() == n_equal


def normals(N: int, C: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((N, C))).float()


@pytest.mark.parametrize(("N", "C", "n_keep"), [(5, 3, 2), (40, 2, 7), (6, 6, 6), (300, 5, 40), (1, 3, 1), (40, 3, 1)])
def test_top_examples_without_ties(N: int, C: int, n_keep: int) -> None:
    check_top(normals(N, C), n_keep)


@pytest.mark.parametrize("decimals", [0, 1])
@pytest.mark.parametrize("n_keep", [1, 20, 100])
def test_top_examples_with_heavy_ties(decimals: int, n_keep: int) -> None:
    check_top(torch.round(normals(200, 7), decimals=decimals), n_keep)


def test_top_examples_of_edge_neurons() -> None:
    N = 60
    dead = torch.zeros(N)
    constant = torch.full((N,), -2.5)
    once = torch.zeros(N)
    once[17] = 3.0
    negative = -normals(N, 1)[:, 0].abs() - 1
    saturated = normals(N, 1, 1)[:, 0].clamp(max=-0.2)
    signed_zeros = torch.where(torch.arange(N) % 2 == 0, 0.0, -0.0)
    tiny = torch.where(torch.arange(N) % 3 == 0, 1e-40, 0.0)
    huge = torch.where(torch.arange(N) % 3 == 0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min)
    columns = [dead, constant, once, negative, saturated, signed_zeros, tiny, huge]
    for n_keep in (1, 9, 60):
        check_top(torch.stack(columns, 1), n_keep)


def test_more_asked_than_there_are() -> None:
    check_top(torch.round(normals(5, 3)), 9)


def test_nonfinite_responses_are_never_kept() -> None:
    x = torch.round(normals(30, 6), decimals=1)
    x[::3, 0] = math.nan
    x[::2, 1] = math.inf
    x[1::2, 2] = -math.inf
    x[:27, 3] = math.nan
    x[:, 4] = math.nan
    x[:10, 5], x[10:20, 5], x[20:29, 5] = math.inf, -math.inf, math.nan
    for n_keep in (1, 12, 16, 30, 40):
        check_top(x, n_keep)


def test_every_neuron_may_have_its_own_examples() -> None:
    rng = np.random.default_rng(4)
    x = torch.round(normals(50, 4), decimals=0)
    examples = torch.from_numpy(np.stack([rng.permutation(1000)[:50] for _ in range(4)], 1))
    examples[::3, 1] = -1
    examples[:, 2] = -1
    examples[7:, 3] = -1
    for n_keep in (1, 10, 40, 60):
        check_top(x, n_keep, examples)


def test_order_of_images_and_neurons_changes_nothing() -> None:
    x = torch.round(normals(80, 5), decimals=0)
    positions = torch.arange(80)[:, None] * 5 + torch.arange(5)
    examples, neurons = torch.arange(80) + 1000, torch.arange(5) + 40
    whole = top_examples(x, positions, examples, 12, SEED, LAYER, neurons)
    rows = torch.from_numpy(np.random.default_rng(2).permutation(80))
    columns = torch.tensor([3, 0, 4, 1, 2])
    mixed = top_examples(
        x[rows][:, columns], positions[rows][:, columns], examples[rows], 12, SEED, LAYER, neurons[columns]
    )
    for field in ("example", "response", "position", "n_equal_cut"):
        assert torch.equal(getattr(mixed, field), getattr(whole, field)[columns]), field
    alone = top_examples(x[:, 2:3], positions[:, 2:3], examples, 12, SEED, LAYER, neurons[2:3])
    assert torch.equal(alone.example[0], whole.example[2])


def test_top_of_the_parts_tops_is_the_top_of_the_whole() -> None:
    C, n_keep = 3, 25
    x = torch.round(normals(90, C), decimals=0)
    x[4:70, 2] = math.nan
    positions = torch.arange(90)[:, None] * C + torch.arange(C)
    examples, neurons = torch.arange(90), torch.tensor([6, 0, 11])
    whole = top_examples(x, positions, examples, n_keep, SEED, LAYER, neurons)
    parts = [
        top_examples(x[s], positions[s], examples[s], n_keep, SEED, LAYER, neurons)
        for s in (slice(0, 40), slice(40, 50), slice(50, 90))
    ]
    merged = top_examples(
        torch.cat([p.response for p in parts], 1).T,
        torch.cat([p.position for p in parts], 1).T,
        torch.cat([p.example for p in parts], 1).T,
        n_keep,
        SEED,
        LAYER,
        neurons,
    )
    assert torch.equal(merged.example, whole.example)
    assert torch.equal(merged.position, whole.position)
    for c in range(C):
        outside = sum(p.n_equal_cut[c].item() for p in parts if p.response[c, -1] == whole.response[c, -1])
        assert merged.n_equal_cut[c].item() + outside == whole.n_equal_cut[c].item()


def test_other_seeds_layers_and_neurons_break_ties_otherwise() -> None:
    x, positions, examples = torch.zeros(500, 1), torch.zeros(500, 1, dtype=torch.int64), torch.arange(500)
    kept = [
        top_examples(x, positions, examples, 20, seed, layer, torch.tensor([neuron])).example[0].tolist()
        for seed, layer, neuron in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({tuple(k) for k in kept}) == 4
    for k in kept:
        assert len(set(k)) == 20


def test_saturated_neurons_of_a_class_sorted_folder_keep_every_class() -> None:
    """Kept per class is hypergeometric: the chi-square per neuron, scaled for sampling without replacement."""
    n_classes, per_class, n_keep, C = 20, 50, 100, 200
    N = n_classes * per_class
    x = torch.full((N, C), 6.0)
    top = top_examples(x, torch.zeros(N, C, dtype=torch.int64), torch.arange(N), n_keep, 0, 0, torch.arange(C))
    assert (top.n_equal_cut == N - n_keep).all()
    counts = np.stack([np.bincount(row // per_class, minlength=n_classes) for row in top.example.numpy()])
    expected = n_keep / n_classes
    chi2 = ((counts - expected) ** 2 / expected).sum(1) * (N - 1) / (N - n_keep)
    assert 1e-3 < stats.chi2.cdf(chi2.sum(), C * (n_classes - 1)) < 1 - 1e-3
    assert stats.kstest(chi2, stats.chi2(n_classes - 1).cdf).pvalue > 1e-3
    total = counts.sum(0)
    assert stats.chisquare(total).pvalue > 1e-3
    ranked_first = top.example[:, 0].numpy() // per_class
    assert stats.chisquare(np.bincount(ranked_first, minlength=n_classes)).pvalue > 1e-3


def test_bin_edges_ascend() -> None:
    edges = torch.as_tensor(BIN_EDGES)
    assert edges.dtype == torch.float64
    assert (edges.diff() > 0).all()
    assert torch.isfinite(edges).all()


def test_histogram_counts_every_finite_value_in_its_bin() -> None:
    edges = torch.as_tensor(BIN_EDGES).numpy()
    rng = np.random.default_rng(0)
    N, C = 500, 5
    x = rng.standard_normal((N, C)) * np.array([1e-3, 0.1, 1.0, 30.0, 1e6])
    x = x.astype(np.float32)
    x[::7, 1], x[::5, 2], x[::3, 3] = np.nan, np.inf, -np.inf
    x[:, 4] = np.where(np.isin(x[:, 4], edges), 1.7, x[:, 4])
    counts = histogram(torch.from_numpy(x))
    assert counts.dtype == torch.int64
    assert counts.shape == (C, len(edges) + 1)
    for c in range(C):
        finite = x[np.isfinite(x[:, c]), c].astype(np.float64)
        expected = np.bincount(np.searchsorted(edges, finite), minlength=len(edges) + 1)
        assert counts[c].tolist() == expected.tolist()


def test_histogram_reaches_both_open_ends_and_edges_fall_on_one_side() -> None:
    edges = torch.as_tensor(BIN_EDGES)
    ends = torch.stack([edges[:1] - 1e3 - edges[:1].abs(), edges[-1:] + 1e3 + edges[-1:].abs()], 1)
    counts = histogram(ends.double())
    assert counts[0, 0] == 1
    assert counts[1, -1] == 1
    assert counts.sum() == 2

    on_edge = histogram(edges[None, :])
    assert (on_edge.sum(1) == 1).all()
    bins = on_edge.argmax(1)
    i = torch.arange(len(edges))
    assert torch.equal(bins, i) or torch.equal(bins, i + 1)
    assert histogram(torch.full((3, 2), math.nan)).sum() == 0
