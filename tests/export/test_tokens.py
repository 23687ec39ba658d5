"""Tokens as text again."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polyray.export.tokens import NO_TEXT, token_text
from polyray.probes.tokens import Tokenizer, _byte_of_letter

PIECES = [
    " cat", "\n\n", "\t", "\r", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u2028", "\u2029", "\u202e",
    "\u200b", "שלום", "語", "é", "😀", "\\", "\\\\", "\\n", "\\xe2", "\\u2028", '"', "'", "</script>", "«», {}",
    NO_TEXT, NO_TEXT + "\\xe2",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer over bytes, whose vocabulary has every byte and some hostile pieces."""
    letter_of = {byte: letter for letter, byte in _byte_of_letter().items()}
    written = [letter_of[b] for b in range(256)] + ["".join(letter_of[b] for b in p.encode()) for p in PIECES]
    written += [letter_of[0xE2] + letter_of[0x80], letter_of[ord("a")] + letter_of[0xE2]]
    written = list(dict.fromkeys(written))
    backend = Backend(models.BPE(vocab={w: i for i, w in enumerate(written)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eot>").save_pretrained(folder)
    return Tokenizer(folder)


def test_what_is_shown_of_a_token_says_its_text(tokenizer: Tokenizer) -> None:
    seen = set()
    for token in range(tokenizer.n_vocab):
        shown, text = tokenizer.shown(token), tokenizer.text(token)
        found = token_text(shown)
        assert found == (NO_TEXT + shown if text is None else text)
        assert json.loads(json.dumps(found)) == found
        found.encode()
        seen.add(found)
    assert set(PIECES) - {NO_TEXT + "\\xe2"} <= seen
    assert len(seen) >= tokenizer.n_vocab - 1


def test_half_a_pair_is_no_text() -> None:
    assert token_text("\\ud800") == NO_TEXT + "\\ud800"
    assert token_text("\\U0001f600\\xff") == NO_TEXT + "\\U0001f600\\xff"
