"""What must hold where an actor runs: each thing that may not is told with the node and what to do."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sweeps import Finished

from polyray.cluster.premises import Ready, mixed, premises_of
from polyray.store import Store


def test_the_machine_that_made_a_run_has_its_premises(finished: Finished) -> None:
    found = premises_of(Store(finished.out), "cpu")
    assert (found.torch, found.lacking()) == (torch.__version__, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "1.13.0+cpu"}, "the run was begun with 1.13.0+cpu"),
        ({"out": "/nowhere/out"}, "does not see the run in '/nowhere/out' ('/nowhere/out' holds no run"),
        ({"run_id": "another"}, "does not see the run in"),
        ({"device": "cuda"}, "torch finds no CUDA device"),
    ],
)
def test_what_does_not_hold_is_told(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lacking = replace(premises_of(Store(finished.out), "cpu"), **change).lacking()
    assert lacking is not None
    assert said in lacking
    assert f"node {platform.node()!r}" in lacking


def test_the_first_gpu_is_the_runs(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.create_or_resume({"seed": 0}, {"torch": "2", "device_class": "cuda"}, {})
    assert mixed(store, Ready("a", gpu="NVIDIA A")) is None
    assert mixed(store, Ready("b", gpu="NVIDIA A")) is None
    assert "'NVIDIA B', the run was begun on 'NVIDIA A'" in str(mixed(Store(store.out), Ready("c", gpu="NVIDIA B")))
    assert mixed(store, Ready("d", refusal="no")) == "no"


def test_a_run_on_cpus_has_no_gpu(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.create_or_resume({"seed": 0}, {"torch": "2", "device_class": "cpu"}, {})
    assert mixed(store, Ready("a")) is None
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["run.json"]
