"""Calls: what an actor has been sent, and what the dispatcher remembers of it.

Place in the flow: `dispatch.py` makes them, `service.py` sends them off.
"""

from dataclasses import dataclass, field
from typing import Literal

Manner = Literal["shared", "alone", "solo", "copy"]
"""How a call is sent: only a shared one may have others beside it on its actor; a solo one needs a fresh actor."""


@dataclass(frozen=True)
class Call:
    """Units to be run one after the other by one actor in one remote call."""

    call_id: int
    actor_id: str
    keys: tuple[str, ...]
    is_copy: bool = False  # of a unit that is in flight elsewhere


@dataclass
class Actor:
    """An actor that has joined and not left."""

    since_s: float  # when it began the first of its calls, or to idle
    calls: dict[int, Call] = field(default_factory=dict)  # in the order in which it runs them
    fresh: bool = True
    alone: bool = False  # nothing may join what it runs
    solo: bool = False  # runs a unit that needs a fresh actor
    draining: bool = False
    spent: bool = False  # has ended a call since its node drains
    affinity: str | None = None
