"""Summarise: q against statsmodels, AUROC against scikit-learn, counts and diagnoses against loops."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from psi.samples import science
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

from polyray import columns
from polyray.psi.summarise import diagnose, summarise
from polyray.schema import COMPONENTS, NULL_KINDS, PRESETS, TABLES

LAYERS = ["first", "second", "third"]
"""The last one has no scored neuron."""


def with_layer(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as the store gives them: the table's columns after the layer."""
    known = TABLES[name].schema.names
    table = columns.table(name, {c: [r.get(c) for r in rows] for c in known})
    return table.add_column(0, "layer", [[r["layer"] for r in rows]])


def calibrated(rng: np.random.Generator, shift: float) -> dict[str, Any]:
    """z, p, log_psi of every preset for a neuron whose z are moved by `shift`; rounded, so that scores tie."""
    out: dict[str, Any] = {}
    for preset in PRESETS:
        z = {c: round(rng.normal(shift), 1) for c in COMPONENTS}
        out |= {f"{preset}_{c}_z": v for c, v in z.items()}
        out |= {f"{preset}_{c}_p": round(math.exp(-max(0.0, 3 * v + 2)), 4) for c, v in z.items()}
        out[f"{preset}_log_psi"] = -sum(math.log1p(math.exp(-v)) for v in z.values())
        out[f"{preset}_p"] = max(out[f"{preset}_{c}_p"] for c in COMPONENTS)
    return out


@pytest.fixture(scope="module")
def tables() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = np.random.default_rng(4)
    neurons: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    reasons = ["dead", "constant", "too few examples: 3 of at least 12", "too few examples: 5 of at least 12", None]
    for layer, n, shift in ((LAYERS[0], 40, 0.5), (LAYERS[1], 30, 1.4), (LAYERS[2], 4, 0.0)):
        for i in range(n):
            row: dict[str, Any] = {"layer": layer, "neuron": i, "n_tied_at_cut": int(rng.integers(1, 12))}
            if i % 6 == 5 or layer == LAYERS[2]:
                reason = reasons[i % 5]
                status = "failed" if reason is None else "excluded"
                neurons.append(row | {"status": status, "reason": reason or "ValueError: odd"})
                continue
            # No draws to compare with: scored, but without p.
            why = {"reason": "not calibrated: the pool has 3 patches with a vector"}
            known = why if (layer, i) == (LAYERS[0], 7) else calibrated(rng, shift)
            neurons.append(row | {"status": "ok", "k": int(rng.integers(2, 5))} | known)
            for kind in NULL_KINDS:
                beside.append({"layer": layer, "neuron": i, "kind": kind, "k": 2} | calibrated(rng, 0.0))
    return neurons, beside


@pytest.fixture(scope="module")
def summary(tables: Any) -> tuple[dict[str, pa.Table], pa.Table]:
    neurons, beside = tables
    return summarise(LAYERS, with_layer("neurons", neurons), with_layer("null_neurons", beside), science())


def figure(rows: pa.Table, layer: str | None, metric: str, **where: str | None) -> dict[str, Any]:
    """The one row of a figure."""
    wanted = {"layer": layer, "metric": metric, "preset": None, "null_kind": None, "score": None} | where
    found = [r for r in rows.to_pylist() if all(r[c] == v for c, v in wanted.items())]
    assert len(found) == 1, wanted
    return found[0]


def of_layer(rows: list[dict[str, Any]], layer: str | None) -> list[dict[str, Any]]:
    return rows if layer is None else [r for r in rows if r["layer"] == layer]


def naive_q(neurons: list[dict[str, Any]], method: str = "fdr_bh") -> dict[tuple[str, int], float]:
    """q of every neuron that has a p, over all layers together."""
    tested = [r for r in neurons if r.get("specific_p") is not None]
    q = multipletests([r["specific_p"] for r in tested], method=method)[1]
    return {(r["layer"], r["neuron"]): v for r, v in zip(tested, q, strict=True)}


