"""The catalog: what SQL sees is what the dataset holds, and nothing else."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest
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
