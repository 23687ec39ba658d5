"""The subject: the image network under study, with its weights, its preprocessing and its read-outs.

Which question it answers: *which network is swept, and what does it see of an image?* Place in the flow: the driver
builds it once to resolve the layers, every subject actor builds it again and keeps it; `psi` asks it for responses.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from polyray.config import NumericsConfig, PlantConfig, SubjectConfig
from polyray.errors import ConfigError, ModelError, nearest
from polyray.models import efficientnet_lite, planted
from polyray.models.encoders import normalised, weights_digest
from polyray.models.layers import LayerInfo
from polyray.models.readouts import Readouts, Selection
from polyray.models.weights import fit, read_weights
from polyray.schema import PLANTED_KINDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

UNTRAINED = (
    "THE SUBJECT IS UNTRAINED (subject.weights: none): its neurons are random functions, and nothing that this run "
    "finds is about a trained network."
)


@dataclass(frozen=True)
class Subject:
    """A network ready to be swept."""

    module: nn.Module
    """In eval mode, on its device, channels last, without gradients to its parameters."""
    readouts: Readouts
    input_px: int
    """Side of the square input in pixels."""
    micro_batch: int
    """Images per forward, always."""
    mean: tuple[float, float, float]
    """Mean subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation that RGB is divided by."""
    dtype: torch.dtype
    device: torch.device
    digest: str
    """SHA-256 over mean, std, and name, dtype, shape and bytes of every tensor of the loaded state."""
    trained: bool
    """False with `weights: none`."""
    notes: list[str]
    """What a reader of the results has to know."""
    selection: Selection = "block_outputs"
    """The layers that are swept: those of the config, or the neurons planted on them."""
    plants: planted.Plants | None = None
    """Neurons of known truth, where the config asks for them."""

    def prepare(self, views: NDArray[np.uint8] | Tensor) -> Tensor:
        """Images as the network takes them.

        Args:
            views: uint8 [N, input_px, input_px, 3], RGB.

        Returns:
            [N, 3, input_px, input_px] on the subject's device in its dtype, channels last, normalised in float32.

        Raises:
            ModelError: another shape or type.
        """
        batch = views if isinstance(views, Tensor) else torch.from_numpy(np.require(views, requirements=["C", "W"]))
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1:] != (self.input_px, self.input_px, 3):
            raise ModelError(
                f"the subject takes uint8 views of shape [N, {self.input_px}, {self.input_px}, 3], got {batch.dtype} "
                f"of shape {list(batch.shape)}."
            )
        x = normalised(batch.to(self.device), self.mean, self.std)
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def responses(self, views: NDArray[np.uint8] | Tensor, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Responses of layers to at most one micro-batch of images, which is padded by repeating the last.

        Args:
            views: uint8 [N, input_px, input_px, 3], N from 1 to micro_batch.
            names: layers.

        Returns:
            By layer: response float32 [N, neurons] and position int64 [N, neurons] on the CPU, as `Readouts.run`.

        Raises:
            ModelError: another shape or type, no image, or more than a micro-batch.
        """
        n = len(views)
        found = self.readouts.run(self.prepare(views[self._padded(n)]), names)
        return {name: (response[:n].cpu(), position[:n].cpu()) for name, (response, position) in found.items()}

    def responses_at(
        self, views: NDArray[np.uint8], name: str, neuron: NDArray[np.int64], position: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """What one neuron for each image says of at most one micro-batch of images, padded as in `responses`.

        Args:
            views: uint8 [N, input_px, input_px, 3], N from 1 to micro_batch.
            name: layer.
            neuron: [N], the neuron asked about each image.
            position: [N], raster index of the position asked about.

        Returns:
            Response, the maximum over positions, and the value at the position: float32 [N] on the CPU.

        Raises:
            ModelError: another shape or type, no image, or more than a micro-batch.
        """
        n = len(views)
        rows = self._padded(n)
        asked = (torch.from_numpy(which[rows]) for which in (neuron, position))
        response, at = self.readouts.run_at(self.prepare(views[rows]), name, *asked)
        return response[:n].cpu(), at[:n].cpu()

    def _padded(self, n: int) -> NDArray[np.int64]:
        """Rows of a whole micro-batch: the n there are, the last one repeated."""
        if not 1 <= n <= self.micro_batch:
            raise ModelError(f"the subject takes 1 to {self.micro_batch} views at a time, got {n}.")
        return np.minimum(np.arange(self.micro_batch), n - 1)


def load_subject(config: SubjectConfig, numerics: NumericsConfig, plant: PlantConfig | None = None) -> Subject:
    """Builds the network that the config asks for, loads its weights and records its read-outs.

    With `plant` neurons of known truth stand on the layers and are swept in their place; until their weights are
    installed they are constant.

    The number of threads is the process's, which whoever owns the process sets.

    Raises:
        ConfigError: an unknown model, weights enum or factory.
        ModelError: weights that cannot be reached or do not fit, a network that does not run at this size, a device
            that is not there.
    """
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("numerics.device is cuda, but torch sees no CUDA device here. Set it to cpu.")
    device, dtype = torch.device(numerics.device), getattr(torch, config.dtype)
    # An untrained network is the same on every machine, and no network draws from the process's generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = _build(config)
    network = built.network.cpu().eval().requires_grad_(False)
    mean, std = config.mean or built.mean, config.std or built.std
    state = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    digest = weights_digest(state, {"mean": list(mean), "std": list(std)})
    network.to(device, dtype)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    shape = (3, config.input_px, config.input_px)
    readouts = Readouts(network, shape, dtype, device)
    trained = config.weights != "none"
    notes = [*([] if trained else [UNTRAINED]), *built.notes, *_left_out(readouts.left_out(config.layers))]
    selection: Selection = config.layers
    plants = None
    if plant is not None:
        plants = _plant(network, readouts.layers(config.layers), plant)
        network.to(device, dtype)
        readouts = Readouts(network, shape, dtype, device)
        selection = [planted.planted_name(layer) for layer in plants.layers]
    return Subject(
        network,
        readouts,
        config.input_px,
        config.micro_batch,
        mean,
        std,
        dtype,
        device,
        digest,
        trained,
        notes,
        selection,
        plants,
    )


def _plant(network: nn.Module, layers: Sequence[LayerInfo], config: PlantConfig) -> planted.Plants:
    for info in layers:
        if info.layout != "nchw":
            raise ConfigError(
                f"science.plant: layer {info.name!r} has layout {info.layout}; neurons are planted on feature maps "
                "(nchw) alone. Name other layers in subject.layers."
            )
    n_neurons = len(PLANTED_KINDS) * config.per_kind
    return planted.attach(network, [(info.name, info.width) for info in layers], n_neurons)


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    if not reasons:
        return []
    shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
    return [f"{len(reasons)} layers cannot be read and are left out: {'; '.join(shown)}{'; …' * (len(reasons) > 3)}"]


@dataclass(frozen=True)
class _Built:
    network: nn.Module
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    notes: list[str] = field(default_factory=list)


def _build(config: SubjectConfig) -> _Built:
    if config.factory is not None:
        network = _from_factory(config.factory, config.factory_args)
        if config.weights in ("default", "none"):
            return _Built(network, notes=[] if config.weights == "none" else ["weights are those of the factory"])
        return _Built(network, notes=_local(network, config.weights))
    source, _, model = str(config.name).partition(":")
    sizes: dict[str, efficientnet_lite.Size] = {"efficientnet_lite0": 0, "efficientnet_lite1": 1}
    if config.name in sizes:
        return _efficientnet_lite(sizes[config.name], config.weights)
    if source == "torchvision" and model:
        return _torchvision(model, config.weights)
    if source == "timm" and model:
        return _timm(model, config.weights)
    known = [*sizes, "torchvision:<model>", "timm:<model>"]
    raise ConfigError(f"subject.name: {config.name!r} is not known.{nearest(str(config.name), known)}")


def _local(network: nn.Module, weights: str) -> list[str]:
    path = Path(weights).expanduser()
    return fit(network, read_weights(path), repr(path.name))


def _efficientnet_lite(size: efficientnet_lite.Size, weights: str) -> _Built:
    mean, std = efficientnet_lite.MEAN, efficientnet_lite.STD
    if weights == "default":
        return _Built(efficientnet_lite.load_efficientnet_lite(size), mean, std)
    network = timm.create_model(efficientnet_lite.timm_name(size), pretrained=False)
    return _Built(network, mean, std, [] if weights == "none" else _local(network, weights))


def _torchvision(model: str, weights: str) -> _Built:
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise ConfigError(f"subject.name: torchvision has no classifier {model!r}.{nearest(model, known)}")
    # torchvision sets these two itself when it loads its own weights.
    inception = {"init_weights": False, "transform_input": True} if model in ("googlenet", "inception_v3") else {}
    enum = torchvision.models.get_model_weights(model)
    entry = enum.DEFAULT if weights == "default" else enum.__members__.get(weights.rpartition(".")[2])
    if weights != "none" and entry is None and not _is_path(weights):
        valid = ["default", "none", *enum.__members__]
        raise ConfigError(f"subject.weights: {weights!r} is no weights of {model}.{nearest(weights, valid)}")
    network = torchvision.models.get_model(model, weights=None, **inception)
    if weights == "none":
        return _Built(network)
    if entry is None:
        return _Built(network, notes=_local(network, weights))
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as e:
        file_name = entry.url.rpartition("/")[2]
        raise ModelError(
            f"cannot fetch {entry.url}: {e}. Download it elsewhere and put it at "
            f"{str(Path(torch.hub.get_dir()) / 'checkpoints' / file_name)!r}, or set subject.weights to its path."
        ) from e
    transform = entry.transforms()
    return _Built(network, _rgb(transform.mean), _rgb(transform.std), fit(network, state, str(entry)))


def _timm(model: str, weights: str) -> _Built:
    if not timm.is_model(model):
        raise ConfigError(f"subject.name: timm has no model {model!r}.{nearest(model, timm.list_models())}")
    if weights not in ("default", "none") and not _is_path(weights):
        raise ConfigError(
            f"subject.weights: {weights!r} must be default, none or a file; timm's other weights have a tag in the "
            f"model's name, such as timm:{model.partition('.')[0]}.<tag>."
        )
    try:
        network = timm.create_model(model, pretrained=weights == "default")
    except (OSError, RuntimeError) as e:
        where = timm.get_pretrained_cfg(model)
        repository = f"https://huggingface.co/{where.hf_hub_id}" if where and where.hf_hub_id else "timm's release page"
        raise ModelError(
            f"cannot fetch the weights of timm:{model} ({e}). Download model.safetensors from {repository} elsewhere "
            "and set subject.weights to its path."
        ) from e
    cfg = network.pretrained_cfg
    notes = [] if weights in ("default", "none") else _local(network, weights)
    return _Built(network, _rgb(cfg["mean"]), _rgb(cfg["std"]), notes)


def _is_path(weights: str) -> bool:
    return "/" in weights or Path(weights).suffix in (".pth", ".pt", ".bin", ".safetensors")


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _from_factory(factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    module_name, colon, function_name = factory.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"subject.factory must be 'package.module:function', got {factory!r}.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise ConfigError(f"subject.factory: cannot import {module_name!r}: {e}. Is it installed here?") from e
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"subject.factory: {module_name} has no {function_name!r}.{nearest(function_name, known)}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as e:
        raise ConfigError(f"subject.factory_args do not fit {factory}: {e}.") from e
    network = function(**arguments)
    if not isinstance(network, nn.Module):
        raise ModelError(f"subject.factory: {factory} returned {type(network).__name__}, not a torch.nn.Module.")
    return network
