"""Index, mine, merge: every mined row against a full sort in plain Python, whatever the ranges were."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EDGE_NEURONS
from numpy.typing import NDArray
from PIL import Image
from psi.samples import (
    EDGE_LAYERS,
    FakeProbe,
    FakeSubject,
    column,
    edge_subject,
    images_of,
    layer_info,
    noise_pictures,
    numbered_pictures,
    science,
    subject_of,
)
from scipy import stats
from torch import nn
from torch.nn import functional as F

from polyray.config import ImageFolder, Science
from polyray.errors import StoreError
from polyray.kernels import random, topk
from polyray.models.layers import LayerInfo
from polyray.models.vision import Subject
from polyray.probes.images import ProbeSet, open_probe, view
from polyray.psi.mine import Images, Mined, distinct_images, index, merge, mine
from polyray.psi.pool import Responses, pool_neurons, smallest_hashes
from polyray.settings import SwapConfig

pytestmark = pytest.mark.usefixtures("one_thread")

N = 80


@dataclass(frozen=True)
class Edge:
    """EdgeNet mined on 80 drawn pictures, and its responses as the network's own modules give them."""

    settings: Science
    subject: Subject
    probe: ProbeSet
    images: Images
    infos: dict[str, LayerInfo]
    maps: dict[str, NDArray[np.float32]]
    """[images, neurons, positions]: what ranks."""

    @property
    def neurons(self) -> dict[str, NDArray[np.int64]]:
        return {name: np.arange(info.width) for name, info in self.infos.items()}

    def mine(self, examples: range, neurons: dict[str, NDArray[np.int64]] | None = None) -> Mined:
        chosen = self.neurons if neurons is None else neurons
        return mine(self.subject, self.probe, self.settings, self.images, list(self.infos.values()), chosen, examples)

    def merged(self, name: str, ranges: Sequence[range]) -> tuple[pa.Table, pa.Table]:
        return merge([self.mine(r).parts[name] for r in ranges], self.settings, self.infos[name])


@pytest.fixture(scope="module")
def edge() -> Edge:
    chosen = science(mine={"K": 12, "K_keep": 16, "k_min": 6})
    subject, probe = edge_subject(chosen), open_probe(chosen.probe)
    rows, _ = index(probe, range(N))
    infos = {info.name: info for info in subject.readouts.layers(EDGE_LAYERS)}
    net = subject.module
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in EDGE_LAYERS}
    step = chosen.subject.micro_batch
    for start in range(0, N, step):
        views = np.stack([view(probe.read(i), 64, "crop") for i in range(start, start + step)])
        with torch.no_grad():
            stem = F.relu(net.norm(net.stem(subject.prepare(views))))
            mid = net.mid(stem)
            edges = net.edges(mid.clamp(0, 6))
            capped = net.capped(edges.nan_to_num())
            values = (stem, mid, edges, capped, net.signed(capped))
        for name, value in zip(EDGE_LAYERS, values, strict=True):
            maps[name].append(value.flatten(2))
    joined = {name: torch.cat(parts).contiguous().numpy() for name, parts in maps.items()}
    return Edge(chosen, subject, probe, distinct_images(rows), infos, joined)


def naive_mined(
    response: NDArray[np.float32],
    examples: Sequence[int],
    neurons: Sequence[int],
    layer: str,
    settings: Science,
    positive_only: bool,
) -> list[dict[str, object]]:
    """The method's words as a loop: sort everything, keep K_keep, count who ties with the last of the K."""
    rows: list[dict[str, object]] = []
    word = random.layer_word(layer)
    for c, neuron in enumerate(neurons):
        counted = []
        for i, example in enumerate(examples):
            value = float(response[i, c])
            if math.isfinite(value) and (value > 0 or not positive_only):
                h = int(random.tie_hash(settings.seed, word, torch.tensor(neuron), torch.tensor(example)))
                counted.append((-value, h, example))
        kept = sorted(counted)[: settings.mine.K_keep]
        last = kept[: settings.mine.K][-1][0] if kept else math.nan
        rows.append(
            {
                "neuron": neuron,
                "example": [example for _, _, example in kept],
                "response": [-value for value, _, _ in kept],
                "n_tied_at_cut": sum(value == last for value, _, _ in counted),
            }
        )
    return rows


