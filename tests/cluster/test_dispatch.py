"""The dispatcher's decisions, against a simulated cluster that keeps its own books."""

import heapq
import itertools
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyray.cluster.dispatch import Call, Cause, Dispatcher, Policy, Unit
from polyray.errors import ConfigError, StageError


@dataclass(frozen=True)
class World:
    """What befalls the simulated cluster; every chance is per unit run or per start."""

    seed: int = 0
    died: float = 0.0
    preempted: float = 0.0
    start_fails: float = 0.0
    late: float = 0.0  # that an actor's last unit is reported after its loss
    echo: float = 0.0  # that an old answer comes again
    silent_frac: float = 0.0  # that a call forgets to report a unit
    slow: float = 0.0  # that a unit takes a hundred times as long
    drains: float = 0.0  # that an actor's node is given notice, and is gone `NOTICE_S` later
    poison: frozenset[str] = frozenset()
    raising: frozenset[str] = frozenset()
    capacity: int = 99  # actors the cluster can hold


NOTICE_S = 30.0


@dataclass
class Worker:
    """A simulated actor: its calls in the order in which it runs them."""

    calls: list[Call] = field(default_factory=list)
    n_sent: int = 0
    since_s: float = 0.0  # when it began the first of its calls
    draining: bool = False
    n_ended: int = 0  # calls that ended since the notice


