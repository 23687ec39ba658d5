"""Quarantine: what the deaths of actors say about the units that were in flight on them.

Which question it answers: *is it the unit, or is it the cluster?* Place in the flow: under `dispatch.py`, which reports
deaths (never the loss of a node) and survivals, and asks where a unit may go next.

After `shared_deaths` a unit goes to fresh actors only, alone. After `solo_deaths` there it is condemned, and it is
quarantined once another unit has survived since it first waited for a fresh actor, or none is left that could. Deaths
are counted apart, since a unit and its copy may die on shared actors once more than the limit.
"""

from collections import Counter
from typing import Literal


class Quarantine:
    """The deaths behind every unit of a stage.

    Attributes:
        condemned: reason by key of the units that are quarantined as soon as another survives.
        quarantined: reason by key of those that are.
        n_survivors: units that an actor lived to tell of.
    """

    def __init__(self, shared_deaths: int, solo_deaths: int, n_survivors: int) -> None:
        self.condemned: dict[str, str] = {}
        self.quarantined: dict[str, str] = {}
        self.n_survivors = n_survivors
        self._most_shared, self._most_solo = shared_deaths, solo_deaths
        self._shared: Counter[str] = Counter()
        self._solo: Counter[str] = Counter()
        self._survivors_at_solo: dict[str, int] = {}

    def died(self, key: str, *, solo: bool) -> None:
        """An actor died with the unit; `solo` where it was fresh and the unit alone on it."""
        (self._solo if solo else self._shared)[key] += 1

    def has_died(self, key: str) -> bool:
        """Whether any death is behind the unit."""
        return key in self._shared  # a unit goes to a fresh actor only after deaths on shared ones

    def next_place(self, key: str, detail: str) -> Literal["anywhere", "alone", "fresh", "nowhere"]:
        """What a unit that waits again needs; one that may go nowhere is condemned, `detail` being the last error."""
        if not self.has_died(key):
            return "anywhere"
        if self._shared[key] < self._most_shared:
            return "alone"
        if self._solo[key] < self._most_solo:
            self._survivors_at_solo.setdefault(key, self.n_survivors)
            return "fresh"
        n_solo = self._solo[key]
        last = f"; the last: {detail}" if detail else ""
        self.condemned[key] = (
            f"{self._shared[key] + n_solo} actors died with it, {n_solo} of them fresh and its own{last}"
        )
        return "nowhere"

    def settle(self, none_left: bool) -> list[str]:
        """Quarantines the condemned units that others have outlived, or that are all there is; returns their keys."""
        found = [key for key in self.condemned if none_left or self.n_survivors > self._survivors_at_solo[key]]
        for key in found:
            self.quarantined[key] = self.condemned.pop(key)
        return found
