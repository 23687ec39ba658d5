"""Calibrate: z, hat, p, log_psi and PSI of every preset against a loop over neurons and draws."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from psi.samples import science

from polyray import columns
from polyray.errors import StoreError
from polyray.psi.calibrate import calibrate, calibrated, nulls, require_draws, scores_of
from polyray.schema import TABLES

SIZES = (24, 19)
B = 50
CONSTANT = ("one_concept", 19)
"""Kind and size of the draws that are all alike."""
NO_DRAWS = 15
"""A size for which nothing was drawn."""


def draw_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Null draws in the form of the table: those of a layer and the shared ones."""
    rows: list[dict[str, Any]] = []
    for n in SIZES:
        for kind in ("rotation", "pool", "one_concept"):
            for i in range(B):
                alike = (kind, n) == CONSTANT
                D = None if kind == "rotation" else 0.5 if alike else round(rng.random(), 2)
                rows.append(
                    {
                        "kind": kind,
                        "n_used": n,
                        "draw": i,
                        "S": 0.25 if alike else round(rng.normal(0.2, 0.05), 2),
                        "k": int(rng.integers(2, 5)),
                        "Q": None if kind == "rotation" else 0.1,
                        "Q_z": None if kind == "rotation" else 0.0 if alike else round(rng.normal(), 1),
                        "D": D,
                    }
                )
    for k in (2, 3, 4):
        for i in range(B):
            empty = dict.fromkeys(("n_used", "S", "Q", "Q_z"))
            rows.append({"kind": "shuffle_text", "draw": i, "k": k, "D": round(rng.random(), 2), **empty})
    return rows


def score_rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Scored neurons and null neurons; two-digit scores, so that they tie with draws."""
    rows = []
    for i, kind in enumerate(["real"] * 12 + ["rotation", "pool", "one_concept"] * 4):
        single = i % 6 == 5  # all its labels agree
        rows.append(
            {
                "kind": kind,
                "neuron": 3 * (i % 12),
                "status": "ok",
                "reason": None,
                "n_used": NO_DRAWS if i == 4 else SIZES[i % 2],
                "n_labels": 1 if single else 5,
                "S": round(rng.normal(0.28, 0.08), 2),
                "k": int(rng.integers(2, 5)),
                "Q": 0.0 if single else round(rng.random(), 2),
                "Q_mean": 0.0 if single else 0.3,
                "Q_std": 0.0 if single else 0.1,
                "Q_p": round(rng.random(), 2),
                "two_means": round(rng.random(), 2),
                "D": round(rng.random(), 2),
            }
        )
    return rows


def as_table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    return columns.table(name, {c: [r[c] for r in rows] for c in TABLES[name].schema.names})


def naive(row: dict[str, Any], draws: list[dict[str, Any]]) -> dict[str, float]:
    """The method's section A.5 for one neuron."""

    def against(raw: float, values: list[float]) -> tuple[float, float, float, float, float]:
        if not values:
            return (math.nan,) * 5
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        if std < 1e-6:
            return mean, std, 0.0, 0.5, 1.0
        z = (raw - mean) / std
        return mean, std, z, 1 / (1 + math.exp(-z)), (1 + sum(v >= raw - 1e-9 for v in values)) / (len(values) + 1)

    n, k = row["n_used"], row["k"]

    def values(kind: str, column: str) -> list[Any]:
        return [r[column] for r in draws if r["kind"] == kind and r["n_used"] == n]

    informative = row["Q_std"] >= 1e-6
    Q_z = (row["Q"] - row["Q_mean"]) / row["Q_std"] if informative else 0.0
    compared = {
        "paper": (
            against(row["S"], values("rotation", "S")),
            (row["Q_mean"], row["Q_std"], Q_z, 1 / (1 + math.exp(-Q_z)), row["Q_p"] if informative else 1.0),
            against(row["D"], [r["D"] for r in draws if r["kind"] == "shuffle_text" and r["k"] == k]),
        )
    }
    for preset, kind in (("selective", "pool"), ("specific", "one_concept")):
        compared[preset] = (
            against(row["S"], values(kind, "S")),
            against(Q_z, values(kind, "Q_z")),
            against(row["D"], values(kind, "D")),
        )
    out: dict[str, float] = {}
    for preset, parts in compared.items():
        for c, part in zip("SQD", parts, strict=True):
            out |= {f"{preset}_{c}_{w}": v for w, v in zip(("mean", "std", "z", "hat", "p"), part, strict=True)}
        hats = [part[3] for part in parts]
        out[f"{preset}_psi"] = hats[0] * hats[1] * hats[2]
        out[f"{preset}_log_psi"] = math.nan if math.isnan(sum(hats)) else sum(map(math.log, hats))
        p = [part[4] for part in parts]
        out[f"{preset}_p"] = math.nan if math.isnan(sum(p)) else max(p)
    return out


