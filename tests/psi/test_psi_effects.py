"""Effects: every row against loops over hand-made swaps, one cluster, neuron, layer and split at a time."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from psi.samples import science
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from polyray import columns
from polyray.kernels.effects import mean_interval
from polyray.psi.contrasts import NO_HOST, ONE_MEMBER
from polyray.psi.effects import NO_JUDGED, NO_NEURON, NO_VERDICT, TOO_FEW, effects
from polyray.schema import CONTRASTS, SWAP_CONDITIONS, TABLES

LAYERS = ["first", "second", "third"]
"""In the last one nothing is swapped."""
SWAPPED = {"first": list(range(0, 18, 2)), "second": [1, 3, 4, 5, 7], "third": []}
WITHOUT_P = 8
"""A neuron with a verdict, but without p of S."""
BOXES = [("box 0-1 %", 0.01), ("box 1-4 %", 0.04), ("box 4-9 %", 0.09), ("box 9-16 %", 0.16), ("box over 16 %", 9.0)]
TWO_SIDED = ("aligned-non_aligned", "non_aligned-random")
N_BOOTSTRAP = 40
SEED = 6
Row = dict[str, Any]


def table(name: str, rows: list[Row], layer: bool = True) -> pa.Table:
    known = TABLES[name].schema.names
    made = columns.table(name, {c: [r.get(c) for r in rows] for c in known})
    return made.add_column(0, "layer", pa.array([r["layer"] for r in rows], pa.string())) if layer else made


def hosts_of(rng: np.random.Generator, layer: str, kind: str, neuron: int, clusters: list[Row]) -> list[Row]:
    """Rows of all hosts of a neuron: seven of each cluster where it is driven, else three to eight; of a third none."""
    made: list[Row] = []
    number = itertools.count()
    sd = float(rng.uniform(0.5, 3.0))
    driven = neuron % 3 == 2
    for cluster in clusters[:-1] if len(clusters) > 2 else clusters:
        for _ in range(7 if driven else int(rng.integers(3, 9))):
            host = next(number)
            box = float(rng.choice([0.005, 0.01, 0.03, 0.16, 0.4 * 0.4]))
            baseline = np.float32(rng.normal())
            for condition in SWAP_CONDITIONS:
                row = {"layer": layer, "kind": kind, "neuron": neuron, "host": host, "condition": condition}
                row |= {
                    "status": "ok",
                    "reason": None,
                    "cluster": cluster["cluster"],
                    "box_frac": box,
                    "host_example": host,
                }
                lift = 4.0 * driven if condition == "aligned" and kind == "real" else 0.0
                value = np.float32(baseline if condition == "baseline" else np.round(rng.normal(lift), 1))
                row |= {"response": value, "response_at_peak": np.float32(np.round(value - rng.random(), 1))}
                effect = float(value) - float(baseline)
                row |= {"effect": effect, "effect_sd": effect / sd if neuron != 4 else None}
                alone = cluster["size"] == 1 and condition in ("aligned", "shuffled_position")
                if alone and neuron != 6:
                    row |= {"status": "not_swappable", "reason": "alone in its cluster"}
                elif (alone and neuron == 6) or rng.random() < 0.04:
                    row |= {"status": "failed", "reason": str(rng.choice(["odd", "image gone"]))}
                elif rng.random() < 0.04:
                    row |= {"response": None, "response_at_peak": None, "effect": None, "effect_sd": None}
                if alone and neuron == 6:
                    row["reason"] = None
                if row["status"] != "ok":
                    row |= {c: None for c in ("response", "response_at_peak", "effect", "effect_sd")}
                if neuron == 5 and condition == "random":
                    row |= {"status": "failed", "reason": "nothing drawn"}
                made.append(row)
    # Rounding of float32: a difference that counts as none.
    for row in made:
        if neuron == 10 and row["condition"] == "aligned" and row["status"] == "ok":
            row["response"] = np.float32(2.0)
        if neuron == 10 and row["condition"] == "random" and row["status"] == "ok":
            row["response"] = np.nextafter(np.float32(2.0), np.float32(3.0))
    return made


class World:
    def __init__(self) -> None:
        rng = np.random.default_rng(SEED)
        self.swaps: dict[str, list[Row]] = {layer: [] for layer in LAYERS}
        self.clusters: list[Row] = []
        self.neurons: list[Row] = []
        for layer in LAYERS:
            for neuron in range(20):  # more than are swapped
                sizes = sorted((int(s) for s in rng.choice([1, 1, 7, 12], int(rng.integers(2, 4)))), reverse=True)
                mine = [{"layer": layer, "neuron": neuron, "cluster": i, "size": s} for i, s in enumerate(sizes)]
                self.clusters += mine
                score = None if neuron == 3 else float(np.round(rng.normal(-2), 1))
                p = None if neuron in (3, 12) else float(rng.choice([0.01, 0.2]))
                p = None if neuron == WITHOUT_P else p
                self.neurons.append(
                    {"layer": layer, "neuron": neuron, "specific_log_psi": score, "specific_S_p": p, "status": "ok"}
                )
                if neuron in SWAPPED[layer] and neuron != 7:  # of 7 there is no row at all
                    self.swaps[layer] += hosts_of(rng, layer, "real", neuron, mine)
                if (layer, neuron) == ("first", 11):  # of which nobody asked
                    self.swaps[layer] += hosts_of(np.random.default_rng(0), layer, "real", neuron, mine)
                if layer == "first" and neuron < 7:
                    self.swaps[layer] += hosts_of(rng, layer, "null", neuron, mine)

    def made(self, order: np.random.Generator | None = None) -> list[Row]:
        def moved(rows: list[Row]) -> list[Row]:
            return rows if order is None else [rows[i] for i in order.permutation(len(rows))]

        given = [table("swaps", moved(self.swaps[layer]), layer=False) for layer in LAYERS]
        chosen = science(seed=SEED, calibrate={"n_bootstrap": N_BOOTSTRAP})
        clusters, neurons = (table(n, moved(getattr(self, n))) for n in ("clusters", "neurons"))
        return effects(LAYERS, iter(given), SWAPPED, clusters, neurons, chosen).to_pylist()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def rows(world: World) -> list[Row]:
    return world.made()


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[c] for c in ("layer", "kind", "scope", "split", "contrast", "neuron", "cluster"))


def flipped_p(d: list[float], two_sided: bool) -> float:
    """Share of all sign flips that reach the observed sum of ranks; Pratt's zeros."""
    x = np.array(d)
    rank = np.where(x == 0, 0.0, stats.rankdata(np.abs(x)))
    flips = (np.arange(2 ** len(x))[:, None] >> np.arange(len(x))) & 1
    sums, seen = flips @ rank, rank[x > 0].sum()
    greater, less = (sums >= seen - 1e-9).mean(), (sums <= seen + 1e-9).mean()
    return min(1.0, 2 * min(greater, less)) if two_sided else float(greater)


