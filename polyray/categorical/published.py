"""Which question it answers: *which core-tokens have others published for these neurons?*

Place in the flow: in place of mine, for GPT-2 XL. OpenAI has published, for each of its MLP neurons, the tokens of
highest average activation over internet text, one file a neuron: `<folder>/<layer>/<neuron>.json` with the fields
`tokens` and `average_activations`, highest first.

They are no exact oracle for what polyray mines: besides another corpus, they were made with another GELU than the one
in transformers' GPT-2, from which activations differ by up to about 0.17.

Source: Bills et al. 2023, "Language models can explain neurons in language models" (the data set "Tokens with high
average activations").
"""

import json
import math
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
    failures: dict[int, str]
    """Neurons without a file that can be used, and why."""


def read_published(
    folder: Path, layer: int, n_neurons: int, ids: Int64[Tensor, " T"], tokenizer: Tokenizer, n_core: int = N_CORE
) -> Published:
    """Core-tokens of a layer from published files.

    Args:
        folder: with one folder a layer.
        layer: the layer's index.
        n_neurons: N.
        ids: token ids that core-tokens may be, ascending (as `Kept.ids`).
        tokenizer: of the model; a file gives tokens as text.
        n_core: C; of longer lists the first.

    Raises:
        DataError: there is no folder for this layer.
    """
    place = folder / str(layer)
    if not place.is_dir():
        raise DataError(
            f"no neuron files for layer {layer}: {str(place)!r} is no folder. Place <layer>/<neuron>.json there."
        )
    row_of: dict[str, int | None] = {}
    for row, token in enumerate(ids.tolist()):
        text = tokenizer.text(token)
        if text is not None:
            row_of[text] = None if text in row_of else row
    core = torch.full((n_neurons, n_core), -1, dtype=torch.int64)
    mean = torch.full((n_neurons, n_core), torch.nan, dtype=torch.float64)
    n_unknown = torch.zeros(n_neurons, dtype=torch.int64)
    failures: dict[int, str] = {}
    for neuron in range(n_neurons):
        try:
            listed = _read(place / f"{neuron}.json")
        except DataError as e:
            failures[neuron] = str(e)
            continue
        rows = [(row_of.get(text), value) for text, value in listed]
        found = {row: value for row, value in rows if row is not None}
        n_unknown[neuron] = len(listed) - len(found)
        kept = list(found.items())[:n_core]
        core[neuron, : len(kept)] = torch.tensor([row for row, _ in kept], dtype=torch.int64)
        mean[neuron, : len(kept)] = torch.tensor([value for _, value in kept], dtype=torch.float64)
    return Published(CoreTokens(core, mean, torch.zeros(n_neurons, dtype=torch.int64)), n_unknown, failures)


def _read(path: Path) -> list[tuple[str, float]]:
    """Tokens and their means, highest first."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        tokens, values = said["tokens"], said["average_activations"]
        listed = [(text, float(value)) for text, value in zip(tokens, values, strict=True)]
    except FileNotFoundError as e:
        raise DataError("no file") from e
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"file damaged: {type(e).__name__}") from e
    if not all(isinstance(text, str) and math.isfinite(value) for text, value in listed):
        raise DataError("file damaged: a token is no text, or an activation not finite")
    return sorted(listed, key=lambda entry: -entry[1])
