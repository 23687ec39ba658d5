"""Recover: does the census find what was planted?

Place in the flow: last, and only where neurons were planted. Size is the share of monosemantic neurons that are
significant, power that of neurons with two or three concepts; both as a function of purity, since truth is only as
true as the top examples are pure. Ours; the paper has no planted neurons.
"""

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import Science
from polyray.kernels import random, statistics
from polyray.psi.calibrate import ranked
from polyray.schema import PLANTED_BALANCE, PLANTED_KINDS, PRESETS

PURITIES = (0.0, 0.5, 0.8, 0.9, 0.95)
"""Figures are given for the neurons of at least this purity."""
LEVEL = 0.05
POLYSEMANTIC = ("order2", "order3")
"""Kinds that power and AUROC are about; siblings, unequal and noise are reported beside them."""


def planted_neurons(
    planted: pa.Table,
    neurons: pa.Table,
    examples: pa.Table,
    clusters: pa.Table,
    vocabulary: pa.Table,
    classes: pa.Table,
) -> pa.Table:
    """What became of every planted neuron of one layer.

    Args:
        planted: the layer's rows of `planted`.
        neurons: its rows of `neurons`.
        examples: its rows of `examples`.
        clusters: its rows of `clusters`.
        vocabulary: rows of `vocabulary`.
        classes: rows of `plant_classes`.

    Returns:
        Rows of `planted_neurons`. Purity is the share of the clustered examples that are of a planted class, balance
        the share of the rarest planted class times their number. A cluster's name hits when, of all class names, the
        one nearest to it is that of a planted class.
    """
    words = columns.padded(vocabulary["embedding"], 0)
    names = columns.padded(classes["embedding"], 0)
    nearest = np.argmax(words @ names.T, axis=1)
    class_name = classes["label"].to_pylist()
    class_of = {p: class_name[i] for p, i in zip(vocabulary["prompt"].to_pylist(), nearest.tolist(), strict=True)}
    truth = {r["neuron"]: r for r in planted.select(["neuron", "kind", "planted_order", "classes"]).to_pylist()}
    clustered = examples.filter(pa.compute.is_valid(examples["cluster"]))
    labels: dict[int, list[str]] = {}
    for row in clustered.select(["neuron", "label"]).to_pylist():
        labels.setdefault(row["neuron"], []).append(row["label"])
    hits: dict[int, list[bool]] = {}
    for row in clusters.select(["neuron", "name"]).to_pylist():
        hits.setdefault(row["neuron"], []).append(class_of[row["name"]] in truth[row["neuron"]]["classes"])
    out: dict[str, list[object]] = {c: [] for c in ("neuron", "kind", "planted_order", "classes", "k")}
    out |= {c: [] for c in ("purity", "balance", "name_hit_frac", "status")}
    for row in neurons.select(["neuron", "k", "status"]).to_pylist():
        t = truth[row["neuron"]]
        of = labels.get(row["neuron"], [])
        share = [of.count(c) / len(of) for c in t["classes"]] if of else []
        hit = hits.get(row["neuron"], [])
        values = (
            row["neuron"],
            t["kind"],
            t["planted_order"],
            t["classes"],
            row["k"],
            sum(share) if share else None,
            min(share) * len(share) if share else None,
            float(np.mean(hit)) if hit and share else None,
            row["status"],
        )
        for column, value in zip(out, values, strict=True):
            out[column].append(value)
    return columns.table("planted_neurons", out)


