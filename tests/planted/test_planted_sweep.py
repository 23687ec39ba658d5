"""A sweep with planted neurons, end to end on a real network, in one process."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sweeps import by_hand, write_config

import polyray
from polyray.cluster import vary
from polyray.cluster.resolve import resolve
from polyray.cluster.scoring import WORKERS
from polyray.commands import printed
from polyray.config import load_config
from polyray.dataset import Dataset
from polyray.errors import ConfigError
from polyray.overlay import opened
from polyray.report import planted
from polyray.report.catalog import Catalog
from polyray.report.content import Facts, Table
from polyray.report.source import Source
from polyray.report.story import tell
from polyray.schema import PLANTED_KINDS
from polyray.serving.bench import Bench
from polyray.store import Store
from polyray.view.trying import question

PER_KIND = 4
LAYER = "planted.blocks.6"


def settings(folder: Path) -> dict[str, Any]:
    return {
        "science": {
            "subject": {"name": "efficientnet_lite1", "layers": ["blocks.6"], "input_px": 64},
            "plant": {"per_kind": PER_KIND},
            "probe": {"kind": "generated", "n_classes": 16, "n_per_class": 48, "image_px": 64},
            "encoder": {"kind": "standin", "input_px": 64},
            "mine": {"K": 12, "K_keep": 12, "k_min": 12},
            "extract": {"n_sample": 4, "thumbnails": False},
            "embed": {"n_pool": 300},
            "cluster": {"n_init": 2},
            "calibrate": {"B": 99, "n_bootstrap": 50},
        }
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("planted")
    config = load_config(write_config(folder / "planted.yaml", settings(folder)))
    by_hand(resolve(config, str(folder / "out")), folder / "out")
    return polyray.open(folder / "out")


def test_its_report_says_that_the_neurons_are_planted(swept: Dataset) -> None:
    told = tell(Source(swept.path))
    assert told.title == "Neurons planted on efficientnet_lite1"
    assert " planted neurons, " in told.subtitle
    headline = next(s for s in told.sections if s.slug == "headline")
    (table,) = [b for b in headline.blocks if isinstance(b, Table)]
    assert table.caption == "Headline numbers of planted neurons"
    assert {row[-1] for row in table.rows} == {"–"}
    assert any(
        "one half of every class" in fact for b in told.sections[0].blocks if isinstance(b, Facts) for _, fact in b.rows
    )


def test_only_planted_neurons_are_swept(swept: Dataset) -> None:
    neurons = swept["neurons"].to_table()
    assert set(neurons["layer"].to_pylist()) == {LAYER}
    assert len(neurons) == PER_KIND * len(PLANTED_KINDS)
    assert "constant" not in str(neurons["reason"].to_pylist())


def test_no_image_is_both_fitted_and_mined(swept: Dataset) -> None:
    fitted = set(swept["plant_features"].to_table()["example"].to_pylist())
    seen = set(swept["examples"].to_table()["example"].to_pylist()) | set(
        swept["pool"].to_table()["example"].to_pylist()
    )
    assert len(fitted) == 16 * 24
    assert not fitted & seen


def test_neurons_respond_to_the_classes_they_were_planted_for(swept: Dataset) -> None:
    found = swept["planted_neurons"].to_table().to_pylist()
    purity = {kind: [r["purity"] for r in found if r["kind"] == kind] for kind in PLANTED_KINDS}
    assert np.mean([*purity["mono"], *purity["order2"], *purity["order3"]]) > 0.7
    # By chance it would be 1, 2 or 3 of 16 classes.
    assert purity["noise"] == [None] * PER_KIND


def test_polysemantic_neurons_stand_above_monosemantic_ones(swept: Dataset) -> None:
    figures = planted.Figures(swept)
    row = figures.get(LAYER, "auroc", "order2+3", 0.0, "specific", "log_psi")
    assert row["value"] > 0.8
    assert row["n"] == PER_KIND


def test_table_and_figure(swept: Dataset, tmp_path: Path) -> None:
    records = planted.records(swept)
    assert [(r["layer"], r["kind"]) for r in records] == [(LAYER, kind) for kind in PLANTED_KINDS]
    assert all(len(planted.cells(r)) == len(planted.COLUMNS) for r in records)
    json.dumps(records)
    path = planted.draw(swept, tmp_path / "planted.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_a_terminal_shows(swept: Dataset) -> None:
    shown = io.StringIO()
    Console(file=shown, width=200).print(printed.planted_table(planted.records(swept)))
    text = shown.getvalue()
    for word in (*PLANTED_KINDS, LAYER, *planted.COLUMNS):
        assert word in text


def test_variants_recover_as_well(swept: Dataset) -> None:
    asked = vary.resolve(str(swept.path), ["K=10,7", "encoder={kind: standin, input_px: 48}", "seed=1"])
    found = {}
    for variant in asked.variants:
        by_hand(variant.resolved, Path(variant.resolved.sweep.out))
        found[variant.label] = opened(variant.resolved.sweep.out)
    fewer, _, encoder, seed = found.values()
    examples = swept["examples"].to_table().to_pylist()
    for row in fewer.read("planted_neurons").to_pylist():
        mine = [e["label"] for e in examples if e["neuron"] == row["neuron"] and e["rank"] < 10]
        inside = [x for x in mine if x in row["classes"]]
        assert row["purity"] == (pytest.approx(len(inside) / 10) if row["planted_order"] else None)
    # Names are told in the variant's own text space; that of this encoder is the sweep's.
    assert "plant_classes" in Store(encoder.out).digests()
    assert encoder.read("plant_classes").equals(Store(swept.path).read("plant_classes"))
    assert encoder.read("planted_summary").num_rows == swept["planted_summary"].count_rows()
    # Another seed of the scores is no other half of the images.
    workers = [WORKERS["scoring"](v.resolved.sweep) for v in asked.variants if v.vary == "seed"]
    fitted = set(swept["plant_features"].to_table()["example"].to_pylist())
    assert not fitted & set(workers[0].images.distinct.tolist())
    assert seed.read("planted_neurons")["purity"].equals(Store(swept.path).read("planted_neurons")["purity"])


def test_a_k_of_which_no_neuron_could_be_pure_is_refused(swept: Dataset, tmp_path: Path) -> None:
    raw = settings(tmp_path)
    raw["science"]["mine"] |= {"K_keep": 20, "K": 13}
    with pytest.raises(ConfigError, match="K 13 is more than half of the 24 images"):
        resolve(load_config(write_config(tmp_path / "planted.yaml", raw)), str(tmp_path / "out"))


def test_a_swap_that_is_tried_sees_the_planted_neurons(swept: Dataset) -> None:
    bench, catalog = Bench(str(swept.path)), Catalog(swept.path)
    rows = [e for e in swept["examples"].to_table().to_pylist() if e["cluster"] is not None]
    for e in rows[:: len(rows) // 5]:
        asked, problems = question(catalog, LAYER, e["neuron"], e["patch_id"], e["example"])
        assert asked is not None, problems
        assert bench.answer(asked).before.response == pytest.approx(e["activation"], rel=1e-6)
