"""The categorical census under input that is no good: a row that says why, or a refusal, and nothing else is lost."""

import itertools
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps import HALF_CPU, command, write_config
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from polyray.cluster import chain, service
from polyray.cluster.chain import STAGE
from polyray.cluster.plan import Work
from polyray.cluster.shard import ShardWorker
from polyray.cluster.text_plan import text_works
from polyray.cluster.text_resolve import TextResolved, resolve
from polyray.cluster.text_rows import REFUSED, n_batches
from polyray.cluster.text_score import NO_LAYER_BEFORE, NO_PRECURSOR, TextScorer
from polyray.config import load_config
from polyray.errors import ModelError, StageError
from polyray.kernels.random import layer_word, tie_hash
from polyray.models.families import FAMILIES
from polyray.probes import text
from polyray.records import Failed, Receipt
from polyray.store import Store
from polyray.text_config import TextConfig

pytestmark = pytest.mark.usefixtures("one_thread")

N_LAYERS, N_NEURONS, WIDTH, CONTEXT, N_CORE = 3, 40, 12, 16, 24
EOT = 256
LETTERS = "abcdefghijklmnopqrstuvwxyz     éñ漢\n"
"""Of one, two and three bytes: the last ones are tokens that are no letters."""

Weights = dict[str, torch.Tensor]


def documents(n: int = 80) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list(LETTERS), int(rng.integers(3, 60)))) + "x" for _ in range(n)]


def write_corpus(folder: Path, lines: list[bytes]) -> None:
    (folder / "corpus.jsonl").write_bytes(b"\n".join(lines))


