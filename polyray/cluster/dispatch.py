"""Which unit of work goes to which actor, how many actors there should be, and what the death of one means.

Place in the flow: `plan.py` cuts a stage into units, a `Dispatcher` decides about one stage, `service.py` does what it
decided, with Ray. No Ray here, no clock, no sleep: the driver passes `now_s` (any clock that never goes back) and
reports what happened; the same reports get the same answers. Its loop, while neither `done` nor `stopped`: let go of
`release`, start actors until `wanted_actors` exist or are starting, send off `assign`, wait for an event, report it.

**Bundles** follow guided self-scheduling (Polychronopoulos and Kuck 1987): a call is about `bundle_s` seconds of work,
but never more than a fair share of what waits, so calls shrink towards the end of the stage.

**Deaths.** Losing a node (`preempted`) never counts against a unit. When an actor dies otherwise, every unit in flight
on it has one death behind it and from then on travels alone: a call of its own, nothing else in flight on that actor,
so that a poison unit does not drag its neighbours along. After a few it goes only to a *fresh* actor, one that has run
nothing else (`quarantine.py`); where none is free or coming, one actor is retired to make room. Where nothing survives,
or nothing starts, `stopped` says why.

**Draining.** An actor whose node is about to go is sent nothing more and is let go as soon as a call of its ends; it
does not count as one that exists, so that another is asked for at once.

**Copies.** Where nothing waits and a call has run much longer than its weight lets expect, an idle actor is sent a
second copy of its units, one at a time, and one is asked for where none idles: the last straggler, or an actor that
hangs, must not hold up the stage. The first answer counts. Units with a death behind them are not copied, and the
death of a copy's actor is a death of its unit like any other.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Literal

from polyray.cluster.backlog import Backlog, Unit
from polyray.cluster.calls import Actor, Call, Manner
from polyray.cluster.pace import Pace, Progress
from polyray.cluster.policy import Policy
from polyray.cluster.quarantine import Quarantine
from polyray.errors import ConfigError, StageError, nearest

Cause = Literal["died", "preempted", "released", "start_failed"]
_N_TRUSTED = 5  # measured units without which nobody can say what long is


class Dispatcher:
    """Decides about the units of one stage; every unit ends once, as done, failed or quarantined.

    Args:
        units: the units that are to be done, in the order in which they would be; keys are unique.
        policy: bounds and limits.
        n_committed: units of the same stage that earlier runs finished. They too show that units can survive, so that
            a unit which an earlier run quarantined is quarantined again even where it is all there is.

    Attributes:
        failed: reason by key of the units that raised; they are not tried again.
        stopped: why the stage cannot go on, or None. Nothing is assigned or wanted any more; answers still count.

    Raises:
        ConfigError: a key comes twice, or a weight is not a positive finite number.
    """

    def __init__(self, units: Iterable[Unit], policy: Policy, *, n_committed: int = 0) -> None:
        self.failed: dict[str, str] = {}
        self.stopped: str | None = None
        self._policy = policy
        self._max_actors = policy.max_actors
        self._pace = Pace()
        self._units: dict[str, Unit] = {}
        self._open: set[str] = set()  # neither done, failed nor quarantined; like all sets here, never iterated over
        self._backlog = Backlog()  # no death behind them
        self._touched: OrderedDict[str, Unit] = OrderedDict()  # some deaths: travel alone
        self._solo: OrderedDict[str, Unit] = OrderedDict()  # many deaths: alone, to a fresh actor
        self._live: dict[str, list[str]] = {}  # in flight, and at which actors
        self._actors: dict[str, Actor] = {}
        self._left: set[str] = set()
        self._calls: dict[int, str] = {}  # that have not returned, and at which actor
        self._quarantine = Quarantine(policy.shared_deaths, policy.solo_deaths, n_committed)
        self._copies: Counter[str] = Counter()
        self._n_calls = self._n_done = self._most_actors = 0
        self._start_losses: Counter[Cause] = Counter()  # in a row
        self._start_failed_s = -math.inf
        self._fruitless: Counter[Cause] = Counter()
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
    def quarantined(self) -> dict[str, str]:
        """Reason by key of the units that keep killing their actors."""
        return self._quarantine.quarantined

    @property
    def n_open(self) -> int:
        """Units that have not ended."""
        return len(self._open)

    @property
    def n_waiting(self) -> int:
        """Units that are neither in flight nor ended."""
        return len(self._backlog) + len(self._touched) + len(self._solo)

    def progress(self, now_s: float) -> Progress:
        """How far the stage is at `now_s`."""
        counts = self._n_done, len(self.failed), len(self.quarantined), len(self._units)
        units_per_s, speed = self._pace.speed(now_s)
        eta_s = max(0.0, self._open_weight / speed) if speed and not self.stopped else None
        return Progress(*counts, units_per_s, 0.0 if self.done else eta_s)

    def allow(self, max_actors: int) -> None:
        """The cluster has grown: there may be so many actors from now on; never fewer than before."""
        self._max_actors = max(self._max_actors, max_actors)

    def wanted_actors(self, now_s: float) -> int:
        """How many actors should exist now, busy ones included, those on draining nodes not.

        As many as have a bundle of work each, at least `min_actors`, at most `max_actors` and one per unit that
        waits; beyond that one fresh actor for every unit that needs one. Where nothing waits: those that are busy, and
        one for every unit that is late.
        """
        if self.stopped or self.done:
            return 0
        able = self._able()
        paused = now_s < self._start_failed_s + self._policy.start_pause_s
        if paused and self._cannot_start:
            return len(able)
        n_solo_live = sum(actor.solo for actor in able.values())
        n_busy = sum(bool(actor.calls) for actor in able.values()) - n_solo_live
        n_waiting = self.n_waiting - len(self._solo)
        n_need = len(self._open)
        if self._pace.s_per_weight is not None:
            n_need = math.ceil(self._open_weight * self._pace.s_per_weight / self._policy.bundle_s)
        n_ordinary = max(n_busy, min(max(n_need, self._policy.min_actors), n_busy + n_waiting))
        n_own = n_solo_live + len(self._solo) + len(self._late(now_s))
        return min(n_ordinary + n_own, self._max_actors)

    def assign(self, now_s: float) -> list[Call]:
        """Calls to send off now; their units are in flight until they end, or their actor leaves."""
        if self.stopped:
            return []
        calls: list[Call] = []
        able = self._able()
        n_slots = max(self.wanted_actors(now_s), len(able)) * self._policy.in_flight
        able.pop(self._retiring(now_s) or "", None)
        for name, actor in able.items():
            how: Manner = "solo" if self._solo and actor.fresh else "alone"
            queue = self._solo if how == "solo" else self._touched
            if queue and not actor.calls:
                calls.append(self._send(name, [queue.popitem(last=False)[1]], now_s, how))
        s_per_weight = self._pace.s_per_weight or 0.0
        bundle_weight = self._policy.bundle_s / s_per_weight if s_per_weight > 0 else math.inf
        holders = Counter(actor.affinity for actor in self._actors.values())
        for n_calls in range(self._policy.in_flight if self._backlog else 0):
            for name, actor in able.items():
                if not self._backlog or actor.alone or len(actor.calls) != n_calls:
                    continue
                max_weight = min(bundle_weight, self._backlog.weight / n_slots)
                # No more units than were ever measured: one odd measurement cannot fill a huge call.
                units = self._backlog.take(actor.affinity, holders, max_weight, max(1, self._n_done))
                holders.subtract([actor.affinity])
                calls.append(self._send(name, units, now_s))
                holders.update([actor.affinity])
        idle = [name for name, actor in able.items() if not actor.calls]
        for name, unit in zip(idle, self._late(now_s), strict=False):
            self._copies[unit.key] += 1
            calls.append(self._send(name, [unit], now_s, "copy"))
        return calls

    def release(self, now_s: float) -> list[str]:
        """Actors to let go of, which is reported back by `actor_left(…, "released")`.

        Those on draining nodes that have ended a call since, or run none; those that no waiting unit can use, and that
        run nothing but what has ended elsewhere. Where units in flight might need copies, as many stay for `idle_s`.
        """
        over = [name for name, a in self._actors.items() if a.draining and (a.spent or not a.calls)]
        waits = not self.stopped and (self._backlog or self._touched)
        if waits:
            retiring = self._retiring(now_s)
            return over + [name for name in [retiring] if name and not self._actors[name].calls]
        idle = [name for name, actor in self._able().items() if not self._awaited(name, actor)]
        kept: list[str] = []
        if self._solo and not self.stopped:
            kept = [name for name in idle if self._actors[name].fresh][: len(self._solo)]
        elif idle and not self.stopped:
            young = [name for name in idle if now_s < self._actors[name].since_s + self._policy.idle_s]
            kept = young[: sum(self._may_copy(key) for key in self._live)]
        return over + [name for name in idle if name not in kept]

    def actor_joined(self, actor_id: str, now_s: float) -> None:
        """An actor has started and can take calls. Raises `StageError` where its id was used before."""
        if actor_id in self._actors or actor_id in self._left:
            raise StageError(f"actor {actor_id!r} joined twice; every start needs an id of its own.")
        self._actors[actor_id] = Actor(now_s)
        self._most_actors = max(self._most_actors, len(self._actors))
        self._start_losses.clear()
        self._pace.start(now_s)

    def actor_draining(self, actor_id: str) -> None:
        """The actor's node will be gone soon; saying it twice, or of an actor that is not here, changes nothing."""
        if actor := self._actors.get(actor_id):
            actor.draining = True

    def actor_left(self, actor_id: str, cause: Cause, now_s: float, detail: str = "") -> list[str]:
        """An actor is gone, or could not start; leaving twice changes nothing.

        Args:
            actor_id: the actor, whether it has joined or not.
            cause: `preempted` for whatever befell the node, `died` for whatever befell the process, `start_failed`
                where it said itself that it cannot start.
            now_s: time of the report.
            detail: the error, for the reasons given to people.

        Returns:
            Keys of the units that were in flight there alone and wait again, in the order in which they were sent.
        """
        if actor_id in self._left:
            return []
        self._left.add(actor_id)
        killed = cause in ("died", "start_failed")
        actor = self._actors.pop(actor_id, None)
        if actor is None:
            if killed:
                self._start_losses[cause] += 1
                self._start_failed_s = now_s
            if self._cannot_start and not self._actors:
                self._stop(f"{self._start_losses.total()} actors in a row could not start", detail)
            return []
        if not self._actors:
            self._start_losses.clear()  # the next starts are judged by themselves
        for call_id in actor.calls:
            del self._calls[call_id]
        lost = [key for call in actor.calls.values() for key in call.keys if actor_id in self._at(key)]
        alone = [key for key in lost if len(self._live[key]) == 1]
        for key in lost:
            self._live[key].remove(actor_id)
            if killed:
                self._quarantine.died(key, solo=actor.solo)
                for other in self._live[key]:
                    self._actors[other].alone = True
        # Units without a death go back to the front of the queue one by one, so backwards.
        for key in alone if killed else reversed(alone):
            del self._live[key]
            self._wait_again(self._units[key], detail)
        self._settle()
        if lost and cause != "released":
            self._fruitless[cause] += 1
        n_lost = self._fruitless.total()
        if n_lost >= max(self._policy.fruitless_losses, 3 * self._most_actors):
            causes = ", ".join(f"{n} {cause}" for cause, n in sorted(self._fruitless.items()))
            self._stop(f"{n_lost} busy actors were lost in a row ({causes}) and no unit ended meanwhile", detail)
        return [key for key in alone if key not in self._quarantine.condemned and key not in self.quarantined]

    def unit_done(self, key: str, seconds: float, now_s: float) -> None:
        """A unit is committed, by whichever actor, even one thought dead; a unit that has ended ignores it.

        Raises `StageError` where the stage has no such unit, or `seconds` is negative or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise StageError(f"unit {key!r} reports {seconds} seconds; a finite number of at least 0 is expected.")
        if self._end(key, now_s):
            self._n_done += 1
            self._pace.measured(seconds, self._units[key].weight)

    def unit_failed(self, key: str, reason: str, now_s: float) -> None:
        """A unit raised and is never tried again; one that has ended ignores it. Raises `StageError` if unknown."""
        if self._end(key, now_s):
            self.failed[key] = reason

    def call_done(self, call_id: int, now_s: float) -> None:
        """A call has returned. Units of which nobody reported anything fail; a call that is not live is ignored."""
        actor_id = self._calls.pop(call_id, None)
        if actor_id is None:
            return
        actor = self._actors[actor_id]
        call = actor.calls.pop(call_id)
        actor.since_s = now_s
        actor.spent = actor.draining
        if not actor.calls:
            actor.alone = actor.solo = False
        for key in call.keys:
            if actor_id in self._at(key):
                self._live[key].remove(actor_id)
                if not self._live[key]:
                    self.unit_failed(key, "its call returned without a word about it", now_s)

    def _at(self, key: str) -> list[str]:
        """The actors at which a unit is in flight."""
        return self._live.get(key, [])

    @property
    def _cannot_start(self) -> bool:
        """Whether so many starts in a row came to nothing that it must have a reason."""
        lost = self._start_losses
        return lost["start_failed"] >= self._policy.start_failures or lost.total() >= self._policy.start_deaths

    def _awaited(self, name: str, actor: Actor) -> bool:
        """Whether anything that the actor runs has not ended elsewhere."""
        return any(name in self._at(key) for call in actor.calls.values() for key in call.keys)

    def _able(self) -> dict[str, Actor]:
        """The actors that can be sent something."""
        return {name: actor for name, actor in self._actors.items() if not actor.draining}

    def _send(self, actor_id: str, units: list[Unit], now_s: float, how: Manner = "shared") -> Call:
        call = Call(self._n_calls, actor_id, tuple(unit.key for unit in units), how == "copy")
        self._n_calls += 1
        self._calls[call.call_id] = actor_id
        for key in call.keys:
            self._live.setdefault(key, []).append(actor_id)
        actor = self._actors[actor_id]
        if not actor.calls:
            actor.since_s = now_s
        actor.calls[call.call_id] = call
        actor.fresh, actor.alone, actor.solo, actor.affinity = False, how != "shared", how == "solo", units[-1].affinity
        return call

    def _may_copy(self, key: str) -> bool:
        untouched = not self._quarantine.has_died(key)
        return untouched and len(self._at(key)) == 1 and self._copies[key] < self._policy.copies

    def _late(self, now_s: float) -> list[Unit]:
        """Units that deserve a copy, where nothing waits: their call should have returned long ago."""
        s_per_weight = self._pace.s_per_weight
        if self.n_waiting or s_per_weight is None or self._pace.n_measured < _N_TRUSTED:
            return []
        late = []
        for actor in self._actors.values():
            expected_s = 0.0
            for call in actor.calls.values():
                expected_s += s_per_weight * sum(self._units[key].weight for key in call.keys)
                if now_s - actor.since_s <= max(self._policy.copy_factor * expected_s, self._policy.copy_after_s):
                    break
                late += [self._units[key] for key in call.keys if self._may_copy(key)]
        return late

    def _retiring(self, now_s: float) -> str | None:
        """The actor to empty where a unit waits for a fresh one and none is idle or to be had: the least busy."""
        able = self._able()
        if not self._solo or self._start_losses or any(actor.fresh for actor in able.values()):
            return None
        if len(able) < self.wanted_actors(now_s):
            return None
        return min(able, key=lambda name: len(able[name].calls), default=None)

    def _wait_again(self, unit: Unit, detail: str) -> None:
        match self._quarantine.next_place(unit.key, detail):
            case "anywhere":
                self._backlog.add(unit, last=False)
            case "alone":
                self._touched[unit.key] = unit
            case "fresh":
                self._solo[unit.key] = unit

    def _end(self, key: str, now_s: float) -> bool:
        """Takes a unit out of wherever it is; false where it has ended before."""
        if key not in self._units:
            raise StageError(f"the stage has no unit {key!r}.{nearest(key, self._units)}")
        if key not in self._open:
            return False
        unit = self._units[key]
        self._open.discard(key)
        self._backlog.discard(unit)
        for place in (self._live, self._touched, self._solo, self._quarantine.condemned):
            place.pop(key, None)
        self._open_weight -= unit.weight
        self._pace.ended(unit.weight, now_s)
        self._quarantine.n_survivors += 1  # one that raised as well: its actor lived to tell
        self._fruitless.clear()
        self._settle()
        return True

    def _settle(self) -> None:
        """Quarantines condemned units once others survive; stops where nothing is left that could."""
        condemned = self._quarantine.condemned
        if not condemned:
            return
        none_left = not (self.n_waiting or self._live)
        if none_left and self._quarantine.n_survivors == 0:
            key, reason = next(iter(condemned.items()))
            return self._stop(f"no unit survives, so it is the cluster or the code; {key!r}: {reason}")
        for key in self._quarantine.settle(none_left) if not self.stopped else []:
            self._open.discard(key)
            self._open_weight -= self._units[key].weight

    def _stop(self, reason: str, detail: str = "") -> None:
        if not self.stopped and not self.done:
            self.stopped = f"{reason}; the last: {detail}" if detail else reason
