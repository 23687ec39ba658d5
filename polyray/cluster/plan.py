"""Plan: which units of work does a sweep consist of?

Place in the flow: between the config and the dispatcher; knows no Ray. Units are fixed by the science half and by
what earlier stages committed, never by how many actors there are, so that a unit's key means the same work in every
run. A unit is a pure function of the run and its key.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from polyray.config import Config, Science
from polyray.models.layers import LayerInfo
from polyray.psi_text_config import PsiTextScience
from polyray.schema import NULL_KINDS, SHARED_LAYER, SWAP_SHOWN
from polyray.store import Store

Actor = Literal["subject", "encoder", "scoring"]

STAGES: dict[str, Actor] = {
    "index": "subject",
    "features": "subject",
    "plant": "subject",
    "window": "subject",
    "mine": "subject",
    "merge": "subject",
    "extract": "subject",
    "embed": "encoder",
    "cluster": "scoring",
    "draw": "scoring",
    "calibrate": "scoring",
    "summarise": "scoring",
    "recover": "scoring",
    "swap": "subject",
    "effects": "subject",
}
"""Every stage in order, and the kind of actor that runs it. A stage starts when the one before has ended; reduce
units run where the units before them ran, so that a sweep starts each kind of actor once, and that of the subject
again for swaps, which are of clusters."""

PLANTING = ("features", "plant", "recover")
"""Stages of a sweep with planted neurons alone."""
SWAPPING = ("swap", "effects")
"""Stages of a sweep with patch swaps alone."""

# Sizes of units. Each takes a few seconds on one core of 2026, well below the 30 s in which a spot node drains.
INDEX_IMAGES = 2048
MINE_IMAGES = 256
INDEX_DOCUMENTS = 256
MINE_TOKENS = 2**14
"""Tokens of a unit of mine over documents, at most; a document that has more is a unit of its own."""
EMBED_PATCHES = 2048
CLUSTER_NEURONS = 64
DRAWS = 256
SWAP_IMAGES = 512
"""What the subject is shown in a unit of swap, roughly: two units of mine, since a last micro-batch is rarely full."""


@dataclass(frozen=True)
class Work:
    """One unit of work."""

    stage: str
    layer: str | None = None
    kind: str | None = None
    n_used: int | None = None
    start: int | None = None
    stop: int | None = None

    @property
    def key(self) -> str:
        """Stable key: stage, layer, kind, size, range."""
        parts = [self.stage]
        parts += [quote(self.layer, safe="")] if self.layer is not None else []
        parts += [self.kind] if self.kind is not None else []
        parts += [f"n{self.n_used}"] if self.n_used is not None else []
        parts += [f"{self.start:07d}-{self.stop:07d}"] if self.start is not None else []
        return "/".join(parts)

    @property
    def items(self) -> range:
        """Images, patches, neurons or draws that it covers."""
        if self.start is None or self.stop is None:
            raise ValueError(f"unit {self.key!r} covers no range")
        return range(self.start, self.stop)

    @property
    def of_layer(self) -> str:
        """The layer that it is about."""
        if self.layer is None:
            raise ValueError(f"unit {self.key!r} is about no layer")
        return self.layer

    @property
    def weight(self) -> float:
        """How much work it is, in items of its stage."""
        return float(1 if self.start is None else len(self.items))


@dataclass(frozen=True)
class Shape:
    """What the units of a sweep follow from, beside what earlier stages committed."""

    science: Science
    n_images: int
    n_neurons: Mapping[str, int]
    """Neurons that are swept, by layer, in order of depth."""


@dataclass(frozen=True)
class Sweep:
    """What the driver resolved before the first unit: all that an actor needs beside the config."""

    config: Config
    out: str
    n_images: int
    layers: tuple[LayerInfo, ...]
    neurons: Mapping[str, NDArray[np.int64]]
    """Neurons that are swept, by layer, ascending."""
    contents: Mapping[str, str]
    """Digests of weights, probe set and prompts, and torch's version: what an actor must find on its node as well."""
    steps: Mapping[str, Actor]
    """What is done, in order, and by which kind of actor: all stages, or of a variant those that it does again."""

    accounts: ClassVar[str] = "neurons"
    """The table in which every neuron that is swept has one row."""

    @property
    def science(self) -> Science:
        """The science half of the config."""
        return self.config.science

    @property
    def n_layers(self) -> int:
        """Layers that are swept."""
        return len(self.layers)

    @property
    def n_items(self) -> str:
        """What is shown to the subject, as people say it."""
        return f"{self.n_images:,} {self.science.items}"

    @property
    def n_neurons(self) -> int:
        """Neurons over all layers."""
        return sum(len(n) for n in self.neurons.values())

    @property
    def shape(self) -> Shape:
        """What its units follow from."""
        return Shape(self.science, self.n_images, {info.name: len(self.neurons[info.name]) for info in self.layers})

    def works(self, stage: str, store: Store) -> list[Work]:
        """Units of a stage, in a fixed order; all earlier ones have ended."""
        return works(stage, self.shape, store)


