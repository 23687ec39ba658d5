"""Embed: every patch gets the vector of its own crop, once; what has no vector is a null and a failure."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from psi.samples import FakeProbe, noise_pictures, science
from torch import Tensor

from polyray.config import Science
from polyray.models.encoders import Encoder, crop
from polyray.probes.images import view
from polyray.psi.embed import embed, vocabulary
from polyray.psi.extract import patch_ids

pytestmark = pytest.mark.usefixtures("one_thread")

PX = 16


class FakeEncoder(Encoder):
    """A fake: a patch's vector is its mean colour and its first pixel. A patch whose mean red is above 250 gives NaN,
    one whose mean green is gives a number that float16 cannot hold. Remembers the size of every batch."""

    name = "fake"
    input_px = 6
    geometry_dim = 6
    text_dim = 2
    standardise = False
    micro_batch = 4
    trained = False
    digest = "0" * 64
    device = torch.device("cpu")

    def __init__(self, same_space: bool) -> None:
        self.same_space = same_space
        self.notes = []
        self.batches: list[int] = []

    def _encode(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        self.batches.append(len(batch))
        x = batch.float()
        mean = x.mean((1, 2))
        geometry = torch.cat([mean, x[:, 0, 0]], dim=1)
        geometry[mean[:, 0] > 250] = torch.nan
        geometry[mean[:, 1] > 250] = 1e6
        return geometry, None if self.same_space else torch.stack([mean[:, 2], mean[:, 0] - mean[:, 1]], dim=1)

    def _encode_text(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[len(p), p.count("a") + 1.0] for p in prompts])


def naive_vectors(picture: NDArray[np.uint8], box: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    seen = view(picture, PX, "crop")
    patch = crop(seen, box[None], 6)[0].numpy().astype(np.float32)
    mean = patch.mean((0, 1))
    return [*mean, *patch[0, 0]], [mean[2], mean[0] - mean[1]]


def settings() -> Science:
    return science(subject={"input_px": PX})


def request(seed: int, examples: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ascending patches, their images and their boxes."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, PX - 3, (len(examples), 2))
    box = np.concatenate([low, np.minimum(low + rng.integers(3, 9, low.shape), PX)], axis=1)
    ids = patch_ids(np.array(examples), box, PX)
    order = np.argsort(ids)
    return ids[order], np.array(examples)[order], box[order]


@pytest.mark.parametrize("same_space", [True, False])
def test_every_patch_gets_the_vector_of_its_own_crop(same_space: bool) -> None:
    pictures = noise_pictures(5, 20)
    ids, examples, boxes = request(1, [4, 0, 0, 3, 1, 0, 4, 3, 3, 3])
    probe, encoder = FakeProbe(pictures, ["x"] * 5), FakeEncoder(same_space)
    rows, failed = embed(encoder, probe, settings(), ids)
    assert failed == []
    assert rows["patch_id"].to_pylist() == ids.tolist()
    for row, example, box in zip(rows.to_pylist(), examples, boxes, strict=True):
        geometry, text = naive_vectors(pictures[example], box)
        assert row["geometry"] == pytest.approx(geometry, rel=2e-3)
        assert row["text"] == (None if same_space else pytest.approx(text, rel=2e-3, abs=0.02))
    assert set(probe.n_reads.values()) == {1}, "each image is decoded once"
    assert sorted(probe.n_reads) == [0, 1, 3, 4]
    assert encoder.batches == [4, 4, 4], "ten patches in batches of four, the last one padded"


def test_other_units_of_work_give_the_same_vectors() -> None:
    pictures = noise_pictures(5, 20)
    ids, *_ = request(2, [0, 1, 1, 2, 2, 2, 3, 4, 4])
    probe = FakeProbe(pictures, ["x"] * 5)
    whole, _ = embed(FakeEncoder(False), probe, settings(), ids)
    parts = [embed(FakeEncoder(False), probe, settings(), ids[a:b])[0] for a, b in ((0, 2), (2, 7), (7, 9))]
    assert pa.concat_tables(parts).to_pylist() == whole.to_pylist()


def test_what_has_no_vector_is_a_null_and_a_failure() -> None:
    pictures = noise_pictures(6, 20)
    pictures[2] = np.full((20, 20, 3), (255, 0, 0), dtype=np.uint8)
    pictures[4] = np.full((20, 20, 3), (0, 255, 0), dtype=np.uint8)
    ids, examples, _ = request(3, [0, 1, 1, 2, 3, 3, 4, 5])
    probe = FakeProbe(pictures, ["x"] * 6, unreadable=[1, 5])
    rows, failed = embed(FakeEncoder(False), probe, settings(), ids)
    for row, example in zip(rows.to_pylist(), examples, strict=True):
        missing = example in (1, 2, 4, 5)
        assert (row["geometry"] is None) == (row["text"] is None) == missing
        if not missing:
            assert all(map(math.isfinite, row["geometry"]))
    told = {(item, item_id) for _, item, item_id, _ in failed}
    bad_patches = {("patch", int(i)) for i, e in zip(ids, examples, strict=True) if e in (2, 4)}
    assert told == bad_patches | {("image", 1), ("image", 5)}
    assert len(failed) == 4, "an unreadable image costs one row, however many patches it has"


def test_a_unit_without_a_readable_image() -> None:
    ids, *_ = request(4, [0, 0, 1])
    rows, failed = embed(FakeEncoder(True), FakeProbe(noise_pictures(2, 20), ["x"] * 2, [0, 1]), settings(), ids)
    assert rows["geometry"].null_count == rows["text"].null_count == 3
    assert [f[1:3] for f in failed] == [("image", 0), ("image", 1)]


def test_prompts_are_unit_vectors_in_their_order() -> None:
    prompts = ["banana", "a cat", "fox", "banana", "zebra crossing"]
    rows = vocabulary(FakeEncoder(True), prompts).to_pylist()
    assert [(r["prompt_idx"], r["prompt"]) for r in rows] == list(enumerate(prompts))
    for row in rows:
        raw = np.array([len(row["prompt"]), row["prompt"].count("a") + 1.0])
        assert row["embedding"] == pytest.approx((raw / np.linalg.norm(raw)).tolist(), rel=1e-6)