def test_q_is_that_of_the_whole_sweep(tables: Any, summary: Any) -> None:
    neurons, _ = tables
    q = naive_q(neurons)
    n_called = 0
    assert list(summary[0]) == LAYERS
    for layer, rows in summary[0].items():
        assert [r["neuron"] for r in rows.to_pylist()] == [r["neuron"] for r in of_layer(neurons, layer)]
        for row in rows.to_pylist():
            expected = q.get((layer, row["neuron"]))
            if expected is None:
                assert (row["q"], row["called"]) == (None, None)
                continue
            assert row["q"] == pytest.approx(expected, rel=1e-12)
            assert row["called"] == (expected < 0.05)
            n_called += row["called"]
    assert 10 < n_called < len(q) - 10
    alone = multipletests([r["specific_p"] for r in of_layer(neurons, "second") if "specific_p" in r], method="fdr_bh")
    assert not np.allclose(alone[1], [q[k] for k in q if k[0] == "second"]), "by layer it would be another q"


def test_alpha_decides_who_is_called(tables: Any) -> None:
    neurons, beside = tables
    q = naive_q(neurons)
    loose = science(calibrate={"alpha": 0.2, "n_bootstrap": 10})
    by_layer, _ = summarise(LAYERS, with_layer("neurons", neurons), with_layer("null_neurons", beside), loose)
    for layer, rows in by_layer.items():
        for row in rows.to_pylist():
            assert row["called"] == (None if (layer, row["neuron"]) not in q else q[layer, row["neuron"]] < 0.2)


@pytest.mark.parametrize(("fdr", "method"), [("bh", "fdr_bh"), ("by", "fdr_by")])
def test_fdr_decides_how_q_is_made(tables: Any, fdr: str, method: str) -> None:
    neurons, beside = tables
    q = naive_q(neurons, method)
    chosen = science(calibrate={"fdr": fdr, "n_bootstrap": 10})
    by_layer, rows = summarise(LAYERS, with_layer("neurons", neurons), with_layer("null_neurons", beside), chosen)
    n_called = 0
    for layer, table in by_layer.items():
        for row in table.to_pylist():
            expected = q.get((layer, row["neuron"]))
            assert row["q"] == (None if expected is None else pytest.approx(expected, rel=1e-12))
            assert row["called"] == (None if expected is None else expected < 0.05)
            n_called += bool(row["called"])
    assert figure(rows, None, "called_frac", preset="specific")["value"] == pytest.approx(n_called / len(q))
    assert naive_q(neurons, "fdr_by") != naive_q(neurons, "fdr_bh")


def test_q_is_by_benjamini_hochberg_unless_asked_otherwise() -> None:
    assert science().calibrate.fdr == "bh"


@pytest.mark.parametrize("layer", [None, *LAYERS])
def test_counts_add_up_and_say_why(tables: Any, summary: Any, layer: str | None) -> None:
    here = of_layer(tables[0], layer)
    rows = summary[1]
    n = len(here)
    assert figure(rows, layer, "n_neurons")["value"] == n
    for status in ("ok", "excluded", "failed"):
        assert figure(rows, layer, f"n_{status}")["value"] == sum(r["status"] == status for r in here)
    assert sum(figure(rows, layer, f"n_{s}")["value"] for s in ("ok", "excluded", "failed")) == n
    reasons: dict[str, int] = {}
    for r in here:
        if r["status"] != "ok":
            reason = r["reason"].split(":")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    told = {
        r["metric"].removeprefix("n_reason:"): r["value"]
        for r in rows.to_pylist()
        if r["layer"] == layer and r["metric"].startswith("n_reason:")
    }
    assert told == reasons
    row = figure(rows, layer, "n_not_calibrated", preset="specific")
    assert (row["value"], row["n"]) == (layer in (None, LAYERS[0]), sum(r["status"] == "ok" for r in here))


