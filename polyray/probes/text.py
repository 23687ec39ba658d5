"""Which question it answers: *which documents is a language model shown?*

Place in the flow: the probe set of the categorical census and of PSI over documents. A corpus is JSON lines, a Parquet
file, or a folder of plain text files; each may be gzipped. A document is an index into the corpus's fixed order. One
that cannot be used costs itself a reason, never the corpus.
"""

import gzip
import hashlib
import io
import json
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from polyray.errors import DataError, nearest
from polyray.probes.probe_set import text_of, visible

MAX_BYTES = 16 * 2**20
"""A document's UTF-8; above it, it is left out: tokenizers hold a document whole, at many times its size."""

_ROWS = 16
"""Rows of a Parquet file that are held at a time: what they take is bounded as long as a page of the file is."""
_JSON = (".jsonl", ".ndjson", ".json")
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError)


@dataclass(frozen=True)
class Document:
    """One document: a text, or the reason why there is none."""

    index: int
    text: str | None
    reason: str | None


class _Unusable(NamedTuple):
    """Stands for a document that cannot be used."""

    reason: str


_TOO_LARGE = _Unusable(f"too large: above {MAX_BYTES:,} bytes")

_Raw = bytes | str | _Unusable | None


class Corpus(ABC):
    """Documents in a fixed order.

    Opening one reads its labels, not the texts. It is not to be handed to another process: each opens its own.
    """

    kind: str
    name: str
    """What a report calls the corpus."""
    names: list[str]
    """What tells where each document lies: its file, its line, its row."""
    labels: list[str | None]
    """Label of each document; None where it has none."""

    def __len__(self) -> int:
        return len(self.names)

    def documents(self, which: range) -> Iterator[Document]:
        """Documents of a range in order.

        Raises:
            DataError: the file ended or broke off since the corpus was opened.
            IndexError: the range leaves the corpus.
        """
        if which.step != 1 or which.start < 0 or which.stop > len(self):
            raise IndexError(f"documents {which} of a corpus of {len(self):,}")
        try:
            for index, raw in zip(which, self._raw(which), strict=True):
                yield _document(index, raw)
        except _DAMAGE as e:
            raise DataError(f"corpus {self.name!r} cannot be read: {_short(e)}.") from e

    @abstractmethod
    def _raw(self, which: range) -> Iterator[_Raw]:
        """Text of each document as it is stored, or why it cannot be used; None where there is none."""

    def digest(self) -> str:
        """64 hexadecimal digits of SHA-256 over name, label and text of all documents. Reads the whole corpus."""
        digest = hashlib.sha256()
        for name, label, document in zip(self.names, self.labels, self.documents(range(len(self))), strict=True):
            for field in (name, label, document.text, document.reason):
                data = None if field is None else field.encode()
                digest.update(struct.pack("<q", -1 if data is None else len(data)) + (data or b""))
        return digest.hexdigest()

    def describe(self) -> dict[str, object]:
        """What run.json says of the corpus: JSON values only, no path."""
        return {
            "kind": self.kind,
            "name": self.name,
            "n": len(self),
            "n_classes": len({label for label in self.labels if label is not None}),
        }


def _document(index: int, raw: _Raw) -> Document:
    if isinstance(raw, _Unusable):
        return Document(index, None, raw.reason)
    if raw is None:
        return Document(index, None, "no text")
    try:
        data = raw if isinstance(raw, bytes) else raw.encode()
        text = data.decode()
    except UnicodeError:
        return Document(index, None, "no valid UTF-8")
    if len(data) > MAX_BYTES:
        return Document(index, None, _TOO_LARGE.reason)
    if not text.strip():
        return Document(index, None, "empty")
    return Document(index, text, None)


def _short(e: BaseException) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def open_corpus(path: str, text_column: str = "text", label_column: str | None = None) -> Corpus:
    """Opens a corpus.

    Args:
        path: a file of JSON lines (`.jsonl`, `.ndjson`, `.json`) or Parquet (`.parquet`), or a folder of `.txt` files,
            directly or in sub-folders, which then are their labels. Each may end in `.gz`.
        text_column: of JSON lines and Parquet: which field is the text.
        label_column: which field is the label; by default `label` where there is one.

    Raises:
        DataError: the corpus as a whole cannot be used: missing, damaged, of no known kind, without documents, or
            without the columns asked for.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return FolderCorpus(place)
    if not place.is_file():
        raise DataError(f"corpus {path!r} does not exist. Give a file of JSON lines or Parquet, or a folder of texts.")
    ending = Path(place.name.lower().removesuffix(".gz")).suffix
    try:
        if ending in _JSON:
            return JsonCorpus(place, text_column, label_column)
        if ending == ".parquet":
            return ParquetCorpus(place, text_column, label_column)
    except _DAMAGE as e:
        raise DataError(f"corpus {path!r} cannot be read: {_short(e)}.") from e
    raise DataError(
        f"corpus {path!r} is of no known kind: expected {', '.join(_JSON)} or .parquet, each with or without .gz, "
        "or a folder of .txt files."
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with cast(BinaryIO, gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")) as file:
        yield file


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Where each line begins that is not blank, and the line; None for one that is too large to be held."""
    limit = 2 * MAX_BYTES  # JSON escapes what UTF-8 writes in fewer bytes
    while True:
        start = file.tell()
        line = file.readline(limit)
        if not line:
            return
        if len(line) == limit and not line.endswith(b"\n"):
            while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                pass
            yield start, None
        elif line.strip():
            yield start, line


