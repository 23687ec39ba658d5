"""Whatever stops, wherever: nothing committed is lost, and the rest is done again to the same digests."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from skips import skip
from store.samples import attempts, do_unit, new_store, no_link, plain, race, records_in, rows_of, unit_key, write_unit

from polyray import files
from polyray.errors import StoreError
from polyray.records import Receipt
from polyray.store import Store, TableDigest
from polyray.verify import VerifyReport, verify

STEPS = ("mkdir", "fsync", "link", "replace", "unlink")


class Killed(BaseException):
    """The process is gone: nothing catches this, and every further step on the disk raises it again."""


@pytest.fixture
def no_waiting(monkeypatch):
    """Syncing changes nothing that a test can see, and takes most of the time; no other writer is waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("polyray.ledger._SETTLE_S", 0.0)
    # Of a claim that was cut short nobody knows whose it is.
    monkeypatch.setattr("polyray.lease.EXPIRES_S", 0.02)


class Disk:
    """Counts the steps that change the disk; from step `fail_at` on, or at it alone, they raise.

    A file is written in two halves, with a step between them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException, hard_links: bool = True):
        self.n_steps, self.fail_at, self.error = 0, fail_at, error
        for name in STEPS:
            monkeypatch.setattr(os, name, self.step(name, getattr(os, name), hard_links))
        halfway = self.step("write", lambda: None, hard_links)

        def write(path: Path, data: bytes) -> None:
            with path.open("xb") as f:
                f.write(data[: len(data) // 2])
                f.flush()
                halfway()
                f.write(data[len(data) // 2 :])
                f.flush()
                os.fsync(f.fileno())

        monkeypatch.setattr(files, "_write", write)

    def step(self, name, real, hard_links):
        def run(*args, **kwargs):
            self.n_steps += 1
            dead = isinstance(self.error, Killed) and self.n_steps > self.fail_at
            if self.n_steps == self.fail_at or dead:
                raise self.error
            if name == "link" and not hard_links:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return real(*args, **kwargs)

        return run


def sweep(out: Path) -> dict[str, TableDigest]:
    """A run of three units, doing what is not committed yet; the first two are merged before the third is done."""
    store = new_store(out)
    for i in (0, 3, 1):
        if unit_key(i) not in store.committed():
            do_unit(store, i)
        if i == 3:
            store.compact("mine")
    return store.finish()


def damage(report: VerifyReport) -> set[str]:
    """Which lists of an audit have findings, leaving out orphans, which any crash may leave."""
    return {name for name, found in vars(report).items() if isinstance(found, list) and found} - {"orphans"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("undisturbed") / "out")


def n_steps_of_a_sweep(out: Path, hard_links: bool) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 0, OSError(), hard_links)
        sweep(out)
    return disk.n_steps


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("hard_links", [True, False], ids=["links", "no links"])
def test_killed_before_every_single_step(tmp_path, undisturbed, hard_links):
    n_steps = n_steps_of_a_sweep(tmp_path / "count", hard_links)
    assert n_steps > 30
    n_with_leftovers = n_cut_records = 0
    expected = plain(pa.concat_tables(rows_of("mine_parts", 5, i) for i in (0, 1, 3)))
    for n in range(1, n_steps + 1):
        out = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, n, Killed(), hard_links)
            with pytest.raises(Killed):
                sweep(out)
        before: dict[str, tuple[float, list[str]]] = {}
        if (out / "commits").exists():
            report = verify(out)
            assert damage(report) <= {"unreadable"}
            n_cut_records += len(report.unreadable)
            n_with_leftovers += bool(report.orphans)
            before = attempts(Store(out))
            if not report.unreadable:
                assert Store(out).read("mine_parts").num_rows == 5 * len(before)
        assert sweep(out) == undisturbed
        after = attempts(Store(out))
        assert {u: after[u] for u in before} == before
        assert verify(out, [unit_key(i) for i in (0, 1, 3)]).ok
        assert plain(Store(out).read("mine_parts").drop_columns(["layer"])) == expected
        kinds = sorted(p.suffix for p in (out / "commits").iterdir())
        assert kinds == ["", ".lease", ".units"], "one generation alone is left"
    assert n_with_leftovers > 10
    # Each record can be cut short where it cannot be linked into place as a whole, none otherwise.
    assert n_cut_records == (0 if hard_links else 3)


def refusal(out: Path) -> str:
    """What a sweep says when the disk refuses a step; empty where the step can be done without."""
    try:
        sweep(out)
    except StoreError as e:
        return str(e)
    return ""


ADVICE = {
    errno.ENOSPC: "The disk is full. Free some space. What is committed is untouched: run the same command again",
    errno.EDQUOT: "Free some space or ask for more",
    errno.EROFS: "Choose an OUT that can be written",
    errno.EACCES: "Choose an OUT that this user may write",
    errno.EIO: "Check the file system",
}


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("code", list(ADVICE), ids=errno.errorcode.get)
def test_simulated_full_disk_at_every_single_step(tmp_path, undisturbed, code):
    n_steps = n_steps_of_a_sweep(tmp_path / "count", True)
    n_errors = 0
    for n in range(1, n_steps + 1, 2 if code == errno.ENOSPC else 11):
        out = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, n, OSError(code, os.strerror(code)))
            message = refusal(out)
        if message:
            n_errors += 1
            assert os.strerror(code) in message
            assert ADVICE[code] in message
        if (out / "run.json").exists():
            assert not damage(verify(out))
        assert sweep(out) == undisturbed
        assert verify(out).ok
    assert n_errors > 5


def test_simulated_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(StoreError, match="disk is full"):
        store.commit(receipt)
    with pytest.raises(StoreError, match="disk is full"):
        write_unit(store, 0)
    assert sorted(tmp_path.rglob("*")) == before
    assert store.committed() == {}


def test_a_record_cut_short_by_a_full_disk_without_hard_links_is_taken_back(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    real = files._write

    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            path.write_bytes(data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", write)
        patch.setattr(os, "link", no_link)
        with pytest.raises(StoreError, match="disk is full"):
            store.commit(receipt)
    assert files.names(records_in(tmp_path)) == []
    assert store.commit(receipt)


def test_a_slow_writer_without_hard_links_sees_that_its_record_was_replaced(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    slow, fast = write_unit(store, 0), write_unit(store, 0)
    real = files._write

    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".json" and not path.exists():
            path.touch()
            monkeypatch.setattr(files, "_write", real)
            assert store.commit(fast)
            return
        real(path, data)

    monkeypatch.setattr("polyray.ledger._SETTLE_S", 0.0)
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(files, "_write", write)
    assert not store.commit(slow)
    assert Store(tmp_path).committed() == {fast.unit_key: fast}
    assert verify(tmp_path).ok


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    receipt, real = write_unit(store, 0), os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link)
    assert store.commit(receipt)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        skip("small-disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Takes all that is left of a disk."""
    with path.open("wb", buffering=0) as f, suppress(OSError):
        while True:
            f.write(b"x" * 4096)


