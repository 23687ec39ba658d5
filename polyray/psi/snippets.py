"""Window, extract and embed for language models: which part of a document stands for a peak, and where does it lie?

Place in the flow: the counterparts of what `extract.py`, `embed.py` and `thumbnails.py` do for images. The layer's grid
is one row of as many positions as a document has tokens; a box is a snippet, x0 to x1 counted in tokens, y0 0 and y1 1.
A snippet is what the neuron has seen just before its peak (causal models) or around it; its text, not its tokens, goes
to the encoder, and without a mark, which would move all vectors the same way.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polyray import columns
from polyray.errors import ConfigError, DataError
from polyray.models.layers import LayerInfo
from polyray.models.sentence_encoder import SentenceEncoder
from polyray.probes.reading import MAX_TOKENS, Around, Passages
from polyray.psi.embed import embeddings
from polyray.psi.mine import Failure

_LENGTHS = 2**12
"""Room for the length of a snippet in the number of a patch; above the largest `extract.span`."""
MAX_DOCUMENTS = (2**63 - 1) // (MAX_TOKENS * _LENGTHS)
"""Documents that can be numbered beside their snippets: 134 million."""


def patch_ids(example: NDArray[np.int64], box: NDArray[np.int64]) -> NDArray[np.int64]:
    """Identity of a snippet: document, first token and length in one integer.

    Args:
        example: documents.
        box: x0, y0, x1, y1 with at least one token.

    Raises:
        ConfigError: a document, a token or a length does not fit beside the others into 63 bits.
    """
    start, length = box[:, 0], box[:, 2] - box[:, 0]
    for what, values, most in (
        ("document", example, MAX_DOCUMENTS),
        ("token", start, MAX_TOKENS),
        ("length", length - 1, _LENGTHS),
    ):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < most:
            raise ConfigError(f"a snippet's {what} {int(values.max())} cannot be numbered: at most {most - 1:,} fit.")
    return (example.astype(np.int64) * MAX_TOKENS + start) * _LENGTHS + length - 1


def from_patch_ids(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document and box of each snippet: the inverse of `patch_ids`."""
    rest, length = np.divmod(ids, _LENGTHS)
    example, start = np.divmod(rest, MAX_TOKENS)
    zero = np.zeros_like(start)
    return example, np.stack([start, zero, start + length + 1, zero + 1], axis=1)


class SnippetFrame:
    """Boxes of documents, in tokens; an `extract.Frame`.

    Args:
        beside: tokens of a snippet beside its peak.
        n_tokens: of every document, 0 for those that cannot be used.
    """

    def __init__(self, beside: Around, n_tokens: NDArray[np.int64]) -> None:
        self._beside, self._n_tokens = beside, n_tokens

    def boxes(
        self, layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Box of each (document, token), clipped to the document; the same for all layers."""
        start = np.maximum(position - self._beside.before, 0)
        stop = np.minimum(position + self._beside.after + 1, self._n_tokens[example])
        zero = np.zeros_like(start)
        return np.stack([start, zero, stop, zero + 1], axis=1)

    def patches(
        self, layer: Mapping[str, Any], example: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Number of each (document, token)'s snippet."""
        return patch_ids(example, self.boxes(layer, example, position))

    def of_patches(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Document and box of each snippet."""
        return from_patch_ids(ids)


def layer_row(info: LayerInfo, n_neurons: int, beside: Around) -> pa.Table:
    """The layer's row of `layers`: nothing is measured, the snippet is as long as the config says."""
    window = "around" if beside.after else "before"
    return columns.layer_row(info, n_neurons, window, beside.before + 1 + beside.after, swap_side=None, grid_w=None)


def embed(encoder: SentenceEncoder, passages: Passages, ids: NDArray[np.int64]) -> tuple[pa.Table, list[Failure]]:
    """Encodes the texts of snippets, document by document.

    Returns:
        Rows of `embeddings`, and one failure for each document that cannot be read any more and each vector that is
        not finite; those snippets have null vectors.
    """
    examples, boxes = from_patch_ids(ids)
    texts = [""] * len(ids)
    readable = np.ones(len(ids), dtype=bool)
    failed: list[Failure] = []
    for document, found in passages.read(np.unique(examples).tolist()):
        of_document = np.flatnonzero(examples == document)
        if isinstance(found, DataError):
            readable[of_document] = False
            failed.append((None, "document", document, str(found)))
            continue
        for i in of_document.tolist():
            texts[i] = found.snippet(int(boxes[i, 0]), int(boxes[i, 2]))
    geometry = np.zeros((len(ids), encoder.text_dim), dtype=np.float16)
    rows = np.flatnonzero(readable)
    geometry[rows] = encoder.encode([texts[i] for i in rows.tolist()]).numpy()
    table, bad = embeddings(ids, geometry, None, readable)
    return table, failed + bad


def with_snippets(
    clusters: pa.Table, peaks: Mapping[int, Mapping[int, int]], passages: Passages
) -> tuple[pa.Table, list[Failure]]:
    """Fills the `snippets` column of `clusters` rows.

    Args:
        clusters: rows of `clusters`.
        peaks: position of the peak in each of a neuron's patches, by neuron and patch.
        passages: the corpus.

    Returns:
        The rows with the texts of their prototypes, the peak token between « and », and one failure for each document
        that cannot be read any more; its snippets are nulls.
    """
    prototypes = clusters["prototypes"].to_pylist()
    wanted = {
        (patch, peaks[neuron][patch])
        for neuron, row in zip(clusters["neuron"].to_pylist(), prototypes, strict=True)
        for patch in row
    }
    texts: dict[tuple[int, int], str | None] = dict.fromkeys(wanted)
    by_document: dict[int, list[tuple[int, int, int, int]]] = {}
    ordered = sorted(wanted)
    examples, boxes = from_patch_ids(np.array([patch for patch, _ in ordered], dtype=np.int64))
    for (patch, peak), document, box in zip(ordered, examples.tolist(), boxes.tolist(), strict=True):
        by_document.setdefault(document, []).append((patch, peak, box[0], box[2]))
    failed: list[Failure] = []
    for document, found in passages.read(list(by_document)):
        if isinstance(found, DataError):
            failed.append((None, "document", document, f"no snippet: {found}"))
            continue
        for patch, peak, x0, x1 in by_document[document]:
            texts[patch, peak] = found.marked(x0, x1, peak)
    column = [
        [texts[patch, peaks[neuron][patch]] for patch in row]
        for neuron, row in zip(clusters["neuron"].to_pylist(), prototypes, strict=True)
    ]
    at = clusters.schema.get_field_index("snippets")
    field = clusters.schema.field(at)
    return clusters.set_column(at, field, pa.array(column, type=field.type)), failed
