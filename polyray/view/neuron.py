"""Neuron: everything that a PSI sweep says of one neuron.

Which question it answers: *what does this neuron respond to, how sure is that, and does it drive it?* Place in the
flow: reads the dataset by way of `report/catalog.py`; `app.py` shows it. A part that the sweep has not come to is None
or empty, and the page says so.
"""

import math
from typing import Any

from polyray.report.catalog import Catalog
from polyray.schema import COMPONENTS, CONTRASTS, PRESETS, SHARED_LAYER, SWAP_CONDITIONS
from polyray.view import charts, words
from polyray.view.index import Index

N_EXAMPLES = 24
"""Top examples that a page lists."""

_NULLS = {"paper": "rotation", "selective": "pool", "specific": "one_concept"}
_KINDS = {
    "rotation": "random directions",
    "pool": "random patches",
    "one_concept": "patches of one thing",
    "shuffle_text": "random names",
}


def neuron(catalog: Catalog, index: Index, layer: str, number: int) -> dict[str, Any] | None:
    """What a page of a neuron shows; None where no table has the neuron.

    Returns:
        row (of `neurons`, with q, called and diagnosis; None before it is calibrated), presets, clusters, examples,
        nulls, swaps, and what the layer is.
    """
    at: Any = {"layer": layer, "neuron": number}
    rows = catalog.at("neurons", **at)
    clusters = sorted(catalog.at("clusters", **at), key=lambda r: r["cluster"])
    examples = sorted(catalog.at("examples", **at), key=lambda r: r["rank"])
    if not rows and not clusters and not examples and not catalog.at("mined", ["neuron"], **at):
        return None
    row = rows[0] if rows else None
    summary = catalog.at("neuron_summary", **at)
    verdict = {c: summary[0][c] if summary else None for c in ("q", "called", "diagnosis")}
    layers = catalog.at("layers", layer=layer)
    planted = catalog.at("planted_neurons", **at)
    return {
        "layer": layer,
        "neuron": number,
        "row": row,
        "verdict": verdict,
        "presets": [_preset(row, preset) for preset in PRESETS] if row else [],
        "clusters": [_cluster(r, examples) for r in clusters],
        "examples": _named(catalog, examples[:N_EXAMPLES]),
        "n_examples": len(examples),
        "nulls": _nulls(catalog, row, layer) if row and row["n_used"] is not None else [],
        "response": _response(catalog, at),
        "swaps": _swaps(catalog, at, {r["cluster"]: r["name"] for r in clusters}),
        "about": layers[0] if layers else None,
        "planted": planted[0] if planted else None,
    }


def _preset(row: dict[str, Any], preset: str) -> dict[str, Any]:
    found = {
        "preset": preset,
        "log_psi": row[f"{preset}_log_psi"],
        "psi": row[f"{preset}_psi"],
        "p": row[f"{preset}_p"],
    }
    for c in COMPONENTS:
        found[c] = {what: row[f"{preset}_{c}_{what}"] for what in ("mean", "std", "z", "p")}
    return found