def figures(d: list[float], contrast: str) -> Row:
    if not d:
        return {"mean": None, "low": None, "high": None, "p": None, "n": 0}
    _, low, high = mean_interval(torch.tensor([d], dtype=torch.float64), N_BOOTSTRAP, SEED)
    p = flipped_p(d, contrast in TWO_SIDED)
    ends = {"low": low.item(), "high": high.item()} if len(d) > 1 else {"low": None, "high": None}
    return {"mean": float(np.mean(d)), "p": p, "n": len(d)} | ends


def scaled(d: list[float], contrast: str) -> Row:
    return {f"{c}_sd": v for c, v in figures(d, contrast).items() if c in ("mean", "low", "high")}


def share(hits: list[bool]) -> Row:
    nothing = {"mean": None, "low": None, "high": None, "p": None, "n": 0}
    if not hits:
        return nothing | {"reason": NO_JUDGED}
    low, high = proportion_confint(sum(hits), len(hits), method="wilson")
    return nothing | {"mean": sum(hits) / len(hits), "low": low, "high": high, "n": len(hits), "reason": None}


def difference(neuron: list[Row], host: int, contrast: str) -> float | None:
    a, b = (next(r for r in neuron if r["host"] == host and r["condition"] == c) for c in contrast.split("-"))
    column = "response_at_peak" if contrast == "aligned-shuffled_position" else "response"
    if a["status"] != "ok" or b["status"] != "ok" or a[column] is None or b[column] is None:
        return None
    d = float(a[column]) - float(b[column])
    largest = max(abs(float(r["response"])) for r in neuron if r["response"] is not None)
    return 0.0 if abs(d) <= 1e-6 * largest else d


def reason_of(neuron: list[Row], hosts: list[int], contrast: str, otherwise: str) -> str:
    given = Counter(
        r["reason"]
        for r in neuron
        if r["host"] in hosts and r["condition"] in contrast.split("-") and r["reason"] is not None
    )
    return min(given, key=lambda w: (-given[w], w)) if given else otherwise


