"""Export: what the table shows, all pages of it, as a file.

Place in the flow: over `neurons.py`; rows are written as they are read, so that a million of them take no memory.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from polyray.view import words
from polyray.view.asked import Asked, preset_of
from polyray.view.columns import STATUSES, Kind
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
    wanted = schema(index.kind, preset_of(asked, index.kind))
    texts = _texts(index)
    layers, statuses, reasons, diagnoses = (
        pa.array(list(x), pa.string()) for x in (index.layers, STATUSES, index.reasons, index.diagnoses)
    )
    numbers = [c.of(preset_of(asked, index.kind)) for c in index.kind.columns]
    for rows in all_rows(index, asked):
        found = _in_order(index, rows, numbers)
        columns = [layers.take(_one(found["layer_id"])), found["neuron"]]
        columns += [statuses.take(_one(found["status"])), reasons.take(_one(found["reason"]))]
        columns += [found[name] for name in numbers]
        columns += [diagnoses.take(_one(found["diagnosis"])), _named(found["names"], texts)]
        yield pa.table([c.cast(f.type) for c, f in zip(columns, wanted, strict=True)], schema=wanted)


def _in_order(index: Index, rows: NDArray[np.int64], numbers: list[str]) -> pa.Table:
    """Rows of the index in this order, with the numbers of their clusters' names, or of their first core-tokens."""
    first = "layer_id, neuron, status, reason, diagnosis, " + ", ".join(f"n.{name}" for name in numbers)
    wanted = "(SELECT unnest($rows::BIGINT[]) AS row, unnest($places::BIGINT[]) AS place) w"
    values: dict[str, object] = {"rows": rows.tolist(), "places": list(range(len(rows)))}
    if index.is_categorical:
        query = (
            f"SELECT {first}, n.tokens AS names FROM {index.neurons} n JOIN {wanted} ON n.rowid = w.row ORDER BY place"
        )
    else:
        of = f"SELECT row, list(name ORDER BY cluster) AS names FROM {index.clusters} SEMI JOIN {wanted} USING (row)"
        query = (
            f"SELECT {first}, names FROM {index.neurons} n JOIN {wanted} ON n.rowid = w.row "
            f"LEFT JOIN ({of} GROUP BY row) c ON c.row = w.row ORDER BY place"
        )
    return index.numbers(query, values)


def _texts(index: Index) -> pa.Array:
    """Texts by their number."""
    found: list[str | None] = [None] * (max(index.texts, default=-1) + 1)
    for i, text in index.texts.items():
        found[i] = text
    return pa.array(found, pa.string())


def _named(numbers: pa.ChunkedArray, texts: pa.Array) -> pa.Array:
    lists = _one(numbers)
    inside = pc.list_flatten(lists)
    known = pc.if_else(pc.less(inside, len(texts)), inside, None)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), texts.take(known))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


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
