"""Creating and resuming OUT, what parts accept, what a commit does, what a reader sees."""

import json
import pickle
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from store.samples import (
    IDENTITY,
    ODD_LAYERS,
    PROVENANCE,
    do_unit,
    empty_rows,
    layer_of,
    new_store,
    plain,
    rows_of,
    unit_key,
    write_unit,
)

from polyray import config, files
from polyray.errors import StoreError
from polyray.records import Receipt, decode, encode, record_name
from polyray.schema import TABLES, VERSION
from polyray.store import Store, part_files
from polyray.verify import verify

# ---------------------------------------------------------------------------------------------------- OUT and its run


def test_run_json_says_what_the_run_is(tmp_path):
    out = tmp_path / "deep" / "out with spaces and 漢字"
    store = Store(out)
    run_id = store.create_or_resume(IDENTITY, PROVENANCE, {"science": {"seed": 0}})
    assert run_id == config.run_id(IDENTITY) == Store(out).run_id
    assert json.loads((out / "run.json").read_text()) == {
        "run_id": run_id,
        "identity": IDENTITY,
        "config": {"science": {"seed": 0}},
        "provenance": PROVENANCE,
        "schema_version": VERSION,
    }
    assert not store.is_finished


def test_resuming_keeps_run_json_as_it_was(tmp_path):
    new_store(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    other_host = PROVENANCE | {"polyray": "0.2.0"}
    assert Store(tmp_path).create_or_resume(IDENTITY, other_host, {}) == config.run_id(IDENTITY)
    assert (tmp_path / "run.json").read_bytes() == before


def test_another_run_is_refused_with_every_field_that_differs(tmp_path):
    new_store(tmp_path)
    other = {k: v for k, v in IDENTITY.items() if k != "seed"} | {"mine.K": 50, "embed.n_pool": [1, 2]}
    with pytest.raises(StoreError) as e:
        Store(tmp_path).create_or_resume(other, PROVENANCE, {})
    assert str(e.value).splitlines()[1:] == [
        "  embed.n_pool: OUT has nothing, this run has [1, 2]",
        "  mine.K: OUT has 100, this run has 50",
        "  seed: OUT has 0, this run has nothing",
    ]


@pytest.mark.parametrize(("key", "value"), [("torch", "2.10.0"), ("device_class", "cuda")])
def test_another_torch_or_device_class_is_refused(tmp_path, key, value):
    new_store(tmp_path)
    with pytest.raises(StoreError, match="Mixed device classes or torch versions") as e:
        Store(tmp_path).create_or_resume(IDENTITY, PROVENANCE | {key: value}, {})
    assert f"{key}: OUT has {json.dumps(PROVENANCE[key])}, this run has {json.dumps(value)}" in str(e.value)


def test_tuples_in_an_identity_are_the_lists_that_json_makes_of_them(tmp_path):
    identity = IDENTITY | {"cluster.k_range": (2, 6)}
    Store(tmp_path).create_or_resume(identity, PROVENANCE, {})
    Store(tmp_path).create_or_resume(identity, PROVENANCE, {})
    with pytest.raises(StoreError) as e:
        Store(tmp_path).create_or_resume(identity | {"mine.K": 1}, PROVENANCE, {})
    assert "k_range" not in str(e.value)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        new_store(tmp_path)
    assert files.names(tmp_path) == ["thesis.tex"]


def test_what_a_crash_leaves_before_run_json_is_not_in_the_way(tmp_path):
    (tmp_path / f".{'0' * 32}.tmp").write_text("{")
    new_store(tmp_path)


def test_out_that_is_a_file_or_an_address_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="Choose another OUT"):
            new_store(out)
    with pytest.raises(StoreError, match="local or shared folder"):
        Store("s3://bucket/out")


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"run_id": "x"}'])
def test_damaged_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError, match="damaged"):
        new_store(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 1, 100])
def test_run_json_cut_short_while_it_was_made_is_made_whole(tmp_path, n_bytes):
    new_store(tmp_path)
    path = tmp_path / "run.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:n_bytes])
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path).committed()
    new_store(tmp_path)
    assert path.read_bytes() == whole


