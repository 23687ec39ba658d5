"""Which neurons are meant by a config, where not all are?

Place in the flow: a leaf, under everything that resolves a choice of neurons.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from polyray.errors import ConfigError


def read_selection(path: Path, key: str) -> Any:
    """What a JSON or YAML file holds; raises `ConfigError` naming the config's key where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ConfigError(f"{key}: cannot read {str(path)!r} as JSON or YAML: {e}") from e


def neurons_of(listed: Sequence[int | str], width: int, layer: str, key: str) -> list[int]:
    """Neurons of one layer, ascending.

    Args:
        listed: indices, and ranges such as `10-19`, which is ten neurons: the first and the last one both count.
        width: neurons of the layer.
        layer: its name, for messages.
        key: of the config, for messages.

    Raises:
        ConfigError: an index out of range, a range that runs backwards, a neuron that is listed twice.
    """
    found: list[int] = []
    for entry in listed:
        first, _, last = str(entry).partition("-")
        start, stop = int(first), int(last or first) + 1
        if start >= stop:
            raise ConfigError(f"{key}: {layer!r} has the range {entry!r}, which runs backwards; say '{last}-{first}'.")
        if stop > width:
            raise ConfigError(f"{key}: {layer!r} has neurons 0 to {width - 1}, got {entry!r}.")
        found += range(start, stop)
    found.sort()
    twice = sorted({a for a, b in itertools.pairwise(found) if a == b})
    if twice:
        raise ConfigError(f"{key}: {layer!r} lists {twice[:5]} more than once.")
    return found
