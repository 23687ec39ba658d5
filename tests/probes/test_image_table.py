"""Parquet and Arrow tables: every column type, rows without picture or label, bounded reading."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from probes.pictures import encode, picture

from polyray.config import ImageTable
from polyray.errors import DataError
from polyray.probes import image_table
from polyray.probes.image_table import TableSet

N = 11
BYTES = [encode(picture(i)) for i in range(N)]
LABELS = ["cat", "dog", "cat", "owl", "dog", "cat", "cat", "owl", "owl", "dog", "cat"]
CODES = [{"cat": 0, "dog": 1, "owl": 2}[label] for label in LABELS]


def opened(path: Path, **rest: object) -> TableSet:
    return TableSet(ImageTable.model_validate({"kind": "table", "path": str(path), **rest}))


def table(images: pa.Array | None = None, labels: pa.Array | None = None) -> pa.Table:
    images = pa.array(BYTES, pa.binary()) if images is None else images
    return pa.table({"id": range(N), "image": images, "label": pa.array(LABELS) if labels is None else labels})


def write(table: pa.Table, path: Path, rows: int = 4) -> Path:
    """The table in batches or row groups of `rows`, in the format that the ending says; `.stream` is Arrow's."""
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path, row_group_size=rows)
        case ".feather":
            pyarrow.feather.write_feather(table, path, chunksize=rows)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=rows)
        case ".stream":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("ending", ["parquet", "feather", "arrow", "stream"])
def test_formats(tmp_path: Path, ending: str) -> None:
    probe = opened(write(table(), tmp_path / f"t.{ending}"))
    assert probe.labels == LABELS
    assert probe.names == [f"row {i}" for i in range(N)]
    assert probe.describe() == {"kind": "table", "name": "t", "n": N, "n_classes": 3, "notes": []}
    for example in (3, 0, 10, 9, 3, 4, 5, 1):
        assert np.array_equal(probe.read(example), picture(example))


def test_the_digest_does_not_depend_on_the_format(tmp_path: Path) -> None:
    struct = pa.array([{"bytes": b, "path": None} for b in BYTES])
    digests = {opened(write(table(), tmp_path / f"t.{e}")).digest() for e in ("parquet", "feather", "arrow", "stream")}
    digests.add(opened(write(table(struct), tmp_path / "s.parquet", rows=3)).digest())
    assert len(digests) == 1
    other = table(pa.array([*BYTES[:-1], BYTES[0]], pa.binary()))
    assert opened(write(other, tmp_path / "o.parquet")).digest() not in digests


STRUCT = pa.struct({"path": pa.string(), "bytes": pa.binary()})


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT])
def test_image_columns(tmp_path: Path, kind: pa.DataType) -> None:
    values = [{"path": f"{i}.png", "bytes": b} for i, b in enumerate(BYTES)] if pa.types.is_struct(kind) else BYTES
    probe = opened(write(table(pa.array(values, kind)), tmp_path / "t.parquet"))
    assert np.array_equal(probe.read(7), picture(7))


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint16()])
def test_integer_labels_without_names(tmp_path: Path, kind: pa.DataType) -> None:
    assert opened(write(table(labels=pa.array(CODES, kind)), tmp_path / "t.parquet")).labels == [str(c) for c in CODES]


