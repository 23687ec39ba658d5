"""Logs for machines: one JSON object a line.

Which question it answers: *what happened when, to which unit?* Place in the flow: a leaf; whoever does something calls
`event`, `cli.py` says where the lines go. Nothing is formatted where nobody listens.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from polyray.errors import ConfigError

_EVENTS = logging.getLogger("polyray.events")
_FIELDS = "polyray_fields"


def event(name: str, **fields: object) -> None:
    """Something happened; fields are JSON values, those that are None are left out."""
    if _EVENTS.isEnabledFor(logging.INFO):
        _EVENTS.info(name, extra={_FIELDS: {k: v for k, v in fields.items() if v is not None}})


class JsonLines(logging.Formatter):
    """A record as one line: time (UTC), level, logger, event or message, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object without a line break."""
        told: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "event" if record.name == _EVENTS.name else "message": record.getMessage(),
        }
        told |= getattr(record, _FIELDS, {})
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def to_people() -> None:
    """Warnings and worse on standard error, as lines of text."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)  # events pass the loggers, but are not for people


@contextmanager
def to_machines(where: str | None) -> Iterator[None]:
    """Sends every event, and every record of polyray's, somewhere for as long as it lasts.

    Args:
        where: a file, which is added to; `-` for standard error; None for nowhere.

    Raises:
        ConfigError: the file cannot be written.
    """
    if where is None:
        yield
        return
    handler: logging.Handler
    try:
        handler = logging.StreamHandler(sys.stderr) if where == "-" else logging.FileHandler(where, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write logs to {where!r}: {e.strerror}. Give another file to --log-json.") from e
    handler.setFormatter(JsonLines())
    root = logging.getLogger("polyray")
    before = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = where != "-"  # else warnings would come twice, once as text
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]
        handler.close()
