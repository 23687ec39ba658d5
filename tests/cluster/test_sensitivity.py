"""Sensitivity on a real Ray: a variant is the sweep with one thing changed, and the sweep itself stays as it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy import stats
from sweeps import LAYERS, PROMPTS, WIDTHS, Finished, by_hand, command, committed, digests, files_of, printed_json

import polyray
from polyray.cluster import service, vary
from polyray.cluster.resolve import Resolved
from polyray.cluster.scoring import ScoringWorker
from polyray.errors import StoreError
from polyray.overlay import Overlay, opened
from polyray.store import Store
from polyray.verify import verify

ADDED = {"sensitivity", "sensitivity_neurons"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the prompts, and some that the sweep does not know."""
    path = tmp_path_factory.mktemp("prompts") / "other words.txt"
    path.write_text("\n".join([*PROMPTS[::2], "cat", "guitar", "bridge", "night", "river", "bread"]))
    return path


ENCODER = "encoder={kind: standin, input_px: 64, dtype: float32, micro_batch: 32}"


@pytest.fixture(scope="module")
def varied(finished: Finished, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A copy of the tiny sweep that was varied in every way: two by the command, the others by hand, without Ray."""
    out = tmp_path_factory.mktemp("varied") / "out"
    shutil.copytree(finished.out, out)
    result = command("sensitivity", out, "--json", "--vary", "K=22,24", "--vary", f"prompts={prompts}")
    assert result.exit_code == 0, result.output
    asked = vary.resolve(str(out), ["seed=7", "k_range=2-3", ENCODER, "calibrate.alpha=0.9"])
    for variant in asked.remaining:
        by_hand(variant.resolved, Path(variant.resolved.sweep.out))
        vary.record(asked.base, variant)
    shown = command("sensitivity", out, "--json")
    assert shown.exit_code == 0, shown.output
    return {"out": out, "first": printed_json(result), "said": result.stderr, "printed": printed_json(shown)}


def folder(varied: dict[str, Any], what: str) -> Path:
    (found,) = (varied["out"] / "variants").glob(f"{what}-*")
    return Path(found)


def rows(store: Store, table: str, layer: str | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.read(table, layer).to_pylist()
    return found


# What a variant is


@pytest.mark.parametrize(
    ("what", "section", "changes"),
    [
        ("K", "mine", {"K": 22}),
        ("k_range", "cluster", {"k_range": (2, 3)}),
        ("encoder", "encoder", {"input_px": 64}),
    ],
)
def test_a_variant_is_what_a_sweep_from_scratch_would_be(
    varied: dict[str, Any], resolved: Resolved, tmp_path: Path, what: str, section: str, changes: dict[str, Any]
) -> None:
    """The whole sweep again with the other setting, mining included."""
    science = resolved.sweep.science
    science = science.model_copy(update={section: getattr(science, section).model_copy(update=changes)})
    # Workers check that they hold the encoder that the driver saw.
    found = json.loads((folder(varied, what) / "run.json").read_text())["identity"]["contents.encoder"]
    other = replace(
        resolved.sweep,
        config=resolved.sweep.config.model_copy(update={"science": science}),
        contents={**resolved.sweep.contents, "encoder": found},
    )
    by_hand(replace(resolved, sweep=other), tmp_path / "out")
    scratch, variant = Store(tmp_path / "out"), opened(folder(varied, what))
    for table in ("neurons", "null_neurons", "neuron_summary", "layer_summary", "nulls", "scores", "examples", "mined"):
        assert variant.read(table).equals(scratch.read(table)), table
    clusters = variant.read("clusters").drop_columns("thumbnails")
    assert clusters.equals(scratch.read("clusters").drop_columns("thumbnails"))
    assert variant.read("neurons").num_rows == sum(WIDTHS.values())
    if what == "K":  # and up again, as far as was kept
        (back,) = vary.resolve(str(tmp_path / "out"), ["K=24"]).variants
        by_hand(back.resolved, Path(back.resolved.sweep.out))
        for table in ("neurons", "neuron_summary"):
            assert opened(back.resolved.sweep.out).read(table).equals(Store(varied["out"]).read(table)), table


def test_another_seed_gives_other_draws_and_nearly_the_same_clusters(varied: dict[str, Any]) -> None:
    base, variant = Store(varied["out"]), opened(folder(varied, "seed"))
    assert variant.read("mined").equals(base.read("mined"))
    assert not variant.read("nulls").equals(base.read("nulls"))
    raw = {"vary": "seed", "metric": "spearman", "layer": None, "preset": None}
    found = {r["score"]: r for r in rows(base, "sensitivity") if raw.items() <= r.items()}
    assert 0.5 < found["S"]["estimate"] < 1
    assert found["S"]["low"] > 0.2


def test_other_prompts_embed_no_patch(varied: dict[str, Any], prompts: Path) -> None:
    base, variant = Store(varied["out"]), opened(folder(varied, "prompts"))
    own = Store(folder(varied, "prompts"))
    assert "embeddings" not in own.digests()
    assert [u for u in own.committed() if u.startswith("embed")] == ["embed/vocabulary"]
    assert variant.read("embeddings").num_rows == base.read("embeddings").num_rows > 0
    words = prompts.read_text().split("\n")
    assert own.read("vocabulary")["prompt"].to_pylist() == words
    assert set(variant.read("clusters")["name"].to_pylist()) <= set(words)
    # Names enter nothing but D.
    for column in ("S", "k", "Q", "paper_S_z", "paper_Q_z"):
        assert variant.read("neurons")[column].equals(base.read("neurons")[column])
    assert not variant.read("neurons")["D"].equals(base.read("neurons")["D"])


def test_what_a_change_does_not_touch_is_not_done_again(varied: dict[str, Any]) -> None:
    stages = {
        what: {r.stage for r in Store(folder(varied, what)).committed().values()}
        for what in ("K", "seed", "k_range", "prompts", "encoder", "calibrate.alpha")
    }
    scoring = {"cluster", "draw", "calibrate", "summarise"}
    assert stages == {
        "K": scoring | {"merge"},
        "seed": scoring,
        "k_range": scoring,
        "prompts": scoring | {"embed"},
        "encoder": scoring | {"embed"},
        "calibrate.alpha": {"summarise"},
    }
    assert Store(folder(varied, "encoder")).read("embeddings").num_rows == Store(varied["out"]).read("patches").num_rows
    # Thumbnails are the sweep's.
    pictures = Store(folder(varied, "seed")).read("clusters")["thumbnails"].to_pylist()
    assert all(p is None or not any(p) for row in pictures for p in row or [])


# What is added to the sweep


def test_comparison_is_a_table_of_the_sweep(varied: dict[str, Any]) -> None:
    found = polyray.open(varied["out"])["sensitivity"].to_table().to_pylist()
    base = Store(varied["out"]).read("neurons")
    assert {(r["vary"], r["value"]) for r in found} == {
        ("K", "22"), ("seed", "7"), ("k_range", "2-3"), ("prompts", str(prompts_of(found))),
        ("encoder", "standin(dtype=float32, input_px=64, micro_batch=32)"), ("calibrate.alpha", "0.9"),
    }  # fmt: skip
    assert {r["layer"] for r in found} == {*LAYERS, None}
    for what in ("K", "encoder", "prompts"):
        variant = opened(folder(varied, what)).read("neurons")
        both = pc.and_(pc.equal(base["status"], "ok"), pc.equal(variant["status"], "ok"))
        for score in ("D", "S"):
            x, y = (t.filter(both)[score].to_numpy() for t in (base, variant))
            asked = {"vary": what, "metric": "spearman", "layer": None, "preset": None, "score": score}
            (row,) = [r for r in found if asked.items() <= r.items()]
            assert row["n"] == len(x) > 10
            assert row["estimate"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-9)
            assert -1 <= row["low"] <= row["high"] <= 1


def prompts_of(found: list[dict[str, Any]]) -> str:
    (value,) = {r["value"] for r in found if r["vary"] == "prompts"}
    assert value.endswith("other words.txt")
    return str(value)


def test_alpha_changes_no_score(varied: dict[str, Any]) -> None:
    base, variant = Store(varied["out"]), opened(folder(varied, "calibrate.alpha"))
    found = [r for r in rows(base, "sensitivity") if r["vary"] == "calibrate.alpha" and not r["layer"]]
    assert {r["estimate"] for r in found if r["metric"] == "spearman"} == {1.0}
    assert variant.read("neurons").equals(base.read("neurons"))
    assert variant.read("neuron_summary")["q"].equals(base.read("neuron_summary")["q"])


def test_a_neuron_is_name_sensitive_where_its_names_change_sides(varied: dict[str, Any]) -> None:
    store = Store(varied["out"])
    base = {(r["layer"], r["neuron"]): r for r in rows(store, "neurons")}
    seen = 0
    for r in rows(store, "sensitivity_neurons"):
        p = base[r["layer"], r["neuron"]]["specific_D_p"]
        crossed = None not in (p, r["D_p"]) and (p < 0.05) != (r["D_p"] < 0.05)
        names = r["vary"] in ("prompts", "encoder")
        assert r["diagnosis"] == ("name-sensitive" if crossed and names else None)
        seen += crossed and names
    assert seen > 0


def test_the_sweep_stays_as_it_is(varied: dict[str, Any], finished: Finished) -> None:
    before, after = files_of(finished.out), files_of(varied["out"])
    changed = {name for name in before if before[name][1] != after.get(name, (0, b""))[1]}
    assert {name for name in changed if not name.startswith("commits/")} == {"_SUCCESS"}
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"variants", "commits", "sensitivity.png", *ADDED}
    old, now = digests(finished.out), digests(varied["out"])
    assert {t: d for t, d in now.items() if t not in ADDED} == old
    assert now.keys() == old.keys() | ADDED


def test_sweep_and_variants_are_whole(varied: dict[str, Any]) -> None:
    assert verify(varied["out"]).ok
    for out in (varied["out"], *(varied["out"] / "variants").iterdir()):
        result = command("verify", out, "--json")
        assert (result.exit_code, printed_json(result)["ok"]) == (0, True), out
    status = printed_json(command("status", folder(varied, "prompts"), "--json"))
    assert status["finished"]
    assert [s["stage"] for s in status["stages"]] == ["embed/vocabulary", "cluster", "draw", "calibrate", "summarise"]
    assert all(s["n_done"] == s["n_units"] for s in status["stages"])


def test_the_same_sweep_again_leaves_the_comparison(varied: dict[str, Any], resolved: Resolved) -> None:
    before, units = files_of(varied["out"]), committed(varied["out"])
    moved = replace(resolved, sweep=replace(resolved.sweep, out=str(varied["out"])))
    service.run(moved, lambda stage, progress: None, lambda message: None)
    after = files_of(varied["out"])
    # Every driver takes the lease anew; what is committed stays, down to the attempt.
    kept, now = ({n: f[1] for n, f in files.items() if not n.startswith("commits/")} for files in (before, after))
    assert now == kept
    assert committed(varied["out"]) == units


# The command


def test_command_prints_one_record_a_variant(varied: dict[str, Any]) -> None:
    printed = varied["printed"]
    assert [r["vary"] for r in varied["first"]["variants"]] == ["K", "prompts"]
    assert [r["vary"] for r in printed["variants"]] == [
        "K", "calibrate.alpha", "encoder", "k_range", "prompts", "seed",
    ]  # fmt: skip
    record = printed["variants"][0]
    assert record["spearman"]["log ψ specific"]["n"] == record["n"]
    assert record["spearman"]["specific_S"]["estimate"] is not None
    assert any("K=24 is what" in note and "passed over" in note for note in varied["first"]["notes"])
    assert Path(printed["picture"]).stat().st_size > 10_000
    assert "K=22 cluster" in varied["said"]
    assert "K=24" in varied["said"]


def test_what_is_there_already_is_shown_and_not_done_again(varied: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(service, "run", None)
    before = files_of(varied["out"])
    for asked in ((), ("--vary", "K=22"), ("--vary", "science.mine.K=22,22")):
        result = command("sensitivity", varied["out"], *asked)
        assert result.exit_code == 0, result.output
        assert "k_range" in result.stdout
        assert "2-3" in result.stdout
    after = files_of(varied["out"])
    assert {n: f[1] for n, f in after.items() if n != "sensitivity.png"} == {
        n: f[1] for n, f in before.items() if n != "sensitivity.png"
    }


def test_a_sweep_that_was_not_varied_has_nothing_to_show(finished: Finished) -> None:
    result = command("sensitivity", finished.out)
    assert result.exit_code == 0
    assert "nothing is varied yet" in result.stdout
    assert not (finished.out / "sensitivity.png").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("kk=3", "there is no 'kk'. Valid: 'K', 'seed'"),
        ("cluster.n_inits=3", "Did you mean 'cluster.n_init'"),
        ("K", "key=value"),
        ("K=", "a value is missing"),
        ("K=25", "from 5 (above k_range) to 24 (mine.K_keep"),
        ("K=4", "from 5 (above k_range) to 24"),
        ("K=ten", "K=ten: from 5"),
        ("K=[22", "the values are no list"),
        ("k_range=4", "LOW-HIGH"),
        ("k_range=4-2", "LOW-HIGH"),
        ("k_range=1-3", "LOW-HIGH"),
        ("k_range=2-20", "HIGH < mine.k_min = 20"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=[1]", "a plain value"),
        ("prompts=nowhere.txt", "nowhere.txt"),
        ("encoder=standing", "Did you mean 'standin'"),
        ("encoder={kind: standin, input_pz: 64}", "Did you mean 'input_px'"),
        ("encoder={input_px: 64}", "with its kind"),
        ("encoder={kind: open_clip, model: ViT-B-33}", "ViT-B-33"),
        ("cluster.n_init=0", "greater than or equal to 1, got '0'"),
        ("mine.K_keep=30", "would need mining and embedding again"),
        ("subject.input_px=32", "would need mining and embedding again"),
        ("probe.n_classes=6", "would need mining and embedding again"),
        ("extract.energy=0.5", "would need mining and embedding again"),
        ("execution.bundle_s=1", "never changes a result"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    finished: Finished, ray_here: None, asked: str, said: str
) -> None:
    before = files_of(finished.out)
    result = command("sensitivity", finished.out, "--json", "--vary", "K=22", "--vary", asked)
    assert result.exit_code == 2, result.output
    assert said in printed_json(result)["message"]
    assert files_of(finished.out) == before


def test_set_takes_execution_alone(finished: Finished) -> None:
    result = command("sensitivity", finished.out, "--json", "--set", "science.seed=1")
    assert result.exit_code == 2
    assert "goes into --vary" in printed_json(result)["message"]


def test_only_a_finished_sweep_can_be_varied(finished: Finished, varied: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    (out / "_SUCCESS").unlink()
    # Whole all the same: a comparison that was cut short takes the mark along.
    assert command("sensitivity", out).exit_code == 0
    assert digests(out) == digests(finished.out)
    store = Store(out)
    with store.acquire():
        store.retire("summarise")
    assert not (out / "_SUCCESS").exists()
    result = command("sensitivity", out, "--json", "--vary", "K=22")
    assert result.exit_code == 2
    assert "Finish it first" in printed_json(result)["message"]
    result = command("sensitivity", folder(varied, "K"), "--json")
    assert "is a variant itself" in printed_json(result)["message"]
    result = command("sensitivity", tmp_path / "nowhere", "--json")
    assert (result.exit_code, printed_json(result)["error"]) == (2, "StoreError")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"schema_version": 0}, "version 0 of the tables"), ({"provenance": {"torch": "1.0"}}, "made with torch 1.0")],
)
def test_sweep_of_another_version_is_refused(
    finished: Finished, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    run = json.loads((out / "run.json").read_text())
    provenance = run["provenance"] | change.pop("provenance", {})
    (out / "run.json").write_text(json.dumps(run | change | {"provenance": provenance}))
    result = command("sensitivity", out, "--json", "--vary", "K=22")
    assert result.exit_code == 2
    assert said in printed_json(result)["message"]


# What befalls a variant


def test_a_variant_that_was_interrupted_goes_on(
    finished: Finished, varied: dict[str, Any], ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)

    def interrupt(stage: str, progress: Any) -> None:
        if stage == "seed=7 draw" and progress.n_done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.vary(vary.resolve(str(out), ["seed=7"]), interrupt, print)
    (half,) = (out / "variants").iterdir()
    before = committed(half)
    assert any(unit.startswith("draw/") for unit in before)
    assert not Store(half).is_finished
    assert digests(out) == digests(finished.out)
    assert verify(out).ok

    # Then between the variant's end and its comparison.
    monkeypatch.setattr("polyray.cluster.vary.record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command("sensitivity", out, "--vary", "seed=7").exit_code == 130
    monkeypatch.undo()
    after = committed(half)
    assert {unit: after[unit] for unit in before} == before
    assert digests(half) == digests(folder(varied, "seed"))

    assert command("sensitivity", out, "--vary", "seed=7").exit_code == 0
    assert committed(half) == after
    found = Store(out).read("sensitivity")
    whole = Store(varied["out"]).read("sensitivity")
    assert found.equals(whole.filter(pc.equal(whole["vary"], "seed")))


def test_variants_do_not_depend_on_the_number_of_actors(
    finished: Finished, varied: dict[str, Any], ray_here: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    sets = ("--set", "execution.scoring.max=2", "--set", "execution.scoring.min=2", "--set", "execution.bundle_s=0.05")
    assert command("sensitivity", out, "--vary", "k_range=[2, 3]", *sets).exit_code == 0
    (made,) = (out / "variants").iterdir()
    assert made.name == folder(varied, "k_range").name
    assert digests(made) == digests(folder(varied, "k_range"))


def test_a_variant_may_be_moved_with_its_sweep_and_not_below_another(
    varied: dict[str, Any], finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere"
    shutil.copytree(varied["out"], out)
    name = folder(varied, "K").name
    moved = opened(out / "variants" / name)
    assert isinstance(moved, Overlay)
    assert moved.base.out == out
    assert moved.read("layers").num_rows == len(LAYERS)
    run = json.loads((out / "run.json").read_text())
    run["identity"]["seed"] = 99
    run["run_id"] = polyray.config.run_id(run["identity"])
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(StoreError, match="Move the variant back"):
        opened(out / "variants" / name)


def test_a_worker_reads_what_is_not_varied_from_the_sweep(varied: dict[str, Any]) -> None:
    asked = vary.resolve(str(varied["out"]), ["K=21"])
    (variant,) = asked.remaining
    assert not Path(variant.resolved.sweep.out).exists()
    Store(variant.resolved.sweep.out).create_or_resume(
        variant.resolved.identity, variant.resolved.provenance, variant.resolved.sweep.config.model_dump(mode="json")
    )
    try:
        worker = ScoringWorker(variant.resolved.sweep)
        assert worker.store.read("images").equals(asked.base.read("images"))
        assert worker.store.read("scores").num_rows == 0
        assert isinstance(worker.store.read("pool", LAYERS[0]), pa.Table)
        assert worker._dim() == 1280
    finally:
        shutil.rmtree(variant.resolved.sweep.out)
