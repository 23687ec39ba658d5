"""Interrupt: how a run ends when somebody asks it to.

Place in the flow: `cli.py` listens, the loop in `service.py` looks whether it was asked. The first SIGINT or SIGTERM
lets a running stage finish or hand back the units in flight; a second one, or one that comes while no stage listens,
raises `KeyboardInterrupt` at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 10.0
"""What units in flight are given to finish: a call's target duration, and a third of what Kubernetes gives a pod."""


class Interrupted(KeyboardInterrupt):
    """The run ended because it was asked to; the message says what became of the units in flight."""


class Stop:
    """Whether the run was asked to end.

    Attributes:
        asked: name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._patient = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Takes SIGINT and SIGTERM for as long as it lasts; only a main thread can, others are left as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Whoever holds this looks at `asked` often, so that the first signal need not raise."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        first = self.asked is None
        self.asked = signal.Signals(number).name
        if not (first and self._patient):
            raise KeyboardInterrupt(self.asked)
