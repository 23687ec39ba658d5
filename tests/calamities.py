"""What may befall a sweep on a cluster of several nodes: `python -m calamities FOLDER NAME…` prints one JSON a line.

A process of its own, since the nodes are made by `ray.cluster_utils.Cluster` and this process connects to them. Every
calamity sweeps units that sleep (`sleepers.py`) into `FOLDER/NAME` while something happens to nodes or processes.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from sleepers import ask_for_trouble, awake, n_runs, pids, sleepy, trouble

from polyray import logs
from polyray.cluster import service
from polyray.errors import PolyrayError

STORE_BYTES = 80_000_000
DRAIN_S = 30
PREEMPTION = 2
"""`DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION`."""


class Theatre:
    """A head without CPUs and nodes of one CPU, on which four actors sleep each."""

    def __init__(self, folder: Path, n_nodes: int = 2) -> None:
        self.folder, self.n_nodes = folder, n_nodes
        self.nodes: list[Any] = []
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
        )
        self.fill_up()
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def fill_up(self) -> None:
        """Nodes come in the place of those that went; Ray starts them from a main thread alone."""
        while len(self.nodes) < self.n_nodes:
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))

    def add_blind_node(self) -> subprocess.Popen[bytes]:
        """A node of two CPUs, in a mount namespace in which this folder is empty; needs root."""
        ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.cluster.address}"]
        ray_start += ["--num-cpus=2", f"--object-store-memory={STORE_BYTES}", "--block"]
        hidden = f"mount -t tmpfs none {shlex.quote(str(self.folder))} && exec {shlex.join(ray_start)}"
        node = subprocess.Popen(["unshare", "--mount", "sh", "-c", hidden], stdout=subprocess.DEVNULL, cwd="/")
        while not any(n["Resources"].get("CPU") == 2 for n in ray.nodes() if n["Alive"]):
            assert node.poll() is None, "the node did not start"
            time.sleep(0.2)
        return node

    def busy_node(self, name: str) -> Any:
        """A node on which actors of a sweep are."""
        busy = set(pids(self.folder / name).values())
        return next(node for node in self.nodes if node.node_id in busy)

    def cut_power(self, node: Any) -> None:
        """A node goes without a word."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def give_notice(self, node: Any) -> None:
        """A node drains, as when a spot instance is about to be taken."""
        self.nodes.remove(node)
        gcs = ray._private.worker.global_worker.gcs_client
        accepted, reason = gcs.drain_node(node.node_id, PREEMPTION, "spot", int((time.time() + DRAIN_S) * 1000))
        assert accepted, reason

    def close(self) -> None:
        """Ends all nodes."""
        ray.shutdown()
        self.cluster.shutdown()

    def sweep(
        self,
        name: str,
        n_units: int,
        unit_s: float,
        happens: Callable[[], None] | None = None,
        *,
        after: int = 8,
        **options: Any,
    ) -> dict[str, Any]:
        """Sweeps, and has something happen once so many units have begun; returns what came of it."""
        self.fill_up()
        out, log = self.folder / name, self.folder / f"{name}.jsonl"
        ask_for_trouble(out)
        log.unlink(missing_ok=True)
        made = sleepy(out, n_units, unit_s, address=self.cluster.address, **({"max": 4, "min": 1} | options))
        messages: list[str] = []
        over = threading.Event()

        def strike() -> bool:
            while len(n_runs(out)) < after and not over.is_set():
                time.sleep(0.05)
            if happens is not None and not over.is_set():
                happens()
            return not over.is_set()

        told: dict[str, Any] = {"name": name, "error": None}
        started_s = time.monotonic()
        fate = ThreadPoolExecutor(1)
        struck = fate.submit(strike)
        try:
            with awake(), logs.to_machines(str(log)):
                told["device_s"] = asdict(service.run(made, lambda stage, p: None, messages.append).device_s)  # type: ignore[arg-type]
        except PolyrayError as e:
            told["error"] = f"{type(e).__name__}: {e}"
        finally:
            over.set()
            fate.shutdown()
        told |= {"seconds": time.monotonic() - started_s, "messages": messages, "n_runs": n_runs(out)}
        told["struck"] = struck.result()
        told["events"] = [json.loads(line) for line in log.read_text().splitlines()]
        return told


def power_failure(t: Theatre) -> dict[str, Any]:
    """A busy node is gone without a word."""
    return t.sweep("power_failure", 80, 0.5, lambda: t.cut_power(t.busy_node("power_failure")))


def notice(t: Theatre) -> dict[str, Any]:
    """A busy node is given notice, and goes in earnest as soon as it idles, or when that is over."""
    return t.sweep("notice", 60, 0.5, lambda: t.give_notice(t.busy_node("notice")))


def killed(t: Theatre) -> dict[str, Any]:
    """An actor's process is killed while busy."""
    out = t.folder / "killed"
    return t.sweep("killed", 40, 0.5, lambda: os.kill(next(iter(pids(out))), signal.SIGKILL))


def poison(t: Theatre) -> list[dict[str, Any]]:
    """A unit kills every actor that takes it; then the same command again; then again, the unit being mended."""
    out = t.folder / "poison"
    ask_for_trouble(out, poison=[7])
    told = [t.sweep("poison", 30, 0.1) for _ in range(2)]
    (trouble(out) / "poison").unlink()
    return [*told, t.sweep("poison", 30, 0.1)]


def hang(t: Theatre) -> dict[str, Any]:
    """The actor of the last unit hangs."""
    ask_for_trouble(t.folder / "hang", hang=[29])
    return t.sweep("hang", 30, 0.2)


def blind(t: Theatre) -> dict[str, Any]:
    """The only node that is large enough has a folder of its own where OUT should be."""
    if os.geteuid() != 0:
        return {"name": "blind", "needs": "root"}
    node = t.add_blind_node()
    try:
        return t.sweep("blind", 5, 0.0, num_cpus=2)
    finally:
        node.terminate()
        node.wait()


def gpus(t: Theatre) -> dict[str, Any]:
    """One actor of four has a GPU of another model."""
    (ask_for_trouble(t.folder / "gpus") / "gpus").write_text("A\nB\nA\n")
    return t.sweep("gpus", 60, 0.3, min=4)


def metrics(t: Theatre) -> dict[str, Any]:
    """No calamity: what Ray serves to Prometheus of the driver's node, once it has what the others counted."""
    (port,) = [n["MetricsExportPort"] for n in ray.nodes() if n["Alive"] and "node:__internal_head__" in n["Resources"]]
    lines: list[str] = []
    for _ in range(2):  # a process exports every ten seconds
        time.sleep(11.0)
        with urllib.request.urlopen(f"http://{ray.util.get_node_ip_address()}:{port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if "polyray_" in line and line[0] != "#"]
    return {"name": "metrics", "lines": lines}


CALAMITIES: dict[str, Callable[[Theatre], dict[str, Any] | list[dict[str, Any]]]] = {
    f.__name__: f for f in (killed, hang, power_failure, notice, poison, gpus, metrics, blind)
}


def main() -> None:
    theatre = Theatre(Path(sys.argv[1]))
    try:
        for name in sys.argv[2:] or CALAMITIES:
            print(json.dumps(CALAMITIES[name](theatre)), flush=True)
    finally:
        theatre.close()


if __name__ == "__main__":
    main()
