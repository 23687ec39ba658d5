"""Between committed rows and what a language model is given.

Place in the flow: under the workers of a categorical sweep; knows no Ray.
"""

import platform

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.categorical.count import Kept
from polyray.categorical.mine import Batch, LayerSums, batches
from polyray.cluster.text_plan import TextSweep
from polyray.errors import ModelError
from polyray.models import blocks
from polyray.models.language import LanguageModel, ModelInfo
from polyray.probes.tokens import Packed
from polyray.store import Store
from polyray.text_config import TextScience

REFUSED = "an activation is not finite, or too large to be added up"
"""Reason of neurons in `refused`."""


def model_of(sweep: TextSweep) -> LanguageModel:
    """The model as this node has it.

    Raises:
        ModelError: it is missing, or another one than the driver has.
    """
    model = LanguageModel(sweep.science.model.path)
    if model.checkpoint.digest() != sweep.contents["model"]:
        raise ModelError(f"node {platform.node()!r} has another model at {model.name!r} than the driver.")
    return model


def context_length(science: TextScience, info: ModelInfo) -> int:
    """Tokens of a context."""
    return blocks.context_length("science.model.context", science.model.context, info.context)


def context_rows(packed: Packed, first_document: int) -> pa.Table:
    """Rows of `contexts`; what is padding is left out."""
    lengths = packed.mask.sum(1).numpy()
    there = packed.mask.numpy()
    doc = packed.doc.numpy()[there]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())
    documents = pa.ListArray.from_arrays(offsets, pa.array(doc, type=pa.int32(), mask=doc < 0))
    return columns.table(
        "contexts",
        {
            "first_document": np.full(len(lengths), first_document),
            "context": np.arange(len(lengths)),
            "tokens": columns.ragged(packed.tokens.numpy()[there], lengths, pa.int32()),
            "documents": documents,
        },
    )


def contexts_of(store: Store, length: int) -> Packed:
    """All contexts of the corpus, in order, each filled up to one length."""
    rows = store.read("contexts").sort_by([("first_document", "ascending"), ("context", "ascending")])
    tokens = columns.padded(rows["tokens"], 0, length)
    n_there = pa.compute.list_value_length(rows["tokens"]).to_numpy()
    mask = np.arange(length)[None, :] < n_there[:, None]
    doc = np.full(tokens.shape, -1, dtype=np.int32)
    flat = rows["documents"].combine_chunks().flatten()
    doc[mask] = pa.compute.fill_null(flat, -1).to_numpy()
    return Packed(torch.from_numpy(tokens), torch.from_numpy(doc), torch.from_numpy(mask))


def n_batches(store: Store, science: TextScience) -> int:
    """Forward passes that the corpus takes."""
    return -(-len(store.read("contexts", columns=["context"])) // science.model.micro_batch)


def batch_of(contexts: Packed, kept: Kept, batch: int, micro_batch: int) -> Batch:
    """One batch, filled up with empty contexts."""
    part = slice(batch * micro_batch, (batch + 1) * micro_batch)
    return next(batches(contexts.tokens[part], contexts.mask[part], contexts.counted[part], kept, micro_batch))


def kept_of(store: Store, n_vocab: int) -> Kept:
    """The tokens that get statistics."""
    rows = store.read("tokens").sort_by("token")
    ids, counts = (torch.from_numpy(columns.numbers(rows, c).astype(np.int64)) for c in ("token", "count"))
    row_of = torch.full((n_vocab,), -1, dtype=torch.int64)
    row_of[ids] = torch.arange(len(ids))
    return Kept(ids, counts, row_of)


def sums_of(store: Store, layer: str, unit: str, neurons: NDArray[np.int64]) -> LayerSums:
    """Token statistics of the neurons of a layer that are mined, as a unit left them."""
    width = len(neurons)
    rows = store.read("token_stats", layer, ["sums"], units=[unit])
    # One copy, part by part: those of a large layer take gigabytes.
    sums = torch.empty(len(rows), width, dtype=torch.int64)
    start = 0
    for part in rows["sums"].chunks:
        sums[start : start + len(part)].numpy()[:] = part.flatten().to_numpy().reshape(-1, width)
        start += len(part)
    refused = torch.zeros(width, dtype=torch.bool)
    bad = columns.numbers(store.read("refused", layer, units=[unit]), "neuron")
    refused[torch.from_numpy(np.isin(neurons, bad))] = True
    return LayerSums(sums, refused)
