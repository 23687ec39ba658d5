"""Deployment: pages and network as the two parts of a Ray Serve application.

Place in the flow: `start.py` runs it. The pages are the application of `view/` behind Serve's HTTP proxy; the network
is a deployment of its own, of as many replicas as were asked for, each with one `Bench`. Serve puts another replica in
the place of one that died; what it was asked is not asked again by itself.
"""

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray.exceptions as rx
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.applications import Starlette

from polyray.config import PoolConfig
from polyray.errors import DataError, PolyrayError
from polyray.report.catalog import Catalog
from polyray.serving.bench import Bench
from polyray.serving.gate import Credentials, Gate
from polyray.view.app import application
from polyray.view.pictures import Pictures
from polyray.view.trying import Answer, CannotError, Question, TryAgainError

log = logging.getLogger(__name__)

NAME = "polyray"
MODEL = "model"
TIMEOUT_S = 60.0
"""What an answer may take, waiting for others included."""
WAITING = 4
"""Questions that may wait for each replica; more are told to come again."""
MOST = 24
"""Questions at once, however many replicas there are: each holds one of the 40 threads that answer requests."""
_LOOK_S = 2.0
"""What a page waits to learn whether the network is there."""
_KNOWN_S = 60.0
"""How long it believes what it learnt."""
_GIB = 1024**3


@dataclass(frozen=True)
class Settings:
    """What the pages need to know."""

    out: str
    probe: str | None
    hosts: Collection[str] | None
    credentials: Credentials | None
    replicas: int


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer."""

    reason: str
    is_for_good: bool
    """Whatever is asked is answered so: there is no bench."""


class Model:
    """One replica with the network under study.

    It starts even where the network must not be asked: only then can it say why.
    """

    def __init__(self, out: str, probe: str | None) -> None:
        self._bench: Bench | None = None
        self._refusal: str | None = None
        try:
            self._bench = Bench(out, probe)
        except PolyrayError as e:
            log.warning("no swap can be tried: %s", e)
            self._refusal = str(e)

    def refusal(self) -> str | None:
        """Why nothing can be asked, if nothing can."""
        return self._refusal

    def ask(self, question: Question) -> Answer | Refusal:
        """The answer to one question, or why there is none."""
        if self._bench is None:
            return Refusal(str(self._refusal), is_for_good=True)
        try:
            return self._bench.answer(question)
        except PolyrayError as e:
            return Refusal(str(e), is_for_good=False)


class Asker:
    """Asks the replicas: at most so many questions at once, and none for ever. Any thread may use it.

    Args:
        handle: of the deployment of `Model`.
        at_once: questions at once.
        timeout_s: what each may take.
    """

    def __init__(self, handle: Any, at_once: int, timeout_s: float = TIMEOUT_S) -> None:
        self._handle, self._timeout_s = handle, timeout_s
        self._free = threading.BoundedSemaphore(at_once)
        self._known: tuple[float, str | None] | None = None

    def refusal(self) -> str | None:
        """Why nothing can be asked, as far as a replica has said so lately."""
        if self._known is not None and time.monotonic() - self._known[0] < _KNOWN_S:
            return self._known[1]
        try:
            self._known = (time.monotonic(), self._call(self._handle.refusal, (), _LOOK_S))
        except TryAgainError:
            self._known = (time.monotonic(), None)  # it is busy, or not there yet: whoever asks will see
        return self._known[1]

    def ask(self, question: Question) -> Answer:
        """As `view.trying.Trying` has it."""
        if not self._free.acquire(blocking=False):
            raise TryAgainError("too many swaps are being tried at once. Try again in a moment.")
        try:
            found = self._call(self._handle.ask, (question,), self._timeout_s)
        finally:
            self._free.release()
        if isinstance(found, Refusal):
            self._known = (time.monotonic(), found.reason if found.is_for_good else None)
            raise CannotError(found.reason)
        return found

    def _call(self, method: Any, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        response = method.remote(*arguments)
        try:
            return response.result(timeout_s=timeout_s)
        except TimeoutError as e:
            response.cancel()
            raise TryAgainError(
                f"no answer within {timeout_s:g} s: the network is busy, or being loaded. Try again in a moment."
            ) from e
        except BackPressureError as e:
            raise TryAgainError("too many swaps are being tried at once. Try again in a moment.") from e
        except rx.RayTaskError:
            raise  # it is ours, and the log says where
        except (rx.RayError, RayServeException) as e:
            self._known = None
            log.warning("a replica is gone: %s", type(e).__name__)
            raise TryAgainError(
                "the process that holds the network ended before it answered; another one is being started. Try again "
                "in a moment."
            ) from e


class Front:
    """The pages, behind Serve's HTTP proxy.

    Args:
        settings: what is shown, and to whom.
        model: handle of the deployment of `Model`.
    """

    def __init__(self, settings: Settings, model: Any) -> None:
        self._settings, self._model = settings, model

    def __serve_build_asgi_app__(self) -> Starlette:
        """The application, made where it runs."""
        s = self._settings
        catalog = Catalog(s.out)
        try:
            pictures: Pictures | None = Pictures(catalog, s.probe)
        except DataError as e:
            log.warning("probe images are not shown: %s", e)
            pictures = None
        asker = Asker(self._model, at_once=min(MOST, s.replicas * (1 + WAITING)))
        app = application(catalog, hosts=s.hosts, pictures=pictures, trier=asker)
        if s.credentials is not None:
            app.add_middleware(Gate, credentials=s.credentials)
        return app


def bound(settings: Settings, pool: PoolConfig, env: dict[str, str]) -> Any:
    """The application as Serve runs it.

    Args:
        settings: for the pages.
        pool: what a replica of the network takes.
        env: environment of its process.
    """
    resources: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, "runtime_env": {"env_vars": env}}
    if pool.memory_gb is not None:
        resources["memory"] = int(pool.memory_gb * _GIB)
    model = serve.deployment(
        Model,
        name=MODEL,
        num_replicas=settings.replicas,
        max_ongoing_requests=1,
        max_queued_requests=settings.replicas * WAITING,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options=resources,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="pages",
        max_ongoing_requests=64,
        max_queued_requests=256,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(settings, model.bind(settings.out, settings.probe))
