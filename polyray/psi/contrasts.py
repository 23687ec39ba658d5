"""Contrasts: what do the differences between two conditions come to, for a cluster and for a neuron?

Place in the flow: under effects; one layer at a time, all neurons at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import Science
from polyray.kernels.effects import mean_interval, signed_rank_p
from polyray.schema import SWAP_CONDITIONS

ROUNDING = 1e-6
"""A difference this small beside the neuron's largest response is rounding of float32, and counts as 0."""
BOX_EDGES = (0.01, 0.04, 0.09, 0.16)
"""Shares of the image between the bins by box: sides of 10, 20, 30 and 40 %. A box on an edge is in the bin below."""
N_BINS = len(BOX_EDGES) + 1
TWO_SIDED = ("aligned-non_aligned", "non_aligned-random")
"""Contrasts that are tested on both sides."""
AT_PEAK = ("aligned-shuffled_position",)
"""Contrasts of responses at the host's peak position."""
ONE_MEMBER = "one member: no donor from another image"
NO_HOST = "no host has both conditions"

Values = NDArray[np.float64]
Index = NDArray[np.int64]


class Figures(NamedTuple):
    """One entry a group, [G] or with contrasts [C, G]; NaN where n is 0."""

    mean: Values
    low: Values
    high: Values
    p: Values
    n: Index

    def shaped(self, n_contrasts: int, n: int) -> "Figures":
        """The same with contrasts apart [C, G]."""
        mean, low, high, p = (x.reshape(n_contrasts, n) for x in (self.mean, self.low, self.high, self.p))
        return Figures(mean, low, high, p, self.n.reshape(n_contrasts, n))

    def of(self, contrast: int) -> "Figures":
        """Those of one contrast [G]."""
        mean, low, high, p = (x[contrast] for x in (self.mean, self.low, self.high, self.p))
        return Figures(mean, low, high, p, self.n[contrast])


@dataclass(frozen=True)
class Groups:
    """G clusters or neurons under C contrasts."""

    figures: Figures
    reason: NDArray[np.object_]
    """Why there is no figure [C, G]; None where there is one."""
    of: Index
    """Index of each one's neuron."""
    cluster: NDArray[np.object_]
    """Its cluster; None of a neuron."""


@dataclass(frozen=True)
class Contrasts:
    """What the hosts of the N neurons of one layer come to; 5 bins of the share of the image in the box."""

    neuron: Index
    """Their indices in the layer, ascending."""
    sd: Values
    """Standard deviation of their clustered examples' responses, as `effect_sd` implies it; NaN where unknown."""
    neurons: Groups
    clusters: Groups
    box: Values
    """Mean share of the image in the box over their hosts; NaN without hosts."""
    in_bin: NDArray[np.bool_]
    """Whether they have a host in each bin [5, N]."""
    by_bin: Values
    """Mean difference over their hosts in each bin [5, C, N]; NaN where there is none."""


def contrasts_of(
    rows: pa.Table, ids: Index, contrasts: Sequence[str], clusters: pa.Table | None, science: Science
) -> Contrasts:
    """Contrasts of one layer and one kind.

    Args:
        rows: rows of `swaps`.
        ids: neurons, ascending; rows of others do not count.
        contrasts: which of `CONTRASTS`.
        clusters: rows of `clusters` of the layer; None where clusters are not asked about.
        science: the sweep's settings.

    Returns:
        A group for each neuron and each cluster of these neurons, with hosts or without. A host has a difference where
        both conditions are ok and finite.
    """
    hosts = _hosts(rows.filter(pc.is_in(rows["neuron"], pa.array(ids, pa.int32()))), ids, contrasts)
    everyone = np.arange(len(ids))
    of_neurons = _grouped(hosts, contrasts, hosts.of, everyone, NO_HOST, np.full(len(ids), None), science)
    owner = cluster = np.zeros(0, dtype=np.int64)
    fallback: Any = NO_HOST
    if clusters is not None:
        clusters = clusters.filter(pc.is_in(clusters["neuron"], pa.array(ids, pa.int32())))
        clusters = clusters.sort_by([("neuron", "ascending"), ("cluster", "ascending")])
        owner = np.searchsorted(ids, columns.numbers(clusters, "neuron"))
        cluster = columns.numbers(clusters, "cluster").astype(np.int64)
        fallback = np.where(columns.numbers(clusters, "size") == 1, ONE_MEMBER, NO_HOST).astype(object)
    group = _places(owner, cluster, hosts.of, hosts.cluster)
    n_hosts = np.bincount(hosts.of, minlength=len(ids))
    in_bin, by_bin = _by_bin(hosts, len(ids))
    return Contrasts(
        ids,
        hosts.sd,
        of_neurons,
        _grouped(hosts, contrasts, group, owner, fallback, cluster.astype(object), science),
        _ratio(np.bincount(hosts.of, hosts.box, len(ids)).astype(np.float64), n_hosts),
        in_bin,
        by_bin,
    )


