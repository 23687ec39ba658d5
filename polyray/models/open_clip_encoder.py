"""Which question it answers: *what does CLIP make of a patch, or of a prompt?*

Place in the flow: the reference `Encoder` for embed, one space for geometry and names (Radford et al. 2021,
arXiv 2103.00020), as open_clip builds it. Weights come from the Hugging Face hub, its local cache, or a file.
"""

import http.client
import pickle
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import Tensor

from polyray.config import OpenClip
from polyray.errors import ConfigError, ModelError, nearest
from polyray.models.encoders import Encoder, normalised, weights_digest

HUB_TIMEOUT_S = 5.0
"""How long the hub may take to answer. Its own client goes on trying for 46 s and more where it cannot be reached."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What open_clip, torch and safetensors raise on a file that is damaged, no state dict, or another model's.
_MISFITS = (
    *(RuntimeError, OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, StopIteration),
    *(pickle.UnpicklingError, SafetensorError),
)
_LONGEST_LINE, _MOST_LINES = 200, 5


class Weights(NamedTuple):
    """Where a model's weights lie, and how the pictures that it was trained on were scaled."""

    path: Path | None
    """None: untrained."""
    mean: tuple[float, ...]
    """Mean of RGB in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation that RGB is divided by."""
    notes: list[str]


class OpenClipEncoder(Encoder):
    """Any of open_clip's models."""

    same_space = OpenClip.same_space
    standardise = OpenClip.standardise

    def __init__(self, config: OpenClip, device: torch.device) -> None:
        """Loads the model.

        Raises:
            ConfigError: no such model or tag, or a template without its one `{}`.
            ModelError: the weights or the tokenizer cannot be reached, or the weights do not fit.
        """
        if config.template.count("{}") != 1:
            raise ConfigError(f"encoder.template must hold '{{}}' once, for the prompt, got {config.template!r}.")
        weights = find_weights(config.model, config.pretrained)
        self._tokenizer = _tokenizer(config.model)
        network = _build(config.model, weights.path)
        self.name = f"open_clip {config.model} ({Path(config.pretrained).name if weights.path else 'untrained'})"
        self.notes = weights.notes
        self.trained = weights.path is not None
        self.input_px = _side(config.model, network)
        self.geometry_dim = self.text_dim = int(open_clip.get_model_config(config.model)["embed_dim"])
        self.micro_batch = config.micro_batch
        self.device = device
        parameters = config.model_dump(mode="json", exclude={"pretrained"})
        self.digest = weights_digest(
            network.state_dict(), {**parameters, "mean": weights.mean, "std": weights.std, "trained": self.trained}
        )
        self._mean, self._std = weights.mean, weights.std
        self._template = config.template
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        network.to(device, self._dtype)
        self._image_vectors = cast(Callable[[Tensor], Tensor], network.encode_image)
        self._text_vectors = cast(Callable[[Tensor], Tensor], network.encode_text)

    def _encode(self, batch: UInt8[Tensor, "b side side 3"]) -> tuple[Tensor, None]:
        return self._image_vectors(normalised(batch, self._mean, self._std).to(self._dtype)), None

    def _encode_text(self, prompts: list[str]) -> Tensor:
        sentences = [self._template.replace("{}", prompt) for prompt in prompts]
        return self._text_vectors(self._tokenizer(sentences).to(self.device))


def find_weights(model: str, pretrained: str) -> Weights:
    """Finds what `encoder.pretrained` asks for, and fetches it from the hub where it is not in the local cache.

    Args:
        model: open_clip's model name.
        pretrained: `none`, one of the model's tags, or a file.

    Raises:
        ConfigError: no such model, no such tag, or a tag of the model's other activation.
        ModelError: no such file, or the hub cannot be reached.
    """
    models = open_clip.list_models()
    if model not in models:
        raise ConfigError(f"encoder.model {model!r} is not one of open_clip's.{nearest(model, models)}")
    tags = {tag: open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)}
    scalings = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in tags.values()}
    # Where a model's tags differ, or there are none, OpenAI's scaling is what open_clip takes as well.
    mean, std = (
        scalings.pop()
        if len(scalings) == 1
        else (tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD))
    )
    if pretrained == "none":
        return Weights(None, mean, std, [f"UNTRAINED encoder: {model} with random weights. Its names mean nothing."])
    if pretrained in tags:
        cfg, quick = tags[pretrained], f"{model}-quickgelu"
        if cfg.get("quick_gelu") and quick in models:
            raise ConfigError(
                f"encoder.pretrained {pretrained!r} was trained with another activation than {model!r} has: "
                f"--set science.encoder.model={quick}"
            )
        return Weights(_fetched(cfg["hf_hub"], cfg), tuple(cfg["mean"]), tuple(cfg["std"]), [])
    path = Path(pretrained).expanduser()
    if not path.is_file():
        if path.suffix in _SUFFIXES or "/" in pretrained:
            raise ModelError(f"encoder.pretrained {pretrained!r}: there is no such file. Give a tag of {model} or a "
                             f"{' or '.join(_SUFFIXES)} file.{nearest(pretrained, tags)}")  # fmt: skip
        raise ConfigError(
            f"encoder.pretrained {pretrained!r} is neither a tag of {model} nor a file nor 'none'."
            f"{nearest(pretrained, tags)}"
        )
    if path.suffix not in _SUFFIXES:
        raise ModelError(f"encoder.pretrained {pretrained!r} must end in {' or '.join(_SUFFIXES)}.")
    note = f"Weights from the file {path.name}: activation and input scaling are {model}'s, which no file confirms."
    return Weights(path, mean, std, [note])


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached at all, within `HUB_TIMEOUT_S` and the time of a name lookup."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except (urllib.error.HTTPError, http.client.HTTPException):
        return True
    except urllib.error.URLError as e:
        # The hub's client may know certificates that Python does not.
        return isinstance(e.reason, ssl.SSLError)
    except OSError:
        return False


