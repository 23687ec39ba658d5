"""The reading side: committed rows alone, layers by name, and any Parquet reader after the end."""

import random

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from store.samples import ODD_LAYERS, do_unit, empty_rows, layer_of, new_store, plain, records_in, rows_of, write_unit

from polyray.dataset import Dataset, open
from polyray.errors import StoreError
from polyray.records import Receipt
from polyray.schema import TABLES
from polyray.store import Store


def add(store: Store, table: str, rows: pa.Table, layer: str | None, unit: str) -> None:
    store.commit(Receipt(unit, [store.write_part(table, unit, rows, layer)], 0.0, "h", "calibrate"))


@pytest.fixture
def odd(tmp_path):
    """A finished run with one part of `neurons` and `examples` in each oddly named layer, and orphans beside them."""
    store = new_store(tmp_path / "out with spaces 漢字")
    for layer in ODD_LAYERS:
        for table in ("neurons", "examples"):
            add(store, table, rows_of(table, 4), layer, f"{table}/{layer}/0-4")
        store.write_part("neurons", f"neurons/{layer}/0-4", rows_of("neurons", 4), layer)
    return store


def test_a_run_is_a_mapping_of_its_tables(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    run = open(tmp_path)
    assert isinstance(run, Dataset)
    assert run.tables == tuple(run) == ("images", "mine_parts")
    assert len(run) == 2
    assert "images" in run
    assert "neurons" not in run
    assert run.run == store.run
    assert run.path == tmp_path
    assert not run.is_finished
    assert {name: d.count_rows() for name, d in run.items()} == {"images": 5, "mine_parts": 5}
    assert isinstance(run["images"], ds.Dataset)
    store.finish()
    assert open(str(tmp_path)).is_finished


def test_tables_without_rows_are_empty_and_unknown_ones_refused(tmp_path):
    new_store(tmp_path)
    run = open(tmp_path)
    assert run.tables == ()
    for table in TABLES:
        assert run[table].to_table().equals(empty_rows(table))
    with pytest.raises(StoreError, match="Did you mean 'neurons'"):
        run["neuron"]


def test_folders_without_a_run_are_refused(tmp_path):
    for out in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="Give the OUT of a run"):
            open(out)


def test_it_shows_committed_rows_alone_as_of_its_opening(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    write_unit(store, 1)
    run = open(tmp_path)
    do_unit(store, 2)
    assert run["images"].count_rows() == 5
    assert open(tmp_path)["images"].count_rows() == 10


def test_layers_are_text_and_come_back_whatever_their_name(odd):
    for dataset in (open(odd.out)["neurons"], open(odd.out)["examples"]):
        assert dataset.schema.field("layer").type == pa.string()
        assert sorted(dataset.to_table(columns=["layer"])["layer"].to_pylist()) == sorted(ODD_LAYERS * 4)
        for layer in ODD_LAYERS:
            assert dataset.count_rows(filter=ds.field("layer") == layer) == 4
    assert open(odd.out)["neurons"].to_table().column_names == empty_rows("neurons").column_names


@pytest.mark.parametrize("table", sorted(TABLES))
def test_every_table_reads_as_it_was_written(tmp_path, table):
    store = new_store(tmp_path)
    rows = rows_of(table, 7)
    add(store, table, rows, layer_of(table, "7"), "u")
    back = open(tmp_path)[table].to_table()
    assert back.schema.equals(empty_rows(table).schema)
    assert plain(back.select(rows.column_names)) == plain(rows)


def summarised(store: Store) -> dict[tuple[str, int], tuple[object, ...]]:
    """Neurons of three layers, all but the last summarised in another order; what is expected for each."""
    rng = random.Random(5)
    expected: dict[tuple[str, int], tuple[object, ...]] = {}
    for layer, n in (("a", 5), ("b/1", 3), ("7", 4)):
        add(store, "neurons", rows_of("neurons", n), layer, f"neurons/{layer}")
        expected |= {(layer, i): (None, None, None) for i in range(n)}
        if layer == "7":
            continue
        values = {i: (rng.random(), rng.random() < 0.5, f"d{layer}{i}") for i in rng.sample(range(n), n)}
        rows = pa.table({"neuron": list(values), "q": [v[0] for v in values.values()],
                         "called": [v[1] for v in values.values()],
                         "diagnosis": [v[2] for v in values.values()]})  # fmt: skip
        add(store, "neuron_summary", rows, layer, f"summary/{layer}")
        expected |= {(layer, i): v for i, v in values.items()}
    return expected


def test_neurons_carry_their_summary(tmp_path):
    store = new_store(tmp_path)
    expected = summarised(store)
    rows = open(tmp_path)["neurons"].to_table()
    assert rows.column_names == [*empty_rows("neurons").column_names, "q", "called", "diagnosis"]
    assert b"calibrate.fdr" in rows.schema.field("q").metadata[b"doc"]
    found = {(r["layer"], r["neuron"]): (r["q"], r["called"], r["diagnosis"]) for r in rows.to_pylist()}
    assert found == expected
    assert list(found) == sorted(expected)
    assert plain(rows.drop_columns(["q", "called", "diagnosis"])) == plain(store.read("neurons"))


def test_a_plain_pyarrow_glob_reads_the_finished_run(odd):
    odd.finish()
    rows = ds.dataset(odd.out / "neurons", partitioning="hive").to_table()
    short = [layer for layer in ODD_LAYERS if len(layer) < 100]
    layers = rows["layer"].to_pylist()
    assert len(layers) == 4 * len(ODD_LAYERS)
    assert set(short) < set(layers)
    assert plain(rows.drop_columns(["layer"])) == plain(odd.read("neurons").drop_columns(["layer"]))


def test_duckdb_reads_the_finished_run(odd):
    odd.finish()
    source = f"read_parquet('{odd.out}/examples/**/*.parquet', hive_partitioning=true)"
    found = dict(duckdb.sql(f"select layer, count(*) from {source} group by layer").fetchall())
    assert sum(found.values()) == 4 * len(ODD_LAYERS)
    assert all(found[layer] == 4 for layer in ODD_LAYERS if len(layer) < 100)
    columns = [c for c in TABLES["examples"].schema.names if c != "activation"]
    rows = duckdb.sql(f"select {', '.join(columns)} from {source} where layer = 'a/b'").fetchall()
    expected = odd.read("examples", layer="a/b", columns=columns)
    assert sorted(map(repr, rows)) == sorted(repr(tuple(r.values())) for r in expected.to_pylist())


def test_duckdb_reads_half_precision_vectors(tmp_path):
    store = new_store(tmp_path)
    rows = pa.table({"patch_id": [1, 2], "geometry": pa.array([[0.5, -2.0], []], pa.list_(pa.float16())),
                     "text": pa.nulls(2)})  # fmt: skip
    add(store, "embeddings", rows, "7", "u")
    store.finish()
    found = duckdb.sql(
        f"select patch_id, geometry, text from '{tmp_path}/embeddings/**/*.parquet' order by 1"
    ).fetchall()
    assert found == [(1, [0.5, -2.0], None), (2, [], None)]


def test_a_damaged_record_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("polyray.ledger._SETTLE_S", 0.0)
    store = new_store(tmp_path)
    do_unit(store, 0)
    next(records_in(tmp_path).iterdir()).write_text("{")
    with pytest.raises(StoreError, match="do not count"):
        open(tmp_path)
