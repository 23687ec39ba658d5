"""The manifest: everything that counts at one moment, in columns, small enough for a hundred thousand units.

Which question it answers: *which units are done, and in which rows of which files do theirs lie?* Place in the flow:
`ledger.py` writes one at the start of every generation; `store.py`, `dataset.py` and `verify.py` look things up in it.
One row per part, and one with no table for a unit that wrote nothing; sorted by unit. On the disk it is a line of JSON
with a checksum, and Parquet after it.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from polyray.digest import table_digest
from polyray.errors import StoreError
from polyray.records import PartInfo, Receipt
from polyray.schema import TABLES

_NAME = pa.dictionary(pa.int32(), pa.string())

COLUMNS = pa.schema(
    [
        ("unit", pa.string()),
        ("stage", _NAME),
        ("seconds", pa.float64()),
        ("host", _NAME),
        ("number", pa.int32()),  # of the part in its unit's receipt
        ("table", _NAME),
        ("layer", _NAME),
        ("n_rows", pa.int64()),
        ("start", pa.int64()),
        ("digest", pa.binary(32)),
        ("path", _NAME),
        ("n_bytes", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)
"""What a manifest says of a part; `records.PartInfo` and `records.Receipt` say what the columns mean."""

_PLAIN = ("unit", "seconds", "digest")
_BATCH = 8192


class TableDigest(TypedDict):
    """Rows and digest of one whole table."""

    n_rows: int
    digest: str


def of_receipts(receipts: Iterable[Receipt]) -> pa.Table:
    """The rows of these receipts, sorted by unit."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
    for r in sorted(receipts, key=lambda r: r.unit_key):
        for number, p in enumerate(r.parts or [None]):
            row: dict[str, Any] = {"unit": r.unit_key, "stage": r.stage, "seconds": r.seconds, "host": r.host}
            if p is not None:
                row |= {"number": number, "table": p.table, "layer": p.layer, "n_rows": p.n_rows, "start": p.start}
                row |= {"digest": bytes.fromhex(p.digest), "sha256": bytes.fromhex(p.sha256)}
                row |= {"path": p.path, "n_bytes": p.n_bytes}
            for name, values in columns.items():
                values.append(row.get(name))
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in COLUMNS}, schema=COLUMNS)


def combined(tables: Iterable[pa.Table]) -> pa.Table:
    """Rows of several manifests as one, sorted by unit, a unit's parts in the order of its receipt."""
    rows = pa.concat_tables(list(tables)).unify_dictionaries().combine_chunks()
    order = pc.sort_indices(rows, sort_keys=[("unit", "ascending"), ("number", "ascending")])
    return rows if np.array_equal(order, np.arange(rows.num_rows)) else rows.take(order).combine_chunks()


def of_units(units: pa.Table, wanted: Iterable[str]) -> pa.Table:
    """The rows of some units."""
    return units.filter(pc.is_in(units["unit"], pa.array(sorted(set(wanted)), pa.string())))


def of_table(units: pa.Table, table: str, layer: str | None = None) -> pa.Table:
    """The rows of one table's parts, or of those of one layer."""
    chosen = units.filter(pc.equal(texts(units, "table"), table))
    return chosen if layer is None else chosen.filter(pc.equal(texts(chosen, "layer"), layer))


def of_stage(units: pa.Table, stage: str) -> pa.Table:
    """The rows of one stage's units."""
    return units.filter(pc.equal(texts(units, "stage"), stage))


def texts(units: pa.Table, column: str) -> pa.ChunkedArray:
    """A column of names as plain text."""
    return units[column].cast(pa.string())


def names(units: pa.Table, column: str) -> list[str]:
    """The distinct values of a column of names, sorted."""
    return sorted(pc.unique(texts(units, column)).drop_null().to_pylist())


