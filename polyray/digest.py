"""Digests of rows: the same rows give the same digest, however Arrow happens to hold them.

Which question it answers: *are these the same results?* Place in the flow: pure; `store.py` digests every part it
writes, `verify.py` every part it reads again. A digest sees values alone: chunks, slices, dictionary encoding, row
order and the bytes that lie under a null change nothing; any cell that changes, changes it. All NaNs count as one
value. −0.0 and 0.0 stay two values: where results must agree, their signs must agree too.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from polyray.errors import StoreError


def canonical(rows: pa.Table, key: Sequence[str], exclude: Iterable[str] = ()) -> pa.Table:
    """Rows in the one order that depends on their values alone, every column in one chunk.

    Args:
        rows: any rows that hold the key's columns.
        key: columns that rows are sorted by, ascending; strings by their UTF-8 bytes, nulls last. Rows of equal key
            are ordered by a hash of their contents.
        exclude: columns that have no say in the order of rows of equal key.

    Returns:
        The same rows and columns, dictionary-encoded columns decoded.
    """
    rows = _plain(rows)
    if rows.num_rows < 2:
        return rows
    rows = in_order(rows, key).combine_chunks()
    ties = _tied_with_previous(rows.select(list(key)))
    if not ties.any():
        return rows
    content = rows.drop_columns([c for c in exclude if c in rows.column_names])
    group = np.cumsum(~ties)
    in_tie = ties | np.append(ties[1:], False)
    content_hash = [_hash(content.slice(i, 1)) if tied else "" for i, tied in enumerate(in_tie.tolist())]
    return rows.take(pa.array(sorted(range(rows.num_rows), key=lambda i: (group[i], content_hash[i]))))


def in_order(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """Rows sorted by the key, ascending, nulls last; rows of equal key stay in their order."""
    order = pc.sort_indices(rows, sort_keys=[(k, "ascending") for k in key])
    # Most rows come sorted, and moving vectors of half precision takes longer than all else.
    return rows if np.array_equal(order, np.arange(rows.num_rows)) else rows.take(order)


def rows_digest(rows: pa.Table, key: Sequence[str], exclude: Iterable[str] = ()) -> str:
    """SHA-256 of rows: column names, types and values, in canonical order.

    Args:
        rows: any rows that hold the key's columns. Columns may be integers, floats, booleans, text, binary, and
            lists of these; all else is refused.
        key: columns that order the rows.
        exclude: columns that have no part in it, such as timings.

    Returns:
        64 hexadecimal digits.

    Raises:
        StoreError: a column's type has no canonical form here.
    """
    exclude = set(exclude)
    return _hash(canonical(rows, key, exclude).drop_columns([c for c in rows.column_names if c in exclude]))


def table_digest(parts: Iterable[tuple[str, str | None, str, int]]) -> str:
    """SHA-256 of a whole table: its parts' (unit key, layer, rows digest, rows), sorted.

    The plan fixes the units, so that the cut into parts is part of what must be equal.
    """
    ordered = sorted(parts, key=lambda p: (p[0], p[1] or "", p[2], p[3]))
    return hashlib.sha256(json.dumps(ordered, separators=(",", ":")).encode()).hexdigest()


def _plain(rows: pa.Table) -> pa.Table:
    """Rows without dictionary encoding, every column in one chunk."""
    for i, field in enumerate(rows.schema):
        if pa.types.is_dictionary(field.type):
            plain = pa.field(field.name, field.type.value_type, metadata=field.metadata)
            rows = rows.set_column(i, plain, rows.column(i).cast(field.type.value_type))
    return rows.combine_chunks()


def _tied_with_previous(keys: pa.Table) -> np.ndarray:
    """Which rows of a sorted key table equal the row before them (two nulls are equal)."""
    tied = np.ones(keys.num_rows, dtype=bool)
    tied[0] = False
    for column in keys.columns:
        codes = column.combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
        tied[1:] &= codes[1:] == codes[:-1]
    return tied


def _hash(rows: pa.Table) -> str:
    h = hashlib.sha256()
    for field, column in zip(rows.schema, rows.columns, strict=True):
        h.update(json.dumps([field.name, _type_name(field.type), rows.num_rows]).encode())
        array = column.combine_chunks()
        if not isinstance(array, pa.Array):
            raise StoreError(f"column {field.name!r} holds 2 GiB or more in one part: cut smaller units.")
        _update(h, array, field.name)
    return h.hexdigest()


def _type_name(kind: pa.DataType) -> str:
    """Name of a type; what a list calls its items ("item", "element") depends on who wrote it and is left out."""
    return f"list<{_type_name(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def _update(h: "hashlib._Hash", array: pa.Array, column: str) -> None:
    """Feeds one array: which values are there, then the values, with zeros or nothing where they are null."""
    kind = array.type
    valid = np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    h.update(np.packbits(valid).tobytes())
    if pa.types.is_list(kind):
        h.update(_lengths(pc.list_value_length(array)))
        # flatten leaves out what lies under null lists
        _update(h, array.flatten(), column)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        array = pc.fill_null(array, "" if pa.types.is_string(kind) else b"")
        h.update(_lengths(pc.binary_length(array)))
        _, offsets_buffer, data = array.buffers()
        if len(array) and data is not None:
            offsets = np.frombuffer(offsets_buffer, "<i4")[array.offset : array.offset + len(array) + 1]
            h.update(memoryview(data)[offsets[0] : offsets[-1]])
    elif pa.types.is_boolean(kind):
        h.update(np.packbits(np.asarray(pc.fill_null(array, False).to_numpy(zero_copy_only=False), bool)).tobytes())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        h.update(_numbers(array, valid).tobytes())
    else:
        raise StoreError(f"column {column!r} is of type {kind}, which has no digest: use integers, floats, booleans, "
                         "text, binary, or lists of these.")  # fmt: skip


def _lengths(lengths: pa.Array) -> bytes:
    return np.asarray(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False), dtype="<i8").tobytes()


def _numbers(array: pa.Array, valid: np.ndarray) -> np.ndarray:
    """Values of a numeric array, little-endian, 0 where null, with one bit pattern for NaN."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        return np.zeros(len(array), dtype)
    values = np.frombuffer(buffer, dtype)[array.offset : array.offset + len(array)].copy()
    values[~valid] = 0
    if values.dtype.kind == "f":
        values[np.isnan(values)] = np.nan
    return values.astype(dtype.newbyteorder("<"), copy=False)
