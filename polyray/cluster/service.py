"""Service: does with Ray what the dispatcher decided.

Place in the flow: `cli.py` calls `run`; this is the driver, and it stays thin: it starts and lets go of actors, sends
calls, commits receipts, and asks the dispatcher what to do next. What bites in Ray and why each guard is here: a dead
actor raises one of a dozen exceptions, so whatever Ray raises for a call means that its actor is lost (what a unit
raises is caught in the worker); a pending actor pends in silence; worker logs flood the driver.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import ray
import ray.exceptions as rx
import torch

from polyray.cluster import actors, chain
from polyray.cluster.dispatch import Cause, Dispatcher, Policy, Progress, Unit
from polyray.cluster.plan import Work
from polyray.cluster.resolve import Resolved
from polyray.cluster.text_plan import TextSweep
from polyray.cluster.text_resolve import TextResolved
from polyray.cluster.units import Failed
from polyray.cluster.vary import Asked, record
from polyray.config import Execution, PoolConfig
from polyray.errors import ConfigError, StageError, StoreError
from polyray.overlay import opened
from polyray.records import Receipt
from polyray.store import Store
from polyray.text_config import TextExecution

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Longest wait for an answer before the dispatcher is asked again."""
PENDING_S = 60.0
"""An actor that has not started for so long is worth a word."""

_TOKEN = secrets.token_hex(32)
"""One a process, since Ray reads it only once."""

AnySweep = actors.AnySweep
OnProgress = Callable[[str, Progress], None]
OnMessage = Callable[[str], None]


@dataclass
class Outcome:
    """How a run ended."""

    run_id: str
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by stage, of the stages that had work left."""


@contextmanager
def cluster(execution: Execution | TextExecution) -> Iterator[None]:
    """A Ray cluster: the one at the address, or a local one for as long as the run lasts.

    A local one asks for a token that only this process and its workers know. (A bare `ray.init()` would write one
    into the home folder, and leave token authentication switched on for whatever this process starts next.)
    """
    if ray.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if execution.address is None:
            os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
            store_bytes = int(execution.object_store_gb * 1024**3)
            ray.init(address="local", include_dashboard=False, object_store_memory=store_bytes, **quiet)
        else:
            try:
                ray.init(address=execution.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as e:
                raise ConfigError(f"no Ray cluster answers at {execution.address!r}: {e}") from e
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def capacity(pool: PoolConfig, nodes: list[dict[str, float]]) -> int:
    """How many actors of a pool fit on nodes of these resources, all of them empty."""
    need = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, "memory": (pool.memory_gb or 0.0) * 1024**3}
    return sum(
        int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in need.items() if amount > 0)) for node in nodes
    )


def lacks(execution: Execution | TextExecution, nodes: list[dict[str, float]]) -> list[str]:
    """What the cluster can never satisfy, with the numbers; empty where every pool's minimum fits."""
    problems = []
    pools = {name: value for name, value in execution if isinstance(value, PoolConfig)}
    for kind, pool in pools.items():
        fits = capacity(pool, nodes)
        if fits < pool.min:
            has = "; ".join(
                ", ".join(f"{n.get(r, 0):g} {r}" for r in ("CPU", "GPU"))
                + f", {n.get('memory', 0) / 1024**3:.1f} GiB memory"
                for n in nodes
            )
            memory = f", {pool.memory_gb:g} GiB memory" if pool.memory_gb else ""
            problems.append(
                f"execution.{kind}: {pool.min} actor(s) of {pool.num_cpus:g} CPU, {pool.num_gpus:g} GPU{memory} each "
                f"do not fit; the cluster's nodes have {has}, which hold {fits}. Lower min, num_cpus, num_gpus or "
                "memory_gb."
            )
    return problems


def nodes() -> list[dict[str, float]]:
    """Resources of the cluster's living nodes."""
    return [n["Resources"] for n in ray.nodes() if n["Alive"]]