class Oracle:
    """All rows but q, by loops."""

    def __init__(self, world: World) -> None:
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.causal: dict[tuple[str, int], bool | None] = {}
        self.means: dict[str, dict[tuple[str, int], dict[str, float]]] = {"real": {}, "null": {}}
        self.sd: dict[tuple[str, str, int], float | None] = {}
        self.boxes: dict[tuple[str, int], list[tuple[float, dict[str, float]]]] = {}
        self.world = world
        for kind in ("real", "null"):
            for layer in LAYERS:
                seen = {r["neuron"] for r in world.swaps[layer] if r["kind"] == kind}
                for neuron in SWAPPED[layer] if kind == "real" else sorted(seen):
                    self.neuron(layer, kind, neuron)
        self.verdicts()
        for layer in (*LAYERS, None):
            self.layer(layer)

    def put(self, row: Row) -> None:
        nothing = {"neuron": None, "cluster": None, "causal": None, "reason": None, "split": "all"}
        nothing |= dict.fromkeys(("mean_sd", "low_sd", "high_sd"))
        row = nothing | row
        assert key(row) not in self.rows
        self.rows[key(row)] = row

    def neuron(self, layer: str, kind: str, neuron: int) -> None:
        mine = [r for r in self.world.swaps[layer] if (r["kind"], r["neuron"]) == (kind, neuron)]
        sds = [r["effect"] / r["effect_sd"] for r in mine if r.get("effect_sd")]
        sd = self.sd[kind, layer, neuron] = float(np.median(sds)) if sds else None
        hosts = sorted({r["host"] for r in mine})
        where = {"layer": layer, "kind": kind, "neuron": neuron}
        by_host: dict[int, dict[str, float]] = {h: {} for h in hosts}
        for contrast in CONTRASTS if kind == "real" else ["aligned-non_aligned"]:
            of = {h: difference(mine, h, contrast) for h in hosts}
            for h, d in of.items():
                if d is not None:
                    by_host[h][contrast] = d
            groups = [(None, hosts, NO_HOST)]
            if kind == "real":
                for c in (c for c in self.world.clusters if (c["layer"], c["neuron"]) == (layer, neuron)):
                    inside = sorted({r["host"] for r in mine if r["cluster"] == c["cluster"]})
                    groups.append((c["cluster"], inside, ONE_MEMBER if c["size"] == 1 else NO_HOST))
            for cluster, inside, otherwise in groups:
                d = [x for h in inside if (x := of[h]) is not None]
                row = where | {"scope": "neuron" if cluster is None else "cluster", "cluster": cluster}
                row |= {"contrast": contrast} | figures(d, contrast)
                if sd is not None:
                    row |= scaled([x / sd for x in d], contrast)
                if not d:
                    row["reason"] = reason_of(mine, inside, contrast, otherwise)
                elif len(d) < 5 and cluster is not None:
                    row["reason"] = TOO_FEW
                self.put(row)
        self.means[kind][layer, neuron] = {
            c: float(np.mean([d[c] for d in by_host.values() if c in d]))
            for c in CONTRASTS
            if any(c in d for d in by_host.values())
        }
        if kind == "real":
            box = {r["host"]: r["box_frac"] for r in mine}
            self.boxes[layer, neuron] = [(box[h], by_host[h]) for h in hosts]

    def verdicts(self) -> None:
        tried = [
            r
            for r in self.rows.values()
            if (r["scope"], r["contrast"]) == ("cluster", "aligned-random") and r["n"] >= 5
        ]
        q = multipletests([r["p"] for r in tried], method="fdr_bh")[1]
        for layer in LAYERS:
            for neuron in SWAPPED[layer]:
                mine = [(r, v) for r, v in zip(tried, q, strict=True) if (r["layer"], r["neuron"]) == (layer, neuron)]
                verdict = sum(r["mean"] > 0 and v < 0.05 for r, v in mine) >= 2 if len(mine) > 1 else None
                self.causal[layer, neuron] = verdict
                row = self.rows[layer, "real", "neuron", "all", "aligned-random", neuron, None]
                row["causal"] = verdict
                row["reason"] = NO_VERDICT if verdict is None and row["n"] else row["reason"]

    def layer(self, layer: str | None) -> None:
        real = [k for k in self.means["real"] if layer in (None, k[0])]
        known = {(r["layer"], r["neuron"]): r for r in self.world.neurons}
        splits: dict[str, tuple[list[tuple[str, int]] | None, list[tuple[str, int]] | None, float, float]] = {}
        splits["all"] = real, real, -1.0, 9.0
        scored = [k for k in real if known[k]["specific_log_psi"] is not None]
        if len(scored) >= 4:
            score = {k: known[k]["specific_log_psi"] for k in scored}
            edges = [-np.inf, *np.percentile(list(score.values()), [25, 50, 75]), np.inf]
            for i in range(4):
                who = [k for k in scored if edges[i] < score[k] <= edges[i + 1]]
                splits[f"log_psi {i + 1}/4"] = who, who, -1.0, 9.0
        low = -1.0
        for name, high in BOXES:
            high += 1e-9
            hosting = [k for k in real if any(low < b <= high for b, _ in self.boxes[k])]
            average = {k: np.mean([b for b, _ in self.boxes[k]]) for k in real if self.boxes[k]}
            judged = [k for k, b in average.items() if low < b <= high]
            splits[name] = hosting or None, judged or None, low, high
            low = high
        for split, (members, judged_by, low, high) in splits.items():
            if members is not None:
                self.of_split(layer, "real", split, members, low, high)
            if judged_by is not None:
                where = {"layer": layer, "kind": "real", "scope": "sweep" if layer is None else "layer", "split": split}
                ruled = [k for k in judged_by if self.causal[k] is not None]
                self.put(where | {"contrast": "causal"} | share([bool(self.causal[k]) for k in ruled]))
                ruled = [k for k in ruled if known[k]["specific_S_p"] is not None]
                both = [bool(self.causal[k]) and known[k]["specific_S_p"] < 0.05 for k in ruled]
                self.put(where | {"contrast": "causal_specific"} | share(both))
        null = [k for k in self.means["null"] if layer in (None, k[0])]
        if null:
            self.of_split(layer, "null", "all", null, -1.0, 9.0)
            where = {"layer": layer, "kind": "null", "scope": "sweep" if layer is None else "layer"}
            p = [self.rows[k[0], "null", "neuron", "all", "aligned-non_aligned", k[1], None]["p"] for k in null]
            p = [x for x in p if x is not None]
            self.put(where | {"contrast": "null_p05"} | share([x < 0.05 for x in p]))
            nothing = {"low": None, "high": None, "n": len(p)}
            for name, side in (("null_ks", "two-sided"), ("null_small", "greater")):
                ks = stats.kstest(p, "uniform", alternative=side)
                self.put(where | nothing | {"contrast": name, "mean": ks.statistic, "p": ks.pvalue})

    def of_split(
        self, layer: str | None, kind: str, split: str, members: list[tuple[str, int]], low: float, high: float
    ) -> None:
        for contrast in CONTRASTS if kind == "real" else ["aligned-non_aligned"]:
            mean: dict[tuple[str, int], float] = {}
            for k in members:
                if kind == "null":
                    inside = [v for c, v in self.means["null"][k].items() if c == contrast]
                else:
                    inside = [d[contrast] for b, d in self.boxes[k] if low < b <= high and contrast in d]
                mean |= {k: float(np.mean(inside))} if inside else {}
            row: Row = {"layer": layer, "kind": kind, "scope": "sweep" if layer is None else "layer", "split": split}
            row |= {"contrast": contrast} | figures(list(mean.values()), contrast)
            in_sd = [v / sd for k, v in mean.items() if (sd := self.sd[kind, *k]) is not None]
            self.put(row | scaled(in_sd, contrast) | {"reason": None if mean else NO_NEURON})


