"""Service: does with Ray what the dispatcher decided.

Place in the flow: `cli.py` calls `run`; this is the driver, and it stays thin: it asks the dispatcher what to do next,
has the crew do it, and commits the receipts that come back. `drive` is the loop. What needs torch is imported where it
is used, so that the driver of a sweep that has no chain of shards holds a few hundred megabytes.
"""

import logging
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
import ray.exceptions as rx

from polyray.cluster import actors
from polyray.cluster.crew import Crew, OnMessage
from polyray.cluster.dispatch import Dispatcher, Policy, Progress, Unit
from polyray.cluster.interrupt import GRACE_S, Interrupted, Stop
from polyray.cluster.plan import Resolved, Work
from polyray.cluster.room import NodeGroup, at_once, groups, lacks, most_actors, nodes
from polyray.cluster.room import capacity as capacity
from polyray.cluster.room import this_machine as this_machine
from polyray.cluster.telemetry import DeviceSeconds, Telemetry
from polyray.cluster.text_plan import TextSweep
from polyray.config import Execution, PoolConfig
from polyray.errors import ConfigError, StageError, StoreError
from polyray.overlay import opened
from polyray.records import Failed, Receipt
from polyray.store import Store
from polyray.text_config import TextExecution

if TYPE_CHECKING:
    from polyray.cluster.text_memory import Room
    from polyray.cluster.text_resolve import TextResolved
    from polyray.cluster.vary import Asked

log = logging.getLogger(__name__)

TOLD_S = 0.2
"""How often progress is told."""
LOOK_S = 5.0
"""How often the cluster is looked at for room, and the gauges are set."""

_TOKEN = secrets.token_hex(32)
"""One a process, since Ray reads it only once."""

AnySweep = actors.AnySweep
OnProgress = Callable[[str, Progress], None]


@dataclass
class Outcome:
    """How a run ended."""

    run_id: str
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by stage, of the stages that had work left."""
    device_s: DeviceSeconds = field(default_factory=DeviceSeconds)
    """What this run's actors worked; of a chain of shards it is not known."""


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
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if execution.address is None:
            os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
            store_bytes = int(execution.object_store_gb * 1024**3)
            ray.init(address="local", include_dashboard=False, object_store_memory=store_bytes, **quiet)
        else:
            try:
                ray.init(address=execution.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, rx.AuthenticationError) as e:
                if "ersion mismatch" in str(e):
                    raise ConfigError(
                        f"the Ray cluster at {execution.address!r} is of another version. {e}\nInstall the cluster's "
                        "versions here, or run this from a machine or an image of the cluster."
                    ) from e
                raise ConfigError(
                    f"no Ray cluster answers at {execution.address!r}: {e}. Where it asks for a token, set "
                    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token here: Ray itself does not say so."
                ) from e
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray takes it for itself
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def room_of(execution: TextExecution, nodes: list[dict[str, float]], groups: Sequence[NodeGroup] = ()) -> "Room":
    """What a categorical sweep finds on nodes of these resources, and on those that the cluster may add."""
    from polyray.cluster.text_memory import Room

    n_fit = {kind: at_once(getattr(execution, kind), execution, nodes, groups) for kind in ("shard", "scoring")}
    most = sum(n_fit.values())
    added = [group.resources for group in groups for _ in range(int(min(group.max_nodes, most)))]
    memory = [node.get("memory", 0.0) for node in [*nodes, *added]]
    # What a cluster that only says that it grows will add cannot be known.
    unknown = [math.inf] * most if execution.autoscale and not groups else []
    return Room(n_fit, memory + unknown)


