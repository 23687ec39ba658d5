"""Whole sweeps on a real Ray: nothing that befalls one changes its results, and no neuron, image or unit is lost."""

import json
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import EDGE_NEURONS
from PIL import Image
from probes.pictures import encode, picture, png
from sweeps import (
    CENSUS,
    CONFIGS,
    HALF_CPU,
    LAYERS,
    N_IMAGES,
    PROMPTS,
    WIDTHS,
    Command,
    Finished,
    by_hand,
    command,
    committed,
    digests,
    files_of,
    printed_json,
    sweep,
    tiny,
    write_config,
)

import polyray
from polyray.cluster import service
from polyray.cluster.dispatch import Policy
from polyray.cluster.resolve import Resolved
from polyray.psi.cluster import sizes
from polyray.schema import NULL_KINDS, PRESETS, TABLES
from polyray.text_tables import TEXT_TABLES
from polyray.verify import verify

# What befalls a sweep


def test_by_hand_gives_the_same_digests_as_ray(resolved: Resolved, finished: Finished, tmp_path: Path) -> None:
    by_hand(resolved, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(finished.out)


def test_two_actors_and_another_execution_half_give_the_same_digests(
    resolved: Resolved, finished: Finished, tmp_path: Path
) -> None:
    two = HALF_CPU | {"min": 2, "max": 2, "in_flight": 3}
    execution = {"subject": two, "encoder": two, "scoring": two | {"in_flight": 1}, "bundle_s": 0.05}
    sweep(resolved, tmp_path / "out", execution)
    assert digests(tmp_path / "out") == digests(finished.out)
    assert verify(tmp_path / "out").ok


@dataclass(frozen=True)
class Interrupted:
    """A sweep of its own process: interrupted, killed, and run to its end."""

    out: Path
    interrupt: Command
    interrupt_code: int
    after_interrupt: dict[str, tuple[float, str, list[str]]]
    kill_code: int
    after_kill: dict[str, tuple[float, str, list[str]]]
    status: dict[str, Any]
    verify_code: int
    verify: dict[str, Any]
    last: Command
    last_code: int
    home: Path


@pytest.fixture(scope="session")
def interrupted(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Ctrl-C during window, SIGKILL of the whole process group during draw, then the same command again."""
    folder = tmp_path_factory.mktemp("interrupted")
    out = folder / "out"
    run = ("run", tiny_yaml, "--out", out)
    first = Command(folder / "first", *run)
    first.wait_until(lambda: len(committed(out, "window")) >= 1)
    interrupt_code = first.send(signal.SIGINT)
    after_interrupt = committed(out)

    second = Command(folder / "second", *run)
    second.wait_until(lambda: len(committed(out, "draw")) >= 2)
    kill_code = second.send(signal.SIGKILL)
    after_kill = committed(out)
    status = printed_json(command("status", out, "--json"))
    found = command("verify", out, "--json")

    last = Command(folder / "last", *run, "--json", "--set", "execution.scoring.max=2")
    last_code = last.wait()
    return Interrupted(
        out, first, interrupt_code, after_interrupt, kill_code, after_kill, status, found.exit_code,
        printed_json(found), last, last_code, folder,
    )  # fmt: skip


def test_interrupt_ends_with_130_and_keeps_what_is_committed(interrupted: Interrupted) -> None:
    assert interrupted.interrupt_code == 130, interrupted.interrupt.stderr
    assert "the same command goes on" in interrupted.interrupt.stderr
    assert "Traceback" not in interrupted.interrupt.stderr
    names = list(interrupted.after_interrupt)
    assert any(name.startswith("window") for name in names)
    assert not any(name.startswith("embed") for name in names)


def test_killed_sweep_goes_on_and_does_nothing_committed_again(interrupted: Interrupted, finished: Finished) -> None:
    assert interrupted.kill_code == -signal.SIGKILL
    assert interrupted.last_code == 0, interrupted.last.stderr
    # A record that was being written is a temporary file, and is gone in the end.
    assert not any(name.endswith(".tmp") for name in files_of(interrupted.out))
    before, now = interrupted.after_kill, committed(interrupted.out)
    n_drawn = sum(unit.startswith("draw/") for unit in before)
    assert 2 <= n_drawn < len(committed(finished.out, "draw"))
    assert {unit: before[unit] for unit in interrupted.after_interrupt} == interrupted.after_interrupt
    assert {unit: now[unit] for unit in before} == before
    assert any(digests for _, _, digests in before.values())


def test_killed_sweep_ends_with_the_digests_of_the_undisturbed_one(
    interrupted: Interrupted, finished: Finished
) -> None:
    assert digests(interrupted.out) == digests(finished.out)
    assert verify(interrupted.out).ok


def test_status_and_verify_of_a_killed_sweep(interrupted: Interrupted) -> None:
    status = interrupted.status
    assert not status["finished"]
    n_done = {s["stage"]: s["n_done"] for s in status["stages"]}
    assert sum(n_done.values()) == status["n_done"]
    n_units = {s["stage"]: s["n_units"] for s in status["stages"]}
    assert n_units["mine"] == n_done["mine"] == 2
    assert 2 <= n_done["draw"] < n_units["draw"]
    # What comes after the stage at which it stopped is known as far as the plan alone says.
    assert n_done["calibrate"] == n_done["summarise"] == 0
    assert interrupted.verify_code == 4
    assert len(interrupted.verify["missing_units"]) == n_units["draw"] - n_done["draw"]
    assert all(unit.startswith("draw/") for unit in interrupted.verify["missing_units"])
    assert not any(interrupted.verify[k] for k in ("missing_parts", "duplicates", "mismatches", "unreadable"))


def test_run_prints_one_json_object(interrupted: Interrupted) -> None:
    printed = json.loads(interrupted.last.stdout)
    assert printed["run_id"] == polyray.open(interrupted.out).run["run_id"]
    assert [r["layer"] for r in printed["layers"]] == [*LAYERS, None]
    assert printed["layers"][-1]["n_neurons"] == sum(WIDTHS.values())
    assert set(printed["stage_seconds"]) == {"draw", "calibrate", "summarise", "swap", "effects"}
    assert any("Stand-in encoder" in note for note in printed["notes"])


def test_a_local_ray_leaves_no_token_in_the_home(interrupted: Interrupted) -> None:
    assert list(interrupted.home.rglob("auth_token")) == []


@pytest.fixture(scope="session")
def troubled(tiny_yaml: Path, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny sweep with a full disk at the second unit of mining, then with a worker that is killed there."""
    folder = tmp_path_factory.mktemp("troubled")
    raw = tiny(tiny_yaml.parent, factory="troubles:edge_net_in", factory_args={"folder": str(folder)})
    run = ("run", write_config(folder / "troubled.yaml", raw), "--out", folder / "out")
    (folder / "full").write_text("9")
    full = command(*run)
    (folder / "full").unlink()
    after_full = committed(folder / "out")
    (folder / "die").write_text("1")
    died = command(*run)
    return {
        "out": folder / "out",
        "full": full,
        "after_full": after_full,
        "died": died,
        "has_died": not (folder / "die").exists(),
    }


def test_full_disk_stops_the_sweep_and_touches_nothing_committed(troubled: dict[str, Any]) -> None:
    """The full disk is a mock inside the worker; see `troubles.Troubled`."""
    assert troubled["full"].exit_code == 3
    assert "disk is full" in troubled["full"].stderr
    assert "run the same command again" in troubled["full"].stderr
    before, now = troubled["after_full"], committed(troubled["out"])
    assert sum(unit.startswith("mine/") for unit in before) == 1
    assert {unit: now[unit] for unit in before} == before


def test_killed_worker_is_replaced_and_digests_stay(troubled: dict[str, Any], finished: Finished) -> None:
    assert troubled["has_died"]
    assert troubled["died"].exit_code == 0, troubled["died"].output
    assert "actor subject-0 died" in troubled["died"].stdout
    assert digests(troubled["out"]) == digests(finished.out)
    assert verify(troubled["out"]).ok


def test_workers_that_cannot_start_stop_the_sweep_with_the_reason(
    ray_here: None, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every start takes seconds, and one shows as much as three do.
    monkeypatch.setattr(service, "Policy", partial(Policy, start_failures=1))
    raw = tiny(tmp_path, factory="troubles:unbuildable", factory_args={"pid": os.getpid()})
    raw["science"]["subject"]["layers"] = ["norm"]
    result = command("run", write_config(tmp_path / "c.yaml", raw), "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "this network cannot be built here" in result.stderr
    assert "could not start" in result.stderr


# Resuming


def test_resuming_with_another_execution_half_is_allowed(
    tiny_yaml: Path, finished: Finished, ray_here: None, tmp_path: Path
) -> None:
    raw = tiny(tmp_path)
    raw["execution"] = {"bundle_s": 0.5, "encoder": {"max": 3, "in_flight": 7}}
    # The prompts lie elsewhere as well: what they are is part of the run, where they lie is not.
    before = files_of(finished.out)
    result = command("run", write_config(tmp_path / "c.yaml", raw), "--out", finished.out, "--json")
    assert result.exit_code == 0, result.output
    assert printed_json(result)["stage_seconds"] == {}
    now = files_of(finished.out)
    # The picture is drawn, the seal set, and the lease taken anew by every run that ends; nothing else is touched.
    touched = {n for n in now.keys() | before.keys() if now.get(n) != before.get(n)}
    assert {n for n in touched if not n.startswith("commits/")} <= {
        "_SUCCESS",
        "summary.png",
        "swaps.png",
    }
    assert now["_SUCCESS"][1] == before["_SUCCESS"][1]


def test_resuming_with_another_science_half_is_refused(
    tiny_yaml: Path, finished: Finished, ray_here: None, tmp_path: Path
) -> None:
    raw = tiny(tmp_path)
    raw["science"]["seed"] = 1
    path = write_config(tmp_path / "c.yaml", raw)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    before = files_of(finished.out)
    result = command("run", path, "--out", finished.out)
    assert result.exit_code == 2
    assert "seed: OUT has 0, this run has 1" in result.stderr
    assert "contents.vocabulary" in result.stderr
    assert "contents.subject" not in result.stderr
    assert files_of(finished.out) == before


# What is in it


def rows(finished: Finished, table: str, layer: str | None = None) -> list[dict[str, Any]]:
    found = polyray.open(finished.out)[table].to_table().to_pylist()
    return [r for r in found if layer is None or r["layer"] == layer]


def test_verify_finds_it_whole(finished: Finished) -> None:
    report = verify(finished.out)
    assert report.ok
    assert finished.messages == []
    assert polyray.open(finished.out).is_finished


def test_every_neuron_has_one_row_and_one_status(finished: Finished) -> None:
    found = rows(finished, "neurons")
    assert Counter((r["layer"], r["neuron"]) for r in found) == Counter(
        {(layer, i): 1 for layer, n in WIDTHS.items() for i in range(n)}
    )
    assert {r["status"] for r in found} <= {"ok", "excluded", "failed"}
    for r in found:
        scored = [r[c] for c in ("S", "k", "Q", "D", "n_used", "n_labels", "q", "called")]
        scored += [r[f"{p}_{c}"] for p in PRESETS for c in ("log_psi", "psi", "p")]
        assert (r["reason"] is None) == (r["status"] == "ok")
        assert all((x is not None) == (r["status"] == "ok") for x in scored)
        if r["status"] == "ok":
            assert -1 <= r["S"] <= 1
            assert 0 <= r["Q"] <= 1
            assert 0 <= r["D"] <= 2
            assert 2 <= r["k"] <= 4
            assert r["n_used"] == 24
            for p in PRESETS:
                assert 1 / 61 <= r[f"{p}_p"] <= 1
                assert r[f"{p}_psi"] == pytest.approx(np.exp(r[f"{p}_log_psi"]))


@pytest.mark.parametrize(
    ("neuron", "status", "reason", "diagnosis"),
    [
        ("dead", "excluded", "dead", "dead"),
        ("constant", "excluded", "constant", "constant"),
        ("nan", "excluded", f"not finite: {N_IMAGES} responses are NaN or infinite", None),
        ("twin_a", "ok", None, ...),
        ("twin_b", "ok", None, ...),
    ],
)
def test_awkward_neuron(finished: Finished, neuron: str, status: str, reason: str | None, diagnosis: object) -> None:
    row = rows(finished, "neurons", "edges")[EDGE_NEURONS[neuron]]
    assert row["neuron"] == EDGE_NEURONS[neuron]
    assert (row["status"], row["reason"]) == (status, reason)
    assert diagnosis is ... or row["diagnosis"] == diagnosis


def test_twins_have_the_same_examples(finished: Finished) -> None:
    a, b = EDGE_NEURONS["twin_a"], EDGE_NEURONS["twin_b"]
    for table in ("mined", "histograms"):
        twins = [{k: v for k, v in r.items() if k != "neuron"} for r in rows(finished, table, "edges")]
        assert twins[a] == twins[b]
    kept = [
        {k: v for k, v in r.items() if k not in ("neuron", "cluster")} | {"neuron": None}
        for r in rows(finished, "examples", "edges")
        if r["neuron"] in (a, b)
    ]
    assert len(kept) == 2 * 24
    assert kept[:24] == kept[24:]


def test_neuron_at_an_unseen_ceiling_is_called_saturated(finished: Finished) -> None:
    """All of `capped` end at 0.01: those that not every image brings there vary, and are tied at the cut."""
    found = rows(finished, "neurons", "capped")
    scored = [r for r in found if r["status"] == "ok"]
    assert scored
    for r in scored:
        assert r["n_tied_at_cut"] > 24 / 4
        assert "saturated" in r["diagnosis"].split("; ")
        maximum = rows(finished, "histograms", "capped")[r["neuron"]]["maximum"]
        assert maximum == np.float32(0.01)
    assert {r["reason"] for r in found if r["status"] != "ok"} == {"constant"}
    assert all("saturated" not in (r["diagnosis"] or "") for r in rows(finished, "neurons", "norm"))


def test_saturating_activation_is_ranked_by_its_pre_activation(finished: Finished) -> None:
    assert {r["layer"]: r["ranked_by"] for r in rows(finished, "neurons")} == {
        layer: "pre_activation" if layer == "mid" else "response" for layer in LAYERS
    }
    best = [r["response"][0] for r in rows(finished, "mined", "mid")]
    assert max(best) > 6


def test_all_negative_neurons_keep_their_best_examples(finished: Finished) -> None:
    for r in rows(finished, "mined", "signed"):
        assert r["status"] == "ok"
        assert max(r["response"]) < 0
        assert r["response"] == sorted(r["response"], reverse=True)
        assert len(set(r["example"])) == 24
        assert min(r["example"]) >= 0


def test_tables_agree_with_each_other(finished: Finished) -> None:
    data = polyray.open(finished.out)
    # Nothing failed, so that no row of failures was written.
    elsewhere = {name for name in TABLES if name.startswith(("plant", "sensitivity"))} | {t.name for t in TEXT_TABLES}
    assert set(data.tables) == set(TABLES) - {"failures"} - elsewhere
    ok = {(r["layer"], r["neuron"]): r for r in rows(finished, "neurons") if r["status"] == "ok"}
    clusters = rows(finished, "clusters")
    examples = rows(finished, "examples")
    n_clusters = Counter((r["layer"], r["neuron"]) for r in clusters)
    assert n_clusters == {key: r["k"] for key, r in ok.items()}
    sizes_of = Counter((r["layer"], r["neuron"], r["cluster"]) for r in examples if r["cluster"] is not None)
    assert sizes_of == {(r["layer"], r["neuron"], r["cluster"]): r["size"] for r in clusters}
    assert {r["name"] for r in clusters} <= set(PROMPTS)
    assert all(len(r["thumbnails"]) == len(r["prototypes"]) and None not in r["thumbnails"] for r in clusters)
    patches = {r["patch_id"] for r in rows(finished, "patches")}
    assert {r["patch_id"] for r in examples} | {r["patch_id"] for r in rows(finished, "pool")} == patches
    assert sorted(r["patch_id"] for r in rows(finished, "embeddings")) == sorted(patches)
    beside = Counter(r["kind"] for r in rows(finished, "null_neurons"))
    assert beside == dict.fromkeys(NULL_KINDS, len(ok))


def test_status_of_a_finished_sweep_counts_every_unit(finished: Finished) -> None:
    result = command("status", finished.out, "--json")
    assert result.exit_code == 0
    status = printed_json(result)
    assert status["finished"]
    assert {s["stage"]: s["n_units"] for s in status["stages"]} == {s["stage"]: s["n_done"] for s in status["stages"]}
    n_layers, n_sizes = len(LAYERS), 1
    assert sizes(24, 20)[:1] == [24]
    assert [s["n_done"] for s in status["stages"]] == [
        1, n_layers, 2, n_layers, 1, 1 + n_layers, n_layers,
        1 + n_sizes + n_layers * (2 * n_sizes + len(NULL_KINDS)), n_layers, 1,
        2 * n_layers, 1,
    ]  # fmt: skip
    assert [s["stage"] for s in status["stages"]] == list(CENSUS)


# Other networks, encoders and images through the same code


def test_resnet50_with_clip_untrained_says_so_loudly(ray_here: None, one_thread: None, tmp_path: Path) -> None:
    """The paper's config as it is shipped, without weights and at the smallest scale."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:12]))
    changes = {
        "science.subject.weights": "none",
        "science.encoder.pretrained": "none",
        "science.subject.layers": "[layer4]",
        "science.subject.neurons": "{layer4: [3, 700]}",
        "science.subject.input_px": 64,
        "science.subject.micro_batch": 16,
        "science.encoder.micro_batch": 8,
        "science.probe": "{kind: generated, n_classes: 8, n_per_class: 5, image_px: 64}",
        "science.vocabulary": tmp_path / "prompts.txt",
        "science.mine": "{K: 20, K_keep: 20, k_min: 20}",
        "science.extract.n_sample": 4,
        "science.embed.n_pool": 24,
        "science.calibrate": "{B: 20, n_bootstrap: 10}",
        "execution.subject.max": 1,
        "execution.encoder.max": 1,
        "execution.scoring.max": 1,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    result = command("run", CONFIGS / "resnet50-tiny-imagenet.yaml", "--out", tmp_path / "out", *sets)
    assert result.exit_code == 0, result.output
    data = polyray.open(tmp_path / "out")
    told = " ".join(data.run["provenance"]["notes"])
    for text in ("THE SUBJECT IS UNTRAINED", "UNTRAINED encoder"):
        assert text in result.stdout
        assert text in told
    assert not data.run["provenance"]["subject"]["trained"]
    assert not data.run["provenance"]["encoder"]["trained"]
    found = data["neurons"].to_table().to_pylist()
    assert [(r["layer"], r["neuron"]) for r in found] == [("layer4", 3), ("layer4", 700)]
    assert {r["status"] for r in found} <= {"ok", "excluded"}
    (layer,) = data["layers"].to_table().to_pylist()
    assert (layer["width"], layer["n_neurons"], layer["grid_h"], layer["activation"]) == (2048, 2, 2, "relu")
    vectors = data["embeddings"].to_table().to_pylist()
    assert {len(r["geometry"]) for r in vectors} == {512}
    assert {r["text"] for r in vectors} == {None}
    assert verify(tmp_path / "out").ok


def test_vision_transformer_tokens_are_positions_on_a_grid(ray_here: None, one_thread: None, tmp_path: Path) -> None:
    raw = tiny(tmp_path)
    raw["science"]["subject"] = {
        "name": "timm:vit_tiny_patch16_224",
        "weights": "none",
        "layers": ["blocks.1"],
        "neurons": {"blocks.1": [0, 5, 191]},
        "input_px": 224,
        "micro_batch": 16,
    }
    raw["science"]["probe"] |= {"n_classes": 8, "n_per_class": 6}
    raw["science"]["embed"]["n_pool"] = 40
    result = command("run", write_config(tmp_path / "c.yaml", raw), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    data = polyray.open(tmp_path / "out")
    (layer,) = data["layers"].to_table().to_pylist()
    assert (layer["layout"], layer["grid_h"], layer["grid_w"], layer["stride_px"]) == ("tokens", 14, 14, 16)
    found = data["neurons"].to_table().to_pylist()
    assert [r["neuron"] for r in found] == [0, 5, 191]
    assert {r["status"] for r in found} == {"ok"}
    examples = data["examples"].to_table().to_pylist()
    assert all(0 <= r["position"] < 14 * 14 for r in examples)
    # The token that holds the peak lies in its box.
    for r in examples:
        row, column = divmod(r["position"], 14)
        assert r["x0"] <= 16 * column + 8 <= r["x1"]
        assert r["y0"] <= 16 * row + 8 <= r["y1"]
    assert verify(tmp_path / "out").ok


BROKEN = {
    "truncated.jpg": "truncated",
    "cut.png": "truncated",
    "empty.png": "empty file",
    "notes.png": "not an image",
    "huge.png": "too large",
    "float.tif": "pixel type",
    "nothing.jpg": "not a file",
    "folder.png": "not a file",
}
"""Files of class `broken`, and how the reason begins that each gets."""
ODD = ("gray.png", "cmyk.jpg", "deep.png", "palette.png", "dot.png", "strip.png", "large.jpg", "clear.png")
"""Files of class `odd`: pictures of every kind that can be read."""


def write_awkward_folder(root: Path) -> None:
    """Six ordinary classes, pictures of every odd kind, repeats, a class with one picture, and broken files."""
    for c in range(6):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(6):
            (root / f"class{c}" / f"{i}.png").write_bytes(encode(picture(10 * c + i, 40, 40)))
    for name in ("odd", "repeats", "alone", "broken"):
        (root / name).mkdir()
    odd, broken = root / "odd", root / "broken"
    image = Image.fromarray(picture(100, 40, 50))
    (odd / "gray.png").write_bytes(encode(image.convert("L")))
    (odd / "cmyk.jpg").write_bytes(encode(image.convert("CMYK"), "JPEG"))
    (odd / "deep.png").write_bytes(encode(Image.fromarray(picture(101, 40, 40)[:, :, 0].astype(np.uint16) * 257)))
    (odd / "palette.png").write_bytes(encode(image.convert("P")))
    (odd / "dot.png").write_bytes(encode(picture(102, 1, 1)))
    (odd / "strip.png").write_bytes(encode(picture(103, 3, 3000)))
    (odd / "large.jpg").write_bytes(encode(Image.fromarray(picture(104, 30, 40)).resize((4000, 3000)), "JPEG"))
    (odd / "clear.png").write_bytes(encode(image.convert("RGBA")))
    # The same pixels under another name, in another format, in another class.
    (root / "repeats" / "0.png").write_bytes((root / "class0" / "0.png").read_bytes())
    (root / "repeats" / "1.bmp").write_bytes(encode(picture(1, 40, 40), "BMP"))
    (root / "alone" / "only.png").write_bytes(encode(picture(105, 40, 40)))
    whole = encode(picture(106, 40, 40), "JPEG")
    (broken / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "cut.png").write_bytes(encode(picture(107, 40, 40))[:900])
    (broken / "empty.png").touch()
    (broken / "notes.png").write_text("this is no picture")
    (broken / "huge.png").write_bytes(png(20_000, 20_000, 8, 2, None))
    (broken / "float.tif").write_bytes(encode(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"))
    (broken / "nothing.jpg").symlink_to(root / "nowhere.jpg")
    (broken / "folder.png").mkdir()
    (broken / "readme.txt").write_text("no picture by its name: passed over")


def test_awkward_images_cost_themselves_a_row_and_nothing_else(
    ray_here: None, one_thread: None, tmp_path: Path
) -> None:
    write_awkward_folder(tmp_path / "pictures")
    raw = tiny(tmp_path, layers=["norm", "edges"], input_px=32)
    raw["science"] |= {
        "probe": {"kind": "folder", "path": str(tmp_path / "pictures")},
        "mine": {"K": 24, "K_keep": 40, "k_min": 20},
        "embed": {"n_pool": 40},
        "calibrate": {"B": 20, "n_bootstrap": 10},
    }
    result = command("run", write_config(tmp_path / "c.yaml", raw), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"{len(BROKEN)} images, patches, neurons or documents failed; see table failures" in result.stdout
    assert "1 constant, 1 dead, 1 not finite" in result.stdout
    data = polyray.open(tmp_path / "out")
    images = data["images"].to_table().to_pylist()
    by_name = {r["name"]: r for r in images}
    assert len(by_name) == len(images) == 6 * 6 + len(ODD) + 2 + 1 + len(BROKEN)

    failed = {r["name"] for r in images if r["status"] != "ok"}
    assert failed == {f"broken/{name}" for name in BROKEN}
    for name, reason in BROKEN.items():
        row = by_name[f"broken/{name}"]
        assert row["status"] == "failed"
        assert row["reason"].startswith(reason), (name, row["reason"])
        assert row["width_px"] is row["height_px"] is row["pixel_hash"] is None
    failures = data["failures"].to_table().to_pylist()
    assert sorted(r["item_id"] for r in failures) == sorted(by_name[f"broken/{name}"]["example"] for name in BROKEN)
    assert {(r["stage"], r["item"], r["layer"]) for r in failures} == {("index", "image", None)}
    assert {r["item_id"]: r["reason"] for r in failures} == {r["example"]: r["reason"] for r in images if r["reason"]}

    assert {name: by_name[f"odd/{name}"]["status"] for name in ODD} == dict.fromkeys(ODD, "ok")
    assert (by_name["odd/dot.png"]["width_px"], by_name["odd/large.jpg"]["width_px"]) == (1, 4000)
    for name, twin in (("repeats/0.png", "class0/0.png"), ("repeats/1.bmp", "class0/1.png")):
        assert by_name[name]["pixel_hash"] == by_name[twin]["pixel_hash"]

    # Each distinct readable picture counts once: repeats stand for themselves no more.
    distinct = {r["example"] for r in images if r["status"] == "ok" and not r["name"].startswith("repeats/")}
    assert {r["n_images"] for r in data["histograms"].to_table().to_pylist() if r["n_nonfinite"] == 0} == {
        len(distinct)
    }
    kept = {r["example"] for r in data["examples"].to_table().to_pylist()}
    assert kept <= distinct
    assert {by_name[f"odd/{name}"]["example"] for name in ODD} & kept
    assert {r["example"] for r in data["pool"].to_table().to_pylist()} <= distinct
    statuses = Counter((r["layer"], r["status"]) for r in data["neurons"].to_table().to_pylist())
    assert statuses[("norm", "ok")] == WIDTHS["norm"]
    assert statuses[("edges", "excluded")] == 3
    assert sum(statuses.values()) == WIDTHS["norm"] + WIDTHS["edges"]
    assert verify(tmp_path / "out").ok


def test_probe_set_without_a_readable_image_stops_the_sweep_and_says_so(
    ray_here: None, one_thread: None, tmp_path: Path
) -> None:
    (tmp_path / "pictures" / "broken").mkdir(parents=True)
    for i in range(25):
        (tmp_path / "pictures" / "broken" / f"{i}.png").write_text(f"no picture {i}")
    raw = tiny(tmp_path, layers=["norm"])
    raw["science"]["probe"] = {"kind": "folder", "path": str(tmp_path / "pictures")}
    result = command("run", write_config(tmp_path / "c.yaml", raw), "--out", tmp_path / "out", "--json")
    assert result.exit_code == 3
    assert printed_json(result)["error"] == "StageError"
    assert "no image" in result.stderr
    failures = polyray.open(tmp_path / "out")["failures"].to_table().to_pylist()
    assert [r["item_id"] for r in failures] == list(range(25))


def test_sweep_in_which_no_neuron_can_be_scored_is_still_whole(resolved: Resolved, tmp_path: Path) -> None:
    (edges,) = [info for info in resolved.sweep.layers if info.name == "edges"]
    hopeless = np.array(sorted(EDGE_NEURONS[name] for name in ("dead", "constant", "nan")))
    swept = replace(resolved.sweep, layers=(edges,), neurons={"edges": hopeless})
    said = resolved.provenance | {"layers": {"edges": len(hopeless)}}
    by_hand(replace(resolved, sweep=swept, provenance=said), tmp_path / "out")
    data = polyray.open(tmp_path / "out")
    found = data["neurons"].to_table().to_pylist()
    assert [(r["neuron"], r["status"], r["reason"].split(":")[0]) for r in found] == [
        (0, "excluded", "dead"),
        (1, "excluded", "constant"),
        (2, "excluded", "not finite"),
    ]
    assert [r["diagnosis"] for r in found] == ["dead", "constant", None]
    assert {r["q"] for r in found} == {None}
    counted = {(r["layer"], r["metric"]): r["value"] for r in data["layer_summary"].to_table().to_pylist()}
    assert counted["edges", "n_excluded"] == counted[None, "n_excluded"] == 3
    assert counted["edges", "called_frac"] is None
    assert command("verify", tmp_path / "out").exit_code == 0
