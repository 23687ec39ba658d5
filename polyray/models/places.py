"""Where in the image the numbers of a tensor come from: its axes, and its receptive field along them.

Which question it answers: *which axis of this layer counts neurons, and which pixels does position (0, 0) see?*
Place in the flow: `readouts.py` asks it about the values of a recording (`graph.py`); `rules.py` holds one rule per
torch function.

Receptive fields are arithmetic over kernel, stride, padding and dilation, with the union over branches. What mixes
all positions (global pooling, attention, normalisation over the map) makes the extent the whole image, while centre
and stride stay those of the path without it. A function without a rule loses the axes, and says so; an elementwise
operation with an operand whose axes are known finds them again (a residual sum keeps its axes whatever the branch did).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyray.models import axes as ax
from polyray.models.axes import Axes
from polyray.models.graph import Op, Recording, Ref


@dataclass(frozen=True)
class Field:
    """Pixels that index 0 of an axis sees: [start, start + size), moved by `jump` pixels from index to index."""

    start: int = 0
    size: int = 1
    jump: int = 1

    def slide(self, kernel: int, stride: int, before: int = 0, dilation: int = 1) -> "Field":
        """Seen through a window of `kernel` taps, with `before` positions of padding in front."""
        reach = (kernel - 1) * dilation * self.jump
        return Field(self.start - before * self.jump, self.size + reach, self.jump * stride)


@dataclass(frozen=True)
class Place:
    """What is known about a value."""

    axes: Axes | None
    """None: lost."""
    lost: str = ""
    """Where and why the axes were lost."""
    y: Field | None = Field()
    x: Field | None = Field()
    """Receptive field along rows and columns; None where it is not known."""
    whole: bool = False
    """Every position depends on the whole image."""
    pooled: bool = False
    """The positions were pooled away: what is left describes the image, not a place in it."""

    def slid(self, label: str, kernel: int, stride: int, before: int = 0, dilation: int = 1) -> "Place":
        """The same axes, rows (label H) or columns (W) seen through a window."""
        if label == "H":
            return replace(self, y=self.y and self.y.slide(kernel, stride, before, dilation))
        return replace(self, x=self.x and self.x.slide(kernel, stride, before, dilation))


class View:
    """One output of one call, as the function's rule sees it."""

    def __init__(self, op: Op, shape: tuple[int, ...], known: dict[int, Place]) -> None:
        self.op = op
        self.shape = shape
        self._known = known
        self.inputs = [known[ref.value] for ref in op.refs() if ref.value is not None]

    def place(self, argument: Any) -> Place | None:
        """Place of a tensor argument; None where it is no tensor or a constant."""
        return self._known[argument.value] if isinstance(argument, Ref) and argument.value is not None else None

    def first(self) -> Place:
        """Place of the first argument; lost where that is a constant."""
        return self.place(self.op.arg(0, "input")) or self.lose("is applied to a constant")

    def lose(self, why: str) -> Place:
        """A place whose axes this call loses."""
        return Place(None, f"{self.op} {why}")


Rule = Callable[[View], Place]


def places(recording: Recording, rules: dict[str, Rule]) -> dict[int, Place]:
    """Walks a recording from the input and returns the place of every value.

    Args:
        recording: one forward.
        rules: by name of the torch function, how it moves axes and fields.
    """
    known = {0: Place(ax.image_axes(recording.values[0].shape))}
    for number in set(range(1, len(recording.values))) - set(recording.producer):
        known[number] = Place(None, "it is changed through a view of it", None, None, True)
    for op in recording.ops:
        rule = rules.get(op.name)
        for output in op.outputs:
            view = View(op, recording.values[output].shape, known)
            made = view.lose("is no function that axes are followed through") if rule is None else rule(view)
            if made.axes is not None and tuple(map(ax.size, made.axes)) != view.shape:
                made = view.lose(f"makes {view.shape} where {ax.spell(made.axes)} was expected")
            known[output] = _lost(made, view.inputs) if made.axes is None else made
    return known


def _lost(made: Place, inputs: Sequence[Place]) -> Place:
    """A place without axes; the first loss is the one that is told."""
    reason = next((p.lost for p in inputs if p.axes is None), made.lost)
    return Place(None, reason, None, None, True, all(p.pooled for p in inputs))


def mix(inputs: Sequence[Place], axes: Axes | None, lost: str = "") -> Place:
    """A place that depends on several: the hull of the fields of those that still have positions."""
    local = [p for p in inputs if p.axes is not None and not p.pooled] or [p for p in inputs if p.axes is not None]
    return Place(
        axes,
        lost,
        _hull([p.y for p in local]),
        _hull([p.x for p in local]),
        any(p.whole for p in inputs),
        all(p.pooled for p in inputs),
    )


def _hull(fields: Sequence[Field | None]) -> Field | None:
    known = [f for f in fields if f is not None]
    if not known or len(known) < len(fields) or len({f.jump for f in known}) > 1:
        return None
    start = min(f.start for f in known)
    return Field(start, max(f.start + f.size for f in known) - start, known[0].jump)
