"""The categorical census of a tiny language model on Ray: whole, the same for every cut, after the loss of a shard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps import HALF_CPU, command, digests, printed_json, write_config
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from troubles import DyingShard

import polyray
from polyray.cluster import chain
from polyray.cluster.text_resolve import resolve
from polyray.config import load_config
from polyray.errors import ConfigError
from polyray.store import Store
from polyray.text_config import TextConfig

N_WORDS, N_NEURONS, N_LAYERS = 120, 40, 3
N_DOCUMENTS = 300
"""Two units of tokenise."""


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2, its tokenizer and a corpus in which two documents cannot be used."""
    folder = tmp_path_factory.mktemp("language")
    words = [f"w{i}" for i in range(N_WORDS)]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate([*words, "<eot>", "<unk>"])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eot>", unk_token="<unk>").save_pretrained(folder)
    shape = GPT2Config(vocab_size=N_WORDS + 2, n_embd=12, n_inner=N_NEURONS, n_layer=N_LAYERS, n_head=3, n_positions=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(shape)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.4)
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, int(rng.integers(1, 40)))) for _ in range(N_DOCUMENTS)]
    texts[7], texts[290] = "", "   "
    lines = [json.dumps({"text": t, "label": f"l{i % 3}"}) for i, t in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


def raw(folder: Path, **execution: Any) -> dict[str, Any]:
    return {
        "science": {
            "method": "categorical",
            "model": {"path": str(folder), "context": 16, "micro_batch": 4},
            "corpus": {"path": str(folder / "corpus.jsonl")},
            "core": {"n_core": 40, "min_count": 3},
            "connect": {"n_precursors": 6},
            "overlap": {"min_tokens": 6, "min_clusters": 3},
            "proximity": {"n_permutations": 50, "n_draws": 2, "n_bootstrap": 50},
            "clamp": {"n_neurons": 2, "n_contexts": 8},
        },
        "execution": {"shard": HALF_CPU | {"max": 1}, "scoring": HALF_CPU | {"max": 1}} | execution,
    }


@pytest.fixture(scope="module")
def census(language: Path, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The whole census with one shard, and what the command printed."""
    out = tmp_path_factory.mktemp("census") / "out"
    config = write_config(out.parent / "whole.yaml", raw(language))
    result = command("run", config, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    return out, printed_json(result)


def test_a_census_has_all_its_tables_and_every_neuron_a_row(census: tuple[Path, dict[str, Any]]) -> None:
    out, printed = census
    data = polyray.open(out)
    rows = data["proximity"].to_table().to_pylist()
    assert len(rows) == N_LAYERS * N_NEURONS == len({(r["layer"], r["neuron"]) for r in rows})
    assert {r["status"] for r in rows} == {"ok", "excluded"}
    assert {r["reason"] for r in rows if r["layer"] == "h.0"} == {"no layer before it"}
    documents = data["documents"].to_table().to_pylist()
    assert [r["document"] for r in documents if r["status"] == "failed"] == [7, 290]
    assert {r["reason"] for r in documents} == {None, "empty"}
    assert [r["layer"] for r in printed["layers"]] == ["h.1", "h.2", None]
    conditions = {r["condition"] for r in data["categorical"].to_table().to_pylist()}
    assert {"actual", "order", "precursors_matched", "precursors_random", "tokens_same_frequency"} <= conditions
    assert (out / "categorical.png").stat().st_size > 10_000
    clamps = data["clamps"].to_table().to_pylist()
    assert {r["layer"] for r in clamps} == {"h.0", "h.1"}, "the last layer feeds none that is swept"
    assert len(clamps) >= 4


def test_token_statistics_are_those_of_a_loop(census: tuple[Path, dict[str, Any]], language: Path) -> None:
    """transformers' own forward over the contexts as they are stored, token by token."""
    out, _ = census
    data = polyray.open(out)
    model = AutoModelForCausalLM.from_pretrained(language).eval()
    seen: list[torch.Tensor] = []
    model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sums: dict[int, Any] = {}
    counts: dict[int, int] = {}
    for row in data["contexts"].to_table().to_pylist():
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row["tokens"]]))
        for token, document, value in zip(row["tokens"], row["documents"], seen[0][0].double().numpy(), strict=True):
            if document is not None:
                sums[token] = sums.get(token, 0.0) + value
                counts[token] = counts.get(token, 0) + 1
    kept = {r["token"]: r["count"] for r in data["tokens"].to_table().to_pylist()}
    assert kept == {t: n for t, n in counts.items() if n >= 3}
    stats = [r for r in data["token_stats"].to_table().to_pylist() if r["layer"] == "h.1"]
    assert {r["token"] for r in stats} == set(kept)
    for row in stats:
        np.testing.assert_allclose(np.array(row["sums"]) / 2**24, sums[row["token"]], atol=1e-4)
    core = {r["neuron"]: r for r in data["core_tokens"].to_table().to_pylist() if r["layer"] == "h.1"}
    for neuron in (0, 17):
        means = {t: sums[t][neuron] / counts[t] for t in kept}
        best = sorted(means, key=lambda t: -means[t])[:40]
        np.testing.assert_allclose(core[neuron]["means"], [means[t] for t in best], atol=1e-5)
        assert core[neuron]["tokens"] == best


