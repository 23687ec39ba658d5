"""Which neurons of the layer before drive a neuron the most?

Place in the flow: after mine, from weights alone. The weight from neuron i of layer l−1 to neuron j of layer l is
`W_out[l-1][i, :] · diag(g) · W_in[l][:, j]`, with g the gain of the norms between them: what one unit of activation of
i adds to the input of j, less the norm's scale at the position, which is common to all i.

Source: arXiv 2505.07831; the formula is OpenAI's for GPT-2 ("Language models can explain neurons in language models",
Bills et al. 2023).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from polyray.errors import ModelError
from polyray.kernels.random import tie_hash

_CHUNK = 4_000_000
"""Weights held at a time: bounds the working memory to about 200 MB."""
_NEVER = torch.iinfo(torch.int64).max


class Connections(NamedTuple):
    """Precursors of N neurons, largest weight first."""

    precursor: Int64[Tensor, "N P"]
    """Indices of neurons of the layer before; −1 where there are fewer."""
    weight: Float64[Tensor, "N P"]
    """NaN where there is no precursor."""
    gate: Float64[Tensor, "N P"]
    """The same weight by way of the target's gate; NaN where there is no precursor or no gate."""


def connect(
    w_out: Float[Tensor, "M d"],
    gain: Float[Tensor, " d"],
    w_in: Float[Tensor, "d N"],
    n_precursors: int,
    seed: int,
    layer: int,
    w_gate: Float[Tensor, "d N"] | None = None,
    neurons: Int64[Tensor, " N"] | None = None,
) -> Connections:
    """The n_precursors neurons of largest weight to every neuron.

    A weight that is not above 0 is no connection that drives the target, so such a neuron is no precursor; in trained
    models the largest weights are far above 0.

    Args:
        w_out: down projection of the layer before, one row a neuron.
        gain: product of the gains of the norms in between.
        w_in: up projection, one column a target.
        n_precursors: P.
        seed: the sweep's seed, for ties.
        layer: the target layer's counter word.
        w_gate: the gate's projection, in gated MLPs; it has no say in which neurons are precursors.
        neurons: which neurons the columns of w_in are; all in order by default.

    Raises:
        ModelError: shapes do not fit, or a weight is not finite.
    """
    if not (w_out.shape[1] == gain.shape[0] == w_in.shape[0]) or (w_gate is not None and w_gate.shape != w_in.shape):
        shapes = [tuple(x.shape) for x in (w_out, gain, w_in, w_gate) if x is not None]
        raise ModelError(f"weights of two layers do not fit: W_out, gain, W_in (and the gate's) have shapes {shapes}")
    neurons = torch.arange(w_in.shape[1], device=w_in.device) if neurons is None else neurons.to(w_in.device)
    source = w_out.double() * gain.double()
    parts = []
    width = max(1, _CHUNK // max(len(source), 1))
    for start in range(0, max(w_in.shape[1], 1), width):
        target = w_in[:, start : start + width].double().T
        weights = target @ source.T
        if not weights.isfinite().all():
            raise ModelError("a weight between two layers is not finite: the model's weights are damaged")
        best = largest(weights, n_precursors, seed, layer, neurons[start : start + len(target)])
        found = torch.full(best.shape, torch.nan, dtype=torch.float64, device=best.device)
        if len(source):
            found = torch.where(best >= 0, weights.gather(1, best.clamp(min=0)), torch.nan)
        best = torch.where(found > 0, best, -1)
        found = torch.where(best >= 0, found, torch.nan)
        gate = torch.full_like(found, torch.nan)
        if w_gate is not None and len(source):
            rows = w_gate[:, start : start + width].double().T
            by_gate = torch.stack([(source[best[:, p].clamp(min=0)] * rows).sum(1) for p in range(best.shape[1])], 1)
            gate = torch.where(best >= 0, by_gate, torch.nan)
        parts.append(Connections(best, found, gate))
    return Connections(*(torch.cat(x) for x in zip(*parts, strict=True)))


def largest(
    values: Float64[Tensor, "N M"], n: int, seed: int, layer: int, neurons: Int64[Tensor, " N"]
) -> Int64[Tensor, "N n"]:
    """Columns of the n largest values of every row, descending, ties in ascending hash; −1 where M < n.

    Unlike `topk.top_examples` it ranks in float64.
    """
    n_rows, n_columns = values.shape
    m = min(n, n_columns)
    out = torch.full((n_rows, n), -1, dtype=torch.int64, device=values.device)
    if m == 0:
        return out
    cut = values.topk(m, dim=1).values[:, -1:]
    hashed = tie_hash(seed, layer, neurons[:, None], torch.arange(n_columns, device=values.device)[None, :])
    key = torch.where(values > cut, -1, torch.where(values == cut, hashed, _NEVER))
    chosen = key.topk(m, dim=1, largest=False).indices
    chosen = chosen.gather(1, hashed.gather(1, chosen).argsort(dim=1))
    out[:, :m] = chosen.gather(1, values.gather(1, chosen).argsort(dim=1, descending=True, stable=True))
    return out
