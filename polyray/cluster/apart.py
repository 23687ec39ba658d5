"""Apart: a config resolved in a process of its own, which gives its memory back.

Which question it answers: *what is this sweep?*, without what was loaded to find out staying with the driver: torch and
the models take more than a gigabyte, and the driver may run for weeks beside others on a small head. Place in the flow:
`cli.py` asks before it starts Ray; `psi_text_resolve`, `resolve` and `text_resolve` do it.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from polyray.config import AnyConfig
from polyray.errors import ModelError, PolyrayError
from polyray.psi_text_config import PsiTextConfig
from polyray.text_config import TextConfig

if TYPE_CHECKING:
    from polyray.cluster.plan import Resolved
    from polyray.cluster.text_resolve import TextResolved


def resolve(config: AnyConfig, out: str) -> "Resolved | TextResolved":
    """What a config of any kind asks for, in this process.

    Raises:
        ConfigError, DataError, ModelError: something does not exist or does not fit; nothing has been written.
    """
    if isinstance(config, TextConfig):
        from polyray.cluster import text_resolve

        return text_resolve.resolve(config, out)
    if isinstance(config, PsiTextConfig):
        from polyray.cluster import psi_text_resolve

        return psi_text_resolve.resolve(config, out)
    from polyray.cluster import resolve as psi_resolve

    return psi_resolve.resolve(config, out)


def resolved(config: AnyConfig, out: str) -> "Resolved | TextResolved":
    """The same, in a process of its own, whose output goes to standard error.

    Raises:
        ConfigError, DataError, ModelError: as `resolve`; or the process was killed, which a lack of memory does.
        RuntimeError: it raised anything else, which is a fault of polyray; the message is its traceback.
    """
    start = multiprocessing.get_context("spawn")
    answer, end = start.Pipe(duplex=False)
    process = start.Process(target=_answer, args=(config, out, end), daemon=True)
    try:
        with _uninterrupted():
            process.start()
        end.close()
        found = pickle.loads(answer.recv_bytes())
    except EOFError:
        process.join()
        raise ModelError(
            f"the process that loads the models to look at them ended with {process.exitcode} before it could answer "
            "(-9: it was killed, perhaps for a lack of memory). Free some memory, or use a larger machine."
        ) from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        answer.close()
    if isinstance(found, PolyrayError):
        raise found
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that end the command wait until the block's end: a process that is half started could not be ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for came in waiting:
            signal.raise_signal(came)


def _answer(config: AnyConfig, out: str, end: Connection) -> None:
    # The parent decides what an interrupt means, and standard output may be for machines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    found: Resolved | TextResolved | PolyrayError | str
    try:
        found = resolve(config, out)
    except PolyrayError as e:
        found = e
    except Exception:  # raised again where people see it
        found = traceback.format_exc()
    end.send_bytes(pickle.dumps(found))