@pytest.mark.parametrize("layer", [None, *LAYERS])
def test_discoveries_and_null_calls_answer_to_one_threshold(tables: Any, summary: Any, layer: str | None) -> None:
    neurons, beside = tables
    rows = summary[1]
    q = naive_q(neurons)
    ok = [r for r in of_layer(neurons, layer) if r["status"] == "ok"]
    called = figure(rows, layer, "called_frac", preset="specific")
    tested = [r for r in ok if r.get("specific_p") is not None]
    assert called["n"] == len(tested)
    n_called = sum(q.get((r["layer"], r["neuron"]), 1.0) < 0.05 for r in ok)
    assert called["value"] == (pytest.approx(n_called / len(tested)) if tested else None)
    largest = max(r["specific_p"] for r in neurons if q.get((r["layer"], r["neuron"]), 1.0) < 0.05)
    for kind in NULL_KINDS:
        p = [r["specific_p"] for r in of_layer(beside, layer) if r["kind"] == kind]
        row = figure(rows, layer, "null_called_frac", preset="specific", null_kind=kind)
        assert row["n"] == len(p)
        assert row["value"] == (pytest.approx(np.mean(np.array(p) <= largest)) if p else None)


def test_without_a_discovery_no_null_neuron_is_called(tables: Any) -> None:
    neurons, beside = tables
    dull = [r | {"specific_p": 0.9} if "specific_p" in r else r for r in neurons]
    quick = science(calibrate={"n_bootstrap": 10})
    by_layer, rows = summarise(LAYERS, with_layer("neurons", dull), with_layer("null_neurons", beside), quick)
    assert not any(r["called"] for t in by_layer.values() for r in t.to_pylist())
    assert {figure(rows, None, "null_called_frac", preset="specific", null_kind=k)["value"] for k in NULL_KINDS} == {0}


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z))


SCORES = {
    "log_psi": lambda z: sum(log_sigmoid(z[c]) for c in COMPONENTS),
    "S": lambda z: z["S"],
    "Q": lambda z: z["Q"],
    "D": lambda z: z["D"],
    "S*Q": lambda z: log_sigmoid(z["S"]) + log_sigmoid(z["Q"]),
}


def ranked(rows: Iterable[dict[str, Any]], preset: str, name: str) -> NDArray[np.float64]:
    known = [r for r in rows if f"{preset}_S_z" in r]
    return np.array([SCORES[name]({c: r[f"{preset}_{c}_z"] for c in COMPONENTS}) for r in known])


@pytest.mark.parametrize("layer", [None, *LAYERS])
@pytest.mark.parametrize("preset", PRESETS)
def test_auroc_of_real_against_null_neurons(tables: Any, summary: Any, layer: str | None, preset: str) -> None:
    neurons, beside = tables
    for kind in NULL_KINDS:
        for name in SCORES:
            a = ranked(of_layer(neurons, layer), preset, name)
            b = ranked([r for r in of_layer(beside, layer) if r["kind"] == kind], preset, name)
            row = figure(summary[1], layer, "auroc", preset=preset, null_kind=kind, score=name)
            assert row["n"] == len(a)
            if not len(a):
                assert (row["value"], row["low"], row["high"]) == (None, None, None)
                continue
            truth = np.r_[np.ones(len(a)), np.zeros(len(b))]
            # log_psi is a sum in another order here, so that ties in exact arithmetic may fall either way.
            tolerance = 1e-9 if name in COMPONENTS else 0.01
            value = roc_auc_score(truth, np.r_[a, b].round(9))
            assert row["value"] == pytest.approx(value, abs=tolerance)
            assert row["low"] <= row["value"] <= row["high"]
            if kind != "pool":
                continue
            rng = np.random.default_rng(0)
            resampled = [
                roc_auc_score(truth, np.r_[rng.choice(a, len(a)), rng.choice(b, len(b))].round(9)) for _ in range(100)
            ]
            assert (row["high"] - row["low"]) / 3.92 == pytest.approx(np.std(resampled), rel=0.35)


def test_medians_and_shares(tables: Any, summary: Any) -> None:
    for layer in (None, *LAYERS[:2]):
        scored = [r for r in of_layer(tables[0], layer) if r["status"] == "ok"]
        known = [r for r in scored if "specific_p" in r]
        rows = summary[1]
        assert figure(rows, layer, "median_k")["value"] == np.median([r["k"] for r in scored])
        for preset in PRESETS:
            found = figure(rows, layer, "median_log_psi", preset=preset)
            assert found["value"] == pytest.approx(np.median([r[f"{preset}_log_psi"] for r in known]))
            assert found["n"] == len(known)
            share = sum(r[f"{preset}_p"] < 0.05 for r in known) / len(known)
            assert figure(rows, layer, "p05_frac", preset=preset)["value"] == pytest.approx(share)
            for c in COMPONENTS:
                median = np.median([r[f"{preset}_{c}_z"] for r in known])
                assert figure(rows, layer, "median_z", preset=preset, score=c)["value"] == pytest.approx(median)


