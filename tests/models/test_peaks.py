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


@pytest.mark.parametrize("n_positions", [1, 2, 7, 13, 49, 169, 196, 251, 263, 784, 12544, 32_771])
def test_equals_numpy_for_every_cut_into_spans(n_positions: int) -> None:
    # Few distinct values, so that most maxima are tied. 263 and 32,771 are prime and need 16 and 32 bits of weights.
    values = torch.randint(0, 4, (2, n_positions, 3), generator=torch.Generator().manual_seed(n_positions)).float()
    response, position = peaks(values)
    expected, where = scan(values)
    np.testing.assert_array_equal(response.numpy(), expected)
    np.testing.assert_array_equal(position.numpy(), where)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_equals_numpy_in_any_memory_order(n: int, p: int, c: int, seed: int, strided: bool) -> None:
    shape = (n, c, p) if strided else (n, p, c)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    values = values.transpose(1, 2) if strided else values
    response, position = peaks(values)
    expected, where = scan(values)
    np.testing.assert_array_equal(response.numpy(), expected)
    np.testing.assert_array_equal(position.numpy(), where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_become_float32(dtype: torch.dtype) -> None:
    values = torch.randn((2, 20, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    response, position = peaks(values)
    assert response.dtype == torch.float32
    np.testing.assert_array_equal(response.numpy(), scan(values)[0])
    np.testing.assert_array_equal(position.numpy(), scan(values)[1])


def test_nan_anywhere_is_nan_and_stays_with_its_neuron() -> None:
    values = torch.randn((2, 12, 3), generator=torch.Generator().manual_seed(0))
    values[1, 7, 2] = torch.nan
    response, position = peaks(values)
    assert response.isnan().nonzero().tolist() == [[1, 2]]
    assert position[1, 2] == 0
    np.testing.assert_array_equal(position[0].numpy(), scan(values)[1][0])


def test_edge_neurons() -> None:
    values = torch.zeros(1, 6, 5)
    values[0, :, 1] = 2.5  # constant
    values[0, :, 2] = torch.tensor([-3.0, -1, -2, -1, -5, -9])  # all negative
    values[0, 5, 3] = 1e-38  # fires once
    values[0, 2, 4] = torch.inf
    response, position = peaks(values)
    assert response[0].tolist() == [0.0, 2.5, -1.0, pytest.approx(1e-38), torch.inf]
    assert position[0].tolist() == [0, 0, 1, 5, 2]
