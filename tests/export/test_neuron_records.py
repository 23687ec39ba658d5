"""Neuron records: what the files say is what the tables say, and nothing else; a folder of others is left alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import Finished, command, files_of, printed_json

import polyray
from polyray import columns, files
from polyray.categorical.published import read_published
from polyray.errors import ConfigError, StageError
from polyray.export import neuron_records
from polyray.export.choice import ranges_of
from polyray.models.checkpoint import MINILM, locate
from polyray.probes.tokens import Tokenizer
from polyray.records import Receipt
from polyray.store import Store

WORDS = ["cat", "dog", "tree", "house", "river", "##ing", "the", '"', "'", "<", "\\", "語"]
HOSTILE = ['"</script>\\', "\u2028line\u2029", "\u202eright to left\u202c", "\x00\x07\n\t", "שלום «x» 😀", "NaN", ""]
N_NEURONS = 5


def made(out: Path, method: str | None, layers: dict[str, int], units: dict[str, Any], finish: bool = True) -> Path:
    """A dataset made by hand: units as lists of table, layer and columns."""
    science: dict[str, Any] = {"mine": {"band": None}} | ({} if method is None else {"method": method})
    store = Store(out)
    provenance = {"torch": "2", "device_class": "cpu", "layers": layers}
    store.create_or_resume({"seed": 0, "of": str(method)}, provenance, {"science": science})
    store.acquire()
    for key, tables in units.items():
        parts = [store.write_part(name, key, columns.table(name, rows), layer) for name, layer, rows in tables]
        store.commit(Receipt(key, parts, 1.0, "here", key.partition("/")[0]))
    if finish:
        store.finish()
    return out


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(locate(MINILM))


def categorical(out: Path, tokenizer: Tokenizer, layers: tuple[int, ...] = (0, 10), finish: bool = True) -> Path:
    ids = sorted({int(tokenizer.encode(word)[0]) if word != "##ing" else 2075 for word in WORDS})
    tokens = {"token": ids, "count": range(len(ids)), "text": [tokenizer.shown(i) for i in ids]}
    units: dict[str, Any] = {"count": [("tokens", None, tokens)]}
    for layer in layers:
        listed = [ids[n : n + 4] for n in range(N_NEURONS)]
        rows = {
            "neuron": range(N_NEURONS),
            "status": ["ok", "ok", "failed", "excluded", "ok"],
            "reason": [None, None, "NaN <b>", "no published file", None],
            "tokens": [[] if n in (2, 3) else listed[n] for n in range(N_NEURONS)],
            "means": [[] if n in (2, 3) else [layer + 4.1 / 3**i - n for i in range(4)] for n in range(N_NEURONS)],
            "n_tied_at_cut": [0] * N_NEURONS,
        }
        units[f"core/h.{layer}"] = [("core_tokens", f"h.{layer}", rows)]
    return made(out, "categorical", {"h.0": N_NEURONS, "h.10": N_NEURONS}, units, finish)


def psi_text(
    out: Path, snippets: Sequence[Sequence[str | None]] | None, status: str = "ok", finish: bool = True
) -> Path:
    """Neuron 0 was clustered in two, neuron 1 is excluded, neuron 2 was mined and waits, 3 has a cluster of its own."""
    example = [[10, 11, 12, 13], [], [20], [30, 31]]
    response = [[5.0, 4.5, 4.25, -1.5], [], [1.0], [2.0, float("nan")]]
    mined = {
        "neuron": range(4),
        "status": ["ok", "excluded", "ok", "ok"],
        "reason": [None, "0 examples, at least 20 are needed", None, None],
        "n_tied_at_cut": [1] * 4,
        "example": example,
        "response": response,
        "position": [[0] * len(e) for e in example],
    }
    kept = [(n, r, e, response[n][r]) for n in (0, 3) for r, e in enumerate(example[n])]
    size = len(kept)
    examples = {
        "neuron": [k[0] for k in kept], "rank": [k[1] for k in kept], "example": [k[2] for k in kept],
        "activation": [None if k[3] != k[3] else k[3] for k in kept], "position": [3] * size, "x0": [0] * size,
        "y0": [0] * size, "x1": [4] * size, "y1": [1] * size, "label": ["a"] * size,
        "patch_id": [k[2] * 100 for k in kept], "cluster": [0] * size,
    }  # fmt: skip
    clusters = {
        "neuron": [0, 0, 3], "cluster": [0, 1, 0], "size": [2, 2, 2], "name": ["x"] * 3, "name_score": [0.5] * 3,
        "names": [["x"]] * 3, "label": ["a"] * 3, "label_frac": [1.0] * 3,
        "prototypes": [[1200, 1000], [1300, 1100], [3000, 3100]], "thumbnails": [None] * 3,
        "snippets": [None] * 3 if snippets is None else snippets,
    }  # fmt: skip
    scores: dict[str, Any] = {
        "kind": ["real", "real", "rotation"], "neuron": [0, 3, 2], "status": ["ok"] * 3, "reason": [None] * 3,
        "n_used": [4] * 3, "n_labels": [1] * 3,
    }  # fmt: skip
    scores |= {c: [None] * 3 for c in ("S", "k", "Q", "Q_mean", "Q_std", "Q_p", "two_means", "D")}
    units = {
        "merge/h.3": [("mined", "h.3", mined)],
        "cluster/h.3": [("scores", "h.3", scores), ("clusters", "h.3", clusters), ("examples", "h.3", examples)],
    }
    return made(out, "psi_text", {"h.3": 4, "h.4": 4}, units, finish)


def exported(out: Path, to: Path, *args: object) -> dict[str, Any]:
    result = command("export", out, "--format", "neuron-records", "--to", to, "--json", *args)
    assert result.exit_code == 0, result.output
    return printed_json(result)


def refused(out: object, to: object, *args: object, form: str = "neuron-records") -> str:
    result = command("export", out, "--format", form, "--to", to, "--json", *args)
    assert result.exit_code == 2, result.output
    return str(printed_json(result)["message"])


def held(to: Path) -> dict[str, Any]:
    """Every neuron's file, parsed as strictly as JSON is."""

    def never(name: str) -> None:
        raise AssertionError(name)

    return {str(p.relative_to(to)): json.loads(p.read_bytes(), parse_constant=never) for p in to.glob("*/**/*.json")}


