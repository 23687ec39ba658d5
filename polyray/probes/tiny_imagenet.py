"""Which question it answers: *which pictures does a split of Tiny-ImageNet hold?*

Place in the flow: one of the sources behind `polyray.probes.images.open_probe`. The set is read in its original
layout, unpacked or from the zip itself, and fetched on request.

Source: Le and Yang, "Tiny ImageNet visual recognition challenge", CS 231N (2015).
"""

import hashlib
import http.client
import logging
import urllib.request
import uuid
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from polyray.config import TinyImageNet
from polyray.errors import DataError
from polyray.probes.pixels import MAX_BYTES
from polyray.probes.probe_set import EncodedSet, distinct_labels, existing, read_file, spread, visible

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TOP = "tiny-imagenet-200/"
"""Folder at the top of the original zip; a set without it is read as well."""

_TIMEOUT_S = 60
_CHUNK_BYTES = 2**20

log = logging.getLogger(__name__)


class TinyImageNetSet(EncodedSet):
    """A split of Tiny-ImageNet, sorted by wnid and file name, so that a `limit` takes equally from every class.

    Labels are the first synonym of `words.txt`, with the wnid in parentheses where two classes of the split share it;
    without a `words.txt` those of timm's list of ImageNet synsets, and the bare wnid where that has none. An annotated
    picture that is missing costs itself; a picture of
    `val` without annotation has no label and is left out, which `notes` says.

    Raises:
        DataError: the set is missing and not to be downloaded, damaged, or does not hold the split.
    """

    kind = "tiny_imagenet"

    def __init__(self, config: TinyImageNet) -> None:
        if config.download and not Path(config.path).expanduser().exists():
            download(Path(config.path).expanduser())
        path = existing(config.path, f"Tiny-ImageNet ({URL}, MD5 {MD5}), zipped or unpacked,")
        self._files: _Files = _Folder(path) if path.is_dir() else _Zip(path)
        top = next((top for top in ("", TOP) if self._files.inside(f"{top}{config.split}")), None)
        if top is None:
            there = self._files.inside(TOP.rstrip("/")) or self._files.inside("")
            raise DataError(
                f"probe.path {config.path!r} holds no folder {config.split!r} of Tiny-ImageNet, neither at its top nor "
                f"in {TOP!r}; it holds {', '.join(map(repr, sorted(there)[:8])) or 'nothing'}. "
                f"Set probe.split to a split that is there, or probe.path to the whole set."
            )
        self.notes = ["drawn from ImageNet: a subject or an encoder trained on ImageNet may have seen these images"]
        found = self._val(top) if config.split == "val" else self._train(top)
        if not found:
            raise DataError(f"probe.path {config.path!r} holds no images in its split {config.split!r}.")
        label = distinct_labels(self._class_names(top, {wnid for wnid, _ in found}))
        found = sorted(found)
        kept = [found[i] for i in spread(len(found), config.limit)]
        self.name = f"tiny-imagenet-200/{config.split}"
        self.labels = [label[wnid] for wnid, _ in kept]
        self.names = [name for _, name in kept]
        self._top = top

    def encoded(self, example: int) -> bytes:
        return self._files.read(self._top + self.names[example])

    def _val(self, top: str) -> list[tuple[str, str]]:
        """(wnid, path below the top) of the annotated validation images."""
        found = []
        for number, line in enumerate(self._text(f"{top}val/val_annotations.txt").splitlines(), start=1):
            file, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0].strip()
            if not wnid or "/" in file:
                raise DataError(f"val/val_annotations.txt, line {number}: expected file and class, got {line[:60]!r}.")
            found.append((wnid, f"val/images/{file}"))
        present = {f"val/images/{file}" for file in _images(self._files.inside(f"{top}val/images"))}
        if n_bare := len(present - {name for _, name in found}):
            self.notes.append(f"{n_bare} images without annotation are left out")
        return found if present else []

    def _train(self, top: str) -> list[tuple[str, str]]:
        """(wnid, path below the top) of the training images."""
        return [
            (wnid, f"train/{wnid}/images/{file}")
            for wnid in visible(self._files.inside(f"{top}train"))
            for file in _images(self._files.inside(f"{top}train/{wnid}/images"))
        ]

    def _class_names(self, top: str, wnids: set[str]) -> dict[str, str]:
        names = {wnid: wnid for wnid in sorted(wnids)}
        if "words.txt" not in self._files.inside(top.rstrip("/")):
            known = wordnet_names(wnids)
            self.notes.append(
                "no words.txt: classes are called as timm's list of ImageNet synsets calls them"
                + (f", {len(wnids) - len(known)} by their WordNet ids" if len(known) < len(wnids) else "")
            )
            return names | known
        for line in self._text(f"{top}words.txt").splitlines():
            wnid, _, synonyms = line.partition("\t")
            if wnid in wnids:
                names[wnid] = _first(synonyms) or wnid
        return names

    def _text(self, path: str) -> str:
        try:
            return self._files.read(path).decode("utf-8")
        except UnicodeDecodeError as e:
            raise DataError(f"{path} of Tiny-ImageNet is not UTF-8 text; unpack or download it again.") from e
        except DataError as e:
            raise DataError(f"{path} of Tiny-ImageNet: {e}; unpack or download it again.") from e


