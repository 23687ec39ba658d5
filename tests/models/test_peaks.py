"""The fast maximum and its place against numpy's, which scans."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyray.models.peaks import peaks


def scan(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = values.float().numpy()
    return array.max(axis=1), array.argmax(axis=1)


def in_memory(values: torch.Tensor, adjacent: bool) -> torch.Tensor:
    """The same values with neurons, or with positions, next to each other in memory."""
    return values.contiguous() if adjacent else values.transpose(1, 2).contiguous().transpose(1, 2)


ORDERS = pytest.mark.parametrize("adjacent", [True, False])


@ORDERS
@pytest.mark.parametrize("n_positions", [1, 2, 7, 49, 196, 12544, 70_001])
def test_first_of_tied_maxima_at_every_size(n_positions: int, adjacent: bool) -> None:
    # Few distinct values, so that most maxima are tied; 37 neurons are no whole number of vector registers.
    generator = torch.Generator().manual_seed(n_positions)
    values = torch.randint(0, 4, (2, n_positions, 37), generator=generator).float() * -1
    response, position = peaks(in_memory(values, adjacent))
    expected, where = scan(values)
    np.testing.assert_array_equal(response.numpy(), expected)
    np.testing.assert_array_equal(position.numpy(), where)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from("npcs"))
def test_equals_numpy_in_any_memory_order(n: int, p: int, c: int, seed: int, order: str) -> None:
    values = torch.randn((n, p, c), generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    given_as = {
        "n": values.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "p": in_memory(values, adjacent=False),
        "c": values,
        "s": torch.cat([values[:, :1] + 99, values], 1)[:, 1:],  # behind a prefix
    }[order]
    response, position = peaks(given_as)
    expected, where = scan(values)
    np.testing.assert_array_equal(response.numpy(), expected)
    np.testing.assert_array_equal(position.numpy(), where)


@ORDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_become_float32(dtype: torch.dtype, adjacent: bool) -> None:
    values = torch.randn((2, 300, 37), generator=torch.Generator().manual_seed(0)).to(dtype)
    response, position = peaks(in_memory(values, adjacent))
    assert response.dtype == torch.float32
    np.testing.assert_array_equal(response.numpy(), scan(values)[0])
    np.testing.assert_array_equal(position.numpy(), scan(values)[1])


@ORDERS
def test_nan_anywhere_is_nan_and_stays_with_its_neuron(adjacent: bool) -> None:
    values = torch.randn((2, 12, 37), generator=torch.Generator().manual_seed(0))
    for neuron, position in ((2, 0), (3, 11), (36, 5)):
        values[1, position, neuron] = torch.nan
    response, position = peaks(in_memory(values, adjacent))
    assert response.isnan().nonzero().tolist() == [[1, 2], [1, 3], [1, 36]]
    assert position[1, [2, 3, 36]].tolist() == [0, 0, 0]
    rest = ~response.isnan().numpy()
    np.testing.assert_array_equal(position.numpy()[rest], scan(values)[1][rest])


@ORDERS
def test_edge_neurons(adjacent: bool) -> None:
    values = torch.zeros(1, 6, 6)
    values[0, :, 1] = 2.5  # constant
    values[0, :, 2] = torch.tensor([-3.0, -1, -2, -1, -5, -9])  # all negative
    values[0, 5, 3] = 1e-38  # fires once
    values[0, 2, 4] = torch.inf
    values[0, :, 5] = -torch.inf
    response, position = peaks(in_memory(values.repeat(1, 1, 4), adjacent))
    assert response[0].tolist() == [0.0, 2.5, -1.0, pytest.approx(1e-38), torch.inf, -torch.inf] * 4
    assert position[0].tolist() == [0, 0, 1, 5, 2, 0] * 4
