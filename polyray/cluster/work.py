"""Work: one unit of work, from committed rows to written parts.

Which question it answers: *what does an actor do with a unit's key?* Place in the flow: between the actors and
`polyray.psi`; knows no Ray, so that a unit can be done by hand. A worker holds one model and is stateless between
calls: what it keeps (open files, the current layer's vectors) is a copy of committed rows. What needs no model is in
`scoring.py`.
"""

import platform
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polyray import columns
from polyray.cluster.plan import CLUSTER_NEURONS, Sweep, Work, works
from polyray.cluster.units import UnitWorker
from polyray.errors import ModelError
from polyray.models.encoders import load_encoder
from polyray.models.layers import LayerInfo
from polyray.models.vision import load_subject
from polyray.models.vocabulary import load_prompts, prompts_digest
from polyray.overlay import base_of
from polyray.probes.images import open_probe
from polyray.psi import effects, embed, extract, hosts, mine, plant, swap
from polyray.records import PartInfo
from polyray.store import Store


class Worker(UnitWorker):
    """Does units of a PSI sweep; subclasses hold a model.

    Args:
        sweep: what the driver resolved.
    """

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep.out, sweep.science.numerics)
        self.sweep = sweep
        self.science = sweep.science
        self.infos = {info.name: info for info in sweep.layers}

    def _require(self, what: str, found: str) -> None:
        """Refuses to work with other weights or prompts than the driver resolved."""
        if found != self.sweep.contents[what]:
            raise ModelError(
                f"node {platform.node()!r} has another {what} than the driver: {found}, not "
                f"{self.sweep.contents[what]}. Results of both would be mixed; install the same on every node."
            )

    def _require_layers(self, found: Iterable[LayerInfo]) -> None:
        """Refuses to work with layers that are not read as the driver's are."""
        own = {info.name: info for info in found}
        if any(own.get(name) != info for name, info in self.infos.items()):
            raise ModelError("this actor's subject has other read-outs than the driver's: are the versions the same?")

    @cached_property
    def frame(self) -> extract.Frame:
        """What of an image stands for a peak."""
        return extract.ImageFrame(self.science.subject.input_px)

    @cached_property
    def probe(self) -> mine.ProbeSet:
        """The probe set, opened when first needed."""
        return open_probe(self.science.probe)

    @cached_property
    def all_images(self) -> mine.Images:
        """Distinct readable images and labels, once `index` has ended."""
        return mine.distinct_images(self.store.read("images"))

    @cached_property
    def images(self) -> mine.Images:
        """Those that are mined: all, or the half on which no planted neuron was fitted."""
        if self.science.plant is None:
            return self.all_images
        # A variant's seed is of its scores: the halves stay those of the sweep that mined them.
        return plant.mined_half(self.all_images, int(base_of(self.store).run["config"]["science"]["seed"]))

    def merge(self, work: Work) -> list[PartInfo]:
        """Top examples of a layer over the whole probe set."""
        units = [w.key for w in works("mine", self.sweep.shape, self.store)]
        ranges = (self.store.read("mine_parts", work.layer, units=[u]) for u in units)
        merged, histograms = mine.merge(ranges, self.science, self.infos[work.of_layer])
        return self.write(work, {"mined": merged, "histograms": histograms})

    def extract(self, work: Work) -> list[PartInfo]:
        """Patches that any layer needs."""
        layers = layer_rows(self.store)
        names = list(self.infos)
        mined_rows = {name: self.store.read("mined", name) for name in names}
        peaks = {name: self.store.read("pool_peaks", name) for name in names}
        patches, pools = extract.extract(layers, mined_rows, peaks, self.images, self.frame)
        return self.write(work, {"patches": patches, "pool": pools})


