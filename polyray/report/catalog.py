"""Catalog: a dataset as tables that SQL asks, for the report and the viewer.

Which question it answers: *which rows are these, of millions, without holding them?* Place in the flow: after
`dataset.py`; DuckDB scans the parts, so that what is asked for is all that is read. Values are bound to a query, never
pasted into it.
"""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from polyray.dataset import Dataset, open
from polyray.schema import TABLES


def _holds_halves(column: pa.DataType) -> bool:
    return pa.types.is_float16(column) or (pa.types.is_nested(column) and pa.types.is_float16(column.value_type))


SUMMARISED = "neurons_with_summary"
"""View of `neurons` with the columns of `neuron_summary`, null where there is none yet. Its `q` is called `fdr_q`: to
SQL the names of columns have no case, and `Q` is another column."""
VIEWS = tuple(t.name for t in TABLES.values() if not any(_holds_halves(f.type) for f in t.schema))
"""Tables that can be asked: all but those that hold float16, which DuckDB does not read from Arrow."""


class Catalog:
    """Every table of `VIEWS` as a view; what nothing was committed for is an empty one.

    It shows what was committed when it was opened, or last refreshed. Any thread may ask.

    Args:
        out: folder or address of the dataset.
        memory_mb: what DuckDB may hold.
        n_threads: threads that it works with.

    Raises:
        StoreError: the folder holds no run, one of a newer schema version, or a commit record is damaged.
    """

    def __init__(self, out: str | Path, memory_mb: int = 400, n_threads: int = 2) -> None:
        self._out = out
        self._lock = threading.RLock()
        self._stored: dict[str, ds.Dataset] = {}
        # What memory does not hold goes here, and not where DuckDB would put it: into the folder one stands in.
        self._spilled = tempfile.TemporaryDirectory(prefix="polyray-")
        settings: dict[str, Any] = {
            "memory_limit": f"{memory_mb}MB",
            "threads": n_threads,
            "temp_directory": self._spilled.name,
        }
        self._duck = duckdb.connect(":memory:", config=settings)
        # Joins are done as they are written, the smaller table last: of a dataset's tables DuckDB knows no sizes, and
        # where it guesses wrong it holds the larger one, and fails where that does not fit.
        self._duck.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        # Only what is handed over may be read: no path in a query reaches a file, and no extension is fetched.
        self._duck.execute("SET autoinstall_known_extensions = false")
        self._duck.execute("SET autoload_known_extensions = false")
        self._duck.execute("SET enable_external_access = false")
        self.refresh()

    def refresh(self) -> Dataset:
        """Opens the dataset anew: what was committed since is seen from now on."""
        dataset = open(self._out)
        stored = {table: dataset.stored(table) for table in VIEWS}
        with self._lock:
            self.dataset, self._stored = dataset, stored
            for table in VIEWS:
                self._duck.register(table, stored[table])
            self._duck.execute(
                f"CREATE OR REPLACE TEMP VIEW {SUMMARISED} AS "
                "SELECT neurons.*, neuron_summary.q AS fdr_q, called, diagnosis "
                "FROM neurons LEFT JOIN neuron_summary USING (layer, neuron)"
            )
        return dataset

    def table(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> pa.Table:
        """The rows of a query, with `?` or `$name` where its values go."""
        with self._lock:
            try:
                return self._duck.sql(query, params=values or None).to_arrow_table()
            except (duckdb.Error, OSError) as e:
                if not self._moved(e):
                    raise
                return self._duck.sql(query, params=values or None).to_arrow_table()

    def rows(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[dict[str, Any]]:
        """The same as a record for each row."""
        return self.table(query, values).to_pylist()

    def make(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> None:
        """Makes or drops a table of the catalog's own, in memory, which `ask` finds."""
        with self._lock:
            try:
                self._duck.execute(query, values or None)
            except (duckdb.Error, OSError) as e:
                if not self._moved(e):
                    raise
                self._duck.execute(query, values or None)

    def ask(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> pa.Table:
        """The rows of a query of the tables that were made: it waits for no other thread's."""
        with self._duck.cursor() as cursor:
            return cursor.sql(query, params=values or None).to_arrow_table()

    def at(self, table: str, columns: Sequence[str] | None = None, **keys: object) -> list[dict[str, Any]]:
        """The rows of a table with these values in these columns, such as one neuron's, by way of Arrow alone.

        Only the files and row groups that may hold them are read.

        Args:
            table: one of `VIEWS`.
            columns: which to read; all by default.
            **keys: value of a column, None for null, or a list of values that it may have.
        """
        where = ds.scalar(True)
        for name, value in keys.items():
            field = pc.field(name)
            where &= (
                field.is_null() if value is None else field.isin(value) if isinstance(value, list) else field == value
            )
        names = None if columns is None else list(columns)
        try:
            return self._stored[table].to_table(names, where).to_pylist()
        except OSError as e:
            if not self._moved(e):
                raise
            return self._stored[table].to_table(names, where).to_pylist()

    def _moved(self, error: Exception) -> bool:
        """Whether the parts of a running sweep were merged in the meantime; then it has looked again."""
        if self.dataset.is_finished or "No such file" not in str(error):
            return False
        self.refresh()
        return True
