"""The reading side: a finished or running sweep as a mapping from table names to Arrow datasets.

Which question it answers: *what did the sweep find?* Place in the flow: after `store.py`, before reports and
notebooks; needs OUT alone, no model and no probe set. `polyray.open` is `open` here.

Once a run is finished any reader of Hive-partitioned Parquet may read a table's folder instead. Such readers take
layers for numbers where all of them are digits, and see a very long name of a layer shortened.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from polyray import manifest
from polyray.errors import StoreError
from polyray.parts import parts_dataset, table_named
from polyray.schema import TABLES
from polyray.store import Store


class Dataset(Mapping[str, ds.Dataset]):
    """The tables of one run, as they were committed when it was opened.

    `run["neurons"]` is a `pyarrow.dataset.Dataset`; tables kept by layer have a text column `layer`, first.
    `neurons` has the columns of `neuron_summary` too where that exists, and is then held in memory. A table that the
    schema knows but nothing was committed for is not in the mapping, and empty when asked for.

    Args:
        out: folder of the dataset.

    Raises:
        StoreError: the folder holds no run, or a commit record is damaged.
    """

    def __init__(self, out: str | Path) -> None:
        self._store = Store(out)
        self.path: Path | str = self._store.out
        self.run: dict[str, Any] = self._store.run
        self.is_finished: bool = self._store.is_finished
        self._units = self._store.intact()
        self._has_turned = False
        found = manifest.names(self._units, "table")
        self._tables = tuple(t for t in TABLES if t in found)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that are there, in the schema's order."""
        return self._tables

    @property
    def n_parts(self) -> int:
        """How many parts of units it is made of: where a sweep goes on, a dataset opened later has more."""
        return int(self._units.num_rows)

    def __getitem__(self, table: str) -> ds.Dataset:
        """One table.

        While a sweep runs its parts are merged now and then: a table that was taken from here long before it is read
        may then miss a file; take it again. What is taken again has the same rows.

        Raises:
            StoreError: the schema has no such table; the nearest name is given.
        """
        if table == "neurons" and "neuron_summary" in self._tables:
            return ds.dataset(self._neurons_with_summary())
        return self.stored(table)

    def stored(self, table: str) -> ds.Dataset:
        """One table as its parts hold it: `neurons` without the summary, and nothing in memory.

        Raises:
            StoreError: the schema has no such table; the nearest name is given.
        """
        spec = table_named(table)
        if self._is_outdated():
            return ds.dataset(self._read(table))
        rows = manifest.of_table(self._units, table)
        in_layers = pc.sort_indices(manifest.texts(rows, "layer"))
        return parts_dataset(self._store.place, spec, rows.take(in_layers))

    def __contains__(self, table: object) -> bool:
        return table in self._tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, tables={list(self._tables)}, is_finished={self.is_finished})"

    def _is_outdated(self) -> bool:
        """Whether parts were merged since it was opened, perhaps with others that did not count then."""
        self._has_turned = self._has_turned or self._store.has_turned
        return self._has_turned

    def _read(self, table: str) -> pa.Table:
        return self._store.read(table, units=pc.unique(self._units["unit"]).to_pylist())

    def _neurons_with_summary(self) -> pa.Table:
        neurons, summary = (self._read(t) for t in ("neurons", "neuron_summary"))
        keys = ["layer", "neuron"]
        # Arrow joins no list columns, so the keys are joined alone, and the rows then taken by number.
        left = neurons.select(keys).append_column("left", pa.array(range(neurons.num_rows), pa.int64()))
        right = summary.select(keys).append_column("right", pa.array(range(summary.num_rows), pa.int64()))
        matched = left.join(right, keys=keys, join_type="left outer").sort_by("left")["right"]
        for column in summary.drop_columns(keys).schema:
            neurons = neurons.append_column(column, summary[column.name].take(matched))
        return neurons


def open(out: str | Path) -> Dataset:
    """Opens the dataset of a run, finished or still running; what is committed later needs opening again.

    Args:
        out: folder that `polyray run` was given as OUT.

    Returns:
        A mapping from table names to `pyarrow.dataset.Dataset`.

    Raises:
        StoreError: the folder holds no run, or a commit record is damaged.
    """
    if not Path(out).is_dir() and "://" not in str(out):
        raise StoreError(f"there is no folder {str(out)!r}. Give the OUT of a run.")
    return Dataset(out)
