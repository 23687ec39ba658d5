"""Which unit of work goes to which actor, how many actors there should be, and what the death of one means.

Place in the flow: `plan.py` cuts a stage into units, a `Dispatcher` decides about one stage, `service.py` does what it
decided, with Ray. No Ray here, no clock, no sleep: the driver passes `now_s` (any clock that never goes back) and
reports what happened; the same reports get the same answers. Its loop, while neither `done` nor `stopped`: let go of
`release`, start actors until `wanted_actors` exist or are starting, send off `assign`, wait for an event, report it.

**Bundles** follow guided self-scheduling (Polychronopoulos and Kuck 1987): a call is about `bundle_s` seconds of work,
but never more than a fair share of what waits, so calls shrink towards the end of the stage.

**Deaths.** Losing a node (`preempted`) never counts against a unit. When an actor dies otherwise, every unit in flight
on it has one death behind it and from then on travels alone: a call of its own, nothing else in flight on that actor,
so that a poison unit does not drag its neighbours along. After `shared_deaths` it goes only to a *fresh* actor, one
that has run nothing else; where none is free or coming, one actor is drained and let go to make room. After
`solo_deaths` more it is quarantined, provided that another unit has survived since it first waited for a fresh actor,
or that none is left that could. Where nothing survives, or nothing starts, `stopped` says why.
"""

import math
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from polyray.errors import ConfigError, StageError, nearest

Cause = Literal["died", "preempted", "released", "start_failed"]

_N_MEASURED = 31  # enough for a median that a dozen odd values cannot move, few enough to follow a change of layer
_N_SPEED = 256  # units that ended most recently, over which the speed is measured


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    key: str
    weight: float = 1.0  # expected cost, in any unit
    affinity: str | None = None  # such as a layer: prefers the actor that was sent the last one; none idles for it