def planted_summary(layers: list[str], found: pa.Table, neurons: pa.Table, science: Science) -> pa.Table:
    """Size, power, AUROC, recovered k and names, by layer and by least purity.

    Args:
        layers: layers of planted neurons in order of depth.
        found: rows of `planted_neurons` with their layer.
        neurons: rows of `neurons` with their layer.
        science: the sweep's settings.

    Returns:
        Rows of `planted_summary`. Shares have Wilson intervals, AUROCs bootstrap intervals. At a least purity above 0 a
        neuron of several classes counts only with a balance of at least `schema.PLANTED_BALANCE` (`unequal`: with
        both classes).
    """
    rows = _Rows()
    for layer in layers:
        of = found.filter(pa.compute.equal(found["layer"], layer)).sort_by("neuron")
        scored = neurons.filter(pa.compute.equal(neurons["layer"], layer)).sort_by("neuron")
        kind = of["kind"].to_numpy(zero_copy_only=False)
        # Noise has no purity: it is reported once, with everything.
        purity = np.nan_to_num(columns.floats(of, "purity"), nan=0.0)
        balance = np.nan_to_num(columns.floats(of, "balance"), nan=0.0)
        # The rarer class of `unequal` has to be there at all.
        several = np.isin(kind, ("order2", "order3", "siblings"))
        needed = np.select([several, kind == "unequal"], [PLANTED_BALANCE, 1e-9], 0.0)
        ok = of["status"].to_numpy(zero_copy_only=False) == "ok"
        for least in PURITIES:
            pure = ok & ((least == 0) | (purity >= least) & (balance >= needed))
            for k in PLANTED_KINDS:
                chosen = pure & (kind == k)
                if k != "noise" or least == 0:
                    these = pa.array(chosen)
                    _of_kind(rows, layer, k, least, of.filter(these), scored.filter(these), science.cluster.k_range)
            for name, positive in (
                *((k, kind == k) for k in PLANTED_KINDS[1:-1]),
                ("order2+3", np.isin(kind, POLYSEMANTIC)),
            ):
                a, b = scored.filter(pa.array(pure & positive)), scored.filter(pa.array(pure & (kind == "mono")))
                _aurocs(rows, layer, name, least, a, b, science)
    return rows.table()


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(
        self,
        layer: str,
        metric: str,
        kind: str,
        least: float,
        value: float,
        n: int,
        *,
        preset: str | None = None,
        score: str | None = None,
        interval: tuple[float, float] = (np.nan, np.nan),
    ) -> None:
        row: dict[str, object] = {"layer": layer, "metric": metric, "kind": kind, "min_purity": least, "n": n}
        row |= {"preset": preset, "score": score}
        figures = zip(("value", "low", "high"), (value, *interval), strict=True)
        self.rows.append(row | {c: None if np.isnan(x) else float(x) for c, x in figures})

    def share(
        self,
        layer: str,
        metric: str,
        kind: str,
        least: float,
        hits: NDArray[np.bool_],
        preset: str | None = None,
        score: str | None = None,
    ) -> None:
        """A share with its Wilson interval; nothing where nothing is there."""
        n = len(hits)
        if not n:
            self.add(layer, metric, kind, least, np.nan, 0, preset=preset, score=score)
            return
        interval = statistics.wilson(int(hits.sum()), n)
        self.add(layer, metric, kind, least, float(hits.mean()), n, interval=interval, preset=preset, score=score)

    def table(self) -> pa.Table:
        names = ("layer", "metric", "kind", "min_purity", "preset", "score", "value", "low", "high", "n")
        return columns.table("planted_summary", {c: [r[c] for r in self.rows] for c in names})


def _of_kind(
    rows: _Rows, layer: str, kind: str, least: float, of: pa.Table, scored: pa.Table, k_range: tuple[int, int]
) -> None:
    for metric in ("purity", "balance", "name_hit_frac"):
        values = columns.floats(of, metric)
        values = values[~np.isnan(values)]
        rows.add(layer, metric, kind, least, float(values.mean()) if len(values) else np.nan, len(values))
    for preset in PRESETS:
        for score in ("S", "Q", "D", "p"):
            p = columns.floats(scored, f"{preset}_p" if score == "p" else f"{preset}_{score}_p")
            rows.share(layer, "p05_frac", kind, least, p[~np.isnan(p)] < LEVEL, preset=preset, score=score)
    k = columns.numbers(of, "k").astype(np.int64)
    for value in range(k_range[0], k_range[1] + 1):
        rows.share(layer, "k_frac", kind, least, k == value, score=str(value))


def _aurocs(
    rows: _Rows, layer: str, kind: str, least: float, positive: pa.Table, negative: pa.Table, science: Science
) -> None:
    def auroc(
        a: NDArray[np.float64], b: NDArray[np.float64], preset: str | None = None, score: str | None = None
    ) -> None:
        x, y = (torch.from_numpy(v[~np.isnan(v)]) for v in (a, b))
        interval = statistics.auroc_interval(
            x, y, science.calibrate.n_bootstrap, science.seed, random.layer_word(layer)
        )
        value = statistics.auroc(x, y)
        rows.add(layer, "auroc", kind, least, value, min(len(x), len(y)), interval=interval, preset=preset, score=score)

    for preset in PRESETS:
        of_positive, of_negative = ranked(positive, preset), ranked(negative, preset)
        for score in of_positive:
            auroc(of_positive[score], of_negative[score], preset=preset, score=score)
    a, b = (columns.floats(t, "two_means") for t in (positive, negative))
    auroc(a, b, score="two_means")
