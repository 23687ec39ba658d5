"""What stands between the dispatcher and Ray: what fits, what Ray's errors mean, and the first promise."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.exceptions as rx
from hypothesis import given
from hypothesis import strategies as st
from sweeps import Finished

from polyray import columns
from polyray.cluster import actors, room, service
from polyray.cluster import crew as crews
from polyray.cluster.crew import _cause
from polyray.cluster.dispatch import Dispatcher, Policy, Unit
from polyray.cluster.plan import Sweep
from polyray.cluster.resolve import Resolved
from polyray.cluster.telemetry import DeviceSeconds, Telemetry
from polyray.config import Execution, PoolConfig
from polyray.errors import ConfigError, StageError
from polyray.records import Receipt
from polyray.schema import TABLES
from polyray.store import Store

GIB = 1024.0**3


# What fits


@pytest.mark.parametrize(
    ("pool", "nodes", "fits"),
    [
        (PoolConfig(), [{"CPU": 4.0}], 4),
        (PoolConfig(num_cpus=0.1), [{"CPU": 1.0}], 10),
        (PoolConfig(num_cpus=3), [{"CPU": 4.0}, {"CPU": 7.0}, {"CPU": 2.0}], 1 + 2 + 0),
        (PoolConfig(num_cpus=1, num_gpus=0.25), [{"CPU": 64.0, "GPU": 8.0}], 32),
        (PoolConfig(num_cpus=1, num_gpus=1), [{"CPU": 64.0}, {"CPU": 2.0, "GPU": 8.0}], 2),
        (PoolConfig(memory_gb=3), [{"CPU": 64.0, "memory": 10 * GIB}], 3),
        (PoolConfig(memory_gb=3), [{"CPU": 2.0, "memory": 10 * GIB}], 2),
        (PoolConfig(memory_gb=3), [{"CPU": 64.0}], 0),
        (PoolConfig(), [], 0),
    ],
)
def test_capacity_counts_whole_actors_on_each_node(pool: PoolConfig, nodes: list[dict[str, float]], fits: int) -> None:
    assert service.capacity(pool, nodes) == fits


@given(st.integers(1, 8), st.integers(0, 4), st.lists(st.tuples(st.integers(0, 32), st.integers(0, 8)), max_size=4))
def test_capacity_is_what_filling_up_the_nodes_gives(cpus: int, gpus: int, sizes: list[tuple[int, int]]) -> None:
    n_placed = 0
    for free_cpus, free_gpus in sizes:
        while free_cpus >= cpus and free_gpus >= gpus:
            free_cpus, free_gpus, n_placed = free_cpus - cpus, free_gpus - gpus, n_placed + 1
    nodes = [{"CPU": float(c), "GPU": float(g)} for c, g in sizes]
    assert service.capacity(PoolConfig(num_cpus=cpus, num_gpus=gpus), nodes) == n_placed


def test_lacks_says_what_is_asked_for_what_is_there_and_what_to_change() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0, "memory": 8 * GIB}, {"CPU": 2.0}]
    execution = Execution(
        subject=PoolConfig(num_gpus=1, min=2), encoder=PoolConfig(num_cpus=6, memory_gb=2), scoring=PoolConfig(min=6)
    )
    subject, encoder = service.lacks(execution, nodes)
    there = "the cluster's nodes have 4 CPU, 1 GPU, 8.0 GiB memory; 2 CPU, 0 GPU, 0.0 GiB memory, which hold "
    assert subject.startswith("execution.subject: 2 actor(s) of 1 CPU, 1 GPU each do not fit; " + there + "1.")
    assert encoder.startswith(
        "execution.encoder: 1 actor(s) of 6 CPU, 0 GPU, 2 GiB memory each do not fit; " + there + "0."
    )
    assert "Lower min, num_cpus, num_gpus or memory_gb" in subject
    assert service.lacks(Execution(), nodes) == []


def grows(by: float, **resources: float) -> list[room.NodeGroup]:
    return [room.NodeGroup(resources, by)]


def test_a_cluster_that_says_what_it_may_add_is_measured_by_that() -> None:
    execution = Execution(address="there", subject=PoolConfig(num_gpus=1, min=3))
    head: list[dict[str, float]] = [{"memory": 8 * GIB}]
    enough = [*grows(2, CPU=8.0, GPU=2.0), *grows(9, CPU=4.0)]
    assert room.lacks(execution, head, enough) == []
    assert room.most_actors(execution.subject, execution, head, enough) == 4
    assert room.at_once(execution.subject, execution, head, enough) == 4
    (problem,) = room.lacks(execution, head, [*grows(2, CPU=8.0, GPU=1.0), *grows(9, CPU=4.0)])
    assert "its autoscaler may have 2 × 8 CPU, 1 GPU, 0.0 GiB memory; 9 × 4 CPU" in problem
    assert "which hold 2. Lower min" in problem
    assert "execution.autoscale" not in problem
    assert len(room.lacks(execution, head)) == 3  # neither an encoder nor a scorer fits on a head without CPUs
    assert "or set execution.autoscale" in room.lacks(execution, head)[0]


def test_a_cluster_that_grows_without_bound_needs_a_bound() -> None:
    pools = {kind: PoolConfig(max=5) for kind in ("encoder", "scoring")}
    without = Execution(address="there", autoscale=True, **pools)
    for groups in ([], grows(float("inf"), CPU=4.0)):
        (problem,) = room.lacks(without, [], groups)
        assert "Set execution.subject.max" in problem
        bounded = without.model_copy(update={"subject": PoolConfig(max=7, min=2)})
        assert room.lacks(bounded, [], groups) == []
        assert room.most_actors(bounded.subject, bounded, [], groups) == 7
        assert room.at_once(bounded.subject, bounded, [], groups) == 7


def test_most_actors_are_those_that_fit_unless_somebody_says_otherwise() -> None:
    here = [{"CPU": 4.0}]
    local, there = Execution(), Execution(address="there")
    assert room.most_actors(PoolConfig(), local, here) == 4
    assert room.most_actors(PoolConfig(max=9), local, here) == 4
    assert room.most_actors(PoolConfig(max=2), local, here) == 2
    assert room.most_actors(PoolConfig(max=9), there, here) == 9  # asking for more is what makes a cluster grow
    assert room.at_once(PoolConfig(max=9), there, here) == 4  # but a chain of nine would wait for ever
    assert room.most_actors(PoolConfig(min=6), there, here) == 6


def test_this_machine_has_what_ray_then_finds(ray_here: None) -> None:
    (node,) = service.nodes()
    assert service.this_machine()["CPU"] == node["CPU"]
    assert service.this_machine()["GPU"] == node.get("GPU", 0)
    assert 0.3 < service.this_machine()["memory"] / node["memory"] < 3


# The cluster


class FakeRay:
    """A mock of what `service.cluster` asks of Ray."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[dict[str, Any]] = []
        self.n_shutdowns = 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.calls.append(options | {"token": os.environ.get("RAY_AUTH_TOKEN")})
        # As Ray does when it starts a cluster of its own.
        os.environ["RAY_AUTH_MODE"] = "token"
        if self.error is not None:
            raise self.error

    def shutdown(self) -> None:
        self.n_shutdowns += 1


