"""Summarise: what needs the whole sweep. q over all scored neurons, AUROC against null neurons, trends, diagnoses.

Place in the flow: last; made by one unit that reads all parts, never patched into them. Source: arXiv 2508.16950,
sections 4 and 5.1, table 1; q-values, intervals and the share of null neurons called are ours.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import Science
from polyray.kernels import random, statistics, trends
from polyray.psi.calibrate import ranked
from polyray.schema import NULL_KINDS, PRESETS

_Q_VALUES = {"bh": statistics.benjamini_hochberg, "by": statistics.benjamini_yekutieli}


def summarise(
    layers: Sequence[str],
    neurons: pa.Table,
    null_neurons: pa.Table,
    science: Science,
    draws: pa.Table | None = None,
) -> tuple[dict[str, pa.Table], pa.Table]:
    """Rows of `neuron_summary` by layer, and of `layer_summary`.

    Args:
        layers: names in order of depth.
        neurons: all rows of `neurons` with their layer.
        null_neurons: all rows of `null_neurons` with their layer.
        science: the sweep's settings.
        draws: rows of `nulls` with their layer, where `calibrate.permute_dims` asked for such draws.

    Returns:
        q is made of `specific_p` over all scored neurons of the sweep, as `calibrate.fdr` says; `called` means
        q < alpha. A null neuron counts as called when its p is at most the largest p
        among the neurons called, so that discoveries and null calls answer to the same threshold.
    """
    alpha = science.calibrate.alpha
    p = columns.floats(neurons, "specific_p")
    q = _Q_VALUES[science.calibrate.fdr](torch.from_numpy(p)).numpy()
    called = q < alpha
    threshold = float(p[called].max()) if called.any() else -1.0
    layer_of = neurons["layer"].to_numpy(zero_copy_only=False)
    null_layer_of = null_neurons["layer"].to_numpy(zero_copy_only=False)
    summaries: dict[str, pa.Table] = {}
    rows = _Rows()
    for layer in layers:
        here = layer_of == layer
        part = neurons.filter(pa.array(here))
        known = ~np.isnan(q[here])
        summaries[layer] = columns.table(
            "neuron_summary",
            {
                "neuron": part["neuron"],
                "q": q[here],
                "called": pa.array(called[here], mask=~known),
                "diagnosis": diagnose(part, science),
            },
        )
        _layer(
            rows, layer, part, called[here], null_neurons.filter(pa.array(null_layer_of == layer)), threshold, science
        )
    _layer(rows, None, neurons, called, null_neurons, threshold, science)
    if len(layers) > 1:
        _trends(rows, layers, neurons, science)
    if draws is not None:
        _permuted(rows, layers, neurons, draws)
    return summaries, rows.table()


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(
        self,
        layer: str | None,
        metric: str,
        value: float,
        n: int,
        *,
        preset: str | None = None,
        null_kind: str | None = None,
        score: str | None = None,
        low: float = np.nan,
        high: float = np.nan,
    ) -> None:
        row: dict[str, object] = {"layer": layer, "metric": metric, "preset": preset, "null_kind": null_kind}
        row |= {"score": score, "n": n}
        row |= {c: None if np.isnan(x) else float(x) for c, x in (("value", value), ("low", low), ("high", high))}
        self.rows.append(row)

    def table(self) -> pa.Table:
        names = ("layer", "metric", "preset", "null_kind", "score", "value", "low", "high", "n")
        return columns.table("layer_summary", {c: [r[c] for r in self.rows] for c in names})


def _layer(
    rows: _Rows,
    layer: str | None,
    neurons: pa.Table,
    called: NDArray[np.bool_],
    null_neurons: pa.Table,
    threshold: float,
    science: Science,
) -> None:
    status = Counter(neurons["status"].to_pylist())
    rows.add(layer, "n_neurons", len(neurons), len(neurons))
    for s in ("ok", "excluded", "failed"):
        rows.add(layer, f"n_{s}", status[s], len(neurons))
    # Counts in a reason ("12 of at least 20") differ between neurons; what stands before them does not.
    left_out = neurons.filter(pa.compute.not_equal(neurons["status"], "ok"))
    reasons = Counter(str(r).split(":")[0] for r in left_out["reason"].to_pylist() if r is not None)
    for reason, count in sorted(reasons.items()):
        rows.add(layer, f"n_reason:{reason}", count, len(neurons))
    ok = np.array([s == "ok" for s in neurons["status"].to_pylist()], dtype=bool)
    n_ok = int(ok.sum())
    scored = neurons.filter(pa.array(ok))
    rows.add(
        layer, "n_not_calibrated", int(np.isnan(columns.floats(scored, "specific_p")).sum()), n_ok, preset="specific"
    )
    tested = ok & ~np.isnan(columns.floats(neurons, "specific_p"))
    rows.add(layer, "called_frac", _share(called[tested]), int(tested.sum()), preset="specific")
    rows.add(layer, "median_k", _median(columns.floats(scored, "k")), n_ok)
    kinds = null_neurons["kind"].to_numpy(zero_copy_only=False)
    null_p = columns.floats(null_neurons, "specific_p")
    for kind in NULL_KINDS:
        p = null_p[(kinds == kind) & ~np.isnan(null_p)]
        rows.add(layer, "null_called_frac", _share(p <= threshold), len(p), preset="specific", null_kind=kind)
    for preset in PRESETS:
        p = columns.floats(scored, f"{preset}_p")
        p = p[~np.isnan(p)]
        rows.add(layer, "median_log_psi", _median(columns.floats(scored, f"{preset}_log_psi")), len(p), preset=preset)
        rows.add(layer, "p05_frac", _share(p < 0.05), len(p), preset=preset)
        for c in ("S", "Q", "D"):
            z = columns.floats(scored, f"{preset}_{c}_z")
            rows.add(layer, "median_z", _median(z), int((~np.isnan(z)).sum()), preset=preset, score=c)
        real = ranked(scored, preset)
        fake = ranked(null_neurons, preset)
        for kind in NULL_KINDS:
            word = random.layer_word(layer or "")
            for name in real:
                a, b = _finite(real[name]), _finite(fake[name][kinds == kind])
                low, high = statistics.auroc_interval(a, b, science.calibrate.n_bootstrap, science.seed, word)
                rows.add(
                    layer,
                    "auroc",
                    statistics.auroc(a, b),
                    min(len(a), len(b)),
                    preset=preset,
                    null_kind=kind,
                    score=name,
                    low=low,
                    high=high,
                )


def _trends(rows: _Rows, layers: Sequence[str], neurons: pa.Table, science: Science) -> None:
    """Do scores rise with depth? Over the sweep Kendall's tau (`depth_tau`, `depth_tau_p`), and for every layer but
    the first its median less that of the layer before (`step_median`, `step_p`); see `kernels.trends` for what p
    does not know of."""
    layer_of = neurons["layer"].to_numpy(zero_copy_only=False)
    words = [random.layer_word(layer) for layer in layers]
    for preset in PRESETS:
        scores = ranked(neurons, preset)
        for name in ("log_psi", "S", "Q", "D"):
            of = [scores[name][(layer_of == layer) & ~np.isnan(scores[name])] for layer in layers]
            found: list[tuple[str | None, str, trends.Trend, int]] = [
                (None, "depth_tau", trends.depth_tau(of, science.seed, words), sum(map(len, of)))
            ]
            for i in range(1, len(layers)):
                moved = trends.step(of[i - 1], of[i], science.seed, (words[i - 1], words[i]))
                found.append((layers[i], "step_median", moved, len(of[i - 1]) + len(of[i])))
            for layer, metric, trend, n in found:
                rows.add(layer, metric, trend.value, n, preset=preset, score=name, low=trend.low, high=trend.high)
                rows.add(layer, f"{metric.removesuffix('_median')}_p", trend.p, n, preset=preset, score=name)


def _permuted(rows: _Rows, layers: Sequence[str], neurons: pa.Table, draws: pa.Table) -> None:
    """Median z of S against draws of permuted coordinates, by layer and over the sweep."""
    draws = draws.filter(pa.compute.equal(draws["kind"], "permute_dims"))
    drawn_in, layer_of = (t["layer"].to_numpy(zero_copy_only=False) for t in (draws, neurons))
    null_n, n, null_S, S = (columns.floats(t, c) for c in ("n_used", "S") for t in (draws, neurons))
    z = np.full(len(S), np.nan)
    for layer in layers:
        for size in np.unique(null_n[drawn_in == layer]).tolist():
            null = torch.from_numpy(null_S[(drawn_in == layer) & (null_n == size)])
            of = (layer_of == layer) & (n == size)
            mean, std = statistics.moments(null)
            x = torch.from_numpy(S[of])
            z[of] = statistics.z_score(x, mean.expand(len(x)), std.expand(len(x))).numpy()
    for name in (*layers, None):
        here = z[~np.isnan(z) & ((layer_of == name) if name is not None else True)]
        rows.add(name, "median_z", _median(here), len(here), null_kind="permute_dims", score="S")


def _finite(values: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(values[~np.isnan(values)])


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else np.nan


def _median(values: NDArray[np.float64]) -> float:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else np.nan


def diagnose(neurons: pa.Table, science: Science) -> list[str | None]:
    """Named patterns of each neuron, several separated by `; `.

    Excluded: dead, constant, too few examples. Scored: `saturated` (more than K/4 images tied at the cut),
    `low-level split` (S beyond chance under `specific`, Q and D not), `same concept, two classes` (Q beyond chance,
    D not); beyond chance is p < 0.05. (`name-sensitive` needs scores under other names: see `sensitivity`.)
    """
    found: list[str | None] = []
    rows = neurons.select(
        ["status", "reason", "n_tied_at_cut", "specific_S_p", "specific_Q_p", "specific_D_p"]
    ).to_pylist()
    for row in rows:
        names = []
        if row["status"] == "excluded":
            names += [d for d in ("dead", "constant", "too few examples") if str(row["reason"]).startswith(d)]
        if row["n_tied_at_cut"] is not None and row["n_tied_at_cut"] > science.mine.K / 4:
            names += [] if "dead" in names or "constant" in names else ["saturated"]
        s, qp, d = (row[f"specific_{c}_p"] for c in ("S", "Q", "D"))
        if row["status"] == "ok" and None not in (s, qp, d):
            if s < 0.05 and qp >= 0.05 and d >= 0.05:
                names.append("low-level split")
            if qp < 0.05 and d >= 0.05:
                names.append("same concept, two classes")
        found.append("; ".join(names) or None)
    return found
