"""Digests against what they promise: equal exactly where the rows hold the same values."""

import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store.samples import value

from polyray.digest import canonical, rows_digest, table_digest
from polyray.errors import StoreError
from polyray.schema import TABLES

KINDS = [
    pa.bool_(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.string(),
    pa.binary(),
    pa.list_(pa.int32()),
    pa.list_(pa.int64()),
    pa.list_(pa.float16()),
    pa.list_(pa.float32()),
    pa.list_(pa.float64()),
    pa.list_(pa.string()),
    pa.list_(pa.binary()),
    pa.list_(pa.bool_()),
]
SCHEMA = pa.schema([("id", pa.int32()), ("name", pa.string()), *((str(k), k) for k in KINDS)])
KEY = ("id", "name")


def test_every_column_type_of_the_schema_is_tested_here():
    assert {f.type for t in TABLES.values() for f in t.schema} <= set(KINDS)


@st.composite
def tables(draw, min_rows=0):
    """Random rows over all column types; keys with ties and nulls."""
    n = draw(st.integers(min_rows, 12))
    rng = random.Random(draw(st.integers(0, 2**32)))
    null_frac = draw(st.sampled_from([0.0, 0.3, 1.0]))
    columns = [
        pa.array([None if rng.random() < null_frac else rng.randrange(3) for _ in range(n)], pa.int32()),
        pa.array([None if rng.random() < null_frac else rng.choice("ab") for _ in range(n)], pa.string()),
    ]
    for kind in KINDS:
        columns.append(pa.array([None if rng.random() < null_frac else value(kind, rng) for _ in range(n)], kind))
    return pa.table(columns, schema=SCHEMA)


def with_garbage(array: pa.Array, hide: np.ndarray) -> pa.Array:
    """The same values with the hidden ones null, their bytes left in place below the null."""
    bitmap = pa.py_buffer(np.packbits(~hide, bitorder="little").tobytes())
    array = pa.concat_arrays([array])
    children = [array.values] if pa.types.is_list(array.type) else None
    return pa.Array.from_buffers(array.type, len(array), [bitmap, *array.buffers()[1 : 2 if children else None]],
                                 children=children)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(tables(min_rows=1), st.data())
def test_how_arrow_holds_the_rows_changes_nothing(rows, data):
    expected = rows_digest(rows, KEY)
    order = data.draw(st.permutations(range(rows.num_rows)))
    assert rows_digest(rows.take(order), KEY) == expected
    cut = data.draw(st.integers(0, rows.num_rows))
    assert rows_digest(pa.concat_tables([rows.slice(0, cut), rows.slice(cut)]), KEY) == expected
    padded = pa.concat_tables([rows.slice(0, 1), rows, rows.slice(0, 1)]).combine_chunks()
    assert rows_digest(padded.slice(1, rows.num_rows), KEY) == expected
    encoded = rows
    for name in ("name", "string", "int32", "double"):
        i = SCHEMA.get_field_index(name)
        encoded = encoded.set_column(i, name, rows.column(i).dictionary_encode())
    assert rows_digest(encoded, KEY) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**32), st.integers(0, 2))
def test_bytes_below_nulls_change_nothing(n, seed, offset):
    rng = random.Random(seed)
    hide = np.array([rng.random() < 0.5 for _ in range(n)])
    for kind in KINDS:
        values = [value(kind, rng) for _ in range(n)]
        dirty = with_garbage(pa.array(values, kind), hide)
        clean = pa.array([None if h else v for v, h in zip(values, hide, strict=True)], kind)
        ids = pa.array(range(n), pa.int32())
        dirty_rows, clean_rows = (pa.table({"id": ids, "v": a}).slice(offset) for a in (dirty, clean))
        assert rows_digest(dirty_rows, ["id"]) == rows_digest(clean_rows, ["id"]), kind


@settings(max_examples=100, deadline=None)
@given(tables(min_rows=1), st.data())
def test_any_cell_that_changes_changes_the_digest(rows, data):
    before = rows_digest(rows, KEY)
    column = data.draw(st.sampled_from(SCHEMA.names))
    row = data.draw(st.integers(0, rows.num_rows - 1))
    kind = SCHEMA.field(column).type
    values = rows[column].to_pylist()
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    new = None if values[row] is not None and rng.random() < 0.3 else value(kind, rng)
    same = repr(new) == repr(values[row])
    values[row] = new
    changed = rows.set_column(SCHEMA.get_field_index(column), SCHEMA.field(column), pa.array(values, kind))
    assert (rows_digest(changed, KEY) == before) == same


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_null_empty_and_zero_are_different_things(kind):
    forms: list[object] = [None]
    if pa.types.is_list(kind):
        forms += [[], [None]]
    elif pa.types.is_string(kind):
        forms += ["", "\0"]
    elif pa.types.is_binary(kind):
        forms += [b"", b"\0"]
    else:
        forms += [False if pa.types.is_boolean(kind) else 0]
    seen = {rows_digest(pa.table({"id": [1], "v": pa.array([v], kind)}), ["id"]) for v in forms}
    assert len(seen) == len(forms)


