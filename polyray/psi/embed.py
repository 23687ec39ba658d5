"""Embed: what does each patch look like to an encoder that is not the subject?

Source: arXiv 2508.16950, section 3.3. The encoder's raw vectors are stored; whoever clusters normalises them.
"""

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import Science
from polyray.errors import DataError
from polyray.models.encoders import Encoder, PromptEncoder, crop
from polyray.probes.images import ProbeSet, view
from polyray.psi.extract import from_patch_ids
from polyray.psi.mine import Failure


def embed(
    encoder: Encoder, probe: ProbeSet, science: Science, ids: NDArray[np.int64]
) -> tuple[pa.Table, list[Failure]]:
    """Encodes patches, ordered by image so that each image is decoded once.

    Args:
        encoder: geometry and text-aligned vectors.
        probe: the probe set.
        science: the sweep's settings.
        ids: patches, ascending.

    Returns:
        Rows of `embeddings`, and one failure for each image that cannot be read any more and each vector that is
        not finite; those patches have null vectors.
    """
    input_px = science.subject.input_px
    examples, boxes = from_patch_ids(ids, input_px)
    readable = np.ones(len(ids), dtype=bool)
    patches = torch.zeros(len(ids), encoder.input_px, encoder.input_px, 3, dtype=torch.uint8)
    failed: list[Failure] = []
    starts = np.flatnonzero(np.diff(examples, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        example = int(examples[start])
        try:
            seen = view(probe.read(example), input_px, science.subject.resize)
        except DataError as e:
            readable[start:stop] = False
            failed.append((None, "image", example, str(e)))
            continue
        patches[start:stop] = crop(seen, boxes[start:stop], encoder.input_px)

    geometry = np.zeros((len(ids), encoder.geometry_dim), dtype=np.float16)
    text = None if encoder.same_space else np.zeros((len(ids), encoder.text_dim), dtype=np.float16)
    for first in range(0, len(ids), encoder.micro_batch):
        batch = slice(first, min(first + encoder.micro_batch, len(ids)))
        vectors, aligned = encoder.encode(patches[batch])
        geometry[batch] = vectors.numpy()
        if text is not None and aligned is not None:
            text[batch] = aligned.numpy()
    rows, bad = embeddings(ids, geometry, text, readable)
    return rows, failed + bad


def embeddings(
    ids: NDArray[np.int64], geometry: NDArray[np.float16], text: NDArray[np.float16] | None, readable: NDArray[np.bool_]
) -> tuple[pa.Table, list[Failure]]:
    """Rows of `embeddings`, and a failure for each readable patch whose vector is not finite."""
    finite = np.isfinite(geometry).all(1) & (True if text is None else np.isfinite(text).all(1))
    failed: list[Failure] = [
        (None, "patch", int(i), "the encoder's vector is not finite") for i in ids[readable & ~finite]
    ]
    good = readable & finite
    rows = columns.table(
        "embeddings",
        {
            "patch_id": ids,
            "geometry": _vectors(geometry, good),
            "text": pa.nulls(len(ids), pa.list_(pa.float16())) if text is None else _vectors(text, good),
        },
    )
    return rows, failed


def _vectors(matrix: NDArray[np.float16], good: NDArray[np.bool_]) -> pa.ListArray:
    lengths = np.where(good, matrix.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix[good].ravel()), mask=pa.array(~good))


def vocabulary(encoder: PromptEncoder, prompts: list[str]) -> pa.Table:
    """Rows of `vocabulary`: every prompt with its unit text embedding."""
    vectors = encoder.encode_prompts(prompts).numpy()
    return columns.table(
        "vocabulary",
        {
            "prompt_idx": np.arange(len(prompts)),
            "prompt": prompts,
            "embedding": columns.lists(vectors, pa.float32()),
        },
    )
