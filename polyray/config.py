"""What is asked for: one frozen object per config file, in two halves.

Which question it answers: *which sweep is this?* `science` decides every number and is hashed into the run_id;
`execution` decides where and how fast, and never changes a result. Place in the flow: a leaf; `cli.py` loads it,
every stage reads its own section; the kinds of probe sets and encoders are described in `settings.py`. The
environment is never read here.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from polyray.errors import ConfigError, nearest
from polyray.settings import (
    Dtype,
    EncoderConfig,
    NeuronsByLayer,
    NumericsConfig,
    PlantConfig,
    PoolConfig,
    ProbeConfig,
    Section,
    SwapConfig,
)
from polyray.settings import Generated as Generated
from polyray.settings import ImageFolder as ImageFolder
from polyray.settings import ImageTable as ImageTable
from polyray.settings import OpenClip as OpenClip
from polyray.settings import StandIn as StandIn
from polyray.settings import TinyImageNet as TinyImageNet
from polyray.text_config import TextConfig

Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class SubjectConfig(Section):
    """The network under study and the neurons that are read out of it."""

    name: str | None = None
    """`efficientnet_lite0` or `…1`, `torchvision:<model>`, `timm:<model>`; leave out when `factory` is given."""
    factory: str | None = None
    """`package.module:function` returning a torch module, for a network of your own."""
    factory_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    weights: str = "default"
    """`default` (the package's or the enum's default), a torchvision enum name, a local `.pth` or `.safetensors`
    file, or `none` for untrained weights (the run says so loudly)."""
    layers: Literal["census", "block_outputs"] | list[str] = "block_outputs"
    """A named set, or layer names with `*` wildcards. `census` is every convolution or MLP that ends in an
    activation and every block output; `block_outputs` the block outputs alone."""
    neurons: NeuronsByLayer = None
    """Optional choice of neurons: by layer a list of indices and ranges, `{blocks.3: [3, 10-19]}` (`10-19` is ten
    neurons, 10 and 19 among them), or a JSON or YAML file with the same. Layers that it does not name are swept
    whole."""
    input_px: int = Field(224, ge=8, le=2048)
    """Side of the square input in pixels."""
    resize: Literal["crop", "stretch"] = "crop"
    """`crop` scales the short side to input_px and cuts the centre, `stretch` ignores the aspect ratio."""
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    """Mean subtracted from RGB in [0, 1]; by default the one that the weights were trained with."""
    std: tuple[Scale, Scale, Scale] | None = None
    """Standard deviation that RGB is divided by; by default the one that the weights were trained with."""
    dtype: Dtype = "float32"
    """Floating point of the subject's forward pass; part of the run's identity."""
    micro_batch: int = Field(32, ge=1, le=4096)
    """Images per forward pass. Fixed, the last one padded, since batch size changes the last bits."""

    @model_validator(mode="after")
    def _one_source(self) -> "SubjectConfig":
        if (self.name is None) == (self.factory is None):
            raise ValueError("give either subject.name or subject.factory, not both and not neither")
        return self


class MineConfig(Section):
    """Which examples stand for a neuron."""

    K: int = Field(100, ge=4, le=10_000)
    """Top examples that are clustered."""
    K_keep: int = Field(200, ge=4, le=10_000)
    """Top examples that are kept and embedded, for scoring again with another K."""
    k_min: int = Field(20, ge=4)
    """Fewest examples with which a neuron is scored."""
    band: tuple[Share, Share] | None = None
    """Two quantiles such as [0.5, 0.6]: instead of the top examples, random ones whose response lies between these
    quantiles of the neuron's own responses (after a ReLU: of those above 0). Keeps every response on disk."""

    @model_validator(mode="after")
    def _order(self) -> "MineConfig":
        if self.band is not None and not self.band[0] < self.band[1]:
            raise ValueError(f"band[0] < band[1] must hold, got {list(self.band)}")
        if not self.k_min <= self.K <= self.K_keep:
            raise ValueError(f"k_min <= K <= K_keep must hold, got {self.k_min}, {self.K}, {self.K_keep}")
        return self


class ExtractConfig(Section):
    """Which part of an image a position of a layer sees."""

    window: Literal["effective", "theoretical"] = "effective"
    """`effective`: central box with a share of the input-gradient energy; `theoretical`: receptive field."""
    energy: float = Field(0.9, gt=0, lt=1)
    """Share of the energy in the box that is embedded."""
    swap_energy: float = Field(0.5, gt=0, lt=1)
    """Share of the energy in the box that is swapped."""
    n_sample: int = Field(32, ge=1, le=4096)
    """Images on which the energy is measured, once per layer."""
    thumbnails: bool = True
    """Store 64 px JPEG thumbnails of each cluster's prototypes, so that reports need no probe set."""


class EmbedConfig(Section):
    """What is embedded beside the neurons' own examples."""

    n_pool: int = Field(5000, ge=4, le=1_000_000)
    """Distinct images in each layer's pool, each cut at the peak of a random neuron of the layer."""


