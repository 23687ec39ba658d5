"""Sweeps whose units sleep: the real service, store and Ray, without a model, for faults and for overhead.

Tests, the chaos test and `benchmarks/bench_dispatch.py` share it. Put `SleepActor` in the place of
`polyray.cluster.actors.WorkerActor` (`awake`), then run what `sleepy` makes with `service.run`.
"""

import argparse
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import ray

from polyray import columns
from polyray.cluster.actors import answer
from polyray.cluster.plan import Work
from polyray.cluster.premises import Premises, Ready
from polyray.config import Config, Science, parse_config
from polyray.records import PartInfo, Receipt
from polyray.store import Store

STAGE = "mine"
CPU = 0.25
"""What an actor that sleeps asks for, so that several fit on a small machine."""


@dataclass(frozen=True)
class SleepSweep:
    """As `plan.Sweep` to the service: one stage, and no neurons of which the tables would have to know."""

    config: Config
    out: str
    n_units: int
    unit_s: float
    says_s: float | None = None
    """What a unit says that it took, where that is not the truth: calls are made up by it."""
    writes: bool = True
    """One row for each unit; else receipts are empty."""
    steps: dict[str, str] = field(default_factory=lambda: {STAGE: "subject"})

    accounts: ClassVar[str] = "neurons"
    n_neurons: ClassVar[int] = 0

    @property
    def science(self) -> Science:
        return self.config.science

    def works(self, stage: str, store: Store) -> list[Work]:
        return [Work(stage, start=i, stop=i + 1) for i in range(self.n_units)]


@dataclass(frozen=True)
class Sleepy:
    """As `resolve.Resolved` to the service."""

    sweep: SleepSweep
    identity: dict[str, Any]
    provenance: dict[str, Any]


def sleepy(
    out: Path | str,
    n_units: int,
    unit_s: float,
    *,
    says_s: float | None = None,
    writes: bool = True,
    address: str | None = None,
    bundle_s: float = 1.0,
    autoscale: bool = False,
    stages: Sequence[str] = (STAGE,),
    **pool: Any,
) -> Sleepy:
    """A sweep of units that sleep, so many in each stage; `pool` are the settings of its one pool of actors."""
    execution = {"address": address, "bundle_s": bundle_s, "autoscale": autoscale}
    science = {
        "subject": {"name": "none"},
        "probe": {"kind": "generated", "n_classes": 2, "n_per_class": 2},
        "encoder": {"kind": "standin"},
    }
    pools = {"subject": {"num_cpus": CPU} | pool, "encoder": {"max": 1}, "scoring": {"max": 1}}
    config = parse_config({"science": science, "execution": execution | pools})
    sweep = SleepSweep(config, str(out), n_units, unit_s, says_s, writes, dict.fromkeys(stages, "subject"))
    return Sleepy(sweep, {"n_units": n_units}, {"torch": "any", "device_class": "cpu"})


