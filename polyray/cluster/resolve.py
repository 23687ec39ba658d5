"""Resolve: from a config to a sweep, before anything is written.

Which question it answers: *does everything that the config names exist, and what does it hold?* Place in the flow:
first step of `run` and `plan`. Whatever is wrong with a config, a model, a prompt file or a probe set comes out here.
"""

import gc
import hashlib
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from polyray import __version__
from polyray.cluster.plan import Resolved, Sweep, stages
from polyray.config import Config, NumericsConfig, StandIn, identity
from polyray.errors import ConfigError, DataError
from polyray.models.encoders import load_encoder
from polyray.models.vision import load_subject
from polyray.models.vocabulary import load_prompts, prompts_digest
from polyray.probes.images import open_probe
from polyray.psi.draw import n_anchors
from polyray.psi.effects import MIN_HOSTS
from polyray.psi.extract import max_examples
from polyray.schema import VERSION
from polyray.selection import neurons_swept

_PACKAGES = ("ray", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "numpy", "pyarrow", "pillow")


def resolve(config: Config, out: str) -> Resolved:
    """Loads and checks everything once, and lets go of it again.

    Raises:
        ConfigError, DataError, ModelError: something does not exist or does not fit; nothing has been written.
    """
    science = config.science
    require_device(science.numerics, config.execution.address)
    # Names, shapes and digests need no GPU, and the driver's machine may have none.
    here = science.numerics.model_copy(update={"device": "cpu"})
    prompts = load_prompts(science.vocabulary)
    probe = open_probe(science.probe)
    if len(probe) < science.mine.k_min:
        raise DataError(
            f"the probe set has {len(probe)} images; a neuron needs at least mine.k_min = {science.mine.k_min} "
            "examples."
        )
    if len(probe) > max_examples(science.subject.input_px):
        raise ConfigError(
            f"{len(probe)} images at subject.input_px {science.subject.input_px} are too many to number patches; "
            f"at most {max_examples(science.subject.input_px)} fit."
        )
    subject = load_subject(science.subject, here, science.plant)
    found = tuple(subject.readouts.layers(subject.selection))
    neurons = neurons_swept(science.subject.neurons, {info.name: info.width for info in found}, "subject.neurons")
    layers = tuple(info for info in found if info.name in neurons)
    notes = list(subject.notes)
    subject_digest, trained = subject.digest, subject.trained
    subject_name = science.subject.name or science.subject.factory
    del subject
    gc.collect()
    encoder = load_encoder(science.encoder, here)
    notes += encoder.notes
    encoder_digest = encoder.digest
    encoder_trained = encoder.trained
    del encoder
    gc.collect()
    if isinstance(science.encoder, StandIn) and trained and "efficientnet_lite0" in str(science.subject.name):
        notes.append("circular: the stand-in encoder and the subject are the same network, which judges itself")
    mined = mined_labels(config, probe.labels)
    if len(mined) < science.mine.K:
        notes.append(f"{len(mined)} images are mined, fewer than K = {science.mine.K}")
    if len(mined) < science.embed.n_pool:
        notes.append(f"the pool is all that is mined: {len(mined)} images, fewer than n_pool = {science.embed.n_pool}")
    notes += pool_notes(config, mined)
    notes += swap_notes(config)
    notes += floor_note(config, sum(len(n) for n in neurons.values()), len(mined))
    contents = {
        "subject": subject_digest,
        "encoder": encoder_digest,
        "probe": probe.digest(),
        "vocabulary": prompts_digest(prompts),
        "neurons": neurons_digest(neurons),
    }
    provenance = {
        "polyray": __version__,
        "python": platform.python_version(),
        "device_class": science.numerics.device,
        **package_versions(),
        "subject": {"name": subject_name, "weights_digest": subject_digest, "trained": trained},
        "encoder": {"kind": science.encoder.kind, "weights_digest": encoder_digest, "trained": encoder_trained},
        "probe": probe.describe(),
        "n_images": len(probe),
        "n_prompts": len(prompts),
        "layers": {info.name: len(neurons[info.name]) for info in layers},
        "notes": notes,
    }
    swept = {info.name: neurons[info.name] for info in layers}
    sweep = Sweep(config, out, len(probe), layers, swept, contents, stages(science))
    return Resolved(sweep, identity(config, contents, VERSION), provenance, notes)


def require_device(numerics: NumericsConfig, address: str | None) -> None:
    """Raises `ConfigError` where a sweep on this machine asks for a GPU that torch does not see."""
    if numerics.device == "cuda" and not torch.cuda.is_available() and address is None:
        raise ConfigError(
            "science.numerics.device is 'cuda', but torch sees no GPU here; say 'cpu', or give an address."
        )


