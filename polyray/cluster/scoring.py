"""Scoring: the units that need no model: cluster, draw, calibrate, summarise, recover.

Which question it answers: *which rows does a scoring unit read, and which does it write?* Place in the flow: as
`work.py`. A scoring worker keeps the pool of the layer that it works on and a block of its neurons' vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.cluster.plan import CLUSTER_NEURONS, EMBED_PATCHES, Sweep, Work, scored_sizes, works
from polyray.cluster.work import EncoderWorker, SubjectWorker, Worker, filed_patches
from polyray.errors import DataError
from polyray.kernels import random
from polyray.overlay import base_of
from polyray.psi import calibrate, cluster, draw, extract, mine, recover, space, summarise, thumbnails
from polyray.records import PartInfo
from polyray.schema import SHARED_LAYER

_GIB = 1024**3


class ScoringWorker(Worker):
    """Holds a layer's pool and the vectors of a block of its neurons: cluster, draw, calibrate, summarise, recover; of
    a variant with another K merge as well."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self._layer: _Layer | None = None
        self._block: _Block | None = None

    def parts(self, work: Work) -> list[PartInfo]:
        match work.stage:
            case "merge":
                return self.write(work, {"mined": self._with_ties(work.of_layer)})
            case "cluster":
                return self._cluster(work)
            case "draw":
                return self._draw(work)
            case "calibrate":
                draws = pa.concat_tables([self.store.read("nulls", name) for name in (work.layer, SHARED_LAYER)])
                n_pool = len(self.layer(work.of_layer).data.pool)
                sizes = scored_sizes(self.store, work.of_layer)
                calibrate.require_draws(draws, self.science.calibrate, sizes, n_pool)
                neurons, null_neurons = calibrate.calibrate(
                    self.store.read("scores", work.layer),
                    self.store.read("mined", work.layer),
                    calibrate.nulls(draws),
                    self.infos[work.of_layer].ranked_by,
                    self.science,
                    n_pool,
                )
                return self.write(work, {"neurons": neurons, "null_neurons": null_neurons})
            case "summarise":
                neurons, null_neurons = self.store.read("neurons"), self.store.read("null_neurons")
                draws = None
                if self.science.calibrate.permute_dims:
                    draws = self.store.read("nulls", columns=["layer", "kind", "n_used", "S"])
                by_layer, summary = summarise.summarise(list(self.infos), neurons, null_neurons, self.science, draws)
                return self.write(work, {"neuron_summary": by_layer, "layer_summary": summary})
            case "recover":
                return self._recover(work)
        raise ValueError(f"a scoring actor cannot do {work.key!r}")

    def _recover(self, work: Work) -> list[PartInfo]:
        read = self.store.read
        vocabulary, classes = read("vocabulary"), read("plant_classes")
        by_layer = {
            name: recover.planted_neurons(
                read("planted", name),
                read("neurons", name),
                read("examples", name),
                read("clusters", name),
                vocabulary,
                classes,
            )
            for name in self.infos
        }
        found = pa.concat_tables(
            [rows.append_column("layer", pa.array([name] * len(rows))) for name, rows in by_layer.items()]
        )
        summary = recover.planted_summary(list(self.infos), found, read("neurons"), self.science)
        return self.write(work, {"planted_neurons": by_layer, "planted_summary": summary})

    def _with_ties(self, layer: str) -> pa.Table:
        """The base's rows of `mined` with the ties counted at this K.

        All else stays: a neuron that was not mined with the base's k_min has no patches that were embedded.
        """
        units = [w.key for w in works("mine", self.sweep.shape, self.store)]
        ranges = (self.store.read("mine_parts", layer, units=[u]) for u in units)
        merged, _ = mine.merge(ranges, self.science, self.infos[layer])
        mined = base_of(self.store).read("mined", layer).drop_columns("layer")
        at = mined.schema.get_field_index("n_tied_at_cut")
        return mined.set_column(at, mined.schema.field(at), merged.sort_by("neuron")["n_tied_at_cut"])

    def layer(self, name: str) -> "_Layer":
        """A layer's pool and space, which is all that draws need; the last one asked for is kept."""
        if self._layer is None or self._layer.name != name:
            self._layer = self._block = None  # let go of the old ones first: two at a time may not fit
            row = next(r for r in self.store.read("layers").to_pylist() if r["layer"] == name)
            pool = self.store.read("pool", name)
            wanted = np.unique(columns.numbers(pool, "patch_id").astype(np.int64))
            if not len(wanted):
                # Random directions need the vectors' dimension all the same.
                first = self.store.read("mined", name).filter(pa.compute.field("status") == "ok").slice(0, 1)
                wanted = _patches(_kept(first, row, self.frame))
            vectors, vocabulary = self._embeddings(name, wanted), self.store.read("vocabulary")
            data = space.space(vectors, wanted, pool, vocabulary, self.images, self.science.encoder.standardise)
            self._layer = _Layer(name, row, data)
        return self._layer

    def block(self, work: Work) -> "_Block":
        """The block of cluster units that a unit lies in; the last one asked for is kept.

        A block is as many consecutive units as `execution.scoring_vectors_gb` has room for, at least one.
        """
        layer = self.layer(work.of_layer)
        n_bytes = sum(v.shape[1] * v.itemsize for v in (layer.data.geometry, layer.data.text) if v is not None)
        unit_bytes = CLUSTER_NEURONS * self.science.mine.K_keep * n_bytes
        # Where no patch of the pool has a vector, how long vectors are is not known.
        known = layer.data.good.any()
        n_units = max(1, int(self.sweep.config.execution.scoring_vectors_gb * _GIB / unit_bytes)) if known else 1
        start = work.items.start // (n_units * CLUSTER_NEURONS) * n_units * CLUSTER_NEURONS
        if self._block is None or (self._block.layer, self._block.start) != (layer.name, start):
            self._block = None  # let go of the old one first: the bound is for one
            neurons = self.sweep.neurons[layer.name][start : start + n_units * CLUSTER_NEURONS]
            mined = self.store.read("mined", layer.name)
            mined = mined.filter(pa.array(np.isin(columns.numbers(mined, "neuron"), neurons)))
            kept = _kept(mined, layer.row, self.frame)
            wanted = _patches(kept)
            data = space.with_vectors(layer.data, self._embeddings(layer.name, wanted), wanted)
            self._block = _Block(layer.name, start, {k.neuron: k for k in kept}, data)
        return self._block

    def _embeddings(self, layer: str, wanted: NDArray[np.int64]) -> Iterator[pa.Table]:
        """Tables of `embeddings` that hold wanted patches: the layer's own and those filed under earlier ones."""
        names = list(self.infos)
        for home in names[: names.index(layer) + 1]:
            filed = filed_patches(self.store, home)
            at = np.flatnonzero(np.isin(filed, wanted, assume_unique=True))
            for start in np.unique(at // EMBED_PATCHES) * EMBED_PATCHES:
                stop = min(int(start) + EMBED_PATCHES, len(filed))
                unit = Work("embed", home, start=int(start), stop=stop)
                yield self.store.read("embeddings", home, units=[unit.key])

    def _examples(self, kept: "Kept", data: space.Space) -> cluster.Examples:
        """What of a neuron's kept examples can be clustered: at most K, only those with a vector."""
        m = self.science.mine
        rows = data.rows(kept.patch)
        usable = np.flatnonzero(data.good[rows])
        return cluster.Examples(
            kept.neuron,
            usable,
            rows[usable],
            self.images.label_of[kept.example[usable]],
            cluster.n_used(len(usable), m.K, m.k_min),
        )

    def _cluster(self, work: Work) -> list[PartInfo]:
        layer, block = self.layer(work.of_layer), self.block(work)
        chosen = self.sweep.neurons[layer.name][work.start : work.stop].tolist()
        kept = {n: block.kept[n] for n in chosen if n in block.kept}
        usable = [self._examples(k, block.data) for k in kept.values()]
        failed: list[mine.Failure] = []
        try:
            result = cluster.cluster_neurons(usable, layer.name, self.science, self.images, block.data)
        except (RuntimeError, ValueError, IndexError) as error:
            _refuse_shortage(error)
            result = self._one_by_one(usable, block, failed)
        clusters, unread = self.pictured(result.clusters, kept)
        failed += unread
        examples = [
            _example_rows(k, result.cluster_of.get(n), layer.row, self.images, self.frame) for n, k in kept.items()
        ]
        tables = {"scores": result.scores, "clusters": clusters, "examples": columns.concat("examples", examples)}
        return self.write(work, tables, failed)

    def pictured(self, clusters: pa.Table, kept: "Mapping[int, Kept]") -> tuple[pa.Table, list[mine.Failure]]:
        """Rows of `clusters` with pictures of their prototypes, where they are asked for."""
        if not self.science.extract.thumbnails or not len(clusters):
            return clusters, []
        return thumbnails.with_thumbnails(clusters, self.probe, self.science)

    def _one_by_one(
        self, usable: Sequence[cluster.Examples], block: "_Block", failed: list[mine.Failure]
    ) -> cluster.Clustered:
        """Scores neurons alone, so that the one that cannot be scored costs only its own row."""
        done = []
        for e in usable:
            try:
                done.append(cluster.cluster_neurons([e], block.layer, self.science, self.images, block.data))
            except (RuntimeError, ValueError, IndexError) as error:
                _refuse_shortage(error)
                reason = f"{type(error).__name__}: {error}"
                failed.append((block.layer, "neuron", e.neuron, reason))
                row = cluster.unscored("real", e.neuron, "failed", reason)
                done.append(cluster.Clustered(row, columns.concat("clusters", []), {}))
        return cluster.Clustered(
            columns.concat("scores", [d.scores for d in done]),
            columns.concat("clusters", [d.clusters for d in done]),
            {neuron: c for d in done for neuron, c in d.cluster_of.items()},
        )

    def _draw(self, work: Work) -> list[PartInfo]:
        if work.kind == "shuffle_text":
            words = columns.padded(self.store.read("vocabulary")["embedding"], 0).astype(np.float64)
            rows = draw.shuffle_text(self.science, torch.from_numpy(words @ words.T))
            return self.write(work, {"nulls": rows})
        if work.layer == SHARED_LAYER:
            # Rotation needs only the dimension, so any layer's first unit of vectors will do.
            rows = draw.rotation_draws(work.n_used or 0, work.items, self.science, self._dim())
            return self.write(work, {"nulls": rows})
        layer = self.layer(work.of_layer)
        word = random.layer_word(layer.name)
        if work.kind in ("pool", "one_concept"):
            rows = draw.draw(work.kind, work.n_used or 0, work.items, word, self.science, layer.data)
            return self.write(work, {"nulls": rows})
        if work.kind == "permute_dims":
            rows = draw.permuted_draws(work.n_used or 0, work.items, word, self.science, layer.data)
            return self.write(work, {"nulls": rows})
        kind = str(work.kind).removeprefix("null_")
        beside_unit = Work("cluster", layer.name, start=work.start, stop=work.stop).key
        scored = self.store.read("scores", layer.name, ["neuron", "status", "n_used"], units=[beside_unit])
        size = {r["neuron"]: r["n_used"] for r in scored.to_pylist() if r["status"] == "ok"}
        clustered = self.store.read("examples", layer.name, ["neuron", "example", "cluster"], units=[beside_unit])
        clustered = clustered.filter(pa.compute.is_valid(clustered["cluster"]))
        of, example = (columns.numbers(clustered, c).astype(np.int64) for c in ("neuron", "example"))
        tables = []
        for n in sorted(set(size.values())):
            neurons = np.array(sorted(neuron for neuron in size if size[neuron] == n), dtype=np.int64)
            labels = self.images.label_of[example[np.isin(of, neurons)]].reshape(len(neurons), n)
            places = np.searchsorted(self.sweep.neurons[layer.name], neurons)
            tables.append(draw.null_neurons(kind, neurons, n, labels, word, self.science, layer.data, places))
        return self.write(work, {"scores": columns.concat("scores", tables)})

    def _dim(self) -> int:
        for unit in works("embed", self.sweep.shape, self.store):
            if unit.layer is not None:
                rows = self.store.read("embeddings", unit.layer, columns=["geometry"], units=[unit.key])
                lengths = pa.compute.max(pa.compute.list_value_length(rows["geometry"])).as_py()
                if lengths:
                    return int(lengths)
        raise DataError("no patch has a vector; see the failures table for what happened to the images.")


@dataclass(frozen=True)
class Kept:
    """The examples that a mined neuron keeps, best first."""

    neuron: int
    example: NDArray[np.int64]
    position: NDArray[np.int64]
    response: NDArray[np.float32]
    patch: NDArray[np.int64]


@dataclass(frozen=True)
class _Layer:
    name: str
    row: Mapping[str, Any]
    """Its row of `layers`."""
    data: space.Space
    """Its pool."""


@dataclass(frozen=True)
class _Block:
    layer: str
    start: int
    """Place of its first neuron among the layer's neurons that are swept."""
    kept: Mapping[int, Kept]
    """By neuron; neurons that could not be mined are missing."""
    data: space.Space
    """The vectors of their patches."""


def _kept(mined: pa.Table, row: Mapping[str, Any], frame: extract.Frame) -> list[Kept]:
    """Kept examples of the neurons that could be mined."""
    mined = mined.filter(pa.compute.equal(mined["status"], "ok"))
    if not len(mined):
        return []
    example, position = (
        mined[c].combine_chunks().flatten().to_numpy().astype(np.int64) for c in ("example", "position")
    )
    response = mined["response"].combine_chunks().flatten().to_numpy()
    patch = frame.patches(row, example, position)
    cuts = np.cumsum(pa.compute.list_value_length(mined["example"]).to_numpy())[:-1]
    split = (np.split(x, cuts) for x in (example, position, response, patch))
    return [Kept(n, *of) for n, *of in zip(mined["neuron"].to_pylist(), *split, strict=True)]


def _patches(kept: Sequence[Kept]) -> NDArray[np.int64]:
    """Patches of these neurons, ascending and distinct."""
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(k.patch for k in kept)]))


def _refuse_shortage(error: Exception) -> None:
    """Raises an error that tells of the machine, not of the neuron: the unit fails, to be done again."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        raise error


def _example_rows(
    kept: Kept, assigned: NDArray[np.int64] | None, layer: Mapping[str, Any], images: mine.Images, frame: extract.Frame
) -> pa.Table:
    n = len(kept.example)
    box = frame.boxes(layer, kept.example, kept.position)
    of = np.full(n, -1, dtype=np.int64)
    if assigned is not None:
        of[: len(assigned)] = assigned
    return columns.table(
        "examples",
        {
            "neuron": [kept.neuron] * n,
            "rank": np.arange(n),
            "example": kept.example,
            "activation": kept.response,
            "position": kept.position,
            **{c: box[:, i] for i, c in enumerate(("x0", "y0", "x1", "y1"))},
            "label": [images.labels[c] for c in images.label_of[kept.example]],
            "patch_id": kept.patch,
            "cluster": pa.array(np.where(of < 0, 0, of), mask=of < 0),
        },
    )


WORKERS: dict[str, type[Worker]] = {"subject": SubjectWorker, "encoder": EncoderWorker, "scoring": ScoringWorker}
"""Who does the units of each kind of actor."""
