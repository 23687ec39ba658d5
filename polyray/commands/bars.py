"""Bars: how far a command is, on the console that the command line hands over.

Place in the flow: beside `cli.py`, for the commands that start work.
"""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class Bars:
    """Progress per stage: bars with rate and estimate on a terminal, plain lines otherwise."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, console: Console) -> None:
        self.shown = False
        self._console = console
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> "Bars":
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, message: str) -> None:
        """A line worth a person's attention."""
        self._console.print(f"[bold yellow]note[/] {escape(message)}")

    def show(self, stage: str, p: Any) -> None:
        """How far a stage is."""
        self.shown = True
        ended = p.n_done + p.n_failed + p.n_quarantined
        rate = f"{p.units_per_s:.2f} units/s" if p.units_per_s else ""
        if p.eta_s is not None and ended < p.n_total:
            rate += f", {duration(p.eta_s)} left"
        if p.n_failed + p.n_quarantined:
            rate += f", {p.n_failed} failed, {p.n_quarantined} quarantined"
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=p.n_total, rate="")
            self._bars.update(self._tasks[stage], completed=ended, rate=rate)
            return
        now_s = time.monotonic()
        ended_now = ended == p.n_total
        if (ended_now and self._last.get(stage) != float("inf")) or now_s - self._last.get(
            stage, -1e9
        ) > self.PLAIN_EVERY_S:
            self._last[stage] = float("inf") if ended_now else now_s
            self._console.print(f"{stage:>10} {ended}/{p.n_total} {rate}")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {s:02d} s" if minutes else f"{s} s"
