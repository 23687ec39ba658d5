"""A scoring actor by hand: what it holds is bounded, and the bound changes no result."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweeps import LAYERS, WIDTHS

from polyray.cluster import plan, scoring
from polyray.cluster.plan import SWAPPING, Sweep, stages, works
from polyray.cluster.resolve import Resolved
from polyray.cluster.scoring import WORKERS, ScoringWorker
from polyray.cluster.work import SubjectWorker, Worker
from polyray.errors import DataError
from polyray.psi import space
from polyray.records import Receipt
from polyray.store import Store

UNIT = 4
"""Neurons in a unit here, so that the tiny sweep's layers have two or three."""


def do(worker: Worker, store: Store, *stages: str) -> None:
    """All units of these stages, one after the other."""
    with store.acquire():
        for stage in stages:
            for unit in works(stage, worker.sweep.shape, store):
                (result,) = worker.run([unit])
                assert isinstance(result, Receipt), result
                store.commit(result)


@dataclass(frozen=True)
class Embedded:
    """The tiny sweep up to embed."""

    sweep: Sweep
    out: Path

    def copy(self, out: Path, scoring_vectors_gb: float = 0.5) -> Sweep:
        """The same elsewhere, to be gone on with under another bound."""
        shutil.copytree(self.out, out)
        config = self.sweep.config
        execution = config.execution.model_copy(update={"scoring_vectors_gb": scoring_vectors_gb})
        return replace(self.sweep, config=config.model_copy(update={"execution": execution}), out=str(out))


@pytest.fixture(scope="module")
def embedded(resolved: Resolved, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    out = tmp_path_factory.mktemp("embedded") / "out"
    store = Store(out)
    store.create_or_resume(resolved.identity, resolved.provenance, resolved.sweep.config.model_dump(mode="json"))
    sweep = replace(resolved.sweep, out=str(out))
    for kind in ("subject", "encoder"):
        of_kind = [stage for stage, of in stages(sweep.science).items() if of == kind and stage not in SWAPPING]
        do(WORKERS[kind](sweep), store, *of_kind)
    return Embedded(sweep, out)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, scoring):
        monkeypatch.setattr(module, "CLUSTER_NEURONS", UNIT)


