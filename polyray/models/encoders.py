"""Which question it answers: *where does a patch lie, and which prompts lie near it?*

Place in the flow: extract says which boxes; embed cuts them with `crop` and encodes them with an `Encoder`; cluster
names the clusters with the encoded prompts. The encoders themselves: `open_clip_encoder` (the reference) and
`standin` (for machines that cannot reach CLIP's weights).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from polyray.config import EncoderConfig, NumericsConfig, OpenClip
from polyray.errors import ConfigError, DataError, ModelError
from polyray.models.devices import require_cuda

Vectors = tuple[Float16[Tensor, "n g"], Float16[Tensor, "n t"] | None]
"""Geometry, and text-aligned vectors where they are not the same."""

_PROMPTS_AT_ONCE = 64


class PromptEncoder(ABC):
    """Maps prompts into a space. Stateless between calls."""

    name: str
    """What a report calls it."""
    text_dim: int
    """Length of the text-aligned vectors and of encoded prompts."""
    micro_batch: int
    """Patches per forward."""
    trained: bool
    """Whether the weights are trained ones."""
    digest: str
    """SHA-256 of the weights and of the parameters that decide a vector."""
    notes: list[str]
    """What a reader of the results has to know about the encoder."""
    device: torch.device

    def encode_prompts(self, prompts: Sequence[str]) -> Float32[Tensor, "V t"]:
        """Unit vectors of prompts, in their order; equal prompts get equal vectors.

        A prompt that is longer than the text encoder's context is cut there, as in its training.

        Args:
            prompts: at least one.

        Returns:
            float32 [V, text_dim] on the CPU, L2-normalised.

        Raises:
            ConfigError: there are no prompts.
            ModelError: the text encoder gave NaN or infinity.
        """
        if not prompts:
            raise ConfigError("there are no prompts to encode: give science.vocabulary at least one.")
        # Of like length together, which saves the text encoder padding.
        row = {prompt: i for i, prompt in enumerate(sorted(dict.fromkeys(prompts), key=len))}
        distinct = list(row)
        chunks = [distinct[i : i + _PROMPTS_AT_ONCE] for i in range(0, len(distinct), _PROMPTS_AT_ONCE)]
        with torch.no_grad():
            vectors = torch.cat([self._encode_text(chunk).float().cpu() for chunk in chunks])
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            bad = distinct[int((~finite).nonzero()[0])]
            raise ModelError(
                f"{self.name} gives NaN or infinity for prompt {bad!r}. Check its weights, or set "
                "science.encoder.dtype to float32."
            )
        return F.normalize(vectors, dim=1)[torch.tensor([row[prompt] for prompt in prompts])]

    @abstractmethod
    def _encode_text(self, prompts: list[str]) -> Tensor:
        """Text vectors of a few prompts on the device; of any norm."""


class Encoder(PromptEncoder):
    """Maps patches as well. A forward always has the same shape."""

    input_px: int
    """Side of the patches that it takes, in pixels."""
    geometry_dim: int
    """Length of the vectors for S and the clusters."""
    same_space: bool
    """Whether the geometry vector is the text-aligned one."""
    standardise: bool
    """Whether geometry must be standardised by the layer's pool mean and deviation before it is L2-normalised."""

    def encode(self, patches: Tensor) -> Vectors:
        """Vectors of at most one micro-batch of patches.

        Args:
            patches: 1 to `micro_batch` of them as RGB, uint8 [n, input_px, input_px, 3]. Fewer are padded with the
                last one, so that a patch gives the same bits in whatever batch it comes (batch size changes them).

        Returns:
            Geometry [n, geometry_dim] and text-aligned [n, text_dim] vectors, float16 on the CPU, raw (not
            normalised); the second is None where `same_space`. What is NaN or infinite stays so.

        Raises:
            ModelError: the patches are not of this shape and type.
        """
        n = len(patches)
        if patches.dtype != torch.uint8 or patches.shape[1:] != (self.input_px, self.input_px, 3):
            raise ModelError(
                f"{self.name} takes uint8 patches of shape [n, {self.input_px}, {self.input_px}, 3], got "
                f"{patches.dtype} of shape {list(patches.shape)}. Cut them with encoders.crop."
            )
        if not 1 <= n <= self.micro_batch:
            raise ModelError(f"{self.name} takes 1 to {self.micro_batch} patches at a time, got {n}.")
        batch = torch.cat([patches, patches[-1:].expand(self.micro_batch - n, -1, -1, -1)])
        with torch.no_grad():
            geometry, text = self._encode(batch.to(self.device))
        return geometry[:n].half().cpu(), None if text is None else text[:n].half().cpu()

    @abstractmethod
    def _encode(self, batch: UInt8[Tensor, "b side side 3"]) -> tuple[Tensor, Tensor | None]:
        """Geometry and text-aligned vectors of one whole micro-batch on the device."""