class Simulation:
    """Runs a dispatcher to its end on a simulated clock, and checks every decision as it is made."""

    def __init__(self, units: list[Unit], policy: Policy, world: World) -> None:
        self.dispatcher = Dispatcher(units, policy)
        self.policy, self.world, self.rng = policy, world, random.Random(world.seed)
        self.units = {u.key: u for u in units}
        self.now_s = 0.0
        self.events: list[tuple[float, int, str, tuple]] = []
        self.order = itertools.count()
        self.n_events = self.n_starts = 0
        self.workers: dict[str, Worker] = {}
        self.starting: set[str] = set()
        self.live: dict[str, list[Call]] = {}
        self.ended: dict[str, str] = {}
        self.deaths = dict.fromkeys(self.units, 0)  # of actors that ran other things too
        self.solo_deaths = dict.fromkeys(self.units, 0)
        self.n_copies = dict.fromkeys(self.units, 0)
        self.solo_calls: set[int] = set()
        self.dead_calls: list[Call] = []
        self.trace: list[Call] = []

    def run(self, max_events: int = 20_000) -> "Simulation":
        n_waits = 0
        while not self.dispatcher.done and self.dispatcher.stopped is None:
            self._drive()
            self._check_progress()
            if not self.events:
                n_waits += 1
                assert n_waits < 5, "nothing is under way, and the dispatcher asks for nothing"
                self.now_s += 60.0
                continue
            n_waits = 0
            self.now_s, _, kind, args = heapq.heappop(self.events)
            getattr(self, f"_on_{kind}")(*args)
            self.n_events += 1
            assert self.n_events < max_events, "does not end"
        self._check_end()
        return self

    def _at(self, delay_s: float, kind: str, *args: object) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.order), kind, args))

    def _drive(self) -> None:
        d = self.dispatcher
        for actor in d.release(self.now_s):
            worker = self.workers.pop(actor)
            mine = self._forget(worker.calls)
            assert not mine or worker.n_ended, "an actor was let go whose units are awaited"
            assert set(d.actor_left(actor, "released", self.now_s)) == {k for k in mine if k not in self.live}
            self.dead_calls += worker.calls
        wanted = d.wanted_actors(self.now_s)
        assert 0 <= wanted <= self.policy.max_actors
        n_here = sum(not w.draining for w in self.workers.values()) + len(self.starting)
        for _ in range(min(wanted, self.world.capacity) - n_here):
            name = f"a{self.n_starts}"
            self.n_starts += 1
            self.starting.add(name)
            self._at(self.rng.uniform(1, 3), "start", name)
        for call in d.assign(self.now_s):
            self._check_call(call)
            worker = self.workers[call.actor_id]
            worker.calls.append(call)
            worker.n_sent += 1
            self.trace.append(call)
            for key in call.keys:
                self.live.setdefault(key, []).append(call)
            if len(worker.calls) == 1:
                worker.since_s = self.now_s
                self._at(self._seconds(call.keys[0]), "unit", call, 0)
        idle = [name for name, w in self.workers.items() if not w.calls and not w.draining]
        waiting = self._waiting()
        n_ordinary = sum(self.deaths[key] < self.policy.shared_deaths for key in waiting)
        n_draining = n_ordinary < len(waiting)
        assert not n_ordinary or len(idle) <= n_draining, f"work waits while {idle} idle"

    def _waiting(self) -> list[str]:
        """Units that could be sent to some actor."""
        most = self.policy.solo_deaths
        return [k for k in self.units if k not in self.live and k not in self.ended and self.solo_deaths[k] < most]

    def _check_call(self, call: Call) -> None:
        worker = self.workers[call.actor_id]
        assert call.keys
        assert not worker.draining
        assert len(worker.calls) < self.policy.in_flight
        for key in call.keys:
            assert key not in self.ended, "ended, and sent again"
            if call.is_copy:
                self._check_copy(call)
            else:
                assert key not in self.live, "in flight twice, and not as a copy"
            if self.deaths[key]:
                assert call.keys == (key,), "a unit that killed shares a call"
                assert not worker.calls, "a unit that killed shares an actor"
            if self.deaths[key] >= self.policy.shared_deaths:
                assert worker.n_sent == 0, "the actor is not fresh"
                self.solo_calls.add(call.call_id)
        alone = [other for other in worker.calls if other.is_copy or any(self.deaths[key] for key in other.keys)]
        assert not alone, "joined a copy or a unit that killed"

    def _check_copy(self, call: Call) -> None:
        (key,) = call.keys
        (first,) = self.live[key]
        self.n_copies[key] += 1
        assert first.actor_id != call.actor_id
        assert not self._waiting(), "a copy was sent while units wait"
        assert not self.workers[call.actor_id].calls
        assert self.deaths[key] == 0
        assert self.n_copies[key] <= self.policy.copies
        assert self.now_s - self.workers[first.actor_id].since_s > self.policy.copy_after_s

    def _forget(self, calls: list[Call]) -> list[str]:
        """Units of calls that will never return, one by one out of flight."""
        lost = [key for call in calls for key in call.keys if call in self.live.get(key, [])]
        for key in lost:
            self.live[key] = [c for c in self.live[key] if c not in calls]
            if not self.live[key]:
                del self.live[key]
        return lost

    def _check_progress(self) -> None:
        progress = self.dispatcher.progress(self.now_s)
        outcomes = list(self.ended.values())
        assert progress.n_done == outcomes.count("done")
        assert progress.n_failed == outcomes.count("failed") == len(self.dispatcher.failed)
        assert progress.n_total == len(self.units)
        assert progress.units_per_s >= 0
        assert progress.eta_s is None or progress.eta_s >= 0

    def _check_end(self) -> None:
        d = self.dispatcher
        assert set(d.failed) == {key for key, outcome in self.ended.items() if outcome == "failed"}
        assert not set(d.quarantined) & set(self.ended)
        shared, solo = self.policy.shared_deaths, self.policy.solo_deaths
        assert all(self.solo_deaths[key] == solo for key in d.quarantined)
        assert all(n <= solo for n in self.solo_deaths.values())
        # A unit and its copy may both be in flight when the one before the last death happens.
        assert all(n <= shared + (self.n_copies[key] > 0) for key, n in self.deaths.items())
        if d.stopped is None:
            assert set(self.units) == set(self.ended) | set(d.quarantined)
        else:
            assert not d.done
        assert d.wanted_actors(self.now_s) == 0
        assert d.assign(self.now_s) == []
        awaited = {call.actor_id for calls in self.live.values() for call in calls}
        over = [name for name, w in self.workers.items() if not w.draining and name not in awaited]
        over += [name for name, w in self.workers.items() if w.draining and (w.n_ended or not w.calls)]
        assert sorted(d.release(self.now_s)) == sorted(over)

    def _seconds(self, key: str) -> float:
        slow = 100 if self.rng.random() < self.world.slow else 1
        return self.units[key].weight * self.rng.uniform(0.5, 1.5) * slow

    def _end(self, key: str, outcome: str) -> None:
        if outcome == "done":
            self.dispatcher.unit_done(key, self._seconds(key), self.now_s)
        else:
            self.dispatcher.unit_failed(key, "ValueError", self.now_s)
        if key not in self.dispatcher.quarantined:
            self.ended.setdefault(key, outcome)
        self.live.pop(key, None)

    def _on_notice_over(self, name: str) -> None:
        if name in self.workers:
            running = self.workers[name].calls  # never empty: an idle actor is let go at once
            self._lose(name, "preempted", running[0].keys[0])

    def _on_start(self, name: str) -> None:
        self.starting.remove(name)
        if self.rng.random() < self.world.start_fails:
            self.dispatcher.actor_left(name, "start_failed", self.now_s, "RuntimeError: no weights")
            return
        self.workers[name] = Worker()
        self.dispatcher.actor_joined(name, self.now_s)

    def _on_unit(self, call: Call, idx: int) -> None:
        worker = self.workers.get(call.actor_id)
        if worker is None:
            return None
        key, world = call.keys[idx], self.world
        if key in world.poison or self.rng.random() < world.died:
            return self._lose(call.actor_id, "died", key)
        if self.rng.random() < world.preempted:
            return self._lose(call.actor_id, "preempted", key)
        if not worker.draining and self.rng.random() < world.drains:
            worker.draining = True
            self.dispatcher.actor_draining(call.actor_id)
            self._at(NOTICE_S, "notice_over", call.actor_id)
        if self.rng.random() >= world.silent_frac:
            self._end(key, "failed" if key in world.raising else "done")
        if self.rng.random() < world.echo:
            self._echo()
        if idx + 1 < len(call.keys):
            return self._at(self._seconds(call.keys[idx + 1]), "unit", call, idx + 1)
        self.dispatcher.call_done(call.call_id, self.now_s)
        for silent in self._forget([call]):
            if silent not in self.live:
                self.ended[silent] = "failed"
        worker.calls.remove(call)
        worker.since_s = self.now_s
        worker.n_ended += worker.draining
        self.dead_calls.append(call)
        if worker.calls:
            self._at(self._seconds(worker.calls[0].keys[0]), "unit", worker.calls[0], 0)
        return None

    def _on_late(self, key: str, call: Call) -> None:
        self._end(key, "done")
        self.dispatcher.call_done(call.call_id, self.now_s)

    def _echo(self) -> None:
        """Old answers come again, and contradict what was said before."""
        if not self.ended:
            return
        key = self.rng.choice(list(self.ended))
        self.dispatcher.unit_done(key, 1e6, self.now_s)
        self.dispatcher.unit_failed(key, "again", self.now_s)
        if self.dead_calls:
            self.dispatcher.call_done(self.rng.choice(self.dead_calls).call_id, self.now_s)

    def _lose(self, name: str, cause: Cause, key: str) -> None:
        calls = self.workers.pop(name).calls
        lost = self._forget(calls)
        if cause == "died":
            for k in lost:
                (self.solo_deaths if calls[0].call_id in self.solo_calls else self.deaths)[k] += 1
        again = self.dispatcher.actor_left(name, cause, self.now_s, "SIGKILL")
        waiting = self._waiting()
        assert again == [k for k in lost if k in waiting]
        assert self.dispatcher.actor_left(name, "died", self.now_s) == []
        self.dead_calls += calls
        if self.rng.random() < self.world.late and key not in self.world.poison:
            self._at(self.rng.uniform(0, 5), "late", key, calls[0])


def stage(n: int, *, layers: int = 1, weight: float = 1.0) -> list[Unit]:
    return [Unit(f"u{i}", weight, f"layer{i * layers // n}") for i in range(n)]


def started(units: list[Unit], policy: Policy, n_actors: int) -> Dispatcher:
    d = Dispatcher(units, policy)
    for i in range(n_actors):
        d.actor_joined(f"a{i}", 0.0)
    return d


def finish(d: Dispatcher, call: Call, seconds: float = 1.0, now_s: float = 1.0) -> None:
    for key in call.keys:
        d.unit_done(key, seconds, now_s)
    d.call_done(call.call_id, now_s)


