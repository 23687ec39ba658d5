"""Is a token the nearer to a neuron's taken-clusters, the higher the neuron's activation at it?

Place in the flow: after overlap. For a core-token and a taken-cluster the proximity is the mean cosine of the input
embeddings of the token and of the cluster's other tokens; the dimensional proximity of the token is the mean over the
neuron's counted taken-clusters.

Source: arXiv 2505.07831.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from polyray.kernels import proximity as kernel
from polyray.kernels import random

_CHUNK = 128
"""Neurons at a time: the cosines of 100 core-tokens take 80 kB a neuron, and several copies of them are held."""

FEW_CLUSTERS = "fewer than {min_clusters} taken-clusters of {min_tokens} tokens or more"
FEW_TOKENS = "fewer than {n_least} core-tokens"
NO_DIRECTION = "the embedding of a core-token is zero or not finite"


@dataclass(frozen=True)
class Settings:
    """What the proximity of one layer is computed with."""

    seed: int
    layer: int
    """The layer's counter word."""
    n_ends: int = 10
    """Core-tokens compared at either end of the order of activation."""
    n_permutations: int = 9999
    """Permutations behind the p of Kruskal and Wallis's test."""
    n_draws: int = 4
    """Draws of every control that draws."""
    min_tokens: int = 6
    min_clusters: int = 3


@dataclass(frozen=True)
class Targets:
    """Neurons that are asked about, with what they are asked about."""

    neuron: Int64[Tensor, " G"]
    """Indices in the layer."""
    core: Int64[Tensor, "G C"]
    taken: Bool[Tensor, "G P C"]
    counted: Bool[Tensor, "G P"]
    """Which taken-clusters count."""
    precursor: Int64[Tensor, "G P"]

    def rows(self, index: Tensor, n: int) -> "Targets":
        """Some of them, with their first n core-tokens."""
        return Targets(
            self.neuron[index], self.core[index, :n], self.taken[index, :, :n], self.counted[index],
            self.precursor[index],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.neuron)


class Scores(NamedTuple):
    """What the dimensional proximities of G neurons come to; NaN where a figure cannot be had."""

    difference: Float64[Tensor, " G"]
    """Mean dimensional proximity of the core-tokens of highest activation less that of the lowest."""
    h: Float64[Tensor, " G"]
    p: Float64[Tensor, " G"]
    """p of Kruskal and Wallis's test over deciles of activation."""
    deciles: Float64[Tensor, "G 10"]
    """Mean dimensional proximity of each decile of activation, the highest first."""
    tau: Float64[Tensor, " G"]
    """Kendall's tau-b over deciles; above 0: the higher the activation, the nearer."""
    first: Float64[Tensor, " G"]
    """Share of the first principal component."""
    agreeing: Float64[Tensor, " G"]
    """Share of its loadings that have the sign that most have."""


@dataclass(frozen=True)
class Proximity:
    """Proximity of all N neurons of a layer; NaN and −1 where the neuron has none, and then a reason."""

    scores: Scores
    dimensional: Float64[Tensor, "N C"]
    """Dimensional proximity of each core-token."""
    loadings: Float64[Tensor, "N P"]
    rank: Int[Tensor, " N"]
    """Rank of the sub-dimension basis."""
    condition: Float64[Tensor, " N"]
    n_counted: Int64[Tensor, " N"]
    reason: NDArray[np.object_]
    """Why there is no difference; None where there is one."""


