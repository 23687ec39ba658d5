"""Jobs: what is sent, what is refused, and a sweep that runs on a head with token authentication."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import ray
from heads import TOKEN, Head, free_ports, started
from ray._private import ray_constants
from ray.job_submission import JobStatus
from sweeps import TESTS, command, printed_json, tiny, write_config

from polyray.cluster import submit
from polyray.config import load_config
from polyray.errors import ConfigError, StageError

OUT = "/shared/out"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a small config that names a network and prompts beside it."""
    monkeypatch.chdir(tmp_path)
    raw = tiny(Path(), layers=["edges"])
    del raw["science"]["swap"]
    write_config(tmp_path / "tiny.yaml", raw)
    shutil.copy(TESTS / "networks.py", tmp_path)
    return tmp_path


def gathered(*overrides: str, path: str = "tiny.yaml") -> submit.Package:
    return submit.gather(Path(path), load_config(path, list(overrides)))


# What is sent


def test_the_config_and_what_it_names_beside_it_are_sent_and_nothing_else(folder: Path) -> None:
    (folder / "thesis.tex").write_text("mine")
    assert set(gathered().members) == {"tiny.yaml", "prompts.txt", "networks.py"}


def test_a_folder_is_sent_without_what_is_hidden_or_compiled(folder: Path) -> None:
    for name in (
        "images/a/1.png",
        "images/a/.DS_Store",
        "images/.git/HEAD",
        "images/b/__pycache__/x.pyc",
        "images/c.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    package = gathered("science.probe={kind: folder, path: ./images/}")
    assert {m for m in package.members if "images" in m} == {"images/a/1.png", "images/c.txt"}


@pytest.mark.parametrize(
    ("override", "sent"),
    [
        ("science.subject.weights=w.pth", "w.pth"),
        ("science.subject.neurons=n.json", "n.json"),
        ("science.encoder={kind: open_clip, pretrained: w.pth}", "w.pth"),
        ("science.subject.factory_args={where: w.pth}", "w.pth"),
        ("science.subject.factory=nets.small:net", "nets/small.py"),
    ],
)
def test_every_key_that_may_name_a_file_counts(folder: Path, override: str, sent: str) -> None:
    for name in ("w.pth", "n.json", "nets/small.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert set(gathered(override).members) - set(gathered().members) == {sent}


def test_files_of_a_language_model_are_sent_and_names_of_the_hub_are_not(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("{}")
    science = {"method": "categorical", "model": {"path": "openai-community/gpt2"}, "corpus": {"path": "corpus.jsonl"}}
    (folder / "text.yaml").write_text(json.dumps({"science": science}))
    assert set(gathered(path="text.yaml").members) == {"text.yaml", "corpus.jsonl"}


def test_absolute_paths_are_the_clusters_and_said_to_be(folder: Path) -> None:
    package = gathered(f"science.vocabulary={folder / 'prompts.txt'}")
    assert set(package.members) == {"tiny.yaml", "networks.py"}
    (note,) = package.notes
    assert note.startswith("science.vocabulary: ")
    assert "every node of the cluster must have it" in note


def test_a_file_outside_the_current_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "below").mkdir()
    shutil.copy("tiny.yaml", "below")
    monkeypatch.chdir(folder / "below")
    with pytest.raises(ConfigError, match=r"science\.vocabulary: '\.\./prompts\.txt' lies outside"):
        gathered("science.vocabulary=../prompts.txt")


def test_a_config_elsewhere_is_sent_by_its_name(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    shutil.copy("tiny.yaml", elsewhere)
    package = gathered(path=str(elsewhere))
    assert (package.config, package.members["mine.yaml"]) == ("mine.yaml", elsewhere)
    clash = elsewhere.with_name("prompts.txt")
    shutil.copy("tiny.yaml", clash)
    with pytest.raises(ConfigError, match=r"both be 'prompts\.txt'"):
        gathered(path=str(clash))


def test_the_same_files_make_the_same_bytes(folder: Path) -> None:
    package = gathered()
    n_bytes = submit.pack(package, folder / "1.zip")
    os.utime("prompts.txt", (1e9, 1e9))
    submit.pack(package, folder / "2.zip")
    assert (folder / "1.zip").read_bytes() == (folder / "2.zip").read_bytes()
    assert n_bytes == (folder / "1.zip").stat().st_size
    with ZipFile(folder / "1.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            name: path.read_bytes() for name, path in package.members.items()
        }


def test_more_than_ray_takes_is_refused_with_the_largest_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit.MAX_PACKAGE_BYTES == ray_constants.DASHBOARD_CLIENT_MAX_SIZE
    monkeypatch.setattr(submit, "MAX_PACKAGE_BYTES", 2 * 1024**2)
    (folder / "w.pth").write_bytes(os.urandom(3 * 1024**2))
    (folder / "n.json").write_bytes(bytes(5 * 1024**2))
    package = gathered("science.subject.neurons=n.json")
    assert submit.pack(package, folder / "1.zip") < 1024**2
    package = gathered("science.subject.neurons=n.json", "science.subject.weights=w.pth")
    with pytest.raises(
        ConfigError, match=r"come to 8\.0 MiB in 5 file.*than the 2 MiB.*n\.json 5\.0 MiB, w\.pth 3\.0 MiB"
    ):
        submit.pack(package, folder / "2.zip")


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot send 'gone\.pth': No such file"):
        submit.pack(submit.Package("c", {"gone.pth": Path("gone.pth")}), folder / "1.zip")


# The command of the job


def test_command_of_the_job_is_run_with_the_same_overrides(folder: Path) -> None:
    config = load_config("tiny.yaml")
    words = shlex.split(submit.entrypoint(gathered(), config, OUT, ["a.b={c: 'd e'}"], as_json=True))
    assert words == ["polyray", "run", "tiny.yaml", "--out", OUT, "--set", "a.b={c: 'd e'}", "--json"]


def test_job_joins_the_cluster_that_it_is_submitted_to_whatever_the_config_says(folder: Path) -> None:
    config = load_config("tiny.yaml", ["execution.address=10.0.0.1:6379"])
    words = shlex.split(submit.entrypoint(gathered(), config, OUT, ["execution.address=10.0.0.1:6379"], as_json=False))
    overrides = [following for word, following in pairwise(words) if word == "--set"]
    assert load_config("tiny.yaml", overrides).execution.address is None


def test_relative_out_is_refused_and_an_object_store_is_left_to_the_run(folder: Path) -> None:
    config = load_config("tiny.yaml")
    with pytest.raises(ConfigError, match=r"absolute path .* got 'out/here'"):
        submit.entrypoint(gathered(), config, "out/here", [], as_json=False)
    assert "s3://bucket/out" in submit.entrypoint(gathered(), config, "s3://bucket/out", [], as_json=False)


# Whom to ask


class Answer(BaseHTTPRequestHandler):
    """A server that answers every request in one way."""

    status = 200
    body = b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answer]]]:
    """Address of a server, and how it answers."""

    class Mine(Answer):
        pass

    http = HTTPServer(("127.0.0.1", 0), Mine)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", Mine
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("version", ["2.9.3", "3.0.0"])
def test_another_version_of_ray_is_refused(server: tuple[str, type[Answer]], version: str) -> None:
    """The other version is a mock: one alone can be installed."""
    address, answer = server
    answer.body = json.dumps({"version": "4", "ray_version": version}).encode()
    with pytest.raises(ConfigError, match=rf"Ray {version} runs at '{address}', and Ray {ray.__version__} here"):
        submit.connect(address)
    answer.body = json.dumps({"version": "4", "ray_version": ray.__version__}).encode()
    assert submit.connect(address + "/").get_address() == address


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b"{}"), (200, b"[]"), (404, b""), (500, b"")])
def test_what_is_no_ray_is_told_from_it(server: tuple[str, type[Answer]], status: int, body: bytes) -> None:
    address, answer = server
    answer.status, answer.body = status, body
    with pytest.raises(ConfigError, match=f"what answers at '{address}' is no Ray dashboard"):
        submit.connect(address)


