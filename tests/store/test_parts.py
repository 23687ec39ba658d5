"""What parts accept, how they are named, and that rows come back as they were."""

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from store.samples import (
    empty_rows,
    layer_of,
    new_store,
    plain,
    rows_of,
)

from polyray import files
from polyray.errors import StoreError
from polyray.records import Receipt
from polyray.schema import TABLES


@example("a" * 300, "b")
@example("é" * 300, "b")
@example("a" * 147 + "é" * 50, "b")
@example("a" * 146 + "é" * 50, "b")
@example("_shared", "_")
@example(".", ".")
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), st.text(min_size=1, max_size=5))
def test_names_are_safe_reversible_and_distinct(name, other):
    q = files.quoted(name)
    assert q.isascii()
    assert q[0] not in "._"
    assert not set(q) & set("/\\*?[]{}'\" \0")
    assert len(f".{q}-12345678.parquet") < 255
    assert name.startswith(unquote(q.partition("~")[0], errors="strict"))
    if "~" not in q:
        assert unquote(q) == name
    assert q not in (files.quoted(name + other), files.quoted(q + "~"))
    assert (files.quoted(q) == q) == (q == name)


def test_long_names_with_equal_beginnings_differ():
    assert len({files.quoted("é" * 300 + str(i)) for i in range(100)}) == 100


def test_the_empty_name_is_refused():
    with pytest.raises(StoreError, match="empty"):
        files.quoted("")


@pytest.mark.parametrize("table", sorted(TABLES))
def test_rows_come_back_as_they_were(tmp_path, table):
    store = new_store(tmp_path)
    rows = rows_of(table, 20)
    part = store.write_part(table, "u/0", rows, layer_of(table, "features.1"))
    assert part.n_rows == 20
    assert part.n_bytes == (tmp_path / part.path).stat().st_size
    folder = f"{table}/layer=features.1" if TABLES[table].by_layer else table
    assert Path(part.path).parent == Path(folder)
    assert store.read(table).equals(empty_rows(table))
    assert store.commit(Receipt("u/0", [part], 0.1, "h", "s"))
    back = store.read(table)
    if TABLES[table].by_layer:
        assert back["layer"].to_pylist() == ["features.1"] * 20
        back = back.drop_columns(["layer"])
    assert back.schema.equals(TABLES[table].schema)
    assert plain(back) == plain(rows)
    key = list(TABLES[table].key)
    assert back.select(key).to_pylist() == rows.sort_by([(k, "ascending") for k in key]).select(key).to_pylist()


def test_half_precision_vectors_keep_every_bit(tmp_path):
    store = new_store(tmp_path)
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[np.isfinite(bits.view(np.float16))]
    vectors = pa.ListArray.from_arrays(
        pa.array([0, 100, 100, len(finite)], pa.int32()), pa.array(finite.view(np.float16))
    )
    rows = pa.table(
        {"patch_id": pa.array([1, 2, 3]), "geometry": vectors, "text": pa.nulls(3, vectors.type)},
        schema=TABLES["embeddings"].schema,
    )
    part = store.write_part("embeddings", "u", rows, "a")
    store.commit(Receipt("u", [part], 0.0, "h", "embed"))
    back = store.read("embeddings")["geometry"].combine_chunks()
    assert back.value_lengths().to_pylist() == [100, 0, len(finite) - 100]
    assert back.flatten().to_numpy(zero_copy_only=False).view(np.uint16).tolist() == finite.tolist()


def test_columns_are_reordered_and_cast_where_nothing_is_lost(tmp_path):
    store = new_store(tmp_path)
    rows = rows_of("mine_parts", 6, null_frac=0)
    loose = pa.table(
        {
            "position": rows["position"].cast(pa.large_list(pa.int64())),
            **{c: rows[c] for c in rows.column_names if c not in ("position", "neuron", "n_images", "bins")},
            "bins": pa.nulls(6),
            "n_images": rows["n_images"].dictionary_encode(),
            "neuron": rows["neuron"].cast(pa.uint64()),
        }
    )
    part = store.write_part("mine_parts", "u", loose, "a")
    same = rows.set_column(
        rows.column_names.index("bins"), rows.schema.field("bins"), pa.nulls(6, pa.list_(pa.int32()))
    )
    assert part.digest == store.write_part("mine_parts", "u", same, "a").digest


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("neuron", pa.array([2**31]), "'neuron'.*int64.*int32"),
        ("neuron", pa.array([1.0]), "'neuron'.*double"),
        ("neuron", pa.array(["1"]), "'neuron'.*string"),
        ("minimum", pa.array([1e300]), "'minimum'.*too large"),
        ("minimum", pa.array(["x"]), "'minimum'"),
        ("bins", pa.array([[2**40]]), "'bins'"),
        ("bins", pa.array([1]), "'bins'"),
        ("total", pa.array([2**60 + 1]), "'total'"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_column(tmp_path, column, values, message):
    rows = rows_of("mine_parts", 1)
    rows = rows.set_column(rows.column_names.index(column), column, values)
    with pytest.raises(StoreError, match=message):
        new_store(tmp_path).write_part("mine_parts", "u", rows, "a")


def test_missing_unknown_and_repeated_columns_are_refused_by_name(tmp_path):
    store, rows = new_store(tmp_path), rows_of("images", 2)
    with pytest.raises(StoreError, match=r"missing: \['label'\]"):
        store.write_part("images", "u", rows.drop_columns(["label"]), None)
    with pytest.raises(StoreError, match=r"unknown: \['extra'\]"):
        store.write_part("images", "u", rows.append_column("extra", rows["label"]), None)
    with pytest.raises(StoreError, match=r"twice: \['label'\]"):
        store.write_part("images", "u", rows.append_column("label", rows["label"]), None)
    assert not list(tmp_path.rglob("*.parquet"))


def test_tables_and_layers_must_fit(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(StoreError, match="Did you mean 'neurons'"):
        store.write_part("neurones", "u", rows_of("neurons", 1), "a")
    with pytest.raises(StoreError, match="name the layer"):
        store.write_part("neurons", "u", rows_of("neurons", 1), None)
    with pytest.raises(StoreError, match="layer must be None"):
        store.write_part("images", "u", rows_of("images", 1), "a")
    with pytest.raises(StoreError, match="layer must be None"):
        store.read("images", layer="a")


def test_parts_are_never_overwritten(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    first = store.write_part("images", "u", rows_of("images", 3), None)
    before = (tmp_path / first.path).read_bytes()
    names = iter([Path(first.path).name, Path(first.path).name, "u-00000000.parquet"])
    monkeypatch.setattr("polyray.parts.part_name", lambda unit: next(names))
    assert store.write_part("images", "u", rows_of("images", 4), None).path == "images/u-00000000.parquet"
    assert (tmp_path / first.path).read_bytes() == before
