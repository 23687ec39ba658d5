"""What each axis of a tensor stands for, carried through reshapes and permutations by name.

Which question it answers: *which axis of this tensor counts neurons, and which count positions?* Sizes cannot say
(a map of 56 channels by 56 by 56 positions looks the same in any order), so every axis is a product of labelled
atoms that are split, moved and put together again exactly as the tensor's axes are. Place in the flow: the algebra
behind `places.py`; no tensors here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Axes = tuple[tuple["Atom", ...], ...]
"""One tuple of atoms per axis of a tensor, outermost first; an axis of size 1 may have none."""


@dataclass(frozen=True)
class Atom:
    """A factor of an axis: `size` neighbours that lie `step` apart in the index of what `label` counts.

    Labels: N images, C neurons, H rows, W columns, T tokens (a raster of rows and columns behind other tokens),
    ? something else.
    """

    label: str
    size: int
    step: int = 1
    grid: tuple[int, int] | None = None
    """Rows and columns at the end of a T."""


def image_axes(shape: Sequence[int]) -> Axes:
    """Axes of a batch of images or maps, [N, C, H, W]."""
    return tuple((Atom(label, size),) for label, size in zip("NCHW", shape, strict=True))


def spell(axes: Axes) -> str:
    """Axes as text for messages: `[N, H·W, C]`."""
    return "[" + ", ".join("·".join(atom.label for atom in axis) or "1" for axis in axes) + "]"


def size(axis: Sequence[Atom]) -> int:
    """Size of an axis."""
    return math.prod(atom.size for atom in axis)


def is_channel(axis: Sequence[Atom]) -> bool:
    """Whether an axis counts neurons and nothing else, in whatever order."""
    return bool(axis) and all(atom.label == "C" for atom in axis)


def is_spatial(axis: Sequence[Atom]) -> bool:
    """Whether positions have a part in an axis."""
    return any(atom.label in "HWT" for atom in axis)


def reshape(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Axes after a reshape: atoms are split at the new boundaries and merged where they meet again.

    Atoms of size 1 go to axes of size 1 where there are any in their place (a map of one position stays a map), and
    are dropped elsewhere.

    Returns:
        The new axes, or None where a boundary cuts an atom unevenly.
    """
    pending = [atom for axis in axes for atom in axis][::-1]
    result: list[tuple[Atom, ...]] = []
    for i, target in enumerate(shape):
        axis: list[Atom] = []
        while (room := target // size(axis)) > 1:
            if size(axis) * room != target or not pending:
                return None
            atom = pending.pop()
            if room % atom.size:
                if atom.label == "T" or atom.size % room:
                    return None
                inner = atom.size // room
                pending.append(Atom(atom.label, inner, atom.step))
                atom = Atom(atom.label, room, atom.step * inner)
            if atom.size > 1:
                axis.append(atom)
        last_of_ones = i + 1 == len(shape) or shape[i + 1] != 1
        while target == 1 and pending and pending[-1].size == 1 and (last_of_ones or not axis):
            axis.append(pending.pop())
        result.append(_merge(axis))
    return tuple(result) if all(atom.size == 1 for atom in pending) else None


def _merge(axis: Sequence[Atom]) -> tuple[Atom, ...]:
    merged: list[Atom] = []
    for atom in axis:
        last = merged[-1] if merged else None
        if last is not None and last.label == atom.label != "T" and last.step == atom.size * atom.step:
            merged[-1] = Atom(atom.label, last.size * atom.size, atom.step)
        else:
            merged.append(atom)
    return tuple(merged)


def join(operands: Sequence[Axes], shape: Sequence[int]) -> Axes | None:
    """Axes of an elementwise result whose operands are broadcast to `shape`.

    Returns:
        The axes, or None where two operands say different things about the same axis. An axis that comes from
        constants alone is labelled `?`, and `?` yields to a known label.
    """
    result: list[tuple[Atom, ...]] = []
    for back in range(len(shape), 0, -1):
        target = shape[-back]
        offered = [axes[-back] for axes in operands if len(axes) >= back]
        full = [axis for axis in offered if size(axis) == target]
        known = [axis for axis in full if axis and all(atom.label != "?" for atom in axis)]
        if any(axis != known[0] and not (is_channel(axis) and is_channel(known[0])) for axis in known[1:]):
            return None
        fallback: tuple[Atom, ...] = (Atom("?", target),) if target > 1 else ()
        result.append((known or full or [fallback])[0])
    return tuple(result)


def resized(axis: tuple[Atom, ...], new_size: int) -> tuple[Atom, ...]:
    """An axis of one kind with another number of entries, such as rows after a pooling or joined channels."""
    if is_channel(axis):
        return (Atom("C", new_size),)
    return (replace(axis[0], size=new_size, step=1),)


@dataclass(frozen=True)
class Layout:
    """How to bring a tensor into the shape [images, positions, neurons]."""

    kind: str
    """nchw, nhwc, tokens or vector."""
    batch: int
    space: tuple[int, ...]
    channel: int
    """Axes of the tensor: images, then positions (rows and columns, or one raster), then neurons."""
    grid: tuple[int, int]
    prefix: int
    """Tokens in front of the raster, which are no positions."""


def layout_of(axes: Axes) -> Layout | str:
    """The layout that axes amount to, or the reason why they amount to none.

    Every axis must count one thing: images, neurons, rows, columns, or a raster of positions.
    """
    found: dict[str, int] = {}
    for i, axis in enumerate(axes):
        if not axis:
            return f"axes {spell(axes)} have one that counts neither neurons nor positions"
        kind = "C" if is_channel(axis) else "".join(atom.label for atom in axis)
        if kind in found or kind not in ("N", "C", "H", "W", "HW", "T") or any(_is_part(atom) for atom in axis):
            return f"axes {spell(axes)} are none of images, neurons and positions alone"
        found[kind] = i
    kinds = frozenset(found)
    if not {"N", "C"} <= kinds:
        return f"axes {spell(axes)} lack images or neurons"
    n, c = found["N"], found["C"]
    if kinds == {"N", "C"}:
        return Layout("vector", n, (), c, (1, 1), 0)
    if kinds == {"N", "C", "H", "W"}:
        h, w = found["H"], found["W"]
        kind = "nchw" if c < min(h, w) else "nhwc"
        return Layout(kind, n, (h, w), c, (size(axes[h]), size(axes[w])), 0)
    if kinds == {"N", "C", "HW"}:
        rows, columns = axes[found["HW"]]
        return Layout("tokens", n, (found["HW"],), c, (rows.size, columns.size), 0)
    if kinds == {"N", "C", "T"}:
        (tokens,) = axes[found["T"]]
        if tokens.grid is not None:
            return Layout("tokens", n, (found["T"],), c, tokens.grid, tokens.size - math.prod(tokens.grid))
    return f"axes {spell(axes)} have rows without columns"


def _is_part(atom: Atom) -> bool:
    return atom.label in "NHW" and atom.step != 1
