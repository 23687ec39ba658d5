"""The command line: exit codes, one JSON object on standard output, and messages that say what to do."""

import errno
import json
import shutil
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from sweeps import (
    CENSUS,
    CONFIGS,
    LAYERS,
    N_IMAGES,
    PROMPTS,
    WIDTHS,
    Finished,
    command,
    files_of,
    printed_json,
    tiny,
    write_config,
)

from polyray import cli, files
from polyray.cluster import service
from polyray.cluster.resolve import Resolved
from polyray.errors import ConfigError
from polyray.store import Store


def refused(result: Any, kind: str) -> str:
    """Message of a command that refused with exit code 2; the same to people and to machines."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    printed = printed_json(result)
    assert (printed["error"], printed["exit"]) == (kind, 2)
    assert kind in result.stderr
    # Lines are not wrapped where standard error is no terminal.
    assert printed["message"] in result.stderr
    return str(printed["message"])


# Bad input to run


@pytest.fixture(scope="module")
def named_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config with a network by name."""
    folder = tmp_path_factory.mktemp("named")
    raw = tiny(folder)
    raw["science"]["subject"] = {"name": "torchvision:resnet18", "weights": "none", "layers": ["layer4"]}
    return write_config(folder / "named.yaml", raw)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ("science.sede=1", "ConfigError", "Did you mean 'seed'"),
        ("science.subject.dtype=float23", "ConfigError", "'float32'"),
        ("science.mine.K=3", "ConfigError", "science.mine.K: Input should be greater than or equal to 4, got 3"),
        ("science.seed", "ConfigError", "key=value"),
        ("science.subject.layers=[edgess]", "ConfigError", "Did you mean 'edges'"),
        ("science.subject.layers=[edges, e*.x]", "ConfigError", "'e*.x' names no layer"),
        ("science.subject.layers=[]", "ConfigError", "layers is empty"),
        ("science.subject.neurons={edgess: [1]}", "ConfigError", "Did you mean 'edges'"),
        ("science.subject.neurons={edges: [10]}", "ConfigError", "neurons 0 to 9, got 10"),
        ("science.subject.neurons={edges: [3, 3]}", "ConfigError", "[3] more than once"),
        ("science.subject.neurons=nowhere.json", "ConfigError", "nowhere.json"),
        ("science.subject.factory=networks:edge_nets", "ConfigError", "Did you mean 'edge_net'"),
        ("science.subject.factory=networkz:edge_net", "ConfigError", "cannot import 'networkz'"),
        ("science.subject.factory=networks", "ConfigError", "package.module:function"),
        ("science.subject.factory=networks:not_a_module", "ModelError", "returned str"),
        ("science.subject.factory_args={width: 3}", "ConfigError", "do not fit"),
        ("science.vocabulary={folder}/prompt.txt", "ConfigError", "Did you mean 'prompts.txt'"),
        ("science.vocabulary={folder}", "ConfigError", "It is a folder"),
        ("science.probe={{kind: folder, path: nowhere}}", "DataError", "'nowhere' does not exist. Place a folder"),
        ("science.probe={{kind: folder, path: {folder}/prompts.txt}}", "DataError", "is a file"),
        ("science.probe={{kind: folder, path: {folder}}}", "DataError", "holds no images"),
        ("science.probe={{kind: table, path: nowhere.parquet}}", "DataError", "'nowhere.parquet' does not exist"),
        ("science.probe={{kind: tiny_imagenet, path: nowhere.zip}}", "DataError", "cs231n.stanford.edu"),
        ("science.probe={{kind: tiny_imagenet, path: {folder}/prompts.txt}}", "DataError", "not a whole zip"),
        ("science.probe.n_per_class=1", "DataError", "12 images; a neuron needs at least mine.k_min = 20"),
        ("science.subject.weights=nowhere.pth", "ModelError", "no weights at 'nowhere.pth'"),
        ("science.subject.weights={folder}/other.safetensors", "ModelError", "do not fit the network"),
        ("science.subject.weights={folder}/broken.pth", "ModelError", "cannot read weights"),
        ("science.encoder={{kind: open_clip, model: ViT-B-33}}", "ConfigError", "Did you mean 'ViT-B-32'"),
        ("science.encoder={{kind: open_clip, pretrained: opanai}}", "ConfigError", "Did you mean 'openai'"),
        ("science.encoder={{kind: open_clip, pretrained: ./no.pt}}", "ModelError", "there is no such file"),
    ],
)
def test_bad_config_or_data_is_refused_before_anything_is_written(
    tmp_path: Path, one_thread: None, change: str, kind: str, said: str
) -> None:
    path = write_config(tmp_path / "c.yaml", tiny(tmp_path))
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 cut short")
    change = change.format(folder=tmp_path) if "{folder}" in change or "{{" in change else change
    result = command("run", path, "--out", tmp_path / "out", "--json", "--set", change)
    assert said in refused(result, kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("resnet18", "none", "is not known"),
        ("torchvision:resnet19", "none", "Did you mean 'resnet18'"),
        ("timm:vit_tny_patch16_224", "none", "Did you mean 'vit_tiny_patch16_224'"),
        ("torchvision:resnet18", "IMAGENET1K_V9", "Did you mean 'IMAGENET1K_V1'"),
        ("timm:resnet18", "a1_in2k", "timm:resnet18.<tag>"),
    ],
)
def test_unknown_model_or_weights_name_the_nearest(
    named_yaml: Path, tmp_path: Path, name: str, weights: str, said: str
) -> None:
    sets = ("--set", f"science.subject.name={name}", "--set", f"science.subject.weights={weights}")
    result = command("run", named_yaml, "--out", tmp_path / "out", "--json", *sets)
    assert said in refused(result, "ConfigError")
    assert not (tmp_path / "out").exists()


