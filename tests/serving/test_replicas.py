"""Questions to replicas of a real Ray Serve, of which one dies and one takes for ever."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.config import ProxyLocation

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


def answered(asker: Asker, path: Any) -> Any:
    """The answer, asked for again as often as it takes."""
    give_up_s = time.monotonic() + 240
    while True:
        try:
            return asker.ask(path)
        except TryAgainError:
            assert time.monotonic() < give_up_s
            time.sleep(0.5)


def test_a_question_that_is_lost_with_its_replica_may_be_asked_again(handle: Any, tmp_path: Path) -> None:
    asker, path = Asker(handle, at_once=2, timeout_s=120.0), tmp_path / "asked"
    raised: list[str] = []

    def ask() -> None:
        with pytest.raises(TryAgainError) as error:
            asker.ask(path)  # type: ignore[arg-type]
        raised.append(str(error.value))

    thread = threading.Thread(target=ask)
    thread.start()
    give_up_s = time.monotonic() + 120
    while not (path.exists() and path.read_text()) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    os.kill(int(path.read_text()), signal.SIGKILL)
    thread.join(120)
    assert len(raised) == 1
    assert "another one is being started" in raised[0]
    assert answered(asker, path) == "an answer"


def test_no_question_waits_for_ever(handle: Any, tmp_path: Path) -> None:
    asker, path = Asker(handle, at_once=2, timeout_s=2.0), tmp_path / "asked"
    started_s = time.monotonic()
    with pytest.raises(TryAgainError, match="no answer within 2 s"):
        asker.ask(path)  # type: ignore[arg-type]
    assert time.monotonic() - started_s < 60