def test_integer_labels_with_the_names_of_hugging_face(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    codes = [-1, 0, 1, 2, *[0] * 7]
    tab = table(labels=pa.array(codes)).replace_schema_metadata(metadata)
    for ending in ("parquet", "stream"):
        # −1 and 2 have no name: they stay numbers, and do not count from the end.
        assert opened(write(tab, tmp_path / f"t.{ending}")).labels[:5] == ["-1", "cat", "dog", "2", "cat"]


@pytest.mark.parametrize("metadata", [{"huggingface": "no json"}, {"huggingface": '{"info": []}'}, {"pandas": "{}"}])
def test_other_metadata_is_ignored(tmp_path: Path, metadata: dict[str, str]) -> None:
    tab = table(labels=pa.array(CODES)).replace_schema_metadata(metadata)
    assert opened(write(tab, tmp_path / "t.parquet")).labels[0] == "0"


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_dictionary_labels(tmp_path: Path, ending: str) -> None:
    tab = table(labels=pa.array(LABELS).dictionary_encode())
    assert opened(write(tab, tmp_path / f"t.{ending}")).labels == LABELS


def test_rows_without_picture_or_label_cost_themselves(tmp_path: Path) -> None:
    struct = [{"bytes": b, "path": "x.png"} for b in BYTES]
    struct[2] = {"bytes": None, "path": "x.png"}
    struct[5] = None
    struct[6] = {"bytes": b"", "path": None}
    struct[7] = {"bytes": BYTES[7][:-30], "path": None}
    labels = [*LABELS[:9], None, ""]
    path = write(table(pa.array(struct), pa.array(labels)), tmp_path / "t.parquet")
    probe = opened(path)
    assert len(probe) == N
    assert probe.labels[8:] == ["owl", "", ""]
    assert probe.describe()["n_classes"] == 3
    for row, reason in {
        2: "no image bytes in this row",
        5: "no image bytes in this row",
        6: "empty file",
        7: "truncated or damaged PNG image",
        9: "no label",
        10: "no label",
    }.items():
        with pytest.raises(DataError, match=f"^{reason}$"):
            probe.read(row)
    assert np.array_equal(probe.read(8), picture(8))
    assert probe.digest() == opened(path).digest()


def test_null_bytes_in_a_binary_column(tmp_path: Path) -> None:
    probe = opened(write(table(pa.array([None, *BYTES[1:]], pa.binary())), tmp_path / "t.parquet"))
    with pytest.raises(DataError, match=r"^no image bytes in this row$"):
        probe.read(0)
    assert np.array_equal(probe.read(1), picture(1))


def test_limit_keeps_names_labels_and_pictures_together(tmp_path: Path) -> None:
    probe = opened(write(table(), tmp_path / "t.parquet"), limit=4)
    kept = [0, 2, 5, 8]
    assert probe.names == [f"row {i}" for i in kept]
    assert probe.labels == [LABELS[i] for i in kept]
    assert all(np.array_equal(probe.read(i), picture(row)) for i, row in enumerate(kept))


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    write(table().slice(6), tmp_path / "b.parquet")
    write(table().slice(0, 6), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not a table")
    (tmp_path / ".c.parquet").write_text("hidden")
    probe = opened(tmp_path)
    assert probe.labels == LABELS
    assert probe.names[5:7] == ["a.parquet row 5", "b.parquet row 0"]
    assert all(np.array_equal(probe.read(i), picture(i)) for i in range(N))


def test_columns_of_other_names(tmp_path: Path) -> None:
    tab = table().rename_columns(["id", "img.data", "fine label"])
    probe = opened(write(tab, tmp_path / "t.parquet"), image_column="img.data", label_column="fine label")
    assert probe.labels == LABELS
    assert np.array_equal(probe.read(4), picture(4))


@pytest.mark.parametrize("ending", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize(("column", "near"), [("image_column", "image"), ("label_column", "label")])
def test_a_missing_column_names_the_nearest(tmp_path: Path, ending: str, column: str, near: str) -> None:
    path = write(table(), tmp_path / f"t.{ending}")
    with pytest.raises(DataError, match=rf"probe\.{column}: 't\..*' has no column '{near}s'\. Did you mean '{near}'\?"):
        opened(path, **{column: f"{near}s"})


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write(table().rename_columns(["label", "image", "label"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="has several columns 'label'; rename all but one"):
        opened(path)


def test_columns_of_the_wrong_type(tmp_path: Path) -> None:
    path = write(table(labels=pa.array(np.linspace(0, 1, N))), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"label_column: column 'label' .* is double; it must be text or integer"):
        opened(path)
    with pytest.raises(DataError, match=r"image_column: column 'id' .* is int64; it must be encoded images as binary"):
        opened(path, image_column="id")


def test_paths_that_are_no_table(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow", "empty.arrow"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"ARROW? no, just some text")
        with pytest.raises(DataError, match="is not a readable Parquet or Arrow table"):
            opened(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder' is a folder without \.parquet files"):
        opened(tmp_path / "folder")
    with pytest.raises(DataError, match=r"gone' does not exist\. Place a \.parquet, \.arrow or \.feather file"):
        opened(tmp_path / "gone")
    with pytest.raises(DataError, match="is a table without rows"):
        opened(write(table().slice(0, 0), tmp_path / "none.parquet"))


def test_damage_inside_a_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(table(), path, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 12] = b"\xff" * 12
    path.write_bytes(data)
    probe = opened(path)
    for row in (4, 7):
        with pytest.raises(DataError, match=r"^damaged in the table$"):
            probe.read(row)
    assert np.array_equal(probe.read(3), picture(3))
    assert np.array_equal(probe.read(8), picture(8))


@pytest.mark.parametrize("ending", ["parquet", "stream"])
def test_memory_is_bounded_and_any_order_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(image_table, "CACHE_BYTES", 3_000)
    monkeypatch.setattr(image_table, "_BATCH_ROWS", 5)
    rng = np.random.Generator(np.random.Philox(key=12))
    payload = [i.to_bytes(2, "big") * int(rng.integers(1, 300)) for i in range(400)]
    tab = pa.table({"image": pa.array(payload, pa.binary()), "label": ["x"] * 400})
    # One segment of 400 rows: the batches within it are read on, kept for a while, and read again.
    path = tmp_path / f"t.{ending}"
    probe = opened(write(tab, path, rows=400 if ending == "parquet" else 5))
    order = [*range(400), *rng.integers(0, 400, 150).tolist(), *range(399, 350, -1)]
    largest_batch = max(sum(map(len, payload[i : i + 5])) + 64 for i in range(0, 400, 5))
    for example in order:
        assert probe.encoded(example) == payload[example]
        assert sum(p.nbytes for p in probe._cache.values()) <= 3_000 + largest_batch
    assert len(probe._cache) < 10


def test_reading_in_order_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_table, "CACHE_BYTES", 1)
    opens = []
    original = pq.ParquetFile
    path = write(table(), tmp_path / "t.parquet", rows=4)
    probe = opened(path)
    monkeypatch.setattr(pq, "ParquetFile", lambda *args, **rest: opens.append(args) or original(*args, **rest))
    assert [probe.encoded(i) for i in range(N)] == BYTES
    assert len(opens) == 3  # one for each row group