def as_dicts(mined: pa.Table) -> list[dict[str, object]]:
    return mined.select(["neuron", "example", "response", "n_tied_at_cut"]).to_pylist()


@pytest.mark.parametrize("name", EDGE_LAYERS)
def test_mined_rows_are_those_of_a_full_sort(edge: Edge, name: str) -> None:
    mined, _ = edge.merged(name, [range(0, 13), range(13, 50), range(50, 50), range(50, N)])
    response = edge.maps[name].max(2)
    info = edge.infos[name]
    expected = naive_mined(response, range(N), range(info.width), name, edge.settings, info.activation is not None)
    assert as_dicts(mined) == expected
    assert any(row["example"] for row in expected)
    for row in mined.to_pylist():
        for example, position in zip(row["example"], row["position"], strict=True):
            assert position == int(edge.maps[name][example, row["neuron"]].argmax())


@pytest.mark.parametrize("name", EDGE_LAYERS)
def test_ranges_change_no_mined_row(edge: Edge, name: str) -> None:
    whole, whole_bins = edge.merged(name, [range(0, N)])
    cut, cut_bins = edge.merged(name, [range(0, 7), range(7, 30), range(30, 62), range(62, N)])
    assert whole.equals(cut)
    same = ["neuron", "n_images", "n_nonfinite", "positive_frac", "minimum", "maximum", "bins"]
    assert whole_bins.select(same).equals(cut_bins.select(same))
    for c in ("mean", "std"):  # sums of another order
        np.testing.assert_allclose(column(whole_bins, c), column(cut_bins, c), rtol=1e-12)


def test_distributions_are_those_of_numpy(edge: Edge) -> None:
    for name in EDGE_LAYERS:
        response = edge.maps[name].max(2)
        _, histograms = edge.merged(name, [range(0, 41), range(41, N)])
        for neuron, row in enumerate(histograms.to_pylist()):
            x = response[:, neuron]
            x = x[np.isfinite(x)].astype(np.float64)
            assert (row["n_images"], row["n_nonfinite"]) == (len(x), N - len(x))
            bins = np.bincount(np.searchsorted(topk.BIN_EDGES.numpy(), x, side="left"), minlength=76)
            assert row["bins"] == bins.tolist()
            assert sum(row["bins"]) == len(x)
            if not len(x):
                assert all(row[c] is None for c in ("mean", "std", "minimum", "maximum", "positive_frac"))
                continue
            assert row["positive_frac"] == np.mean(x > 0)
            assert (row["minimum"], row["maximum"]) == (x.min(), x.max())
            assert row["mean"] == pytest.approx(x.mean(), rel=1e-12)
            assert row["std"] == pytest.approx(x.std(), rel=1e-9, abs=1e-9)


def test_every_excluded_neuron_says_why(edge: Edge) -> None:
    rows = edge.merged("edges", [range(0, N)])[0].to_pylist()
    for name, reason in (("dead", "dead"), ("constant", "constant"), ("nan", "not finite")):
        row = rows[EDGE_NEURONS[name]]
        assert row["status"] == "excluded"
        assert row["reason"].startswith(reason)
    others = [r for i, r in enumerate(rows) if i not in (EDGE_NEURONS[n] for n in ("dead", "constant", "nan"))]
    assert {(r["status"], r["reason"]) for r in others} == {("ok", None)}
    assert rows[EDGE_NEURONS["dead"]]["example"] == []
    assert rows[EDGE_NEURONS["nan"]]["example"] == []


def test_twins_differ_only_in_how_ties_are_broken(edge: Edge) -> None:
    a, b = (edge.merged("edges", [range(0, N)])[0].to_pylist()[EDGE_NEURONS[t]] for t in ("twin_a", "twin_b"))
    assert len(set(a["response"])) == len(a["response"]), "a tie would make this test say nothing"
    assert {k: v for k, v in a.items() if k != "neuron"} == {k: v for k, v in b.items() if k != "neuron"}


def test_a_saturating_activation_is_ranked_by_its_input(edge: Edge) -> None:
    info = edge.infos["mid"]
    assert (info.activation, info.ranked_by) == ("relu6", "pre_activation")
    mined, histograms = edge.merged("mid", [range(0, N)])
    above = [r for row in mined.to_pylist() for r in row["response"] if r > 6]
    assert len(above) > 12
    assert column(histograms, "maximum").max() > 6
    assert column(mined, "n_tied_at_cut").max() == 1


