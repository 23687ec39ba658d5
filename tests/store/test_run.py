"""Creating and resuming OUT: one run, told by its identity, never mixed with anything else."""

import json

import pytest
from store.samples import (
    IDENTITY,
    PROVENANCE,
    new_store,
    write_unit,
)

from polyray import config, files
from polyray.errors import StoreError
from polyray.records import Receipt
from polyray.schema import VERSION
from polyray.store import Store


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
    for address in ("gs://bucket/out", "s3://", "file:///tmp/out"):
        with pytest.raises(StoreError, match="local or shared folder or s3://bucket/prefix"):
            Store(address)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"run_id": "x"}'])
def test_damaged_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError, match="is damaged"):
        new_store(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 1, 100])
def test_run_json_cut_short_while_it_was_made_is_made_whole(tmp_path, n_bytes):
    new_store(tmp_path)
    path = tmp_path / "run.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:n_bytes])
    with pytest.raises(StoreError, match="is damaged"):
        Store(tmp_path).committed()
    new_store(tmp_path)
    assert path.read_bytes() == whole


def test_edited_run_json_is_refused(tmp_path):
    new_store(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"mine.K": 100', '"mine.K": 101'))
    with pytest.raises(StoreError, match="was edited"):
        new_store(tmp_path)


def test_nothing_is_written_where_there_is_no_run(tmp_path):
    store = Store(tmp_path / "out")
    for write in (lambda: write_unit(store, 0), lambda: store.commit(Receipt("u", [], 0.0, "h", "mine"))):
        with pytest.raises(StoreError, match="holds no run"):
            write()
    assert not (tmp_path / "out").exists()