def test_config_file_that_is_missing_or_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("science: [")
    for path, said in ((tmp_path / "d.yaml", "No such file"), (tmp_path / "c.yaml", "is not YAML")):
        for result in (command("run", path, "--out", tmp_path / "out", "--json"), command("plan", path, "--json")):
            assert said in refused(result, "ConfigError")


def test_refusal_without_json_leaves_standard_output_empty(tmp_path: Path) -> None:
    result = command("run", tmp_path / "d.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ConfigError: cannot read config")


def nothing_answers(*_: object, **__: object) -> None:
    raise urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))


def not_in_the_cache(*_: object, **__: object) -> None:
    raise LocalEntryNotFoundError("it is not in the cache, and the hub cannot be asked")


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            ["science.probe={kind: tiny_imagenet, path: FOLDER/deep/t.zip, download: true}"],
            "DataError",
            ["cs231n.stanford.edu/tiny-imagenet-200.zip", "place the file at", "FOLDER/deep/t.zip"],
        ),
        (
            ["science.subject.weights=IMAGENET1K_V1"],
            "ModelError",
            ["download.pytorch.org/models/resnet18", "put it at", "FOLDER/checkpoints/resnet18", "subject.weights"],
        ),
        (
            ["science.subject.name=timm:resnet18.a1_in1k", "science.subject.weights=default"],
            "ModelError",
            ["huggingface.co/timm/resnet18.a1_in1k", "subject.weights"],
        ),
        (
            ["science.encoder={kind: open_clip, model: ViT-B-32-quickgelu, pretrained: openai}"],
            "ModelError",
            ["cannot be reached", "bring the file here", "--set science.encoder.pretrained="],
        ),
    ],
    ids=["tiny-imagenet", "torchvision", "timm", "open_clip"],
)
def test_download_that_cannot_be_reached_says_what_to_place_where(
    named_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
    changes: list[str],
    kind: str,
    said: list[str],
) -> None:
    """The network and the caches are mocks: nothing answers, nothing is cached."""
    monkeypatch.setattr("urllib.request.urlopen", nothing_answers)
    monkeypatch.setattr("torch.hub.urlopen", nothing_answers)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", not_in_the_cache)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", not_in_the_cache)
    sets = [word for change in changes for word in ("--set", change.replace("FOLDER", str(tmp_path)))]
    result = command("run", named_yaml, "--out", tmp_path / "out", "--json", *sets)
    message = refused(result, kind)
    for part in said:
        assert part.replace("FOLDER", str(tmp_path)) in message
    assert not (tmp_path / "out").exists()


