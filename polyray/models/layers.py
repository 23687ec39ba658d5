"""Layers: what a sweep knows of a layer, without the network that has it.

Place in the flow: a leaf without torch; `locate.py` finds it out, actors and the driver pass it on.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerInfo:
    """One layer as the sweep sees it. Pixels are those of the subject's input; pixel i covers [i, i + 1)."""

    name: str
    """Module path."""
    depth: int
    """Order in the forward pass among all layers that can be read, from 0."""
    width: int
    """Neurons."""
    layout: str
    """nchw, nhwc, tokens or vector."""
    grid_h: int
    """Positions from top to bottom."""
    grid_w: int
    """Positions from left to right; a position is the raster index row · grid_w + column."""
    activation: str | None
    """Function that the read-out ends in; None where it is linear."""
    ranked_by: Literal["response", "pre_activation"]
    """`pre_activation`: the activation saturates, so the response is its input."""
    positive_only: bool
    """An example counts only with a response above 0 (the activation is 0 below)."""
    receptive_px: int | None
    """Longer side of the theoretical receptive field; None where every position sees the whole image."""
    center_x_px: float
    """Centre of what position (0, 0) sees, horizontally."""
    center_y_px: float
    """Centre of what position (0, 0) sees, vertically."""
    stride_px: float
    """Pixels between neighbouring positions."""

    @property
    def central_position(self) -> int:
        """Raster index of the position in the middle (below and right of the middle where the grid is even)."""
        return self.grid_h // 2 * self.grid_w + self.grid_w // 2

    def center(self, position: int) -> tuple[float, float]:
        """Pixel coordinates (x, y) of the centre of what a position sees."""
        row, column = divmod(position, self.grid_w)
        return self.center_x_px + column * self.stride_px, self.center_y_px + row * self.stride_px
