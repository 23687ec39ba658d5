"""Index and mine for language models: which documents stand for each neuron?

Place in the flow: as `index` and `mine` of `mine.py`, whose rows these are; what comes after, merge and the pool, is
the same code. An example is a document, so that a neuron has at most one peak in each, and documents of one text count
once. Source: arXiv 2508.16950, section 3.2; the paper sweeps vision networks, documents are ours.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns, schema
from polyray.errors import DataError
from polyray.models.documents import Reader, Response
from polyray.models.layers import LayerInfo
from polyray.probes.reading import Passage, Passages, text_hash
from polyray.psi.mine import Failure, Images, Mined, mined
from polyray.psi.pool import Responses
from polyray.psi_text_config import PsiTextScience

UNLABELLED = "no label, but others have one"


def index(passages: Passages, examples: range) -> tuple[pa.Table, list[Failure]]:
    """Reads a range of documents once: which can be used, how long they are, and which hold the same text.

    Returns:
        Rows of `images`, one a document, and one failure for each that cannot be used. In a corpus with labels a
        document without one cannot be; in one without any, all have the label "".
    """
    labels = passages.corpus.labels
    labelled = any(label is not None for label in labels)
    rows: dict[str, list[object]] = {name: [] for name in schema.TABLES["images"].schema.names}
    failed: list[Failure] = []
    for example, found in passages.read(examples):
        label = labels[example]
        reason = UNLABELLED if labelled and label is None else str(found) if isinstance(found, DataError) else None
        if reason is not None:
            failed.append((None, "document", example, reason))
        usable = found if reason is None and isinstance(found, Passage) else None
        row = {
            "example": example,
            "name": passages.corpus.names[example],
            "label": label or "",
            "status": "ok" if usable else "failed",
            "reason": reason,
            "width_px": len(usable.ids) if usable else None,
            "height_px": 1 if usable else None,
            "pixel_hash": text_hash(usable.text) if usable else None,
        }
        for column, values in rows.items():
            values.append(row.get(column))
    return columns.table("images", rows), failed


def mine(
    reader: Reader,
    passages: Passages,
    science: PsiTextScience,
    images: Images,
    layers: Sequence[LayerInfo],
    neurons: Mapping[str, NDArray[np.int64]],
    examples: range,
) -> Mined:
    """Top documents of a range for every layer, in one pass.

    Args:
        reader: the model under study.
        passages: the corpus.
        science: the sweep's settings.
        images: the distinct usable documents.
        layers: the layers that are swept.
        neurons: the neurons of each layer that are swept.
        examples: the range; repeats and unusable documents in it are passed over.

    Returns:
        Rows of `mine_parts` and `pool_peaks` for each layer. A document on which the model's hidden states are not
        finite is a failure and contributes nothing.
    """
    wanted = images.distinct[(images.distinct >= examples.start) & (images.distinct < examples.stop)]
    failed: list[Failure] = []

    def usable() -> Iterator[tuple[int, Passage]]:
        for document, found in passages.read(wanted.tolist()):
            if isinstance(found, DataError):
                failed.append((None, "document", document, str(found)))
            else:
                yield document, found

    done: list[int] = []
    answers: list[list[Response]] = []
    keep = {info.depth: torch.from_numpy(neurons[info.name]) for info in layers}
    for document, answer in reader.responses(usable(), keep):
        if isinstance(answer, str):
            failed.append((None, "document", document, answer))
        else:
            done.append(document)
            answers.append(answer)
    found = {}
    for i, info in enumerate(layers):
        n = len(neurons[info.name])
        of_layer = [answer[i] for answer in answers]
        response = torch.stack([r for r, _ in of_layer]) if done else torch.zeros(0, n)
        position = torch.stack([p for _, p in of_layer]) if done else torch.zeros(0, n)
        found[info.name] = Responses(np.array(done, dtype=np.int64), response, position.int())
    return mined(found, science, images, layers, neurons, failed)
