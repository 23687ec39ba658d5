"""Which tensor of a forward stands for a module, and what an example must do to count there.

Which question it answers: *where is layer `layer1.0.conv1` read?* A hook on a bare convolution reads before batch norm,
where a negative gain turns the ranking round. Place in the flow: between the recording (`graph.py`, `places.py`) and
the layers that `readouts.py` offers.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from polyray.errors import ModelError
from polyray.models.axes import Layout, layout_of
from polyray.models.graph import Op, Recording, Ref, Value
from polyray.models.layers import LayerInfo
from polyray.models.places import Field, Place


@dataclass(frozen=True)
class Reading:
    """Where a layer's numbers come from."""

    info: LayerInfo
    value: Value
    function: str
    layout: Layout

    @property
    def tensor(self) -> tuple[int, int, str]:
        """What is read: number of the call, of its output, and the activation. Names that agree in it are one layer."""
        return self.value.call, self.value.output, self.info.activation or ""

    def positions_of(self, tensor: Tensor) -> Tensor:
        """[images, positions, neurons] of the tensor that is read."""
        lay = self.layout
        x = tensor.permute(lay.batch, *lay.space, lay.channel)
        x = x.flatten(1, 2) if len(lay.space) == 2 else x if lay.space else x.unsqueeze(1)
        return x[:, lay.prefix :]


@dataclass(frozen=True)
class Candidate:
    """A module that could be a layer."""

    reading: Reading | None
    refused: str
    """Why it cannot be read."""
    block: bool
    """It is a block."""
    census: bool
    """It is a block, or a convolution or linear with positions whose read-out ends in an activation."""

    def at(self, depths: dict[tuple[int, int, str], int]) -> "Candidate":
        """The same with the depth of what it reads."""
        if self.reading is None:
            return self
        info = replace(self.reading.info, depth=depths[self.reading.tensor])
        return replace(self, reading=replace(self.reading, info=info))


