"""Backlog: units that wait, in order, and which of them go into the next call.

Place in the flow: under `dispatch.py`, which keeps here the units that nothing has happened to yet.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work."""

    key: str
    weight: float = 1.0  # expected cost, in any unit
    affinity: str | None = None  # such as a layer: prefers the actor that was sent the last one; none idles for it


class Backlog:
    """Waiting units without a death behind them, grouped by affinity, each group in order.

    Attributes:
        weight: of all of them.
    """

    def __init__(self) -> None:
        self.weight, self._n = 0.0, 0
        self._groups: dict[str | None, OrderedDict[str, Unit]] = {}

    def __len__(self) -> int:
        return self._n

    def add(self, unit: Unit, *, last: bool) -> None:
        """Puts a unit at the end of its group, or at its front."""
        group = self._groups.setdefault(unit.affinity, OrderedDict())
        group[unit.key] = unit
        group.move_to_end(unit.key, last=last)
        self.weight, self._n = self.weight + unit.weight, self._n + 1

    def discard(self, unit: Unit) -> None:
        """Takes a unit out, where it is here."""
        group = self._groups.get(unit.affinity)
        if group and group.pop(unit.key, None):
            self.weight, self._n = self.weight - unit.weight, self._n - 1
            if not group:
                del self._groups[unit.affinity]

    def take(self, held: str | None, holders: Counter[str | None], max_weight: float, max_units: int) -> list[Unit]:
        """At least one unit: from the group that the actor holds, else from the first that fewest actors hold."""
        taken: list[Unit] = []
        while self._groups and len(taken) < max_units:
            if held is None or held not in self._groups:
                held = min(self._groups, key=lambda name: holders[name])
            unit = next(iter(self._groups[held].values()))
            max_weight -= unit.weight
            if taken and max_weight < 0:
                break
            self.discard(unit)
            taken.append(unit)
        return taken
