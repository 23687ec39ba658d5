"""Questions to replicas of a real Ray Serve, of which one dies and one takes for ever."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.config import ProxyLocation

from polyray.config import PoolConfig
from polyray.errors import ConfigError
from polyray.serving import start
from polyray.serving.deployment import Asker
from polyray.view.trying import TryAgainError


class Slow:
    """Takes for ever the first time that it is asked with a file of this name, over all replicas."""

    def refusal(self) -> str | None:
        return None

    def ask(self, path: Any) -> str:
        if not path.exists():
            path.write_text(str(os.getpid()))
            time.sleep(600)
        return "an answer"


@pytest.fixture(scope="module")
def handle(ray_here: None) -> Iterator[Any]:
    serve.start(proxy_location=ProxyLocation.Disabled)
    resources = {"num_cpus": 0}
    slow = serve.deployment(Slow, max_ongoing_requests=1, ray_actor_options=resources, graceful_shutdown_timeout_s=1.0)
    yield serve.run(slow.bind(), name="slow", route_prefix=None)
    serve.shutdown()


def asked(asker: Asker, path: Path) -> str:
    """The answer, or why there is none; from a thread of its own, as requests are answered."""
    with ThreadPoolExecutor(1) as pool:
        try:
            found: Any = pool.submit(asker.ask, path).result()  # type: ignore[arg-type]
        except TryAgainError as e:
            return str(e)
        return str(found)


def test_a_question_that_is_lost_with_its_replica_may_be_asked_again(handle: Any, tmp_path: Path) -> None:
    asker, path = Asker(handle, at_once=2, timeout_s=120.0), tmp_path / "asked"
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(asked, asker, path)
        give_up_s = time.monotonic() + 120
        while not (path.exists() and path.read_text()) and time.monotonic() < give_up_s:
            time.sleep(0.05)
        os.kill(int(path.read_text()), signal.SIGKILL)
        assert "another one is being started" in lost.result(120)
    give_up_s = time.monotonic() + 240
    while (found := asked(asker, path)) != "an answer" and time.monotonic() < give_up_s:
        assert "Try again" in found
        time.sleep(0.5)
    assert found == "an answer"


def test_no_question_waits_for_ever(handle: Any, tmp_path: Path) -> None:
    asker, path = Asker(handle, at_once=2, timeout_s=2.0), tmp_path / "asked"
    started_s = time.monotonic()
    assert "no answer within 2 s" in asked(asker, path)
    assert time.monotonic() - started_s < 60


def test_a_serve_that_somebody_else_runs_is_left_alone(handle: Any) -> None:
    with pytest.raises(ConfigError, match="served on this Ray cluster already"):
        start._refuse_another()


def test_replicas_that_do_not_fit_are_refused_at_once(ray_here: None) -> None:
    with pytest.raises(ConfigError, match=r"10000 replica.* do not fit"):
        start._fitting(PoolConfig(), 10000)
