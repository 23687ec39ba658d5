"""Names of a language model's layers.

Place in the flow: a leaf that needs no torch, under `language.py` and everything that plans.
"""

_PREFIX = "h."


def layer_name(layer: int) -> str:
    """What tables call the layer of a block."""
    return f"{_PREFIX}{layer}"


def layer_index(layer: str) -> int:
    """Block of a layer's name."""
    return int(layer.removeprefix(_PREFIX))