def _cluster(row: dict[str, Any], examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A cluster with its prototypes: picture, and where it was cut out."""
    by_patch = {e["patch_id"]: e for e in examples}
    thumbnails = row["thumbnails"] or []
    snippets = row["snippets"] or []
    prototypes = [
        {
            "thumbnail": words.jpeg(thumbnails[i]) if i < len(thumbnails) else None,
            "is_damaged": i < len(thumbnails) and thumbnails[i] is not None and words.jpeg(thumbnails[i]) is None,
            "example": by_patch.get(patch),
        }
        for i, patch in enumerate(row["prototypes"] or [])
    ]
    others = [n for n in row["names"] or [] if n != row["name"]]
    return row | {
        "prototypes": prototypes,
        "others": others,
        "snippets": [s for s in snippets if s is not None],
        "has_thumbnails": any(p["thumbnail"] for p in prototypes),
    }


def _named(catalog: Catalog, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Examples with the names of their images."""
    if not examples:
        return []
    found = catalog.at("images", ["example", "name"], example=[e["example"] for e in examples])
    names = {r["example"]: r["name"] for r in found}
    return [e | {"name": names.get(e["example"])} for e in examples]


def _nulls(catalog: Catalog, row: dict[str, Any], layer: str) -> list[dict[str, Any]]:
    """Each component's draws under each preset, with the neuron's own value: S by the number of examples, Q as the z
    of its label permutations, D under `paper` by the number of clusters."""
    columns = ["kind", "n_used", "S", "k", "Q_z", "D"]
    draws = catalog.at("nulls", columns, layer=[layer, SHARED_LAYER], n_used=row["n_used"])
    names = catalog.at("nulls", ["D"], layer=SHARED_LAYER, kind="shuffle_text", k=row["k"])
    # What could not be clustered is left out, as calibrate does.
    draws = [d for d in draws if d["k"] is not None and d["k"] > 1]
    found = []
    for preset in PRESETS:
        kind = _NULLS[preset]
        of_kind = [d for d in draws if d["kind"] == kind]
        for c in COMPONENTS:
            value = row["paper_Q_z"] if c == "Q" else row[c]
            source, x = kind, [d["Q_z" if c == "Q" else c] for d in of_kind]
            if preset == "paper" and c == "Q":
                source, x = "permutation", []
            elif preset == "paper" and c == "D":
                source, x = "shuffle_text", [d["D"] for d in names]
            band = _band(row) if source == "permutation" else None
            found.append(
                {
                    "preset": preset,
                    "component": c,
                    "kind": source,
                    "source": _KINDS.get(source, "permuted labels"),
                    "band": band,
                    "chart": charts.histogram(x, value),
                    "value": value,
                    **{what: row[f"{preset}_{c}_{what}"] for what in ("z", "p", "mean", "std")},
                }
            )
    return found


def _band(row: dict[str, Any]) -> dict[str, float] | None:
    """Q, and what two standard deviations around its mean under permuted labels span, on an axis from 0 to 1."""
    values = (row["Q"], row["Q_mean"], row["Q_std"])
    if any(v is None or not math.isfinite(v) for v in values):
        return None
    q, mean, std = values

    def at(x: float) -> float:
        return round(min(max(x, 0.0), 1.0) * charts.WIDTH, 2)

    return {"at": at(q), "mean": at(mean), "low": at(mean - 2 * std), "high": at(mean + 2 * std)}


def _response(catalog: Catalog, at: Any) -> dict[str, Any] | None:
    columns = ["n_images", "n_nonfinite", "positive_frac", "mean", "std", "minimum", "maximum"]
    found = catalog.at("histograms", columns, **at)
    return found[0] if found else None


def _swaps(catalog: Catalog, at: Any, names: dict[int, str]) -> dict[str, Any] | None:
    """The pictures shown of the first host of each cluster, and what came of all hosts; None where nothing was
    swapped."""
    columns = ["host", "condition", "status", "reason", "cluster", "response", "effect_sd", "picture", "reduced"]
    rows = catalog.at("swaps", columns, kind="real", **at)
    effects = catalog.at("effects", kind="real", scope=["neuron", "cluster"], split="all", **at)
    if not rows and not effects:
        return None
    pictured = sorted({r["host"] for r in rows if r["picture"] is not None})
    hosts = []
    for host in pictured:
        of = {r["condition"]: r for r in rows if r["host"] == host}
        cluster = next(iter(of.values()))["cluster"]
        cells = [_cell(condition, of.get(condition)) for condition in SWAP_CONDITIONS]
        hosts.append({"host": host, "cluster": cluster, "name": names.get(cluster), "cells": cells})
    whole = {r["contrast"]: r for r in effects if r["scope"] == "neuron"}
    contrasts = [whole[c] for c in CONTRASTS if c in whole]
    in_sd = [r for r in contrasts if r["mean_sd"] is not None]
    parts = sorted(
        (r for r in effects if r["scope"] == "cluster" and r["contrast"] == "aligned-random"),
        key=lambda r: r["cluster"],
    )
    verdict = whole.get("aligned-random", {})
    return {
        "hosts": hosts,
        "n_hosts": len({r["host"] for r in rows}),
        "reduced": any(r["reduced"] for r in rows),
        "contrasts": contrasts,
        "chart": charts.intervals(in_sd, ("mean_sd", "low_sd", "high_sd")) if len(in_sd) == len(contrasts) else None,
        "clusters": [r | {"name": names.get(r["cluster"])} for r in parts],
        "causal": verdict.get("causal"),
        "reason": verdict.get("reason"),
    }


def _cell(condition: str, row: dict[str, Any] | None) -> dict[str, Any]:
    shown = {"condition": condition, "picture": None, "why": None, "response": None, "effect_sd": None}
    if row is None:
        return shown | {"why": "not shown"}
    if row["status"] != "ok":
        return shown | {"why": f"{row['status'].replace('_', ' ')}: {row['reason'] or 'no reason given'}"}
    picture = words.jpeg(row["picture"])
    why = None if picture else "no picture stored" if row["picture"] is None else "the stored picture is no JPEG"
    return shown | {"picture": picture, "why": why, "response": row["response"], "effect_sd": row["effect_sd"]}