@pytest.fixture
def no_ray_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert "RAY_AUTH_MODE" not in os.environ
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_local_cluster_has_a_token_of_its_own_and_leaves_none(
    monkeypatch: pytest.MonkeyPatch, no_ray_environment: None
) -> None:
    fake = FakeRay()
    monkeypatch.setattr(service, "ray", fake)
    with service.cluster(Execution(object_store_gb=0.25)):
        assert fake.n_shutdowns == 0
    (call,) = fake.calls
    assert (call["address"], call["object_store_memory"], call["log_to_driver"]) == ("local", 2**28, False)
    assert len(call["token"]) >= 32
    assert fake.n_shutdowns == 1


def test_cluster_is_let_go_when_the_sweep_fails(monkeypatch: pytest.MonkeyPatch, no_ray_environment: None) -> None:
    fake = FakeRay()
    monkeypatch.setattr(service, "ray", fake)
    with pytest.raises(StageError, match="sad"), service.cluster(Execution()):
        raise StageError("sad")
    assert fake.n_shutdowns == 1


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError, ValueError, rx.AuthenticationError])
def test_cluster_that_does_not_answer_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, no_ray_environment: None, kind: type[Exception]
) -> None:
    fake = FakeRay(kind("nobody"))
    monkeypatch.setattr(service, "ray", fake)
    with (
        pytest.raises(ConfigError, match=r"'10\.0\.0\.1:6379'.*nobody.*RAY_AUTH_MODE=token"),
        service.cluster(Execution(address="10.0.0.1:6379")),
    ):
        pytest.fail("there is no cluster")
    # A cluster that somebody else runs may ask for another token, or for none.
    assert fake.calls[0]["token"] is None


def test_a_running_ray_is_taken_and_left_running(ray_here: None) -> None:
    with service.cluster(Execution(object_store_gb=7)):
        assert ray.is_initialized()
    assert ray.is_initialized()


# What Ray's errors mean