class SleepActor:
    """In the place of `actors.WorkerActor`. What befalls it stands in files of the folder `OUT.trouble`.

    `poison` holds keys of units that kill their actor, `hang` keys of units that never end, in the first process that
    takes them, `gpus` the models that processes say they have, in the order in which they start. Every process leaves a
    file `pid-…` with its node, every unit that begins one `ran-…`.
    """

    def __init__(self, kind: str, sweep: SleepSweep, premises: Premises) -> None:
        self._sweep = sweep
        self._store = Store(sweep.out)
        self._trouble = trouble(sweep.out)
        # Torch takes seconds to import: asked only where there is no trouble, as on a node that sees nothing.
        node = ray.get_runtime_context().get_node_id()
        self._ready = Ready(node) if self._trouble.exists() else _answer(premises)
        if self._trouble.exists():
            (self._trouble / f"pid-{os.getpid()}").write_text(self._ready.node)

    def ready(self) -> Ready:
        return replace(self._ready, gpu=self._gpu()) if (self._trouble / "gpus").exists() else self._ready

    def _gpu(self) -> str:
        """The first of the models listed that no process before has taken; the last may be taken by many."""
        *several, last = listed(self._trouble / "gpus")
        for i, model in enumerate(several):
            with suppress(FileExistsError):
                (self._trouble / f"gpu-{i}").touch(exist_ok=False)
                time.sleep(0 if model == last else 3)  # the odd one is not the first that is heard of
                return model
        return last

    def run(self, units: Sequence[Work]) -> list[Receipt]:
        return [self._do(work) for work in units]

    def _do(self, work: Work) -> Receipt:
        started_s = time.monotonic()
        if self._trouble.exists():
            self._make_trouble(work)
        parts = slept(self._sweep, self._store, work)
        seconds = time.monotonic() - started_s if self._sweep.says_s is None else self._sweep.says_s
        return Receipt(work.key, parts, seconds, self._ready.node, work.stage)

    def _make_trouble(self, work: Work) -> None:
        n = len(list(self._trouble.glob(f"ran-{work.items[0]}-*")))
        (self._trouble / f"ran-{work.items[0]}-{n}-{os.getpid()}").touch()
        if work.key in listed(self._trouble / "poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        if n == 0 and work.key in listed(self._trouble / "hang"):
            time.sleep(1e6)


def _answer(premises: Premises) -> Ready:
    import torch

    return answer(replace(premises, torch=torch.__version__))


def slept(sweep: SleepSweep, store: Store, work: Work) -> list[PartInfo]:
    """What a unit comes to."""
    if sweep.unit_s:
        time.sleep(sweep.unit_s)
    if not sweep.writes:
        return []
    rows = columns.failures(work.stage, work.key, [(None, "image", work.items[0], "it slept")])
    return [store.write_part("failures", work.key, rows, None)]


def trouble(out: Path | str) -> Path:
    """The folder in which trouble is asked for; none is made where it does not exist."""
    return Path(f"{out}.trouble")


def ask_for_trouble(out: Path | str, **keys: Sequence[int]) -> Path:
    """Makes the folder and the files in it: `poison=[3]` for the unit of item 3."""
    folder = trouble(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in keys.items():
        (folder / name).write_text("\n".join(Work(STAGE, start=i, stop=i + 1).key for i in items))
    return folder


def listed(path: Path) -> list[str]:
    """Lines of a file, none where there is no file."""
    return path.read_text().split() if path.exists() else []


def pids(out: Path | str) -> dict[int, str]:
    """Every actor's process that there has been, and its node."""
    return {int(p.name.partition("-")[2]): p.read_text() for p in trouble(out).glob("pid-*") if p.stat().st_size}


def n_runs(out: Path | str) -> dict[int, int]:
    """How often each unit has been begun."""
    begun = [int(p.name.split("-")[1]) for p in trouble(out).glob("ran-*")]
    return {i: begun.count(i) for i in sorted(set(begun))}


@contextmanager
def awake() -> Iterator[None]:
    """Sweeps in this process are done by `SleepActor`."""
    from polyray.cluster import actors

    before = actors.WorkerActor
    actors.WorkerActor = SleepActor  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        actors.WorkerActor = before  # type: ignore[misc]


def main() -> None:
    """`python -m sleepers OUT`: a run in a process of its own, with the signals and exit codes of the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out")
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--unit-s", type=float, default=0.1)
    parser.add_argument("--stages", nargs="+", default=[STAGE])
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--bundle-s", type=float, default=1.0)
    parser.add_argument("--address")
    parser.add_argument("--log-json")
    given = parser.parse_args()

    import typer

    from polyray import logs
    from polyray.cluster import service
    from polyray.cluster.interrupt import Stop
    from polyray.commands import terminal

    made = sleepy(
        given.out,
        given.units,
        given.unit_s,
        address=given.address,
        bundle_s=given.bundle_s,
        stages=given.stages,
        min=1,
        max=given.actors,
    )
    stop = Stop()

    def work() -> int:
        with logs.to_machines(given.log_json), service.cluster(made.sweep.config.execution), awake():
            outcome = service.run(made, lambda stage, progress: None, print, stop)  # type: ignore[arg-type]
        print(outcome)
        return 0

    with stop.listening():
        try:
            terminal.guarded(work, as_json=False)
        except typer.Exit as e:
            raise SystemExit(e.exit_code) from None


if __name__ == "__main__":
    main()
