"""A Ray head of its own process, with token authentication, as a cluster's is."""

import json
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
FAKE_HEAD = "f" * 51 + "00000"
"""Id that Ray's fake provider knows the head by."""
PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")


@dataclass(frozen=True)
class Head:
    """A head that answers."""

    address: str
    """Of its dashboard."""
    gcs: str
    """What a driver joins."""
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
def started(folder: Path, n_cpus: int = 2, most_nodes: int | None = None) -> Iterator[Head]:
    """Starts a head and ends all of it afterwards.

    Args:
        folder: home, log and config go there.
        n_cpus: of the head.
        most_nodes: where it is given, Ray's own autoscaler adds so many nodes of one CPU at most while actors pend,
            and removes those that idle for some seconds; its nodes are processes of this machine.
    """
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}", home)
    # Paths of sockets are short: pytest's folders are too deep.
    session = tempfile.mkdtemp(prefix="pr")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={n_cpus}"]
    command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir={session}"]
    command += ["--object-store-memory=100000000", *(f"--{name}={port}" for name, port in ports.items())]
    changes = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
    if most_nodes is not None:
        (folder / "autoscaling.yaml").write_text(json.dumps(_autoscaling(head.gcs, most_nodes)))
        command += ["--node-ip-address=127.0.0.1", f"--autoscaling-config={folder / 'autoscaling.yaml'}"]
        changes |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
        changes |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD}
    said = folder / "head.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=head.environment(**changes),
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


def _autoscaling(gcs: str, most_nodes: int) -> dict[str, object]:
    """For Ray's fake provider, whose nodes are processes. By its own name it would want a file that the wheel lacks."""
    lists = "initialization_commands setup_commands cluster_synced_files rsync_exclude rsync_filter".split()
    nothing: dict[str, object] = {name: [] for name in lists} | {"file_mounts": {}}
    nothing |= {f"{node}_{what}_commands": [] for node in ("head", "worker") for what in ("setup", "start_ray")}
    fake = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": fake, "gcs_address": gcs, "launch_multiple": True}
    provider |= {"head_node_id": FAKE_HEAD, "disable_node_updaters": True}
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most_nodes},
    }
    limits = {"max_workers": most_nodes, "idle_timeout_minutes": 0.1, "upscaling_speed": 1.0}
    names = {"cluster_name": "fake", "head_node_type": "ray.head.default", "available_node_types": types}
    return nothing | limits | names | {"provider": provider, "auth": {}, "docker": {}}


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError as e:
        return e.code == 401
    except OSError:
        return False
    raise AssertionError("the head asks for no token")
