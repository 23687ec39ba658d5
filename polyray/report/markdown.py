"""Markdown: a report as a supplement to a paper, with its figures as SVG files.

Place in the flow: after `story.py`, as `page.py` is. Pictures of neurons are left out: a supplement is text, tables and
figures. Whatever comes from the dataset is escaped, so that no cell ends its table and no name becomes a tag or a link.
"""

import re
from collections.abc import Iterator

from polyray.report.content import Block, Card, Cards, Code, Facts, Figure, Missing, Points, Prose, Story, Table
from polyray.report.svg import standalone

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&!@]|:(?=//)|(?<=www)\.)")
"""What Markdown would read as its own; addresses would become links by themselves."""


def figures(story: Story) -> dict[str, str]:
    """Every panel of every figure as an SVG file, by its name."""
    found = {}
    for section in story.sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                for i, panel in enumerate(block.panels, 1):
                    found[f"{block.name}-{i}.svg"] = standalone(panel.svg)
    return found


def markdown(story: Story, folder: str) -> str:
    """The supplement.

    Args:
        story: the report.
        folder: where the figures lie, relative to the supplement; of characters that need no escape in a link.
    """
    lines = [f"# {escaped(story.title)}", "", escaped(story.subtitle), ""]
    if story.state:
        lines += [f"**Not finished.** {escaped(story.state)}", ""]
    for number, section in enumerate(story.sections, 1):
        lines += [f"## {number} {escaped(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block, folder), ""]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", text)


def _block(block: Block, folder: str) -> Iterator[str]:
    if isinstance(block, Prose):
        yield escaped(block.text)
    elif isinstance(block, Missing):
        yield f"**Not here.** {escaped(block.text)}"
    elif isinstance(block, Points):
        yield f"**{escaped(block.title)}**"
        yield ""
        yield from (f"- {escaped(text)}" for text in block.texts)
    elif isinstance(block, Facts):
        yield from (f"- **{escaped(term)}**: {escaped(text)}" for term, text in block.rows)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Code):
        yield f"**{escaped(block.title)}**"
        yield ""
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        yield from (fence, block.text.rstrip("\n"), fence)
    elif isinstance(block, Figure):
        yield f"### {escaped(block.title)}"
        yield ""
        for i, panel in enumerate(block.panels, 1):
            yield f"![{escaped(panel.title)}]({folder}/{block.name}-{i}.svg)"
        yield ""
        yield f"*How to read it.* {escaped(block.caption)}"
        for table in block.tables:
            yield ""
            yield from _table(table)
    elif isinstance(block, Cards):
        for card in block.cards:
            yield from _card(card)


def _table(table: Table) -> Iterator[str]:
    yield f"**{escaped(table.caption)}**"
    yield ""
    yield "| " + " | ".join(map(escaped, table.heads)) + " |"
    marks = [
        "---" if i < table.n_text or (table.last_is_text and i + 1 == len(table.heads)) else "---:"
        for i in range(len(table.heads))
    ]
    yield "|" + "|".join(marks) + "|"
    yield from ("| " + " | ".join(map(escaped, row)) + " |" for row in table.rows)
    if table.note:
        yield ""
        yield escaped(table.note)


def _card(card: Card) -> Iterator[str]:
    yield f"### {escaped(card.title)}"
    yield ""
    yield "; ".join(f"{escaped(term)} {escaped(text)}" for term, text in card.facts)
    yield ""
    for group in card.groups:
        said = f" ({escaped(group.facts)})" if group.facts else ""
        texts = [
            f"“{escaped(s.before)}{f'**{escaped(s.peak)}**' if s.peak else ''}{escaped(s.after)}”"
            for s in group.snippets
        ]
        texts += [", ".join(escaped(t.strip() or "␠") for t in group.tokens)] if group.tokens else []
        yield f"- **{escaped(group.name)}**{said}" + ("".join(f"\n  - {t}" for t in texts))
    yield ""
