"""What is asked for of a language model: the categorical census, in the same two halves as `config.py`.

Which question it answers: *which sweep is this?* Place in the flow: a leaf beside `config.py`, which picks this one
where `science.method` is `categorical`.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from polyray.selection import neuron_lists
from polyray.settings import Dtype, NumericsConfig, PoolConfig, Section

NeuronLists = dict[int, list[int | str]]
"""Neurons by layer: indices, and ranges such as `10-19`, of which the first and the last one both count."""


def by_block(held: object) -> NeuronLists:
    """Lists of neurons by block as a config or a file holds them; raises `ValueError` where it holds something else."""
    lists = neuron_lists(held)
    for layer in lists:
        if not (type(layer) is int and layer >= 0) and not (isinstance(layer, str) and layer.isdecimal()):
            raise ValueError(f"neurons are listed by block, an index from 0, got {layer!r}")
    return {int(layer): listed for layer, listed in lists.items()}


class ModelConfig(Section):
    """The language model under study."""

    path: str
    """A local folder or hub name in transformers' format, or `all-minilm-l6-v2` of the package of that name."""
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    """Blocks whose MLP neurons are swept; each layer's precursors are in the layer before, which is mined as well."""
    neurons: NeuronLists | str | None = None
    """Optional choice of neurons: by layer a list of indices and ranges, `{1: [3, 10-19]}` (`10-19` is ten neurons, 10
    and 19 among them), or a JSON or YAML file with the same. Layers that it does not name are swept whole. The layer
    before a swept one is mined whole in any case, since any of its neurons may be a precursor."""
    context: int | None = Field(None, ge=2, le=131_072)
    """Tokens of a context; by default what the model was made for, at most 1,024."""
    micro_batch: int = Field(8, ge=1, le=4096)
    """Contexts per forward pass. Fixed, the last one padded, since batch size changes the last bits."""
    dtype: Dtype = "float32"
    """Floating point of the forward pass; part of the run's identity."""

    @field_validator("neurons", mode="before")
    @classmethod
    def _neurons(cls, given: object) -> object:
        return given if given is None or isinstance(given, str) else by_block(given)


class CorpusConfig(Section):
    """The documents that are read."""

    path: str
    """A JSON-lines or Parquet file, or a folder of text files; each may be gzipped."""
    text_column: str = "text"
    """Column with the text."""
    label_column: str | None = None
    """Column with a label; by default `label` where there is one."""
    limit: int | None = Field(None, ge=1)
    """Only so many documents, the first ones; all by default."""


class CoreConfig(Section):
    """Which tokens stand for a neuron."""

    n_core: int = Field(100, ge=20, le=10_000)
    """Core-tokens: those of highest mean activation."""
    min_count: int = Field(5, ge=1)
    """Fewest occurrences with which a token has statistics."""
    published: str | None = Field(None, min_length=1)
    """Folder with published core-tokens, `<layer>/<neuron>.json` as OpenAI has them for GPT-2 XL, in place of mining.
    The corpus is still counted: only its tokens can be core-tokens, and controls need to know how frequent each is."""


class ConnectConfig(Section):
    """Which neurons of the layer before a neuron is built from."""

    n_precursors: int = Field(10, ge=1, le=1000)
    """Neurons of the layer before with the largest connection weights."""


class OverlapConfig(Section):
    """Which neurons have a categorical vector space."""

    min_tokens: int = Field(6, ge=2)
    """Fewest tokens of a taken-cluster."""
    min_clusters: int = Field(3, ge=1)
    """Fewest such taken-clusters of a neuron that qualifies."""


class ProximityConfig(Section):
    """Activation against dimensional proximity."""

    centred: bool = False
    """Take the embeddings less their mean over the tokens, which nearly all of their cosines are made of; the paper
    takes them as they are."""
    n_ends: int = Field(10, ge=1)
    """Core-tokens of highest and of lowest activation whose mean proximities are compared."""
    n_permutations: int = Field(1000, ge=10, le=100_000)
    """Permutations of the activation order behind each Kruskal-Wallis p."""
    n_draws: int = Field(10, ge=1, le=1000)
    """Draws of every control that draws."""
    n_bootstrap: int = Field(2000, ge=10, le=100_000)
    """Resamples behind each interval."""


class ClampConfig(Section):
    """What a neuron does to the model: its activation held at its core-tokens."""

    n_neurons: int = Field(8, ge=1)
    """Qualifying neurons of each layer, drawn uniformly."""
    n_contexts: int = Field(8, ge=1)
    """Contexts of the corpus, drawn uniformly, in which they are clamped."""


class TextScience(Section):
    """Everything that decides a number."""

    method: Literal["categorical"]
    """`categorical`: taken-clusters and dimensional proximity of MLP neurons (arXiv 2505.07831)."""
    model: ModelConfig
    corpus: CorpusConfig
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sweep; every random value is a function of it and of what the value is for."""
    core: CoreConfig = CoreConfig()
    connect: ConnectConfig = ConnectConfig()
    overlap: OverlapConfig = OverlapConfig()
    proximity: ProximityConfig = ProximityConfig()
    clamp: ClampConfig | None = None
    """Clamps after the census; off by default."""
    numerics: NumericsConfig = NumericsConfig()

    @model_validator(mode="after")
    def _ends(self) -> "TextScience":
        if 2 * self.proximity.n_ends > self.core.n_core:
            raise ValueError(
                f"2 × proximity.n_ends <= core.n_core must hold, got {self.proximity.n_ends} and {self.core.n_core}"
            )
        return self


class TextExecution(Section):
    """Where and how fast; never changes a result."""

    address: str | None = None
    """Ray cluster; local Ray is started where none is given."""
    autoscale: bool = False
    """The cluster adds nodes when actors ask for them: ask and wait for what no living node can hold. Ray's own
    autoscaler (2.60) does not say what it may add; not needed on clusters of which Ray knows that."""
    shard: PoolConfig = PoolConfig()
    """Actors that each hold one shard of the model; `max` is how many shards it is cut into, by default as many as
    fit, at most one a block."""
    scoring: PoolConfig = PoolConfig()
    """Actors that tokenise, connect and score."""
    stats_gb: float = Field(8.0, gt=0, allow_inf_nan=False)
    """Most GiB of token statistics that a shard holds, on average over all shards; what does not fit is mined in
    several passes. A layer lies on one shard, and a sweep one of whose layers is beyond all of them is refused."""
    checkpoint_s: float = Field(120.0, gt=0)
    """Seconds between checkpoints of mining: what the loss of a shard costs at most."""
    bundle_s: float = Field(10.0, gt=0, lt=30)
    """Target duration of one call in seconds, for which several small units travel together; well below the 30 s that a
    spot node has after its notice."""
    object_store_gb: float = Field(0.5, ge=0.1, allow_inf_nan=False)
    """Object store of a local Ray in GiB, through which hidden states pass between shards."""


class TextConfig(Section):
    """A whole config file."""

    science: TextScience
    execution: TextExecution = TextExecution()
