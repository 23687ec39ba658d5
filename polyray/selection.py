"""Which neurons are meant by a config, where not all are?

Place in the flow: a leaf, under everything that resolves a choice of neurons.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from polyray.errors import ConfigError, nearest


def neuron_lists(held: object) -> dict[Any, list[int | str]]:
    """Lists of neurons by layer as a config or a file holds them; raises `ValueError` where it holds something else."""
    if not isinstance(held, dict):
        raise ValueError("neurons must be lists of indices and ranges by layer, such as {LAYER: [3, 10-19]}")
    for layer, listed in held.items():
        if not isinstance(listed, list):
            raise ValueError(f"neurons of layer {layer} must be a list such as [3, 10-19], got {listed!r}")
        for entry in listed:
            if not (type(entry) is int and entry >= 0) and not re.fullmatch("[0-9]+-[0-9]+", str(entry)):
                raise ValueError(f"neurons of layer {layer}: {entry!r} is neither an index nor a range such as 10-19")
    return {layer: list(listed) for layer, listed in held.items()}


def neurons_swept(
    selection: Mapping[str, Sequence[int | str]] | str | None, widths: Mapping[str, int], key: str
) -> dict[str, NDArray[np.int64]]:
    """Which neurons of each layer are swept.

    Args:
        selection: indices and ranges by layer; or a JSON or YAML file with the same; None for all. Layers that it does
            not name are swept whole.
        widths: neurons of each layer, in order of depth.
        key: of the config, for messages.

    Returns:
        Indices, ascending, of every layer that has any.

    Raises:
        ConfigError: the file cannot be read or holds something else, a layer is not swept, an index is out of range or
            given twice, no neuron is left.
    """
    lists = lists_of(selection, key)
    if strangers := [layer for layer in lists if layer not in widths]:
        raise ConfigError(f"{key}: {strangers[0]!r} is not among the layers swept.{nearest(str(strangers[0]), widths)}")
    found = {
        layer: np.asarray(neurons_of(lists.get(layer, [f"0-{width - 1}"]), width, layer, key), dtype=np.int64)
        for layer, width in widths.items()
    }
    if not any(len(chosen) for chosen in found.values()):
        raise ConfigError(f"{key} leaves no neuron to sweep.")
    return {layer: chosen for layer, chosen in found.items() if len(chosen)}


def lists_of(selection: Any, key: str, checked: Callable[[object], Any] = neuron_lists) -> Any:
    """Lists of neurons by layer, from the file where one is named.

    Args:
        selection: the lists, checked before; a file; None for none.
        key: of the config, for messages.
        checked: what makes lists of what a file holds, or raises `ValueError`.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    if not isinstance(selection, str):
        return selection or {}
    held = read_selection(Path(selection), key)
    try:
        return checked(held)
    except ValueError as e:
        raise ConfigError(f"{key}: {selection!r} is no choice of neurons: {e}.") from e


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
