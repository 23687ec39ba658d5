"""Export: what the table shows, all pages of it, as a file.

Place in the flow: over `neurons.py`; rows are written as they are read, so that a million of them take no memory.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from polyray.view import words
from polyray.view.asked import Asked, preset_of
from polyray.view.columns import Kind
from polyray.view.index import Index
from polyray.view.neurons import all_rows

_TYPES = {"float": pa.float64(), "p": pa.float64(), "count": pa.int64(), "flag": pa.bool_()}


def schema(kind: Kind, preset: str) -> pa.Schema:
    """Columns of an export, under the names that the dataset has for them."""
    first = [("layer", pa.string()), ("neuron", pa.int32()), ("status", pa.string()), ("reason", pa.string())]
    numbers = [(c.of(preset), _TYPES[c.shown]) for c in kind.columns]
    names = [("diagnosis", pa.string()), (kind.names.replace("-", "_"), pa.list_(pa.string()))]
    return pa.schema([*first, *numbers, *names])


def tables(index: Index, asked: Asked) -> Iterator[pa.Table]:
    """All rows, some at a time."""
    preset = preset_of(asked, index.kind)
    wanted = schema(index.kind, preset)
    sources = ["layer", "neuron", "status", "reason", *(c.key for c in index.kind.columns), "diagnosis", "names"]
    for rows in all_rows(index, asked):
        columns = [[r[source] for r in rows] for source in sources]
        yield pa.table([pa.array(x, f.type) for x, f in zip(columns, wanted, strict=True)], schema=wanted)


def csv(index: Index, asked: Asked) -> Iterator[bytes]:
    """Rows as CSV: names are parted by `; `, a missing value is empty, no text is taken for a formula."""
    names = schema(index.kind, preset_of(asked, index.kind)).names
    yield words.csv_line(names).encode()
    for table in tables(index, asked):
        columns = [_cells(table[name]) for name in names]
        yield "".join(words.csv_line(list(line)) for line in zip(*columns, strict=True)).encode()


def _cells(column: pa.ChunkedArray) -> list[str]:
    values = column.to_pylist()
    if pa.types.is_string(column.type):
        return ["" if v is None else words.cell(v) for v in values]
    if pa.types.is_list(column.type):
        return ["" if v is None else words.cell("; ".join(x or "" for x in v)) for v in values]
    if pa.types.is_boolean(column.type):
        return ["" if v is None else str(v).lower() for v in values]
    return ["" if v is None else repr(v) for v in values]


def parquet(index: Index, asked: Asked) -> Iterator[bytes]:
    """Rows as a Parquet file, a row group at a time."""
    sink = _Sink()
    with pq.ParquetWriter(sink, schema(index.kind, preset_of(asked, index.kind)), compression="zstd") as writer:
        for table in tables(index, asked):
            writer.write_table(table)
            yield sink.taken()
    yield sink.taken()


class _Sink:
    """Holds what was written until it is taken. As much of a file as Arrow asks for."""

    closed = False

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._n_bytes = 0

    def write(self, data: bytes) -> int:
        self._held.append(bytes(data))
        self._n_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self._n_bytes

    def flush(self) -> None:
        """What is held is taken by whoever reads."""

    close = flush

    def taken(self) -> bytes:
        data = b"".join(self._held)
        self._held.clear()
        return data
