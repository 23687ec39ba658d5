"""The files of deploy/, without a cloud: schemas, and that all they name exists in the project and fits together."""

import copy
import json
import os
import re
import shlex
import stat
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

from polyray.cli import app
from polyray.cluster.room import capacity, lacks
from polyray.config import AnyConfig, Config, PoolConfig, load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCHEMA = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
VMS = sorted((DEPLOY / "vms").glob("*.yaml"))
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
MOUNT = "/mnt/polyray"


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(DEPLOY / "kuberay" / f"{name}.yaml")["spec"]
    found: dict[str, Any] = spec if name == "raycluster" else spec["rayClusterSpec"]
    return found


def dockerfile(instruction: str) -> list[list[str]]:
    """Words of every instruction of a kind, without its options."""
    lines = re.findall(rf"^{instruction} (.*)$", DOCKERFILE, re.MULTILINE)
    return [[word for word in shlex.split(line) if not word.startswith("--")] for line in lines]


def ray_version() -> str:
    (version,) = re.findall(r"^ray==(.*)$", (DEPLOY / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


# Kubernetes


def valid(resource: dict[str, Any]) -> bool:
    return jsonschema.Draft7Validator(SCHEMA).is_valid(resource)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda p: p.stem)
def test_resource_of_kubernetes_is_valid(path: Path) -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    resource = read(path)
    kind = {"$ref": f"#/definitions/{resource['kind']}", "definitions": SCHEMA["definitions"]}
    jsonschema.validate(resource, kind, jsonschema.Draft7Validator)  # says where it fails, which oneOf does not
    assert valid(resource)


def all_places(node: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all mappings in a document."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [place] if isinstance(node, dict) else []
    return found + [p for key, value in inside for p in all_places(value, (*place, key))]


FREE_KEYS = ("rayStartParams", "nodeSelector", "requests", "limits", "labels")
"""Mappings whose keys nobody can know."""


@pytest.mark.parametrize("path", KUBERAY, ids=lambda p: p.stem)
def test_the_schema_sees_an_unknown_key_wherever_it_stands(path: Path) -> None:
    resource = json.loads(json.dumps(read(path)))  # without YAML's aliases, each place is a mapping of its own
    places = [p for p in all_places(resource) if not p or p[-1] not in FREE_KEYS]
    assert len(places) > 3
    for place in places:
        changed = copy.deepcopy(resource)
        node = changed
        for key in place:
            node = node[key]
        node["misspelt"] = "x"
        assert not valid(changed), place


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "rayVersion"), 2.6),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers"), []),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "0"),
        (("spec", "workerGroupSpecs", 0, "groupName"), "GPU spot"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "nodeSelector", "spot"), True),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"), "7 cores"),
    ],
)
def test_the_schema_sees_a_wrong_value(place: tuple[Any, ...], value: object) -> None:
    resource = json.loads(json.dumps(read(DEPLOY / "kuberay" / "raycluster.yaml")))
    node = resource
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert not valid(resource)


def test_both_resources_have_the_same_cluster() -> None:
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


def test_cluster_on_kubernetes_is_what_it_promises_to_be() -> None:
    spec = cluster_spec("raycluster")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    spot, on_demand = spec["workerGroupSpecs"]
    assert spot["priority"] > on_demand["priority"]
    for group in (spot, on_demand):
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["maxReplicas"] > 0
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {e["name"]: e["value"] for e in container["env"]}
        drain_s = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain_s == ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
        assert pod["terminationGracePeriodSeconds"] > drain_s
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spot["template"]["spec"]["containers"] == on_demand["template"]["spec"]["containers"]
    (label,) = spot["template"]["spec"]["nodeSelector"]
    affinity = on_demand["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": label, "operator": "DoesNotExist"}]