@pytest.fixture(scope="module")
def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = np.random.default_rng(2)
    return score_rows(rng), draw_rows(rng)


def test_every_calibrated_column_is_that_of_a_loop(rows: Any) -> None:
    scored, draws = rows
    found = calibrated(as_table("scores", scored), nulls(as_table("nulls", draws)), science())
    expected = [naive(row, draws) for row in scored]
    assert set(found) == set(expected[0])
    for name, values in found.items():
        np.testing.assert_allclose(values, [e[name] for e in expected], rtol=1e-9, atol=1e-9, err_msg=name)
    ties = sum(r["S"] == d["S"] for r in scored for d in draws if d["kind"] == "pool" and d["n_used"] == r["n_used"])
    assert ties > 10, "ties between scores and draws were not tried"
    assert np.isnan(found["specific_p"]).sum() == 1
    assert np.isfinite(found["paper_Q_p"]).all()


def test_log_psi_ranks_where_psi_cannot(rows: Any) -> None:
    """From z = 18 on every hat is 1 in float32; the sum of logarithms still tells neurons apart."""
    S = np.array([d["S"] for d in rows[1] if d["kind"] == "rotation" and d["n_used"] == 24])
    base = score_rows(np.random.default_rng(0))[0] | {"n_used": 24, "k": 3, "D": 0.5, "Q": 3.0}
    neurons = [base | {"S": S.mean() + z * S.std()} for z in (18.0, 21.0, 24.0)]
    found = calibrated(as_table("scores", neurons), nulls(as_table("nulls", rows[1])), science())
    np.testing.assert_allclose(found["paper_S_z"], [18, 21, 24])
    assert (found["paper_S_hat"].astype(np.float32) == 1).all()
    hats = [found[f"paper_{c}_hat"].astype(np.float32) for c in "SQD"]
    assert len(set(hats[0] * hats[1] * hats[2])) == 1
    for values in (found["paper_log_psi"], *(scores_of(found, "paper")[c] for c in ("S", "S*Q", "log_psi"))):
        assert (np.diff(values) > 0).all()


def test_ablations_rank_as_the_products_of_their_hats(rows: Any) -> None:
    scored, draws = rows
    found = calibrated(as_table("scores", scored), nulls(as_table("nulls", draws)), science())
    for preset in ("paper", "selective", "specific"):
        hats = {c: found[f"{preset}_{c}_hat"] for c in "SQD"}
        known = {**hats, "S*Q": hats["S"] * hats["Q"], "log_psi": hats["S"] * hats["Q"] * hats["D"]}
        ranks = scores_of(found, preset)
        assert set(ranks) == set(known)
        there = ~np.isnan(known["log_psi"])
        for name, values in ranks.items():
            assert np.array_equal(
                np.argsort(values[there], kind="stable"), np.argsort(known[name][there], kind="stable")
            )


def test_chance_is_an_eighth(rows: Any) -> None:
    """A neuron at the mean of every null has hats of one half."""
    draws = rows[1]
    of = [d for d in draws if d["kind"] == "one_concept" and d["n_used"] == 24]
    Q_z = float(np.mean([d["Q_z"] for d in of]))
    row = score_rows(np.random.default_rng(0))[0] | {
        "n_used": 24,
        "k": 3,
        "S": float(np.mean([d["S"] for d in of])),
        "Q": 0.3 + 0.1 * Q_z,
        "D": float(np.mean([d["D"] for d in of])),
    }
    found = calibrated(as_table("scores", [row]), nulls(as_table("nulls", draws)), science())
    assert found["specific_psi"][0] == pytest.approx(0.125)
    assert found["specific_log_psi"][0] == pytest.approx(3 * math.log(0.5))


