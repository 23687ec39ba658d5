"""Start: `polyray serve`, from its options to a service that answers, and to its end.

Place in the flow: `cli.py` calls `serve_dataset`. It is thin: a Ray, a Serve on it that listens where it was told to,
and the application of `deployment.py`.
"""

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from polyray import files
from polyray.cluster import service
from polyray.config import Execution, PoolConfig
from polyray.errors import ConfigError, DataError
from polyray.report.catalog import Catalog
from polyray.serving.bench import vision_config
from polyray.serving.deployment import NAME, Settings, bound
from polyray.serving.gate import Credentials, Token, names
from polyray.view.pictures import probe_of


def serve_dataset(
    out: str,
    host: str,
    port: int,
    address: str | None,
    probe: str | None,
    replicas: int,
    token: Token | None,
    say: Callable[[str], None],
) -> None:
    """Serves a dataset until it is interrupted.

    Args:
        out: the dataset.
        host: where it listens: an address of the head node of the cluster, which a local Ray's is this machine.
        port: its port; 0 for any free one.
        address: the Ray cluster; None for one of its own.
        probe: where the probe set lies, if not where the run's config says.
        replicas: processes that hold the network.
        token: what lets people in; None for whoever reaches it.
        say: is told the address once it is answered, and what takes long.

    Raises:
        ConfigError: the port is taken, there is no such cluster, it has no room, or something is served there already.
        StoreError: there is no dataset, or it cannot be read.
        KeyboardInterrupt: it was interrupted; all that it started has ended.
    """
    run = Catalog(out).dataset.run
    place = _absolute(out)
    if address is None:
        port = free_port(host, port)
    execution, probe = _execution(run, probe)
    execution = execution.model_copy(update={"address": address})
    if address is None and os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise ConfigError(
            "RAY_AUTH_MODE is set to something else than token: Ray's own ports, which take commands, would be open to "
            "whoever reaches this machine. Unset it."
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with service.cluster(execution):
        _refuse_another()
        pool = _fitting(execution.subject, replicas)
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                serve.start(
                    proxy_location=ProxyLocation.HeadOnly,
                    http_options=HTTPOptions(host=host, port=port),
                    logging_config=quiet,
                )
            credentials = None if token is None else Credentials.of(token.text)
            settings = Settings(place, probe, names(host, port), credentials, replicas)
            app = bound(settings, pool, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
            serve.run(app, name=NAME, route_prefix="/", logging_config=quiet, blocking=False)
            say(f"http://{f'[{host}]' if ':' in host else host}:{port}/")
            while True:
                time.sleep(1.0)
        except (RayServeException, TimeoutError, RuntimeError) as e:
            raise ConfigError(f"it cannot be served at {host}:{port}: {e}") from e
        finally:
            # A Ray of its own ends with all that runs on it.
            if address is not None:
                with suppress(RayServeException, ray.exceptions.RayError):
                    serve.shutdown()


def free_port(host: str, port: int) -> int:
    """The port, which nobody listens on; any such one for 0.

    Raises:
        ConfigError: it is taken, or may not be used.
    """
    try:
        family, kind, protocol, _, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(at)
            sock.listen(1)
            return int(sock.getsockname()[1])
    except OSError as e:
        raise ConfigError(
            f"port {port} of {host} cannot be listened on: {e.strerror}. Choose another with --port, or any free one "
            "with --port 0."
        ) from e


def _absolute(out: str) -> str:
    """OUT as the processes of a cluster find it, which work elsewhere."""
    located = str(files.located(out))
    return located if "://" in located else str(Path(located).absolute())


def _execution(run: dict[str, object], probe: str | None) -> tuple[Execution, str | None]:
    """How much a replica takes, and where the probe set lies as seen from anywhere on this machine."""
    try:
        config = vision_config(run)
        found = probe_of(config.science.probe, probe)
    except DataError:
        # A run over texts is shown as well: the pages say that nothing is swapped.
        return Execution(), probe
    path = getattr(found, "path", None)
    if path is not None and (at := Path(path).expanduser()).exists():
        probe = str(at.absolute())
    return config.execution, probe


def _refuse_another() -> None:
    """One Serve a cluster: what it listens on was decided by whoever started it, and may be more than was asked for."""
    try:
        there = serve.status()
    except RayServeException:
        return
    if there.proxies or there.applications:
        raise ConfigError(
            "something is served on this Ray cluster already, at an address that cannot be changed now. End it "
            "(serve shutdown), or give another --address."
        )


def _fitting(pool: PoolConfig, replicas: int) -> PoolConfig:
    """What a replica takes, made to fit where the cluster has no GPU.

    Raises:
        ConfigError: so many replicas do not fit in the cluster.
    """
    there = ray.cluster_resources()
    if pool.num_gpus and there.get("GPU", 0.0) < pool.num_gpus:
        pool = pool.model_copy(update={"num_gpus": 0.0})
    for name, each in (("CPU", pool.num_cpus), ("GPU", pool.num_gpus)):
        if each * replicas > there.get(name, 0.0):
            raise ConfigError(
                f"{replicas} replica(s) of {each:g} {name} each do not fit: the cluster has {there.get(name, 0.0):g}. "
                "Lower --replicas."
            )
    return pool
