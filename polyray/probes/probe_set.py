"""Which question it answers: *what does every probe set offer, whatever it is read from?*

Place in the flow: the sources (`tiny_imagenet`, `image_folder`, `image_table`, `generated`) derive from what stands
here; everything else imports it from `polyray.probes.images`. An example is an index into the set's sorted list.
"""

import hashlib
import os
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from polyray.errors import DataError
from polyray.probes.pixels import MAX_BYTES, Pixels, decode


class ProbeSet(ABC):
    """Labelled pictures in a fixed order.

    Constructing one lists the examples and reads no picture: every worker opens its own. It is not to be handed to
    another process, which would share its open files.
    """

    kind: str
    """The config's `kind`."""
    name: str
    """What a report calls the set."""
    names: list[str]
    """File name or row of each example, relative to the set."""
    labels: list[str]
    """Class of each example; empty where the source gives none (such an example cannot be read)."""
    notes: list[str]
    """What a reader of the results has to know about the set."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, example: int) -> Pixels:
        """Decoded RGB of one example at its original size, shape [height, width, 3].

        Raises:
            DataError: this one picture cannot be used; the message is a short reason that names no path.
            IndexError: there is no such example.
        """

    @abstractmethod
    def digest(self) -> str:
        """64 hexadecimal digits of SHA-256 that say what the set holds, wherever it lies. Reads the whole set."""

    def describe(self) -> dict[str, object]:
        """What run.json says of the set: JSON values only, no path."""
        return {
            "kind": self.kind,
            "name": self.name,
            "n": len(self),
            "n_classes": len(set(self.labels) - {""}),
            "notes": list(self.notes),
        }


class EncodedSet(ProbeSet):
    """A probe set whose pictures are stored as encoded bytes."""

    @abstractmethod
    def encoded(self, example: int) -> bytes:
        """Bytes of one example as stored; raises `DataError` where there are none to be had."""

    def read(self, example: int) -> Pixels:
        return decode(self.encoded(example))

    def digest(self) -> str:
        """SHA-256 over name, label and encoded bytes of all examples in order.

        Each is preceded by its length. An example whose bytes cannot be had counts as such, with the length −1.
        """
        digest = hashlib.sha256()
        for example, (name, label) in enumerate(zip(self.names, self.labels, strict=True)):
            for text in (name, label):
                field = text.encode()
                digest.update(struct.pack("<q", len(field)) + field)
            try:
                data = self.encoded(example)
            except DataError:
                digest.update(struct.pack("<q", -1))
            else:
                digest.update(struct.pack("<q", len(data)) + data)
        return digest.hexdigest()


def spread(n: int, limit: int | None) -> list[int]:
    """Indices of `limit` items spread evenly over `n`, ascending; all of them where `limit` is None or above `n`."""
    if limit is None or limit >= n:
        return list(range(n))
    return [i * n // limit for i in range(limit)]


def distinct_labels(names: Mapping[str, str]) -> dict[str, str]:
    """Class identity -> label, where a name that several classes share gets the identity in parentheses."""
    shared = Counter(names.values())
    return {key: name if shared[name] == 1 else f"{name} ({key})" for key, name in names.items()}


def text_of(file_name: str) -> str:
    """A file name as text that can be written as UTF-8; undecodable bytes are escaped."""
    return os.fsencode(file_name).decode("utf-8", "backslashreplace")


def visible(names: Iterable[str]) -> list[str]:
    """Names that are not hidden, sorted by code point (the same under every locale)."""
    return sorted(name for name in names if not name.startswith("."))


def read_file(path: Path) -> bytes:
    """Bytes of one image file.

    Raises:
        DataError: it is no regular file, cannot be opened, or is larger than `MAX_BYTES`.
    """
    if not path.is_file():
        raise DataError("not a file, or a link to nothing")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise DataError(f"cannot be read: {e.strerror or type(e).__name__}") from e
    if len(data) > MAX_BYTES:
        raise DataError(f"too large: above {MAX_BYTES:,} bytes")
    return data


def existing(path: str, what: str) -> Path:
    """The path, with `~` resolved.

    Raises:
        DataError: nothing lies there; the message says that `what` belongs there.
    """
    resolved = Path(path).expanduser()
    try:
        found = resolved.exists()
    except OSError as e:
        raise DataError(f"probe.path {path!r} cannot be read: {e.strerror}.") from e
    if not found:
        raise DataError(f"probe.path {path!r} does not exist. Place {what} there, or set probe.path to where it lies.")
    return resolved
