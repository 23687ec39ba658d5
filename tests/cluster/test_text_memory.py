"""Memory of a categorical sweep: GPT2-XL's by hand, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sweeps import TESTS, clean_environment, command, printed_json, write_config
from transformers import GPT2Config

from polyray.cluster.text_estimate import TextEstimate, estimate
from polyray.cluster.text_memory import Room
from polyray.config import parse_any
from polyray.text_config import TextConfig

GIB = 1024**3
VOCAB, WIDTH, NEURONS, LAYERS = 50_257, 1600, 6400, 48
BLOCK = 12 * WIDTH**2 + 13 * WIDTH
"""Parameters of a block: attention, MLP, their biases and two norms."""
LARGE = [64.0 * GIB]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT2-XL's configuration without weights or tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("xl")
    GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=25).save_pretrained(folder)
    (folder / "corpus.jsonl").write_text(json.dumps({"text": "a few words"}))
    return folder


def raw(folder: Path, model: dict[str, Any] | None = None, **execution: Any) -> dict[str, Any]:
    science = {
        "method": "categorical",
        "model": {"path": str(folder)} | (model or {}),
        "corpus": {"path": str(folder / "corpus.jsonl")},
        "clamp": {},
    }
    return {"science": science, "execution": execution}


def planned(
    folder: Path, n_shards: int, memory: list[float], model: dict[str, Any] | None = None, **execution: Any
) -> TextEstimate:
    config = parse_any(raw(folder, model, **execution))
    assert isinstance(config, TextConfig)
    return estimate(config, Room({"shard": n_shards, "scoring": 2}, memory))


def about_memory(e: TextEstimate) -> list[str]:
    """Problems but those of missing files."""
    return [p for p in e.problems if not p.startswith(("tokenizer:", "model:"))]


def test_the_whole_of_gpt2_xl(xl: Path) -> None:
    e = planned(xl, 8, LARGE)
    assert e.n_neurons == 307_200
    all_layers = e.memory_gb["statistics of all layers"] * GIB
    assert all_layers == 50_257 * 307_200 * 8
    assert round(all_layers / 1e9, 1) == 123.5
    # A layer takes 2.40 GiB, so that 26 of them go into 8 × 8 GiB, and 22 remain, on the last shards.
    assert (e.n_passes, e.n_shards) == (2, 8)
    held = {k: v * GIB for k, v in e.memory_gb.items() if k.startswith("shard of")}
    assert sum(v for k, v in held.items() if k.endswith("weights")) == 4 * (LAYERS * BLOCK + (VOCAB + 1024) * WIDTH)
    assert held["shard of blocks 0 to 5: statistics"] == 0
    assert held["shard of blocks 24 to 29: statistics"] == 4 * 8 * VOCAB * NEURONS
    assert held["shard of blocks 42 to 47: statistics"] == 6 * 8 * VOCAB * NEURONS
    clamp = e.memory_gb["scoring actor in clamp"] * GIB
    assert clamp > 4 * (LAYERS * BLOCK + (VOCAB + 1024) * WIDTH)
    assert e.memory_gb["scoring actor in core"] * GIB >= 2 * 8 * VOCAB * NEURONS


def test_two_layers_on_two_shards(xl: Path) -> None:
    e = planned(xl, 2, LARGE, {"layers": [1]}, stats_gb=3)
    assert (e.n_passes, e.n_shards, e.n_mined) == (1, 2, 2)
    layer = 8 * VOCAB * NEURONS / GIB
    for i in (0, 1):
        name = f"shard of blocks {i} to {i}"
        assert e.memory_gb[f"{name}: statistics"] == layer
        entry = 0 if i else 4 * (VOCAB + 1024) * WIDTH
        assert e.memory_gb[f"{name}: weights"] * GIB == 4 * BLOCK + entry
        assert layer < e.memory_gb[name] < layer + 4
    half = planned(xl, 2, LARGE, {"layers": [1], "dtype": "bfloat16", "neurons": {1: ["0-639"]}})
    name = "shard of blocks 1 to 1"
    assert half.memory_gb[f"{name}: weights"] * GIB == 2 * BLOCK
    assert half.memory_gb[f"{name}: statistics"] == pytest.approx(layer / 10)
    assert half.memory_gb["shard of blocks 0 to 0: statistics"] == layer


@pytest.mark.parametrize(
    ("n_shards", "memory", "execution", "said"),
    [
        (2, LARGE, {"stats_gb": 1}, "stats_gb 1 × 2 shard(s) is less than the statistics of one layer: 'h.0' takes up "
         "to 2.40 GiB (50,257 tokens × 6,400 neurons × 8 bytes)"),
        (2, LARGE, {"shard": {"memory_gb": 4}}, "execution.shard.memory_gb is 4, but up to"),
        (1, [6.0 * GIB], {}, "a shard actor needs up to"),
        (2, [8.0 * GIB], {}, "2 shard actors need up to"),
        (2, LARGE, {"scoring": {"memory_gb": 4}}, "stage core: execution.scoring.memory_gb is 4, but up to 5."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_problem(
    xl: Path, n_shards: int, memory: list[float], execution: dict[str, Any], said: str
) -> None:
    assert any(said in problem for problem in about_memory(planned(xl, n_shards, memory, {"layers": [1]}, **execution)))
    assert about_memory(planned(xl, 2, LARGE, {"layers": [1]})) == []


def test_plan_says_what_is_in_the_way(xl: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "xl.yaml", raw(xl, stats_gb=0.01))
    result = command("plan", config, "--json")
    assert result.exit_code == 2
    printed = printed_json(result)
    assert not printed["feasible"]
    assert any("less than the statistics of one layer" in p for p in printed["problems"])
    assert any(p.startswith("model: no weights") for p in printed["problems"])
    shown = command("plan", config).output
    assert "statistics of all layers" in shown
    assert "in the way" in shown


@pytest.mark.slow
def test_processes_hold_what_was_planned(tmp_path: Path) -> None:
    """GPT2-XL's width: two shards with the statistics of all tokens, and one scoring actor."""
    bench = TESTS / "benchmarks" / "bench_xl.py"
    done = subprocess.run(
        [sys.executable, bench, "--json"], env=clean_environment(tmp_path), capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    statistics, libraries = 8 * VOCAB * NEURONS / GIB, 1.0
    assert [s["layer"] for s in found["shards"]] == ["h.0", "h.1"]
    for shard in found["shards"]:
        assert statistics < shard["mining_gib"] <= shard["saving_gib"] < shard["planned_gib"] + libraries
    assert found["core"]["peak_gib"] < found["core"]["planned_gib"] + libraries
