"""Vary: which variants of a finished sweep are asked for, and what their comparison with it adds.

Which question it answers: *what does "K=50,100" mean for this dataset, and what must be done again for it?* Place in
the flow: `polyray sensitivity`, before the service runs the variants (`resolve`) and after each (`record`). A variant
is the sweep with one thing changed; what was mined and, unless the encoder changes, embedded is read as it is.
"""

import copy
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns, files, overlay, run_file
from polyray.cluster.changes import changed, parsed
from polyray.cluster.plan import STAGES, Actor, Sweep
from polyray.cluster.progress import expected_units
from polyray.cluster.resolve import Resolved, floor_note, mined_labels, pool_notes
from polyray.config import Config, Execution, Science, identity, override, parse_config, run_id
from polyray.errors import ConfigError, DataError, ModelError, StoreError
from polyray.models.encoders import load_encoder
from polyray.models.layers import LayerInfo
from polyray.models.vocabulary import load_prompts, prompts_digest
from polyray.probes.images import open_probe
from polyray.psi import sensitivity
from polyray.records import Receipt
from polyray.schema import VERSION
from polyray.store import Store

STAGE = "sensitivity"
"""Stage of the units that a comparison commits to the sweep's dataset."""

_RESCORE = ("cluster", "draw", "calibrate", "summarise")
_STEPS: dict[str, tuple[str, ...]] = {
    "K": ("merge", *_RESCORE),
    "prompts": ("embed/vocabulary", *_RESCORE),
    "encoder": ("embed", *_RESCORE),
    "calibrate.alpha": ("summarise",),
    "calibrate.n_bootstrap": ("summarise",),
}
"""What a change makes necessary; what is not named here is scored again."""


@dataclass(frozen=True)
class Variant:
    """A sweep with one thing changed."""

    vary: str
    """What is varied, one of `changes.KEYS`."""
    value: str
    """The value it takes."""
    resolved: Resolved
    """Ready to run, in its own folder of OUT/variants."""

    @property
    def name(self) -> str:
        """Its folder: what is varied, and the beginning of its run_id, which changes with all that it is."""
        return Path(self.resolved.sweep.out).name

    @property
    def label(self) -> str:
        """What people see while it runs: of a prompt file its name alone."""
        return f"{self.vary}={Path(self.value).name if self.vary == 'prompts' else self.value}"

    @property
    def unit(self) -> str:
        """The unit of the sweep's dataset that holds its comparison."""
        return f"{STAGE}/{self.name}"


@dataclass(frozen=True)
class Asked:
    """What is to be done."""

    base: Store
    variants: list[Variant]
    execution: Execution
    """Where and how fast."""
    notes: list[str] = field(default_factory=list)
    """Values that are passed over, and what a reader of the numbers must know."""

    @property
    def remaining(self) -> list[Variant]:
        """Variants whose comparison is not part of the sweep's dataset yet."""
        done = self.base.committed(STAGE)
        return [variant for variant in self.variants if variant.unit not in done]


def resolve(
    out: str,
    vary: Sequence[str],
    overrides: Sequence[str] = (),
    address: str | None = None,
    default_address: str | None = None,
) -> Asked:
    """From `--vary` to variants; writes nothing.

    Args:
        out: folder of a finished sweep.
        vary: `key=value,value`, values in YAML's flow notation; a key may come several times.
        overrides: `execution.a.b=c`.
        address: Ray cluster; by default the sweep's own.
        default_address: Ray cluster where the sweep had none.

    Raises:
        StoreError: OUT holds no sweep of this version that has ended.
        ConfigError, DataError, ModelError: a key or value cannot be varied, or what it names is not there.
    """
    base = _finished(out)
    config = _config(base, overrides, address, default_address)
    asked = Asked(base, [], config.execution)
    if not vary:
        return asked
    changes = [(key, *changed(key, given, config)) for key, given in parsed(vary)]
    source = _Source(base, config)
    for key, science, shown in changes:
        variant = source.variant(key, shown, science, asked.notes)
        if variant is None:
            asked.notes.append(f"{key}={shown} is what {str(base.out)!r} has already; passed over")
        elif variant.name not in [v.name for v in asked.variants]:
            asked.variants.append(variant)
    return asked


