"""Devices: whether what the config computes on is there.

Place in the flow: a leaf under everything that loads a model.
"""

import torch

from polyray.errors import ModelError
from polyray.settings import NumericsConfig


def require_cuda(numerics: NumericsConfig) -> None:
    """Raises `ModelError` where a GPU is asked for and torch finds none."""
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("numerics.device is 'cuda', but torch finds no CUDA device here. Set it to 'cpu'.")
