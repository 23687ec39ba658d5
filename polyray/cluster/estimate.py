"""Estimate: what will a sweep cost, before it is run?

Place in the flow: `polyray plan`. Neurons, units, memory and disk follow from the config; times are measured on this
machine on one micro-batch of each model and scaled, so they are an order of magnitude, not a promise.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from polyray.cluster import plan
from polyray.config import Config, Execution, NumericsConfig, Science, TinyImageNet
from polyray.errors import DataError, ModelError
from polyray.kernels import random
from polyray.models.encoders import Encoder, load_encoder
from polyray.models.layers import LayerInfo
from polyray.models.vision import Subject, load_subject
from polyray.models.vocabulary import load_prompts
from polyray.probes.images import open_probe
from polyray.psi import cluster, space
from polyray.schema import NULL_KINDS, SWAP_SHOWN
from polyray.selection import neurons_swept

_TINY_IMAGENET = {"val": 10_000, "train": 100_000}
_GIB = 1024**3


@dataclass
class Estimate:
    """What `polyray plan` says."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    """name, neurons, width, grid, layout, ranked_by of each layer."""
    n_neurons: int = 0
    n_images: int = 0
    items: str = "images"
    """What they are."""
    units: dict[str, int] = field(default_factory=dict)
    """Units by stage; those of embed at most, those of draw where every neuron has K examples, those of mine over
    documents where all are as long as the first ones are on average."""
    device_hours: dict[str, float] = field(default_factory=dict)
    """Hours by stage on one actor of this machine's device."""
    memory_gb: dict[str, float] = field(default_factory=dict)
    """GiB by kind of actor, without about 0.7 GiB for the libraries."""
    disk_gb: dict[str, float] = field(default_factory=dict)
    """GiB by table before compression, at most."""
    problems: list[str] = field(default_factory=list)
    """What stands in the way of `polyray run`."""
    notes: list[str] = field(default_factory=list)


def estimate(config: Config) -> Estimate:
    """Plans a sweep without running it; what cannot be reached here is a problem, not an end.

    Raises:
        ConfigError: layers, neurons or prompts that do not exist.
        ModelError: a model that cannot even be built without its weights.
    """
    e = Estimate()
    science = config.science
    torch.set_num_threads(science.numerics.threads)
    n_prompts = len(load_prompts(science.vocabulary))
    e.n_images = _n_images(config, e)
    subject = _subject(config, e)
    infos = tuple(subject.readouts.layers(subject.selection))
    chosen = neurons_swept(science.subject.neurons, {info.name: info.width for info in infos}, "subject.neurons")
    n_neurons = {name: len(neurons) for name, neurons in chosen.items()}
    e.layers = [layer_line(info, n_neurons[info.name]) for info in infos if info.name in n_neurons]
    e.n_neurons = sum(n_neurons.values())
    encoder = _encoder(config, e)
    shape = plan.Shape(science, e.n_images, n_neurons)
    n_pool = min(science.embed.n_pool, e.n_images)
    n_keep = min(science.mine.K_keep, e.n_images)
    n_patches = {x: min(n * n_keep + n_pool, e.n_images * _positions(infos, x)) for x, n in n_neurons.items()}
    _count_units(e, shape, n_patches)
    _size(e, config, shape, n_patches, subject, encoder, n_prompts)
    _time(e, config, shape, n_patches, subject, encoder)
    return e


def _here(numerics: NumericsConfig) -> NumericsConfig:
    """The device asked for where this machine has it, so that times are the device's; the CPU elsewhere."""
    return numerics if torch.cuda.is_available() else numerics.model_copy(update={"device": "cpu"})


def lacking(execution: Execution, memory_gb: Mapping[str, float]) -> list[str]:
    """What a config declares for actors that need more, as problems for people."""
    declared = {kind: getattr(execution, kind).memory_gb for kind in memory_gb}
    return [
        f"execution.{kind}.memory_gb is {declared[kind]:g}, but about {needed:.1f} GiB are needed; raise it."
        for kind, needed in memory_gb.items()
        if declared[kind] is not None and needed > declared[kind]
    ]


def layer_line(info: LayerInfo, n: int) -> dict[str, Any]:
    """What `plan` says of a layer of which n neurons are swept."""
    return {
        "layer": info.name,
        "neurons": n,
        "width": info.width,
        "grid": f"{info.grid_h}×{info.grid_w}",
        "layout": info.layout,
        "activation": info.activation,
        "ranked_by": info.ranked_by,
        "receptive_px": info.receptive_px,
    }


