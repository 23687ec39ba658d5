"""Estimate of a categorical sweep: what will it need, before it is run?

Place in the flow: `polyray plan`. Everything follows from the config, the model's configuration and the corpus's index;
no weights are read and nothing is tokenised, so that figures are upper bounds.
"""

from dataclasses import dataclass, field

from polyray.cluster.text_layers import layers_of
from polyray.cluster.text_plan import passes, text_shape, text_stages, text_works
from polyray.errors import DataError
from polyray.models.blocks import layer_index
from polyray.models.language import LanguageModel
from polyray.probes.text import open_corpus
from polyray.text_config import TextConfig

_GIB = 1024**3


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
    disk_gb: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What stands in the way of `polyray run`."""


def estimate(config: TextConfig, n_fit: int) -> TextEstimate:
    """Plans a sweep without running it; a corpus that cannot be reached here is a problem, not an end.

    Args:
        config: the config.
        n_fit: shards that the cluster holds.

    Raises:
        ConfigError: layers that do not exist.
        ModelError: there is no such model.
    """
    science, execution = config.science, config.execution
    e = TextEstimate()
    try:
        corpus = open_corpus(science.corpus.path, science.corpus.text_column, science.corpus.label_column)
        e.n_documents = min(len(corpus), science.corpus.limit or len(corpus))
    except DataError as error:
        e.problems.append(f"corpus: {error}")
    info = LanguageModel(science.model.path).info
    layers = layers_of(science, info)
    shape = text_shape(science, e.n_documents, layers)
    names = list(shape.n_neurons)
    e.n_layers, e.n_mined, e.n_neurons_a_layer = len(shape.swept), len(names), info.n_neurons
    e.n_neurons, e.n_tokens = sum(map(len, layers.swept.values())), info.vocab
    e.n_shards = max(1, min(execution.shard.max or n_fit, n_fit, layer_index(names[-1]) + 1))
    of_layer = 8 * info.vocab * info.n_neurons
    planned = passes(names, dict.fromkeys(names, of_layer), e.n_shards * execution.stats_gb * _GIB)
    e.n_passes = len(planned)
    e.units = {stage: len(text_works(stage, shape)) for stage in text_stages(science)}
    e.memory_gb = {
        "statistics of all shards, one pass": of_layer * max(map(len, planned)) / _GIB,
        "statistics of one layer": of_layer / _GIB,
        "a scoring actor": (2 * of_layer + 8 * info.vocab * info.width) / _GIB,
    }
    e.disk_gb = {"token_stats": of_layer * len(names) / _GIB}
    return e