def test_edited_run_json_is_refused(tmp_path):
    new_store(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"mine.K": 100', '"mine.K": 101'))
    with pytest.raises(StoreError, match="edited"):
        new_store(tmp_path)


def test_nothing_is_written_where_there_is_no_run(tmp_path):
    store = Store(tmp_path / "out")
    for write in (lambda: write_unit(store, 0), lambda: store.commit(Receipt("u", [], 0.0, "h", "mine"))):
        with pytest.raises(StoreError, match="holds no run"):
            write()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- names


@example("a" * 300, "b")
@example("a" * 147 + "é" * 50, "b")
@example("a" * 146 + "é" * 50, "b")
@example("_shared", "_")
@example(".", ".")
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300), st.text(min_size=1, max_size=5))
def test_names_are_safe_reversible_and_distinct(name, other):
    q = files.quoted(name)
    assert q.isascii()
    assert q[0] not in "._"
    assert not set(q) & set("/\\*?[]{}'\" \0")
    assert len(f".{q}-12345678.parquet") < 255
    assert name.startswith(unquote(q.partition("~")[0], errors="strict"))
    if "~" not in q:
        assert unquote(q) == name
    assert q not in (files.quoted(name + other), files.quoted(q + "~"))
    assert (files.quoted(q) == q) == (q == name)


def test_long_names_with_equal_beginnings_differ():
    assert len({files.quoted("é" * 300 + str(i)) for i in range(100)}) == 100


def test_the_empty_name_is_refused():
    with pytest.raises(StoreError, match="empty"):
        files.quoted("")


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("table", sorted(TABLES))
def test_rows_come_back_as_they_were(tmp_path, table):
    store = new_store(tmp_path)
    rows = rows_of(table, 20)
    part = store.write_part(table, "u/0", rows, layer_of(table, "features.1"))
    assert part.n_rows == 20
    assert part.n_bytes == (tmp_path / part.path).stat().st_size
    folder = f"{table}/layer=features.1" if TABLES[table].by_layer else table
    assert Path(part.path).parent == Path(folder)
    assert store.read(table).equals(empty_rows(table))
    assert store.commit(Receipt("u/0", [part], 0.1, "h", "s"))
    back = store.read(table)
    if TABLES[table].by_layer:
        assert back["layer"].to_pylist() == ["features.1"] * 20
        back = back.drop_columns(["layer"])
    assert back.schema.equals(TABLES[table].schema)
    assert plain(back) == plain(rows)
    key = list(TABLES[table].key)
    assert back.select(key).to_pylist() == rows.sort_by([(k, "ascending") for k in key]).select(key).to_pylist()


def test_half_precision_vectors_keep_every_bit(tmp_path):
    store = new_store(tmp_path)
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[np.isfinite(bits.view(np.float16))]
    vectors = pa.ListArray.from_arrays(
        pa.array([0, 100, 100, len(finite)], pa.int32()), pa.array(finite.view(np.float16))
    )
    rows = pa.table(
        {"patch_id": pa.array([1, 2, 3]), "geometry": vectors, "text": pa.nulls(3, vectors.type)},
        schema=TABLES["embeddings"].schema,
    )
    part = store.write_part("embeddings", "u", rows, "a")
    store.commit(Receipt("u", [part], 0.0, "h", "embed"))
    back = store.read("embeddings")["geometry"].combine_chunks()
    assert back.value_lengths().to_pylist() == [100, 0, len(finite) - 100]
    assert back.flatten().to_numpy(zero_copy_only=False).view(np.uint16).tolist() == finite.tolist()