EMPTY: dict[str, Any] = {
    "dataclass_name": "NeuronRecord",
    "random_sample": [],
    "random_sample_by_quantile": [[], [], [], []],
    "quantile_boundaries": None,
    "mean": None,
    "variance": None,
    "skewness": None,
    "kurtosis": None,
    "most_positive_activation_records": [],
}


def neuron_id(layer: int, neuron: int) -> dict[str, Any]:
    return {"dataclass_name": "NeuronId", "layer_index": layer, "neuron_index": neuron}


def test_a_categorical_export_is_what_a_loop_over_the_tables_gives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out, to = categorical(tmp_path / "out", tokenizer), tmp_path / "to"
    before = files_of(out)
    summary = exported(out, to)
    assert files_of(out) == before
    data = polyray.open(out)
    expected: dict[str, Any] = {}
    for row in data["core_tokens"].to_table().to_pylist():
        if row["status"] == "ok":
            layer = int(row["layer"].removeprefix("h."))
            name = f"{layer}/{row['neuron']}.json"
            expected["neurons/" + name] = EMPTY | {"neuron_id": neuron_id(layer, row["neuron"])}
            expected["related-tokens/activation-based/" + name] = {
                "dataclass_name": "TokenLookupTableSummaryOfNeuron",
                "tokens": [tokenizer.text(t) for t in row["tokens"]],
                "average_activations": row["means"],
            }
    assert held(to) == expected
    assert len(expected) == 2 * 2 * 3
    assert (summary["n_records"], summary["n_token_tables"], summary["finished"]) == (6, 6, True)
    assert [x["layer"] for x in summary["layers"]] == ["h.0", "h.10"]
    assert {json.dumps(x["not_exported"]) for x in summary["layers"]} == {'{"NaN <b>": 1, "no published file": 1}'}
    assert json.loads((to / "export.json").read_text()) == {"form": "neuron-records", "complete": True} | summary
    assert all(line in (to / "README.md").read_text() for line in summary["left_out"])


def test_published_core_tokens_are_the_runs_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = categorical(tmp_path / "out", tokenizer)
    exported(out, tmp_path / "to")
    data = polyray.open(out)
    ids = torch.tensor(sorted(data["tokens"].to_table()["token"].to_pylist()))
    folder = tmp_path / "to" / "related-tokens" / "activation-based"
    for layer in (0, 10):
        read = read_published(folder, layer, range(N_NEURONS), ids, tokenizer, n_core=4)
        assert (read.missing, read.failures, read.n_unknown.sum().item()) == ([2, 3], {}, 0)
        for row in data["core_tokens"].to_table().to_pylist():
            if row["layer"] == f"h.{layer}" and row["status"] == "ok":
                assert ids[read.core_tokens.core[row["neuron"]]].tolist() == row["tokens"]
                assert read.core_tokens.mean[row["neuron"]].tolist() == row["means"]


