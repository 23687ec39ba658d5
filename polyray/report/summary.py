"""Summary: the figures that people read first, from the dataset alone.

Place in the flow: after the last stage; `cli.py` prints what comes out of here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyray.dataset import Dataset
from polyray.errors import StoreError

AUROC_AGAINST = {"paper": "rotation", "selective": "pool", "specific": "one_concept"}
"""The kind of null neuron that each preset is held against in the short table: the one that asks its own question."""


def layer_table(dataset: Dataset) -> list[dict[str, Any]]:
    """One record for each layer in order of depth, and a last one, `layer` None, for the whole sweep.

    Returns:
        n_neurons, n_ok, n_excluded, n_failed, reasons (count by reason), side_px, median_log_psi, auroc (value, low,
        high) and median_z by preset, called_frac, null_called_frac by kind of null neuron, median_k. Missing figures
        are None.

    Raises:
        StoreError: the sweep has not come to its summary yet.
    """
    if "layer_summary" not in dataset:
        raise StoreError(f"{str(dataset.path)!r} holds no summary yet; `polyray status` says how far the sweep is.")
    layers = sorted(dataset["layers"].to_table().to_pylist(), key=lambda r: r["depth"])
    figures = dataset["layer_summary"].to_table().to_pylist()
    sides = {r["layer"]: r["side_px"] for r in layers}
    return [_record(name, sides.get(name), figures) for name in [*sides, None]]


def _record(layer: str | None, side_px: int | None, figures: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [r for r in figures if r["layer"] == layer]

    def value(metric: str, **where: str) -> Any:
        found = [r for r in rows if r["metric"] == metric and all(r[k] == v for k, v in where.items())]
        return found[0] if found else {"value": None, "low": None, "high": None}

    counts = {name: int(value(name)["value"] or 0) for name in ("n_neurons", "n_ok", "n_excluded", "n_failed")}
    prefix = "n_reason:"
    return counts | {
        "layer": layer,
        "side_px": side_px,
        "reasons": {r["metric"].removeprefix(prefix): int(r["value"]) for r in rows if r["metric"].startswith(prefix)},
        "median_k": value("median_k")["value"],
        "median_log_psi": {p: value("median_log_psi", preset=p)["value"] for p in AUROC_AGAINST},
        "median_z": {
            p: {c: value("median_z", preset=p, score=c)["value"] for c in ("S", "Q", "D")} for p in AUROC_AGAINST
        },
        "auroc": {
            p: {k: value("auroc", preset=p, null_kind=kind, score="log_psi")[k] for k in ("value", "low", "high")}
            for p, kind in AUROC_AGAINST.items()
        },
        "called_frac": value("called_frac")["value"],
        "null_called_frac": {
            kind: value("null_called_frac", null_kind=kind)["value"] for kind in AUROC_AGAINST.values()
        },
    }


def shown(value: float | None, digits: int = 3) -> str:
    """A figure for a table cell; a dash where it is missing."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def series(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """One figure of several rows, to be drawn; NaN where it is missing or null."""
    return np.array([row.get(name) for row in rows], dtype=np.float64)


def excluded(record: dict[str, Any]) -> str:
    """Excluded and failed neurons of a layer with their reasons, for a table cell."""
    n = record["n_excluded"] + record["n_failed"]
    if n == 0:
        return "0"
    return f"{n} ({', '.join(f'{count} {reason}' for reason, count in record['reasons'].items())})"


COLUMNS = (
    "layer",
    "neurons",
    "excluded",
    "log ψ",
    "AUROC paper",
    "AUROC selective",
    "AUROC specific",
    "q < α",
    "null called",
)
"""Head of the short table. log ψ is the median under `specific`; null called is the share of one_concept neurons."""


def cells(record: dict[str, Any]) -> list[str]:
    """One line of the short table."""
    return [
        record["layer"] or "all",
        str(record["n_neurons"]),
        excluded(record),
        shown(record["median_log_psi"]["specific"], 2),
        *(shown(record["auroc"][preset]["value"]) for preset in AUROC_AGAINST),
        shown(record["called_frac"]),
        shown(record["null_called_frac"]["one_concept"]),
    ]


def markdown(records: list[dict[str, Any]]) -> str:
    """The short table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(cells(r)) + " |" for r in records)])