policies = st.builds(
    Policy,
    max_actors=st.integers(2, 6),
    min_actors=st.integers(1, 2),
    in_flight=st.integers(1, 3),
    bundle_s=st.sampled_from([0.5, 3.0, 20.0]),
    shared_deaths=st.sampled_from([1, 3]),
    copies=st.integers(0, 2),
    idle_s=st.sampled_from([0.0, 30.0]),
)
chance = st.sampled_from([0.0, 0.02, 0.2])
worlds = st.builds(
    World,
    seed=st.integers(0, 2**32 - 1),
    died=chance,
    preempted=chance,
    start_fails=st.sampled_from([0.0, 0.3]),
    late=st.sampled_from([0.0, 0.5]),
    echo=chance,
    silent_frac=st.sampled_from([0.0, 0.05]),
    slow=chance,
    drains=chance,
    poison=st.frozensets(st.sampled_from([f"u{i}" for i in range(0, 60, 7)]), max_size=3),
    raising=st.frozensets(st.sampled_from([f"u{i}" for i in range(3, 60, 7)]), max_size=3),
    capacity=st.sampled_from([1, 3, 99]),
)


@settings(max_examples=250, deadline=None)
@given(n=st.integers(1, 60), layers=st.integers(1, 4), policy=policies, world=worlds)
@example(n=60, layers=3, policy=Policy(max_actors=1), world=World(died=0.3, preempted=0.3, late=1.0, echo=0.3))
@example(
    n=40,
    layers=1,
    policy=Policy(max_actors=5, shared_deaths=1),
    world=World(died=0.1, slow=0.2, drains=0.1, poison=frozenset({"u35"}), capacity=4),
)
def test_every_unit_ends_once_whatever_happens(n: int, layers: int, policy: Policy, world: World) -> None:
    Simulation(stage(n, layers=layers), policy, world).run()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), policy=policies)
def test_preemption_never_counts(seed: int, policy: Policy) -> None:
    policy = replace(policy, shared_deaths=1, solo_deaths=1, fruitless_losses=1000)
    simulation = Simulation(stage(25, layers=2), policy, World(seed=seed, preempted=0.5)).run()
    assert simulation.dispatcher.stopped is None
    assert set(simulation.ended.values()) == {"done"}


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), policy=policies, poison=st.sets(st.integers(0, 39), min_size=1, max_size=3))
def test_poison_is_quarantined_and_nothing_else(seed: int, policy: Policy, poison: set[int]) -> None:
    world = World(seed=seed, poison=frozenset(f"u{i}" for i in poison), preempted=0.02)
    simulation = Simulation(stage(40), policy, world).run()
    assert simulation.dispatcher.stopped is None
    assert set(simulation.dispatcher.quarantined) == world.poison
    for key, reason in simulation.dispatcher.quarantined.items():
        n_shared = simulation.deaths[key]
        assert n_shared == policy.shared_deaths
        assert f"{n_shared + 3} actors died with it, 3 of them fresh" in reason
    assert set(simulation.ended.values()) == {"done"}


@pytest.mark.parametrize("n", [1, 3, 200])
@pytest.mark.parametrize("max_actors", [1, 4])
def test_where_every_unit_kills_the_stage_stops_and_says_why(n: int, max_actors: int) -> None:
    world = World(poison=frozenset(f"u{i}" for i in range(n)))
    simulation = Simulation(stage(n), Policy(max_actors=max_actors), world).run(max_events=500)
    assert simulation.dispatcher.quarantined == {}
    expected = "no unit survives" if n <= 3 else "30 busy actors were lost in a row (30 died)"
    assert expected in (simulation.dispatcher.stopped or "")
    assert "SIGKILL" in (simulation.dispatcher.stopped or "")


def test_endless_preemption_stops_with_its_own_reason() -> None:
    simulation = Simulation(stage(5), Policy(max_actors=2), World(preempted=1.0)).run(max_events=500)
    assert "30 busy actors were lost in a row (30 preempted)" in (simulation.dispatcher.stopped or "")
    assert not any(simulation.deaths.values())


def test_losing_all_of_a_large_cluster_twice_is_no_reason_to_stop() -> None:
    d = started(stage(500), Policy(max_actors=100, fruitless_losses=5), 0)
    for wave in range(3):
        names = [f"w{wave}a{i}" for i in range(100)]
        for name in names:
            d.actor_joined(name, wave)
        d.assign(wave)
        assert d.stopped is None
        for name in names:
            d.actor_left(name, "preempted", wave)
    assert "300 busy actors" in (d.stopped or "")


def test_one_poison_unit_does_not_take_its_bundle_along() -> None:
    simulation = Simulation(stage(300), Policy(max_actors=2, bundle_s=50), World(poison=frozenset({"u150"}))).run()
    assert max(len(call.keys) for call in simulation.trace) > 20
    assert sorted(simulation.deaths.values())[-2:] == [1, 3]


def test_the_last_unit_of_a_resumed_stage_is_quarantined_but_a_stage_of_one_stops() -> None:
    for n_committed in (0, 7):
        d = Dispatcher([Unit("u0")], Policy(max_actors=1), n_committed=n_committed)
        for i in range(6):
            assert d.wanted_actors(i) == 1
            d.actor_joined(f"a{i}", i)
            (call,) = d.assign(i)
            assert call.keys == ("u0",)
            assert d.actor_left(f"a{i}", "died", i, "exit 139") == (["u0"] if i < 5 else [])
        assert d.done == (n_committed > 0)
        assert (d.stopped is None) == (n_committed > 0)
        assert "exit 139" in (d.stopped or d.quarantined["u0"])


def test_quarantine_waits_for_another_unit_to_survive() -> None:
    d = started([Unit("bad"), Unit("slow")], Policy(max_actors=2, in_flight=1), 2)
    d.assign(0.0)
    d.actor_left("a0", "died", 0.0)
    for i in range(2, 7):
        d.actor_joined(f"a{i}", i)
        assert [call.keys for call in d.assign(i)] == [("bad",)]
        d.actor_left(f"a{i}", "died", i)
    assert d.quarantined == {}
    assert not d.done
    assert d.stopped is None
    assert d.assign(7.0) == []
    assert d.wanted_actors(7.0) == 1  # "slow" is still running
    d.unit_done("slow", 5.0, 8.0)
    assert list(d.quarantined) == ["bad"]
    assert d.done


