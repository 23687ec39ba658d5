"""PSI over documents by command: whole, the same for other actors and orders, clear about what cannot be swept."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from corpora import WORDS, with_words, write_corpus
from languages import INNER
from matplotlib.figure import Figure
from sweeps import HALF_CPU, by_hand, command, digests, printed_json
from viewing import viewing

import polyray
from polyray.cluster import psi_text_resolve
from polyray.config import load_config
from polyray.psi.snippets import from_patch_ids
from polyray.psi_text_config import PsiTextConfig
from polyray.report import figure

N_DOCUMENTS = 48
EMPTY, REPEAT, ODD = 5, 9, 11
SPAN = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2, a random BERT to encode with, prompts, and documents of which three are not as others."""
    folder = tmp_path_factory.mktemp("documents")
    with_words("gpt2", folder)
    with_words("bert", folder)
    rng = np.random.default_rng(4)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(8, 60)))) for _ in range(N_DOCUMENTS)]
    texts[EMPTY] = " "
    texts[REPEAT] = texts[8].replace(" ", "  ")
    texts[ODD] = "w3 $\\frac{w1}$ \x07 «w2» w4\n\nw5 \u202e 語"
    write_corpus(folder / "corpus.jsonl", texts, [f"l{i % 4}" for i in range(N_DOCUMENTS)])
    (folder / "prompts.txt").write_text("\n".join(f"{a} {b}" for a, b in zip(WORDS, WORDS[7:], strict=False)))
    return folder