def this_machine() -> dict[str, float]:
    """Resources of the one node that a local cluster would have, without starting it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": 0.7 * memory}


def run(resolved: Resolved | TextResolved, on_progress: OnProgress, on_message: OnMessage) -> Outcome:
    """Runs a sweep on the current Ray cluster, resuming what its OUT already holds.

    Args:
        resolved: from `resolve.resolve`.
        on_progress: called with the stage and how far it is.
        on_message: called with a line worth a person's attention.

    Returns:
        The outcome of a sweep that is whole.

    Raises:
        ConfigError: the cluster can never hold the actors asked for.
        StoreError: OUT belongs to another run, is written by another driver, or cannot be written.
        StageError: a stage ended with failed units, so that the next cannot run.
    """
    sweep = resolved.sweep
    if problems := lacks(sweep.config.execution, nodes()):
        raise ConfigError("the cluster lacks what the config asks for:\n  " + "\n  ".join(problems))
    store = Store(sweep.out)
    config = sweep.config.model_dump(mode="json")
    outcome = Outcome(store.create_or_resume(resolved.identity, resolved.provenance, config))
    store = opened(sweep.out)
    with store.acquire():
        return _sweep(sweep, store, outcome, on_progress, on_message)


def _sweep(sweep: AnySweep, store: Store, outcome: Outcome, on_progress: OnProgress, on_message: OnMessage) -> Outcome:
    """All stages, one after the other, by the driver that holds the dataset's lease."""
    crew = _Crew(sweep, on_message)
    stages = list(sweep.steps.items())
    try:
        for i, (stage, kind) in enumerate(stages):
            units = sweep.works(stage, store)
            done = store.committed(stage.partition("/")[0])
            remaining = [w for w in units if w.key not in done]
            if remaining:
                started_s = time.monotonic()
                later = stages[i + 1][1] if i + 1 < len(stages) else None
                failed: dict[str, str] = {}
                if isinstance(sweep, TextSweep) and kind == "shard":
                    crew.dismiss()
                    n_fit = capacity(sweep.config.execution.shard, nodes())
                    chain.mine(sweep, store, remaining, n_fit, on_progress, on_message)
                else:
                    failed = _stage(stage, kind, later, remaining, len(units), sweep, store, crew, on_progress)
                outcome.seconds[stage] = time.monotonic() - started_s
                if failed:
                    _refuse_to_go_on(stage, failed, store)
                store.compact(stage.partition("/")[0])
            else:
                n = len(units)
                on_progress(stage, Progress(n, 0, 0, n, 0.0, 0.0))
    finally:
        crew.dismiss()
    check_counts(store, sweep)
    store.finish()
    return outcome


def vary(asked: Asked, on_progress: OnProgress, on_message: OnMessage) -> None:
    """Runs the variants of a sweep one after the other, and adds each comparison to the sweep's dataset.

    What OUT holds already is not done again. Raises as `run` does.
    """
    for variant in asked.remaining:
        run(variant.resolved, _named(variant.label, on_progress), on_message)
        record(asked.base, variant)


def _named(variant: str, on_progress: OnProgress) -> OnProgress:
    return lambda stage, progress: on_progress(f"{variant} {stage}", progress)


def _refuse_to_go_on(stage: str, failed: dict[str, str], store: Store) -> None:
    """Every later stage reads this one whole: say what is missing rather than compute with less."""
    shown = "\n".join(f"  {key}: {reason}" for key, reason in list(failed.items())[:10])
    more = f"\n  … and {len(failed) - 10} more" if len(failed) > 10 else ""
    raise StageError(
        f"{len(failed)} unit(s) of stage {stage!r} failed; what is committed stays in {str(store.out)!r}. Mend the "
        f"cause and run the same command again.\n{shown}{more}"
    )


def check_counts(store: Store, sweep: AnySweep) -> None:
    """The first promise: every neuron is ok, excluded or failed, and has exactly one row."""
    rows = store.read(sweep.accounts, columns=["layer", "neuron", "status"])
    counts = {s: pa.compute.sum(pa.compute.equal(rows["status"], s)).as_py() or 0 for s in ("ok", "excluded", "failed")}
    distinct = rows.group_by(["layer", "neuron"]).aggregate([]).num_rows
    if not sum(counts.values()) == distinct == len(rows) == sweep.n_neurons:
        raise StageError(
            f"{sweep.n_neurons} neurons were swept, but {len(rows)} rows ({distinct} distinct) say "
            f"{counts['ok']} ok + {counts['excluded']} excluded + {counts['failed']} failed. `polyray verify` says "
            "more."
        )


def _stage(
    stage: str,
    kind: str,
    later: str | None,
    remaining: list[Work],
    n_units: int,
    sweep: AnySweep,
    store: Store,
    crew: "_Crew",
    on_progress: OnProgress,
) -> dict[str, str]:
    """Runs one stage to its end; returns the reasons of units that failed."""
    pool: PoolConfig = getattr(sweep.config.execution, kind)
    fits = capacity(pool, nodes())
    # On a cluster that may grow, asking for more than fits now is what makes it grow.
    most = max(pool.min, pool.max if pool.max and sweep.config.execution.address else min(pool.max or fits, fits))
    by_key = {w.key: w for w in remaining}
    dispatcher = Dispatcher(
        (Unit(w.key, w.weight, w.layer) for w in remaining),
        Policy(
            max_actors=most, min_actors=pool.min, in_flight=pool.in_flight, bundle_s=sweep.config.execution.bundle_s
        ),
        n_committed=n_units - len(remaining),
    )
    crew.man(kind, pool, dispatcher)
    n_before = n_units - len(remaining)
    while not dispatcher.done and not dispatcher.stopped:
        now_s = time.monotonic()
        # Idle actors at the end of a stage are kept where the next stage has use for them.
        if later != kind or dispatcher.n_waiting:
            for name in dispatcher.release(now_s):
                crew.let_go(name)
                dispatcher.actor_left(name, "released", now_s)
        crew.grow(dispatcher.wanted_actors(now_s))
        for call in dispatcher.assign(now_s):
            crew.send(call.call_id, call.actor_id, [by_key[key] for key in call.keys])
        for call_id, results in crew.answers(dispatcher):
            now_s = time.monotonic()
            for result in results:
                if isinstance(result, Failed):
                    if result.fatal:
                        raise StoreError(f"unit {result.unit_key!r} was stopped by the dataset: {result.reason}")
                    log.error("unit %s failed: %s\n%s", result.unit_key, result.reason, result.where)
                    dispatcher.unit_failed(result.unit_key, result.reason, now_s)
                else:
                    store.commit(result)
                    dispatcher.unit_done(result.unit_key, result.seconds, now_s)
            dispatcher.call_done(call_id, now_s)
        p = dispatcher.progress(time.monotonic())
        on_progress(stage, Progress(p.n_done + n_before, p.n_failed, p.n_quarantined, n_units, p.units_per_s, p.eta_s))
    failed = dispatcher.failed | dispatcher.quarantined
    if dispatcher.stopped:
        raise StageError(f"stage {stage!r} cannot go on: {dispatcher.stopped}. What is committed stays; run again.")
    return failed


