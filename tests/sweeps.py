"""Small sweeps that tests share: one Ray, one resolved config and one finished sweep for the whole test run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from polyray.cli import app
from polyray.cluster import apart, service
from polyray.cluster.plan import PLANTING, STAGES, works
from polyray.cluster.psi_text_work import workers_of
from polyray.cluster.resolve import Resolved, resolve
from polyray.cluster.work import Worker
from polyray.config import AnyConfig, Execution, load_config
from polyray.overlay import opened
from polyray.records import Receipt
from polyray.store import Store, TableDigest

CENSUS = [stage for stage in STAGES if stage not in PLANTING]
"""Stages of a sweep without planted neurons."""
TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs"

LAYERS = ("norm", "mid", "edges", "capped", "signed")
"""Layers of `networks.EdgeNet` that the tiny sweep has, in order of depth."""
WIDTHS = {"norm": 8, "mid": 12, "edges": 10, "capped": 5, "signed": 6}
N_IMAGES = 300
"""Two units of mining."""
PROMPTS = """red blue green yellow stripes dots checks circle square triangle star ring cross line wave spiral noise
water wood metal glass stone sky grass sand snow fire smoke leaf feather fur wool paper brick tile cloud moss""".split()
HALF_CPU = {"num_cpus": 0.5}
"""Two actors fit on a machine of one core."""


def tiny(folder: Path, **subject: object) -> dict[str, Any]:
    """A config that takes seconds; `folder` must hold prompts.txt."""
    return {
        "science": {
            "subject": {"factory": "networks:edge_net", "layers": list(LAYERS), "input_px": 64} | subject,
            "probe": {"kind": "generated", "n_classes": 12, "n_per_class": N_IMAGES // 12, "image_px": 64},
            "encoder": {"kind": "standin", "input_px": 32, "dtype": "float32", "micro_batch": 32},
            "vocabulary": str(folder / "prompts.txt"),
            "mine": {"K": 24, "K_keep": 24, "k_min": 20},
            "extract": {"n_sample": 8},
            "embed": {"n_pool": 144},
            "cluster": {"k_range": [2, 4], "n_init": 2},
            "calibrate": {"B": 60, "n_bootstrap": 20},
            "swap": {"n_hosts": 6, "n_neurons": 7, "n_random": 40, "n_null": 2},
        },
        "execution": {kind: HALF_CPU | {"max": 1} for kind in ("subject", "encoder", "scoring")},
    }


def write_config(path: Path, raw: dict[str, Any]) -> Path:
    """A config file, and the prompts beside it."""
    (path.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    path.write_text(yaml.safe_dump(raw))
    return path


def command(*args: object) -> Result:
    """The command line in this process, configs resolved included, on the Ray that runs already where one does."""

    def here(config: AnyConfig, out: str) -> Any:
        with redirect_stdout(sys.stderr):
            return apart.resolve(config, out)

    with patch.object(apart, "resolved", here):
        return CliRunner().invoke(app, [str(a) for a in args])


def printed_json(result: Result) -> dict[str, Any]:
    """Standard output that must be one JSON object and nothing else."""
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def sweep(resolved: Resolved, out: Path, execution: dict[str, Any] | None = None) -> list[str]:
    """Runs a sweep on the current Ray and returns the messages worth a person's attention."""
    config = resolved.sweep.config
    if execution is not None:
        config = config.model_copy(update={"execution": Execution.model_validate(execution)})
    messages: list[str] = []
    moved = replace(resolved, sweep=replace(resolved.sweep, config=config, out=str(out)))
    service.run(moved, lambda stage, progress: None, messages.append)
    return messages


def by_hand(resolved: Resolved, out: Path) -> None:
    """The same units in one process, one after the other, backwards, without Ray, dispatcher or service."""
    moved = replace(resolved.sweep, out=str(out))
    store = Store(out)
    store.create_or_resume(resolved.identity, resolved.provenance, moved.config.model_dump(mode="json"))
    store = opened(out)
    store.acquire()
    workers: dict[str, Worker] = {}
    for stage, kind in moved.steps.items():
        if kind not in workers:
            workers[kind] = workers_of(moved)[kind](moved)
        for work in reversed(works(stage, moved.shape, store)):
            (result,) = workers[kind].run([work])
            assert isinstance(result, Receipt), result
            store.commit(result)
    service.check_counts(store, moved)
    store.finish()


def digests(out: Path) -> dict[str, TableDigest]:
    """Digest of every table of a finished sweep."""
    found: dict[str, TableDigest] = json.loads((out / "_SUCCESS").read_text())["tables"]
    return found


def files_of(out: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file below a folder."""
    return {
        str(p.relative_to(out)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(out.rglob("*")) if p.is_file()
    }


def committed(out: Path, stage: str | None = None) -> dict[str, tuple[float, str, list[str]]]:
    """What was committed, by unit: how long it took and where, which no two goes have in common, and its digests."""
    if not (out / "run.json").exists():
        return {}
    receipts = Store(out).committed(stage)
    return {unit: (r.seconds, r.host, [p.digest for p in r.parts]) for unit, r in receipts.items()}


def python_path() -> str:
    """tests/ before whatever is there already, so that workers can import what lies in it."""
    return os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))


def clean_environment(home: Path) -> dict[str, str]:
    """What a command of its own process sees: nothing of the Ray that the tests run, and a home of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"HOME": str(home), "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
AS_FROM_A_TERMINAL = """
import signal
from polyray.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


class Command:
    """`polyray …` in a process group of its own, as a shell starts it."""

    def __init__(self, folder: Path, *args: object, program: str = AS_FROM_A_TERMINAL) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", program, *map(str, args)],
                stdout=stdout,
                stderr=stderr,
                env=clean_environment(folder),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def processes(self, title: str) -> list[int]:
        """Processes that it started whose command line holds a text."""
        return [pid for pid in descendants(self.process.pid) if title in command_line(pid)]

    def wait_until(self, happened: Callable[[], bool], limit_s: float = 400) -> None:
        """Waits for something to happen while the command runs."""
        started_s = time.monotonic()
        while not happened():
            assert self.process.poll() is None, f"it ended first:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() - started_s < limit_s, f"it takes too long:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> int:
        """Sends a signal to the whole process group and returns the exit status once all of it has ended."""
        family = descendants(self.process.pid)
        os.killpg(self.process.pid, number)
        status = self.wait()
        give_up_s = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < give_up_s:
            time.sleep(0.05)
        for pid in family:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        return status

    def wait(self, limit_s: float = 400) -> int:
        """Waits for the end and returns the exit status."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


def command_line(pid: int) -> str:
    """Of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """The one Ray of the test run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("PYTHONPATH", python_path())
        with service.cluster(Execution()):
            yield


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Models in this process use one thread, which is faster where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of the tiny sweep."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder / "tiny.yaml", tiny(folder))


@pytest.fixture(scope="session")
def resolved(tiny_yaml: Path, one_thread: None) -> Resolved:
    """The tiny sweep, resolved once."""
    return resolve(load_config(tiny_yaml), "unset")


@dataclass(frozen=True)
class Finished:
    """A finished sweep."""

    out: Path
    messages: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def finished(resolved: Resolved, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny sweep, undisturbed, with one actor of each kind. Tests must leave it as it is."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return Finished(out, sweep(resolved, out))
