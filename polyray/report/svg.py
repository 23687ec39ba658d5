"""SVG: small charts whose text is text, for light and dark pages, screens and paper.

Place in the flow: beside `content.py`; `charts.py` draws with it. Colours are the style sheet's (`chart.css`), so that
they follow the reader's scheme; what colours tell apart, shapes and dashes tell apart as well.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib import resources

from markupsafe import Markup, escape

WIDTH = 360
"""Units of a chart's width: about a pixel each where there is room, so that letters are as large as the page's."""
N_COLOURS = 6
_LETTER = 6.5
"""Mean width of a letter."""


@cache
def style() -> str:
    """The charts' style sheet."""
    return (resources.files("polyray.report") / "templates" / "chart.css").read_text(encoding="utf-8")


def standalone(svg: Markup) -> str:
    """A chart as a file of its own, with its style."""
    head, mark, rest = str(svg).partition(">")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}{mark}<style>{style()}</style>{rest}\n'


def letters(text: str) -> float:
    """About how wide a text is."""
    return _LETTER * len(text)


def cut(text: str, room: float) -> str:
    """A text that fits into so many units."""
    n = max(3, int(room / _LETTER))
    return text if len(text) <= n else text[: n - 1] + "…"


class Drawing:
    """A chart that is being drawn. Coordinates are units from its upper left corner.

    Args:
        width: units.
        height: units.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def svg(self, label: str) -> Markup:
        """The finished element; a reader who does not see it is told the label."""
        size = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}" height="{_n(self.height)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{escape(label)}" {size}>'
        return Markup(head + "".join(self._parts) + "</svg>")

    def text(self, x: float, y: float, text: str, classes: str = "", whole: str = "") -> None:
        """A text; `whole` is what it was cut from."""
        told = f"<title>{escape(whole)}</title>" if whole and whole != text else ""
        self._parts.append(f'<text x="{_n(x)}" y="{_n(y)}"{_class(classes)}>{told}{escape(text)}</text>')

    def line(self, x0: float, y0: float, x1: float, y1: float, classes: str) -> None:
        """A straight line."""
        self._parts.append(f'<line x1="{_n(x0)}" y1="{_n(y0)}" x2="{_n(x1)}" y2="{_n(y1)}"{_class(classes)}/>')

    def path(self, points: Sequence[tuple[float, float]], classes: str, closed: bool = False) -> None:
        """A line through points, or the area inside it."""
        steps = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self._parts.append(f'<path d="M{steps}{"Z" if closed else ""}"{_class(classes)}/>')

    def hexagon(self, x: float, y: float, radius: float, opacity: float) -> None:
        """A hexagon that stands on a corner."""
        corners = [(x + radius * math.sin(a * math.pi / 3), y + radius * math.cos(a * math.pi / 3)) for a in range(6)]
        steps = "L".join(f"{_n(a)} {_n(b)}" for a, b in corners)
        self._parts.append(f'<path d="M{steps}Z" class="hex" opacity="{_n(opacity)}"/>')

    def mark(self, x: float, y: float, i: int, radius: float = 3.4) -> None:
        """The mark of the i-th series: circle, square, triangle, diamond, other triangle, bar."""
        r = radius
        if i % N_COLOURS == 0:
            self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" class="mark c1"/>')
            return
        shapes = (
            [(-r, -r), (r, -r), (r, r), (-r, r)],
            [(0, -1.2 * r), (1.2 * r, r), (-1.2 * r, r)],
            [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
            [(0, 1.2 * r), (1.2 * r, -r), (-1.2 * r, -r)],
            [(-0.5 * r, -1.3 * r), (0.5 * r, -1.3 * r), (0.5 * r, 1.3 * r), (-0.5 * r, 1.3 * r)],
        )
        corners = [(x + a, y + b) for a, b in shapes[i % N_COLOURS - 1]]
        self.path(corners, f"mark {colour(i)}", closed=True)

    def sign(self, x: float, y: float, kind: str, radius: float = 3.2) -> None:
        """A sign on a hexagon: `dot`, `ring` or `vee`."""
        if kind == "vee":
            self.path([(x - radius, y - radius + 1), (x, y + radius), (x + radius, y - radius + 1)], "sign")
        else:
            full = " full" if kind == "dot" else ""
            r = radius - 0.8 if kind == "dot" else radius
            self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" class="sign{full}"/>')


def colour(i: int) -> str:
    """Class of the i-th series' colour."""
    return f"c{i % N_COLOURS + 1}"


def dash(i: int) -> str:
    """Class of the i-th series' dashes; none for the first."""
    return f"d{i % N_COLOURS + 1}" if i % N_COLOURS else ""


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers between two others, about n."""
    raw = (high - low) / max(n, 1)
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def said(value: float) -> str:
    """A tick's number."""
    return f"{round(value, 10) + 0.0:g}".replace("-", "−")


def _class(classes: str) -> str:
    return f' class="{classes}"' if classes else ""


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
