"""What the dispatcher and the service cost beside the actor calls that they make.

`PYTHONPATH=tests python tests/benchmarks/bench_dispatch.py --json` prints one JSON object:

- ratio_1, ratio_10: rate of no-op units through the service's loop, divided by the rate of bare calls of the same
  actors with the same units in bundles of 1 and 10 and the same number in flight; the median of pairs that take turns,
  so that a slow spell of the machine hits both. Receipts are taken, not committed: what a commit costs is the disk's
  affair, and stands beside as commit_ms.
- committed_1: as ratio_1, but with every receipt committed to the disk.
- efficiency_real: share of their time that as many sleeping actors as asked for spend in units of 100 ms.
- efficiency_64: the same of 64 actors in a simulation of events, in which every decision of the dispatcher takes the
  processor time that it took here, calls and answers take time, units vary by a fifth, and calls carry up to `bundle_s`
  of them.
- rss: growth of the driver's memory over 100,000 units, in MB, and what it is in all.
"""

import argparse
import heapq
import itertools
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from sleepers import STAGE, awake, sleepy

from polyray.cluster import service
from polyray.cluster.crew import Crew
from polyray.cluster.dispatch import Call, Dispatcher, Policy, Unit
from polyray.cluster.interrupt import Stop
from polyray.cluster.plan import Work
from polyray.cluster.telemetry import DeviceSeconds, Telemetry
from polyray.config import Execution
from polyray.records import Receipt
from polyray.store import Store

ACTORS, IN_FLIGHT = 2, 4
LATENCY_S = 0.002
"""Of a call, and of its answer, in the simulation: that of Ray on a local network."""


class Tray:
    """In the place of a `Store`: receipts are taken and forgotten."""

    def __init__(self) -> None:
        self.n = 0

    def commit_all(self, receipts: Sequence[Receipt]) -> list[bool]:
        self.n += len(receipts)
        return [True] * len(receipts)


class Loop:
    """The service's loop over actors that stay from one measurement to the next."""

    def __init__(self, folder: Path, n_actors: int, unit_s: float, says_s: float | None) -> None:
        made = sleepy(folder / "out", 1, unit_s, says_s=says_s, writes=False)
        made_store = Store(made.sweep.out)
        made_store.create_or_resume(made.identity, made.provenance, {})
        self.sweep, self.n_actors = made.sweep, n_actors
        self.pool = made.sweep.config.execution.subject
        self.telemetry = Telemetry("bench", DeviceSeconds())
        self.crew = Crew(made.sweep, made_store, print, self.telemetry)  # type: ignore[arg-type]
        nobody = Dispatcher([], Policy(max_actors=n_actors))
        self.crew.man("subject", self.pool, nobody)
        self.crew.grow(n_actors)
        while any(m.ready is not None for m in self.crew._members.values()):
            assert list(self.crew.answers(nobody)) == []

    def drive(self, n: int, bundle_s: float, store: Store | None = None) -> float:
        """Seconds that a stage of so many units takes; they are committed where there is a store."""
        works = {w.key: w for w in (Work(STAGE, start=i, stop=i + 1) for i in range(n))}
        policy = Policy(max_actors=self.n_actors, min_actors=self.n_actors, in_flight=IN_FLIGHT, bundle_s=bundle_s)
        dispatcher = Dispatcher((Unit(key, 1.0) for key in works), policy)
        self.telemetry.stage(STAGE, self.pool, n, n)
        self.crew.man("subject", self.pool, dispatcher)
        tray = Tray()
        started_s = time.perf_counter()
        service.drive(
            dispatcher, self.crew, works, store or tray, self.telemetry, Stop(), lambda p: None, lambda: self.n_actors,
            keep_idle=True,
        )  # type: ignore[arg-type]  # fmt: skip
        seconds = time.perf_counter() - started_s
        assert (len(store.committed()) if store else tray.n) >= n
        assert dispatcher.progress(time.monotonic()).n_done == n
        return seconds

    def bare(self, n: int, bundle: int) -> float:
        """Seconds that the same actors take for the same units without anybody deciding anything."""
        works = [Work(STAGE, start=i, stop=i + 1) for i in range(n)]
        bundles = iter([works[i : i + bundle] for i in range(0, n, bundle)])
        handles = [m.handle for m in self.crew._members.values()]
        started_s = time.perf_counter()
        pending = {h.run.remote(b): h for _ in range(IN_FLIGHT) for h in handles if (b := next(bundles, None))}
        n_back = 0
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            for ref in ready:
                handle = pending.pop(ref)
                n_back += len(ray.get(ref))
                if following := next(bundles, None):
                    pending[handle.run.remote(following)] = handle
        seconds = time.perf_counter() - started_s
        assert n_back == n
        return seconds


def with_commits(loop: Loop, folder: Path, n: int, pairs: int) -> float:
    """Rate of the loop with a real store, one unit a call, divided by that of bare calls."""
    ratios = []
    for pair in range(pairs):
        made = sleepy(folder / f"committed-{pair}", 1, 0.0)
        store = Store(made.sweep.out)
        store.create_or_resume(made.identity, made.provenance, {})
        with store.acquire():
            ratios.append(loop.bare(n, 1) / loop.drive(n, 1.0, store))
    return round(statistics.median(ratios), 3)


