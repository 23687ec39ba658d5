"""Thumbnails: pictures of each cluster's prototypes, so that reports need no probe set.

Place in the flow: the last step of cluster; swap makes its own.
"""

import io

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from polyray.config import Science
from polyray.errors import DataError
from polyray.models.encoders import crop
from polyray.probes.images import ProbeSet, view
from polyray.psi.extract import from_patch_ids
from polyray.psi.mine import Failure

SIDE_PX = 64
QUALITY = 80


def with_thumbnails(clusters: pa.Table, probe: ProbeSet, science: Science) -> tuple[pa.Table, list[Failure]]:
    """Fills the `thumbnails` column of `clusters` rows.

    Returns:
        The rows with 64 px JPEGs of their prototypes, and one failure for each image that cannot be read any more;
        its thumbnail is a null.
    """
    prototypes = clusters["prototypes"].to_pylist()
    ids = np.unique(np.array([p for row in prototypes for p in row], dtype=np.int64))
    examples, boxes = from_patch_ids(ids, science.subject.input_px)
    pictures: dict[int, bytes | None] = {}
    failed: list[Failure] = []
    starts = np.flatnonzero(np.diff(examples, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        try:
            seen = view(probe.read(int(examples[start])), science.subject.input_px, science.subject.resize)
        except DataError as e:
            failed.append((None, "image", int(examples[start]), f"no thumbnail: {e}"))
            pictures |= {int(i): None for i in ids[start:stop]}
            continue
        for i, patch in zip(ids[start:stop], crop(seen, boxes[start:stop], SIDE_PX), strict=True):
            pictures[int(i)] = jpeg(patch.numpy())
    kind = clusters.schema.field("thumbnails").type
    column = pa.array([[pictures[p] for p in row] for row in prototypes], type=kind)
    return clusters.set_column(
        clusters.schema.get_field_index("thumbnails"), clusters.schema.field("thumbnails"), column
    ), failed


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """A picture [height, width, 3] as JPEG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="JPEG", quality=QUALITY)
    return out.getvalue()