def line(document: str) -> bytes:
    return json.dumps({"text": document}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random GPT-2 whose tokens are bytes, and a corpus."""
    home = tmp_path / "language"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(home)
    shape = GPT2Config(
        vocab_size=EOT + 1, n_embd=WIDTH, n_inner=N_NEURONS, n_layer=N_LAYERS, n_head=3, n_positions=CONTEXT,
        bos_token_id=EOT, eos_token_id=EOT,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(shape)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.4)
    model.save_pretrained(home)
    write_corpus(home, [line(d) for d in documents()])
    return home


def change(folder: Path, how: Callable[[Weights], None]) -> None:
    """Writes the weights anew."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    how(weights)
    save_file(weights, path, metadata={"format": "pt"})


def raw(folder: Path, **sections: Any) -> dict[str, Any]:
    science: dict[str, Any] = {
        "method": "categorical",
        "model": {"path": str(folder), "micro_batch": 8},
        "corpus": {"path": str(folder / "corpus.jsonl")},
        "core": {"n_core": N_CORE, "min_count": 3},
        "connect": {"n_precursors": 6},
        "overlap": {"min_tokens": 6, "min_clusters": 3},
        "proximity": {"n_permutations": 30, "n_draws": 2, "n_bootstrap": 30},
    }
    for name, values in sections.items():
        science[name] = science.get(name, {}) | values if isinstance(values, dict) else values
    return {"science": science, "execution": {"shard": HALF_CPU | {"max": 1}, "scoring": HALF_CPU | {"max": 1}}}


def resolved_of(folder: Path, out: Path, **sections: Any) -> TextResolved:
    config = load_config(write_config(folder / "config.yaml", raw(folder, **sections)))
    assert isinstance(config, TextConfig)
    return resolve(config, str(out))


def refused(folder: Path, tmp_path: Path, **sections: Any) -> str:
    """What `polyray run` says when it does not even start."""
    result = command("run", write_config(folder / "config.yaml", raw(folder, **sections)), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()
    return result.output.replace("\n", " ")


class ByHand:
    """A census in this process, unit by unit."""

    def __init__(self, resolved: TextResolved) -> None:
        self.sweep = resolved.sweep
        self.store = Store(self.sweep.out)
        config = self.sweep.config.model_dump(mode="json")
        self.store.create_or_resume(resolved.identity, resolved.provenance, config)
        self.store.acquire()
        self.scorer = TextScorer(self.sweep)

    def stage(self, stage: str) -> list[Receipt | Failed]:
        done = [] if stage == STAGE else self.scorer.run(text_works(stage, self.sweep.shape))
        for result in done:
            if isinstance(result, Receipt):
                self.store.commit(result)
        if stage == STAGE:
            self._mine()
        return done

    def _mine(self) -> None:
        layers = list(self.sweep.shape.n_neurons)
        worker = ShardWorker(self.sweep, range(N_LAYERS), layers, None)
        for batch in range(n_batches(self.store, self.sweep.science)):
            assert worker.step(batch, None) is None
        parts = worker.save(STAGE)
        for layer in layers:
            own = [p for p in parts if p.layer == layer]
            self.store.commit(Receipt(Work(STAGE, layer).key, own, 0.0, "", STAGE))

    def until(self, last: str = "summarise") -> "ByHand":
        for stage in self.sweep.steps:
            for result in self.stage(stage):
                assert isinstance(result, Receipt), result
            if stage == last:
                break
        else:
            raise AssertionError(f"no stage {last!r}")
        if last == "summarise":
            service.check_counts(self.store, self.sweep)
            self.store.finish()
        return self

    def rows(self, table: str, layer: str | None = None) -> list[dict[str, Any]]:
        return self.store.read(table, layer).to_pylist()


def swept(folder: Path, out: Path, **sections: Any) -> ByHand:
    return ByHand(resolved_of(folder, out, **sections)).until()


def same(a: ByHand, b: ByHand, table: str, but: set[tuple[str, int]] = frozenset()) -> None:
    """Two censuses agree on every neuron but some."""
    for layer in a.sweep.shape.n_neurons:
        pairs = list(zip(*(sorted(x.rows(table, layer), key=lambda r: r["neuron"]) for x in (a, b)), strict=True))
        assert len(pairs) == N_NEURONS
        for left, right in pairs:
            assert left == right or (layer, left["neuron"]) in but


# --- Documents ------------------------------------------------------------------------------------------------------


def test_bad_documents_cost_themselves_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number is that of the corpus without them."""
    monkeypatch.setattr(text, "MAX_BYTES", 2000)
    good = [line(d) for d in documents()]
    clean = swept(folder, tmp_path / "clean")
    bad = [
        (0, b'{"text": ""}', "empty"),
        (5, b'{"text": " \\n\\t "}', "empty"),
        (6, b'{"text": "caf\xe9"}', "no valid UTF-8"),
        (7, b'{"text": "\\udc80"}', "no valid UTF-8"),
        (40, line("y" * 2001), text._TOO_LARGE.reason),
        (41, line("y" * 9000), text._TOO_LARGE.reason),
        (50, b"{not json", "no valid JSON"),
        (len(good) + 7, b'{"title": "no text"}', "no text"),
        (len(good) + 8, b'{"text": 12345}', "no text"),
    ]
    for at, document, _ in bad:
        good.insert(at, document)
    write_corpus(folder, good)
    mixed = swept(folder, tmp_path / "mixed")
    rows = mixed.rows("documents")
    assert [(r["document"], r["reason"]) for r in rows if r["status"] == "failed"] == [(a, why) for a, _, why in bad]
    assert all(r["n_tokens"] is None for r in rows if r["status"] == "failed")
    failures = [(r["stage"], r["item"], r["item_id"], r["reason"]) for r in mixed.rows("failures")]
    assert failures == [("tokenise", "document", a, why) for a, _, why in bad]
    same(clean, mixed, "core_tokens")
    same(clean, mixed, "proximity")
    assert mixed.rows("categorical") == clean.rows("categorical")


def test_documents_of_one_token_are_documents(folder: Path, tmp_path: Path) -> None:
    """Half of the corpus; and nothing but such documents is a corpus as well."""
    write_corpus(folder, [x for d in documents() for x in (line(d), line("q"))])
    census = swept(folder, tmp_path / "out")
    rows = census.rows("documents")
    assert {r["status"] for r in rows} == {"ok"}
    assert [r["n_tokens"] for r in rows][1::2] == [1] * (len(rows) // 2)
    count = {r["text"]: r["count"] for r in census.rows("tokens")}
    assert count["q"] == sum(d.count("q") for d in documents()) + len(rows) // 2

    write_corpus(folder, [line(letter) for letter in "abcdefghij" for _ in range(9)])
    alone = swept(folder, tmp_path / "alone")
    assert {r["n_tokens"] for r in alone.rows("documents")} == {1}
    few = "fewer than 20 core-tokens"
    said = {(r["layer"], r["status"], r["reason"]) for r in alone.rows("proximity")}
    assert said == {(f"h.{i}", "excluded", few if i else NO_LAYER_BEFORE) for i in range(N_LAYERS)}


def test_contexts_never_mix_documents_without_a_separator(folder: Path, tmp_path: Path) -> None:
    """Told from the rows that go through the model, a text that looks like the separator included."""
    texts = [*documents(), "ab<|end|>cd"]
    write_corpus(folder, [line(d) for d in texts])
    census = ByHand(resolved_of(folder, tmp_path / "out")).until("tokenise")
    rows = sorted(census.rows("contexts"), key=lambda r: r["context"])
    assert [len(r["tokens"]) for r in rows[:-1]] == [CONTEXT] * (len(rows) - 1)
    assert 0 < len(rows[-1]["tokens"]) <= CONTEXT
    tokens = [t for r in rows for t in r["tokens"]]
    owners = [d for r in rows for d in r["documents"]]
    between = [i for i, d in enumerate(owners) if d is None]
    assert [tokens[i] for i in between] == [EOT] * (len(texts) - 1)
    assert tokens.count(EOT) == len(between)
    assert all(a == b for a, b in itertools.pairwise(owners) if a is not None and b is not None)
    letters = {i: bytes([b]) for b, i in byte_ids(census).items()}
    for document, want in enumerate(texts):
        assert b"".join(letters[t] for t, d in zip(tokens, owners, strict=True) if d == document) == want.encode()


def byte_ids(census: ByHand) -> dict[int, int]:
    """Token of each byte, by the letters that are such tokens' names."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {b: chr(b) for b in printable}
    names |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in names)}
    return {b: sorted(names.values()).index(name) for b, name in names.items()}


