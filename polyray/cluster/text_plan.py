"""Plan of a categorical sweep: which units of work does the census of a language model consist of?

Place in the flow: as `plan.py`, for `science.method: categorical`; knows no Ray.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from polyray.cluster.plan import Work, ranges
from polyray.cluster.text_layers import Layers
from polyray.store import Store
from polyray.text_config import TextConfig, TextScience

TextActor = Literal["shard", "scoring"]

TEXT_STAGES: dict[str, TextActor] = {
    "tokenise": "scoring",
    "count": "scoring",
    "mine": "shard",
    "core": "scoring",
    "connect": "scoring",
    "overlap": "scoring",
    "proximity": "scoring",
    "clamp": "scoring",
    "summarise": "scoring",
}
"""Every stage in order, and the kind of actor that runs it. A stage starts when the one before has ended."""

TOKENISE_DOCUMENTS = 256
"""Documents of a unit of tokenise; contexts never cross units."""


@dataclass(frozen=True)
class TextShape:
    """What the units of a sweep follow from."""

    science: TextScience
    n_documents: int
    n_neurons: Mapping[str, int]
    """Neurons that are mined, by layer in order of depth."""
    swept: tuple[str, ...]
    """Layers that are swept."""


@dataclass(frozen=True)
class TextSweep:
    """What the driver resolved before the first unit: all that an actor needs beside the config."""

    config: TextConfig
    out: str
    n_documents: int
    layers: Layers
    contents: Mapping[str, str]
    """Digests of model, tokenizer and corpus, and versions: what an actor must find on its node as well."""
    steps: Mapping[str, TextActor]
    """Stages, in order, and by which kind of actor."""

    @property
    def science(self) -> TextScience:
        """The science half of the config."""
        return self.config.science

    accounts: ClassVar[str] = "proximity"
    """The table in which every neuron that is swept has one row."""

    @property
    def shape(self) -> TextShape:
        """What its units follow from."""
        return text_shape(self.science, self.n_documents, self.layers)

    @property
    def n_layers(self) -> int:
        """Layers that are swept."""
        return len(self.layers.swept)

    @property
    def n_items(self) -> str:
        """What is shown to the model, as people say it."""
        return f"{self.n_documents:,} documents"

    @property
    def n_neurons(self) -> int:
        """Neurons over all layers that are swept."""
        return sum(map(len, self.layers.swept.values()))

    def works(self, stage: str, store: Store) -> list[Work]:
        """Units of a stage, in a fixed order; all earlier ones have ended."""
        return text_works(stage, self.shape)


def text_shape(science: TextScience, n_documents: int, layers: Layers) -> TextShape:
    """The shape of a sweep."""
    return TextShape(science, n_documents, {x: len(n) for x, n in layers.mined.items()}, tuple(layers.swept))


def text_stages(science: TextScience) -> dict[str, TextActor]:
    """The stages of a sweep in order, and the kind of actor that runs each."""
    left_out = [*(() if science.clamp else ("clamp",)), *(("mine",) if science.core.published else ())]
    return {stage: actor for stage, actor in TEXT_STAGES.items() if stage not in left_out}


def text_works(stage: str, shape: TextShape) -> list[Work]:
    """Units of a stage, in a fixed order."""
    match stage:
        case "tokenise":
            return [Work(stage, start=a, stop=b) for a, b in ranges(shape.n_documents, TOKENISE_DOCUMENTS)]
        case "count" | "summarise":
            return [Work(stage)]
        case "mine" | "core":
            return [Work(stage, layer) for layer in shape.n_neurons]
        case "connect" | "overlap" | "proximity" | "clamp":
            return [Work(stage, layer) for layer in shape.swept]
    raise ValueError(f"no stage {stage!r}")


def passes(layers: list[str], bytes_of: Mapping[str, int], room_bytes: float) -> list[list[str]]:
    """Layers in as few passes over the corpus as their statistics leave room for, at least one layer each."""
    found: list[list[str]] = []
    used = 0.0
    for layer in layers:
        if not found or used + bytes_of[layer] > room_bytes:
            found.append([])
            used = 0.0
        found[-1].append(layer)
        used += bytes_of[layer]
    return found


def shards(n_blocks: int, n_shards: int) -> list[range]:
    """Blocks 0 … n−1 in contiguous ranges whose lengths differ by at most one."""
    n_shards = max(1, min(n_shards, n_blocks))
    ends = [round(i * n_blocks / n_shards) for i in range(n_shards + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]