def mined_rows(neurons: list[int], excluded: dict[int, str]) -> pa.Table:
    return as_table(
        "mined",
        [
            {
                "neuron": n,
                "status": "excluded" if n in excluded else "ok",
                "reason": excluded.get(n),
                "n_tied_at_cut": 1 + n,
                "example": list(range(n % 5)),
                "response": [1.0] * (n % 5),
                "position": [0] * (n % 5),
            }
            for n in neurons
        ],
    )


def test_every_neuron_has_one_row_and_null_neurons_stand_apart(rows: Any) -> None:
    scored, draws = rows
    real = [r | {"kind": "real"} for r in scored if r["kind"] == "real"]
    without = {"n_used", "n_labels", "S", "k", "Q", "Q_mean", "Q_std", "Q_p", "two_means", "D"}
    late = real[0] | dict.fromkeys(without) | {"neuron": 34, "status": "excluded", "reason": "too few examples: 3"}
    broken = real[0] | dict.fromkeys(without) | {"neuron": 35, "status": "failed", "reason": "ValueError: odd"}
    beside = [r for r in scored if r["kind"] != "real"]
    table = as_table("scores", [*reversed(real), late, broken, *beside])
    mined = mined_rows([r["neuron"] for r in real] + [34, 35, 36], {36: "dead"})
    neurons, null_neurons = calibrate(table, mined, nulls(as_table("nulls", draws)), "pre_activation", science(), 100)

    by_neuron = {r["neuron"]: r for r in neurons.to_pylist()}
    assert len(by_neuron) == len(neurons) == 15
    for row in real:
        found = by_neuron[row["neuron"]]
        assert (found["status"], found["reason"], found["ranked_by"]) == ("ok", None, "pre_activation")
        assert (found["n_examples"], found["n_tied_at_cut"]) == (row["neuron"] % 5, 1 + row["neuron"])
        assert {c: found[c] for c in without} == {c: row[c] for c in without}
        for name, value in naive(row, draws).items():
            assert found[name] is None if math.isnan(value) else found[name] == pytest.approx(value, rel=1e-9, abs=1e-9)
    for neuron, status, reason in (
        (34, "excluded", "too few examples: 3"),
        (35, "failed", "ValueError: odd"),
        (36, "excluded", "dead"),
    ):
        found = by_neuron[neuron]
        assert (found["status"], found["reason"]) == (status, reason)
        assert all(found[c] is None for c in found if c in without or c.startswith(("paper", "selective", "specific")))

    assert len(null_neurons) == len(beside)
    for found, row in zip(null_neurons.to_pylist(), beside, strict=True):
        assert (found["kind"], found["neuron"], found["S"]) == (row["kind"], row["neuron"], row["S"])
        for name, value in naive(row, draws).items():
            assert found[name] is None if math.isnan(value) else found[name] == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_a_layer_without_a_scored_neuron(rows: Any) -> None:
    empty = TABLES["scores"].schema.empty_table()
    shared = [d for d in rows[1] if d["kind"] == "shuffle_text"]
    mined = mined_rows([4, 1], {1: "dead", 4: "constant"})
    neurons, null_neurons = calibrate(empty, mined, nulls(as_table("nulls", shared)), "response", science(), 100)
    assert [(r["neuron"], r["reason"], r["specific_p"]) for r in neurons.to_pylist()] == [
        (4, "constant", None),
        (1, "dead", None),
    ]
    assert len(null_neurons) == 0


N_POOL = 300
ASKED = science(calibrate={"B": B}).calibrate


