"""Effects: do the clusters that were found drive the neuron?

Place in the flow: after swap; made by one unit that reads all rows of `swaps`. Conditions are compared within a host;
a cluster and a neuron are judged by their hosts, a layer and the sweep by their neurons, since hosts of one neuron are
not independent. Source: the patch swaps of arXiv 2508.16950; contrasts, p, q, verdicts and the null check are ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from scipy import stats

from polyray import columns
from polyray.config import Science
from polyray.kernels import statistics
from polyray.psi.contrasts import N_BINS, TWO_SIDED, Contrasts, Groups, Values, bins, contrasts_of, figures
from polyray.schema import CONTRASTS

ALPHA = 0.05
"""q below which a cluster drives its neuron, and p of S below which a neuron has several concepts. The verdict is
defined by it, so it does not follow `calibrate.alpha`."""
MIN_HOSTS = 5
"""Fewest differences of a cluster that is judged: 2^-5 = 0.03 is the first p below `ALPHA` that can be reached."""
SWAP_COLUMNS = (
    "kind",
    "neuron",
    "host",
    "condition",
    "status",
    "reason",
    "cluster",
    "box_frac",
    "response",
    "response_at_peak",
    "effect",
    "effect_sd",
)
"""Columns of `swaps` that are looked at; pictures need not be read."""
VERDICT = "aligned-random"
"""The contrast that clusters are judged by."""
NULL_CONTRASTS = ("aligned-non_aligned",)
"""What is asked of null neurons: of these alone it is known that there is no difference."""
LOG_PSI_SPLITS = tuple(f"log_psi {i}/4" for i in range(1, 5))
BOX_SPLITS = ("box 0-1 %", "box 1-4 %", "box 4-9 %", "box 9-16 %", "box over 16 %")
NO_VERDICT = f"fewer than two clusters with at least {MIN_HOSTS} differences"
TOO_FEW = f"fewer than {MIN_HOSTS} differences: no p of theirs is below {ALPHA}"
NO_NEURON = "no neuron has a difference"
NO_JUDGED = "no neuron has a verdict"

Mask = NDArray[np.bool_]


def effects(
    layers: Sequence[str],
    swaps: Iterable[pa.Table],
    swapped: Mapping[str, Sequence[int]],
    clusters: pa.Table,
    neurons: pa.Table,
    science: Science,
) -> pa.Table:
    """Contrasts between conditions by cluster, neuron and layer and over the sweep, with verdicts.

    Args:
        layers: names in order of depth.
        swaps: rows of `swaps` of each layer, in that order: `SWAP_COLUMNS` at least. Taken one table at a time.
        swapped: neurons of each layer that were to be swapped.
        clusters: rows of `clusters` with their layer: layer, neuron, cluster, size.
        neurons: rows of `neurons` with their layer: layer, neuron, specific_log_psi, specific_S_p.
        science: the sweep's settings.

    Returns:
        Rows of `effects`. A host has a difference where both conditions are ok and finite; one of at most 1e-6 of the
        neuron's largest response is 0. Standard deviations are what `effect` and `effect_sd` imply for the neuron;
        where that is unknown there is no figure in their units. For a layer and the sweep p is of the neurons' means in
        units of the response, and the figures in standard deviations are of the neurons that have one.

        A cluster is judged with at least `MIN_HOSTS` differences: fewer cannot reach p below 0.05, so that they are
        left out of the family of q, and a neuron with fewer than two such clusters has no verdict. Power falls with
        the number of clusters all the same, since hosts are spread over them.

        All neurons take their random patches from the same `swap.n_random` images and many share top images, so that
        p and intervals of a layer and the sweep, which treat neurons as independent, say less than they seem to.

        `causal` is the share of neurons with a verdict that are causally polysemantic. The swap cannot tell two
        clusters of one concept from two concepts: both drive the neuron. The null of one concept can, so
        `causal_specific` is the share that are causal and have `specific_S_p` below 0.05, of the neurons that have
        both a verdict and this p.

        Splits, of real neurons alone: quartiles of `specific_log_psi` of the layer's (the sweep's) swapped neurons,
        where at least four have it, equal values together; and bins of the share of the image in the box, those that
        occur: a neuron's mean is then over its hosts in the bin, while shares go by the mean box of its hosts.

        Of null neurons aligned and non_aligned are exchangeable: `null_p05` is the share of them with p below 0.05,
        at most about 5 %. `null_small` is how far the distribution of their p lies above the uniform one at most, with
        the p of Kolmogorov and Smirnov's one-sided test: a small one means that p are too small. `null_ks` is the
        distance to both sides, with its p; signed-rank p of few hosts are discrete, and those of hosts whose largest
        response lies elsewhere are 1, which it sees as well.
    """
    real, null = [], []
    layer_of = clusters["layer"].to_numpy(zero_copy_only=False)
    for layer, rows in zip(layers, swaps, strict=True):
        ids = np.unique(np.array(swapped[layer], dtype=np.int64))
        rows = rows.select(list(SWAP_COLUMNS))
        found, beside = (rows.filter(pc.equal(rows["kind"], kind)) for kind in ("real", "null"))
        real.append(contrasts_of(found, ids, CONTRASTS, clusters.filter(pa.array(layer_of == layer)), science))
        ids = np.unique(columns.numbers(beside, "neuron").astype(np.int64))
        null.append(contrasts_of(beside, ids, NULL_CONTRASTS, None, science))
    verdicts = _verdicts(real)
    out = _Rows()
    for layer, part in zip(layers, real, strict=True):
        out.groups("real", "cluster", layer, part, part.clusters, CONTRASTS)
    for layer, part, verdict in zip(layers, real, verdicts, strict=True):
        out.groups("real", "neuron", layer, part, part.neurons, CONTRASTS, verdict)
    for layer, part in zip(layers, null, strict=True):
        out.groups("null", "neuron", layer, part, part.neurons, NULL_CONTRASTS)
    log_psi, S_p = (_looked_up(neurons, c, layers, real) for c in ("specific_log_psi", "specific_S_p"))
    _over_real(out, layers, _Pooled(real, CONTRASTS), np.concatenate([*verdicts, np.zeros(0)]), log_psi, S_p, science)
    _over_null(out, layers, _Pooled(null, NULL_CONTRASTS), science)
    return out.table()


class _Pooled:
    """All neurons of one kind, layer by layer; attributes as of `Contrasts`, and the layer's index."""

    def __init__(self, parts: Sequence[Contrasts], contrasts: Sequence[str]) -> None:
        c = len(contrasts)
        self.home = np.repeat(np.arange(len(parts)), [len(part.neuron) for part in parts])
        self.sd = np.concatenate([*(part.sd for part in parts), np.zeros(0)])
        self.mean = np.concatenate([*(part.neurons.figures.mean for part in parts), np.zeros((c, 0))], axis=1)
        self.p = np.concatenate([*(part.neurons.figures.p for part in parts), np.zeros((c, 0))], axis=1)
        self.box = np.concatenate([*(part.box for part in parts), np.zeros(0)])
        self.in_bin = np.concatenate([*(part.in_bin for part in parts), np.zeros((N_BINS, 0), dtype=bool)], axis=1)
        self.by_bin = np.concatenate([*(part.by_bin for part in parts), np.zeros((N_BINS, c, 0))], axis=2)

    def scopes(self, layers: Sequence[str]) -> list[tuple[str | None, Mask]]:
        """Each layer and, as None, the sweep, with the neurons in it."""
        return [*((layer, self.home == i) for i, layer in enumerate(layers)), (None, np.ones(len(self.home), bool))]