class JsonCorpus(Corpus):
    """One JSON object a line; blank lines are no documents."""

    kind = "json_lines"

    def __init__(self, path: Path, text_column: str, label_column: str | None) -> None:
        self.name = text_of(path.name)
        self._path, self._text = path, text_column
        self._starts: list[int] = []
        self.names, self.labels = [], []
        fields: set[str] = set()
        with _opened(path) as file:
            for start, line in _lines(file):
                self._starts.append(start)
                self.names.append(f"document {len(self._starts)}")
                fields_here = _object(line)
                fields.update(fields_here)
                self.labels.append(_label(fields_here.get(label_column or "label")))
        if not self._starts:
            raise DataError(f"corpus {self.name!r} has no documents.")
        for column in (text_column, label_column):
            if column is not None and column not in fields:
                raise DataError(f"no document of corpus {self.name!r} has {column!r}.{nearest(column, sorted(fields))}")

    def _raw(self, which: range) -> Iterator[_Raw]:
        if not which:
            return
        with _opened(self._path) as file:
            file.seek(self._starts[which.start])
            lines = _lines(file)
            for _ in which:
                _, line = next(lines, (0, b""))
                if line == b"":
                    raise EOFError("the file has ended since it was opened")
                yield _TOO_LARGE if line is None else self._text_of(line)

    def _text_of(self, line: bytes) -> _Raw:
        try:
            found = json.loads(line)
        except UnicodeDecodeError:
            return _Unusable("no valid UTF-8")
        except (ValueError, RecursionError):
            return _Unusable("no valid JSON")
        text = found.get(self._text) if isinstance(found, dict) else None
        return text if isinstance(text, str) else None


def _object(line: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(line or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _label(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None or isinstance(value, (dict, list)) else str(value).encode("utf-8", "replace").decode()


class ParquetCorpus(Corpus):
    """One row a document."""

    kind = "parquet"

    def __init__(self, path: Path, text_column: str, label_column: str | None) -> None:
        self.name = text_of(path.name)
        self._path, self._text = path, text_column
        file = self._file()
        fields = file.schema_arrow.names
        label_column = label_column or ("label" if "label" in fields else None)
        for column in (text_column, label_column):
            if column is not None and column not in fields:
                raise DataError(f"corpus {self.name!r} has no column {column!r}.{nearest(column, fields)}")
            if fields.count(column) > 1:
                raise DataError(f"corpus {self.name!r} has {fields.count(column)} columns {column!r}; name them apart.")
        kind = file.schema_arrow.field(text_column).type
        if not _is_text(kind):
            raise DataError(f"column {text_column!r} of corpus {self.name!r} holds {kind}, not text.")
        n = file.metadata.num_rows
        if n == 0:
            raise DataError(f"corpus {self.name!r} has no documents.")
        self.names = [f"row {row}" for row in range(n)]
        self.labels = [None] * n if label_column is None else _labels(file.read([label_column])[label_column])
        self._ends: list[int] = []
        for group in range(file.metadata.num_row_groups):
            self._ends.append((self._ends[-1] if self._ends else 0) + file.metadata.row_group(group).num_rows)

    def _file(self) -> pq.ParquetFile:
        if self._path.name.lower().endswith(".gz"):
            with _opened(self._path) as file:
                return pq.ParquetFile(io.BytesIO(file.read()))
        return pq.ParquetFile(self._path, memory_map=True)

    def _raw(self, which: range) -> Iterator[_Raw]:
        if not which:
            return
        file = self._file()
        start = 0
        for group, end in enumerate(self._ends):
            if start < which.stop and end > which.start:
                row = start
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[self._text]):
                    column = _as_bytes(batch.column(0))
                    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy()
                    for value, size in zip(column, sizes, strict=True):
                        if which.start <= row < which.stop:
                            yield _TOO_LARGE if size > MAX_BYTES else value.as_py()
                        row += 1
            start = end


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts as bytes: one that is no UTF-8 is to cost itself, not those beside it."""
    kind = column.type
    return column.cast(kind.value_type if pa.types.is_dictionary(kind) else kind).cast(pa.large_binary())


def _labels(column: pa.ChunkedArray) -> list[str | None]:
    return [_label(value) for value in (_as_bytes(column) if _is_text(column.type) else column).to_pylist()]


class FolderCorpus(Corpus):
    """Text files of a folder, sorted by name; those in its sub-folders are labelled with the sub-folder's name."""

    kind = "text_folder"

    def __init__(self, root: Path) -> None:
        self.name = text_of(root.resolve().name)
        try:
            found: list[tuple[str | None, Path]] = [(None, path) for path in _texts(root)]
            for folder in visible(entry.name for entry in root.iterdir() if entry.is_dir()):
                found += [(text_of(folder), path) for path in _texts(root / folder)]
        except OSError as e:
            raise DataError(f"corpus {str(root)!r} cannot be listed: {e.strerror}.") from e
        if not found:
            raise DataError(f"corpus {str(root)!r} holds no .txt or .txt.gz files, directly or in its sub-folders.")
        self.labels = [label for label, _ in found]
        self.names = [text_of(path.name) if label is None else f"{label}/{text_of(path.name)}" for label, path in found]
        self._paths = [path for _, path in found]

    def _raw(self, which: range) -> Iterator[_Raw]:
        for index in which:
            try:
                with _opened(self._paths[index]) as file:
                    yield file.read(MAX_BYTES + 1)
            except _DAMAGE as e:
                yield _Unusable(f"cannot be read: {getattr(e, 'strerror', None) or type(e).__name__}")


def _texts(folder: Path) -> list[Path]:
    names = visible(entry.name for entry in folder.iterdir() if not entry.is_dir())
    return [folder / name for name in names if name.lower().endswith((".txt", ".txt.gz"))]
