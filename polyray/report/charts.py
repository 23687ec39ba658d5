"""Charts: the four kinds of picture of the report.

Place in the flow: `story.py` and what belongs to it hand over numbers, `svg.py` draws. Missing numbers are left out of
a picture; the table beside it has a dash.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from polyray.report.svg import WIDTH, Drawing, colour, cut, dash, letters, said, ticks

_TOP, _BOTTOM, _RIGHT = 8, 34, 12
_LEGEND = 15
_MANY = 30
"""Rows beyond which they stand closer."""
_MOST_LEFT = 180.0
"""Room for the labels of rows."""
_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """Figures that belong together; each with the ends of its interval, where it has one."""

    name: str
    values: Sequence[float | None]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()

    def at(self, i: int) -> tuple[float | None, float | None, float | None]:
        """Figure, low and high of one row; None where there is none, or none that is finite."""
        low = self.lows[i] if self.lows else None
        high = self.highs[i] if self.highs else None
        return _finite(self.values[i]), _finite(low), _finite(high)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


@dataclass(frozen=True)
class Hexes:
    """Hexagons of a plane: centre, neurons, and the sign that it bears, if any."""

    cells: Sequence[tuple[float, float, int, str | None]]
    dx: float
    """Width of a hexagon, in units of x."""


def _legend(drawing: Drawing, names: Sequence[str], y: float, lines: bool = False) -> None:
    for i, name in enumerate(names):
        at = y + i * _LEGEND
        if lines:
            drawing.line(10, at - 4, 30, at - 4, f"line {colour(i)} {dash(i)}".strip())
        else:
            drawing.mark(20, at - 4, i)
        drawing.text(38, at, cut(name, WIDTH - 44), "soft", name)


def dots(
    labels: Sequence[str],
    series: Sequence[Series],
    x_label: str,
    told: str,
    reference: float | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """A row for each label; in it a mark for each series, with its interval as a line.

    Args:
        labels: of the rows, from the top.
        series: a figure for each row.
        x_label: what the figures are.
        told: to a reader who does not see it.
        reference: where a dashed line stands.
        limits: ends of the axis, where they are not the figures'.
    """
    found = [v for s in series for i in range(len(labels)) for v in s.at(i) if v is not None]
    found += [] if reference is None else [reference]
    low, high = _limits(found, limits)
    left = min(_MOST_LEFT, 14 + max((letters(x) for x in labels), default=26.0))
    n_legend = len(series) if len(series) > 1 else 0
    top = _TOP + _LEGEND * n_legend + 4
    row = 13.0 if len(series) == 1 and len(labels) > _MANY else max(18.0, 10 + 8.5 * len(series))
    drawing = Drawing(WIDTH, top + row * max(1, len(labels)) + _BOTTOM)
    bottom = drawing.height - _BOTTOM
    _legend(drawing, [s.name for s in series] if n_legend else [], _TOP + 8)

    def x(value: float) -> float:
        share = (value - low) / (high - low)
        return left + min(max(share, 0.0), 1.0) * (WIDTH - _RIGHT - left)

    _x_axis(drawing, x, ticks(low, high, 4), left, top, bottom, x_label)
    if reference is not None:
        drawing.line(x(reference), top, x(reference), bottom, "ref")
    for i, label in enumerate(labels):
        middle = top + row * (i + 0.5)
        if i and len(series) > 1:
            drawing.line(8, top + row * i, WIDTH - _RIGHT, top + row * i, "grid")
        drawing.text(left - 8, middle + 4, cut(label, left - 10), "end", label)
        for j, s in enumerate(series):
            y = middle + 8.5 * (j - (len(series) - 1) / 2)
            value, a, b = s.at(i)
            if a is not None and b is not None:
                drawing.line(x(a), y, x(b), y, f"span {colour(j)}")
            if value is not None:
                drawing.mark(x(value), y, j)
    return drawing.svg(told)


def lines(
    x_values: Sequence[float],
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    told: str,
    limits: tuple[float | None, float | None] = (None, None),
    reference: float | None = None,
    ends: tuple[float, float] | None = None,
) -> Markup:
    """Lines over an axis; a series with intervals has them as a band.

    Args:
        x_values: places of the figures.
        series: a figure for each place.
        x_label: what the places are.
        y_label: what the figures are.
        told: to a reader who does not see it.
        limits: ends of the axis of figures, where they are not the figures'.
        reference: place on the lower axis where a dashed line stands.
        ends: of the lower axis, where they are not the first and last place.
    """
    found = [v for s in series for i in range(len(x_values)) for v in s.at(i) if v is not None]
    low, high = _limits(found, limits)
    n_legend = len(series) if len(series) > 1 else 0
    left, top = 46.0, _TOP + _LEGEND * n_legend + 18.0
    drawing = Drawing(WIDTH, top + 170 + _BOTTOM)
    bottom = drawing.height - _BOTTOM
    _legend(drawing, [s.name for s in series] if n_legend else [], _TOP + 8, lines=True)
    first, last = ends or ((min(x_values), max(x_values)) if x_values else (0.0, 1.0))
    last = last if last > first else first + 1

    def x(value: float) -> float:
        return left + (value - first) / (last - first) * (WIDTH - _RIGHT - left)

    def y(value: float) -> float:
        return bottom - min(max((value - low) / (high - low), 0.0), 1.0) * (bottom - top)

    drawing.text(4, top - 8, cut(y_label, WIDTH - 10), "soft", y_label)
    for tick in ticks(low, high, 4):
        drawing.line(left, y(tick), WIDTH - _RIGHT, y(tick), "grid")
        drawing.text(left - 6, y(tick) + 4, said(tick), "end soft")
    _x_axis(drawing, x, ticks(first, last, 5), left, bottom, bottom, x_label)
    if reference is not None and first <= reference <= last:
        drawing.line(x(reference), top, x(reference), bottom, "ref")
    for j, s in enumerate(series):
        rows = [(x(at), s.at(i)) for i, at in enumerate(x_values)]
        band = [(at, a, b) for at, (_, a, b) in rows if a is not None and b is not None]
        if band:
            around = [(at, y(b)) for at, _, b in band] + [(at, y(a)) for at, a, _ in reversed(band)]
            drawing.path(around, f"area {colour(j)}", closed=True)
        points = [(at, y(v)) for at, (v, _, _) in rows if v is not None]
        if points:
            drawing.path(points, f"line {colour(j)} {dash(j)}".strip())
    return drawing.svg(told)


def hexagons(
    found: Hexes,
    x_label: str,
    y_label: str,
    told: str,
    limits: tuple[float, float, float, float],
) -> Markup:
    """A plane of hexagons, the darker the more neurons (by the logarithm), with their signs.

    Args:
        found: the hexagons.
        x_label: what lies on the lower axis.
        y_label: what lies on the left axis.
        told: to a reader who does not see it.
        limits: left, right, lower and upper end of the plane.
    """
    x0, x1, y0, y1 = limits
    left, top = 46.0, 26.0
    side = WIDTH - _RIGHT - left
    drawing = Drawing(WIDTH, top + side + _BOTTOM)
    bottom = drawing.height - _BOTTOM

    def x(value: float) -> float:
        return left + (value - x0) / (x1 - x0) * side

    def y(value: float) -> float:
        return bottom - (value - y0) / (y1 - y0) * side

    drawing.text(4, 14, cut(y_label, WIDTH - 10), "soft", y_label)
    for tick in ticks(y0, y1, 5):
        drawing.line(left, y(tick), WIDTH - _RIGHT, y(tick), "grid")
        drawing.text(left - 6, y(tick) + 4, said(tick), "end soft")
    _x_axis(drawing, x, ticks(x0, x1, 5), left, top, bottom, x_label)
    radius = found.dx / (x1 - x0) * side / math.sqrt(3)
    most = max((n for _, _, n, _ in found.cells), default=1)
    for a, b, n, sign in found.cells:
        share = math.log1p(n) / math.log1p(most)
        drawing.hexagon(x(a), y(b), radius * 0.97, 0.15 + 0.6 * share)
        if sign is not None:
            drawing.sign(x(a), y(b), sign, min(3.2, radius * 0.5))
    if x0 < 0 < x1:
        drawing.line(x(0), top, x(0), bottom, "ref")
    if y0 < 0 < y1:
        drawing.line(left, y(0), WIDTH - _RIGHT, y(0), "ref")
    return drawing.svg(told)


def _x_axis(
    drawing: Drawing, x: _Scale, at: Sequence[float], left: float, top: float, bottom: float, label: str
) -> None:
    for tick in at:
        if top < bottom:
            drawing.line(x(tick), top, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 14, said(tick), "mid soft")
    drawing.line(left, bottom, drawing.width - _RIGHT, bottom, "axis")
    said_label = cut(label, drawing.width - 12)
    half = drawing.width / 2 if len(said_label) < len(label) else letters(said_label) / 2
    middle = min((left + drawing.width - _RIGHT) / 2, drawing.width - 4 - half)
    drawing.text(middle, bottom + 29, said_label, "mid soft", label)


def _limits(found: Sequence[float], asked: tuple[float | None, float | None]) -> tuple[float, float]:
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    room = (high - low) * 0.04 or 0.5
    low = low - room if asked[0] is None else asked[0]
    high = high + room if asked[1] is None else asked[1]
    return (low, high) if high > low else (low - 0.5, low + 0.5)
