"""Pace: how long units take, how fast they end, and when the last one will.

Place in the flow: under `dispatch.py`, which reports every unit that ends.
"""

import statistics
from collections import deque
from dataclasses import dataclass

_N_MEASURED = 31  # enough for a median that a dozen odd values cannot move, few enough to follow a change of layer
_N_SPEED = 256  # units that ended most recently, over which the speed is measured


@dataclass(frozen=True)
class Progress:
    """How far the stage is; what is neither done, failed nor quarantined is still open.

    The speed is that of the last few hundred units, 0 until one has ended; `eta_s` is by weight at that speed, None
    where it is unknown or the stage has stopped.
    """

    n_done: int
    n_failed: int
    n_quarantined: int
    n_total: int
    units_per_s: float
    eta_s: float | None


class Pace:
    """What was measured of the units that ended.

    Attributes:
        s_per_weight: median over the last units that an actor reported, in seconds per unit of weight; None until one
            was.
        n_measured: how many units that is a median of.
    """

    def __init__(self) -> None:
        self.s_per_weight: float | None = None
        self._s_per_weight: deque[float] = deque(maxlen=_N_MEASURED)
        self._ended: deque[tuple[float, float]] = deque(maxlen=_N_SPEED)  # time, weight

    @property
    def n_measured(self) -> int:
        return len(self._s_per_weight)

    def start(self, now_s: float) -> None:
        """The speed counts from here; calling it again changes nothing."""
        if not self._ended:
            self._ended.append((now_s, 0.0))

    def measured(self, seconds: float, weight: float) -> None:
        """An actor needed so long for a unit of this weight."""
        self._s_per_weight.append(seconds / weight)
        self.s_per_weight = statistics.median(self._s_per_weight)

    def ended(self, weight: float, now_s: float) -> None:
        """A unit ended, one way or another."""
        self._ended.append((now_s, weight))

    def speed(self, now_s: float) -> tuple[float, float]:
        """Units and weight a second; zeros until a unit has ended."""
        if not self._ended or now_s <= self._ended[0][0]:
            return 0.0, 0.0
        elapsed_s = now_s - self._ended[0][0]
        weight = sum(weight for _, weight in self._ended) - self._ended[0][1]
        return (len(self._ended) - 1) / elapsed_s, weight / elapsed_s
