"""Thumbnails: each prototype's own crop as a small JPEG; a picture that is gone costs a null and a row."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from psi.samples import FakeProbe, science

from polyray import columns
from polyray.probes.images import view
from polyray.psi.extract import patch_ids
from polyray.psi.thumbnails import with_thumbnails

pytestmark = pytest.mark.usefixtures("one_thread")

PX = 32
BOXES = np.array([[0, 0, 16, 16], [8, 8, 24, 24], [0, 0, 32, 32], [20, 4, 28, 12]])


def smooth_pictures(n: int) -> list[NDArray[np.uint8]]:
    """Pictures of gradients, which a JPEG keeps."""
    y, x = np.mgrid[0:48, 0:40] / 48
    return [
        (255 * np.stack([x * (i + 1) / n, y, 0 * x + i / n], axis=-1)).clip(0, 255).astype(np.uint8) for i in range(n)
    ]


def cluster_rows(prototypes: list[list[int]]) -> pa.Table:
    n = len(prototypes)
    return columns.table(
        "clusters",
        {
            "neuron": np.arange(n),
            "cluster": np.zeros(n, dtype=np.int64),
            "size": [10] * n,
            "name": ["a"] * n,
            "name_score": [0.5] * n,
            "names": [["a", "b"]] * n,
            "label": ["x"] * n,
            "label_frac": [1.0] * n,
            "prototypes": prototypes,
            "thumbnails": [None] * n,
            "snippets": [None] * n,
        },
    )


@pytest.fixture
def asked() -> dict[str, Any]:
    """Clusters whose prototypes are boxes of three pictures, one of them in two clusters."""
    of = [[(2, 0), (0, 1), (2, 2)], [(1, 3), (2, 0)], [(0, 2)]]
    ids = [[int(patch_ids(np.array([e]), BOXES[[b]], PX)[0]) for e, b in row] for row in of]
    return {"of": of, "rows": cluster_rows(ids)}


def naive_thumbnail(picture: NDArray[np.uint8], box: NDArray[np.int64]) -> NDArray[np.float64]:
    seen = Image.fromarray(view(picture, PX, "crop")).crop(tuple(box.tolist()))
    return np.asarray(seen.resize((64, 64), Image.Resampling.BILINEAR)).astype(np.float64)


def test_every_prototype_is_shown_as_its_own_crop(asked: dict[str, Any]) -> None:
    pictures = smooth_pictures(3)
    probe = FakeProbe(pictures, ["x"] * 3)
    found, failed = with_thumbnails(asked["rows"], probe, science(subject={"input_px": PX}))
    assert failed == []
    assert set(probe.n_reads.values()) == {1}, "each image is decoded once"
    assert found.drop_columns(["thumbnails"]).equals(asked["rows"].drop_columns(["thumbnails"]))
    assert found.schema.equals(asked["rows"].schema)
    for listed, of in zip(found["thumbnails"].to_pylist(), asked["of"], strict=True):
        assert len(listed) == len(of)
        for data, (example, box) in zip(listed, of, strict=True):
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
            expected = naive_thumbnail(pictures[example], BOXES[box])
            assert np.abs(np.asarray(image) - expected).mean() < 4
            others = [naive_thumbnail(pictures[e], b) for e in range(3) for b in BOXES]
            distance = [np.abs(np.asarray(image) - o).mean() for o in others]
            assert int(np.argmin(distance)) == 4 * example + box


def test_a_picture_that_is_gone_costs_a_null_and_a_row(asked: dict[str, Any]) -> None:
    probe = FakeProbe(smooth_pictures(3), ["x"] * 3, unreadable=[2])
    found, failed = with_thumbnails(asked["rows"], probe, science(subject={"input_px": PX}))
    assert [f[:3] for f in failed] == [(None, "image", 2)]
    assert failed[0][3].startswith("no thumbnail")
    missing = [[e == 2 for e, _ in row] for row in asked["of"]]
    assert [[data is None for data in row] for row in found["thumbnails"].to_pylist()] == missing
