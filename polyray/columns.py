"""Between arrays and Arrow columns.

Place in the flow: under every stage that makes rows. Missing numbers become nulls here, in one place.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polyray import schema
from polyray.models.layers import LayerInfo


def table(name: str, columns: dict[str, Any]) -> pa.Table:
    """Rows of a table in its schema.

    Args:
        name: the table.
        columns: every column of it, as Arrow arrays, NumPy arrays or lists; NaN in a floating column is a null.
    """
    want = schema.TABLES[name].schema
    return pa.table([_column(columns[f.name], f.type) for f in want], schema=want)


def layer_row(
    info: LayerInfo, n_neurons: int, window: str, side: int, *, swap_side: int | None, grid_w: int | None
) -> pa.Table:
    """A layer's row of `layers`; see the schema for what the sides are."""
    row = {
        "layer": info.name,
        "depth": info.depth,
        "n_neurons": n_neurons,
        "width": info.width,
        "layout": info.layout,
        "grid_h": info.grid_h,
        "grid_w": grid_w,
        "activation": info.activation,
        "ranked_by": info.ranked_by,
        "window": window,
        "side_px": side,
        "swap_side_px": swap_side,
        "receptive_px": info.receptive_px,
        "center_x_px": info.center_x_px,
        "center_y_px": info.center_y_px,
        "stride_px": info.stride_px,
    }
    return table("layers", {name: [value] for name, value in row.items()})


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return array if array.type == kind else array.cast(kind)
    if isinstance(values, np.ndarray) and values.dtype.kind == "f" and pa.types.is_floating(kind):
        return pa.array(values, type=kind, mask=np.isnan(values))
    return pa.array(values, type=kind)


def ragged(values: NDArray[Any], lengths: NDArray[Any], kind: pa.DataType) -> pa.ListArray:
    """A list column from all its values in order and the length of each list; NaN in floating values is a null."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = np.isnan(values) if values.dtype.kind == "f" else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind, mask=mask))


def lists(matrix: NDArray[Any], kind: pa.DataType) -> pa.ListArray:
    """A list column from the rows of a matrix, or of more axes, whose last ones are laid end to end."""
    return ragged(matrix.ravel(), np.full(len(matrix), math.prod(matrix.shape[1:])), kind)


def ragged_prefix(matrix: NDArray[Any], lengths: NDArray[Any], kind: pa.DataType) -> pa.ListArray:
    """A list column from the first `lengths[i]` entries of each row of a matrix."""
    return ragged(matrix[np.arange(matrix.shape[1])[None, :] < lengths[:, None]], lengths, kind)


def padded(column: pa.Array | pa.ChunkedArray, fill: float, width: int | None = None) -> NDArray[Any]:
    """A list column as a matrix, short lists filled up on the right."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = np.diff(array.offsets.to_numpy()) if len(array) else np.zeros(0, dtype=np.int64)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    width = int(lengths.max(initial=0)) if width is None else width
    out = np.full((len(array), width), fill, dtype=flat.dtype)
    out[np.arange(width)[None, :] < lengths[:, None]] = flat
    return out


def numbers(rows: pa.Table, column: str) -> NDArray[Any]:
    """A numeric column as NumPy; nulls are NaN (then the dtype is floating)."""
    return rows[column].to_numpy()


def vectors(column: pa.Array | pa.ChunkedArray, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A column of equally long vectors as a matrix, and which rows have one (others are zero)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    valid = ~array.is_null().to_numpy(zero_copy_only=False)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    out = np.zeros((len(array), width), dtype=flat.dtype)
    out[valid] = flat.reshape(-1, width)
    return out, valid


def concat(name: str, tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of the same name as one; no tables give an empty one."""
    return pa.concat_tables(tables) if tables else schema.TABLES[name].schema.empty_table()


def failures(stage: str, unit: str, items: Sequence[tuple[str | None, str, int | None, str]]) -> pa.Table:
    """Rows of the failures table from (layer, item, item_id, reason)."""
    return table(
        "failures",
        {
            "stage": [stage] * len(items),
            "unit": [unit] * len(items),
            "layer": [i[0] for i in items],
            "item": [i[1] for i in items],
            "item_id": [i[2] for i in items],
            "reason": [i[3] for i in items],
        },
    )


def floats(rows: pa.Table, column: str) -> NDArray[np.float64]:
    """A numeric column as float64; nulls are NaN."""
    return numbers(rows, column).astype(np.float64)
