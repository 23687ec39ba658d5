"""Words: texts and numbers as a page shows them.

Place in the flow: a leaf; the templates' filters. Whatever comes from a dataset is text, never markup, and nothing in
it can change how the rest of a page reads: control characters are shown as symbols, and writing direction ends where
the text does.
"""

import base64
import csv
import io
import math
import unicodedata
from typing import Any

from markupsafe import Markup, escape

NOTHING = "–"
_JPEG = b"\xff\xd8\xff"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_PICTURES = 0x2400
"""Unicode's symbols for the first 32 control characters."""


def clean(text: object) -> str:
    """A text without characters that act instead of being seen: they are shown as symbols or by their number."""
    return "".join(map(_visible, str(text)))


def _visible(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(_PICTURES + code)
    if code == 0x7F:
        return "␡"
    # Cf: directions, joiners, byte order marks, tags; Zl, Zp: line and paragraph separators; Co: private use.
    if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co"):
        return f"⟨U+{code:04X}⟩"
    return c


def said(text: object) -> Markup:
    """A text of the dataset as markup that isolates its writing direction; a dash where there is none."""
    return Markup("<bdi>{}</bdi>").format(clean(text)) if text is not None else Markup(escape(NOTHING))


def peak(text: str) -> Markup:
    """A snippet with what stands between « and » marked."""
    before, mark, rest = clean(text).partition("«")
    inside, end, after = rest.partition("»")
    if not mark or not end:
        return Markup("<bdi>{}</bdi>").format(clean(text))
    return Markup("<bdi>{}<mark>{}</mark>{}</bdi>").format(before, inside, after)


def token(text: object) -> Markup:
    """A token: spaces at its ends can be seen."""
    shown = clean(text)
    bare = shown.strip(" ")
    left, right = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    if not bare:
        return Markup("<bdi>{}</bdi>").format("␣" * len(shown) or "∅")
    return Markup("<bdi>{}</bdi>").format("␣" * left + bare + "␣" * right)


def number(value: Any, digits: int = 3) -> str:
    """A number with so many decimals; a dash where it is missing."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def figure(value: float) -> str:
    """A number at the end of an axis: two figures that count."""
    return f"{value:.2g}".replace("-", "−")


def probability(value: Any) -> str:
    """A p or q: two figures that count."""
    if value is None:
        return NOTHING
    if not 0 < value < 0.01:
        return number(value, 2 if value >= 0.1 else 3)
    return f"{value:.1e}".replace("-", "−") if value < 0.0001 else f"{value:.2g}"


def count(value: Any) -> str:
    """A whole number with its thousands apart."""
    return NOTHING if value is None else f"{int(value):,}"


def share(value: Any, digits: int = 0) -> str:
    """A share as per cent."""
    if value is None:
        return NOTHING
    shown = f"{100 * value:.{digits}f}"
    return f"<{10**-digits:g} %" if value > 0 and float(shown) == 0 else f"{shown} %"


def flag(value: Any) -> str:
    """A verdict."""
    return NOTHING if value is None else "yes" if value else "no"


def jpeg(data: object) -> str | None:
    """A picture of the dataset as an address that holds it; None for what is no JPEG."""
    if not isinstance(data, bytes) or not is_jpeg(data):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def is_jpeg(data: bytes) -> bool:
    """Whether bytes begin as a JPEG does."""
    return data.startswith(_JPEG)


def cell(text: str) -> str:
    """A text for a spreadsheet, which must not take it for a formula."""
    return "'" + text if text.startswith(_FORMULA) or text.lstrip().startswith(_FORMULA) else text


def csv_line(cells: list[str]) -> str:
    """One line of a CSV file."""
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()


FILTERS = {
    f.__name__: f for f in (clean, said, peak, token, number, figure, probability, count, share, flag, jpeg)
}  # fmt: skip
