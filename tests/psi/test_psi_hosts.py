"""Who takes part in a swap and where: counted, and held against what chance alone would give."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from psi.samples import layer_info, layer_row, science
from scipy import stats

from polyray.kernels.effects import signed_rank_p
from polyray.psi.hosts import (
    NONE,
    Examples,
    Peaks,
    Places,
    Roles,
    Window,
    boxes,
    null_examples,
    null_swapped,
    places,
    roles,
    swapped,
    window,
)

PX, GRID = 64, 8
GRID_LAYER = layer_info(grid_h=GRID, grid_w=GRID)
"""Positions 8 px apart, from 4 px."""


def examples_of(sizes: list[int], seed: int = 0) -> Examples:
    """Clusters of these sizes, shuffled, in images 3, 10, 17, …"""
    rng = np.random.default_rng(seed)
    cluster = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(cluster)
    return Examples(3 + 7 * np.arange(n), rng.integers(0, GRID * GRID, n), cluster, rng.random(n))


def peaks_of(n: int, first: int = 5000, unfired: float = 0.0, seed: int = 1) -> Peaks:
    rng = np.random.default_rng(seed)
    position = np.where(rng.random(n) < unfired, NONE, rng.integers(0, GRID * GRID, n))
    return Peaks(np.arange(first, first + n), position)


def cast(examples: Examples, n_hosts: int = 6, neuron: int = 0, peaks: Peaks | None = None, **other: Any) -> Roles:
    words = {"seed": 0, "layer": "layer", "kind": "real"} | other
    return roles(examples, peaks_of(30) if peaks is None else peaks, n_hosts, neuron=neuron, **words)


def images(examples: Examples, peaks: Peaks, drawn: Roles) -> list[list[int]]:
    """Roles as images, host by host."""
    named = [np.where(i == NONE, NONE, examples.example[i]) for i in (drawn.host, drawn.aligned, drawn.other)]
    named.append(np.where(drawn.random == NONE, NONE, peaks.example[drawn.random]))
    return np.stack(named, axis=1).tolist()


def uniform_p(counts: NDArray[np.int64]) -> float:
    assert counts.min() >= 0
    assert counts.mean() >= 20
    return float(stats.chisquare(counts).pvalue)


# --- Roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "n_of"), [([50, 50], [10, 10]), ([40, 30, 30], [7, 7, 6]), ([70, 30], [10, 10])])
def test_all_roles_are_distinct_while_examples_last(sizes: list[int], n_of: list[int]) -> None:
    examples, peaks = examples_of(sizes), peaks_of(40)
    drawn = cast(examples, 20, peaks=peaks)
    assert np.bincount(examples.cluster[drawn.host]).tolist() == n_of
    np.testing.assert_array_equal(examples.cluster[drawn.aligned], examples.cluster[drawn.host])
    assert (examples.cluster[drawn.other] != examples.cluster[drawn.host]).all()
    taken = np.concatenate(drawn[:3])
    assert taken.min() >= 0
    assert len(set(taken.tolist())) == 60
    assert len(set(drawn.random.tolist())) == 20


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    n_hosts=st.integers(2, 25),
    neuron=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_what_holds_of_any_sizes(sizes: list[int], n_hosts: int, neuron: int) -> None:
    examples = examples_of(sizes, neuron)
    drawn = cast(examples, n_hosts, neuron)
    of, most = examples.cluster, [m // 2 for m in sizes]
    host, aligned, other = (x.tolist() for x in drawn[:3])
    assert len(host) == min(n_hosts, sum(most))
    n_of = [sum(of[h] == c for h in host) for c in range(len(sizes))]
    # As even as can be: who has less than the fullest by more than one can have no more.
    assert all(n == m or n >= max(n_of) - 1 for n, m in zip(n_of, most, strict=True))
    assert all(of[a] == of[h] for a, h in zip(aligned, host, strict=True))
    assert len(set(host + aligned)) == 2 * len(host)
    given_away = [o for o in other if o != NONE]
    assert len(set(host + aligned + given_away)) == 2 * len(host) + len(given_away), "nobody has two roles"
    idle = set(range(len(of))) - set(host) - set(aligned) - set(given_away)
    for h, o in zip(host, other, strict=True):
        assert o == NONE or of[o] != of[h]
        # Nobody goes without while somebody of another cluster is idle.
        assert o != NONE or all(of[i] == of[h] for i in idle)


def test_a_small_cluster_cannot_answer_for_many_hosts() -> None:
    """One donor against many hosts would make one difference of all of them, and p-values that are far too small."""
    examples = examples_of([97, 3])
    drawn = cast(examples, 20)
    assert np.bincount(examples.cluster[drawn.host]).tolist() == [19, 1]
    of_large = drawn.other[examples.cluster[drawn.host] == 0]
    left = set(np.flatnonzero(examples.cluster == 1).tolist()) - set(drawn.host.tolist()) - set(drawn.aligned.tolist())
    assert len(left) == 1
    assert of_large[of_large != NONE].tolist() == list(left), "once"


def test_a_cluster_of_one_has_no_host_but_gives_a_donor() -> None:
    examples = examples_of([9, 1])
    drawn = cast(examples, 6)
    alone = int(np.flatnonzero(examples.cluster == 1)[0])
    assert examples.cluster[drawn.host].tolist() == [0] * 4
    assert drawn.other.tolist() == [alone, NONE, NONE, NONE]


def test_one_cluster_has_no_donor_of_another_and_no_example_no_role() -> None:
    assert (cast(examples_of([12])).other == NONE).all()
    for sizes in ([0], [1, 1, 1]):
        assert [len(x) for x in cast(examples_of(sizes))] == [0] * 4
        nobody = examples_of(sizes)
        where = placed(nobody, cast(nobody))
        assert [x.shape for x in where] == [(0, 4)] * 6


def test_the_order_of_the_examples_does_not_matter() -> None:
    examples, peaks = examples_of([14, 9, 5]), peaks_of(30)
    known = images(examples, peaks, cast(examples, peaks=peaks))
    for seed in range(3):
        order, other_order = (np.random.default_rng(seed).permutation(n) for n in (28, 30))
        shuffled, drawn_from = Examples(*(x[order] for x in examples)), Peaks(*(x[other_order] for x in peaks))
        assert images(shuffled, drawn_from, cast(shuffled, peaks=drawn_from)) == known


def test_seed_layer_neuron_and_kind_each_draw_anew() -> None:
    examples = examples_of([30, 30])
    known = images(examples, peaks_of(30), cast(examples))
    assert images(examples, peaks_of(30), cast(examples)) == known
    for other in ({"seed": 1}, {"layer": "layer2"}, {"neuron": 1}, {"kind": "null"}):
        found = images(examples, peaks_of(30), cast(examples, **other))
        assert all(sum(a[i] == b[i] for a, b in zip(found, known, strict=True)) <= 2 for i in range(4))


def test_more_hosts_leave_who_is_host_of_each_cluster_first() -> None:
    examples = examples_of([30, 30])
    few, many = (cast(examples, n).host for n in (4, 12))
    assert set(few.tolist()) < set(many.tolist())


def test_a_random_image_is_nobody_s_who_has_a_role() -> None:
    examples = examples_of([14, 14])
    peaks = Peaks(examples.example.copy(), np.zeros(28, dtype=np.int64))
    for neuron in range(50):
        found = cast(examples, 6, neuron, peaks)
        assert (found.other != NONE).all()
        used = examples.example[np.concatenate(found[:3])]
        drawn = peaks.example[found.random]
        assert len(set(drawn.tolist())) == 6
        assert not set(used.tolist()) & set(drawn.tolist())


def test_few_random_images_serve_again_and_none_is_nobody() -> None:
    examples = examples_of([20, 20])
    assert sorted(Counter(cast(examples, 8, peaks=peaks_of(3)).random.tolist()).values()) == [2, 3, 3]
    assert (cast(examples, 8, peaks=peaks_of(0)).random == NONE).all()
    own = Peaks(examples.example.copy(), np.zeros(40, dtype=np.int64))
    hosts = cast(examples, 8, peaks=own).host
    only_hosts = Peaks(own.example[hosts], own.position[hosts])
    assert (cast(examples, 8, peaks=only_hosts).random == NONE).all()


def test_under_permuted_labels_roles_are_a_random_injection() -> None:
    """Which makes aligned and non_aligned exchangeable."""
    n, n_neurons = 12, 3000
    known = examples_of([5, 4, 3])
    rng = np.random.default_rng(5)
    triples = np.empty((n_neurons, 3, 3), dtype=np.int64)
    for neuron in range(n_neurons):
        drawn = cast(known._replace(cluster=rng.permutation(known.cluster)), 3, neuron)
        triples[neuron] = np.stack(drawn[:3], axis=1)
    for host in range(3):
        for role in range(3):
            assert uniform_p(np.bincount(triples[:, host, role], minlength=n)) > 1e-3
        for a, b in ((0, 1), (0, 2), (1, 2)):
            pairs = np.bincount(triples[:, host, a] * n + triples[:, host, b], minlength=n * n).reshape(n, n)
            assert (np.diag(pairs) == 0).all()
            assert uniform_p(pairs[~np.eye(n, dtype=bool)]) > 1e-3


@pytest.mark.parametrize("sizes", [[50, 50], [60, 20, 20], [80, 20], [90, 10], [97, 3], [99, 1], [88, 6, 6]])
def test_clusters_that_mean_nothing_give_no_small_p(sizes: list[int]) -> None:
    """The signed-rank test takes hosts for independent, and no roles may make it wrong."""
    known, peaks = examples_of(sizes), peaks_of(30)
    rng = np.random.default_rng(7)
    p = []
    for neuron in range(200):
        drawn = cast(known._replace(cluster=rng.permutation(known.cluster)), 20, neuron, peaks)
        given = drawn.other != NONE
        strength, noise = rng.normal(size=len(known.cluster)), 0.3 * rng.normal(size=given.sum())
        d = strength[drawn.aligned[given]] - strength[drawn.other[given]] + noise
        p.append(float(signed_rank_p(torch.from_numpy(d[None]), two_sided=True)[0]))
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 0.01


def test_within_a_cluster_every_member_is_as_likely_for_each_role() -> None:
    examples = examples_of([12, 10, 8])
    counts: dict[str, list[int]] = {"host": [], "aligned": [], "other": [], "random": []}
    for neuron in range(1500):
        for role, drawn in cast(examples, 3, neuron)._asdict().items():
            counts[role] += drawn.tolist()
    for role in ("host", "aligned", "other"):
        found = np.bincount(counts[role], minlength=30)
        assert all(uniform_p(found[examples.cluster == c]) > 1e-3 for c in range(3)), role
    assert uniform_p(np.bincount(counts["random"], minlength=30)) > 1e-3


def test_swapped_neurons_are_drawn_uniformly_and_null_neurons_among_them() -> None:
    swept = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    every = science(swap={})
    np.testing.assert_array_equal(swapped(every, "layer", swept), swept)
    np.testing.assert_array_equal(null_swapped(every, "layer", swept), swept)
    counts: Counter[int] = Counter()
    for seed in range(500):
        some = science(seed=seed, swap={"n_neurons": 6, "n_null": 2})
        chosen, nulls = swapped(some, "layer", swept), null_swapped(some, "layer", swept)
        assert len(set(chosen.tolist())) == 6
        assert (np.diff(chosen) > 0).all()
        assert len(nulls) == 2
        assert set(nulls.tolist()) < set(chosen.tolist()) < set(swept.tolist())
        np.testing.assert_array_equal(swapped(some, "layer", swept[::-1].copy()), chosen)
        counts.update(chosen.tolist())
    assert uniform_p(np.array([counts[n] for n in swept.tolist()])) > 1e-3
    assert len(swapped(science(swap={"n_neurons": 50}), "layer", swept)) == 10
    assert len(null_swapped(science(swap={"n_null": 0}), "layer", swept)) == 0


# --- Null neurons ---------------------------------------------------------------------------------------------------


def test_null_examples_are_images_that_fire_under_the_neuron_s_own_labels_permuted() -> None:
    examples, peaks = examples_of([9, 6, 5]), peaks_of(60, unfired=0.4)
    at = dict(zip(peaks.example.tolist(), peaks.position.tolist(), strict=True))
    first_label, first_image = [], []
    for neuron in range(600):
        found = null_examples(examples, peaks, 0, "layer", neuron)
        assert np.bincount(found.cluster).tolist() == [9, 6, 5]
        assert len(set(found.example.tolist())) == 20
        assert [at[i] for i in found.example.tolist()] == found.position.tolist()
        assert found.position.min() >= 0
        assert np.isnan(found.activation).all()
        first_label.append(found.cluster[0])
        first_image.append(found.example[0])
    assert stats.chisquare(np.bincount(first_label), [600 * 9 / 20, 600 * 6 / 20, 600 * 5 / 20]).pvalue > 1e-3
    fired = peaks.example[peaks.position != NONE]
    assert stats.chisquare([first_image.count(i) for i in fired]).pvalue > 1e-3


def test_the_order_of_the_examples_does_not_matter_to_a_null_neuron() -> None:
    examples, peaks = examples_of([9, 6, 5]), peaks_of(60)
    turned = Examples(*(x[::-1].copy() for x in examples))
    for a, b in zip(*(null_examples(x, peaks, 0, "layer", 0) for x in (examples, turned)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_neuron_that_rarely_fires_has_fewer_null_examples_or_none() -> None:
    examples = examples_of([9, 6, 5])
    few = Peaks(np.arange(100, 110), np.where(np.arange(10) < 7, 3, NONE))
    assert sorted(null_examples(examples, few, 0, "layer", 0).example) == list(range(100, 107))
    for nowhere in (Peaks(few.example, np.full(10, NONE)), peaks_of(0)):
        found = null_examples(examples, nowhere, 0, "layer", 0)
        assert [len(x) for x in found] == [0] * 4
        assert len(cast(found, peaks=nowhere, kind="null").host) == 0


# --- Places ---------------------------------------------------------------------------------------------------------


def placed(examples: Examples, drawn: Roles, peaks: Peaks | None = None, side: int = 12, **fields: Any) -> Places:
    """Places in a layer of 8 × 8 positions in an image of 64 px."""
    layer = layer_row(GRID_LAYER, side) | fields
    chosen = science(swap={"max_frac": 1.0})
    at = window(layer, PX, 1.0)
    return places(examples, peaks_of(30) if peaks is None else peaks, drawn, layer, at, chosen, 0, "real")


def inside(found: NDArray[np.int64]) -> bool:
    return bool((found[:, :2] >= 0).all() and (found[:, 2:] <= PX).all() and (found[:, :2] < found[:, 2:]).all())


def shares_a_pixel(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (np.maximum(a[:, :2], b[:, :2]) < np.minimum(a[:, 2:], b[:, 2:])).all(1)


def sizes_of(found: NDArray[np.int64]) -> NDArray[np.int64]:
    return found[:, 2:] - found[:, :2]


@pytest.mark.parametrize("side", [1, 7, 12, 25])
def test_places_lie_inside_the_image_and_elsewhere_beside_the_host_s_box(side: int) -> None:
    examples, peaks = examples_of([40, 40]), peaks_of(60)
    drawn = cast(examples, 26, peaks=peaks)
    where = placed(examples, drawn, peaks, side)
    assert all(inside(found) for name, found in where._asdict().items() if name != "elsewhere")
    # There is room exactly where a side of the image is far enough from the box.
    room = ((where.box[:, :2] >= sizes_of(where.box)) | (PX - where.box[:, 2:] >= sizes_of(where.box))).any(1)
    assert room.all() == (side < 25)
    np.testing.assert_array_equal(where.elsewhere[:, 0] != NONE, room)
    assert inside(where.elsewhere[room])
    assert not shares_a_pixel(where.box, where.elsewhere)[room].any()
    np.testing.assert_array_equal(sizes_of(where.elsewhere)[room], sizes_of(where.box)[room])
    np.testing.assert_array_equal(sizes_of(where.random_place), sizes_of(where.box))
    for found, chosen, at in (
        (where.box, drawn.host, examples.position),
        (where.aligned, drawn.aligned, examples.position),
        (where.other, drawn.other, examples.position),
        (where.random, drawn.random, peaks.position),
    ):
        # Around 4 + 8 i, clipped.
        starts = np.floor(4 + 8 * np.stack([at[chosen] % 8, at[chosen] // 8], 1) - side / 2 + 0.5).astype(int)
        expected = np.concatenate([np.maximum(starts, 0), np.minimum(starts + side, PX)], 1)
        np.testing.assert_array_equal(found, expected)


def test_at_the_corner_patch_and_place_are_as_small_as_the_clipped_box() -> None:
    examples = examples_of([10, 10])._replace(position=np.zeros(20, dtype=np.int64))
    where = placed(examples, cast(examples), side=20)
    assert (where.box == [0, 0, 14, 14]).all()
    assert (sizes_of(where.elsewhere) == 14).all()
    assert (sizes_of(where.random_place) == 14).all()


def test_where_there_is_no_room_nothing_else_is_lost() -> None:
    examples = examples_of([10, 10])
    middle = examples._replace(position=np.full(20, 3 * GRID + 3))
    where = placed(middle, cast(middle), side=40)
    assert (where.elsewhere == NONE).all()
    assert all(inside(found) for name, found in where._asdict().items() if name != "elsewhere")


def test_who_has_no_donor_has_no_place_in_it() -> None:
    alone = examples_of([12])
    where = placed(alone, cast(alone, peaks=peaks_of(0)), peaks_of(0))
    for nowhere in (where.other, where.random, where.random_place):
        assert (nowhere == NONE).all()
    assert all(inside(found) for found in (where.box, where.aligned, where.elsewhere))


def test_where_the_neuron_does_not_fire_every_position_is_as_likely() -> None:
    examples, silent = examples_of([40, 40]), peaks_of(60, unfired=1.0)
    layer, chosen = layer_row(GRID_LAYER, 8), science(swap={})
    corners, anywhere = [], []
    for neuron in range(80):
        drawn = cast(examples, 26, neuron, silent)
        where = places(examples, silent, drawn, layer, Window(8, 1, False), chosen, neuron, "real")
        corners += (where.random[:, 1] // 8 * 8 + where.random[:, 0] // 8).tolist()
        full = (sizes_of(where.random_place) == 8).all(1)
        anywhere += where.random_place[full].tolist()
    assert uniform_p(np.bincount(corners, minlength=64)) > 1e-3
    # 57 places in each direction, in three runs of 19.
    left, top, *_ = np.array(anywhere).T
    assert uniform_p(np.bincount(left // 19 * 3 + top // 19, minlength=9)) > 1e-3


# --- Windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "max_frac", "expected"),
    [
        (12, 0.4, Window(12, 1, False)),
        (25, 0.4, Window(25, 1, False)),
        (26, 0.4, Window(25, 1, True)),
        (128, 0.4, Window(25, 1, True)),
        (128, 1.0, Window(64, 1, True)),
        (5, 0.001, Window(1, 1, True)),
    ],
)
def test_windows_have_a_limit(side: int, max_frac: float, expected: Window) -> None:
    layer = layer_row(GRID_LAYER, side)
    assert window(layer, PX, max_frac) == expected
    found = boxes(layer, expected, np.arange(GRID * GRID), PX)
    assert inside(found)
    # From the middle of the map it is 28 and 32 px to the sides.
    assert sizes_of(found).max() == min(expected.side, 60)


@pytest.mark.parametrize(
    ("side", "max_frac", "n_patches", "reduced"),
    [
        (3, 1.0, 1, False),
        (8, 1.0, 1, False),
        (16, 1.0, 1, False),
        (24, 1.0, 3, False),
        (39, 1.0, 3, False),
        (40, 1.0, 5, False),
        (64, 0.4, 3, True),
        (20, 0.1, 1, True),
    ],
)
def test_tokens_see_an_odd_number_of_whole_patches(side: int, max_frac: float, n_patches: int, reduced: bool) -> None:
    layer = layer_row(GRID_LAYER, side) | {"layout": "tokens"}
    assert window(layer, PX, max_frac) == Window(8 * n_patches, 8, reduced)


@pytest.mark.parametrize("side", [8, 24, 40])
def test_boxes_and_places_of_tokens_are_on_their_grid(side: int) -> None:
    examples, peaks = examples_of([40, 40]), peaks_of(60, unfired=0.3)
    drawn = cast(examples, 26, peaks=peaks)
    where = placed(examples, drawn, peaks, side, layout="tokens")
    for found in where:
        assert (found[found[:, 0] != NONE] % 8 == 0).all()
    some = where.elsewhere[:, 0] != NONE
    assert some.any()
    assert not shares_a_pixel(where.box[some], where.elsewhere[some]).any()
    at = examples.position[drawn.host]
    border = np.isin(at % 8, (0, 7)) | np.isin(at // 8, (0, 7))
    assert ((sizes_of(where.box) < side).any(1) >= border * (side > 8)).all()


def test_tokens_off_their_grid_are_treated_as_maps() -> None:
    off = layer_row(GRID_LAYER, 12) | {"layout": "tokens"}
    assert window(off | {"center_x_px": 3.0}, PX, 1.0) == Window(12, 1, False)
    for center in (0.0, 32.0):
        assert window(off | {"stride_px": 0.0, "center_x_px": center}, PX, 1.0) == Window(12, 1, False)
