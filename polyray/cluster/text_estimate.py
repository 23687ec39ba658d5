"""Estimate of a categorical sweep: what will it need, before it is run?

Place in the flow: `polyray plan`. Everything follows from the config, the model's configuration and the corpus's index;
no weights are read. Tokens with statistics are bounded by the vocabulary; contexts are extrapolated from the corpus's
first documents.
"""

from dataclasses import dataclass, field

from polyray.cluster.text_layers import layers_of
from polyray.cluster.text_memory import (
    CONTEXT_BYTES,
    GIB,
    Room,
    lacks,
    n_shards_of,
    planned,
    positions_of,
    scoring_memory,
    shard_memory,
    sizes_of,
)
from polyray.cluster.text_plan import text_shape, text_stages, text_works
from polyray.errors import DataError, ModelError
from polyray.models.language import LanguageModel
from polyray.probes.text import open_corpus
from polyray.probes.tokens import Tokenizer
from polyray.text_config import TextConfig


@dataclass
class TextEstimate:
    """What `polyray plan` says of a categorical sweep."""

    n_layers: int = 0
    n_mined: int = 0
    n_neurons_a_layer: int = 0
    n_neurons: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    """Tokens with statistics: the whole vocabulary at most."""
    n_shards: int = 0
    n_passes: int = 0
    units: dict[str, int] = field(default_factory=dict)
    memory_gb: dict[str, float] = field(default_factory=dict)
    """GiB at most by what takes them, of actors without about 0.9 GiB for the libraries."""
    disk_gb: dict[str, float] = field(default_factory=dict)
    """GiB by table before compression, at most."""
    problems: list[str] = field(default_factory=list)
    """What stands in the way of `polyray run`."""


def estimate(config: TextConfig, room: Room) -> TextEstimate:
    """Plans a sweep without running it; a corpus or weights that cannot be reached here are a problem, not an end.

    Args:
        config: the config.
        room: what the cluster has.

    Raises:
        ConfigError: layers or neurons that do not exist.
        ModelError: there is no such model.
    """
    science, execution = config.science, config.execution
    e = TextEstimate()
    model = LanguageModel(science.model.path)
    info = model.info
    layers = layers_of(science, info)
    n_positions = 0
    try:
        corpus = open_corpus(science.corpus.path, science.corpus.text_column, science.corpus.label_column)
        e.n_documents = min(len(corpus), science.corpus.limit or len(corpus))
        n_positions = positions_of(corpus, Tokenizer(model.folder), science, info, e.n_documents)
    except DataError as error:
        e.problems.append(f"corpus: {error}")
    except ModelError as error:
        e.problems.append(f"tokenizer: {error}")
    stages = text_stages(science)
    shape = text_shape(science, e.n_documents, layers)
    e.units = {stage: len(text_works(stage, shape)) for stage in stages}
    e.n_layers, e.n_mined, e.n_neurons_a_layer = len(layers.swept), len(layers.mined), info.n_neurons
    e.n_neurons, e.n_tokens = sum(map(len, layers.swept.values())), info.vocab
    sizes = sizes_of(model, science, layers, n_positions)
    needed: dict[str, int] = {}
    if "mine" in stages:
        n_fit = n_shards_of(execution, room.n_fit["shard"])
        held = shard_memory(sizes, science, execution, n_fit)
        e.n_shards = len(held)
        e.n_passes = len(planned(sizes, execution, n_fit))
        statistics = [sizes.statistics(layer) for layer in layers.mined]
        needed["statistics of all layers"] = sum(statistics)
        needed["statistics of the largest layer"] = max(statistics)
        needed["all contexts, in every shard"] = CONTEXT_BYTES * n_positions
        for m in held:
            name = f"shard of blocks {m.blocks.start} to {m.blocks.stop - 1}"
            needed |= {name: m.total, f"{name}: weights": m.weights, f"{name}: statistics": m.statistics}
        e.disk_gb["token_stats"] = sum(statistics) / GIB
    scoring = scoring_memory(sizes, science, [stage for stage, kind in stages.items() if kind == "scoring"])
    needed |= {f"scoring actor in {stage}": n for stage, n in scoring.items()}
    e.memory_gb = {name: n / GIB for name, n in needed.items()}
    e.problems += lacks(sizes, science, execution, stages, room)
    try:
        model.checkpoint  # noqa: B018 - opened to see whether it can be
    except ModelError as error:
        e.problems.append(f"model: {error}")
    return e