@pytest.mark.parametrize("preset", PRESETS)
def test_trends_over_depth(tables: Any, summary: Any, preset: str) -> None:
    for name in ("log_psi", *COMPONENTS):
        first, second, third = (ranked(of_layer(tables[0], x), preset, name) for x in LAYERS)
        assert len(third) == 0
        depth = np.r_[np.zeros(len(first)), np.ones(len(second))]
        expected = stats.kendalltau(depth, np.r_[first, second].round(9), method="asymptotic")
        row = figure(summary[1], None, "depth_tau", preset=preset, score=name)
        assert (row["value"], row["n"]) == (pytest.approx(expected.statistic, abs=0.01), len(first) + len(second))
        assert row["low"] < row["value"] < row["high"]
        p = figure(summary[1], None, "depth_tau_p", preset=preset, score=name)
        assert (p["value"], p["low"], p["n"]) == (pytest.approx(expected.pvalue, rel=0.1), None, row["n"])

        row = figure(summary[1], "second", "step_median", preset=preset, score=name)
        assert row["value"] == pytest.approx(np.median(second) - np.median(first))
        assert row["low"] <= row["value"] <= row["high"]
        test = stats.mannwhitneyu(second.round(9), first.round(9), alternative="greater", method="asymptotic")
        p = figure(summary[1], "second", "step_p", preset=preset, score=name)
        assert (p["value"], p["n"]) == (pytest.approx(test.pvalue, rel=0.1), row["n"])
        assert p["value"] < 0.05, "the second layer's z were moved up by 0.9"
        row = figure(summary[1], "third", "step_median", preset=preset, score=name)
        assert (row["value"], row["low"], row["n"]) == (None, None, len(second))
    assert not [r for r in summary[1].to_pylist() if r["layer"] == "first" and r["metric"].startswith("step")]


def test_one_layer_has_no_trend(tables: Any) -> None:
    only = [[r for r in rows if r["layer"] == "second"] for rows in tables]
    quick = science(calibrate={"n_bootstrap": 10})
    _, rows = summarise(["second"], with_layer("neurons", only[0]), with_layer("null_neurons", only[1]), quick)
    assert not {m for m in rows["metric"].to_pylist() if m.startswith(("depth", "step"))}


def test_every_figure_is_there_once(summary: Any) -> None:
    rows = summary[1].to_pylist()
    assert "permute_dims" not in {r["null_kind"] for r in rows}, "for study, off by default"
    keys = [tuple(r[c] for c in ("layer", "metric", "preset", "null_kind", "score")) for r in rows]
    assert len(set(keys)) == len(keys)
    assert not any(isinstance(r["value"], float) and math.isnan(r["value"]) for r in rows)


def test_order_of_rows_and_bootstrap_seed_are_fixed(tables: Any, summary: Any) -> None:
    neurons, beside = tables
    again = summarise(LAYERS, with_layer("neurons", neurons), with_layer("null_neurons", beside), science())
    assert again[1].equals(summary[1])
    only = [r for r in neurons if r["layer"] == "second"], [r for r in beside if r["layer"] == "second"]
    _, rows = summarise(["second"], with_layer("neurons", only[0]), with_layer("null_neurons", only[1]), science())
    of_second = [r for r in summary[1].to_pylist() if r["layer"] == "second" and r["metric"] == "auroc"]
    assert [r for r in rows.to_pylist() if r["layer"] == "second" and r["metric"] == "auroc"] == of_second


