"""Content: what a report is made of, whatever it is written as.

Which question it answers: *what is said, in which order?* Place in the flow: `story.py` makes it from a dataset;
`page.py` writes it as HTML, `markdown.py` as Markdown. All text here is plain text, yet to be escaped; names that come
from data have passed through `plain.visible`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Missing:
    """What a section has no rows for, and why."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    title: str
    texts: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Terms and what they are."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column is the row's head."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    n_text: int = 1
    """So many columns from the left hold text and stand left; the others hold figures and stand right."""
    last_is_text: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture of a figure."""

    title: str
    label: str
    """What a reader who does not see it is told."""
    svg: Markup
    """The whole `svg` element; whatever it holds of the dataset is escaped."""


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, how to read them, and their numbers."""

    name: str
    """Names its files."""
    title: str
    caption: str
    panels: Sequence[Panel]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Snippet:
    """A text with the peak marked."""

    before: str
    peak: str
    after: str


@dataclass(frozen=True)
class Group:
    """What belongs together of a neuron's examples: a cluster, or core-tokens."""

    name: str
    facts: str
    pictures: Sequence[str] = ()
    """`data:` addresses of JPEGs."""
    snippets: Sequence[Snippet] = ()
    tokens: Sequence[str] = ()
    missing: str = ""
    """Why there is nothing to be shown."""


@dataclass(frozen=True)
class Card:
    """One neuron."""

    title: str
    facts: Sequence[tuple[str, str]]
    groups: Sequence[Group]


@dataclass(frozen=True)
class Cards:
    """Neurons, the most certain first."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Code:
    """Something to be copied."""

    title: str
    text: str
    folded: bool = False


Block = Prose | Missing | Points | Facts | Table | Figure | Cards | Code


@dataclass(frozen=True)
class Section:
    """A part of the report with a head of its own."""

    slug: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Story:
    """A whole report."""

    title: str
    subtitle: str
    state: str
    """Empty of a finished sweep; else how far it is."""
    sections: Sequence[Section]