def load_encoder(config: EncoderConfig, numerics: NumericsConfig) -> Encoder:
    """Builds the encoder that the config asks for, on the device that it asks for.

    The number of threads is the process's, which whoever owns the process sets.

    Raises:
        ConfigError: a model, tag or template that does not exist.
        ModelError: weights that cannot be reached or do not fit, a package or a device that is not there.
    """
    require_cuda(numerics)
    device = torch.device(numerics.device)
    # Imported here, since each takes seconds to import and only one of them is wanted.
    if isinstance(config, OpenClip):
        from polyray.models.open_clip_encoder import OpenClipEncoder

        return OpenClipEncoder(config, device)
    from polyray.models.standin import StandInEncoder

    return StandInEncoder(config, device)


def crop(
    view: UInt8[Tensor, "height width 3"] | UInt8[np.ndarray, "height width 3"],
    boxes: Int[Tensor, "n 4"] | Int[np.ndarray, "n 4"],
    side: int,
) -> UInt8[Tensor, "n side side 3"]:
    """Cuts boxes from what the subject saw and scales each to a square, whatever its aspect ratio.

    Antialiased bilinear, as Pillow's `resize` within two grey levels; a box sees nothing beyond its own edges.
    Deviation: CLIP's own preprocessing is bicubic and keeps the aspect ratio, which a box has given up already.

    Args:
        view: the subject's input as 8-bit RGB.
        boxes: x0, y0, x1, y1 in pixels of the view, right and bottom exclusive.
        side: side of the patches in pixels.

    Returns:
        uint8 [n, side, side, 3] on the CPU, in the boxes' order.

    Raises:
        DataError: a box is empty or leaves the view.
    """
    view, boxes = torch.as_tensor(view), torch.as_tensor(boxes)
    height, width, _ = view.shape
    out = torch.empty((len(boxes), side, side, 3), dtype=torch.uint8)
    for patch, box in zip(out, boxes.tolist(), strict=True):
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise DataError(f"box {box} is empty or leaves the view of {width}×{height} px (x0, y0, x1, y1).")
        patch.copy_(scaled(view[y0:y1, x0:x1], side, side))
    return out


def scaled(
    picture: UInt8[Tensor, "height width 3"], height: int, width: int
) -> UInt8[Tensor, "new_height new_width 3"]:
    """A picture at another size: antialiased bilinear, as Pillow's `resize` within two grey levels; the same pixels
    where the size stays."""
    # Channels last in memory, for which torch has a fast path on 8 bits.
    planes = picture.permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def normalised(
    batch: UInt8[Tensor, "b side side 3"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "b 3 side side"]:
    """RGB in [0, 1] less its mean, over its standard deviation, in float32; channels last in memory."""
    scale = batch.new_tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    shift = batch.new_tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    return batch.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)


def weights_digest(weights: Mapping[str, Tensor], parameters: Mapping[str, object]) -> str:
    """SHA-256 over parameters and weights: whatever changes a vector changes it.

    Args:
        weights: tensors by name, on the CPU; their order has no part in it.
        parameters: JSON values.

    Returns:
        64 hexadecimal digits over name, dtype, shape and bytes of every tensor.
    """
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
