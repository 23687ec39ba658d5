"""Scoring of a categorical sweep: proximity, its controls, clamps and the summary.

Which question it answers: *which rows does a unit read, and which does it write?* Place in the flow: as `text_work.py`,
after overlap.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyray import columns
from polyray.categorical import clamp, controls, proximity, summary
from polyray.cluster.plan import Work
from polyray.cluster.text_rows import context_length, contexts_of
from polyray.cluster.text_work import TextWorker
from polyray.errors import DataError, ModelError
from polyray.kernels import proximity as kernel
from polyray.kernels import random
from polyray.kernels.random import layer_word
from polyray.models.blocks import layer_index, layer_name
from polyray.models.language import Shard
from polyray.psi.mine import Failure
from polyray.records import PartInfo
from polyray.schema import TABLES

NO_LAYER_BEFORE = "no layer before it"
NO_PRECURSOR = "no precursor: no weight from the layer before is above 0"


class TextScorer(TextWorker):
    """Does all that a categorical sweep does but mining."""

    def parts(self, work: Work) -> list[PartInfo]:
        match work.stage:
            case "proximity":
                return self._proximity(work)
            case "clamp":
                return self._clamp(work)
            case "summarise":
                return self._summarise(work)
        return super().parts(work)

    @cached_property
    def _embeddings(self) -> Tensor:
        """Input embeddings of the kept tokens; less their mean where the config asks for it."""
        raw = self.model.input_embeddings()[self.kept.ids]
        return proximity.centred(raw) if self.science.proximity.centred else raw

    @cached_property
    def _contexts(self) -> clamp.Contexts:
        packed = contexts_of(self.store, context_length(self.science, self.model.info))
        return clamp.Contexts(packed.tokens.long(), packed.mask, self.kept.rows(packed.tokens, packed.counted))

    @cached_property
    def _whole(self) -> list[Shard]:
        blocks, dtype = range(self.model.info.n_layers), getattr(torch, self.science.model.dtype)
        return [Shard(self.model, blocks, dtype, self.science.numerics.device, self.model.has_head())]

    def _settings(self, layer: str) -> proximity.Settings:
        s = self.science
        return proximity.Settings(
            s.seed,
            layer_word(layer),
            s.proximity.n_ends,
            s.proximity.n_permutations,
            s.proximity.n_draws,
            s.overlap.min_tokens,
            s.overlap.min_clusters,
        )

    def _taken(self, layer: str, core: Tensor) -> Tensor:
        """Taken-clusters of a layer's swept neurons as masks over their core-tokens [N, P, C]."""
        unit = Work("overlap", layer).key
        rows = self.store.read("taken_clusters", layer, ["neuron", "rank", "tokens"], units=[unit])
        taken = torch.zeros(len(core), self.science.connect.n_precursors, core.shape[1], dtype=torch.bool)
        if len(rows):
            neuron, rank = (columns.numbers(rows, c).astype(np.int64) for c in ("neuron", "rank"))
            at_row = torch.from_numpy(np.searchsorted(self.layers.swept[layer], neuron))
            at_rank = torch.from_numpy(rank)
            ids = torch.from_numpy(columns.padded(rows["tokens"], -1).astype(np.int64))
            at = torch.where(ids >= 0, self.kept.row_of[ids.clamp(min=0)], -2)
            for part in torch.arange(len(neuron)).split(4096):
                row = at_row[part]
                taken[row, at_rank[part]] = (core[row, :, None] == at[part, None, :]).any(2)
        return taken

    def _proximity(self, work: Work) -> list[PartInfo]:
        layer = work.of_layer
        swept = self.layers.swept[layer]
        without = self._without(layer, swept)
        if layer_index(layer) == 0:
            return self.write(work, {"proximity": _unscored(swept, without)})
        settings = self._settings(layer)
        core = self.core(layer, swept)
        taken = self._taken(layer, core)
        precursors = self.precursors(layer)
        found = proximity.proximity(core, taken, self._embeddings, settings)
        found.reason[(precursors < 0).all(1).numpy()] = NO_PRECURSOR
        chosen = torch.from_numpy(np.flatnonzero(np.array([r is None for r in found.reason]) & without.ok))
        neurons = torch.from_numpy(swept)[chosen]
        targets = proximity.Targets(
            neurons,
            core[chosen],
            taken[chosen],
            taken[chosen].sum(2) >= settings.min_tokens,
            precursors[chosen],
        )
        world = controls.World(self._embeddings, controls.frequency_deciles(self.kept.counts), self.core_before(layer))
        drawn = controls.controls(targets, world, settings)
        tables = {
            "proximity": _proximity_rows(found, swept, without, core, self.science.overlap.min_clusters),
            "proximity_controls": columns.concat(
                "proximity_controls", [_control_rows(neurons.numpy(), c) for c in drawn.values()]
            ),
        }
        return self.write(work, dict(tables))

    def _without(self, layer: str, neurons: NDArray[np.int64]) -> "_Without":
        rows = self.store.read("core_tokens", layer, ["status", "reason"], units=[Work("core", layer).key])
        rows = rows.take(self.layers.rows(layer, neurons))
        return _Without(*(np.array(rows[c].to_pylist(), dtype=object) for c in ("status", "reason")))

    def _clamp(self, work: Work) -> list[PartInfo]:
        settings, layer = self.science.clamp, layer_index(work.of_layer)
        following = layer_name(layer + 1)
        if settings is None or following not in self.layers.swept:
            return []
        core = self.core(work.of_layer, self.layers.mined[work.of_layer])
        targets = self.layers.swept[following]
        next_core = self.core(following, targets)
        precursors = self.precursors(following)
        swept = self.layers.swept[work.of_layer]
        feeds = np.isin(swept, precursors.numpy())
        able = torch.from_numpy(swept[feeds & self._without(work.of_layer, swept).ok])
        hashes = random.bits(self.science.seed, random.CLAMP_NEURON, layer_word(work.of_layer), able)
        chosen = able[hashes.argsort(stable=True)[: settings.n_neurons]].sort().values
        rows: list[pa.Table] = []
        failed: list[Failure] = []
        distribution: clamp.Distribution | None = None
        for neuron in chosen.tolist():
            try:
                distribution = distribution or clamp.measure(
                    self._whole,
                    self._contexts,
                    layer,
                    self.science.seed,
                    self.model.w_out(layer),
                    settings.n_contexts,
                    self.science.model.micro_batch,
                )
                effects = clamp.clamp(
                    self._whole,
                    self._contexts,
                    layer,
                    neuron,
                    core,
                    next_core,
                    precursors,
                    self._embeddings,
                    distribution,
                    self.science.seed,
                    settings.n_contexts,
                    next_neurons=torch.from_numpy(targets),
                )
                rows.append(_clamp_rows(effects))
            except DataError as e:
                rows.append(_unclamped(neuron, "excluded", str(e)))
            except ModelError as e:  # what is held makes hidden states that the dtype has no room for
                failed.append((work.of_layer, "neuron", neuron, str(e)))
                rows.append(_unclamped(neuron, "failed", str(e)))
        return self.write(work, {"clamps": columns.concat("clamps", rows)}, failed)

    def _summarise(self, work: Work) -> list[PartInfo]:
        token_group = summary.token_groups(self._embeddings, self.science.seed)
        layers = [self._layer_scores(layer, token_group) for layer in self.layers.swept if layer_index(layer) > 0]
        rows = summary.summarise(layers, self.science.seed, self.science.proximity.n_bootstrap)
        n_neurons = {layer_index(name): len(swept) for name, swept in self.layers.swept.items()}
        return self.write(work, {"categorical": _summary_rows(rows, n_neurons)})

    def _layer_scores(self, layer: str, token_group: Tensor) -> summary.LayerScores:
        unit = [Work("proximity", layer).key]
        rows = self.store.read("proximity", layer, units=unit)
        rows = rows.filter(pa.compute.equal(rows["status"], "ok")).sort_by("neuron")
        neurons = columns.numbers(rows, "neuron").astype(np.int64)
        figure = {c: torch.from_numpy(columns.floats(rows, c).copy()) for c in ("difference", "h", "p", "tau", "first")}
        agreeing = torch.from_numpy(columns.floats(rows, "agreeing").copy())
        deciles = torch.from_numpy(columns.padded(rows["deciles"], np.nan, kernel.N_GROUPS))
        scores = proximity.Scores(
            figure["difference"], figure["h"], figure["p"], deciles, figure["tau"], figure["first"], agreeing
        )
        drawn = self.store.read("proximity_controls", layer, units=unit).sort_by("neuron")
        name = np.array(drawn["control"].to_pylist())
        found = {c: _control_of(c, drawn.filter(pa.array(name == c))) for c in controls.CONTROLS}
        group = summary.neuron_groups(self.core(layer, neurons), token_group)
        return summary.LayerScores(layer_index(layer), group, scores, found)


