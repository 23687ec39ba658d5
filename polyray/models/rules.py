"""How each torch function moves the axes and receptive fields of its input: one short rule each.

Which question it answers: *after this call, where did rows, columns and neurons go?* Place in the flow: the table
that `places.py` walks a recording with. A rule returns a place without axes where it cannot say.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from polyray.models import axes as ax
from polyray.models.axes import Atom
from polyray.models.graph import Ref
from polyray.models.places import Place, Rule, View, mix


def _elementwise(v: View) -> Place:
    known = [p.axes for p in v.inputs if p.axes is not None]
    if not known:
        return v.lose("has no operand with known axes")
    return mix(v.inputs, ax.join(known, v.shape), f"{v.op} joins {' and '.join(map(ax.spell, known))}")


def _reshape(v: View) -> Place:
    p = v.first()
    return p if p.axes is None else replace(p, axes=ax.reshape(p.axes, v.shape), lost=f"{v.op} cuts an axis unevenly")


def _permute(v: View) -> Place:
    p = v.first()
    dims = v.op.arg(1, "dims")
    order = v.op.args[1:] if isinstance(dims, int) else dims
    return p if p.axes is None else replace(p, axes=tuple(p.axes[d] for d in order))


def _transpose(v: View) -> Place:
    p = v.first()
    if p.axes is None:
        return p
    a, b = v.op.arg(1, "dim0", v.op.kwargs.get("axis0")), v.op.arg(2, "dim1", v.op.kwargs.get("axis1"))
    axes = list(p.axes)
    axes[a], axes[b] = axes[b], axes[a]
    return replace(p, axes=tuple(axes))


def _transpose_last(v: View) -> Place:
    p = v.first()
    return p if p.axes is None else replace(p, axes=(*p.axes[:-2], *p.axes[-2:][::-1]))


def _unsqueeze(v: View) -> Place:
    p = v.first()
    at = v.op.arg(1, "dim") % len(v.shape)
    return p if p.axes is None else replace(p, axes=(*p.axes[:at], (), *p.axes[at:]))


def _squeeze(v: View) -> Place:
    p = v.first()
    if p.axes is None:
        return p
    dim = v.op.arg(1, "dim")
    chosen = range(len(p.axes)) if dim is None else _dims(dim, p)
    return replace(p, axes=tuple(a for i, a in enumerate(p.axes) if i not in chosen or ax.size(a) > 1))


def _expand(v: View) -> Place:
    p = v.first()
    return p if p.axes is None else replace(p, axes=ax.join([p.axes], v.shape))


def _index(v: View) -> Place:
    """Basic indexing: slices of channels, every n-th row, the raster without the tokens in front."""
    p = v.first()
    if p.axes is None:
        return p
    key = v.op.args[1]
    items = list(key) if isinstance(key, tuple) else [key]
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        n_taken = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (len(p.axes) - n_taken)
    rest = iter(p.axes)
    axes: list[tuple[Atom, ...]] = []
    for item in items:
        axis = () if item is None else next(rest)
        kept = [axis] if item is None else _taken(axis, item)
        if kept is None:
            return v.lose(f"takes {item!r} of {ax.spell((axis,))}")
        if _is_raster(axis) and not any(map(ax.is_spatial, kept)):
            # Single tokens, such as the class token in front, speak for the image.
            p = replace(p, whole=True, pooled=True)
        if isinstance(item, slice) and axis and axis[0].label in "HW":
            start, _, step = item.indices(ax.size(axis))
            p = p.slid(axis[0].label, 1, step, -start)
        axes += kept
    return replace(p, axes=(*axes, *rest))


def _taken(axis: tuple[Atom, ...], item: Any) -> list[tuple[Atom, ...]] | None:
    """What is left of one axis after an index; None where that has no name."""
    if isinstance(item, int):
        return [] if _is_raster(axis) or all(a.label in "C?" for a in axis) else None
    if not isinstance(item, slice):
        return None
    taken = range(*item.indices(ax.size(axis)))
    if taken == range(ax.size(axis)):
        return [axis]
    if ax.is_channel(axis) or (len(axis) == 1 and axis[0].label in "HW" and axis[0].step == 1):
        return [ax.resized(axis, len(taken))]
    grid = axis[0].grid if axis else None
    n_prefix = 0 if grid is None else axis[0].size - grid[0] * grid[1]
    if grid is not None and taken == range(n_prefix, axis[0].size):
        return [(Atom("H", grid[0]), Atom("W", grid[1]))]
    if taken.step == 1 and taken.stop <= n_prefix:
        return [(Atom("?", len(taken)),)]
    return None


def _is_raster(axis: tuple[Atom, ...]) -> bool:
    return [a.label for a in axis] == ["T"]


def _part(v: View) -> Place:
    """Channels may be parted, and axes that count neither images nor positions may be dropped."""
    p = v.first()
    if p.axes is None:
        return p
    at = 2 if v.op.name in ("chunk", "split") else 1
    dim = v.op.arg(at, "dim", 0) % len(p.axes)
    axis = p.axes[dim]
    if len(v.shape) < len(p.axes):
        kept = None if _is_raster(axis) else _taken(axis, 0)
    else:
        kept = [ax.resized(axis, v.shape[dim])] if ax.is_channel(axis) else None
    return v.lose(f"cuts {ax.spell((axis,))}") if kept is None else replace(p, axes=_with(p.axes, dim, kept))


def _cat(v: View) -> Place:
    """Joined channels, or tokens put in front of a raster of positions."""
    dim = v.op.arg(1, "dim", 0) % len(v.shape)
    parts = [v.place(ref) for ref in v.op.arg(0, "tensors")]
    known = [p.axes for p in parts if p is not None and p.axes is not None]
    if not known or any(p is not None and p.axes is None for p in parts):
        return v.lose("joins tensors without known axes")
    along = [axes[dim] for axes in known]
    raster = [axis for axis in along if ax.is_spatial(axis)]
    others = ax.join([_with(axes, dim, [()]) for axes in known], (*v.shape[:dim], 1, *v.shape[dim + 1 :]))
    axis: tuple[Atom, ...] | None = None
    if all(map(ax.is_channel, along)):
        axis = (Atom("C", v.shape[dim]),)
    elif len(raster) == 1 and parts[-1] is not None and [a.label for a in along[-1]] == ["H", "W"]:
        axis = (Atom("T", v.shape[dim], grid=(along[-1][0].size, along[-1][1].size)),)
    if others is None or axis is None:
        return v.lose(f"joins {' and '.join(map(ax.spell, known))} along axis {dim}")
    return mix(v.inputs, _with(others, dim, [axis]))


def _reduce(v: View) -> Place:
    """mean, sum, max and the like over some axes."""
    dim = v.op.arg(2 if v.op.name == "norm" else 1, "dim")
    if isinstance(dim, Ref):
        return _elementwise(v)
    p = v.first()
    if p.axes is None:
        return p
    dims = range(len(p.axes)) if dim is None else _dims(dim, p)
    keep = len(v.shape) == len(p.axes)
    axes = tuple(ax.resized(a, 1) if a and i in dims else a for i, a in enumerate(p.axes) if keep or i not in dims)
    space = any(ax.is_spatial(p.axes[d]) for d in dims)
    left = any(ax.is_spatial(a) and ax.size(a) > 1 for a in axes)
    return replace(p, axes=axes, whole=p.whole or space, pooled=p.pooled or (space and not left))


def _over(p: Place, dims: Sequence[int]) -> Place:
    """The same axes, every entry depending on all entries along `dims`."""
    if p.axes is None:
        return p
    local = all(_patch(p.axes, d % len(p.axes)) is not None for d in dims)
    return p if local else replace(p, whole=True)


def _patch(axes: ax.Axes, dim: int) -> dict[str, int] | None:
    """Rows and columns of the patches that an axis holds beside channels; None where it holds anything else.

    A patch is the inner part of rows or columns whose outer part is a position still: [N, H·W, C·h·w].
    """
    outer = {(a.label, a.step) for i, axis in enumerate(axes) if i != dim for a in axis if a.label in "HW"}
    inner = {a.label: a.size for a in axes[dim] if a.label != "C"}
    local = all(a.step == 1 and (a.label, a.size) in outer for a in axes[dim] if a.label != "C")
    return inner if local else None


def _absorbed(p: Place, dim: int) -> Place:
    """The place where an axis of channels and patches counts as channels, each position seeing its patch."""
    patch = None if p.axes is None else _patch(p.axes, dim % len(p.axes))
    if p.axes is None or not patch:
        return p
    axes = _with(p.axes, dim % len(p.axes), [(Atom("C", ax.size(p.axes[dim])),)])
    for label, size in patch.items():
        p = p.slid(label, size, size)
        axes = tuple(tuple(replace(a, step=1) if a.label == label else a for a in axis) for axis in axes)
    return replace(p, axes=axes)


def _layer_norm(v: View) -> Place:
    return _over(v.first(), range(-len(_tuple(v.op.arg(1, "normalized_shape"))), 0))


def _softmax(v: View) -> Place:
    return _over(v.first(), [v.op.arg(1, "dim", -1)])


def _normalize(v: View) -> Place:
    return _over(v.first(), _tuple(v.op.arg(2, "dim", 1)))


def _map_norm(v: View) -> Place:
    """group_norm, instance_norm: statistics over the whole map."""
    return replace(v.first(), whole=True)


def _linear(v: View) -> Place:
    """A new axis of neurons in place of the last one, which holds neurons, or patches, or positions."""
    p = _absorbed(v.first(), -1)
    if p.axes is None:
        return p
    rest = p.axes[:-1]
    if ax.is_channel(p.axes[-1]):
        return replace(p, axes=(*rest, (Atom("C", v.shape[-1]),)))
    new = (Atom("C" if len(rest) == 1 else "?", v.shape[-1]),)
    return replace(p, axes=(*rest, new), whole=True, pooled=not any(map(ax.is_spatial, rest)))


def _matmul(v: View) -> Place:
    """Rows of the first factor, columns of the second; attention sums over positions."""
    a, b = v.place(v.op.arg(0, "input")), v.place(v.op.arg(1, "other", v.op.kwargs.get("mat2")))
    if a is None or a.axes is None:
        return v.lose("has a first factor without known axes")
    if b is None:
        return _linear(v)
    last = (Atom("?", v.shape[-1]),) if b.axes is None else b.axes[-1]
    return replace(a, axes=(*a.axes[:-1], last), whole=True)


def _attention(v: View) -> Place:
    query, value = v.place(v.op.arg(0, "query")), v.place(v.op.arg(2, "value"))
    if query is None or value is None or query.axes is None or value.axes is None:
        return v.lose("has a query or a value without known axes")
    return replace(query, axes=(*query.axes[:-1], value.axes[-1]), whole=True)


def _multi_head(v: View) -> Place:
    p = v.place(v.op.arg(0, "query")) or v.lose("has a constant query")
    return p if p.axes is None else replace(p, axes=(*p.axes[:-1], (Atom("C", v.shape[-1]),)), whole=True)


def _map(v: View) -> Place:
    """The first argument, lost unless its axes are [N, C, H, W]."""
    p = _absorbed(v.first(), 1)
    if p.axes is None:
        return p
    layout = ax.layout_of(p.axes)
    fits = isinstance(layout, ax.Layout) and (layout.batch, layout.channel, layout.space) == (0, 1, (2, 3))
    return p if fits else v.lose(f"takes {ax.spell(p.axes)} for [N, C, H, W]")


def _seen(v: View, p: Place, rows: tuple[int, int, int, int], columns: tuple[int, int, int, int]) -> Place:
    """A map seen through a window, given as (kernel, stride, padding in front, dilation)."""
    return replace(p, axes=ax.image_axes(v.shape)).slid("H", *rows).slid("W", *columns)


def _conv2d(v: View) -> Place:
    p = _map(v)
    if p.axes is None:
        return p
    ky, kx = v.op.arg(1, "weight").shape[2:]
    (sy, sx), (dy, dx) = _pair(v.op.arg(3, "stride", 1)), _pair(v.op.arg(5, "dilation", 1))
    padding = v.op.arg(4, "padding", 0)
    if padding == "same":
        padding = ((ky - 1) * dy // 2, (kx - 1) * dx // 2)
    py, px = _pair(0 if padding == "valid" else padding)
    return _seen(v, p, (ky, sy, py, dy), (kx, sx, px, dx))


def _pool2d(v: View) -> Place:
    p = _map(v)
    if p.axes is None:
        return p
    ky, kx = _pair(v.op.arg(1, "kernel_size"))
    sy, sx = _pair(v.op.arg(2, "stride") or (ky, kx))
    py, px = _pair(v.op.arg(3, "padding", 0))
    dy, dx = _pair(v.op.arg(4, "dilation", 1)) if v.op.name == "max_pool2d" else (1, 1)
    return _seen(v, p, (ky, sy, py, dy), (kx, sx, px, dx))


def _adaptive_pool2d(v: View) -> Place:
    p = _map(v)
    if p.axes is None:
        return p
    (gy, gx), (wy, wx) = map(ax.size, p.axes[2:]), v.shape[2:]
    if (wy, wx) == (1, 1):
        return replace(p, axes=ax.image_axes(v.shape), whole=True, pooled=True)
    if gy % wy or gx % wx:
        return replace(p, axes=ax.image_axes(v.shape), y=None, x=None, whole=True)
    return _seen(v, p, (gy // wy, gy // wy, 0, 1), (gx // wx, gx // wx, 0, 1))


def _resample(v: View) -> Place:
    """A map whose positions have no simple field."""
    p = _map(v)
    return p if p.axes is None else replace(p, axes=ax.image_axes(v.shape), y=None, x=None)


def _pad(v: View) -> Place:
    p = v.first()
    if p.axes is None:
        return p
    amounts, axes = v.op.arg(1, "pad"), p.axes
    for i, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        dim = len(axes) - 1 - i
        axis = axes[dim]
        if before == after == 0:
            continue
        if len(axis) != 1 or axis[0].label not in "CHW" or axis[0].step != 1:
            return v.lose(f"pads {ax.spell((axis,))}")
        axes = _with(axes, dim, [ax.resized(axis, v.shape[dim])])
        p = p if axis[0].label == "C" else p.slid(axis[0].label, 1, 1, before)
    return replace(p, axes=axes)


def _with(axes: ax.Axes, dim: int, new: Sequence[tuple[Atom, ...]]) -> ax.Axes:
    return (*axes[:dim], *new, *axes[dim + 1 :])


def _dims(value: Any, p: Place) -> list[int]:
    return [d % len(p.axes or ()) for d in _tuple(value)]


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _pair(value: Any) -> tuple[int, int]:
    values = _tuple(value)
    return values[0], values[-1]


_FUNCTIONS: tuple[tuple[Rule, str], ...] = (
    (
        _elementwise,
        "add radd iadd sub rsub isub mul rmul imul multiply div truediv rtruediv itruediv divide addcmul addcdiv lerp "
        "pow square sqrt rsqrt exp log log1p expm1 neg abs sign sin cos erf reciprocal maximum minimum clamp clamp_min "
        "clamp_max clip where masked_fill nan_to_num to type type_as float half bfloat16 double clone contiguous "
        "detach dropout dropout1d dropout2d alpha_dropout feature_alpha_dropout batch_norm local_response_norm "
        "relu relu6 hardtanh silu gelu leaky_relu elu selu celu mish hardswish sigmoid logsigmoid tanh softplus "
        "softsign prelu hardsigmoid hardshrink softshrink tanhshrink threshold rrelu",
    ),
    (_reshape, "reshape view reshape_as view_as flatten unflatten"),
    (_permute, "permute"),
    (_transpose, "transpose swapaxes swapdims"),
    (_transpose_last, "T mT t"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_expand, "expand expand_as broadcast_to"),
    (_index, "getitem"),
    (_part, "chunk split unbind select"),
    (_cat, "cat concat concatenate"),
    (_reduce, "mean sum amax amin max min std var norm logsumexp"),
    (_layer_norm, "layer_norm rms_norm"),
    (_map_norm, "group_norm instance_norm"),
    (_softmax, "softmax log_softmax"),
    (_normalize, "normalize"),
    (_linear, "linear"),
    (_matmul, "matmul bmm mm"),
    (_attention, "scaled_dot_product_attention"),
    (_multi_head, "multi_head_attention_forward"),
    (_conv2d, "conv2d"),
    (_pool2d, "max_pool2d avg_pool2d"),
    (_adaptive_pool2d, "adaptive_avg_pool2d adaptive_max_pool2d"),
    (_resample, "interpolate upsample conv_transpose2d pixel_shuffle pixel_unshuffle"),
    (_pad, "pad"),
)

RULES: dict[str, Rule] = {name: rule for rule, names in _FUNCTIONS for name in names.split()}
"""By name of the torch function, without underscores."""
