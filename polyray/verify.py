"""The audit of a dataset: every part read again, every record held against what lies on the disk.

Which question it answers: *is this dataset whole, and is it what was written?* Place in the flow: beside `store.py`,
whose records it trusts for nothing but what should be there; changes nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from polyray import files
from polyray.digest import rows_digest
from polyray.errors import StoreError
from polyray.ledger import ManifestError
from polyray.manifest import digests_of
from polyray.parts import conform, folder_name, part_files
from polyray.records import CopiedRecordError, PartInfo
from polyray.schema import TABLES
from polyray.store import SUCCESS, Store
from polyray.table import Table


@dataclass
class VerifyReport:
    """What an audit found; every finding is one line that names a file or a unit.

    Args:
        missing_parts: committed parts that are not on the disk.
        duplicates: parts that two records name, and records that repeat another's unit.
        orphans: parts that no record names, and leftovers of unfinished writes. A sweep that runs or was interrupted
            may have some; `finish` removes them.
        mismatches: parts whose bytes or rows are not those committed, and a `_SUCCESS` that does not fit.
        missing_units: units that should be committed and are not.
        unreadable: records that are cut short, edited, or of another run.
        n_parts: files that hold committed rows.
        n_rows: committed rows by table.
    """

    missing_parts: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    missing_units: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    n_parts: int = 0
    n_rows: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was found, orphans included."""
        return not (
            self.missing_parts
            or self.duplicates
            or self.orphans
            or self.mismatches
            or self.missing_units
            or self.unreadable
        )


def verify(out: str | Path, expected_units: Iterable[str] | None = None) -> VerifyReport:
    """Audits a dataset; reads every byte of it.

    Args:
        out: folder of the dataset.
        expected_units: keys of all units that the plan has; by default what is missing is not asked.

    Returns:
        The findings, each list sorted.

    Raises:
        StoreError: the folder holds no run, or its run.json is damaged.
    """
    store = Store(out)
    while True:
        report, is_stale = _audit(store, expected_units)
        # What a running sweep merged while its old parts were read looks like damage: look again.
        if not (is_stale and (report.missing_parts or report.orphans)):
            return report


def _audit(store: Store, expected_units: Iterable[str] | None) -> tuple[VerifyReport, bool]:
    """The findings, and whether a new generation began meanwhile."""
    on_disk = part_files(store.place)
    report = VerifyReport()
    try:
        receipts, damaged = store.records()
    except ManifestError as e:
        report.unreadable.append(str(e))
        return report, False
    for name, reason in damaged.items():
        kind = report.duplicates if isinstance(reason, CopiedRecordError) else report.unreadable
        kind.append(f"{name}: {reason}")
    files_of: dict[str, list[tuple[str, PartInfo]]] = {}
    for receipt in receipts.receipts():
        for part in receipt.parts:
            files_of.setdefault(part.path, []).append((receipt.unit_key, part))
    report.orphans = [path for path in on_disk if path not in files_of]
    for path, parts in files_of.items():
        alone = [unit for unit, part in parts if part.start is None]
        if alone and len(parts) > 1:
            report.duplicates.append(f"{path}: named {len(parts)} times")
        report.n_parts += 1
        for _, part in parts:
            report.n_rows[part.table] = report.n_rows.get(part.table, 0) + part.n_rows
        _check_file(store, path, parts, report)
    report.missing_units = sorted(set(expected_units or ()) - receipts.keys())
    _check_success(store, receipts.units, report)
    report.missing_parts.sort()
    report.mismatches.sort()
    report.duplicates.sort()
    return report, store.has_turned


def _check_file(store: Store, path: str, parts: list[tuple[str, PartInfo]], report: VerifyReport) -> None:
    """One file: that it is there, and that it holds the rows of its units, in order, and no others."""
    whose = f"of unit {parts[0][0]!r}" + (f" and {len(parts) - 1} others" if len(parts) > 1 else "")
    try:
        problem = _problem(store.place, path, sorted((part for _, part in parts), key=lambda p: p.start or 0))
    except FileNotFoundError:
        report.missing_parts.append(f"{path}: {whose}")
        return
    except OSError as e:
        problem = f"cannot be read: {e.strerror}"
    if problem:
        report.mismatches.append(f"{path}: {problem}")


def _problem(place: files.Place, path: str, parts: list[PartInfo]) -> str:
    """What is wrong with a file's bytes or rows; empty where nothing is."""
    part = parts[0]
    data = place.read(path)
    if len(data) != part.n_bytes:
        return f"{len(data)} bytes, {part.n_bytes} were committed"
    if hashlib.sha256(data).hexdigest() != part.sha256:
        return "its bytes are not those committed"
    table = TABLES[part.table]
    folder = folder_name(table, part.layer)
    if folder != Path(path).parent.as_posix():
        return f"lies elsewhere than the rows of layer {part.layer!r}"
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        n_committed = sum(p.n_rows for p in parts) if part.start is not None else part.n_rows
        if file.metadata.num_rows != n_committed:
            return f"{file.metadata.num_rows} rows, {n_committed} were committed"
        stop = 0
        for part, rows in zip(parts, _of_parts(file, table, parts), strict=True):
            if part.start not in (None, stop):
                return f"rows {stop} to {part.start} are of no unit, or of two"
            if rows_digest(rows, table.key) != part.digest:
                return "its rows are not those committed"
            stop += part.n_rows
    except (OSError, pa.ArrowException, StoreError) as e:
        return f"cannot be read as rows of {part.table!r}: {e}"
    return ""


def _of_parts(file: pq.ParquetFile, table: Table, parts: list[PartInfo]) -> Iterator[pa.Table]:
    """The rows of each part, one after the other, with no more of the file in memory than they need."""
    held = table.schema.empty_table()
    groups = iter(range(file.num_row_groups))
    for part in parts:
        while held.num_rows < part.n_rows:
            held = pa.concat_tables([held, conform(file.read_row_group(next(groups)), table)])
        yield held.slice(0, part.n_rows)
        held = held.slice(part.n_rows) if part.start is not None else held


def _check_success(store: Store, units: pa.Table, report: VerifyReport) -> None:
    if SUCCESS not in store.place.names():
        return
    with files.explained("read", store.place.at(SUCCESS)):
        data = store.place.read(SUCCESS)
    try:
        success = json.loads(data)
        claimed, run_id = success["tables"], success["run_id"]
    except (ValueError, KeyError, TypeError):
        report.unreadable.append(f"{SUCCESS}: damaged; run the sweep again to write it anew")
        return
    if run_id != store.run_id or claimed != digests_of(units):
        report.mismatches.append(f"{SUCCESS}: its digests are not those of the committed records")