def test_real_full_and_read_only_disk(small_disk, undisturbed):
    out = small_disk / "out"
    store = new_store(out)
    do_unit(store, 0)
    fill(small_disk / "ballast")
    with pytest.raises(StoreError, match="disk is full"):
        sweep(out)
    assert list(Store(out).committed()) == [unit_key(0)]
    assert not damage(verify(out))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for use in (lambda: new_store(small_disk / "new"), lambda: sweep(out)):
        with pytest.raises(StoreError, match="read-only"):
            use()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (small_disk / "ballast").unlink()
    assert sweep(out) == undisturbed
    assert verify(out).ok


N_UNITS = 25
WORKER = """
import sys
from store.samples import attempts, do_unit, new_store, unit_key
store = new_store(sys.argv[1])
done = store.committed()
for i in range(int(sys.argv[2])):
    if unit_key(i) not in done:
        do_unit(store, i)
        print(unit_key(i), flush=True)
"""


def test_killed_with_signal_9_again_and_again(tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    acknowledged: set[str] = set()
    committed: dict[str, Receipt] = {}
    for n_before_kill, wait_s in ((2, 0.0), (6, 0.003), (5, 0.007)):
        command = [sys.executable, "-c", WORKER, str(out), str(N_UNITS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            assert worker.stdout is not None
            acknowledged |= {worker.stdout.readline().strip() for _ in range(n_before_kill)}
            time.sleep(wait_s)
            worker.send_signal(signal.SIGKILL)
            acknowledged |= {line.strip() for line in worker.stdout if line.endswith("\n")}
        now = Store(out).committed()
        assert acknowledged <= now.keys()
        assert {u: now[u] for u in committed} == committed
        committed = now
        assert not damage(verify(out))
    assert 13 <= len(committed) < N_UNITS
    store, other = new_store(out), new_store(tmp_path / "undisturbed")
    for i in range(N_UNITS):
        if unit_key(i) not in committed:
            do_unit(store, i)
        do_unit(other, i)
    assert store.finish() == other.finish()
    assert verify(out, [unit_key(i) for i in range(N_UNITS)]).ok
    assert plain(store.read("mine_parts")) == plain(other.read("mine_parts"))


def test_of_several_writers_exactly_one_puts_a_file(tmp_path):
    n_files, n_writers = 12, 3
    for name in ("links", "no links"):
        (tmp_path / name).mkdir()
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(n_writers), context.Queue()
    writers = [context.Process(target=race, args=(tmp_path, n_files, start, results)) for _ in range(n_writers)]
    for w in writers:
        w.start()
    won = [results.get(timeout=120) for _ in writers]
    for w in writers:
        w.join()
    for name, of_writers in zip(("links", "no links"), zip(*won, strict=True), strict=True):
        assert [sum(w) for w in zip(*of_writers, strict=True)] == [1] * n_files
        found = [(tmp_path / name / f"{i}.json").read_bytes() for i in range(n_files)]
        assert [len(set(data)) for data in found] == [1] * n_files
        assert {len(data) for data in found} == {100_000}