def test_a_signed_layer_keeps_negative_responses(edge: Edge) -> None:
    mined, _ = edge.merged("signed", [range(0, N)])
    assert edge.maps["signed"].max() < 0
    assert all(len(row["example"]) == 16 and max(row["response"]) < 0 for row in mined.to_pylist())


def test_ties_beyond_a_range_s_list_are_counted(edge: Edge) -> None:
    response = edge.maps["capped"].max(2)[:, 0]
    n_at_ceiling = int((response == response.max()).sum())
    assert n_at_ceiling > 60
    for ranges in ([range(0, N)], [range(0, 40), range(40, N)], [range(i, i + 5) for i in range(0, N, 5)]):
        row = edge.merged("capped", ranges)[0].to_pylist()[0]
        assert row["n_tied_at_cut"] == n_at_ceiling


def test_a_choice_of_neurons_gives_the_same_rows(edge: Edge) -> None:
    chosen = {name: np.array([0, 3, 4]) for name in EDGE_LAYERS}
    part = edge.mine(range(0, N), chosen)
    for name in EDGE_LAYERS:
        whole, _ = edge.merged(name, [range(0, N)])
        some, _ = merge([part.parts[name]], edge.settings, edge.infos[name])
        assert some.to_pylist() == [row for row in whole.to_pylist() if row["neuron"] in (0, 3, 4)]


def test_each_pooled_image_shows_the_peak_of_its_neuron(edge: Edge) -> None:
    n_pool = edge.settings.embed.n_pool
    hashes = [int(random.bits(edge.settings.seed, random.POOL_IMAGE, 0, e)) for e in range(N)]
    expected = sorted(sorted(range(N), key=lambda e: hashes[e])[:n_pool])
    parts = [edge.mine(r).pool_peaks for r in (range(0, 33), range(33, 35), range(35, N))]
    for name in EDGE_LAYERS:
        rows = pa.concat_tables([p[name] for p in parts])
        assert rows["example"].to_pylist() == expected
        for row in rows.to_pylist():
            peaks = edge.maps[name][row["example"], row["neuron"]]
            assert row["position"] == peaks.argmax()
            assert np.isfinite(peaks.max())
            assert peaks.max() > 0 or edge.infos[name].activation is None, "a neuron that is silent there has no peak"
        assert rows.equals(edge.mine(range(0, N)).pool_peaks[name])
    neurons = [np.concatenate([column(p[name], "neuron") for p in parts]).tolist() for name in ("mid", "stem")]
    assert neurons[0] != neurons[1], "layers draw neurons of their own"


def test_every_neuron_s_peak_is_kept_in_the_images_drawn_for_swaps(edge: Edge) -> None:
    n_random = 25
    chosen = edge.settings.model_copy(update={"swap": SwapConfig(n_random=n_random, n_hosts=5)})
    asked = replace(edge, settings=chosen)
    hashes = [int(random.bits(chosen.seed, random.SWAP_IMAGE, 0, e)) for e in range(N)]
    expected = sorted(sorted(range(N), key=lambda e: hashes[e])[:n_random])
    parts = [asked.mine(r).swap_peaks for r in (range(0, 33), range(33, 35), range(35, N))]
    unfired = 0
    for name in EDGE_LAYERS:
        rows = pa.concat_tables([p[name] for p in parts])
        assert rows["example"].to_pylist() == expected
        for row in rows.to_pylist():
            for peaks, position in zip(edge.maps[name][row["example"]], row["position"], strict=True):
                fires = np.isfinite(peaks.max()) and (peaks.max() > 0 or edge.infos[name].activation is None)
                assert position == (peaks.argmax() if fires else None)
                unfired += position is None
        assert rows.equals(asked.mine(range(0, N)).swap_peaks[name])
    assert unfired > 2 * n_random, "the dead neuron and that of NaN have no peak"
    some = {name: np.array([1, 3]) for name in EDGE_LAYERS}
    few = asked.mine(range(0, N), some).swap_peaks["mid"].to_pylist()
    every = asked.mine(range(0, N)).swap_peaks["mid"].to_pylist()
    assert [r["position"] for r in few] == [[r["position"][i] for i in (1, 3)] for r in every]


def test_nothing_is_kept_where_nothing_is_swapped(edge: Edge) -> None:
    assert edge.settings.swap is None
    assert all(len(rows) == 0 for rows in edge.mine(range(0, 16)).swap_peaks.values())


