"""Each control breaks what it says and nothing else; planted models in which the truth is known."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from polyray.categorical import controls as stage
from polyray.categorical.connect import connect
from polyray.categorical.controls import CONTROLS, Part, World, controls, frequency_deciles, stand_ins
from polyray.categorical.count import Kept
from polyray.categorical.mine import LayerSums, core_tokens
from polyray.categorical.overlap import overlap, qualify
from polyray.categorical.proximity import Scores, Settings, Targets, proximity
from polyray.errors import ConfigError
from polyray.kernels import proximity as kernel
from polyray.kernels.tokens import SCALE

SETTINGS = Settings(seed=0, layer=5, n_permutations=199, n_draws=2)


class Swept(NamedTuple):
    """One layer through all stages."""

    targets: Targets
    scores: Scores
    world: World


def swept(
    embeddings: Tensor, before: Tensor, own: Tensor, w: tuple[Tensor, Tensor, Tensor], settings: Settings
) -> Swept:
    """From embeddings [T, d], mean activations of two layers [T, M], [T, N] and weights to proximity."""
    n_tokens = len(embeddings)
    g = torch.Generator().manual_seed(9)
    counts = torch.randint(5, 500, (n_tokens,), generator=g)
    kept = Kept(torch.arange(n_tokens), counts, torch.arange(n_tokens))

    def core_of(layer: int, means: Tensor) -> Tensor:
        sums = (means.double() * SCALE).round().long() * counts[:, None]
        none = torch.zeros(means.shape[1], dtype=torch.bool)
        return core_tokens(LayerSums(sums, none), kept, layer, 0).core

    first, second = core_of(0, before), core_of(1, own)
    precursors = connect(*w, 10, settings.seed, settings.layer).precursor
    shared = overlap(second, first, precursors, n_tokens)
    counted, enough = qualify(shared.size)
    found = proximity(second, shared.taken, embeddings, settings)
    at = enough.nonzero().flatten()
    targets = Targets(at, second[at], shared.taken[at], counted[at], precursors[at])
    return Swept(targets, Scores(*(x[at] for x in found.scores)), World(embeddings, frequency_deciles(counts), first))


def planted(n_targets: int = 60, d: int = 64) -> Swept:
    """Targets that converge on the categories of their three precursors, and on nothing that others share with them.

    Of each target's own 100 tokens the ten of highest activation lie between categories A, B and C, those of ranks 10
    to 39 in one of them; D, E and F at ranks 40 to 69 are as coherent, but no token of either end is near to them. A,
    B and C are core-tokens of its precursors, D, E and F of neurons that do not drive it.
    """
    g = torch.Generator().manual_seed(0)
    n_tokens = n_targets * 100 + 3000
    embeddings = torch.randn(n_tokens, d, generator=g) / d**0.5
    own = torch.rand(n_tokens, n_targets, generator=g) * 0.1
    before = torch.rand(n_tokens, 6 * n_targets, generator=g) * 0.1
    before[: n_targets * 100] = 0.0  # the rest of every core are tokens of no target
    w_in = torch.full((6 * n_targets, n_targets), -1.0)
    for j in range(n_targets):
        tokens = j * 100 + torch.randperm(100, generator=g)
        own[tokens, j] = torch.linspace(3, 1, 100)
        axes = torch.linalg.qr(torch.randn(d, 6, generator=g)).Q.T
        for k in range(6):
            members = tokens[10 + 10 * k : 20 + 10 * k]
            embeddings[members] = axes[k] + 0.3 * embeddings[members]
            before[members, 6 * j + k] = 2.0
        embeddings[tokens[:10]] += axes[:3].sum(0)
        w_in[6 * j : 6 * j + 3, j] = 1.0
    gain = torch.full((6 * n_targets,), 2.0)
    return swept(embeddings, before, own, (torch.eye(6 * n_targets), gain, w_in / 2), SETTINGS)


def test_planted_categories_are_found_and_the_controls_are_chance() -> None:
    model = planted()
    n = len(model.targets)
    assert n == 60
    assert model.targets.taken.sum(2)[model.targets.counted].tolist() == [10] * 180
    assert (model.scores.difference > 0).double().mean() == 1
    assert (model.scores.p < 0.05).double().mean() == 1
    names = ["order", "precursors_matched", "tokens_same_frequency", "embeddings_same_frequency"]
    found = controls(model.targets, model.world, SETTINGS, names)
    for name in names:
        share = float((found[name].scores.difference > 0).double().mean())
        assert 0.3 < share < 0.7, name
    assert found["precursors_matched"].qualifies.all(), "others share as many tokens with each target"
    random = controls(model.targets, model.world, SETTINGS, ["precursors_random"])["precursors_random"]
    assert not random.qualifies.any()
    assert random.scores.difference.isnan().double().mean() > 0.8, "most neurons share no token with the target"


def test_a_linear_read_out_has_the_effect_without_connections_or_clusters() -> None:
    g = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2500, 48, generator=g)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    directions = torch.nn.functional.normalize(torch.randn(48, 200, generator=g), dim=0)
    own = unit @ directions[:, :40]
    before = unit @ (directions[:, torch.arange(120) % 40] + 0.1 * torch.randn(48, 120, generator=g))
    w = torch.zeros(120, 40)
    w[torch.arange(120), torch.arange(120) % 40] = 1.0
    model = swept(embeddings, before, own, (torch.eye(120), torch.ones(120), w), SETTINGS)
    assert len(model.targets) == 40
    found = controls(model.targets, model.world, SETTINGS)
    share = {name: float((c.scores.difference > 0).double().mean()) for name, c in found.items()}
    assert (model.scores.difference > 0).double().mean() > 0.9
    assert min(share[n] for n in ("members", "members_same_activation", "whole_core", "directions", "strangers")) > 0.9
    broken = ("order", "embeddings_same_frequency", "tokens_same_frequency", "centre_removed")
    assert max(abs(share[n] - 0.5) for n in broken) < 0.25


def small(n_targets: int = 5, n: int = 40, T: int = 400, M: int = 30) -> tuple[Targets, World]:
    g = torch.Generator().manual_seed(0)
    core = torch.stack([torch.randperm(T, generator=g)[:n] for _ in range(n_targets)])
    before = torch.stack([torch.randperm(T, generator=g)[:n] for _ in range(M)])
    for i in range(M):  # up to half of it are core-tokens of one target
        taken_over = core[i % n_targets, torch.randperm(n, generator=g)[: n // 2]]
        others = before[i][~torch.isin(before[i], taken_over)]
        before[i] = torch.cat([taken_over, others])[:n]
    precursor = torch.stack([torch.randperm(M, generator=g)[:6] for _ in range(n_targets)])
    taken = overlap(core, before, precursor, T).taken
    targets = Targets(torch.arange(n_targets) + 3, core, taken, taken.sum(2) >= 6, precursor)
    counts = torch.randint(5, 60, (T,), generator=g)
    return targets, World(torch.randn(T, 9, generator=g), frequency_deciles(counts), before)


def part_of(targets: Targets, world: World) -> Part:
    cosine = kernel.cosines(world.embeddings, targets.core, targets.core)
    return Part(targets, cosine, kernel.proximity(cosine, targets.taken))


def test_order_permutes_and_within_frequency_stays_there() -> None:
    targets, world = small()
    part = part_of(targets, world)
    marked = part._replace(near=torch.arange(40.0).double()[None, :, None].expand(5, 40, 6).contiguous())
    moved = stage.order(marked, world, SETTINGS, 0).near[:, :, 0].long()
    assert (moved.sort(1).values == torch.arange(40)).all()
    assert (moved != torch.arange(40)).double().mean() > 0.8
    assert not torch.equal(moved, stage.order(marked, world, SETTINGS, 1).near[:, :, 0].long())
    assert not torch.equal(moved[0], moved[1])
    moved = stage.order_same_frequency(marked, world, SETTINGS, 0).near[:, :, 0].long()
    assert (moved.sort(1).values == torch.arange(40)).all()
    assert (moved != torch.arange(40)).double().mean() > 0.5
    for j in range(5):
        stratum = world.stratum[targets.core[j]]
        ranked = sorted(range(40), key=lambda i: (int(stratum[i]), int(targets.core[j, i])))
        group = {place: r * 10 // 40 for r, place in enumerate(ranked)}
        assert all(group[i] == group[int(moved[j, i])] for i in range(40))


def test_members_keep_sizes_and_overlaps() -> None:
    targets, world = small()
    for control, decile in ((stage.members, False), (stage.members_same_activation, True)):
        seen: list[Tensor] = []

        def remember(cosine: Tensor, clusters: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(clusters)
            return torch.zeros(5, 40, 6, dtype=torch.float64)

        part = part_of(targets, world)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage.kernel, "proximity", remember)
            control(part, world, SETTINGS, 0)
        (clusters,) = seen
        together = targets.taken.double() @ targets.taken.double().transpose(1, 2)
        assert torch.equal(clusters.double() @ clusters.double().transpose(1, 2), together)
        assert not torch.equal(clusters, targets.taken)
        by_decile = [x.view(5, 6, 10, 4).sum(3) for x in (clusters, targets.taken)]
        assert torch.equal(*by_decile) == decile


def test_matched_precursors_are_the_nearest_in_size_and_distinct() -> None:
    targets, world = small()
    chosen: list[Tensor] = []

    def remember(core: Tensor, before: Tensor, precursors: Tensor, n_tokens: int) -> object:
        chosen.append(precursors)
        return overlap(core, before, precursors, n_tokens)

    for control in (stage.precursors_matched, stage.precursors_random):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "overlap", remember)
            control(part_of(targets, world), world, SETTINGS, 0)
    matched, unmatched = chosen
    for j in range(5):
        own = set(targets.precursor[j].tolist())
        sizes = [len(set(targets.core[j].tolist()) & set(b.tolist())) for b in world.before]
        free = set(range(30)) - own
        for p in range(6):
            i = int(matched[j, p])
            if not targets.counted[j, p]:
                assert i == -1
                continue
            wanted = int(targets.taken[j, p].sum())
            assert i in free
            assert abs(sizes[i] - wanted) == min(abs(sizes[k] - wanted) for k in free)
            free.remove(i)
        assert len(set(unmatched[j].tolist())) == 6
        assert not own & set(unmatched[j].tolist())


def test_stand_ins_are_of_the_same_frequency_distinct_and_no_core_tokens() -> None:
    targets, world = small()
    core = torch.cat([targets.core, torch.full((5, 0), -1)], 1)
    found = stand_ins(core, targets.neuron, world.stratum, SETTINGS, 0)
    for j in range(5):
        assert (found[j] >= 0).all()
        assert len(set(found[j].tolist())) == 40
        assert not set(found[j].tolist()) & set(core[j].tolist())
        assert torch.equal(world.stratum[found[j]], world.stratum[core[j]])
    assert not torch.equal(found, stand_ins(core, targets.neuron, world.stratum, SETTINGS, 1))
    alone = stand_ins(core[2:3], targets.neuron[2:3], world.stratum, SETTINGS, 0)
    assert torch.equal(alone, found[2:3]), "a neuron does not depend on the others"
    everything = torch.arange(400)[None, :]
    assert (stand_ins(everything, torch.zeros(1, dtype=torch.int64), world.stratum, SETTINGS, 0) == -1).all()
    most = torch.arange(390)[None, :]
    left = stand_ins(most, torch.zeros(1, dtype=torch.int64), world.stratum, SETTINGS, 0)
    assert set(left[left >= 0].tolist()) == set(range(390, 400)), "all that are left are used"


def test_stand_ins_are_drawn_evenly() -> None:
    stratum = torch.zeros(60, dtype=torch.int64)
    core = torch.arange(20)[None, :].expand(3, -1)
    n = torch.zeros(60)
    for r in range(300):
        n += torch.bincount(stand_ins(core, torch.arange(3), stratum, SETTINGS, r)[:, :10].flatten(), minlength=60)
    assert n[:20].sum() == 0
    assert n[20:].min() > 0.7 * 225
    assert n[20:].max() < 1.3 * 225


def test_frequency_deciles() -> None:
    counts = torch.tensor([5, 100, 7, 7, 30, 9, 8, 50, 6, 20])
    assert frequency_deciles(counts).tolist() == [0, 9, 2, 3, 7, 5, 4, 8, 1, 6]
    assert torch.bincount(frequency_deciles(torch.full((25,), 5))).tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 3, 2]


def test_swapped_embeddings_stay_within_their_frequency() -> None:
    targets, world = small()
    asked: list[Tensor] = []
    real = kernel.cosines

    def remember(embeddings: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        asked.append(rows)
        return real(embeddings, rows, columns)

    part = part_of(targets, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.kernel, "cosines", remember)
        stage.embeddings_same_frequency(part, world, SETTINGS, 0)
    (rows,) = asked
    assert torch.equal(world.stratum[rows], world.stratum[targets.core])
    assert (rows != targets.core).double().mean() > 0.8
    for a in range(5):
        for b in range(5):  # one swap for all neurons
            same = targets.core[a][:, None] == targets.core[b][None, :]
            assert torch.equal(rows[a][:, None] == rows[b][None, :], same)


def test_chunks_and_other_controls_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, world = small()
    whole = controls(targets, world, SETTINGS)
    assert list(whole) == list(CONTROLS)
    monkeypatch.setattr(stage, "_CHUNK", 2)
    cut = controls(targets, world, SETTINGS, ["directions", "tokens_same_frequency", "precursors_matched"])
    for name, control in cut.items():
        assert torch.equal(control.qualifies, whole[name].qualifies)
        for a, b in zip(control.scores[:5], whole[name].scores[:5], strict=True):
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)), name


def test_ragged_targets_and_missing_neurons() -> None:
    targets, world = small()
    core, taken = targets.core.clone(), targets.taken.clone()
    core[1, 30:] = -1
    taken[1, :, 30:] = False
    ragged = dataclasses.replace(targets, core=core, taken=taken, counted=taken.sum(2) >= 6)
    whole, found = controls(targets, world, SETTINGS), controls(ragged, world, SETTINGS)
    for name, control in found.items():
        assert not control.scores.difference[:, 1].isnan().any(), name
        same = torch.tensor([0, 2, 3, 4])
        assert torch.equal(control.scores.difference[:, same], whole[name].scores.difference[:, same]), name
    empty = targets.rows(torch.zeros(0, dtype=torch.int64), 40)
    assert controls(empty, world, SETTINGS, ["order"])["order"].scores.difference.shape == (2, 0)
    few = dataclasses.replace(world, before=world.before[:6])
    alone = dataclasses.replace(targets, precursor=torch.arange(6).expand(5, -1))
    for name, control in controls(alone, few, SETTINGS, ["precursors_matched", "precursors_random"]).items():
        assert control.scores.difference.isnan().all(), f"{name}: every neuron is a precursor"
        assert not control.qualifies.any()


def test_an_unknown_control_is_refused() -> None:
    targets, world = small()
    with pytest.raises(ConfigError, match=r"unknown control 'membres'\. Did you mean 'members'"):
        controls(targets, world, SETTINGS, ["membres"])


def test_directions_have_the_tokens_of_largest_projection() -> None:
    targets, world = small()
    part = part_of(targets, world)
    rows: list[Tensor] = []
    real = kernel.cosines

    def remember(embeddings: Tensor, core: Tensor, columns: Tensor) -> Tensor:
        rows.append(core)
        return real(embeddings, core, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.kernel, "cosines", remember)
        stage.directions(part, world, SETTINGS, 0)
    unit = torch.nn.functional.normalize(world.embeddings.double(), dim=1).numpy()
    for core in rows[0].tolist():
        # Some direction has these tokens in this order: the first lies further along it than all others.
        v = np.linalg.lstsq(unit[core], np.linspace(1, 0, 40), rcond=None)[0]
        assert (unit @ v)[core].mean() > np.sort(unit @ v)[-80:].mean() * 0.8
        assert len(set(core)) == 40
    assert rows[0][0].tolist() != rows[0][1].tolist()