def test_every_pod_mounts_the_claim_at_one_place() -> None:
    claim = read(DEPLOY / "kuberay" / "storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = cluster_spec("raycluster")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert (mount["name"], mount["mountPath"]) == (volume["name"], MOUNT)


# Virtual machines


def prepared(path: Path) -> dict[str, Any]:
    """What Ray makes of a file of `ray up` before it asks a cloud."""
    config: dict[str, Any] = prepare_config(read(path))
    return config


@pytest.mark.parametrize("path", VMS, ids=lambda p: p.stem)
def test_file_of_ray_up_passes_rays_own_validation(path: Path) -> None:
    validate_config(prepared(path))
    broken = read(path) | {"max_wokers": 8}
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("path", VMS, ids=lambda p: p.stem)
def test_cluster_of_virtual_machines_is_what_it_promises_to_be(path: Path) -> None:
    config = prepared(path)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert (head["resources"]["CPU"], head["max_workers"]) == (0, 0)
    (start,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--num-cpus=0" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    for group in types.values():
        assert group["min_workers"] == 0
        assert group["resources"]["GPU"] == 1
    spot, on_demand = types["gpu-spot"]["node_config"], types["gpu-on-demand"]["node_config"]
    marks = {"aws": {"MarketType": "spot"}, "gcp": {"preemptible": True}}[path.stem]
    assert marks in (spot.get("InstanceMarketOptions"), *spot.get("scheduling", []))
    assert "spot" not in json.dumps(on_demand)
    assert "preemptible" not in json.dumps(on_demand)
    options = config["docker"]["run_options"]
    assert f"--volume={MOUNT}:{MOUNT}" in options
    assert "--env=RAY_AUTH_MODE=token" in options
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


# What the files name


def test_what_the_image_copies_exists_and_reaches_the_build() -> None:
    allowed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    sources = [source for words in dockerfile("COPY") for source in words[:-1]]
    assert set(sources) == set(allowed)
    for source in sources:
        assert (ROOT / source).exists(), source
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {needed["readme"], *needed["license-files"], "pyproject.toml"} <= set(sources)
    extras = re.findall(r"\.\[([a-z0-9,]+)\]", DOCKERFILE)
    assert extras
    assert {e for group in extras for e in group.split(",")} <= set(needed["optional-dependencies"])


def test_version_of_ray_is_the_same_everywhere() -> None:
    version = ray_version()
    ((base,),) = dockerfile("FROM")
    assert re.fullmatch(rf"rayproject/ray:{re.escape(version)}-py311", base)
    assert {cluster_spec(name)["rayVersion"] for name in ("rayjob", "raycluster")} == {version}


def test_there_is_one_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    image = f"registry.example.com/polyray:{version}"
    named = set()
    for path in [*KUBERAY, *VMS, DEPLOY / "Dockerfile", DEPLOY / "README.md"]:
        named |= set(re.findall(r"(?:image: |build .* -t )([^\s`]+)", path.read_text()))
    assert named == {image}


def commands() -> list[tuple[str, list[str]]]:
    """Every polyray command line that a file of deploy/ holds, by file: in comments, tables and entrypoints."""
    found = []
    for path in [*KUBERAY, *VMS, DEPLOY / "README.md"]:
        text = re.sub(r"^ *#", "", path.read_text(), flags=re.MULTILINE)
        text = re.sub(r"\\\n", " ", text)
        for line in re.findall(r"(?:`|^ *|token )(polyray [a-z]+ [A-Za-z/][^\n`]*)", text, re.MULTILINE):
            found.append((f"{path.parent.name}/{path.name}", shlex.split(line, comments=True)))
    entrypoint = read(DEPLOY / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"]
    found = [(where, words) for where, words in found if "rayjob" not in where]
    return [*found, ("kuberay/rayjob.yaml", shlex.split(entrypoint))]


COMMANDS = commands()


def asked(words: list[str]) -> AnyConfig:
    """The config that a command line asks for, its files taken from the project."""
    path = words[2].replace(dockerfile("WORKDIR")[0][0], str(ROOT))
    overrides = [following for word, following in pairwise(words) if word == "--set"]
    return load_config(ROOT / path, overrides)


def test_command_lines_are_found() -> None:
    assert {where for where, _ in COMMANDS} >= {
        *(f"{p.parent.name}/{p.name}" for p in [*VMS, DEPLOY / "README.md"]),
        "kuberay/raycluster.yaml",
        "kuberay/rayjob.yaml",
    }


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{where}: {words[1]}" for where, words in COMMANDS])
def test_command_line_is_one_of_polyrays(where: str, words: list[str]) -> None:
    group = get_command(app)
    verb = group.commands[words[1]]  # type: ignore[attr-defined]
    context = verb.make_context(words[1], list(words[2:]))
    out = context.params["out"]
    if words[2] == "CONFIG":
        return
    assert isinstance(asked(words), Config)
    assert out.startswith(f"{MOUNT}/")


NODES = {
    f"kuberay {name}": node["resources"]
    for name, node in _derive_autoscaling_config_from_ray_cr(
        read(DEPLOY / "kuberay" / "raycluster.yaml") | {"metadata": {"name": "polyray", "namespace": "default"}}
    )["available_node_types"].items()
} | {
    f"{path.stem} {name}": node["resources"]
    for path in VMS
    for name, node in read(path)["available_node_types"].items()
}
"""Resources of every kind of node, those of Kubernetes as Ray's autoscaler derives them from the pods."""


MOST_NODES = 8


def test_every_cluster_grows_to_as_many_nodes() -> None:
    specs = [cluster_spec(name) for name in ("rayjob", "raycluster")]
    groups = [group["maxReplicas"] for spec in specs for group in spec["workerGroupSpecs"]]
    kinds = [kind for path in VMS for kind in read(path)["available_node_types"].values()]
    assert {*groups, *(kind["max_workers"] for kind in kinds if "GPU" in kind["resources"])} == {MOST_NODES}


def test_nodes_are_as_many_as_the_files_say() -> None:
    assert sum("gpu" in kind for kind in NODES) == 6
    assert len(NODES) == 9
    assert {kind for kind, has in NODES.items() if has["CPU"] == 0} == {k for k in NODES if "gpu" not in k}


@pytest.mark.parametrize("node", [kind for kind in NODES if "gpu" in kind])
@pytest.mark.parametrize(("where", "words"), [(f, w) for f, w in COMMANDS if w[2] != "CONFIG"])
def test_every_actor_fits_a_worker_and_none_the_head(node: str, where: str, words: list[str]) -> None:
    execution = asked(words).execution
    pools = {kind: pool for kind, pool in execution if isinstance(pool, PoolConfig)}
    assert set(pools) == {"subject", "encoder", "scoring"}
    heads = [resources for kind, resources in NODES.items() if "gpu" not in kind]
    assert len(heads) == 3
    for kind, pool in pools.items():
        assert capacity(pool, [NODES[node]]) >= 1, kind
        assert capacity(pool, heads) == 0, kind


@pytest.mark.parametrize(("where", "words"), [(f, w) for f, w in COMMANDS if w[2] != "CONFIG"])
def test_a_sweep_asks_for_what_its_cluster_grows_to(where: str, words: list[str]) -> None:
    kind = {"kuberay/rayjob.yaml": "kuberay gpu-spot", "kuberay/raycluster.yaml": "kuberay gpu-spot"}.get(where)
    most = [NODES[kind or next(k for k in NODES if k.startswith(Path(where).stem) and "gpu" in k)]] * MOST_NODES
    execution = asked(words).execution
    assert execution.autoscale  # there is no worker at first
    assert lacks(execution, [{"CPU": 0.0, "memory": 2.0**30}]) == []
    for kind, pool in execution:
        if isinstance(pool, PoolConfig):
            assert pool.max is not None, kind  # what makes Ray's autoscaler add nodes
            assert pool.max == capacity(pool, most), kind


def test_files_of_the_table_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    named = set(re.findall(r"`((?:kuberay|vms)/[a-z.]+|[a-z]+\.(?:sh|txt))`", text))
    named |= {name.removeprefix("deploy/") for name in re.findall(r"deploy/[A-Za-z/.]+[a-z]", text)}
    assert {p.relative_to(DEPLOY).as_posix() for p in DEPLOY.rglob("*") if p.is_file()} - named == {
        "README.md",
        "Dockerfile.dockerignore",
    }
    assert [name for name in named if not (DEPLOY / name).exists()] == []


# Nightly

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
[[ "$*" == *"$FAILS"* ]] && exit "$CODE"
echo '{}'
"""


def nightly(folder: Path, fails: str, code: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The nightly command, with a python that only writes down what it is asked to do."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    calls = folder / "calls"
    environment = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    done = subprocess.run(
        [DEPLOY / "nightly.sh", folder / "results"],
        env=environment | {"FAILS": fails, "CODE": str(code)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines()


BENCHMARKS = sorted(p.name for p in (ROOT / "tests" / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize(("fails", "code"), [("nothing", 1), ("-m slow", 5)], ids=["all pass", "nothing is slow"])
def test_nightly_runs_the_slow_tests_and_every_benchmark(tmp_path: Path, fails: str, code: int) -> None:
    done, calls = nightly(tmp_path, fails, code)
    assert done.returncode == 0, done.stderr
    assert calls[0].startswith("-m pytest -m slow")
    assert calls[1:] == [f"tests/benchmarks/{name} --json" for name in BENCHMARKS]
    results = {p.stem + ".py" for p in (tmp_path / "results").glob("*.json")}
    assert results == set(BENCHMARKS)


@pytest.mark.parametrize("fails", ["-m slow", BENCHMARKS[0]])
def test_nightly_goes_on_after_a_failure_and_fails_in_the_end(tmp_path: Path, fails: str) -> None:
    done, calls = nightly(tmp_path, fails, 1)
    assert done.returncode == 1
    assert len(calls) == 1 + len(BENCHMARKS)
    assert "failed: " in done.stderr
    assert fails.removesuffix(".py") in done.stderr
