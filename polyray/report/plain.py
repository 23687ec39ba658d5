"""Plain: figures and text of a dataset as people may see them.

Which question it answers: *how is this value written?* Place in the flow: a leaf of the report. Names of classes,
files, prompts and tokens are data: they are shown as text, with what is invisible or would turn the order of letters
round made visible. A missing figure is a dash, never 0.
"""

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

NOTHING = "–"
"""Stands where there is no figure; the table's note says why."""
LONGEST = 240
"""Letters of a text of the dataset that are shown; the rest is left out, which an ellipsis says."""

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_INVISIBLE = re.compile(f"[\x00-\x1f\x7f-\x9f{_BIDI}\u200b\u2028\u2029\ufeff\ufff9-\ufffb]")


def visible(text: object, longest: int = LONGEST) -> str:
    """A text of the dataset, with control characters and marks of direction as something that can be seen.

    Args:
        text: a name, token, reason or the like; None is a dash.
        longest: letters that are kept.

    Returns:
        C0 controls as their pictures (`␀`), other controls and marks of direction as `⟨U+202E⟩`. It still has to be
        escaped for where it goes.
    """
    if text is None:
        return NOTHING
    written = str(text)
    written = written if len(written) <= longest else written[: longest - 1] + "…"
    return _INVISIBLE.sub(_pictured, written)


def network_name(run: Mapping[str, Any]) -> str | None:
    """What the network under study is called: of a folder or file the last part of its path; None where nothing says.

    Args:
        run: what run.json holds.
    """
    provenance = run.get("provenance") or {}
    about = provenance.get("subject") or provenance.get("model") or {}
    name = about.get("name") if isinstance(about, Mapping) else None
    if not name:
        return None
    # Names of hubs have a slash as well: openai-community/gpt2.
    is_path = str(name).startswith(("/", ".", "~")) or str(name).count("/") > 1
    return PurePath(str(name)).name if is_path else str(name)


def _pictured(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits after the point."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    written = f"{value:,.{digits}f}"
    return written.removeprefix("-") if float(written.replace(",", "")) == 0 else written.replace("-", "−")


def count(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None else f"{int(value):,}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share, 0 to 1, in per cent."""
    written = number(None if value is None else 100 * value, digits)
    return written if written == NOTHING else written + "\u00a0%"


def p_value(value: float | None) -> str:
    """A p or q: two digits that count."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.2g}" if value == 0 or value >= 1e-4 else f"{value:.1e}"


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A figure with its interval in brackets, where it has one."""
    written = number(value, digits)
    if written == NOTHING or low is None or high is None:
        return written
    return f"{written} ({number(low, digits)} to {number(high, digits)})"


def percent_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A share with its interval, in per cent."""
    if value is None or low is None or high is None:
        return percent(value)
    return f"{percent(value)} ({number(100 * low, 1)} to {number(100 * high, 1)})"