def run(
    resolved: "Resolved | TextResolved", on_progress: OnProgress, on_message: OnMessage, stop: Stop | None = None
) -> Outcome:
    """Runs a sweep on the current Ray cluster, resuming what its OUT already holds.

    Args:
        resolved: from `resolve.resolve`.
        on_progress: called with the stage and how far it is.
        on_message: called with a line worth a person's attention.
        stop: how to ask it to end before.

    Returns:
        The outcome of a sweep that is whole.

    Raises:
        ConfigError: the cluster can never hold the actors asked for.
        StoreError: OUT belongs to another run, is written by another driver, or cannot be written.
        StageError: a stage ended with failed units, so that the next cannot run.
        Interrupted: `stop` was asked; what is committed stays.
    """
    sweep, stop = resolved.sweep, stop or Stop()
    problems = lacks(sweep.config.execution, nodes(), groups())
    if isinstance(sweep, TextSweep) and not problems:
        from polyray.cluster import text_memory

        execution = sweep.config.execution
        room = room_of(execution, nodes(), groups())
        sizes: text_memory.Sizes = resolved.sizes  # type: ignore[union-attr]  # of a sweep of that kind
        problems = text_memory.lacks(sizes, sweep.science, execution, sweep.steps, room)
    if problems:
        raise ConfigError("the cluster lacks what the config asks for:\n  " + "\n  ".join(problems))
    store = Store(sweep.out)
    config = sweep.config.model_dump(mode="json")
    outcome = Outcome(store.create_or_resume(resolved.identity, resolved.provenance, config))
    store = opened(sweep.out)
    with store.acquire():
        return _sweep(sweep, store, outcome, on_progress, on_message, stop)


def _sweep(
    sweep: AnySweep, store: Store, outcome: Outcome, on_progress: OnProgress, on_message: OnMessage, stop: Stop
) -> Outcome:
    """All stages, one after the other, by the driver that holds the dataset's lease."""
    telemetry = Telemetry(outcome.run_id, outcome.device_s)
    crew = Crew(sweep, store, on_message, telemetry)
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
                    from polyray.cluster import chain

                    crew.dismiss()
                    shard = sweep.config.execution.shard
                    n_fit = at_once(shard, sweep.config.execution, nodes(), groups())
                    chain.mine(sweep, store, remaining, n_fit, on_progress, on_message)
                else:
                    failed = _stage(
                        stage, kind, later, remaining, len(units), sweep, store, crew, telemetry, stop, on_progress
                    )
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


def vary(asked: "Asked", on_progress: OnProgress, on_message: OnMessage, stop: Stop | None = None) -> None:
    """Runs the variants of a sweep one after the other, and adds each comparison to the sweep's dataset.

    What OUT holds already is not done again. Raises as `run` does.
    """
    from polyray.cluster.vary import record

    for variant in asked.remaining:
        run(variant.resolved, _named(variant.label, on_progress), on_message, stop)
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
    crew: Crew,
    telemetry: Telemetry,
    stop: Stop,
    on_progress: OnProgress,
) -> dict[str, str]:
    """Runs one stage to its end; returns the reasons of units that failed."""
    execution = sweep.config.execution
    pool: PoolConfig = getattr(execution, kind)
    n_before = n_units - len(remaining)

    def most() -> int:
        return most_actors(pool, execution, nodes(), groups())

    def told(p: Progress) -> None:
        on_progress(stage, Progress(p.n_done + n_before, p.n_failed, p.n_quarantined, n_units, p.units_per_s, p.eta_s))

    dispatcher = Dispatcher(
        (Unit(w.key, w.weight, w.layer) for w in remaining),
        Policy(max_actors=most(), min_actors=pool.min, in_flight=pool.in_flight, bundle_s=execution.bundle_s),
        n_committed=n_before,
    )
    telemetry.stage(stage, pool, n_units, len(remaining))
    crew.man(kind, pool, dispatcher)
    with stop.patience():
        drive(
            dispatcher,
            crew,
            {w.key: w for w in remaining},
            store,
            telemetry,
            stop,
            told,
            most,
            # Idle actors at the end of a stage are kept where the next stage has use for them.
            keep_idle=later == kind,
        )
    if dispatcher.stopped:
        raise StageError(f"stage {stage!r} cannot go on: {dispatcher.stopped}. What is committed stays; run again.")
    return dispatcher.failed | dispatcher.quarantined


