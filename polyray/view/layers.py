"""Layers: the map, a row a layer.

Which question it answers: *where in the network is what?* Place in the flow: asks `index.py`; for progress, the commit
records by way of `cluster/progress.py`.
"""

from typing import Any

import numpy as np

from polyray.report.catalog import Catalog
from polyray.report.summary import AUROC_AGAINST
from polyray.view.columns import STATUSES
from polyray.view.index import Index

N_BINS = 40


def overview(index: Index, catalog: Catalog, preset: str) -> dict[str, Any]:
    """What every layer comes to.

    Returns:
        low, high: ends of what the distributions show; most: neurons of the largest layer; layers in order of depth:
        layer, planned (neurons that the sweep is about), n (those of them that have a row), n_ok, n_excluded, n_failed,
        n_tested and n_called (with a q, and with one below alpha; of a language sweep with a difference, and with one
        above 0), median, counts and null_counts by bin, and what the sweep's own summary says where there is one: auroc
        (value, low, high) against the null neurons that ask the preset's question, null_called (share of one-concept
        null neurons that are called as neurons are), and beside (of a language sweep, the share with a positive
        difference under each control of `BESIDE`); total: the same over all layers.
    """
    value = index.kind.column(index.kind.spread).of(preset)
    low, high = _ends(index, catalog, preset, value)
    bins = {"low": low, "step": (high - low) / N_BINS or 1.0, "last": N_BINS - 1}
    grouped = index.ask(
        f"SELECT layer_id, {_figures(index, value)} FROM {index.neurons} GROUP BY GROUPING SETS ((layer_id), ())"
    )
    of = {r["layer_id"]: r for r in grouped}
    empty = {c: 0 for c in ("n", "n_ok", "n_excluded", "n_failed", "n_tested", "n_called")} | {"median": None}
    counts = _counts(
        index.ask(f"SELECT layer_id, {_bin(value)} AS bin, count(*) AS n FROM {index.neurons} "
                  f"WHERE isfinite({value}) GROUP BY ALL", bins),
    )  # fmt: skip
    null_counts = {} if index.is_categorical else _null_counts(index, catalog, preset, bins)
    told = _told_of_language(catalog) if index.is_categorical else _told(catalog, preset)
    layers = []
    for i, layer in enumerate(index.layers):
        shown = (empty | of.get(i, {})) | {"layer": layer, "planned": index.planned.get(layer)}
        shown |= told.get(layer, _UNTOLD)
        layers.append(shown | {"counts": counts.get(i), "null_counts": null_counts.get(i)})
    total = empty | of.get(None, {}) | {"planned": sum(index.planned.values()) or None} | told.get(None, _UNTOLD)
    most = max([r["planned"] or r["n"] for r in layers], default=0)
    return {"low": low, "high": high, "most": most, "layers": layers, "total": total}


_NONE = {"value": None, "low": None, "high": None}
_UNTOLD: dict[str, Any] = {"auroc": _NONE, "null_called": None, "beside": {}}

BESIDE = ("precursors_random", "tokens_same_frequency")
"""Controls of a language sweep whose share of positive differences stands beside the neurons' own."""


def _told(catalog: Catalog, preset: str) -> dict[str | None, dict[str, Any]]:
    """What `layer_summary` has, by layer, None for the whole sweep."""
    if preset not in AUROC_AGAINST:
        return {}
    # Neurons are called under `specific` whatever preset is shown, and what is called by mistake is of its null.
    rows = catalog.rows(
        "SELECT layer, metric, value, low, high FROM layer_summary WHERE "
        "metric = 'auroc' AND preset = $preset AND null_kind = $kind AND score = 'log_psi' OR "
        "metric = 'null_called_frac' AND preset = 'specific' AND null_kind = 'one_concept'",
        {"kind": AUROC_AGAINST[preset], "preset": preset},
    )
    found: dict[str | None, dict[str, Any]] = {}
    for r in rows:
        of = found.setdefault(r["layer"], dict(_UNTOLD))
        if r["metric"] == "auroc":
            of["auroc"] = {k: r[k] for k in _NONE}
        else:
            of["null_called"] = r["value"]
    return found


def _told_of_language(catalog: Catalog) -> dict[str | None, dict[str, Any]]:
    """What `categorical` has, likewise."""
    query = "SELECT layer, condition, positive FROM categorical WHERE condition IN (SELECT unnest($beside::VARCHAR[]))"
    found: dict[str | None, dict[str, Any]] = {}
    for r in catalog.rows(query, {"beside": list(BESIDE)}):
        found.setdefault(r["layer"], _UNTOLD | {"beside": {}})["beside"][r["condition"]] = r["positive"]
    return found


def _figures(index: Index, value: str) -> str:
    tested, called = ("difference IS NOT NULL", "difference > 0") if index.is_categorical else (
        "fdr_q IS NOT NULL", "called")  # fmt: skip
    statuses = ", ".join(f"count(*) FILTER (status = {i}) AS n_{s}" for i, s in enumerate(("ok", "excluded", "failed")))
    return (
        f"count(*) FILTER (status <> {STATUSES.index('mined')}) AS n, {statuses}, "
        f"count(*) FILTER ({tested}) AS n_tested, count(*) FILTER ({called}) AS n_called, median({value}) AS median"
    )


def _ends(index: Index, catalog: Catalog, preset: str, value: str) -> tuple[float, float]:
    """What most values lie between, of null neurons as well; those beyond are counted in the last bins."""
    quantiles = f"quantile_cont({value}, [0.005, 0.995]) AS ends"
    found = index.ask(f"SELECT {quantiles} FROM {index.neurons} WHERE isfinite({value})")[0]["ends"]
    low, high = found or (-3.0, 0.0)
    if index.is_categorical:
        return low, high
    null = catalog.rows(
        f"SELECT {quantiles} FROM null_neurons WHERE kind = $kind AND isfinite({value})",
        {"kind": AUROC_AGAINST[preset]},
    )[0]["ends"]
    return min(low, -1.0, *((null or [0.0])[:1])), 0.0


def _bin(value: str) -> str:
    return f"least(greatest(floor(({value} - $low) / $step), 0), $last)::INTEGER"


def _counts(rows: list[dict[str, Any]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for r in rows:
        found.setdefault(r["layer_id"], [0] * N_BINS)[r["bin"]] = r["n"]
    return found


def _null_counts(index: Index, catalog: Catalog, preset: str, bins: dict[str, Any]) -> dict[int, list[int]]:
    """Of the null neurons that ask the preset's own question."""
    value = f"{preset}_log_psi"
    found = catalog.rows(
        f"SELECT layer, {_bin(value)} AS bin, count(*) AS n FROM null_neurons WHERE kind = $kind AND isfinite({value}) "
        "GROUP BY ALL",
        bins | {"kind": AUROC_AGAINST[preset]},
    )
    numbers = {layer: i for i, layer in enumerate(index.layers)}
    return _counts([r | {"layer_id": numbers[r["layer"]]} for r in found if r["layer"] in numbers])


def outline(counts: list[int] | None) -> str:
    """A distribution as the points of an SVG polygon, 100 wide and 1 high."""
    if not counts or not sum(counts):
        return ""
    heights = np.array(counts, float) / max(counts)
    step = 100 / len(counts)
    points = ["0,1"]
    for i, h in enumerate(heights.tolist()):
        points += [f"{i * step:g},{1 - h:.3f}", f"{(i + 1) * step:g},{1 - h:.3f}"]
    return " ".join([*points, "100,1"])
