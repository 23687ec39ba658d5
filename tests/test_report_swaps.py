"""What patch swaps came to, for people: table, figure and strips of a small made-up dataset."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from PIL import Image
from psi.samples import science
from rich.console import Console
from store.samples import new_store

import polyray
from polyray import columns
from polyray.commands.printed import swaps_table
from polyray.dataset import Dataset
from polyray.errors import StoreError
from polyray.psi.effects import effects
from polyray.records import Receipt
from polyray.report import gallery, swaps
from polyray.schema import CONTRASTS, SWAP_CONDITIONS, TABLES
from polyray.store import Store

LAYERS = {"stem": 12, "block10.conv_pw": 116}
"""Side of the swapped box; the second is wider than the box is allowed to be."""
N_NEURONS, N_HOSTS, INPUT_PX, WIDEST_PX = 12, 14, 224, 89
SHARPEST = 6
"""Neuron of highest log_psi; one cluster alone drives it, so it is not causal."""
Row = dict[str, Any]


def picture(rng: np.random.Generator, side: int, condition: str, cluster: int) -> bytes:
    """Something like a host with its box changed."""
    y, x = np.mgrid[:64, :64] / 64
    waves = np.sin(2 * np.pi * (x * rng.uniform(1, 3) + y * rng.uniform(1, 3)))
    canvas = (128 + 60 * np.stack([waves, waves * y, x - y], axis=-1)).astype(np.uint8)
    half = max(3, side * 32 // INPUT_PX)
    if condition not in ("host", "ablate_elsewhere"):
        patch = {"aligned": (220, 60, 60), "non_aligned": (60, 60, 220), "random": (60, 200, 60)}
        canvas[32 - half : 32 + half, 32 - half : 32 + half] = patch.get(condition, (118, 112, 104))
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, format="JPEG", quality=80)
    return out.getvalue()


def hosts(layer: str, kind: str, neuron: int, rng: np.random.Generator) -> list[Row]:
    side = min(LAYERS[layer], WIDEST_PX)
    sd = 0.8
    made: list[Row] = []
    for host in range(N_HOSTS):
        cluster = host % 2
        base = rng.normal(0.5, 0.1)
        for condition in SWAP_CONDITIONS if kind == "real" else ("baseline", "aligned", "non_aligned"):
            driven = kind == "real" and (cluster == 0 or neuron != SHARPEST) and neuron % 3 != 1
            lift = {"host": 2.0, "aligned": 1.5 * driven, "non_aligned": 0.4 * driven, "baseline": 0.0}
            value = np.float32(base + lift.get(condition, 0.1) + rng.normal(0, 0.2) * (condition != "baseline"))
            row: Row = {"kind": kind, "neuron": neuron, "host": host, "condition": condition, "status": "ok"}
            row |= {"cluster": cluster, "host_example": host, "reduced": LAYERS[layer] > WIDEST_PX}
            row |= {"x0": 20, "y0": 30, "x1": 20 + side, "y1": 30 + side - host, "box_frac": (side / INPUT_PX) ** 2}
            row |= {"baseline": base, "response": value, "response_at_peak": value, "effect": float(value) - base}
            row["effect_sd"] = row["effect"] / sd if kind == "real" else None
            if condition == "shuffled_position" and layer != "stem" and host % 4 == 0:
                row |= dict.fromkeys(("response", "response_at_peak", "effect", "effect_sd"))
                row |= {
                    "status": "not_swappable",
                    "reason": "there is no room for a box of this size beside the host's",
                }
            elif kind == "real" and host < 2:
                row["picture"] = picture(rng, side, condition, cluster)
            made.append(row)
    return made


def clusters_of(neuron: int) -> list[Row]:
    names = [("zebra, a striped animal", 60), ("sign $5 or $9_", 40)]
    return [{"neuron": neuron, "cluster": i, "name": name, "size": n} for i, (name, n) in enumerate(names)]


def rows_of(table: str, rows: list[Row]) -> pa.Table:
    return columns.table(table, {c: [r.get(c) for r in rows] for c in TABLES[table].schema.names})


def write(out: Path, n_swapped: int, pictures: bool = True) -> Dataset:
    """A dataset whose layers have swaps of so many neurons each."""
    rng = np.random.default_rng(3)
    store: Store = new_store(out)
    tables: dict[str, dict[str, pa.Table]] = {"layers": {}, "neurons": {}, "clusters": {}, "swaps": {}}
    for depth, (layer, side) in enumerate(LAYERS.items()):
        made = [r for n in range(n_swapped) for r in hosts(layer, "real", n, rng)]
        made += [r for n in range(min(4, n_swapped)) for r in hosts(layer, "null", n, rng)]
        made = made if pictures else [r | {"picture": None} for r in made]
        scores = [-1.0 - 0.1 * abs(n - SHARPEST) for n in range(N_NEURONS)]
        scored = [
            {"neuron": n, "status": "ok", "specific_log_psi": s, "specific_S_p": 0.01 * (n % 8)}
            for n, s in enumerate(scores)
        ]
        tables["layers"][layer] = rows_of("layers", [{"layer": layer, "depth": depth, "swap_side_px": side}])
        tables["neurons"][layer] = rows_of("neurons", scored)
        tables["clusters"][layer] = rows_of("clusters", [r for n in range(N_NEURONS) for r in clusters_of(n)])
        tables["swaps"][layer] = rows_of("swaps", made)
    parts = []
    joined = {
        name: pa.concat_tables([t.add_column(0, "layer", pa.array([x] * len(t), pa.string())) for x, t in by.items()])
        for name, by in tables.items()
        if name in ("neurons", "clusters")
    }
    found = effects(
        list(LAYERS),
        tables["swaps"].values(),
        {layer: range(n_swapped) for layer in LAYERS},
        joined["clusters"],
        joined["neurons"],
        science(calibrate={"n_bootstrap": 100}),
    )
    for name, by_layer in (*tables.items(), ("effects", {"": found})):
        for layer, rows in by_layer.items():
            if name == "layers":
                rows = rows.drop_columns(["layer"]) if "layer" not in TABLES["layers"].schema.names else rows
            kept = layer if TABLES[name].by_layer else None
            parts.append(store.write_part(name, "made", rows, kept))
    store.commit(Receipt("made", parts, seconds=0.1, host="here", stage="effects"))
    return polyray.open(out)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("swaps") / "out", N_NEURONS - 1)


def test_records_are_the_rows_of_effects(dataset: Dataset) -> None:
    found = swaps.records(dataset)
    quarters = [f"log_psi {i}/4" for i in range(1, 5)]
    assert [(r["layer"], r["split"]) for r in found] == [
        ("stem", "all"),
        ("block10.conv_pw", "all"),
        (None, "all"),
        *((None, q) for q in quarters),
        (None, "box 0-1 %"),
        (None, "box 9-16 %"),
    ]
    assert [r["n"] for r in found[:3]] == [11, 11, 22]
    assert found[0]["box"] == {"side_px": 12, "shown_px": 12, "reduced": 0.0}
    assert found[1]["box"] == {"side_px": 116, "shown_px": 89, "reduced": 1.0}
    assert all(r["box"] is None for r in found[2:])
    rows = {
        (r["layer"], r["split"], r["contrast"]): r
        for r in dataset["effects"].to_table().to_pylist()
        if r["scope"] in ("layer", "sweep")
    }
    for record in found:
        for name in CONTRASTS:
            row = rows[record["layer"], record["split"], name]
            # Of kind null there is aligned-non_aligned too: the record is of real neurons.
            if name != "aligned-non_aligned":
                assert record["contrasts"][name] == {c: row[c] for c in record["contrasts"][name]}
        for name in ("causal", "causal_specific"):
            assert record[name]["mean"] == rows[record["layer"], record["split"], name]["mean"]
    assert found[0]["contrasts"]["aligned-non_aligned"]["n"] == 11
    assert found[0]["null_p05"]["n"] == 4
    assert found[3]["null_p05"]["n"] == 0
    assert found[0]["causal"]["mean"] == pytest.approx(6 / 11), "every third neuron and the sharpest are not driven"


def test_cells_say_what_the_records_hold(dataset: Dataset) -> None:
    found = swaps.records(dataset)
    for record in found:
        line = dict(zip(swaps.COLUMNS, swaps.cells(record), strict=True))
        figure = record["contrasts"]["aligned-random"]
        low, high = figure["low_sd"], figure["high_sd"]
        assert line["aligned − random"] == f"{figure['mean_sd']:.2f} ({low:.2f}–{high:.2f})"
        assert line["causal"] == f"{record['causal']['mean']:.2f}"
    lines = [dict(zip(swaps.COLUMNS, swaps.cells(r), strict=True)) for r in found]
    assert [x["layer"] for x in lines[:4]] == ["stem", "block10.conv_pw", "all", "log ψ 1/4"]
    assert [x["box"] for x in lines[:3]] == ["12", "89, reduced", ""]
    assert lines[3]["null p < 0.05"] == "–"


def test_the_table_shows_whole_words_on_160_columns(dataset: Dataset) -> None:
    stream = io.StringIO()
    Console(file=stream, width=160, highlight=False).print(swaps_table(swaps.records(dataset)))
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= 160
    assert "…" not in shown
    for word in ("block10.conv", "non-aligned", "and specific", "position", "89, reduced", "log ψ 4/4", "box 9-16 %"):
        assert word in shown, word
    assert shown.count("│(") + shown.count(" (") >= 9 * 6, "intervals on one line each"
    assert shown.count("├") == 3, "a line between layers, sweep, quartiles and boxes"


def test_the_figure_shows_the_causal_neurons_of_highest_score(dataset: Dataset, tmp_path: Path) -> None:
    assert swaps.striking(dataset, 3) == [("block10.conv_pw", 5), ("stem", 5), ("block10.conv_pw", 8)]
    path = swaps.draw(dataset, tmp_path / "swaps.png")
    with Image.open(path) as image:
        assert image.width > 1500
        assert np.asarray(image.convert("L")).std() > 20


def texts(figure: Any) -> list[str]:
    """All text of a figure and its parts."""
    found = [t.get_text() for t in figure.texts]
    found += [] if figure._suptitle is None else [figure._suptitle.get_text()]
    for axes in figure.axes if isinstance(figure, Figure) else []:
        found += [axes.get_title(), axes.get_xlabel(), *(t.get_text() for t in axes.texts)]
    for part in figure.subfigs:
        found += texts(part)
    return found


def test_strip_shows_every_condition_of_a_host_of_each_cluster(dataset: Dataset, tmp_path: Path) -> None:
    found = gallery.strip(dataset, "block10.conv_pw", 5)
    shown = texts(found)
    assert shown.count("aligned") == 2
    assert shown.count("ablate elsewhere") == 2
    for name in ("cluster 0: zebra, a striped animal (60)", "cluster 1: sign $5 or $9_ (40)"):
        assert name in shown
    assert any("log ψ -1.10, causal, box reduced" in t for t in shown)
    assert sum(t.startswith("not swappable:\nthere is no room") for t in shown) == 1
    row = next(
        r
        for r in dataset["swaps"].to_table().to_pylist()
        if (r["layer"], r["kind"], r["neuron"], r["host"], r["condition"])
        == ("block10.conv_pw", "real", 5, 0, "aligned")
    )
    assert f"{row['response']:.2f} ({row['effect_sd']:+.1f})" in shown, "far from 0"
    assert sum(len(a.images) for a in found.axes) == 2 * len(SWAP_CONDITIONS) - 1
    path = gallery.draw_strip(dataset, "block10.conv_pw", 5, tmp_path / "strip.png")
    with Image.open(path) as image:
        assert image.width > 1000


@pytest.mark.parametrize(
    ("layer", "neuron", "says"),
    [
        ("block10", 0, "Did you mean 'block10.conv_pw'"),
        ("stem", 11, "not swapped; 11 were, the nearest in number is 10"),
    ],
)
def test_neuron_that_was_not_swapped_is_named(dataset: Dataset, layer: str, neuron: int, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        gallery.strip(dataset, layer, neuron)


def test_sweep_whose_swaps_found_no_neuron(tmp_path: Path) -> None:
    empty = write(tmp_path / "out", 0)
    found = swaps.records(empty)
    assert [r["n"] for r in found] == [0, 0, 0]
    assert all(r["causal"]["mean"] is None for r in found)
    assert "–" in swaps.cells(found[0])
    with pytest.raises(StoreError, match="nothing was swapped in layer 'stem'"):
        gallery.strip(empty, "stem", 0)
    with Image.open(swaps.draw(empty, tmp_path / "swaps.png")) as image:
        assert image.width < 1000, "no strips beside it"


def test_sweep_without_thumbnails(tmp_path: Path) -> None:
    plain = write(tmp_path / "out", 5, pictures=False)
    assert swaps.striking(plain, 3) == []
    swaps.draw(plain, tmp_path / "swaps.png")
    assert not math.isnan(swaps.records(plain)[0]["contrasts"]["aligned-random"]["mean_sd"])
    assert gallery.strip(plain, "stem", 0).axes == []
