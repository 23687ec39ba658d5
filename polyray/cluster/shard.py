"""Shard: a contiguous range of a language model's blocks, with the token statistics of its layers.

Which question it answers: *what does one shard do with one batch, and how is it taken up again?* Place in the flow:
under `chain.py`, which drives several in a row; knows no Ray. The one stateful kind of worker: its sums grow with the
corpus. Sums are whole numbers, so that they do not depend on cut, order or restart.
"""

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from polyray import columns
from polyray.categorical.count import Kept
from polyray.categorical.mine import TokenStatistics
from polyray.cluster.text_plan import TextSweep
from polyray.cluster.text_rows import batch_of, context_length, contexts_of, kept_of, model_of, sums_of
from polyray.models.blocks import layer_index
from polyray.models.language import Shard
from polyray.records import PartInfo
from polyray.store import Store

PART_BYTES = 256 * 2**20
"""Sums of one part before compression."""


class ShardWorker:
    """One shard and its sums.

    Args:
        sweep: what the driver resolved.
        blocks: its blocks.
        layers: layers, of any shard, that this pass mines.
        cut: unit of the checkpoint that it goes on from; None at the start of the corpus.
    """

    def __init__(self, sweep: TextSweep, blocks: range, layers: Sequence[str], cut: str | None) -> None:
        science = sweep.science
        torch.set_num_threads(science.numerics.threads)
        torch.use_deterministic_algorithms(science.numerics.device == "cuda", warn_only=True)
        self.out = sweep.out
        self._store = Store(sweep.out)
        model = model_of(sweep)
        self._shard = Shard(model, blocks, getattr(torch, science.model.dtype), science.numerics.device)
        self._layers = {layer_index(layer): layer for layer in layers if layer_index(layer) in blocks}
        self._last = max(layer_index(layer) for layer in layers)
        self._micro_batch = science.model.micro_batch
        self._kept: Kept = kept_of(self._store, model.info.vocab)
        self._contexts = contexts_of(self._store, context_length(science, model.info))
        self._neurons = {index: torch.from_numpy(sweep.layers.mined[x]) for index, x in self._layers.items()}
        n_neurons = model.info.n_neurons
        self._statistics = TokenStatistics(
            self._kept,
            list(self._layers),
            n_neurons,
            science.numerics.device,
            {index: neurons for index, neurons in self._neurons.items() if len(neurons) < n_neurons},
        )
        if cut is not None:
            self._restore(cut)

    def _restore(self, cut: str) -> None:
        for index, layer in self._layers.items():
            into = self._statistics.sums[index]
            saved = sums_of(self._store, layer, cut, self._neurons[index].numpy())
            into.sums.copy_(saved.sums)
            into.refused.copy_(saved.refused)

    def step(self, batch: int, hidden: Tensor | None) -> Tensor | None:
        """Takes one batch through the shard and adds up what its layers say.

        Args:
            batch: number of the batch in the corpus.
            hidden: what the shard before returned for it; None for the first.

        Returns:
            What the next shard is to be given; None where no later block is needed.
        """
        chosen = batch_of(self._contexts, self._kept, batch, self._micro_batch)
        x = chosen.tokens if hidden is None else hidden
        read = self._statistics.reader(chosen.rows)
        with torch.inference_mode():
            out = self._shard(x, chosen.mask, read, list(self._layers), self._last)
        return None if self._shard.blocks.stop > self._last else out.cpu()

    def save(self, unit_key: str) -> list[PartInfo]:
        """Writes the sums as they are after the batches so far; they count once all shards' are committed."""
        parts = []
        for index, sums in self._statistics.sums.items():
            layer = self._layers[index]
            n, width = sums.sums.shape
            step = max(1, PART_BYTES // (8 * width))
            for a in range(0, n, step):
                # Sums of a refused neuron would depend on the order of batches.
                values = torch.where(sums.refused, 0, sums.sums[a : a + step]).cpu().numpy()
                rows = {
                    "token": self._kept.ids[a : a + step].numpy(),
                    "sums": columns.lists(values, pa.int64()),
                }
                parts.append(self._store.write_part("token_stats", unit_key, columns.table("token_stats", rows), layer))
            refused = self._neurons[index][sums.refused.cpu()].numpy()
            if len(refused):
                rows = {"neuron": refused}
                parts.append(self._store.write_part("refused", unit_key, columns.table("refused", rows), layer))
        return parts
