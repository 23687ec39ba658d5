"""Viewers for tests: the application behind a real server, asked as a browser or anybody else may ask it; and datasets
made by hand, with everything in them that a name can hold."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from censuses import config, picture, put_rows
from starlette.applications import Starlette

from polyray.config import identity
from polyray.report.catalog import Catalog
from polyray.store import Store
from polyray.view.app import application
from polyray.view.pictures import Pictures
from polyray.view.serve import hosts, listening


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Viewer:
    """A running viewer."""

    def __init__(self, port: int) -> None:
        self.port, self.address = port, f"http://127.0.0.1:{port}"

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Asks for a path exactly as it is given; `Host` and others by name, with `_` for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in given)
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def page(self, path: str) -> str:
        """A page that must be there."""
        found = self.get(path)
        assert found.status == 200, (path, found.status, found.text[:2000])
        return found.text


@contextmanager
def served(app: Starlette | Any, sock: Any) -> Iterator[Viewer]:
    """An application behind uvicorn, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    give_up_s = time.monotonic() + 60
    while not server.started and time.monotonic() < give_up_s:
        time.sleep(0.01)
    try:
        yield Viewer(sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()


@contextmanager
def viewing(out: Path | str, probe: bool = False) -> Iterator[Viewer]:
    """The viewer of a dataset, as `polyray view` starts it."""
    sock = listening(0)
    catalog = Catalog(out)
    pictures = Pictures(catalog) if probe else None
    with served(application(catalog, hosts=hosts(sock.getsockname()[1]), pictures=pictures), sock) as viewer:
        yield viewer


SCRIPT = "<script>window.harmed = 1</script>"
QUOTES = "\"'><img src=x onerror=window.harmed=1>"
FORMULA = '=HYPERLINK("http://elsewhere","here")'
TURNED = "evil\u202egnp.exe"
CONTROL = "bell\x07 line\nnull\x00"
HOSTILE = (SCRIPT, QUOTES, FORMULA, TURNED, CONTROL, "../../../etc/passwd", "{{ 7*7 }}", "\u2066\ufeffx\u2069")
LAYER = 'a/../<b>&"\u202e='


def begun(out: Path, layers: dict[str, int], method: str = "psi", swept: dict[str, int] | None = None) -> Store:
    """A store of a run that has these layers, of which so many neurons are swept, with the lease."""
    store = Store(out)
    settings = config(list(layers))
    provenance: dict[str, Any] = {"torch": "0", "device_class": "cpu", "n_images": 2400, "layers": layers}
    raw = settings.model_dump(mode="json")
    if method == "categorical":
        provenance |= {"model": {"name": SCRIPT}, "swept": list(swept or layers), "n_documents": 2}
        provenance["n_swept"] = swept or layers
    else:
        provenance |= {"subject": {"name": SCRIPT}, "notes": [QUOTES]}
    raw["science"]["method"] = method
    store.create_or_resume(identity(settings, {"made": f"{layers} {method}"}, 0), provenance, raw)
    store.acquire()
    return store


def scored(neuron: int, **figures: Any) -> dict[str, Any]:
    """A row of `neurons` with every figure set, unless given otherwise."""
    row: dict[str, Any] = {"neuron": neuron, "status": "ok", "ranked_by": "response", "n_examples": 30, "n_used": 30}
    row |= {"n_labels": 5, "S": 0.2, "k": 2, "Q": 0.4, "Q_mean": 0.1, "Q_std": 0.05, "Q_p": 0.01, "D": 0.7}
    for preset in ("paper", "selective", "specific"):
        for c in ("S", "Q", "D"):
            row |= {f"{preset}_{c}_{what}": 0.5 for what in ("mean", "std", "z", "hat", "p")}
        row |= {f"{preset}_log_psi": -1.0, f"{preset}_psi": 0.3, f"{preset}_p": 0.5}
    return row | figures


def hostile(out: Path) -> Path:
    """A finished census of a few neurons whose every text is out to do harm."""
    store = begun(out, {LAYER: len(HOSTILE), "plain": 1})
    neurons, clusters, summary, examples, swaps = [], [], [], [], []
    for i, text in enumerate(HOSTILE):
        neurons.append(scored(i, reason=text, specific_log_psi=-1.0 - i / 10))
        summary.append({"neuron": i, "q": 0.01, "called": True, "diagnosis": text})
        pictures = [picture(i), b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.harmed=1'/>", None]
        clusters.append(
            {"neuron": i, "cluster": 0, "size": 20, "name": text, "name_score": 0.5, "names": [text, "other"]}
            | {"label": text, "label_frac": 0.5, "prototypes": [1, 2, 3], "thumbnails": pictures}
        )
        box = {"x0": 1, "y0": 2, "x1": 30, "y1": 31}
        examples.append(
            {"neuron": i, "rank": 0, "example": i, "activation": 1.0, "position": 0, "label": text, "patch_id": 1}
            | box | {"cluster": 0}
        )  # fmt: skip
        for condition in ("host", "aligned"):
            swaps.append(
                {"kind": "real", "neuron": i, "host": 0, "condition": condition, "status": "ok", "cluster": 0}
                | {"picture": picture(i) if condition == "host" else b"GIF89a<script>", "response": 1.0}
            )
        swaps.append(
            {"kind": "real", "neuron": i, "host": 0, "condition": "random", "status": "failed", "reason": text}
        )
    images = [{"example": i, "name": text, "label": text, "status": "ok"} for i, text in enumerate(HOSTILE)]
    put_rows(store, "index", "index", {"images": images})
    tables = {"neurons": neurons, "neuron_summary": summary, "clusters": clusters, "examples": examples, "swaps": swaps}
    put_rows(store, "all", "calibrate", tables, LAYER)
    put_rows(store, "plain", "calibrate", {"neurons": [scored(0, specific_log_psi=-3.0)]}, "plain")
    store.finish()
    return out


def language(out: Path, only_read: int = 0) -> Path:
    """A finished categorical sweep of three neurons of a layer, with the layer before it.

    Args:
        out: where.
        only_read: so many neurons more of the layer are mined without being swept.
    """
    store = begun(out, {"h.0": 3, "h.1": 3 + only_read}, "categorical", {"h.1": 3})
    texts = [" the", "zebra", "zebras", SCRIPT, TURNED, FORMULA, "\n", " "]
    tokens = [{"token": i, "count": 10 + i, "text": t} for i, t in enumerate(texts)]
    documents = [{"document": i, "name": n, "status": "ok", "n_tokens": 6} for i, n in enumerate(("first", SCRIPT))]
    contexts = [
        {"first_document": 0, "context": 0, "tokens": [99, 0, 1, 2, 0, 3], "documents": [None, 0, 0, 0, 0, 0]},
        {"first_document": 0, "context": 1, "tokens": [5, 4, 3, 1, 6, 7], "documents": [1] * 6},
    ]
    put_rows(store, "count", "count", {"tokens": tokens, "documents": documents, "contexts": contexts})
    for layer in ("h.0", "h.1"):
        core = [
            {
                "neuron": 0,
                "status": "ok",
                "tokens": [1, 2, 0, 3, 4, 5, 6, 7],
                "means": [3.0, 2.5, 2, 1, 1, 1, 0.5, -0.5],
            },
            {"neuron": 1, "status": "ok", "tokens": [0, 3, 4, 5, 6, 7, 1], "means": [3.0, 2, 1, 1, 1, 1, 0.5]},
            {"neuron": 2, "status": "failed", "reason": "an activation is not finite"},
        ]
        more = range(3, 3 + only_read if layer == "h.1" else 3)
        core += [{"neuron": i, "status": "ok", "tokens": [0], "means": [1.0]} for i in more]
        put_rows(store, f"core/{layer}", "core", {"core_tokens": core}, layer)
    deciles = [1 - i / 10 for i in range(10)]
    ok = {"neuron": 0, "status": "ok", "n_clusters": 3, "difference": 0.25, "h": 9.0, "p": 0.02, "tau": 0.9}
    ok |= {
        "first": 0.8,
        "agreeing": 0.9,
        "rank": 3,
        "deciles": deciles,
        "diagnosis": "rank_deficient; weak_first_component",
    }
    out_of = {"neuron": 1, "status": "excluded", "reason": "fewer than 3 taken-clusters"}
    control = {"neuron": 0, "control": "order", "deciles": deciles[::-1] * 2}
    connections = [
        {"neuron": 0, "rank": r, "precursor": 1 - r, "weight": 0.5 - r / 10, "gate_weight": None} for r in (0, 1)
    ]
    taken = [{"neuron": 0, "rank": 0, "precursor": 1, "size": 2, "p": 0.03, "counted": True, "tokens": [1, 3]}]
    clamp = {
        "neuron": 0,
        "quantile": 0.5,
        "status": "ok",
        "value": 1.5,
        "kl": 0.01,
        "control_kl": 0.002,
        "n_positions": 7,
    }
    tables = {"proximity": [ok, out_of], "proximity_controls": [control], "connections": connections}
    put_rows(store, "score", "proximity", tables | {"taken_clusters": taken, "clamps": [clamp]}, "h.1")
    told = [
        {"layer": layer, "condition": condition, "n_neurons": 3, "n": 1, "positive": share}
        for layer, of in (("h.1", (1.0, 0.625, 0.5)), (None, (1.0, 0.75, 0.25)))
        for condition, share in zip(("actual", "precursors_random", "tokens_same_frequency"), of, strict=True)
    ]
    put_rows(store, "summarise", "summarise", {"categorical": told})
    store.finish()
    return out
