"""Space: the vectors that a layer's neurons, null neurons and draws are scored with.

Place in the flow: under cluster and draw. The pool's vectors are held whole, the neurons' own as many as their block
needs. Source: arXiv 2508.16950, section 3.3; the pool is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyray import columns
from polyray.kernels import cluster
from polyray.psi.mine import Images

GRAM_POOL = 6000
"""Largest pool of which the whole Gram matrix is kept (288 MB); above it a draw computes its own."""


@dataclass(frozen=True)
class Space:
    """Vectors of one layer: those of its pool, or of some of its neurons' patches in the pool's space."""

    ids: NDArray[np.int64]
    """Patches that it holds, ascending."""
    geometry: NDArray[np.float16]
    """Encoder's vectors [P, d]."""
    text: NDArray[np.float16] | None
    """Text-aligned vectors [P, t]; None where they are the geometry vectors."""
    good: NDArray[np.bool_]
    """Whether the patch has a vector."""
    center: NDArray[np.float32]
    """Subtracted from geometry: the pool's mean where the encoder asks for standardising, else 0."""
    scale: NDArray[np.float32]
    """Geometry is divided by it: the pool's standard deviation, else 1."""
    pool: NDArray[np.int64]
    """Rows of the pool's patches that have a vector."""
    pool_label: NDArray[np.int64]
    """Class codes of the pool's images."""
    prompts: list[str]
    vocabulary: Tensor
    """Unit text embeddings [V, t], float32."""

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each patch."""
        return np.searchsorted(self.ids, ids)

    def geometry_of(self, rows: NDArray[np.int64]) -> Tensor:
        """Unit geometry vectors, float32 [*, d]."""
        x = (self.geometry[rows].astype(np.float32) - self.center) / self.scale
        return torch.nn.functional.normalize(torch.from_numpy(x), dim=-1)

    def text_of(self, rows: NDArray[np.int64]) -> Tensor:
        """Unit text-aligned vectors, float32 [*, t]."""
        source = self.geometry if self.text is None else self.text
        return torch.nn.functional.normalize(torch.from_numpy(source[rows].astype(np.float32)), dim=-1)

    @cached_property
    def similarity(self) -> Tensor:
        """Cosines between prompts, float64 [V, V]."""
        v = self.vocabulary.double()
        return v @ v.T

    @cached_property
    def pool_geometry(self) -> Tensor:
        """Unit geometry vectors of the pool, float32 [n_pool, d]."""
        return self.geometry_of(self.pool)

    @cached_property
    def _pool_gram(self) -> Tensor:
        x = self.pool_geometry.double()
        return x @ x.T

    def pool_similarity(self, rows: Tensor) -> Tensor:
        """Inner products of some of the pool's patches with all of them, float64 [n, n_pool]."""
        if len(self.pool) <= GRAM_POOL:
            return self._pool_gram[rows]
        # A product for each row: one for all of them would round differently for other numbers of rows.
        x = self.pool_geometry.double()
        return torch.stack([x @ x[r] for r in rows])

    def gram_of(self, rows: Tensor) -> Tensor:
        """Inner products within sets of the pool's patches [G, n], float64 [G, n, n]."""
        if len(self.pool) <= GRAM_POOL:
            return self._pool_gram[rows[:, :, None], rows[:, None, :]]
        return cluster.gram(self.pool_geometry[rows])

    @cached_property
    def pool_text(self) -> Tensor:
        """Text-aligned vectors of the pool, float32 [n_pool, t]."""
        return self.text_of(self.pool)


def space(
    embeddings: Iterator[pa.Table],
    wanted: NDArray[np.int64],
    pool: pa.Table,
    vocabulary: pa.Table,
    images: Images,
    standardise: bool,
) -> Space:
    """The space of a layer: the vectors of its pool.

    Args:
        embeddings: tables of `embeddings` rows, taken one at a time; what is not wanted is passed over.
        wanted: patches that are needed, ascending and distinct, the pool's among them.
        pool: the layer's rows of `pool`.
        vocabulary: rows of `vocabulary`.
        images: the probe set's labels.
        standardise: centre and scale geometry by the pool's mean and standard deviation. Done per layer, since crops
            of another size have another mean.
    """
    geometry, text, good = _gathered(embeddings, wanted)
    pool_rows = np.searchsorted(wanted, columns.numbers(pool, "patch_id"))
    has_vector = good[pool_rows]
    pool_rows = pool_rows[has_vector]
    pool_label = images.label_of[columns.numbers(pool, "example")[has_vector]]
    d = geometry.shape[1]
    center, scale = np.zeros(d, dtype=np.float32), np.ones(d, dtype=np.float32)
    if standardise and len(pool_rows):
        sample = geometry[pool_rows].astype(np.float64)
        center = sample.mean(0).astype(np.float32)
        deviation = sample.std(0)
        scale = np.where(deviation > 0, deviation, 1.0).astype(np.float32)
    words = torch.from_numpy(columns.padded(vocabulary["embedding"], 0).astype(np.float32))
    return Space(
        wanted, geometry, text, good, center, scale, pool_rows, pool_label, vocabulary["prompt"].to_pylist(), words
    )


def with_vectors(data: Space, embeddings: Iterator[pa.Table], wanted: NDArray[np.int64]) -> Space:
    """The vectors of other patches in a layer's space, without its pool.

    Args:
        data: the layer's space, which says where the centre is and what the prompts are.
        embeddings: tables of `embeddings` rows, taken one at a time; what is not wanted is passed over.
        wanted: patches that are needed, ascending and distinct.
    """
    geometry, text, good = _gathered(embeddings, wanted)
    none = np.zeros(0, dtype=np.int64)
    return replace(data, ids=wanted, geometry=geometry, text=text, good=good, pool=none, pool_label=none)


def _gathered(
    embeddings: Iterator[pa.Table], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.float16], NDArray[np.float16] | None, NDArray[np.bool_]]:
    """`geometry`, `text` and `good` of the wanted patches."""
    geometry: NDArray[np.float16] | None = None
    text: NDArray[np.float16] | None = None
    good = np.zeros(len(wanted), dtype=bool)
    for rows in embeddings:
        ids = columns.numbers(rows, "patch_id")
        rows = rows.filter(pa.array(np.isin(ids, wanted, assume_unique=True)))
        rows = rows.filter(pa.compute.is_valid(rows["geometry"]))
        if not len(rows):
            continue
        at = np.searchsorted(wanted, columns.numbers(rows, "patch_id"))
        g = columns.padded(rows["geometry"], 0)
        geometry = np.zeros((len(wanted), g.shape[1]), dtype=np.float16) if geometry is None else geometry
        geometry[at] = g
        if rows["text"].null_count < len(rows):
            t = columns.padded(rows["text"], 0)
            text = np.zeros((len(wanted), t.shape[1]), dtype=np.float16) if text is None else text
            text[at] = t
            good[at] = (t != 0).any(1) & (g != 0).any(1)
        else:
            good[at] = (g != 0).any(1)
    if geometry is None:
        geometry = np.zeros((len(wanted), 1), dtype=np.float16)
    return geometry, text, good