def test_columns_are_reordered_and_cast_where_nothing_is_lost(tmp_path):
    store = new_store(tmp_path)
    rows = rows_of("mine_parts", 6, null_frac=0)
    loose = pa.table(
        {
            "position": rows["position"].cast(pa.large_list(pa.int64())),
            **{c: rows[c] for c in rows.column_names if c not in ("position", "neuron", "n_images", "bins")},
            "bins": pa.nulls(6),
            "n_images": rows["n_images"].dictionary_encode(),
            "neuron": rows["neuron"].cast(pa.uint64()),
        }
    )
    part = store.write_part("mine_parts", "u", loose, "a")
    same = rows.set_column(
        rows.column_names.index("bins"), rows.schema.field("bins"), pa.nulls(6, pa.list_(pa.int32()))
    )
    assert part.digest == store.write_part("mine_parts", "u", same, "a").digest


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("neuron", pa.array([2**31]), "'neuron'.*int64.*int32"),
        ("neuron", pa.array([1.0]), "'neuron'.*double"),
        ("neuron", pa.array(["1"]), "'neuron'.*string"),
        ("minimum", pa.array([1e300]), "'minimum'.*too large"),
        ("minimum", pa.array(["x"]), "'minimum'"),
        ("bins", pa.array([[2**40]]), "'bins'"),
        ("bins", pa.array([1]), "'bins'"),
        ("total", pa.array([2**60 + 1]), "'total'"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_column(tmp_path, column, values, message):
    rows = rows_of("mine_parts", 1)
    rows = rows.set_column(rows.column_names.index(column), column, values)
    with pytest.raises(StoreError, match=message):
        new_store(tmp_path).write_part("mine_parts", "u", rows, "a")


def test_missing_unknown_and_repeated_columns_are_refused_by_name(tmp_path):
    store, rows = new_store(tmp_path), rows_of("images", 2)
    with pytest.raises(StoreError, match=r"missing: \['label'\]"):
        store.write_part("images", "u", rows.drop_columns(["label"]), None)
    with pytest.raises(StoreError, match=r"unknown: \['extra'\]"):
        store.write_part("images", "u", rows.append_column("extra", rows["label"]), None)
    with pytest.raises(StoreError, match=r"twice: \['label'\]"):
        store.write_part("images", "u", rows.append_column("label", rows["label"]), None)
    assert not list(tmp_path.rglob("*.parquet"))


def test_tables_and_layers_must_fit(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(StoreError, match="Did you mean 'neurons'"):
        store.write_part("neurones", "u", rows_of("neurons", 1), "a")
    with pytest.raises(StoreError, match="name the layer"):
        store.write_part("neurons", "u", rows_of("neurons", 1), None)
    with pytest.raises(StoreError, match="layer must be None"):
        store.write_part("images", "u", rows_of("images", 1), "a")
    with pytest.raises(StoreError, match="layer must be None"):
        store.read("images", layer="a")


def test_parts_are_never_overwritten(tmp_path, monkeypatch):
    store = new_store(tmp_path)
    first = store.write_part("images", "u", rows_of("images", 3), None)
    before = (tmp_path / first.path).read_bytes()
    names = iter([Path(first.path).name, Path(first.path).name, "u-00000000.parquet"])
    monkeypatch.setattr("polyray.store.part_name", lambda unit: next(names))
    assert store.write_part("images", "u", rows_of("images", 4), None).path == "images/u-00000000.parquet"
    assert (tmp_path / first.path).read_bytes() == before


# ----------------------------------------------------------------------------------------------------------- commits


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
    assert not Store(tmp_path).commit(second)
    assert Store(tmp_path).committed() == {first.unit_key: first}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.parquet")) == sorted(
        p.path for p in first.parts
    )


def test_committing_the_same_receipt_again_harms_nothing(tmp_path):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    assert store.commit(receipt)
    assert not Store(tmp_path).commit(receipt)
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
    with pytest.raises(StoreError, match="It is gone"):
        store.commit(receipt)
    assert store.committed() == {}


def test_records_of_another_run_do_not_count(tmp_path, caplog):
    store = new_store(tmp_path)
    receipt = write_unit(store, 0)
    (tmp_path / "commits" / record_name(receipt.unit_key)).write_bytes(encode(receipt, "f" * 16))
    assert store.committed() == {}
    assert "belongs to another run" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"unit_key": "x"}'])
def test_a_damaged_record_is_no_commit_and_heals(tmp_path, caplog, monkeypatch, damage):
    monkeypatch.setattr("polyray.store._SETTLE_S", 0.0)
    store = new_store(tmp_path)
    do_unit(store, 0)
    do_unit(store, 1)
    (tmp_path / "commits" / record_name(unit_key(0))).write_bytes(damage)
    again = Store(tmp_path)
    assert list(again.committed()) == [unit_key(1)]
    assert "does not count" in caplog.text
    for use in (
        again.digests,
        again.finish,
        lambda: again.read("images"),
        lambda: again.read("images", units=[unit_key(0)]),
    ):
        with pytest.raises(StoreError):
            use()
    assert do_unit(again, 0)
    assert list(Store(tmp_path).committed()) == [unit_key(0), unit_key(1)]
    assert Store(tmp_path).read("images").num_rows == 10


# ---------------------------------------------------------------------------------------------------- reading, finish


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
    list_parts, read_records, late = part_files, Store.intact, iter([1, 2])

    def listing(out: Path) -> list[str]:
        do_unit(Store(tmp_path), next(late))
        return list_parts(out)

    def records(self: Store) -> list[Receipt]:
        do_unit(Store(tmp_path), next(late))
        return read_records(self)

    with monkeypatch.context() as patch:
        patch.setattr("polyray.store.part_files", listing)
        patch.setattr(Store, "intact", records)
        store.finish()
    assert len(store.committed()) == 3
    assert verify(tmp_path).ok


def test_a_commit_takes_success_back_but_a_losing_one_does_not(tmp_path):
    store = new_store(tmp_path)
    do_unit(store, 0)
    store.finish()
    assert not do_unit(Store(tmp_path), 0)
    assert store.is_finished
    assert do_unit(store, 1)
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