@dataclass(frozen=True)
class Resolved:
    """A sweep that can start, and what its run.json says."""

    sweep: Sweep
    identity: dict[str, Any]
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers must know: untrained weights, stand-ins, circularity."""


def stages(science: Science) -> dict[str, Actor]:
    """The stages of a sweep in order, and the kind of actor that runs each."""
    left_out = [*(() if science.plant else PLANTING), *(() if science.swap else SWAPPING)]
    return {stage: actor for stage, actor in STAGES.items() if stage not in left_out}


def works(stage: str, shape: Shape, store: Store) -> list[Work]:
    """Units of a stage, in a fixed order.

    Args:
        stage: one of `STAGES`, or `embed/vocabulary`, its unit that embeds no patch; all earlier ones have ended.
        shape: the sweep's.
        store: what earlier stages committed.
    """
    if stage == "embed":
        return embed_works({x: len(store.read("patches", x, columns=["patch_id"])) for x in shape.n_neurons})
    if stage == "mine" and isinstance(shape.science, PsiTextScience):
        rows = store.read("images", columns=["example", "width_px"]).sort_by("example")
        return document_works([n or 0 for n in rows["width_px"].to_pylist()])
    if stage == "draw":
        return draw_works(shape, {layer: scored_sizes(store, layer) for layer in shape.n_neurons})
    return fixed_works(stage, shape)


def fixed_works(stage: str, shape: Shape) -> list[Work]:
    """Units of a stage that needs to know nothing of what earlier stages committed: all but embed and draw, and mine
    over documents."""
    text = isinstance(shape.science, PsiTextScience)
    match stage:
        case "index":
            step = INDEX_DOCUMENTS if text else INDEX_IMAGES
            return [Work("index", start=a, stop=b) for a, b in ranges(shape.n_images, step)]
        case "mine" | "features" if not text:
            return [Work(stage, start=a, stop=b) for a, b in ranges(shape.n_images, MINE_IMAGES)]
        case "window" | "merge" | "calibrate":
            return [Work(stage, layer) for layer in shape.n_neurons]
        case "extract" | "summarise" | "plant" | "recover" | "effects":
            return [Work(stage)]
        case "swap":
            return swap_works(shape)
        case "embed/vocabulary":
            return [Work("embed", kind="vocabulary")]
        case "cluster":
            return [
                Work("cluster", layer, start=a, stop=b)
                for layer, n in shape.n_neurons.items()
                for a, b in ranges(n, CLUSTER_NEURONS)
            ]
    raise ValueError(f"no stage {stage!r} with fixed units")


def document_works(n_tokens: Sequence[int]) -> list[Work]:
    """Units of mine over documents, given how many tokens each has: ranges of at most `MINE_TOKENS`, or of one."""
    starts: list[int] = []
    held = 0
    for document, n in enumerate(n_tokens):
        if not starts or held + n > MINE_TOKENS or document - starts[-1] == MINE_IMAGES:
            starts.append(document)
            held = 0
        held += n
    return [Work("mine", start=a, stop=b) for a, b in pairwise([*starts, len(n_tokens)])]


def embed_works(n_patches: Mapping[str, int]) -> list[Work]:
    """Units of embed, given how many patches are filed under each layer."""
    return [Work("embed", kind="vocabulary")] + [
        Work("embed", layer, start=a, stop=b) for layer, n in n_patches.items() for a, b in ranges(n, EMBED_PATCHES)
    ]


def swap_works(shape: Shape) -> list[Work]:
    """Units of swap: ranges of the swapped neurons of each layer, and of those with a null neuron beside them."""
    swap = shape.science.swap
    if swap is None:
        return []
    found = []
    for layer, n_neurons in shape.n_neurons.items():
        n_swapped = min(n_neurons, swap.n_neurons or n_neurons)
        for kind, n in (("real", n_swapped), ("null", min(n_swapped, swap.n_null))):
            per_unit = max(1, SWAP_IMAGES // (len(SWAP_SHOWN[kind]) * swap.n_hosts))
            found += [Work("swap", layer, kind, None, a, b) for a, b in ranges(n, per_unit)]
    return found


def scored_sizes(store: Store, layer: str) -> list[int]:
    """Sizes of example sets that occur among the layer's scored neurons, descending."""
    rows = store.read("scores", layer, columns=["kind", "status", "n_used"])
    found = {r["n_used"] for r in rows.to_pylist() if r["kind"] == "real" and r["status"] == "ok"}
    return sorted(found, reverse=True)


def draw_works(shape: Shape, sizes: Mapping[str, Sequence[int]]) -> list[Work]:
    """Units of draw: shared draws first, then each layer's draws and null neurons."""
    B = shape.science.calibrate.B
    found = [Work("draw", SHARED_LAYER, "shuffle_text")]
    for n in sorted({n for layer in sizes.values() for n in layer}, reverse=True):
        found += [Work("draw", SHARED_LAYER, "rotation", n, a, b) for a, b in ranges(B, DRAWS)]
    for layer, needed in sizes.items():
        for kind in ("pool", "one_concept", *(["permute_dims"] if shape.science.calibrate.permute_dims else [])):
            found += [Work("draw", layer, kind, n, a, b) for n in needed for a, b in ranges(B, DRAWS)]
        for kind in NULL_KINDS:
            found += [
                Work("draw", layer, f"null_{kind}", None, a, b)
                for a, b in ranges(shape.n_neurons[layer], CLUSTER_NEURONS)
            ]
    return found


def ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each range of at most `step` items out of n."""
    return ((a, min(a + step, n)) for a in range(0, n, step))
