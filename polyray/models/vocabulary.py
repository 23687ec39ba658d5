"""Which question it answers: *what may a cluster be called?*

Place in the flow: an encoder turns the prompts into text vectors once; cluster names by the nearest of them. The
built-in vocabulary is the 1,000 ImageNet class names and `attributes.txt`: textures, colours, parts, materials,
scenes, actions; that of language models is `topics.txt`: topics, registers, grammar.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from polyray.errors import ConfigError, nearest

# open_clip gives two pairs of classes one name; WordNet's own words for the other of each pair set them apart.
_DISTINCT = {744: "projectile", 836: "sunglass"}


def imagenet_class_names() -> list[str]:
    """The 1,000 classes of ImageNet-1k in the order of a classifier's outputs, all distinct (in any case).

    Source: open_clip's curated names; classes 744 and 836, which repeat 657 and 837 there, by their WordNet names.
    """
    # Imported here, since it brings all of open_clip along.
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return [_DISTINCT.get(i, name) for i, name in enumerate(IMAGENET_CLASSNAMES)]


def builtin_prompts() -> list[str]:
    """The built-in vocabulary: the class names, then the attributes; all distinct."""
    text = files("polyray.models").joinpath("attributes.txt").read_text(encoding="utf-8")
    return imagenet_class_names() + _parse(text)


def topic_prompts() -> list[str]:
    """The built-in vocabulary of language models: topics, registers and grammatical phenomena; all distinct."""
    return _parse(files("polyray.models").joinpath("topics.txt").read_text(encoding="utf-8"))


def load_prompts(vocabulary: str, builtin: Callable[[], list[str]] = builtin_prompts) -> list[str]:
    """The prompts that `science.vocabulary` asks for.

    Args:
        vocabulary: `builtin`, or a text file (UTF-8) with one prompt a line. Spaces around a prompt, blank lines and
            lines that start with `#` are skipped; of equal prompts the first counts, and the order is kept.
        builtin: what `builtin` stands for.

    Raises:
        ConfigError: the file is missing, no text, or holds no prompt.
    """
    if vocabulary == "builtin":
        return builtin()
    path = Path(vocabulary).expanduser()
    try:
        # A byte order mark is no part of the first prompt.
        prompts = _parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"science.vocabulary {vocabulary!r} is not UTF-8 text: {e}. Save it as UTF-8.") from e
    except OSError as e:
        raise ConfigError(f"science.vocabulary {vocabulary!r} cannot be read: {e.strerror}.{_neighbours(path)}") from e
    if not prompts:
        raise ConfigError(f"science.vocabulary {vocabulary!r} holds no prompt: write one a line.")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in their order, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts), ensure_ascii=True).encode()).hexdigest()


def _parse(text: str) -> list[str]:
    """Prompts of a text, one a line; `str.splitlines` would also split at characters inside a prompt."""
    lines = (line.strip() for line in text.split("\n"))
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def _neighbours(path: Path) -> str:
    """A clause that names what the user may have meant."""
    if path.is_dir():
        return " It is a folder: give a text file in it, or 'builtin'."
    if not path.parent.is_dir():
        return (
            f" There is no folder {str(path.parent)!r} either. Give a text file with one prompt a line, or 'builtin'."
        )
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    except OSError:
        names = []
    return nearest(path.name, [*names, "builtin"])
