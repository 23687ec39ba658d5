"""The audit of a dataset: every part read again, every record held against what lies on the disk.

Which question it answers: *is this dataset whole, and is it what was written?* Place in the flow: beside `store.py`,
whose records it trusts for nothing but what should be there; changes nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from polyray import files
from polyray.digest import rows_digest
from polyray.errors import StoreError
from polyray.parts import conform, folder_name
from polyray.records import CopiedRecordError, PartInfo, Receipt
from polyray.schema import TABLES
from polyray.store import SUCCESS, Store, digests_of, part_files


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
        n_parts: parts that are committed.
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
    on_disk = part_files(store.out)
    receipts, damaged = store.records()
    report = VerifyReport()
    for name, reason in damaged.items():
        kind = report.duplicates if isinstance(reason, CopiedRecordError) else report.unreadable
        kind.append(f"commits/{name}: {reason}")
    times_named = Counter(p.path for r in receipts.values() for p in r.parts)
    report.duplicates += [f"{path}: named {n} times" for path, n in sorted(times_named.items()) if n > 1]
    report.orphans = [path for path in on_disk if path not in times_named]
    for receipt in receipts.values():
        for part in receipt.parts:
            _check_part(store, receipt, part, report)
    report.missing_units = sorted(set(expected_units or ()) - {r.unit_key for r in receipts.values()})
    _check_success(store, list(receipts.values()), report)
    report.missing_parts.sort()
    report.mismatches.sort()
    report.duplicates.sort()
    return report


def _check_part(store: Store, receipt: Receipt, part: PartInfo, report: VerifyReport) -> None:
    report.n_parts += 1
    report.n_rows[part.table] = report.n_rows.get(part.table, 0) + part.n_rows
    try:
        data = (store.out / part.path).read_bytes()
    except FileNotFoundError:
        report.missing_parts.append(f"{part.path}: of unit {receipt.unit_key!r}")
        return
    except OSError as e:
        report.mismatches.append(f"{part.path}: cannot be read: {e.strerror}")
        return
    problem = _problem(data, part)
    if problem:
        report.mismatches.append(f"{part.path}: {problem}")


def _problem(data: bytes, part: PartInfo) -> str:
    """What is wrong with a part's bytes or rows; empty where nothing is."""
    if len(data) != part.n_bytes:
        return f"{len(data)} bytes, {part.n_bytes} were committed"
    if hashlib.sha256(data).hexdigest() != part.sha256:
        return "its bytes are not those committed"
    table = TABLES[part.table]
    try:
        folder = folder_name(table, part.layer)
        rows = conform(pq.ParquetFile(pa.BufferReader(data)).read(), table)
    except (OSError, pa.ArrowException, StoreError) as e:
        return f"cannot be read as rows of {part.table!r}: {e}"
    if folder != Path(part.path).parent.as_posix():
        return f"lies elsewhere than the rows of layer {part.layer!r}"
    if rows.num_rows != part.n_rows:
        return f"{rows.num_rows} rows, {part.n_rows} were committed"
    if rows_digest(rows, table.key) != part.digest:
        return "its rows are not those committed"
    return ""


def _check_success(store: Store, receipts: list[Receipt], report: VerifyReport) -> None:
    if not store.is_finished:
        return
    with files.explained("read", store.out / SUCCESS):
        data = (store.out / SUCCESS).read_bytes()
    try:
        success = json.loads(data)
        claimed, run_id = success["tables"], success["run_id"]
    except (ValueError, KeyError, TypeError):
        report.unreadable.append(f"{SUCCESS}: damaged; run the sweep again to write it anew")
        return
    if run_id != store.run_id or claimed != digests_of(receipts):
        report.mismatches.append(f"{SUCCESS}: its digests are not those of the committed records")