def _finished(out: str) -> Store:
    """The sweep that is varied; refuses one that cannot be."""
    base = overlay.opened(out)
    if isinstance(base, overlay.Overlay):
        raise StoreError(f"{out!r} is a variant itself. Give the OUT of its sweep: {str(base.base.out)!r}.")
    run_file.require_this_version(out, base.run)
    # After a comparison was cut short the mark is missing, and the sweep is whole all the same.
    is_whole = base.is_finished or (base.committed("summarise") and set(expected_units(out)) <= base.committed().keys())
    if not is_whole:
        raise StoreError(
            f"the sweep in {out!r} is not finished. Finish it first, with the command it was begun with (`polyray run "
            f"CONFIG --out {out}`); `polyray status` says how far it is."
        )
    if base.run["provenance"]["torch"] != torch.__version__:
        raise StoreError(
            f"{out!r} was made with torch {base.run['provenance']['torch']}, here is {torch.__version__}: scores "
            "differ in the last bits, and could not be told from what is varied. Install the same."
        )
    return base


def _config(base: Store, overrides: Sequence[str], address: str | None, default_address: str | None) -> Config:
    raw: dict[str, Any] = copy.deepcopy(base.run["config"])
    if (method := raw["science"].get("method", "psi")) != "psi":
        raise ConfigError(
            f"{str(base.out)!r} is a sweep with science.method {method!r}; only one over images (psi) can be varied. "
            "Run it again with --set into another OUT."
        )
    for item in overrides:
        if not item.strip().startswith("execution."):
            raise ConfigError(f"--set takes keys of execution here, got {item!r}. What is varied goes into --vary.")
        override(raw, item)
    raw["execution"]["address"] = address or raw["execution"].get("address") or default_address
    return parse_config(raw)


class _Source:
    """What all variants of a sweep share, and what was checked once."""

    def __init__(self, base: Store, config: Config) -> None:
        self.base = base
        self.config = config
        run = base.run
        self.provenance: dict[str, Any] = run["provenance"]
        self.contents = {
            key.removeprefix("contents."): str(value)
            for key, value in run["identity"].items()
            if key.startswith("contents.")
        }
        self.layers = layer_infos(base)
        self.neurons = {
            info.name: np.sort(columns.numbers(base.read("mined", info.name, ["neuron"]), "neuron")).astype(np.int64)
            for info in self.layers
        }
        plain = config.science.extract.model_copy(update={"thumbnails": False})
        self.identity = self._identity(config.science.model_copy(update={"extract": plain}), self.contents)
        self._encoders: dict[str, tuple[str, bool, list[str]]] = {}

    def _identity(self, science: Science, contents: dict[str, str]) -> dict[str, Any]:
        fields = identity(self.config.model_copy(update={"science": science}), contents, VERSION)
        return fields | {"variant_of": self.base.run_id}

    def variant(self, key: str, shown: str, science: Science, notes: list[str]) -> Variant | None:
        """A variant that can start; None where it is the sweep itself. Adds what a reader must know to `notes`."""
        contents = dict(self.contents)
        provenance = {**self.provenance, "notes": []}
        if key in ("prompts", "encoder"):
            prompts = load_prompts(science.vocabulary)
            contents["vocabulary"] = prompts_digest(prompts)
            provenance["n_prompts"] = len(prompts)
            digest, trained, said = self._encoder(science)
            contents["encoder"] = digest
            provenance["encoder"] = {"kind": science.encoder.kind, "weights_digest": digest, "trained": trained}
            if key == "prompts" and digest != self.contents["encoder"]:
                raise ModelError("the encoder's weights are not those that the sweep was embedded with.")
        if key == "encoder":
            if contents["vocabulary"] != self.contents["vocabulary"]:
                raise ConfigError(
                    f"the prompts of {science.vocabulary!r} have changed since the sweep, and the encoder has to embed "
                    "the same ones. Bring the old file back."
                )
            if open_probe(science.probe).digest() != self.contents["probe"]:
                raise DataError(
                    "the probe set has changed since the sweep, and its patches have to be embedded again. Bring the "
                    "old one back."
                )
            notes += [note for note in said if note not in (*notes, *self.provenance.get("notes", ()))]
        fields = self._identity(science, contents)
        if fields == self.identity:
            return None
        provenance["notes"] = self._warnings(science)
        notes += [f"{key}={shown}: {note}" for note in provenance["notes"]]
        steps = (*_STEPS.get(key, _RESCORE), *(["recover"] if science.plant else []))
        provenance["variant"] = overlay.described(self.base, steps) | {"vary": key, "value": shown}
        text = Path(shown).name if key == "prompts" else shown
        label = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{key}-{text}")[:60]
        out = files.joined(self.base.out, overlay.FOLDER, f"{label}-{run_id(fields)[:8]}")
        sweep = Sweep(
            self.config.model_copy(update={"science": science}),
            str(out),
            self.provenance["n_images"],
            self.layers,
            self.neurons,
            contents,
            {step: _actor(step) for step in steps},
        )
        return Variant(key, shown, Resolved(sweep, fields, provenance))

    def _warnings(self, science: Science) -> list[str]:
        """What the same settings would have been warned of in a sweep, beside what this sweep was.

        Raises:
            ConfigError: as for a sweep, a K of which no planted neuron could have as many pure examples.
        """
        config = self.config.model_copy(update={"science": science})
        mined = mined_labels(config, self.base.read("images", columns=["label"])["label"].to_pylist())
        n_neurons = sum(len(n) for n in self.neurons.values())
        found = pool_notes(config, mined) + floor_note(config, n_neurons, len(mined))
        return [note for note in found if note not in self.provenance.get("notes", ())]

    def _encoder(self, science: Science) -> tuple[str, bool, list[str]]:
        """Digest, whether it is trained, notes; loaded once for each encoder."""
        at = science.encoder.model_dump_json()
        if at not in self._encoders:
            encoder = load_encoder(science.encoder, science.numerics.model_copy(update={"device": "cpu"}))
            self._encoders[at] = encoder.digest, encoder.trained, list(encoder.notes)
        return self._encoders[at]


