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
import pyarrow.dataset as ds

from polyray.errors import StoreError
from polyray.parts import parts_dataset, read_parts, table_named
from polyray.records import PartInfo
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
        store = Store(out)
        self.path: Path = store.out
        self.run: dict[str, Any] = store.run
        self.is_finished: bool = store.is_finished
        found: dict[str, list[PartInfo]] = {}
        for receipt in store.intact():
            for part in receipt.parts:
                found.setdefault(part.table, []).append(part)
        self._parts = {t: sorted(found[t], key=lambda p: p.layer or "") for t in TABLES if t in found}

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that are there, in the schema's order."""
        return tuple(self._parts)

    def __getitem__(self, table: str) -> ds.Dataset:
        """One table.

        Raises:
            StoreError: the schema has no such table; the nearest name is given.
        """
        if table == "neurons" and "neuron_summary" in self._parts:
            return ds.dataset(self._neurons_with_summary())
        return parts_dataset(self.path, table_named(table), self._parts.get(table, []))

    def __contains__(self, table: object) -> bool:
        return table in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, tables={list(self._parts)}, is_finished={self.is_finished})"

    def _neurons_with_summary(self) -> pa.Table:
        neurons, summary = (
            read_parts(self.path, TABLES[t], self._parts.get(t, [])) for t in ("neurons", "neuron_summary")
        )
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
