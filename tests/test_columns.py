"""Between arrays and list columns."""

import numpy as np
import pyarrow as pa

from polyray import columns


def test_lists_are_the_rows_of_a_matrix() -> None:
    matrix = np.array([[1.5, np.nan, 2.0], [np.nan, -1.0, 0.0]])
    column = columns.lists(matrix, pa.float32())
    assert column.to_pylist() == [[1.5, None, 2.0], [None, -1.0, 0.0]]
    np.testing.assert_array_equal(columns.padded(column, np.nan, 3), matrix)
    assert columns.lists(np.arange(12).reshape(2, 3, 2).transpose(1, 0, 2), pa.int64()).to_pylist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
    ]
    assert columns.lists(np.array([[True, False]]), pa.bool_()).to_pylist() == [[True, False]]


def test_lists_of_nothing() -> None:
    assert columns.lists(np.zeros((0, 3)), pa.float64()).to_pylist() == []
    assert columns.lists(np.zeros((2, 0), dtype=np.int64), pa.int32()).to_pylist() == [[], []]
    assert columns.padded(columns.lists(np.zeros((0, 3), dtype=bool), pa.bool_()), False, 3).shape == (0, 3)


def test_ragged_lists_have_nulls_for_nan_alone() -> None:
    column = columns.ragged(np.array([1.0, np.nan, np.inf]), np.array([1, 0, 2]), pa.float64())
    assert column.to_pylist() == [[1.0], [], [None, np.inf]]
    padded = columns.padded(column, np.nan, 2)
    np.testing.assert_array_equal(padded, [[1.0, np.nan], [np.nan, np.nan], [np.nan, np.inf]])
    prefix = columns.ragged_prefix(np.array([[1.0, np.nan], [3.0, 4.0]]), np.array([2, 1]), pa.float64())
    assert prefix.to_pylist() == [[1.0, None], [3.0]]
