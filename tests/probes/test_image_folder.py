"""Folders with one sub-folder a class, and what every stored set shares: order, limit, digest, bad files."""

import hashlib
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from probes.pictures import encode, picture

from polyray.config import ImageFolder
from polyray.errors import DataError
from polyray.probes import probe_set
from polyray.probes.images import ProbeSet, open_probe, pixel_hash
from polyray.probes.probe_set import distinct_labels, spread


def folder(path: Path, limit: int | None = None) -> ProbeSet:
    return open_probe(ImageFolder(kind="folder", path=str(path), limit=limit))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 3, 1 and 2 pictures, an empty class, and what is to be ignored."""
    root = tmp_path / "set"
    for i, name in enumerate(["zebra/b.PNG", "zebra/a.png", "zebra/c.jpeg", "ant/only.bmp", "bee/2.png", "bee/10.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        format = {"bmp": "BMP", "jpeg": "JPEG"}.get(name.rpartition(".")[2], "PNG")
        (root / name).write_bytes(encode(picture(i), format))
    for ignored in (".hidden/x.png", "zebra/.y.png", "zebra/notes.txt", "empty/readme.md"):
        (root / ignored).parent.mkdir(exist_ok=True)
        (root / ignored).write_bytes(encode(picture(99)))
    return root


NAMES = ["ant/only.bmp", "bee/10.png", "bee/2.png", "zebra/a.png", "zebra/b.PNG", "zebra/c.jpeg"]


def test_order_labels_and_pixels(root: Path) -> None:
    probe = folder(root)
    assert probe.names == NAMES
    assert probe.labels == ["ant", "bee", "bee", "zebra", "zebra", "zebra"]
    assert len(probe) == 6
    assert np.array_equal(probe.read(0), picture(3))
    assert np.array_equal(probe.read(4), picture(0))
    assert probe.describe() == {"kind": "folder", "name": "set", "n": 6, "n_classes": 3, "notes": []}
    with pytest.raises(IndexError):
        probe.read(6)


def test_digest_is_sha256_of_framed_names_labels_and_bytes(root: Path) -> None:
    expected = hashlib.sha256()
    for name in NAMES:
        for field in (name.encode(), name.partition("/")[0].encode(), (root / name).read_bytes()):
            expected.update(struct.pack("<q", len(field)) + field)
    assert folder(root).digest() == expected.hexdigest()


def test_digest_knows_contents_and_not_places(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = folder(root).digest()
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    assert folder(tmp_path / "elsewhere" / "copy").digest() == digest
    monkeypatch.chdir(tmp_path)
    assert folder(Path("set")).digest() == digest
    changed = []
    (root / "bee/2.png").write_bytes(encode(picture(50)))
    changed.append(folder(root).digest())
    (root / "bee/2.png").rename(root / "bee/3.png")
    changed.append(folder(root).digest())
    (root / "bee").rename(root / "cat")
    changed.append(folder(root).digest())
    (root / "cat/3.png").write_bytes(b"")
    changed.append(folder(root).digest())
    changed.append(folder(root, limit=5).digest())
    assert len({digest, *changed}) == 6


@pytest.mark.parametrize(("limit", "kept"), [(1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (6, range(6)), (100, range(6))])
def test_limit_spreads_evenly(root: Path, limit: int, kept: list[int]) -> None:
    probe = folder(root, limit)
    assert probe.names == [NAMES[i] for i in kept]
    assert probe.read(len(probe) - 1).shape == (5, 7, 3)


def test_spread_takes_equally_from_equal_stretches() -> None:
    counts = np.bincount(np.array(spread(600, 50)) // 60, minlength=10)
    assert counts.tolist() == [5] * 10
    assert spread(5, None) == [0, 1, 2, 3, 4]
    for n, limit in ((7, 3), (100, 99), (13, 12)):
        assert len(set(spread(n, limit))) == limit
        assert max(spread(n, limit)) < n


def test_bad_files_cost_themselves(root: Path) -> None:
    whole = encode(picture(20, 30, 30), "JPEG")
    bad = {
        "0 truncated.jpg": (whole[:-90], "truncated or damaged JPEG image"),
        "1 empty.png": (b"", "empty file"),
        "2 text.png": (b"no image at all", "not an image"),
    }
    for name, (data, _) in bad.items():
        (root / "bee" / name).write_bytes(data)
    (root / "bee" / "3 folder.png").mkdir()
    (root / "bee" / "4 link.png").symlink_to(root / "nowhere.png")
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= dict.fromkeys(("3 folder.png", "4 link.png"), "not a file, or a link to nothing")
    probe = folder(root)
    assert len(probe) == 11
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=f"^{reason}") as caught:
            probe.read(probe.names.index(f"bee/{name}"))
        assert str(root) not in str(caught.value)
    assert np.array_equal(probe.read(probe.names.index("bee/2.png")), picture(4))
    assert probe.digest() == folder(root).digest()


def test_unreadable_and_empty_files_differ_in_the_digest(root: Path) -> None:
    (root / "ant/z.png").symlink_to("nowhere")
    unreadable = folder(root).digest()
    (root / "ant/z.png").unlink()
    (root / "ant/z.png").write_bytes(b"")
    assert folder(root).digest() != unreadable


def test_a_file_beyond_the_byte_limit_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (root / "ant/only.bmp").stat().st_size
    monkeypatch.setattr(probe_set, "MAX_BYTES", size)
    assert folder(root).read(0).shape == (5, 7, 3)
    monkeypatch.setattr(probe_set, "MAX_BYTES", size - 1)
    with pytest.raises(DataError, match=rf"^too large: above {size - 1} bytes$"):
        folder(root).read(0)


def test_a_pipe_is_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "ant/0.png")
    with pytest.raises(DataError, match="not a file"):
        folder(root).read(0)


def test_duplicates_are_found_by_their_pixels(root: Path) -> None:
    (root / "zebra/d.bmp").write_bytes(encode(picture(4), "BMP"))
    probe = folder(root)
    hashes = [pixel_hash(probe.read(i)) for i in range(len(probe))]
    assert probe.names[-1] == "zebra/d.bmp"
    assert hashes[-1] == hashes[probe.names.index("bee/2.png")]
    assert len(set(hashes)) == 6


def test_linked_class_folders_are_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "w.png").write_bytes(encode(picture(31)))
    (root / "wasp").symlink_to(tmp_path / "store")
    probe = folder(root)
    assert np.array_equal(probe.read(probe.names.index("wasp/w.png")), picture(31))


def test_names_that_are_no_utf8_are_escaped(root: Path) -> None:
    with open(os.fsencode(root / "ant") + b"/\xff.png", "wb") as file:  # noqa: PTH123
        file.write(encode(picture(32)))
    probe = folder(root)
    assert probe.names[1] == "ant/\\xff.png"
    assert np.array_equal(probe.read(1), picture(32))
    assert len(probe.digest()) == 64


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' does not exist\. Place a folder with one sub-folder a class there"):
        folder(tmp_path / "nowhere")


def test_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(picture(1)))
    with pytest.raises(DataError, match="is a file; kind 'folder' takes a folder"):
        folder(tmp_path / "x.png")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"holds no images in its 1 sub-folders; known endings: \.jpg"):
        folder(tmp_path)


def test_images_without_class_folder(root: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "loose").mkdir(exist_ok=True)
        (tmp_path / "loose" / f"{i}.png").write_bytes(encode(picture(i)))
    with pytest.raises(DataError, match="3 images lie directly in it: move them into one sub-folder a class"):
        folder(tmp_path / "loose")
    (root / "stray.png").write_bytes(encode(picture(1)))
    assert folder(root).describe()["notes"] == ["1 images outside the class folders are left out"]


def test_distinct_labels() -> None:
    assert distinct_labels({"n1": "crane", "n2": "ant", "n3": "crane"}) == {
        "n1": "crane (n1)",
        "n2": "ant",
        "n3": "crane (n3)",
    }
