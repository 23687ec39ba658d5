"""One swap by itself: the numbers of the table `swaps`, and those of a loop that knows nothing of what is tested."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sweeps import Finished

import polyray
from polyray.cluster.resolve import Resolved
from polyray.errors import DataError, ModelError
from polyray.models.vision import load_subject
from polyray.probes.images import open_probe
from polyray.report.catalog import Catalog
from polyray.serving.bench import Bench
from polyray.view.trying import Answer, Place, Question, question

Row = dict[str, Any]


@pytest.fixture(scope="module")
def bench(finished: Finished) -> Bench:
    return Bench(str(finished.out))


@pytest.fixture(scope="module")
def catalog(finished: Finished) -> Catalog:
    return Catalog(finished.out)


@pytest.fixture(scope="module")
def examples(finished: Finished) -> dict[tuple[str, int, int], Row]:
    rows = polyray.open(finished.out)["examples"].to_table().to_pylist()
    return {(r["layer"], r["neuron"], r["example"]): r for r in rows}


def asked(catalog: Catalog, layer: str, neuron: int, patch: int, example: int) -> Question:
    found, problems = question(catalog, layer, neuron, patch, example)
    assert found is not None, problems
    return found


def test_a_swap_of_the_study_gives_the_same_numbers_bit_by_bit(
    finished: Finished, bench: Bench, catalog: Catalog, examples: dict[tuple[str, int, int], Row]
) -> None:
    swaps = polyray.open(finished.out)["swaps"].to_table().to_pylist()
    pasted = [
        r for r in swaps
        if r["kind"] == "real" and r["condition"] in ("aligned", "non_aligned") and r["status"] == "ok"
    ]  # fmt: skip
    assert len(pasted) > 100
    for row in pasted:
        patch = examples[row["layer"], row["neuron"], row["source_example"]]["patch_id"]
        answer = bench.answer(asked(catalog, row["layer"], row["neuron"], patch, row["host_example"]))
        # What the study did in one micro-batch and this in another agrees in every bit: each is of the same size.
        assert answer.after.response == row["response"]
        assert answer.after.response_at_peak == row["response_at_peak"]
        assert answer.baseline.response == row["baseline"]
        assert answer.effect_sd == row["effect_sd"]
        assert answer.position == row["position"]
        assert list(answer.box) == [row[c] for c in ("x0", "y0", "x1", "y1")]
        assert list(answer.source_box) == [row[f"source_{c}"] for c in ("x0", "y0", "x1", "y1")]


def test_before_is_what_mining_saw(bench: Bench, catalog: Catalog, examples: dict[tuple[str, int, int], Row]) -> None:
    of = [e for e in examples.values() if e["layer"] == "edges" and e["neuron"] == 1 and e["cluster"] is not None]
    for e in of[:5]:
        answer = bench.answer(asked(catalog, "edges", 1, of[0]["patch_id"], e["example"]))
        assert answer.before.response == pytest.approx(e["activation"], rel=1e-6)
        assert answer.before.response == answer.before.response_at_peak


def naive(resolved: Resolved, catalog: Catalog, layer: str, neuron: int, donor: Row, example: int) -> Row:
    """The swap by plain loops: peak by argmax over the whole map, boxes by arithmetic, pasting by Pillow."""
    science = resolved.sweep.science
    side = science.subject.input_px
    probe = open_probe(science.probe)
    subject = load_subject(science.subject, science.numerics)
    about = catalog.at("layers", layer=layer)[0]

    def responses(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Map of the neuron [grid_h, grid_w], by a hook on the module."""
        taken: list[torch.Tensor] = []
        handle = subject.module.get_submodule(layer).register_forward_hook(lambda m, i, o: taken.append(o.detach()))
        with torch.no_grad():
            subject.module(subject.prepare(picture[None]))
        handle.remove()
        found = taken[0][0, neuron].numpy()
        assert found.shape == (about["grid_h"], about["grid_w"])
        return found

    def box(position: int) -> list[int]:
        limit = max(1, math.floor(science.swap.max_frac * side)) if science.swap else side
        width = min(about["swap_side_px"], limit)
        row, column = divmod(position, about["grid_w"])
        edges = []
        for centre in (
            about["center_x_px"] + column * about["stride_px"],
            about["center_y_px"] + row * about["stride_px"],
        ):
            start = math.floor(centre - width / 2 + 0.5)
            edges.append((max(0, start), min(side, start + width)))
        return [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]

    host, source = (
        np.asarray(Image.fromarray(probe.read(e)).resize((side, side))) if probe.read(e).shape[0] != side
        else probe.read(e)
        for e in (example, donor["example"])
    )  # fmt: skip
    before = responses(host)
    x0, y0, x1, y1 = box(int(before.argmax()))
    a0, b0, a1, b1 = box(donor["position"])
    patch = Image.fromarray(source[b0:b1, a0:a1]).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    after = host.copy()
    after[y0:y1, x0:x1] = np.asarray(patch)
    top = [
        e["activation"]
        for e in catalog.at("examples", layer=layer, neuron=neuron)
        if e["cluster"] is not None
    ]  # fmt: skip
    mean = sum(top) / len(top)
    sd = math.sqrt(sum((x - mean) ** 2 for x in top) / len(top))
    return {
        "before": float(before.max()), "after": float(responses(after).max()), "box": [x0, y0, x1, y1],
        "sd": sd, "position": int(before.argmax()),
    }  # fmt: skip