def test_values_cannot_slide_into_the_next_row_column_or_list():
    def digest(a: list[object], b: list[object], kind: pa.DataType) -> str:
        return rows_digest(pa.table({"id": [1, 2], "a": pa.array(a, kind), "b": pa.array(b, kind)}), ["id"])

    assert digest(["xy", ""], ["", ""], pa.string()) != digest(["x", "y"], ["", ""], pa.string())
    assert digest(["x", "y"], ["", ""], pa.string()) != digest(["x", ""], ["y", ""], pa.string())
    lists = pa.list_(pa.int32())
    assert digest([[1, 2], []], [[], []], lists) != digest([[1], [2]], [[], []], lists)
    assert digest([[1], []], [[2], []], lists) != digest([[1], [2]], [[], []], lists)
    nested = pa.list_(pa.string())
    assert digest([["ab"], []], [[], []], nested) != digest([["a", "b"], []], [[], []], nested)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_all_nans_are_one_value_and_signed_zeros_are_two(kind):
    dtype = kind.to_pandas_dtype()
    unsigned = np.dtype(dtype).str.replace("f", "u")
    quiet = np.array([np.nan], dtype)
    other = (quiet.view(unsigned) | 1 | (1 << (8 * quiet.itemsize - 1))).astype(unsigned).view(dtype)
    assert math.isnan(other[0])
    assert other.tobytes() != quiet.tobytes()

    def digest(values: np.ndarray) -> str:
        return rows_digest(pa.table({"id": [1], "v": pa.array(values, kind)}), ["id"])

    assert digest(quiet) == digest(other)
    assert digest(np.array([0.0], dtype)) != digest(np.array([-0.0], dtype))
    assert digest(quiet) != rows_digest(pa.table({"id": [1], "v": pa.array([None], kind)}), ["id"])


def test_names_types_and_number_of_rows_count():
    rows = pa.table({"id": pa.array([1, 2], pa.int32())})
    others = [
        rows.rename_columns(["idx"]),
        rows.cast(pa.schema([("id", pa.int64())])),
        rows.slice(0, 1),
        rows.slice(0, 0),
        pa.concat_tables([rows, rows]),
        rows.append_column("v", pa.nulls(2, pa.int32())),
    ]
    digests = [rows_digest(r, [r.column_names[0]]) for r in (rows, *others)]
    assert len(set(digests)) == len(digests)


def test_what_a_list_calls_its_items_changes_nothing():
    item, element = (pa.list_(pa.field(name, pa.int32())) for name in ("item", "element"))
    digests = {rows_digest(pa.table({"id": [1], "v": pa.array([[1]], kind)}), ["id"]) for kind in (item, element)}
    assert len(digests) == 1


def test_excluded_columns_have_no_say_even_in_the_order_of_ties():
    rows = pa.table({"id": [1, 1, 2], "v": [5, 4, 3], "seconds": [0.1, 0.2, 0.3]})
    other = pa.table({"id": [1, 1, 2], "v": [5, 4, 3], "seconds": [0.9, 0.05, 0.7]})
    assert rows_digest(rows, ["id"], ["seconds"]) == rows_digest(other, ["id"], ["seconds"])
    assert rows_digest(rows, ["id"], ["seconds"]) == rows_digest(rows.drop_columns(["seconds"]), ["id"])
    assert rows_digest(rows, ["id"]) != rows_digest(other, ["id"])


def test_canonical_order_is_that_of_the_key_with_nulls_last():
    rows = pa.table({"a": ["b", None, "a", "a"], "n": [1, 0, 2, None]})
    assert canonical(rows, ["a", "n"]).to_pylist() == [
        {"a": "a", "n": 2},
        {"a": "a", "n": None},
        {"a": "b", "n": 1},
        {"a": None, "n": 0},
    ]


def test_types_without_a_canonical_form_are_refused_by_name():
    rows = pa.table({"id": [1], "when": pa.array([0], pa.timestamp("s"))})
    with pytest.raises(StoreError, match="'when' is of type timestamp"):
        rows_digest(rows, ["id"])


def test_digest_stays_what_it_was():
    # Another value here means that no digest written so far can be compared with a new one.
    rows = pa.table(
        {
            "id": pa.array([2, 1, None], pa.int32()),
            "text": ["b", None, "ä"],
            "half": pa.array([[0.5, None], None, []], pa.list_(pa.float16())),
            "yes": [True, None, False],
        }
    )
    assert rows_digest(rows, ["id"]) == "40e781aa103a3b4d65e15d9c10959606939782e1989b9ed160d95af41fd5782b"


def test_table_digest_takes_parts_in_any_order_and_sees_each_field():
    parts = [("u1", "a", "d1", 3), ("u2", None, "d2", 4), ("u1", "b", "d1", 3)]
    expected = table_digest(parts)
    assert table_digest(reversed(parts)) == expected
    for i, new in enumerate(["u9", "z", "d9", 5]):
        changed = tuple(new if i == j else v for j, v in enumerate(parts[0]))
        assert table_digest([changed, *parts[1:]]) != expected
    assert table_digest(parts[:2]) != expected
