"""Which question it answers: *which core-tokens have others published for these neurons?*

Place in the flow: in place of mine, for GPT-2 XL. OpenAI has published, for each of its MLP neurons, the tokens of
highest average activation over internet text, one file a neuron: `<folder>/<layer>/<neuron>.json` with the fields
`tokens` and `average_activations`, highest first.

They are no exact oracle for what polyray mines: besides another corpus, they were made with another GELU than the one
in transformers' GPT-2, from which activations differ by up to about 0.17.

Source: Bills et al. 2023, "Language models can explain neurons in language models" (the data set "Tokens with high
average activations").
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from polyray.categorical.mine import N_CORE, CoreTokens
from polyray.errors import DataError
from polyray.probes.tokens import Tokenizer


class Published(NamedTuple):
    """What a folder says of the neurons of one layer."""

    core_tokens: CoreTokens
    """`n_tied_at_cut` is 0: the files do not say what was left out."""
    n_unknown: Int64[Tensor, " N"]
    """Tokens of a file that are left out: their text is no token with statistics, or that of several."""
    missing: list[int]
    """Neurons without a file."""
    failures: dict[int, str]
    """Neurons whose file cannot be used, and why."""


def read_published(
    folder: Path,
    layer: int,
    neurons: Sequence[int],
    ids: Int64[Tensor, " T"],
    tokenizer: Tokenizer,
    n_core: int = N_CORE,
) -> Published:
    """Core-tokens of neurons of a layer from published files.

    Args:
        folder: with one folder a layer.
        layer: the layer's index.
        neurons: which; rows of what is returned are in this order.
        ids: token ids that core-tokens may be, ascending (as `Kept.ids`).
        tokenizer: of the model; a file gives tokens as text.
        n_core: C; of longer lists the first.

    Without a folder for the layer none of its neurons has a file.
    """
    place = folder / str(layer)
    row_of: dict[str, int | None] = {}
    for row, token in enumerate(ids.tolist()):
        text = tokenizer.text(token)
        if text is not None:
            row_of[text] = None if text in row_of else row
    n_neurons = len(neurons)
    core = torch.full((n_neurons, n_core), -1, dtype=torch.int64)
    mean = torch.full((n_neurons, n_core), torch.nan, dtype=torch.float64)
    n_unknown = torch.zeros(n_neurons, dtype=torch.int64)
    missing: list[int] = []
    failures: dict[int, str] = {}
    for i, neuron in enumerate(neurons):
        try:
            listed = _read(place / f"{neuron}.json")
        except FileNotFoundError:
            missing.append(neuron)
            continue
        except DataError as e:
            failures[neuron] = str(e)
            continue
        rows = [(row_of.get(text), value) for text, value in listed]
        found = {row: value for row, value in rows if row is not None}
        n_unknown[i] = len(listed) - len(found)
        kept = list(found.items())[:n_core]
        core[i, : len(kept)] = torch.tensor([row for row, _ in kept], dtype=torch.int64)
        mean[i, : len(kept)] = torch.tensor([value for _, value in kept], dtype=torch.float64)
    return Published(CoreTokens(core, mean, torch.zeros(n_neurons, dtype=torch.int64)), n_unknown, missing, failures)


def published_digest(folder: Path, neurons: Mapping[int, Sequence[int]]) -> str:
    """64 hexadecimal digits of SHA-256 over the files of some neurons by layer, and which of them there are.

    Raises:
        DataError: the folder holds a file of none of them.
    """
    digest = hashlib.sha256()
    n_found = 0
    for layer, indices in neurons.items():
        for neuron in indices:
            try:
                data = (folder / str(layer) / f"{neuron}.json").read_bytes()
            except OSError:
                continue  # the neuron has its row that says so
            n_found += 1
            digest.update(f"{layer}/{neuron}".encode() + hashlib.sha256(data).digest())
    if n_found == 0:
        raise DataError(
            f"{str(folder)!r} holds a file of none of the neurons that are asked for: expected <layer>/<neuron>.json, "
            "such as 1/42.json."
        )
    return digest.hexdigest()


def _read(path: Path) -> list[tuple[str, float]]:
    """Tokens and their means, highest first."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        tokens, values = said["tokens"], said["average_activations"]
        listed = [(text, float(value)) for text, value in zip(tokens, values, strict=True)]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"file damaged: {type(e).__name__}") from e
    if not all(isinstance(text, str) and math.isfinite(value) for text, value in listed):
        raise DataError("file damaged: a token is no text, or an activation not finite")
    return sorted(listed, key=lambda entry: -entry[1])
