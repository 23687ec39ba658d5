"""Neurons of known truth: how they are fitted, and that they respond to what they should."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from polyray.config import Science
from polyray.errors import DataError, ModelError
from polyray.models.planted import PlantedNeurons, Weights, attach
from polyray.models.readouts import Readouts
from polyray.psi import plant
from polyray.psi.mine import Images
from polyray.schema import PLANTED_KINDS, TABLES

N_CLASSES, CHANNELS, SIDE, PER_KIND = 16, 20, 3, 3
LAYER = "planted.body"


def science(**plant_settings: Any) -> Science:
    return Science.model_validate(
        {
            "subject": {"name": "efficientnet_lite0"},
            "probe": {"kind": "generated"},
            "encoder": {"kind": "standin"},
            "mine": {"K": 24, "K_keep": 24, "k_min": 20},
            "plant": {"per_kind": PER_KIND, **plant_settings},
        }
    )


def images(per_class: list[int]) -> Images:
    """Classes of these sizes, shuffled; every seventh image is a repeat or unreadable."""
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(len(per_class)), per_class))
    distinct = np.array([i for i in range(len(label)) if i % 7 != 3], dtype=np.int64)
    return Images(distinct, label, [f"class {c:02d}" for c in range(len(per_class))])


def features_of(of: Images, noise: float = 0.3) -> tuple[pa.Table, np.ndarray]:
    """Rows of `plant_features` whose classes lie around centres of their own, and the centres."""
    rng = np.random.default_rng(1)
    centres = 3 * rng.normal(size=(len(of.labels), CHANNELS))
    halves = plant.split(of, 0)
    maps = [centres[of.label_of[e]][:, None] + noise * rng.normal(size=(CHANNELS, SIDE * SIDE)) for e in halves.fit]
    rows = {
        "example": halves.fit,
        "mean": [m.mean(1).astype(np.float32) for m in maps],
        "map": [
            m.astype(np.float16).ravel() if e in halves.mapped else None for m, e in zip(maps, halves.fit, strict=True)
        ],
    }
    return pa.table(rows, schema=TABLES["plant_features"].schema), centres


def text_vectors(n: int) -> np.ndarray:
    x = np.random.default_rng(2).normal(size=(n, 6))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_halves_share_no_image_and_no_class_is_cut_unevenly() -> None:
    of = images([90, 41, 7, 1])
    halves = plant.split(of, 5)
    assert not set(halves.fit) & set(halves.mined)
    assert sorted([*halves.fit, *halves.mined]) == of.distinct.tolist()
    assert set(halves.mapped) <= set(halves.fit)
    for c in range(4):
        n_fit, n_map, n_mined = (int((of.label_of[h] == c).sum()) for h in halves)
        assert n_mined - n_fit in (0, 1)
        assert n_map == min(n_fit, plant.N_MAPS)
    assert plant.mined_half(of, 5).distinct.tolist() == halves.mined.tolist()
    assert plant.split(of, 6).fit.tolist() != halves.fit.tolist()


def test_the_probe_is_scikit_learn_s_discriminant() -> None:
    rng = np.random.default_rng(3)
    y = np.repeat(np.arange(4), 30)
    x = rng.normal(size=(4, 8))[y] + rng.normal(size=(120, 8)) @ rng.normal(size=(8, 8))
    probe = plant.linear_probe(x, y, 4)
    # Adding 0.1 of the mean variance to every direction is shrinking by 0.1 / 1.1, but for the scale. (Scikit-learn
    # scales its covariance by class as this one does: equal classes, equal weights.)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=plant.SHRINK / (1 + plant.SHRINK)).fit(x, y)
    for a, b in itertools.combinations(range(4), 2):
        ours = probe.weight[a] - probe.weight[b]
        theirs = oracle.coef_[a] - oracle.coef_[b]
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert cosine > 0.999
    evidence = x @ probe.weight.T + probe.bias
    assert (evidence.argmax(1) == oracle.predict(x)).mean() > 0.97


def test_channels_that_never_differ_do_no_harm() -> None:
    x = np.zeros((20, 5))
    x[:10, 0] = 1.0
    probe = plant.linear_probe(x, np.repeat([0, 1], 10), 2)
    assert np.isfinite(probe.weight).all()
    assert (probe.weight[:, 1:] == 0).all()


def test_standardised_evidence_has_mean_0_and_deviation_1_at_its_largest() -> None:
    rng = np.random.default_rng(4)
    y = np.repeat([0, 1, 2], 15)
    maps = [rng.normal(size=(6, 4)) * (1 + c) for c in y]
    probe = plant.standardised(plant.Probe(rng.normal(size=(3, 6)), rng.normal(size=3)), maps, y)
    for c in range(3):
        largest = [max(probe.weight[c] @ m + probe.bias[c]) for m, of in zip(maps, y, strict=True) if of == c]
        assert np.mean(largest) == pytest.approx(0, abs=1e-9)
        assert np.std(largest) == pytest.approx(1)


def test_groups_are_what_their_kind_says() -> None:
    text = text_vectors(N_CLASSES)
    similarity = text @ text.T
    found = plant.groups(similarity, PER_KIND, 0, 7)
    pairs = list(itertools.combinations(range(N_CLASSES), 2))
    limit = np.quantile([similarity[p] for p in pairs], plant.FAR)
    assert list(found) == list(PLANTED_KINDS)
    for kind, size in (("mono", 1), ("order2", 2), ("order3", 3), ("siblings", 2), ("unequal", 2), ("noise", 0)):
        assert [len(g) for g in found[kind]] == [size] * PER_KIND
        assert kind == "noise" or len(set(found[kind])) == PER_KIND
    for kind in ("order2", "order3", "unequal"):
        assert all(similarity[p] <= limit for g in found[kind] for p in itertools.combinations(g, 2))
    assert not set(found["order2"]) & set(found["unequal"])
    assert set(found["siblings"]) == set(sorted(pairs, key=lambda p: -similarity[p])[:PER_KIND])


@pytest.mark.parametrize(("n_classes", "n"), [(1, 1), (2, 1), (4, 5), (6, 200)])
def test_too_few_classes_are_refused(n_classes: int, n: int) -> None:
    text = text_vectors(n_classes)
    with pytest.raises(DataError, match="classes give only"):
        plant.groups(text @ text.T, n, 0, 7)


def test_the_rarer_class_is_as_rare_as_asked_where_evidence_is_normal() -> None:
    K, rarity, n = 24, 5.0, 60
    shift = plant.rarer(science(rarity=rarity), n, n)
    # Both classes' largest evidence is standard normal; the top K of both, one of them shifted.
    t = norm.isf(K * rarity / (rarity + 1) / n)
    assert n * norm.sf(t) + n * norm.sf(t + shift) == pytest.approx(K)
    assert norm.sf(t) / norm.sf(t + shift) == pytest.approx(rarity)


def test_fitted_neurons_respond_to_their_classes_and_to_no_other() -> None:
    of = images([80] * N_CLASSES)
    rows, centres = features_of(of)
    planted = plant.fit(rows, LAYER, science(), of, text_vectors(N_CLASSES)).to_pylist()
    assert [r["neuron"] for r in planted] == list(range(len(PLANTED_KINDS) * PER_KIND))
    neurons = PlantedNeurons(CHANNELS, len(planted))
    neurons.install(plant.weights(pa.Table.from_pylist(planted[::-1], schema=TABLES["planted"].schema)))
    x = torch.from_numpy(centres.astype(np.float32))[:, :, None, None]
    response = neurons(x)[:, :, 0, 0].detach().numpy()
    for r in planted:
        inside = [of.labels.index(c) for c in r["classes"]]
        assert r["planted_order"] == len(inside)
        if r["kind"] == "noise":
            assert not inside
            continue
        outside = np.delete(response[:, r["neuron"]], inside)
        assert response[inside, r["neuron"]].min() > outside.max(), r["kind"]
        values = response[inside, r["neuron"]]
        # Standardised evidence: equal for all classes but the rarer one, which is lowered.
        if r["kind"] == "unequal":
            assert values[0] - values[1] > 1
        elif len(values) > 1:
            assert np.ptp(values) < 1


def test_a_class_that_cannot_be_fitted_or_mined_takes_no_part() -> None:
    of = images([*[80] * (N_CLASSES - 2), 1, 0])
    rows, _ = features_of(of)
    planted = plant.fit(rows, LAYER, science(), of, text_vectors(N_CLASSES)).to_pylist()
    assert not {of.labels[-1], of.labels[-2]} & {c for r in planted for c in r["classes"]}


class Net(nn.Module):
    """A map with four channels, then something that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu()).mean((2, 3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def test_planting_changes_nothing_that_the_network_computes(net: Net) -> None:
    x = torch.randn(2, 3, 8, 8)
    before = net(x)
    plants = attach(net, [("body", 4)], 5)
    assert torch.equal(net(x), before)
    assert torch.equal(plants.maps(x)["body"], net.body(x))


def test_planted_neurons_are_read_as_the_largest_of_three_convolutions(net: Net) -> None:
    plants = attach(net, [("body", 4)], 5)
    weight, bias = torch.randn(3, 5, 4), torch.randn(3, 5)
    plants.neurons("body").install(Weights(weight, bias))
    x = torch.randn(2, 3, 8, 8)
    readouts = Readouts(net, (3, 8, 8))
    (info,) = readouts.layers(["planted.body"])
    assert (info.width, info.grid_h, info.grid_w, info.positive_only, info.layout) == (5, 8, 8, False, "nchw")
    maps = net.body(x).flatten(2)
    evidence = torch.einsum("pnc,bcx->bpnx", weight, maps) + bias[None, :, :, None]
    expected, position = evidence.amax(1).max(2)
    response, found = readouts.run(x, ["planted.body"])["planted.body"]
    torch.testing.assert_close(response, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, position)


def test_weights_of_another_shape_are_refused(net: Net) -> None:
    plants = attach(net, [("body", 4)], 5)
    with pytest.raises(ModelError, match="do not fit 5 neurons on 4 channels"):
        plants.neurons("body").install(Weights(torch.zeros(3, 5, 6), torch.zeros(3, 5)))


def test_nothing_is_planted_twice(net: Net) -> None:
    attach(net, [("body", 4)], 5)
    with pytest.raises(ModelError, match="submodule 'planted' of its own"):
        attach(net, [("body", 4)], 5)
