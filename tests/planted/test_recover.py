"""Size, power, AUROC and names of planted neurons, against loops over hand-made tables."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from planted.test_plant import science
from scipy.stats import mannwhitneyu
from statsmodels.stats.proportion import proportion_confint

from polyray.psi import recover
from polyray.schema import PLANTED_KINDS, PRESETS, TABLES

N = 60
CLASSES = ["cat", "dog", "car", "tree"]
PROMPTS = {"a cat": 0, "kitten": 0, "hound": 1, "automobile": 2, "oak": 3}
"""Each prompt and the class it is nearest to."""


def table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    spec = TABLES[name].schema
    return pa.Table.from_pylist([{c: r.get(c) for c in spec.names} for r in rows], schema=spec)


@pytest.fixture(scope="module")
def world() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    planted, neurons, examples, clusters = [], [], [], []
    for i in range(N):
        kind = PLANTED_KINDS[i % len(PLANTED_KINDS)]
        order = {"mono": 1, "order3": 3, "noise": 0}.get(kind, 2)
        classes = rng.permutation(CLASSES)[:order].tolist()
        planted.append({"neuron": i, "kind": kind, "planted_order": order, "classes": classes})
        ok = i % 11 != 10
        neuron: dict[str, Any] = {"neuron": i, "status": "ok" if ok else "excluded"}
        if ok:
            neuron |= {"k": int(rng.integers(2, 5)), "two_means": round(rng.random(), 1)}
            for preset in PRESETS:
                z = {c: float(rng.normal() + (kind in recover.POLYSEMANTIC)) for c in "SQD"}
                p = {c: float(rng.random() * 0.15) for c in "SQD"}
                neuron |= {f"{preset}_{c}_z": z[c] for c in "SQD"} | {f"{preset}_{c}_p": p[c] for c in "SQD"}
                neuron |= {
                    f"{preset}_p": max(p.values()),
                    f"{preset}_log_psi": -sum(np.logaddexp(0, -v) for v in z.values()),
                }
            purity = rng.choice([0.4, 0.85, 1.0])
            for rank in range(24):
                inside = classes and rng.random() < purity
                label = rng.choice(classes) if inside else rng.choice(CLASSES)
                cluster = int(rank % neuron["k"]) if rank < 20 else None
                examples.append({"neuron": i, "rank": rank, "label": str(label), "cluster": cluster})
            for c in range(neuron["k"]):
                clusters.append({"neuron": i, "cluster": c, "name": str(rng.choice(list(PROMPTS)))})
        neurons.append(neuron)
    return {"planted": planted, "neurons": neurons, "examples": examples, "clusters": clusters}


@pytest.fixture(scope="module")
def found(world: dict[str, list[dict[str, Any]]]) -> pa.Table:
    words = np.eye(len(CLASSES)) * 0.9 + 0.1
    rng = np.random.default_rng(1)
    vectors = [words[c] + 0.05 * rng.random(len(CLASSES)) for c in PROMPTS.values()]
    vocabulary = table("vocabulary", [{"prompt": p, "embedding": v} for p, v in zip(PROMPTS, vectors, strict=True)])
    classes = table("plant_classes", [{"label": c, "embedding": w} for c, w in zip(CLASSES, words, strict=True)])
    names = ("planted", "neurons", "examples", "clusters")
    return recover.planted_neurons(*(table(n, world[n]) for n in names), vocabulary, classes)


def test_purity_balance_and_names(world: dict[str, list[dict[str, Any]]], found: pa.Table) -> None:
    assert found["neuron"].to_pylist() == list(range(N))
    for row, truth, neuron in zip(found.to_pylist(), world["planted"], world["neurons"], strict=True):
        assert {c: row[c] for c in ("kind", "planted_order", "classes")} == {
            c: truth[c] for c in ("kind", "planted_order", "classes")
        }
        assert (row["k"], row["status"]) == (neuron.get("k"), neuron["status"])
        mine = [e["label"] for e in world["examples"] if e["neuron"] == row["neuron"] and e["rank"] < 20]
        if not mine or truth["kind"] == "noise":
            assert (row["purity"], row["balance"], row["name_hit_frac"]) == (None, None, None)
            continue
        inside = [x for x in mine if x in truth["classes"]]
        assert row["purity"] == pytest.approx(len(inside) / 20)
        rarest = min(inside.count(c) for c in truth["classes"])
        assert row["balance"] == pytest.approx(rarest / 20 * truth["planted_order"])
        names = [c["name"] for c in world["clusters"] if c["neuron"] == row["neuron"]]
        hits = [CLASSES[PROMPTS[n]] in truth["classes"] for n in names]
        assert row["name_hit_frac"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("least", recover.PURITIES)
def test_size_power_and_auroc(world: dict[str, list[dict[str, Any]]], found: pa.Table, least: float) -> None:
    layer = "planted.x"
    neurons = table("neurons", world["neurons"]).append_column("layer", pa.array([layer] * N))
    rows = recover.planted_summary(
        [layer], found.append_column("layer", pa.array([layer] * N)), neurons, science()
    ).to_pylist()
    figures = {tuple(r[c] for c in ("metric", "kind", "min_purity", "preset", "score")): r for r in rows}
    assert len(figures) == len(rows)
    scored = [f | n for f, n in zip(found.to_pylist(), world["neurons"], strict=True) if f["status"] == "ok"]
    needed = {"order2": 0.5, "order3": 0.5, "siblings": 0.5, "unequal": 1e-9}
    pure = [
        r
        for r in scored
        if least == 0 or ((r["purity"] or 0.0) >= least and (r["balance"] or 0.0) >= needed.get(r["kind"], 0.0))
    ]
    for kind in PLANTED_KINDS:
        of = [r for r in pure if r["kind"] == kind]
        if kind == "noise" and least > 0:
            assert ("p05_frac", kind, least, "specific", "p") not in figures
            continue
        for preset in PRESETS:
            for score in ("S", "Q", "D", "p"):
                row = figures["p05_frac", kind, least, preset, score]
                p = [r[f"{preset}_p" if score == "p" else f"{preset}_{score}_p"] for r in of]
                assert row["n"] == len(p)
                if p:
                    hits = sum(x < 0.05 for x in p)
                    assert row["value"] == pytest.approx(hits / len(p))
                    low, high = proportion_confint(hits, len(p), method="wilson")
                    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-9)
                else:
                    assert row["value"] is None
        for k in range(2, 7):
            share = sum(r["k"] == k for r in of) / len(of) if of else None
            assert figures["k_frac", kind, least, None, str(k)]["value"] == (
                None if share is None else pytest.approx(share)
            )
    mono = [r for r in pure if r["kind"] == "mono"]
    many = [r for r in pure if r["kind"] in ("order2", "order3")]
    for key, column in ((("specific", "log_psi"), "specific_log_psi"), ((None, "two_means"), "two_means")):
        row = figures["auroc", "order2+3", least, *key]
        if mono and many:
            a, b = [r[column] for r in many], [r[column] for r in mono]
            assert row["value"] == pytest.approx(mannwhitneyu(a, b).statistic / len(a) / len(b))
            assert row["low"] <= row["value"] <= row["high"]
            assert row["n"] == min(len(a), len(b))
        else:
            assert row["value"] is None