class ClusterConfig(Section):
    """k-means on the unit vectors of a neuron's examples."""

    k_range: tuple[int, int] = (2, 6)
    """Smallest and largest number of clusters tried; the one of highest mean silhouette is kept."""
    n_init: int = Field(4, ge=1, le=100)
    """k-means++ restarts for every k."""
    max_iter: int = Field(50, ge=1, le=1000)
    """Most Lloyd iterations of a restart."""

    @model_validator(mode="after")
    def _order(self) -> "ClusterConfig":
        if not 2 <= self.k_range[0] <= self.k_range[1]:
            raise ValueError(f"2 <= k_range[0] <= k_range[1] must hold, got {list(self.k_range)}")
        return self


class CalibrateConfig(Section):
    """Null draws, p-values and null neurons."""

    B: int = Field(1000, ge=1, le=1_000_000)
    """Null draws per component."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """False discovery rate of the summary's discoveries."""
    fdr: Literal["bh", "by"] = "bh"
    """How q is made of p: `bh`, Benjamini-Hochberg; `by`, Benjamini-Yekutieli, which holds under any dependence
    between neurons and calls fewer."""
    permute_dims: bool = False
    """Draw also pool patches whose vectors have their coordinates permuted, each in its own way: a null of S for
    study, which enters no p."""
    n_bootstrap: int = Field(1000, ge=10, le=100_000)
    """Bootstrap resamples behind each AUROC's 95 % interval."""


class Science(Section):
    """Everything that decides a number."""

    items: ClassVar[str] = "images"
    """What examples are, as people say it."""

    method: Literal["psi"] = "psi"
    """`psi`: the null-calibrated Polysemanticity Index (arXiv 2508.16950); for language models see text_config.py and
    psi_text_config.py."""
    subject: SubjectConfig
    probe: ProbeConfig
    encoder: EncoderConfig
    vocabulary: str = "builtin"
    """`builtin` (1,000 ImageNet class names and about 600 attributes), or a text file with one prompt a line."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sweep; every random value is a function of it and of what the value is for."""
    mine: MineConfig = MineConfig()
    extract: ExtractConfig = ExtractConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    plant: PlantConfig | None = None
    """Sweep neurons of known truth, planted on `subject.layers`, in place of the subject's own; off by default."""
    swap: SwapConfig | None = None
    """Causal patch swaps after the census; off by default."""
    numerics: NumericsConfig = NumericsConfig()

    @model_validator(mode="after")
    def _enough_examples(self) -> "Science":
        if self.embed.n_pool < self.mine.K:
            raise ValueError(f"embed.n_pool >= mine.K must hold, got {self.embed.n_pool} and {self.mine.K}")
        if self.plant is not None and self.mine.band is not None:
            raise ValueError(
                "plant and mine.band exclude each other: what is planted is true of the top examples alone"
            )
        if self.mine.k_min <= self.cluster.k_range[1]:
            raise ValueError(
                f"mine.k_min must be above cluster.k_range[1], got {self.mine.k_min} and {self.cluster.k_range[1]}"
            )
        return self


class Execution(Section):
    """Where and how fast; never changes a result."""

    address: str | None = None
    """Ray cluster; local Ray is started where none is given."""
    autoscale: bool = False
    """The cluster adds nodes when actors ask for them: ask and wait for what no living node can hold. Ray's own
    autoscaler (2.60) does not say what it may add; not needed on clusters of which Ray knows that."""
    subject: PoolConfig = PoolConfig()
    """Actors that hold the subject and mine."""
    encoder: PoolConfig = PoolConfig()
    """Actors that hold the encoder and embed."""
    scoring: PoolConfig = PoolConfig()
    """Actors that cluster and calibrate."""
    scoring_vectors_gb: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Most GiB of vectors of neurons' examples that a scoring actor holds at a time, however many neurons there are;
    the layer's pool comes on top. It holds those of one unit (64 neurons) in any case."""
    bundle_s: float = Field(10.0, gt=0, lt=30)
    """Target duration of one call in seconds, for which several small units travel together; well below the 30 s that a
    spot node has after its notice."""
    object_store_gb: float = Field(0.5, ge=0.1, allow_inf_nan=False)
    """Object store of a local Ray in GiB; polyray sends receipts, not tensors, so little is needed."""


class Config(Section):
    """A whole config file."""

    science: Science
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _gpus(self) -> "Config":
        if self.science.numerics.device == "cuda":
            for kind, pool in (("subject", self.execution.subject), ("encoder", self.execution.encoder)):
                if pool.num_gpus == 0:
                    raise ValueError(
                        f"science.numerics.device is 'cuda', but execution.{kind}.num_gpus is 0: every actor would "
                        "load onto the same GPU; set it to 1, or to the share that one actor needs"
                    )
        return self


AnyConfig = Config | TextConfig