@dataclass(frozen=True)
class _Ending:
    """The activation that a tensor comes out of."""

    name: str
    op: Op
    saturates: bool
    zero_below: bool
    """0 for every input that is not positive."""
    direct: bool = True
    """Nothing but copies lies between it and the tensor."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Upper limits make ties at the top, so that the largest response says nothing about the best example.
_SATURATING = _names("relu6 hardtanh sigmoid tanh hardsigmoid softsign")
_UNBOUNDED = _names(
    "relu silu gelu leaky_relu elu selu celu mish hardswish softplus prelu rrelu logsigmoid hardshrink softshrink"
)
_NORMS = _names("batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm")
_COPIES = _names("clone contiguous detach to type_as dropout dropout1d dropout2d")
# What keeps "positive" and "zero" of its input: numbers are moved, left out, or averaged.
_REARRANGING = _names(
    "reshape view flatten unflatten permute transpose squeeze unsqueeze chunk split getitem cat concat "
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"
)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(module: nn.Module, recording: Recording, path: str = "") -> set[str]:
    """Paths of a network's blocks: the outermost modules with children that are elements of a container.

    Containers (Sequential, ModuleList, ModuleDict and what derives from them) are looked into, and so is a stage: an
    element that returns what a block inside it has returned.
    """
    found: set[str] = set()
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        below = blocks_of(child, recording, child_path)
        element = isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS)
        returned = recording.outputs.get(child_path)
        stage = returned is None or any(returned == recording.outputs.get(inner) for inner in below)
        if element and not stage and next(child.children(), None) is not None:
            found.add(child_path)
        else:
            found |= below
    return found


class Locator:
    """Finds the tensor that stands for each module of a recorded forward."""

    def __init__(self, recording: Recording, known: dict[int, Place], blocks: set[str]) -> None:
        self._recording = recording
        self._places = known
        self._blocks = blocks
        self._endings: dict[int, _Ending | None] = {}

    def candidates(self) -> dict[str, Candidate]:
        """Every module below the root that was called, in the order in which the calls ended."""
        found = {name: self._candidate(name) for name in self._recording.outputs if name}
        tensors = sorted({c.reading.tensor for c in found.values() if c.reading is not None})
        depths = {tensor: depth for depth, tensor in enumerate(tensors)}
        return {name: c.at(depths) for name, c in found.items()}

    def _candidate(self, name: str) -> Candidate:
        calls = self._recording.outputs[name]
        block = name in self._blocks
        made = calls[0]
        if made is None or made == 0:
            whose = "the network's input" if made == 0 else "not made by torch calls on the input that Python can see"
            return Candidate(None, f"its output is {whose}", block, block)
        end = self._follow(made)
        ending = self._ending(end)
        producer = self._recording.producer.get(made)
        mapping = producer is not None and producer.name in ("conv2d", "linear")
        census = block or (mapping and ending is not None and not self._places[made].pooled)
        if len(calls) > 1:
            why = f"it is called {len(calls)} times in one forward; name a module that is called once"
            return Candidate(None, why, block, census)
        reading = self._read(name, end, ending)
        if isinstance(reading, str):
            return Candidate(None, reading, block, census)
        return Candidate(reading, "", block, census)

    def _follow(self, value: int) -> int:
        """From a module's output through its norm and dropout to the first activation.

        A sum of branches is not followed into a norm: the norm in front of what comes next, as the final one of a
        transformer, is no part of the block.
        """
        producer = self._recording.producer.get(value)
        steps = _COPIES if producer is not None and producer.name in ("add", "iadd") else _COPIES | _NORMS
        while self._ending(value) is None:
            users = self._recording.consumers.get(value, [])
            if len(users) != 1 or not isinstance(ref := users[0].arg(0, "input"), Ref) or ref.value != value:
                break
            if users[0].name not in steps and _activation(users[0]) is None:
                break
            value = users[0].outputs[0]
        return value

    def _ending(self, value: int) -> _Ending | None:
        if value not in self._endings:
            self._endings[value] = self._look_back(value)
        return self._endings[value]

    def _look_back(self, value: int) -> _Ending | None:
        op = self._recording.producer.get(value)
        if op is None:
            return None
        found = _activation(op)
        if found is not None or op.name not in _COPIES | _REARRANGING:
            return found
        behind = [None if ref.value is None else self._ending(ref.value) for ref in op.refs()]
        first = behind[0]
        if first is None or any(e is None or (e.name, e.zero_below) != (first.name, first.zero_below) for e in behind):
            return None
        direct = first.direct and op.name in _COPIES
        return _Ending(first.name, first.op, first.saturates, first.zero_below, direct)

    def _read(self, name: str, end: int, ending: _Ending | None) -> Reading | str:
        pre = ending is not None and ending.saturates and ending.direct
        source = ending.op.arg(0, "input").value if ending is not None and pre else end
        place, value = self._places[source], self._recording.values[source]
        if place.axes is None:
            return place.lost
        layout = layout_of(place.axes)
        if isinstance(layout, str):
            return layout
        op = self._recording.producer.get(source)
        if op is None:
            return "it is an activation of the network's input"
        height, width = self._recording.values[0].shape[2:]
        geometry = _geometry(place, layout.grid, (height, width))
        if isinstance(geometry, str):
            return geometry
        receptive_px, center_x_px, center_y_px, stride_px = geometry
        info = LayerInfo(
            name=name,
            depth=0,
            width=value.shape[layout.channel],
            layout=layout.kind,
            grid_h=layout.grid[0],
            grid_w=layout.grid[1],
            activation=None if ending is None else ending.name,
            ranked_by="pre_activation" if pre else "response",
            positive_only=ending is not None and ending.zero_below,
            receptive_px=receptive_px,
            center_x_px=center_x_px,
            center_y_px=center_y_px,
            stride_px=stride_px,
        )
        return Reading(info, value, op.name, layout)


def _activation(op: Op) -> _Ending | None:
    """The activation that a call is; None where it is none. Bounds decide what a clamp is."""
    name = op.name
    if name in ("hardtanh", "clamp", "clip", "clamp_min", "clamp_max"):
        low, high = _bounds(op)
        if isinstance(low, Ref) or isinstance(high, Ref):
            return None
        shown = "relu6" if (low, high) == (0, 6) else "relu" if (low, high) == (0, None) else name
        return _Ending(shown, op, high is not None, low == 0)
    if name == "threshold":
        zero = op.arg(1, "threshold") == 0 and op.arg(2, "value") == 0
        return _Ending("relu" if zero else name, op, False, zero)
    if name in _SATURATING:
        return _Ending(name, op, True, name == "relu6")
    if name in _UNBOUNDED:
        return _Ending(name, op, False, name == "relu")
    return None


def _bounds(op: Op) -> tuple[object, object]:
    if op.name == "hardtanh":
        return op.arg(1, "min_val", -1.0), op.arg(2, "max_val", 1.0)
    if op.name == "clamp_max":
        return None, op.arg(1, "max")
    return op.arg(1, "min"), None if op.name == "clamp_min" else op.arg(2, "max")


def _geometry(
    place: Place, grid: tuple[int, int], image: tuple[int, int]
) -> tuple[int | None, float, float, float] | str:
    """Receptive field, centre (x, y) of position (0, 0) and stride; or why there is no single stride.

    Where the fields are unknown or pooled away, the grid is spread evenly over the image.
    """
    receptive: int | None = None
    if place.y is None or place.x is None or place.pooled:
        strides = [side / n for n, side in zip(grid, image, strict=True)]
        center_y, center_x = (stride / 2 for stride in strides)
    else:
        fields = (place.y, place.x)
        strides = [float(field.jump) for field in fields]
        center_y, center_x = (field.start + field.size / 2 for field in fields)
        if not place.whole and not all(map(_covers, fields, grid, image)):
            receptive = max(field.size for field in fields)
    used = {stride for stride, n in zip(strides, grid, strict=True) if n > 1} or {strides[0]}
    if len(used) > 1:
        return f"its rows and columns have different strides, {sorted(used)} px"
    return receptive, center_x, center_y, used.pop()


def _covers(field: Field, n_positions: int, side: int) -> bool:
    """Whether the first and the last position see all of an image's side."""
    last = field.start + (n_positions - 1) * field.jump
    return last <= 0 and field.start + field.size >= side


def refuse_chance(recording: Recording) -> None:
    """Refuses a network whose result for an image is random or depends on the other images of its batch.

    Raises:
        ModelError: names the call.
    """
    for op in recording.ops:
        if "dropout" in op.name and op.arg(2, "training", False) and op.arg(1, "p", 0.5):
            raise ModelError(f"{op} is active in eval mode, so responses would be random. Pass training=self.training.")
        if op.name == "batch_norm" and op.arg(5, "training", False):
            first = op.arg(0, "input")
            if isinstance(first, Ref) and first.value is not None:
                raise ModelError(
                    f"{op} uses the statistics of the batch, so the response to an image would depend on the others. "
                    "Use running statistics."
                )
