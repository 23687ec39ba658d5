"""The largest value of every map and where it stands first, in little more than one pass over memory.

Which question it answers: *how strongly does each neuron respond to each image, and where?* Place in the flow: called
by `readouts.py` on every layer while the forward runs, so that no map is kept.

`torch.max(dim)` is exact too, but tracks an index per element: on a channels-last map it costs four to six times as
much as `amax`, which is vectorised. So the raster is cut into spans: `amax` of each span, the first span that holds the
maximum, and the first place within that one span.
"""

import torch
from torch import Tensor

_SPAN = 16
"""Wanted positions per span: shorter spans leave more maxima to search, longer ones more to look up."""


def peaks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over positions and its first place.

    Args:
        values: [N, P, C], any floating dtype and strides; P at least 1.

    Returns:
        response: float32 [N, C], the maximum; NaN where any position is NaN.
        position: int64 [N, C], smallest index of a position that equals the maximum; 0 where the response is NaN.
    """
    n_positions = values.shape[1]
    span = min((d for d in range(1, n_positions + 1) if n_positions % d == 0), key=lambda d: abs(d - _SPAN))
    spans = values.unflatten(1, (n_positions // span, span))
    tops = spans.amax(2)
    response = tops.amax(1)
    which = _first(tops, response)
    inside = spans.gather(1, which[:, None, None].expand(-1, -1, span, -1))[:, 0]
    return response.float(), which * span + _first(inside, response)


def _first(values: Tensor, target: Tensor) -> Tensor:
    """First index along axis 1 at which values [N, P, C] equal target [N, C]; 0 where none does (NaN)."""
    n = values.shape[1]
    # Falling weights turn "first match" into a maximum; the narrower the integers, the faster.
    dtype = torch.uint8 if n < 2**8 else torch.int16 if n < 2**15 else torch.int32
    weight = torch.arange(n, 0, -1, dtype=torch.int32, device=values.device).to(dtype)
    best = ((values == target[:, None]) * weight[:, None]).amax(1).long()
    return torch.where(best > 0, n - best, 0)
