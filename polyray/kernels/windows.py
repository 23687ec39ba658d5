"""From a peak position to the part of the image that the neuron sees there.

Which question it answers: *which box of the input belongs to this position?* Place in the flow: extract.
Source: Luo et al. 2016, "Understanding the effective receptive field in deep convolutional neural networks".
"""

import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor


def central_side(energy: Float[Tensor, "H W"], center_x: float, center_y: float, share: float) -> int:
    """Side of the smallest centred square that holds a share of the energy.

    Args:
        energy: non-negative input-gradient energy of each pixel.
        center_x: centre of the square in pixels, horizontally; 0 is the image's left edge.
        center_y: likewise from the top edge.
        share: between 0 and 1.

    Returns:
        Side in whole pixels, at least 1, of the box that `boxes` cuts around this centre. Energy that is zero, or not
        finite somewhere, says nothing about the window: the larger side of the image is returned.
    """
    height, width = energy.shape
    total = float(energy.double().sum())
    if not 0 < total < float("inf"):
        return max(height, width)
    below = torch.zeros(height + 1, width + 1, dtype=torch.float64)
    below[1:, 1:] = energy.double().cpu().cumsum(0).cumsum(1)
    side = 0
    held = 0.0
    while held < share * total and side < 2 * max(height, width):
        side += 1
        x0, y0 = (_start(c, side) for c in (center_x, center_y))
        x1, y1 = min(max(x0 + side, 0), width), min(max(y0 + side, 0), height)
        x0, y0 = min(max(x0, 0), width), min(max(y0, 0), height)
        held = float(below[y1, x1] - below[y0, x1] - below[y1, x0] + below[y0, x0])
    return side


def _start(center: float, side: int) -> int:
    """First pixel of a run of `side` pixels around a centre; halves go up."""
    return math.floor(center - side / 2 + 0.5)


def boxes(
    position: Int[Tensor, " N"],
    grid_w: int,
    center_x: float,
    center_y: float,
    stride: float,
    side: int,
    input_px: int,
) -> Int64[Tensor, "N 4"]:
    """Boxes of positions, clipped to the image.

    Args:
        position: raster indices in the layer's grid.
        grid_w: positions in a row of the grid.
        center_x: centre of position (0, 0)'s box in pixels, horizontally.
        center_y: likewise vertically.
        stride: pixels between neighbouring positions.
        side: side of the box before clipping.
        input_px: side of the square input.

    Returns:
        x0, y0, x1, y1 in whole pixels, right and bottom exclusive, at least one pixel in each direction.
    """
    position = position.long()
    centers = (center_x + stride * (position % grid_w), center_y + stride * (position // grid_w))
    starts = [torch.floor(c.double() - side / 2 + 0.5).long() for c in centers]
    low = [s.clamp(0, input_px - 1) for s in starts]
    high = [torch.maximum((s + side).clamp(max=input_px), lo + 1) for s, lo in zip(starts, low, strict=True)]
    return torch.stack([*low, *high], dim=1)
