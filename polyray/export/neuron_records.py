"""Which question it answers: *what does the dataset say of each neuron, in the form that OpenAI's tools read?*

Place in the flow: `polyray export --format neuron-records`. Two forms, each a JSON file a neuron with the names of its
classes in `dataclass_name`, as those tools write them:

    neurons/<layer>/<neuron>.json                                 NeuronRecord: passages and the neuron's activations
    related-tokens/activation-based/<layer>/<neuron>.json         tokens and their mean activations, highest first

A NeuronRecord takes activations as the model gave them. PSI over documents has one for each prototype: that at its
peak. A categorical sweep has none, but means by token, whose place is the other form; it is also what
`science.core.published` reads. What the dataset lacks is left out or null, see `LEFT_OUT`.

Source: Bills et al. 2023, "Language models can explain neurons in language models": its published code and data.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from polyray import dataset as reading
from polyray import run_file
from polyray.dataset import Dataset
from polyray.errors import DataError, StageError, StoreError
from polyray.export.choice import condition, layers_of, ranges_of
from polyray.export.target import Shelf, Target, explained
from polyray.export.tokens import token_text
from polyray.models.blocks import layer_index

FORM = "neuron-records"
FOLDERS = {"records": ("neurons",), "token_tables": ("related-tokens", "activation-based")}
LEFT_OUT = {
    "categorical": (
        "most_positive_activation_records is empty: the dataset has each token's mean activation, not the activations "
        "of single contexts; the means are in related-tokens/activation-based",
        "random_sample and the four lists of random_sample_by_quantile are empty, quantile_boundaries is null: no "
        "sample of contexts was taken",
        "mean, variance, skewness and kurtosis are null: the dataset has sums by frequent token alone",
    ),
    "psi_text": (
        "of a neuron's examples only the prototypes of its clusters are here: the dataset has no text of the others",
        "the one token of an activation record is the snippet as the dataset has it, the peak token between « and »; "
        "its activation is that at the peak, the highest in its document: no other token's is in the dataset",
        "random_sample and the four lists of random_sample_by_quantile are empty, quantile_boundaries is null: no "
        "random documents were kept",
        "mean, variance, skewness and kurtosis are null: the dataset has those of documents' highest activations, not "
        "of tokens'",
    ),
}
"""What a record of a method does not hold, and why."""

_BAND = 512
"""Neurons whose examples are held at a time."""
_ROWS = 1024
"""Neurons whose core-tokens are."""


class Step(NamedTuple):
    """How far the export is, as `bars.Bars` shows it; units are neurons."""

    n_done: int
    n_total: int
    units_per_s: float
    n_failed: int = 0
    n_quarantined: int = 0

    @property
    def eta_s(self) -> float:
        """Seconds to come, at the rate so far."""
        return (self.n_total - self.n_done) / self.units_per_s


@dataclass
class LayerCount:
    """What became of the neurons of a layer."""

    layer: str
    layer_index: int
    n_records: int = 0
    n_activation_records: int = 0
    n_token_tables: int = 0
    n_without_text: int = 0
    """Prototypes that are left out since the dataset has no text of them."""
    not_exported: dict[str, int] = field(default_factory=dict)
    """Neurons without a record by reason."""

    def omit(self, reason: str | None, n: int = 1) -> None:
        """Counts neurons without a record."""
        told = reason or "no reason given"
        self.not_exported[told] = self.not_exported.get(told, 0) + n


def export(
    out: str | Path,
    to: str,
    layers: Sequence[str] = (),
    neurons: str | None = None,
    show: Callable[[Step], None] = lambda step: None,
) -> dict[str, Any]:
    """Writes the files of a run's neurons; a neuron without rows, or excluded or failed, has none.

    Args:
        out: folder or address of the dataset, of a finished or a running sweep of a language model.
        to: folder that is written, see `target.Target`.
        layers: names or indices; empty for all.
        neurons: such as `0-99,512`, of each layer; None for all.
        show: told now and then how far it is.

    Returns:
        run_id, method, finished, out, folder, n_records, n_token_tables, layers (`LayerCount`s), left_out.

    Raises:
        StoreError: no run, one of another schema version, or a folder that must not be written; nothing is.
        DataError: the run is of images or has nothing to export yet; nothing is written.
        ConfigError: layers or neurons that cannot be; nothing is written.
        StageError: reading or writing failed on the way; the files that are there are whole.
    """
    dataset = reading.open(out)
    run_file.require_this_version(out, dataset.run)
    method = _method(dataset)
    chosen = layers_of(layers, list(dataset.run["provenance"]["layers"]))
    ranges = ranges_of(neurons)
    target = Target(to, FORM, dataset.run["run_id"], dataset.path)
    table = "core_tokens" if method == "categorical" else "mined"
    with explained(StoreError):
        sizes = {layer: dataset.stored(table).count_rows(filter=condition(layer, ranges)) for layer in chosen}
        texts = _texts(dataset) if method == "categorical" else {}
    if not any(sizes.values()):
        raise DataError(_nothing(dataset, table, layers, neurons))
    target.begin()
    counts = []
    n_done, n_total, started_s = 0, sum(sizes.values()), time.monotonic()
    with explained(StageError):
        for layer, size in sizes.items():
            count = LayerCount(layer, layer_index(layer))
            work = (
                _categorical(dataset, layer, ranges, texts, target, count)
                if method == "categorical"
                else _psi_text(dataset, layer, ranges, target, count)
            )
            for n in work:
                so_far = n_done + n
                show(Step(so_far, n_total, so_far / max(time.monotonic() - started_s, 1e-3)))
            n_done += size
            counts.append(count)
        summary = _summary(dataset, method, target, counts)
        target.end(readme(summary), summary)
    return summary


def record(layer: int, neuron: int, passages: Sequence[tuple[str, float]] = ()) -> dict[str, Any]:
    """A NeuronRecord.

    Args:
        layer: index of the layer.
        neuron: index of the neuron in it.
        passages: text and activation, highest first.
    """
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {"dataclass_name": "NeuronId", "layer_index": layer, "neuron_index": neuron},
        "random_sample": [],
        # Null would be the truer word, but the viewer takes the four lists for granted.
        "random_sample_by_quantile": [[], [], [], []],
        "quantile_boundaries": None,
        "mean": None,
        "variance": None,
        "skewness": None,
        "kurtosis": None,
        "most_positive_activation_records": [
            {"dataclass_name": "ActivationRecord", "tokens": [text], "activations": [activation]}
            for text, activation in passages
        ],
    }


def token_table(tokens: Sequence[str], means: Sequence[float]) -> dict[str, Any]:
    """Tokens and their mean activations, highest first."""
    return {
        "dataclass_name": "TokenLookupTableSummaryOfNeuron",
        "tokens": list(tokens),
        "average_activations": list(means),
    }


def readme(summary: dict[str, Any]) -> str:
    """What someone who finds the folder must know."""
    state = "finished" if summary["finished"] else "not finished when this was written: neurons are missing"
    tables = (
        "- `related-tokens/activation-based/<layer>/<neuron>.json`: a TokenLookupTableSummaryOfNeuron each, the tokens "
        "of highest mean activation. `science.core.published` of polyray reads that folder. A token with bytes that "
        "are no text is escaped after U+FFFD.\n"
        if summary["method"] == "categorical"
        else ""
    )
    left_out = "".join(f"- {line}.\n" for line in summary["left_out"])
    return (
        f"# Neurons of run {summary['run_id']}\n\n"
        f"Written by polyray from a dataset of method `{summary['method']}`; the run is {state}.\n\n"
        f"- `neurons/<layer>/<neuron>.json`: a NeuronRecord each, as OpenAI's neuron explainer has it.\n{tables}"
        "- `export.json`: what is here; `complete` is false while it is written, or where that was cut short.\n\n"
        f"Neurons that were excluded or failed have no file.\n\n## What the records do not hold\n\n{left_out}"
    )


def _method(dataset: Dataset) -> str:
    science = dataset.run["config"].get("science", {})
    method = science.get("method", "psi")
    if method not in LEFT_OUT:
        raise DataError(
            f"{str(dataset.path)!r} is a sweep over images (method {method!r}), and a NeuronRecord is made of tokens: "
            f"--format {FORM} is for runs of methods {' and '.join(LEFT_OUT)}. A vision sweep's clusters, names and "
            "pictures are in the tables clusters and examples; see polyray.open."
        )
    if method == "psi_text" and science.get("mine", {}).get("band") is not None:
        raise DataError(
            f"{str(dataset.path)!r} was mined with science.mine.band: its examples are no neuron's highest "
            f"activations, which is what --format {FORM} is of."
        )
    return str(method)


def _nothing(dataset: Dataset, table: str, layers: Sequence[str], neurons: str | None) -> str:
    asked = " of the layers and neurons asked for" if layers or neurons else ""
    ahead = "The run has none." if dataset.is_finished else "The run has not come so far; see polyray status."
    return f"{str(dataset.path)!r} has nothing to export: no rows of {table}{asked}. {ahead}"


def _summary(dataset: Dataset, method: str, target: Target, counts: Sequence[LayerCount]) -> dict[str, Any]:
    return {
        "run_id": dataset.run["run_id"],
        "method": method,
        "finished": dataset.is_finished,
        "out": str(dataset.path),
        "folder": str(target.path),
        "n_records": sum(c.n_records for c in counts),
        "n_token_tables": sum(c.n_token_tables for c in counts),
        "layers": [vars(c) for c in counts],
        "left_out": list(LEFT_OUT[method]),
    }


def _texts(dataset: Dataset) -> dict[int, str]:
    rows = dataset.stored("tokens").to_table(["token", "text"])
    return {i: token_text(text) for i, text in zip(rows["token"].to_pylist(), rows["text"].to_pylist(), strict=True)}


def _categorical(
    dataset: Dataset,
    layer: str,
    ranges: Sequence[tuple[int, int]] | None,
    texts: dict[int, str],
    target: Target,
    count: LayerCount,
) -> Iterator[int]:
    index = count.layer_index
    # One part after another, a few rows at a time.
    scanned = dataset.stored("core_tokens").scanner(
        columns=["neuron", "status", "reason", "tokens", "means"],
        filter=condition(layer, ranges),
        batch_size=_ROWS,
        batch_readahead=1,
        fragment_readahead=1,
    )
    n = 0
    records, tables = (Shelf(target, *names, str(index)) for names in FOLDERS.values())
    with records, tables:
        for batch in scanned.to_batches():
            for row in batch.to_pylist():
                n += 1
                if row["status"] != "ok":
                    count.omit(row["reason"])
                    continue
                # The table first: who finds a record finds what goes with it.
                tables.put(row["neuron"], token_table([texts[i] for i in row["tokens"]], row["means"]))
                records.put(row["neuron"], record(index, row["neuron"]))
                count.n_records += 1
                count.n_token_tables += 1
            yield n


def _psi_text(
    dataset: Dataset, layer: str, ranges: Sequence[tuple[int, int]] | None, target: Target, count: LayerCount
) -> Iterator[int]:
    columns = ["neuron", "status", "reason"]
    mined = dataset.stored("mined").to_table(columns, filter=condition(layer, ranges))
    real = condition(layer, ranges) & (pc.field("kind") == "real")
    scored = dataset.stored("scores").to_table(columns, filter=real)
    said = {row["neuron"]: row for row in [*mined.to_pylist(), *scored.to_pylist()]}
    waiting = said.keys() - set(scored["neuron"].to_pylist())
    asked = sorted(said)
    with Shelf(target, *FOLDERS["records"], str(count.layer_index)) as records:
        for start in range(0, len(asked), _BAND):
            some = asked[start : start + _BAND]
            found = _passages(dataset, layer, (some[0], some[-1]), count)
            for neuron in some:
                if neuron in found:
                    records.put(neuron, record(count.layer_index, neuron, found[neuron]))
                    count.n_records += 1
                    count.n_activation_records += len(found[neuron])
                elif said[neuron]["status"] == "ok":
                    count.omit("not clustered yet" if neuron in waiting else "no clusters")
                else:
                    count.omit(said[neuron]["reason"])
            yield start + len(some)


def _passages(
    dataset: Dataset, layer: str, band: tuple[int, int], count: LayerCount
) -> dict[int, list[tuple[str, float]]]:
    """Text and activation of the prototypes of neurons that were clustered, highest activation first."""
    here = condition(layer, [band])
    clusters = dataset.stored("clusters").to_table(["neuron", "prototypes", "snippets"], filter=here).to_pylist()
    wanted = pa.array(sorted({patch for row in clusters for patch in row["prototypes"]}), pa.int64())
    columns = ["neuron", "patch_id", "activation", "rank"]
    examples = dataset.stored("examples").to_table(columns, filter=here & pc.field("patch_id").isin(wanted))
    measured = {(row["neuron"], row["patch_id"]): (row["activation"], row["rank"]) for row in examples.to_pylist()}
    found: dict[int, list[tuple[float, int, str]]] = {row["neuron"]: [] for row in clusters}
    for row in clusters:
        snippets = row["snippets"] or [None] * len(row["prototypes"])
        for patch, text in zip(row["prototypes"], snippets, strict=True):
            activation, rank = measured[row["neuron"], patch]
            if text is None or activation is None or not math.isfinite(activation):
                count.n_without_text += 1
            else:
                found[row["neuron"]].append((-activation, rank, text))
    return {neuron: [(text, -less) for less, _, text in sorted(rows)] for neuron, rows in found.items()}