def test_status_verify_and_plan_know_the_census(census: tuple[Path, dict[str, Any]], language: Path) -> None:
    out, _ = census
    status = printed_json(command("status", out, "--json"))
    assert status["finished"]
    assert {s["stage"]: s["n_done"] for s in status["stages"]} == {
        "tokenise": 2, "count": 1, "mine": 3, "core": 3, "connect": 3, "overlap": 3, "proximity": 3, "clamp": 3,
        "summarise": 1,
    }  # fmt: skip
    verified = command("verify", out, "--json")
    assert verified.exit_code == 0, verified.output
    planned = printed_json(command("plan", write_config(out.parent / "plan.yaml", raw(language)), "--json"))
    assert planned["feasible"]
    assert planned["n_neurons"] == N_LAYERS * N_NEURONS
    assert planned["units"] == {s["stage"]: s["n_done"] for s in status["stages"]}


def test_cuts_passes_and_checkpoints_change_nothing(
    census: tuple[Path, dict[str, Any]], language: Path, tmp_path: Path
) -> None:
    """Two shards, a pass a layer, a checkpoint after every batch."""
    execution = {"shard": HALF_CPU | {"max": 2}, "stats_gb": 2e-5, "checkpoint_s": 1e-6}  # room for one layer
    config = write_config(tmp_path / "cut.yaml", raw(language, **execution))
    result = command("run", config, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "out") == digests(census[0])
    assert Store(tmp_path / "out").committed(chain.CUT) == {}, "checkpoints are retired"


