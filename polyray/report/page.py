"""Page: a report as one HTML file that opens offline.

Place in the flow: after `story.py`. Whatever comes from the dataset is escaped by the template; nothing is fetched, no
script runs, and pictures are part of the file.
"""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from polyray.report.content import Story
from polyray.report.svg import style

MOST_BYTES = 10_000_000
"""The page stays below it, whatever the size of the census."""


def _environment() -> Environment:
    loader = PackageLoader("polyray.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def html(story: Story) -> str:
    """The page of a report."""
    environment = _environment()
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    template = environment.get_template("report.html")
    # The style sheets are the package's own.
    return template.render(story=story, chart_style=Markup(style()), version=_version())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("polyray")
    except PackageNotFoundError:
        return "from a folder"
