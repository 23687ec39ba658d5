"""The parts of a config that come in kinds (where images come from, what encodes them), may be left out (planted
neurons, patch swaps) or are the same for images and text (numerics, pools of actors).

Place in the flow: a leaf under `config.py`, which puts the sections together and is what others import.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from polyray.selection import neuron_lists

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]


class Section(BaseModel):
    """One section of a config: frozen, no unknown keys, attribute docstrings are the field documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _listed(given: object) -> object:
    if given is None or isinstance(given, str):
        return given
    lists = neuron_lists(given)
    if strangers := [layer for layer in lists if not isinstance(layer, str)]:
        raise ValueError(f"layers go by their names, got {strangers[0]!r}; where a name is a number, put it in quotes")
    return lists


NeuronsByLayer = Annotated[dict[str, list[int | str]] | str | None, BeforeValidator(_listed)]
"""By layer a list of indices and ranges, `{NAME: [3, 10-19]}` (`10-19` is ten neurons, 10 and 19 among them), or a JSON
or YAML file with the same; layers that it does not name are swept whole."""


class TinyImageNet(Section):
    """Tiny-ImageNet in its original layout."""

    kind: Literal["tiny_imagenet"]
    path: str = "data/tiny-imagenet-200.zip"
    """The unpacked folder or the zip file itself."""
    split: Literal["val", "train"] = "val"
    """Which split: 10,000 validation or 100,000 training images."""
    download: bool = False
    """Fetch the zip to `path` and check it when it is not there."""
    limit: int | None = Field(None, ge=1)
    """Only so many images, spread evenly over the sorted list; all by default."""


class ImageFolder(Section):
    """A folder of images with one sub-folder a class."""

    kind: Literal["folder"]
    path: str
    """The folder; its sub-folders' names are the labels."""
    limit: int | None = Field(None, ge=1)
    """Only so many images, spread evenly over the sorted list; all by default."""


class ImageTable(Section):
    """A Parquet or Arrow table with image bytes and labels."""

    kind: Literal["table"]
    path: str
    """A `.parquet`, `.arrow` or `.feather` file, or a folder of Parquet files."""
    image_column: str = "image"
    """Column with encoded image bytes (or a struct with a `bytes` field, as Hugging Face writes it)."""
    label_column: str = "label"
    """Column with the label, text or integer."""
    limit: int | None = Field(None, ge=1)
    """Only so many images, spread evenly over the rows; all by default."""


class Generated(Section):
    """Procedurally drawn textures and shapes, from a seed; needs no data at all."""

    kind: Literal["generated"]
    n_classes: int = Field(48, ge=2, le=48)
    """How many of the drawn classes."""
    n_per_class: int = Field(40, ge=1, le=10_000)
    """Images drawn of each class."""
    image_px: int = Field(96, ge=64, le=128)
    """Side of the drawn images in pixels."""
    seed: int = Field(0, ge=0)
    """Seed of the drawing."""


ProbeConfig = Annotated[TinyImageNet | ImageFolder | ImageTable | Generated, Field(discriminator="kind")]


class OpenClip(Section):
    """An open_clip model: one space for geometry and names. The reference encoder."""

    same_space: ClassVar[bool] = True
    standardise: ClassVar[bool] = False

    kind: Literal["open_clip"]
    model: str = "ViT-B-32-quickgelu"
    """open_clip's model name; OpenAI's ViT-B/32 weights want the quickgelu variant."""
    pretrained: str = "openai"
    """A pretrained tag, a local weights file, or `none` for untrained weights (the run says so loudly)."""
    template: str = "{}"
    """How a prompt becomes a sentence, for instance `a photo of {}`."""
    dtype: Dtype = "float32"
    """Floating point of the encoder's forward pass."""
    micro_batch: int = Field(64, ge=1, le=4096)
    """Patches per forward pass, the last one padded."""


class StandIn(Section):
    """The encoder for machines that cannot reach CLIP's weights: classifier features and ConSE names."""

    same_space: ClassVar[bool] = False
    standardise: ClassVar[bool] = True

    kind: Literal["standin"]
    input_px: int = Field(128, ge=32, le=512)
    """Side to which patches are resized before EfficientNet-Lite0 encodes them."""
    top_classes: int = Field(10, ge=1, le=1000)
    """How many of the classifier's top classes enter the ConSE mean."""
    dtype: Dtype = "bfloat16"
    """Floating point of the encoder's forward pass."""
    micro_batch: int = Field(16, ge=1, le=4096)
    """Patches per forward pass, the last one padded."""


EncoderConfig = Annotated[OpenClip | StandIn, Field(discriminator="kind")]


class PlantConfig(Section):
    """Neurons of known truth, planted on feature maps of the subject and swept in place of its own."""

    per_kind: int = Field(60, ge=1, le=1000)
    """Neurons of each kind on each layer; at most as many as there are classes."""
    rarity: float = Field(5.0, gt=1, le=100)
    """`unequal`: how many times rarer the second concept is meant to be among the top K."""


class SwapConfig(Section):
    """Causal patch swaps: does what a cluster shows drive the neuron?"""

    n_hosts: int = Field(40, ge=2, le=1000)
    """Host images of a neuron, spread evenly over its clusters; each is shown in seven versions. No p of a cluster
    with n hosts is below 2^-n, and its verdict needs q < 0.05 among all clusters of the sweep."""
    n_neurons: int | None = Field(None, ge=1)
    """At most so many neurons of each layer, drawn uniformly, whether they can be scored or not; all by default."""
    max_frac: float = Field(0.4, gt=0, le=1)
    """Longest side of the box as a share of the image's side; a larger window is cut to its centre and flagged."""
    n_random: int = Field(512, ge=2, le=1_000_000)
    """Images from which random patches are drawn; where every neuron peaks in them is kept from mining."""
    n_null: int = Field(32, ge=0)
    """Null neurons of each layer: random examples under permuted cluster labels, to check the method itself."""

    @model_validator(mode="after")
    def _enough_images(self) -> "SwapConfig":
        if self.n_random < 2 * self.n_hosts:
            raise ValueError(
                f"n_random >= 2 × n_hosts must hold, got {self.n_random} and {self.n_hosts}: an image that serves "
                "several hosts makes their differences depend on each other"
            )
        return self


class NumericsConfig(Section):
    """What makes floating point reproducible."""

    device: Device = "cpu"
    """Device class of every actor; results of different classes are never mixed in one OUT."""
    threads: int = Field(1, ge=1, le=256)
    """Threads per actor; another number may change last bits, so it belongs to the run's identity."""


class PoolConfig(Section):
    """One kind of actor: what each needs, and how many."""

    num_cpus: float = Field(1, gt=0, allow_inf_nan=False)
    """CPU cores that Ray sets aside for each actor."""
    num_gpus: float = Field(0, ge=0, allow_inf_nan=False)
    """GPUs that Ray sets aside for each actor; a share is allowed."""
    memory_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Memory in GiB that Ray sets aside for each actor; none declared by default."""
    min: int = Field(1, ge=1)
    """Fewest actors; the run is refused where the cluster cannot hold them."""
    max: int | None = Field(None, ge=1)
    """Most actors; as many as the cluster holds by default."""
    in_flight: int = Field(2, ge=1, le=64)
    """Calls that may wait at one actor at a time."""

    @model_validator(mode="after")
    def _order(self) -> "PoolConfig":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"min <= max must hold, got {self.min} and {self.max}")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"num_gpus must be whole above 1, got {self.num_gpus}")
        for name, amount in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if round(amount, 4) != amount:
                raise ValueError(f"{name} may have at most 4 decimals, got {amount}")
        return self