def test_the_loss_of_a_shard_changes_nothing(
    census: tuple[Path, dict[str, Any]], language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "ShardActor", DyingShard)
    (tmp_path / "die_at").write_text("9")
    execution = {"shard": HALF_CPU | {"max": 2}, "checkpoint_s": 1e-6}
    config = write_config(tmp_path / "lost.yaml", raw(language, **execution))
    result = command("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "a shard was lost" in result.output
    assert "all go back to batch 0" not in result.output, "the checkpoint was used"
    assert not (tmp_path / "die_at").exists()
    assert digests(tmp_path / "out") == digests(census[0])


def test_chosen_neurons_are_all_that_is_swept_and_come_out_as_in_the_whole(
    census: tuple[Path, dict[str, Any]], language: Path, tmp_path: Path
) -> None:
    """Layer 0 is mined for layer 1, and layer 1 whole for layer 2; of layer 2 the chosen neurons alone."""
    few = raw(language)
    few["science"]["model"] |= {"layers": [1, 2], "neurons": {1: [3, "10-29", 33], 2: ["0-19"]}}
    chosen = {"h.1": [3, *range(10, 30), 33], "h.2": list(range(20))}
    config = write_config(tmp_path / "few.yaml", few)
    planned = printed_json(command("plan", config, "--json"))
    assert (planned["n_neurons"], planned["n_mined"]) == (42, 3)
    result = command("run", config, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    here, there = (polyray.open(out) for out in (tmp_path / "out", census[0]))

    def rows(data: Any, table: str, layer: str, *key: str) -> dict[Any, dict[str, Any]]:
        return {tuple(r[k] for k in key): r for r in data[table].to_table().to_pylist() if r["layer"] == layer}

    for layer, mined in {"h.0": range(40), "h.1": range(40), "h.2": range(20)}.items():
        found = rows(here, "core_tokens", layer, "neuron")
        whole = rows(there, "core_tokens", layer, "neuron")
        assert found == {(n,): whole[n,] for n in mined}
        sums = rows(here, "token_stats", layer, "token")
        whole = rows(there, "token_stats", layer, "token")
        assert {t: r["sums"] for t, r in sums.items()} == {t: r["sums"][: len(mined)] for t, r in whole.items()}
    for layer, neurons in chosen.items():
        found = rows(here, "proximity", layer, "neuron")
        whole = rows(there, "proximity", layer, "neuron")
        assert list(found) == [(n,) for n in neurons]
        for key, row in found.items():
            assert row["status"] == whole[key]["status"]
            np.testing.assert_allclose(row["dimensional"] or [], whole[key]["dimensional"] or [], atol=1e-12)
        for table, key in (("connections", ("neuron", "rank")), ("taken_clusters", ("neuron", "rank"))):
            found, whole = (rows(data, table, layer, *key) for data in (here, there))
            assert {k: r["precursor"] for k, r in found.items()} == {
                k: r["precursor"] for k, r in whole.items() if k[0] in neurons
            }
            assert {k: r.get("tokens") for k, r in found.items()} == {
                k: r.get("tokens") for k, r in whole.items() if k[0] in neurons
            }
    drawn = rows(here, "proximity_controls", "h.2", "neuron", "control")
    whole = rows(there, "proximity_controls", "h.2", "neuron", "control")
    assert drawn
    for key, row in drawn.items():
        assert row["qualifies"] == whole[key]["qualifies"]
        ours, theirs = (np.array(r["differences"], dtype=float) for r in (row, whole[key]))
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    clamps = here["clamps"].to_table().to_pylist()
    assert clamps
    feeds = {(r["neuron"], r["precursor"]) for r in rows(here, "connections", "h.2", "neuron", "rank").values()}
    for row in clamps:
        assert (row["layer"], row["neuron"] in chosen["h.1"]) == ("h.1", True)
        assert row["targets"] == sorted(n for n, p in feeds if p == row["neuron"])
    assert {r["n_neurons"] for r in here["categorical"].to_table().to_pylist()} == {22, 20, 42}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"neurons": {1: [3, "38-40"]}}}, "'h.1' has neurons 0 to 39, got '38-40'"),
        ({"model": {"neurons": {1: ["9-3"]}}}, "runs backwards; say '3-9'"),
        ({"model": {"neurons": {1: [4, "3-7"]}}}, "lists [4] more than once"),
        ({"model": {"layers": [1], "neurons": {2: [4]}}}, "layers [2] are not among those swept, 1"),
        ({"model": {"layers": [1], "neurons": {1: []}}}, "leaves no neuron"),
        ({"model": {"neurons": {1: ["3:7"]}}}, "neurons of layer 1: '3:7' is neither an index nor a range"),
        ({"model": {"neurons": {"h.1": [3]}}}, "an index from 0, got 'h.1'"),
        ({"model": {"neurons": [3]}}, "must be lists of indices and ranges by layer"),
        ({"model": {"neurons": "/nowhere.json"}}, "cannot read '/nowhere.json'"),
        ({"core": {"published": "/nowhere"}}, "'/nowhere' holds a file of none of the neurons"),
        ({"model": {"layers": [1, 7]}}, "layers 0 to 2"),
        ({"model": {"path": "/nowhere"}}, "/nowhere"),
        ({"model": {"context": 17}}, "more than the model's 16"),
        ({"corpus": {"path": "/nowhere.jsonl"}}, "does not exist"),
        ({"corpus": {"label_column": "genre"}}, "genre"),
        ({"core": {"n_core": 20}, "proximity": {"n_ends": 11}}, "2 × proximity.n_ends"),
        ({"overlap": {"min_token": 6}}, "Did you mean 'min_tokens'"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    language: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    bad = raw(language)
    for section, values in change.items():
        bad["science"][section] = bad["science"].get(section, {}) | values
    result = command("run", write_config(tmp_path / "bad.yaml", bad), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_statistics_that_do_not_fit_are_refused_before_anything_is_written(
    language: Path, ray_here: None, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "large.yaml", raw(language, stats_gb=1e-6))
    result = command("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "122 tokens × 40 neurons × 8 bytes" in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def publish(census: Path, folder: Path) -> None:
    """Core-tokens of a census, in the form of OpenAI's neuron files."""
    data = polyray.open(census)
    word = {r["token"]: r["text"] for r in data["tokens"].to_table().to_pylist()}
    for row in data["core_tokens"].to_table().to_pylist():
        place = folder / row["layer"].removeprefix("h.") / f"{row['neuron']}.json"
        place.parent.mkdir(exist_ok=True, parents=True)
        said = {"tokens": [word[t] for t in row["tokens"]], "average_activations": row["means"]}
        place.write_text(json.dumps(said))


def test_published_files_take_the_place_of_mining(
    census: tuple[Path, dict[str, Any]], language: Path, tmp_path: Path
) -> None:
    """Those of another sweep give its results; neurons without one say so, and the others are as they were."""
    publish(census[0], tmp_path / "files")
    exported = command("export", census[0], "--format", "neuron-records", "--to", tmp_path / "exported", "--json")
    tables = tmp_path / "exported" / "related-tokens" / "activation-based"
    assert printed_json(exported)["n_token_tables"] == N_LAYERS * N_NEURONS == len(list(tables.glob("*/*.json")))
    for path in tables.glob("*/*.json"):
        by_hand = json.loads((tmp_path / "files" / path.relative_to(tables)).read_text())
        assert json.loads(path.read_text()) == {"dataclass_name": "TokenLookupTableSummaryOfNeuron"} | by_hand
    config = raw(language)
    config["science"]["core"]["published"] = str(tables)
    planned = printed_json(command("plan", write_config(tmp_path / "c.yaml", config), "--json"))
    assert planned["feasible"]
    assert "mine" not in planned["units"]
    assert "scoring actor in core" in planned["memory_gb"]
    result = command("run", tmp_path / "c.yaml", "--out", tmp_path / "whole")
    assert result.exit_code == 0, result.output
    here, there = digests(tmp_path / "whole"), digests(census[0])
    assert set(there) - set(here) == {"token_stats"}
    assert {t for t in here if here[t] != there[t]} == {"core_tokens"}, "n_tied_at_cut is not published"

    config["science"]["core"]["published"] = str(tmp_path / "files")
    (tmp_path / "files" / "2" / "5.json").unlink()
    (tmp_path / "files" / "2" / "6.json").write_text("{")
    strange = {"tokens": ["not a word"], "average_activations": [1.0]}
    (tmp_path / "files" / "2" / "7.json").write_text(json.dumps(strange))
    for path in (tmp_path / "files" / "0").glob("*.json"):
        path.unlink()
    config["science"].pop("clamp")
    result = command("run", write_config(tmp_path / "c.yaml", config), "--out", tmp_path / "holes")
    assert result.exit_code == 0, result.output
    data = polyray.open(tmp_path / "holes")
    rows = {(r["layer"], r["neuron"]): r for r in data["proximity"].to_table().to_pylist()}
    assert len(rows) == N_LAYERS * N_NEURONS
    assert {rows["h.0", n]["reason"] for n in range(N_NEURONS)} == {"no published file"}
    of = {n: (rows["h.2", n]["status"], rows["h.2", n]["reason"]) for n in (5, 6, 7)}
    assert of[5] == ("excluded", "no published file")
    assert of[6] == ("failed", "file damaged: JSONDecodeError")
    assert of[7] == ("excluded", "none of its published tokens is frequent enough in the corpus")
    assert {rows["h.1", n]["status"] for n in range(N_NEURONS)} == {"excluded"}, "their precursors have no tokens"
    failures = data["failures"].to_table().to_pylist()
    assert [(r["layer"], r["item_id"]) for r in failures if r["item"] == "neuron"] == [("h.2", 6)]
    before = polyray.open(census[0])["proximity"].to_table().to_pylist()
    same = [r for r in before if r["layer"] == "h.2" and r["neuron"] not in (5, 6, 7)]
    assert [rows["h.2", r["neuron"]] for r in same] == same
    assert command("verify", tmp_path / "holes", "--json").exit_code == 0


def test_a_choice_of_neurons_in_a_file_is_that_in_the_config(language: Path, tmp_path: Path) -> None:
    inline = raw(language)
    inline["science"]["model"]["neurons"] = {1: [3, "10-12"], 2: ["0-19"]}
    (tmp_path / "some.json").write_text('{"1": ["3-3", 10, 11, 12], "2": ["0-9", "10-19"]}')
    (tmp_path / "bad.yaml").write_text("1: 3")
    in_file = raw(language)
    in_file["science"]["model"]["neurons"] = str(tmp_path / "some.json")
    configs = [load_config(write_config(tmp_path / "c.yaml", x)) for x in (inline, in_file, raw(language))]
    resolved = [resolve(c, "unset") for c in configs if isinstance(c, TextConfig)]
    assert resolved[0].identity == resolved[1].identity != resolved[2].identity
    assert {x: n.tolist() for x, n in resolved[1].sweep.layers.swept.items()} == {
        "h.0": list(range(40)), "h.1": [3, 10, 11, 12], "h.2": list(range(20)),
    }  # fmt: skip
    in_file["science"]["model"]["neurons"] = str(tmp_path / "bad.yaml")
    bad = load_config(write_config(tmp_path / "c.yaml", in_file))
    assert isinstance(bad, TextConfig)
    with pytest.raises(ConfigError, match=r"bad.yaml.*layer 1 must be a list such as .* got 3"):
        resolve(bad, "unset")


def test_a_corpus_without_a_frequent_token_stops_with_the_numbers(
    language: Path, ray_here: None, tmp_path: Path
) -> None:
    rare = raw(language)
    rare["science"]["core"]["min_count"] = 10_000
    result = command("run", write_config(tmp_path / "rare.yaml", rare), "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "no token occurs 10,000 times" in result.output.replace("\n", " ")
