"""From a peak position to the part of the image that the neuron sees there.

Which question it answers: *which box of the input belongs to this position, and which others could be there instead?*
Place in the flow: extract, swap.
Source: Luo et al. 2016, "Understanding the effective receptive field in deep convolutional neural networks".
"""

import math

import torch
from jaxtyping import Float, Float64, Int, Int64
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


def disjoint_places(
    box: Int[Tensor, "N 4"], input_px: int, u: Float64[Tensor, " N"], step: int = 1
) -> Int64[Tensor, "N 4"]:
    """For each box one of the same width and height elsewhere in the image, drawn uniformly among all such places.

    Args:
        box: x0, y0, x1, y1 within the image, right and bottom exclusive, at least one pixel in each direction.
        input_px: side of the square input.
        u: uniform on (0, 1).
        step: left and top stay the box's own modulo this many pixels, as on the grid of patches of a transformer.

    Returns:
        x0, y0, x1, y1 of a box within the image that shares no pixel with the given one; −1 four times where there is
        no place for one.
    """
    start, size = box[:, :2].long(), box[:, 2:].long() - box[:, :2].long()
    offset = start % step
    # Numbers of places by column and row: in all, before the box, behind it.
    n = (input_px - size - offset) // step + 1
    before = ((start - size - offset) // step + 1).clamp(min=0)
    behind = (n + (offset - start - size) // step).clamp(min=0)
    (n_x, n_y), (before_x, before_y) = n.T, before.T
    beside_x, beside_y = (before + behind).T
    # Rows above and below the box take any column, the others only columns left and right of it.
    n_free = beside_y * n_x
    n_places = n_free + (n_y - beside_y) * beside_x
    place = torch.minimum((u * n_places).long(), n_places - 1)
    free, rest = place < n_free, place - n_free
    per_row = beside_x.clamp(min=1)
    row = torch.where(free, place // n_x, before_y + rest // per_row)
    row += torch.where(free & (row >= before_y), n_y - beside_y, 0)
    column = torch.where(free, place % n_x, rest % per_row)
    column += torch.where(~free & (column >= before_x), n_x - beside_x, 0)
    start = offset + step * torch.stack([column, row], dim=1)
    return torch.where(n_places[:, None] > 0, torch.cat([start, start + size], dim=1), -1)


def random_places(
    width: Int[Tensor, " N"], height: Int[Tensor, " N"], input_px: int, u: Float64[Tensor, "N 2"], step: int = 1
) -> Int64[Tensor, "N 4"]:
    """Boxes of given sizes anywhere in the image, drawn uniformly.

    Args:
        width: in pixels, at least 1.
        height: likewise.
        input_px: side of the square input.
        u: uniform on (0, 1), for left and top.
        step: left and top are multiples of this many pixels.

    Returns:
        x0, y0, x1, y1 in whole pixels, right and bottom exclusive; −1 four times where a box is larger
        than the image.
    """
    size = torch.stack([width, height], dim=1).long()
    n = (input_px - size) // step + 1
    start = step * torch.minimum((u * n).long(), n - 1)
    fits = (size <= input_px).all(1, keepdim=True)
    return torch.where(fits, torch.cat([start, start + size], dim=1), -1)
