"""A sweep under everything at once: `python -m chaos FOLDER --seed 0 --strikes 50` prints one JSON object.

On a cluster of a head without work and three nodes, a driver in a process of its own sweeps units that sleep
(`sleepers.py`) through several stages, or does what a config asks for (`--config`). Every few seconds a random one of
these happens: an actor's process is killed with SIGKILL; a node goes without a word and another comes; the driver is
killed with SIGKILL and started again. What the sweep came to must not show it. The choices follow from the seed; when
each strikes does not, since a machine is as slow as it is.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from calamities import Theatre
from sleepers import ask_for_trouble, n_runs
from sweeps import descendants

STAGES = ("index", "mine", "merge")
N_NODES = 3
LONGEST_S = 1800.0
"""A run that takes longer has come to a stop."""


@dataclass
class Told:
    """What came of one run."""

    seed: int
    strikes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("worker", "node", "driver"), 0))
    """How often each thing happened while the sweep was under way."""
    exits: list[int] = field(default_factory=list)
    """Exit codes of the drivers, in order; the last one is that of the run."""
    seconds: float = 0.0
    n_begun: int = 0
    """Units begun, those done again included."""
    said: str = ""
    """What the last driver said, where it did not end well."""


def sleeping(out: Path, address: str, n_units: int, unit_s: float) -> list[str]:
    """A command that sweeps units that sleep."""
    command = [sys.executable, "-m", "sleepers", str(out), "--address", address, "--units", str(n_units)]
    return [*command, "--unit-s", str(unit_s), "--actors", "6", "--stages", *STAGES]


def running(out: Path, address: str, config: Path) -> list[str]:
    """`polyray run` of a config, with two actors of each kind."""
    command = [sys.executable, "-c", "from polyray.cli import main; main()", "run", str(config), "--out", str(out)]
    pools = [
        f"execution.{kind}.{what}" for kind in ("subject", "encoder", "scoring") for what in ("num_cpus=0.5", "max=2")
    ]
    return [*command, "--address", address, *(word for pool in pools for word in ("--set", pool))]


class Driver:
    """A driver on a cluster; the same command each time."""

    def __init__(self, out: Path, command: list[str]) -> None:
        self._command = command
        self._log = out.with_name(f"{out.name}.log")
        self.start()

    def start(self) -> None:
        """Begins, or begins again."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> int:
        """SIGKILL to the process; its actors are Ray's to end."""
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait()

    @property
    def said(self) -> str:
        """The end of what all of them printed."""
        return self._log.read_text()[-2000:]


def chaos(folder: Path, seed: int, n_strikes: int, every_s: float, command: Callable[[Path, str], list[str]]) -> Told:
    """One sweep, with so many strikes while it lasts; `command` makes it of OUT and address. See the module's text."""
    rng = random.Random(seed)
    out, told = folder / f"seed-{seed}", Told(seed)
    ask_for_trouble(out)
    theatre = Theatre(folder, N_NODES)
    started_s = time.monotonic()
    try:
        driver = Driver(out, command(out, theatre.cluster.address))
        while time.monotonic() - started_s < LONGEST_S:
            time.sleep(rng.uniform(0.5, 1.5) * every_s)
            code = driver.process.poll()
            if code is not None:
                told.exits.append(code)
                if code == 0:
                    break
                # What the product asks of people: run the same command again.
                driver.start()
                continue
            if sum(told.strikes.values()) < n_strikes:
                strike(theatre, out, driver, told, rng)
        else:
            told.exits.append(driver.kill())
        told.said = "" if told.exits[-1] == 0 else driver.said
    finally:
        theatre.close()
    told.seconds, told.n_begun = time.monotonic() - started_s, sum(n_runs(out).values())
    return told


def strike(theatre: Theatre, out: Path, driver: Driver, told: Told, rng: random.Random) -> None:
    """One thing happens."""
    what = rng.choices(("worker", "node", "driver"), weights=(6, 2, 2))[0]
    if what == "worker":
        alive = [pid for pid in sorted(descendants(os.getpid())) if _is_actor(pid)]
        if not alive:
            return  # none has come up yet
        os.kill(rng.choice(alive), signal.SIGKILL)
    elif what == "node":
        theatre.cut_power(rng.choice(theatre.nodes))
        theatre.fill_up()
    else:
        told.exits.append(driver.kill())
        driver.start()
    told.strikes[what] += 1


def _is_actor(pid: int) -> bool:
    """Whether it is a process of Ray's that an actor has, and lives."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::SleepActor", b"ray::WorkerActor"))
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strikes", type=int, default=50)
    parser.add_argument("--every-s", type=float, default=3.0, help="mean time between two strikes")
    parser.add_argument("--units", type=int, default=300, help="units of each stage")
    parser.add_argument("--unit-s", type=float, default=0.5)
    parser.add_argument("--config", type=Path, help="sweep this with `polyray run`, rather than units that sleep")
    given = parser.parse_args()

    def command(out: Path, address: str) -> list[str]:
        if given.config:
            return running(out, address, given.config)
        return sleeping(out, address, given.units, given.unit_s)

    told = chaos(given.folder, given.seed, given.strikes, given.every_s, command)
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
