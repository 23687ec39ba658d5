"""The audit finds each kind of damage, names it, and finds nothing where there is none."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from store.samples import do_unit, new_store, records_in, rows_of, unit_key, write_unit

from polyray import records
from polyray.errors import StoreError
from polyray.records import Receipt, encode, record_name
from polyray.store import Store
from polyray.verify import VerifyReport, verify

LISTS = ("missing_parts", "duplicates", "orphans", "mismatches", "missing_units", "unreadable")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr("polyray.ledger._SETTLE_S", 0.0)
    store = new_store(tmp_path / "out with spaces 漢")
    for i in range(3):
        do_unit(store, i)
    return store


def record_of(store: Store, i: int) -> Path:
    return records_in(store.out) / record_name(unit_key(i))


def part_of(store: Store, i: int) -> Path:
    return store.out / store.committed()[unit_key(i)].parts[0].path


def only(report: VerifyReport, name: str) -> list[str]:
    """The findings of one list, when all others are empty."""
    assert {n for n in LISTS if getattr(report, n)} == {name}
    assert not report.ok
    return getattr(report, name)


def test_a_sound_dataset_has_no_findings(store):
    for n_parts in (6, 4):
        report = verify(store.out, [unit_key(i) for i in range(3)])
        assert report.ok
        assert all(getattr(report, n) == [] for n in LISTS)
        assert (report.n_parts, report.n_rows) == (n_parts, {"mine_parts": 15, "images": 15})
        store.finish()


def test_missing_units(store):
    expected = [unit_key(i) for i in (9, 0, 5)]
    assert only(verify(store.out, expected), "missing_units") == sorted([unit_key(5), unit_key(9)])


def test_missing_part(store):
    path = part_of(store, 1)
    path.unlink()
    (finding,) = only(verify(store.out), "missing_parts")
    assert path.name in finding
    assert unit_key(1) in finding


def test_orphans_and_leftovers(store):
    orphan = write_unit(store, 7).parts
    leftover = f"commits/.{'b' * 32}.tmp"
    (store.out / leftover).write_text("")
    assert only(verify(store.out), "orphans") == sorted([leftover, *(p.path for p in orphan)])
    store.finish()
    assert verify(store.out).ok


def test_truncated_part(store):
    path = part_of(store, 2)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (finding,) = only(verify(store.out), "mismatches")
    assert finding.endswith(f"{len(data) // 2} bytes, {len(data)} were committed")


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_flipped_byte(store, where):
    path = part_of(store, 0)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    (finding,) = only(verify(store.out), "mismatches")
    assert path.name in finding


def test_every_edit_of_a_record(store):
    path = record_of(store, 0)
    whole = json.loads(path.read_text())
    for key, value in (
        ("seconds", 9.0),
        ("stage", "embed"),
        ("host", "there"),
        ("parts", []),
        ("unit_key", unit_key(1)),
    ):
        path.write_text(json.dumps({**whole, "receipt": {**whole["receipt"], key: value}}) + "\n")
        findings = verify(store.out).unreadable
        assert findings == [
            f"commits/{path.parent.name}/{path.name}: its checksum does not match: it was edited or damaged"
        ]


def forge(store: Store, i: int, **changes: object) -> None:
    """An edit by someone who mends the checksum."""
    receipt = store.committed()[unit_key(i)]
    first, *rest = receipt.parts
    part = records.PartInfo(**{**vars(first), **changes})
    record_of(store, i).write_bytes(encode(Receipt(receipt.unit_key, [part, *rest], 0.0, "h", "mine"), store.run_id))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_rows": 6}, "5 rows, 6 were committed"),
        ({"digest": "0" * 64}, "its rows are not those committed"),
        ({"sha256": "0" * 64}, "its bytes are not those committed"),
        ({"layer": "blocks.1"}, "lies elsewhere"),
    ],
)
def test_forged_record(store, changes, message):
    forge(store, 0, **changes)
    (finding,) = only(verify(store.out), "mismatches")
    assert message in finding


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "mine_parts/../../x", "commits/x", "nowhere/x"])
def test_a_record_that_points_elsewhere_is_refused(store, path):
    forge(store, 0, path=path)
    report = verify(store.out)
    assert "is no part of table" in report.unreadable[0]
    assert unit_key(0) not in Store(store.out).committed()


@pytest.mark.parametrize("changes", [{"n_rows": "5"}, {"n_rows": None}, {"table": 3}])
def test_a_record_of_other_types_is_refused(store, changes):
    forge(store, 0, **changes)
    assert "not a receipt" in verify(store.out).unreadable[0]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"3"])
def test_unreadable_record(store, data):
    record_of(store, 1).write_bytes(data)
    report = verify(store.out)
    (finding,) = report.unreadable
    assert record_of(store, 1).name in finding
    assert len(report.orphans) == 2


def test_copied_record_is_a_duplicate(store):
    (records_in(store.out) / "copy.json").write_bytes(record_of(store, 0).read_bytes())
    (finding,) = only(verify(store.out), "duplicates")
    assert "/copy.json" in finding
    assert unit_key(0) in finding


def test_a_part_that_two_records_name_is_a_duplicate(store):
    parts = store.committed()[unit_key(0)].parts
    store.commit(Receipt("mine/again", parts, 0.0, "h", "mine"))
    assert only(verify(store.out), "duplicates") == sorted(f"{p.path}: named 2 times" for p in parts)


def test_rows_swapped_for_others_of_the_same_unit(store):
    part = store.committed()[unit_key(0)].parts[0]
    pq.write_table(rows_of(part.table, 5, seed=99), store.out / part.path)
    (finding,) = only(verify(store.out), "mismatches")
    assert part.path in finding


def test_success_that_does_not_fit(store):
    store.finish()
    path = store.out / "_SUCCESS"
    path.write_text(path.read_text().replace('"n_rows": 15', '"n_rows": 16'))
    (finding,) = only(verify(store.out), "mismatches")
    assert finding.startswith("_SUCCESS")
    path.write_text("")
    (finding,) = only(verify(store.out), "unreadable")
    assert finding.startswith("_SUCCESS")


def test_what_holds_no_run_cannot_be_verified(tmp_path):
    with pytest.raises(StoreError, match="holds no run"):
        verify(tmp_path)
