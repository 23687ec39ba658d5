"""A Ray head of its own process, with token authentication, as a cluster's is."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sweeps import clean_environment, descendants

TOKEN = "0123456789abcdef" * 4
PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")


@dataclass(frozen=True)
class Head:
    """A head that answers."""

    address: str
    """Of its dashboard."""
    home: Path
    """Home folder of whoever may talk to it: holds the token."""

    def environment(self, **changes: str) -> dict[str, str]:
        """What a command sees that may talk to the head."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        return clean_environment(self.home) | {"RAY_AUTH_MODE": "token", "PATH": path} | changes


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on, outside those that Ray's workers take."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        found = [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
    assert not any(10002 <= port <= 19999 for port in found)
    return found


@contextmanager
def started(folder: Path) -> Iterator[Head]:
    """Starts a head and ends all of it afterwards."""
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", home)
    # Paths of sockets are short: pytest's folders are too deep.
    session = tempfile.mkdtemp(prefix="pr")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir={session}"]
    command += ["--object-store-memory=100000000", *(f"--{name}={port}" for name, port in ports.items())]
    said = folder / "head.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=head.environment(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="1"),
            start_new_session=True,
        )
    try:
        give_up_s = time.monotonic() + 180
        while not _answers(head.address):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < give_up_s, said.read_text()
            time.sleep(0.2)
        yield head
    finally:
        family = descendants(process.pid)
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in family:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(session, ignore_errors=True)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError as e:
        return e.code == 401
    except OSError:
        return False
    raise AssertionError("the head asks for no token")