def test_tokens_that_are_no_text_are_shown_escaped(folder: Path, tmp_path: Path) -> None:
    census = ByHand(resolved_of(folder, tmp_path / "out")).until("count")
    shown = {r["token"]: r["text"] for r in census.rows("tokens")}
    ids = byte_ids(census)
    for byte in "é漢".encode():
        assert shown[ids[byte]] == f"\\x{byte:02x}"
    assert shown[ids[10]] == r"\n"
    assert shown[ids[32]] == " "
    assert shown[ids[97]] == "a"
    assert all(unicodedata.category(c)[0] not in "C" for t in shown.values() for c in t)
    assert len(set(shown.values())) == len(shown)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([b'{"text": ""}'] * 9, "no token occurs 3 times or more: the corpus has 0 tokens"),
        ([line("abc"), line("abd")], "no token occurs 3 times or more: the corpus has 6 tokens, the most frequent one "
         "occurs 2 times. Lower min_count or add text."),
    ],
)  # fmt: skip
def test_a_corpus_without_a_frequent_token_is_refused_with_the_numbers(
    folder: Path, tmp_path: Path, lines: list[bytes], said: str
) -> None:
    write_corpus(folder, lines)
    census = ByHand(resolved_of(folder, tmp_path / "out")).until("tokenise")
    assert len(census.rows("documents")) == len(lines)
    (result,) = census.stage("count")
    assert isinstance(result, Failed)
    assert said in result.reason
    assert not result.fatal


# --- Neurons --------------------------------------------------------------------------------------------------------

LONELY, HUGE = 7, 11


def test_a_neuron_that_nothing_drives_is_excluded_with_that_reason(folder: Path, tmp_path: Path) -> None:
    healthy = swept(folder, tmp_path / "healthy")

    def unplug(weights: Weights) -> None:
        weights["transformer.h.2.mlp.c_fc.weight"][:, LONELY] = 0.0

    change(folder, unplug)
    census = swept(folder, tmp_path / "lonely")
    assert not [r for r in census.rows("connections", "h.2") if r["neuron"] == LONELY]
    row = next(r for r in census.rows("proximity", "h.2") if r["neuron"] == LONELY)
    assert (row["status"], row["reason"], row["n_clusters"]) == ("excluded", NO_PRECURSOR, 0)
    assert row["difference"] is row["tau"] is row["first"] is row["rank"] is None
    same(healthy, census, "proximity", but={("h.2", LONELY)})


def test_a_layer_that_nothing_drives_is_excluded_and_the_sweep_ends(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda weights: weights["transformer.h.1.mlp.c_fc.weight"].zero_())
    census = swept(folder, tmp_path / "out", clamp={"n_neurons": 3, "n_contexts": 4})
    rows = census.rows("proximity", "h.1")
    assert [(r["status"], r["reason"]) for r in rows] == [("excluded", NO_PRECURSOR)] * N_NEURONS
    actual = {r["layer"]: r for r in census.rows("categorical") if r["condition"] == "actual"}
    assert actual["h.1"]["n"] == 0
    assert actual["h.1"]["positive"] is None
    assert actual[None]["n"] == actual["h.2"]["n"]
    assert {r["layer"] for r in census.rows("clamps")} == {"h.1"}, "neurons of the first layer feed none"