def _actor(step: str) -> Actor:
    """Merge's ties need no subject, so that what scores can count them too."""
    return "scoring" if step == "merge" else STAGES[step.partition("/")[0]]


def layer_infos(store: Store) -> tuple[LayerInfo, ...]:
    """The layers of a sweep from its own table, without the subject, in order of depth."""
    return tuple(
        LayerInfo(
            name=row["layer"],
            # Decides which examples count; that was decided when the sweep was mined.
            positive_only=False,
            **{c: row[c] for c in ("depth", "width", "layout", "grid_h", "grid_w", "activation", "ranked_by")},
            **{c: row[c] for c in ("receptive_px", "center_x_px", "center_y_px", "stride_px")},
        )
        for row in sorted(store.read("layers").to_pylist(), key=lambda r: r["depth"])
    )


def record(base: Store, variant: Variant) -> None:
    """Compares a variant that is whole with its sweep, and makes the result part of the sweep's dataset."""
    started_s = time.monotonic()
    varied = overlay.opened(variant.resolved.sweep.out)
    layers = [info.name for info in variant.resolved.sweep.layers]
    what = sensitivity.Variation(variant.name, variant.vary, variant.value)
    # The sweep's own settings, so that all variants are compared over the same resamples.
    science = parse_config(base.run["config"]).science
    rows, by_layer = sensitivity.compare(
        what, layers, _neurons(base), _neurons(varied), _agreement(base, varied, layers), science
    )
    parts = [base.write_part("sensitivity", variant.unit, rows, None)]
    parts += [base.write_part("sensitivity_neurons", variant.unit, t, x) for x, t in by_layer.items() if len(t)]
    with base.acquire():
        base.commit(Receipt(variant.unit, parts, time.monotonic() - started_s, platform.node(), STAGE))
        base.finish()


def _neurons(store: Store) -> pa.Table:
    """Rows of `neurons` with q and called."""
    neurons, summary = store.read("neurons"), store.read("neuron_summary", columns=["layer", "neuron", "q", "called"])
    if not neurons.select(["layer", "neuron"]).equals(summary.select(["layer", "neuron"])):
        raise StoreError(f"tables neurons and neuron_summary of {str(store.out)!r} do not hold the same neurons.")
    return neurons.append_column("q", summary["q"]).append_column("called", summary["called"])


def _agreement(base: Store, varied: Store, layers: Sequence[str]) -> NDArray[np.float64]:
    """Adjusted Rand index of every neuron, in the order of `_neurons`."""
    found = []
    for layer in sorted(layers):
        neurons = columns.numbers(base.read("neurons", layer, ["neuron"]), "neuron").astype(np.int64)
        a, b = (s.read("examples", layer, ["neuron", "rank", "cluster"]) for s in (base, varied))
        found.append(sensitivity.agreement(a, b, neurons))
    return np.concatenate(found)