def overhead(loop: Loop, n: int, bundle: int, pairs: int) -> dict[str, float]:
    """Rates of the loop and of bare calls, in turns."""
    rates: list[tuple[float, float]] = []
    for pair in range(pairs):
        measure = [lambda: n / loop.bare(n, bundle), lambda: n / loop.drive(n, bundle_s=float(bundle))]
        if pair % 2:
            second = measure[1]()
            first = measure[0]()
        else:
            first = measure[0]()
            second = measure[1]()
        rates.append((first, second))
    ratios = sorted(b / a for a, b in rates)
    bare, driven = (statistics.median(column) for column in zip(*rates, strict=True))
    return {
        f"ratio_{bundle}": round(statistics.median(ratios), 3),
        f"ratio_{bundle}_lowest": round(ratios[0], 3),
        f"bare_{bundle}_per_s": round(bare),
        f"driven_{bundle}_per_s": round(driven),
    }


def simulated_efficiency(n_actors: int, n_units: int, unit_s: float, in_flight: int, seed: int = 0) -> dict[str, float]:
    """A stage on a simulated cluster whose clock also runs while the real dispatcher decides."""
    rng = random.Random(seed)
    policy = Policy(max_actors=n_actors, min_actors=n_actors, in_flight=in_flight)
    dispatcher = Dispatcher([Unit(f"u{i}") for i in range(n_units)], policy)
    now_s, deciding_s, order = 0.0, 0.0, itertools.count()
    free_s: dict[str, float] = {}  # when an actor has done what it was sent so far
    worked_s = 0.0
    events: list[tuple[float, int, Call, list[float]]] = []
    for i in range(n_actors):
        dispatcher.actor_joined(f"a{i}", 0.0)
        free_s[f"a{i}"] = 0.0
    while not dispatcher.done:
        began_s = time.process_time()
        dispatcher.release(now_s)  # actors are there anyway; only its time counts
        dispatcher.wanted_actors(now_s)
        calls = dispatcher.assign(now_s)
        spent_s = time.process_time() - began_s
        deciding_s += spent_s
        now_s += spent_s
        for call in calls:
            each = [unit_s * rng.uniform(0.8, 1.2) for _ in call.keys]
            free_s[call.actor_id] = max(free_s[call.actor_id], now_s + LATENCY_S) + sum(each)
            heapq.heappush(events, (free_s[call.actor_id] + LATENCY_S, next(order), call, each))
        when_s, _, call, each = heapq.heappop(events)
        now_s = max(now_s, when_s)
        began_s = time.process_time()
        for key, seconds in zip(call.keys, each, strict=True):
            dispatcher.unit_done(key, seconds, now_s)
        dispatcher.call_done(call.call_id, now_s)
        spent_s = time.process_time() - began_s
        deciding_s += spent_s
        now_s += spent_s
        worked_s += sum(each)
    return {
        "efficiency_64": round(worked_s / (n_actors * now_s), 4),
        "simulated_s": round(now_s, 1),
        "deciding_us_per_unit": round(1e6 * deciding_s / n_units, 1),
    }


def commit_ms(folder: Path, n: int = 200) -> float:
    """What it takes to commit an empty receipt on this disk, files and folder synced."""
    made = sleepy(folder / "commits", 1, 0.0)
    store = Store(made.sweep.out)
    store.create_or_resume(made.identity, made.provenance, {})
    with store.acquire():
        started_s = time.perf_counter()
        for i in range(n):
            store.commit(Receipt(f"{STAGE}/{i}", [], 0.0, "here", STAGE))
    return 1e3 * (time.perf_counter() - started_s) / n


def rss_mb() -> float:
    """Memory of this process at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sleepers", type=int, default=4, help="actors of efficiency_real; 0 leaves it out")
    parser.add_argument("--many", type=int, default=100_000, help="units of rss; 0 leaves it out")
    given = parser.parse_args(arguments)
    told: dict[str, Any] = simulated_efficiency(64, 64 * 600, 0.1, in_flight=2)
    with tempfile.TemporaryDirectory() as name, service.cluster(Execution()), awake():
        folder = Path(name)
        told["commit_ms"] = round(commit_ms(folder), 3)
        if given.units:
            loop = Loop(folder / "a", ACTORS, 0.0, says_s=1.0)
            told |= overhead(loop, given.units, 1, given.pairs) | overhead(loop, given.units, 10, given.pairs)
            told["committed_1"] = with_commits(loop, folder, given.units, given.pairs)
            if given.many:
                before = rss_mb()
                seconds = loop.drive(given.many, bundle_s=20.0)
                told |= {"rss_growth_mb": round(rss_mb() - before), "rss_mb": round(rss_mb())}
                told["many_per_s"] = round(given.many / seconds)
            loop.crew.dismiss()
        if given.sleepers:
            loop = Loop(folder / "b", given.sleepers, 0.1, says_s=None)
            n = 300 * given.sleepers
            told["efficiency_real"] = round(0.1 * n / (given.sleepers * loop.drive(n, bundle_s=10.0)), 4)
            loop.crew.dismiss()
    told |= {"units": given.units, "actors": ACTORS, "in_flight": IN_FLIGHT, "cores": os.cpu_count()}
    told["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(told, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