def test_ties_at_the_last_core_token_go_by_hash_and_are_counted(folder: Path, tmp_path: Path) -> None:
    """A neuron without input says the same to every token, so all are tied; the order of documents has no say."""

    def constant(weights: Weights) -> None:
        weights["transformer.h.1.mlp.c_fc.weight"][:, LONELY] = 0.0
        weights["transformer.h.1.mlp.c_fc.bias"][LONELY] = 1.25

    change(folder, constant)
    found = []
    for name, texts in (("forth", documents()), ("back", documents()[::-1])):
        write_corpus(folder, [line(d) for d in texts])
        census = ByHand(resolved_of(folder, tmp_path / name)).until("core")
        tokens = sorted(r["token"] for r in census.rows("tokens"))
        row = next(r for r in census.rows("core_tokens", "h.1") if r["neuron"] == LONELY)
        hashes = tie_hash(0, layer_word("h.1"), torch.tensor(LONELY), torch.tensor(tokens)).tolist()
        assert row["tokens"] == [t for _, t in sorted(zip(hashes, tokens, strict=True))][:N_CORE]
        assert row["n_tied_at_cut"] == len(tokens) - N_CORE > 0
        assert row["tokens"] != tokens[:N_CORE]
        assert len(set(row["means"])) == 1
        found.append(row)
    assert found[0] == found[1]


def test_a_neuron_that_cannot_be_added_up_costs_itself(folder: Path, tmp_path: Path) -> None:
    def cut_off(weights: Weights) -> None:
        weights["transformer.h.1.mlp.c_proj.weight"][HUGE] = 0.0

    def blow_up(weights: Weights) -> None:
        weights["transformer.h.1.mlp.c_fc.bias"][HUGE] = 1e15

    change(folder, cut_off)
    healthy = swept(folder, tmp_path / "healthy")
    change(folder, blow_up)
    census = swept(folder, tmp_path / "huge")
    row = next(r for r in census.rows("core_tokens", "h.1") if r["neuron"] == HUGE)
    assert (row["status"], row["reason"], row["tokens"], row["n_tied_at_cut"]) == ("failed", REFUSED, [], None)
    row = next(r for r in census.rows("proximity", "h.1") if r["neuron"] == HUGE)
    assert (row["status"], row["reason"], row["difference"]) == ("failed", REFUSED, None)
    failures = census.rows("failures")
    assert [(r["stage"], r["layer"], r["item"], r["item_id"], r["reason"]) for r in failures] == [
        ("core", "h.1", "neuron", HUGE, REFUSED)
    ]
    same(healthy, census, "proximity", but={("h.1", HUGE)})


# --- Half precision -------------------------------------------------------------------------------------------------


def overflow(weights: Weights) -> None:
    """Beyond float16, and no matter to bfloat16."""
    weights["transformer.h.1.mlp.c_fc.bias"][HUGE] = 3e5


HALF = "hidden states of blocks 0 to 2 are not finite in float16. Use float32, or bfloat16 for its range."


def test_numbers_beyond_float16_stop_mining_with_the_way_out(folder: Path, ray_here: None, tmp_path: Path) -> None:
    change(folder, overflow)
    config = write_config(folder / "half.yaml", raw(folder, model={"dtype": "float16"}))
    result = command("run", config, "--out", tmp_path / "out")
    assert result.exit_code == 3, result.output
    said = result.output.replace("\n", " ")
    assert HALF in said
    assert "a shard was lost" not in said, "what a shard raises it would raise again"
    store = Store(tmp_path / "out")
    assert {r["status"] for r in store.read("documents").to_pylist()} == {"ok"}
    assert store.committed(STAGE) == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_way_out_of_float16_is_one(folder: Path, tmp_path: Path, dtype: str) -> None:
    change(folder, overflow)
    census = swept(folder, tmp_path / "out", model={"dtype": dtype})
    assert {r["status"] for r in census.rows("core_tokens")} == {"ok"}


def test_a_clamp_beyond_float16_costs_its_neuron_a_row(folder: Path, tmp_path: Path) -> None:
    """Mining reaches the clamped layer and the next; what comes after it overflows, clamped or not."""

    def last(weights: Weights) -> None:
        weights["transformer.h.2.mlp.c_fc.bias"][HUGE] = 3e5

    change(folder, last)
    model, clamp = {"dtype": "float16", "layers": [0, 1]}, {"n_neurons": 3, "n_contexts": 4}
    census = swept(folder, tmp_path / "out", model=model, clamp=clamp)
    rows = census.rows("clamps", "h.0")
    assert [(r["status"], r["reason"]) for r in rows] == [("failed", HALF)] * 3
    assert sorted(r["item_id"] for r in census.rows("failures")) == sorted(r["neuron"] for r in rows)
    assert {r["stage"] for r in census.rows("failures")} == {"clamp"}


