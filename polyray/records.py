"""Commit records: what a finished unit of work leaves behind, and how it is told from a damaged one.

Which question it answers: *is this unit done, and where are its rows?* Place in the flow: actors return receipts,
`store.py` puts them as records, everything that reads the dataset goes by them. A record carries a checksum and the
id of its run: one that was cut short, edited, or left by another run counts as damaged, not as a commit.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from polyray import files
from polyray.errors import StoreError
from polyray.schema import TABLES


@dataclass(frozen=True)
class PartInfo:
    """One Parquet file of one table.

    Args:
        path: relative to OUT, with `/` between folders.
        table: table that the rows belong to.
        layer: layer of all rows; None for tables that are not kept by layer.
        n_rows: rows in the file.
        n_bytes: size of the file.
        digest: `rows_digest` of the rows.
        sha256: of the file's bytes.
        start: row of the file at which the unit's rows begin; None where the file is the unit's alone.
    """

    path: str
    table: str
    layer: str | None
    n_rows: int
    n_bytes: int
    digest: str
    sha256: str
    start: int | None = None


@dataclass(frozen=True)
class Receipt:
    """A finished unit of work; survives JSON and pickling.

    Args:
        unit_key: the unit, unique in the run.
        parts: what it wrote; may be empty.
        seconds: how long it took; in no digest.
        host: where it ran; in no digest.
        stage: stage of the sweep that the unit belongs to.
    """

    unit_key: str
    parts: list[PartInfo]
    seconds: float
    host: str
    stage: str


@dataclass(frozen=True)
class Failed:
    """A unit that raised."""

    unit_key: str
    reason: str
    where: str
    """The last frames of its traceback."""
    fatal: bool
    """The dataset itself cannot be read or written: no other unit would fare better."""


_RECEIPT = TypeAdapter(Receipt)
# The checksum is over the text as it stands, so that a reader of thousands of records need not write them again.
_RECORD = re.compile(r'\{"checksum": "([0-9a-f]{64})", "run_id": "(\w*)", "receipt": (\{.*\})\}\n')


_DIGEST = re.compile(r"[0-9a-f]{64}")


class CopiedRecordError(StoreError):
    """A commit record under a name that is not its unit's."""


def record_name(unit_key: str) -> str:
    """File name of a unit's commit record."""
    return files.quoted(unit_key) + ".json"


def encode(receipt: Receipt, run_id: str) -> bytes:
    """A receipt as the bytes of its commit record."""
    content = json.dumps(asdict(receipt), sort_keys=True)
    return f'{{"checksum": "{_checksum(run_id, content)}", "run_id": "{run_id}", "receipt": {content}}}\n'.encode()


def decode(data: bytes, name: str, run_id: str) -> Receipt:
    """The receipt in a commit record.

    Args:
        data: bytes of the record.
        name: its file name.
        run_id: run that it must belong to.

    Raises:
        StoreError: the record is damaged; the message is a clause that says how.
    """
    found = _RECORD.fullmatch(data.decode(errors="replace"))
    if found is None:
        raise StoreError(f"it is not a whole record ({len(data)} bytes)")
    checksum, its_run_id, content = found.groups()
    if checksum != _checksum(its_run_id, content):
        raise StoreError("its checksum does not match: it was edited or damaged")
    if its_run_id != run_id:
        raise StoreError(f"it belongs to another run than {run_id}")
    try:
        receipt = _RECEIPT.validate_json(content, strict=True)
    except ValidationError as e:
        raise StoreError(f"it is not a receipt: {e.errors()[0]['loc']} {e.errors()[0]['msg']}") from e
    if record_name(receipt.unit_key) != name:
        raise CopiedRecordError(
            f"it is a copy of the record of unit {receipt.unit_key!r}, {record_name(receipt.unit_key)}"
        )
    for part in receipt.parts:
        segments = part.path.split("/")
        if not (_DIGEST.fullmatch(part.digest) and _DIGEST.fullmatch(part.sha256)):
            raise StoreError(f"it is not a receipt: {part.path!r} has no digest of 64 hexadecimal digits")
        if part.table not in TABLES or segments[0] != part.table or ".." in segments:
            raise StoreError(f"it names {part.path!r}, which is no part of table {part.table!r}")
    return receipt


def _checksum(run_id: str, content: str) -> str:
    return hashlib.sha256(f"{run_id} {content}".encode()).hexdigest()
