"""A config resolved in a process of its own: the same sweep, the same errors, and nothing left behind."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from sweeps import Command, command_line, descendants, tiny, write_config

from polyray.cluster import apart
from polyray.cluster.resolve import Resolved
from polyray.config import load_config
from polyray.errors import ConfigError, ModelError


def test_it_is_what_this_process_would_find(tiny_yaml: Path, resolved: Resolved) -> None:
    found = apart.resolved(load_config(tiny_yaml), "unset")
    assert found.identity == resolved.identity
    assert found.provenance == resolved.provenance
    assert found.notes == resolved.notes
    assert (found.sweep.config, found.sweep.n_neurons) == (resolved.sweep.config, resolved.sweep.n_neurons)


def test_what_it_refuses_is_refused_here(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", tiny(tmp_path, layers=["nowhere"])))
    with pytest.raises(ConfigError, match="nowhere"):
        apart.resolved(config, "unset")


def test_a_fault_is_no_refusal(tmp_path: Path) -> None:
    """The traceback of the other process is not lost."""
    config = load_config(write_config(tmp_path / "c.yaml", tiny(tmp_path)))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*AttributeError"):
        apart.resolved(config.model_copy(update={"science": None}), "unset")


def test_one_that_is_killed_is_told(tiny_yaml: Path) -> None:
    me, known = os.getpid(), set(descendants(os.getpid()))

    def kill() -> None:
        while not (new := [pid for pid in descendants(me) if pid not in known and "spawn_main" in command_line(pid)]):
            time.sleep(0.01)
        os.kill(new[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ModelError, match=r"ended with -9.*a lack of memory"):
        apart.resolved(load_config(tiny_yaml), "unset")
    killer.join()


def test_an_interrupt_ends_it_as_well(tmp_path: Path) -> None:
    run = Command(tmp_path, "run", write_config(tmp_path / "c.yaml", tiny(tmp_path)), "--out", tmp_path / "out")
    children: list[int] = []  # two, where it is seen while it starts something itself
    run.wait_until(lambda: bool(children.extend(run.processes("spawn_main")) or children))
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 130, run.stderr
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in run.stderr


def test_an_interrupt_waits_while_the_process_is_started() -> None:
    """One that came between would leave it behind."""
    before = signal.getsignal(signal.SIGINT)
    done: list[bool] = []

    def start() -> None:
        with apart._uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done
    assert signal.getsignal(signal.SIGINT) == before