@pytest.mark.parametrize("layer", ["edges", "mid"])
def test_any_image_may_be_a_host_as_a_naive_loop_has_it(
    resolved: Resolved,
    bench: Bench,
    catalog: Catalog,
    examples: dict[tuple[str, int, int], Row],
    layer: str,
) -> None:
    donor = next(e for e in examples.values() if (e["layer"], e["cluster"]) == (layer, 0) and e["rank"] == 0)
    neuron = donor["neuron"]
    # A host of the same box takes the patch as it is, so that two ways of scaling cannot differ.
    strangers = [e for e in range(0, 300, 7) if (layer, neuron, e) not in examples]
    done = 0
    for example in strangers:
        expected = naive(resolved, catalog, layer, neuron, donor, example)
        answer = bench.answer(asked(catalog, layer, neuron, donor["patch_id"], example))
        if any("does not fire" in note for note in answer.notes):
            assert expected["before"] <= 0
            continue
        x0, y0, x1, y1 = answer.box
        a0, b0, a1, b1 = answer.source_box
        assert list(answer.box) == expected["box"]
        assert answer.position == expected["position"]
        if (x1 - x0, y1 - y0) != (a1 - a0, b1 - b0):
            continue
        assert answer.sd == pytest.approx(expected["sd"], rel=1e-9)
        assert answer.before.response == pytest.approx(expected["before"], rel=1e-4, abs=1e-5)
        assert answer.after.response == pytest.approx(expected["after"], rel=1e-4, abs=1e-5)
        change = (expected["after"] - expected["before"]) / expected["sd"]
        assert answer.change_sd == pytest.approx(change, rel=1e-3, abs=1e-3)
        done += 1
    assert done >= 5


def test_a_host_in_which_the_neuron_does_not_fire_says_so(bench: Bench, catalog: Catalog) -> None:
    found = [
        (n["layer"], n["neuron"]) for n in catalog.at("histograms") if 0 < (n["positive_frac"] or 0) < 0.9
    ]  # fmt: skip
    assert found
    silent = 0
    for layer, neuron in found:
        rows = [e for e in catalog.at("examples", layer=layer, neuron=neuron) if e["cluster"] is not None]
        fired = {e["example"] for e in catalog.at("examples", layer=layer, neuron=neuron)}
        for example in [e for e in range(0, 300, 11) if rows and e not in fired]:
            answer = bench.answer(asked(catalog, layer, neuron, rows[0]["patch_id"], example))
            if any("does not fire" in n for n in answer.notes):
                about = catalog.at("layers", layer=layer)[0]
                assert answer.before.response is not None
                assert answer.before.response <= 0
                assert answer.position == about["grid_h"] // 2 * about["grid_w"] + about["grid_w"] // 2
                silent += 1
        if silent:
            return
    pytest.fail("no neuron is silent anywhere: the sweep is another one than this test was written for")


