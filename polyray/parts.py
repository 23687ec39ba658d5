"""Parts: the rows of one unit for one table and layer, on their way into a Parquet file and out again.

Which question it answers: *are these rows what the schema says, and what do the files hold?* Place in the flow:
under `store.py`, which decides when a part is written and which parts count.
"""

import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from polyray import files
from polyray.digest import in_order
from polyray.errors import StoreError, nearest
from polyray.lease import COMMITS
from polyray.records import Receipt
from polyray.schema import TABLES, Table

_PART = re.compile(r".+-[0-9a-f]{8}\.parquet")

LAYER = pa.field("layer", pa.string(), metadata={"doc": "name of the layer"})


def table_named(name: str) -> Table:
    """The description of a table; `StoreError` with the nearest name where there is none."""
    if name not in TABLES:
        raise StoreError(f"there is no table {name!r}.{nearest(name, TABLES)}")
    return TABLES[name]


def full_schema(table: Table) -> pa.Schema:
    """Schema that readers see: the part's own, after `layer` where the table is kept by layer."""
    return pa.schema([LAYER, *table.schema]) if table.by_layer else table.schema


def folder_name(table: Table, layer: str | None) -> str:
    """Folder of a table's parts, relative to OUT, partitioned as Hive does."""
    if table.by_layer != (layer is not None):
        kept = "kept by layer: name the layer" if table.by_layer else "not kept by layer: layer must be None"
        raise StoreError(f"table {table.name!r} is {kept}, got layer {layer!r}.")
    return table.name if layer is None else f"{table.name}/layer={files.quoted(layer)}"


def part_name(unit_key: str) -> str:
    """A new file name for one attempt at a unit."""
    return f"{files.quoted(unit_key)}-{uuid.uuid4().hex[:8]}.parquet"


def new_name(place: files.Place, folder: str, unit_key: str) -> str:
    """A name that no part has yet, relative to OUT."""
    while True:
        name = f"{folder}/{part_name(unit_key)}"
        if place.n_bytes([name]) == [None]:
            return name


def require_parts(place: files.Place, receipts: Sequence[Receipt]) -> None:
    """Makes sure that all parts of receipts are there; `StoreError` where one is gone or was cut short."""
    parts = [(part, receipt.unit_key) for receipt in receipts for part in receipt.parts]
    sizes = place.n_bytes([part.path for part, _ in parts])
    for (part, unit_key), n_bytes in zip(parts, sizes, strict=True):
        if n_bytes != part.n_bytes:
            found = "is gone" if n_bytes is None else f"has {n_bytes} bytes, was written with {part.n_bytes}"
            raise StoreError(f"part {part.path!r} of unit {unit_key!r} {found}: do the unit again.")


def part_files(place: files.Place) -> list[str]:
    """Sorted paths, relative to OUT, of all parts and of what unfinished writes left behind."""
    loose = [name for name in place.names() if files.is_temporary(name)]
    below = [path for folder in (COMMITS, *TABLES) for path in place.files_below(folder)]
    return sorted(loose + [p for p in below if p.endswith(".parquet") or files.is_temporary(Path(p).name)])


def removable(path: str) -> bool:
    """Whether a file is one that only polyray can have made, so that it may be removed as an orphan."""
    name = Path(path).name
    return files.is_temporary(name) or _PART.fullmatch(name) is not None


def conform(rows: pa.Table, table: Table) -> pa.Table:
    """Rows with exactly the table's columns, types and order.

    Args:
        rows: columns in any order. A column is cast within its kind (integers, floats, text, lists of these) and
            from integers to floats; floats may be rounded, nothing else may be lost.
        table: what the rows must become.

    Raises:
        StoreError: a column is missing, unknown, there twice, of another kind, or has a value that does not fit.
    """
    given, wanted = rows.column_names, table.schema.names
    missing = [c for c in wanted if c not in given]
    unknown = [c for c in given if c not in wanted]
    if missing or unknown or len(given) != len(wanted):
        raise StoreError(
            f"rows for table {table.name!r} must have each of its columns once; "
            f"missing: {missing or 'none'}, unknown: {unknown or 'none'}, "
            f"twice: {sorted({c for c in given if given.count(c) > 1}) or 'none'}."
        )
    return pa.table([_cast(rows.column(f.name), f, table.name) for f in table.schema], schema=table.schema)