def _fetched(address: str, cfg: dict[str, object]) -> Path:
    """The file of a tag: from the hub's local cache without asking the hub, else from the hub."""
    repo, _, name = address.rpartition("/")
    wanted = (name,) if name else _HUB_FILES
    for file in wanted:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    advice = (
        f"On a machine that reaches it run: hf download {repo} {wanted[0]} --local-dir . ; bring the file here and "
        f"give its place: --set science.encoder.pretrained=/path/to/{wanted[0]} (or take encoder.kind standin)."
    )
    if not hub_answers():
        raise ModelError(
            f"the weights {repo} are not in the local cache, and {huggingface_hub.constants.ENDPOINT} cannot be "
            f"reached (or HF_HUB_OFFLINE is set). {advice}"
        )
    try:
        return Path(open_clip.download_pretrained(cfg))
    except (OSError, RuntimeError) as e:
        raise ModelError(f"the weights {repo} could not be fetched: {e}. {advice}") from e


def _tokenizer(model: str) -> "open_clip.tokenizer.SimpleTokenizer | open_clip.tokenizer.HFTokenizer":
    """The model's tokenizer: CLIP's own ships with open_clip, all others come from the hub or its cache."""
    text = open_clip.get_model_config(model)["text_cfg"]
    source = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    # With HF_HUB_OFFLINE the cache is read at once; without it, an unreachable hub is asked again and again.
    if source and not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers():
        raise ModelError(
            f"{model} takes its tokenizer from {source} on the Hugging Face hub, which cannot be reached. Choose a "
            f"model with CLIP's own tokenizer, such as ViT-B-32-quickgelu; or, if {source} is in the local cache, "
            "run with HF_HUB_OFFLINE=1."
        )
    try:
        return open_clip.get_tokenizer(model)
    except (OSError, ValueError, ImportError) as e:
        raise ModelError(f"the tokenizer of {model} could not be loaded from {source}: {e}") from e


def _build(model: str, path: Path | None) -> torch.nn.Module:
    """The model on the CPU in float32; random weights are the same ones always."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return open_clip.create_model(
                model, pretrained=None if path is None else str(path), pretrained_text=False, weights_only=True
            ).eval()
    except _MISFITS as e:
        reason = _shortened(str(e)) or type(e).__name__
        if path is None:
            raise ModelError(f"open_clip cannot build {model}: {reason}") from e
        raise ModelError(
            f"the weights in {str(path)!r} do not fit {model}: {reason}\nGive a plain state dict of this model as "
            "safetensors, or as a torch file that loads with weights_only=True (OpenAI's own .pt files are programs, "
            "which are not run: their weights are on the hub as open_clip_model.safetensors)."
        ) from e


def _shortened(reason: str) -> str:
    """An error of load_state_dict names every key: a line each for those missing, unexpected and of another shape."""
    lines = reason.strip().splitlines()
    shown = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} …" for line in lines[:_MOST_LINES]]
    return "\n".join(shown + ["\t…"] * (len(lines) > _MOST_LINES))


def _side(model: str, network: torch.nn.Module) -> int:
    size = cast(int | tuple[int, int], network.get_submodule("visual").image_size)
    height, width = size if isinstance(size, Sequence) else (size, size)
    if height != width:
        raise ModelError(f"{model} takes pictures of {width}×{height} px; only square inputs are supported.")
    return height
