"""Tiny-ImageNet in miniature: both splits, zipped and unpacked, damaged, missing and not to be downloaded."""

import hashlib
import socket
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from probes.pictures import encode, picture
from skips import skip

from polyray.config import TinyImageNet
from polyray.errors import DataError
from polyray.probes import tiny_imagenet
from polyray.probes.images import ProbeSet, open_probe

WORDS = "n01\tcrane, wading bird\nn02\tant, emmet, pismire\nn03\tcrane\nn99\tcrane, of another set\n"
RESEARCH_DATA = Path(__file__).parents[2] / "../shared/data"


def tiny(path: Path, split: str = "val", **rest: object) -> ProbeSet:
    config = TinyImageNet.model_validate({"kind": "tiny_imagenet", "path": str(path), "split": split, **rest})
    return open_probe(config)


def miniature(root: Path) -> Path:
    """Three classes; 2 training images of each, 4 validation images of which one has no annotation."""
    files = {"words.txt": WORDS.encode(), "wnids.txt": b"n03\nn01\nn02\n"}
    for c, wnid in enumerate(["n03", "n01", "n02"]):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        files[f"train/{wnid}/images/.hidden.JPEG"] = b""
        for i in range(2):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encode(picture(10 * c + i, 64, 64), "JPEG")
    for i in range(4):
        files[f"val/images/val_{i}.JPEG"] = encode(picture(100 + i, 64, 64), "JPEG")
    files["val/val_annotations.txt"] = "".join(
        f"val_{i}.JPEG\t{wnid}\t0\t1\t62\t63\n" for i, wnid in enumerate(["n02", "n01", "n02"])
    ).encode()
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(root: Path, file: Path, top: str = "", folders: bool = False, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        # Reversed: a set's order may not come from its archive's.
        for path in sorted(root.rglob("*"), reverse=True):
            if path.is_file() or folders:
                archive.write(path, top + path.relative_to(root).as_posix())
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return miniature(tmp_path / "unpacked")


def test_val(root: Path) -> None:
    probe = tiny(root)
    assert probe.names == [f"val/images/val_{i}.JPEG" for i in (1, 0, 2)]  # sorted by wnid, then by name
    assert probe.labels == ["crane", "ant", "ant"]
    assert probe.describe()["n_classes"] == 2
    assert "1 images without annotation are left out" in probe.describe()["notes"]
    image = Image.open(root / "val/images/val_0.JPEG")
    assert np.array_equal(probe.read(1), np.asarray(image))


def test_train(root: Path) -> None:
    probe = tiny(root, "train")
    assert probe.names == [f"train/{w}/images/{w}_{i}.JPEG" for w in ("n01", "n02", "n03") for i in (0, 1)]
    assert probe.labels == ["crane (n01)"] * 2 + ["ant"] * 2 + ["crane (n03)"] * 2
    assert tiny(root, "train", limit=3).names == [probe.names[i] for i in (0, 2, 4)]


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
@pytest.mark.parametrize("folders", [False, True])
def test_zip_and_folder_are_the_same_set(root: Path, tmp_path: Path, split: str, top: str, folders: bool) -> None:
    unpacked = tiny(root, split)
    zipped = tiny(pack(root, tmp_path / "any name.zip", top, folders), split)
    assert zipped.names == unpacked.names
    assert zipped.labels == unpacked.labels
    assert zipped.digest() == unpacked.digest()
    assert zipped.describe() == unpacked.describe()
    for example in range(len(unpacked)):
        assert np.array_equal(zipped.read(example), unpacked.read(example))


def test_a_folder_around_the_unpacked_set(tmp_path: Path) -> None:
    root = miniature(tmp_path / "data" / "tiny-imagenet-200")
    assert tiny(tmp_path / "data").digest() == tiny(root).digest()


def test_the_digest_tells_splits_and_contents_apart(root: Path) -> None:
    digests = {tiny(root).digest(), tiny(root, "train").digest(), tiny(root, "train", limit=3).digest()}
    annotations = root / "val/val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("n01", "n02"))
    digests.add(tiny(root).digest())
    (root / "words.txt").write_text(WORDS.replace("ant, emmet", "emmet, ant"))
    digests.add(tiny(root).digest())
    assert len(digests) == 5


@pytest.mark.parametrize("split", ["val", "train"])
def test_one_split_may_be_missing(root: Path, tmp_path: Path, split: str) -> None:
    other = {"val": "train", "train": "val"}[split]
    (root / other).rename(tmp_path / other)
    (root / "words.txt").unlink()
    probe = tiny(pack(root, tmp_path / "part.zip", "tiny-imagenet-200/"), split)
    assert set(probe.labels) <= {"n01", "n02", "n03"}
    (note,) = (n for n in probe.notes if "words.txt" in n)
    assert note.endswith(f", {len(set(probe.labels))} by their WordNet ids")
    with pytest.raises(DataError, match=rf"holds no folder '{other}' .*; it holds '{split}', 'wnids.txt'\. Set probe"):
        tiny(tmp_path / "part.zip", other)


def test_synsets_are_named_without_words_txt(root: Path) -> None:
    (root / "words.txt").unlink()
    for wnid, synset in (("n01", "n02002724"), ("n02", "n02123045")):
        (root / "train" / wnid).rename(root / "train" / synset)
    probe = tiny(root, "train")
    assert set(probe.labels) == {"black stork", "tabby", "n03"}
    assert tiny_imagenet.wordnet_names(["n02002724", "n00000000"]) == {"n02002724": "black stork"}


def test_an_annotated_image_that_is_missing_costs_itself(root: Path, tmp_path: Path) -> None:
    (root / "val/images/val_0.JPEG").unlink()
    for path in (root, pack(root, tmp_path / "x.zip")):
        probe = tiny(path)
        with pytest.raises(DataError, match=r"^not a file, or a link to nothing$"):
            probe.read(1)
        assert probe.read(2).shape == (64, 64, 3)
    assert tiny(root).digest() == tiny(tmp_path / "x.zip").digest()


def test_a_damaged_member_of_the_zip_costs_itself(root: Path, tmp_path: Path) -> None:
    path = pack(root, tmp_path / "x.zip", method=zipfile.ZIP_STORED)
    jpeg = (root / "val/images/val_1.JPEG").read_bytes()
    packed = path.read_bytes()
    path.write_bytes(packed.replace(jpeg, jpeg[:-9] + b"\0" * 9))
    probe = tiny(path)
    with pytest.raises(DataError, match=r"^damaged in the zip file$"):
        probe.read(0)
    assert probe.read(1).shape == (64, 64, 3)


def test_a_member_beyond_the_byte_limit_is_not_unpacked(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(root, tmp_path / "x.zip")
    monkeypatch.setattr(tiny_imagenet, "MAX_BYTES", (root / "val/images/val_1.JPEG").stat().st_size - 1)
    with pytest.raises(DataError, match=r"^too large: above [\d,]+ bytes$"):
        tiny(path).read(0)


def test_a_truncated_zip_is_refused(root: Path, tmp_path: Path) -> None:
    path = pack(root, tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"x\.zip' is not a whole zip file; download it again"):
        tiny(path)


def test_broken_annotations_are_refused(root: Path) -> None:
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\nval_1.JPEG\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 2: expected file and class, got 'val_1\.JPEG'"):
        tiny(root)
    (root / "val/val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"val/val_annotations\.txt of Tiny-ImageNet: not a file"):
        tiny(root)


def test_no_images(root: Path) -> None:
    for image in (root / "val/images").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="holds no images in its split 'val'"):
        tiny(root)


def test_missing_path_says_what_to_place_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*gone\.zip' does not exist\. Place Tiny-ImageNet \(http://.*\.zip, MD5 90"):
        tiny(tmp_path / "gone.zip")


def unreachable() -> str:
    """A loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/tiny.zip"


def test_unreachable_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data" / "tiny.zip"
    for url in (unreachable(), (tmp_path / "nothing.zip").as_uri()):
        monkeypatch.setattr(tiny_imagenet, "URL", url)
        with pytest.raises(DataError, match=r"cannot fetch .*: .*Download .* elsewhere and place the file at '.*tiny"):
            tiny(target, download=True)
        assert not list(target.parent.iterdir())


def test_download_of_the_wrong_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source.zip").write_bytes(b"an error page")
    monkeypatch.setattr(tiny_imagenet, "URL", (tmp_path / "source.zip").as_uri())
    got = hashlib.md5(b"an error page").hexdigest()
    with pytest.raises(DataError, match=f"came with MD5 {got} instead of 90528d7ca1a48142e341f4ef8d21d0de"):
        tiny(tmp_path / "data" / "tiny.zip", download=True)
    assert not list((tmp_path / "data").iterdir())


def test_download(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pack(root, tmp_path / "source.zip", "tiny-imagenet-200/")
    monkeypatch.setattr(tiny_imagenet, "URL", source.as_uri())
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(source.read_bytes()).hexdigest())
    target = tmp_path / "new" / "folder" / "tiny.zip"
    assert tiny(target, download=True).digest() == tiny(root).digest()
    assert [path.name for path in target.parent.iterdir()] == ["tiny.zip"]
    source.unlink()
    assert len(tiny(target, download=True)) == 3  # what is there is not fetched again


@pytest.mark.shared
def test_the_real_validation_split() -> None:
    path = RESEARCH_DATA / "tiny-imagenet-200-val.zip"
    if not path.exists():
        skip("research-data")
    probe = tiny(path)
    assert len(probe) == 10_000
    assert set(Counter(probe.labels).values()) == {50}
    assert len(set(probe.labels)) == 200
    assert {"goldfish", "Egyptian cat", "school bus"} <= set(probe.labels)
    assert set(Counter(tiny(path, limit=400).labels).values()) == {2}
    assert {probe.read(i).shape for i in range(0, 10_000, 50)} == {(64, 64, 3)}


@pytest.mark.shared
def test_the_real_training_split() -> None:
    path = RESEARCH_DATA / "tiny-imagenet-200-train-60.zip"
    if not path.exists():
        skip("research-data")
    probe = tiny(path, "train")
    assert len(probe) == 30_000
    assert set(Counter(probe.labels).values()) == {500}
    assert len(set(probe.labels)) == 60
    assert probe.read(29_999).shape == (64, 64, 3)