def _verdicts(parts: Sequence[Contrasts]) -> list[Values]:
    """Whether each neuron of each layer is causally polysemantic, 1 or 0; NaN where fewer than two clusters have
    enough differences. q is over all clusters of the sweep that have."""
    at = CONTRASTS.index(VERDICT)
    p = np.concatenate(
        [*(_judged(part.clusters.figures.p[at], part.clusters.figures.n[at]) for part in parts), np.zeros(0)]
    )
    q = statistics.benjamini_hochberg(torch.from_numpy(p)).numpy()
    verdicts, start = [], 0
    for part in parts:
        of, found = part.clusters.of, part.clusters.figures
        drives = (found.mean[at] > 0) & (q[start : start + len(of)] < ALPHA)
        start += len(of)
        enough = found.n[at] >= MIN_HOSTS
        n_tried, n_driving = (np.bincount(of[x], minlength=len(part.neuron)) for x in (enough, drives))
        verdicts.append(np.where(n_tried >= 2, np.where(n_driving >= 2, 1.0, 0.0), np.nan))
    return verdicts


def _judged(p: Values, n: NDArray[np.int64]) -> Values:
    """p of clusters with enough differences; NaN of the others, which no outcome could call."""
    return np.where(n >= MIN_HOSTS, p, np.nan)


