"""Synthetic censuses of any size, written through the store's own protocol, for tests and benchmarks of readers.

Numbers are random, but hang together as a sweep's do: p goes with z, log_psi is the sum of log sigmoid(z), q is
Benjamini-Hochberg's over all neurons, clusters come largest first, neurons that are left out have reasons and nulls.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit, log_expit
from scipy.stats import false_discovery_control, norm

from polyray import columns
from polyray.columns import ragged
from polyray.config import identity, parse_any
from polyray.records import Receipt
from polyray.schema import COMPONENTS, PRESETS, SHARED_LAYER, TABLES
from polyray.store import Store

ATTRIBUTES = Path(__file__).parents[1] / "polyray/models/attributes.txt"
ANIMALS = (
    "zebra",
    "zebra finch",
    "grevy's zebra",
    "tench",
    "golden retriever",
    "minivan",
    "bow tie",
    "Yorkshire terrier",
)
N_USED, N_PROTOTYPES, N_EXAMPLES, B = 100, 4, 12, 200
REASONS = ("fires on too few images: {n} of at least 20", "constant", "too few labels")

Floats = NDArray[np.float64]


def prompts() -> list[str]:
    """About 600 names that clusters may have, a few animals first."""
    lines = ATTRIBUTES.read_text().splitlines()
    return [*ANIMALS, *(line for line in lines if line and not line.startswith("#"))]


def picture(seed: int, side: int = 64) -> bytes:
    """A small JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(out, format="JPEG", quality=70)
    return out.getvalue()


def config(layers: Sequence[str]) -> Any:
    """The config that such a sweep would have had."""
    return parse_any(
        {
            "science": {
                "subject": {"name": "efficientnet_lite0", "layers": list(layers), "input_px": 64},
                "probe": {"kind": "generated", "n_classes": 40, "n_per_class": 60, "image_px": 64},
                "encoder": {"kind": "standin"},
                "mine": {"K": N_USED, "K_keep": N_USED},
                "embed": {"n_pool": 2400},
                "calibrate": {"B": B},
                "swap": {"n_hosts": 2, "n_neurons": 4},
            }
        }
    )


