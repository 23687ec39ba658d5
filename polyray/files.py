"""The file-system calls behind the dataset: all of a file is there, or none of it, at whatever moment things stop.

Which question it answers: *how do bytes reach the disk?* Place in the flow: a leaf under `store.py` and what it is
made of, which know what the bytes mean and ask for them through a `Place`. `Folder` works on any local or shared POSIX
file system; without hard links a record is created exclusively instead, and may then be seen half-written for a moment.
"""

import errno
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import pyarrow.fs

from polyray.errors import StoreError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
# A file name may have 255 bytes; this leaves room for "layer=", the attempt and the ending.
_LONGEST_NAME = 180
_NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
RESUME = "What is committed is untouched: run the same command again to go on."
_ADVICE = {
    errno.ENOSPC: f"The disk is full. Free some space. {RESUME}",
    errno.EDQUOT: f"The disk quota is used up. Free some space or ask for more. {RESUME}",
    errno.EROFS: "The file system is read-only. Choose an OUT that can be written.",
    errno.EACCES: "Choose an OUT that this user may write, or change its permissions.",
    errno.EPERM: "Choose an OUT that this user may write, or change its permissions.",
    errno.ENOTDIR: "A file stands where a folder should be. Choose another OUT.",
    errno.EEXIST: "A file stands where a folder should be. Choose another OUT.",
    errno.ENOENT: "It is gone, or its folder is. Was OUT moved or deleted while in use?",
}


class Writer(Protocol):
    """What a file is written to, piece by piece."""

    def write(self, data: bytes) -> object:
        """Adds to the file."""


