"""Crew: the actors that exist, and what Ray says became of them.

Place in the flow: under `service.py`, which passes on what the dispatcher decided. What bites in Ray and why each guard
is here: a dead actor raises one of a dozen exceptions, so whatever Ray raises for a call means that its actor is lost
(what a unit raises is caught in the worker); the loss of a node looks like that of an actor, and for half a minute like
neither; an idle actor on a dead node says nothing; a pending actor pends in silence.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ray
import ray.exceptions as rx

from polyray.cluster import actors, room
from polyray.cluster.dispatch import Call, Cause, Dispatcher
from polyray.cluster.plan import Work
from polyray.cluster.premises import Ready, mixed, premises_of
from polyray.cluster.telemetry import Telemetry
from polyray.config import PoolConfig
from polyray.errors import StoreError
from polyray.records import Failed, Receipt
from polyray.store import Store

OnMessage = Callable[[str], None]

POLL_S = 0.2
"""Longest wait for an answer before the dispatcher is asked again."""
WATCH_S = 2.0
"""How often Ray is asked about nodes; a notice gives 30 s."""
PENDING_S = 60.0
"""An actor that has not started for so long is worth a word, and again after as long."""
DOUBT_S = 60.0
"""How long Ray may need to say whether an actor that cannot be reached is dead; a dead node takes it 15 to 40 s."""


@dataclass
class _Member:
    handle: ray.actor.ActorHandle
    asked_s: float
    ready: ray.ObjectRef | None  # until it has started
    node: str | None = None
    calls: dict[ray.ObjectRef, int] = field(default_factory=dict)
    since_s: float = 0.0  # when it began the first of its calls
    draining: bool = False
    doubt: tuple[float, Exception] | None = None  # since when it cannot be reached, and what was raised


class Crew:
    """Actors started, pending, busy. One kind at a time, so that one pool has the whole cluster."""

    def __init__(self, sweep: actors.AnySweep, store: Store, on_message: OnMessage, telemetry: Telemetry) -> None:
        self._store, self._premises = store, premises_of(store, sweep.science.numerics.device)
        self._threads = str(sweep.science.numerics.threads)
        self._sweep_ref = ray.put(sweep)
        self._on_message, self._telemetry = on_message, telemetry
        self._kind = ""
        self._pool = PoolConfig()
        self._members: dict[str, _Member] = {}
        self._waiting: dict[ray.ObjectRef, str] = {}  # whose answer it is
        self._n_started = 0
        self._watched_s = self._warned_s = time.monotonic()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def n_calls(self) -> int:
        """Calls that have not returned."""
        return sum(len(m.calls) for m in self._members.values())

    def say(self, message: str) -> None:
        """A line worth a person's attention."""
        self._telemetry.message(message)
        self._on_message(message)

    def is_draining(self, name: str) -> bool:
        """Whether the actor's node was given notice, or cannot be reached."""
        return self._members[name].draining

    def man(self, kind: str, pool: PoolConfig, dispatcher: Dispatcher) -> None:
        """Turns to a stage: actors of the same kind stay, others go, as do those that still run what nobody awaits."""
        for name, m in list(self._members.items()):
            if kind != self._kind or m.calls or m.doubt or m.draining:
                self.let_go(name)
        self._kind, self._pool = kind, pool
        for name, m in self._members.items():
            if m.ready is None:
                dispatcher.actor_joined(name, time.monotonic())

    def grow(self, wanted: int, *, shrink: bool = False) -> None:
        """Asks Ray for actors until as many exist or are pending as are wanted.

        Where it may shrink, requests beyond that are taken back: an actor that pends makes an autoscaler start nodes.
        """
        here = {name: m for name, m in self._members.items() if not m.draining}
        for _ in range(wanted - len(here)):
            name = f"{self._kind}-{self._n_started}"
            self._n_started += 1
            env = {"OMP_NUM_THREADS": self._threads, "MKL_NUM_THREADS": self._threads}
            handle = actors.start(self._kind, self._sweep_ref, self._premises, self._pool, env)
            member = _Member(handle, time.monotonic(), handle.ready.remote())
            self._members[name] = member
            self._waiting[member.ready] = name
        pending = [name for name, m in here.items() if m.ready is not None] if shrink else []
        for name in pending[::-1][: max(0, len(here) - wanted)]:
            self.let_go(name)

    def send(self, call: Call, units: list[Work]) -> None:
        """Sends a call off."""
        m = self._members[call.actor_id]
        ref = m.handle.run.remote(units)
        if not m.calls:
            m.since_s = time.monotonic()
        m.calls[ref] = call.call_id
        self._waiting[ref] = call.actor_id
        self._telemetry.sent(call.actor_id, list(call.keys), is_copy=call.is_copy)

    def answers(self, dispatcher: Dispatcher) -> Iterator[dict[int, list[Receipt | Failed]]]:
        """Waits a moment; yields the calls that returned, if any, all at once, and only then reports what befell
        actors to the dispatcher: what they had done before counts first."""
        if not self._waiting:
            time.sleep(POLL_S)
        else:
            waiting = list(self._waiting)
            ready, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            if ready:
                ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            returned: dict[int, list[Receipt | Failed]] = {}
            unanswered: list[tuple[str, Exception]] = []
            for ref in ready:
                name = self._waiting.pop(ref, None)
                if name is None:
                    continue  # its actor went while others were looked at
                try:
                    answer = ray.get(ref)
                except rx.RayError as e:
                    unanswered.append((name, e))
                    continue
                m = self._members[name]
                if ref == m.ready:
                    self._welcome(name, answer, dispatcher)
                else:
                    returned[m.calls.pop(ref)] = answer
                    m.since_s = time.monotonic()
            if returned:
                yield returned
            for name, error in unanswered:
                if name in self._members:
                    self._unanswered(name, error, dispatcher)
        if time.monotonic() - self._watched_s > WATCH_S:
            self._watch(dispatcher)
            self._watched_s = time.monotonic()

    def let_go(self, name: str, cause: Cause = "released", detail: str = "") -> None:
        """Ends an actor."""
        m = self._members.pop(name)
        for ref in [m.ready, *m.calls]:
            self._waiting.pop(ref, None)
        ray.kill(m.handle)
        self._telemetry.left(name, cause, time.monotonic() - m.since_s if m.calls else 0.0, detail)

    def dismiss(self) -> None:
        """Ends all actors."""
        for name in list(self._members):
            self.let_go(name)

    def _welcome(self, name: str, ready: Ready, dispatcher: Dispatcher) -> None:
        """An actor has started; one that must not do a unit goes, and takes the run with it where it is the first."""
        m, now_s = self._members[name], time.monotonic()
        if refusal := mixed(self._store, ready):
            if all(other.node is None for other in self._members.values()):
                raise StoreError(refusal)
            self.let_go(name, "start_failed", refusal)
            self.say(f"actor {name} was let go: {refusal}")
            dispatcher.actor_left(name, "start_failed", now_s, refusal)
            return
        m.ready, m.node = None, ready.node
        self._telemetry.joined(name, ready.node, now_s - m.asked_s)
        dispatcher.actor_joined(name, now_s)

    def _unanswered(self, name: str, error: Exception, dispatcher: Dispatcher) -> None:
        m = self._members[name]
        if m.doubt is not None:
            return  # another of its calls
        if isinstance(error, rx.ActorUnavailableError):
            # It may be its node, which Ray notices later: until then nothing is held against the units.
            m.doubt = time.monotonic(), error
            self._give_notice(name, dispatcher)
            return
        self._lost(name, error, room.fate(m.handle).node_is_going, dispatcher)

    def _watch(self, dispatcher: Dispatcher) -> None:
        """What Ray does not say unasked."""
        living, draining = room.living(), room.draining()
        now_s = time.monotonic()
        for name, m in list(self._members.items()):
            if m.doubt is not None:
                since_s, error = m.doubt
                fate = room.fate(m.handle)
                if fate.is_dead or fate.node_is_going or now_s - since_s > DOUBT_S:
                    self._lost(name, error, fate.node_is_going or not fate.is_dead, dispatcher)
            elif m.node is not None and m.node not in living:
                self._lost(name, rx.NodeDiedError(f"node {m.node} is dead"), True, dispatcher)
            elif m.node in draining and not m.draining:
                self._telemetry.draining(name, m.node or "")
                self.say(f"the node of actor {name} was given notice; it does what it is at and goes")
                self._give_notice(name, dispatcher)
        longest_s = max((now_s - m.asked_s for m in self._members.values() if m.ready is not None), default=0.0)
        if longest_s > PENDING_S and now_s - self._warned_s > PENDING_S:
            self._warned_s = now_s
            n_pending = sum(m.ready is not None for m in self._members.values())
            self.say(
                f"{n_pending} {self._kind} actor(s) have been pending for {longest_s:.0f} s: the cluster is busy or "
                f"growing. Free now: {ray.available_resources()}"
            )

    def _give_notice(self, name: str, dispatcher: Dispatcher) -> None:
        self._members[name].draining = True
        dispatcher.actor_draining(name)

    def _lost(self, name: str, error: Exception, node_is_going: bool, dispatcher: Dispatcher) -> None:
        cause = _cause(error, starting=self._members[name].ready is not None, node_is_going=node_is_going)
        detail = actors.reason_of(error)
        self.let_go(name, cause, detail)
        self.say(f"actor {name} {cause.replace('_', ' ')}: {detail}")
        dispatcher.actor_left(name, cause, time.monotonic(), detail)


def _cause(error: Exception, *, starting: bool, node_is_going: bool) -> Cause:
    if node_is_going or isinstance(error, rx.NodeDiedError) or getattr(error, "preempted", False):
        return "preempted"
    # One that is killed while it starts says less than one that raises.
    was_killed = isinstance(error, rx.ActorDiedError) and not error.actor_init_failed
    return "start_failed" if starting and not was_killed else "died"