@dataclass(frozen=True)
class Policy:
    """How many actors, how much in flight, and how much dying is enough; out of bounds is a `ConfigError`."""

    max_actors: int
    min_actors: int = 1  # while as many units wait
    in_flight: int = 2  # calls that may wait or run at one actor
    bundle_s: float = 5.0  # target duration of a call
    shared_deaths: int = 3  # after which a unit goes to fresh actors only
    solo_deaths: int = 3  # on fresh actors, after which it is quarantined
    start_failures: int = 3  # in a row: stop the stage where no actor is alive, pause growth where one is
    start_pause_s: float = 60.0  # length of that pause, from the last failed start
    fruitless_losses: int = 30  # busy actors lost with no unit ending: stop the stage (3 per actor if that is more)

    def __post_init__(self) -> None:
        for name in ("min_actors", "in_flight", "shared_deaths", "solo_deaths", "start_failures", "fruitless_losses"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_actors < self.min_actors:
            raise ConfigError(f"min_actors <= max_actors must hold, got {self.min_actors} and {self.max_actors}.")
        if not 0 < self.bundle_s < math.inf:
            raise ConfigError(f"bundle_s must be positive and finite, got {self.bundle_s}.")


@dataclass(frozen=True)
class Call:
    """Units to be run one after the other by one actor in one remote call."""

    call_id: int
    actor_id: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """How far the stage is; what is neither done, failed nor quarantined is still open.

    The speed is that of the last few hundred units, 0 until one has ended; `eta_s` is by weight at that speed, None
    where it is unknown or the stage has stopped.
    """

    n_done: int
    n_failed: int
    n_quarantined: int
    n_total: int
    units_per_s: float
    eta_s: float | None


@dataclass
class _Actor:
    calls: dict[int, Call] = field(default_factory=dict)
    fresh: bool = True
    alone: bool = False
    affinity: str | None = None


class _Backlog:
    """Waiting units without a death behind them, grouped by affinity, each group in order."""

    def __init__(self) -> None:
        self.weight, self._n = 0.0, 0
        self._groups: dict[str | None, OrderedDict[str, Unit]] = {}

    def __len__(self) -> int:
        return self._n

    def add(self, unit: Unit, *, last: bool) -> None:
        group = self._groups.setdefault(unit.affinity, OrderedDict())
        group[unit.key] = unit
        group.move_to_end(unit.key, last=last)
        self.weight, self._n = self.weight + unit.weight, self._n + 1

    def discard(self, unit: Unit) -> None:
        group = self._groups.get(unit.affinity)
        if group and group.pop(unit.key, None):
            self.weight, self._n = self.weight - unit.weight, self._n - 1
            if not group:
                del self._groups[unit.affinity]

    def take(self, held: str | None, holders: Counter[str | None], max_weight: float, max_units: int) -> list[Unit]:
        """At least one unit: from the group that the actor holds, else from the first that fewest actors hold."""
        taken: list[Unit] = []
        while self._groups and len(taken) < max_units:
            if held is None or held not in self._groups:
                held = min(self._groups, key=lambda name: holders[name])
            unit = next(iter(self._groups[held].values()))
            max_weight -= unit.weight
            if taken and max_weight < 0:
                break
            self.discard(unit)
            taken.append(unit)
        return taken


class Dispatcher:
    """Decides about the units of one stage; every unit ends once, as done, failed or quarantined.

    Args:
        units: the units that are to be done, in the order in which they would be; keys are unique.
        policy: bounds and limits.
        n_committed: units of the same stage that earlier runs finished. They too show that units can survive, so that
            a unit which an earlier run quarantined is quarantined again even where it is all there is.

    Attributes:
        failed: reason by key of the units that raised; they are not tried again.
        quarantined: reason by key of the units that keep killing their actors.
        stopped: why the stage cannot go on, or None. Nothing is assigned or wanted any more; answers still count.

    Raises:
        ConfigError: a key comes twice, or a weight is not a positive finite number.
    """

    def __init__(self, units: Iterable[Unit], policy: Policy, *, n_committed: int = 0) -> None:
        self.failed: dict[str, str] = {}
        self.quarantined: dict[str, str] = {}
        self.stopped: str | None = None
        self._policy = policy
        self._units: dict[str, Unit] = {}
        self._open: set[str] = set()  # neither done, failed nor quarantined; like all sets here, never iterated over
        self._backlog = _Backlog()  # no death behind them
        self._touched: OrderedDict[str, Unit] = OrderedDict()  # some deaths: travel alone
        self._solo: OrderedDict[str, Unit] = OrderedDict()  # many deaths: alone, to a fresh actor
        self._condemned: dict[str, str] = {}  # quarantined as soon as another unit survives
        self._live: set[str] = set()  # in flight
        self._actors: dict[str, _Actor] = {}
        self._left: set[str] = set()
        self._deaths: Counter[str] = Counter()
        self._survivors_at_solo: dict[str, int] = {}
        self._n_survivors = n_committed
        self._n_calls = self._n_done = self._most_actors = self._n_start_failures = 0
        self._start_failed_s = -math.inf
        self._fruitless: Counter[Cause] = Counter()
        self._s_per_weight: deque[float] = deque(maxlen=_N_MEASURED)
        self._ended: deque[tuple[float, float]] = deque(maxlen=_N_SPEED)  # time, weight
        for unit in units:
            if unit.key in self._units:
                raise ConfigError(f"unit {unit.key!r} comes twice; keys must be unique within a stage.")
            if not 0 < unit.weight < math.inf:
                raise ConfigError(f"unit {unit.key!r} has weight {unit.weight}; it must be positive and finite.")
            self._units[unit.key] = unit
            self._open.add(unit.key)
            self._backlog.add(unit, last=True)
        self._open_weight = self._backlog.weight

    @property
    def done(self) -> bool:
        """Every unit has ended, as done, failed or quarantined; not true of a stage that stopped half-way."""
        return not self._open

    @property
    def n_waiting(self) -> int:
        """Units that are neither in flight nor ended."""
        return len(self._backlog) + len(self._touched) + len(self._solo)

    def progress(self, now_s: float) -> Progress:
        """How far the stage is at `now_s`."""
        counts = self._n_done, len(self.failed), len(self.quarantined), len(self._units)
        elapsed_s = now_s - self._ended[0][0] if self._ended else 0.0
        weight = sum(weight for _, weight in self._ended) - self._ended[0][1] if self._ended else 0.0
        speed = weight / elapsed_s if elapsed_s > 0 else 0.0
        eta_s = max(0.0, self._open_weight / speed) if speed and not self.stopped else None
        return Progress(*counts, (len(self._ended) - 1) / elapsed_s if speed else 0.0, 0.0 if self.done else eta_s)

    def wanted_actors(self, now_s: float) -> int:
        """How many actors should exist now, busy ones included.

        As many as have a bundle of work each, at least `min_actors`, at most `max_actors` and one per unit that
        waits; beyond that one fresh actor for every unit that needs one. Where nothing waits: those that are busy.
        """
        if self.stopped or self.done:
            return 0
        paused = now_s < self._start_failed_s + self._policy.start_pause_s
        if paused and self._n_start_failures >= self._policy.start_failures:
            return len(self._actors)
        n_solo_live = sum(key in self._live for key in self._survivors_at_solo)
        n_busy = sum(bool(actor.calls) for actor in self._actors.values()) - n_solo_live
        n_waiting = self.n_waiting - len(self._solo)
        n_need = len(self._open)
        if self._s_per_weight:
            n_need = math.ceil(self._open_weight * statistics.median(self._s_per_weight) / self._policy.bundle_s)
        n_ordinary = max(n_busy, min(max(n_need, self._policy.min_actors), n_busy + n_waiting))
        return min(n_ordinary + n_solo_live + len(self._solo), self._policy.max_actors)

    def assign(self, now_s: float) -> list[Call]:
        """Calls to send off now; their units are in flight until they end, or their actor leaves."""
        if self.stopped:
            return []
        calls: list[Call] = []
        n_slots = max(self.wanted_actors(now_s), len(self._actors)) * self._policy.in_flight
        retiring = self._retiring(now_s)
        able = {name: actor for name, actor in self._actors.items() if name != retiring}
        for name, actor in able.items():
            queue = self._solo if self._solo and actor.fresh else self._touched
            if queue and not actor.calls:
                calls.append(self._send(name, [queue.popitem(last=False)[1]], alone=True))
        s_per_weight = statistics.median(self._s_per_weight) if self._s_per_weight else 0.0
        bundle_weight = self._policy.bundle_s / s_per_weight if s_per_weight > 0 else math.inf
        holders = Counter(actor.affinity for actor in self._actors.values())
        for n_calls in range(self._policy.in_flight):
            for name, actor in able.items():
                if not self._backlog or actor.alone or len(actor.calls) != n_calls:
                    continue
                max_weight = min(bundle_weight, self._backlog.weight / n_slots)
                # No more units than were ever measured: one odd measurement cannot fill a huge call.
                units = self._backlog.take(actor.affinity, holders, max_weight, max(1, self._n_done))
                holders.subtract([actor.affinity])
                calls.append(self._send(name, units, alone=False))
                holders.update([actor.affinity])
        return calls

    def release(self, now_s: float) -> list[str]:
        """Idle actors that no waiting unit can use; a permission, reported back by `actor_left(…, "released")`."""
        idle = [name for name, actor in self._actors.items() if not actor.calls]
        if self.stopped or self.done:
            return idle
        if self._backlog or self._touched:
            return [name for name in idle if name == self._retiring(now_s)]
        kept = [name for name in idle if self._actors[name].fresh][: len(self._solo)]
        return [name for name in idle if name not in kept]

    def actor_joined(self, actor_id: str, now_s: float) -> None:
        """An actor has started and can take calls. Raises `StageError` where its id was used before."""
        if actor_id in self._actors or actor_id in self._left:
            raise StageError(f"actor {actor_id!r} joined twice; every start needs an id of its own.")
        self._actors[actor_id] = _Actor()
        self._most_actors = max(self._most_actors, len(self._actors))
        self._n_start_failures = 0
        if not self._ended:
            self._ended.append((now_s, 0.0))  # the speed counts from here

    def actor_left(self, actor_id: str, cause: Cause, now_s: float, detail: str = "") -> list[str]:
        """An actor is gone, or could not start; leaving twice changes nothing.

        Args:
            actor_id: the actor; one that `died` without having joined counts as `start_failed`.
            cause: `preempted` for whatever befell the node, `died` for whatever befell the process.
            now_s: time of the report.
            detail: the error, for the reasons given to people.

        Returns:
            Keys of the units that were in flight and wait again, in the order in which they were sent.
        """
        if actor_id in self._left:
            return []
        self._left.add(actor_id)
        killed = cause in ("died", "start_failed")
        actor = self._actors.pop(actor_id, None)
        if actor is None:
            if killed:
                self._n_start_failures += 1
                self._start_failed_s = now_s
            if self._n_start_failures >= self._policy.start_failures and not self._actors:
                self._stop(f"{self._n_start_failures} actors in a row could not start", detail)
            return []
        if not self._actors:
            self._n_start_failures = 0  # the next starts are judged by themselves
        lost = [key for call in actor.calls.values() for key in call.keys if key in self._live]
        self._live.difference_update(lost)
        # Units without a death go back to the front of the queue one by one, so backwards.
        for key in lost if killed else reversed(lost):
            self._wait_again(self._units[key], killed, detail)
        self._settle()
        if lost and cause != "released":
            self._fruitless[cause] += 1
        n_lost = self._fruitless.total()
        if n_lost >= max(self._policy.fruitless_losses, 3 * self._most_actors):
            causes = ", ".join(f"{n} {cause}" for cause, n in sorted(self._fruitless.items()))
            self._stop(f"{n_lost} busy actors were lost in a row ({causes}) and no unit ended meanwhile", detail)
        return [key for key in lost if key not in self._condemned and key not in self.quarantined]

    def unit_done(self, key: str, seconds: float, now_s: float) -> None:
        """A unit is committed, by whichever actor, even one thought dead; a unit that has ended ignores it.

        Raises `StageError` where the stage has no such unit, or `seconds` is negative or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise StageError(f"unit {key!r} reports {seconds} seconds; a finite number of at least 0 is expected.")
        if self._end(key, now_s):
            self._n_done += 1
            self._s_per_weight.append(seconds / self._units[key].weight)

    def unit_failed(self, key: str, reason: str, now_s: float) -> None:
        """A unit raised and is never tried again; one that has ended ignores it. Raises `StageError` if unknown."""
        if self._end(key, now_s):
            self.failed[key] = reason

    def call_done(self, call_id: int, now_s: float) -> None:
        """A call has returned. Units of which it reported nothing fail; a call that is not live is ignored."""
        for actor in self._actors.values():
            if call := actor.calls.pop(call_id, None):
                actor.alone = False
                for key in call.keys:
                    if key in self._live:
                        self.unit_failed(key, "its call returned without a word about it", now_s)

    def _send(self, actor_id: str, units: list[Unit], *, alone: bool) -> Call:
        call = Call(self._n_calls, actor_id, tuple(unit.key for unit in units))
        self._n_calls += 1
        self._live.update(call.keys)
        actor = self._actors[actor_id]
        actor.calls[call.call_id] = call
        actor.fresh, actor.alone, actor.affinity = False, alone, units[-1].affinity
        return call

    def _retiring(self, now_s: float) -> str | None:
        """The actor to drain where a unit waits for a fresh one and none is idle or to be had: the least busy."""
        if not self._solo or self._n_start_failures or any(actor.fresh for actor in self._actors.values()):
            return None
        if len(self._actors) < self.wanted_actors(now_s):
            return None
        return min(self._actors, key=lambda name: len(self._actors[name].calls), default=None)

    def _wait_again(self, unit: Unit, killed: bool, detail: str) -> None:
        self._deaths[unit.key] += killed
        n_deaths = self._deaths[unit.key]
        n_solo = n_deaths - self._policy.shared_deaths
        if n_deaths == 0:
            self._backlog.add(unit, last=False)
        elif n_solo < 0:
            self._touched[unit.key] = unit
        elif n_solo < self._policy.solo_deaths:
            self._survivors_at_solo.setdefault(unit.key, self._n_survivors)
            self._solo[unit.key] = unit
        else:
            last = f"; the last: {detail}" if detail else ""
            self._condemned[unit.key] = f"{n_deaths} actors died with it, {n_solo} of them fresh and its own{last}"

    def _end(self, key: str, now_s: float) -> bool:
        """Takes a unit out of wherever it is; false where it has ended before."""
        if key not in self._units:
            raise StageError(f"the stage has no unit {key!r}.{nearest(key, self._units)}")
        if key not in self._open:
            return False
        unit = self._units[key]
        self._open.discard(key)
        self._backlog.discard(unit)
        self._live.discard(key)
        for place in (self._touched, self._solo, self._condemned):
            place.pop(key, None)
        self._open_weight -= unit.weight
        self._ended.append((now_s, unit.weight))
        self._n_survivors += 1  # one that raised as well: its actor lived to tell
        self._fruitless.clear()
        self._settle()
        return True

    def _settle(self) -> None:
        """Quarantines condemned units once others survive; stops where nothing is left that could."""
        none_left = not (self._backlog or self._touched or self._solo or self._live)
        if none_left and self._condemned and self._n_survivors == 0:
            key, reason = next(iter(self._condemned.items()))
            self._stop(f"no unit survives, so it is the cluster or the code; {key!r}: {reason}")
        for key in list(self._condemned) if not self.stopped else []:
            if none_left or self._n_survivors > self._survivors_at_solo[key]:
                self.quarantined[key] = self._condemned.pop(key)
                self._open.discard(key)
                self._open_weight -= self._units[key].weight

    def _stop(self, reason: str, detail: str = "") -> None:
        if not self.stopped and not self.done:
            self.stopped = f"{reason}; the last: {detail}" if detail else reason