# OUT that cannot be had


@pytest.fixture
def resolves_at_once(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny sweep without loading its models again; where it goes is still decided by the command."""

    def at_once(config: Any, out: str) -> Resolved:
        return replace(resolved, sweep=replace(resolved.sweep, out=out, config=config))

    monkeypatch.setattr("polyray.cluster.resolve.resolve", at_once)


def file_in_place(out: Path) -> None:
    out.write_text("mine")


def file_above(out: Path) -> None:
    out.parent.rmdir()
    out.parent.write_text("mine")


def other_files(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


def damaged_run(out: Path) -> None:
    out.mkdir()
    (out / "run.json").write_text('{"run_id": "')


@pytest.mark.parametrize(
    ("occupy", "said"),
    [
        (file_in_place, "A file stands where a folder should be"),
        (file_above, "A file stands where a folder should be"),
        (other_files, "'thesis.tex'"),
        (damaged_run, "run.json' is damaged"),
    ],
)
def test_out_that_cannot_be_had_is_refused_and_left_as_it_is(
    tiny_yaml: Path,
    resolves_at_once: None,
    ray_here: None,
    tmp_path: Path,
    occupy: Callable[[Path], None],
    said: str,
) -> None:
    (tmp_path / "some").mkdir()
    occupy(tmp_path / "some" / "out")
    before = files_of(tmp_path)
    result = command("run", tiny_yaml, "--out", tmp_path / "some" / "out", "--json")
    assert said in refused(result, "StoreError")
    assert files_of(tmp_path) == before


def test_disk_that_is_full_from_the_start_is_refused(
    tiny_yaml: Path, resolves_at_once: None, ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full disk is a mock: whatever is written fails as on one."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    result = command("run", tiny_yaml, "--out", tmp_path / "out", "--json")
    assert "The disk is full" in refused(result, "StoreError")
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("verb", ["run", "status", "verify"])
def test_address_of_another_object_store_is_refused(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("run", tiny_yaml, "--out", "gs://bucket/out") if verb == "run" else (verb, "gs://bucket/out")
    result = command(*arguments, "--json")
    assert "must be a local or shared folder" in refused(result, "StoreError")
    assert list(tmp_path.iterdir()) == []


# Clusters that cannot do it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("execution.subject.num_cpus=9999", "execution.subject: 1 actor(s) of 9999 CPU, 0 GPU each do not fit"),
        ("execution.encoder.num_gpus=64", "execution.encoder: 1 actor(s) of 0.5 CPU, 64 GPU each do not fit"),
        ("execution.scoring.memory_gb=1e6", "execution.scoring: 1 actor(s) of 0.5 CPU, 0 GPU, 1e+06 GiB memory each"),
        ("execution.scoring={min: 4000, num_cpus: 0.5}", "execution.scoring: 4000 actor(s) of 0.5 CPU"),
    ],
)
def test_run_on_a_cluster_that_can_never_hold_the_actors_is_refused_with_the_numbers(
    tiny_yaml: Path, resolves_at_once: None, ray_here: None, tmp_path: Path, change: str, said: str
) -> None:
    result = command("run", tiny_yaml, "--out", tmp_path / "out", "--json", "--set", change)
    message = refused(result, "ConfigError")
    assert said in message
    cpus = service.nodes()[0]["CPU"]
    assert f"the cluster's nodes have {cpus:g} CPU, " in message
    assert not (tmp_path / "out").exists()


def test_plan_on_a_cluster_that_can_never_hold_the_actors_ends_with_2(
    tiny_yaml: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = command("plan", tiny_yaml, "--json", "--set", "execution.subject.num_cpus=9999")
    assert result.exit_code == 2
    printed = printed_json(result)
    assert not printed["feasible"]
    (problem,) = printed["problems"]
    assert "1 actor(s) of 9999 CPU, 0 GPU each do not fit" in problem
    assert f"have {service.this_machine()['CPU']:g} CPU" in problem
    assert "which hold 0" in problem


# Plan


def test_plan_says_what_the_sweep_then_is(tiny_yaml: Path, finished: Finished, one_thread: None) -> None:
    result = command("plan", tiny_yaml, "--json")
    assert result.exit_code == 0, result.output
    printed = printed_json(result)
    assert printed["feasible"]
    assert printed["problems"] == []
    assert {x["layer"]: x["neurons"] for x in printed["layers"]} == WIDTHS
    assert (printed["n_neurons"], printed["n_images"]) == (sum(WIDTHS.values()), N_IMAGES)
    done = {s["stage"]: s["n_done"] for s in printed_json(command("status", finished.out, "--json"))["stages"]}
    assert list(printed["units"]) == list(CENSUS)
    assert printed["units"] == done
    assert set(printed["device_hours"]) == {"mine", "embed", "cluster", "draw", "swap"}
    assert all(0 < hours < 1 for hours in printed["device_hours"].values())
    assert set(printed["memory_gb"]) == {"subject", "encoder", "scoring"}
    assert all(0 < size < 64 for size in [*printed["memory_gb"].values(), *printed["disk_gb"].values()])
    on_disk = sum(len(data) for _, data in files_of(finished.out).values()) / 2**30
    assert sum(printed["disk_gb"].values()) > on_disk / 4
    assert any("smallest p is 1.6e-02" in note for note in printed["notes"])


def test_plan_of_the_census_of_resnet50(one_thread: None, tmp_path: Path) -> None:
    """22,720 neurons, without weights or data: what is missing is said, the numbers are given all the same."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    changes = {
        "science.subject.weights": "none",
        "science.encoder.pretrained": "none",
        "science.probe.path": tmp_path / "nowhere.zip",
        "science.vocabulary": tmp_path / "prompts.txt",
        "science.subject.micro_batch": 2,
        "science.encoder.micro_batch": 2,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    result = command("plan", CONFIGS / "resnet50-census.yaml", *sets)
    assert result.exit_code == 2
    assert "22,720 neurons, 10,000 images" in result.stdout
    assert f"probe set: probe.path '{tmp_path / 'nowhere.zip'}' does not exist" in result.stdout
    for stage in CENSUS:
        assert stage in result.stdout
    for heading in ("device-hours", "memory of an actor", "disk before compression"):
        assert heading in result.stdout


# Status and verify


def test_status_of_a_finished_sweep(finished: Finished) -> None:
    for arguments in ((), ("--watch",)):
        result = command("status", finished.out, *arguments)
        assert result.exit_code == 0
        assert "finished" in result.stdout
        assert "not finished" not in result.stdout


def test_status_of_a_sweep_that_has_only_begun(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "commits").mkdir(parents=True)
    shutil.copy(finished.out / "run.json", out)
    printed = printed_json(command("status", out, "--json"))
    assert (printed["finished"], printed["n_done"]) == (False, 0)
    assert [s["n_done"] for s in printed["stages"]] == [0] * len(CENSUS)
    # What later stages will have follows from what the first commits.
    assert [s["n_units"] for s in printed["stages"]] == [1] + [None] * (len(CENSUS) - 1)
    result = command("status", out)
    assert result.exit_code == 0
    assert "0 units committed, not finished" in result.stdout


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_folder_that_is_no_dataset_is_refused(tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for out in ("empty", "file", "nowhere"):
        result = command(verb, tmp_path / out, "--json")
        assert "holds no run" in refused(result, "StoreError")
    assert not (tmp_path / "nowhere").exists()


def test_dataset_of_another_schema_is_refused(finished: Finished, tmp_path: Path) -> None:
    run = json.loads((finished.out / "run.json").read_text())
    del run["config"]["science"]["mine"]["K"]
    run["config"]["science"]["mine"]["top"] = 3
    (tmp_path / "run.json").write_text(json.dumps(run))
    for verb in ("status", "verify"):
        assert "does not describe a sweep" in refused(command(verb, tmp_path, "--json"), "StoreError")


def test_verify_of_a_whole_dataset(finished: Finished) -> None:
    result = command("verify", finished.out)
    assert result.exit_code == 0, result.output
    assert "whole" in result.stdout
    assert "not whole" not in result.stdout
    printed = printed_json(command("verify", finished.out, "--json"))
    assert printed["ok"]
    assert printed["n_rows"]["neurons"] == sum(WIDTHS.values())
    assert printed["n_parts"] == len(list(finished.out.rglob("*.parquet")))


def drop_part(out: Path) -> str:
    path = sorted((out / "neurons").rglob("*.parquet"))[0]
    path.unlink()
    return path.name


def flip_byte(out: Path) -> str:
    path = sorted((out / "scores").rglob("*.parquet"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def add_orphan(out: Path) -> str:
    path = sorted((out / "clusters").rglob("*.parquet"))[0]
    orphan = path.with_name(path.name.replace(path.name[-16:-8], "0123abcd"))
    assert orphan != path
    shutil.copy(path, orphan)
    return orphan.name


def drop_record(out: Path) -> str:
    store = Store(out)
    unit = next(iter(store.committed("merge")))
    with store.acquire():
        store.retire(unit)
    assert unit == f"merge/{min(LAYERS)}"
    return unit


def cut_manifest(out: Path) -> str:
    (path,) = (out / "commits").glob("*.units")
    path.write_bytes(path.read_bytes()[:50])
    return path.name


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (drop_part, "missing_parts"),
        (flip_byte, "mismatches"),
        (add_orphan, "orphans"),
        (drop_record, "missing_units"),
        (cut_manifest, "unreadable"),
    ],
)
def test_verify_of_a_damaged_dataset_ends_with_4_and_the_list(
    finished: Finished, tmp_path: Path, damage: Callable[[Path], str], finding: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    name = damage(out)
    result = command("verify", out, "--json")
    assert result.exit_code == 4
    printed = printed_json(result)
    assert not printed["ok"]
    assert any(name in line for line in printed[finding]), printed
    shown = command("verify", out)
    assert shown.exit_code == 4
    assert name in shown.stdout
    assert "not whole" in shown.stdout


# Doctor, and the command itself


def test_doctor_says_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    result = command("doctor", "--json")
    assert result.exit_code == 0
    printed = printed_json(result)
    assert set(printed) == {"versions", "devices", "ray", "weights and probe sets"}
    assert printed["versions"]["torch"] == version("torch")
    assert printed["ray"]["address"] == "10.0.0.1:6379"
    assert "not cached" in printed["weights and probe sets"]["ResNet-50 (torchvision)"]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").touch()
    shown = command("doctor")
    assert shown.exit_code == 0
    assert "cached: resnet50-0676ba61.pth" in shown.stdout
    assert "10.0.0.1:6379" in shown.stdout


def test_polyray_is_installed_as_a_command() -> None:
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "polyray"]
    assert script.load() is cli.main


@pytest.mark.parametrize("arguments", [("run", "c.yaml"), ("fly",), ("status",), ("plan", "c.yaml", "--sett", "a=b")])
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert command(*arguments).exit_code == 2


def test_every_command_offers_json() -> None:
    for verb in ("run", "plan", "status", "verify", "sensitivity", "doctor"):
        result = command(verb, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


def test_address_comes_from_the_option_then_the_config_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny(tmp_path)
    plain = write_config(tmp_path / "plain.yaml", raw)
    raw["execution"]["address"] = "config:1"
    addressed = tmp_path / "addressed.yaml"
    addressed.write_text(yaml.safe_dump(raw))
    asked: list[str | None] = []

    def remember(config: Any, out: str) -> None:
        asked.append(config.execution.address)
        raise ConfigError("seen")

    monkeypatch.setattr("polyray.cluster.resolve.resolve", remember)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command("run", plain, "--out", tmp_path / "out")
    monkeypatch.setenv("RAY_ADDRESS", "environment:1")
    command("run", plain, "--out", tmp_path / "out")
    command("run", addressed, "--out", tmp_path / "out")
    command("run", addressed, "--out", tmp_path / "out", "--address", "option:1")
    assert asked == [None, "environment:1", "config:1", "option:1"]
