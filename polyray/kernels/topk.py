"""Top examples of many neurons at once, with ties broken by hash.

Which question it answers: *which images stand for this neuron?* Place in the flow: mine. Ties go to the smaller
`random.tie_hash`, never to the lower index: a folder sorted by class would otherwise make a saturated neuron look
monosemantic.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from polyray.kernels.random import tie_hash

# Half octaves from 2^-8 to 2^10 on both sides of zero: wide enough for any normalised network's responses.
_HALF_OCTAVES = 2.0 ** (torch.arange(-16, 21, dtype=torch.float64) / 2)
BIN_EDGES = torch.cat([-_HALF_OCTAVES.flip(0), torch.zeros(1, dtype=torch.float64), _HALF_OCTAVES])
"""Edges of the response histogram, float64 [75]; bin i holds edge[i−1] < x <= edge[i], 76 bins in all."""

_NEVER = torch.iinfo(torch.int64).max
_CHUNK = 4_000_000
"""Elements sorted at a time: bounds the working memory to about 200 MB."""


class Top(NamedTuple):
    """Kept examples of C neurons, best first; an empty slot has example −1, position −1 and response NaN."""

    example: Int64[Tensor, "C m"]
    response: Float[Tensor, "C m"]
    position: Int64[Tensor, "C m"]
    n_equal_cut: Int64[Tensor, " C"]
    """Examples left out whose response equals that of the last one kept."""


def top_examples(
    responses: Float[Tensor, "N C"],
    positions: Int[Tensor, "N C"],
    examples: Int[Tensor, " N"] | Int[Tensor, "N C"],
    n_keep: int,
    seed: int,
    layer: int,
    neurons: Int64[Tensor, " C"],
) -> Top:
    """The n_keep examples of largest response for every neuron.

    Args:
        responses: response of every example and neuron; NaN and infinite values are never kept.
        positions: raster index of each peak.
        examples: index of each example, the same for all neurons or one column a neuron (negative: no example);
            distinct within a neuron.
        n_keep: how many to keep.
        seed: the sweep's seed.
        layer: the layer's counter word.
        neurons: the neurons' indices in their layer.

    Returns:
        `Top` with m = min(n_keep, N) columns, responses descending, ties in ascending hash.
    """
    n, n_neurons = responses.shape
    width = max(1, _CHUNK // max(n, 1))
    chunks = [slice(c, c + width) for c in range(0, max(n_neurons, 1), width)]
    tops = [
        _top_chunk(
            responses[:, c], positions[:, c], examples if examples.ndim == 1 else examples[:, c], n_keep, seed, layer,
            neurons[c],
        )
        for c in chunks
    ]  # fmt: skip
    return Top(*(torch.cat(parts) for parts in zip(*tops, strict=True)))


def _top_chunk(
    responses: Tensor, positions: Tensor, examples: Tensor, n_keep: int, seed: int, layer: int, neurons: Tensor
) -> Top:
    values = responses.T.float().contiguous() + 0.0  # −0.0 + 0.0 is 0.0, so that both zeros tie
    which = (examples[None, :] if examples.ndim == 1 else examples.T).long().expand(values.shape)
    m = min(n_keep, values.shape[1])
    valid = torch.isfinite(values) & (which >= 0)
    as_int = values.view(torch.int32)
    ascending = (as_int ^ ((as_int >> 31) & 0x7FFFFFFF)).long()  # monotone in the float's value
    key = (-ascending << 32) | tie_hash(seed, layer, neurons.long()[:, None], which.clamp(min=0))
    key = torch.where(valid, key, _NEVER)
    best, at = torch.topk(key, m, dim=1, largest=False, sorted=True)
    kept = best != _NEVER
    response = torch.where(kept, values.gather(1, at), torch.nan)
    cut = response.gather(1, (kept.sum(1, keepdim=True) - 1).clamp(min=0)) if m else response.new_full((len(key), 1), 0)
    n_equal = ((values == cut) & valid).sum(1) - ((response == cut) & kept).sum(1)
    return Top(
        torch.where(kept, which.gather(1, at), -1),
        response,
        torch.where(kept, positions.T.gather(1, at).long(), -1),
        n_equal,
    )


def band_examples(
    responses: Float[Tensor, "N C"],
    positions: Int[Tensor, "N C"],
    examples: Int[Tensor, " N"] | Int[Tensor, "N C"],
    band: tuple[float, float],
    n_keep: int,
    seed: int,
    layer: int,
    neurons: Int64[Tensor, " C"],
) -> Top:
    """Random examples within a band of every neuron's responses: the n_keep of smallest hash.

    Args:
        responses: as for `top_examples`, as are positions, examples, seed, layer and neurons.
        positions: raster index of each peak.
        examples: index of each example (negative: no example).
        band: two quantiles, 0 to 1. An example is in the band when its response is at least the first and at most
            the second quantile of the neuron's finite responses, interpolated linearly between neighbours.
        n_keep: how many to keep.
        seed: the sweep's seed.
        layer: the layer's counter word.
        neurons: the neurons' indices in their layer.

    Returns:
        `Top` with m = min(n_keep, N) columns in ascending hash, in which responses have no order; a band has no cut,
        and n_equal_cut is 0.
    """
    n, n_neurons = responses.shape
    width = max(1, _CHUNK // (4 * max(n, 1)))  # several times as much is held for an element as in `top_examples`
    tops = []
    for c in (slice(c, c + width) for c in range(0, max(n_neurons, 1), width)):
        values = responses[:, c].T.double()
        which = (examples[None, :] if examples.ndim == 1 else examples[:, c].T).long().expand(values.shape)
        valid = torch.isfinite(values) & (which >= 0)
        ordered = torch.where(valid, values, torch.inf).sort(1).values
        low, high = (_quantile(ordered, valid.sum(1), q) for q in band)
        inside = valid & (values >= low[:, None]) & (values <= high[:, None])
        key = torch.where(inside, tie_hash(seed, layer, neurons[c].long()[:, None], which.clamp(min=0)), _NEVER)
        best, at = torch.topk(key, min(n_keep, n), dim=1, largest=False, sorted=True)
        kept = best != _NEVER
        tops.append(
            Top(
                torch.where(kept, which.gather(1, at), -1),
                torch.where(kept, responses[:, c].T.float().gather(1, at), torch.nan),
                torch.where(kept, positions[:, c].T.gather(1, at).long(), -1),
                torch.zeros(len(key), dtype=torch.int64),
            )
        )
    return Top(*(torch.cat(parts) for parts in zip(*tops, strict=True)))


def _quantile(ordered: Tensor, count: Tensor, q: float) -> Tensor:
    """The q-quantile of the first `count` entries of each ascending row, NaN where there are none."""
    if ordered.shape[1] == 0:
        return torch.full((len(ordered),), torch.nan, dtype=torch.float64)
    at = (count - 1).clamp(min=0).double() * q
    below = at.floor().long()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    a, b = (ordered.gather(1, i[:, None]).squeeze(1) for i in (below, above))
    t = at - below
    # Rounded as NumPy's quantile is.
    value = torch.where(t >= 0.5, b - (b - a) * (1 - t), a + (b - a) * t)
    return torch.where(count > 0, value, torch.nan)


def histogram(values: Float[Tensor, "N C"]) -> Int64[Tensor, "C bins"]:
    """Counts of the finite values of every column in the fixed bins of `BIN_EDGES`."""
    n_bins = len(BIN_EDGES) + 1
    bin_of = torch.bucketize(values.double().contiguous(), BIN_EDGES.to(values.device))
    column = torch.arange(values.shape[1], device=values.device).expand(values.shape)
    finite = torch.isfinite(values)
    flat = (column * n_bins + bin_of)[finite]
    return torch.bincount(flat, minlength=values.shape[1] * n_bins).view(values.shape[1], n_bins)
