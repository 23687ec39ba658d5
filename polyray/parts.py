"""Parts: the rows of one unit for one table and layer, on their way into a Parquet file and out again.

Which question it answers: *are these rows what the schema says, and what do the files hold?* Place in the flow:
under `store.py`, which decides when a part is written and which parts count.
"""

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from polyray import files
from polyray.digest import in_order
from polyray.errors import StoreError, nearest
from polyray.records import PartInfo
from polyray.schema import TABLES, Table

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
    # Real numbers hardly repeat: a dictionary of them costs time and space.
    repeating = [f.name for f in rows.schema if pa.types.is_integer(f.type) or pa.types.is_string(f.type)]
    rows = rows.replace_schema_metadata({"polyray.run_id": run_id})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", use_dictionary=repeating)
    return sink.getvalue().to_pybytes()


def parts_dataset(out: Path, table: Table, parts: Iterable[PartInfo]) -> ds.Dataset:
    """Exactly these parts as one dataset, in order, with `layer` as the records say it."""
    schema = full_schema(table)
    layout, disk = ds.ParquetFileFormat(), pyarrow.fs.LocalFileSystem()
    fragments = [
        layout.make_fragment(
            str(out / part.path),
            disk,
            partition_expression=ds.field("layer") == part.layer if table.by_layer else ds.scalar(True),
        )
        for part in parts
    ]
    if not fragments:
        return ds.dataset(schema.empty_table())
    return ds.FileSystemDataset(fragments, schema, layout, disk)


def read_parts(out: Path, table: Table, parts: Iterable[PartInfo], columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of these parts, sorted by layer and the table's key; rows of equal key keep the order of the parts.

    Raises:
        StoreError: a column is unknown, or a part is missing or damaged.
    """
    known = full_schema(table).names
    chosen = known if columns is None else list(columns)
    for column in chosen:
        if column not in known:
            raise StoreError(f"table {table.name!r} has no column {column!r}.{nearest(column, known)}")
    order = (["layer"] if table.by_layer else []) + list(table.key)
    needed = chosen + [k for k in order if k not in chosen]
    try:
        rows = parts_dataset(out, table, parts).to_table(columns=needed)
    except (OSError, pa.ArrowException) as e:
        raise StoreError(
            f"cannot read table {table.name!r} of {str(out)!r}: {e}. A committed part is missing or damaged: "
            "`polyray verify` names it; delete its unit's record in commits/ and run again to do the unit again."
        ) from e
    return in_order(rows, order).select(chosen)


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