def to_parquet(rows: pa.Table, run_id: str) -> bytes:
    """Rows as the bytes of a Parquet file, which says what each column means and which run it is of."""
    sink = pa.BufferOutputStream()
    with new_parquet(sink, rows.schema, run_id) as writer:
        writer.write_table(rows.replace_schema_metadata(writer.schema.metadata))
    return sink.getvalue().to_pybytes()


def new_parquet(sink: object, schema: pa.Schema, run_id: str) -> pq.ParquetWriter:
    """A Parquet file to be written, as all of a dataset are."""
    # Real numbers hardly repeat: a dictionary of them costs time and space.
    repeating = [f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_string(f.type)]
    schema = schema.with_metadata({"polyray.run_id": run_id})
    return pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=repeating)


class PartsError(StoreError):
    """A part that should be there cannot be read."""


def parts_dataset(place: files.Place, table: Table, rows: pa.Table) -> ds.Dataset:
    """All files that these rows of a manifest name as one dataset, in order, with `layer` as the manifest says it."""
    return _dataset(table, _fragments(place, table, rows), place)


def read_parts(
    place: files.Place,
    table: Table,
    rows: pa.Table,
    columns: Sequence[str] | None = None,
    *,
    whole_files: bool = True,
) -> pa.Table:
    """Rows of these parts, sorted by layer and the table's key; rows of equal key keep the order of the parts.

    Args:
        place: where the dataset lies.
        table: what the rows are.
        rows: of a manifest, all of this table.
        columns: which to read; all by default.
        whole_files: whether nothing else lies in the files; otherwise the row groups that are needed are read.

    Raises:
        StoreError: a column is unknown.
        PartsError: a part is missing or damaged.
    """
    known = full_schema(table).names
    chosen = known if columns is None else list(columns)
    for column in chosen:
        if column not in known:
            raise StoreError(f"table {table.name!r} has no column {column!r}.{nearest(column, known)}")
    order = (["layer"] if table.by_layer else []) + list(table.key)
    needed = chosen + [k for k in order if k not in chosen]
    try:
        found = _in_units(place, table, rows, needed, whole_files)
    except (OSError, pa.ArrowException, _OtherRowsError) as e:
        raise PartsError(
            f"cannot read table {table.name!r} of {place.at('')!r}: {e}. A committed part is missing or damaged: "
            "`polyray verify` names it. Restore it, or run the sweep into a new OUT."
        ) from e
    return in_order(found, order).select(chosen)


class _OtherRowsError(Exception):
    pass


def _in_units(place: files.Place, table: Table, rows: pa.Table, columns: list[str], whole_files: bool) -> pa.Table:
    """What the parts hold, in their order, whatever order their files hold them in."""
    parts = list(zip(*(rows[c].to_pylist() for c in ("path", "start", "n_rows")), strict=True))
    fragments = _fragments(place, table, rows)
    spans: dict[str, list[tuple[int, int]]] = {path: [] for path in fragments}
    for path, start, n in parts:
        spans[path].append((start or 0, n))
    n_read = {path: sum(n for _, n in of_file) for path, of_file in spans.items()}
    skips: dict[str, _Skips] = {}
    if not whole_files:
        for path in {path for path, start, _ in parts if start is not None}:
            skips[path] = _Skips(fragments[path].metadata, spans[path])
            fragments[path] = fragments[path].subset(row_group_ids=skips[path].kept)
            n_read[path] = skips[path].n_rows
    found = _dataset(table, fragments, place).to_table(columns=columns)
    if found.num_rows != sum(n_read.values()):
        raise _OtherRowsError(f"{found.num_rows} rows were found where {sum(n_read.values())} were committed")
    begins = dict(zip(n_read, np.cumsum([0, *n_read.values()]).tolist(), strict=False))
    slices: list[list[int]] = []
    for path, start, n in parts:
        begin = begins[path] + (skips[path].position(start) if path in skips else start or 0)
        if slices and slices[-1][1] == begin:
            slices[-1][1] += n
        else:
            slices.append([begin, begin + n])
    if slices in ([], [[0, found.num_rows]]):
        return found
    return pa.concat_tables(found.slice(start, stop - start) for start, stop in slices)