def test_quarantine_comes_as_soon_as_another_unit_survives() -> None:
    d = started(
        [Unit("bad", affinity="layer0"), *stage(9)],
        Policy(max_actors=2, in_flight=1, shared_deaths=1, solo_deaths=1),
        2,
    )
    calls = d.assign(0.0)
    assert [c.keys for c in calls] == [("bad",), ("u0",)]
    d.actor_left("a0", "died", 0.0)
    d.actor_joined("a2", 1.0)
    d.assign(1.0)
    d.actor_left("a2", "died", 1.0)
    assert d.quarantined == {}
    d.unit_failed("u0", "ValueError", 2.0)  # its actor survived it
    assert list(d.quarantined) == ["bad"]
    assert not d.done


def test_deaths_before_it_went_solo_need_a_survivor_of_their_own() -> None:
    d = started(
        [Unit("bad", affinity="layer0"), *stage(3)],
        Policy(max_actors=2, in_flight=1, shared_deaths=1, solo_deaths=2),
        2,
    )
    calls = d.assign(0.0)
    finish(d, calls[1])  # survives before "bad" has killed anyone: says nothing about what happens later
    d.assign(0.0)
    d.actor_left("a0", "died", 0.0)
    for i in (2, 3):
        d.actor_joined(f"a{i}", i)
        assert ("bad",) in [c.keys for c in d.assign(i)]
        d.actor_left(f"a{i}", "died", i)
    assert d.quarantined == {}
    d.unit_done("u1", 1.0, 4.0)
    assert list(d.quarantined) == ["bad"]


def test_a_late_answer_frees_a_condemned_unit_and_comes_too_late_after_quarantine() -> None:
    policy = Policy(max_actors=2, in_flight=1, shared_deaths=1, solo_deaths=1)
    for rescued in (True, False):
        d = started([Unit("bad"), Unit("slow")], policy, 2)
        d.assign(0.0)
        d.actor_left("a0", "died", 0.0)
        d.actor_joined("a2", 1.0)
        d.assign(1.0)
        d.actor_left("a2", "died", 1.0)
        for key in ("bad", "slow") if rescued else ("slow", "bad"):
            d.unit_done(key, 1.0, 2.0)
        assert list(d.quarantined) == ([] if rescued else ["bad"])
        assert d.progress(3.0).n_done == (2 if rescued else 1)
        assert d.done


def test_an_actor_is_drained_where_a_unit_needs_a_fresh_one_and_none_is_coming() -> None:
    d = started(stage(40), Policy(max_actors=2, in_flight=2, shared_deaths=1, bundle_s=0.5), 2)
    calls = d.assign(0.0)
    assert [(c.actor_id, c.keys) for c in calls] == [("a0", ("u0",)), ("a1", ("u1",)), ("a0", ("u2",)), ("a1", ("u3",))]
    assert d.actor_left("a0", "died", 0.0) == ["u0", "u2"]
    finish(d, calls[1])
    assert [c.keys for c in d.assign(1.0)] == [("u4",)]  # a place is free, a fresh actor will come: a1 goes on
    d.actor_joined("a2", 1.0)
    (solo,) = d.assign(1.0)
    assert (solo.actor_id, solo.keys) == ("a2", ("u0",))
    assert d.wanted_actors(1.0) == 2
    assert d.release(1.0) == []
    finish(d, solo)
    # u0 survived. u2 still needs a fresh actor, but both are used and the pool is full: the less busy one goes.
    assert d.assign(2.0) == []
    assert d.release(2.0) == ["a2"]
    d.actor_left("a2", "released", 2.0)
    finish(d, calls[3])
    assert [(c.actor_id, c.keys) for c in d.assign(2.0)] == [("a1", ("u5",))]
    assert d.wanted_actors(2.0) == 2
    d.actor_joined("a3", 3.0)
    (solo,) = d.assign(3.0)
    assert (solo.actor_id, solo.keys) == ("a3", ("u2",))
    finish(d, solo)
    assert [c.actor_id for c in d.assign(3.0)] == ["a3", "a3"]  # none waits any more: a3 joins in


def test_no_actor_is_drained_while_starts_fail() -> None:
    d = started(stage(9), Policy(max_actors=2, in_flight=1, shared_deaths=1, start_failures=2), 2)
    _, ordinary = d.assign(0.0)
    d.actor_left("a0", "died", 0.0)
    assert d.wanted_actors(0.0) == 2
    d.actor_left("s0", "start_failed", 0.0)
    d.actor_left("s1", "start_failed", 0.0)
    assert d.wanted_actors(0.0) == 1  # growth pauses; u0, which needs a fresh actor, must not cost the last one
    finish(d, ordinary)
    assert d.release(1.0) == []
    assert [c.actor_id for c in d.assign(1.0)] == ["a1"]


def test_bundles_start_with_one_unit_and_reach_the_target() -> None:
    d = started(stage(2000, weight=2.0), Policy(max_actors=1, in_flight=1, bundle_s=5.0), 1)
    sizes = []
    for _ in range(6):
        (call,) = d.assign(0.0)
        sizes.append(len(call.keys))
        finish(d, call, seconds=0.5)  # 0.25 s per weight: 10 units are 5 s
    assert sizes == [1, 1, 2, 4, 8, 10]


def test_the_estimate_shrugs_off_odd_measurements_and_follows_a_lasting_change() -> None:
    d = started(stage(5000), Policy(max_actors=1, in_flight=1, bundle_s=10.0), 1)
    sizes = []
    for i in range(30):
        (call,) = d.assign(0.0)
        sizes.append(len(call.keys))
        for j, key in enumerate(call.keys):
            seconds = 1.0 if i < 20 else 2.0
            d.unit_done(key, 1000.0 if j % 5 == 4 else seconds, 1.0)
        d.call_done(call.call_id, 1.0)
    assert sizes[10:20] == [10] * 10
    assert sizes[-5:] == [5] * 5


