"""Charts: numbers as shapes of SVG, drawn on the server.

Place in the flow: under `neuron.py` and `language.py`; the templates draw what is returned. Shapes carry classes, no
styles, so that light, dark and print are the style sheet's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT = 260, 84
N_BINS = 32


def histogram(draws: Sequence[float | None], value: float | None) -> dict[str, Any] | None:
    """Draws as bars, with a mark where the real value is; None where there is no draw.

    Returns:
        bars (x, y, width, height in a box of `WIDTH` × `HEIGHT`), at (x of the value, None without one), low, high
        (ends of the axis), n, n_above (draws as high as the value or higher), median of the draws.
    """
    x = np.array([d for d in draws if d is not None and math.isfinite(d)], float)
    if not len(x):
        return None
    shown = x if value is None or not math.isfinite(value) else np.append(x, value)
    low, high = float(shown.min()), float(shown.max())
    pad = (high - low) * 0.03 or 0.5
    low, high = low - pad, high + pad
    counts = np.histogram(x, N_BINS, (low, high))[0]
    w = WIDTH / N_BINS
    bars = [
        {"x": round(i * w, 2), "y": round(HEIGHT * (1 - c / counts.max()), 2), "w": round(w - 0.5, 2),
         "h": round(HEIGHT * c / counts.max(), 2)}
        for i, c in enumerate(counts.tolist())
        if c
    ]  # fmt: skip
    at = None if value is None else round((value - low) / (high - low) * WIDTH, 2)
    above = None if value is None else int((x >= value).sum())
    return {"bars": bars, "at": at, "low": low, "high": high, "n": len(x), "n_above": above,
            "median": float(np.median(x)), "value": value}  # fmt: skip


def intervals(rows: Sequence[dict[str, Any]], keys: tuple[str, str, str]) -> dict[str, Any] | None:
    """Means with intervals on one axis that has 0: positions from 0 to 100."""
    values = [r[k] for r in rows for k in keys if r[k] is not None and math.isfinite(r[k])]
    if not values:
        return None
    low, high = min([0.0, *values]), max([0.0, *values])
    pad = (high - low) * 0.06 or 1.0
    low, high = low - pad, high + pad

    def at(x: float | None) -> float | None:
        return None if x is None or not math.isfinite(x) else round((x - low) / (high - low) * 100, 2)

    return {"zero": at(0.0), "rows": [tuple(at(r[k]) for k in keys) for r in rows], "low": low, "high": high}


def curves(lines: Mapping[str, Sequence[float | None]], width: int = 420, height: int = 170) -> dict[str, Any] | None:
    """Lines over the same steps as SVG points, with the values of the axis; None where no line has a value."""
    known = {name: [y for y in ys if y is not None and math.isfinite(y)] for name, ys in lines.items()}
    values = [y for ys in known.values() for y in ys]
    if not values:
        return None
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or 0.05
    low, high = low - pad, high + pad
    drawn = {}
    for name, ys in lines.items():
        step = width / max(1, len(ys) - 1)
        drawn[name] = [
            (round(i * step, 2), round(height * (1 - (y - low) / (high - low)), 2))
            for i, y in enumerate(ys)
            if y is not None and math.isfinite(y)
        ]
    ticks = [{"y": round(height * (1 - t), 2), "value": low + t * (high - low)} for t in (0.0, 0.5, 1.0)]
    return {"lines": drawn, "ticks": ticks, "width": width, "height": height}
