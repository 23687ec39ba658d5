"""Which question it answers: *which pictures does a Parquet or Arrow table hold?*

Place in the flow: one of the sources behind `polyray.probes.images.open_probe`. Labels are read at once, pictures in
batches as they are asked for, so that memory does not grow with the table.
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from polyray.config import ImageTable
from polyray.errors import DataError, nearest
from polyray.probes.pixels import MAX_BYTES
from polyray.probes.probe_set import EncodedSet, distinct_labels, existing, spread, text_of, visible

CACHE_BYTES = 64 * 2**20
"""Encoded pictures kept in memory by one open table."""

_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20
_IPC_MAGIC = b"ARROW1"

Batches = Callable[[], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class _Segment:
    """Consecutive rows that are read from their first on: a Parquet row group, a record batch, an Arrow stream."""

    n_rows: int
    batches: Batches


@dataclass(frozen=True)
class _Source:
    """One file of a table."""

    schema: pa.Schema
    labels: pa.ChunkedArray
    segments: list[_Segment]


class TableSet(EncodedSet):
    """Pictures of a table, in the order of its rows; of a folder's Parquet files in the order of their names.

    Integer labels are named by the Hugging Face metadata of the table where it has them. A row without picture or
    without label costs itself.

    Raises:
        DataError: the path is missing or no table, a column is missing or of another type, or there are no rows.
    """

    kind = "table"

    def __init__(self, config: ImageTable) -> None:
        path = existing(config.path, "a .parquet, .arrow or .feather file, or a folder of .parquet files,")
        files = [path]
        if path.is_dir():
            files = [path / f for f in visible(entry.name for entry in path.glob("*.parquet"))]
            if not files:
                raise DataError(f"probe.path {config.path!r} is a folder without .parquet files.")
        labels: list[str] = []
        names: list[str] = []
        self._segments: list[_Segment] = []
        for file in files:
            source = _open(file, config)
            prefix = f"{text_of(file.name)} " if path.is_dir() else ""
            names += [f"{prefix}row {row}" for row in range(len(source.labels))]
            labels += _label_texts(source, config.label_column, file)
            self._segments += source.segments
        if not names:
            raise DataError(f"probe.path {config.path!r} is a table without rows.")
        self._rows = spread(len(names), config.limit)
        self.name = text_of(path.stem)
        self.notes = []
        self.labels = [labels[row] for row in self._rows]
        self.names = [names[row] for row in self._rows]
        self._starts = [0]
        for segment in self._segments:
            self._starts.append(self._starts[-1] + segment.n_rows)
        self._column = config.image_column
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()  # first row -> pictures of a batch, oldest first
        self._running: tuple[int, int, Iterator[pa.RecordBatch]] | None = None  # segment, next row, batches to come

    def encoded(self, example: int) -> bytes:
        if not self.labels[example]:
            raise DataError("no label")
        first, pictures = self._batch_of(self._rows[example])
        value = pictures[self._rows[example] - first].as_py()
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise DataError("no image bytes in this row")
        if len(value) > MAX_BYTES:
            raise DataError(f"too large: above {MAX_BYTES:,} bytes")
        return bytes(value)

    def _batch_of(self, row: int) -> tuple[int, pa.Array]:
        """First row and pictures of the batch that holds a row; reads on from where the last call stopped if it can."""
        for first, pictures in self._cache.items():
            if first <= row < first + len(pictures):
                self._cache.move_to_end(first)
                return first, pictures
        segment = bisect_right(self._starts, row) - 1
        if self._running is None or self._running[0] != segment or self._running[1] > row:
            self._running = (segment, self._starts[segment], self._segments[segment].batches())
        _, first, batches = self._running
        try:
            for batch in batches:
                pictures = batch.column(self._column)
                self._running = (segment, first + len(pictures), batches)
                self._keep(first, pictures)
                if row < first + len(pictures):
                    return first, pictures
                first += len(pictures)
        except (pa.ArrowException, OSError) as e:
            self._running = None
            raise DataError("damaged in the table") from e
        self._running = None
        raise DataError("damaged in the table: fewer rows than its metadata says")

    def _keep(self, first: int, pictures: pa.Array) -> None:
        self._cache[first] = pictures
        self._cache.move_to_end(first)
        while len(self._cache) > 1 and sum(p.nbytes for p in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)


def _open(path: Path, config: ImageTable) -> _Source:
    """Schema, labels and segments of one file; raises `DataError` where it is no table or lacks a column."""
    try:
        if path.suffix == ".parquet":
            return _open_parquet(path, config)
        with path.open("rb") as file:
            is_file_format = file.read(len(_IPC_MAGIC)) == _IPC_MAGIC
        return _open_arrow_file(path, config) if is_file_format else _open_arrow_stream(path, config)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"probe.path: {str(path)!r} is not a readable Parquet or Arrow table: {e}") from e


def _open_parquet(path: Path, config: ImageTable) -> _Source:
    column = config.image_column

    def batches(group: int) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)

    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow, config, path)
        labels = file.read(columns=[config.label_column], use_threads=False).column(config.label_column)
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        segments = [_Segment(n, partial(batches, group)) for group, n in enumerate(counts)]
        return _Source(file.schema_arrow, labels, segments)


def _open_arrow_file(path: Path, config: ImageTable) -> _Source:
    def batch(number: int, column: str) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source:
            fields = [pa.ipc.open_file(source).schema.get_field_index(column)]
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
            yield pa.ipc.open_file(source, options=options).get_batch(number)

    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        _check_columns(reader.schema, config, path)
        numbers = range(reader.num_record_batches)
    chunks = [next(batch(number, config.label_column)).column(config.label_column) for number in numbers]
    labels = pa.chunked_array(chunks, type=reader.schema.field(config.label_column).type)
    segments = [
        _Segment(len(chunk), partial(batch, number, config.image_column)) for number, chunk in enumerate(chunks)
    ]
    return _Source(reader.schema, labels, segments)


def _open_arrow_stream(path: Path, config: ImageTable) -> _Source:
    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source:
            yield from pa.ipc.open_stream(source)

    with pa.memory_map(str(path)) as source:
        schema = pa.ipc.open_stream(source).schema
    _check_columns(schema, config, path)
    chunks = [batch.column(config.label_column) for batch in batches()]
    labels = pa.chunked_array(chunks, type=schema.field(config.label_column).type)
    return _Source(schema, labels, [_Segment(len(labels), batches)])


def _check_columns(schema: pa.Schema, config: ImageTable, path: Path) -> None:
    for key, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column not in schema.names:
            raise DataError(f"probe.{key}: {path.name!r} has no column {column!r}.{nearest(column, schema.names)}")
        if schema.names.count(column) > 1:
            raise DataError(f"probe.{key}: {path.name!r} has several columns {column!r}; rename all but one.")
    image, label = schema.field(config.image_column).type, schema.field(config.label_column).type
    if pa.types.is_struct(image):
        field = image.get_field_index("bytes")
        ok = field >= 0 and _is_bytes(image.field(field).type)
    else:
        ok = _is_bytes(image)
    if not ok:
        raise DataError(
            f"probe.image_column: column {config.image_column!r} of {path.name!r} is {image}; "
            "it must be encoded images as binary, or a struct with a binary field 'bytes'."
        )
    if pa.types.is_dictionary(label):
        label = label.value_type
    if not (pa.types.is_integer(label) or _is_text(label)):
        raise DataError(
            f"probe.label_column: column {config.label_column!r} of {path.name!r} is {label}; "
            "it must be text or integer."
        )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _label_texts(source: _Source, column: str, path: Path) -> list[str]:
    """Label of every row as text; empty where it is null."""
    try:
        values = source.labels.to_pylist()
    except UnicodeDecodeError as e:
        raise DataError(f"probe.label_column: column {column!r} of {path.name!r} holds text that is not UTF-8.") from e
    names = _class_names(source.schema, column)
    texts = {v: names[v] if isinstance(v, int) and 0 <= v < len(names) else str(v) for v in set(values) - {None}}
    texts[None] = ""
    return [texts[value] for value in values]


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """Class names that the Hugging Face metadata gives for an integer column, in order; empty where it gives none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return []
    return list(distinct_labels({str(i): name for i, name in enumerate(names)}).values())
