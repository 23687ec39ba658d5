"""Merging parts changes nothing but the files: rows, units, digests, and what readers see at any moment."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store.samples import attempts, do_unit, held, new_store, plain, records_in, rows_of, unit_key, write_unit

from polyray import compact
from polyray import store as store_module
from polyray.dataset import open as open_dataset
from polyray.errors import StoreError
from polyray.lease import LeaseLostError
from polyray.parts import _Skips
from polyray.records import Receipt
from polyray.store import Store
from polyray.verify import verify

N = 12
TABLES = ("images", "mine_parts")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Twelve units of three layers, in row groups of a few units."""
    monkeypatch.setattr(compact, "ROW_GROUP_BYTES", 1500)
    store = new_store(tmp_path / "out")
    for i in range(N):
        do_unit(store, i)
    return store


def parts(store: Store) -> list[Path]:
    return sorted(store.out.rglob("*.parquet"))


def seen(store: Store) -> dict[str, object]:
    """All that a reader can see."""
    whole = {t: repr(store.read(t).to_pylist()) for t in TABLES}
    return {
        **whole,
        "columns": repr(store.read("mine_parts", "blocks.1", ["total"]).to_pylist()),
        "units": [repr(store.read(t, units=[unit_key(i)]).to_pylist()) for t in TABLES for i in range(N)],
        "some": repr(store.read("images", units=[unit_key(i) for i in (1, 2, 7, 11)]).to_pylist()),
        "opened": {t: plain(d.to_table()) for t, d in open_dataset(store.out).items()},
        "attempts": attempts(store),
        "digests": store.digests(),
    }


def test_files_are_fewer_and_nothing_else_changes(store: Store) -> None:
    before = seen(store)
    assert len(parts(store)) == 2 * N
    store.compact("mine")
    assert len(parts(store)) == 1 + 3
    assert list(records_in(store.out).iterdir()) == []
    assert seen(store) == seen(Store(store.out)) == before
    assert verify(store.out, [unit_key(i) for i in range(N)]).ok
    assert max(pq.ParquetFile(p).num_row_groups for p in parts(store)) > 2
    again = parts(store)
    store.compact()
    assert parts(store) == again


