"""What the pages ask and say of a swap, with somebody who holds no network; and how replicas are asked."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import ray.exceptions as rx
from censuses import picture, put_rows
from ray.serve.exceptions import BackPressureError
from starlette.applications import Starlette
from viewing import HOSTILE, LAYER, SCRIPT, Viewer, begun, hostile, language, scored, served, viewing

from polyray.report.catalog import Catalog
from polyray.serving.deployment import Asker, Refusal
from polyray.view.app import application
from polyray.view.serve import hosts, listening
from polyray.view.trying import Answer, CannotError, Question, Seen, TryAgainError, choices

N_IMAGES = 40


def answer(after: float | None = 3.0, sd: float | None = 0.5, notes: tuple[str, ...] = ()) -> Answer:
    shown = picture(1)
    seen = [Seen(r, r, shown) for r in (2.0, 1.0, after)]
    return Answer(*seen, shown, (1, 2, 9, 10), (3, 4, 11, 12), 64, 5, sd, notes)


class Stub:
    """Answers as it is told to."""

    def __init__(self, reply: Answer | Exception, why_not: str | None = None) -> None:
        self.reply, self.why_not, self.asked = reply, why_not, list[Question]()

    def refusal(self) -> str | None:
        return self.why_not

    def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


@contextmanager
def trying(out: Path, stub: Stub) -> Iterator[Viewer]:
    sock = listening(0)
    app: Starlette = application(Catalog(out), hosts=hosts(sock.getsockname()[1]), trier=stub)
    with served(app, sock) as viewer:
        yield viewer


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A neuron with twelve examples in two clusters of two prototypes, and images of which the last cannot be read."""
    out = tmp_path_factory.mktemp("made") / "out"
    store = begun(out, {"mid": 3})
    images = [
        {"example": i, "name": f"{i}", "label": "x", "status": "ok", "pixel_hash": f"{i:064}"} for i in range(N_IMAGES)
    ]
    images[-1] |= {"status": "failed", "reason": "cut short", "pixel_hash": None}
    layer = {"layer": "mid", "depth": 0, "grid_h": 4, "grid_w": 4, "width": 3, "swap_side_px": 9, "layout": "nchw"}
    examples = [
        {"neuron": 1, "rank": i, "example": 3 * i, "activation": 9.0 - i, "position": i, "label": "x"}
        | {"patch_id": 10**15 + i, "cluster": i % 2 if i < 10 else None, "x0": 0, "y0": 0, "x1": 9, "y1": 9}
        for i in range(12)
    ]
    clusters = [
        {"neuron": 1, "cluster": c, "size": 5, "name": "zebra", "name_score": 0.5, "names": ["zebra"], "label": "x"}
        | {"label_frac": 1.0, "prototypes": [10**15 + c, 10**15 + c + 2], "thumbnails": [picture(c), None]}
        for c in (0, 1)
    ]
    put_rows(store, "index", "index", {"images": images, "layers": [layer]})
    put_rows(store, "all", "calibrate", {"neurons": [scored(1)], "clusters": clusters, "examples": examples}, "mid")
    store.finish()
    return out


@pytest.fixture(scope="module")
def neuron(out: Path) -> dict[str, Any]:
    """An example of it."""
    return Catalog(out).at("examples", rank=2)[0]


def address(row: dict[str, Any], changes: dict[str, Any] | None = None) -> str:
    asked = {"layer": row["layer"], "neuron": row["neuron"], "patch": row["patch_id"], "example": 0}
    return "/swap?" + urlencode(asked | (changes or {}))


def test_the_viewer_alone_says_nothing_of_it(out: Path, neuron: dict[str, Any]) -> None:
    with viewing(out) as viewer:
        page = viewer.page(f"/neuron?layer={neuron['layer']}&neuron={neuron['neuron']}")
        assert "Try a swap" not in page
        assert "/swap" not in page
        assert viewer.get(address(neuron)).status == 404


