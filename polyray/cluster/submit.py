"""Submit: a run that happens elsewhere, as a Ray job.

Which question it answers: *how does a config get to a cluster, and how does the end of its run come back?* Place in
the flow: `polyray submit`. What runs over there is `polyray run`, which joins the cluster that the job belongs to.
Relative paths in a config are files of this machine and travel with it; absolute ones are the cluster's own.
"""

import asyncio
import json
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from polyray.config import AnyConfig, Config, locations
from polyray.errors import ConfigError, StageError

MAX_PACKAGE_BYTES = 100 * 1024**2
"""Ray's job server refuses a request with a larger body."""
CONNECT_S = 10.0
"""Ray's client would wait as long as the operating system does for an address where nothing answers."""
POLL_S = 1.0
"""Between questions after a job whose log has ended or cannot be reached."""
LOST_S = 120.0
"""A cluster that has not answered for so long is taken to be gone."""

_MIB = 1024**2
_CHUNK_BYTES = 1024**2
_N_LARGEST = 5
# With either set, Ray's client talks to that address whatever it is told.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Package:
    """What a job needs of this machine."""

    config: str
    """Where the config lies in the job's working directory."""
    members: dict[str, Path] = field(default_factory=dict)
    """Files of this machine by their place in the job's working directory."""
    notes: list[str] = field(default_factory=list)
    """What is not sent, and why."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: str
    exit_code: int
    """Of `polyray run`; 128 + n where signal n ended it, as shells have it."""
    log: str


def gather(path: Path, config: AnyConfig) -> Package:
    """Finds the config and the files beside it that it names.

    Args:
        path: of the config file.
        config: what it says, overrides included.

    Returns:
        Relative names that exist here, folders with all they hold but hidden files and `__pycache__`. What a
        relative name does not find here may be a model's name, and is left for the run to judge.

    Raises:
        ConfigError: a name points out of the current folder, which becomes the job's working directory.
    """
    inside = not path.is_absolute() and ".." not in path.parts
    package = Package(path.as_posix() if inside else path.name)
    for key, name in _names(config).items():
        path_named = Path(os.path.normpath(name))
        if path_named.is_absolute():
            package.notes.append(f"{key}: {name!r} is not sent; every node of the cluster must have it")
        elif ".." in path_named.parts and path_named.exists():
            raise ConfigError(
                f"{key}: {name!r} lies outside the current folder, which becomes the job's working directory. Move it "
                "below, or give the absolute path that it has on the cluster."
            )
        elif path_named.exists():
            package.members.update({place.as_posix(): place for place in _files(path_named)})
    if package.members.get(package.config, path) != path:
        raise ConfigError(f"{str(path)!r} and a file that it names would both be {package.config!r}: rename one.")
    package.members[package.config] = path
    return package


def _names(config: AnyConfig) -> dict[str, str]:
    """What a config calls by name and may be a file, by key."""
    names = locations(config)
    subject = config.science.subject if isinstance(config, Config) else None
    if subject is not None and subject.factory is not None:
        module = subject.factory.partition(":")[0].partition(".")[0]
        names["science.subject.factory"] = f"{module}.py" if Path(f"{module}.py").is_file() else module
        names |= {f"science.subject.factory_args.{k}": v for k, v in subject.factory_args.items() if isinstance(v, str)}
    return names


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for parent, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def pack(package: Package, archive: Path) -> int:
    """Zips a package; the same files always give the same bytes, which Ray then needs only once.

    Returns:
        Bytes of the archive.

    Raises:
        ConfigError: they are more than Ray takes, with the largest files; or a file cannot be read.
    """
    with ZipFile(archive, "w", ZIP_DEFLATED) as out:
        for place, source in sorted(package.members.items()):
            try:
                info = ZipInfo(place)
                info.compress_type = ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                info.file_size = source.stat().st_size
                with source.open("rb") as f, out.open(info, "w") as member:
                    while chunk := f.read(_CHUNK_BYTES):
                        member.write(chunk)
                        _check_size(package, archive)
            except OSError as e:
                raise ConfigError(f"cannot send {str(source)!r}: {e.strerror or e}.") from e
    return _check_size(package, archive)


def _check_size(package: Package, archive: Path) -> int:
    n_bytes = archive.stat().st_size
    if n_bytes < MAX_PACKAGE_BYTES:
        return n_bytes
    sizes = sorted(((p.stat().st_size, place) for place, p in package.members.items()), reverse=True)
    total = sum(size for size, _ in sizes) / _MIB
    largest = ", ".join(f"{place} {size / _MIB:.1f} MiB" for size, place in sizes[:_N_LARGEST])
    raise ConfigError(
        f"the config and what it names come to {total:.1f} MiB in {len(sizes)} file(s), zipped to more than the "
        f"{MAX_PACKAGE_BYTES / _MIB:.0f} MiB that Ray takes. Largest: {largest}. Put them where every node of the "
        "cluster sees them and give the absolute path there with --set."
    )


def entrypoint(package: Package, config: AnyConfig, out: str, overrides: list[str], as_json: bool) -> str:
    """The command line of the job.

    Raises:
        ConfigError: OUT is relative, and so would lie in the job's working directory, which goes when the job does.
    """
    if "://" not in out and not Path(out).is_absolute():
        raise ConfigError(
            f"--out must be the absolute path of a folder that every node of the cluster sees, got {out!r}: a relative "
            "one would lie in the job's working directory, which Ray deletes."
        )
    words = ["polyray", "run", package.config, "--out", out]
    for override in overrides:
        words += ["--set", override]
    if config.execution.address is not None:
        # The job belongs to the cluster that it was submitted to.
        words += ["--set", "execution.address=null"]
    return shlex.join(words + (["--json"] if as_json else []))


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at an `http://` or `https://` address.

    Raises:
        ConfigError: nothing answers there, something else than Ray does, it asks for another token, or it runs another
            version of Ray.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address must be that of the cluster's dashboard, such as http://HEAD:8265, got {address!r}."
        )
    _knock(address)
    try:
        with _without(_OVERRIDES):
            client = JobSubmissionClient(address)
    except AuthenticationError as e:
        raise ConfigError(
            f"the cluster at {address!r} does not let us in: {_first_line(e)}. Set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or the file ~/.ray/auth_token to the cluster's token, which `ray get-auth-token` prints "
            "there."
        ) from e
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as e:
        raise ConfigError(f"what answers at {address!r} is no Ray dashboard: {_first_line(e)}.") from e
    # Ray's client keeps it, and offers no other way to it.
    there = client._server_ray_version
    if there != ray.__version__:
        raise ConfigError(
            f"Ray {there} runs at {address!r}, and Ray {ray.__version__} here. Install the cluster's version here, or "
            "start the cluster with this one."
        )
    return client


def _knock(address: str) -> None:
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=CONNECT_S).close()
    except urllib.error.HTTPError:
        return  # whoever is there answers
    except (OSError, ValueError) as e:
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        raise ConfigError(
            f"nothing answers at {address!r}: {reason}. Give the address of the cluster's dashboard, by default port "
            "8265 of its head."
        ) from e


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def submit(client: JobSubmissionClient, archive: Path, command: str) -> str:
    """Sends the package and starts the job; returns its id.

    Raises:
        ConfigError: the cluster refuses it.
    """
    try:
        return str(client.submit_job(entrypoint=command, runtime_env={"working_dir": str(archive)}))
    except (AuthenticationError, OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f"the cluster refuses the job: {_first_line(e)}.") from e


def follow(client: JobSubmissionClient, job_id: str, show: Callable[[str], None]) -> Ended:
    """Shows a job's log as it grows, until the job has ended.

    Raises:
        StageError: the cluster stopped answering, or the job ended before its command did.
    """
    n_shown = 0
    answered_s = time.monotonic()
    while True:
        try:
            n_shown = asyncio.run(_tail(client, job_id, n_shown, show))
            info = client.get_job_info(job_id)
            answered_s = time.monotonic()
            if info.status.is_terminal():
                log = client.get_job_logs(job_id)
                break
        except (aiohttp.ClientError, OSError, RuntimeError) as e:
            if time.monotonic() - answered_s > LOST_S:
                raise StageError(
                    f"the cluster has not answered for {LOST_S:.0f} s: {_first_line(e)}. Job {job_id} may go on there; "
                    "if not, the same command goes on with what OUT holds."
                ) from e
        time.sleep(POLL_S)
    show(log[n_shown:])
    if info.status == JobStatus.STOPPED:
        return Ended(info.status.value, 130, log)
    if info.driver_exit_code is None:
        raise StageError(f"job {job_id} ended before its command did: {info.message}")
    code = int(info.driver_exit_code)
    return Ended(info.status.value, code if code >= 0 else 128 - code, log)


async def _tail(client: JobSubmissionClient, job_id: str, n_shown: int, show: Callable[[str], None]) -> int:
    """Every tail starts at the beginning: passes over what was shown; returns how many characters are shown now."""
    n_seen = 0
    try:
        async for lines in client.tail_job_logs(job_id):
            show(lines[max(0, n_shown - n_seen) :])
            n_seen += len(lines)
            n_shown = max(n_shown, n_seen)
    except (aiohttp.ClientError, OSError, RuntimeError):
        # What was shown must be known; whether the job goes on is asked next.
        return n_shown
    return n_shown


def printed_object(log: str) -> dict[str, Any] | None:
    """The last JSON object that stands on a line of its own in a log; none where there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