def test_missing_draws_are_refused(rows: Any) -> None:
    draws: list[dict[str, Any]] = rows[1]
    require_draws(as_table("nulls", draws), ASKED, SIZES, N_POOL)
    short = [d for d in draws if not (d["kind"] == "pool" and d["n_used"] == 19 and d["draw"] in (3, 4))]
    with pytest.raises(StoreError, match="48 of 50 pool draws of 19"):
        require_draws(as_table("nulls", short), ASKED, SIZES, N_POOL)
    require_draws(as_table("nulls", short), ASKED, [24], N_POOL)
    with pytest.raises(StoreError, match="0 of 50 rotation draws of 21"):
        require_draws(as_table("nulls", draws), ASKED, [24, 21], N_POOL)


@pytest.mark.parametrize("kind", ["rotation", "pool", "one_concept"])
def test_a_missing_last_unit_is_seen(rows: Any, kind: str) -> None:
    gap = [d for d in rows[1] if not (d["kind"] == kind and d["n_used"] == 24 and d["draw"] >= 40)]
    with pytest.raises(StoreError, match=f"40 of 50 {kind} draws of 24"):
        require_draws(as_table("nulls", gap), ASKED, SIZES, N_POOL)


def test_fewer_anchors_than_draws_asked_for_are_no_gap(rows: Any) -> None:
    few = [d for d in rows[1] if d["kind"] != "one_concept" or d["draw"] < 30]
    for n_pool in (59, 60):
        require_draws(as_table("nulls", few), ASKED, SIZES, n_pool)
    for n_pool in (58, 61):
        with pytest.raises(StoreError, match=r"30 of (29|31) one_concept draws of 24"):
            require_draws(as_table("nulls", few), ASKED, SIZES, n_pool)
    table = as_table("scores", [r for r in rows[0] if r["n_used"] == 24])
    found = calibrated(table, nulls(as_table("nulls", few)), science())
    assert found["specific_S_p"].min() >= 1 / 31


def test_a_pool_smaller_than_the_sets_needs_rotation_draws_alone(rows: Any) -> None:
    none = [d for d in rows[1] if d["kind"] == "rotation" or d["n_used"] != 24]
    require_draws(as_table("nulls", none), ASKED, [24], 23)
    with pytest.raises(StoreError, match="0 of 50 pool draws of 24"):
        require_draws(as_table("nulls", none), ASKED, [24], 24)


def test_a_neuron_of_more_examples_than_the_pool_has_says_so(rows: Any) -> None:
    scored, draws = rows
    real = [r for r in scored if r["kind"] == "real" and r["n_used"] in SIZES]
    beyond = [d for d in draws if d["kind"] in ("rotation", "shuffle_text") or d["n_used"] == 19]
    mined = mined_rows([r["neuron"] for r in real], {})
    neurons, _ = calibrate(as_table("scores", real), mined, nulls(as_table("nulls", beyond)), "response", science(), 20)
    by_neuron = {r["neuron"]: r for r in neurons.to_pylist()}
    for row in real:
        found = by_neuron[row["neuron"]]
        assert found["status"] == "ok"
        assert (found["specific_p"] is None) == (row["n_used"] == 24)
        assert found["paper_psi"] is not None
        assert found["reason"] == (
            "not calibrated: the pool has 20 patches with a vector, fewer than the 24 examples clustered"
            if row["n_used"] == 24
            else None
        )


def test_draws_of_permuted_coordinates_are_wanted_only_where_asked_for(rows: Any) -> None:
    asked = science(calibrate={"B": B, "permute_dims": True}).calibrate
    with pytest.raises(StoreError, match="0 of 50 permute_dims draws of 24"):
        require_draws(as_table("nulls", rows[1]), asked, SIZES, N_POOL)
    more = [d | {"kind": "permute_dims", "Q": None, "D": None} for d in rows[1] if d["kind"] == "rotation"]
    require_draws(as_table("nulls", [*rows[1], *more]), asked, SIZES, N_POOL)


def test_draws_that_could_not_be_clustered_are_no_draws(rows: Any) -> None:
    scored, draws = rows
    alike = [d | {"k": 1, "S": 0.0, "D": 0.0} for d in draws if d["kind"] == "one_concept" and d["draw"] < 10]
    table = as_table("scores", scored)
    found = calibrated(table, nulls(as_table("nulls", [*draws, *alike])), science())
    expected = calibrated(table, nulls(as_table("nulls", draws)), science())
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
