"""Serve: the viewer on this machine, for whoever sits before it.

Place in the flow: `polyray view`. It listens on 127.0.0.1 alone.
"""

import errno
import logging
import signal
import socket
import webbrowser
from collections.abc import Callable

import uvicorn

from polyray.errors import ConfigError
from polyray.report.catalog import Catalog
from polyray.view.app import application

ADDRESS = "127.0.0.1"
PORT = 7870


def listening(port: int) -> socket.socket:
    """A socket that listens on a port of this machine; 0 for any free one.

    Raises:
        ConfigError: the port is taken, or may not be used.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((ADDRESS, port))
        sock.listen(128)
    except OSError as e:
        sock.close()
        taken = e.errno == errno.EADDRINUSE
        why = "is in use: another viewer, perhaps" if taken else f"cannot be used: {e.strerror}"
        raise ConfigError(f"port {port} {why}. Choose another with --port, or any free one with --port 0.") from e
    return sock


def hosts(port: int) -> list[str]:
    """The names under which a browser on this machine may ask."""
    return [f"{name}:{port}" for name in (ADDRESS, "localhost")] + ([ADDRESS, "localhost"] if port == 80 else [])


def view(out: str, port: int, probe: bool, browser: bool, say: Callable[[str], None]) -> None:
    """Serves the viewer of a dataset until it is interrupted: by SIGINT or SIGTERM, which raise `KeyboardInterrupt`.

    Args:
        out: the dataset.
        port: where; 0 for any free port.
        probe: whether whole probe images are shown, from where the run's config says.
        browser: whether to open one.
        say: is told the address once it is answered.

    Raises:
        ConfigError: the port is taken.
        StoreError: there is no dataset, or it cannot be read.
        DataError: the probe set is not to be had.
    """
    with listening(port) as sock:
        catalog = Catalog(out)
        pictures = None
        if probe:
            # Imported here: some probe sets need what subjects need, which takes longer to load than all of the viewer.
            from polyray.view.pictures import Pictures

            pictures = Pictures(catalog)
        bound = sock.getsockname()[1]
        app = application(catalog, hosts=hosts(bound), pictures=pictures)
        address = f"http://{ADDRESS}:{bound}/"
        server = _Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False))
        logging.getLogger("uvicorn").setLevel(logging.WARNING)

        def ready() -> None:
            say(address)
            if browser:
                webbrowser.open(address)

        server.ready = ready
        # As Ctrl-C: uvicorn ends its answers, and what was put aside on the disk is taken away.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.run(sockets=[sock])
        finally:
            signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Tells when it answers."""

    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()