class _Crew:
    """The actors that exist: started, pending, busy. One kind at a time, so that one pool has the whole cluster."""

    def __init__(self, sweep: AnySweep, on_message: OnMessage) -> None:
        self._sweep = sweep
        self._sweep_ref = ray.put(sweep)
        self._on_message = on_message
        self._kind: str | None = None
        self._pool = PoolConfig()
        self._handles: dict[str, ray.actor.ActorHandle] = {}
        self._starting: dict[ray.ObjectRef, tuple[str, float]] = {}
        self._calls: dict[ray.ObjectRef, tuple[int, str]] = {}
        self._n_started = 0
        self._warned = False

    def man(self, kind: str, pool: PoolConfig, dispatcher: Dispatcher) -> None:
        """Turns to a stage: actors of the same kind stay, others go."""
        if kind != self._kind:
            self.dismiss()
            self._kind = kind
        self._pool = pool
        pending = {name for name, _ in self._starting.values()}
        for name in self._handles:
            if name not in pending:
                dispatcher.actor_joined(name, time.monotonic())

    def grow(self, wanted: int) -> None:
        """Asks Ray for actors until as many exist or are pending as are wanted."""
        assert self._kind is not None
        threads = str(self._sweep.science.numerics.threads)
        while len(self._handles) < wanted:
            name = f"{self._kind}-{self._n_started}"
            self._n_started += 1
            env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
            handle = actors.start(self._kind, self._sweep_ref, self._pool, env)
            self._handles[name] = handle
            self._starting[handle.ready.remote()] = (name, time.monotonic())

    def send(self, call_id: int, actor_id: str, units: list[Work]) -> None:
        """Sends a call off."""
        self._calls[self._handles[actor_id].run.remote(units)] = (call_id, actor_id)

    def answers(self, dispatcher: Dispatcher) -> Iterator[tuple[int, list[Receipt | Failed]]]:
        """Waits a moment; yields calls that returned, reports actors that joined or left to the dispatcher."""
        waiting = [*self._calls, *self._starting]
        if not waiting:
            time.sleep(POLL_S)
            return
        ready, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
        if ready:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        self._say_when_pending()
        for ref in ready:
            now_s = time.monotonic()
            if ref in self._starting:
                name, _ = self._starting.pop(ref)
                try:
                    ray.get(ref)
                    dispatcher.actor_joined(name, now_s)
                except rx.RayError as e:
                    self._lost(name, _cause(e, starting=True), e, dispatcher)
            elif ref in self._calls:
                call_id, name = self._calls.pop(ref)
                try:
                    results = ray.get(ref)
                except rx.RayError as e:
                    self._lost(name, _cause(e, starting=False), e, dispatcher)
                else:
                    yield call_id, results

    def _lost(self, name: str, cause: Cause, error: Exception, dispatcher: Dispatcher) -> None:
        if name not in self._handles:
            return
        self.let_go(name)
        detail = actors.reason_of(error)
        self._on_message(f"actor {name} {cause.replace('_', ' ')}: {detail}")
        dispatcher.actor_left(name, cause, time.monotonic(), detail)

    def _say_when_pending(self) -> None:
        if self._warned or not self._starting:
            return
        longest = time.monotonic() - min(since for _, since in self._starting.values())
        if longest > PENDING_S:
            self._warned = True
            self._on_message(
                f"{len(self._starting)} {self._kind} actor(s) have been pending for {longest:.0f} s: the cluster is "
                f"busy or growing. Free now: {ray.available_resources()}"
            )

    def let_go(self, name: str) -> None:
        """Ends an actor."""
        handle = self._handles.pop(name)
        self._starting = {r: v for r, v in self._starting.items() if v[0] != name}
        self._calls = {r: v for r, v in self._calls.items() if v[1] != name}
        ray.kill(handle)

    def dismiss(self) -> None:
        """Ends all actors."""
        for name in list(self._handles):
            self.let_go(name)


def _cause(error: Exception, *, starting: bool) -> Cause:
    if isinstance(error, rx.NodeDiedError) or getattr(error, "preempted", False):
        return "preempted"
    return "start_failed" if starting else "died"
