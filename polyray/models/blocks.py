"""Names of a language model's layers, and how long its contexts are.

Place in the flow: a leaf that needs no torch, under `language.py` and everything that plans.
"""

from polyray.errors import ConfigError

_PREFIX = "h."
_MOST_CONTEXT = 1024
"""Tokens of a context where the config does not say: longer ones cost more than a token's statistics gain."""


def layer_name(layer: int) -> str:
    """What tables call the layer of a block."""
    return f"{_PREFIX}{layer}"


def layer_index(layer: str) -> int:
    """Block of a layer's name."""
    return int(layer.removeprefix(_PREFIX))


def context_length(key: str, asked: int | None, longest: int) -> int:
    """Tokens of a context.

    Args:
        key: of the config that asks.
        asked: what it says, or None.
        longest: what the model takes.

    Raises:
        ConfigError: it asks for more than that.
    """
    if asked is not None and asked > longest:
        raise ConfigError(f"{key} {asked} is more than the model's {longest} tokens.")
    return asked or min(longest, _MOST_CONTEXT)
