"""One forward pass of a network, written down as a graph of torch calls.

Which question it answers: *which operation made this tensor, and who uses it next?* A module name alone does not say:
a hook on a convolution reads before batch norm, and one `relu` module may serve a whole block. Place in the flow:
`readouts.py` records a subject once, `places.py` walks the recording.

Only calls that Python makes are seen (torch.overrides.TorchFunctionMode); what runs inside TorchScript or a compiled
module is not.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyray.errors import ModelError


@dataclass(frozen=True)
class Ref:
    """A tensor among the arguments of a call; `value` is None where it does not derive from the network's input."""

    value: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor at one moment: output number `output` of call number `call`. An in-place call makes a new value."""

    call: int
    output: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One call that returned or changed a tensor derived from the input."""

    call: int
    """Number of the call among those of the forward that returned tensors; what is merely asked (a shape) is none."""
    name: str
    """Name of the function, without underscores: `relu_` and `relu` are both `relu`."""
    module: str
    """Path of the innermost module that was running."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Arguments as given, with every tensor replaced by its `Ref`."""
    outputs: tuple[int, ...]
    """Values that it made."""

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at a position or under a name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def refs(self) -> list[Ref]:
        """Every tensor among the arguments, in order."""
        return list(flat((self.args, self.kwargs), Ref))

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the root module'}"


class Recording:
    """What one forward pass did.

    Value 0 is the input. `outputs` holds, for every module in the order in which their calls ended, the values that
    its calls returned: None for a call whose result does not derive from the input as far as torch calls show.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self.values: list[Value] = [Value(-1, 0, input_shape)]
        self.ops: list[Op] = []
        self.producer: dict[int, Op] = {}
        self.consumers: dict[int, list[Op]] = {}
        self.outputs: dict[str, list[int | None]] = {}

    def add_value(self, call: int, output: int, shape: tuple[int, ...]) -> int:
        """Registers a value and returns its number."""
        self.values.append(Value(call, output, shape))
        return len(self.values) - 1

    def add_op(self, op: Op) -> None:
        """Registers a call as the producer of its outputs and as a consumer of its inputs."""
        self.ops.append(op)
        self.producer |= dict.fromkeys(op.outputs, op)
        for value in {ref.value for ref in op.refs() if ref.value is not None}:
            self.consumers.setdefault(value, []).append(op)


def record(module: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Recording:
    """Runs two forwards on two noise images, without gradients, and writes down the second.

    The first fills what networks cache on first use (position grids, attention masks), so that the recorded calls
    are those of every later forward.

    Args:
        module: the network, in eval mode.
        shape: channels, height and width of its input.
        dtype: floating point of its input.
        device: where it lives.

    Returns:
        The recording of a batch of two.

    Raises:
        ModelError: the forward fails on such a batch.
    """
    noise = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    x = noise.to(device, dtype).contiguous(memory_format=torch.channels_last)
    recording = Recording(tuple(x.shape))
    writer = _Writer(recording, x)
    with torch.no_grad():
        try:
            module(x.clone())
            with writer.watching(module), writer:
                module(x)
        except _FORWARD_ERRORS as e:
            raise ModelError(
                f"the network fails on a batch of shape {tuple(x.shape)}: {type(e).__name__}: {e}. "
                "Check subject.input_px: many networks take one size only."
            ) from e
    return recording


_FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Writer(TorchFunctionMode):
    """Sees every torch call of a forward and writes it into a recording."""

    def __init__(self, recording: Recording, x: Tensor) -> None:
        super().__init__()
        self._recording = recording
        self._n_calls = 0
        self._path: list[str] = [""]
        # id -> (the tensor, its version, its value). Weak, so that a forward needs no more memory than it does
        # without us; an id that another tensor has taken over is told by the reference.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._learn(x, 0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(flat((args, kwargs), Tensor))
        versions = [t._version for t in tensors]
        ref_args, ref_kwargs = self._with_refs(args), self._with_refs(kwargs)
        result = func(*args, **kwargs)

        call = self._n_calls
        self._n_calls += has_tensors(result)
        changed = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        given = {id(t) for t in tensors} - {id(t) for t in changed}
        made = [(i, t) for i, t in enumerate(flat(result, Tensor)) if id(t) not in given]
        made += [(-1, t) for t in changed if all(t is not m for _, m in made)]
        derived = any(ref.value is not None for ref in flat((ref_args, ref_kwargs), Ref))
        if made and derived:
            values = []
            for output, tensor in made:
                values.append(self._recording.add_value(call, output, tuple(tensor.shape)))
                self._learn(tensor, values[-1])
            op = Op(call, call_name(func), self._path[-1], ref_args, ref_kwargs, tuple(values))
            self._recording.add_op(op)
        return result

    def watching(self, module: nn.Module) -> "_Hooks":
        """A context in which the paths of running modules and the values that they return are known."""
        return _Hooks(self, module)

    def enter(self, path: str) -> None:
        """The module at a path begins its call."""
        self._path.append(path)

    def leave(self, path: str, output: Any) -> None:
        """The module at a path has returned; of several tensors the first counts."""
        self._path.pop()
        first = next(flat(output, Tensor), None)
        self._recording.outputs.setdefault(path, []).append(None if first is None else self._value(first))

    def _learn(self, tensor: Tensor, value: int) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), tensor._version, value)

    def _value(self, tensor: Tensor) -> int | None:
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        if known[1] != tensor._version:
            # Changed through a view of it: a value that no operation owns.
            self._learn(tensor, self._recording.add_value(-1, 0, tuple(tensor.shape)))
            return self._known[id(tensor)][2]
        return known[2]

    def _with_refs(self, node: Any) -> Any:
        if isinstance(node, Tensor):
            return Ref(self._value(node), tuple(node.shape))
        if isinstance(node, dict):
            return {key: self._with_refs(child) for key, child in node.items()}
        if isinstance(node, list):
            return [self._with_refs(child) for child in node]
        if isinstance(node, tuple):
            return tuple(self._with_refs(child) for child in node)
        return node


class _Hooks:
    """Temporary forward hooks on a module and everything below it."""

    def __init__(self, writer: _Writer, module: nn.Module) -> None:
        self._writer = writer
        self._module = module
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for path, module in self._module.named_modules():
            before, after = self._pair(path)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after))

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _pair(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any) -> None:
            self._writer.enter(path)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._writer.leave(path, output)

        return before, after


def call_name(func: Callable[..., Any]) -> str:
    """Name of a torch function without leading and trailing underscores; a property's own name for its getter."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def has_tensors(result: Any) -> bool:
    """Whether a call has returned tensors, alone or in a container."""
    return next(flat(result, Tensor), None) is not None


def flat(node: Any, kind: type) -> Iterator[Any]:
    """Everything of a type in nested tuples, lists and dictionaries (and what derives from them)."""
    if isinstance(node, kind):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from flat(child, kind)
    elif isinstance(node, (tuple, list)):
        for child in node:
            yield from flat(child, kind)
