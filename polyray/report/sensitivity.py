"""Sensitivity: how well a sweep's scores agree with those of its variants, from the dataset alone.

Place in the flow: `polyray sensitivity` prints and draws what comes out of here.
"""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from polyray.dataset import Dataset
from polyray.report.summary import shown

SCORES: dict[str, tuple[str | None, str]] = {
    "log ψ paper": ("paper", "log_psi"),
    "log ψ specific": ("specific", "log_psi"),
    "S": (None, "S"),
    "Q": (None, "Q"),
    "D": (None, "D"),
}
"""Scores of the short table and the figure: their preset (none: raw) and name in the table `sensitivity`."""
SHARES = ("same_k_frac", "adjusted_rand", "n_called_base", "n_called", "called_flip_frac", "D_flip_frac")
COLUMNS = ("vary", "value", "neurons", *SCORES, "same k", "Rand", "called")
"""Head of the short table."""
CAPTION = (
    "Spearman correlation of each score with the sweep's, over the neurons that both scored, with a bootstrap 95 % "
    "interval. same k: share of neurons with as many clusters. Rand: mean adjusted Rand index of their clusters. "
    "called: neurons at q < α in the sweep → in the variant."
)
PAPER_TEXT_HEAD = 0.21
"""Spearman that arXiv 2508.16950 gives for another text head, for comparison."""
_COLOURS = ("#7f7f7f", "#d62728", "#1f77b4", "#2ca02c", "#9467bd")


def variant_table(dataset: Dataset) -> list[dict[str, Any]]:
    """One record for each variant, in order of what is varied and its value; none where nothing was varied.

    Returns:
        variant, vary, value, n (neurons that both scored), spearman (estimate, low, high, n by the names of `SCORES`
        and by `preset_score` for all others), and the same of same_k_frac, adjusted_rand, n_called_base, n_called,
        called_flip_frac, D_flip_frac. Figures are of the whole sweep; missing ones are None.
    """
    if "sensitivity" not in dataset:
        return []
    rows = [r for r in dataset["sensitivity"].to_table().to_pylist() if r["layer"] is None]
    variants = sorted({(r["vary"], _natural(r["value"]), r["value"], r["variant"]) for r in rows})
    return [_record(vary, value, variant, rows) for vary, _, value, variant in variants]


def _natural(value: str) -> tuple[float, str]:
    """Numbers by size, other values by name."""
    try:
        return float(value), ""
    except ValueError:
        return np.inf, value


def _record(vary: str, value: str, variant: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = {asked: name for name, asked in SCORES.items()}
    record: dict[str, Any] = {"variant": variant, "vary": vary, "value": value, "n": 0, "spearman": {}}
    for row in rows:
        if row["variant"] != variant:
            continue
        figures = {c: row[c] for c in ("estimate", "low", "high", "n")}
        if row["metric"] == "spearman":
            asked = row["preset"], row["score"]
            record["spearman"][names.get(asked, f"{row['preset']}_{row['score']}")] = figures
        else:
            record[row["metric"]] = figures
    record["n"] = record["n_called"]["n"]
    return record


def cells(record: dict[str, Any]) -> list[str]:
    """One line of the short table."""
    calls = (record[name]["estimate"] for name in ("n_called_base", "n_called"))
    return [
        record["vary"],
        record["value"],
        str(record["n"]),
        *(_interval(record["spearman"][name]) for name in SCORES),
        shown(record["same_k_frac"]["estimate"], 2),
        shown(record["adjusted_rand"]["estimate"], 2),
        " → ".join(str(int(n)) for n in calls),
    ]


def _interval(figures: dict[str, Any]) -> str:
    value, low, high = (shown(figures[c], 2) for c in ("estimate", "low", "high"))
    return value if figures["low"] is None else f"{value} ({low}–{high})"


def draw(dataset: Dataset, path: Path) -> Path:
    """Draws Spearman correlations with their intervals, a line a variant.

    Args:
        dataset: a sweep that was varied.
        path: where the PNG goes; replaced where it exists.

    Returns:
        The path.
    """
    records = variant_table(dataset)
    figure, axes = plt.subplots(figsize=(9, 1.8 + 0.6 * len(records)), layout="constrained")
    y = np.arange(len(records))
    for i, (name, colour) in enumerate(zip(SCORES, _COLOURS, strict=True)):
        value, low, high = (
            np.array([np.nan if r["spearman"][name][c] is None else r["spearman"][name][c] for r in records])
            for c in ("estimate", "low", "high")
        )
        at = y + (i - (len(SCORES) - 1) / 2) * 0.14
        axes.hlines(at, low, high, color=colour, linewidth=1.2)
        axes.plot(value, at, "o", color=colour, markersize=4, label=name)
    paper = f"paper, another text head: {PAPER_TEXT_HEAD}"
    axes.axvline(PAPER_TEXT_HEAD, color="black", linewidth=0.8, linestyle=":", label=paper)
    axes.set_yticks(y, [_label(r) for r in records], fontsize=8)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(right=1.02)
    axes.set_xlabel("Spearman correlation with the sweep, 95 % interval")
    axes.grid(axis="x", linewidth=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(SCORES) + 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _label(record: dict[str, Any]) -> str:
    """What is varied, short enough for an axis: of a file its name alone."""
    value = record["value"]
    value = Path(value).name if record["vary"] in ("prompts", "encoder") and "(" not in value else value
    return "\n".join(textwrap.wrap(f"{record['vary']} = {value}", 34)[:3])
