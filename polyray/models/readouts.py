"""The neurons of a network: which layers it has, and how strongly and where each neuron responds to an image.

Which question it answers: *what does neuron c of layer l say about this image?* Place in the flow: built once per
subject by `vision.py`; the mine stage calls `run`, the extract stage reads the layers' geometry and calls
`input_energy`.

A layer is named by its module path and read from the graph: the module's output, followed forward through norms and
dropout to the first activation, as long as nothing else uses the tensor. So `layer1.0.conv1` of a ResNet is read after
its batch norm and its own call of the block's one `relu`. Effective receptive fields: Luo et al. 2016, "Understanding
the effective receptive field in deep convolutional neural networks".
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyray.errors import ConfigError, ModelError, nearest
from polyray.models.graph import call_name, flat, has_tensors, record
from polyray.models.layers import LayerInfo
from polyray.models.locate import Candidate, Locator, Reading, blocks_of, refuse_chance
from polyray.models.peaks import peaks
from polyray.models.places import places
from polyray.models.rules import RULES

Selection = Literal["census", "block_outputs"] | Sequence[str]


class Readouts:
    """The layers of one network at one input size.

    Args:
        module: the network, in eval mode, taking float [N, channels, height, width].
        shape: channels, height and width of its input.
        dtype: floating point of its input.
        device: where it lives.

    Raises:
        ModelError: the forward fails at this size, or its result for an image depends on chance or on other images.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        recording = record(module, shape, dtype, device)
        refuse_chance(recording)
        self._module = module
        self._candidates = Locator(recording, places(recording, RULES), blocks_of(module, recording)).candidates()
        self._readings = {name: c.reading for name, c in self._candidates.items() if c.reading is not None}

    @property
    def names(self) -> list[str]:
        """Every module that can be read, in the order in which their calls ended; several may read one tensor."""
        return list(self._readings)

    def layers(self, selection: Selection) -> list[LayerInfo]:
        """The layers that a selection names, in the order of the forward pass.

        Args:
            selection: `census` (every conv2d and linear with positions whose read-out ends in an activation, and every
                block output), `block_outputs` (see `locate.blocks_of`), or names. In a name `*` and `?` stand for
                characters other than a dot, `**` for any. Names that read the same tensor count once: a block's name
                is kept before a name given in full, that before a wildcard's, and then the one whose call ended first.

        Raises:
            ConfigError: a name matches no layer, or a named set is empty.
            ModelError: a layer named in full cannot be read; the message says what stands in the way.
        """
        kept: dict[int, Reading] = {}
        names = self._set(selection) if isinstance(selection, str) else self._named(selection)
        for name in sorted(names, key=lambda name: not self._candidates[name].block):
            kept.setdefault(self._readings[name].info.depth, self._readings[name])
        return sorted((reading.info for reading in kept.values()), key=lambda info: info.depth)

    def left_out(self, selection: Selection) -> dict[str, str]:
        """What belongs to a named set but cannot be read, with the reason; empty for explicit names."""
        if not isinstance(selection, str):
            return {}
        return {name: c.refused for name, c in self._candidates.items() if c.refused and _belongs(c, selection)}

    def run(self, x: Tensor, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Responses of layers to a batch: one forward, which ends after the last layer asked for.

        Args:
            x: [N, channels, height, width], prepared for the network.
            names: layers.

        Returns:
            By name: the response, float32 [N, neurons], the maximum over positions (NaN where any is NaN), and its
            position, int64 [N, neurons], the smallest raster index among equals (0 for NaN). On the device of `x`.

        Raises:
            ConfigError: unknown name.
            ModelError: the forward took another course than when it was recorded.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def read(reading: Reading, tensor: Tensor) -> None:
            found[reading.info.name] = peaks(reading.positions_of(tensor))

        with torch.no_grad():
            self._capture(x, [self._reading(name) for name in names], read)
        return {name: found[name] for name in names}

    def run_at(self, x: Tensor, name: str, neuron: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """What one neuron for each image says of it, in all and at one position.

        Args:
            x: [N, channels, height, width], prepared for the network.
            name: layer.
            neuron: int64 [N], the image's neuron.
            position: int64 [N], raster index in the layer's grid.

        Returns:
            Response, float32 [N], the maximum over positions as `run` gives it, and the value at the position,
            float32 [N]. On the device of `x`.

        Raises:
            ConfigError: unknown name.
            ModelError: the forward took another course than when it was recorded.
        """
        taken: list[tuple[Tensor, Tensor]] = []
        rows, neuron, position = torch.arange(len(x), device=x.device), neuron.to(x.device), position.to(x.device)

        def read(reading: Reading, tensor: Tensor) -> None:
            values = reading.positions_of(tensor)[rows, :, neuron]
            taken.append((values.amax(1).float(), values[rows, position].float()))

        with torch.no_grad():
            self._capture(x, [self._reading(name)], read)
        return taken[0]

    def input_energy(self, x: Tensor, name: str, seed: int) -> Tensor:
        """Input-gradient energy of a layer at its central position (Luo et al. 2016, with random signs).

        The gradient is that of the sum over neurons of the layer's values at `LayerInfo.central_position`, each with a
        random sign per image and neuron, so that the expected energy is the sum of the single neurons' energies.

        Args:
            x: [N, channels, height, width], prepared for the network.
            name: layer.
            seed: decides the signs (Philox, counter-based).

        Returns:
            float64 [height, width] on the CPU: squared gradient summed over channels and images; not normalised.

        Raises:
            ConfigError: unknown name.
            ModelError: no gradient reaches the input, or the forward took another course than when it was recorded.
        """
        chosen = self._reading(name)
        leaf = x.detach().requires_grad_()
        taken: list[Tensor] = []

        def read(reading: Reading, tensor: Tensor) -> None:
            taken.append(reading.positions_of(tensor)[:, reading.info.central_position])

        with torch.enable_grad():
            # A copy, because a network may work in place on its input, which autograd forbids on a leaf.
            self._capture(leaf.clone(), [chosen], read)
            values = taken[0]
            signs = np.random.Philox(key=seed).random_raw(values.numel()) & np.uint64(1)
            sign = torch.from_numpy(signs.astype(np.float32) * 2 - 1).to(values).view_as(values)
            total = (values * sign).sum()
            gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise ModelError(f"no gradient reaches the input from layer {name!r}; set extract.window to theoretical.")
        return gradient.double().square().sum((0, 1)).cpu()

    def _capture(self, x: Tensor, readings: list[Reading], read: Callable[[Reading, Tensor], None]) -> None:
        if not readings:
            return
        with contextlib.suppress(_EndedEarly), _float_as_asked(x.device), _Capture(readings, len(x), read):
            self._module(x)
            raise ModelError("the forward ended before the last layer: its course depends on the images.")

    def _reading(self, name: str) -> Reading:
        if name not in self._readings:
            raise ConfigError(f"{name!r} is no layer of this network.{nearest(name, self._readings)}")
        return self._readings[name]

    def _set(self, selection: str) -> list[str]:
        if selection not in ("census", "block_outputs"):
            raise ConfigError(f"subject.layers: no set {selection!r}.{nearest(selection, ['census', 'block_outputs'])}")
        names = [name for name in self._readings if _belongs(self._candidates[name], selection)]
        if not names:
            why = "".join(f" {name} cannot be read: {reason}." for name, reason in self.left_out(selection).items())
            raise ConfigError(
                f"subject.layers: {selection!r} is empty for this network; give layer names."
                f"{why[:500] or nearest('', self._readings)}"
            )
        return names

    def _named(self, patterns: Sequence[str]) -> list[str]:
        if not patterns:
            raise ConfigError("subject.layers is empty; give 'census', 'block_outputs' or layer names.")
        full = [pattern for pattern in patterns if not set(pattern) & set("*?")]
        names: list[str] = []
        for pattern in [*full, *(p for p in patterns if p not in full)]:
            refused = self._candidates[pattern].refused if pattern in self._candidates else ""
            if refused:
                raise ModelError(f"subject.layers: {pattern!r} cannot be read: {refused}.")
            matched = [name for name in self._readings if _wildcard(pattern).fullmatch(name)]
            if not matched:
                raise ConfigError(f"subject.layers: {pattern!r} names no layer.{nearest(pattern, self._readings)}")
            names += matched
        return list(dict.fromkeys(names))


def _belongs(candidate: Candidate, selection: str) -> bool:
    return candidate.census if selection == "census" else candidate.block


def _wildcard(pattern: str) -> re.Pattern[str]:
    parts = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(parts.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*|\?)", pattern)))


class _EndedEarly(Exception):  # noqa: N818 - not an error
    """The last layer asked for has been read."""


class _Capture(TorchFunctionMode):
    """Counts torch calls as the recording does, and hands over the wanted tensors as soon as they are made."""

    def __init__(self, readings: list[Reading], n_images: int, read: Callable[[Reading, Tensor], None]) -> None:
        super().__init__()
        self._wanted: dict[int, list[Reading]] = {}
        for reading in readings:
            self._wanted.setdefault(reading.value.call, []).append(reading)
        self._last = max(self._wanted)
        self._n_images = n_images
        self._read = read
        self._call = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not has_tensors(result):
            return result
        call = self._call
        self._call += 1
        if call in self._wanted:
            tensors = list(flat(result, Tensor))
            for reading in self._wanted[call]:
                self._check(reading, call_name(func), [tuple(t.shape) for t in tensors])
                self._read(reading, tensors[reading.value.output])
            if call == self._last:
                raise _EndedEarly
        return result

    def _check(self, reading: Reading, name: str, shapes: list[tuple[int, ...]]) -> None:
        expected = list(reading.value.shape)
        expected[reading.layout.batch] = self._n_images
        made = shapes[reading.value.output] if reading.value.output < len(shapes) else None
        if name != reading.function or made != tuple(expected):
            raise ModelError(
                f"layer {reading.info.name!r} was recorded as {reading.function} of shape {tuple(expected)}, but this "
                f"forward made {name} of shape {made} there: its course depends on the images."
            )


@contextlib.contextmanager
def _float_as_asked(device: torch.device) -> Iterator[None]:
    """float32 means float32 on CUDA too (cuDNN would round to TF32), with one fixed algorithm."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