def test_cause_of_a_loss() -> None:
    died = rx.RayActorError()
    cause = partial(_cause, node_is_going=False)
    assert cause(died, starting=False) == "died"
    assert cause(died, starting=True) == "start_failed"
    killed, raised = rx.ActorDiedError(), rx.ActorDiedError()
    raised._actor_init_failed = True
    assert (cause(killed, starting=True), cause(raised, starting=True)) == ("died", "start_failed")
    assert _cause(died, starting=False, node_is_going=True) == "preempted"
    assert _cause(died, starting=True, node_is_going=True) == "preempted"
    assert cause(rx.NodeDiedError("gone"), starting=False) == "preempted"
    assert cause(rx.NodeDiedError("gone"), starting=True) == "preempted"
    drained = rx.ActorDiedError()
    drained._preempted = True
    assert drained.preempted
    assert cause(drained, starting=False) == "preempted"
    assert cause(rx.OutOfMemoryError("x"), starting=False) == "died"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The actor died because of an error\n  File x\nValueError: no such thing\n", "ValueError: no such thing"),
        ("one\n\n  two  \n", "two"),
        ("KeyError: 1\nbut also\nOSError: 2\nin passing", "OSError: 2"),
        ("", "Exception"),
        ("x" * 900, "x" * 500),
    ],
)
def test_reason_is_the_last_line_that_says_something(text: str, reason: str) -> None:
    assert actors.reason_of(Exception(text)) == reason


# Actors that wait for a place


@ray.remote(num_cpus=0)
class Hog:
    """Holds CPUs without using them."""

    def pid(self) -> int:
        return os.getpid()


def test_actor_that_pends_is_worth_a_word(
    resolved: Resolved, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "PENDING_S", 0.5)
    monkeypatch.setattr(crews, "WATCH_S", 0.1)
    hog = Hog.options(num_cpus=service.nodes()[0]["CPU"]).remote()
    ray.get(hog.pid.remote())
    messages: list[str] = []
    crew = crews.Crew(resolved.sweep, Store(finished.out), messages.append, Telemetry("run", DeviceSeconds()))
    dispatcher = Dispatcher([Unit("a")], Policy(max_actors=1))
    try:
        crew.man("scoring", PoolConfig(), dispatcher)
        crew.grow(1)
        for _ in range(8):
            assert list(crew.answers(dispatcher)) == []
        assert len(crew) == 1
        crew.grow(0)  # what is pending stays while anything waits
        assert len(crew) == 1
        crew.grow(0, shrink=True)  # and is taken back when nothing does: it would make a cluster grow
        assert len(crew) == 0
    finally:
        crew.dismiss()
        ray.kill(hog)
    assert 2 <= len(messages) <= 3  # again and again
    assert "1 scoring actor(s) have been pending" in messages[0]
    assert "the cluster is busy or growing" in messages[0]


# The first promise


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "out")
    made.create_or_resume({"seed": 0}, {"torch": "2", "device_class": "cpu"}, {})
    made.acquire()
    return made


def commit_neurons(store: Store, layer: str, neurons: list[int], status: list[str]) -> None:
    n = len(neurons)
    rows: dict[str, Any] = {name: [None] * n for name, _, _ in TABLES["neurons"].columns}
    rows |= {"neuron": neurons, "status": status}
    unit = f"calibrate/{layer}"
    part = store.write_part("neurons", unit, columns.table("neurons", rows), layer)
    store.commit(Receipt(unit, [part], 1.0, "here", "calibrate"))


@pytest.mark.parametrize(
    ("neurons", "status", "said"),
    [
        ([0, 1], ["ok", "ok"], "2 rows (2 distinct) say 2 ok + 0 excluded + 0 failed"),
        ([0, 1, 1], ["ok", "excluded", "excluded"], "3 rows (2 distinct)"),
        ([0, 1, 2], ["ok", "excluded", "lost"], "1 ok + 1 excluded + 0 failed"),
        ([], [], "0 rows"),
    ],
)
def test_sweep_without_exactly_one_row_for_every_neuron_is_an_error(
    store: Store, resolved: Resolved, neurons: list[int], status: list[str], said: str
) -> None:
    swept = Sweep(resolved.sweep.config, str(store.out), 1, (), {"a": np.arange(3)}, {}, {})
    commit_neurons(store, "a", neurons, status)
    with pytest.raises(StageError) as caught:
        service.check_counts(store, swept)
    assert "3 neurons were swept" in str(caught.value)
    assert said in str(caught.value)


def test_sweep_with_one_row_for_every_neuron_passes(store: Store, resolved: Resolved) -> None:
    swept = Sweep(resolved.sweep.config, str(store.out), 1, (), {"a": np.arange(3), "b": np.arange(1)}, {}, {})
    commit_neurons(store, "a", [0, 1, 2], ["ok", "excluded", "failed"])
    commit_neurons(store, "b", [0], ["ok"])
    service.check_counts(store, swept)
