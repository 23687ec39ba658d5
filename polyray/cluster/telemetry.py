"""Telemetry: what a run tells of itself while it lasts, and what it cost in the end.

Place in the flow: `service.py` and `crew.py` report here; every report becomes a line of the log (`logs.py`), a metric
that Ray's agents serve to Prometheus, and an entry in the account of device-seconds.
"""

from collections import Counter as Tally
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge, Histogram

from polyray.cluster.dispatch import Cause
from polyray.config import PoolConfig
from polyray.logs import event

_BOUNDS_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


@dataclass
class DeviceSeconds:
    """Work of actors in seconds, times the GPUs that each holds, or the CPUs where it holds no GPU."""

    used: float = 0.0
    """By units that were committed."""
    twice: float = 0.0
    """By units that another copy had committed already, or was awaited from no more."""
    cut: float = 0.0
    """By calls whose actor was lost before they returned."""

    @property
    def lost(self) -> float:
        """What an undisturbed run would not have spent."""
        return self.twice + self.cut


class Telemetry:
    """Log lines, metrics and the account of one run; call `stage` before anything else.

    Args:
        run_id: stands in every line of the log.
        account: is added to.
    """

    def __init__(self, run_id: str, account: DeviceSeconds) -> None:
        self._run_id, self._account = run_id, account
        self._stage, self._devices = "", 1.0
        self._ended: Tally[str] = Tally()  # since `standing` was last told, as each call of Ray's counters takes 5 µs
        self._spent: dict[str, float] = {}
        self._units = Counter("polyray_units", "Units that ended.", ("stage", "outcome"))
        self._unit_s = Histogram("polyray_unit_seconds", "Seconds that a unit took.", _BOUNDS_S, ("stage",))
        self._device_s = Counter("polyray_device_seconds", "Seconds of devices' work.", ("stage", "spent"))
        self._losses = Counter("polyray_actors_lost", "Actors that were lost.", ("stage", "cause"))
        self._actors = Gauge("polyray_actors", "Actors that are there.", ("stage",))
        self._open = Gauge("polyray_units_open", "Units that have not ended.", ("stage",))
        self._stage_s = Gauge("polyray_stage_seconds", "Seconds that a stage has taken.", ("stage",))

    def stage(self, stage: str, pool: PoolConfig, n_units: int, n_remaining: int) -> None:
        """A stage begins."""
        self._stage, self._devices = stage, pool.num_gpus or pool.num_cpus
        self._say("stage_began", n_units=n_units, n_remaining=n_remaining)

    def stage_ended(self, seconds: float, n_failed: int) -> None:
        """Every unit of the stage has ended, or it cannot go on."""
        self._stage_s.set(seconds, {"stage": self._stage})
        self._say("stage_ended", seconds=seconds, n_failed=n_failed)

    def unit(self, key: str, outcome: str, seconds: float | None = None, host: str | None = None) -> None:
        """A unit is `done`, `failed`, `quarantined`, or was done a second time, `twice`."""
        self._ended[outcome] += 1
        if seconds is not None:
            self._unit_s.observe(seconds, {"stage": self._stage})
            self._spend("twice" if outcome == "twice" else "used", seconds)
        self._say(f"unit_{outcome}", unit=key, seconds=seconds, host=host)

    def sent(self, actor_id: str, keys: list[str], *, is_copy: bool) -> None:
        """A call goes off."""
        self._say("call_sent", actor=actor_id, units=keys, is_copy=is_copy)

    def joined(self, actor_id: str, node: str, seconds: float) -> None:
        """An actor has started."""
        self._say("actor_joined", actor=actor_id, node=node, seconds=seconds)

    def left(self, actor_id: str, cause: Cause, busy_s: float, detail: str = "") -> None:
        """An actor is gone, `busy_s` after it had begun the call that now never returns."""
        if cause != "released":
            self._losses.inc(1, {"stage": self._stage, "cause": cause})
        self._spend("twice" if cause == "released" else "cut", busy_s)
        self._say("actor_left", actor=actor_id, cause=cause, busy_s=busy_s, detail=detail or None)

    def message(self, text: str) -> None:
        """A line worth a person's attention."""
        self._say("message", text=text)

    def draining(self, actor_id: str, node: str) -> None:
        """The node of an actor was given notice."""
        self._say("actor_draining", actor=actor_id, node=node)

    def standing(self, n_actors: int, n_open: int, seconds: float) -> None:
        """How things stand, now and then and at the end of the stage; what was counted since is passed on."""
        tags = {"stage": self._stage}
        for outcome, n in self._ended.items():
            self._units.inc(n, tags | {"outcome": outcome})
        for how, spent in self._spent.items():
            self._device_s.inc(spent, tags | {"spent": how})
        self._ended.clear()
        self._spent.clear()
        self._actors.set(n_actors, tags)
        self._open.set(n_open, tags)
        self._stage_s.set(seconds, tags)

    def _spend(self, how: str, seconds: float) -> None:
        if seconds > 0:
            spent = seconds * self._devices
            setattr(self._account, how, getattr(self._account, how) + spent)
            self._spent[how] = self._spent.get(how, 0.0) + spent

    def _say(self, name: str, **fields: object) -> None:
        event(name, run_id=self._run_id, stage=self._stage or None, **fields)
