"""Sums by token against a loop over Python's integers; nothing may depend on order, batch or cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyray.kernels.tokens import ROOM, SCALE, accumulate, largest_value, means

LIMIT = largest_value(torch.tensor([100]))


def sample(n_rows: int, n_tokens: int, n_neurons: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, n_tokens, (n_rows,), generator=generator)
    return index, torch.randn(n_rows, n_neurons, generator=generator) * 10.0 ** torch.randint(-6, 4, (n_rows, 1))


def naive(index: torch.Tensor, values: torch.Tensor, n_tokens: int) -> torch.Tensor:
    sums = [[0] * values.shape[1] for _ in range(n_tokens)]
    for token, row in zip(index.tolist(), values.double().tolist(), strict=True):
        if token >= 0:
            for n, value in enumerate(row):
                sums[token][n] += round(value * SCALE)  # Python rounds halves to even too
    return torch.tensor(sums, dtype=torch.int64).reshape(n_tokens, values.shape[1])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
def test_sums_are_those_of_a_loop(n_rows: int, n_tokens: int, n_neurons: int, seed: int) -> None:
    index, values = sample(n_rows, n_tokens, n_neurons, seed)
    sums = torch.zeros(n_tokens, n_neurons, dtype=torch.int64)
    assert not accumulate(sums, index, values, LIMIT).any()
    assert torch.equal(sums, naive(index, values, n_tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_added_exactly(dtype: torch.dtype) -> None:
    index, values = sample(50, 4, 3, 0)
    values = values.clamp(-6e4, 6e4).to(dtype)
    sums = torch.zeros(4, 3, dtype=torch.int64)
    accumulate(sums, index, values, LIMIT)
    assert torch.equal(sums, naive(index, values, 4))


def test_no_order_batch_or_cut_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    index, values = sample(997, 13, 7, 3)
    whole = torch.zeros(13, 7, dtype=torch.int64)
    accumulate(whole, index, values, LIMIT)
    order = torch.randperm(997, generator=torch.Generator().manual_seed(1))
    in_parts, cut = torch.zeros_like(whole), torch.zeros_like(whole)
    for rows in order.split(61):
        accumulate(in_parts, index[rows], values[rows], LIMIT)
    monkeypatch.setattr("polyray.kernels.tokens._CHUNK", 30)
    accumulate(cut[:, :2], index, values[:, :2], LIMIT)
    accumulate(cut[:, 2:], index, values[:, 2:], LIMIT)
    assert torch.equal(in_parts, whole)
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, LIMIT * 1.01, -LIMIT * 1.01])
def test_a_value_that_cannot_be_added_costs_its_neuron_alone(bad: float) -> None:
    index, values = sample(40, 5, 6, 2)
    index[7] = 2
    want = naive(index, values, 5)
    values[7, 4] = bad
    sums = torch.zeros(5, 6, dtype=torch.int64)
    refused = accumulate(sums, index, values, LIMIT)
    assert refused.tolist() == [False] * 4 + [True, False]
    assert torch.equal(sums[:, ~refused], want[:, ~refused])


def test_what_stands_at_no_token_is_not_looked_at() -> None:
    sums = torch.zeros(2, 3, dtype=torch.int64)
    values = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, torch.inf, 1e30]])
    assert not accumulate(sums, torch.tensor([1, -1]), values, LIMIT).any()
    assert sums.tolist() == [[0, 0, 0], [SCALE, 2 * SCALE, 3 * SCALE]]
    assert not accumulate(sums, torch.tensor([-1, -1]), values, LIMIT).any()


def test_the_largest_value_as_often_as_a_token_is_seen_fits() -> None:
    counts = torch.tensor([3, 1000, 5])
    limit = largest_value(counts)
    sums = torch.zeros(1, 2, dtype=torch.int64)
    values = torch.tensor([[limit, -limit]], dtype=torch.float64).expand(1000, 2)
    assert not accumulate(sums, torch.zeros(1000, dtype=torch.int64), values, limit).any()
    assert ROOM * 0.999 < int(sums[0, 0]) <= ROOM * (1 + 1e-6)
    assert int(sums[0, 1]) == -int(sums[0, 0])
    assert largest_value(counts[:0]) == ROOM / SCALE


def test_means() -> None:
    index, values = sample(60, 4, 3, 5)
    sums = torch.zeros(4, 3, dtype=torch.int64)
    accumulate(sums, index, values, LIMIT)
    counts = torch.bincount(index[index >= 0], minlength=4)
    want = torch.stack([values[index == token].double().mean(0) for token in range(4)])
    torch.testing.assert_close(means(sums, counts), want, atol=2.0**-24, rtol=1e-9)
    assert torch.isnan(means(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]))).all()