def _looked_up(neurons: pa.Table, column: str, layers: Sequence[str], parts: Sequence[Contrasts]) -> Values:
    """A column of `neurons` for all neurons of the parts; NaN where it has none."""
    layer_of = neurons["layer"].to_numpy(zero_copy_only=False)
    number, value = columns.numbers(neurons, "neuron"), columns.floats(neurons, column)
    found = [np.zeros(0)]
    for layer, part in zip(layers, parts, strict=True):
        here = layer_of == layer
        known = dict(zip(number[here].tolist(), value[here].tolist(), strict=True))
        found.append(np.array([known.get(i, np.nan) for i in part.neuron.tolist()]))
    return np.concatenate(found)


def _over_real(
    out: "_Rows", layers: Sequence[str], pooled: _Pooled, causal: Values, log_psi: Values, S_p: Values, science: Science
) -> None:
    """Differences and shares of each layer and the sweep, all and by split."""
    bin_of = np.where(np.isnan(pooled.box), -1, bins(pooled.box))
    for layer, here in pooled.scopes(layers):
        whole = [("all", here)]
        known = here & ~np.isnan(log_psi)
        if known.sum() >= len(LOG_PSI_SPLITS):
            quarter = np.searchsorted(np.quantile(log_psi[known], (0.25, 0.5, 0.75)), log_psi)
            whole += [(split, known & (quarter == i)) for i, split in enumerate(LOG_PSI_SPLITS)]
        members = [(split, who, pooled.mean) for split, who in whole]
        members += [(split, here & pooled.in_bin[i], pooled.by_bin[i]) for i, split in enumerate(BOX_SPLITS)]
        members = [m for m in members if not m[0].startswith("box") or m[1].any()]
        parts = [(split, mean[:, who], pooled.sd[who]) for split, who, mean in members]
        out.differences("real", layer, CONTRASTS, parts, science)
        boxes = [(split, here & (bin_of == i)) for i, split in enumerate(BOX_SPLITS)]
        for split, who in [*whole, *(b for b in boxes if b[1].any())]:
            judged = who & ~np.isnan(causal)
            out.share("real", layer, split, "causal", causal[judged] == 1, NO_JUDGED)
            judged &= ~np.isnan(S_p)
            out.share("real", layer, split, "causal_specific", (causal == 1)[judged] & (S_p < ALPHA)[judged], NO_JUDGED)


def _over_null(out: "_Rows", layers: Sequence[str], pooled: _Pooled, science: Science) -> None:
    """The null check of each layer that has null neurons, and of the sweep."""
    for layer, here in pooled.scopes(layers):
        if not here.any():
            continue
        out.differences("null", layer, NULL_CONTRASTS, [("all", pooled.mean[:, here], pooled.sd[here])], science)
        p = pooled.p[0, here]
        p = p[~np.isnan(p)]
        out.share("null", layer, "all", "null_p05", p < ALPHA, NO_NEURON)
        for name, side in (("null_small", "greater"), ("null_ks", "two-sided")):
            distance, ks_p = stats.kstest(p, "uniform", alternative=side) if len(p) else (np.nan, np.nan)
            out.figure("null", layer, "all", name, len(p), NO_NEURON, mean=distance, p=ks_p)


