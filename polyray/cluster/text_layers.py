"""Layers of a categorical sweep: which neurons are swept, and which are mined for it?

Place in the flow: between the config and the plan; knows the model's shape alone, and neither Ray nor torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from polyray.errors import ConfigError, nearest
from polyray.models.blocks import layer_name
from polyray.selection import lists_of, neurons_swept
from polyray.text_config import NeuronLists, TextScience, by_block

if TYPE_CHECKING:
    from polyray.models.language import ModelInfo

Neurons = Mapping[str, NDArray[np.int64]]
"""Indices by layer, ascending; layers in order of depth."""

_LAYERS, _NEURONS = "science.model.layers", "science.model.neurons"


@dataclass(frozen=True)
class Layers:
    """What is swept and what is mined."""

    swept: Neurons
    mined: Neurons
    """Those swept, and all of the layer before each: precursors, and controls of them, may be any of its neurons."""

    def rows(self, layer: str, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where neurons that are mined stand among all of their layer that are."""
        return np.searchsorted(self.mined[layer], neurons)


def layers_of(science: TextScience, info: "ModelInfo") -> Layers:
    """Which neurons of which layers a sweep is about.

    Raises:
        ConfigError: layers or neurons that do not exist, a choice that cannot be read or that leaves none.
    """
    chosen = science.model.layers
    indices = list(range(info.n_layers)) if chosen == "all" else sorted(set(chosen))
    if not indices or indices[-1] >= info.n_layers:
        raise ConfigError(f"{_LAYERS}: {science.model.path!r} has layers 0 to {info.n_layers - 1}, got {indices[-1:]}.")
    lists: NeuronLists = lists_of(science.model.neurons, _NEURONS, by_block)
    if strangers := sorted(set(lists) - set(indices)):
        known = [str(i) for i in indices]
        raise ConfigError(
            f"{_NEURONS}: layers {strangers} are not among those swept, {', '.join(known[:10])}"
            f"{', …' if len(known) > 10 else ''}.{nearest(str(strangers[0]), known)}"
        )
    swept = neurons_swept(
        {layer_name(i): listed for i, listed in lists.items()},
        {layer_name(i): info.n_neurons for i in indices},
        _NEURONS,
    )
    everyone = np.arange(info.n_neurons)
    mined: dict[str, NDArray[np.int64]] = {}
    for i in range(info.n_layers):
        name = layer_name(i)
        if layer_name(i + 1) in swept:
            mined[name] = everyone
        elif name in swept:
            mined[name] = swept[name]
    return Layers(swept, mined)
