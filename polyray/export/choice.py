"""Which question it answers: *which layers and neurons of the run are meant?*

Place in the flow: under `neuron_records.py`. Neurons are kept as ranges, so that a wide one costs nothing.
"""

import re
from collections.abc import Sequence

import pyarrow.compute as pc

from polyray.errors import ConfigError, nearest
from polyray.models.blocks import layer_index

_MOST = 2**31 - 1


def layers_of(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Layers in order of depth.

    Args:
        asked: names (`h.3`) or indices (`3`) of layers; empty for all.
        known: names of the run's layers.

    Raises:
        ConfigError: the run has no such layer.
    """
    by_index = {str(layer_index(name)): name for name in known}
    for given in asked:
        if given not in known and given not in by_index:
            raise ConfigError(f"--layer: the run has no layer {given!r}.{nearest(given, known)}")
    chosen = {by_index.get(given, given) for given in asked} or set(known)
    return sorted(chosen, key=layer_index)


def ranges_of(asked: str | None) -> list[tuple[int, int]] | None:
    """First and last neuron of each range, or None for all neurons.

    Args:
        asked: such as `0-99,512`: both ends of a range count.

    Raises:
        ConfigError: it is not of that form, or a range runs backwards.
    """
    if asked is None:
        return None
    found = []
    for entry in asked.split(","):
        form = re.fullmatch(r"\s*([0-9]{1,10})\s*(?:-\s*([0-9]{1,10})\s*)?", entry)
        if form is None:
            raise ConfigError(f"--neurons: {entry!r} is no neuron and no range of neurons; say for instance 0-99,512.")
        first, last = int(form[1]), int(form[2] or form[1])
        if first > last:
            raise ConfigError(f"--neurons: the range {entry!r} runs backwards; say '{last}-{first}'.")
        if last > _MOST:
            raise ConfigError(f"--neurons: no layer has a neuron {last}.")
        found.append((first, last))
    return found


def condition(layer: str, ranges: Sequence[tuple[int, int]] | None) -> pc.Expression:
    """Which rows of a table by layer are meant."""
    where = pc.field("layer") == layer
    if ranges is None:
        return where
    neuron = pc.field("neuron")
    among = pc.scalar(False)
    for first, last in ranges:
        among = among | ((neuron >= first) & (neuron <= last))
    return where & among
