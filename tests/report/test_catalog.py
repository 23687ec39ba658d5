"""The catalog: what SQL sees is what the dataset holds, and nothing else."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest
from store.samples import do_unit, new_store, unit_key
from sweeps import Finished

import polyray
from polyray.report.catalog import SUMMARISED, VIEWS, Catalog
from polyray.schema import TABLES


def test_every_view_has_the_rows_and_columns_of_its_table(finished: Finished) -> None:
    catalog, dataset = Catalog(finished.out), polyray.open(finished.out)
    assert set(TABLES) - set(VIEWS) == {"embeddings", "plant_features"}
    for table in VIEWS:
        found = catalog.table(f"SELECT * FROM {table}")
        expected = dataset.stored(table)
        assert (found.num_rows, found.column_names) == (expected.count_rows(), expected.schema.names)


def test_the_summary_is_joined_as_the_dataset_joins_it(finished: Finished) -> None:
    found = Catalog(finished.out).table(f"SELECT * FROM {SUMMARISED} ORDER BY layer, neuron")
    expected = (
        polyray.open(finished.out)["neurons"].to_table().sort_by([("layer", "ascending"), ("neuron", "ascending")])
    )
    expected = expected.rename_columns(["fdr_q" if c == "q" else c for c in expected.column_names])
    assert found.column_names == expected.column_names
    assert found.to_pylist() == expected.to_pylist()
    assert found["fdr_q"].drop_null() != found["Q"].drop_null()


def test_a_value_is_bound_and_not_pasted(finished: Finished) -> None:
    catalog = Catalog(finished.out)
    assert catalog.rows("SELECT * FROM neurons WHERE layer = ?", ["mid' OR ''='"]) == []
    assert len(catalog.rows("SELECT neuron FROM neurons WHERE layer = $layer", {"layer": "mid"})) == 12


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text({path})",
        "SELECT * FROM {path}",
        "COPY (SELECT 1) TO {path}",
        "ATTACH {path} AS other",
        "INSTALL httpfs",
        "SET enable_external_access = true",
    ],
)
def test_no_query_reaches_a_file(finished: Finished, tmp_path: Path, query: str) -> None:
    path = tmp_path / "secret.csv"
    path.write_text("a\n1\n")
    with pytest.raises(duckdb.Error):
        Catalog(finished.out).rows(query.format(path=f"'{path}'"))
    assert path.read_text() == "a\n1\n"


def test_threads_may_ask_at_once(finished: Finished) -> None:
    catalog = Catalog(finished.out)

    def ask(i: int) -> int:
        return int(catalog.rows("SELECT count(*) AS n, ? AS i FROM clusters", [i])[0]["i"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == list(range(40))


def test_rows_of_a_key_are_those_that_a_query_finds(finished: Finished) -> None:
    catalog = Catalog(finished.out)
    for keys in (
        {"layer": "mid"},
        {"layer": "mid", "neuron": 3},
        {"layer": ["mid", "edges"], "neuron": 2},
        {"k": None},
    ):
        where = " AND ".join(
            f"{k} IS NULL" if v is None else f"list_contains(${k}, {k})" if isinstance(v, list) else f"{k} = ${k}"
            for k, v in keys.items()
        )
        values = {k: v for k, v in keys.items() if v is not None}
        expected = catalog.rows(f"SELECT layer, neuron, S FROM neurons WHERE {where} ORDER BY ALL", values)
        found = catalog.at("neurons", ["layer", "neuron", "S"], **keys)
        assert sorted(found, key=lambda r: (r["layer"], r["neuron"])) == expected
        assert expected


def test_what_is_made_is_asked_beside_other_queries(finished: Finished) -> None:
    catalog = Catalog(finished.out)
    catalog.make("CREATE TABLE own AS SELECT neuron FROM neurons WHERE layer = $layer", {"layer": "mid"})
    assert catalog.ask("SELECT count(*) AS n FROM own").to_pylist() == [{"n": 12}]
    with ThreadPoolExecutor(1) as pool, catalog._lock:  # a long query of the dataset holds it
        assert pool.submit(lambda: catalog.ask("SELECT 1 AS x").num_rows).result(timeout=30) == 1
    catalog.make("DROP TABLE own")
    with pytest.raises(duckdb.Error):
        catalog.ask("SELECT * FROM own")


@pytest.mark.parametrize("query", ["SELECT * FROM read_text('/etc/hostname')", "SELECT * FROM '/etc/hostname'"])
def test_what_is_asked_beside_reaches_no_file_either(finished: Finished, query: str) -> None:
    with pytest.raises(duckdb.Error):
        Catalog(finished.out).ask(query)


def test_parts_that_were_merged_meanwhile_are_found(tmp_path: Path) -> None:
    store = new_store(tmp_path / "out")
    for i in range(6):
        do_unit(store, i)
    catalog = Catalog(tmp_path / "out")
    rows = catalog.table("SELECT layer, neuron FROM mine_parts ORDER BY ALL")
    store.compact()
    assert catalog.table("SELECT layer, neuron FROM mine_parts ORDER BY ALL") == rows
    store.retire(unit_key(0))
    store.compact()
    for i in range(6, 12):
        do_unit(store, i)
    store.compact()
    assert len(catalog.at("mine_parts", ["neuron"], layer="blocks.1")) == 20


def test_what_memory_does_not_hold_goes_where_it_is_taken_away(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    catalog = Catalog(finished.out, memory_mb=64)
    folder = Path(catalog.rows("SELECT current_setting('temp_directory') AS at")[0]["at"])
    catalog.make("CREATE TABLE big AS SELECT range AS i, hash(range) AS h FROM range(12_000_000)")
    assert list(folder.iterdir())
    assert catalog.ask("SELECT count(*) AS n FROM big").to_pylist() == [{"n": 12_000_000}]
    assert list(tmp_path.iterdir()) == []
    del catalog
    gc.collect()
    assert not folder.exists()