def test_a_document_export_has_the_prototypes_that_have_a_text(tmp_path: Path) -> None:
    snippets: list[list[str | None]] = [[HOSTILE[0], HOSTILE[1]], [None, HOSTILE[2]], [HOSTILE[3], HOSTILE[4]]]
    to = tmp_path / "to"
    summary = exported(psi_text(tmp_path / "out", snippets, finish=False), to)

    def passages(*rows: tuple[str, float]) -> list[dict[str, Any]]:
        return [{"dataclass_name": "ActivationRecord", "tokens": [t], "activations": [a]} for t, a in rows]

    assert held(to) == {
        "neurons/3/0.json": EMPTY | {
            "neuron_id": neuron_id(3, 0),
            "most_positive_activation_records": passages((HOSTILE[1], 5.0), (HOSTILE[2], 4.5), (HOSTILE[0], 4.25)),
        },
        "neurons/3/3.json": EMPTY | {
            "neuron_id": neuron_id(3, 3), "most_positive_activation_records": passages((HOSTILE[3], 2.0)),
        },
    }  # fmt: skip
    first, second = summary["layers"]
    assert (first["n_records"], first["n_activation_records"], first["n_without_text"]) == (2, 4, 2)
    assert first["not_exported"] == {"0 examples, at least 20 are needed": 1, "not clustered yet": 1}
    assert (second["layer"], second["n_records"], second["not_exported"]) == ("h.4", 0, {})
    assert not summary["finished"]
    assert "not finished" in (to / "README.md").read_text()


def test_without_snippets_there_are_records_and_no_passages(tmp_path: Path) -> None:
    summary = exported(psi_text(tmp_path / "out", None), tmp_path / "to")
    assert {json.dumps(r["most_positive_activation_records"]) for r in held(tmp_path / "to").values()} == {"[]"}
    assert summary["layers"][0]["n_without_text"] == 6


def test_bands_of_neurons_give_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = psi_text(tmp_path / "out", [["a", "b"], ["c", "d"], ["e", "f"]])
    exported(out, tmp_path / "one")
    monkeypatch.setattr(neuron_records, "_BAND", 1)
    exported(out, tmp_path / "many")
    assert held(tmp_path / "one") == held(tmp_path / "many") != {}


def test_files_are_plain_ascii(tmp_path: Path) -> None:
    exported(psi_text(tmp_path / "out", [HOSTILE[:2], HOSTILE[2:4], HOSTILE[4:6]]), tmp_path / "to")
    for path in (tmp_path / "to").glob("neurons/*/*.json"):
        assert path.read_bytes().isascii()
        assert not set(path.read_bytes()) & set(range(32))


def test_a_choice_of_layers_and_neurons(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = categorical(tmp_path / "out", tokenizer)
    exported(out, tmp_path / "a", "--layer", "10", "--neurons", "1-3,0,4000000")
    assert {p for p in held(tmp_path / "a") if p.startswith("neurons")} == {"neurons/10/0.json", "neurons/10/1.json"}
    exported(out, tmp_path / "b", "--layer", "h.0", "--layer", "0", "--neurons", "4")
    assert {p for p in held(tmp_path / "b") if p.startswith("neurons")} == {"neurons/0/4.json"}
    assert "no layer 'h.1'" in refused(out, tmp_path / "c", "--layer", "h.1")
    assert "nothing to export" in refused(out, tmp_path / "c", "--neurons", "99")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("asked", ["", "a", "1-", "-1", "1,,2", "5-2", "1.5", "99999999999", "2147483648", "١"])
def test_a_range_that_is_none_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="--neurons"):
        ranges_of(asked)


def test_a_sweep_over_images_is_refused(finished: Finished, tmp_path: Path) -> None:
    message = refused(finished.out, tmp_path / "to")
    assert "sweep over images" in message
    assert "categorical and psi_text" in message
    assert "pictures" in message
    assert not (tmp_path / "to").exists()


def test_a_run_of_another_schema_none_or_an_empty_one_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    to = tmp_path / "to"
    assert "there is no folder" in refused(tmp_path / "nowhere", to)
    (tmp_path / "folder").mkdir()
    assert "holds no run" in refused(tmp_path / "folder", to)
    assert "not come so far" in refused(made(tmp_path / "empty", "categorical", {"h.0": 3}, {}, finish=False), to)
    out = categorical(tmp_path / "out", tokenizer)
    told = json.loads((out / "run.json").read_text())
    for version, advice in ((told["schema_version"] + 1, "or a later one"), (1, "run the sweep again")):
        (out / "run.json").write_text(json.dumps(told | {"schema_version": version}))
        message = refused(out, to)
        assert f"version {version}" in message
        assert advice in message
    assert "'neuron-records'" in refused(out, to, form="csv")
    assert not to.exists()


