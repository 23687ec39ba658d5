"""The dataset's commit protocol: parts first, then one record per unit, `_SUCCESS` last.

Which question it answers: *what is done, and how does a result become part of the run?* Place in the flow: the only
place that writes results. Whoever does a unit of work calls `write_part` for its rows; the driver holds the lease,
calls `commit`, asks `committed` what remains, and ends with `finish`; reduce units `read`. `dataset.py` is the reading
side for people, `verify.py` the audit.

The protocol. A part has a name of its own, is never overwritten, and counts for nothing until it is named:

- *Generations.* `commits/<G>.lease` claims generation G for one driver (`lease.py`). `commits/<G>.units`, the manifest,
  holds all that counted when G began; `commits/<G>/<unit>.json` is the record of a unit committed since. **What counts
  is the highest manifest and the records in its folder**, nothing else: not a lease without a manifest yet, and not a
  record in the folder of an earlier generation.
- *A generation begins* (another driver takes over, or the same one compacts): claim G + 1; then list what counts; put
  the manifest G + 1; make sure that no G + 2 was claimed; only then remove what came before. The claim comes first,
  since a driver that was thought dead may still be committing: each commit puts its record and then looks for a higher
  claim. If it finds none, its record was there before the claim and is in the list; if it finds one, `commit` raises
  `LeaseLostError` and promises nothing.
- *Compaction* writes merged parts under new names, then begins a generation that names them, then removes the old ones.
- *Removing* comes after a look for a higher claim, and concerns names that were listed before that look: no later
  driver can have begun to use them, and names are not used twice. The one exception is `_SUCCESS`, which a driver takes
  back before its first commit; should one that lost the lease at that very moment take back another's, running the same
  command again puts it back, and nothing else is affected.
- *Readers* load the manifest, then list and read the records, then look whether the manifest is still the highest, else
  begin again; when a part is gone they look for a newer manifest and read what that names.

Whatever is killed at whatever moment, a unit is either there as a whole or not at all.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from polyray import compact, files, lease, manifest, run_file
from polyray.digest import canonical, rows_digest
from polyray.errors import StoreError
from polyray.lease import Lease
from polyray.ledger import Ledger
from polyray.manifest import Committed, TableDigest, digests_of
from polyray.parts import (
    PartsError,
    conform,
    folder_name,
    new_name,
    part_files,
    read_parts,
    removable,
    require_parts,
    table_named,
    to_parquet,
)
from polyray.records import PartInfo, Receipt

_log = logging.getLogger(__name__)

SUCCESS = "_SUCCESS"

_MOST_RECORDS = 10_000
"""Records in one folder before they are made part of a manifest: bounds what a driver holds in memory."""
_READS = 5


class Store:
    """One OUT: writes parts, commits units, says what is committed.

    Any number of stores, in any processes, may read one OUT and write parts into it; one at a time may commit.

    Args:
        out: folder of the dataset, which need not exist yet, or `s3://bucket/prefix`.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = files.located(out)
        self.place = files.place(self.out)
        self._run: dict[str, Any] | None = None
        self._of_run: Ledger | None = None
        self._lease: Lease | None = None
        self._began = 0
        self._took_success_back = False

    @property
    def run(self) -> dict[str, Any]:
        """What run.json holds; `StoreError` where there is none, it is damaged, or its tables are newer."""
        if self._run is None:
            self._run = run_file.load(self.place)
        return self._run

    @property
    def run_id(self) -> str:
        """Identity of the run that OUT holds."""
        return str(self.run["run_id"])

    @property
    def is_finished(self) -> bool:
        """Whether `finish` ran and nothing was committed since."""
        try:
            n_units = json.loads(self.place.read(SUCCESS))["n_units"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            return True  # it was written, and `verify` says that it is damaged
        return bool(n_units == len(self.committed()))

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
        self.place.prove()
        run = run_file.described(identity, provenance, config)
        run_file.put(self.place, run)
        self._run = self._of_run = None
        run_file.refuse_another(self.place, run)
        return self.run_id

    def acquire(self) -> Lease:
        """Takes the lease, which `commit`, `retire`, `compact` and `finish` need; best as `with store.acquire():`.

        Raises:
            StoreError: OUT holds no run, cannot be written, or another driver lives that writes it, which is named.
        """
        ledger = self._ledger
        with ExitStack() as on_failure:
            held = lease.acquire(self.place)
            on_failure.callback(held.release)
            units, damaged = ledger.look()
            for name, reason in damaged.items():
                _log.warning("commit record %s of %s does not count: %s", name, self.place.at(""), reason)
            ledger.begin(held, units)
            on_failure.pop_all()
        self._lease, self._began, self._took_success_back = held, ledger.generation, False
        return held

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
        folder = folder_name(spec, layer)
        rows = canonical(conform(rows, spec), spec.key)
        data = to_parquet(rows, self.run_id)
        with files.explained("write", self.place.at(folder)):
            self.place.make_folder(folder)
            path = new_name(self.place, folder, unit_key)
            self.place.replace(path, data)
        return PartInfo(
            path=path,
            table=table,
            layer=layer,
            n_rows=rows.num_rows,
            n_bytes=len(data),
            digest=rows_digest(rows, spec.key),
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def commit(self, receipt: Receipt) -> bool:
        """Makes a unit's parts count, all at once, unless the unit is committed already; see `commit_all`.

        Returns:
            True where this receipt is now the unit's record; False where another was first, which stays.
        """
        return self.commit_all([receipt])[0]

    def commit_all(self, receipts: Sequence[Receipt]) -> list[bool]:
        """Commits units, each by itself: their records are put side by side, since a bucket answers after a while.

        A commit takes `_SUCCESS` back: the mark stands for what was there when it was written.

        Returns:
            For each receipt whether it is now its unit's record; False where another was first, which stays. The
            parts of a receipt that lost are removed.

        Raises:
            LeaseLostError: another driver took over; whether the units are committed is for that one to say.
            StoreError: there is no lease, a part of a receipt is missing (then none was committed), or a record
                cannot be written.
        """
        held = self._held()
        new: dict[str, int] = {}
        for i, receipt in enumerate(receipts):
            if receipt.unit_key not in new and self._ledger.standing(receipt.unit_key) is None:
                new[receipt.unit_key] = i
        won: set[int] = set()
        if new:
            require_parts(self.place, [receipts[i] for i in new.values()])
            self._take_success_back(held)
            with files.explained("commit to", self.place.at(self._ledger.folder)):
                try:
                    created = self._ledger.put([receipts[i] for i in new.values()])
                except FileNotFoundError:
                    held.check()
                    raise
            held.check()
            won = {i for i, first in zip(new.values(), created, strict=True) if first}
        for i in set(range(len(receipts))) - won:
            self._forget(receipts[i])
        if self._ledger.n_records >= _MOST_RECORDS:
            self._begin(held, self.intact())
        return [i in won for i in range(len(receipts))]

    def _forget(self, receipt: Receipt) -> None:
        """Removes the parts of a receipt that lost."""
        standing = self._ledger.standing(receipt.unit_key)
        kept = {p.path for p in standing.parts} if standing else set()
        with files.explained("clean up", self.place.at("")):
            self.place.remove(p.path for p in receipt.parts if p.path not in kept)

    def retire(self, unit_key: str) -> None:
        """Takes back a commit whose rows others have replaced (a checkpoint): its record first, then its parts.

        Raises:
            LeaseLostError: another driver took over; then no part was removed.
            StoreError: there is no lease, or OUT cannot be written.
        """
        held = self._held()
        units, _ = self._ledger.look()
        self._require_own_generation(held)
        gone = manifest.of_units(units, [unit_key])
        self._take_success_back(held)
        if self._ledger.is_recorded(unit_key):
            with files.explained("retire", self.place.at(self._ledger.folder)):
                self._ledger.drop(unit_key)
            held.check()
        elif gone.num_rows:
            rest = manifest.without(units, [unit_key])
            together = [[path] for path in compact.shared(gone, rest)]
            self._begin(held, compact.merge(self.place, rest, together, self.run_id))
        with files.explained("retire parts of", self.place.at("")):
            self.place.remove(gone["path"].drop_null().to_pylist())

    def compact(self, stage: str | None = None) -> None:
        """Merges small parts into parts of 64 to 256 MB for each table and layer, and the records into a manifest.

        Rows, units and digests stay what they are, and readers go on reading. Call it when no unit of the stage is
        being worked on. A crash leaves at most files that nothing names.

        Args:
            stage: only parts of this stage; by default all.

        Raises:
            LeaseLostError: another driver took over; then nothing was removed.
            StoreError: there is no lease, a record or a part is damaged, or OUT cannot be written.
        """
        held = self._held()
        units = self.intact()
        chosen = compact.groups(units, stage)
        if chosen or self._ledger.n_records:
            self._begin(held, compact.merge(self.place, units, chosen, self.run_id))
            with files.explained("clean up", self.place.at("")):
                self.place.remove(path for group in chosen for path in group)

    def committed(self, stage: str | None = None) -> Committed:
        """Receipts of all committed units, or of one stage's, by unit key in sorted order.

        A damaged record is no commit: it is logged, and its unit is one of those that remain.
        """
        units, damaged = self._ledger.look()
        for name, reason in damaged.items():
            _log.warning("commit record %s of %s does not count: %s", name, self.place.at(""), reason)
        return Committed(units if stage is None else manifest.of_stage(units, stage))

    def records(self) -> tuple[Committed, dict[str, StoreError]]:
        """Receipts by unit key, and of every damaged record, by name in OUT, what is wrong with it."""
        units, damaged = self._ledger.look()
        return Committed(units), damaged

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
        wanted = None if units is None else sorted(set(units))

        def once() -> pa.Table:
            found = self.intact() if wanted is None else self._ledger.find(wanted)
            rows = manifest.of_table(found, table, layer)
            return read_parts(self.place, spec, rows, columns, whole_files=wanted is None)

        return self.again(once)

    def again(self, once: Callable[[], pa.Table]) -> pa.Table:
        """What reading gives; reads again as long as parts are gone because they were merged in the meantime."""
        for _ in range(_READS):
            try:
                return once()
            except PartsError:
                if not self._ledger.has_turned:
                    raise
                self._ledger.turn()
        return once()

    @property
    def has_turned(self) -> bool:
        """Whether a newer generation began since this store last looked: parts may lie in other files now."""
        return self._ledger.has_turned

    def digests(self) -> dict[str, TableDigest]:
        """Rows and digest of every table that has a part, from the records alone."""
        return digests_of(self.intact())

    def finish(self) -> dict[str, TableDigest]:
        """Merges what is small, removes what nothing names, and writes `_SUCCESS`, last: the digest of every table.

        Call it when no unit is being worked on. Safe to repeat.

        Raises:
            LeaseLostError: another driver took over; then nothing was removed.
            StoreError: there is no lease, a record is damaged, a committed part is gone, or OUT cannot be written.
        """
        held = self._held()
        self.compact()
        # Parts are listed before records are read: a part that is committed in between is then never removed.
        on_disk = part_files(self.place)
        units = self.intact()
        named = set(manifest.names(units, "path"))
        gone = sorted(named - set(on_disk))
        for path, n_bytes in zip(gone, self.place.n_bytes(gone), strict=True):
            if n_bytes is None:
                raise StoreError(f"committed part {path!r} is gone from {self.place.at('')!r}: restore it, or run the "
                                 "sweep into a new OUT. `polyray verify` names all that is missing.")  # fmt: skip
        # Whatever was listed is older than any driver that may come after this look.
        held.check()
        self._ledger.clean()
        with files.explained("clean up", self.place.at("")):
            self.place.remove(path for path in on_disk if path not in named and removable(path))
            digests = digests_of(units)
            success = {"run_id": self.run_id, "n_units": len(Committed(units)), "tables": digests}
            held.check()
            self.place.replace(SUCCESS, json.dumps(success, indent=1).encode())
        self._took_success_back = False
        return digests

    def intact(self) -> pa.Table:
        """What counts, as rows of a manifest; refuses damaged records, whose rows would be missing without a word."""
        units, damaged = self._ledger.look()
        if damaged:
            name, reason = next(iter(damaged.items()))
            raise StoreError(f"{len(damaged)} commit record(s) of {self.place.at('')!r} do not count, for instance "
                             f"{name!r}: {reason}. Delete them and run the sweep again.")  # fmt: skip
        return units

    @property
    def _ledger(self) -> Ledger:
        if self._of_run is None:
            self._of_run = Ledger(self.place, self.run_id)
        return self._of_run

    def _held(self) -> Lease:
        """The lease, without which nothing is committed or removed."""
        if self._lease is None or self._lease.is_released:
            _ = self.run_id  # what is wrong with OUT itself is said first
            raise StoreError(f"{self.place.at('')!r} is written without a lease: call acquire() first.")
        self._require_own_generation(self._lease)
        return self._lease

    def _require_own_generation(self, held: Lease) -> None:
        """A driver that lost the lease may have read what the next one began, and must not write there."""
        if self._ledger.generation != self._began:
            held.check()

    def _begin(self, held: Lease, units: pa.Table) -> None:
        held.claim_next()
        self._ledger.begin(held, units)
        self._began = self._ledger.generation

    def _take_success_back(self, held: Lease) -> None:
        if not self._took_success_back:
            held.check()
            with files.explained("commit to", self.place.at("")):
                self.place.remove([SUCCESS])
            self._took_success_back = True
