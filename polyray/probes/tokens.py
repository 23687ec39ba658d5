"""Which question it answers: *which tokens stand where in what the model is given?*

Place in the flow: between a corpus and the model. Documents become tokens, tokens become contexts of one length.
Tokens of the corpus are told from what is put between and around them, which nothing counts.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int32
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from polyray.errors import ModelError
from polyray.probes.text import Document

Ids = NDArray[np.int32]


class Tokenizer:
    """A model's tokenizer.

    Text that looks like a special token is split like any other text.

    Args:
        folder: of the model, as `checkpoint.locate` gives it.

    Raises:
        ModelError: there is none, or it is none of the tokenizers library.
    """

    def __init__(self, folder: Path) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            raise ModelError(f"no tokenizer in {str(folder)!r}: {str(e).strip().splitlines()[0]}") from e
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"the tokenizer in {str(folder)!r} is a slow one; polyray needs its tokenizer.json.")
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.n_vocab = int(backend.get_vocab_size(with_added_tokens=True))
        self.special = frozenset(int(i) for i in tokenizer.all_special_ids)
        """Ids that mean no text: separators, padding, unknown."""
        self.eot: int | None = _first(tokenizer.eos_token_id, tokenizer.bos_token_id)
        """Ends a document, of models that have such a token."""
        self.around: tuple[int, int] | None = (
            None
            if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None
            else (int(tokenizer.cls_token_id), int(tokenizer.sep_token_id))
        )
        """What stands before and behind a document, of models that have such tokens."""
        self.pad = _first(tokenizer.pad_token_id, self.eot) or 0
        self._state = json.loads(backend.to_str())
        self._added = {int(token["id"]): str(token["content"]) for token in self._state["added_tokens"]}
        self._bytes = _byte_of_letter() if "ByteLevel" in json.dumps(self._state["decoder"]) else None

    def encode(self, text: str) -> Ids:
        """Token ids of a text, without special tokens around it."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_placed(self, text: str) -> tuple[Ids, NDArray[np.int32]]:
        """Token ids as `encode`, and where each stands in the text: its first character and the one after it, [n, 2].

        Tokens that are parts of one character share its place.
        """
        encoded = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, np.int32), np.array(encoded.offsets, np.int32).reshape(-1, 2)

    def digest(self) -> str:
        """64 hexadecimal digits of SHA-256 over what the tokenizer does."""
        return hashlib.sha256(json.dumps(self._state, sort_keys=True).encode()).hexdigest()

    def shown(self, token: int) -> str:
        r"""A token as printable text.

        Bytes that are no valid UTF-8, control characters and the like are escaped (`\xe2`, `\n`, `\u200b`), a
        backslash is doubled. Spaces stand for themselves, as does the `##` of WordPiece. An id that the tokenizer does
        not know is `<id>`.
        """
        text = self._text(token)
        return f"<{token}>" if text is None else "".join(_shown_letter(letter) for letter in text)

    def text(self, token: int) -> str | None:
        """A token as it stands in a text; None where it is no text of its own: part of a letter, or unknown."""
        text = self._text(token)
        return None if text is None or any("\ud800" <= letter <= "\udfff" for letter in text) else text

    def _text(self, token: int) -> str | None:
        """A token as text, bytes that are no valid UTF-8 as lone surrogates; None for an unknown id."""
        if token in self._added:
            return self._added[token]
        letters: str | None = self._backend.id_to_token(token)
        if letters is None:
            return None
        if self._bytes is not None and all(letter in self._bytes for letter in letters):
            return bytes(self._bytes[letter] for letter in letters).decode("utf-8", "surrogateescape")
        one_byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", letters)
        if one_byte:
            return bytes([int(one_byte[1], 16)]).decode("utf-8", "surrogateescape")
        return letters.replace("\u2581", " ")  # SentencePiece writes spaces so


def _first(*ids: Any) -> int | None:
    return next((int(i) for i in ids if i is not None), None)


def _shown_letter(letter: str) -> str:
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if letter == "\\":
        return "\\\\"
    if letter.isprintable():
        return letter
    # Not as \\x.., which would look like a byte.
    return f"\\u{ord(letter):04x}" if 0x80 <= ord(letter) < 0x100 else letter.encode("unicode_escape").decode()


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable letter: itself where it is one, else one from U+0100 on.

    Source: Radford et al. 2019 (GPT-2), `encoder.py`.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Tokenized(NamedTuple):
    """Documents as tokens."""

    ids: list[Ids]
    docs: list[int]
    """Index in the corpus of each."""
    left_out: list[tuple[int, str]]
    """Index and reason of documents without tokens."""


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Tokenized:
    """Tokens of documents; one that cannot be used is left out with its reason."""
    done = Tokenized([], [], [])
    for document in documents:
        if document.text is None:
            done.left_out.append((document.index, document.reason or "no text"))
            continue
        ids = tokenizer.encode(document.text)
        if len(ids) == 0:
            done.left_out.append((document.index, "no tokens"))
            continue
        done.ids.append(ids)
        done.docs.append(document.index)
    return done


