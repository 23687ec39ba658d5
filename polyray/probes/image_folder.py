"""Which question it answers: *which pictures does a folder with one sub-folder a class hold?*

Place in the flow: one of the sources behind `polyray.probes.images.open_probe`.
"""

from collections.abc import Iterable

from polyray.config import ImageFolder
from polyray.errors import DataError
from polyray.probes.probe_set import EncodedSet, existing, read_file, spread, text_of, visible

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


class FolderSet(EncodedSet):
    """Pictures of a folder, sorted by class and file name.

    A picture is whatever lies in a class folder, is not hidden and ends in one of `EXTENSIONS` (in any case); deeper
    folders are not searched. Class folders without pictures are no classes.

    Raises:
        DataError: the path is missing, is no folder, or holds no pictures.
    """

    kind = "folder"

    def __init__(self, config: ImageFolder) -> None:
        root = existing(config.path, "a folder with one sub-folder a class")
        if not root.is_dir():
            raise DataError(f"probe.path {config.path!r} is a file; kind 'folder' takes a folder.")
        try:
            classes = visible(entry.name for entry in root.iterdir() if entry.is_dir())
            found = [(c, file) for c in classes for file in _pictures(entry.name for entry in (root / c).iterdir())]
            loose = _pictures(entry.name for entry in root.iterdir() if not entry.is_dir())
        except OSError as e:
            raise DataError(f"probe.path {config.path!r} cannot be listed: {e.strerror}.") from e
        if not found:
            hint = f" {len(loose)} images lie directly in it: move them into one sub-folder a class." if loose else ""
            raise DataError(
                f"probe.path {config.path!r} holds no images in its {len(classes)} sub-folders; "
                f"known endings: {', '.join(EXTENSIONS)}.{hint}"
            )
        kept = [found[i] for i in spread(len(found), config.limit)]
        self.name = text_of(root.resolve().name)
        self.notes = [f"{len(loose)} images outside the class folders are left out"] if loose else []
        self.labels = [text_of(c) for c, _ in kept]
        self.names = [f"{text_of(c)}/{text_of(file)}" for c, file in kept]
        self._paths = [root / c / file for c, file in kept]

    def encoded(self, example: int) -> bytes:
        return read_file(self._paths[example])


def _pictures(names: Iterable[str]) -> list[str]:
    return [name for name in visible(names) if name.lower().endswith(EXTENSIONS)]