def test_the_form_offers_prototypes_and_images(out: Path, neuron: dict[str, Any]) -> None:
    stub = Stub(answer())
    with trying(out, stub) as viewer:
        page = viewer.page(f"/neuron?layer={neuron['layer']}&neuron={neuron['neuron']}")
    assert '<form action="/swap"' in page
    catalog = Catalog(out)
    at = {"layer": neuron["layer"], "neuron": neuron["neuron"]}
    known = {e["patch_id"] for e in catalog.at("examples", **at)}
    prototypes = [p for c in catalog.at("clusters", **at) for p in c["prototypes"] if p in known]
    assert prototypes
    assert page.count('name="patch"') == len(prototypes)
    assert all(f'name="patch" value="{p}"' in page for p in prototypes)
    assert page.count("checked") >= 2


def test_numbers_and_their_difference_are_shown(out: Path, neuron: dict[str, Any]) -> None:
    stub = Stub(answer(notes=(SCRIPT,)))
    with trying(out, stub) as viewer:
        page = viewer.page(address(neuron, {"example": 1}))
        (asked,) = stub.asked
        assert (asked.neuron, asked.donor.example, asked.host.example) == (neuron["neuron"], neuron["example"], 1)
        assert (asked.donor.position, asked.host.position) == (neuron["position"], None)
        assert len(asked.activation) == 10
        assert "from <b>2.000</b> to <b>3.000</b>: <b>+2.00</b> standard deviations" in page
        assert '<td class="n">+4.00</td>' in page  # against the filled box
        assert page.count('<img src="data:image/jpeg') >= 3
        assert 'alt="image 1 with the patch in the box"' in page
        assert SCRIPT not in page
        viewer.page(address(neuron, {"example": 1, "other": 2}))
        assert stub.asked[-1].host.example == 2
        viewer.page(address(neuron, {"example": 9}))
        assert stub.asked[-1].host.position == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (answer(after=None), "is not finite"),
        (answer(sd=None), "do not vary"),
    ],
)
def test_what_has_no_number_says_so(out: Path, neuron: dict[str, Any], reply: Answer, words: str) -> None:
    with trying(out, Stub(reply)) as viewer:
        assert words in viewer.page(address(neuron))


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"patch": 1}, 404),
        ({"patch": 2**63 - 1}, 404),
        ({"patch": 2**63}, 400),
        ({"patch": -1}, 400),
        ({"patch": ""}, 400),
        ({"patch": "../../etc/passwd"}, 400),
        ({"patch": "9" * 5000}, 400),
        ({"patch": "٣"}, 400),
        ({"patch": 10**15 + 11}, 404),  # it is beyond those clustered
        ({"example": N_IMAGES - 1}, 404),
        ({"example": 10**6}, 404),
        ({"example": 2**31}, 400),
        ({"example": "0x1"}, 400),
        ({"example": 0, "other": "nan"}, 400),
        ({"neuron": 10**6}, 404),
        ({"neuron": "1e3"}, 400),
        ({"layer": "nowhere"}, 404),
        ({"probe": "/etc"}, 400),
    ],
)
def test_ids_that_cannot_be_are_refused_before_anybody_is_asked(
    out: Path, neuron: dict[str, Any], changes: dict[str, Any], status: int
) -> None:
    stub = Stub(answer())
    with trying(out, stub) as viewer:
        found = viewer.get(address(neuron, changes))
    assert found.status == status, found.text
    assert stub.asked == []


@pytest.mark.parametrize("error", [CannotError(f"the weights {SCRIPT} are others"), TryAgainError(f"busy {SCRIPT}")])
def test_why_there_is_no_answer_is_said(out: Path, neuron: dict[str, Any], error: Exception) -> None:
    with trying(out, Stub(error)) as viewer:
        found = viewer.get(address(neuron))
        assert found.status == 503
        assert str(error).split(SCRIPT)[0] in found.text
        assert SCRIPT not in found.text
        assert '<form action="/swap"' in found.text
        assert viewer.get("/neurons").status == 200


def test_a_reason_that_is_known_stands_in_place_of_the_form(out: Path, neuron: dict[str, Any]) -> None:
    with trying(out, Stub(answer(), why_not=f"the probe set {SCRIPT} is not there.")) as viewer:
        page = viewer.page(f"/neuron?layer={neuron['layer']}&neuron={neuron['neuron']}")
    assert "No swap can be tried. <bdi>the probe set &lt;script&gt;" in page
    assert '<form action="/swap"' not in page


