"""What does it take for tokens of high activation to be near to the taken-clusters?

Place in the flow: beside proximity. Each control breaks one thing and leaves the rest as it is, over the same
qualifying neurons: what survives did not depend on what was broken. No share of positive differences is shown without
them. The paper has none; all are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from polyray.categorical.overlap import all_sizes, overlap
from polyray.categorical.proximity import Scores, Settings, Targets, by_length, no_scores, null_of, scored
from polyray.errors import ConfigError, nearest
from polyray.kernels import proximity as kernel
from polyray.kernels import random

_CHUNK = 128
"""Neurons at a time, as in `proximity`."""
_TOP = 2**33
"""Above every hash: what sizes are multiplied by, so that hashes break their ties."""


@dataclass(frozen=True)
class World:
    """What a layer's controls draw from."""

    embeddings: Float[Tensor, "T d"]
    stratum: Int64[Tensor, " T"]
    """Frequency decile of every token, 0 the rarest."""
    before: Int64[Tensor, "M C"]
    """Core-tokens of the layer before."""


class Part(NamedTuple):
    """Some targets with n core-tokens each, and what is known of them."""

    targets: Targets
    cosine: Float64[Tensor, "G n n"]
    near: Float64[Tensor, "G n P"]


class Drawn(NamedTuple):
    """What a control makes of them."""

    near: Float64[Tensor, "G n P"]
    counted: Bool[Tensor, "G P"]
    """Which clusters count."""
    size: Int64[Tensor, "G P"]
    """Tokens of each cluster."""


class Control(NamedTuple):
    """One control: R draws over G targets."""

    name: str
    scores: Scores
    """As in `proximity`, each with the draw before the target: [R, G]."""
    qualifies: Bool[Tensor, "R G"]
    """Whether the clusters that the control makes would qualify the target."""


