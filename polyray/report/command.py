"""Command: what `polyray report` does.

Place in the flow: `cli.py` hands over what was asked for and prints what comes back.
"""

from pathlib import Path
from typing import Any

from polyray import files
from polyray.errors import StoreError
from polyray.report.markdown import figures, markdown
from polyray.report.page import html
from polyray.report.source import Source
from polyray.report.story import tell

_TRIES = 3
"""A running sweep merges its parts now and then, so that one that was to be read may be gone; then it is read anew."""


def write_report(out: str, target: Path | None, as_markdown: bool, svg_folder: Path | None) -> dict[str, Any]:
    """Writes the report of a dataset.

    Args:
        out: folder or address of the dataset.
        target: file to write; by default OUT/report.html or OUT/report.md.
        as_markdown: Markdown with figures in a folder beside it, in place of the page.
        svg_folder: where every figure goes as an SVG file as well.

    Returns:
        out, run_id, finished, path, bytes, figures (paths).

    Raises:
        StoreError: the folder holds no run, or one of a newer schema version; or the target cannot be written.
    """
    located = files.located(out)
    name = "report.md" if as_markdown else "report.html"
    if target is None:
        if not isinstance(located, Path):
            raise StoreError(f"{out!r} is in an object store: say with --out where the report is to be written.")
        target = located / name
    target = target.absolute()
    source = Source(out)
    if target.is_dir():
        raise StoreError(
            f"cannot write {str(target)!r}: it is a folder. Give --out the name of a file, {name} for one."
        )
    for tries_left in reversed(range(_TRIES)):
        try:
            story = tell(source)
            break
        except StoreError:
            if source.dataset.is_finished or not tries_left:
                raise
            source = Source(out)
    drawn: list[Path] = []
    beside = target.parent / f"{target.stem}-figures"
    text = markdown(story, _linked(beside.name)) if as_markdown else html(story)
    for folder in ([beside] if as_markdown else []) + ([svg_folder.absolute()] if svg_folder else []):
        for file, svg in figures(story).items():
            _write(folder / file, svg.encode())
            drawn.append(folder / file)
    data = text.encode()
    _write(target, data)
    return {
        "out": out,
        "run_id": source.run["run_id"],
        "finished": source.dataset.is_finished,
        "path": str(target),
        "bytes": len(data),
        "figures": [str(p) for p in drawn],
    }


def said(written: dict[str, Any]) -> str:
    """What people are told of a report that was written."""
    figures_said = f", {len(written['figures'])} figures" if written["figures"] else ""
    state = "" if written["finished"] else "; the sweep is not finished, and the report says what is missing"
    return f"{written['path']} ({written['bytes'] / 1e6:.2f} MB{figures_said}){state}"


def _linked(name: str) -> str:
    """A folder's name as part of a link."""
    from urllib.parse import quote

    return quote(name)


def _write(path: Path, data: bytes) -> None:
    with files.explained("write", path):
        files.ensure_folder(path.parent)
        files.replace(path, data)