def test_clamps_without_a_frequent_token_in_their_contexts_are_rows(folder: Path, tmp_path: Path) -> None:
    """One context is drawn; of 18 there are 14 of rare tokens alone, and with this seed it is one of them twice."""
    rare = "".join(chr(c) for c in range(0x20, 0x80) if not chr(c).islower()) + "".join(map(chr, range(1, 0x20)))
    texts = [rare[i : i + CONTEXT - 1] for i in range(0, 7 * (CONTEXT - 1), CONTEXT - 1)] * 2
    frequent = "abcdefghijklmnopqrst" * 3
    texts += [frequent[i : i + CONTEXT - 1] for i in range(0, len(frequent), CONTEXT - 1)]
    write_corpus(folder, [line(t) for t in texts])
    sections = {"clamp": {"n_neurons": 3, "n_contexts": 1}, "core": {"n_core": 20}, "seed": 0}
    census = swept(folder, tmp_path / "out", **sections)
    assert len(census.rows("tokens")) == 20
    rows = census.rows("clamps")
    assert [r["layer"] for r in rows] == ["h.0"] * 3 + ["h.1"] * 3
    why = "none of the contexts to clamp in has a token with statistics."
    assert {(r["status"], r["reason"], r["kl"]) for r in rows} == {("excluded", why, None)}
    assert census.rows("failures") == []


# --- Models ---------------------------------------------------------------------------------------------------------


def in_files(folder: Path) -> list[Path]:
    """The same weights in several files with an index."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    return files


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def wrong_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"[" + data[9:])


def huge_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("damage", [cut_short, wrong_header, huge_header, Path.unlink])
def test_a_damaged_file_of_weights_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], several: bool
) -> None:
    path = in_files(folder)[1] if several else folder / "model.safetensors"
    damage(path)
    said = refused(folder, tmp_path)
    gone = damage is Path.unlink
    assert ("no weights in" if gone and not several else path.name) in said
    missing = "is missing in" if several else "expected model.safetensors"
    assert (missing if gone else "is damaged or no file of weights") in said


def flip(path: Path) -> None:
    """A byte of the weights themselves: the file is as good as before, but another."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def test_weights_that_change_after_they_were_digested_are_refused(folder: Path, ray_here: None, tmp_path: Path) -> None:
    resolved = resolved_of(folder, tmp_path / "out")
    census = ByHand(resolved).until("count")
    before = sorted((tmp_path / "out").rglob("*.parquet"))
    flip(folder / "model.safetensors")
    for worker in (TextScorer, lambda sweep: ShardWorker(sweep, range(N_LAYERS), ["h.0"], None)):
        with pytest.raises(ModelError, match="another model"):
            worker(census.sweep)
    # By way of Ray: once is enough, since the same weights would be found again.
    messages: list[str] = []
    works = text_works(STAGE, census.sweep.shape)
    with pytest.raises(StageError, match=r"mining stopped.*another model at .*language"):
        chain.mine(census.sweep, census.store, works, 1, lambda stage, progress: None, messages.append)
    assert messages == []
    # Resumed, it is another run.
    result = command("run", folder / "config.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "contents.model" in result.output
    assert sorted((tmp_path / "out").rglob("*.parquet")) == before


def test_another_tokenizer_than_the_drivers_is_refused(folder: Path, tmp_path: Path) -> None:
    resolved = resolved_of(folder, tmp_path / "out")
    other = replace(resolved.sweep, contents={**resolved.sweep.contents, "tokenizer": "0" * 64})
    with pytest.raises(ModelError, match="another tokenizer"):
        ByHand(replace(resolved, sweep=other))


def test_an_unknown_family_is_told_the_known_ones(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    said = refused(folder, tmp_path)
    assert "'mamba', which polyray does not know" in said
    for family in FAMILIES:
        for name in family.model_types:
            assert f"'{name}'" in said


@pytest.mark.parametrize(("layers", "said"), [([0, 3], "layers 0 to 2, got [3]"), ([-1], "greater than or equal to 0")])
def test_layers_out_of_range_are_refused(folder: Path, tmp_path: Path, layers: list[int], said: str) -> None:
    assert said in refused(folder, tmp_path, model={"layers": layers})