def order(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Activation order permuted: does the order matter at all?"""
    return _kept(part, _reordered(part.near, _shuffle(part, settings, draw, 0)))


def order_same_frequency(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Order permuted among core-tokens of about equal frequency: does it take more than frequency?

    Equal: in the same tenth of the neuron's own core-tokens by frequency decile, which ties leave in order of tokens.
    """
    tokens = part.targets.core
    by_frequency = (world.stratum[tokens] * len(world.stratum) + tokens).argsort(dim=1)
    group = torch.arange(tokens.shape[1]) * kernel.N_GROUPS // max(tokens.shape[1], 1)
    within = (_noise(part, settings, draw, 1) + group[None, :]).argsort(dim=1)
    place = torch.empty_like(by_frequency).scatter_(1, by_frequency, by_frequency.gather(1, within))
    return _kept(part, _reordered(part.near, place))


def precursors_matched(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Each taken-cluster by one with a neuron that is no precursor, of the size nearest to it; each such neuron once.

    Does it take the connections?
    """
    targets = part.targets
    sizes = torch.from_numpy(all_sizes(targets.core, world.before, len(world.stratum))).long()
    key = _of_precursors(targets, len(world.before), settings, draw)
    free = key >= 0
    chosen = torch.full_like(targets.precursor, -1)
    wanted = targets.taken.sum(2)
    for p in range(chosen.shape[1]):
        away = torch.where(free, (sizes - wanted[:, p : p + 1]).abs() * _TOP + key, torch.iinfo(torch.int64).max)
        best = away.argmin(1)
        use = targets.counted[:, p] & free.any(1)
        chosen[:, p] = torch.where(use, best, -1)
        free[use, best[use]] = False
    taken = overlap(targets.core, world.before, chosen, len(world.stratum)).taken
    return Drawn(kernel.proximity(part.cosine, taken), taken.any(2), taken.sum(2))


def precursors_random(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """As many neurons that are no precursors, whatever the size of the overlap; every overlap counts."""
    targets = part.targets
    key = _of_precursors(targets, len(world.before), settings, draw)
    key = torch.where(key >= 0, key, torch.iinfo(torch.int64).max)
    n = min(targets.precursor.shape[1], key.shape[1])
    best = key.topk(n, dim=1, largest=False)
    chosen = torch.where(best.values < torch.iinfo(torch.int64).max, best.indices, -1)
    taken = overlap(targets.core, world.before, chosen, len(world.stratum)).taken
    return Drawn(kernel.proximity(part.cosine, taken), taken.any(2), taken.sum(2))


def members(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Each taken token by another of the neuron's core-tokens, one for one: does it take these tokens?"""
    moved = _shuffle(part, settings, draw, 2)
    return _kept(part, kernel.proximity(part.cosine, _relabelled(part.targets.taken, moved)))


def members_same_activation(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Likewise, but by one of the same decile of activation.

    Taken-clusters have more of the core-tokens of high activation: is that all there is to them?
    """
    n = part.targets.core.shape[1]
    group = torch.arange(n) * kernel.N_GROUPS // n
    moved = (_noise(part, settings, draw, 3) + group[None, :]).argsort(dim=1)
    return _kept(part, kernel.proximity(part.cosine, _relabelled(part.targets.taken, moved)))


def whole_core(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """All core-tokens as the one cluster: does it take clusters?"""
    everything = torch.ones(len(part.targets), 1, part.targets.core.shape[1], dtype=torch.bool)
    return Drawn(kernel.proximity(part.cosine, everything), everything[:, :, 0], everything.sum(2))


def strangers(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Proximity of tokens to the clusters that they are not in: does it take membership?"""
    return _kept(part, torch.where(part.targets.taken.transpose(1, 2), torch.nan, part.near))


def centre_removed(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """The mean direction of the neuron's core-tokens taken out of their embeddings: is it more than one dimension?

    Where proximity is high because a token lies further along the one direction that all core-tokens have in common,
    nothing is left; nearness to particular clusters stays.
    """
    return _kept(part, kernel.proximity(kernel.without_centre(part.cosine), part.targets.taken))


def tokens_same_frequency(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Each taken token by a token of the same frequency decile that is no core-token: does it take core-tokens?"""
    instead = stand_ins(part.targets.core, part.targets.neuron, world.stratum, settings, draw)
    taken = part.targets.taken & (instead >= 0)[:, None, :]
    cosine = kernel.cosines(world.embeddings, part.targets.core, instead)
    return Drawn(kernel.proximity(cosine, taken, own=False), part.targets.counted & taken.any(2), taken.sum(2))


def embeddings_same_frequency(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Each token's embedding by that of another of the same frequency decile.

    Does it take that activation follows the embedding? Clusters, order and frequencies stay as they are.
    """
    n_tokens = len(world.stratum)
    noise = random.uniform(settings.seed, random.PROXIMITY_TOKENS, torch.arange(n_tokens), draw, settings.layer, 1)
    place = world.stratum.argsort(stable=True)
    swapped = torch.empty_like(place).scatter_(0, place, (noise + world.stratum).argsort())
    other = swapped[part.targets.core]
    return _kept(part, kernel.proximity(kernel.cosines(world.embeddings, other, other), part.targets.taken))


def directions(part: Part, world: World, settings: Settings, draw: int) -> Drawn:
    """Core-tokens of a random direction of the embedding space; clusters at the same ranks as the neuron's.

    A neuron that is nothing but a projection of the embedding, on a direction that nothing has learned: does it take
    a network? What it has is what the geometry of any linear read-out gives.
    """
    n = part.targets.core.shape[1]
    unit = world.embeddings.double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    coordinate = torch.arange(unit.shape[1])[None, :]
    word = part.targets.neuron[:, None]
    v = random.normal(settings.seed, random.PROXIMITY_DIRECTIONS, word, coordinate, draw, settings.layer)
    # Ties are tokens of equal embedding, for which the order is of no consequence.
    core = (v @ unit.T).nan_to_num(-torch.inf).topk(n, dim=1).indices
    return _kept(part, kernel.proximity(kernel.cosines(world.embeddings, core, core), part.targets.taken))


CONTROLS: dict[str, Callable[[Part, World, Settings, int], Drawn]] = {
    f.__name__: f
    for f in (
        order, precursors_matched, precursors_random, tokens_same_frequency, members, members_same_activation,
        whole_core, strangers, centre_removed, order_same_frequency, embeddings_same_frequency, directions,
    )
}  # fmt: skip
"""Every control by name; the first four are those of the method."""
FIXED = ("whole_core", "strangers", "centre_removed")
"""Controls that draw nothing, so that one draw is all."""


def controls(
    targets: Targets, world: World, settings: Settings, names: Sequence[str] = tuple(CONTROLS)
) -> dict[str, Control]:
    """Controls over some targets.

    Args:
        targets: neurons that qualify.
        world: what is drawn from.
        settings: the settings of `proximity`.
        names: which of `CONTROLS`.

    Raises:
        ConfigError: a name is not known.
    """
    for name in names:
        if name not in CONTROLS:
            raise ConfigError(f"unknown control {name!r}.{nearest(name, CONTROLS)}")
    out = {}
    for name in names:
        shape = (1 if name in FIXED else settings.n_draws, len(targets))
        out[name] = Control(name, no_scores(*shape), torch.zeros(shape, dtype=torch.bool))
    for n, at in by_length(targets.core, torch.arange(len(targets))):
        null = null_of(n, settings)
        for some in at.split(_CHUNK):
            own = targets.rows(some, n)
            cosine = kernel.cosines(world.embeddings, own.core, own.core)
            part = Part(own, cosine, kernel.proximity(cosine, own.taken))
            for name, control in out.items():
                for r in range(len(control.qualifies)):
                    drawn = CONTROLS[name](part, world, settings, r)
                    _, scores, _ = scored(drawn.near, drawn.counted, null, settings)
                    for whole, piece in zip(control.scores, scores, strict=True):
                        whole[r, some] = piece
                    wide = drawn.counted & (drawn.size >= settings.min_tokens)
                    control.qualifies[r, some] = wide.sum(1) >= settings.min_clusters
    return out


def frequency_deciles(counts: Int64[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Decile of every token by how often it occurs, 0 the rarest; equal counts are in the order of their ids."""
    rank = torch.empty_like(counts).scatter_(0, counts.argsort(stable=True), torch.arange(len(counts)))
    return rank * kernel.N_GROUPS // max(len(counts), 1)


def stand_ins(
    core: Int64[Tensor, "G n"],
    neurons: Int64[Tensor, " G"],
    stratum: Int64[Tensor, " T"],
    settings: Settings,
    draw: int,
) -> Int64[Tensor, "G n"]:
    """For each core-token another token of its stratum that is no core-token of the neuron, each at most once.

    Tokens of a stratum stand in one random order, the same for all neurons; a neuron takes those that follow a random
    place of its own. −1 where the stratum has too few.
    """
    noise = random.uniform(settings.seed, random.PROXIMITY_TOKENS, torch.arange(len(stratum)), draw, settings.layer, 0)
    shuffled = (noise + stratum).argsort()
    n_in = torch.bincount(stratum, minlength=int(stratum.max()) + 1)
    start = n_in.cumsum(0) - n_in
    out = torch.full_like(core, -1)
    mine = stratum[core]
    for s in mine.unique().tolist():
        size = int(n_in[s])
        wanted = mine == s
        # Of so many successive tokens at least as many as are wanted are no core-tokens, if the stratum has them.
        width = min(size, 2 * int(wanted.sum(1).max()))
        at = random.uniform(settings.seed, random.PROXIMITY_TOKENS, neurons, draw, settings.layer, 2 + s) * size
        window = shuffled[start[s] + (at.long()[:, None] + torch.arange(width)[None, :]) % size]
        usable = ~(window[:, :, None] == torch.where(wanted, core, -1)[:, None, :]).any(2)
        order_of = torch.where(usable, usable.cumsum(1) - 1, width)
        by_turn = torch.full((len(core), width + 1), -1).scatter_(1, order_of, window)
        by_turn[:, width] = -1
        turn = (wanted.cumsum(1) - 1).clamp(min=0, max=width)
        out = torch.where(wanted, by_turn.gather(1, turn), out)
    return out


def _kept(part: Part, near: Float64[Tensor, "G n P"]) -> Drawn:
    """Other proximities to clusters as large as they are."""
    return Drawn(near, part.targets.counted, part.targets.taken.sum(2))


def _of_precursors(targets: Targets, n_before: int, settings: Settings, draw: int) -> Int64[Tensor, "G M"]:
    """A hash for every neuron of the layer before; −1 of the target's precursors."""
    everyone = torch.arange(n_before)[None, :]
    word = targets.neuron[:, None]
    key = random.bits(settings.seed, random.PROXIMITY_PRECURSORS, word, everyone, draw, settings.layer)
    known = targets.precursor >= 0
    precursor = torch.zeros(len(targets), n_before + 1, dtype=torch.bool)
    precursor.scatter_(1, torch.where(known, targets.precursor, n_before), True)
    return torch.where(precursor[:, :n_before], -1, key)


def _noise(part: Part, settings: Settings, draw: int, what: int) -> Float64[Tensor, "G n"]:
    n = torch.arange(part.targets.core.shape[1])[None, :]
    word = part.targets.neuron[:, None]
    return random.uniform(settings.seed, random.PROXIMITY_MEMBERS, word, n, 4 * draw + what, settings.layer)


def _shuffle(part: Part, settings: Settings, draw: int, what: int) -> Int64[Tensor, "G n"]:
    return _noise(part, settings, draw, what).argsort(dim=1)


def _reordered(near: Float64[Tensor, "G n P"], place: Int64[Tensor, "G n"]) -> Float64[Tensor, "G n P"]:
    return near.gather(1, place[:, :, None].expand_as(near))


def _relabelled(taken: Bool[Tensor, "G P n"], place: Int64[Tensor, "G n"]) -> Bool[Tensor, "G P n"]:
    return taken.gather(2, place[:, None, :].expand_as(taken))
