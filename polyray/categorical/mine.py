"""Which question it answers: *which tokens stand for this neuron?*

Place in the flow: after count. The corpus goes through the model once; every neuron's activation at a token (at the
token's own position) is added to the sum of that neuron and token. The core-tokens of a neuron are those of the
highest mean.

Source: arXiv 2505.07831.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int, Int64
from torch import Tensor

from polyray.categorical.count import Kept
from polyray.kernels.random import layer_word
from polyray.kernels.tokens import accumulate, largest_value, means
from polyray.kernels.topk import top_examples
from polyray.models.blocks import layer_name
from polyray.models.language import Read, Shard

N_CORE = 100
"""Core-tokens of a neuron, as in the paper."""

_CHUNK = 20_000_000
"""Means looked at at a time: bounds the working memory to about 500 MB."""


class LayerSums(NamedTuple):
    """What the corpus makes of one layer."""

    sums: Int64[Tensor, "T N"]
    refused: Bool[Tensor, " N"]
    """Neurons with an activation that is not finite, or too large to be added up; their sums are 0."""


class TokenStatistics:
    """Sums of some layers, on their device, while the corpus goes by.

    Args:
        kept: the tokens.
        layers: which layers.
        n_neurons: neurons of a layer.
        device: where the sums lie: 8 bytes for each of T × n_neurons × layers.
        chosen: of the layers that it names, only these neurons are kept, in this order.
    """

    def __init__(
        self,
        kept: Kept,
        layers: Collection[int],
        n_neurons: int,
        device: torch.device | str = "cpu",
        chosen: Mapping[int, Int64[Tensor, " n"]] | None = None,
    ) -> None:
        self._limit = largest_value(kept.counts)
        self._chosen = {layer: neurons.to(device) for layer, neurons in (chosen or {}).items()}
        width = {layer: len(self._chosen[layer]) if layer in self._chosen else n_neurons for layer in layers}
        self.sums = {
            layer: LayerSums(
                torch.zeros(len(kept.ids), width[layer], dtype=torch.int64, device=device),
                torch.zeros(width[layer], dtype=torch.bool, device=device),
            )
            for layer in sorted(layers)
        }

    def reader(self, rows: Int64[Tensor, "B L"]) -> Read:
        """What to give `Shard.forward` as `read`, for a batch whose tokens stand in these rows (−1: not counted)."""
        flat = rows.reshape(-1)

        def read(layer: int, activations: Tensor) -> None:
            of_layer = self.sums[layer]
            index = flat.to(of_layer.sums.device)
            values = activations.reshape(len(index), -1)
            if layer in self._chosen:
                values = values[:, self._chosen[layer]]
            refused = accumulate(of_layer.sums, index, values, self._limit)
            of_layer.refused.logical_or_(refused)

        return read

    def finish(self) -> dict[int, LayerSums]:
        """The sums, 0 for refused neurons, whose sums would depend on the order."""
        for of_layer in self.sums.values():
            if bool(of_layer.refused.any()):
                of_layer.sums[:, of_layer.refused] = 0
        return self.sums


class Batch(NamedTuple):
    """Contexts that go through the model at once."""

    tokens: Int64[Tensor, "B L"]
    mask: Bool[Tensor, "B L"]
    rows: Int64[Tensor, "B L"]


def batches(
    tokens: Int[Tensor, "n L"], mask: Bool[Tensor, "n L"], counted: Bool[Tensor, "n L"], kept: Kept, micro_batch: int
) -> Iterator[Batch]:
    """Contexts in batches of one size, the last one filled up with empty contexts: the size decides the last bits."""
    for start in range(0, len(tokens), micro_batch):
        part = slice(start, start + micro_batch)
        batch = Batch(tokens[part].long(), mask[part], kept.rows(tokens[part], counted[part]))
        missing = micro_batch - len(batch.tokens)
        if missing:
            length = tokens.shape[1]
            batch = Batch(
                torch.cat([batch.tokens, torch.zeros(missing, length, dtype=torch.int64)]),
                torch.cat([batch.mask, torch.zeros(missing, length, dtype=torch.bool)]),
                torch.cat([batch.rows, torch.full((missing, length), -1)]),
            )
        yield batch


def mine(
    shards: Sequence[Shard],
    tokens: Int[Tensor, "n L"],
    mask: Bool[Tensor, "n L"],
    counted: Bool[Tensor, "n L"],
    kept: Kept,
    layers: Collection[int],
    micro_batch: int,
) -> dict[int, LayerSums]:
    """Sums of some layers over some contexts, in this process.

    Args:
        shards: of one model, in order, from its first block on.
        tokens: token ids.
        mask: where there is a token.
        counted: where there is a token of the corpus.
        kept: the tokens that get statistics; their counts are those of the whole corpus.
        layers: which layers; nothing behind the last one is computed.
        micro_batch: contexts at once.

    Returns:
        Sums by layer. Those of parts of a corpus add up.
    """
    statistics = {
        shard: TokenStatistics(kept, _inside(shard, layers), shard.info.n_neurons, shard.device) for shard in shards
    }
    last = max(layers)
    with torch.inference_mode():
        for batch in batches(tokens, mask, counted, kept, micro_batch):
            x: Tensor = batch.tokens
            for shard in shards:
                if shard.blocks.start <= last:
                    x = shard(x, batch.mask, statistics[shard].reader(batch.rows), _inside(shard, layers), last)
    return {layer: sums for own in statistics.values() for layer, sums in own.finish().items()}


def _inside(shard: Shard, layers: Collection[int]) -> list[int]:
    return [layer for layer in shard.blocks if layer in layers]


class CoreTokens(NamedTuple):
    """Core-tokens of N neurons."""

    core: Int64[Tensor, "N C"]
    """Rows of kept, highest mean first; −1 where there are fewer than C, or the neuron was refused."""
    mean: Float64[Tensor, "N C"]
    """Their mean activations; NaN where there is no core-token."""
    n_tied_at_cut: Int64[Tensor, " N"]
    """Tokens left out whose mean equals that of the last core-token."""


def core_tokens(
    of_layer: LayerSums,
    kept: Kept,
    layer: int,
    seed: int,
    n_core: int = N_CORE,
    neurons: Int64[Tensor, " N"] | None = None,
) -> CoreTokens:
    """The tokens of highest mean activation of every neuron of a layer, ties by hash of the token id.

    Means are compared in float32; those that agree in it are tied.

    Args:
        of_layer: the layer's sums over the whole corpus.
        kept: the tokens.
        layer: the layer's index.
        seed: the sweep's seed.
        n_core: C.
        neurons: which neurons the columns of the sums are; all in order by default.
    """
    n_neurons = of_layer.sums.shape[1]
    device = of_layer.sums.device
    neurons = torch.arange(n_neurons, device=device) if neurons is None else neurons.to(device)
    ids, counts = kept.ids.to(device), kept.counts.to(device)
    core = torch.full((n_neurons, n_core), -1, dtype=torch.int64, device=device)
    mean = torch.full((n_neurons, n_core), torch.nan, dtype=torch.float64, device=device)
    n_tied = torch.zeros(n_neurons, dtype=torch.int64, device=device)
    width = max(1, _CHUNK // max(len(ids), 1))
    for start in range(0, n_neurons, width):
        part = slice(start, start + width)
        values = means(of_layer.sums[:, part], counts)
        values[:, of_layer.refused[part]] = torch.nan
        no_position = torch.zeros(1, 1, dtype=torch.int64, device=device).expand(values.shape)
        top = top_examples(values, no_position, ids, n_core, seed, layer_word(layer_name(layer)), neurons[part])
        at = torch.searchsorted(ids, top.example)
        there = top.example >= 0
        m = at.shape[1]
        core[part, :m] = torch.where(there, at, -1)
        gathered = values.T.gather(1, at.clamp(max=len(ids) - 1))
        mean[part, :m] = torch.where(there, gathered, torch.nan)
        n_tied[part] = top.n_equal_cut
    return CoreTokens(core, mean, n_tied)