def test_images_for_swaps_are_drawn_among_distinct_ones_and_those_gone_are_left_out() -> None:
    chosen = science(subject={"input_px": 8, "micro_batch": 4}, mine={"k_min": 6}, swap={"n_random": 6, "n_hosts": 3})
    pictures = noise_pictures(15, 8)
    subject = subject_of(Colours(), 8)
    info = subject.readouts.layers(["read"])[0]
    distinct = [e for e in range(15) if e not in (2, 11)]

    def run(unreadable: Sequence[int]) -> list[int]:
        probe = FakeProbe(pictures, ["x"] * 15, unreadable)
        images = images_of(probe.labels, distinct)
        found = mine(subject, probe, chosen, images, [info], {"read": np.arange(3)}, range(15))
        return found.swap_peaks["read"]["example"].to_pylist()

    drawn = run([])
    assert len(drawn) == 6
    assert set(drawn) <= set(distinct)
    assert run(drawn[:2]) == drawn[2:]


def test_the_pool_is_drawn_uniformly_without_replacement() -> None:
    n, n_pool, n_seeds = 30, 12, 1500
    examples = 3 * np.arange(n)
    times = np.zeros(n)
    for seed in range(n_seeds):
        drawn = smallest_hashes(seed, random.POOL_IMAGE, 0, examples, n_pool)
        assert len(set(drawn.tolist())) == n_pool
        assert np.array_equal(drawn, np.sort(drawn))
        times[drawn // 3] += 1
    # Without replacement counts vary less than a multinomial's: by (n − n_pool)/(n − 1).
    statistic = ((times - times.mean()) ** 2 / times.mean()).sum() * (n - 1) / (n - n_pool)
    assert 0.001 < stats.chi2(n - 1).sf(statistic) < 0.999
    assert len(smallest_hashes(0, random.POOL_IMAGE, 0, examples, 99)) == n


def test_the_pool_s_neurons_are_drawn_uniformly_among_those_that_fire() -> None:
    n = 3000
    firing = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=np.float32)
    response = np.tile(firing, (n, 1))
    response[:, 1] *= np.where(np.arange(len(response)) % 4 == 2, np.nan, 1)
    expected = [[0, 2, 3], [1], [0, 2, 3, 4], []]
    info = layer_info("a", width=5, positive_only=True)

    def all_of(response: NDArray[np.float32]) -> Responses:
        return Responses(np.arange(len(response)), torch.from_numpy(response), torch.zeros(response.shape))

    drawn = pool_neurons(science(), info, all_of(response))
    for pattern, able in enumerate(expected):
        found = drawn[pattern::4]
        assert set(found.tolist()) == set(able or [-1])
        if len(able) > 1:
            assert stats.chisquare(np.bincount(found, minlength=5)[able]).pvalue > 0.001
    signed = pool_neurons(science(), layer_info("a", width=5), all_of(-1 - firing[:3]))
    assert (signed >= 0).all(), "without a rectifier every finite response is one"


def fake_mine(
    response: NDArray[np.float32], ranges: Sequence[range], settings: Science, info: LayerInfo, distinct: list[int]
) -> tuple[pa.Table, pa.Table]:
    """`mine` and `merge` of a matrix of responses."""
    probe = FakeProbe(numbered_pictures(len(response)), ["x"] * len(response))
    subject, images = FakeSubject({info.name: response}), images_of(probe.labels, distinct)
    parts = [
        mine(subject, probe, settings, images, [info], {info.name: np.arange(response.shape[1])}, r).parts[info.name]
        for r in ranges
    ]
    return merge(parts, settings, info)


VALUES = np.array([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, math.nan, math.inf])