def mined_labels(config: Config, labels: Sequence[str]) -> list[str]:
    """Labels of the images that are mined, as far as they are known before any is read: all, or half of each class.

    Raises:
        ConfigError: there are fewer classes than neurons to plant of each kind, or K is more than half of what is
            mined of the median class, so that the top K of a monosemantic neuron could not be pure.
    """
    plant, K = config.science.plant, config.science.mine.K
    if plant is None:
        return list(labels)
    counts = {label: n - n // 2 for label, n in Counter(labels).items()}
    if plant.per_kind > len(counts):
        raise ConfigError(
            f"science.plant.per_kind {plant.per_kind} is more than the probe set's {len(counts)} classes; lower it."
        )
    median = statistics.median(counts.values())
    if median / 2 < K:
        raise ConfigError(
            f"science.plant: mine.K {K} is more than half of the {median:g} images of a class that are mined, so that "
            "no neuron of one class could have pure top examples; lower mine.K or show more images of each class."
        )
    return [label for label, n in counts.items() for _ in range(n)]


def pool_notes(config: Config, labels: Sequence[str]) -> list[str]:
    """Warnings where the pool is too small for what is drawn from it."""
    K, B = config.science.mine.K, config.science.calibrate.B
    n_pool = min(len(labels), config.science.embed.n_pool)
    of_class = statistics.median(Counter(labels).values()) * n_pool / len(labels)
    notes = []
    if of_class < K:
        items = config.science.items
        notes.append(
            f"the pool has about {of_class:.0f} {items} of a class, fewer than K = {K}: the K nearest of a patch then "
            "span several classes, and `specific` is conservative; lower mine.K or raise embed.n_pool"
        )
    elif n_pool < 10 * K:
        notes.append(
            f"the pool has {n_pool} patches, fewer than 10 K = {10 * K}: the K nearest of a patch are then hardly one "
            "thing, and `specific` is conservative; raise embed.n_pool or lower mine.K"
        )
    if n_pool < 4 * K:
        notes.append(
            f"the pool has {n_pool} patches, fewer than 4 K = {4 * K}: draws of K from so few have much in common, and "
            "p under `selective` is too small; raise embed.n_pool or lower mine.K"
        )
    if n_anchors(n_pool) < B:
        notes.append(
            f"one_concept has {n_anchors(n_pool)} draws, not B = {B}: half of the pool's patches are its anchors, and "
            f"no p under `specific` is below {1 / (n_anchors(n_pool) + 1):.1e}"
        )
    return notes


def swap_notes(config: Config) -> list[str]:
    """Warnings where a neuron has too few hosts for a verdict."""
    swap, m = config.science.swap, config.science.mine
    if swap is None:
        return []
    low, high = config.science.cluster.k_range
    hosts = {k: min(swap.n_hosts // k, m.K // (2 * k)) for k in range(low, high + 1)}
    unjudged = [k for k, n in hosts.items() if n < MIN_HOSTS]
    if not unjudged:
        return []
    return [
        f"swap: a neuron with {unjudged[0]} clusters has about {hosts[unjudged[0]]} hosts in each, and no p of fewer "
        f"than {MIN_HOSTS} is below 0.05: from {unjudged[0]} clusters on there is hardly a verdict; raise "
        "swap.n_hosts, or mine.K, of which every host takes two"
    ]


def floor_note(config: Config, n_neurons: int, n_images: int) -> list[str]:
    """A warning where the smallest possible p is so large that discoveries need many neurons tied at it.

    `specific` has b draws, B or one for each anchor of the pool. With smallest p = 1/(b+1), a neuron at that floor
    reaches q < alpha only if at least n_neurons/(alpha·(b+1)) neurons are there with it.
    """
    c = config.science.calibrate
    most = n_anchors(min(n_images, config.science.embed.n_pool))
    n_draws = min(c.B, most)
    share = 1 / (c.alpha * (n_draws + 1))
    if share <= 0.01:
        return []
    n_tied = int(-(-n_neurons * share // 1))
    remedy = "raise calibrate.B" if most > c.B else "raise embed.n_pool, with a larger probe set where it has no more,"
    return [
        f"with {n_draws} draws of one_concept the smallest p is {1 / (n_draws + 1):.1e}: a discovery at q < {c.alpha} "
        f"needs {n_tied} of {n_neurons} neurons ({share:.1%}) tied at that floor; {remedy} for finer p"
    ]


def neurons_digest(neurons: Mapping[str, Any]) -> str:
    """Says which neurons are swept; enters the run_id."""
    text = ";".join(f"{name}:{','.join(map(str, chosen.tolist()))}" for name, chosen in sorted(neurons.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that numbers may depend on; of torch the build as well, since builds differ in bits."""
    return {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