def raw(folder: Path, **science: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "method": "psi_text",
        "subject": {"path": str(folder / "gpt2"), "layers": [1, 3], "micro_batch": 4},
        "probe": {"path": str(folder / "corpus.jsonl")},
        "encoder": {"kind": "sentence", "path": str(folder / "bert"), "max_tokens": 24, "micro_batch": 32},
        "vocabulary": str(folder / "prompts.txt"),
        "mine": {"K": 24, "K_keep": 30, "k_min": 20},
        "extract": {"span": SPAN},
        "embed": {"n_pool": 40},
        "cluster": {"k_range": [2, 3], "n_init": 2},
        "calibrate": {"B": 40, "n_bootstrap": 20},
    }
    for section, values in science.items():
        found[section] = found.get(section, {}) | values if isinstance(values, dict) else values
    return {
        "science": found,
        "execution": {kind: HALF_CPU | {"max": 1} for kind in ("subject", "encoder", "scoring")},
    }


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def swept(folder: Path, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The sweep with one actor of each kind, and what the command printed."""
    out = tmp_path_factory.mktemp("psi_text") / "out"
    result = command("run", written(out.parent / "c.yaml", raw(folder)), "--out", out, "--json")
    assert result.exit_code == 0, result.output
    return out, printed_json(result)


def test_every_neuron_has_a_row_and_every_snippet_its_text(swept: tuple[Path, dict[str, Any]], folder: Path) -> None:
    out, printed = swept
    data = polyray.open(out)
    neurons = data["neurons"].to_table().to_pylist()
    assert {(r["layer"], r["neuron"]) for r in neurons} == {(x, i) for x in ("h.1", "h.3") for i in range(INNER)}
    assert len(neurons) == 2 * INNER
    assert {r["status"] for r in neurons} == {"ok"}
    assert [r["layer"] for r in printed["layers"]] == ["h.1", "h.3", None]
    rows = data["images"].to_table().sort_by("example").to_pylist()
    assert [r["example"] for r in rows if r["status"] == "failed"] == [EMPTY]
    assert rows[REPEAT]["pixel_hash"] == rows[8]["pixel_hash"]
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    examples = data["examples"].to_table().to_pylist()
    assert not {EMPTY, REPEAT} & {r["example"] for r in examples}
    position = {}
    for r in examples:
        assert r["x1"] == r["position"] + 1, "a causal model has seen nothing behind its peak"
        assert r["x0"] == max(0, r["x1"] - SPAN)
        assert (r["y0"], r["y1"]) == (0, 1)
        assert r["label"] == f"l{r['example'] % 4}"
        position[r["layer"], r["neuron"], r["patch_id"]] = r["position"]
    for r in data["clusters"].to_table().to_pylist():
        assert r["thumbnails"] is None
        documents, boxes = from_patch_ids(np.array(r["prototypes"]))
        for snippet, document, (x0, _, x1, _) in zip(r["snippets"], documents.tolist(), boxes.tolist(), strict=True):
            words = texts[document].split()[x0:x1]
            assert snippet.replace("«", "").replace("»", "").split() == [w.strip("«»") for w in words]
            assert snippet.endswith(f"«{words[-1]}»"), "the peak is the last token"
    layers = data["layers"].to_table().to_pylist()
    assert {(r["grid_h"], r["grid_w"], r["layout"], r["window"], r["side_px"]) for r in layers} == {
        (1, None, "tokens", "before", SPAN)
    }
    embeddings = data["embeddings"].to_table()
    assert embeddings["text"].null_count == len(embeddings), "one space"
    assert embeddings["geometry"].null_count == 0


def test_its_export_has_every_prototype_with_the_activation_at_its_peak(
    swept: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result = command("export", swept[0], "--format", "neuron-records", "--to", tmp_path / "to", "--json")
    assert result.exit_code == 0, result.output
    assert printed_json(result)["n_records"] == 2 * INNER == len(list((tmp_path / "to").glob("neurons/*/*.json")))
    data = polyray.open(swept[0])
    examples = data["examples"].to_table().to_pylist()
    activation = {(r["layer"], r["neuron"], r["patch_id"]): r["activation"] for r in examples}
    expected: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for r in data["clusters"].to_table().to_pylist():
        for patch, snippet in zip(r["prototypes"], r["snippets"], strict=True):
            found = activation[r["layer"], r["neuron"], patch]
            expected.setdefault((r["layer"], r["neuron"]), []).append((found, snippet))
    for (layer, neuron), passages in expected.items():
        path = tmp_path / "to" / "neurons" / layer.removeprefix("h.") / f"{neuron}.json"
        records = json.loads(path.read_text())["most_positive_activation_records"]
        listed = [(r["activations"][0], r["tokens"][0]) for r in records]
        assert sorted(listed) == sorted(passages)
        assert [a for a, _ in listed] == sorted((a for a, _ in listed), reverse=True)


def test_report_and_viewer_show_documents_and_snippets(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = swept
    assert command("report", out, "--out", tmp_path / "r.html").exit_code == 0
    page = " ".join(re.sub(r"<[^>]*>", "", (tmp_path / "r.html").read_text()).split())
    assert "A census of gpt2 " in page
    assert f"{2 * INNER} neurons, {2 * INNER} of them scored, in 2 layers" in page
    assert f"{N_DOCUMENTS} documents" in page
    assert "images" not in page.split("Is it causal?")[0].lower().replace("tiny-imagenet", "")
    row = polyray.open(out)["clusters"].to_table().to_pylist()[0]
    with viewing(out) as viewer:
        shown = viewer.page(f"/neuron?layer={row['layer']}&neuron={row['neuron']}")
    text = html.unescape(re.sub(r"<[^>]*>", "", shown))
    assert "documents, best first" in text
    assert all(re.findall("«(.*)»$", snippet)[-1] in text for snippet in row["snippets"])


def test_status_verify_plan_and_sensitivity_know_the_sweep(swept: tuple[Path, dict[str, Any]], folder: Path) -> None:
    out, _ = swept
    status = printed_json(command("status", out, "--json"))
    assert status["finished"]
    units = {s["stage"]: s["n_done"] for s in status["stages"]}
    assert units["index"] == 1
    assert units["window"] == units["merge"] == units["calibrate"] == 2
    assert not {"swap", "effects", "plant"} & units.keys()
    verified = command("verify", out, "--json")
    assert verified.exit_code == 0, verified.output
    planned = printed_json(command("plan", out.parent / "c.yaml", "--json"))
    assert planned["feasible"], planned["problems"]
    assert planned["n_neurons"] == 2 * INNER
    assert planned["n_images"] == N_DOCUMENTS
    assert {s: planned["units"][s] for s in units if s not in ("embed", "draw")} == {
        s: n for s, n in units.items() if s not in ("embed", "draw")
    }
    shown = command("plan", out.parent / "c.yaml")
    assert f"{2 * INNER} neurons, {N_DOCUMENTS} documents" in shown.output
    varied = command("sensitivity", out, "--vary", "K=20")
    assert varied.exit_code == 2
    assert "psi_text" in varied.output


def test_other_actors_and_orders_give_the_same_digests(
    swept: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    several = raw(folder)
    several["execution"] = {kind: HALF_CPU | {"min": 2, "max": 2} for kind in ("subject", "encoder", "scoring")}
    several["execution"] |= {"bundle_s": 0.001, "scoring_vectors_gb": 1e-6}
    result = command("run", written(tmp_path / "several.yaml", several), "--out", tmp_path / "several")
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "several") == digests(swept[0])
    config = load_config(swept[0].parent / "c.yaml")
    assert isinstance(config, PsiTextConfig)
    resolved = psi_text_resolve.resolve(config, str(tmp_path / "hand"))
    by_hand(resolved, tmp_path / "hand")
    assert digests(tmp_path / "hand") == digests(swept[0])


def test_a_selection_of_neurons_is_swept_alone(
    swept: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    chosen = raw(folder, subject={"neurons": {"h.1": [3, 17], "h.3": []}}, extract={"snippets": False})
    result = command("run", written(tmp_path / "chosen.yaml", chosen), "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    data, whole = polyray.open(tmp_path / "out"), polyray.open(swept[0])
    mined = {(r["layer"], r["neuron"]): r for r in data["mined"].to_table().to_pylist()}
    assert set(mined) == {("h.1", 3), ("h.1", 17)}
    for r in whole["mined"].to_table().to_pylist():
        assert mined.get((r["layer"], r["neuron"]), r) == r
    assert {r["snippets"] for r in data["clusters"].to_table(columns=["snippets"]).to_pylist()} == {None}
    with_text = printed_json(command("status", tmp_path / "out", "--json"))
    assert with_text["finished"]


def test_documents_that_are_all_alike_end_with_reasons(folder: Path, ray_here: None, tmp_path: Path) -> None:
    alike = raw(folder, probe={"path": str(write_corpus(tmp_path / "a.jsonl", ["w1 w2 w3"] * 30, ["x", "y"] * 15))})
    result = command("run", written(tmp_path / "alike.yaml", alike), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = polyray.open(tmp_path / "out")["neurons"].to_table().to_pylist()
    assert len(rows) == 2 * INNER
    assert {(r["status"], r["reason"]) for r in rows} == {("excluded", "constant")}


def test_without_labels_nothing_is_significant_and_the_run_says_so(
    folder: Path, ray_here: None, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    corpus = write_corpus(tmp_path / "bare.jsonl", texts)
    bare = raw(folder, probe={"path": str(corpus)}, subject={"neurons": {"h.1": [], "h.3": [0, 1, 2]}})
    result = command("run", written(tmp_path / "bare.yaml", bare), "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert any("have no labels" in note for note in printed_json(result)["notes"])
    for r in polyray.open(tmp_path / "out")["neurons"].to_table().to_pylist():
        assert (r["status"], r["Q"], r["specific_Q_z"], r["specific_Q_p"]) == ("ok", 0.0, 0.0, 1.0)
        assert r["specific_p"] == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mine": {"K": 49, "K_keep": 49}, "embed": {"n_pool": 49}}, "mine.K is 49, but corpus"),
        ({"subject": {"layers": [1, 4]}}, "has layers 0 to 3, got [4]"),
        ({"subject": {"path": "/nowhere"}}, "/nowhere"),
        ({"subject": {"context": 25}}, "more than the model's 24 tokens"),
        ({"subject": {"neurons": {"h.1": [INNER]}}}, "has neurons 0 to 19, got 20"),
        ({"subject": {"neurons": {"h.2": [1]}}}, "'h.2' is not among the layers swept"),
        ({"subject": {"neurons": {"h.1": [], "h.3": []}}}, "leaves no neuron"),
        ({"extract": {"span": 12}}, "more than half of the 23 tokens"),
        ({"probe": {"path": "/nowhere.jsonl"}}, "does not exist"),
        ({"probe": {"label_column": "genre"}}, "genre"),
        ({"encoder": {"max_tokens": 25}}, "more than the 24 tokens"),
        ({"encoder": {"kind": "open_clip"}}, "sentence"),
        ({"swap": {"n_hosts": 4}}, "swap is for images alone"),
        ({"plant": {}}, "plant is for images alone"),
        ({"vocabulary": "/nowhere.txt"}, "cannot be read"),
        ({"subject": {"input_px": 64}}, "unknown key"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    result = command("run", written(tmp_path / "bad.yaml", raw(folder, **change)), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert said in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_causal_is_refused(folder: Path, tmp_path: Path) -> None:
    bad = raw(folder, encoder={"path": str(folder / "gpt2")})
    result = command("run", written(tmp_path / "bad.yaml", bad), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "give a BERT" in result.output


def test_the_same_network_as_subject_and_encoder_is_said_to_be_circular(folder: Path, tmp_path: Path) -> None:
    circular = raw(folder, subject={"path": str(folder / "bert")})
    config = load_config(written(tmp_path / "c.yaml", circular))
    assert isinstance(config, PsiTextConfig)
    resolved = psi_text_resolve.resolve(config, "unset")
    assert any(note.startswith("circular") for note in resolved.notes)
    config = load_config(written(tmp_path / "c.yaml", raw(folder)))
    assert isinstance(config, PsiTextConfig)
    other = psi_text_resolve.resolve(config, "unset")
    assert not any(note.startswith("circular") for note in other.notes)


@pytest.mark.filterwarnings("error")
def test_strange_text_is_drawn(tmp_path: Path) -> None:
    strange = "w3 $\\frac{1}$ \x07 a\u202eb\n\n語 " + "long " * 500 + "$x^«{$»" + " after" * 90
    shown = figure.shown_text(strange)
    assert len(shown) < 3 * figure.N_BEFORE
    assert shown.isprintable()
    assert "$x^«{$»" in shown
    assert "語" not in figure.shown_text("語 «語»")
    assert figure.shown_text("«" * 3 + "a" * 1000).startswith("«")
    canvas = Figure()
    axes = canvas.subplots()
    axes.text(0, 1, "\n".join([shown, figure.shown_text("語 $ \x00")]), parse_math=False)
    canvas.savefig(tmp_path / "text.png")
