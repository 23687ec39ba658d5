"""Memory of a categorical sweep: what will its actors hold at most, and does that fit?

Which question it answers: *can this sweep run here?* Place in the flow: `plan` shows it, and `run` refuses what does
not fit before anything is written; knows no Ray. Before the corpus is counted, tokens with statistics are bounded by
the vocabulary; `core.min_count` leaves out most of it in a small corpus.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from polyray.cluster.shard import PART_BYTES
from polyray.cluster.text_layers import Layers
from polyray.cluster.text_plan import TOKENISE_DOCUMENTS, passes, shards
from polyray.cluster.text_rows import context_length
from polyray.models.blocks import layer_index
from polyray.models.language import LanguageModel, ModelInfo
from polyray.probes.text import Corpus
from polyray.probes.tokens import Tokenizer, pack, tokenize
from polyray.settings import PoolConfig
from polyray.text_config import TextExecution, TextScience

GIB = 1024**3
CONTEXT_BYTES = 9
"""Of a token in a context, as `Packed` holds it: token, document, mask."""
_CLAMP_CONTEXT_BYTES = 17
"""As `clamp.Contexts` holds it."""
_BATCH_BYTES = 40
"""Of a neuron at a position while a batch passes, as measured at GPT2-XL's width (bench_xl.py)."""
_PART_COPIES = 5
"""Of a part on its way to disk: sums, rows, Parquet, digest; as measured there."""
_MEANS = 20_000_000
"""Means that `core_tokens` looks at at a time, at about 35 bytes each."""


@dataclass(frozen=True)
class Weights:
    """Bytes of the parts of a model in the dtype of the forward pass."""

    block: int
    entry: int
    """What the first shard needs besides its blocks."""
    head: int
    """The last norm and the head, whether it is tied or not."""


def weights_of(model: LanguageModel, dtype: str) -> Weights:
    """Sizes from the configuration alone; no weights are read."""
    whole = model.skeleton
    base = whole.get_submodule(whole.base_model_prefix)
    size = getattr(torch, dtype).itemsize

    def n_bytes(*modules: torch.nn.Module) -> int:
        return sum(size * p.numel() for module in modules for p in module.parameters())

    family = model.family
    head = [whole.get_submodule(family.head)] + ([base.get_submodule(family.norm)] if family.norm else [])
    return Weights(
        n_bytes(base.get_submodule(f"{family.blocks}.0")),
        n_bytes(*map(base.get_submodule, family.entry)),
        n_bytes(*head),
    )


@dataclass(frozen=True)
class Sizes:
    """What the memory of a sweep follows from."""

    info: ModelInfo
    weights: Weights
    layers: Layers
    n_positions: int
    """Tokens of all contexts, padding included, about."""

    def statistics(self, layer: str) -> int:
        """Bytes of a layer's sums at most."""
        return 8 * self.info.vocab * len(self.layers.mined[layer])


def sizes_of(model: LanguageModel, science: TextScience, layers: Layers, n_positions: int) -> Sizes:
    """What a sweep's memory follows from."""
    return Sizes(model.info, weights_of(model, science.model.dtype), layers, n_positions)


def positions_of(corpus: Corpus, tokenizer: Tokenizer, science: TextScience, info: ModelInfo, n_documents: int) -> int:
    """Tokens of all contexts, padding included, by the corpus's first documents."""
    n_seen = min(n_documents, TOKENISE_DOCUMENTS)
    seen = tokenize(corpus.documents(range(n_seen)), tokenizer)
    packed = pack(seen, tokenizer, context_length(science, info), info.causal)
    return packed.tokens.numel() * n_documents // max(n_seen, 1)


@dataclass(frozen=True)
class Room:
    """What a cluster has."""

    n_fit: Mapping[str, int]
    """Actors of each kind that it holds by what they ask for."""
    memory: Sequence[float]
    """Bytes of each node."""


