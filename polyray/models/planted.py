"""Neurons of known truth, added to a real network.

Which question it answers: *does the method find what is there?* Place in the flow: `vision.load_subject` attaches them
where the config has a `plant` section; their weights are fitted by `psi.plant` and installed before mining. A planted
neuron is the largest of three 1×1 convolutions on a layer's feature map: the evidence for one, two or three classes.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polyray.errors import ModelError

PREFIX = "planted"
N_PARTS = 3
"""Most classes of one neuron; neurons with fewer repeat one."""


def planted_name(layer: str) -> str:
    """The layer of planted neurons on a layer's output."""
    return f"{PREFIX}.{layer}"


class Weights(NamedTuple):
    """What makes the planted neurons of one layer."""

    weight: Float[Tensor, "parts neurons channels"]
    bias: Float[Tensor, "parts neurons"]


class PlantedNeurons(nn.Module):
    """The largest of three 1×1 convolutions; all zero, and so constant, until `install` is called.

    Args:
        channels: of the feature map.
        n_neurons: how many neurons.
    """

    def __init__(self, channels: int, n_neurons: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(channels, n_neurons, 1) for _ in range(N_PARTS))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n neurons h w"]:
        """Responses at every position."""
        return torch.maximum(torch.maximum(self.first(x), self.second(x)), self.third(x))

    def install(self, weights: Weights) -> None:
        """Sets the fitted weights.

        Raises:
            ModelError: they have another shape.
        """
        with torch.no_grad():
            for part, weight, bias in zip((self.first, self.second, self.third), *weights, strict=True):
                if part.weight.shape[:2] != weight.shape or part.bias is None:
                    raise ModelError(
                        f"planted weights of shape {list(weight.shape)} do not fit {len(part.weight)} neurons on "
                        f"{part.in_channels} channels."
                    )
                part.weight.copy_(weight[:, :, None, None])
                part.bias.copy_(bias)


class Plants(NamedTuple):
    """The planted neurons of one network."""

    module: nn.Module
    layers: tuple[str, ...]
    """The network's layers on which neurons stand, in order of depth."""

    def neurons(self, layer: str) -> PlantedNeurons:
        """The planted neurons on a layer."""
        found = self.module.get_submodule(planted_name(layer))
        if not isinstance(found, PlantedNeurons):
            raise ModelError(f"nothing is planted on layer {layer!r}.")
        return found

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps of the layers for a batch, by layer: [N, channels, h, w]."""
        found: dict[str, Tensor] = {}

        def keep(layer: str) -> RemovableHandle:
            def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
                found[layer] = output

            return self.module.get_submodule(layer).register_forward_hook(hook)

        with torch.no_grad(), ExitStack() as handles:
            for layer in self.layers:
                handles.callback(keep(layer).remove)
            self.module(x)
        return found


def attach(network: nn.Module, layers: Sequence[tuple[str, int]], n_neurons: int) -> Plants:
    """Adds planted neurons to a network, in place; what it computes otherwise stays the same.

    Args:
        network: the backbone.
        layers: name and channels of each layer whose output is a feature map [N, channels, h, w].
        n_neurons: neurons planted on each.

    Raises:
        ModelError: the network has a submodule of that name already.
    """
    if hasattr(network, PREFIX):
        raise ModelError(f"the network has a submodule {PREFIX!r} of its own; nothing can be planted on it.")
    root = nn.Module()
    network.add_module(PREFIX, root)
    for layer, channels in layers:
        parent = root
        *path, last = layer.split(".")
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, PlantedNeurons(channels, n_neurons))
        network.get_submodule(layer).register_forward_hook(_Respond(parent.get_submodule(last)))
    return Plants(network, tuple(layer for layer, _ in layers))


class _Respond:
    """Lets planted neurons respond whenever their layer has an output; the output itself goes on unchanged."""

    def __init__(self, neurons: nn.Module) -> None:
        self._neurons = neurons

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._neurons(output)
