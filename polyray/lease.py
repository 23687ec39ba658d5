"""The lease: one driver at a time, told by a number that only grows.

Which question it answers: *who may commit, and how does one that was paused learn that it no longer may?* Place in the
flow: `store.py` takes one before it writes; `ledger.py` ties what counts to its numbers.

`commits/<G>.lease` says who holds generation G. It is put where there is none, which is the only thing that two drivers
ever race for: whoever puts G has everything from G − 1 and below behind it. A number once passed does not come back,
for the highest `.lease` is never removed. So whoever finds a higher number than its own, *after* it put something,
knows that what it put may count for nothing, and whoever finds none knows that its successor will see it.

`commits/<G>.beat` holds a counter that the owner moves on every `BEAT_S`. Another driver takes over when the owner
released it; at once when the owner was a process of this machine that is gone; or when the counter has stood still for
`EXPIRES_S` as counted by the taker's own monotonic clock, in steps of at most twice its polling interval, so that a
clock that jumps, or a machine that slept, counts for nothing. No two clocks are ever compared.
"""

import json
import logging
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from polyray import files
from polyray.errors import StoreError

_log = logging.getLogger(__name__)

COMMITS = "commits"
EXPIRES_S = 30.0
"""How long a counter stands still before its owner counts as dead. Longer than any pause of a busy process."""
BEAT_S = 5.0
_POLL_S = 1.0

# Leases of this process that a thread keeps alive.
_beating: set[str] = set()


class LeaseLostError(StoreError):
    """Another driver took the dataset over; what this one was about to commit does not count."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Args:
        host: its name, for people.
        pid: process.
        started: what tells the process from a later one of the same number; None where the system does not say.
        machine: boot of the machine and its space of process numbers; empty where the system does not say.
        since: when it took the lease, by its own clock, for people.
        token: tells this lease from every other.
    """

    host: str
    pid: int
    started: str | None
    machine: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> "Owner":
        """The owner that this process would be."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(platform.node(), os.getpid(), _started(os.getpid()), _machine(), now, secrets.token_hex(16))

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended: a process of this machine that no longer runs, or a lease that this very
        process no longer keeps alive. False where nothing is known."""
        if not self.machine or self.machine != _machine():
            return False
        if self.pid == os.getpid() and self.started == _started(self.pid):
            return self.token not in _beating
        return not _runs(self.pid) or _started(self.pid) not in (self.started, None)


@dataclass(frozen=True)
class _Beat:
    token: str
    counter: int
    is_released: bool