def receipts_of(units: pa.Table) -> Iterator[Receipt]:
    """The receipts that a manifest holds, by unit; a few at a time are in memory."""
    rows = (row for batch in units.to_batches(_BATCH) for row in batch.to_pylist())
    for unit, of_unit in groupby(rows, key=lambda row: row["unit"]):
        first, *rest = of_unit
        parts = [_part(row) for row in (first, *rest) if row["table"] is not None]
        yield Receipt(unit, parts, first["seconds"], first["host"], first["stage"])


def _part(row: dict[str, Any]) -> PartInfo:
    same = {name: row[name] for name in ("path", "table", "layer", "n_rows", "n_bytes", "start")}
    return PartInfo(digest=row["digest"].hex(), sha256=row["sha256"].hex(), **same)


def digests_of(units: pa.Table) -> dict[str, TableDigest]:
    """Rows and digest of every table that has a part, in the schema's order."""
    found = {}
    for table in TABLES:
        rows = of_table(units, table).select(["unit", "layer", "digest", "n_rows"])
        if rows.num_rows:
            parts = (
                (r["unit"], r["layer"], r["digest"].hex(), r["n_rows"])
                for batch in rows.to_batches(_BATCH)
                for r in batch.to_pylist()
            )
            found[table] = TableDigest(n_rows=pc.sum(rows["n_rows"]).as_py(), digest=table_digest(parts))
    return found


class Committed(Mapping[str, Receipt]):
    """Receipts by unit key, in sorted order, made when they are asked for.

    Args:
        units: rows of a manifest, which it keeps.
    """

    def __init__(self, units: pa.Table) -> None:
        self.units = units
        keys = units["unit"].to_numpy() if units.num_rows else np.array([], object)
        is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        self._first = {key: int(i) for key, i in zip(keys[is_first], np.flatnonzero(is_first), strict=True)}

    @property
    def seconds(self) -> float:
        """What all units took together."""
        first = pa.array(list(self._first.values()), pa.int64())
        return float(pc.sum(self.units["seconds"].take(first)).as_py() or 0.0)

    def __getitem__(self, unit_key: str) -> Receipt:
        start = stop = self._first[unit_key]
        units = self.units["unit"]
        while stop < len(units) and units[stop].as_py() == unit_key:
            stop += 1
        return next(receipts_of(self.units.slice(start, stop - start)))

    def __contains__(self, unit_key: object) -> bool:
        return unit_key in self._first

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def receipts(self) -> Iterator[Receipt]:
        """All receipts, one after the other."""
        return receipts_of(self.units)


def encode(units: pa.Table, run_id: str) -> bytes:
    """A manifest as the bytes of its file."""
    sink = io.BytesIO()
    repeating = [name for name in COLUMNS.names if name not in _PLAIN]
    pq.write_table(
        units, sink, compression="zstd", use_dictionary=repeating, column_encoding={"unit": "DELTA_BYTE_ARRAY"}
    )
    content = sink.getvalue()
    head = {"run_id": run_id, "checksum": _checksum(run_id, content)}
    return json.dumps(head).encode() + b"\n" + content


def decode(data: bytes, run_id: str) -> pa.Table:
    """The rows in a manifest.

    Raises:
        StoreError: it is damaged, or of another run; the message is a clause that says how.
    """
    head, _, content = data.partition(b"\n")
    try:
        found = json.loads(head)
        its_run_id, checksum = str(found["run_id"]), found["checksum"]
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f"it is no whole manifest ({len(data)} bytes)") from e
    if checksum != _checksum(its_run_id, content):
        raise StoreError("its checksum does not match: it was edited or damaged")
    if its_run_id != run_id:
        raise StoreError(f"it belongs to another run than {run_id}")
    units = pq.read_table(pa.BufferReader(content))
    if not units.schema.equals(COLUMNS):
        raise StoreError("its columns are not those of this version")
    return units.combine_chunks()


def without(units: pa.Table, gone: Collection[str]) -> pa.Table:
    """All rows but those of some units."""
    return units.filter(pc.invert(pc.is_in(units["unit"], pa.array(sorted(gone), pa.string()))))


def _checksum(run_id: str, content: bytes) -> str:
    return hashlib.sha256(run_id.encode() + b"\n" + content).hexdigest()