def test_median_z_against_permuted_coordinates(tables: Any) -> None:
    rng = np.random.default_rng(5)
    sizes = {"first": [24, 19], "second": [24], "third": []}
    draws = [
        {"layer": layer, "kind": kind, "n_used": n, "draw": i, "S": rng.normal(0.1 + 0.01 * n, 0.02)}
        for layer, found in sizes.items()
        for n in found
        for kind in ("permute_dims", "pool")
        for i in range(30)
    ]
    neurons = [
        r | ({"S": rng.normal(0.3, 0.1), "n_used": sizes[r["layer"]][i % len(sizes[r["layer"]])]})
        if r["status"] == "ok"
        else r
        for i, r in enumerate(tables[0])
    ]
    _, rows = summarise(
        LAYERS,
        with_layer("neurons", neurons),
        with_layer("null_neurons", []),
        science(calibrate={"n_bootstrap": 10}),
        with_layer("nulls", draws),
    )
    z: dict[str | None, list[float]] = {"first": [], "second": []}
    for r in neurons:
        if r["status"] == "ok":
            key = (r["layer"], r["n_used"], "permute_dims")
            null = np.array([d["S"] for d in draws if (d["layer"], d["n_used"], d["kind"]) == key])
            z[r["layer"]].append((r["S"] - null.mean()) / null.std())
    z[None] = z["first"] + z["second"]
    for layer, values in z.items():
        row = figure(rows, layer, "median_z", null_kind="permute_dims", score="S")
        assert (row["value"], row["n"]) == (pytest.approx(np.median(values)), len(values))
    assert figure(rows, "third", "median_z", null_kind="permute_dims", score="S")["value"] is None


P = ("specific_S_p", "specific_Q_p", "specific_D_p")
DIAGNOSES: list[tuple[dict[str, Any], str | None]] = [
    ({"status": "excluded", "reason": "dead", "n_tied_at_cut": 0}, "dead"),
    ({"status": "excluded", "reason": "constant", "n_tied_at_cut": 80}, "constant"),
    ({"status": "excluded", "reason": "too few examples: 3 of at least 12", "n_tied_at_cut": 1}, "too few examples"),
    ({"status": "excluded", "reason": "not finite: 2 responses are NaN", "n_tied_at_cut": 1}, None),
    ({"status": "failed", "reason": "ValueError: odd", "n_tied_at_cut": 1}, None),
    (dict(zip(P, (0.5, 0.5, 0.5), strict=True)) | {"n_tied_at_cut": 6}, None),
    (dict(zip(P, (0.5, 0.5, 0.5), strict=True)) | {"n_tied_at_cut": 7}, "saturated"),
    (dict(zip(P, (0.01, 0.5, 0.5), strict=True)), "low-level split"),
    (dict(zip(P, (0.5, 0.01, 0.5), strict=True)), "same concept, two classes"),
    (dict(zip(P, (0.01, 0.01, 0.5), strict=True)), "same concept, two classes"),
    (dict(zip(P, (0.01, 0.01, 0.01), strict=True)), None),
    (dict(zip(P, (0.01, 0.5, 0.01), strict=True)), None),
    (dict(zip(P, (0.01, 0.05, 0.5), strict=True)) | {"n_tied_at_cut": 30}, "saturated; low-level split"),
    ({"status": "ok"}, None),
]


def test_diagnoses_by_name() -> None:
    """K is 24: saturated means more than 6 tied."""
    rows = [{"layer": "x", "neuron": i, "status": "ok", "n_tied_at_cut": 1} | r for i, (r, _) in enumerate(DIAGNOSES)]
    assert diagnose(with_layer("neurons", rows), science()) == [name for _, name in DIAGNOSES]


def test_a_sweep_without_a_scored_neuron() -> None:
    rows = [{"layer": "x", "neuron": 0, "status": "excluded", "reason": "dead", "n_tied_at_cut": 0}]
    by_layer, summary = summarise(["x"], with_layer("neurons", rows), with_layer("null_neurons", []), science())
    assert by_layer["x"].to_pylist() == [{"neuron": 0, "q": None, "called": None, "diagnosis": "dead"}]
    assert figure(summary, None, "called_frac", preset="specific")["value"] is None
    assert figure(summary, "x", "n_excluded")["value"] == 1