class Place(Protocol):
    """Where a dataset lies. Names are relative to it, with `/` between folders; what fails raises `OSError`.

    Whatever stops at whatever moment, a file is there as a whole or not at all, and when a call returns what it put
    survives a power cut.
    """

    def at(self, name: str) -> str:
        """Where a file is, for people."""

    def prove(self) -> None:
        """Makes sure that `put_if_absent` is what it says; `StoreError` where it is not."""

    def read(self, name: str) -> bytes:
        """All of a file; `FileNotFoundError` where there is none."""

    def n_bytes(self, names: Iterable[str]) -> list[int | None]:
        """Size of each file; None where there is none."""

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of what a folder holds, folders included; empty where there is no such folder."""

    def files_below(self, folder: str) -> list[str]:
        """Sorted names, relative to the place, of all files below a folder."""

    def make_folder(self, folder: str = "") -> None:
        """Makes a folder, where the place has such a thing, and those above it."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Puts a whole file unless one is there; of several writers one alone gets True."""

    def replace(self, name: str, data: bytes) -> None:
        """Puts a whole file, in place of the old one where there is one."""

    def stream(self, name: str) -> AbstractContextManager[Writer]:
        """A new file, written piece by piece, there once the block has ended well."""

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, as far as they are there."""

    def remove_folder(self, folder: str) -> None:
        """Removes a folder and the files in it."""

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """For Arrow: the file system, and what goes before a name and `/`."""


class Folder:
    """A folder of a local or shared file system as a `Place`.

    Args:
        root: its absolute path; need not exist yet.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def at(self, name: str) -> str:
        """See `Place`."""
        return str(self._root / name)

    def prove(self) -> None:
        """See `Place`; every file system creates exclusively."""

    def read(self, name: str) -> bytes:
        """See `Place`."""
        return (self._root / name).read_bytes()

    def n_bytes(self, names: Iterable[str]) -> list[int | None]:
        """See `Place`."""
        return [_n_bytes(self._root / name) for name in names]

    def names(self, folder: str = "") -> list[str]:
        """See `Place`."""
        return names(self._root / folder)

    def files_below(self, folder: str) -> list[str]:
        """See `Place`."""
        return files_below(self._root, folder)

    def make_folder(self, folder: str = "") -> None:
        """See `Place`."""
        ensure_folder(self._root / folder)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Place`."""
        return put_if_absent(self._root / name, data)

    def replace(self, name: str, data: bytes) -> None:
        """See `Place`."""
        replace(self._root / name, data)

    @contextmanager
    def stream(self, name: str) -> Iterator[Writer]:
        """See `Place`."""
        path = self._root / name
        with _passing(path.parent) as temporary:
            with temporary.open("xb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)

    def remove(self, names: Iterable[str]) -> None:
        """See `Place`."""
        for name in names:
            remove(self._root / name)

    def remove_folder(self, folder: str) -> None:
        """See `Place`."""
        for name in names(self._root / folder):
            remove(self._root / folder / name)
        # Someone who was slow may still put something there; it is no one's, and goes next time.
        with suppress(OSError):
            (self._root / folder).rmdir()

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """See `Place`."""
        return pyarrow.fs.LocalFileSystem(), str(self._root)


def located(out: str | Path) -> Path | str:
    """OUT as an absolute path, or as the address of an object store without a slash at its end.

    Raises:
        StoreError: it is the address of something else.
    """
    text = str(out)
    if "://" not in text:
        return Path(out).absolute()
    scheme, _, rest = text.partition("://")
    if scheme != "s3" or not rest.strip("/"):
        raise StoreError(f"OUT must be a local or shared folder or s3://bucket/prefix, got the address {text!r}.")
    return f"{scheme}://{rest.strip('/')}"


def joined(out: Path | str, *names: str) -> Path | str:
    """What lies relative to an OUT, with `..` taken out."""
    if isinstance(out, Path):
        return Path(os.path.normpath(out.joinpath(*names)))
    scheme, _, rest = out.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, *names))}"


def folder_for_people(out: Path | str) -> Path:
    """Where pictures of a dataset are drawn: beside its tables, or where one is when those are in an object store."""
    return out if isinstance(out, Path) else Path()


def place(out: Path | str) -> Place:
    """Where an OUT from `located` lies.

    Raises:
        StoreError: it is in an object store, and the extra `s3` is not installed.
    """
    if isinstance(out, Path):
        return Folder(out)
    try:
        # Imported here: only who asks for an object store needs the packages.
        from polyray.objects import Bucket
    except ModuleNotFoundError as e:
        raise StoreError(f"{out!r} needs the package {e.name!r}: pip install 'polyray[s3]', on every node.") from e
    return Bucket(out)


def quoted(name: str) -> str:
    """A name as one safe path segment: reversible by `urllib.parse.unquote`, different names never alike.

    Args:
        name: any text but the empty one.

    Returns:
        ASCII letters, digits and `_.-%`, neither starting with `.` nor with `_` (which readers skip). Where that
        is longer than a file name may be, its beginning, `~` and 128 bits of SHA-256: unique, not reversible.

    Raises:
        StoreError: the name is empty.
    """
    if not name:
        raise StoreError("the name of a unit or layer is empty: give it at least one character.")
    safe = _escaped(name)
    if len(safe) <= _LONGEST_NAME:
        return safe
    head = name[: _LONGEST_NAME - 33]
    while len(_escaped(head)) > _LONGEST_NAME - 33:
        head = head[:-1]
    return f"{_escaped(head)}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def _escaped(name: str) -> str:
    safe = quote(name, safe="").replace("~", "%7E")
    return f"%{ord(safe[0]):02X}{safe[1:]}" if safe[0] in "._" else safe


def is_temporary(name: str) -> bool:
    """Whether a file name is one that an unfinished write leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def explained(what: str, path: object) -> Iterator[None]:
    """Turns the file system's errors into `StoreError`s that say what failed and what to do."""
    try:
        yield
    except OSError as e:
        advice = _ADVICE.get(e.errno or 0, f"Check the file system. {RESUME}")
        raise StoreError(f"cannot {what} {str(path)!r}: {e.strerror or e}. {advice}") from e


def ensure_folder(folder: Path) -> None:
    """Makes a folder and those above it; when it returns they survive a power cut."""
    if folder.is_dir():
        return
    ensure_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def replace(path: Path, data: bytes) -> None:
    """Puts a whole file in one step, in place of the old one where there is one."""
    with _temporary(path.parent, data) as temporary:
        temporary.replace(path)
        _sync_folder(path.parent)


def put_if_absent(path: Path, data: bytes) -> bool:
    """Puts a whole file in one step unless one is there; of several writers one alone gets True."""
    with _temporary(path.parent, data) as temporary:
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:
            # Over NFS the answer to a link that was made can get lost, and the repeated request then fails.
            won = temporary.stat().st_nlink == 2
        except OSError as e:
            if e.errno not in _NO_HARD_LINKS:
                raise
            won = _create(path, data)
        _sync_folder(path.parent)
        return won


def remove(path: Path) -> bool:
    """Removes a file; False where there was none."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def names(folder: Path) -> list[str]:
    """Sorted names of what a folder holds; empty where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries)
    except FileNotFoundError:
        return []


def files_below(root: Path, folder: str) -> list[str]:
    """Sorted paths, relative to `root`, of all files below one of its folders."""
    found = []
    for parent, _, files in os.walk(root / folder):
        relative = Path(parent).relative_to(root)
        found += [(relative / name).as_posix() for name in files]
    return sorted(found)


def _n_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _create(path: Path, data: bytes) -> bool:
    """Exclusive create for file systems without hard links."""
    try:
        _write(path, data)
    except FileExistsError:
        return False
    except OSError:
        # A record cut short by a full disk must not stand in the way of the next attempt.
        with suppress(OSError):
            path.unlink()
        raise
    return path.read_bytes() == data


@contextmanager
def _temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A synced file under a passing name."""
    with _passing(folder) as path:
        _write(path, data)
        yield path


@contextmanager
def _passing(folder: Path) -> Iterator[Path]:
    """A name for a file that is gone at the end whatever happens short of a crash."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some network file systems sync folders by themselves and refuse to be asked.
        if e.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
