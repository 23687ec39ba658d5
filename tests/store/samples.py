"""A small made-up run: rows of every table from a seed, and units of work that write them."""

import errno
import itertools
import multiprocessing
import os
import random
import string
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow as pa

from polyray import files
from polyray.parts import full_schema
from polyray.records import Receipt
from polyray.schema import TABLES
from polyray.store import Store

IDENTITY = {"seed": 0, "mine.K": 100, "subject.name": "tiny", "contents.weights": "ab12", "schema_version": 1}
PROVENANCE = {"torch": "2.9.0", "device_class": "cpu", "polyray": "0.1.0"}
ODD_LAYERS = [
    "7",
    "a/b",
    "50%",
    "%41",
    "ü x",
    "_hidden",
    ".dot",
    "layer=3",
    "a\\b",
    "it's",
    "block[0]*?",
    "~",
    "L" * 300,
]


# No two attempts at a unit take the same time.
_SECONDS = itertools.count(0.5)


def new_store(out: Path) -> Store:
    store = Store(out)
    store.create_or_resume(IDENTITY, PROVENANCE, {"science": {}})
    store.acquire()
    return store


def held(out: Path) -> Store:
    """Another store of the same dataset, which has taken the lease over."""
    store = Store(out)
    store.acquire()
    return store


def records_in(out: Path) -> Path:
    """The folder of the records that count."""
    return max(p for p in (out / "commits").iterdir() if p.is_dir())


def value(kind: pa.DataType, rng: random.Random) -> object:
    if pa.types.is_list(kind):
        return [value(kind.value_type, rng) for _ in range(rng.randrange(4))]
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    if pa.types.is_integer(kind):
        return rng.randrange(-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1))
    if pa.types.is_floating(kind):
        return rng.choice([rng.randrange(-2048, 2048) / 64, float("inf"), float("nan"), -0.0])
    if pa.types.is_string(kind):
        return "".join(rng.choice(string.printable + "äß漢") for _ in range(rng.randrange(6)))
    return rng.randbytes(rng.randrange(6))


def rows_of(table: str, n: int, seed: int = 0, null_frac: float = 0.2) -> pa.Table:
    """n rows of a table; the key's columns are distinct and not null."""
    rng = random.Random(f"{table} {seed}")
    columns = {}
    for f in TABLES[table].schema:
        if f.name in TABLES[table].key:
            numeric = pa.types.is_integer(f.type) or pa.types.is_floating(f.type)
            values = list(range(n)) if numeric else [f"{i:05d}" for i in range(n)]
            rng.shuffle(values)
        else:
            values = [None if rng.random() < null_frac else value(f.type, rng) for _ in range(n)]
        columns[f.name] = pa.array(values, f.type)
    return pa.table(columns, schema=TABLES[table].schema)


def plain(rows: pa.Table) -> list[tuple[str, ...]]:
    """Rows as sorted tuples of text, NaN equal to NaN: equal exactly where two tables hold the same values."""
    return sorted(tuple(repr(v) for v in row.values()) for row in rows.to_pylist())


def layer_of(table: str, layer: str) -> str | None:
    return layer if TABLES[table].by_layer else None


def unit_key(i: int) -> str:
    return f"mine/blocks.{i % 3}/{i * 64:06d}-{i * 64 + 64:06d}"


def write_unit(store: Store, i: int, tables: tuple[str, ...] = ("mine_parts", "images")) -> Receipt:
    """The parts of unit i, not committed; the same rows for the same i."""
    parts = [store.write_part(t, unit_key(i), rows_of(t, 5, i), layer_of(t, f"blocks.{i % 3}")) for t in tables]
    return Receipt(unit_key(i), parts, seconds=next(_SECONDS), host="here", stage="mine")


def attempts(store: Store) -> dict[str, tuple[float, list[str]]]:
    """Which attempt at each unit was committed, and the digests of its parts, wherever they lie by now."""
    return {unit: (r.seconds, [p.digest for p in r.parts]) for unit, r in store.committed().items()}


def do_unit(store: Store, i: int) -> bool:
    return store.commit(write_unit(store, i))


def empty_rows(table: str) -> pa.Table:
    return full_schema(TABLES[table]).empty_table()


def no_link(*args: object, **kwargs: object) -> None:
    """`os.link` on a file system without hard links."""
    raise OSError(errno.EPERM, "no links")


def race(folder: Path, n_files: int, start: Barrier, results: "multiprocessing.Queue[list[list[bool]]]") -> None:
    """One of several processes that put the same files at the same time, with hard links and then without."""
    data = os.getpid().to_bytes(4, "little")[:1] * 100_000
    won = []
    for name in ("links", "no links"):
        if name == "no links":
            os.link = no_link
        won.append([])
        for i in range(n_files):
            start.wait(60)
            won[-1].append(files.put_if_absent(folder / name / f"{i}.json", data))
    results.put(won)
