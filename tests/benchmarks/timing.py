"""How benchmarks take times: calls in turn, so that a slow spell of the machine hits all of them.

With one thread on the CPU what counts is processor time, which other processes' load distorts less than it does the
clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Times = Sequence[tuple[float, ...]]
"""Seconds of the same calls, taken several times."""


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that a call takes, to the end of what it leaves to a GPU."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turn(calls: Sequence[Callable[[], object]], turn: int, device: str = "cpu") -> tuple[float, ...]:
    """Seconds of each call, taken one after the other.

    Who goes first takes turns, so that what one leaves behind in the caches favours none.
    """
    order = range(len(calls)) if turn % 2 == 0 else range(len(calls) - 1, -1, -1)
    found = {i: seconds(calls[i], device) for i in order}
    return tuple(found[i] for i in range(len(calls)))


def medians(times: Times) -> list[float]:
    """Median seconds of each call."""
    return [statistics.median(column) for column in zip(*times, strict=True)]


def ratios(times: Times, above: int, below: int, digits: int = 4) -> tuple[float, float, float]:
    """Seconds of one call over those of another, taken together each time: median, lowest, highest."""
    found = [row[above] / row[below] for row in times]
    return round(statistics.median(found), digits), round(min(found), digits), round(max(found), digits)
