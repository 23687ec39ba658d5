"""Contexts against a naive loop; tokens as printable text; text that looks like a special token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from polyray.errors import ModelError
from polyray.models.checkpoint import MINILM, locate
from polyray.probes.text import Document
from polyray.probes.tokens import Tokenized, Tokenizer, pack, pack_apart, pack_joined, tokenize

EOT = 7
lists = st.lists(st.lists(st.integers(10, 30), min_size=1, max_size=9), max_size=6)


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(d, dtype=np.int32) for d in documents]


@given(lists, st.integers(1, 8))
def test_joined_documents_are_the_stream_cut_into_contexts(documents: list[list[int]], context: int) -> None:
    docs = [3 + 2 * i for i in range(len(documents))]
    packed = pack_joined(arrays(documents), context, EOT, docs)
    stream: list[tuple[int, int]] = []
    for i, document in enumerate(documents):
        stream += ([(EOT, -1)] if i else []) + [(token, docs[i]) for token in document]
    assert packed.tokens.shape == packed.doc.shape == packed.mask.shape == (-(-len(stream) // context), context)
    got = list(zip(packed.tokens[packed.mask].tolist(), packed.doc[packed.mask].tolist(), strict=True))
    assert got == stream
    assert not packed.counted[~packed.mask].any()
    assert packed.mask.flatten().tolist() == [True] * len(stream) + [False] * (packed.mask.numel() - len(stream))


@given(lists, st.integers(3, 8))
def test_documents_apart_never_share_a_context(documents: list[list[int]], context: int) -> None:
    packed = pack_apart(arrays(documents), context, (1, 2), 0, list(range(len(documents))))
    want = [
        (i, document[start : start + context - 2])
        for i, document in enumerate(documents)
        for start in range(0, len(document), context - 2)
    ]
    assert len(packed.tokens) == len(want)
    for tokens, doc, mask, (i, piece) in zip(*packed, want, strict=True):
        assert tokens[mask].tolist() == [1, *piece, 2]
        assert doc[mask].tolist() == [-1, *[i] * len(piece), -1]
        assert mask.tolist() == [True] * (len(piece) + 2) + [False] * (context - len(piece) - 2)
        assert (doc[~mask] == -1).all()


def test_special_tokens_of_a_text_are_not_counted() -> None:
    packed = pack_joined(arrays([[10, 11, 12], [11]]), 3, EOT, [0, 1], special=(11, EOT))
    assert packed.counted.tolist() == [[True, False, True], [False, False, False]]
    assert packed.mask.tolist() == [[True] * 3, [True, True, False]]


def test_contexts_without_room_are_refused() -> None:
    with pytest.raises(ModelError, match="no room"):
        pack_joined([], 0, EOT, [])
    with pytest.raises(ModelError, match="no room"):
        pack_apart([], 2, (1, 2), 0, [])


def byte_level(folder: Path) -> Path:
    """A byte-level tokenizer with all bytes, one merged token and an end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "Ġa"])}
    backend = Backend(models.BPE(vocab, [("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return folder


def test_byte_tokens_are_shown_escaped(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path))
    assert tokenizer.eot == 257
    assert tokenizer.around is None
    assert tokenizer.special == {257}
    assert tokenizer.n_vocab == 258
    shown = {tokenizer.shown(int(token)) for token in tokenizer.encode("é a\n\\")}
    assert shown == {r"\xc3", r"\xa9", " a", r"\n", r"\\"}
    everything = [tokenizer.shown(token) for token in range(258)]
    assert len(set(everything)) == 258
    assert all(text.isprintable() for text in everything)
    assert tokenizer.shown(257) == "<|end|>"
    assert tokenizer.shown(258) == "<258>"
    for text in ("é", " a", "\n"):
        ids = tokenizer.encode(text)
        assert [tokenizer.text(int(i)) for i in ids] == ([None, None] if text == "é" else [text])
    assert tokenizer.text(258) is None


def test_text_that_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path))
    ids = tokenizer.encode("x<|end|>y")
    assert 257 not in ids
    assert "".join(tokenizer.shown(int(i)) for i in ids) == "x<|end|>y"


def test_documents_are_tokenized_or_left_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(tmp_path))
    long = "word " * 50_000
    documents = [Document(4, None, "empty"), Document(5, "x", None), Document(6, long, None)]
    done = tokenize(documents, tokenizer)
    assert done.docs == [5, 6]
    assert [len(ids) for ids in done.ids] == [1, len(long)]
    assert done.left_out == [(4, "empty")]
    packed = pack(done, tokenizer, 1024, causal=True)
    assert packed.counted.sum() == 1 + len(long)
    with pytest.raises(ModelError, match="around a document"):
        pack(done, tokenizer, 16, causal=False)
    assert pack(Tokenized([], [], []), tokenizer, 16, causal=True).tokens.shape == (0, 16)


def test_minilms_tokenizer() -> None:
    tokenizer = Tokenizer(locate(MINILM))
    assert tokenizer.around == (101, 102)
    assert tokenizer.pad == 0
    done = tokenize([Document(0, "Unbelievable [SEP] things", None)], tokenizer)
    assert [tokenizer.shown(int(i)) for i in done.ids[0]] == ["unbelievable", "[", "sep", "]", "things"]
    packed = pack(done, tokenizer, 5, causal=False)
    assert packed.tokens[:, 0].tolist() == [101, 101]
    assert packed.tokens[1, -2:].tolist() == [102, 0]
    with pytest.raises(ModelError, match="end-of-text"):
        pack(done, tokenizer, 5, causal=True)
    nothing = tokenize([Document(3, "\u200b", None), Document(4, "x", None)], tokenizer)
    assert (nothing.docs, nothing.left_out) == ([4], [(3, "no tokens")])
    unknown = pack(tokenize([Document(0, "a \U0001f9ff", None)], tokenizer), tokenizer, 5, causal=False)
    assert int(unknown.counted.sum()) == 1
    assert unknown.mask.dtype == torch.bool


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer(tmp_path)