def wordnet_names(wnids: Iterable[str]) -> dict[str, str]:
    """First synonym of each WordNet id that ImageNet's 21,843 synsets know."""
    # Imported here: it brings torch along, which the viewer, which opens any probe set, has no use for.
    from timm.data.imagenet_info import ImageNetInfo

    synsets = ImageNetInfo("imagenet-21k-goog")
    known = set(synsets.label_names())
    return {w: _first(synsets.label_name_to_description(w, detailed=False)) for w in sorted(wnids) if w in known}


def _first(synonyms: str) -> str:
    return synonyms.partition(",")[0].strip()


def _images(names: list[str]) -> list[str]:
    return [name for name in visible(names) if name.lower().endswith((".jpeg", ".jpg"))]


class _Files(Protocol):
    """A tree of files, packed or not; paths are relative, with `/`."""

    def inside(self, folder: str) -> list[str]:
        """Names directly in a folder; empty where there is no such folder."""

    def read(self, path: str) -> bytes:
        """Bytes of a file; raises `DataError` with a short reason."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def inside(self, folder: str) -> list[str]:
        try:
            return [entry.name for entry in (self._root / folder).iterdir()]
        except OSError:
            return []

    def read(self, path: str) -> bytes:
        return read_file(self._root / path)


class _Zip:
    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as e:
            raise DataError(f"probe.path {str(path)!r} is not a whole zip file; download it again ({URL}).") from e
        except OSError as e:
            raise DataError(f"probe.path {str(path)!r} cannot be read: {e.strerror}.") from e
        self._inside: dict[str, set[str]] = defaultdict(set)
        for path_inside in self._zip.namelist():
            # Zips need not have entries for folders: list every folder in the one that holds it.
            entry = path_inside.rstrip("/")
            while entry:
                folder, _, name = entry.rpartition("/")
                if name in self._inside[folder]:
                    break
                self._inside[folder].add(name)
                entry = folder

    def inside(self, folder: str) -> list[str]:
        return sorted(self._inside.get(folder, ()))

    def read(self, path: str) -> bytes:
        try:
            info = self._zip.getinfo(path)
        except KeyError as e:
            raise DataError("not a file, or a link to nothing") from e
        if info.file_size > MAX_BYTES:
            raise DataError(f"too large: above {MAX_BYTES:,} bytes")
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
            raise DataError("damaged in the zip file") from e
        except RuntimeError as e:
            raise DataError("encrypted, or packed by a method that is not supported") from e


def download(path: Path) -> None:
    """Fetches the zip to `path`, which exists afterwards only as a whole and with the right checksum.

    Args:
        path: where the zip is to lie; its folders are made. Several workers may do this at once: each writes a file of
            its own, and the last to finish stays.

    Raises:
        DataError: the address cannot be reached, the transfer breaks off, the disk refuses it, or the checksum differs.
    """
    place = f"Download {URL} (MD5 {MD5}) elsewhere and place the file at {str(path)!r}."
    log.info("fetching %s to %s", URL, path)
    checksum = hashlib.md5(usedforsecurity=False)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(URL, timeout=_TIMEOUT_S) as response,
            temporary.open("xb") as file,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                checksum.update(chunk)
                file.write(chunk)
        if checksum.hexdigest() != MD5:
            raise DataError(f"{URL} came with MD5 {checksum.hexdigest()} instead of {MD5}. {place}")
        temporary.replace(path)
    except (OSError, http.client.HTTPException) as e:
        raise DataError(f"cannot fetch {URL} to {str(path)!r}: {e}. {place}") from e
    finally:
        temporary.unlink(missing_ok=True)
