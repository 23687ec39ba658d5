r"""Which question it answers: *which text does a row of `tokens` stand for?*

Place in the flow: under `neuron_records.py`; the inverse of `probes.tokens.Tokenizer.shown`, which needs no tokenizer.
"""

import re

NO_TEXT = "\ufffd"
"""Stands before the printable form of a token that is no text of its own, so that it is not taken for one that is."""

_ESCAPE = re.compile(r"\\(?:(\\)|([tnr])|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")
_LETTERS = {"t": "\t", "n": "\n", "r": "\r"}


def token_text(shown: str) -> str:
    r"""A token as it stands in a text.

    Args:
        shown: its printable form, with a doubled backslash, `\n`, `\u200b` and the like for letters, `\xe2` for a byte.

    Returns:
        The token with its letters; where it has a byte that is no UTF-8, or half a surrogate pair, what was given after
        U+FFFD.
    """
    text = _ESCAPE.sub(_letter, shown)
    return NO_TEXT + shown if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def _letter(found: re.Match[str]) -> str:
    backslash, letter, byte, *wide = found.groups()
    if backslash or letter:
        return _LETTERS.get(letter, "\\")
    # Below 0x80 it is a control character; above, letters are written with four digits, so that it is a byte.
    code = int(byte or wide[0] or wide[1], 16)
    return chr(code if byte is None or code < 0x80 else 0xDC00 + code)
