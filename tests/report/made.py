"""Small datasets made by hand through the store, of every shape that the report may meet: no model, no Ray."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from psi.samples import science
from scipy.special import expit, log_expit

from polyray import columns
from polyray.psi.effects import effects
from polyray.psi.summarise import summarise
from polyray.records import Receipt
from polyray.schema import COMPONENTS, NULL_KINDS, PRESETS, SWAP_CONDITIONS, TABLES
from polyray.store import Store

Row = dict[str, Any]
LAYERS = ("stem", "mid.9", "mid.10")
"""In order of depth, which is not that of their names."""
N_NEURONS = 90
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`|*_[a](http://x.test)\u202eevil\u2066\x00\x07\nend"
"""What a name may hold to do harm."""
CONDITIONS = ("actual", "order", "precursors_matched", "precursors_random", "tokens_same_frequency", "unheard_of")


def store_at(out: Path, config: Row | None = None, provenance: Row | None = None) -> Store:
    """A new dataset, leased."""
    store = Store(out)
    identity = {"seed": 0, "swap.seed": 3, "contents.subject": "ab12", "method": "psi"}
    known: Row = {"torch": "2.9.0", "device_class": "cpu", "polyray": "0.1.0", "notes": ["a note of the run"]}
    known |= {"subject": {"name": "tiny", "trained": False}, "probe": {"kind": "generated", "name": "drawn", "n": 80}}
    store.create_or_resume(identity, known | (provenance or {}), {"science": config or {}})
    store.acquire()
    return store


def put(store: Store, unit: str, tables: Sequence[tuple[str, list[Row], str | None]]) -> None:
    """Commits rows as one unit; what a row leaves out is null."""
    parts = []
    for name, rows, layer in tables:
        held = columns.table(name, {c: [r.get(c) for r in rows] for c in TABLES[name].schema.names})
        parts.append(store.write_part(name, unit, held, layer if TABLES[name].by_layer else None))
    store.commit(Receipt(unit, parts, seconds=0.1, host="here", stage=unit))


def thumbnail(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="JPEG", quality=50)
    return out.getvalue()


def scored(rng: np.random.Generator, n: int, shift: float) -> list[Row]:
    """Neurons, or null neurons, with all their scores; a few of the first have none."""
    rows: list[Row] = []
    for neuron in range(n):
        row: Row = {"neuron": neuron, "status": "ok", "k": int(rng.integers(2, 5)), "n_used": 24, "n_tied_at_cut": 1}
        row |= {"S": rng.uniform(0, 0.5), "Q": rng.uniform(), "D": rng.uniform(0, 1)}
        for preset in PRESETS:
            z = {c: rng.normal(shift, 1.5) for c in COMPONENTS}
            p = {c: math.ceil(20 * expit(-2 * z[c])) / 20 - 0.01 for c in COMPONENTS}  # so that some are equal
            row |= {f"{preset}_{c}_z": z[c] for c in COMPONENTS} | {f"{preset}_{c}_p": p[c] for c in COMPONENTS}
            row[f"{preset}_log_psi"] = float(sum(log_expit(x) for x in z.values()))
            row[f"{preset}_p"] = max(p.values())
        rows.append(row)
    return rows


def real(rng: np.random.Generator, shift: float) -> list[Row]:
    rows = scored(rng, N_NEURONS, shift)
    kept = ("neuron",)
    for i, (status, reason) in enumerate(
        [("excluded", "dead: 3 of at least 20"), ("excluded", "dead: 7 of at least 20"), ("failed", HOSTILE)]
    ):
        rows[i] = {c: rows[i][c] for c in kept} | {"status": status, "reason": reason}
    rows[3] |= {f"specific_{c}": None for c in ("p", "log_psi")} | {"reason": "no pool of its size: 12"}
    return rows


def clusters(n: int, pictures: bool, name: str = "zebra") -> list[Row]:
    made = []
    for neuron in range(4, n):
        for cluster in range(2):
            row: Row = {"neuron": neuron, "cluster": cluster, "size": 14 - cluster, "name": f"{name} {cluster}"}
            row |= {"name_score": 0.5, "label": name, "label_frac": 0.75}
            row["thumbnails"] = [thumbnail(cluster), thumbnail(2), b"<svg onload=alert(1)>"] if pictures else None
            made.append(row)
    return made


def swaps(rng: np.random.Generator, n: int) -> list[Row]:
    made: list[Row] = []
    for kind in ("real", "null"):
        for neuron in range(4, 4 + n):
            for host in range(12):
                cluster, base = host % 2, rng.normal(0.5, 0.1)
                for condition in SWAP_CONDITIONS if kind == "real" else ("baseline", "aligned", "non_aligned"):
                    lift = {"host": 2.0, "aligned": 1.4, "non_aligned": 0.4, "baseline": 0.0} if kind == "real" else {}
                    value = base + lift.get(condition, 0.1) + rng.normal(0, 0.1) * (condition != "baseline")
                    row: Row = {"kind": kind, "neuron": neuron, "host": host, "condition": condition, "status": "ok"}
                    row |= {"cluster": cluster, "host_example": host, "reduced": False, "box_frac": 0.05}
                    row |= {"x0": 1, "y0": 1, "x1": 13, "y1": 13, "response": np.float32(value)}
                    row |= {"response_at_peak": np.float32(value), "effect": value - base, "baseline": base}
                    row["effect_sd"] = (value - base) / 0.8 if kind == "real" else None
                    if condition == "shuffled_position" and host == 3:
                        row |= dict.fromkeys(("response", "response_at_peak", "effect", "effect_sd"))
                        row |= {"status": "not_swappable", "reason": "no room: 3 px"}
                    made.append(row)
    return made


def with_layers(rows: dict[str, list[Row]], name: str) -> pa.Table:
    tables = []
    for layer, of in rows.items():
        held = columns.table(name, {c: [r.get(c) for r in of] for c in TABLES[name].schema.names})
        tables.append(held.add_column(0, "layer", pa.array([layer] * len(held), pa.string())))
    return pa.concat_tables(tables)


def census(
    out: Path, layers: Sequence[str] = LAYERS, pictures: bool = True, name: str = "zebra", stop: str = "", **config: Any
) -> Path:
    """A PSI sweep with swaps and a variant; `stop` ends it before `summarise`, or right after the first layer."""
    rng = np.random.default_rng(5)
    asked = science(calibrate={"n_bootstrap": 40})
    store = store_at(out, asked.model_dump(mode="json") | config)
    about = [{"layer": x, "depth": i, "n_neurons": N_NEURONS, "grid_h": 4, "grid_w": 5, "side_px": 12 + i,
              "swap_side_px": 12, "ranked_by": "response"} for i, x in enumerate(layers)]  # fmt: skip
    put(store, "window", [("layers", about, None)])
    images = [{"example": i, "name": f"{i}", "status": "failed" if i == 2 else "ok"} for i in range(80)]
    images[2]["reason"] = "cannot be read: cut short"
    put(store, "index", [("images", images, None)])
    neurons: dict[str, list[Row]] = {}
    nulls: dict[str, list[Row]] = {}
    for depth, layer in enumerate(layers):
        if stop == "layer" and depth:
            return out
        neurons[layer] = real(rng, 0.3 * depth)
        nulls[layer] = [r | {"kind": k} for k in NULL_KINDS for r in scored(rng, 40, -0.2)]
        put(store, f"calibrate/{layer}", [("neurons", neurons[layer], layer), ("null_neurons", nulls[layer], layer)])
        put(store, f"cluster/{layer}", [("clusters", clusters(N_NEURONS, pictures, name), layer)])
    if stop == "summarise":
        return out
    summaries, figures = summarise(
        list(layers), with_layers(neurons, "neurons"), with_layers(nulls, "null_neurons"), asked
    )
    parts = [store.write_part("neuron_summary", "summarise", rows, layer) for layer, rows in summaries.items()]
    parts.append(store.write_part("layer_summary", "summarise", figures, None))
    store.commit(Receipt("summarise", parts, seconds=0.1, host="here", stage="summarise"))
    swapped = {layer: swaps(rng, 6) for layer in layers}
    for layer, rows in swapped.items():
        put(store, f"swap/{layer}", [("swaps", rows, layer)])
    found = effects(
        list(layers),
        [columns.table("swaps", {c: [r.get(c) for r in rows] for c in TABLES["swaps"].schema.names})
         for rows in swapped.values()],
        {layer: range(4, 10) for layer in layers},
        with_layers({x: clusters(N_NEURONS, False) for x in layers}, "clusters"),
        with_layers(neurons, "neurons"),
        asked,
    )  # fmt: skip
    part = store.write_part("effects", "effects", found, None)
    store.commit(Receipt("effects", [part], seconds=0.1, host="here", stage="effects"))
    failures = [
        {"stage": "mine", "unit": f"u{n}", "item": "image", "item_id": i, "reason": f"{HOSTILE}: {i}"}
        for n, i in enumerate((3, 4, 4))
    ]
    put(store, "failed", [("failures", failures, None)])
    put(store, "sensitivity", [("sensitivity", variant("prompts", f"{name}.txt") + variant("seed", "1"), None)])
    store.finish()
    return out


def variant(vary: str, value: str) -> list[Row]:
    about = {"variant": f"{vary}-{value}", "vary": vary, "value": value, "n": 260}
    rows = [
        about | {"metric": "spearman", "preset": p, "score": s, "estimate": 0.2 + 0.01 * i, "low": 0.1, "high": 0.3}
        for i, (p, s) in enumerate(
            [("paper", "log_psi"), ("specific", "log_psi"), (None, "S"), (None, "Q"), (None, "D")]
        )
    ]
    ends = ("same_k_frac", "adjusted_rand", "n_called_base", "n_called", "called_flip_frac", "D_flip_frac")
    return rows + [about | {"metric": m, "estimate": 3.0 if m.startswith("n_") else 0.4} for m in ends]


def language(out: Path, name: str = "w", finish: bool = True) -> Path:
    """A categorical sweep of two layers; in the first no neuron qualifies."""
    rng = np.random.default_rng(7)
    about = {"layers": {"h.0": 30, "h.1": 30}, "subject": None, "model": {"name": name, "family": "GPT-2"}}
    store = store_at(out, {"method": "categorical", "seed": 4}, about)
    put(store, "count", [("tokens", [{"token": i, "count": 9, "text": f" {name}{i}"} for i in range(50)], None)])
    for layer in ("h.0", "h.1"):
        rows: list[Row] = []
        broken: list[Row] = []
        for neuron in range(30):
            if layer == "h.0" or neuron < 5:
                said = "fewer than 3 taken-clusters"
                rows.append({"neuron": neuron, "status": "excluded", "reason": said, "diagnosis": "few_taken_clusters"})
                continue
            row: Row = {"neuron": neuron, "status": "ok", "n_clusters": 8, "difference": rng.normal(0.02, 0.02)}
            row |= {"p": [0.001, 0.01, 0.5][neuron % 3], "tau": 0.6, "first": 0.7, "deciles": rng.normal(0.1, 0.02, 10)}
            row["diagnosis"] = "weak_first_component; rank_deficient" if neuron == 9 else None
            rows.append(row)
            for control, n in (("order", 30), ("precursors_random", 20), ("unheard_of", 10)):
                broken.append({"neuron": neuron, "control": control, "deciles": rng.normal(0.05, 0.02, n)})
        put(store, f"proximity/{layer}", [("proximity", rows, layer), ("proximity_controls", broken, layer)])
        core = [{"neuron": i, "status": "ok", "tokens": list(range(i, i + 20)), "means": list(np.linspace(3, 1, 20))}
                for i in range(30)]  # fmt: skip
        taken = [{"neuron": i, "rank": k, "precursor": 7 * k, "size": 6, "p": 0.001, "counted": k != 1,
                  "tokens": list(range(i, i + 45, 8))} for i in range(30) for k in range(8)]  # fmt: skip
        put(store, f"core/{layer}", [("core_tokens", core, layer), ("taken_clusters", taken, layer)])
    held = [{"neuron": i, "quantile": q, "status": "ok", "change": [0.1, -0.3, 0.2], "control_change": [0.0, 0.1, 0.0],
             "deviation": [1.0, 0.5, 0.0], "kl": rng.uniform(), "control_kl": 0.4} for i in range(9)
            for q in (0.0, 0.99)]  # fmt: skip
    put(store, "clamp", [("clamps", held, "h.1")])
    if finish:
        put(store, "summarise", [("categorical", [r for x in ("h.1", None) for r in conditions(x)], None)])
        store.finish()
    return out


def conditions(layer: str | None) -> list[Row]:
    rows = []
    for i, condition in enumerate(CONDITIONS):
        row: Row = {"layer": layer, "condition": condition, "n_neurons": 60, "n": 25, "n_groups": 6}
        for j, name in enumerate(("positive", "difference", "gap", "remaining", "tau", "kruskal", "first")):
            value = 0.9 - 0.05 * i - 0.01 * j
            row |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.05}
        row |= {"verdict": None if condition == "actual" else ("kept", "gone")[i % 2], "requalifying": 0.1 * i}
        rows.append(row)
    return rows


def floats(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """A column of records; NaN where it is null."""
    return np.array([np.nan if r[name] is None else r[name] for r in rows], dtype=np.float64)
