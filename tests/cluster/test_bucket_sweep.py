"""A whole sweep whose OUT is a bucket: the workers write there, and what it holds is what a folder would."""

import json
import os
import re
import signal
from pathlib import Path

from sweeps import Command, Finished, command, digests, printed_json
from viewing import viewing

import polyray
from polyray.store import Store


def n_committed(out: str) -> int:
    try:
        return len(Store(out).committed())
    except polyray.PolyrayError:
        return 0  # it has not begun


def test_a_sweep_into_a_bucket_survives_its_driver(
    out: str, tiny_yaml: Path, finished: Finished, tmp_path: Path
) -> None:
    """The driver and all its workers are killed half-way; the same command then ends the sweep, and loses a worker."""
    run = ("run", tiny_yaml, "--out", out, "--json")
    first = Command(tmp_path / "first", *run)
    first.wait_until(lambda: n_committed(out) >= 12)
    first.send(signal.SIGKILL)
    done = set(Store(out).committed())
    assert not Store(out).is_finished

    second = Command(tmp_path / "second", *run)
    second.wait_until(lambda: bool(second.processes("WorkerActor")) and n_committed(out) > len(done))
    os.kill(second.processes("WorkerActor")[0], signal.SIGKILL)
    assert second.wait() == 0, second.stderr
    assert "A worker died" in second.stderr  # Ray prints it, and would do so among the results
    assert done <= set(Store(out).committed())
    assert Store(out).digests() == digests(finished.out)
    told = json.loads(second.stdout)
    assert told["pictures"]
    assert all((tmp_path / "second" / picture).is_file() for picture in told["pictures"])  # a bucket shows nobody any

    verified = command("verify", out, "--json")
    assert (verified.exit_code, printed_json(verified)["ok"]) == (0, True)
    status = printed_json(command("status", out, "--json"))
    assert status["finished"]
    neurons = polyray.open(out)["neurons"].to_table()
    assert neurons.equals(polyray.open(finished.out)["neurons"].to_table())

    written = command("report", out, "--out", tmp_path / "r.html", "--json")
    assert (written.exit_code, printed_json(written)["finished"]) == (0, True), written.output
    beside = command("report", finished.out, "--out", tmp_path / "beside.html")
    assert beside.exit_code == 0
    tables = [re.findall("<td[^>]*>.*?</td>", (tmp_path / name).read_text()) for name in ("r.html", "beside.html")]
    assert len(tables[0]) > 100
    assert [a for a, b in zip(*tables, strict=True) if a != b and "actor" not in a] == []
    with viewing(out) as viewer:
        assert len(viewer.page("/neurons")) > 1000
