"""Whatever is killed, whenever: the sweep ends, and what it holds does not show it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos import STAGES
from sleepers import sleepy, slept
from sweeps import Finished, clean_environment

from polyray.cluster.plan import Work
from polyray.records import Receipt
from polyray.store import Store
from polyray.verify import verify


def under_fire(folder: Path, seed: int, strikes: int, every_s: float, *options: object) -> dict[str, Any]:
    """What `chaos.py` tells, in a process of its own: Ray's nodes are started from a main thread alone."""
    command = [sys.executable, "-m", "chaos", folder, "--seed", seed, "--strikes", strikes, "--every-s", every_s]
    done = subprocess.run(
        [str(word) for word in [*command, *options]],
        env=clean_environment(folder) | {"RAY_AUTH_MODE": "disabled"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray prints as well, of workers that die.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"seed"')]
    told: dict[str, Any] = json.loads(line)
    return told


def undisturbed(out: Path, n_units: int, made: Any) -> Store:
    """The same rows, committed one after the other by hand."""
    store = Store(out)
    store.create_or_resume(made.identity, made.provenance, made.sweep.config.model_dump(mode="json"))
    with store.acquire():
        for stage in STAGES:
            for i in range(n_units):
                work = Work(stage, start=i, stop=i + 1)
                store.commit(Receipt(work.key, slept(made.sweep, store, work), 0.0, "here", stage))
        store.finish()
    return store


def survived(folder: Path, told: dict[str, Any], n_strikes: int) -> Path:
    """OUT of a sweep that ended well although as much happened as should."""
    assert told["exits"][-1] == 0, told
    assert sum(told["strikes"].values()) >= n_strikes, (
        f"the sweep ended before as much had happened, it needs more units: {told}"
    )
    # 3 would be a stage that gave up, or a unit that was quarantined; -9 is what chaos did.
    assert set(told["exits"]) <= {0, -9}, told
    return folder / f"seed-{told['seed']}"


def check(folder: Path, told: dict[str, Any], n_units: int, n_strikes: int) -> None:
    out = survived(folder, told, n_strikes)
    keys = [Work(stage, start=i, stop=i + 1).key for stage in STAGES for i in range(n_units)]
    report = verify(out, keys)
    assert report.ok, report
    store = Store(out)
    assert store.is_finished
    reference = undisturbed(folder / "reference", n_units, sleepy(folder / "reference", n_units, 0.0, stages=STAGES))
    assert store.digests() == reference.digests()
    assert store.digests()["failures"]["n_rows"] == len(keys)


def test_a_sweep_under_fire_holds_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    told = under_fire(tmp_path, 1, 6, 2.0, "--units", 40, "--unit-s", 0.5)
    check(tmp_path, told, 40, 6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fifty_strikes(tmp_path: Path, seed: int) -> None:
    told = under_fire(tmp_path, seed, 50, 3.0, "--units", 250, "--unit-s", 0.5)
    print(json.dumps(told))
    check(tmp_path, told, 250, 50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_strikes_on_a_real_sweep(finished: Finished, tiny_yaml: Path, tmp_path: Path, seed: int) -> None:
    """A network, images and all stages but planting: fewer strikes, since each costs the loading of models."""
    told = under_fire(tmp_path, seed, 15, 8.0, "--config", tiny_yaml)
    print(json.dumps(told))
    out = survived(tmp_path, told, 5)
    assert verify(out, list(Store(finished.out).committed())).ok
    assert Store(out).is_finished
    assert Store(out).digests() == Store(finished.out).digests()
