"""Policy: the bounds within which the dispatcher decides.

Place in the flow: `service.py` makes one of the execution half of the config for every stage.
"""

import math
from dataclasses import dataclass

from polyray.errors import ConfigError

DRAIN_S = 30.0
"""What a spot node has between its notice and its end: a call must be shorter, or a notice would cost it."""


@dataclass(frozen=True)
class Policy:
    """How many actors, how much in flight, and how much dying is enough; out of bounds is a `ConfigError`."""

    max_actors: int
    min_actors: int = 1  # while as many units wait
    in_flight: int = 2  # calls that may wait or run at one actor
    bundle_s: float = 10.0  # target duration of a call; a third of `DRAIN_S`, so that few calls ever outlast a drain
    shared_deaths: int = 3  # after which a unit goes to fresh actors only
    solo_deaths: int = 3  # on fresh actors, after which it is quarantined
    start_failures: int = 3  # in a row: stop the stage where no actor is alive, pause growth where one is
    start_deaths: int = 12  # the same of actors killed while they start, which says less: it need not be their doing
    start_pause_s: float = 60.0  # length of that pause, from the last failed start
    fruitless_losses: int = 30  # busy actors lost with no unit ending: stop the stage (3 per actor if that is more)
    copies: int = 2  # that a unit may get over time; in flight twice at most
    copy_factor: float = 3.0  # times the expected time, after which a call is late
    copy_after_s: float = 5.0  # and no earlier: short calls wait for the network, not for their units
    idle_s: float = 30.0  # for which an idle actor is kept while a unit in flight might need a copy

    def __post_init__(self) -> None:
        for name in (
            "min_actors",
            "in_flight",
            "shared_deaths",
            "solo_deaths",
            "start_failures",
            "start_deaths",
            "fruitless_losses",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, least in (("copies", 0), ("copy_factor", 1), ("copy_after_s", 0), ("idle_s", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.max_actors < self.min_actors:
            raise ConfigError(f"min_actors <= max_actors must hold, got {self.min_actors} and {self.max_actors}.")
        if not 0 < self.bundle_s < math.inf:
            raise ConfigError(f"bundle_s must be positive and finite, got {self.bundle_s}.")
