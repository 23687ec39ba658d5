"""The viewer on what is wrong, unfinished or not there: it says so, and shows what there is."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from censuses import census, picture, put_rows
from sweeps import AS_FROM_A_TERMINAL, Command, command
from viewing import Viewer, begun, scored, viewing

from polyray.cluster.plan import works
from polyray.cluster.psi_text_work import workers_of
from polyray.cluster.resolve import Resolved
from polyray.errors import DataError, StoreError
from polyray.overlay import opened
from polyray.records import Receipt
from polyray.report.catalog import Catalog
from polyray.schema import VERSION
from polyray.store import Store
from polyray.view import site
from polyray.view.pictures import Pictures


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return census(tmp_path_factory.mktemp("census") / "out", n_neurons=60, n_layers=2, n_detailed=3)


@pytest.fixture(scope="module")
def viewer(out: Path) -> Iterator[Viewer]:
    with viewing(out) as found:
        yield found


def test_a_dataset_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    made = census(tmp_path / "out", n_neurons=20, n_layers=1)
    run = json.loads((made / "run.json").read_text())
    (made / "run.json").write_text(json.dumps(run | {"schema_version": VERSION + 1}))
    with pytest.raises(
        StoreError, match=f"version {VERSION + 1} of the tables, and this polyray knows none after {VERSION}"
    ):
        Catalog(made)
    done = command("view", made, "--port", 0, "--no-open")
    assert done.exit_code == 2
    assert "none after" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("made", ["nothing", "a folder"])
def test_what_is_no_dataset_is_refused(tmp_path: Path, made: str) -> None:
    if made == "a folder":
        (tmp_path / "out").mkdir()
    done = command("view", tmp_path / "out", "--port", 0, "--no-open")
    assert done.exit_code == 2
    assert "Give the OUT of a run" in done.stderr


def test_a_port_in_use_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("view", tmp_path / "not even there", "--port", port, "--no-open")
    assert done.exit_code == 2
    assert f"port {port} is in use" in done.stderr
    assert "--port 0" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_tells_its_address_answers_and_ends_cleanly(
    out: Path, tmp_path: Path, number: signal.Signals
) -> None:
    running = Command(tmp_path, "view", out, "--port", 0, "--no-open", program=AS_FROM_A_TERMINAL)
    running.wait_until(lambda: "http://127.0.0.1:" in running.stdout, 60)
    port = int(running.stdout.split("http://127.0.0.1:")[1].split("/")[0])
    assert "blocks.1" in Viewer(port).page("/")
    status = running.send(number)
    assert status == 0
    assert running.stdout.rstrip().endswith("ended")
    assert "Traceback" not in running.stderr


def test_a_layer_or_neuron_that_is_not_there_names_the_nearest(viewer: Viewer) -> None:
    for path, told in (
        ("/neuron?layer=block.1&neuron=0", "Did you mean &#39;blocks.1&#39;"),
        ("/neuron?layer=blocks.1&neuron=999", "the nearest in number is 29"),
        ("/thumbnail?layer=blocks.1&neuron=0&cluster=99&i=0", "has no cluster 99"),
        ("/image?example=0", "start the viewer with --probe"),
        ("/nowhere", "No page has this address"),
    ):
        found = viewer.get(path)
        assert found.status == 404
        assert told in found.text


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("min_S=high", "min_S must be a number such as 0.05"),
        ("min_S=nan", "min_S must be a number"),
        ("min_S=1&max_S=0", "min_S must be at most max_S"),
        ("status=xyz", "Valid: &#39;ok&#39;, &#39;excluded&#39;, &#39;failed&#39;"),
        ("called=perhaps", "Valid: &#39;yes&#39;, &#39;no&#39;"),
        ("preset=specifik", "Did you mean &#39;specific&#39;"),
        ("sort=log_pis", "Did you mean &#39;log_psi&#39;"),
        ("layer=blocks1", "Did you mean &#39;blocks.1&#39;"),
        ("page=0", "page must be a whole number from 1"),
        ("page=99999999999999999999", "page must be a whole number from 1"),
        ("page=١", "page must be a whole number from 1"),
        ("per=51", "per must be one of 25, 50, 100, 200"),
        ("nme=zebra", "Did you mean &#39;name&#39;"),
        ("name=" + "a" * 201, "name may have 200 letters"),
        ("diagnosis=odd", "diagnosis cannot be"),
    ],
)
def test_a_filter_that_cannot_be_says_what_can(viewer: Viewer, query: str, told: str) -> None:
    for path in ("/neurons", "/neurons.csv"):
        found = viewer.get(f"{path}?{query.replace('١', '%D9%A1')}")
        assert found.status == 400
        assert told in found.text.replace("&#34;", '"')


def test_all_problems_are_told_at_once_and_empty_fields_are_none(viewer: Viewer) -> None:
    found = viewer.get("/neurons?min_S=x&per=3&foo=1")
    assert [w in found.text for w in ("min_S", "per must", "foo")] == [True] * 3
    assert viewer.get("/neurons?min_S=&layer=&name=&called=&preset=&sort=").status == 200
    for path in ("/search?q=a&in=nowhere", "/search?q=a&page=-1", "/neuron?layer=blocks.1&neuron=-1", "/?foo=1"):
        assert viewer.get(path).status == 400


def test_a_run_that_has_only_begun_is_an_empty_network(tmp_path: Path) -> None:
    begun(tmp_path / "out", {"a": 4, "b": 2})
    with viewing(tmp_path / "out") as viewer:
        page = viewer.page("/")
        assert "No neuron has its numbers yet" in page
        assert "of 6" in page
        assert ">a<" in page
        assert "calibrate" in page
        assert "No neuron has its numbers yet" in viewer.page("/neurons")
        assert "No neuron has its numbers yet" in viewer.page("/search?q=zebra")
        assert len(viewer.page("/neurons.csv").splitlines()) == 1
        found = viewer.get("/neuron?layer=a&neuron=0")
        assert found.status == 404
        assert "the sweep has not come to it" in found.text


def test_a_run_without_layers_says_so(tmp_path: Path) -> None:
    begun(tmp_path / "out", {})
    with viewing(tmp_path / "out") as viewer:
        assert "it stopped before its first one" in viewer.page("/")
        assert viewer.get("/neurons").status == 200


def test_a_run_in_which_everything_failed_is_shown_with_its_reasons(tmp_path: Path) -> None:
    store = begun(tmp_path / "out", {"mid": 3})
    rows = [{"neuron": i, "status": "failed", "reason": f"no response: {i}", "n_examples": 0} for i in range(3)]
    put_rows(store, "all", "calibrate", {"neurons": rows})
    store.finish()
    with viewing(tmp_path / "out") as viewer:
        assert 'aria-label="3 failed in mid"' in viewer.page("/")
        assert "no response: 2" in viewer.page("/neurons?status=failed")
        page = viewer.page("/neuron?layer=mid&neuron=1")
        assert page.count("no response: 1") >= 3
        assert "It has no clusters" in page
        assert "It has no scores" in page


def test_a_neuron_that_is_clustered_but_not_calibrated_yet(tmp_path: Path) -> None:
    store = begun(tmp_path / "out", {"mid": 3})
    cluster = {
        "neuron": 0,
        "cluster": 0,
        "size": 5,
        "name": "zebra",
        "name_score": 0.5,
        "label": "a",
        "label_frac": 1.0,
    }
    put_rows(store, "cluster", "cluster", {"clusters": [cluster]})
    with viewing(tmp_path / "out") as viewer:
        page = viewer.page("/neuron?layer=mid&neuron=0")
        assert "not calibrated yet" in page
        assert "zebra" in page
        assert "the sweep has not calibrated it yet" in page


def test_cards_say_that_pictures_are_missing(tmp_path: Path) -> None:
    store = begun(tmp_path / "out", {"mid": 2})
    of = {"size": 5, "name": "zebra", "name_score": 0.5, "label": None, "prototypes": [1, 2]}
    clusters = [
        {"neuron": 0, "cluster": 0, "thumbnails": None} | of,
        {"neuron": 0, "cluster": 1, "thumbnails": [None, picture(0)]} | of,
        {"neuron": 1, "cluster": 0, "thumbnails": [], "prototypes": None} | {k: of[k] for k in ("size", "name")},
    ]
    put_rows(store, "all", "calibrate", {"neurons": [scored(0), scored(1)], "clusters": clusters})
    store.finish()
    with viewing(tmp_path / "out") as viewer:
        page = viewer.page("/neuron?layer=mid&neuron=0")
        assert page.count("No thumbnails are stored") == 1
        assert page.count(">no picture<") == 3
        assert "polyray view OUT --probe" in page
        assert "No thumbnails are stored" in viewer.page("/neuron?layer=mid&neuron=1")
        assert b"no picture" in viewer.get("/thumbnail?layer=mid&neuron=0&cluster=0&i=0").body


def test_probe_images_are_framed_and_a_probe_set_that_is_another_is_refused(out: Path, tmp_path: Path) -> None:
    with viewing(out, probe=True) as viewer:
        found = viewer.get("/image?example=3")
        assert (found.status, found.headers["content-type"]) == (200, "image/jpeg")
        assert found.body.startswith(b"\xff\xd8\xff")
        assert viewer.get("/image?example=2400").status == 404
        page = viewer.page("/neuron?layer=blocks.0&neuron=0")
        assert 'src="/image?example=' in page
        assert '<rect class="under" x="8" y="4" width="32" height="32"/>' in page
    store = begun(tmp_path / "other", {"mid": 1})
    images = [{"example": 3, "name": "another picture", "status": "ok"}]
    put_rows(store, "all", "calibrate", {"neurons": [scored(0)], "images": images})
    with viewing(tmp_path / "other", probe=True) as viewer:
        assert b"cannot be read" in viewer.get("/image?example=3").body
        assert viewer.get("/image?example=4").headers["content-type"] == "image/jpeg"


def test_a_probe_set_that_is_gone_or_of_words_is_refused(out: Path, tmp_path: Path) -> None:
    gone = census(tmp_path / "gone", n_neurons=20, n_layers=1)
    run = json.loads((gone / "run.json").read_text())
    run["config"]["science"]["probe"] = {"kind": "folder", "path": str(tmp_path / "not there")}
    (gone / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match="not there"):
        Pictures(Catalog(gone))
    run["config"]["science"]["probe"] = {"kind": "generated", "n_classes": 3, "n_per_class": 4, "image_px": 64}
    (gone / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match="has 12 images, the run saw 2400"):
        Pictures(Catalog(gone))


def work_off(resolved: Resolved, out: Path, stages: tuple[str, ...]) -> None:
    """Some stages of the tiny sweep, by hand, without the end."""
    moved = replace(resolved.sweep, out=str(out))
    store = Store(out)
    store.create_or_resume(resolved.identity, resolved.provenance, moved.config.model_dump(mode="json"))
    store = opened(out)
    with store.acquire():
        workers = {}
        for stage in stages:
            kind = moved.steps[stage]
            if kind not in workers:
                workers[kind] = workers_of(moved)[kind](moved)
            for work in works(stage, moved.shape, store):
                (result,) = workers[kind].run([work])
                assert isinstance(result, Receipt), result
                store.commit(result)


def test_a_running_sweep_is_followed(resolved: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "REFRESH_S", 0.05)
    out = tmp_path / "out"
    work_off(resolved, out, ("index", "window", "mine"))
    with viewing(out) as viewer:
        page = viewer.page("/")
        assert '<th scope="row">mine</th>' in page
        assert "<progress" in page
        assert 'data-running="yes"' in page
        assert "No neuron has its numbers yet" in page
        work_off(resolved, out, ("merge", "extract", "embed", "cluster", "draw", "calibrate"))
        give_up_s = time.monotonic() + 20
        while "of 41 neurons" not in (page := viewer.page("/neurons")) and time.monotonic() < give_up_s:
            time.sleep(0.1)
        assert "1–41 of 41 neurons" in page
        assert "not called" not in viewer.page("/neuron?layer=mid&neuron=3")  # q comes with the summary
        with (store := opened(out)).acquire():
            store.finish()
        while 'data-running="yes"' in (page := viewer.page("/")) and time.monotonic() < give_up_s:
            time.sleep(0.1)
        assert 'data-running="no"' in page
        assert "<progress" not in page