def test_a_heavy_unit_still_travels_and_weights_count() -> None:
    units = [Unit("a", 1.0), Unit("b", 1.0), Unit("heavy", 100.0), *(Unit(f"c{i}", 1.0) for i in range(900))]
    d = started(units, Policy(max_actors=1, in_flight=1, bundle_s=10.0), 1)
    calls = []
    for _ in range(5):
        (call,) = d.assign(0.0)
        calls.append(call.keys)
        for key in call.keys:
            d.unit_done(key, 100.0 if key == "heavy" else 1.0, 1.0)
        d.call_done(call.call_id, 1.0)
    assert calls[:3] == [("a",), ("b",), ("heavy",)]
    assert [len(keys) for keys in calls[3:]] == [3, 6]


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_the_tail_is_shared_fairly(in_flight: int) -> None:
    n_actors, n_units = 4, 1000
    d = started(stage(n_units), Policy(max_actors=n_actors, in_flight=in_flight, bundle_s=100.0), n_actors)
    clock = dict.fromkeys((f"a{i}" for i in range(n_actors)), 0.0)
    queues: dict[str, list[Call]] = {name: [] for name in clock}
    while not d.done:
        waiting = len(d._backlog)
        for call in d.assign(0.0):
            assert len(call.keys) <= max(1, waiting / n_actors)
            queues[call.actor_id].append(call)
        name = min((n for n in queues if queues[n]), key=lambda n: clock[n] + len(queues[n][0].keys))
        call = queues[name].pop(0)
        clock[name] += len(call.keys)
        finish(d, call, seconds=1.0)
    assert sum(clock.values()) == n_units
    assert max(clock.values()) <= n_units / n_actors + in_flight


def test_idle_actors_get_a_call_before_busy_ones_get_a_second() -> None:
    d = started(stage(5), Policy(max_actors=3, in_flight=2), 3)
    assert [call.actor_id for call in d.assign(0.0)] == ["a0", "a1", "a2", "a0", "a1"]


def test_affinity_keeps_layers_together_and_leaves_nobody_idle() -> None:
    layers = 3
    d = started(stage(90, layers=layers), Policy(max_actors=3, in_flight=1, bundle_s=1.0), 3)
    seen: dict[str, list[str]] = {}
    while not d.done:
        calls = d.assign(0.0)
        for call in calls:
            seen.setdefault(call.actor_id, []).extend(d._units[key].affinity or "" for key in call.keys)
        for call in calls:
            finish(d, call)
    assert [set(layers_of) for layers_of in seen.values()] == [{"layer0"}, {"layer1"}, {"layer2"}]
    d = started([Unit(f"u{i}", affinity="only") for i in range(30)], Policy(max_actors=3, in_flight=1), 3)
    assert len(d.assign(0.0)) == 3
    d = started([*stage(2, layers=2), Unit("free")], Policy(max_actors=1, in_flight=3), 1)
    assert [call.keys for call in d.assign(0.0)] == [("u0",), ("u1",), ("free",)]


def test_a_bundle_crosses_layers_rather_than_stay_small() -> None:
    d = started([Unit(f"u{i}", affinity=f"layer{i}") for i in range(100)], Policy(max_actors=1, in_flight=1), 1)
    for _ in range(4):
        (call,) = d.assign(0.0)
        finish(d, call, seconds=0.1)
    assert len(call.keys) == 4


def test_wanted_actors_follow_the_backlog() -> None:
    policy = Policy(max_actors=8, min_actors=2, in_flight=1, bundle_s=10.0)
    d = Dispatcher(stage(100), policy)
    assert d.wanted_actors(0.0) == 8  # nothing measured: as many as there may be
    d.actor_joined("a0", 0.0)
    (call,) = d.assign(0.0)
    finish(d, call, seconds=0.5)
    assert d.wanted_actors(1.0) == 5  # 99 units of 0.5 s in bundles of 10 s
    assert Dispatcher(stage(1), policy).wanted_actors(0.0) == 1  # never more than units wait
    assert Dispatcher([], policy).wanted_actors(0.0) == 0
    for i in range(40):
        (call,) = d.assign(1.0)
        finish(d, call, seconds=0.001)
        if d.progress(1.0).n_done > 90 or i > 20:
            break
    assert d.wanted_actors(1.0) == 2  # milliseconds remain: the minimum


def test_wanted_actors_count_the_busy_and_add_one_for_a_unit_that_needs_its_own() -> None:
    d = started(stage(4), Policy(max_actors=8, in_flight=1, shared_deaths=1), 3)
    calls = d.assign(0.0)
    assert [c.keys for c in calls] == [("u0",), ("u1",), ("u2",)]
    d.unit_done("u0", 0.001, 1.0)  # milliseconds remain, but three calls have not returned and u3 waits
    assert d.wanted_actors(1.0) == 3
    d.call_done(calls[0].call_id, 1.0)
    assert [c.keys for c in d.assign(1.0)] == [("u3",)]
    d.actor_left("a1", "died", 1.0)
    assert d.wanted_actors(1.0) == 3  # u2 and u3 run, u1 needs an actor of its own
    d.actor_joined("a3", 1.0)
    assert [c.keys for c in d.assign(1.0)] == [("u1",)]
    assert d.wanted_actors(1.0) == 3


def test_idle_actors_are_let_go_at_the_tail_and_not_asked_for_again() -> None:
    d = started(stage(3), Policy(max_actors=4, min_actors=4, in_flight=1, copies=0), 4)
    calls = d.assign(0.0)
    assert len(calls) == 3
    assert d.release(0.0) == ["a3"]
    assert d.wanted_actors(0.0) == 3
    finish(d, calls[1])
    assert d.release(0.0) == ["a1", "a3"]
    assert d.wanted_actors(0.0) == 2
    d.actor_left("a0", "preempted", 1.0)  # its unit comes back: they are of use after all
    assert d.release(1.0) == []
    assert [call.keys for call in d.assign(1.0)] == [calls[0].keys]


# Nodes that drain


def test_an_actor_on_a_draining_node_gets_no_more_and_goes_when_a_call_ends() -> None:
    d = started(stage(40), Policy(max_actors=2, in_flight=2), 2)
    calls = d.assign(0.0)
    d.actor_draining("a0")
    d.actor_draining("a0")
    d.actor_draining("nobody")
    assert d.wanted_actors(1.0) == 2  # a0 no longer counts: one more is asked for while it still runs
    assert d.release(1.0) == []
    finish(d, calls[1], now_s=1.0)
    assert {c.actor_id for c in d.assign(1.0)} == {"a1"}
    finish(d, calls[0], now_s=2.0)
    assert d.release(2.0) == ["a0"]
    assert d.actor_left("a0", "released", 2.0) == ["u2"]  # its second call, unharmed and first in line
    d.actor_joined("a2", 3.0)
    assert d.assign(3.0)[0].keys[0] == "u2"