class Packed(NamedTuple):
    """Contexts of one length."""

    tokens: Int32[Tensor, "n L"]
    doc: Int32[Tensor, "n L"]
    """Which document a token is of; −1 for what is no token of the corpus: separators, unknown tokens, padding."""
    mask: Bool[Tensor, "n L"]
    """Where there is a token, be it a separator; the rest is padding."""

    @property
    def counted(self) -> Bool[Tensor, "n L"]:
        """Where there is a token of the corpus."""
        return self.doc >= 0


def pack(tokenized: Tokenized, tokenizer: Tokenizer, context: int, causal: bool) -> Packed:
    """Documents as contexts: joined for a causal model, apart for others.

    Args:
        tokenized: the documents.
        tokenizer: of the model.
        context: L, the tokens of a context.
        causal: whether a token of the model sees only what is before it.

    Raises:
        ModelError: the tokenizer has no token to separate documents with, or the context has no room for one token.
    """
    if causal:
        if tokenizer.eot is None:
            raise ModelError("the tokenizer has neither an end-of-text nor a beginning-of-text token.")
        return pack_joined(tokenized.ids, context, tokenizer.eot, tokenized.docs, tokenizer.special)
    if tokenizer.around is None:
        raise ModelError("the tokenizer has no tokens to put around a document ([CLS] and [SEP]).")
    return pack_apart(tokenized.ids, context, tokenizer.around, tokenizer.pad, tokenized.docs, tokenizer.special)


def pack_joined(ids: Sequence[Ids], context: int, eot: int, docs: Sequence[int], special: Iterable[int] = ()) -> Packed:
    """Documents joined with an end-of-text token between, and cut into contexts; the last one is padded.

    Args:
        ids: tokens of each document.
        context: L, at least 1.
        eot: the end-of-text token; pads as well.
        docs: index of each document.
        special: ids that are no tokens of the corpus wherever they stand.
    """
    if context < 1:
        raise ModelError(f"a context of {context} tokens has no room for one.")
    between = np.array([eot], dtype=np.int32)
    pieces = [piece for document in ids for piece in (between, document)][1:]
    owners = [o for index, document in zip(docs, ids, strict=True) for o in ((-1, 1), (index, len(document)))][1:]
    n = -(-sum(len(p) for p in pieces) // context)
    tokens, doc, mask = _empty(n, context, eot)
    if pieces:
        stream = np.concatenate(pieces)
        tokens.reshape(-1)[: len(stream)] = stream
        doc.reshape(-1)[: len(stream)] = np.repeat([o for o, _ in owners], [m for _, m in owners])
        mask.reshape(-1)[: len(stream)] = True
    return _packed(tokens, doc, mask, special)


def pack_apart(
    ids: Sequence[Ids],
    context: int,
    around: tuple[int, int],
    pad: int,
    docs: Sequence[int],
    special: Iterable[int] = (),
) -> Packed:
    """Documents cut into pieces, each in a context of its own with a token before and one behind it.

    Args:
        ids: tokens of each document.
        context: L, at least 3.
        around: the tokens before and behind.
        pad: fills up a context.
        docs: index of each document.
        special: ids that are no tokens of the corpus wherever they stand.
    """
    room = context - 2
    if room < 1:
        raise ModelError(f"a context of {context} tokens has no room for one between the two around it.")
    pieces = [
        (index, document[start : start + room])
        for index, document in zip(docs, ids, strict=True)
        for start in range(0, len(document), room)
    ]
    tokens, doc, mask = _empty(len(pieces), context, pad)
    for row, (index, piece) in enumerate(pieces):
        end = len(piece) + 2
        tokens[row, 0], tokens[row, end - 1] = around
        tokens[row, 1 : end - 1] = piece
        doc[row, 1 : end - 1] = index
        mask[row, :end] = True
    return _packed(tokens, doc, mask, special)


def _empty(n: int, context: int, fill: int) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    shape = (n, context)
    return np.full(shape, fill, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)


def _packed(tokens: Ids, doc: Ids, mask: NDArray[np.bool_], special: Iterable[int]) -> Packed:
    doc[np.isin(tokens, list(special))] = -1
    return Packed(torch.from_numpy(tokens), torch.from_numpy(doc), torch.from_numpy(mask))