@dataclass(frozen=True)
class ShardMemory:
    """Bytes that one shard holds at most, besides about 0.9 GiB for the libraries."""

    blocks: range
    weights: int
    statistics: int
    contexts: int
    work: int
    """One batch's activations, and one part on its way to disk."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.statistics + self.contexts + self.work


def n_shards_of(execution: TextExecution, n_fit: int) -> int:
    """Shards that a sweep is cut into where the cluster holds so many; never more than blocks are needed."""
    return max(1, min(execution.shard.max or n_fit, n_fit))


def planned(sizes: Sizes, execution: TextExecution, n_shards: int) -> list[list[str]]:
    """Passes over the corpus where every token of the vocabulary has statistics."""
    bytes_of = {layer: sizes.statistics(layer) for layer in sizes.layers.mined}
    return passes(list(bytes_of), bytes_of, n_shards * execution.stats_gb * GIB)


def shard_memory(sizes: Sizes, science: TextScience, execution: TextExecution, n_shards: int) -> list[ShardMemory]:
    """What each shard of the pass that takes the most holds, shard by shard."""
    info, w = sizes.info, sizes.weights
    batch = _BATCH_BYTES * science.model.micro_batch * context_length(science, info) * info.n_neurons
    found: list[list[ShardMemory]] = []
    for layers in planned(sizes, execution, n_shards):
        cut = shards(max(map(layer_index, layers)) + 1, n_shards)
        of_pass = []
        for blocks in cut:
            own = [sizes.statistics(x) for x in layers if layer_index(x) in blocks]
            of_pass.append(
                ShardMemory(
                    blocks,
                    w.block * len(blocks) + (w.entry if blocks.start == 0 else 0),
                    sum(own),
                    CONTEXT_BYTES * sizes.n_positions,
                    batch + _PART_COPIES * min(PART_BYTES, max(own, default=0)),
                )
            )
        found.append(of_pass)
    return max(found, key=lambda of_pass: max(m.total for m in of_pass))


def scoring_memory(sizes: Sizes, science: TextScience, stages: Sequence[str]) -> dict[str, int]:
    """Bytes that a scoring actor holds at most in its larger stages, besides about 0.9 GiB for the libraries.

    Of a clamp without what the output distribution takes: 32 bytes for each token of the vocabulary and each position
    at which a neuron is held.
    """
    info, w = sizes.info, sizes.weights
    largest = max(map(sizes.statistics, sizes.layers.mined))
    # Raw rows of the vocabulary, then those of kept tokens, in float64 for their directions.
    embeddings = (4 + 24) * info.vocab * info.width
    layer_weights = info.n_neurons * info.width * (4 + 4 + 8 + (4 if info.gated else 0))
    needed = {
        # The rows as they are read, and the sums that are made of them.
        "core": 0 if science.core.published else 2 * largest + 35 * min(_MEANS, largest // 8),
        "connect": layer_weights + 200 * 2**20,
        "proximity": embeddings,
        "clamp": embeddings
        + w.block * info.n_layers
        + w.entry
        + w.head
        + (CONTEXT_BYTES + _CLAMP_CONTEXT_BYTES) * sizes.n_positions,
    }
    return {stage: needed[stage] for stage in stages if stage in needed}


def lacks(
    sizes: Sizes,
    science: TextScience,
    execution: TextExecution,
    stages: Mapping[str, str],
    room: Room,
) -> list[str]:
    """What does not fit, with the numbers; empty where all does.

    Args:
        sizes: the sweep's.
        science: the science half of the config.
        execution: the execution half.
        stages: stages of the sweep, and the kind of actor that runs each.
        room: what the cluster has.
    """
    problems = []
    if "shard" in stages.values():
        n_shards = n_shards_of(execution, room.n_fit["shard"])
        layer = max(sizes.layers.mined, key=sizes.statistics)
        if sizes.statistics(layer) > n_shards * execution.stats_gb * GIB:
            problems.append(
                f"execution.stats_gb {execution.stats_gb:g} × {n_shards} shard(s) is less than the statistics of one "
                f"layer: {layer!r} takes up to {sizes.statistics(layer) / GIB:.2f} GiB ({sizes.info.vocab:,} tokens × "
                f"{len(sizes.layers.mined[layer]):,} neurons × 8 bytes). Raise stats_gb, or choose fewer neurons."
            )
        held = [m.total for m in shard_memory(sizes, science, execution, n_shards)]
        remedy = "Lower execution.stats_gb or science.model.micro_batch, or take more shards"
        problems += _beyond("shard", execution.shard, held, room.memory, remedy)
    scoring = scoring_memory(sizes, science, [s for s, kind in stages.items() if kind == "scoring"])
    for stage, needed in scoring.items():
        n_units = len(sizes.layers.mined if stage == "core" else sizes.layers.swept)
        n_actors = max(1, min(n_units, room.n_fit["scoring"], execution.scoring.max or n_units))
        remedy = "Lower execution.scoring.max"
        found = _beyond("scoring", execution.scoring, [needed] * n_actors, room.memory, remedy)
        problems += [f"stage {stage}: {problem}" for problem in found]
    return problems


def _beyond(kind: str, pool: PoolConfig, held: Sequence[int], memory: Sequence[float], remedy: str) -> list[str]:
    most = max(held) / GIB
    if pool.memory_gb is not None:
        if most <= pool.memory_gb:
            return []
        return [f"execution.{kind}.memory_gb is {pool.memory_gb:g}, but up to {most:.1f} GiB are needed; raise it."]
    largest, whole = max(memory, default=0.0) / GIB, sum(memory) / GIB
    if most > largest:
        return [
            f"a {kind} actor needs up to {most:.1f} GiB, but no node has more than {largest:.1f} GiB of memory for "
            f"actors. {remedy}, or choose fewer layers or neurons."
        ]
    together = sum(held) / GIB
    if together > whole:
        return [
            f"{len(held)} {kind} actors need up to {together:.1f} GiB together, but the nodes have {whole:.1f} GiB of "
            f"memory for actors. {remedy}, or choose fewer layers or neurons."
        ]
    return []