@given(n=st.integers(1, 40), n_values=st.integers(1, 6), bad=st.booleans(), positive_only=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ties_any_ranges(n: int, n_values: int, bad: bool, positive_only: bool, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    response = rng.choice(VALUES[6 - n_values : 6], (n, 3))
    response[:, 2] = np.where(rng.random(n) < (0.2 if bad else 0), rng.choice(VALUES[6:], n), response[:, 2])
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    ranges = [range(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    distinct = sorted(rng.choice(n, rng.integers(0, n + 1), replace=False).tolist())
    K = int(rng.integers(4, 10))
    chosen = science(
        subject={"input_px": 8, "micro_batch": 4},
        mine={"K": K, "K_keep": int(rng.integers(K, 13)), "k_min": 4},
        cluster={"k_range": [2, 3]},
        seed=seed,
    )
    info = layer_info(positive_only=positive_only)
    mined, histograms = fake_mine(response.astype(np.float32), ranges, chosen, info, distinct)
    expected = naive_mined(response[distinct], distinct, range(3), info.name, chosen, positive_only)
    assert as_dicts(mined) == expected
    for c, (row, known) in enumerate(zip(mined.to_pylist(), expected, strict=True)):
        x = response[distinct, c]
        finite = x[np.isfinite(x)]
        assert histograms["n_images"][c].as_py() == len(finite)
        reason = None
        if len(finite) < len(x):
            reason = "not finite"
        elif not len(x):
            reason = "no images"
        elif positive_only and not (x > 0).any():
            reason = "dead"
        elif len(set(x + 0.0)) == 1:
            reason = "constant"
        elif len(known["example"]) < 4:
            reason = "too few examples"
        assert row["status"] == ("ok" if reason is None else "excluded")
        assert (row["reason"] or "").startswith(reason or "")
        assert (row["reason"] is None) == (reason is None)


def naive_band(
    response: NDArray[np.float64], distinct: list[int], neuron: int, chosen: Science, positive_only: bool
) -> list[int]:
    """Images of a neuron's band, in order of hash, from NumPy's quantiles of the responses that count."""
    x = np.float32(response)
    counting = [e for e in distinct if np.isfinite(x[e]) and (x[e] > 0 or not positive_only)]
    if not counting:
        return []
    low, high = np.quantile(x[counting].astype(np.float64), chosen.mine.band)
    hashes = random.tie_hash(chosen.seed, random.layer_word("layer"), torch.tensor(neuron), torch.arange(len(x)))
    inside = [e for e in counting if low <= x[e] <= high]
    return sorted(inside, key=lambda e: int(hashes[e]))[: chosen.mine.K_keep]


EDGES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0])


@given(
    n=st.integers(0, 60),
    decimals=st.integers(0, 3),
    positive_only=st.booleans(),
    edges=st.tuples(EDGES, EDGES).filter(lambda b: b[0] < b[1]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_a_band_holds_the_images_between_two_quantiles(
    n: int, decimals: int, positive_only: bool, edges: tuple[float, float], data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    # Ties, zeros of a rectifier, and a neuron with responses that are no numbers.
    response = rng.normal(0.5, 1, (n, 4)).round(decimals)
    response[:, 1] = response[:, 1].clip(0)
    response[:, 2] = np.where(rng.random(n) < 0.1, np.nan, response[:, 2])
    response[:, 3] = np.where(rng.random(n) < 0.7, 6.0, response[:, 3])
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    ranges = [range(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    distinct = sorted(rng.choice(n, rng.integers(0, n + 1), replace=False).tolist()) if n else []
    keep = int(rng.integers(5, 20))
    chosen = science(
        subject={"input_px": 8, "micro_batch": 8},
        mine={"K": 5, "K_keep": keep, "k_min": 5, "band": list(edges)},
    )
    info = layer_info(width=4, positive_only=positive_only)
    mined, histograms = fake_mine(response.astype(np.float32), ranges, chosen, info, distinct)
    for c, row in enumerate(mined.to_pylist()):
        expected = naive_band(response[:, c], distinct, c, chosen, positive_only)
        assert row["example"] == expected
        assert row["response"] == [float(np.float32(response[e, c])) for e in expected]
        assert row["n_tied_at_cut"] is None
        if row["status"] == "ok":
            assert len(expected) >= 5
        elif (row["reason"] or "").startswith("too few examples"):
            assert row["reason"] == f"too few examples: {len(expected)} of at least 5"
    top = chosen.model_copy(update={"mine": chosen.mine.model_copy(update={"band": None})})
    assert histograms.equals(fake_mine(response.astype(np.float32), ranges, top, info, distinct)[1])
    whole = fake_mine(response.astype(np.float32), [range(n)], chosen, info, distinct)[0]
    assert whole.equals(mined), "how images are split into ranges changes nothing"


def test_the_whole_band_of_a_large_set_is_a_uniform_sample() -> None:
    """Of 40 images in the band of a neuron 12 are kept, each as often as another, and none from outside."""
    n, n_neurons = 200, 200
    chosen = science(
        subject={"input_px": 8, "micro_batch": 64}, mine={"K": 12, "K_keep": 12, "k_min": 6, "band": [0.4, 0.6]}
    )
    response = np.tile(np.arange(n, dtype=np.float32)[:, None], (1, n_neurons))
    ranges = [range(0, 77), range(77, n)]
    mined, _ = fake_mine(response, ranges, chosen, layer_info(width=n_neurons), list(range(n)))
    rows = mined.to_pylist()
    assert all(len(set(r["example"])) == 12 and r["status"] == "ok" for r in rows)
    times = np.bincount(np.concatenate([r["example"] for r in rows]), minlength=n)
    inside = np.flatnonzero(times)
    assert inside.tolist() == list(range(80, 120)), "the quantiles are 79.6 and 119.4"
    times = times[inside]
    statistic = ((times - times.mean()) ** 2 / times.mean()).sum() * (40 - 1) / (40 - 12)
    assert 0.001 < stats.chi2(39).sf(statistic) < 0.999


def test_zeros_of_a_rectifier_are_no_part_of_its_quantiles() -> None:
    chosen = science(
        subject={"input_px": 8, "micro_batch": 32}, mine={"K": 6, "K_keep": 20, "k_min": 6, "band": [0.5, 1]}
    )
    response = np.zeros((50, 3), dtype=np.float32)
    response[:20, 0] = np.arange(1, 21)
    response[:4, 1] = np.arange(1, 5)
    mined, _ = fake_mine(response, [range(50)], chosen, layer_info(positive_only=True), list(range(50)))
    some, few, none = mined.to_pylist()
    assert sorted(some["response"]) == list(range(11, 21)), "the upper half of those above 0, not of all 50"
    assert (few["status"], few["reason"]) == ("excluded", "too few examples: 2 of at least 6")
    assert (none["reason"], none["example"]) == ("dead", [])


class Colours(nn.Module):
    """Neurons: how red, how green, how blue every 2 × 2 pixels are."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(3, 3, 2, stride=2, bias=False)
        self.relu = nn.ReLU()
        with torch.no_grad():
            self.read.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.read(x))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 reds, of which 5 are repeated in other classes and formats, 4 of them with some green; and two bad files."""
    root = tmp_path / "set"
    for label in ("ant", "bee", "cow"):
        (root / label).mkdir(parents=True)
    for i in range(24):
        picture = Image.new("RGB", (8, 8), (10 * i, 60 if i >= 20 else 0, 0))
        picture.save(root / "bee" / f"{i:02d}.png")
        if i % 5 == 0:
            picture.save(root / "ant" / f"copy {i:02d}.bmp")
            picture.save(root / "cow" / f"copy {i:02d}.png")
    (root / "cow" / "broken.png").write_bytes((root / "bee" / "07.png").read_bytes()[:40])
    (root / "ant" / "empty.png").write_bytes(b"")
    return root


def test_repeated_pictures_count_once_and_bad_ones_cost_a_row(folder: Path) -> None:
    chosen = science(
        subject={"input_px": 8, "micro_batch": 4},
        mine={"K": 10, "K_keep": 40, "k_min": 6},
    )
    probe = open_probe(ImageFolder(kind="folder", path=str(folder)))
    rows, failed = index(probe, range(len(probe)))
    table = rows.to_pylist()
    bad = [r["example"] for r in table if r["name"] in ("ant/empty.png", "cow/broken.png")]
    assert [f[:3] for f in failed] == [(None, "image", e) for e in bad]
    assert all(f[3] for f in failed)
    for row in table:
        known = (row["width_px"], row["height_px"], row["pixel_hash"] is None, row["reason"] is None)
        assert known == ((None, None, True, False) if row["example"] in bad else (8, 8, False, True))

    images = distinct_images(rows)
    assert len(images.distinct) == 24
    groups = Counter(table[e]["pixel_hash"] for e in images.distinct.tolist())
    assert set(groups.values()) == {1}
    assert [images.labels[c] for c in images.label_of] == [r["label"] for r in table]

    subject = subject_of(Colours(), 8)
    info = subject.readouts.layers(["read"])[0]
    assert info.positive_only
    neurons = {"read": np.arange(3)}
    cut = len(table) // 2
    found = [mine(subject, probe, chosen, images, [info], neurons, r) for r in (range(cut), range(cut, len(table)))]
    assert [f for m in found for f in m.failed] == [], "what index could not read is passed over"
    mined, histograms = merge([m.parts["read"] for m in found], chosen, info)
    red, green, blue = mined.to_pylist()
    assert histograms["n_images"].to_pylist() == [24] * 3
    assert red["status"] == "ok"
    assert red["response"] == pytest.approx([10 * i / 255 for i in range(23, 0, -1)], rel=1e-6)
    assert green["reason"].startswith("too few examples")
    assert len(green["example"]) == green["n_tied_at_cut"] == 4
    assert blue["reason"] == "dead"
    assert (blue["example"], blue["n_tied_at_cut"]) == ([], 0)


def test_mean_colours_are_those_of_the_decoded_pixels() -> None:
    pictures = [*noise_pictures(3, 8), np.full((2, 5, 3), (255, 0, 7), dtype=np.uint8)]
    rows, _ = index(FakeProbe(pictures, ["x"] * 4, unreadable=[1]), range(4))
    for i, row in enumerate(rows.to_pylist()):
        expected = [None] * 3 if i == 1 else pictures[i].astype(np.float64).mean((0, 1)).tolist()
        assert [row[f"mean_{c}"] for c in ("red", "green", "blue")] == pytest.approx(expected)


def test_missing_rows_of_images_are_refused() -> None:
    probe = FakeProbe(noise_pictures(6, 8), ["x"] * 6)
    rows, _ = index(probe, range(6))
    with pytest.raises(StoreError, match="gaps"):
        distinct_images(pa.concat_tables([rows.slice(0, 2), rows.slice(3)]))
    assert distinct_images(rows).distinct.tolist() == list(range(6))


def test_an_image_that_has_become_unreadable_costs_itself_alone() -> None:
    chosen = science(subject={"input_px": 8, "micro_batch": 4}, mine={"k_min": 6})
    pictures = noise_pictures(15, 8)
    info = subject_of(Colours(), 8).readouts.layers(["read"])[0]

    def run(probe: FakeProbe, distinct: range | list[int]) -> Mined:
        images = images_of(probe.labels, distinct)
        return mine(subject_of(Colours(), 8), probe, chosen, images, [info], {"read": np.arange(3)}, range(15))

    gone = FakeProbe(pictures, ["x"] * 15, unreadable=[4])
    found = run(gone, range(15))
    assert [f[:3] for f in found.failed] == [(None, "image", 4)]
    without = run(FakeProbe(pictures, ["x"] * 15), [e for e in range(15) if e != 4])
    assert found.parts["read"].equals(without.parts["read"])
    assert max(gone.n_reads.values()) == 1

    nothing = run(FakeProbe(pictures, ["x"] * 15, unreadable=range(15)), range(15))
    assert len(nothing.failed) == 15
    mined, _ = merge([nothing.parts["read"], found.parts["read"]], chosen, info)
    assert mined.equals(merge([found.parts["read"]], chosen, info)[0])
    assert merge([nothing.parts["read"]], chosen, info)[0]["reason"].to_pylist() == ["no images"] * 3


def test_ties_follow_neither_order_nor_class() -> None:
    """A neuron that responds alike to every picture of a folder sorted by class keeps a uniform sample of them."""
    n, kept_per_neuron, n_neurons = 60, 12, 200
    chosen = science(
        subject={"input_px": 8, "micro_batch": 16}, mine={"K": kept_per_neuron, "K_keep": kept_per_neuron, "k_min": 6}
    )
    response = np.ones((n, n_neurons), dtype=np.float32)
    response[0] = 0.5  # not constant
    mined, _ = fake_mine(response, [range(0, 30), range(30, n)], chosen, layer_info(width=n_neurons), list(range(n)))
    times = np.bincount(np.concatenate([r["example"] for r in mined.to_pylist()]), minlength=n)[1:]
    assert times.sum() == kept_per_neuron * n_neurons
    statistic = ((times - times.mean()) ** 2 / times.mean()).sum() * (n - 2) / (n - 1 - kept_per_neuron)
    assert 0.001 < stats.chi2(n - 2).sf(statistic) < 0.999
    assert mined["n_tied_at_cut"].to_pylist() == [n - 1] * n_neurons