class Watched(ScoringWorker):
    """Remembers the blocks that it held."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.blocks: list[tuple[str, int]] = []
        self.most_bytes = 0

    def block(self, unit: plan.Work) -> scoring._Block:
        found = super().block(unit)
        if (found.layer, found.start) not in self.blocks[-1:]:
            self.blocks.append((found.layer, found.start))
        held = [v.nbytes for v in (found.data.geometry, found.data.text) if v is not None]
        self.most_bytes = max(self.most_bytes, sum(held))
        return found


def test_the_bound_on_vectors_changes_no_result(embedded: Embedded, small_units: None, tmp_path: Path) -> None:
    vector_bytes = 2 * (1280 + 384)
    two_units = 2 * UNIT * embedded.sweep.science.mine.K_keep * vector_bytes
    found = {}
    for name, bound_gb, width in (
        ("whole layers", 0.5, 100),
        ("two units", two_units / 2**30, 2 * UNIT),
        ("one unit", 1e-9, UNIT),
    ):
        sweep = embedded.copy(tmp_path / name, bound_gb)
        worker, store = Watched(sweep), Store(tmp_path / name)
        do(worker, store, "cluster", "draw", "calibrate", "summarise")
        assert worker.blocks == [(x, start) for x in LAYERS for start in range(0, WIDTHS[x], width)]
        assert 0 < worker.most_bytes <= max(bound_gb * 2**30, two_units / 2)
        found[name] = store.digests()
    assert found["whole layers"] == found["two units"] == found["one unit"]
    assert found["one unit"]["neurons"]["n_rows"] == sum(WIDTHS.values())


def test_units_in_any_order_give_the_same_rows(embedded: Embedded, small_units: None, tmp_path: Path) -> None:
    digests = []
    for name, step in (("forth", 1), ("back", -1)):
        sweep = embedded.copy(tmp_path / name, 1e-9)
        worker, store = Watched(sweep), Store(tmp_path / name)
        store.acquire()
        for unit in works("cluster", sweep.shape, store)[::step]:
            (result,) = worker.run([unit])
            assert isinstance(result, Receipt), result
            store.commit(result)
        digests.append(store.digests())
    assert digests[0] == digests[1]


def test_draws_hold_no_vectors_of_neurons(embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = embedded.copy(tmp_path / "out")
    store = Store(tmp_path / "out")
    do(ScoringWorker(sweep), store, "cluster")
    monkeypatch.setattr(space, "with_vectors", None)
    worker = Watched(sweep)
    do(worker, store, "draw")
    assert worker.blocks == []
    layer = worker.layer(LAYERS[0])
    assert len(layer.data.ids) <= sweep.science.embed.n_pool


def test_neurons_beyond_an_empty_pool_are_ok_and_say_that_they_are_not_calibrated(
    embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = embedded.copy(tmp_path / "out")
    worker, store = ScoringWorker(sweep), Store(tmp_path / "out")
    read = worker.store.read
    monkeypatch.setattr(
        worker.store,
        "read",
        lambda table, *rest, **by: read(table, *rest, **by).slice(0, 0 if table == "pool" else None),
    )
    do(worker, store, "cluster", "draw", "calibrate", "summarise")
    rows = store.read("neurons").to_pylist()
    ok = [r for r in rows if r["status"] == "ok"]
    assert len(ok) > 20
    for row in ok:
        assert row["specific_p"] is row["selective_p"] is None
        assert row["paper_psi"] is not None
        assert row["reason"] == (
            f"not calibrated: the pool has 0 patches with a vector, fewer than the {row['n_used']} examples clustered"
        )
    figures = {r["metric"]: r["value"] for r in store.read("layer_summary").to_pylist() if r["layer"] is None}
    assert figures["n_not_calibrated"] == figures["n_ok"] == len(ok)
    assert figures["n_ok"] + figures["n_excluded"] + figures["n_failed"] == len(rows)
    assert sum(v for m, v in figures.items() if m.startswith("n_reason:")) == len(rows) - len(ok)
    assert {r["kind"] for r in store.read("null_neurons").to_pylist()} == {"rotation"}
    directions = [r["S"] for r in store.read("null_neurons").to_pylist()]
    assert max(directions) < 0.2, "random directions of as many dimensions as the vectors have"


def test_images_lost_between_mining_and_swapping_cost_their_swaps_a_row(
    embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host of all and one donor cannot be read any more; all other swaps are as if they could."""
    scored = replace(embedded, out=tmp_path / "scored")
    do(ScoringWorker(embedded.copy(scored.out)), Store(scored.out), "cluster", "draw", "calibrate", "summarise")
    healthy, store = scored.copy(tmp_path / "healthy"), Store(tmp_path / "healthy")
    do(SubjectWorker(healthy), store, *SWAPPING)
    known = {identity_of(r): r for r in store.read("swaps").to_pylist()}
    first = min(known)
    lost = {known[first]["host_example"], next(r["source_example"] for r in known.values() if r["source_example"])}

    worker = SubjectWorker(scored.copy(tmp_path / "broken"))
    read = worker.probe.read

    def gone(example: int) -> np.ndarray:
        if example in lost:
            raise DataError("No such file or directory")
        return read(example)

    monkeypatch.setattr(worker.probe, "read", gone)
    store = Store(tmp_path / "broken")
    do(worker, store, *SWAPPING)
    rows = {identity_of(r): r for r in store.read("swaps").to_pylist()}
    assert rows.keys() == known.keys()
    n_failed = 0
    for key, row in rows.items():
        bad = [i for i in (row["host_example"], row["source_example"]) if i in lost]
        if row["status"] == "not_swappable":
            assert row == known[key]
        elif bad:
            assert row["status"] == "failed"
            assert row["reason"] == f"image {bad[0]} cannot be read: No such file or directory"
            assert row["response"] is row["effect"] is row["picture"] is None
            n_failed += 1
        else:
            assert row["response"] == pytest.approx(known[key]["response"], rel=1e-5, abs=1e-6)
    assert 0 < n_failed < len(rows) / 2
    failures = store.read("failures").to_pylist()
    assert {r["item_id"] for r in failures} == lost
    assert {(r["stage"], r["item"], r["reason"]) for r in failures} == {("swap", "image", "No such file or directory")}
    assert len(store.read("effects")) == len(Store(tmp_path / "healthy").read("effects"))


def identity_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[c] for c in ("layer", "kind", "neuron", "host", "condition"))
