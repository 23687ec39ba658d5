"""A dataset in a bucket, against the server of `buckets.py`: the same protocol as in a folder.

What happens at the same instant is not tested here, what happens one after the other is; the answer to two conditional
puts under way (409) is made up.
"""

import pyarrow as pa
import pytest
from store.samples import IDENTITY, PROVENANCE, attempts, do_unit, new_store, plain, rows_of, unit_key, write_unit

from polyray import compact, files
from polyray.dataset import open as open_dataset
from polyray.errors import StoreError
from polyray.lease import LeaseLostError
from polyray.overlay import described, opened
from polyray.records import Receipt
from polyray.store import Store
from polyray.verify import verify

try:
    import boto3
    from botocore.exceptions import ClientError
except ModuleNotFoundError:
    pass  # the tests skip

N = 6


def objects(out: str) -> list[str]:
    """All keys below an OUT, relative to it."""
    above = out.removeprefix("s3://census/") + "/"
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="census", Prefix=above)
    return sorted(o["Key"].removeprefix(above) for page in pages for o in page.get("Contents", ()))


def test_a_run_in_a_bucket_is_the_run_in_a_folder(out: str, tmp_path: object) -> None:
    stores = [new_store(out), new_store(tmp_path / "out")]
    for store in stores:
        for i in range(N):
            do_unit(store, i)
            if i == 3:
                store.compact("mine")
        write_unit(store, N)
        assert len(verify(store.out).orphans) == 2
    there, here = stores
    assert there.finish() == here.finish()
    assert Store(out).is_finished
    report = verify(out, [unit_key(i) for i in range(N)])
    assert report.ok, report
    assert report.n_parts == 4
    assert repr(there.read("mine_parts").to_pylist()) == repr(here.read("mine_parts").to_pylist())
    some = [unit_key(i) for i in (0, 2, 5)]
    assert repr(there.read("images", units=some).to_pylist()) == repr(here.read("images", units=some).to_pylist())
    dataset = open_dataset(out)
    assert plain(dataset["images"].to_table()) == plain(pa.concat_tables(rows_of("images", 5, i) for i in range(N)))
    kinds = [name for name in objects(out) if name.startswith("commits/")]
    assert [name.rpartition(".")[2] for name in kinds] == ["lease", "units"]
    assert len(objects(out)) == 2 + 2 + 4


def test_a_second_driver_takes_over_and_the_first_commits_nothing(out: str) -> None:
    first = new_store(out)
    do_unit(first, 0)
    late = write_unit(first, 1)
    second = new_store(out)
    assert do_unit(second, 2)
    for use in (lambda: first.commit(late), first.finish, first.compact):
        with pytest.raises(LeaseLostError):
            use()
    assert sorted(second.committed()) == [unit_key(0), unit_key(2)]
    second.finish()
    assert verify(out, [unit_key(0), unit_key(2)]).ok


def test_of_two_copies_of_a_unit_the_first_counts(out: str) -> None:
    store = new_store(out)
    first, second = write_unit(store, 0), write_unit(store, 0)
    assert store.commit(first)
    before = attempts(store)
    assert not store.commit(second)
    assert attempts(Store(out)) == before
    assert [n for n in objects(out) if n.endswith(".parquet")] == sorted(p.path for p in first.parts)