def _positions(infos: tuple[LayerInfo, ...], name: str) -> int:
    return next(info.grid_h * info.grid_w for info in infos if info.name == name)


def _n_images(config: Config, e: Estimate) -> int:
    try:
        return len(open_probe(config.science.probe))
    except DataError as error:
        e.problems.append(f"probe set: {error}")
        probe = config.science.probe
        if isinstance(probe, TinyImageNet):
            return min(probe.limit or 10**9, _TINY_IMAGENET[probe.split])
        return 0


def _subject(config: Config, e: Estimate) -> Subject:
    science = config.science
    try:
        return load_subject(science.subject, _here(science.numerics), science.plant)
    except ModelError as error:
        if science.subject.weights == "none":
            raise
        e.problems.append(f"subject: {error}")
        without = science.subject.model_copy(update={"weights": "none"})
        return load_subject(without, _here(science.numerics), science.plant)


def _encoder(config: Config, e: Estimate) -> Encoder | None:
    science = config.science
    try:
        return load_encoder(science.encoder, _here(science.numerics))
    except ModelError as error:
        e.problems.append(f"encoder: {error}")
    if science.encoder.kind != "open_clip":
        return None
    return load_encoder(science.encoder.model_copy(update={"pretrained": "none"}), _here(science.numerics))


def _count_units(e: Estimate, shape: plan.Shape, n_patches: Mapping[str, int]) -> None:
    sizes = {x: cluster.sizes(shape.science.mine.K, shape.science.mine.k_min)[:1] for x in shape.n_neurons}
    at_most = {"embed": plan.embed_works(n_patches), "draw": plan.draw_works(shape, sizes)}
    for stage in plan.stages(shape.science):
        # `works` reads what earlier stages committed for embed and draw alone.
        e.units[stage] = len(at_most[stage] if stage in at_most else plan.fixed_works(stage, shape))


def _size(
    e: Estimate,
    config: Config,
    shape: plan.Shape,
    n_patches: Mapping[str, int],
    subject: Subject,
    encoder: Encoder | None,
    n_prompts: int,
) -> None:
    science = config.science
    n_pool = min(science.embed.n_pool, e.n_images)
    n_keep = min(science.mine.K_keep, e.n_images)
    dim = 0 if encoder is None else encoder.geometry_dim + (0 if encoder.same_space else encoder.text_dim)
    band = science.mine.band is not None
    per_range = plan.MINE_IMAGES if band else min(science.mine.K_keep, plan.MINE_IMAGES)
    n_ranges = e.units["mine"]
    e.disk_gb = {
        "mine_parts": e.n_neurons * n_ranges * (12 * per_range + 400) / _GIB,
        "mined and examples": e.n_neurons * n_keep * 70 / _GIB,
        "embeddings": sum(n_patches.values()) * dim * 2 / _GIB,
        "clusters": e.n_neurons * 3 * (cluster.N_PROTOTYPES * 1800 + 300) / _GIB,
        "swaps": sum(len(w.items) for w in plan.swap_works(shape)) * _bytes_of_swaps(science) / _GIB,
        "all others": e.n_neurons * 4 * 600 / _GIB + len(e.layers) * 2 * science.calibrate.B * 100 / _GIB,
    }
    batch = science.subject.micro_batch
    weights = sum(p.numel() * p.element_size() for p in subject.module.parameters())
    pixels = batch * 3 * science.subject.input_px**2 * 4
    unit = plan.CLUSTER_NEURONS * n_keep * dim * 2
    block = max(config.execution.scoring_vectors_gb * _GIB, unit)
    vectors = min(block, max(n_patches.values(), default=0) * dim * 2)
    if unit > config.execution.scoring_vectors_gb * _GIB:
        e.notes.append(
            f"execution.scoring_vectors_gb is {config.execution.scoring_vectors_gb:g}, but the vectors of one unit of "
            f"{plan.CLUSTER_NEURONS} neurons are {unit / _GIB:.2g} GiB and are held in any case; lower mine.K_keep"
        )
    merging = 24 * e.n_images * max(shape.n_neurons.values(), default=0) if band else 0
    if band:
        e.notes.append(
            f"mine.band keeps every response: mine_parts takes up to {e.disk_gb['mine_parts']:.2g} GiB, and merging a "
            f"layer {merging / _GIB:.2g} GiB of memory; choose layers or neurons where that is too much"
        )
    # Decoded images that are kept, and the pictures of a unit.
    swapping = 0 if science.swap is None else 0.25 * _GIB + 2 * plan.SWAP_IMAGES * 3 * science.subject.input_px**2
    e.memory_gb = {
        "subject": (weights + max(60 * pixels + plan.MINE_IMAGES * e.n_neurons * 8, merging) + swapping) / _GIB,
        "encoder": (0 if encoder is None else encoder_bytes(encoder)) / _GIB,
        "scoring": (vectors + n_pool * dim * 10 + 8 * n_pool**2 + 8 * n_prompts**2 + 0.4 * _GIB) / _GIB,
    }
    e.problems += lacking(config.execution, e.memory_gb)


