"""Work of a categorical sweep that needs no forward pass: tokenise, count, core, connect, overlap.

Which question it answers: *which rows does a unit read, and which does it write?* Place in the flow: as `work.py`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyray import columns
from polyray.categorical import connect, count, mine, overlap
from polyray.categorical.count import Kept
from polyray.categorical.published import read_published
from polyray.cluster.plan import Work
from polyray.cluster.text_plan import TextSweep, text_works
from polyray.cluster.text_rows import REFUSED, context_length, context_rows, kept_of, model_of, sums_of
from polyray.cluster.units import UnitWorker
from polyray.errors import ModelError
from polyray.kernels.random import layer_word
from polyray.models.blocks import layer_index, layer_name
from polyray.probes.text import open_corpus
from polyray.probes.tokens import Tokenizer, pack, tokenize
from polyray.records import PartInfo

NO_FILE = "no published file"
NO_TOKEN = "none of its published tokens is frequent enough in the corpus"


class _Core(NamedTuple):
    """Core-tokens of a layer's mined neurons; indices and reasons of those that have none."""

    tokens: mine.CoreTokens
    excluded: dict[int, str]
    failed: dict[int, str]


class TextWorker(UnitWorker):
    """Does what needs the model's weights at most one by one."""

    def __init__(self, sweep: TextSweep) -> None:
        super().__init__(sweep.out, sweep.science.numerics)
        self.text = sweep
        self.science = sweep.science
        self.layers = sweep.layers
        self.model = model_of(sweep)
        self.tokenizer = Tokenizer(self.model.folder)
        if self.tokenizer.digest() != sweep.contents["tokenizer"]:
            raise ModelError(f"this node has another tokenizer at {self.science.model.path!r} than the driver.")
        self._kept: Kept | None = None

    @property
    def kept(self) -> Kept:
        """The tokens that get statistics, once `count` has ended."""
        if self._kept is None:
            self._kept = kept_of(self.store, self.model.info.vocab)
        return self._kept

    def parts(self, work: Work) -> list[PartInfo]:
        match work.stage:
            case "tokenise":
                return self._tokenise(work)
            case "count":
                return self._count(work)
            case "core":
                return self._core(work)
            case "connect":
                return self._connect(work)
            case "overlap":
                return self._overlap(work)
        raise ValueError(f"a scoring actor cannot do {work.key!r}")

    def _tokenise(self, work: Work) -> list[PartInfo]:
        science, first = self.science, work.items.start
        corpus = open_corpus(science.corpus.path, science.corpus.text_column, science.corpus.label_column)
        done = tokenize(corpus.documents(work.items), self.tokenizer)
        packed = pack(done, self.tokenizer, context_length(science, self.model.info), self.model.info.causal)
        n_tokens = dict(zip(done.docs, map(len, done.ids), strict=True))
        left_out = dict(done.left_out)
        documents = {
            "document": list(work.items),
            "name": [corpus.names[i] for i in work.items],
            "label": [corpus.labels[i] for i in work.items],
            "status": ["ok" if i in n_tokens else "failed" for i in work.items],
            "reason": [left_out.get(i) for i in work.items],
            "n_tokens": [n_tokens.get(i) for i in work.items],
        }
        counts = count.count_tokens(packed.tokens, packed.counted, self.model.info.vocab)
        found = counts.nonzero().squeeze(1)
        rows = {
            "documents": columns.table("documents", documents),
            "contexts": context_rows(packed, first),
            "token_counts": columns.table(
                "token_counts",
                {"first_document": np.full(len(found), first), "token": found.numpy(), "count": counts[found].numpy()},
            ),
        }
        failed = [(None, "document", i, reason) for i, reason in done.left_out]
        return self.write(work, dict(rows), failed)

    def _count(self, work: Work) -> list[PartInfo]:
        rows = self.store.read("token_counts", units=[w.key for w in text_works("tokenise", self.text.shape)])
        counts = torch.zeros(self.model.info.vocab, dtype=torch.int64)
        token, n = (torch.from_numpy(columns.numbers(rows, c).astype(np.int64)) for c in ("token", "count"))
        counts.index_add_(0, token, n)
        kept = count.select(counts, self.science.core.min_count, self.tokenizer.special)
        shown = [self.tokenizer.shown(i) for i in kept.ids.tolist()]
        table = columns.table("tokens", {"token": kept.ids.numpy(), "count": kept.counts.numpy(), "text": shown})
        return self.write(work, {"tokens": table})

    def _core(self, work: Work) -> list[PartInfo]:
        layer = work.of_layer
        neurons = self.layers.mined[layer]
        found, excluded, failed = self._published(layer) if self.science.core.published else self._mined(layer)
        there = (found.core >= 0).numpy()
        n = there.sum(1)
        ids = self.kept.ids[found.core.clamp(min=0)].numpy()
        reason = [failed.get(i) or excluded.get(i) for i in neurons.tolist()]
        # Published files do not say what was left out.
        untold = np.isin(neurons, list(failed)) | (self.science.core.published is not None)
        table = columns.table(
            "core_tokens",
            {
                "neuron": neurons,
                "status": [
                    "failed" if i in failed else "excluded" if i in excluded else "ok" for i in neurons.tolist()
                ],
                "reason": reason,
                "tokens": columns.ragged(ids[there], n, pa.int32()),
                "means": columns.ragged(found.mean.numpy()[there], n, pa.float64()),
                "n_tied_at_cut": pa.array(found.n_tied_at_cut.numpy(), mask=untold),
            },
        )
        return self.write(work, {"core_tokens": table}, [(layer, "neuron", i, why) for i, why in failed.items()])

    def _mined(self, layer: str) -> _Core:
        neurons, science = self.layers.mined[layer], self.science
        of_layer = sums_of(self.store, layer, Work("mine", layer).key, neurons)
        found = mine.core_tokens(
            of_layer, self.kept, layer_index(layer), science.seed, science.core.n_core, torch.from_numpy(neurons)
        )
        return _Core(found, {}, dict.fromkeys(neurons[of_layer.refused.numpy()].tolist(), REFUSED))

    def _published(self, layer: str) -> _Core:
        neurons, core = self.layers.mined[layer].tolist(), self.science.core
        folder = Path(core.published or "").expanduser()
        found = read_published(folder, layer_index(layer), neurons, self.kept.ids, self.tokenizer, core.n_core)
        excluded = dict.fromkeys(found.missing, NO_FILE)
        empty = (found.core_tokens.core < 0).all(1).tolist()
        excluded |= {i: NO_TOKEN for i, e in zip(neurons, empty, strict=True) if e and i not in excluded}
        return _Core(found.core_tokens, excluded, found.failures)

    def core(self, layer: str, neurons: NDArray[np.int64]) -> Tensor:
        """Core-tokens of neurons of a layer as rows of `kept`, −1 where there are none."""
        rows = self.store.read("core_tokens", layer, ["tokens"], units=[Work("core", layer).key])
        tokens = rows["tokens"].take(self.layers.rows(layer, neurons))
        ids = torch.from_numpy(columns.padded(tokens, -1, self.science.core.n_core).astype(np.int64))
        return torch.where(ids >= 0, self.kept.row_of[ids.clamp(min=0)], -1)

    def core_before(self, layer: str) -> Tensor:
        """Core-tokens of all neurons of the layer before."""
        before = layer_name(layer_index(layer) - 1)
        return self.core(before, self.layers.mined[before])

    def _connect(self, work: Work) -> list[PartInfo]:
        layer = layer_index(work.of_layer)
        if layer == 0:
            return []
        model, science = self.model, self.science
        swept = torch.from_numpy(self.layers.swept[work.of_layer])
        gate = model.gate(layer)
        found = connect.connect(
            model.w_out(layer - 1),
            model.gains(layer),
            model.w_in(layer)[:, swept],
            science.connect.n_precursors,
            science.seed,
            layer_word(work.of_layer),
            None if gate is None else gate[:, swept],
            swept,
        )
        row, rank = (found.precursor >= 0).nonzero().numpy().T
        rows = {"neuron": swept.numpy()[row], "rank": rank, "precursor": found.precursor.numpy()[row, rank]}
        rows |= {"weight": found.weight.numpy()[row, rank], "gate_weight": found.gate.numpy()[row, rank]}
        return self.write(work, {"connections": columns.table("connections", rows)})

    def precursors(self, layer: str) -> Tensor:
        """Precursors of a layer's neurons that are swept, −1 where there are fewer."""
        rows = self.store.read("connections", layer, units=[Work("connect", layer).key])
        swept = self.layers.swept[layer]
        out = torch.full((len(swept), self.science.connect.n_precursors), -1)
        neuron, rank, precursor = (columns.numbers(rows, c).astype(np.int64) for c in ("neuron", "rank", "precursor"))
        row = np.searchsorted(swept, neuron)
        out[torch.from_numpy(row), torch.from_numpy(rank)] = torch.from_numpy(precursor)
        return out

    def _overlap(self, work: Work) -> list[PartInfo]:
        layer = work.of_layer
        if layer_index(layer) == 0:
            return []
        swept = self.layers.swept[layer]
        precursors = self.precursors(layer)
        core = self.core(layer, swept)
        found = overlap.overlap(core, self.core_before(layer), precursors, len(self.kept.ids))
        row, rank = (precursors >= 0).nonzero().numpy().T
        taken = found.taken.numpy()[row, rank]
        ids = self.kept.ids[core.clamp(min=0)].numpy()[row]
        size = found.size.numpy()[row, rank]
        rows = {
            "neuron": swept[row],
            "rank": rank,
            "precursor": precursors.numpy()[row, rank],
            "size": size,
            "p": found.p.numpy()[row, rank],
            "counted": size >= self.science.overlap.min_tokens,
            "tokens": columns.ragged(ids[taken], size, pa.int32()),
        }
        return self.write(work, {"taken_clusters": columns.table("taken_clusters", rows)})