def test_examples_of_a_band_are_no_highest_activations(tmp_path: Path) -> None:
    out = psi_text(tmp_path / "out", None)
    told = json.loads((out / "run.json").read_text())
    told["config"]["science"]["mine"]["band"] = [0.5, 0.9]
    (out / "run.json").write_text(json.dumps(told))
    assert "mine.band" in refused(out, tmp_path / "to")


def test_of_a_partial_run_there_is_what_it_has(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = categorical(tmp_path / "out", tokenizer, layers=(10,), finish=False)
    summary = exported(out, tmp_path / "to")
    assert not summary["finished"]
    assert [(x["layer"], x["n_records"]) for x in summary["layers"]] == [("h.0", 0), ("h.10", 3)]
    assert "nothing to export" in refused(out, tmp_path / "other", "--layer", "h.0")
    told = command("export", out, "--format", "neuron-records", "--to", tmp_path / "to")
    assert "not finished" in told.output


def test_a_folder_of_others_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = categorical(tmp_path / "out", tokenizer)
    other = psi_text(tmp_path / "other", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "export.json").write_text("[]")
    exported(other, tmp_path / "theirs")
    before = files_of(tmp_path)
    assert "'thesis.txt'" in refused(out, tmp_path / "mine")
    assert "is a file" in refused(out, tmp_path / "file")
    assert "cannot be used" in refused(out, tmp_path / "file" / "below")
    assert "none of polyray's" in refused(out, tmp_path / "strange")
    assert "holds the neuron-records of run" in refused(out, tmp_path / "theirs")
    assert "lies in the dataset" in refused(out, out)
    assert "lies in the dataset" in refused(out, out / "export")
    (tmp_path / "link").symlink_to(out)
    assert "lies in the dataset" in refused(out, tmp_path / "link" / "export")
    (tmp_path / "link").unlink()
    assert "folder of this machine" in refused(out, "s3://bucket/x")
    assert files_of(tmp_path) == before


def stops_after(n: int, error: BaseException, replace: Callable[..., Any] = Path.replace) -> Callable[..., Any]:
    """`Path.replace` that fails once n neurons' files were put."""
    done = 0

    def failing(self: Path, target: Path) -> Any:
        nonlocal done
        if target.name.removesuffix(".json").isdigit():
            done += 1
            if done > n:
                raise error
        return replace(self, target)

    return failing


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 3), (KeyboardInterrupt(), 130)], ids=["full", "ctrl-c"]
)
def test_one_that_is_cut_short_leaves_whole_files_and_goes_on(
    error: BaseException, code: int, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, to = categorical(tmp_path / "out", tokenizer), tmp_path / "to"
    exported(out, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stops_after(5, error))
        result = command("export", out, "--format", "neuron-records", "--to", to, "--json")
    assert result.exit_code == code, result.output
    whole = held(tmp_path / "whole")
    assert held(to) == {name: whole[name] for name in held(to)}
    assert len(held(to)) == 5
    assert not [p for p in to.rglob(".*")]
    assert json.loads((to / "export.json").read_text())["complete"] is False
    left = to / "neurons" / "0" / f".{'a' * 32}.tmp"
    left.write_text('{"half')  # what a kill leaves
    assert files.is_temporary(left.name)
    exported(out, to)
    assert held(to) == whole
    assert not left.exists()
    assert json.loads((to / "export.json").read_text())["complete"] is True


def test_a_part_that_is_damaged_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = categorical(tmp_path / "out", tokenizer)
    part = next((out / "core_tokens" / "layer=h.10").glob("*.parquet"))
    data = part.read_bytes()
    part.write_bytes(b"x" * len(data))
    assert "polyray verify" in refused(out, tmp_path / "to")
    part.write_bytes(data[:4] + b"\xff" * 40 + data[44:])  # the first page; what the file says of itself is whole
    with pytest.raises(StageError, match="polyray verify"):
        neuron_records.export(out, str(tmp_path / "to"))
    assert len(held(tmp_path / "to")) == 6, "the layer before is there"


def test_progress_counts_neurons(tmp_path: Path, tokenizer: Tokenizer) -> None:
    steps: list[neuron_records.Step] = []
    neuron_records.export(categorical(tmp_path / "out", tokenizer), str(tmp_path / "to"), show=steps.append)
    assert [(s.n_done, s.n_total) for s in steps] == [(5, 10), (10, 10)]