def test_only_parts_of_the_stage_are_merged_and_large_ones_are_left(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = store.write_part("images", "other", rows_of("images", 5), None)
    store.commit(Receipt("other", [part], 0.0, "h", "embed"))
    store.compact("embed")
    store.compact("none")
    assert len(parts(store)) == 2 * N + 1
    small = sorted((store.out / "images").iterdir(), key=lambda p: p.stat().st_size)
    monkeypatch.setattr(compact, "SMALL_BYTES", small[-1].stat().st_size)
    store.compact("mine")
    assert len(list((store.out / "images").iterdir())) == 3, "the merged one, the largest, and that of the other stage"
    store.compact()
    assert verify(store.out).ok


def test_units_done_later_are_merged_with_what_was_merged_before(store: Store) -> None:
    store.compact()
    for i in range(N, N + 3):
        do_unit(store, i)
    before = {t: repr(store.read(t).to_pylist()) for t in TABLES}
    store.compact()
    assert len(parts(store)) == 4
    assert {t: repr(store.read(t).to_pylist()) for t in TABLES} == before


def test_rows_of_equal_key_keep_the_order_of_units_wherever_they_lie(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of all units have the same keys here; the last units' files come to lie before the first units'."""
    rows = repr(store.read("images").to_pylist())
    other = new_store(store.out.parent / "other")
    for i in reversed(range(N)):
        do_unit(other, i)
        if i % 4 == 0:
            monkeypatch.setattr(compact, "SMALL_BYTES", 2**26)
            other.compact()
            monkeypatch.setattr(compact, "SMALL_BYTES", 1)
    assert len(parts(other)) < 2 * N
    assert repr(other.read("images").to_pylist()) == rows


def test_a_reader_that_still_holds_the_old_view_reads_on(store: Store) -> None:
    reader, opened = Store(store.out), open_dataset(store.out)
    expected, whole = repr(reader.read("images", units=[unit_key(5)]).to_pylist()), plain(opened["images"].to_table())
    do_unit(store, N)
    store.compact()
    assert repr(reader.read("images", units=[unit_key(5)]).to_pylist()) == expected
    assert plain(opened["images"].to_table()) == whole, "as of its opening, without the unit that came later"
    assert open_dataset(store.out)["images"].count_rows() == 5 * (N + 1)


def test_a_part_that_goes_while_it_is_read_is_looked_for_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, real, n_reads = Store(store.out), store_module.read_parts, []

    def read(*args: object, **by: object) -> pa.Table:
        n_reads.append(1)
        if len(n_reads) <= 3:
            do_unit(store, N + len(n_reads))
            store.compact()
        return real(*args, **by)

    monkeypatch.setattr(store_module, "read_parts", read)
    assert reader.read("images").num_rows == 5 * (N + 3)
    assert len(n_reads) == 4
    n_reads.clear()
    assert reader.read("images", units=[unit_key(1), unit_key(9)]).num_rows == 10


def test_a_part_that_is_gone_for_good_is_an_error(store: Store) -> None:
    parts(store)[0].unlink()
    with pytest.raises(StoreError, match="missing or damaged"):
        store.read("images")


def test_readers_in_other_threads_see_every_unit_once_at_any_moment(store: Store) -> None:
    stop, problems, n_looks = threading.Event(), [], [0]

    def watch() -> None:
        least = N
        while not stop.is_set():
            reader = Store(store.out)
            try:
                units = len(reader.committed())
                rows = reader.read("images").num_rows
                report = verify(store.out, [unit_key(i) for i in range(N)])
                found = reader.read("mine_parts", units=[unit_key(i) for i in range(N)]).num_rows
            except StoreError as e:
                problems.append(str(e))
                return
            n_looks[0] += 1
            if not (least <= units <= rows / 5) or rows % 5 or found != 5 * N:
                problems.append(f"{units} units, {rows} rows, {found} found")
            if report.missing_parts or report.mismatches or report.duplicates or report.missing_units:
                problems.append(repr(report))
            least = units

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(N, N + 30):
        do_unit(store, i)
        store.compact()
    stop.set()
    watcher.join()
    assert problems == []
    assert n_looks[0] > 3


def test_a_copy_of_a_unit_that_comes_after_the_merge_changes_nothing(store: Store) -> None:
    copy, first = write_unit(store, 3), store.committed()[unit_key(3)]
    before = seen(store)
    store.compact()
    assert not store.commit(copy)
    assert not store.commit(first)
    assert len(parts(store)) == 4
    assert seen(store) == before


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_retired_unit_is_gone_from_files_too(store: Store, is_merged: bool) -> None:
    if is_merged:
        store.compact()
    store.finish()
    kept = {u: a for u, a in attempts(store).items() if u != unit_key(4)}
    rows = {i: repr(store.read("mine_parts", units=[unit_key(i)]).to_pylist()) for i in range(N) if i != 4}
    store.retire(unit_key(4))
    assert not (store.out / "_SUCCESS").exists()
    assert attempts(store) == attempts(Store(store.out)) == kept
    assert {i: repr(store.read("mine_parts", units=[unit_key(i)]).to_pylist()) for i in rows} == rows
    in_files = sum(pq.read_metadata(p).num_rows for p in parts(store) if p.parent.name == "images")
    assert store.read("images").num_rows == in_files == 5 * (N - 1)
    assert verify(store.out).ok
    store.finish()
    assert verify(store.out, sorted(kept)).ok
    assert do_unit(store, 4)
    store.retire("of no unit")


def test_a_record_from_before_a_take_over_is_retired(store: Store) -> None:
    taker = held(store.out)
    taker.retire(unit_key(0))
    assert unit_key(0) not in taker.committed()
    assert len(parts(store)) == 2 * N - 2
    assert verify(store.out).ok


def test_a_damaged_part_is_not_merged(store: Store) -> None:
    path = parts(store)[3]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = attempts(store)
    with pytest.raises(StoreError, match=path.name):
        store.compact()
    assert attempts(store) == before
    assert path.exists()


def test_a_driver_that_lost_its_lease_merges_nothing(store: Store) -> None:
    new = held(store.out)
    before = parts(store)
    with pytest.raises(LeaseLostError):
        store.compact()
    assert set(before) <= set(parts(store))
    assert verify(store.out).missing_parts == []
    new.finish()
    assert verify(store.out, [unit_key(i) for i in range(N)]).ok


def test_one_that_loses_it_while_it_merges_removes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    new, merge, before = [], compact.merge, seen(store)

    def slow(*args: object) -> pa.Table:
        merged = merge(*args)
        new.append(held(store.out))
        return merged

    with monkeypatch.context() as patch:
        patch.setattr(compact, "merge", slow)
        with pytest.raises(LeaseLostError):
            store.compact()
    assert seen(Store(store.out)) == before
    assert not verify(store.out).missing_parts
    new[0].finish()
    assert len(parts(store)) == 4
    assert seen(Store(store.out)) == before


def test_many_records_become_part_of_a_manifest_while_a_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MOST_RECORDS", 10)
    store = new_store(tmp_path)
    for i in range(25):
        do_unit(store, i)
    assert len(list(records_in(tmp_path).iterdir())) == 5
    assert sorted(store.committed()) == sorted(unit_key(i) for i in range(25))
    assert not do_unit(store, 3)
    assert verify(tmp_path).ok


@given(st.lists(st.integers(1, 2**26 - 1), min_size=1, max_size=60), st.integers(0, 3))
@settings(deadline=None)
def test_merged_parts_have_64_to_256_megabytes_and_keep_the_order(sizes: list[int], scale: int) -> None:
    small = [(str(i), max(1, size >> (5 * scale))) for i, size in enumerate(sizes)]
    runs = compact._cut(small)
    assert [file for run in runs for file in run] == small
    totals = [sum(size for _, size in run) for run in runs]
    assert all(total < 2**28 for total in totals)
    assert all(total >= 2**26 for total in totals) or len(runs) == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_the_row_groups_that_are_read_are_those_that_hold_the_rows(sizes: list[int], data: st.DataObject) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"x": np.arange(sum(sizes))})
    with pq.ParquetWriter(sink, table.schema) as writer:
        for start, n in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            writer.write_table(table.slice(start, n))
    cuts = sorted(data.draw(st.sets(st.integers(0, sum(sizes)), min_size=2, max_size=6)) if sum(sizes) > 1 else {0, 1})
    spans = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    file = pq.ParquetFile(pa.BufferReader(sink.getvalue()))
    skips = _Skips(file.metadata, spans)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    assert skips.kept == sorted({int(group_of[row]) for start, n in spans for row in range(start, start + n)})
    read = file.read_row_groups(skips.kept)["x"].to_pylist()
    assert skips.n_rows == len(read)
    for start, n in spans:
        position = skips.position(start)
        assert read[position : position + n] == list(range(start, start + n))


def test_very_many_units_leave_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are links to a few files, so that a thousand of them take a second."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(store_module, "_MOST_RECORDS", 300)
    n, store = 1000, new_store(tmp_path)
    made = [store.write_part("mine_parts", "u", rows_of("mine_parts", 4, i), f"l{i}") for i in range(5)]
    for i in range(n):
        part = made[i % 5]
        path = part.path.replace(Path(part.path).name, f"u{i}-{i:08x}.parquet")
        (tmp_path / path).hardlink_to(tmp_path / part.path)
        store.commit(Receipt(f"mine/{i:04d}", [replace(part, path=path)], 1.0, "h", "mine"))
    before = store.digests()
    assert store.finish() == before
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 5 + len(["run.json", "_SUCCESS", "lease", "units"])
    assert store.read("mine_parts", "l3", units=["mine/0003", "mine/0998"]).num_rows == 8
    assert verify(tmp_path, [f"mine/{i:04d}" for i in range(n)]).ok