def test_an_idle_actor_on_a_draining_node_goes_at_once() -> None:
    d = started(stage(1), Policy(max_actors=2), 2)
    d.actor_draining("a0")
    assert d.release(0.0) == ["a0"]
    assert [c.actor_id for c in d.assign(0.0)] == ["a1"]


def test_a_unit_that_needs_a_fresh_actor_gets_none_on_a_draining_node() -> None:
    d = started(stage(30), Policy(max_actors=2, in_flight=1, shared_deaths=1), 1)
    d.assign(0.0)
    d.actor_left("a0", "died", 0.0)
    d.actor_joined("a1", 1.0)
    d.actor_draining("a1")
    assert d.assign(1.0) == []
    assert d.wanted_actors(1.0) == 2
    d.actor_joined("a2", 2.0)
    assert [(c.actor_id, c.keys) for c in d.assign(2.0)] == [("a2", ("u0",))]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), policy=policies)
def test_notices_cost_no_unit_anything_where_calls_are_shorter_than_a_drain(seed: int, policy: Policy) -> None:
    policy = replace(policy, shared_deaths=1, solo_deaths=1, bundle_s=min(policy.bundle_s, 10.0))
    simulation = Simulation(stage(60), policy, World(seed=seed, drains=0.1)).run()
    assert set(simulation.ended.values()) == {"done"}
    assert not any(simulation.deaths.values())
    assert not simulation.dispatcher._fruitless  # whoever had a notice was let go before the node was gone


# Copies of stragglers


