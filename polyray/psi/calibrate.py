"""Calibrate: how far beyond chance is each component, under each of three questions?

`paper` asks what the paper asks, `selective` whether the neuron is selective at all, `specific` whether it responds
to more than one thing. Source: arXiv 2508.16950, section 3.6; p-values, `selective` and `specific` are ours.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns
from polyray.config import CalibrateConfig, Science
from polyray.errors import StoreError
from polyray.kernels import statistics
from polyray.psi.draw import n_anchors
from polyray.schema import COMPONENTS, PRESETS

POOLED = {"selective": "pool", "specific": "one_concept"}
"""The kind of draw that each preset of ours compares with."""


class Nulls(NamedTuple):
    """Null draws of one layer, ready to be compared with."""

    S: dict[tuple[str, int], NDArray[np.float64]]
    """By (kind, n_used)."""
    Q_z: dict[tuple[str, int], NDArray[np.float64]]
    """By (kind, n_used), for pool and one_concept."""
    D: dict[tuple[str, int], NDArray[np.float64]]
    """By (kind, n_used) for pool and one_concept; by ("shuffle_text", k)."""


def nulls(draws: pa.Table) -> Nulls:
    """Groups rows of `nulls` (the layer's and the shared ones).

    Draws that could not be clustered (all vectors alike) are left out, as neurons and null neurons are.
    """
    draws = draws.filter(pa.compute.greater(draws["k"], 1))
    S: dict[tuple[str, int], NDArray[np.float64]] = {}
    Q_z: dict[tuple[str, int], NDArray[np.float64]] = {}
    D: dict[tuple[str, int], NDArray[np.float64]] = {}
    kinds = draws["kind"].to_numpy(zero_copy_only=False)
    size = np.nan_to_num(columns.floats(draws, "n_used")).astype(np.int64)
    ks = columns.numbers(draws, "k").astype(np.int64)
    for kind in ("rotation", "pool", "one_concept"):
        for n in np.unique(size[kinds == kind]).tolist():
            rows = draws.filter(pa.array((kinds == kind) & (size == n)))
            S[kind, n] = columns.floats(rows, "S")
            if kind == "rotation":
                continue
            Q_z[kind, n] = columns.floats(rows, "Q_z")
            D[kind, n] = columns.floats(rows, "D")
    shuffled = kinds == "shuffle_text"
    for k in np.unique(ks[shuffled]).tolist():
        rows = draws.filter(pa.array(shuffled & (ks == k)))
        D["shuffle_text", k] = columns.floats(rows, "D")
    return Nulls(S, Q_z, D)


_EMPTY = np.zeros(0)


def require_draws(draws: pa.Table, settings: CalibrateConfig, sizes: Sequence[int], n_pool: int) -> None:
    """Refuses to calibrate against draws of which some are missing.

    Args:
        draws: the layer's rows of `nulls` and the shared ones.
        settings: how many draws are asked for, and of which kinds.
        sizes: how many examples the layer's scored neurons have.
        n_pool: patches of the layer's pool that have a vector. There are no more one_concept draws than it has
            anchors, and none of either kind of more examples than it has patches.

    Raises:
        StoreError: draws of a kind and size are missing.
    """
    counts = draws.group_by(["kind", "n_used"]).aggregate([("draw", "count")]).to_pylist()
    found = {(row["kind"], row["n_used"]): row["draw_count"] for row in counts}
    for n in sizes:
        B = settings.B
        expected = {"rotation": B}
        if n <= n_pool:
            expected |= {"pool": B, "one_concept": min(B, n_anchors(n_pool))}
            expected |= {"permute_dims": B} if settings.permute_dims else {}
        for kind, wanted in expected.items():
            if found.get((kind, n), 0) != wanted:
                raise StoreError(
                    f"{found.get((kind, n), 0)} of {wanted} {kind} draws of {n} examples are there; "
                    "`polyray verify` says which unit is missing."
                )


def calibrated(scores: pa.Table, null: Nulls, science: Science) -> dict[str, NDArray[np.float64]]:
    """z, hat, p of every component and log_psi, PSI, p of every preset.

    Args:
        scores: rows of `scores` that were scored.
        null: the layer's draws.
        science: the sweep's settings.

    Returns:
        The calibrated columns of `neurons`, NaN where there are no draws to compare with. Q under `selective` and
        `specific` compares the set's permutation z with the draws' permutation z; their D compares with each draw's D
        at the k that the draw itself kept. (A deviation: the method names draws at the neuron's k. A k that was chosen
        is not like one that was not, and p of D was then not super-uniform: P(p <= 0.05) = 0.087 on null neurons, and
        0.17 on those with k = 5, against 0.054 as done here.)
    """
    out = {
        f"{preset}_{c}_{what}": np.full(len(scores), np.nan)
        for preset in PRESETS
        for c in COMPONENTS
        for what in ("mean", "std", "z", "hat", "p")
    }
    raw = {c: columns.floats(scores, c) for c in ("S", "Q", "Q_mean", "Q_std", "Q_p", "D")}
    n = columns.numbers(scores, "n_used").astype(np.int64)
    k = columns.numbers(scores, "k").astype(np.int64)
    Q_z = statistics.z_score(*(torch.from_numpy(raw[c].copy()) for c in ("Q", "Q_mean", "Q_std"))).numpy()

    def put(preset: str, component: str, rows: NDArray[np.bool_], values: NDArray[np.float64], draws: NDArray) -> None:
        if not len(draws):
            return
        x, d = torch.from_numpy(values[rows]), torch.from_numpy(draws)
        mean, std = statistics.moments(d)
        z = statistics.z_score(x, mean.expand(len(x)), std.expand(len(x)))
        for what, value in (
            ("mean", mean),
            ("std", std),
            ("z", z),
            ("hat", torch.sigmoid(z)),
            ("p", statistics.p_value(x, d)),
        ):
            out[f"{preset}_{component}_{what}"][rows] = value.numpy()

    for size in np.unique(n).tolist():
        same_size = n == size
        put("paper", "S", same_size, raw["S"], null.S.get(("rotation", size), _EMPTY))
        for preset, kind in POOLED.items():
            put(preset, "S", same_size, raw["S"], null.S.get((kind, size), _EMPTY))
            put(preset, "Q", same_size, Q_z, null.Q_z.get((kind, size), _EMPTY))
            put(preset, "D", same_size, raw["D"], null.D.get((kind, size), _EMPTY))
    for clusters in np.unique(k).tolist():
        put("paper", "D", k == clusters, raw["D"], null.D.get(("shuffle_text", clusters), _EMPTY))
    out["paper_Q_mean"], out["paper_Q_std"], out["paper_Q_p"] = raw["Q_mean"], raw["Q_std"], raw["Q_p"].copy()
    out["paper_Q_p"][raw["Q_std"] < statistics.CONSTANT_STD] = 1.0
    out["paper_Q_z"] = Q_z
    out["paper_Q_hat"] = torch.sigmoid(torch.from_numpy(Q_z)).numpy()

    for preset in PRESETS:
        z = [torch.from_numpy(out[f"{preset}_{c}_z"]) for c in COMPONENTS]
        log_psi = statistics.log_psi(*z)
        out[f"{preset}_log_psi"] = log_psi.numpy()
        out[f"{preset}_psi"] = log_psi.exp().numpy()
        p = torch.stack([torch.from_numpy(out[f"{preset}_{c}_p"]) for c in COMPONENTS], dim=-1)
        out[f"{preset}_p"] = statistics.conjunctive_p(p).numpy()
    return out


def calibrate(
    scores: pa.Table, mined: pa.Table, null: Nulls, ranked_by: str, science: Science, n_pool: int
) -> tuple[pa.Table, pa.Table]:
    """One row for each neuron of a layer, and the null neurons beside them.

    Args:
        scores: the layer's rows of `scores`.
        mined: its rows of `mined`.
        null: its draws.
        ranked_by: response or pre_activation.
        science: the sweep's settings.
        n_pool: patches of the layer's pool that have a vector.

    Returns:
        Rows of `neurons`: ok, excluded or failed with its reason; and rows of `null_neurons`. A neuron of more
        examples than the pool has patches stays ok, without p under `selective` and `specific`, and says so.
    """
    scored = scores.filter(pa.compute.equal(scores["status"], "ok"))
    values = calibrated(scored, null, science)
    real = np.array([kind == "real" for kind in scored["kind"].to_pylist()], dtype=bool)
    neurons = columns.numbers(mined, "neuron").astype(np.int64)
    at = _place(columns.numbers(scored, "neuron").astype(np.int64), real, neurons)

    status, reason = mined["status"].to_pylist(), mined["reason"].to_pylist()
    place = {neuron: i for i, neuron in enumerate(neurons.tolist())}
    for row in scores.select(["kind", "neuron", "status", "reason", "n_used"]).to_pylist():
        if row["kind"] == "real":
            status[place[row["neuron"]]], reason[place[row["neuron"]]] = row["status"], row["reason"]
            if row["status"] == "ok" and row["n_used"] > n_pool:
                reason[place[row["neuron"]]] = (
                    f"not calibrated: the pool has {n_pool} patches with a vector, fewer than the {row['n_used']} "
                    "examples clustered"
                )

    def spread(column: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.full(len(neurons), np.nan)
        out[at[real]] = column[real]
        return out

    raw = {c: columns.floats(scored, c) for c in ("S", "k", "Q", "Q_mean", "Q_std", "Q_p", "two_means", "D")}
    counts = {c: columns.floats(scored, c) for c in ("n_used", "n_labels")}
    rows = {
        "neuron": neurons,
        "status": status,
        "reason": reason,
        "ranked_by": [ranked_by] * len(neurons),
        "n_examples": pa.compute.list_value_length(mined["example"]),
        "n_tied_at_cut": mined["n_tied_at_cut"],
    }
    rows |= {c: _whole(spread(v)) for c, v in counts.items()}
    rows |= {c: _whole(spread(v)) if c == "k" else spread(v) for c, v in raw.items()}
    rows |= {c: spread(v) for c, v in values.items()}

    beside = pa.array(~real)
    null_rows = {c: scored[c].filter(beside) for c in ("kind", "neuron", "n_used", *raw)}
    null_rows |= {c: v[~real] for c, v in values.items()}
    return columns.table("neurons", rows), columns.table("null_neurons", null_rows)


def _place(scored: NDArray[np.int64], real: NDArray[np.bool_], neurons: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(neurons)
    at = order[np.searchsorted(neurons[order], scored).clip(max=max(len(neurons) - 1, 0))] if len(neurons) else scored
    return np.where(real, at, -1)


def _whole(values: NDArray[np.float64]) -> pa.Array:
    missing = np.isnan(values)
    return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)


def scores_of(values: Mapping[str, NDArray[np.float64]], preset: str) -> dict[str, NDArray[np.float64]]:
    """log_psi and the ablations of a preset, each as something to rank by.

    The ablations are ranked by z and by sums of log sigmoid(z): the same order as Ŝ, Q̂, D̂ and Ŝ·Q̂, without
    their saturation at 1.
    """
    z = {c: torch.from_numpy(np.ascontiguousarray(values[f"{preset}_{c}_z"])) for c in COMPONENTS}
    product = torch.nn.functional.logsigmoid(z["S"]) + torch.nn.functional.logsigmoid(z["Q"])
    return {
        "log_psi": values[f"{preset}_log_psi"],
        **{c: z[c].numpy() for c in COMPONENTS},
        "S*Q": product.numpy(),
    }


def ranked(rows: pa.Table, preset: str) -> dict[str, NDArray[np.float64]]:
    """`scores_of` rows of `neurons` or `null_neurons`; NaN where a row has no score."""
    wanted = [*(f"{preset}_{c}_z" for c in COMPONENTS), f"{preset}_log_psi"]
    return scores_of({c: columns.floats(rows, c) for c in wanted}, preset)