def load_config(path: str | Path, overrides: list[str] | None = None) -> AnyConfig:
    """Reads a YAML config and applies `a.b=c` overrides (values parsed as YAML).

    Raises:
        ConfigError: the file is missing, not YAML, or holds an unknown key or a value out of bounds; the message
            names the key and the nearest valid one.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read config {str(path)!r}: {e.strerror}. Give the path of a YAML file.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{str(path)!r} is not YAML: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{str(path)!r} must hold the sections 'science' and 'execution', got {type(raw).__name__}.")
    for item in overrides or []:
        override(raw, item)
    return parse_any(raw)


def parse_any(raw: dict[str, Any]) -> AnyConfig:
    """Validates a config of any method; raises `ConfigError` as `load_config` does."""
    # Imported here, since it derives from what stands here.
    from polyray.psi_text_config import PsiTextConfig

    roots: dict[str, type[AnyConfig]] = {"psi": Config, "psi_text": PsiTextConfig, "categorical": TextConfig}
    science = raw.get("science")
    method = str(science.get("method", "psi")) if isinstance(science, dict) else "psi"
    if method not in roots:
        raise ConfigError(f"config refused:\n  science.method: {method!r} is not known.{nearest(method, roots)}")
    return _validated(roots[method], raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Validates the config of a PSI sweep; raises `ConfigError` as `load_config` does."""
    return _validated(Config, raw)


_Root = TypeVar("_Root", bound=BaseModel)


def _validated(root: type[_Root], raw: dict[str, Any]) -> _Root:
    try:
        return root.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("config refused:\n" + "\n".join(_explain(root, err) for err in e.errors())) from e


def override(raw: dict[str, Any], item: str) -> None:
    """Sets one key of a config given as nested dictionaries, as `--set` does; raises `ConfigError`."""
    key, eq, value = item.partition("=")
    if not eq or not key:
        raise ConfigError(f"--set takes key=value with dots between sections, got {item!r}.")
    *sections, last = key.strip().split(".")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item!r}: {section!r} is a value, not a section.")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {item!r}: the value is not YAML: {e}") from e


def _explain(root: type[BaseModel], err: Any) -> str:
    """One line for one pydantic error: dotted key, what is wrong, the nearest valid key."""
    loc = [str(part) for part in err["loc"]]
    where = ".".join(loc) or "config"
    if err["type"] == "extra_forbidden":
        return f"  {where}: unknown key.{nearest(loc[-1], _known_keys(root, loc[:-1]))}"
    if err["type"] == "union_tag_invalid":
        ctx = err["ctx"]
        known = [t.strip().strip("'") for t in ctx["expected_tags"].split(",")]
        return f"  {where}.kind: {ctx['tag']!r} is not known.{nearest(ctx['tag'], known)}"
    got = err.get("input")
    shown = "" if isinstance(got, (dict, BaseModel)) or err["type"] == "missing" else f", got {got!r}"
    return f"  {where}: {err['msg']}{shown}."


def _known_keys(root: type[BaseModel], loc: list[str]) -> list[str]:
    """Keys valid at a dotted place; a discriminator's tag in the place picks the union's member."""
    known: list[str] = []
    pending: list[tuple[type[BaseModel], list[str]]] = [(root, loc)]
    while pending:
        model, rest = pending.pop()
        if not rest:
            known += list(model.model_fields)
            continue
        field = model.model_fields.get(rest[0])
        if field is None:
            continue
        members = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        if len(models) == 1:
            pending.append((models[0], rest[1:]))
        else:
            tagged = [m for m in models if rest[1:] and rest[1] in _tags(m)]
            pending += [(m, rest[2:]) for m in tagged]
    return known


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    kind = model.model_fields.get("kind")
    return () if kind is None else getattr(kind.annotation, "__args__", ())


# What says where something lies, not what it is: its contents are digested instead.
_LOCATORS: dict[str, Any] = {
    "model": {"path", "neurons"},
    "corpus": {"path"},
    "core": {"published"},
    "subject": {"path", "weights", "neurons"},
    "probe": {"path", "download"},
    "encoder": {"path", "pretrained"},
    "vocabulary": True,
}


def identity(config: AnyConfig, contents: dict[str, str], schema_version: int) -> dict[str, Any]:
    """What the run *is*, as flat `dotted key -> value`: the science half with contents in place of locations.

    Args:
        config: the resolved config.
        contents: digests of what the locations hold (weights, probe set, encoder, vocabulary, neurons).
        schema_version: version of the dataset's schema.

    Returns:
        A flat dictionary of JSON values; two runs are the same run exactly when it is equal.
    """
    flat = _flatten(config.science.model_dump(mode="json", exclude=_LOCATORS))
    flat |= {f"contents.{name}": digest for name, digest in contents.items()}
    return flat | {"schema_version": schema_version}


def locations(config: AnyConfig) -> dict[str, str]:
    """What the science half says about where things lie, by dotted key: file names, or names of what is built in."""
    named = _flatten(config.science.model_dump(mode="json", include=_LOCATORS), "science.")
    return {key: value for key, value in named.items() if isinstance(value, str)}


def run_id(identity_fields: dict[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the canonical JSON of `identity`."""
    text = json.dumps(identity_fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
