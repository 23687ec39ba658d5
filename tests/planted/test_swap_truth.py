"""Swaps of neurons made by hand: every response and effect is known beforehand; and the method's own null, measured."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from psi.samples import layer_row, science
from psi.scenes import A_ALONE, A_OR_B, FILL, GREY, LAYER, Scene, detectors, scene, settings, value
from scipy import stats

from polyray.kernels.effects import signed_rank_p
from polyray.models.vision import load_subject
from polyray.probes.images import open_probe
from polyray.psi.hosts import NONE, Examples, Peaks
from polyray.psi.swap import Neuron, Views, swap
from polyray.schema import SWAP_CONDITIONS

pytestmark = pytest.mark.usefixtures("one_thread")

REDS = [(180 + 5 * i, 50, 40) for i in range(12)]
GREENS = [(50, 180 + 5 * i, 40) for i in range(12)]
DARK_REDS = [(130 + i, 50, 40) for i in range(12)]
EQUAL_REDS, EQUAL_GREENS = [(200, 50, 40)] * 12, [(50, 200, 40)] * 12


def swaps_of(neuron: int, made: Scene, n_hosts: int = 8) -> list[dict[str, Any]]:
    chosen = settings(swap={"n_hosts": n_hosts})
    asked = [Neuron(neuron, made.examples, made.peaks)]
    rows, failed = swap(detectors(), made.views(chosen), chosen, LAYER, asked, "real", FILL)
    assert failed == []
    return rows.to_pylist()


def expected(neuron: int, row: dict[str, Any], made: Scene) -> tuple[float, float]:
    """Response and value at the peak, from the colours alone. Around the box all is grey, which says nothing, and a
    mean over two colours is never above the larger."""
    host, fill = made.colours[row["host_example"]], FILL.tolist()
    source = None if row["source_example"] is None else made.colours[row["source_example"]]
    at_peak = {
        "host": host,
        "baseline": fill,
        "shuffled_position": fill,
        "ablate_elsewhere": host,
    }.get(row["condition"], source)
    shown = {"shuffled_position": [fill, source], "ablate_elsewhere": [host, fill]}.get(row["condition"], [at_peak])
    return max(value(neuron, c) for c in [*shown, GREY]), value(neuron, at_peak)


@pytest.mark.parametrize("neuron", [A_ALONE, A_OR_B])
@pytest.mark.parametrize("clusters", [[REDS, GREENS], [REDS, DARK_REDS], [REDS, DARK_REDS, GREENS]])
def test_every_response_and_effect_is_what_the_colours_say(
    neuron: int, clusters: list[list[tuple[int, int, int]]]
) -> None:
    made = scene(neuron, clusters)
    rows = swaps_of(neuron, made)
    assert len(rows) == 8 * len(SWAP_CONDITIONS)
    baseline = value(neuron, FILL)
    assert baseline == pytest.approx(20 / 255)
    sd = made.examples.activation.std()
    for row in rows:
        assert row["status"] == "ok"
        response, at_peak = expected(neuron, row, made)
        assert row["response"] == pytest.approx(response, abs=1e-4)
        assert row["response_at_peak"] == pytest.approx(at_peak, abs=1e-4)
        assert row["baseline"] == pytest.approx(baseline, abs=1e-4)
        assert row["effect"] == pytest.approx(response - baseline, abs=1e-4)
        assert row["effect_at_peak"] == pytest.approx(at_peak - baseline, abs=1e-4)
        assert row["effect_sd"] == pytest.approx((response - baseline) / sd, abs=1e-3)


def contrast(rows: list[dict[str, Any]], a: str, b: str, column: str = "response") -> np.ndarray:
    found = {(r["host"], r["condition"]): r[column] for r in rows}
    return np.array([found[h, a] - found[h, b] for h in sorted({r["host"] for r in rows})])


def test_a_detector_of_both_answers_to_either_alike() -> None:
    rows = swaps_of(A_OR_B, scene(A_OR_B, [EQUAL_REDS, EQUAL_GREENS]))
    np.testing.assert_allclose(contrast(rows, "aligned", "non_aligned"), 0, atol=1e-6)
    assert (contrast(rows, "non_aligned", "random") > 0.3).all()
    assert (contrast(rows, "aligned", "random_place") > 0.3).all()
    np.testing.assert_allclose(
        contrast(rows, "aligned", "shuffled_position", "response_at_peak"), 150 / 255 - 20 / 255, atol=1e-4
    )
    np.testing.assert_allclose(contrast(rows, "aligned", "shuffled_position"), 0, atol=1e-6)
    np.testing.assert_allclose(contrast(rows, "ablate_elsewhere", "baseline"), 150 / 255 - 20 / 255, atol=1e-4)


def test_a_detector_of_one_answers_to_that_one_alone() -> None:
    made = scene(A_ALONE, [EQUAL_REDS, EQUAL_GREENS])
    rows = swaps_of(A_ALONE, made)
    cluster = np.array([r["cluster"] for r in rows if r["condition"] == "host"])
    found = contrast(rows, "aligned", "non_aligned")
    np.testing.assert_allclose(found, np.where(cluster == 0, 1, -1) * 150 / 255, atol=1e-4)


def test_clusters_that_mean_nothing_to_the_neuron_make_no_difference() -> None:
    rows = swaps_of(A_ALONE, scene(A_ALONE, [EQUAL_REDS, EQUAL_REDS]))
    np.testing.assert_allclose(contrast(rows, "aligned", "non_aligned"), 0, atol=1e-6)
    assert (contrast(rows, "aligned", "random") > 0.3).all()
    assert {r["effect_sd"] for r in rows} == {None}


# --- The method's null ----------------------------------------------------------------------------------------------

NULL_LAYER, NULL_PX, N_IMAGES, N_NULL = "blocks.2.1.conv_pw", 96, 240, 210
SIZES = [[30, 30], [20, 20, 20], [40, 20], [50, 10], [57, 3], [30, 20, 10], [15, 15, 15, 15]]
"""Clusters of a null neuron, by turns, from equal to very unequal ones."""


def test_of_null_neurons_aligned_and_other_patches_are_alike() -> None:
    """A trained network, 210 neurons that fire on most images, random images under permuted labels."""
    subject_config = {"factory": None, "name": "efficientnet_lite0", "weights": "default", "micro_batch": 32}
    chosen = science(
        subject=subject_config | {"input_px": NULL_PX, "layers": [NULL_LAYER]},
        probe={"kind": "generated", "n_classes": 40, "n_per_class": N_IMAGES // 40, "image_px": NULL_PX},
        swap={"n_hosts": 8},
    )
    subject = load_subject(chosen.subject, chosen.numerics)
    views = Views(open_probe(chosen.probe), chosen)
    shown = np.stack([views.get(i) for i in range(N_IMAGES)])
    parts = [subject.responses(shown[i : i + 32], [NULL_LAYER])[NULL_LAYER] for i in range(0, N_IMAGES, 32)]
    response, position = (torch.cat(p).numpy() for p in zip(*parts, strict=True))
    fires = response > 0
    dense = np.flatnonzero(fires.mean(0) > 0.5)[:N_NULL]
    assert len(dense) == N_NULL
    neurons = [
        Neuron(n, examples_of(SIZES[i % len(SIZES)]), Peaks(np.arange(N_IMAGES), np.where(f, p, NONE)))
        for i, (n, f, p) in enumerate(zip(dense.tolist(), fires.T[dense], position.T[dense], strict=True))
    ]
    layer = layer_row(subject.readouts.layers([NULL_LAYER])[0], 16)
    rows, failed = swap(subject, views, chosen, layer, neurons, "null", np.full(3, 128, dtype=np.uint8))
    assert failed == []
    p = null_p(rows)
    assert len(p) == N_NULL
    # P(p <= a) <= a: the share below never exceeds what is uniform, but by chance.
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 0.01
    # And the test can reject: some p are small.
    assert 0 < (p < 0.2).mean() < 0.27


def examples_of(sizes: list[int]) -> Examples:
    """Examples of which a null neuron takes the labels alone."""
    n = sum(sizes)
    return Examples(np.arange(n), np.zeros(n, np.int64), np.repeat(np.arange(len(sizes)), sizes), np.ones(n))


def null_p(rows: pa.Table) -> np.ndarray:
    """Two-sided p of aligned − non_aligned, neuron by neuron."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for row in rows.select(["neuron", "host", "condition", "status", "response"]).to_pylist():
        if row["status"] == "ok":
            found.setdefault(row["neuron"], {}).setdefault(row["host"], {})[row["condition"]] = row["response"]
    p = []
    for hosts in found.values():
        d = [h["aligned"] - h["non_aligned"] for h in hosts.values() if "non_aligned" in h]
        p.append(float(signed_rank_p(torch.tensor([d], dtype=torch.float64), two_sided=True)[0]))
    return np.array(p)