def bins(box: Values) -> Index:
    """Bin of each share of the image, 0 to 4; of NaN 4."""
    return np.searchsorted(np.array(BOX_EDGES) + 1e-9, box)  # 0.4 × 0.4 is a little above 0.16


def figures(values: Values, group: Index, two_sided: NDArray[np.bool_], science: Science) -> Figures:
    """Mean, bootstrap interval and signed-rank p of each group's values.

    Args:
        values: values of all groups; NaN is none. A group's are resampled in the order in which they stand here.
        group: the group of each.
        two_sided: of each group, whether p is two-sided.
        science: the sweep's settings.

    Returns:
        Intervals are percentiles of the bootstrap, which of few values are too narrow; of one value there is none.
    """
    known = ~np.isnan(values)
    values, group = values[known], group[known]
    values = values[np.argsort(group, kind="stable")]
    n = np.bincount(group, minlength=len(two_sided))
    start = np.cumsum(n) - n
    mean, low, high, p = np.full((4, len(n)), np.nan)
    for size in np.unique(n[n > 0]).tolist():
        these = np.flatnonzero(n == size)
        rows = torch.from_numpy(values[start[these][:, None] + np.arange(size)])
        interval = mean_interval(rows, science.calibrate.n_bootstrap, science.seed)
        mean[these], low[these], high[these] = (x.numpy() for x in interval)
        if size == 1:
            low[these] = high[these] = np.nan  # one value says nothing of its spread
        for side in (False, True):
            chosen = two_sided[these] == side
            if chosen.any():
                p[these[chosen]] = signed_rank_p(rows[torch.from_numpy(chosen)], two_sided=side).numpy()
    return Figures(mean, low, high, p, n)


@dataclass(frozen=True)
class _Hosts:
    """H hosts by neuron and number, so that neither the order of rows nor what stands beside them changes a sum."""

    of: Index
    cluster: NDArray[Any]
    box: Values
    difference: Values
    """[C, H]; NaN where there is none."""
    why: Index
    """Reason of each condition [H, 8], as an index in `words`."""
    words: list[str]
    """Sorted; the empty one is no reason."""
    sd: Values
    """Of each neuron."""


def _hosts(rows: pa.Table, ids: Index, contrasts: Sequence[str]) -> _Hosts:
    of = np.searchsorted(ids, columns.numbers(rows, "neuron"))
    number = columns.numbers(rows, "host").astype(np.int64)
    condition = pc.index_in(rows["condition"], pa.array(SWAP_CONDITIONS)).to_numpy()
    span = int(number.max(initial=0)) + 1
    _, first, host = np.unique(of * span + number, return_index=True, return_inverse=True)
    shape = (len(first), len(SWAP_CONDITIONS))
    ok = pc.equal(rows["status"], "ok").to_numpy()
    response = columns.floats(rows, "response")
    seen = {}
    for column in ("response", "response_at_peak"):
        seen[column] = np.full(shape, np.nan)
        seen[column][host, condition] = np.where(ok, columns.floats(rows, column), np.nan)
    given = pc.fill_null(rows["reason"], "").combine_chunks().dictionary_encode()
    words, rank = np.unique(np.array(["", *given.dictionary.to_pylist()], dtype=np.str_), return_inverse=True)
    why = np.zeros(shape, dtype=np.int64)
    why[host, condition] = rank[1:][given.indices.to_numpy()]
    difference = np.empty((len(contrasts), len(first)))
    for x, contrast, (a, b) in zip(difference, contrasts, map(_pair, contrasts), strict=True):
        at = seen["response_at_peak" if contrast in AT_PEAK else "response"]
        x[:] = at[:, a] - at[:, b]
    largest = np.zeros(len(ids))
    np.fmax.at(largest, of, np.abs(response))
    difference[np.abs(difference) <= ROUNDING * largest[of[first]]] = 0.0
    return _Hosts(
        of[first],
        columns.numbers(rows, "cluster")[first],
        columns.floats(rows, "box_frac")[first],
        difference,
        why,
        words.tolist(),
        _deviations(rows, of, number, condition, len(ids)),
    )