def with_straggler(**policy: object) -> tuple[Dispatcher, Call]:
    """Eight of nine units took a second each; the ninth has been running at a0 since second 10."""
    given = {"max_actors": 3, "in_flight": 1, "bundle_s": 1.0, "copy_after_s": 4.0} | policy
    d = started(stage(9), Policy(**given), 1)  # type: ignore[arg-type]
    for i in range(8 // int(given["in_flight"])):
        for call in d.assign(float(i)):
            finish(d, call, now_s=float(i + 1))
    (call,) = d.assign(10.0)
    assert call.keys == ("u8",)
    return d, call


def test_a_straggler_is_copied_once_it_is_late_and_the_first_answer_counts() -> None:
    d, first = with_straggler()
    d.actor_joined("a1", 11.0)
    assert d.assign(14.0) == []  # neither four seconds nor three times as long as it should
    assert d.release(14.0) == []  # but a1 might be needed
    (copy,) = d.assign(14.1)
    assert (copy.actor_id, copy.keys, copy.is_copy) == ("a1", ("u8",), True)
    assert not first.is_copy
    assert d.assign(1000.0) == []  # in flight twice is enough
    assert d.wanted_actors(1000.0) == 2
    d.unit_done("u8", 1.0, 1001.0)
    d.call_done(copy.call_id, 1001.0)
    assert d.done
    assert d.release(1001.0) == ["a0", "a1"]  # nobody waits for what a0 still runs
    d.unit_done("u8", 990.0, 1002.0)
    assert d.call_done(first.call_id, 1002.0) is None
    assert d.progress(1002.0).n_done == 9


def test_what_late_means_goes_by_weight_and_by_what_runs_before() -> None:
    units = [*(Unit(f"u{i}") for i in range(6)), Unit("heavy", 10.0), Unit("behind", 1.0)]
    d = started(units, Policy(max_actors=2, in_flight=2, bundle_s=1.0, copy_after_s=0.0), 1)
    for i in range(3):
        for call in d.assign(float(i)):
            finish(d, call, now_s=float(i + 1))
    calls = d.assign(100.0)
    assert [c.keys for c in calls] == [("heavy",), ("behind",)]
    d.actor_joined("a1", 100.0)
    assert d.assign(130.0) == []  # three times ten seconds
    assert [c.keys for c in d.assign(130.1)] == [("heavy",)]
    d.actor_joined("a2", 131.0)
    assert d.assign(133.0) == []
    assert [c.keys for c in d.assign(133.1)] == [("behind",)]  # stuck behind it


def test_no_copy_while_anything_waits_or_little_was_measured() -> None:
    d, _ = with_straggler(copies=0)
    d.actor_joined("a1", 11.0)
    assert d.assign(1e6) == []
    d = started(stage(3), Policy(max_actors=3, in_flight=1), 1)
    for i in range(2):
        finish(d, d.assign(float(i))[0], now_s=i + 1.0)
    d.assign(3.0)
    d.actor_joined("a1", 4.0)
    assert d.assign(1e6) == []  # two units say little about the third
    d = started(stage(30), Policy(max_actors=2, in_flight=1, bundle_s=1.0), 2)
    for i in range(10):
        for call in d.assign(float(i)):
            if call.actor_id == "a1":
                finish(d, call, now_s=i + 1.0)
    assert all(c.keys != ("u0",) for c in d.assign(1e6))  # a0 has had u0 since the beginning, but others wait


def test_an_actor_is_asked_for_where_none_idles_for_a_late_unit() -> None:
    d, _ = with_straggler()
    assert d.wanted_actors(14.0) == 1
    assert d.wanted_actors(14.1) == 2
    d.actor_joined("a1", 20.0)
    assert [c.is_copy for c in d.assign(20.0)] == [True]
    assert d.wanted_actors(20.0) == 2


def test_idle_actors_stay_for_copies_but_not_for_ever() -> None:
    d, _ = with_straggler(idle_s=30.0, copy_factor=100.0)
    d.actor_joined("a1", 11.0)
    d.actor_joined("a2", 12.0)
    assert d.release(12.0) == ["a2"]  # one unit is in flight: one may be needed
    d.actor_left("a2", "released", 12.0)
    assert d.release(40.9) == []
    assert d.release(41.0) == ["a1"]


@pytest.mark.parametrize("cause", ["died", "preempted", "released"])
def test_the_loss_of_a_copy_or_of_the_first_leaves_the_other_in_flight(cause: Cause) -> None:
    for lost, left in (("a0", "a1"), ("a1", "a0")):
        d, _ = with_straggler(shared_deaths=2)
        d.actor_joined("a1", 11.0)
        d.assign(20.0)
        assert d.actor_left(lost, cause, 21.0) == []
        d.actor_joined("a2", 22.0)
        (again,) = d.assign(60.0) or [None]
        if cause == "died":
            assert again is None  # a unit with a death behind it is not copied
        else:
            assert again is not None
            assert again.is_copy
            d.actor_left("a2", "released", 61.0)
            d.actor_joined("a3", 62.0)
            assert d.assign(90.0) == []  # its two copies are used up
        assert d.actor_left(left, cause, 91.0) == ["u8"]
        assert d.n_waiting == 1
        d.actor_joined("a4", 92.0)
        (call,) = [c for c in d.assign(92.0) if c.keys == ("u8",)]
        assert not call.is_copy


def test_deaths_of_a_unit_and_its_copy_both_count_and_solo_deaths_are_counted_apart() -> None:
    d, _ = with_straggler(shared_deaths=1, solo_deaths=1)
    d.actor_joined("a1", 11.0)
    d.assign(20.0)
    assert d.actor_left("a1", "died", 21.0) == []
    assert d.actor_left("a0", "died", 22.0) == ["u8"]  # two deaths, none of them on a fresh actor of its own
    assert d.quarantined == {}
    d.actor_joined("a2", 23.0)
    assert [c.keys for c in d.assign(23.0)] == [("u8",)]
    d.actor_left("a2", "died", 24.0)
    assert d.quarantined == {"u8": "3 actors died with it, 1 of them fresh and its own"}


def test_a_call_that_forgets_a_unit_leaves_it_to_the_copy() -> None:
    d, first = with_straggler()
    d.actor_joined("a1", 11.0)
    (copy,) = d.assign(20.0)
    d.call_done(first.call_id, 21.0)
    assert d.failed == {}
    d.call_done(copy.call_id, 22.0)
    assert d.failed == {"u8": "its call returned without a word about it"}


def test_nothing_joins_an_actor_whose_unit_died_elsewhere() -> None:
    d, _ = with_straggler(in_flight=2)
    d.actor_joined("a1", 11.0)
    d.actor_joined("a2", 11.0)
    d.assign(20.0)
    d.actor_left("a1", "died", 21.0)
    late = Unit("late")
    d._units["late"] = late  # as a unit that another actor gave back
    d._open.add("late")
    d._backlog.add(late, last=True)
    assert [(c.actor_id, c.keys) for c in d.assign(21.0)] == [("a2", ("late",))]


def test_stragglers_hold_a_stage_up_less_with_copies() -> None:
    mean_s = {}
    for copies in (0, 2):
        policy = Policy(max_actors=6, bundle_s=3.0, copies=copies)
        runs = [Simulation(stage(120), policy, World(seed=seed, slow=0.03)).run() for seed in range(20)]
        mean_s[copies] = sum(run.now_s for run in runs) / len(runs)
        assert (sum(sum(run.n_copies.values()) for run in runs) > 0) == (copies > 0)
    assert mean_s[2] < 0.8 * mean_s[0]


def test_the_pool_grows_with_the_cluster_and_never_shrinks() -> None:
    d = started(stage(500), Policy(max_actors=2), 1)
    assert d.wanted_actors(0.0) == 2
    d.allow(5)
    assert d.wanted_actors(0.0) == 5
    d.allow(3)
    assert d.wanted_actors(0.0) == 5


def test_actors_that_are_killed_while_they_start_are_given_more_patience() -> None:
    """Whatever kills them need not be their own doing; what a start raises, the next one raises too."""
    d = Dispatcher(stage(20), Policy(max_actors=4))
    for i in range(11):
        d.actor_left(f"s{i}", "died", float(i), "killed")
        assert d.wanted_actors(float(i)) == 4
    d.actor_left("s11", "died", 11.0, "killed")
    assert d.stopped == "12 actors in a row could not start; the last: killed"

    d = Dispatcher(stage(20), Policy(max_actors=4))
    for i in range(11):
        d.actor_left(f"s{i}", "died", 0.0)
    d.actor_joined("a", 1.0)
    d.actor_left("a", "preempted", 2.0)
    for i in range(11):
        d.actor_left(f"t{i}", "died", 3.0)
    assert d.stopped is None  # not in a row
    d.actor_left("raises", "start_failed", 3.0)
    assert d.stopped == "12 actors in a row could not start"


def test_starts_that_fail_stop_the_stage_only_where_no_actor_lives() -> None:
    d = Dispatcher(stage(20), Policy(max_actors=4))
    for i in range(3):
        assert d.wanted_actors(float(i)) == 4
        d.actor_left(f"s{i}", "start_failed", float(i), f"OSError {i}")
    assert d.stopped == "3 actors in a row could not start; the last: OSError 2"
    assert d.wanted_actors(3.0) == 0

    d = Dispatcher(stage(20), Policy(max_actors=4))
    d.actor_left("s0", "start_failed", 0.0)
    d.actor_left("s1", "start_failed", 0.0)
    d.actor_left("p", "preempted", 0.0)  # a node lost before the actor was up says nothing
    d.actor_left("r", "released", 0.0)
    assert d.stopped is None
    d.actor_joined("a0", 1.0)
    for i in range(2, 6):
        d.actor_left(f"s{i}", "start_failed", 2.0)
    assert d.stopped is None
    assert d.wanted_actors(61.9) == 1  # growth pauses
    assert d.wanted_actors(62.0) == 4
    d.actor_joined("a1", 62.0)
    d.actor_left("a1", "preempted", 62.0)
    d.actor_left("again", "start_failed", 62.0)
    assert d.wanted_actors(62.0) == 4  # a1 started, so this is the first failure of a new row
    d.actor_left("a0", "preempted", 63.0)
    assert d.wanted_actors(63.0) == 4
    d.actor_left("s6", "start_failed", 64.0)
    assert d.stopped is None  # judged anew
    d.actor_left("s6", "start_failed", 64.0)
    d.actor_left("s7", "start_failed", 64.0)
    assert d.stopped is None
    d.actor_left("s8", "start_failed", 64.0)
    assert d.stopped == "3 actors in a row could not start"


def test_a_unit_that_raises_is_never_tried_again() -> None:
    d = started(stage(3), Policy(max_actors=1, in_flight=1), 1)
    (call,) = d.assign(0.0)
    d.unit_failed("u0", "ValueError: bad image", 1.0)
    d.call_done(call.call_id, 1.0)
    sent = []
    while calls := d.assign(1.0):
        sent += [key for call in calls for key in call.keys]
        for call in calls:
            finish(d, call)
    assert sent == ["u1", "u2"]
    assert d.failed == {"u0": "ValueError: bad image"}
    assert d.done


def test_a_late_answer_spares_a_waiting_unit_and_the_copy_in_flight() -> None:
    d = started(stage(2), Policy(max_actors=2, in_flight=1), 2)
    first, second = d.assign(0.0)
    d.actor_left("a0", "preempted", 1.0)
    d.unit_done("u0", 1.0, 2.0)  # a0 had committed it
    d.call_done(first.call_id, 2.0)
    d.actor_joined("a2", 2.0)
    assert d.assign(2.0) == []
    d.actor_left("a1", "preempted", 3.0)
    (again,) = d.assign(3.0)
    assert again.keys == second.keys
    d.unit_done("u1", 1.0, 4.0)
    assert d.done
    d.unit_done("u1", 1.0, 5.0)
    d.unit_failed("u1", "late", 5.0)
    d.call_done(again.call_id, 5.0)
    assert d.actor_left("a2", "died", 6.0) == []
    assert d.failed == {}
    assert d.progress(6.0).n_done == 2


def test_a_call_that_forgets_a_unit_fails_it() -> None:
    d = started(stage(1), Policy(max_actors=1), 1)
    (call,) = d.assign(0.0)
    d.call_done(call.call_id, 1.0)
    assert d.failed == {"u0": "its call returned without a word about it"}


def test_an_actor_let_go_while_busy_gives_its_units_back_unharmed() -> None:
    d = Dispatcher(stage(4), Policy(max_actors=1, in_flight=2, fruitless_losses=1, shared_deaths=1))
    for i in range(9):
        d.actor_joined(f"a{i}", i)
        assert [call.keys for call in d.assign(i)] == [("u0",), ("u1",)]
        assert d.actor_left(f"a{i}", "released", i) == ["u0", "u1"]
    assert d.stopped is None


def test_losses_count_only_while_busy_and_only_until_a_unit_ends() -> None:
    d = started(stage(50), Policy(max_actors=2, in_flight=1, fruitless_losses=1), 0)
    for i in range(40):
        d.actor_joined(f"idle{i}", i)
        d.actor_left(f"idle{i}", "preempted", i)
    assert d.stopped is None
    for i in range(20):
        d.actor_joined(f"a{i}", i)
        d.assign(i)
        lost = d.actor_left(f"a{i}", "preempted", i)
        d.unit_done(lost[0], 1.0, i)  # it had committed
    assert d.stopped is None
    for i in range(20, 23):
        d.actor_joined(f"a{i}", i)
        d.assign(i)
        d.actor_left(f"a{i}", "preempted", i)
    assert "3 busy actors" in (d.stopped or "")


def test_progress_counts_from_the_first_actor_and_estimates_by_weight() -> None:
    d = Dispatcher([Unit("a", 1.0), Unit("b", 1.0), Unit("c", 6.0)], Policy(max_actors=1))
    assert d.progress(50.0).eta_s is None
    d.actor_joined("a0", 100.0)
    d.assign(100.0)
    assert (d.progress(101.0).units_per_s, d.progress(101.0).eta_s) == (0.0, None)
    d.unit_done("a", 2.0, 102.0)
    d.unit_failed("b", "no", 104.0)
    p = d.progress(104.0)
    assert (p.n_done, p.n_failed, p.n_quarantined, p.n_total) == (1, 1, 0, 3)
    assert p.units_per_s == pytest.approx(0.5)
    assert p.eta_s == pytest.approx(12.0)
    d.unit_done("c", 12.0, 116.0)
    assert d.progress(116.0).eta_s == 0.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a' comes twice"):
        Dispatcher([Unit("a"), Unit("a")], Policy(max_actors=1))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive and finite"):
            Dispatcher([Unit("a", weight)], Policy(max_actors=1))
    for bad in ({"max_actors": 0}, {"max_actors": 1, "min_actors": 2}, {"max_actors": 1, "in_flight": 0}):
        with pytest.raises(ConfigError):
            Policy(**bad)
    for copying in ({"copies": -1}, {"copy_factor": 0.9}, {"copy_after_s": float("nan")}, {"idle_s": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(copying))):
            Policy(max_actors=1, **copying)  # type: ignore[arg-type]
    for bundle_s in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="bundle_s"):
            Policy(max_actors=1, bundle_s=bundle_s)
    d = started(stage(2), Policy(max_actors=1), 1)
    with pytest.raises(StageError, match="no unit 'u9'"):
        d.unit_done("u9", 1.0, 0.0)
    with pytest.raises(StageError, match="at least 0"):
        d.unit_done("u0", float("nan"), 0.0)
    with pytest.raises(StageError, match="joined twice"):
        d.actor_joined("a0", 1.0)
    d.actor_left("a0", "died", 1.0)
    with pytest.raises(StageError, match="joined twice"):
        d.actor_joined("a0", 2.0)


_SCENARIO = """
import sys
from polyray.cluster.dispatch import Dispatcher, Policy, Unit
d = Dispatcher([Unit(f"u{i}", 1 + i % 3, f"l{i % 4}") for i in range(60)], Policy(max_actors=3))
joined = 0
for step in range(60):
    while joined - step // 5 < 3:
        d.actor_joined(f"a{joined}", step)
        joined += 1
    for call in d.assign(step):
        print(call)
        for key in call.keys[: 1 + step % 2]:
            d.unit_done(key, 0.5, step)
    if step % 5 == 4:
        print(d.actor_left(f"a{step // 5}", "preempted" if step % 2 else "died", step))
    for call_id in range(0, 200, 3):
        d.call_done(call_id, step)
print(d.failed, d.quarantined, d.stopped, d.progress(99.0))
print(sorted({"ray", "torch", "time"} & (set(sys.modules) - sys.stdlib_module_names)))
"""


def test_decisions_do_not_depend_on_hash_order_and_need_no_ray() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _SCENARIO],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].count("Call(") > 20
    assert outputs[0].endswith("[]\n")