class _Without(NamedTuple):
    """Which neurons have no core-tokens, and why: columns of `core_tokens`."""

    status: NDArray[np.object_]
    reason: NDArray[np.object_]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Neurons that have some."""
        return self.status == "ok"


def _unscored(neurons: NDArray[np.int64], without: _Without) -> pa.Table:
    """Rows of `proximity` of a layer that has none before it."""
    status = np.where(without.ok, "excluded", without.status)
    reason = np.where(without.ok, NO_LAYER_BEFORE, without.reason)
    nothing = dict.fromkeys(TABLES["proximity"].schema.names, [None] * len(neurons))
    return columns.table("proximity", nothing | {"neuron": neurons, "status": status, "reason": reason})


def _proximity_rows(
    found: proximity.Proximity,
    neurons: NDArray[np.int64],
    without: _Without,
    core: Tensor,
    min_clusters: int,
) -> pa.Table:
    s = found.scores
    reason = np.where(without.ok, found.reason, without.reason)
    ok = np.array([r is None for r in reason])
    diagnoses = summary.neuron_diagnoses(found, min_clusters)
    lengths = (core >= 0).sum(1).numpy()
    rank = found.rank.numpy()

    def figure(x: Tensor) -> NDArray[np.float64]:
        return np.where(ok, x.numpy(), np.nan)

    rows: dict[str, Any] = {
        "neuron": neurons,
        "status": np.where(without.ok, np.where(ok, "ok", "excluded"), without.status),
        "reason": reason,
        "n_clusters": pa.array(found.n_counted.numpy(), mask=without.status == "failed"),
        **{c: figure(getattr(s, c)) for c in ("difference", "h", "p", "tau", "first", "agreeing")},
        "rank": pa.array(rank, mask=~ok | (rank < 0)),
        "condition": figure(found.condition),
        "deciles": columns.lists(np.where(ok[:, None], s.deciles.numpy(), np.nan), pa.float64()),
        "dimensional": columns.ragged_prefix(
            np.where(ok[:, None], found.dimensional.numpy(), np.nan), lengths, pa.float64()
        ),
        "diagnosis": ["; ".join(d) or None for d in diagnoses],
    }
    return columns.table("proximity", rows)


def _control_rows(neurons: NDArray[np.int64], control: controls.Control) -> pa.Table:
    s = control.scores
    return columns.table(
        "proximity_controls",
        {
            "neuron": neurons,
            "control": [control.name] * len(neurons),
            "differences": columns.lists(s.difference.T.numpy(), pa.float64()),
            "p": columns.lists(s.p.T.numpy(), pa.float64()),
            "first": columns.lists(s.first.T.numpy(), pa.float64()),
            "deciles": columns.lists(s.deciles.transpose(0, 1).numpy(), pa.float64()),
            "qualifies": columns.lists(control.qualifies.T.numpy(), pa.bool_()),
        },
    )


def _control_of(name: str, rows: pa.Table) -> controls.Control:
    """What `_control_rows` wrote."""
    n_draws = len(rows["differences"][0]) if len(rows) else 1
    difference, p, first = (
        torch.from_numpy(columns.padded(rows[c], np.nan, n_draws)).T for c in ("differences", "p", "first")
    )
    deciles = torch.from_numpy(columns.padded(rows["deciles"], np.nan, n_draws * kernel.N_GROUPS))
    deciles = deciles.reshape(len(rows), n_draws, kernel.N_GROUPS).transpose(0, 1)
    nothing = torch.full_like(difference, torch.nan)
    scores = proximity.Scores(difference, nothing, p, deciles, nothing, first, nothing)
    return controls.Control(name, scores, torch.from_numpy(columns.padded(rows["qualifies"], False, n_draws)).T)


def _clamp_rows(effects: list[clamp.Effect]) -> pa.Table:
    single = (
        "neuron",
        "quantile",
        "value",
        "control",
        "control_value",
        "n_contexts",
        "n_positions",
        "kl",
        "control_kl",
    )
    several = ("change", "control_change", "deviation", "coherence_change", "control_coherence_change")
    n_targets = np.array([len(e.targets) for e in effects])
    rows: dict[str, Any] = {c: np.array([getattr(e, c) for e in effects]) for c in single}
    rows |= {c: columns.ragged(_joined(effects, c), n_targets, pa.float64()) for c in several}
    rows |= {"targets": columns.ragged(_joined(effects, "targets"), n_targets, pa.int32())}
    rows |= {"status": ["ok"] * len(effects), "reason": [None] * len(effects)}
    return columns.table("clamps", rows)


def _joined(effects: list[clamp.Effect], name: str) -> NDArray[Any]:
    return torch.cat([getattr(e, name) for e in effects]).numpy()


def _unclamped(neuron: int, status: str, reason: str) -> pa.Table:
    rows: dict[str, Any] = {name: [None] for name in TABLES["clamps"].schema.names}
    return columns.table(
        "clamps", rows | {"neuron": [neuron], "quantile": [0.0], "status": [status], "reason": [reason]}
    )


def _summary_rows(rows: list[summary.Row], n_neurons: dict[int, int]) -> pa.Table:
    out: dict[str, Any] = {
        "layer": [None if r.layer is None else layer_name(r.layer) for r in rows],
        "condition": [r.condition for r in rows],
        "n_neurons": [sum(n_neurons.values()) if r.layer is None else n_neurons[r.layer] for r in rows],
        "n": [r.n for r in rows],
        "n_groups": [r.n_groups for r in rows],
        "requalifying": np.array([r.requalifying for r in rows]),
        "verdict": [r.verdict or None for r in rows],
        "diagnosis": [summary.layer_diagnosis(r) if r.condition == "actual" else None for r in rows],
        "wilson_low": np.array([r.wilson.low for r in rows]),
        "wilson_high": np.array([r.wilson.high for r in rows]),
    }
    for name in ("positive", "difference", "gap", "remaining", "tau", "kruskal", "first"):
        for end, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            out[name + end] = np.array([getattr(getattr(r, name), part) for r in rows])
    return columns.table("categorical", out)