def test_a_run_over_texts_says_that_nothing_is_swapped(tmp_path: Path) -> None:
    stub = Stub(answer())
    with trying(language(tmp_path / "out"), stub) as viewer:
        page = viewer.page("/neuron?layer=h.1&neuron=0")
        assert "A run over texts has no images" in page
        assert viewer.get("/swap?layer=h.1&neuron=0&patch=1&example=1").status == 404
    assert stub.asked == []


def test_what_a_dataset_says_stays_text(tmp_path: Path) -> None:
    out = hostile(tmp_path / "out")
    with trying(out, Stub(answer())) as viewer:
        for i in range(len(HOSTILE)):
            page = viewer.page(f"/neuron?layer={quote(LAYER, safe='')}&neuron={i}")
            assert "Try a swap" in page
            assert SCRIPT not in page
            assert "<img src=x" not in page


def test_random_images_are_the_same_every_time_and_none_of_the_top_ones(out: Path, neuron: dict[str, Any]) -> None:
    catalog = Catalog(out)
    catalog.dataset.run["provenance"]["n_images"] = N_IMAGES
    examples = catalog.at("examples", layer=neuron["layer"], neuron=neuron["neuron"])
    prototype = {"thumbnail": None, "example": examples[0]}
    found = {"layer": neuron["layer"], "neuron": neuron["neuron"], "examples": examples}
    found["clusters"] = [{"cluster": 0, "name": "x", "prototypes": [prototype]}]
    first, second = (choices(catalog, Stub(answer()), found) for _ in range(2))
    assert first == second
    assert not set(first["random"]) & set(first["top"])
    assert len(set(first["random"])) == len(first["random"])
    readable = {r["example"] for r in catalog.at("images") if r["status"] == "ok"}
    assert set(first["random"]) <= readable
    assert len(first["random"]) == 8


class Response:
    def __init__(self, act: Callable[[float], Any]) -> None:
        self._act, self.cancelled = act, False

    def result(self, timeout_s: float) -> Any:
        return self._act(timeout_s)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment's handle whose replicas act as told."""

    def __init__(self, act: Callable[[float], Any]) -> None:
        self.responses: list[Response] = []
        self._act = act
        self.ask = self.refusal = self

    def remote(self, *arguments: object) -> Response:
        self.responses.append(Response(self._act))
        return self.responses[-1]


def raising(error: Exception) -> Callable[[float], Any]:
    def act(timeout_s: float) -> Any:
        raise error

    return act


QUESTION = Question({}, 0, None, None, ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "no answer within 7 s"),
        (rx.ActorDiedError(), "another one is being started"),
        (rx.ActorUnavailableError("gone", b"0" * 16), "another one is being started"),
        (rx.NodeDiedError("gone"), "another one is being started"),
        (rx.OutOfMemoryError("gone"), "another one is being started"),
        (BackPressureError(num_queued_requests=9, max_queued_requests=8), "too many"),
    ],
)
def test_what_befalls_a_replica_is_a_reason_to_try_again(error: Exception, words: str) -> None:
    handle = Handle(raising(error))
    with pytest.raises(TryAgainError, match=words):
        Asker(handle, 1, timeout_s=7.0).ask(QUESTION)
    assert handle.responses[0].cancelled is isinstance(error, TimeoutError)


@pytest.mark.parametrize("is_for_good", [True, False])
def test_a_refusal_is_remembered_where_it_is_for_good(is_for_good: bool) -> None:
    asker = Asker(Handle(lambda timeout_s: Refusal("why", is_for_good)), 1)
    with pytest.raises(CannotError, match="why"):
        asker.ask(QUESTION)
    assert asker.refusal() == ("why" if is_for_good else None)


def test_no_more_than_so_many_are_asked_at_once() -> None:
    free, begun = threading.Event(), threading.Semaphore(0)

    def act(timeout_s: float) -> Answer:
        begun.release()
        assert free.wait(60)
        return answer()

    asker = Asker(Handle(act), at_once=2)
    threads = [threading.Thread(target=asker.ask, args=(QUESTION,)) for _ in range(2)]
    for t in threads:
        t.start()
    assert all(begun.acquire(timeout=60) for _ in threads)
    started_s = time.monotonic()
    with pytest.raises(TryAgainError, match="too many"):
        asker.ask(QUESTION)
    assert time.monotonic() - started_s < 5
    free.set()
    for t in threads:
        t.join(60)
    assert asker.ask(QUESTION) == answer()
