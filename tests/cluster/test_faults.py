"""Nodes that go, actors that die and drivers that are told to stop: on real clusters, with units that sleep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from skips import skip
from sleepers import ask_for_trouble, n_runs, trouble
from sweeps import Command, clean_environment, committed

import polyray
from polyray.verify import verify

Told = dict[str, list[dict[str, Any]]]
N_UNITS = {"killed": 40, "hang": 30, "power_failure": 80, "notice": 60, "poison": 30, "gpus": 60}
BUNDLE_UNITS = 10
"""Most that travel together: a second's worth, of a tenth each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    """What `calamities.py` tells of each calamity, all on one cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "calamities", str(folder)],
        env=clean_environment(folder) | {"RAY_AUTH_MODE": "disabled"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray prints as well, of workers that die.
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"name"', '[{"name"'))]
    listed = [line if isinstance(line, list) else [line] for line in lines]
    return {runs[0]["name"]: runs for runs in listed}


def causes(run: dict[str, Any], *actors: str) -> list[str]:
    """Why actors left, or these, where it was not the run that let them go."""
    left = [e["cause"] for e in run["events"] if e["event"] == "actor_left" and (not actors or e["actor"] in actors)]
    return [cause for cause in left if cause != "released"]


@pytest.mark.parametrize("name", N_UNITS)
def test_every_unit_is_done_and_counted_once(told: Told, folder: Path, name: str) -> None:
    run = told[name][-1]
    assert run["error"] is None
    assert run["struck"]
    out = folder / name
    rows = polyray.open(out)["failures"].to_table().to_pylist()
    assert sorted(row["item_id"] for row in rows) == list(range(N_UNITS[name]))
    assert verify(out, [row["unit"] for row in rows]).ok
    ended = [e["unit"] for run in told[name] for e in run["events"] if e["event"] == "unit_done"]
    assert len(ended) == len(set(ended)) == N_UNITS[name]


def test_a_killed_actor_costs_what_it_had_in_flight(told: Told) -> None:
    (run,) = told["killed"]
    assert causes(run) == ["died"]
    again = [n for n in run["n_runs"].values() if n > 1]
    assert again == [2] * len(again)
    assert 1 <= len(again) <= 2 * BUNDLE_UNITS
    assert 0 < run["device_s"]["cut"] < 2
    assert any("died" in message for message in run["messages"])


def test_a_node_that_vanishes_is_held_against_no_unit(told: Told) -> None:
    (run,) = told["power_failure"]
    assert set(causes(run)) <= {"preempted"}  # none where copies finished before Ray noticed
    again = [n for n in run["n_runs"].values() if n > 1]
    assert 1 <= len(again) <= 4 * 2 * BUNDLE_UNITS
    assert max(again) <= 3  # its own, the second, and a copy where that was slow to start
    assert run["device_s"]["twice"] + run["device_s"]["cut"] > 0


def test_a_notice_costs_nothing(told: Told) -> None:
    (run,) = told["notice"]
    warned = {e["actor"] for e in run["events"] if e["event"] == "actor_draining"}
    assert warned
    assert set(causes(run)) <= {"preempted"}
    assert not set(causes(run, *warned))
    left_s = {e["actor"]: e["time"] for e in run["events"] if e["event"] == "actor_left"}
    ended = max(e["time"] for e in run["events"] if e["event"] == "stage_ended")
    assert all(left_s[actor] < ended for actor in warned)
    assert run["device_s"]["cut"] == 0
    sent = {e["actor"] for e in run["events"] if e["event"] == "call_sent" and e["time"] > max(map(left_s.get, warned))}
    assert not sent & warned


def test_a_poison_unit_is_quarantined_and_tried_again_by_the_next_run(told: Told) -> None:
    first, second, mended = told["poison"]
    for run in (first, second):
        assert "1 unit(s) of stage 'mine' failed" in run["error"]
        assert "mine/0000007-0000008: 6 actors died with it, 3 of them fresh and its own" in run["error"]
        assert causes(run) == ["died"] * 6
        assert [e["unit"] for e in run["events"] if e["event"] == "unit_quarantined"] == ["mine/0000007-0000008"]
    assert (first["n_runs"]["7"], second["n_runs"]["7"], mended["n_runs"]["7"]) == (6, 12, 13)
    assert len([e for e in first["events"] if e["event"] == "unit_done"]) == 29
    assert [e["unit"] for e in mended["events"] if e["event"] == "unit_done"] == ["mine/0000007-0000008"]


def test_a_unit_that_hangs_is_done_by_a_copy(told: Told) -> None:
    (run,) = told["hang"]
    copies = [e["units"] for e in run["events"] if e["event"] == "call_sent" and e["is_copy"]]
    assert ["mine/0000029-0000030"] in copies
    assert run["n_runs"]["29"] == 2
    assert run["device_s"]["twice"] > 0


def test_a_worker_with_another_gpu_does_nothing_and_the_others_go_on(told: Told, folder: Path) -> None:
    (run,) = told["gpus"]
    refused = [m for m in run["messages"] if "was let go" in m]
    assert len(refused) == 1
    assert "a GPU 'B', the run was begun on 'A'" in refused[0]
    assert causes(run) == ["start_failed"]
    assert json.loads((folder / "gpus" / "gpu.json").read_text()) == {"gpu": "A"}


def test_a_worker_that_does_not_see_out_is_refused_before_the_first_unit(told: Told) -> None:
    (run,) = told["blind"]
    if "needs" in run:
        skip("mount")
    assert run["error"].startswith("StoreError: node ")
    assert "does not see the run in" in run["error"]
    assert "every node mounts at the same path" in run["error"]
    assert run["n_runs"] == {}
    assert run["seconds"] < 60


def test_prometheus_is_told(told: Told) -> None:
    lines = told["metrics"][0]["lines"]

    def value(name: str, **tags: str) -> float:
        wanted = [f'{k}="{v}"' for k, v in tags.items()]
        found = [x for x in lines if x.split("{")[0].endswith(name) and all(w in x for w in wanted)]
        return sum(float(x.rpartition(" ")[2]) for x in found)

    assert value("polyray_units_total", outcome="quarantined", stage="mine") == 2
    assert value("polyray_units_total", outcome="done", stage="mine") == sum(N_UNITS.values())
    assert value("polyray_unit_seconds_count", stage="mine") >= sum(N_UNITS.values())
    assert value("polyray_actors_lost_total", cause="died") == 1 + 2 * 6
    assert value("polyray_device_seconds_total", spent="used") > 0


# The driver

SLEEPERS = "from sleepers import main; main()"


def begun(out: Path, n: int) -> bool:
    return len(n_runs(out)) >= n


def test_a_driver_that_is_told_to_stop_ends_with_130_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask_for_trouble(out)
    run = (out, "--units", "60", "--unit-s", "0.5")
    first = Command(tmp_path / "first", *run, "--log-json", tmp_path / "log", program=SLEEPERS)
    first.wait_until(lambda: begun(out, 6))
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait() == 130, first.stderr
    assert "SIGTERM" in first.stderr
    assert "the same command goes on where this one stopped" in first.stderr
    assert "Traceback" not in first.stderr
    done, first_runs = committed(out, "mine"), n_runs(out)
    # Whatever had begun could finish within the grace, and nothing more was sent.
    assert 6 <= len(done) < 60
    assert len(first_runs) == len(done)
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len([e for e in events if e["event"] == "unit_done"]) == len(done)

    (trouble(out) / "poison").write_text("mine/0000059-0000060")
    second = Command(tmp_path / "second", *run, program=SLEEPERS)
    assert second.wait() == 3, second.stderr
    assert "mine/0000059-0000060: 6 actors died" in second.stderr
    assert len(committed(out, "mine")) == 59
    assert done.items() <= committed(out, "mine").items()
    assert first_runs.items() <= n_runs(out).items()  # nothing was done again


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask_for_trouble(out)
    run = Command(tmp_path / "run", out, "--units", "4", "--unit-s", "600", program=SLEEPERS)
    run.wait_until(lambda: begun(out, 1))
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.stdout)
    started_s = time.monotonic()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert time.monotonic() - started_s < 10
    assert "goes on where this one stopped" in run.stderr
    assert committed(out, "mine") == {}