@pytest.mark.parametrize("address", ["", "10.0.0.1:8265", "ray://10.0.0.1:10001", "ftp://10.0.0.1"])
def test_address_that_is_no_dashboards_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"such as http://HEAD:8265, got"):
        submit.connect(address)


def test_address_where_nothing_answers_is_refused() -> None:
    (port,) = free_ports(1)
    for address in (f"http://127.0.0.1:{port}", "http://nowhere.invalid:8265", "http://[bad"):
        with pytest.raises(ConfigError, match="nothing answers at"):
            submit.connect(address)


def test_environment_does_not_override_the_address(
    server: tuple[str, type[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, answer = server
    answer.body = json.dumps({"version": "4", "ray_version": ray.__version__}).encode()
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265")
    assert submit.connect(address).get_address() == address
    assert os.environ["RAY_ADDRESS"] == os.environ["RAY_API_SERVER_ADDRESS"] == "http://10.0.0.1:8265"


# Following a job


class Info:
    """A mock of what Ray says of a job."""

    def __init__(self, status: JobStatus, code: int | None) -> None:
        self.status, self.driver_exit_code, self.message = status, code, "it is told why"


class Client:
    """A mock of Ray's client: every tail starts at the beginning, and the first ones break off."""

    def __init__(self, log: str, *infos: Info | Exception, breaks_at: int = 0) -> None:
        self.log, self.infos, self.breaks_at = log, list(infos), breaks_at

    async def tail_job_logs(self, job_id: str) -> Any:
        if len(self.infos) > 1:
            yield self.log[: self.breaks_at]
            raise RuntimeError("closed unexpectedly")
        yield self.log[:3]
        yield self.log[3:-1]

    def get_job_info(self, job_id: str) -> Info:
        info = self.infos.pop(0)
        if isinstance(info, Exception):
            raise info
        return info

    def get_job_logs(self, job_id: str) -> str:
        return self.log


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 130),
        (JobStatus.STOPPED, -15, 130),
    ],
)
@pytest.mark.parametrize("breaks_at", [0, 2, 5])
def test_log_is_shown_once_and_the_exit_code_is_the_jobs(
    at_once: None, status: JobStatus, code: int | None, exit_code: int, breaks_at: int
) -> None:
    shown: list[str] = []
    running = Info(JobStatus.RUNNING, None)
    client = Client("one\ntwo\nthree\n", running, OSError("away"), running, Info(status, code), breaks_at=breaks_at)
    ended = submit.follow(client, "job", shown.append)  # type: ignore[arg-type]
    assert "".join(shown) == ended.log == client.log
    assert (ended.status, ended.exit_code) == (status.value, exit_code)