def test_a_merge_that_fails_leaves_the_bucket_as_it_was(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(out)
    for i in range(N):
        do_unit(store, i)
    before, seen = objects(out), attempts(store)
    real, n_added = compact._RowGroups.add, []

    def add(self: object, *args: object) -> None:
        n_added.append(1)
        if len(n_added) == 4:
            raise KeyboardInterrupt
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(compact._RowGroups, "add", add)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert [n for n in objects(out) if "/merged-" not in n] == before
    assert attempts(Store(out)) == seen
    store.finish()
    assert verify(out).ok


def test_a_variant_in_a_bucket_reads_its_base(out: str) -> None:
    base = new_store(out)
    do_unit(base, 0)
    variant = Store(f"{out}/variants/K-1")
    provenance = PROVENANCE | {"variant": described(base, ["summarise"])}
    variant.create_or_resume(IDENTITY | {"mine.K": 3}, provenance, {})
    found = opened(f"{out}/variants/K-1")
    assert found.base.out == out
    assert plain(found.read("images")) == plain(base.read("images"))
    assert found.read("neuron_summary").num_rows == 0


def test_names_are_listed_by_folder(out: str) -> None:
    place = files.place(files.located(out + "/"))
    for name in ("a", "b/c", "b/d/e", "bb"):
        assert place.put_if_absent(name, name.encode())
    assert place.names() == ["a", "b", "bb"]
    assert place.names("b") == ["c", "d"]
    assert place.names("none") == []
    assert place.files_below("b") == ["b/c", "b/d/e"]
    assert place.n_bytes(["a", "none", "b/d/e"]) == [1, None, 5]
    assert not place.put_if_absent("a", b"other")
    assert place.put_if_absent("a", b"a"), "what is there is what was put: the answer to the first try was lost"
    assert place.read("a") == b"a"
    place.remove_folder("b")
    place.remove(["a", "a", "none"])
    assert place.names() == ["bb"]
    with pytest.raises(FileNotFoundError):
        place.read("a")


def test_more_objects_than_one_answer_or_request_holds(out: str) -> None:
    place = files.place(out)
    wanted = [f"x/{i:04d}" for i in range(1005)]
    for name in wanted:
        place.replace(name, b"")
    assert place.files_below("x") == wanted
    assert len(place.names("x")) == 1005
    place.remove(wanted)
    assert place.names("x") == []


def fails(code: str, status: int = 400) -> "ClientError":
    return ClientError(
        {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


@pytest.mark.parametrize("how", ["ignored", "not implemented"])
def test_a_store_without_conditional_puts_is_refused_with_the_reason(
    out: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(out)
    client = store.place._client
    put = client.put_object

    def plain_put(**what: object) -> object:
        if what.pop("IfNoneMatch", None) and how == "not implemented":
            raise fails("NotImplemented", 501)
        return put(**what)

    monkeypatch.setattr(client, "put_object", plain_put)
    with pytest.raises(StoreError, match="does not honour `If-None-Match"):
        store.create_or_resume(IDENTITY, PROVENANCE, {})
    assert objects(out) == []


def test_a_conflict_of_two_puts_is_tried_again(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = files.place(out)
    put, n_puts = place._client.put_object, []

    def busy(**what: object) -> object:
        n_puts.append(1)
        if len(n_puts) < 3:
            raise fails("ConditionalRequestConflict", 409)
        return put(**what)

    monkeypatch.setattr("polyray.objects.time.sleep", lambda seconds: None)
    monkeypatch.setattr(place._client, "put_object", busy)
    assert place.put_if_absent("a", b"1")
    assert len(n_puts) == 3


def test_what_stands_in_the_way_is_said(server: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="there is no bucket 'nowhere'"):
        new_store("s3://nowhere/out")
    with pytest.raises(StoreError, match="holds no run"):
        Store(out).committed()
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        with pytest.raises(StoreError, match="no credentials"):
            new_store(out)
    store = new_store(out)
    monkeypatch.setattr(
        store.place._client, "put_object", lambda **_: (_ for _ in ()).throw(fails("AccessDenied", 403))
    )
    with pytest.raises(StoreError, match="Check the credentials"):
        write_unit(store, 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be reached"):
        new_store(out)


def test_a_store_that_cannot_be_reached_is_no_damaged_record(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(out)
    do_unit(store, 0)
    reader = Store(out)
    assert reader.run_id
    get = reader.place._client.get_object

    def failing(**what: object) -> object:
        if str(what["Key"]).endswith(".json"):
            raise fails("SlowDown", 503)
        return get(**what)

    monkeypatch.setattr(reader.place._client, "get_object", failing)
    with pytest.raises(StoreError, match="SlowDown"):
        reader.committed()


def test_a_receipt_without_parts_needs_no_object(out: str) -> None:
    store = new_store(out)
    assert store.commit(Receipt("none", [], 0.0, "h", "mine"))
    assert list(Store(out).committed()) == ["none"]
