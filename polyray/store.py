"""The dataset's commit protocol: parts first, then one record per unit, `_SUCCESS` last.

Which question it answers: *what is done, and how does a result become part of the run?* Place in the flow: the only
place that writes results. Whoever does a unit of work calls `write_part` for its rows and then `commit`; the driver
asks `committed` what remains, reduce units `read`, and the end of the run is `finish`. A part is never overwritten,
a record is put only where there is none, and readers go by records: whatever is killed at whatever moment, a unit is
either there as a whole or not at all. `dataset.py` is the reading side for people, `verify.py` the audit.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from polyray import config as settings
from polyray import files
from polyray.digest import canonical, rows_digest, table_digest
from polyray.errors import StoreError
from polyray.parts import conform, folder_name, part_name, read_parts, table_named, to_parquet
from polyray.records import PartInfo, Receipt, decode, encode, record_name
from polyray.schema import TABLES, VERSION

_log = logging.getLogger(__name__)

RUN = "run.json"
COMMITS = "commits"
SUCCESS = "_SUCCESS"

_PART = re.compile(r".+-[0-9a-f]{8}\.parquet")
# Where hard links are missing a record can be seen half-written for a moment; one that stays so is damaged.
_SETTLE_S = 0.5


class TableDigest(TypedDict):
    """Rows and digest of one whole table."""

    n_rows: int
    digest: str


class Store:
    """One OUT: writes parts, commits units, says what is committed.

    Any number of stores, in any processes, may work on one OUT at a time.

    Args:
        out: folder of the dataset; need not exist yet.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = files.local_folder(out)
        self._run: dict[str, Any] | None = None
        self._receipts: dict[str, Receipt] = {}

    @property
    def run(self) -> dict[str, Any]:
        """What run.json holds; `StoreError` where there is none or it is damaged."""
        if self._run is None:
            self._run = _load_run(self.out)
        return self._run

    @property
    def run_id(self) -> str:
        """Identity of the run that OUT holds."""
        return str(self.run["run_id"])

    @property
    def is_finished(self) -> bool:
        """Whether `finish` ran and nothing was committed since."""
        return (self.out / SUCCESS).exists()

    def create_or_resume(self, identity: dict[str, Any], provenance: dict[str, Any], config: dict[str, Any]) -> str:
        """Makes OUT the dataset of a run, or makes sure that it is that already.

        Args:
            identity: `config.identity` of the run: flat, JSON values.
            provenance: versions, devices, digests; `torch` and `device_class` must be the same on resuming.
            config: the resolved config, for readers.

        Returns:
            The run_id.

        Raises:
            StoreError: OUT holds another run (every differing field is named), was begun with another torch or
                device class, holds files that are not polyray's, or cannot be written.
        """
        run: dict[str, Any] = {
            "run_id": settings.run_id(identity),
            "identity": identity,
            "config": config,
            "provenance": provenance,
            "schema_version": VERSION,
        }
        data = json.dumps(run, indent=1).encode()
        with files.explained("create", self.out):
            files.ensure_folder(self.out)
            held = files.names(self.out)
            if RUN not in held:
                strangers = [name for name in held if not files.is_temporary(name)]
                if strangers:
                    raise StoreError(
                        f"{str(self.out)!r} holds files but no {RUN}, for instance {strangers[0]!r}: it is no dataset "
                        "of polyray. Choose an empty or a new folder."
                    )
                files.put_if_absent(self.out / RUN, data)
            elif _is_cut_short((self.out / RUN).read_bytes(), data):
                # A crash did it, on a file system where the file could not be linked into place as a whole.
                files.replace(self.out / RUN, data)
            files.ensure_folder(self.out / COMMITS)
        self._run = None
        _refuse_other_run(self.out, self.run, json.loads(data))
        return self.run_id

    def write_part(self, table: str, unit_key: str, rows: pa.Table, layer: str | None) -> PartInfo:
        """Writes the rows that one unit has for one table (and layer); they count once the unit is committed.

        Args:
            table: name in `schema.TABLES`.
            unit_key: the unit of work.
            rows: the table's columns in any order; see `parts.conform` for what is cast.
            layer: the rows' layer; None exactly for tables that are not kept by layer.

        Returns:
            What the receipt needs. The file holds the rows in canonical order.

        Raises:
            StoreError: OUT holds no run, the rows do not fit the table, or the file cannot be written.
        """
        spec = table_named(table)
        folder = self.out / folder_name(spec, layer)
        rows = canonical(conform(rows, spec), spec.key)
        data = to_parquet(rows, self.run_id)
        with files.explained("write", folder):
            files.ensure_folder(folder)
            path = folder / part_name(unit_key)
            while path.exists():
                path = folder / part_name(unit_key)
            files.replace(path, data)
        return PartInfo(
            path=path.relative_to(self.out).as_posix(),
            table=table,
            layer=layer,
            n_rows=rows.num_rows,
            n_bytes=len(data),
            digest=rows_digest(rows, spec.key),
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def commit(self, receipt: Receipt) -> bool:
        """Makes a unit's parts count, all at once, unless the unit is committed already.

        A commit takes `_SUCCESS` back: the mark stands for what was there when it was written.

        Returns:
            True where this receipt is now the unit's record; False where another was first, which stays. The parts
            of a receipt that lost are removed.

        Raises:
            StoreError: a part of the receipt is missing, or the record cannot be written.
        """
        name = record_name(receipt.unit_key)
        path = self.out / COMMITS / name
        data = encode(receipt, self.run_id)
        with files.explained("commit to", path):
            standing = self._settled([name])[0].get(name) if path.exists() else None
            if standing is None:
                self._require_parts(receipt)
                files.remove(self.out / SUCCESS)
                if files.put_if_absent(path, data):
                    return True
                standing = self._settled([name])[0].get(name)
            if standing is None:
                _log.warning("the damaged commit record %s is replaced", path)
                files.replace(path, data)
                return True
            for part in receipt.parts:
                if part not in standing.parts:
                    files.remove(self.out / part.path)
        return False

    def retire(self, unit_key: str) -> None:
        """Takes back a commit whose rows others have replaced (a checkpoint): its record first, then its parts."""
        name = record_name(unit_key)
        receipt = self._settled([name])[0].get(name)
        with files.explained("retire", self.out / COMMITS / name):
            files.remove(self.out / COMMITS / name)
            self._receipts.pop(name, None)
            for part in receipt.parts if receipt is not None else ():
                files.remove(self.out / part.path)

    def committed(self, stage: str | None = None) -> dict[str, Receipt]:
        """Receipts of all committed units, or of one stage's, by unit key in sorted order.

        A damaged record is no commit: it is logged, and its unit is one of those that remain.
        """
        receipts, damaged = self.records()
        for name, reason in damaged.items():
            _log.warning("commit record %s of %s does not count: %s", name, self.out, reason)
        chosen = [r for r in receipts.values() if stage is None or r.stage == stage]
        return {r.unit_key: r for r in sorted(chosen, key=lambda r: r.unit_key)}

    def records(self) -> tuple[dict[str, Receipt], dict[str, StoreError]]:
        """Receipts by record name, and of every damaged record by name what is wrong with it; both sorted."""
        listed = files.names(self.out / COMMITS)
        return self._settled([name for name in listed if name.endswith(".json") and not name.startswith(".")])

    def read(
        self,
        table: str,
        layer: str | None = None,
        columns: Sequence[str] | None = None,
        units: Iterable[str] | None = None,
    ) -> pa.Table:
        """Committed rows of a table, sorted by layer and key.

        Args:
            table: name in `schema.TABLES`; empty rows where nothing is committed.
            layer: only this layer's rows; all by default.
            columns: only these, in this order; by default `layer` (where the table is kept by it) and all others.
            units: only what these units wrote, found without listing the folder of records. All must be committed,
                so that a reduce unit cannot miss what a slow shared file system does not list yet.

        Raises:
            StoreError: a table or column is unknown, a unit is not committed, a record or a part is damaged.
        """
        spec = table_named(table)
        if layer is not None:
            folder_name(spec, layer)  # refuses a layer where there are none
        receipts = self.intact() if units is None else self._of_units(units)
        parts = [p for r in receipts for p in r.parts if p.table == table and (layer is None or p.layer == layer)]
        return read_parts(self.out, spec, parts, columns)

    def digests(self) -> dict[str, TableDigest]:
        """Rows and digest of every table that has a part, from the records alone."""
        return digests_of(self.intact())

    def finish(self) -> dict[str, TableDigest]:
        """Removes what no record names and writes `_SUCCESS`, last, with the digest of every table.

        Call it when no unit is being worked on. Safe to repeat.

        Raises:
            StoreError: a record is damaged, a committed part is gone, or OUT cannot be written.
        """
        # Parts are listed before records are read: a part that is committed in between is then never removed.
        on_disk = part_files(self.out)
        receipts = self.intact()
        named = {p.path for r in receipts for p in r.parts}
        for path in sorted(named - set(on_disk)):
            if not (self.out / path).exists():
                raise StoreError(f"committed part {path!r} is gone from {str(self.out)!r}: `polyray verify` names its "
                                 "unit; delete the unit's record in commits/ and run again.")  # fmt: skip
        with files.explained("clean up", self.out):
            for path in on_disk:
                if path not in named and removable(path):
                    files.remove(self.out / path)
            digests = digests_of(receipts)
            success = {"run_id": self.run_id, "n_units": len(receipts), "tables": digests}
            files.replace(self.out / SUCCESS, json.dumps(success, indent=1).encode())
        return digests

    def _require_parts(self, receipt: Receipt) -> None:
        for part in receipt.parts:
            with files.explained("commit the part", self.out / part.path):
                n_bytes = (self.out / part.path).stat().st_size
            if n_bytes != part.n_bytes:
                raise StoreError(f"part {part.path!r} of unit {receipt.unit_key!r} has {n_bytes} bytes, was written "
                                 f"with {part.n_bytes}: do the unit again.")  # fmt: skip

    def intact(self) -> list[Receipt]:
        """All receipts by unit key; refuses damaged records, whose rows would be missing without a word."""
        receipts, damaged = self.records()
        if damaged:
            name, reason = next(iter(damaged.items()))
            raise StoreError(f"{len(damaged)} commit record(s) of {str(self.out)!r} do not count, for instance "
                             f"{name!r}: {reason}. Delete them from {COMMITS}/ and run the sweep again.")  # fmt: skip
        return sorted(receipts.values(), key=lambda r: r.unit_key)

    def _of_units(self, units: Iterable[str]) -> list[Receipt]:
        by_name = {record_name(unit): unit for unit in sorted(set(units))}
        receipts, damaged = self._settled(list(by_name))
        for name, unit in by_name.items():
            if name not in receipts:
                reason = damaged.get(name)
                raise StoreError(f"unit {unit!r} is not committed: {reason or 'it has no record'}. The stage that does "
                                 "it must end before its rows are read.")  # fmt: skip
        return [receipts[name] for name in by_name]

    def _settled(self, names: Iterable[str]) -> tuple[dict[str, Receipt], dict[str, StoreError]]:
        """Receipts and reasons of damage of these records; those that do not exist are in neither."""
        names = sorted(names)
        damaged = self._load(names)
        if damaged:
            time.sleep(_SETTLE_S)
            damaged = self._load(damaged)
        return {n: self._receipts[n] for n in names if n in self._receipts}, damaged

    def _load(self, names: Iterable[str]) -> dict[str, StoreError]:
        """Reads the records that were not read before (records never change); returns what is wrong with which."""
        run_id = self.run_id
        damaged = {}
        for name in names:
            if name in self._receipts:
                continue
            try:
                self._receipts[name] = decode((self.out / COMMITS / name).read_bytes(), name, run_id)
            except FileNotFoundError:
                continue
            except OSError as e:
                damaged[name] = StoreError(f"it cannot be read: {e.strerror}")
            except StoreError as e:
                damaged[name] = e
        return damaged


def part_files(out: Path) -> list[str]:
    """Sorted paths, relative to OUT, of all parts and of what unfinished writes left behind."""
    loose = [name for name in files.names(out) if files.is_temporary(name)]
    below = [path for folder in (COMMITS, *TABLES) for path in files.files_below(out, folder)]
    return sorted(loose + [p for p in below if p.endswith(".parquet") or files.is_temporary(Path(p).name)])


def removable(path: str) -> bool:
    """Whether a file is one that only polyray can have made, so that it may be removed as an orphan."""
    name = Path(path).name
    return files.is_temporary(name) or _PART.fullmatch(name) is not None


def digests_of(receipts: Iterable[Receipt]) -> dict[str, TableDigest]:
    """Rows and digest of every table that has a part in these receipts, in the schema's order."""
    parts: dict[str, list[tuple[str, str | None, str, int]]] = {}
    for r in receipts:
        for p in r.parts:
            parts.setdefault(p.table, []).append((r.unit_key, p.layer, p.digest, p.n_rows))
    return {
        name: TableDigest(n_rows=sum(p[3] for p in parts[name]), digest=table_digest(parts[name]))
        for name in TABLES
        if name in parts
    }


def _is_cut_short(found: bytes, whole: bytes) -> bool:
    return found != whole and whole.startswith(found)


def _load_run(out: Path) -> dict[str, Any]:
    path = out / RUN
    try:
        run = json.loads(path.read_bytes())
        whole = settings.run_id(run["identity"]) == run["run_id"] and isinstance(run["provenance"], dict)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise StoreError(f"{str(out)!r} holds no run: it has no {RUN}. Give the OUT of a run.") from e
    except OSError as e:
        raise StoreError(f"cannot read {str(path)!r}: {e.strerror}. Check OUT's permissions and disk.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{str(path)!r} is damaged ({e}). Restore it, or choose a new OUT.") from e
    if not whole:
        raise StoreError(f"{str(path)!r} was edited: its run_id is not that of its identity. Restore it.")
    return run


def _refuse_other_run(out: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    if held["run_id"] != wanted["run_id"]:
        raise StoreError(
            f"{str(out)!r} holds another run; choose another OUT, or the config it was made with:\n"
            + _differences(held["identity"], wanted["identity"])
        )
    begun, now = ({k: run["provenance"].get(k) for k in ("torch", "device_class")} for run in (held, wanted))
    if begun != now:
        raise StoreError(
            "Mixed device classes or torch versions in one OUT are refused, since their results differ in the last "
            f"bits; choose another OUT than {str(out)!r}, or go on as it was begun:\n" + _differences(begun, now)
        )


def _differences(held: dict[str, Any], wanted: dict[str, Any]) -> str:
    """One line for every field that differs."""
    return "\n".join(
        f"  {key}: OUT has {_shown(held, key)}, this run has {_shown(wanted, key)}"
        for key in sorted(held.keys() | wanted.keys())
        if _shown(held, key) != _shown(wanted, key)
    )


def _shown(fields: dict[str, Any], key: str) -> str:
    return json.dumps(fields[key]) if key in fields else "nothing"