def proximity(
    core: Int64[Tensor, "N C"], taken: Bool[Tensor, "N P C"], embeddings: Float[Tensor, "T d"], settings: Settings
) -> Proximity:
    """Proximity of every neuron of a layer that qualifies.

    Args:
        core: core-tokens, highest activation first, −1 at the end where there are fewer than C.
        taken: the taken-clusters.
        embeddings: input embeddings of the kept tokens.
        settings: the settings.
    """
    n_neurons, n_core = core.shape
    counted = taken.sum(2) >= settings.min_tokens
    out = Proximity(
        no_scores(n_neurons),
        _nan(n_neurons, n_core),
        _nan(n_neurons, taken.shape[1]),
        torch.full((n_neurons,), -1, dtype=torch.int32),
        _nan(n_neurons),
        counted.sum(1),
        np.full(n_neurons, None, dtype=object),
    )
    qualifying = out.n_counted >= settings.min_clusters
    neurons = torch.arange(n_neurons)
    everyone = Targets(neurons, core, taken, counted, torch.full(counted.shape, -1))
    for n, at in by_length(core, torch.nonzero(qualifying).flatten()):
        null = null_of(n, settings)
        for some in at.split(_CHUNK):
            part = everyone.rows(some, n)
            cosine = kernel.cosines(embeddings, part.core, part.core)
            cosine[cosine.isnan().any(2).any(1)] = torch.nan
            near = kernel.proximity(cosine, part.taken)
            basis = kernel.basis(cosine, part.taken, part.counted)
            dimensional, scores, loadings = scored(near, part.counted, null, settings)
            for whole, piece in zip(out.scores, scores, strict=True):
                whole[some] = piece
            out.dimensional[some, :n] = dimensional
            out.loadings[some], out.rank[some], out.condition[some] = loadings, basis.rank, basis.condition
    few = (core >= 0).sum(1) < 2 * settings.n_ends
    for which, why in (
        (out.scores.difference.isnan(), NO_DIRECTION),
        (few, FEW_TOKENS.format(n_least=2 * settings.n_ends)),
        (~qualifying, FEW_CLUSTERS.format(min_clusters=settings.min_clusters, min_tokens=settings.min_tokens)),
    ):
        out.reason[which.numpy()] = why
    return out


def by_length(core: Int64[Tensor, "N C"], rows: Int64[Tensor, " n"]) -> Iterator[tuple[int, Int64[Tensor, " k"]]]:
    """Rows by how many core-tokens they have, where these are any."""
    lengths = (core[rows] >= 0).sum(1)
    for n in lengths.unique().tolist():
        if n:
            yield n, rows[lengths == n]


def null_of(n: int, settings: Settings) -> kernel.OrderNull | None:
    """Deciles of n core-tokens and their permutations; None where there are fewer tokens than deciles."""
    if n < kernel.N_GROUPS:
        return None
    order = random.permutations(settings.seed, random.PROXIMITY_ORDER, n, settings.n_permutations, settings.layer, n)
    return kernel.order_null(kernel.groups_of(n), order)


def scored(
    near: Float64[Tensor, "G n P"], counted: Bool[Tensor, "G P"], null: kernel.OrderNull | None, settings: Settings
) -> tuple[Float64[Tensor, "G n"], Scores, Float64[Tensor, "G P"]]:
    """Dimensional proximities of neurons with n core-tokens each, what they come to, and the component's loadings."""
    values = kernel.dimensional(near, counted)
    component = kernel.first_component(near, counted)
    if null is None:
        h, p, tau = _nan(3, len(near))
        deciles = _nan(len(near), kernel.N_GROUPS)
    else:
        h, p = kernel.kruskal(values, null)
        deciles = kernel.group_means(values, null.group)
        tau = kernel.tau(deciles)
    difference = kernel.difference(values, settings.n_ends)
    scores = Scores(difference, h, p, deciles, tau, component.share, component.agreeing)
    return values, scores, component.loadings


def no_scores(*shape: int) -> Scores:
    """Scores to be filled in: nothing but NaN."""
    deciles = _nan(*shape, kernel.N_GROUPS)
    difference, h, p, tau, first, agreeing = (_nan(*shape) for _ in range(6))
    return Scores(difference, h, p, deciles, tau, first, agreeing)


def centred(embeddings: Float[Tensor, "T d"]) -> Float64[Tensor, "T d"]:
    """Embeddings less their mean over the kept tokens.

    Input embeddings share a large common part, in which what they have in common with each other drowns.
    """
    return embeddings.double() - embeddings.double().mean(0)


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)