class SubjectWorker(Worker):
    """Holds the network under study: index, window, mine, merge, extract, swap, effects; features and plant."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.subject = load_subject(self.science.subject, self.science.numerics, self.science.plant)
        self._require_layers(self.subject.readouts.layers(list(self.infos)))
        self._require("subject", self.subject.digest)
        self._installed = False
        self._peaks: tuple[str, NDArray[np.int64], NDArray[np.int64]] | None = None

    def parts(self, work: Work) -> list[PartInfo]:
        match work.stage:
            case "index":
                rows, failed = mine.index(self.probe, work.items)
                return self.write(work, {"images": rows}, failed)
            case "features":
                features, failed = plant.features(self.subject, self.probe, self.science, self.all_images, work.items)
                return self.write(work, {"plant_features": features}, failed)
            case "plant":
                return self._plant(work)
            case "window":
                self._install()
                info = self.infos[work.of_layer]
                n_neurons = len(self.sweep.neurons[work.of_layer])
                row = extract.window(self.subject, self.probe, self.science, self.images, info, n_neurons)
                return [self.store.write_part("layers", work.key, row, None)]
            case "mine":
                self._install()
                examples = work.items
                mined = mine.mine(
                    self.subject, self.probe, self.science, self.images, self.sweep.layers, self.sweep.neurons, examples
                )
                tables = {"mine_parts": mined.parts, "pool_peaks": mined.pool_peaks, "swap_peaks": mined.swap_peaks}
                return self.write(work, dict(tables), mined.failed)
            case "merge":
                return self.merge(work)
            case "swap":
                self._install()
                return self._swap(work)
            case "effects":
                return self._effects(work)
            case "extract":
                return self.extract(work)
        raise ValueError(f"a subject actor cannot do {work.key!r}")

    def _plant(self, work: Work) -> list[PartInfo]:
        images = self.all_images
        encoder = load_encoder(self.science.encoder, self.science.numerics)
        classes = plant.class_rows(encoder, images)
        text = columns.padded(classes["embedding"], 0).astype(np.float64)
        del encoder
        planted = {
            layer: plant.fit(self.store.read("plant_features", layer), layer, self.science, images, text)
            for layer in self.infos
        }
        return self.write(work, {"planted": planted, "plant_classes": classes})

    def _swap(self, work: Work) -> list[PartInfo]:
        layer, swept = work.of_layer, self.sweep.neurons[work.of_layer]
        of_kind = hosts.null_swapped if work.kind == "null" else hosts.swapped
        neurons = of_kind(self.science, layer, swept)[work.start : work.stop]
        examples = clustered_examples(self.store, self.sweep, layer, neurons)
        if self._peaks is None or self._peaks[0] != layer:
            self._peaks = (layer, *swap_peaks(self.store, layer, len(swept)))
        _, image, position = self._peaks
        chosen = [
            swap.Neuron(n, examples[n], hosts.Peaks(image, position[:, np.searchsorted(swept, n)]))
            for n in neurons.tolist()
            if n in examples
        ]
        row = next(r for r in self._layer_rows if r["layer"] == layer)
        rows, failed = swap.swap(self.subject, self._views, self.science, row, chosen, str(work.kind), self._fill)
        return self.write(work, {"swaps": rows}, failed)

    def _effects(self, work: Work) -> list[PartInfo]:
        names = list(self.infos)
        rows = effects.effects(
            names,
            (self.store.read("swaps", name, effects.SWAP_COLUMNS) for name in names),
            {name: hosts.swapped(self.science, name, self.sweep.neurons[name]).tolist() for name in names},
            self.store.read("clusters", columns=["layer", "neuron", "cluster", "size"]),
            self.store.read("neurons", columns=["layer", "neuron", "specific_log_psi", "specific_S_p"]),
            self.science,
        )
        return self.write(work, {"effects": rows})

    @cached_property
    def _layer_rows(self) -> list[dict[str, Any]]:
        return layer_rows(self.store)

    @cached_property
    def _views(self) -> swap.Views:
        return swap.Views(self.probe, self.science)

    @cached_property
    def _fill(self) -> NDArray[np.uint8]:
        return swap.fill_colour(self.store.read("images"), self.images)

    def _install(self) -> None:
        """Gives planted neurons their weights, before the first forward that needs them."""
        if self.science.plant is not None and not self._installed:
            plant.install(self.subject, {layer: self.store.read("planted", layer) for layer in self.infos})
            self._installed = True


class EncoderWorker(Worker):
    """Holds the encoder: embed."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.encoder = load_encoder(self.science.encoder, self.science.numerics)
        self._require("encoder", self.encoder.digest)
        self.prompts = load_prompts(self.science.vocabulary)
        self._require("vocabulary", prompts_digest(self.prompts))
        self._ids: tuple[str, NDArray[np.int64]] | None = None

    def parts(self, work: Work) -> list[PartInfo]:
        if work.kind == "vocabulary":
            tables = {"vocabulary": embed.vocabulary(self.encoder, self.prompts)}
            if self.science.plant is not None and "embed" in self.sweep.steps and "plant" not in self.sweep.steps:
                # A variant with another encoder: what names hit is told in that encoder's space.
                tables["plant_classes"] = plant.class_rows(self.encoder, self.images)
            return self.write(work, dict(tables))
        if self._ids is None or self._ids[0] != work.of_layer:
            self._ids = (work.of_layer, filed_patches(self.store, work.of_layer))
        ids = self._ids[1][work.start : work.stop]
        rows, failed = embed.embed(self.encoder, self.probe, self.science, ids)
        return self.write(work, {"embeddings": rows}, failed)


def layer_rows(store: Store) -> list[dict[str, Any]]:
    """Rows of `layers` in order of depth."""
    return sorted(store.read("layers").to_pylist(), key=lambda r: r["depth"])


def clustered_examples(store: Store, sweep: Sweep, layer: str, neurons: NDArray[np.int64]) -> dict[int, hosts.Examples]:
    """Clustered examples of those of a layer's neurons that were scored."""
    places = np.unique(np.searchsorted(sweep.neurons[layer], neurons) // CLUSTER_NEURONS) * CLUSTER_NEURONS
    last = len(sweep.neurons[layer])
    units = [Work("cluster", layer, start=a, stop=min(a + CLUSTER_NEURONS, last)).key for a in places.tolist()]
    wanted = ["neuron", "rank", "example", "position", "cluster", "activation"]
    rows = store.read("examples", layer, wanted, units=units)
    rows = rows.filter(pa.compute.is_valid(rows["cluster"])).sort_by([("neuron", "ascending"), ("rank", "ascending")])
    of = columns.numbers(rows, "neuron")
    example, position, cluster = (columns.numbers(rows, c).astype(np.int64) for c in wanted[2:5])
    activation = columns.floats(rows, "activation")
    return {
        n: hosts.Examples(example[of == n], position[of == n], cluster[of == n], activation[of == n])
        for n in neurons.tolist()
        if (of == n).any()
    }


def swap_peaks(store: Store, layer: str, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Images from which random patches are drawn, ascending, and where the swept neurons peak in them [R, width]."""
    rows = store.read("swap_peaks", layer).sort_by("example")
    flat = pa.compute.fill_null(rows["position"].combine_chunks().flatten(), hosts.NONE)
    return columns.numbers(rows, "example").astype(np.int64), flat.to_numpy().astype(np.int64).reshape(-1, width)


def filed_patches(store: Store, layer: str) -> NDArray[np.int64]:
    """Patches filed under a layer, ascending: what the ranges of embed's units count."""
    return columns.numbers(store.read("patches", layer, columns=["patch_id"]), "patch_id").astype(np.int64)