@pytest.fixture(scope="module")
def oracle(world: World) -> Oracle:
    return Oracle(world)


def test_every_row_is_that_of_the_loops(rows: list[Row], oracle: Oracle) -> None:
    assert len({key(r) for r in rows}) == len(rows)
    assert {key(r) for r in rows} == set(oracle.rows)
    for row in rows:
        expected = oracle.rows[key(row)]
        for column, value in expected.items():
            about = pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
            assert row[column] == about, (key(row), column)


def test_q_is_over_kind_scope_contrast_and_sort_of_split(rows: list[Row]) -> None:
    families: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tested = row["p"] is not None and not (row["scope"] == "cluster" and row["n"] < 5)
        assert (row["q"] is not None) == tested
        if tested:
            family = (row["kind"], row["scope"], row["contrast"], row["split"].split()[0])
            families.setdefault(family, []).append(row)
    for of in families.values():
        q = multipletests([r["p"] for r in of], method="fdr_bh")[1]
        assert [r["q"] for r in of] == pytest.approx(q.tolist(), rel=1e-12)
    assert len(families) == 6 + 6 + 1 + 2 * (3 * 6 + 3)


def test_the_world_has_all_that_matters(rows: list[Row], oracle: Oracle) -> None:
    assert Counter(oracle.causal.values()).keys() == {True, False, None}
    assert oracle.causal["first", WITHOUT_P] is not None
    reasons = Counter(r["reason"] for r in rows)
    for reason in (ONE_MEMBER, NO_HOST, NO_VERDICT, NO_NEURON, NO_JUDGED, "alone in its cluster", "nothing drawn"):
        assert reasons[reason], reason
    zero = [r for r in rows if (r["layer"], r["neuron"], r["contrast"]) == ("first", 10, "aligned-random")]
    assert zero[0]["n"] > 0
    assert {(r["mean"], r["p"]) for r in zero if r["n"]} == {(0.0, 1.0)}
    assert all(r["mean_sd"] is None and r["mean"] is not None for r in rows if r["neuron"] == 4 and r["n"] and
               r["layer"] == "second" and r["scope"] == "neuron")  # fmt: skip
    assert {s for r in rows if r["scope"] == "layer" and (s := r["split"]).startswith("box")} <= {b for b, _ in BOXES}
    assert not any(r["split"] == "box over 16 %" for r in rows), "0.4 × 0.4 is not over 16 %"
    assert not any(r["layer"] == "third" and r["split"] != "all" for r in rows)