class _Rows:
    """Rows of `effects`, added in blocks."""

    _FLOATS = ("mean", "low", "high", "mean_sd", "low_sd", "high_sd", "p")

    def __init__(self) -> None:
        names = ("layer", "kind", "scope", "neuron", "cluster", "split", "contrast", "n", "causal", "reason")
        self._blocks: dict[str, list[NDArray[Any]]] = {c: [] for c in (*names, *self._FLOATS)}

    def _add(self, size: int, **given: Any) -> None:
        """A value, or one a row, for each column; null where nothing is given."""
        for column, blocks in self._blocks.items():
            block = np.full(size, np.nan) if column in self._FLOATS else np.full(size, None)
            if column in given:
                block[:] = given[column]
            blocks.append(block)

    def groups(
        self,
        kind: str,
        scope: str,
        layer: str,
        part: Contrasts,
        groups: Groups,
        contrasts: Sequence[str],
        causal: Values | None = None,
    ) -> None:
        """A row for each contrast and each cluster or neuron."""
        sd = part.sd[groups.of]
        for i, contrast in enumerate(contrasts):
            found, reason = groups.figures.of(i), groups.reason[i]
            verdict: NDArray[np.object_] = np.full(len(sd), None)
            if scope == "cluster":
                reason = np.where((found.n > 0) & (found.n < MIN_HOSTS), TOO_FEW, reason)
            if causal is not None and contrast == VERDICT:
                judged = ~np.isnan(causal)
                verdict[judged] = causal[judged] == 1
                reason = np.where(~judged & (found.n > 0), NO_VERDICT, reason)
            where: dict[str, Any] = {"kind": kind, "scope": scope, "layer": layer, "neuron": part.neuron[groups.of]}
            where |= {"cluster": groups.cluster, "split": "all", "contrast": contrast, "causal": verdict}
            scaled = {f"{c}_sd": getattr(found, c) / sd for c in ("mean", "low", "high")}
            self._add(len(sd), **where, **found._asdict(), **scaled, reason=reason)

    def differences(
        self,
        kind: str,
        layer: str | None,
        contrasts: Sequence[str],
        parts: Sequence[tuple[str, Values, Values]],
        science: Science,
    ) -> None:
        """A row for each split and contrast, from the means of its neurons [C, n] and their standard deviations."""
        rows = [x for _, mean, _ in parts for x in mean] + [x for _, mean, sd in parts for x in mean / sd]
        two_sided = np.tile([c in TWO_SIDED for c in contrasts], 2 * len(parts))
        group = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
        found = figures(np.concatenate(rows), group, two_sided, science)
        n = len(rows) // 2
        scaled = {f"{c}_sd": getattr(found, c)[n:] for c in ("mean", "low", "high")}
        self._add(
            n,
            kind=kind,
            scope=_scope(layer),
            layer=layer,
            split=np.repeat(np.array([split for split, _, _ in parts], dtype=object), len(contrasts)),
            contrast=np.tile(np.array(contrasts, dtype=object), len(parts)),
            reason=[None if size else NO_NEURON for size in found.n[:n].tolist()],
            **{c: x[:n] for c, x in found._asdict().items()},
            **scaled,
        )

    def share(self, kind: str, layer: str | None, split: str, contrast: str, hits: Mask, reason: str) -> None:
        """A share of neurons with its Wilson interval."""
        n, k = len(hits), int(hits.sum())
        low, high = statistics.wilson(k, n)
        self.figure(kind, layer, split, contrast, n, reason, mean=k / n if n else np.nan, low=low, high=high)

    def figure(
        self, kind: str, layer: str | None, split: str, contrast: str, n: int, reason: str, **given: float
    ) -> None:
        """One row; the reason counts where n is 0."""
        where = {"kind": kind, "scope": _scope(layer), "layer": layer, "split": split, "contrast": contrast}
        self._add(1, **where, n=n, reason=None if n else reason, **given)

    def table(self) -> pa.Table:
        """The rows, with q over each kind, scope, contrast and sort of split."""
        whole = {c: np.concatenate([*blocks, np.zeros(0, object)]) for c, blocks in self._blocks.items()}
        whole |= {c: whole[c].astype(np.float64) for c in self._FLOATS}
        sort = [str(s).split(" ")[0] for s in whole["split"]]
        family = np.zeros(len(sort), dtype=np.int64)
        for keys in (whole["kind"], whole["scope"], whole["contrast"], sort):
            code = pa.array(keys, pa.string()).dictionary_encode().indices.to_numpy()
            family = family * (code.max(initial=0) + 1) + code
        q = np.full(len(sort), np.nan)
        tested = _judged(whole["p"], np.where(whole["scope"] == "cluster", whole["n"], MIN_HOSTS).astype(np.int64))
        for value in np.unique(family):
            of = np.flatnonzero(family == value)
            q[of] = statistics.benjamini_hochberg(torch.from_numpy(tested[of])).numpy()
        return columns.table("effects", whole | {"q": q})


def _scope(layer: str | None) -> str:
    return "sweep" if layer is None else "layer"