class _Skips:
    """The row groups of a file that hold some rows, and where those rows are once the others are left out.

    Args:
        metadata: of the file.
        spans: first row and number of rows of what is wanted.
    """

    def __init__(self, metadata: pq.FileMetaData, spans: Sequence[tuple[int, int]]) -> None:
        n_rows = np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], np.int64)
        self._stops = np.cumsum(n_rows)
        first, n = np.array(spans, np.int64).T
        # +1 where a span enters its first group and −1 past its last: their running sum counts the spans in a group.
        change = np.zeros(len(n_rows) + 1, np.int64)
        np.add.at(change, np.searchsorted(self._stops, first[n > 0], side="right"), 1)
        np.add.at(change, np.searchsorted(self._stops, (first + n)[n > 0], side="left") + 1, -1)
        wanted = np.cumsum(change)[:-1] > 0
        self.kept: list[int] = np.flatnonzero(wanted).tolist()
        self.n_rows = int(n_rows[wanted].sum())
        self._skipped = np.append(np.cumsum(np.where(wanted, 0, n_rows)), 0)

    def position(self, row: int) -> int:
        """Where a wanted row of the file is among those that are read."""
        return row - int(self._skipped[np.searchsorted(self._stops, row, side="right")])


def _fragments(place: files.Place, table: Table, rows: pa.Table) -> dict[str, ds.ParquetFileFragment]:
    """The files that these rows of a manifest name, each once, in order."""
    layout = ds.ParquetFileFormat()
    disk, above = place.filesystem()
    of_file = dict(zip(rows["path"].to_pylist(), rows["layer"].to_pylist(), strict=True))
    return {
        path: layout.make_fragment(
            f"{above}/{path}",
            disk,
            partition_expression=ds.field("layer") == layer if table.by_layer else ds.scalar(True),
        )
        for path, layer in of_file.items()
    }


def _dataset(table: Table, fragments: dict[str, ds.ParquetFileFragment], place: files.Place) -> ds.Dataset:
    schema = full_schema(table)
    if not fragments:
        return ds.dataset(schema.empty_table())
    return ds.FileSystemDataset(list(fragments.values()), schema, ds.ParquetFileFormat(), place.filesystem()[0])


def _cast(column: pa.ChunkedArray, field: pa.Field, table: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.type == field.type:
        return column
    problem = f"is {column.type}, must be {field.type}"
    try:
        cast = column.cast(field.type) if _same_kind(column.type, field.type) else None
    except pa.ArrowException as e:
        cast, problem = None, f"{problem}: {e}"
    if cast is not None and _n_infinite(cast) > _n_infinite(column):
        cast, problem = None, f"{problem}: a finite value is too large for it"
    if cast is None:
        raise StoreError(f"table {table!r}, column {field.name!r} {problem}. Cast it before writing.")
    return cast


def _same_kind(given: pa.DataType, wanted: pa.DataType) -> bool:
    t = pa.types
    if t.is_null(given):
        return True
    if t.is_list(wanted):
        listed = t.is_list(given) or t.is_large_list(given) or t.is_fixed_size_list(given)
        return listed and (given.value_type == wanted.value_type or _same_kind(given.value_type, wanted.value_type))
    if t.is_integer(wanted):
        return t.is_integer(given)
    if t.is_floating(wanted):
        return t.is_integer(given) or t.is_floating(given)
    if t.is_string(wanted):
        return t.is_string(given) or t.is_large_string(given) or t.is_string_view(given)
    if t.is_binary(wanted):
        return t.is_binary(given) or t.is_large_binary(given) or t.is_binary_view(given)
    return False


def _n_infinite(column: pa.ChunkedArray) -> int:
    total = 0
    for array in column.chunks:
        while pa.types.is_nested(array.type):
            array = array.flatten()
        if pa.types.is_floating(array.type):
            total += int(np.isinf(array.to_numpy(zero_copy_only=False)).sum())
    return total