def _pair(contrast: str) -> tuple[int, int]:
    a, b = contrast.split("-")
    return SWAP_CONDITIONS.index(a), SWAP_CONDITIONS.index(b)


def _deviations(rows: pa.Table, of: Index, number: Index, condition: Index, n: int) -> Values:
    """Standard deviation by which each neuron's effects were divided, from its largest effect."""
    effect, in_sd = (columns.floats(rows, c) for c in ("effect", "effect_sd"))
    usable = np.flatnonzero(np.isfinite(effect) & np.isfinite(in_sd) & (in_sd != 0))
    order = usable[np.lexsort((condition[usable], number[usable], -np.abs(effect[usable]), of[usable]))]
    neuron, first = np.unique(of[order], return_index=True)
    sd = np.full(n, np.nan)
    sd[neuron] = effect[order[first]] / in_sd[order[first]]
    return sd


def _grouped(
    hosts: _Hosts,
    contrasts: Sequence[str],
    group: Index,
    of: Index,
    fallback: Any,
    cluster: NDArray[np.object_],
    science: Science,
) -> Groups:
    """Figures of each group of hosts under each contrast, and why there is none: the most frequent reason that its
    hosts give, else the fallback. Hosts of group −1 are left out."""
    n, inside = len(of), group >= 0
    each = (np.arange(len(contrasts))[:, None] * n + group[inside]).ravel()
    two_sided = np.repeat([c in TWO_SIDED for c in contrasts], n)
    found = figures(hosts.difference[:, inside].ravel(), each, two_sided, science).shaped(len(contrasts), n)
    reason = np.full((len(contrasts), n), None, dtype=object)
    for row, pair in zip(reason, map(_pair, contrasts), strict=True):
        row[:] = fallback
        _most_frequent(row, np.tile(group[inside], 2), hosts.why[inside][:, pair].T.ravel(), hosts.words)
    reason[found.n > 0] = None
    return Groups(found, reason, of, cluster)


def _most_frequent(into: NDArray[np.object_], group: Index, word: Index, words: list[str]) -> None:
    """Puts each group's most frequent word into its place, of equally frequent ones the first; empty words are none."""
    given = np.array([w != "" for w in words], dtype=bool)[word]
    pairs, times = np.unique(group[given] * len(words) + word[given], return_counts=True)
    owner, which = np.divmod(pairs, max(len(words), 1))
    order = np.lexsort((which, -times, owner))
    owner, first = np.unique(owner[order], return_index=True)
    into[owner] = np.array(words, dtype=object)[which[order[first]]]


def _places(owner: Index, cluster: Index, of: Index, labels: NDArray[Any]) -> Index:
    """Where each host's (neuron, cluster) stands among the sorted clusters; −1 where it is none of them."""
    if not len(owner):
        return np.full(len(of), -1)
    span = int(cluster.max()) + 1
    known = owner * span + cluster
    is_one = labels < span  # not so of NaN
    wanted = of * span + np.where(is_one, labels, 0).astype(np.int64)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(is_one & (known[at] == wanted), at, -1)


def _by_bin(hosts: _Hosts, n: int) -> tuple[NDArray[np.bool_], Values]:
    cell = bins(hosts.box) * n + hosts.of
    size = N_BINS * n
    means = np.empty((N_BINS, len(hosts.difference), n))
    for i, x in enumerate(hosts.difference):
        known = ~np.isnan(x)
        total, times = (np.bincount(cell[known], w, size) for w in (x[known], None))
        means[:, i] = _ratio(total.astype(np.float64), times).reshape(N_BINS, n)
    return np.bincount(cell, minlength=size).reshape(N_BINS, n) > 0, means


def _ratio(total: Values, n: Index) -> Values:
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)
