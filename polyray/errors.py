"""What can go wrong, as one tree of exceptions.

Place in the flow: a leaf; everything imports it, it imports nothing. Every message says what, which value,
what is allowed, and what to do. `cli.py` turns the classes into exit codes.
"""

import difflib
from collections.abc import Iterable


class PolyrayError(Exception):
    """Root of every error that polyray raises on purpose."""


class ConfigError(PolyrayError):
    """The config asks for something that does not exist or cannot be (exit code 2, nothing written)."""


class DataError(PolyrayError):
    """A probe set or a prompt file cannot be used as a whole (exit code 2); one bad image is a row instead."""


class ModelError(PolyrayError):
    """A subject or an encoder cannot be built, or its weights do not fit (exit code 2)."""


class StageError(PolyrayError):
    """A stage ended with failed units, so that the stages after it cannot run (exit code 3)."""


class StoreError(PolyrayError):
    """The dataset cannot be read or written as asked: another run's OUT, a full disk, a damaged record."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the nearest valid choices, for the end of an error message.

    Args:
        name: what was asked for.
        known: the valid choices; may be empty.

    Returns:
        `" Did you mean 'a' or 'b'?"` where something is near, else the first dozen valid choices, else `""`.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return ""
    shown = ", ".join(repr(k) for k in known[:12])
    return f" Valid: {shown}{', …' if len(known) > 12 else ''}."
