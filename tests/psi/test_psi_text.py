"""Documents: read in windows, mined and cut as a naive loop over each of them would have it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import CLS, EOT, SEP, SPECIAL, UNK, WORDS, with_words, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from languages import CONTEXT, INNER, LAYERS, reference
from transformers import PreTrainedModel

from polyray.config import NumericsConfig
from polyray.errors import ConfigError, DataError, ModelError
from polyray.models.documents import Opened, Reader, _special_around
from polyray.probes import reading
from polyray.probes.reading import Around, Passage, Passages, around, text_hash, windows
from polyray.probes.text import MAX_BYTES, open_corpus
from polyray.probes.tokens import Tokenizer
from polyray.psi import documents, mine, snippets
from polyray.psi_text_config import LanguageSubject, PsiTextScience

SPAN = 5
KNOWN = [*WORDS, *SPECIAL]
CPU = NumericsConfig()
N_DOCUMENTS = 24


def science(folder: Path, corpus: Path, **changes: Any) -> PsiTextScience:
    raw: dict[str, Any] = {
        "method": "psi_text",
        "subject": {"path": str(folder), "micro_batch": 3},
        "probe": {"path": str(corpus)},
        "encoder": {"kind": "sentence"},
        "mine": {"K": 8, "K_keep": 8, "k_min": 7},
        "extract": {"span": SPAN},
        "embed": {"n_pool": 16},
    }
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    return PsiTextScience.model_validate(raw)


def texts(n: int = N_DOCUMENTS) -> list[str]:
    """Documents of 1 to 70 words, the longest of three windows and more."""
    rng = np.random.default_rng(2)
    return [" ".join(rng.choice(WORDS, size)) for size in [1, 2, 70, CONTEXT - 1, *rng.integers(1, 60, n - 4)]]


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama", "bert"])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    return with_words(request.param, tmp_path_factory.mktemp("language"))


def passages_of(opened: Opened, corpus: Path) -> Passages:
    return Passages(open_corpus(str(corpus)), opened.tokenizer, opened.n_vocab)


def naive(model: PreTrainedModel, opened: Opened, ids: list[int], counts: list[bool]) -> list[np.ndarray]:
    """Activations [n, N] of every layer for a document, −inf where a token does not count: one window at a time."""
    bert = model.config.model_type == "bert"
    before, after = (SPAN // 2, SPAN - 1 - SPAN // 2) if bert else (SPAN - 1, 0)
    room = CONTEXT - (2 if bert else 1)
    out = [np.full((len(ids), INNER), np.nan, np.float32) for _ in range(LAYERS)]
    done = 0
    while done < len(ids):
        start = max(0, done - before)
        piece = ids[start : start + room]
        whole = [CLS, *piece, SEP] if bert else [EOT, *piece]
        seen, _, _ = reference(model, torch.tensor([whole]))
        end = len(ids) if start + room >= len(ids) else start + room - after
        for layer in range(LAYERS):
            out[layer][done:end] = seen[layer][0, 1 : 1 + len(piece)].numpy()[done - start : end - start]
        done = end
    return [np.where(np.array(counts)[:, None], a, -np.inf) for a in out]


@given(st.integers(1, 200), st.integers(1, 12), st.booleans(), st.integers(0, 20))
def test_every_token_counts_once_with_its_snippet_around_it(n: int, span: int, causal: bool, more: int) -> None:
    beside = around(span, causal)
    assert beside.before + 1 + beside.after == span
    room = span + more
    found = windows(n, room, beside)
    assert [w.first for w in found] == [0, *(w.last for w in found[:-1])]
    assert found[-1].last == n
    for w in found:
        assert 0 <= w.start <= w.first < w.last <= w.stop <= min(n, w.start + room)
        assert w.start <= max(0, w.first - beside.before)
        assert w.stop >= min(n, w.last + beside.after)


def test_responses_are_those_of_a_loop_over_documents(language: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = language
    given_texts = texts()
    given_texts[5] += " outside w3 <eot> [CLS]"  # unknown words, and what looks like a special token
    corpus = write_corpus(tmp_path / "c.jsonl", given_texts)
    config = LanguageSubject(path=str(folder), micro_batch=3)
    reader = Reader(config, SPAN, CPU)
    passages = passages_of(reader, corpus)
    read = [(i, p) for i, p in passages.read(range(N_DOCUMENTS)) if isinstance(p, Passage)]
    assert len(read) == N_DOCUMENTS
    everyone = dict.fromkeys(range(LAYERS), torch.arange(INNER))
    answers = dict(reader.responses(iter(read), everyone))
    assert list(answers) == list(range(N_DOCUMENTS))
    for document, tokens in read:
        words = given_texts[document].split()
        ids = [KNOWN.index(w) if w in KNOWN else UNK for w in words]
        assert tokens.ids.tolist() == ids
        special = {UNK, CLS, SEP} if model.config.model_type == "bert" else {UNK, EOT}
        expected = naive(model, reader, ids, [i not in special for i in ids])
        answer = answers[document]
        assert not isinstance(answer, str)
        for layer in range(LAYERS):
            np.testing.assert_allclose(answer[layer].response.numpy(), expected[layer].max(0), atol=2e-5)
            picked = expected[layer][answer[layer].position.numpy(), np.arange(INNER)]
            np.testing.assert_allclose(picked, expected[layer].max(0), atol=2e-5)


def test_bits_do_not_depend_on_who_shares_a_batch(language: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = language
    reader = Reader(LanguageSubject(path=str(folder), micro_batch=3, layers=[1, 3]), SPAN, CPU)
    read = list(passages_of(reader, write_corpus(tmp_path / "c.jsonl", texts(11))).read(range(11)))
    usable = [(i, p) for i, p in read if isinstance(p, Passage)]
    keep = {1: torch.tensor([0, 7, 8]), 3: torch.tensor([2])}
    together = dict(reader.responses(iter(usable), keep))
    backwards = dict(reader.responses(reversed(usable), keep))
    for one in usable:
        ((document, alone),) = reader.responses(iter([one]), keep)
        for other in (together[document], backwards[document]):
            assert not isinstance(alone, str)
            assert not isinstance(other, str)
            for a, b in zip(alone, other, strict=True):
                assert torch.equal(a.response, b.response)
                assert torch.equal(a.position, b.position)


def test_equal_peaks_take_the_first_token(tmp_path: Path) -> None:
    """One word over and over: with a span of 1 windows do not overlap, and each repeats the first exactly."""
    _, folder = with_words("llama", tmp_path)
    reader = Reader(LanguageSubject(path=str(folder), layers=[0]), 1, CPU)
    corpus = write_corpus(tmp_path / "c.jsonl", [" ".join(["w1"] * 90)])
    ((_, found),) = passages_of(reader, corpus).read([0])
    assert isinstance(found, Passage)
    ((_, answer),) = reader.responses(iter([(0, found)]), {0: torch.arange(INNER)})
    assert not isinstance(answer, str)
    assert (answer[0].position < reader.room).all()


def mined_tables(folder: Path, corpus: Path, cuts: list[int], **changes: Any) -> Any:
    chosen = science(folder, corpus, **changes)
    reader = Reader(chosen.subject, chosen.extract.span, CPU)
    passages = passages_of(reader, corpus)
    n = len(passages.corpus)
    rows, failed = documents.index(passages, range(n))
    images = mine.distinct_images(rows)
    layers = reader.layers()
    neurons = {info.name: np.arange(info.width) for info in layers}
    ends = [0, *cuts, n]
    parts = [
        documents.mine(reader, passages, chosen, images, layers, neurons, range(a, b))
        for a, b in itertools.pairwise(ends)
    ]
    merged = {info.name: mine.merge([p.parts[info.name] for p in parts], chosen, info)[0] for info in layers}
    return rows, failed, parts, merged


def test_the_top_documents_are_those_of_the_naive_loop(language: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = language
    given_texts = texts()
    given_texts[9] = "  " + given_texts[4].upper().replace(" ", "\n ").replace("W", "w")  # a repeat of document 4
    given_texts[11] = ""
    corpus = write_corpus(tmp_path / "c.jsonl", given_texts, [f"l{i % 3}" for i in range(N_DOCUMENTS)])
    rows, failed, _, merged = mined_tables(folder, corpus, [5, 6, 20])
    assert failed == [(None, "document", 11, "empty")]
    status = rows["status"].to_pylist()
    assert [i for i, s in enumerate(status) if s != "ok"] == [11]
    hashes = rows["pixel_hash"].to_pylist()
    assert hashes[9] == hashes[4]
    assert len(set(hashes)) == N_DOCUMENTS - 1
    assert rows["width_px"].to_pylist() == [len(t.split()) or None for t in given_texts]
    opened = Opened(LanguageSubject(path=str(folder)), SPAN)
    distinct = [i for i in range(N_DOCUMENTS) if i not in (9, 11)]
    of = {
        i: naive(model, opened, [WORDS.index(w) for w in given_texts[i].split()], [True] * len(given_texts[i].split()))
        for i in distinct
    }
    for layer in range(LAYERS):
        best = np.stack([of[i][layer].max(0) for i in distinct])
        for row in merged[f"h.{layer}"].to_pylist():
            expected = np.sort(best[:, row["neuron"]])[::-1][:8]
            np.testing.assert_allclose(row["response"], expected, atol=2e-5)
            for example, response, position in zip(row["example"], row["response"], row["position"], strict=True):
                assert abs(of[example][layer][position, row["neuron"]] - response) < 2e-5


def test_units_cut_elsewhere_give_the_same_rows(language: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = language
    corpus = write_corpus(tmp_path / "c.jsonl", texts())
    one, two = (mined_tables(folder, corpus, cuts)[3] for cuts in ([], [1, 3, 17]))
    for name in one:
        assert one[name].equals(two[name])


def test_a_broken_neuron_costs_itself_alone(tmp_path: Path) -> None:
    """NaN weights of one neuron of layer 1: it is excluded, all others of later layers are what they would be at 0."""
    model, folder = with_words("gpt2", tmp_path)
    silent = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:, 3] = torch.nan
    model.save_pretrained(folder)
    corpus = write_corpus(tmp_path / "c.jsonl", texts())
    _, failed, parts, merged = mined_tables(folder, corpus, [])
    assert failed == parts[0].failed == []
    for name, rows in merged.items():
        for row in rows.to_pylist():
            broken = (name, row["neuron"]) == ("h.1", 3)
            assert row["status"] == ("excluded" if broken else "ok")
            assert row["reason"] == (f"not finite: {N_DOCUMENTS} responses are NaN or infinite" if broken else None)
    with torch.no_grad():  # the same network in which that neuron reaches nothing
        for p, was in zip(model.parameters(), silent, strict=True):
            p.copy_(was)
        model.transformer.h[1].mlp.c_proj.weight[3] = 0
    model.save_pretrained(folder)
    _, _, _, without = mined_tables(folder, corpus, [])
    assert merged["h.3"].equals(without["h.3"])


def test_a_document_that_breaks_the_model_costs_itself_alone(tmp_path: Path) -> None:
    model, folder = with_words("gpt2", tmp_path)
    given_texts = [t.replace("w7 ", "w8 ").replace("w7", "w8") for t in texts()]
    given_texts[6] = "w1 w2 w7 w3"
    with torch.no_grad():
        model.transformer.wte.weight[7] = torch.nan
    model.save_pretrained(folder)
    _, _, parts, merged = mined_tables(folder, write_corpus(tmp_path / "c.jsonl", given_texts), [])
    ((layer, item, document, reason),) = parts[0].failed
    assert (layer, item, document) == (None, "document", 6)
    assert "not finite" in reason
    for rows in merged.values():
        assert set(rows["status"].to_pylist()) == {"ok"}
        assert all(6 not in r["example"] for r in rows.to_pylist())


def test_documents_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    _, folder = with_words("gpt2", tmp_path)
    (tmp_path / "texts").mkdir()
    for name, data in {
        "a.txt": b"w1 w2 w3",
        "b.txt": b"",
        "c.txt": b"\xff\xfe w1",
        "d.txt": b"w1",
        "e.txt": b"w1 " * (MAX_BYTES // 3 + 1),
        "f.txt": b"stranger words",
        "g.txt": b" \n\t ",
    }.items():
        (tmp_path / "texts" / name).write_bytes(data)
    opened = Opened(LanguageSubject(path=str(folder)), SPAN)
    rows, failed = documents.index(passages_of(opened, tmp_path / "texts"), range(7))
    assert {item_id: reason for _, _, item_id, reason in failed} == {
        1: "empty",
        2: "no valid UTF-8",
        4: f"too large: above {MAX_BYTES:,} bytes",
        5: "no tokens",
        6: "empty",
    }
    assert rows["width_px"].to_pylist() == [3, None, None, 1, None, None, None]
    assert set(rows["label"].to_pylist()) == {""}


def test_a_document_without_label_among_labelled_ones_cannot_be_used(tmp_path: Path) -> None:
    _, folder = with_words("gpt2", tmp_path)
    corpus = write_corpus(tmp_path / "c.jsonl", ["w1", "w2", "w3"], ["a", None, "b"])
    opened = Opened(LanguageSubject(path=str(folder)), SPAN)
    rows, failed = documents.index(passages_of(opened, corpus), range(3))
    assert failed == [(None, "document", 1, documents.UNLABELLED)]
    assert rows["label"].to_pylist() == ["a", "", "b"]
    assert mine.distinct_images(rows).distinct.tolist() == [0, 2]


def test_an_enormous_document_is_tokenised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = with_words("gpt2", tmp_path)
    tokenizer = Tokenizer(folder)
    rng = np.random.default_rng(0)
    text = "  ".join(rng.choice(WORDS, 3000)) + " " + "x" * 500 + "\n\nw4  w5 "
    whole = reading.passage(text, tokenizer, 53)
    longest: list[int] = []
    placed = Tokenizer.encode_placed

    def watched(self: Tokenizer, piece: str) -> Any:
        longest.append(len(piece))
        return placed(self, piece)

    monkeypatch.setattr(Tokenizer, "encode_placed", watched)
    monkeypatch.setattr(reading, "PIECE", 600)
    pieces = reading.passage(text, tokenizer, 53)
    assert len(longest) > 10
    assert max(longest) <= 600
    assert pieces.ids.tolist() == whole.ids.tolist()
    assert pieces.places.tolist() == whole.places.tolist()
    assert [text[a:b] for a, b in pieces.places.tolist()] == text.split()
    with pytest.raises(DataError, match="token 50 is none of the model's 50"):
        reading.passage(text, tokenizer, 50)
    monkeypatch.setattr(reading, "MAX_TOKENS", 3001)
    with pytest.raises(DataError, match="too long: 3,003 tokens, at most 3,001"):
        reading.passage(text, tokenizer, 53)


def test_what_is_kept_is_bounded_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = with_words("gpt2", tmp_path)
    opened = Opened(LanguageSubject(path=str(folder)), SPAN)
    corpus = write_corpus(tmp_path / "c.jsonl", texts())
    monkeypatch.setattr(Passages, "MAX_KEPT", 400)
    passages = passages_of(opened, corpus)
    first = {i: p for i, p in passages.read([2, 3, 9, 23])}
    again = {i: p for i, p in passages.read([0, 2, 3, 4, 23])}
    assert list(again) == [0, 2, 3, 4, 23]
    held = passages._kept.values()
    assert 0 < sum(len(p.text) + len(p.ids) for p in held) <= 400
    for i in (2, 3, 23):
        one, two = first[i], again[i]
        assert isinstance(one, Passage)
        assert isinstance(two, Passage)
        assert one.ids.tolist() == two.ids.tolist()


def test_repeats_are_told_without_regard_to_case_and_spacing() -> None:
    assert text_hash("The  straße\n") == text_hash(" the STRASSE")
    assert text_hash("a b") != text_hash("ab")


# Snippets


def test_numbers_of_patches_go_both_ways_and_know_their_limits() -> None:
    rng = np.random.default_rng(0)
    example = np.array([0, snippets.MAX_DOCUMENTS - 1, *rng.integers(0, 10**6, 50)])
    start = np.array([0, reading.MAX_TOKENS - 1, *rng.integers(0, 10**6, 50)])
    zero = np.zeros_like(start)
    box = np.stack([start, zero, start + np.array([1, 4096, *rng.integers(1, 256, 50)]), zero + 1], axis=1)
    ids = snippets.patch_ids(example, box)
    assert len(set(ids.tolist())) == len(ids)
    assert ids.min() >= 0
    back_example, back_box = snippets.from_patch_ids(ids)
    assert back_example.tolist() == example.tolist()
    assert back_box.tolist() == box.tolist()
    order = np.lexsort((start, example))
    assert (np.diff(ids[order]) > 0).all(), "ascending numbers are ascending documents"
    for bad in (
        (snippets.MAX_DOCUMENTS, 0, 1),
        (0, reading.MAX_TOKENS, 1),
        (0, 0, 4097),
        (0, 0, 0),
    ):
        with pytest.raises(ConfigError, match="cannot be numbered"):
            snippets.patch_ids(np.array([bad[0]]), np.array([[bad[1], 0, bad[1] + bad[2], 1]]))


@pytest.mark.parametrize(("beside", "x0", "x1"), [
    (Around(4, 0), [0, 0, 5], [1, 3, 10]),
    (Around(2, 2), [0, 0, 7], [3, 3, 10]),
])  # fmt: skip
def test_boxes_are_clipped_to_their_document(beside: Around, x0: list[int], x1: list[int]) -> None:
    frame = snippets.SnippetFrame(beside, np.array([3, 0, 10]))
    example, position = np.array([0, 0, 2]), np.array([0, 2, 9])
    boxes = frame.boxes({}, example, position)
    assert boxes.tolist() == [[a, 0, b, 1] for a, b in zip(x0, x1, strict=True)]
    back, again = frame.of_patches(frame.patches({"layer": "h.1"}, example, position))
    assert back.tolist() == example.tolist()
    assert again.tolist() == boxes.tolist()


def test_snippets_are_the_documents_own_text() -> None:
    text = "One  two,\nthree  four"
    places = np.array([[0, 3], [3, 8], [8, 9], [10, 15], [15, 21]], np.int32)  # some tokens hold the space before them
    p = Passage(text, np.arange(5, dtype=np.int32), places, np.ones(5, np.bool_))
    assert p.snippet(1, 4) == "  two,\nthree"
    assert p.marked(0, 2, 1) == "One  «two»"
    assert p.marked(1, 5, 4) == "  two,\nthree  «four»"
    assert p.marked(0, 3, 2) == "One  two«,»"
    blank = Passage("a  b", np.arange(3, dtype=np.int32), np.array([[0, 1], [1, 3], [3, 4]], np.int32), p.counts[:3])
    assert blank.marked(0, 3, 1) == "a«  »b"


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [0, 4]}, "has layers 0 to 3, got [4]"),
        ({"layers": []}, "has layers 0 to 3"),
        ({"context": CONTEXT + 1}, "more than the model's 24 tokens"),
        ({"context": 10}, "more than half of the 9 tokens"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    _, folder = with_words("gpt2", tmp_path)
    with pytest.raises(ConfigError) as caught:
        Opened(LanguageSubject.model_validate({"path": str(folder)} | change), SPAN)
    assert said in str(caught.value)


def test_a_family_that_is_not_known_and_a_tokenizer_without_ends_are_refused(tmp_path: Path) -> None:
    _, folder = with_words("gpt2", tmp_path)
    backend = Tokenizer(folder)
    backend.eot = None
    with pytest.raises(ModelError, match="end-of-text"):
        _special_around(backend, True, "it")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="'mamba'"):
        Opened(LanguageSubject(path=str(folder)), SPAN)