class Lease:
    """The right to commit, until another takes it.

    As a context manager it is kept alive by a thread, and released at the end. Without one whoever holds it calls
    `beat` now and then; another store of the same process then takes it over at once.

    Args:
        place: where the dataset lies.
        generation: number that was claimed.
        owner: this process.
    """

    def __init__(self, place: files.Place, generation: int, owner: Owner) -> None:
        self._place, self._owner = place, owner
        self.generation = generation
        self._state = _Beat(owner.token, 0, False)
        # The thread must not take the number that `claim_next` has just put for someone else's.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_released(self) -> bool:
        """Whether it was given back."""
        return self._state.is_released

    def beat(self) -> None:
        """Moves the counter on.

        Raises:
            LeaseLostError: another driver took over.
        """
        with self._lock:
            self._require_newest()
            self._state = replace(self._state, counter=self._state.counter + 1)
            self._put_beat()

    def check(self) -> None:
        """Makes sure that nobody took over up to now.

        Raises:
            LeaseLostError: another driver did.
        """
        with self._lock:
            self._require_newest()

    def claim_next(self) -> None:
        """Claims the next generation for the same owner.

        Raises:
            LeaseLostError: another driver was first.
        """
        with self._lock:
            self._require_newest()
            if not _claim(self._place, self.generation + 1, self._owner):
                raise self._lost()
            self.generation += 1

    def release(self) -> None:
        """Gives the lease back, so that another driver need not wait. Safe to repeat, and when it was lost."""
        self._stop()
        with self._lock:
            if not self._state.is_released:
                self._state = replace(self._state, is_released=True)
                with suppress(LeaseLostError):
                    self._require_newest()
                    self._put_beat()

    def __enter__(self) -> Self:
        _beating.add(self._owner.token)
        self._thread = threading.Thread(target=self._go_on_beating, name="polyray-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.release()
        except StoreError as e:
            # Whoever comes next waits, or sees that this process is gone; what ended the block matters more.
            _log.warning("the lease could not be released: %s", e)

    def _go_on_beating(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self.beat()
            except LeaseLostError as e:
                _log.error("%s", e)
                return
            except StoreError as e:
                _log.warning("the lease could not be kept alive, which is tried again: %s", e)

    def _stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _beating.discard(self._owner.token)

    def _require_newest(self) -> None:
        if newest(self._place) > self.generation:
            raise self._lost()

    def _lost(self) -> LeaseLostError:
        generation = newest(self._place)
        by = _owner(self._place, generation)
        return LeaseLostError(
            f"{self._place.at('')!r} was taken over by {_named(by)}: this driver ({_named(self._owner)}) was not heard "
            f"of for {EXPIRES_S:g} s or longer. It commits nothing any more; what it had committed counts. End it."
        )

    def _put_beat(self) -> None:
        with files.explained("keep the lease of", self._place.at("")):
            self._place.replace(file_of(self.generation, "beat"), json.dumps(asdict(self._state)).encode())


def acquire(place: files.Place) -> Lease:
    """Waits until the lease is free or its owner has died, and takes it.

    Raises:
        StoreError: its owner is alive, which takes up to `BEAT_S` to see.
    """
    owner = Owner.this_process()
    seen: tuple[int, _Beat | None] | None = None
    stood_still_s, poll_s = 0.0, min(_POLL_S, EXPIRES_S / 5)
    while True:
        generation = newest(place)
        holder, beat = _owner(place, generation), _beat(place, generation)
        is_free = generation == 0 or (holder is not None and (_is_released(holder, beat) or holder.is_gone))
        if not is_free and seen not in (None, (generation, beat)):
            raise _taken(place, holder)
        if not is_free and stood_still_s < EXPIRES_S:
            seen = generation, beat
            since_s = time.monotonic()
            time.sleep(poll_s)
            stood_still_s += min(max(time.monotonic() - since_s, 0.0), 2 * poll_s)
        elif _claim(place, generation + 1, owner):
            if newest(place) == generation + 1:
                return Lease(place, generation + 1, owner)
            # Numbers between were passed and cleaned away while this process was not looking.
            with files.explained("clean up", place.at(COMMITS)):
                place.remove([file_of(generation + 1, "lease")])


def newest(place: files.Place) -> int:
    """The highest generation that anyone claimed; 0 where there is none."""
    with files.explained("read", place.at(COMMITS)):
        return max(numbers(place.names(COMMITS), "lease"), default=0)


def numbers(names: list[str], kind: str) -> list[int]:
    """The generations that files of a kind are of, by their names."""
    found = (name.partition(".") for name in names)
    return [int(number) for number, _, ending in found if ending == kind and len(number) == 8 and number.isdecimal()]


def file_of(generation: int, kind: str) -> str:
    """Name of a generation's file of a kind, relative to OUT."""
    return f"{COMMITS}/{generation:08d}.{kind}"


def _claim(place: files.Place, generation: int, owner: Owner) -> bool:
    with files.explained("take the lease of", place.at("")):
        place.make_folder(COMMITS)
        return place.put_if_absent(file_of(generation, "lease"), json.dumps(asdict(owner)).encode())


def _owner(place: files.Place, generation: int) -> Owner | None:
    """Whoever holds a generation; None where nobody can tell."""
    try:
        with files.explained("read", place.at(file_of(generation, "lease"))):
            return Owner(**json.loads(_read(place, generation, "lease")))
    except (ValueError, TypeError):
        return None


def _beat(place: files.Place, generation: int) -> _Beat | None:
    try:
        with files.explained("read", place.at(file_of(generation, "beat"))):
            return _Beat(**json.loads(_read(place, generation, "beat")))
    except (ValueError, TypeError):
        return None


def _read(place: files.Place, generation: int, kind: str) -> bytes:
    try:
        return place.read(file_of(generation, kind))
    except FileNotFoundError:
        return b""


def _is_released(holder: Owner, beat: _Beat | None) -> bool:
    return beat is not None and beat.is_released and beat.token == holder.token


def _taken(place: files.Place, holder: Owner | None) -> StoreError:
    return StoreError(
        f"{place.at('')!r} is being written by {_named(holder)}. One driver at a time: wait for it, end it, or choose "
        "another OUT."
    )


def _named(owner: Owner | None) -> str:
    if owner is None:
        return "another driver"
    return f"process {owner.pid} on {owner.host!r}, since {owner.since}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; empty where it has ended, None where no one says."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    # A process that has ended and whose end nobody has asked for is still listed.
    return "" if state in "ZX" else rest[18]


def _machine() -> str:
    """Boot of this machine and space of process numbers: containers of one machine do not see each other's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
