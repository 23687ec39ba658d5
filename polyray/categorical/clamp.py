"""Which question it answers: *does this neuron's activation drive what comes after it?*

Place in the flow: after connect, the causal check. A neuron's activation at its core-tokens is set to a quantile of
its own distribution; then the model goes on. Looked at are, at those positions, the neurons of the next layer that it
feeds (it is among their precursors), the coherence of the taken-clusters which they share with it, and the output
distribution; and the same for the same clamp on another neuron of equal scale.

**Distribution**: the neuron's activations at the tokens of a fixed sample of contexts. No histogram is kept while
mining: a few thousand tokens give a 0.99 quantile well enough, and only layers that are clamped pay for them.

**Scale** of a neuron: standard deviation of its activation times the length of its row of W_out, which is the size of
what it writes. Its control is drawn from the `N_NEAR` neurons of nearest scale that feed none of its targets.

**Coherence** of a taken-cluster for a target: mean cosine of the input embeddings over pairs of its tokens, each pair
weighted with the product of the target's mean activations at the two (negative ones as 0). A target that comes to
prefer the tokens that are alike raises it.

Source: method B6; arXiv 2505.07831 asks for it and does not do it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

from polyray.errors import DataError
from polyray.kernels.random import CLAMP_CONTEXT, CLAMP_CONTROL, CLAMP_SAMPLE, bits, layer_word
from polyray.models.blocks import layer_name
from polyray.models.language import Read, Shard

QUANTILES = (0.0, 0.5, 0.99)
N_NEAR = 20
"""Neurons of nearest scale among which the control is drawn: enough to be a draw, few enough to be of one scale."""


class Contexts(NamedTuple):
    """Contexts to clamp in."""

    tokens: Int[Tensor, "n L"]
    mask: Bool[Tensor, "n L"]
    rows: Int64[Tensor, "n L"]
    """Row of kept of each token; −1 where it has none."""

    def at(self, which: Tensor) -> "Contexts":
        """Some of the contexts."""
        return Contexts(self.tokens[which], self.mask[which], self.rows[which])


class Distribution(NamedTuple):
    """What the neurons of a layer do on the sample."""

    quantiles: Float64[Tensor, "Q N"]
    scale: Float64[Tensor, " N"]
    deviation: Float64[Tensor, " N"]
    """Standard deviation of the activation (divisor M − 1); NaN for fewer than two tokens."""


@dataclass(frozen=True)
class Effect:
    """What one clamp does, and the same clamp on the control, at the n_positions core-tokens of the neuron."""

    neuron: int
    control: int
    quantile: float
    value: float
    """What the neuron is held at."""
    control_value: float
    n_contexts: int
    n_positions: int
    targets: Int64[Tensor, " K"]
    """Neurons of the next layer that the neuron feeds."""
    change: Float64[Tensor, " K"]
    """Mean of clamped minus actual activation of each."""
    control_change: Float64[Tensor, " K"]
    deviation: Float64[Tensor, " K"]
    """Standard deviation (divisor n − 1) of the actual activations of each at the positions, the unit to read changes
    in; NaN for one position."""
    coherence: Float64[Tensor, " K"]
    """Of the taken-cluster of each, unclamped; NaN where fewer than two of its tokens have a weight."""
    coherence_change: Float64[Tensor, " K"]
    control_coherence_change: Float64[Tensor, " K"]
    kl: float
    """Mean Kullback-Leibler divergence of the output from actual to clamped, in nats; NaN without head."""
    control_kl: float


def holding(layer: int, neuron: int, where: Bool[Tensor, "B L"], value: float | Float[Tensor, " P"]) -> Read:
    """Given to `Shard.forward` as `read`: holds a neuron at a value at some positions.

    Args:
        layer: the neuron's layer, which must be among the layers to be read.
        neuron: its index.
        where: the positions.
        value: for all of them, or one for each in raster order.
    """

    def read(at: int, activations: Tensor) -> Tensor | None:
        if at != layer:
            return None
        held = activations.clone()
        column = held[..., neuron]
        column[where.to(held.device)] = torch.as_tensor(value, dtype=held.dtype, device=held.device)
        return held

    return read


def measure(
    shards: Sequence[Shard],
    contexts: Contexts,
    layer: int,
    seed: int,
    w_out: Float32[Tensor, "N d"],
    n_contexts: int,
    micro_batch: int,
    quantiles: Sequence[float] = QUANTILES,
) -> Distribution:
    """Distribution of the activations of a layer's neurons at the tokens of a sample of contexts.

    Args:
        shards: of one model, in order, from its first block on.
        contexts: of the corpus; only tokens that have a row count.
        layer: which layer.
        seed: the sweep's seed.
        w_out: of the layer.
        n_contexts: how many contexts, those of smallest hash.
        micro_batch: contexts at once.
        quantiles: which, each from 0 to 1, interpolated linearly.

    Raises:
        DataError: the sample has no tokens that count.
    """
    which = _smallest(bits(seed, CLAMP_SAMPLE, layer_word(layer_name(layer)), torch.arange(len(contexts.tokens))))
    sample = contexts.at(which[:n_contexts].sort().values)
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(sample.tokens), micro_batch):
            part = sample.at(torch.arange(start, min(start + micro_batch, len(sample.tokens))))
            seen: dict[int, Tensor] = {}
            _run(shards, part.tokens, part.mask, {layer}, seen.__setitem__, stop=layer)
            found.append(seen[layer][(part.rows >= 0).to(seen[layer].device)].double())
        values = torch.cat(found) if found else torch.zeros(0, len(w_out), dtype=torch.float64)
        if len(values) == 0:
            raise DataError("none of the contexts to clamp in has a token with statistics.")
        ordered = values.sort(0).values
        at = torch.tensor(list(quantiles), dtype=torch.float64) * (len(ordered) - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=len(ordered) - 1)
        share = (at - below)[:, None].to(ordered)
        deviation = values.std(0).cpu()
        length = w_out.double().norm(dim=1).cpu()
        mixed = torch.lerp(ordered[below], ordered[above], share)
        return Distribution(mixed.cpu().clone(), (deviation * length).clone(), deviation.clone())


def _smallest(hashes: Tensor) -> Tensor:
    return torch.sort(hashes, stable=True).indices


def _run(
    shards: Sequence[Shard],
    x: Tensor,
    mask: Tensor,
    layers: set[int],
    read: Read,
    start: int | None = None,
    stop: int | None = None,
) -> Tensor:
    for shard in shards:
        if shard.blocks.stop > (start or 0) and (stop is None or shard.blocks.start <= stop):
            inside = start if start is not None and start in shard.blocks else None
            x = shard(x, mask, read, layers, stop, inside)
    return x


def control_of(
    neuron: int, scale: Float64[Tensor, " N"], barred: Int64[Tensor, " M"], layer: int, seed: int
) -> int | None:
    """A random one of the `N_NEAR` neurons whose scale is nearest, on a logarithmic scale.

    Args:
        neuron: whose control.
        scale: of all neurons of the layer.
        barred: neurons that must not be it; the neuron itself never is.
        layer: the layer's index.
        seed: the sweep's seed.

    Returns:
        None where no neuron is left.
    """
    distance = (scale.log() - scale[neuron].log()).abs()
    distance[barred] = torch.inf
    distance[neuron] = torch.inf
    allowed = torch.isfinite(distance)
    if not bool(allowed.any()):
        return None
    near = torch.sort(torch.where(allowed, distance, torch.inf), stable=True).indices[: min(N_NEAR, int(allowed.sum()))]
    draw = int(bits(seed, CLAMP_CONTROL, layer_word(layer_name(layer)), neuron))
    return int(near[draw % len(near)])


def clamp(
    shards: Sequence[Shard],
    contexts: Contexts,
    layer: int,
    neuron: int,
    core: Int64[Tensor, "N C"],
    next_core: Int64[Tensor, "M C"],
    precursors: Int64[Tensor, "M P"],
    embeddings: Float[Tensor, "T d"],
    distribution: Distribution,
    seed: int,
    n_contexts: int,
    quantiles: Sequence[float] = QUANTILES,
    next_neurons: Int64[Tensor, " M"] | None = None,
) -> list[Effect]:
    """Holds one neuron at quantiles of its own distribution, and its control at quantiles of its.

    Args:
        shards: of one model, in order, from its first block on; with a head on the last one, the output distribution
            is looked at too.
        contexts: of the corpus.
        layer: the neuron's layer; after the last one there are no targets.
        neuron: its index.
        core: core-tokens of the layer.
        next_core: core-tokens of the next layer.
        precursors: of the next layer's neurons in this one, −1 where there are fewer.
        embeddings: input embeddings of the kept tokens.
        distribution: as `measure` gives it for the same layer and quantiles.
        seed: the sweep's seed.
        n_contexts: at most how many contexts; of those with one of its core-tokens, those of smallest hash.
        quantiles: which.
        next_neurons: which neurons of the next layer the rows of next_core and precursors are; all by default.

    Returns:
        One effect a quantile.

    Raises:
        DataError: the neuron cannot be clamped; the message says why.
    """
    mine = core[neuron][core[neuron] >= 0]
    wanted = torch.isin(contexts.rows, mine)
    having = wanted.any(1).nonzero().squeeze(1)
    if len(having) == 0:
        raise DataError("none of its core-tokens is in the contexts")
    order = _smallest(bits(seed, CLAMP_CONTEXT, layer_word(layer_name(layer)), neuron, having))
    part = contexts.at(having[order[:n_contexts]].sort().values)
    where = torch.isin(part.rows, mine)
    fed = (precursors == neuron).any(1).nonzero().squeeze(1)
    targets = fed if next_neurons is None else next_neurons[fed]
    rivals = precursors[fed]
    control = control_of(neuron, distribution.scale, rivals[rivals >= 0], layer, seed)
    if control is None:
        raise DataError("no other neuron to clamp in its place")
    clusters = [next_core[t][torch.isin(next_core[t], mine) & (next_core[t] >= 0)] for t in fed.tolist()]
    with torch.inference_mode():
        entering = _run(shards, part.tokens, part.mask, set(), _nothing, stop=layer - 1) if layer else part.tokens
        look = _Look(shards, part, where, layer, targets, clusters, embeddings, entering)
        actual = look.at(None)
        effects = []
        for q, quantile in enumerate(quantiles):
            values = [float(distribution.quantiles[q, n]) for n in (neuron, control)]
            pair = [look.at(holding(layer, n, where, v)) for n, v in zip((neuron, control), values, strict=True)]
            effects.append(
                Effect(
                    neuron=neuron, control=control, quantile=quantile, value=values[0], control_value=values[1],
                    n_contexts=len(part.tokens), n_positions=int(where.sum()), targets=targets,
                    change=(pair[0].activations - actual.activations).mean(0),
                    control_change=(pair[1].activations - actual.activations).mean(0),
                    deviation=_deviation(actual.activations), coherence=actual.coherence,
                    coherence_change=pair[0].coherence - actual.coherence,
                    control_coherence_change=pair[1].coherence - actual.coherence,
                    kl=_divergence(actual, pair[0]), control_kl=_divergence(actual, pair[1]),
                )
            )  # fmt: skip
        return effects


def _deviation(values: Tensor) -> Tensor:
    return values.std(0) if len(values) > 1 and values.shape[1] else torch.full_like(values.sum(0), torch.nan)


def _nothing(_: int, __: Tensor) -> None:
    return None


class _Seen(NamedTuple):
    activations: Float64[Tensor, "P K"]
    """Of the targets at the positions."""
    coherence: Float64[Tensor, " K"]
    log_p: Float64[Tensor, "P V"] | None


@dataclass(frozen=True)
class _Look:
    """Runs the rest of the model, and looks at what the clamp is about."""

    shards: Sequence[Shard]
    part: Contexts
    where: Tensor
    layer: int
    targets: Tensor
    clusters: list[Tensor]
    embeddings: Tensor
    entering: Tensor

    def at(self, held: Read | None) -> _Seen:
        n_layers = self.shards[0].info.n_layers
        following = self.layer + 1
        seen: dict[int, Tensor] = {}

        def read(layer: int, activations: Tensor) -> Tensor | None:
            if layer == following:
                seen[layer] = activations
                return None
            return None if held is None else held(layer, activations)

        to_the_end = self.shards[-1].has_head
        stop = None if to_the_end else min(following, n_layers - 1)
        start = self.layer if self.layer else None
        out = _run(self.shards, self.entering, self.part.mask, {self.layer, following}, read, start, stop)
        log_p = None
        if to_the_end:
            log_p = torch.log_softmax(self.shards[-1].logits(out[self.where.to(out.device)]).double(), dim=-1).cpu()
        if following not in seen:
            return _Seen(torch.zeros(int(self.where.sum()), 0).double(), torch.zeros(0).double(), log_p)
        of_targets = seen[following][..., self.targets.to(out.device)].double().cpu()
        coherence = [
            coherence_of(of_targets[..., k], self.part.rows, cluster, self.embeddings)
            for k, cluster in enumerate(self.clusters)
        ]
        return _Seen(of_targets[self.where], torch.tensor(coherence, dtype=torch.float64), log_p)


def coherence_of(
    activations: Float64[Tensor, "B L"],
    rows: Int64[Tensor, "B L"],
    cluster: Int64[Tensor, " n"],
    embeddings: Float[Tensor, "T d"],
) -> float:
    """Coherence of a taken-cluster for one target; NaN where fewer than two of its tokens have a positive mean.

    Args:
        activations: of the target at every position.
        rows: the token of every position.
        cluster: the cluster's tokens, as rows.
        embeddings: of all tokens.
    """
    means = [activations[rows == row] for row in cluster.tolist()]
    weight = torch.tensor([float(m.mean()) if len(m) else 0.0 for m in means], dtype=torch.float64).clamp(min=0.0)
    if int((weight > 0).sum()) < 2:
        return torch.nan
    unit = torch.nn.functional.normalize(embeddings[cluster].double(), dim=1)
    pairs = weight[:, None] * weight[None, :]
    pairs.fill_diagonal_(0.0)
    return float((pairs * (unit @ unit.T)).sum() / pairs.sum())


def _divergence(actual: _Seen, clamped: _Seen) -> float:
    if actual.log_p is None or clamped.log_p is None:
        return torch.nan
    return float((actual.log_p.exp() * (actual.log_p - clamped.log_p)).sum(-1).mean())
