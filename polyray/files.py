"""The file-system calls behind the dataset: all of a file is there, or none of it, at whatever moment things stop.

Which question it answers: *how do bytes reach the disk?* Place in the flow: a leaf under `store.py` and `verify.py`,
which know what the bytes mean. Works on any local or shared POSIX file system; without hard links a record is created
exclusively instead, and may then be seen half-written for a moment.
"""

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from polyray.errors import StoreError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
# A file name may have 255 bytes; this leaves room for "layer=", the attempt and the ending.
_LONGEST_NAME = 180
_NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_RESUME = "What is committed is untouched: run the same command again to go on."
_ADVICE = {
    errno.ENOSPC: f"The disk is full. Free some space. {_RESUME}",
    errno.EDQUOT: f"The disk quota is used up. Free some space or ask for more. {_RESUME}",
    errno.EROFS: "The file system is read-only. Choose an OUT that can be written.",
    errno.EACCES: "Choose an OUT that this user may write, or change its permissions.",
    errno.EPERM: "Choose an OUT that this user may write, or change its permissions.",
    errno.ENOTDIR: "A file stands where a folder should be. Choose another OUT.",
    errno.EEXIST: "A file stands where a folder should be. Choose another OUT.",
    errno.ENOENT: "It is gone, or its folder is. Was OUT moved or deleted while in use?",
}


def local_folder(out: str | Path) -> Path:
    """The absolute path of OUT; `StoreError` where it is the address of an object store."""
    if "://" in str(out):
        raise StoreError(f"OUT must be a local or shared folder, got the address {str(out)!r}.")
    return Path(out).absolute()


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
def explained(what: str, path: Path) -> Iterator[None]:
    """Turns the file system's errors into `StoreError`s that say what failed and what to do."""
    try:
        yield
    except OSError as e:
        advice = _ADVICE.get(e.errno or 0, f"Check the file system. {_RESUME}")
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
    """A synced file under a passing name, gone at the end whatever happens short of a crash."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        _write(path, data)
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