def test_order_of_rows_changes_nothing(world: World, rows: list[Row]) -> None:
    assert world.made(np.random.default_rng(1)) == rows


def test_layers_change_nothing_of_each_other_but_q(world: World, rows: list[Row]) -> None:
    chosen = science(seed=SEED, calibrate={"n_bootstrap": N_BOOTSTRAP})
    given = [table("swaps", world.swaps["second"], layer=False)]
    alone = effects(
        ["second"], given, SWAPPED, table("clusters", world.clusters), table("neurons", world.neurons), chosen
    )
    both = {key(r): r for r in rows if r["layer"] == "second"}
    found = {key(r): r for r in alone.to_pylist() if r["layer"] == "second"}
    assert found.keys() == both.keys()
    for k, row in found.items():
        columns_ = [c for c in row if c not in ("q", "causal") and not row["contrast"].startswith("causal")]
        assert {c: row[c] for c in columns_} == {c: both[k][c] for c in columns_}


def test_sweep_without_swaps(world: World) -> None:
    clusters, neurons = table("clusters", world.clusters), table("neurons", world.neurons)
    nothing = TABLES["swaps"].schema.empty_table()
    none = {layer: [] for layer in LAYERS}
    for layers in ([], LAYERS):
        found = effects(layers, [nothing] * len(layers), none, clusters, neurons, science()).to_pylist()
        assert len(found) == (len(layers) + 1) * (len(CONTRASTS) + 2)
        assert {(r["n"], r["mean"], r["p"], r["q"], r["causal"]) for r in found} == {(0, None, None, None, None)}
        assert {r["reason"] for r in found} == {NO_NEURON, NO_JUDGED}


def test_null_neurons_without_a_difference_have_no_p(world: World, recwarn: pytest.WarningsRecorder) -> None:
    gone = {"status": "failed", "reason": "image gone"} | dict.fromkeys(("response", "response_at_peak", "effect"))
    rows = [r | gone | {"effect_sd": None} for r in world.swaps["first"] if r["kind"] == "null"]
    clusters, neurons = table("clusters", world.clusters), table("neurons", world.neurons)
    given = [table("swaps", rows, layer=False)]
    found = effects(["first"], given, {"first": []}, clusters, neurons, science()).to_pylist()
    null = [r for r in found if r["kind"] == "null"]
    assert {r["contrast"] for r in null} == {"aligned-non_aligned", "null_p05", "null_ks", "null_small"}
    assert {(r["n"], r["mean"], r["low"], r["p"], r["q"]) for r in null} == {(0, None, None, None, None)}
    assert {r["reason"] for r in null} == {"image gone", NO_NEURON}
    assert list(recwarn) == []


def test_every_layer_needs_its_swaps(world: World) -> None:
    clusters, neurons = table("clusters", world.clusters), table("neurons", world.neurons)
    with pytest.raises(ValueError, match="shorter"):
        effects(LAYERS, [TABLES["swaps"].schema.empty_table()], SWAPPED, clusters, neurons, science())