def drive(
    dispatcher: Dispatcher,
    crew: Crew,
    works: Mapping[str, Work],
    store: Store,
    telemetry: Telemetry,
    stop: Stop,
    told: Callable[[Progress], None],
    most: Callable[[], int],
    *,
    keep_idle: bool = False,
) -> None:
    """The loop: does what the dispatcher decides until every unit has ended, or nothing can go on.

    Args:
        dispatcher: of one stage.
        crew: has turned to the stage.
        works: the units by key.
        store: where receipts are committed.
        telemetry: has been told of the stage.
        stop: looked at all the time; once asked, nothing more is sent, and what is in flight gets `GRACE_S`.
        told: called with how far the stage is, a few times a second and at the end.
        most: how many actors there may be, asked again every few seconds, since clusters grow.
        keep_idle: leave idle and pending actors be when nothing waits any more.

    Raises:
        Interrupted: `stop` was asked, and what came back in time is committed.
        StoreError: the dataset cannot be written.
    """
    began_s = told_s = looked_s = time.monotonic()
    give_up_s: float | None = None
    while not dispatcher.done and not dispatcher.stopped:
        now_s = time.monotonic()
        if stop.asked and give_up_s is None:
            give_up_s = now_s + GRACE_S
            crew.say(f"{stop.asked}: {crew.n_calls} call(s) in flight have {GRACE_S:.0f} s to finish; again to end now")
        if give_up_s is None:
            _act(dispatcher, crew, works, now_s, keep_idle=keep_idle)
        elif not crew.n_calls or now_s > give_up_s:
            raise Interrupted(f"interrupted by {stop.asked}; {crew.n_calls} call(s) were handed back unfinished")
        for returned in crew.answers(dispatcher):
            _take([result for results in returned.values() for result in results], dispatcher, store, telemetry)
            for call_id in returned:
                dispatcher.call_done(call_id, time.monotonic())
        now_s = time.monotonic()
        if now_s - told_s > TOLD_S:
            told_s = now_s
            told(dispatcher.progress(now_s))
        if now_s - looked_s > LOOK_S:
            looked_s = now_s
            dispatcher.allow(most())
            telemetry.standing(len(crew), dispatcher.n_open, now_s - began_s)
    for key in dispatcher.quarantined:
        telemetry.unit(key, "quarantined")
    now_s = time.monotonic()
    told(dispatcher.progress(now_s))
    telemetry.standing(len(crew), dispatcher.n_open, now_s - began_s)
    telemetry.stage_ended(now_s - began_s, len(dispatcher.failed) + len(dispatcher.quarantined))


def _act(dispatcher: Dispatcher, crew: Crew, works: Mapping[str, Work], now_s: float, *, keep_idle: bool) -> None:
    for name in dispatcher.release(now_s):
        if not keep_idle or dispatcher.n_waiting or crew.is_draining(name):
            crew.let_go(name)
            dispatcher.actor_left(name, "released", now_s)
    crew.grow(dispatcher.wanted_actors(now_s), shrink=not keep_idle and not dispatcher.n_waiting)
    for call in dispatcher.assign(now_s):
        crew.send(call, [works[key] for key in call.keys])


def _take(results: Sequence[Receipt | Failed], dispatcher: Dispatcher, store: Store, telemetry: Telemetry) -> None:
    """Units came back, some perhaps for the second time."""
    receipts = [result for result in results if isinstance(result, Receipt)]
    for receipt, first in zip(receipts, store.commit_all(receipts), strict=True):
        telemetry.unit(receipt.unit_key, "done" if first else "twice", receipt.seconds, receipt.host)
        dispatcher.unit_done(receipt.unit_key, receipt.seconds, time.monotonic())
    for failed in (result for result in results if isinstance(result, Failed)):
        if failed.fatal:
            raise StoreError(f"unit {failed.unit_key!r} was stopped by the dataset: {failed.reason}")
        log.error("unit %s failed: %s\n%s", failed.unit_key, failed.reason, failed.where)
        telemetry.unit(failed.unit_key, "failed")
        dispatcher.unit_failed(failed.unit_key, failed.reason, time.monotonic())
