"""The ledger: what counts, in generations; `store.py` says how they follow each other.

Which question it answers: *which units are committed, as of now?* Place in the flow: between `store.py`, which decides
what is committed, and the files below OUT/commits. The reading half needs nothing but the folder; a reader that meets
a change of generations looks again, and never sees half of each.
"""

import logging
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from polyray import files, lease, manifest
from polyray.errors import StoreError
from polyray.lease import COMMITS, Lease
from polyray.records import Receipt, decode, encode, record_name

_log = logging.getLogger(__name__)

# Where hard links are missing a record can be seen half-written for a moment; one that stays so is damaged.
_SETTLE_S = 0.5
# Generations follow each other after minutes; a reader that meets so many has other troubles.
_LOOKS = 20
_AT_ONCE = 16
_NUMBERED = re.compile(r"[0-9]{8}(\.[a-z]+)?")


class ManifestError(StoreError):
    """The manifest is damaged, so that nobody can say what counts."""


class Ledger:
    """What counts in one OUT.

    Args:
        place: where the dataset lies.
        run_id: run that all of it must belong to.
    """

    def __init__(self, place: files.Place, run_id: str) -> None:
        self._place, self._run_id = place, run_id
        self._generation = 0
        self._units = manifest.of_receipts([])
        self._records: dict[str, Receipt] = {}
        self._known: frozenset[str] | None = None

    @property
    def n_records(self) -> int:
        """Units that were committed since the manifest, as far as they were looked at."""
        return len(self._records)

    @property
    def generation(self) -> int:
        """The generation that was looked at last, or begun; 0 where there is none yet."""
        return self._generation

    @property
    def folder(self) -> str:
        """Where records are put."""
        return f"{COMMITS}/{self._generation:08d}"

    def look(self) -> tuple[pa.Table, dict[str, StoreError]]:
        """What counts now.

        Returns:
            Rows of a manifest, and of every damaged record, by name relative to OUT, what is wrong with it.

        Raises:
            StoreError: the manifest is damaged, or OUT holds commits of another layout.
        """
        for _ in range(_LOOKS):
            if not self.turn():
                continue
            with files.explained("read", self._place.at(self.folder)):
                listed = self._place.names(self.folder) if self._generation else []
            names = [name for name in listed if name.endswith(".json") and not name.startswith(".")]
            self._records = {n: r for n, r in self._records.items() if n in set(names)}
            damaged = self._settle(names)
            # Only then was nothing of this generation cleaned away while it was read.
            if not self.has_turned:
                units = manifest.combined([self._units, manifest.of_receipts(self._records.values())])
                return units, {f"{self.folder}/{name}": reason for name, reason in damaged.items()}
        raise StoreError(f"what counts in {self._place.at('')!r} changes faster than it can be read. Try again.")

    def find(self, wanted: Iterable[str]) -> pa.Table:
        """The rows of some units, found without listing records.

        Raises:
            StoreError: a unit is not committed, or its record is damaged.
        """
        wanted = sorted(set(wanted))
        damaged: dict[str, StoreError] = {}
        for look in range(_LOOKS):
            # Records never change, and what a manifest holds is in every later one: the first look costs nothing.
            found = self._found(wanted)
            there = set(found["unit"].to_pylist())
            missing = [unit for unit in wanted if unit not in there]
            if not missing:
                return found
            if look and not self.has_turned:
                break
            if self.turn():
                damaged = self._settle(record_name(unit) for unit in missing)
        reason = damaged.get(record_name(missing[0]), "it has no record")
        raise StoreError(
            f"unit {missing[0]!r} is not committed: {reason}. The stage that does it must end before its rows are read."
        )

    @property
    def has_turned(self) -> bool:
        """Whether there is a newer generation than the one that was looked at."""
        return self._newest() != self._generation

    def is_recorded(self, unit_key: str) -> bool:
        """Whether a unit has a record, rather than being in the manifest."""
        return record_name(unit_key) in self._records

    def standing(self, unit_key: str) -> Receipt | None:
        """The receipt of a unit that is committed, as far as the one who commits knows: all of it."""
        if self._known is None:
            self._known = frozenset(self._units["unit"].to_pylist())
        if record_name(unit_key) in self._records:
            return self._records[record_name(unit_key)]
        if unit_key not in self._known:
            return None
        return next(manifest.receipts_of(manifest.of_units(self._units, [unit_key])))

    def put(self, receipts: Sequence[Receipt]) -> list[bool]:
        """Puts the records of distinct units, side by side, unless a whole one is there; False where one is.

        A damaged one is replaced.

        Raises:
            FileNotFoundError: the generation was cleaned away, since another has long begun.
        """
        named = {record_name(receipt.unit_key): receipt for receipt in receipts}
        records = [(f"{self.folder}/{name}", encode(receipt, self._run_id)) for name, receipt in named.items()]
        with ThreadPoolExecutor(min(_AT_ONCE, len(records))) as pool:
            created = list(pool.map(lambda record: self._place.put_if_absent(*record), records))
        won = []
        for (name, receipt), (path, data), is_new in zip(named.items(), records, created, strict=True):
            if not is_new:
                self._settle([name])
                if name not in self._records:
                    _log.warning("the damaged commit record %s is replaced", self._place.at(path))
                    self._place.replace(path, data)
                    is_new = True
            if is_new:
                self._records[name] = receipt
            won.append(is_new)
        return won

    def drop(self, unit_key: str) -> None:
        """Removes a unit's record."""
        self._place.remove([f"{self.folder}/{record_name(unit_key)}"])
        self._records.pop(record_name(unit_key), None)

    def begin(self, held: Lease, units: pa.Table) -> None:
        """Makes a manifest of these rows what counts, under the generation that the lease has claimed.

        Raises:
            LeaseLostError: another driver claimed a later one; then nothing was removed.
        """
        number = held.generation
        with files.explained("write the manifest of", self._place.at(COMMITS)):
            self._place.make_folder(f"{COMMITS}/{number:08d}")
            self._place.replace(lease.file_of(number, "units"), manifest.encode(units, self._run_id))
        held.check()
        self._hold(number, units)
        self.clean()

    def clean(self) -> None:
        """Removes what is left of the generations before the one that was begun."""
        with files.explained("clean up", self._place.at(COMMITS)):
            names = self._place.names(COMMITS)
            old = [n for n in names if _NUMBERED.fullmatch(n) and int(n[:8]) < self._generation]
            for folder in (n for n in old if "." not in n):
                self._place.remove_folder(f"{COMMITS}/{folder}")
            self._place.remove(f"{COMMITS}/{n}" for n in old if "." in n)

    def turn(self) -> bool:
        """Turns to the newest generation; False where that was cleaned away in the meantime."""
        number = self._newest()
        if number == self._generation:
            return True
        name = lease.file_of(number, "units")
        with files.explained("read", self._place.at(name)):
            try:
                data = self._place.read(name)
            except FileNotFoundError:
                return False
        try:
            self._hold(number, manifest.decode(data, self._run_id))
        except StoreError as e:
            raise ManifestError(
                f"the manifest {self._place.at(name)!r} does not count: {e}. Restore it, or choose a new OUT."
            ) from e
        return True

    def _newest(self) -> int:
        """The generation whose manifest is the highest; 0 where there is none yet."""
        with files.explained("read", self._place.at(COMMITS)):
            names = self._place.names(COMMITS)
        if strange := [n for n in names if n.endswith(".json") and not n.startswith(".")]:
            raise StoreError(
                f"{self._place.at(COMMITS)!r} holds {strange[0]!r}, which this version does not know: was the dataset "
                "written by an earlier one? Choose another OUT, or read it with the version that wrote it."
            )
        return max(lease.numbers(names, "units"), default=0)

    def _hold(self, generation: int, units: pa.Table) -> None:
        self._generation, self._units, self._records, self._known = generation, units, {}, None

    def _found(self, wanted: list[str]) -> pa.Table:
        """The rows of some units, as far as they are known."""
        names = map(record_name, wanted)
        recorded = manifest.of_receipts(self._records[name] for name in names if name in self._records)
        return manifest.combined([manifest.of_units(self._units, wanted), recorded])

    def _settle(self, names: Iterable[str]) -> dict[str, StoreError]:
        """Reads the records that were not read before; says of those that stay damaged what is wrong with them."""
        damaged = self._load(names)
        if damaged:
            time.sleep(_SETTLE_S)
            damaged = self._load(damaged)
        return damaged

    def _load(self, names: Iterable[str]) -> dict[str, StoreError]:
        damaged = {}
        for name in names:
            if name in self._records:
                continue
            try:
                data = self._place.read(f"{self.folder}/{name}")
            except FileNotFoundError:
                continue
            except OSError as e:
                damaged[name] = StoreError(f"it cannot be read: {e.strerror}")
                continue
            try:
                self._records[name] = decode(data, name, self._run_id)
            except StoreError as e:
                damaged[name] = e
        return damaged
