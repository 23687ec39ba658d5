"""Which question it answers: *which tokens are in the corpus, and how often?*

Place in the flow: first, and without the model: only tokens that are frequent enough get statistics, and how often a
token is seen at most says how large an activation may be before its sum overflows.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from polyray.errors import DataError


class Kept(NamedTuple):
    """Tokens that get statistics."""

    ids: Int64[Tensor, " T"]
    """Token ids, ascending."""
    counts: Int64[Tensor, " T"]
    """How often each is in the corpus."""
    row_of: Int64[Tensor, " V"]
    """Where a token id stands in `ids`; −1 for tokens without statistics."""

    def rows(self, tokens: Int[Tensor, "*n"], counted: Bool[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
        """Row of each token; −1 where it has none, or is not to be counted (padding, separators)."""
        return torch.where(counted, self.row_of[tokens.long()], -1)


def count_tokens(tokens: Int[Tensor, "*n"], counted: Bool[Tensor, "*n"], n_vocab: int) -> Int64[Tensor, " V"]:
    """How often each token id occurs among the tokens to be counted. Counts of parts of a corpus add up.

    Args:
        tokens: token ids.
        counted: which of them are tokens of the corpus.
        n_vocab: V, as the model has it.

    Raises:
        DataError: a token id is beyond the vocabulary: the tokenizer is that of another model.
    """
    if tokens.numel() and int(tokens.max()) >= n_vocab:
        raise DataError(
            f"token id {int(tokens.max()):,} is beyond the model's {n_vocab:,} tokens: the tokenizer is that of "
            "another model."
        )
    return torch.bincount(tokens[counted].long(), minlength=n_vocab)


def select(counts: Int64[Tensor, " V"], min_count: int, exclude: Iterable[int] = ()) -> Kept:
    """The tokens that occur at least min_count times.

    Args:
        counts: of the whole corpus, by token id.
        min_count: at least 1.
        exclude: token ids that get no statistics however often they occur.

    Raises:
        DataError: no token occurs that often.
    """
    frequent = counts >= max(min_count, 1)
    for token in exclude:
        frequent[token] = False
    ids = frequent.nonzero().squeeze(1)
    if len(ids) == 0:
        raise DataError(
            f"no token occurs {min_count:,} times or more: the corpus has {int(counts.sum()):,} tokens, the most "
            f"frequent one occurs {int(counts.max()) if len(counts) else 0:,} times. Lower min_count or add text."
        )
    row_of = torch.full((len(counts),), -1, dtype=torch.int64)
    row_of[ids] = torch.arange(len(ids))
    return Kept(ids, counts[ids], row_of)
