"""Compaction: many small parts of a table and layer become a few large ones, with the same rows and digests.

Which question it answers: *which files belong together, and what do the units' rows lie in afterwards?* Place in the
flow: `store.py` asks for it at the end of a stage and makes the outcome count. Every unit's rows stay together and in
their order, a manifest says where they begin, and the digest of a table, which is over its units, stays what it was.
Parts are streamed: of a file that is written no more than one row group is in memory, of those that are read `_AHEAD`.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from polyray import files, manifest
from polyray.errors import StoreError
from polyray.parts import folder_name, new_name, new_parquet, table_named

SMALL_BYTES = 64 * 1024**2
"""A smaller part is merged with others of its table and layer."""
ENOUGH_BYTES = 96 * 1024**2
"""A merged part that has so much takes no more. It has less than 256 MB even with one more of almost `SMALL_BYTES` and
a remainder that is smaller than that."""
ROW_GROUP_BYTES = 8 * 1024**2
"""Of rows in memory: what a reader of one unit has to read at least."""

# An object store answers slowly, and many at a time.
_AHEAD = 16
_AHEAD_BYTES = SMALL_BYTES


def groups(units: pa.Table, stage: str | None = None) -> list[list[str]]:
    """Which files to merge into one: of one table and layer, in the order of their first units.

    Args:
        units: rows of a manifest.
        stage: only files all of whose units are of this stage; by default all files.
    """
    codes, paths = _files(units)
    first = np.unique(codes, return_index=True)[1]
    first = np.sort(first[codes[first] >= 0])
    is_wanted = np.ones(len(paths), bool)
    if stage is not None:
        is_other = pc.not_equal(manifest.texts(units, "stage"), stage).to_numpy()
        is_wanted[codes[is_other & (codes >= 0)]] = False
    of_file = units.select(["table", "layer", "n_bytes"]).take(pa.array(first)).to_pylist()
    together: dict[tuple[str, str | None], list[tuple[str, int]]] = {}
    for code, row in zip(codes[first].tolist(), of_file, strict=True):
        if is_wanted[code] and row["n_bytes"] < SMALL_BYTES:
            together.setdefault((row["table"], row["layer"]), []).append((paths[code], row["n_bytes"]))
    runs = [run for small in together.values() for run in _cut(small)]
    return [[path for path, _ in run] for run in runs if len(run) > 1]


def merge(place: files.Place, units: pa.Table, chosen: Sequence[Sequence[str]], run_id: str) -> pa.Table:
    """Writes one file for each group of files, which stay.

    Args:
        place: where the dataset lies.
        units: rows of a manifest; of the files, only what these rows name is kept.
        chosen: groups of files, each of one table and layer.
        run_id: the run.

    Returns:
        The same rows, which name the new files.

    Raises:
        StoreError: a part is missing, is not what was committed, or the new file cannot be written.
    """
    codes, paths = _files(units)
    code_of = {path: code for code, path in enumerate(paths)}
    starts = units["start"].combine_chunks().fill_null(0).to_numpy().copy()
    n_rows = units["n_rows"].combine_chunks().fill_null(0).to_numpy()
    order = np.lexsort((starts, codes))
    bounds = np.searchsorted(codes[order], np.arange(len(paths) + 1))
    moved = np.zeros(units.num_rows, bool)
    new_paths, new_sizes, new_hashes = list(paths), [0] * len(paths), [b""] * len(paths)
    for group in chosen:
        rows_of = [order[bounds[code_of[path]] : bounds[code_of[path] + 1]] for path in group]
        first = units.slice(int(rows_of[0][0]), 1).to_pylist()[0]
        spec = table_named(first["table"])
        folder = folder_name(spec, first["layer"])
        sizes, hashes = (units[c].take(pa.array([r[0] for r in rows_of])).to_pylist() for c in ("n_bytes", "sha256"))
        with files.explained("merge parts in", place.at(folder)):
            path = new_name(place, folder, "merged")
            with place.stream(path) as out:
                sink = _Hashed(out)
                with new_parquet(sink, spec.schema, run_id) as writer:
                    into, offset = _RowGroups(writer), 0
                    for i, data in enumerate(_ahead(place, group, sizes)):
                        if hashlib.sha256(data).digest() != hashes[i]:
                            raise StoreError(f"part {place.at(group[i])!r} is not what was committed, and was not "
                                             "merged: restore it, or run the sweep into a new OUT.")  # fmt: skip
                        into.add(data, starts[rows_of[i]], n_rows[rows_of[i]])
                        n = n_rows[rows_of[i]]
                        starts[rows_of[i]] = offset + np.cumsum(n) - n
                        offset += int(n.sum())
                    into.flush()
        for i, old in enumerate(group):
            moved[rows_of[i]] = True
            new_paths[code_of[old]] = path
            new_sizes[code_of[old]], new_hashes[code_of[old]] = sink.n_bytes, sink.sha256
    return _moved(units, moved, codes, starts, (new_paths, new_sizes, new_hashes))


def shared(units: pa.Table, rest: pa.Table) -> list[str]:
    """The files of some units that hold rows of the others, too."""
    return sorted(set(manifest.names(units, "path")) & set(manifest.names(rest, "path")))


class _Hashed:
    """Counts and hashes what is written. As much of a file as Arrow asks for."""

    closed = False

    def __init__(self, out: files.Writer) -> None:
        self._out, self._hash, self.n_bytes = out, hashlib.sha256(), 0

    @property
    def sha256(self) -> bytes:
        return self._hash.digest()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._out.write(data)
        self.n_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.n_bytes

    def flush(self) -> None:
        """Whoever owns the file does that."""

    close = flush


class _RowGroups:
    """Gathers rows until they make a row group."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._held: list[pa.Table] = []
        self._n_bytes = 0

    def add(self, data: bytes, starts: NDArray[np.int64], n_rows: NDArray[np.int64]) -> None:
        """The rows of a part that are named, which may leave some out."""
        file = pq.ParquetFile(pa.BufferReader(data))
        total = file.metadata.num_rows
        named = np.zeros(total, bool)
        for start, n in zip(starts.tolist(), n_rows.tolist(), strict=True):
            named[start : start + n] = True
        if named.sum() != n_rows.sum():
            raise StoreError(f"a part has {total} rows where {n_rows.sum()} were committed: see `polyray verify`.")
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        n_at_once = max(1, total * ROW_GROUP_BYTES // max(size, 1))
        position = 0
        for batch in file.iter_batches(batch_size=n_at_once):
            chosen = named[position : position + batch.num_rows]
            position += batch.num_rows
            rows = pa.Table.from_batches([batch])
            self._hold(rows if chosen.all() else rows.filter(pa.array(chosen)))

    def flush(self) -> None:
        """Writes what is held."""
        if self._held:
            rows = pa.concat_tables(self._held)
            self._writer.write_table(rows, row_group_size=max(1, rows.num_rows))
            self._held, self._n_bytes = [], 0

    def _hold(self, rows: pa.Table) -> None:
        self._held.append(rows.replace_schema_metadata(self._writer.schema.metadata))
        self._n_bytes += rows.nbytes
        if self._n_bytes >= ROW_GROUP_BYTES:
            self.flush()


def _ahead(place: files.Place, paths: Sequence[str], sizes: Sequence[int]) -> Iterator[bytes]:
    """The bytes of files, in order; while one is used the next are read."""
    waiting: deque[tuple[Future[bytes], int]] = deque()
    n_bytes = 0
    with ThreadPoolExecutor(_AHEAD) as pool:
        for path, size in zip(paths, sizes, strict=True):
            while waiting and (len(waiting) >= _AHEAD or n_bytes + size > _AHEAD_BYTES):
                future, its = waiting.popleft()
                n_bytes -= its
                yield future.result()
            waiting.append((pool.submit(place.read, path), size))
            n_bytes += size
        for future, _ in waiting:
            yield future.result()


def _cut(small: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Runs of files that are large enough together; what is left at the end joins the run before it."""
    runs: list[list[tuple[str, int]]] = []
    size = ENOUGH_BYTES
    for file in small:
        if size >= ENOUGH_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(file)
        size += file[1]
    if len(runs) > 1 and size < SMALL_BYTES:
        runs[-2:] = [runs[-2] + runs[-1]]
    return runs


def _files(units: pa.Table) -> tuple[NDArray[np.int64], list[str]]:
    """Of every row the number of its file, −1 where there is none; the files."""
    column = units["path"].combine_chunks()
    return column.indices.fill_null(-1).to_numpy().astype(np.int64), column.dictionary.to_pylist()


def _moved(
    units: pa.Table,
    moved: NDArray[np.bool_],
    codes: NDArray[np.int64],
    starts: NDArray[np.int64],
    new: tuple[list[str], list[int], list[bytes]],
) -> pa.Table:
    """Rows that name their new files."""
    if not new[0]:
        return units
    is_moved, of = pa.array(moved), pa.array(np.maximum(codes, 0))
    values: dict[str, pa.Array] = {
        "path": pa.array(new[0], pa.string()).take(of),
        "n_bytes": pa.array(new[1], pa.int64()).take(of),
        # What is not moved has no new hash, and none is looked at.
        "sha256": pa.array([sha256 or None for sha256 in new[2]], pa.binary(32)).take(of),
        "start": pa.array(starts),
    }
    for name, moved_to in values.items():
        column = pc.if_else(is_moved, moved_to, units[name].combine_chunks().cast(moved_to.type))
        field = manifest.COLUMNS.field(name)
        if pa.types.is_dictionary(field.type):
            column = column.dictionary_encode()
        units = units.set_column(units.schema.get_field_index(name), field, column)
    return units
