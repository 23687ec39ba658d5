"""What a commit does, what a reader sees, what finishing leaves."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.samples import (
    ODD_LAYERS,
    do_unit,
    empty_rows,
    held,
    new_store,
    plain,
    records_in,
    rows_of,
    unit_key,
    write_unit,
)

from polyray.errors import StoreError
from polyray.files import Place
from polyray.parts import part_files
from polyray.records import Receipt, decode, encode, record_name
from polyray.store import Store
from polyray.verify import verify


def test_receipts_survive_pickling_and_their_record(tmp_path):
    receipt = write_unit(new_store(tmp_path), 0)
    assert pickle.loads(pickle.dumps(receipt)) == receipt
    data = encode(receipt, "run")
    assert decode(data, record_name(receipt.unit_key), "run") == receipt


def test_only_committed_units_count(tmp_path):
    store = new_store(tmp_path)
    receipts = [write_unit(store, i) for i in range(4)]
    for r in receipts[:3]:
        assert store.commit(r)
    assert Store(tmp_path).committed() == {r.unit_key: r for r in receipts[:3]}
    assert list(store.committed()) == sorted(r.unit_key for r in receipts[:3])
    assert store.committed("mine").keys() == store.committed().keys()
    assert store.committed("embed") == {}
    assert plain(store.read("images")) == plain(pa.concat_tables(rows_of("images", 5, i) for i in range(3)))
    store.commit(receipts[3])
    assert len(store.committed()) == 4


def test_the_first_record_wins_and_what_the_other_wrote_is_removed(tmp_path):
    store = new_store(tmp_path)
    first, second = write_unit(store, 0), write_unit(store, 0)
    assert store.commit(first)
    assert not held(tmp_path).commit(second)
    assert Store(tmp_path).committed() == {first.unit_key: first}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.parquet")) == sorted(
        p.path for p in first.parts
    )


def test_several_units_are_committed_at_once_each_by_itself(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    again, first, second, other = (write_unit(store, i) for i in (0, 1, 1, 2))
    assert store.commit_all([again, first, second, other]) == [False, True, False, True]
    assert store.commit_all([]) == []
    assert list(Store(tmp_path).committed()) == [unit_key(i) for i in range(3)]
    assert Store(tmp_path).committed()[unit_key(1)].parts == first.parts
    # What lost left nothing behind.
    assert verify(tmp_path).ok


def test_of_several_units_none_is_committed_where_a_part_is_gone(tmp_path):
    store = new_store(tmp_path)
    receipts = [write_unit(store, i) for i in range(3)]
    (tmp_path / receipts[1].parts[0].path).unlink()
    with pytest.raises(StoreError, match=f"of unit '{unit_key(1)}' is gone"):
        store.commit_all(receipts)
    assert list(store.committed()) == []


def test_committing_the_same_receipt_again_harms_nothing(tmp_path):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    assert store.commit(receipt)
    assert not held(tmp_path).commit(receipt)
    assert Store(tmp_path).read("images").num_rows == 5


def test_a_unit_may_write_nothing(tmp_path):
    store = new_store(tmp_path)
    assert store.commit(Receipt("mine/none", [], 0.0, "h", "mine"))
    assert list(store.committed()) == ["mine/none"]


def test_parts_that_are_gone_or_cut_short_cannot_be_committed(tmp_path):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    path = tmp_path / receipt.parts[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="do the unit again"):
        store.commit(receipt)
    path.unlink()
    with pytest.raises(StoreError, match="is gone: do the unit again"):
        store.commit(receipt)
    assert store.committed() == {}


def test_records_of_another_run_do_not_count(tmp_path, caplog):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    (records_in(tmp_path) / record_name(receipt.unit_key)).write_bytes(encode(receipt, "f" * 16))
    assert store.committed() == {}
    assert "belongs to another run" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"unit_key": "x"}'])
def test_a_damaged_record_is_no_commit_and_heals(tmp_path, caplog, monkeypatch, damage):
    monkeypatch.setattr("polyray.ledger._SETTLE_S", 0.0)
    store = new_store(tmp_path)
    do_unit(store, 0)
    do_unit(store, 1)
    (records_in(tmp_path) / record_name(unit_key(0))).write_bytes(damage)
    again = Store(tmp_path)
    assert list(again.committed()) == [unit_key(1)]
    assert "does not count" in caplog.text
    for use in (
        again.digests,
        lambda: again.read("images"),
        lambda: again.read("images", units=[unit_key(0)]),
    ):
        with pytest.raises(StoreError):
            use()
    assert do_unit(held(tmp_path), 0)
    assert list(Store(tmp_path).committed()) == [unit_key(0), unit_key(1)]
    assert Store(tmp_path).read("images").num_rows == 10


def test_rows_are_sorted_by_layer_and_key_whatever_the_order_of_commits(tmp_path):
    stores = [new_store(tmp_path / name) for name in "ab"]
    for store, order in zip(stores, ([0, 1, 2, 3], [3, 1, 0, 2]), strict=True):
        for i in order:
            do_unit(store, i)
    one, other = (s.read("mine_parts") for s in stores)
    assert plain(one) == plain(other)
    assert one.column_names[0] == "layer"
    keys = [(r["layer"], r["neuron"]) for r in one.select(["layer", "neuron"]).to_pylist()]
    assert keys == sorted(keys)
    assert [repr(r) for r in one.to_pylist()] == [repr(r) for r in other.to_pylist()]


def test_layers_columns_and_units_can_be_chosen(tmp_path):
    store = new_store(tmp_path)
    for i in range(4):
        do_unit(store, i)
    rows = store.read("mine_parts", layer="blocks.0", columns=["total", "layer"])
    assert rows.column_names == ["total", "layer"]
    assert rows.num_rows == 10
    assert set(rows["layer"].to_pylist()) == {"blocks.0"}
    assert store.read("mine_parts", layer="none").num_rows == 0
    assert store.read("mine_parts", units=[]).equals(empty_rows("mine_parts"))
    one = store.read("images", units=[unit_key(2), unit_key(2)])
    assert plain(one) == plain(rows_of("images", 5, 2))
    with pytest.raises(StoreError, match="Did you mean 'total'"):
        store.read("mine_parts", columns=["totl"])
    with pytest.raises(StoreError, match="is not committed: it has no record"):
        store.read("images", units=[unit_key(2), unit_key(9)])
    with pytest.raises(StoreError, match="no table"):
        store.read("imagse")


@pytest.mark.parametrize("layer", ODD_LAYERS)
def test_odd_layer_names_come_back(tmp_path, layer):
    store = new_store(tmp_path)
    unit = f"mine/{layer}/0-64"
    part = store.write_part("mine_parts", unit, rows_of("mine_parts", 3), layer)
    store.commit(Receipt(unit, [part], 0.0, "h", "mine"))
    again = Store(tmp_path)
    assert list(again.committed()) == [unit]
    assert again.read("mine_parts", layer=layer)["layer"].to_pylist() == [layer] * 3


def test_digests_do_not_depend_on_order_attempt_host_or_time(tmp_path):
    digests = []
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        store = new_store(tmp_path / name)
        for i in order:
            parts = write_unit(store, i).parts[:: 1 if name == "a" else -1]
            store.commit(Receipt(unit_key(i), parts, seconds=i, host=name, stage="mine"))
        digests.append(store.finish())
    assert digests[0] == digests[1]
    assert digests[0]["images"]["n_rows"] == 15
    assert list(digests[0]) == ["images", "mine_parts"]


def test_finish_removes_orphans_alone_and_says_what_is_there(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    committed = sorted(tmp_path.rglob("*.parquet"))
    write_unit(store, 1)
    leftovers = [
        tmp_path / folder / f".{'a' * 32}.tmp" for folder in ("", "commits", "images", "mine_parts/layer=blocks.0")
    ]
    kept = [tmp_path / "report.html", tmp_path / "images" / "notes.txt", tmp_path / "images" / "mine.parquet"]
    for path in leftovers + kept:
        path.write_text("x")
    before = store.digests()
    assert store.finish() == before
    assert store.is_finished
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in kept)
    assert sorted(p for p in tmp_path.rglob("*.parquet") if p not in kept) == committed
    success = json.loads((tmp_path / "_SUCCESS").read_text())
    assert success == {"run_id": store.run_id, "n_units": 1, "tables": before}
    assert store.finish() == before


def test_a_unit_that_is_committed_while_the_run_finishes_is_not_harmed(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    do_unit(store, 0)
    list_parts, look, late = part_files, Store.intact, iter([1, 2, 4])

    def listing(place: Place) -> list[str]:
        do_unit(store, next(late))
        return list_parts(place)

    def looking(self: Store) -> pa.Table:
        do_unit(store, next(late))
        return look(self)

    with monkeypatch.context() as patch:
        patch.setattr("polyray.store.part_files", listing)
        patch.setattr(Store, "intact", looking)
        store.finish()
    assert len(store.committed()) == 4
    assert verify(tmp_path).ok


def test_a_commit_takes_success_back_but_a_losing_one_does_not(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    store.finish()
    again = held(tmp_path)
    assert not do_unit(again, 0)
    assert again.is_finished
    assert do_unit(again, 1)
    assert not store.is_finished


def test_finish_refuses_when_a_committed_part_is_gone(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    gone = next(tmp_path.rglob("*.parquet"))
    gone.unlink()
    with pytest.raises(StoreError, match="gone"):
        store.finish()
    assert not store.is_finished
    with pytest.raises(StoreError, match="missing or damaged"):
        store.read(gone.relative_to(tmp_path).parts[0])


def test_parts_say_what_their_columns_mean(tmp_path):
    store = new_store(tmp_path)
    part = store.write_part("images", "u", rows_of("images", 1), None)
    schema = pq.read_schema(tmp_path / part.path)
    assert schema.metadata[b"polyray.run_id"].decode() == store.run_id
    assert schema.field("label").metadata[b"doc"] == b"class label"
