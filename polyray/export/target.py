"""Which question it answers: *may this folder be written, and how do whole files get there?*

Place in the flow: under `neuron_records.py`. A file is written under a passing name and then renamed, so that one that
is there is whole whenever the export is killed; `export.json` says whether it came to its end. Files are not synced one
by one, which would take hours for a million: all are, once, before `export.json` says so.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from polyray import files
from polyray.errors import PolyrayError, StoreError

STATE = "export.json"


@contextmanager
def explained(kind: type[PolyrayError]) -> Iterator[None]:
    """Turns what the file system or a damaged part says into an error of a kind: files that are there are whole."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as e:
        if isinstance(e, OSError) and e.errno is not None:
            where = "" if e.filename is None else f" at {str(e.filename)!r}"
            told = f"{e.strerror or e}{where}. Check the disk, its room and permissions"
        else:
            told = f"a part of the dataset cannot be read: {e}. See polyray verify"
        raise kind(f"the export stopped: {told}. The files that are there are whole; repeat the command.") from e


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StoreError(
            f"--to {str(folder)!r} cannot be used: {e.strerror or e}. Choose a folder that this user may write."
        ) from e


class Target:
    """A folder that an export of one run is written to.

    Args:
        folder: need not exist; else it must be empty or hold an export of the same run in the same form.
        form: of the export.
        run_id: of the run.
        dataset: where the run lies; an export must not lie in it.

    Raises:
        StoreError: it is none that may be written. Nothing has been changed then.
    """

    def __init__(self, folder: str, form: str, run_id: str, dataset: Path | str) -> None:
        if "://" in folder:
            raise StoreError(f"--to must be a folder of this machine, got {folder!r}. Export there and copy it.")
        self.path = Path(folder).absolute()
        self._own = {"form": form, "run_id": run_id}
        real = self.path.resolve()
        if isinstance(dataset, Path) and real.is_relative_to(dataset.resolve()):
            raise StoreError(f"--to {folder!r} lies in the dataset {str(dataset)!r}. Choose a folder beside it.")
        with _refusing(self.path):
            self._require_own()

    def _require_own(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise StoreError(f"--to {str(self.path)!r} is a file. Choose an empty or a new folder.")
        held = [name for name in files.names(self.path) if not files.is_temporary(name)]
        if not held:
            return
        try:
            state = json.loads((self.path / STATE).read_bytes())
            own = {key: state[key] for key in self._own}
        except FileNotFoundError:
            raise StoreError(
                f"--to {str(self.path)!r} holds files but no {STATE}, for instance {held[0]!r}: it is no export of "
                "polyray. Choose an empty or a new folder."
            ) from None
        except (ValueError, KeyError, TypeError) as e:
            raise StoreError(
                f"{str(self.path / STATE)!r} is none of polyray's, or damaged. Choose a new folder."
            ) from e
        if own != self._own:
            raise StoreError(
                f"--to {str(self.path)!r} holds the {own['form']} of run {own['run_id']}, this is {self._own['form']} "
                f"of run {self._own['run_id']}. Choose an empty or a new folder."
            )

    def begin(self) -> None:
        """Makes the folder, and says that it is not whole."""
        with _refusing(self.path):
            files.ensure_folder(self.path)
            self._put_state({"complete": False})

    def end(self, readme: str, summary: dict[str, Any]) -> None:
        """Makes all files outlive a power cut, then says that the export is whole and what it holds."""
        files.replace(self.path / "README.md", readme.encode())
        os.sync()
        self._put_state({"complete": True} | summary)

    def _put_state(self, said: dict[str, Any]) -> None:
        data = json.dumps(self._own | said, indent=1).encode()
        files.replace(self.path / STATE, data + b"\n")


class Shelf:
    """A folder of a target with one file for each neuron of a layer; a context.

    Args:
        target: the folder of the export.
        names: folders below it.
    """

    def __init__(self, target: Target, *names: str) -> None:
        self._folder = target.path.joinpath(*names)
        files.ensure_folder(self._folder)
        for name in files.names(self._folder):
            if files.is_temporary(name):  # of an export that was killed
                files.remove(self._folder / name)
        self._passing = self._folder / f".{uuid.uuid4().hex}.tmp"

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._passing.unlink(missing_ok=True)

    def put(self, neuron: int, record: dict[str, Any]) -> None:
        """Writes a neuron's file, in place of the old one where there is one."""
        # ASCII alone: line separators, marks of direction and the like reach no reader unescaped.
        self._passing.write_text(json.dumps(record, separators=(",", ":"), allow_nan=False), encoding="ascii")
        self._passing.replace(self._folder / f"{neuron}.json")