def census(
    out: Path,
    n_neurons: int = 1_000_000,
    n_layers: int = 100,
    n_detailed: int = 16,
    seed: int = 0,
    finish: bool = True,
    names: Sequence[str] | None = None,
) -> Path:
    """Writes a finished census.

    Args:
        out: a new folder.
        n_neurons: in all layers together, spread evenly.
        n_layers: how many layers.
        n_detailed: neurons of each layer, the first ones, that have thumbnails, examples and swaps.
        seed: of all random values.
        finish: whether it is finished, too.
        names: what clusters may be called; `prompts()` by default.

    Returns:
        The folder.
    """
    widths = [n_neurons // n_layers + (i < n_neurons % n_layers) for i in range(n_layers)]
    layers = [f"blocks.{i}" for i in range(n_layers)]
    store = Store(out)
    settings = config(layers)
    provenance = {"torch": "0", "device_class": "cpu", "polyray": "0.1.0", "n_images": 2400, "notes": []}
    provenance |= {"layers": dict(zip(layers, widths, strict=True)), "subject": {"name": "synthetic"}}
    store.create_or_resume(
        identity(settings, {"census": f"{n_neurons} {seed}"}, 0), provenance, settings.model_dump(mode="json")
    )
    with store.acquire():
        rng = np.random.default_rng(seed)
        numbers = [_neurons(rng, width) for width in widths]
        _summarise(rng, numbers)
        _put(store, "window", "window", [("layers", _layers(layers, widths), None)])
        _put(store, "draw/_shared", "draw", [("nulls", _shared_nulls(rng), SHARED_LAYER)])
        pictures = [picture(i) for i in range(24)]
        called = list(prompts() if names is None else names)
        for layer, columns_ in zip(layers, numbers, strict=True):
            tables = _of_layer(rng, columns_, called, pictures, n_detailed)
            for stage, wanted in (
                ("cluster", ("clusters", "examples")),
                ("draw", ("nulls",)),
                ("calibrate", ("neurons", "null_neurons")),
                ("summarise", ("neuron_summary",)),
                ("swap", ("swaps",)),
            ):
                _put(store, f"{stage}/{layer}", stage, [(t, tables[t], layer) for t in wanted])
        _put(store, "effects", "effects", [("effects", _effects(rng, layers, widths, n_detailed), None)])
        _put(store, "summarise", "summarise", [("layer_summary", _layer_summary(layers, numbers), None)])
        if finish:
            store.finish()
    return out


def put_rows(store: Store, unit: str, stage: str, tables: dict[str, list[dict[str, Any]]], layer: str = "mid") -> None:
    """Commits rows given as records; columns that are not given are null."""
    parts = []
    for name, rows in tables.items():
        schema = TABLES[name].schema
        table = pa.Table.from_pylist([{f.name: None for f in schema} | row for row in rows], schema=schema)
        parts.append((name, table, layer if TABLES[name].by_layer else None))
    _put(store, unit, stage, parts)


def _put(store: Store, unit: str, stage: str, parts: list[tuple[str, pa.Table, str | None]]) -> None:
    written = [store.write_part(table, unit, rows, layer) for table, rows, layer in parts]
    store.commit(Receipt(unit, written, seconds=1.0, host="here", stage=stage))


def _neurons(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Every column of `neurons` of one layer."""
    status = rng.choice(["ok", "excluded", "failed"], n, p=[0.97, 0.028, 0.002])
    missing = status != "ok"
    short = rng.integers(0, 20, n)
    reasons = [REASONS[i].format(n=m) for i, m in zip(rng.integers(0, 3, n), short, strict=True)]
    out: dict[str, Any] = {
        "neuron": np.arange(n, dtype=np.int32),
        "status": status,
        "reason": [r if bad else None for r, bad in zip(reasons, missing.tolist(), strict=True)],
        "ranked_by": ["response"] * n,
        "n_examples": np.where(missing, short, N_USED).astype(np.int32),
        "n_tied_at_cut": np.ones(n, np.int32),
    }
    whole = {"n_used": np.full(n, N_USED), "n_labels": rng.integers(5, 40, n), "k": rng.integers(2, 7, n)}
    out |= {c: pa.array(v, mask=missing) for c, v in whole.items()}
    z = {c: rng.normal(0.6 if c == "S" else 0.3, 1.3, n) for c in COMPONENTS}
    raw = {
        "S": np.clip(0.12 + 0.05 * z["S"], -1, 1),
        "Q": np.clip(0.35 + 0.07 * z["Q"], 0, 1),
        "D": np.clip(0.7 + 0.08 * z["D"], 0, 2),
        "Q_mean": np.full(n, 0.14),
        "Q_std": np.full(n, 0.05),
        "Q_p": 1 / (1 + rng.integers(0, B, n)),
        "two_means": rng.uniform(0, 1, n),
    }
    for shift, preset in zip((4.0, 1.0, 0.0), PRESETS, strict=True):
        here = {c: z[c] + (shift if c == "S" else 0) for c in COMPONENTS}
        p = {c: np.maximum(1, np.round(norm.sf(here[c]) * (B + 1))) / (B + 1) for c in COMPONENTS}
        for c in COMPONENTS:
            raw[f"{preset}_{c}_mean"] = np.full(n, 0.1)
            raw[f"{preset}_{c}_std"] = np.full(n, 0.05)
            raw[f"{preset}_{c}_z"] = here[c]
            raw[f"{preset}_{c}_hat"] = expit(here[c])
            raw[f"{preset}_{c}_p"] = p[c]
        raw[f"{preset}_log_psi"] = sum((log_expit(v) for v in here.values()), np.zeros(n))
        raw[f"{preset}_psi"] = np.exp(raw[f"{preset}_log_psi"])
        raw[f"{preset}_p"] = np.maximum.reduce(list(p.values()))
    return out | {c: np.where(missing, np.nan, v) for c, v in raw.items()}


def _summarise(rng: np.random.Generator, numbers: list[dict[str, Any]]) -> None:
    """Adds q and called, over all layers, and diagnoses."""
    p = np.concatenate([layer["specific_p"] for layer in numbers])
    q = np.full(len(p), np.nan)
    known = ~np.isnan(p)
    q[known] = false_discovery_control(p[known] ** 3)  # so that some are called
    start = 0
    for layer in numbers:
        n = len(layer["neuron"])
        here = q[start : start + n]
        layer["q"], layer["called"] = here, pa.array(here < 0.05, mask=np.isnan(here))
        kinds = np.array([None, "names alike", "one label; names alike"], dtype=object)
        layer["diagnosis"] = kinds[rng.choice(3, n, p=[0.9, 0.08, 0.02])].tolist()
        start += n


def _of_layer(
    rng: np.random.Generator, neurons: dict[str, Any], names: list[str], pictures: list[bytes], n_detailed: int
) -> dict[str, pa.Table]:
    null = dict(neurons)
    kept = np.flatnonzero(neurons["status"] == "ok")[:200]
    beside = {c: neurons[c][kept] for c in neurons if isinstance(neurons[c], np.ndarray)}
    for c in ("n_used", "k"):
        beside[c] = neurons[c].take(pa.array(kept))
    null = {c: v for c, v in beside.items() if c in TABLES["null_neurons"].schema.names}
    kinds = ("rotation", "pool", "one_concept")
    for preset in PRESETS:
        null[f"{preset}_log_psi"] = rng.normal(-2.4, 0.6, len(kept)).clip(max=0)
    null_neurons = pa.concat_tables(
        columns.table("null_neurons", null | {"kind": [kind] * len(kept)}) for kind in kinds
    )
    draws = {
        "kind": np.repeat(["pool", "one_concept"], B),
        "n_used": np.full(2 * B, N_USED),
        "draw": np.tile(np.arange(B), 2),
        "S": rng.normal(0.1, 0.04, 2 * B),
        "k": rng.integers(2, 7, 2 * B),
        "Q": rng.uniform(0.1, 0.4, 2 * B),
        "Q_z": rng.normal(2, 1.5, 2 * B),
        "D": rng.uniform(0.4, 0.9, 2 * B),
    }
    clusters = _clusters(rng, neurons, names, pictures, n_detailed)
    return {
        "clusters": clusters,
        "examples": _examples(rng, neurons, names, n_detailed),
        "nulls": columns.table("nulls", draws),
        "neurons": columns.table("neurons", neurons),
        "null_neurons": null_neurons,
        "neuron_summary": columns.table("neuron_summary", neurons),
        "swaps": _swaps(rng, neurons, pictures, min(2, n_detailed)),
    }


def _clusters(
    rng: np.random.Generator, neurons: dict[str, Any], names: list[str], pictures: list[bytes], n_detailed: int
) -> pa.Table:
    k = neurons["k"].fill_null(0).to_numpy()
    n = int(k.sum())
    neuron = np.repeat(neurons["neuron"], k)
    cluster = np.arange(n) - np.repeat(np.cumsum(k) - k, k)
    size = np.maximum(2, N_USED // (cluster + 2))
    chosen = rng.integers(0, len(names), (n, 5))
    detailed = neuron < n_detailed
    lengths = np.where(detailed, N_PROTOTYPES, 0)
    n_shown = int(lengths.sum())
    strings = pa.array(names)
    which = rng.integers(0, len(pictures), n_shown)
    thumbnails = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), pa.array(pictures).take(pa.array(which))
    )
    return columns.table(
        "clusters",
        {
            "neuron": neuron,
            "cluster": cluster,
            "size": size,
            "name": strings.take(pa.array(chosen[:, 0])),
            "name_score": rng.uniform(0.2, 0.9, n),
            "names": pa.ListArray.from_arrays(
                pa.array(np.arange(0, 5 * n + 1, 5, dtype=np.int32)), strings.take(pa.array(chosen.ravel()))
            ),
            "label": pa.array([f"class {i}" for i in range(40)]).take(pa.array(rng.integers(0, 40, n))),
            "label_frac": rng.uniform(0.1, 1, n),
            "prototypes": ragged(np.tile(np.arange(N_PROTOTYPES), n)[:n_shown], lengths, pa.int64()),
            "thumbnails": thumbnails,
            "snippets": pa.nulls(n, pa.list_(pa.string())),
        },
    )


def _examples(rng: np.random.Generator, neurons: dict[str, Any], names: list[str], n_detailed: int) -> pa.Table:
    ok = [i for i in range(n_detailed) if i < len(neurons["status"]) and neurons["status"][i] == "ok"]
    n = len(ok) * N_EXAMPLES
    rank = np.tile(np.arange(N_EXAMPLES), len(ok))
    return columns.table(
        "examples",
        {
            "neuron": np.repeat(ok, N_EXAMPLES),
            "rank": rank,
            "example": rng.integers(0, 2400, n),
            "activation": (10 - 0.3 * rank).astype(np.float32),
            "position": np.zeros(n, np.int32),
            **{c: np.full(n, v) for c, v in (("x0", 8), ("y0", 4), ("x1", 40), ("y1", 36))},
            "label": [f"class {i}" for i in rng.integers(0, 40, n)],
            "patch_id": rank,
            "cluster": rank % 2,
        },
    )


def _swaps(rng: np.random.Generator, neurons: dict[str, Any], pictures: list[bytes], n_swapped: int) -> pa.Table:
    conditions = ("host", "baseline", "aligned", "non_aligned", "random")
    rows: list[dict[str, Any]] = []
    for neuron in range(n_swapped):
        for host in range(2):
            for i, condition in enumerate(conditions):
                rows.append(
                    {"kind": "real", "neuron": neuron, "host": host, "condition": condition, "status": "ok"}
                    | {"cluster": host, "host_example": 5, "reduced": False, "box_frac": 0.1, "baseline": 1.0}
                    | {"response": float(rng.uniform(1, 4)), "effect_sd": float(rng.normal()), "effect": 0.5}
                    | {"picture": pictures[i], "x0": 3, "y0": 3, "x1": 20, "y1": 20}
                )
    schema = TABLES["swaps"].schema
    return pa.Table.from_pylist([{f.name: None for f in schema} | row for row in rows], schema=schema)


def _effects(rng: np.random.Generator, layers: list[str], widths: list[int], n_detailed: int) -> pa.Table:
    rows = []
    for layer in layers:
        for neuron in range(min(2, n_detailed)):
            for contrast in ("aligned-random", "aligned-non_aligned"):
                mean = float(rng.normal(0.5, 0.5))
                figures = {"mean": mean, "low": mean - 0.3, "high": mean + 0.3}
                figures |= {f"{c}_sd": v for c, v in figures.items()}
                row = {"layer": layer, "kind": "real", "scope": "neuron", "neuron": neuron, "split": "all", "n": 2}
                causal = mean > 0.3 if contrast == "aligned-random" else None
                rows.append(row | figures | {"contrast": contrast, "p": 0.04, "q": 0.2, "causal": causal})
    schema = TABLES["effects"].schema
    return pa.Table.from_pylist([{f.name: None for f in schema} | row for row in rows], schema=schema)


def _shared_nulls(rng: np.random.Generator) -> pa.Table:
    ks = range(2, 7)
    n = B * (1 + len(ks))
    missing = np.full(n, np.nan)
    is_rotation = np.arange(n) < B
    return columns.table(
        "nulls",
        {
            "kind": np.where(is_rotation, "rotation", "shuffle_text"),
            "n_used": pa.array(np.full(n, N_USED), mask=~is_rotation),
            "draw": np.tile(np.arange(B), 1 + len(ks)),
            "S": np.where(is_rotation, rng.normal(0.005, 0.001, n), np.nan),
            "k": np.concatenate([np.full(B, 2), np.repeat(list(ks), B)]),
            "Q": missing,
            "Q_z": missing,
            "D": np.where(is_rotation, np.nan, rng.normal(0.8, 0.06, n)),
        },
    )


def _layers(layers: list[str], widths: list[int]) -> pa.Table:
    n = len(layers)
    return columns.table(
        "layers",
        {
            "layer": layers,
            "depth": np.arange(n),
            "n_neurons": widths,
            "width": widths,
            "layout": ["nchw"] * n,
            **{c: np.full(n, 8) for c in ("grid_h", "grid_w")},
            "activation": pa.nulls(n),
            "ranked_by": ["response"] * n,
            "window": ["effective"] * n,
            **{c: np.full(n, 16) for c in ("side_px", "swap_side_px", "receptive_px")},
            **{c: np.full(n, 8.0) for c in ("center_x_px", "center_y_px", "stride_px")},
        },
    )


def _layer_summary(layers: list[str], numbers: list[dict[str, Any]]) -> pa.Table:
    def rows() -> Iterator[dict[str, Any]]:
        for layer, of in [*zip(layers, numbers, strict=True)]:
            for status in ("ok", "excluded", "failed"):
                n = float((of["status"] == status).sum())
                yield {"layer": layer, "metric": f"n_{status}", "value": n, "n": len(of["neuron"])}
            yield {"layer": layer, "metric": "n_neurons", "value": float(len(of["neuron"])), "n": len(of["neuron"])}
            for preset in PRESETS:
                median = float(np.nanmedian(of[f"{preset}_log_psi"]))
                yield {"layer": layer, "metric": "median_log_psi", "preset": preset, "value": median, "n": 1}

    schema = TABLES["layer_summary"].schema
    return pa.Table.from_pylist([{f.name: None for f in schema} | row for row in rows()], schema=schema)


if __name__ == "__main__":
    import sys
    import time

    started_s = time.monotonic()
    census(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    print(f"{time.monotonic() - started_s:.1f} s")