def test_pictures_show_what_the_network_saw(
    bench: Bench, catalog: Catalog, examples: dict[tuple[str, int, int], Row]
) -> None:
    e = next(e for e in examples.values() if e["cluster"] is not None and e["layer"] == "mid")
    answer: Answer = bench.answer(asked(catalog, "mid", e["neuron"], e["patch_id"], 0))
    before, after, filled = (
        np.asarray(Image.open(io.BytesIO(s.jpeg))).astype(int) for s in (answer.before, answer.after, answer.baseline)
    )
    assert before.shape == (answer.side_px, answer.side_px, 3)
    x0, y0, x1, y1 = answer.box
    outside = np.ones(before.shape[:2], dtype=bool)
    outside[max(0, y0 - 8) : y1 + 8, max(0, x0 - 8) : x1 + 8] = False  # JPEG's blocks reach 8 px beyond, 16 in colour
    for changed in (after, filled):
        assert np.abs(changed - before)[outside].mean() < 3
    images = catalog.at("images")
    fill = [sum(r[f"mean_{c}"] for r in images) / len(images) for c in ("red", "green", "blue")]
    assert np.abs(filled[y0:y1, x0:x1] - np.array(fill)).mean() < 8
    assert np.abs(after[y0:y1, x0:x1] - before[y0:y1, x0:x1]).mean() > 4


def other(place: Place, **changes: Any) -> Place:
    return Place(**(vars(place) | changes))


def test_an_image_that_is_another_one_is_refused(
    bench: Bench, catalog: Catalog, examples: dict[tuple[str, int, int], Row]
) -> None:
    e = next(e for e in examples.values() if e["cluster"] is not None)
    q = asked(catalog, e["layer"], e["neuron"], e["patch_id"], 0)
    for changed, why in (
        ({"pixel_hash": "0" * 64}, "not the one that the run saw"),
        ({"example": 300}, "300 images"),
    ):
        with pytest.raises(DataError, match=why):
            bench.answer(Question(q.layer, q.neuron, other(q.host, **changed), q.donor, q.activation))
    with pytest.raises(ModelError, match="no layer"):
        bench.answer(Question({**q.layer, "grid_w": 3}, q.neuron, q.host, q.donor, q.activation))


def test_what_there_is_not_is_no_question(catalog: Catalog, examples: dict[tuple[str, int, int], Row]) -> None:
    e = next(e for e in examples.values() if e["cluster"] is not None)
    at = e["layer"], e["neuron"]
    for patch, example, why in (
        (e["patch_id"] + 1, 0, "is in no cluster"),
        (e["patch_id"], 300, "no image 300"),
        (2**63 - 1, 2**31 - 1, "is in no cluster"),
    ):
        found, problems = question(catalog, *at, patch, example)
        assert found is None
        assert any(why in p for p in problems), problems


def moved(finished: Finished, folder: Path, change: Any) -> Path:
    """The finished sweep with another run.json."""
    out = folder / "out"
    shutil.copytree(finished.out, out)
    run = json.loads((out / "run.json").read_text())
    change(run)
    (out / "run.json").write_text(json.dumps(run))
    return out


def test_other_weights_are_refused(finished: Finished, tmp_path: Path) -> None:
    def change(run: Row) -> None:
        run["provenance"]["subject"]["weights_digest"] = "f" * 64

    with pytest.raises(ModelError, match=f"their digest is [0-9a-f]{{64}}, run.json says {'f' * 64}"):
        Bench(str(moved(finished, tmp_path, change)))


def test_a_probe_set_that_is_not_there_is_refused(finished: Finished, tmp_path: Path) -> None:
    def change(run: Row) -> None:
        run["config"]["science"]["probe"] = {"kind": "folder", "path": str(tmp_path / "nowhere")}

    out = moved(finished, tmp_path, change)
    with pytest.raises(DataError, match="does not exist"):
        Bench(str(out))
    with pytest.raises(DataError, match="lies nowhere"):
        Bench(str(finished.out), probe=str(tmp_path))
