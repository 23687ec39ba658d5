"""Trained tensors from a local file into a network, without executing anything that the file says.

Which question it answers: *do these weights fit this network?* Place in the flow: `vision.py` loads subjects with it.
Files are safetensors or PyTorch files read with `weights_only=True`.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyray.errors import ModelError

# Training scripts wrap the tensors, and parallel ones put a prefix before every name.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIX = "module."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a `.safetensors` file, or of a PyTorch file that holds a state dict or wraps one.

    Raises:
        ModelError: the file is missing, damaged, or holds anything but named tensors.
    """
    if not path.is_file():
        raise ModelError(f"no weights at {str(path)!r}. Give subject.weights the path of a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"cannot read weights from {str(path)!r}: {reason}") from e
    for key in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelError(f"{str(path)!r} holds no state dict (names with tensors). Save network.state_dict().")
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    return dict(state)


def fit(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Puts weights into a network in place; floating point is converted to the network's own.

    Args:
        network: every tensor of its state is overwritten, except batch norms' counters where the weights lack them.
        weights: tensors by name.
        source: what to call the weights in a message.

    Returns:
        Notes for the run: which conversion was made, if any.

    Raises:
        ModelError: names or shapes differ; the message lists the first of each kind.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    both = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    misshapen = [f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}" for name in both]
    problems = [
        f"{len(names)} {what} ({'; '.join(names[:3])}{'; …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ModelError(f"the weights of {source} do not fit the network: {', '.join(problems)}.")
    network.load_state_dict(weights, strict=False)
    cast = sorted(
        {f"{weights[n].dtype} to {own[n].dtype}" for n in own if n in weights and _converted(own, weights, n)}
    )
    return [f"weights of {source} converted from {', '.join(cast).replace('torch.', '')}"] if cast else []


def _converted(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str) -> bool:
    return own[name].is_floating_point() and own[name].dtype != weights[name].dtype