def test_job_that_never_ran_its_command_says_why(at_once: None) -> None:
    with pytest.raises(StageError, match="before its command did: it is told why"):
        submit.follow(Client("log", Info(JobStatus.FAILED, None)), "job", lambda _: None)  # type: ignore[arg-type]


def test_cluster_that_is_gone_is_given_up(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LOST_S", -1.0)
    with pytest.raises(StageError, match=r"has not answered for .* gone.*the same command goes on"):
        submit.follow(Client("", OSError("gone"), OSError("gone")), "job", lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ('noise\n{"a": 1}\n', {"a": 1}),
        ('{"a": 1}\n{"a": 2}\n{broken\nnoise', {"a": 2}),
        ("{broken\n[1]\n", None),
        ("", None),
    ],
)
def test_object_that_run_printed_is_found_in_the_log(log: str, found: dict[str, Any] | None) -> None:
    assert submit.printed_object(log) == found


# The command line


@pytest.fixture
def no_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is asked of any cluster; addresses are written down."""
    asked: list[str] = []
    monkeypatch.setattr(submit, "connect", asked.append)
    monkeypatch.setattr(submit, "submit", lambda client, archive, line: "job-1")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    return asked


def test_address_is_the_options_or_the_environments(no_cluster: list[str]) -> None:
    for options in ((), ("--address", "http://10.0.0.2:8265")):
        result = command("submit", "tiny.yaml", "--out", OUT, "--no-wait", *options)
        assert result.exit_code == 0, result.output
    assert no_cluster == ["http://10.0.0.1:8265", "http://10.0.0.2:8265"]


def test_interrupt_stops_watching_and_says_how_to_go_on(no_cluster: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "follow", interrupted)
    result = command("submit", "tiny.yaml", "--out", OUT, "--json")
    assert result.exit_code == 130
    assert printed_json(result)["exit"] == 130
    assert "ray job logs job-1 --follow, ray job stop job-1" in result.stderr


def test_what_cannot_be_sent_is_refused_before_a_cluster_is_asked(no_cluster: list[str]) -> None:
    for options in (("--out", "out/here"), ("--out", OUT, "--set", "science.sede=1")):
        result = command("submit", "tiny.yaml", *options, "--json")
        assert result.exit_code == 2
        assert printed_json(result)["error"] == "ConfigError"
    assert no_cluster == []


# A head with token authentication


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started(tmp_path_factory.mktemp("head")) as one:
        yield one


def ran(line: list[object], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    words = [str(word) for word in line]
    return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=500)


def polyray(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "polyray.cli", *arguments]


def job_info(head: Head, job_id: str) -> dict[str, Any]:
    """What the head's job server says of a job, asked without Ray."""
    request = urllib.request.Request(f"{head.address}/api/jobs/{job_id}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


@pytest.mark.parametrize(
    ("mode", "token", "said"),
    [
        (None, None, "Missing authentication token"),
        ("token", "", "couldn't find an authentication token"),
        ("token", "f" * 64, "Invalid authentication token"),
    ],
    ids=["mode unset", "no token", "wrong token"],
)
def test_wrong_or_missing_token_is_refused(
    head: Head, folder: Path, mode: str | None, token: str | None, said: str
) -> None:
    environment = head.environment(HOME=str(folder), RAY_AUTH_TOKEN=token or "")
    del environment["RAY_AUTH_MODE"]
    environment |= {} if mode is None else {"RAY_AUTH_MODE": mode}
    done = ran(polyray("submit", "tiny.yaml", "--out", OUT, "--address", head.address, "--json"), environment, folder)
    assert done.returncode == 2, done.stderr
    printed = json.loads(done.stdout)
    assert printed["error"] == "ConfigError"
    assert printed["message"].startswith(f"the cluster at '{head.address}' does not let us in: ")
    assert said in printed["message"]
    assert "RAY_AUTH_MODE=token" in printed["message"]
    assert "f" * 64 not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_sweep_runs_as_a_job_and_verifies(head: Head, folder: Path) -> None:
    out = folder / "out"
    # An address in the config or the environment must not lead the job, or the client, anywhere else.
    environment = head.environment(RAY_ADDRESS="http://127.0.0.1:1")
    elsewhere = ("--set", "execution.address=127.0.0.1:1", "--set", "science.calibrate.B=20")
    where = ("--out", out, "--address", head.address)
    done = ran(polyray("submit", "tiny.yaml", *where, *elsewhere, "--json"), environment, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    assert (printed["status"], printed["exit"]) == ("SUCCEEDED", 0)
    assert printed["files"] == ["networks.py", "prompts.txt", "tiny.yaml"]
    assert printed["run"]["run_id"] == json.loads((out / "run.json").read_text())["run_id"]
    assert "calibrate 1/1" in done.stderr
    # A driver that had started a Ray of its own would be unknown to this cluster.
    assert job_info(head, printed["job_id"])["driver_info"] is not None
    audit = ran(polyray("verify", out, "--json"), environment, folder)
    assert audit.returncode == 0, audit.stdout
    assert json.loads(audit.stdout)["ok"]

    # Without polyray on this side: the same run, which finds nothing left to do.
    ray_cli = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.address]
    run = ["polyray", "run", "tiny.yaml", "--out", out, "--set", "science.calibrate.B=20"]
    done = ran([*ray_cli, "--working-dir", ".", "--submission-id", "plain", "--", *run], head.environment(), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run_id {printed['run']['run_id']}" in done.stdout
    assert job_info(head, "plain")["driver_info"] is not None


def test_exit_code_is_that_of_the_job(head: Head, folder: Path) -> None:
    where = ("--out", folder / "out", "--address", head.address)
    refused = ("--set", "science.vocabulary=/nowhere/prompts.txt")
    done = ran(polyray("submit", "tiny.yaml", *where, *refused, "--json"), head.environment(), folder)
    assert done.returncode == 2, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    assert (printed["status"], printed["exit"]) == ("FAILED", 2)
    assert "/nowhere/prompts.txt" in printed["run"]["message"]
    assert not (folder / "out").exists()


def test_no_wait_leaves_once_the_job_is_submitted(head: Head, folder: Path) -> None:
    where = ("--out", folder / "out", "--address", head.address)
    refused = ("--set", "science.vocabulary=/nowhere/prompts.txt")
    done = ran(polyray("submit", "tiny.yaml", *where, *refused, "--no-wait", "--json"), head.environment(), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    assert (printed["status"], printed["exit"], printed["run"]) == (None, None, None)
    assert job_info(head, printed["job_id"])["entrypoint"] == printed["command"]


IN_ITS_STORE = """
import json, sys
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY as key
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER as space
from ray._raylet import GcsClient

client = GcsClient(address=sys.argv[1])
said = json.loads(client.internal_kv_get(key, space))
print(said["ray_version"])
client.internal_kv_put(key, json.dumps(said | {"ray_version": sys.argv[2]}).encode(), True, space)
"""


def test_a_driver_of_another_version_of_ray_is_refused(head: Head, folder: Path) -> None:
    """The head says in its store which Ray it is: there it is made another, since one machine has one."""

    def become(version: str) -> str:
        done = ran([sys.executable, "-c", IN_ITS_STORE, head.gcs, version], head.environment(), folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    here = become("2.9.3")
    try:
        run = polyray("run", "tiny.yaml", "--out", folder / "out", "--address", head.gcs, "--json")
        done = ran(run, head.environment(), folder)
    finally:
        assert become(here) == "2.9.3"
    assert done.returncode == 2, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    assert printed["error"] == "ConfigError"
    assert f"the Ray cluster at '{head.gcs}' is of another version" in printed["message"]
    assert "Ray: 2.9.3" in printed["message"]
    assert f"Ray: {here}" in printed["message"]
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()
