"""One driver at a time: who is refused, who takes over and when, and what a driver that was paused can still do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from store.samples import do_unit, held, new_store, records_in, unit_key, write_unit

from polyray import lease
from polyray.errors import StoreError
from polyray.lease import LeaseLostError, Owner
from polyray.store import Store
from polyray.verify import verify

HOLDER = """
import sys, time
from polyray import lease
lease.BEAT_S = 0.05
from store.samples import do_unit
from polyray.store import Store
store = Store(sys.argv[1])
with store.acquire():
    do_unit(store, 0)
    print("holds", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES_S", 1.0)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    store = new_store(tmp_path / "out")
    store.acquire().release()
    return store.out


def holder(out: Path) -> "subprocess.Popen[str]":
    """A driver in a process of its own, which holds the lease and has committed unit 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(out)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def beat_by(store: Store, **changes: object) -> None:
    """Makes the lease that a store holds that of another machine, as far as anyone can see."""
    path = max((store.out / "commits").glob("*.lease"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "another", "host": "far", **changes}))


def test_without_a_lease_nothing_is_committed(tmp_path: Path) -> None:
    receipt = write_unit(new_store(tmp_path), 0)
    store = Store(tmp_path)
    for use in (lambda: store.commit(receipt), store.finish, lambda: store.retire(unit_key(0))):
        with pytest.raises(StoreError, match=r"call acquire\(\)"):
            use()
    with store.acquire():
        assert store.commit(receipt)
    with pytest.raises(StoreError, match=r"call acquire\(\)"):
        store.finish()


@pytest.mark.usefixtures("quick")
def test_a_second_driver_is_refused_while_the_first_lives_and_is_told_which(made: Path) -> None:
    with holder(made) as process:
        started_s = time.monotonic()
        with pytest.raises(StoreError, match=f"process {process.pid} on '.*', since 20"):
            Store(made).acquire()
        assert time.monotonic() - started_s < 5
        process.communicate("\n", timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("how", ["released", "killed", "terminated"])
def test_what_ended_on_this_machine_is_taken_over_at_once(made: Path, how: str) -> None:
    with holder(made) as process:
        if how == "released":
            process.communicate("\n", timeout=60)
        else:
            # Its end is asked for only after the lease was taken: until then it is listed as a zombie.
            process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        started_s = time.monotonic()
        store = held(made)
        assert time.monotonic() - started_s < lease.EXPIRES_S / 3
    assert list(store.committed()) == [unit_key(0)]
    assert do_unit(store, 1)


@pytest.mark.usefixtures("quick")
def test_a_paused_driver_is_taken_over_and_commits_nothing_once_it_wakes(made: Path) -> None:
    with holder(made) as process:
        process.send_signal(signal.SIGSTOP)
        store = held(made)
        assert do_unit(store, 1)
        process.send_signal(signal.SIGCONT)
        process.communicate("\n", timeout=60)
    assert sorted(store.committed()) == [unit_key(0), unit_key(1)]
    assert verify(made).ok


def test_a_number_of_a_process_that_was_given_to_another_one_proves_nothing(tmp_path: Path) -> None:
    this = Owner.this_process()
    assert this.is_gone, "no thread keeps it alive"
    other = replace(this, pid=1)
    assert other.is_gone, "began at another time"
    assert not replace(other, started=lease._started(1)).is_gone
    for unknown in (replace(other, machine=""), replace(other, machine="another")):
        assert not unknown.is_gone


@pytest.mark.usefixtures("quick")
def test_of_another_machine_only_the_counter_tells(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    beat_by(store)
    started_s = time.monotonic()
    taker = held(tmp_path)
    assert time.monotonic() - started_s >= lease.EXPIRES_S
    with pytest.raises(LeaseLostError):
        do_unit(store, 0)
    assert do_unit(taker, 0)


@pytest.mark.usefixtures("quick")
def test_a_counter_that_moves_at_the_last_moment_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(new_store(tmp_path).out)
    first = store.acquire()
    beat_by(store)
    naps = []

    def nap(seconds: float) -> None:
        real(seconds)
        naps.append(seconds)
        if len(naps) == 5:
            first.beat()

    real = time.sleep
    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(StoreError, match="on 'far'"):
        Store(tmp_path).acquire()
    assert do_unit(store, 0)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_clocks_that_jump_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """The wall clock of either side, and the taker's own monotonic clock, as after a sleep of the whole machine."""
    store = new_store(tmp_path)
    beat_by(store, since="1970-01-01T00:00:00+00:00" if jump_s > 0 else "2999-01-01T00:00:00+00:00")
    now_s, naps = [1000.0], []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        now_s[0] += seconds + (jump_s if len(naps) == 3 else 0.0)

    monkeypatch.setattr(time, "sleep", nap)
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(time, "time", lambda: -now_s[0])
    held(tmp_path)
    assert lease.EXPIRES_S - 2 <= sum(naps) <= lease.EXPIRES_S + 2


def test_a_driver_that_lost_its_lease_removes_nothing_and_seals_nothing(tmp_path: Path) -> None:
    old = new_store(tmp_path)
    do_unit(old, 0)
    new = held(tmp_path)
    receipt = write_unit(new, 1)
    late = write_unit(old, 2)
    for use in (old.finish, lambda: old.retire(unit_key(0)), lambda: old.commit(late), old._lease.beat):
        with pytest.raises(LeaseLostError, match=f"taken over by process {os.getpid()}"):
            use()
    assert new.commit(receipt)
    assert sorted(new.committed()) == [unit_key(0), unit_key(1)]
    assert not new.is_finished
    new.finish()
    with pytest.raises(LeaseLostError):
        old.commit(late)
    assert new.is_finished
    assert verify(tmp_path, [unit_key(0), unit_key(1)]).ok


@pytest.mark.parametrize("moment", ["before the list", "after the list"])
def test_a_record_put_while_another_takes_over_is_either_promised_and_counts_or_not_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = new_store(tmp_path)
    do_unit(old, 1)
    receipt, promised = write_unit(old, 0), []

    def commit_late() -> None:
        try:
            promised.append(old.commit(receipt))
        except LeaseLostError:
            promised.append(False)

    new = Store(tmp_path)
    ledger = new._ledger
    look, begin = ledger.look, ledger.begin
    if moment == "before the list":
        monkeypatch.setattr(ledger, "look", lambda: (commit_late(), look())[1])
    else:
        monkeypatch.setattr(ledger, "begin", lambda *args: (commit_late(), begin(*args))[1])
    new.acquire()
    assert promised == [False]
    assert sorted(new.committed()) == ([unit_key(0), unit_key(1)] if moment == "before the list" else [unit_key(1)])
    assert records_in(tmp_path).name == "00000002"


@pytest.mark.usefixtures("quick")
def test_of_several_takers_one_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if each were on a machine of its own.
    monkeypatch.setattr(Owner, "is_gone", False)
    store = new_store(tmp_path)
    do_unit(store, 0)
    beat_by(store)
    taken, refused, start = [], [], threading.Barrier(4)

    def take() -> None:
        taker = Store(tmp_path)
        start.wait()
        try:
            with taker.acquire():
                taken.append(taker)
                time.sleep(2)
                do_unit(taker, 1)
        except StoreError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (len(taken), len(refused)) == (1, 3), refused
    assert sorted(Store(tmp_path).committed()) == [unit_key(0), unit_key(1)]


def test_a_taker_that_slept_through_several_generations_takes_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that it claims was passed and cleaned away: the claim succeeds, and is worth nothing."""
    new_store(tmp_path).acquire().release()
    slow, real, claimed = Store(tmp_path), lease._claim, []

    def claim(place: object, generation: int, owner: Owner) -> bool:
        if not claimed:
            monkeypatch.setattr(lease, "_claim", real)
            for i in range(3):
                do_unit(held(tmp_path), i)
        claimed.append(generation)
        return real(place, generation, owner)

    monkeypatch.setattr(lease, "_claim", claim)
    assert slow.acquire().generation == 6
    assert sorted(slow.committed()) == [unit_key(i) for i in range(3)]
    assert claimed == [3]


def test_the_lease_is_kept_alive_by_a_thread_and_released_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    store = Store(new_store(tmp_path).out)

    def beat() -> dict[str, object]:
        found: dict[str, object] = json.loads(max((tmp_path / "commits").glob("*.beat")).read_text())
        return found

    with suppress(KeyboardInterrupt), store.acquire():
        time.sleep(0.5)
        before = beat()["counter"]
        time.sleep(0.5)
        assert isinstance(before, int)
        assert beat()["counter"] > before
        assert not beat()["is_released"]
        raise KeyboardInterrupt
    assert beat()["is_released"]
    assert not [t for t in threading.enumerate() if t.name == "polyray-lease"]


def test_a_heartbeat_that_the_disk_refuses_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    store = Store(new_store(tmp_path).out)
    with store.acquire() as kept:
        with monkeypatch.context() as patch:
            patch.setattr(store.place, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            time.sleep(0.3)
        assert "disk is full" in caplog.text
        time.sleep(0.3)
        assert kept._state.counter > 0
        assert do_unit(store, 0)


def test_commits_of_an_earlier_layout_are_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (tmp_path / "commits" / "mine.json").write_text("{}")
    for use in (store.committed, lambda: Store(tmp_path).acquire(), lambda: Store(tmp_path).read("images")):
        with pytest.raises(StoreError, match="written by an earlier one"):
            use()