def _bytes_of_swaps(science: Science) -> int:
    """Rows of one neuron, and pictures for one host of each of about four clusters."""
    return 8 * (130 * _n_hosts(science) + (4 * 1800 if science.extract.thumbnails else 0))


def _n_hosts(science: Science) -> int:
    return 0 if science.swap is None else science.swap.n_hosts


def encoder_bytes(encoder: Encoder) -> float:
    """Memory of an encoder's parameters and of one micro-batch's activations, roughly."""
    modules = [m for m in vars(encoder).values() if isinstance(m, torch.nn.Module)]
    weights = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    return weights + 60.0 * encoder.micro_batch * 3 * encoder.input_px**2 * 4


def _time(
    e: Estimate,
    config: Config,
    shape: plan.Shape,
    n_patches: Mapping[str, int],
    subject: Subject,
    encoder: Encoder | None,
) -> None:
    science = config.science
    rng = np.random.Generator(np.random.Philox(0))
    batch = science.subject.micro_batch
    px = science.subject.input_px
    views = rng.integers(0, 256, (batch, px, px, 3), dtype=np.uint8)
    names = [layer["layer"] for layer in e.layers]
    e.device_hours["mine"] = (
        seconds_of(lambda: subject.responses(torch.from_numpy(views), names)) / batch * e.n_images / 3600
    )
    if encoder is not None:
        side, n = encoder.input_px, encoder.micro_batch
        patches = torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
        per_patch = seconds_of(lambda: encoder.encode(patches)) / n
        e.device_hours["embed"] = per_patch * sum(n_patches.values()) / 3600
    # At most: the forward of a swap ends at its own layer.
    n_shown = sum(len(w.items) * len(SWAP_SHOWN[str(w.kind)]) for w in plan.swap_works(shape)) * _n_hosts(science)
    if n_shown:
        e.device_hours["swap"] = e.device_hours["mine"] / max(e.n_images, 1) * n_shown
    per_set = seconds_per_set(config)
    n_real = sum(shape.n_neurons.values())
    e.device_hours["cluster"] = per_set * n_real / 3600
    n_draws = science.calibrate.B * ((2 + science.calibrate.permute_dims) * len(shape.n_neurons) + 1)
    e.device_hours["draw"] = per_set * (n_draws + len(NULL_KINDS) * n_real) / 3600


def seconds_per_set(config: Config) -> float:
    """Time of scoring one set of K examples, measured on random vectors with 200 labels."""
    science = config.science
    n, t = science.mine.K, 384
    items = torch.arange(cluster.CHUNK)
    vectors = random.directions(0, random.DRAW_ROTATION, items, n, 512)
    text = random.directions(0, random.NULL_ROTATION_TEXT, items, n, t)
    words = random.directions(0, random.DRAW_TEXT, items[:1], 1600, t)[0]
    labels = (random.uniform(0, random.POOL_NEURON, items[:, None], torch.arange(n)[None, :]) * 200).long()
    none = np.zeros(0, dtype=np.int64)
    half = np.zeros((0, 1), dtype=np.float16)
    flat = np.zeros(1, dtype=np.float32)
    data = space.Space(none, half, None, none.astype(bool), flat, flat, none, none, [], words)
    gram = (vectors @ vectors.transpose(1, 2)).double()
    run = lambda: cluster.score(gram, text, labels, items, 0, random.KMEANS_REAL, science, data)  # noqa: E731
    return seconds_of(run) / len(items)


def seconds_of(call: Any) -> float:
    """Seconds of the second of two calls, so that what is made on first use is not counted."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
