"""Sums of activations by token, exact in every order.

Which question it answers: *what does every neuron say to every token, on average?* Place in the flow: mine. Sums are
fixed-point integers: integers add up to the same whatever the order, so that no batch, cut of the model or restart
changes a bit of them.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

SCALE = 2.0**24
"""Units in 1. A value is rounded to 2^-25 at most, which is float32's own precision at 1; a token may be seen 4 million
times with the largest value of float16 before a sum leaves its room."""

ROOM = 2.0**62
"""What sums are kept to, half of what int64 holds: rounding cannot take one over the edge."""

_CHUNK = 4_000_000
"""Values turned into integers at a time: bounds the working memory to about 50 MB."""


def largest_value(counts: Int64[Tensor, " T"]) -> float:
    """The largest absolute value that every token can be given as often as it is seen without leaving the room."""
    return ROOM / SCALE / max(int(counts.max()) if len(counts) else 0, 1)


def accumulate(
    sums: Int64[Tensor, "T N"], index: Int64[Tensor, " M"], values: Float[Tensor, "M N"], limit: float
) -> Bool[Tensor, " N"]:
    """Adds the activations of M tokens, in units of 1 / `SCALE`, to the sums of their tokens, in place.

    Args:
        sums: row t belongs to token t.
        index: which row each value goes to; negative: none (padding, separators, rare tokens).
        values: activations; what stands in a row without token is not looked at.
        limit: as `largest_value` gives it for the counts of the whole corpus, so that no sum can overflow.

    Returns:
        Neurons that a value of was refused: NaN, infinite, or beyond the limit. Nothing of these values is added for
        such a neuron, whose sums are of no use from then on; those of the others are as without it.
    """
    if bool((index < 0).any()):
        has_token = index >= 0
        index, values = index[has_token], values[has_token]
    refused = torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
    step = max(1, _CHUNK // max(values.shape[1], 1))
    for start in range(0, len(index), step):
        rows = values[start : start + step]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        low, high = torch.aminmax(rows)
        if not bool((low >= -limit) & (high <= limit)):
            outside = ~(rows.abs() <= limit).all(0)
            refused |= outside
            rows = rows.masked_fill(outside, 0.0)
        sums.index_add_(0, index[start : start + step], (rows * SCALE).round_().long())
    return refused


def means(sums: Int64[Tensor, "T N"], counts: Int64[Tensor, " T"]) -> Float64[Tensor, "T N"]:
    """Mean activation of every neuron at every token; NaN for a token that was never seen."""
    return sums.double() / (SCALE * counts.double())[:, None]
