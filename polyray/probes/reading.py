"""Which question it answers: *how is a document read by a model that sees only so many tokens at once?*

Place in the flow: between a corpus and the subject of a PSI sweep over documents. A document becomes tokens with their
places in its text, and windows of the model's context that overlap, so that every token counts in exactly one window
and stands there with all the tokens of its snippet around it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyray.errors import DataError
from polyray.probes.text import Corpus, Document
from polyray.probes.tokens import Ids, Tokenizer

MAX_TOKENS = 2**24
"""A document's tokens; more than its bytes allow, but for a tokenizer that makes several of one."""
PIECE = 2**16
"""Characters that are tokenised at a time: tokenizers hold a text at many times its size."""


@dataclass(frozen=True)
class Passage:
    """A document as tokens."""

    text: str
    ids: Ids
    """Token ids [n]."""
    places: NDArray[np.int32]
    """First character of each token and the one after it [n, 2]."""
    counts: NDArray[np.bool_]
    """Which tokens are text [n]; unknown ones and the like are not."""

    def snippet(self, x0: int, x1: int) -> str:
        """The document's own text of tokens x0 to x1 (exclusive)."""
        return self.text[self.places[x0, 0] : self.places[x1 - 1, 1]]

    def marked(self, x0: int, x1: int, peak: int) -> str:
        """The snippet with its peak token between « and », which stand within the white space around it."""
        start, end = self.places[x0, 0], self.places[x1 - 1, 1]
        first, last = self.places[peak]
        token = self.text[first:last]
        first, last = first + len(token) - len(token.lstrip()), last - len(token) + len(token.rstrip())
        if first >= last:  # the token is white space alone
            first, last = self.places[peak]
        return f"{self.text[start:first]}«{self.text[first:last]}»{self.text[last:end]}"


def passage(text: str, tokenizer: Tokenizer, n_vocab: int) -> Passage:
    """A document's tokens.

    A text of more than `PIECE` characters is tokenised in pieces that begin with white space, where most tokenizers
    would cut in any case.

    Args:
        text: of the document.
        tokenizer: of the model.
        n_vocab: tokens that the model knows.

    Raises:
        DataError: it has no token that is text, more than `MAX_TOKENS`, or one that the model does not know.
    """
    ids, places = [], []
    for start, stop in _pieces(text):
        found, place = tokenizer.encode_placed(text[start:stop])
        ids.append(found)
        places.append(place + np.int32(start))
    tokens = np.concatenate(ids)
    counts = ~np.isin(tokens, list(tokenizer.special))
    if not counts.any():
        raise DataError("no tokens")
    if len(tokens) > MAX_TOKENS:
        raise DataError(f"too long: {len(tokens):,} tokens, at most {MAX_TOKENS:,}")
    if tokens.max() >= n_vocab:
        raise DataError(f"token {tokens.max()} is none of the model's {n_vocab:,}")
    return Passage(text, tokens, np.concatenate(places), counts)


def _pieces(text: str) -> list[tuple[int, int]]:
    """Start and stop of pieces of at most `PIECE` characters."""
    cuts = [0]
    while len(text) - cuts[-1] > PIECE:
        most = cuts[-1] + PIECE
        fit = (i for i in range(most, cuts[-1] + PIECE // 2, -1) if text[i].isspace() and not text[i - 1].isspace())
        cuts.append(next(fit, most))
    return list(zip(cuts, [*cuts[1:], len(text)], strict=True))


def text_hash(text: str) -> str:
    """BLAKE2 of a text whose runs of white space are one space, without regard to case: equal for repeats."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=16).hexdigest()


class Around(NamedTuple):
    """Tokens beside the peak that belong to a snippet."""

    before: int
    after: int


def around(span: int, causal: bool) -> Around:
    """A snippet of `span` tokens: up to the peak where the model sees no further, else with the peak in the middle."""
    return Around(span - 1, 0) if causal else Around(span // 2, span - 1 - span // 2)


class Window(NamedTuple):
    """Part of a document that the model sees at once."""

    start: int
    stop: int
    first: int
    """The first token that counts in it."""
    last: int
    """The one after the last that does."""


def windows(n_tokens: int, room: int, beside: Around) -> list[Window]:
    """Windows in which a document is read.

    Every token counts in exactly one of them, with `before` tokens before it and `after` behind it, as far as the
    document goes.

    Args:
        n_tokens: of the document.
        room: tokens of a window, more than `before` and `after` together.
        beside: tokens of a snippet beside its peak.
    """
    found: list[Window] = []
    first = 0
    while first < n_tokens:
        start = max(0, first - beside.before)
        stop = min(n_tokens, start + room)
        last = n_tokens if stop == n_tokens else stop - beside.after
        found.append(Window(start, stop, first, last))
        first = last
    return found


class Passages:
    """Documents of a corpus as passages, the last ones read kept within a bound.

    Args:
        corpus: the documents.
        tokenizer: of the model.
        n_vocab: tokens that the model knows.
    """

    MAX_KEPT = 2**23
    """Characters and tokens of passages that are kept; about 100 MB."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.corpus = corpus
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        self._kept: dict[int, Passage] = {}
        self._n_kept = 0

    def read(self, documents: Sequence[int]) -> Iterator[tuple[int, Passage | DataError]]:
        """Documents of the corpus, ascending and distinct; of one that cannot be used the error that says why.

        The corpus is read once, from the first to the last of those that are not kept.

        Raises:
            DataError: the corpus cannot be read any more.
        """
        missing = [i for i in documents if i not in self._kept]
        found = self.corpus.documents(range(missing[0], missing[-1] + 1)) if missing else iter(())
        for index in documents:
            kept = self._kept.get(index)
            yield index, self._used(next(d for d in found if d.index == index)) if kept is None else kept

    def _used(self, document: Document) -> Passage | DataError:
        try:
            if document.text is None:
                raise DataError(document.reason or "no text")
            found = passage(document.text, self._tokenizer, self._n_vocab)
        except DataError as e:
            return e
        size = len(found.text) + len(found.ids)
        if self._n_kept + size <= self.MAX_KEPT:
            self._n_kept += size
            self._kept[document.index] = found
        return found
