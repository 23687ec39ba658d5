"""What the subject is shown and what becomes of its answers, against pictures drawn by hand with Pillow."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from psi.samples import FakeProbe, images_of, layer_row, noise_pictures, science
from psi.scenes import (
    A_ALONE,
    A_OR_B,
    FILL,
    GRID,
    LAYER,
    PX,
    Scene,
    box_of,
    by_hand,
    detectors,
    means,
    scene,
    settings,
)
from torch import Tensor

from polyray.config import Science
from polyray.errors import DataError
from polyray.models.vision import Subject, load_subject
from polyray.probes.images import view
from polyray.psi.hosts import NONE, Examples, Peaks, boxes, window
from polyray.psi.mine import index
from polyray.psi.swap import Neuron, Views, compose, fill_colour, redraw, swap
from polyray.schema import SWAP_CONDITIONS, TABLES

pytestmark = pytest.mark.usefixtures("one_thread")

REDS = [(150 + 8 * i, 50, 40) for i in range(8)]
GREENS = [(50, 150 + 8 * i, 40) for i in range(8)]
PATCHED = ("aligned", "non_aligned", "random", "random_place", "shuffled_position")
NO_ROOM = "there is no room for a box of this size beside the host's"


class Watched:
    """A subject that keeps what it is shown; and may answer otherwise, by its largest response or that at the peak."""

    def __init__(
        self,
        subject: Subject,
        answer: Callable[[NDArray[np.uint8], Tensor], Tensor] | None = None,
        at_peak: bool = False,
    ) -> None:
        self.subject, self.micro_batch, self.answer, self.at_peak = subject, subject.micro_batch, answer, at_peak
        self.shown: list[NDArray[np.uint8]] = []

    def responses_at(self, views: NDArray[np.uint8], *asked: Any) -> tuple[Tensor, Tensor]:
        self.shown += list(views)
        response, at = self.subject.responses_at(views, *asked)
        if self.answer is None:
            return response, at
        return (response, self.answer(views, at)) if self.at_peak else (self.answer(views, response), at)


def swapped(
    made: Scene,
    neurons: tuple[int, ...] = (A_OR_B,),
    subject: Any = None,
    kind: str = "real",
    unreadable: tuple[int, ...] = (),
    layer: dict[str, Any] = LAYER,
    chosen: Science | None = None,
) -> tuple[list[dict[str, Any]], list[Any]]:
    chosen = settings() if chosen is None else chosen
    asked = [Neuron(n, made.examples, made.peaks) for n in neurons]
    views = made.views(chosen, unreadable)
    rows, failed = swap(detectors() if subject is None else subject, views, chosen, layer, asked, kind, FILL)
    assert rows.schema.names == TABLES["swaps"].schema.names
    rows.validate(full=True)
    return rows.to_pylist(), failed


def noisy(made: Scene, seed: int = 0) -> Scene:
    """The same roles in pictures of noise, so that no two patches are alike."""
    return made._replace(pictures=noise_pictures(len(made.pictures), PX, seed))


def sick(row: dict[str, Any]) -> bool:
    return row["response"] is None and row["response_at_peak"] is None and row["effect"] is None


@pytest.fixture
def made() -> Scene:
    return scene(A_OR_B, [REDS, GREENS])


# --- A patch swapped with itself ------------------------------------------------------------------------------------

NETWORKS = [
    ({"name": "efficientnet_lite0", "weights": "default", "input_px": 96}, "blocks.3"),
    ({"name": "torchvision:resnet50", "weights": "none", "input_px": 64}, "layer3.0"),
    ({"name": "timm:vit_tiny_patch16_224", "weights": "none", "input_px": 224}, "blocks.1"),
]


@pytest.mark.parametrize(("network", "name"), NETWORKS, ids=["lite0", "resnet50", "vit"])
def test_a_patch_swapped_with_its_like_is_the_host_again(network: dict[str, Any], name: str) -> None:
    """Every image is the same picture under another number: whoever gives the patch, it is what was there before."""
    px = network["input_px"]
    chosen = science(
        subject={"factory": None, "micro_batch": 8, **network, "layers": [name]},
        swap={"n_hosts": 2},
    )
    subject = load_subject(chosen.subject, chosen.numerics)
    info = subject.readouts.layers([name])[0]
    noise = np.array(Image.fromarray(noise_pictures(1, 12)[0]).resize((px, px)))
    probe = FakeProbe([noise] * 16, ["x"] * 16)
    response, position = (x[0].numpy() for x in subject.responses(noise[None], [name])[name])
    # One neuron that peaks somewhere at the border, one within.
    at = np.stack([position % info.grid_w, position // info.grid_w])
    border = (at == 0).any(0) | (at[0] == info.grid_w - 1) | (at[1] == info.grid_h - 1)
    asked = [int(np.flatnonzero(border == side)[0]) for side in (True, False)]
    layer = layer_row(info, px // 3)
    neurons = []
    for n in asked:
        where = np.full(12, position[n], dtype=np.int64)
        examples = Examples(np.arange(12), where, np.arange(12) % 2, np.full(12, float(response[n])))
        neurons.append(Neuron(n, examples, Peaks(np.arange(12, 16), where[:4])))
    watched = Watched(subject)
    rows, failed = swap(watched, Views(probe, chosen), chosen, layer, neurons, "real", FILL)  # type: ignore[arg-type]
    assert failed == []
    shown = iter(watched.shown)
    n_same = 0
    for row in rows.to_pylist():
        seen = noise if row["condition"] == "host" else next(shown)
        if row["condition"] in ("host", "aligned", "non_aligned", "random"):
            np.testing.assert_array_equal(seen, noise)
            assert row["response"] == pytest.approx(response[row["neuron"]], rel=1e-5, abs=1e-5)
            assert row["response_at_peak"] == pytest.approx(response[row["neuron"]], rel=1e-5, abs=1e-5)
            n_same += 1
        else:
            assert not np.array_equal(seen, noise)
    assert n_same == 16
    for n in neurons:
        box = boxes(layer, window(layer, px, 0.4), n.examples.position[:1], px)[0].tolist()
        np.testing.assert_array_equal(compose("aligned", noise, box, FILL, (noise, box)), noise)


# --- What is shown, and what is said --------------------------------------------------------------------------------


def test_every_row_shows_what_it_says(made: Scene) -> None:
    """Boxes at borders included, where patches of other sizes are scaled."""
    made = noisy(made)
    watched = Watched(detectors())
    rows, failed = swapped(made, (A_ALONE, A_OR_B), watched)
    assert failed == []
    assert len(rows) == 2 * 4 * len(SWAP_CONDITIONS)
    shown = iter(watched.shown)
    chosen = settings()
    views = made.views(chosen)
    n_scaled = 0
    for row in rows:
        drawn = by_hand(row, made.pictures, FILL)
        again = redraw(row, views, FILL)
        assert int(np.abs(again.astype(int) - drawn).max()) <= 2
        if row["condition"] == "host":
            assert row["response"] == row["response_at_peak"]
            assert row["response"] == made.examples.activation[row["host_example"]].astype(np.float32)
            continue
        np.testing.assert_array_equal(next(shown), again)
        values = means(again)[row["neuron"]]
        assert row["response"] == pytest.approx(values.max(), abs=1e-5)
        assert row["response_at_peak"] == pytest.approx(values[row["position"]], abs=1e-5)
        if row["source_x0"] is not None:
            n_scaled += (row["source_x1"] - row["source_x0"], row["source_y1"] - row["source_y0"]) != (
                row["x1"] - row["x0"],
                row["y1"] - row["y0"],
            )
    assert next(shown, None) is None
    assert n_scaled > 0


def test_rows_say_who_gives_what_and_where(made: Scene) -> None:
    rows, _ = swapped(made)
    cluster, position = made.examples.cluster, made.examples.position
    for row in rows:
        condition, host = row["condition"], row["host_example"]
        assert (row["status"], row["reason"], row["kind"], row["reduced"]) == ("ok", None, "real", False)
        assert (row["cluster"], row["position"]) == (cluster[host], position[host])
        box = [row[c] for c in ("x0", "y0", "x1", "y1")]
        assert box == box_of(row["position"])
        assert row["box_frac"] == pytest.approx((box[2] - box[0]) * (box[3] - box[1]) / PX**2)
        assert (row["source_example"] is not None) == (row["source_x0"] is not None) == (condition in PATCHED)
        assert (row["place_x0"] is not None) == (condition in ("shuffled_position", "ablate_elsewhere"))
        source = row["source_example"]
        if condition in ("aligned", "shuffled_position", "non_aligned"):
            assert row["source_cluster"] == cluster[source]
            assert (cluster[source] == cluster[host]) == (condition != "non_aligned")
            assert [row["source_" + c] for c in ("x0", "y0", "x1", "y1")] == box_of(int(position[source]))
        else:
            assert row["source_cluster"] is None
        if condition == "random":
            at = int(made.peaks.position[made.peaks.example == source][0])
            assert [row["source_" + c] for c in ("x0", "y0", "x1", "y1")] == box_of(at)
    by = {(r["host"], r["condition"]): r for r in rows}
    for h in range(4):
        assert by[h, "aligned"]["source_example"] == by[h, "shuffled_position"]["source_example"]
        assert by[h, "random"]["source_example"] == by[h, "random_place"]["source_example"]
    assert [(r["host"], r["condition"]) for r in rows] == [(h, c) for h in range(4) for c in SWAP_CONDITIONS]


def test_a_null_neuron_swaps_random_images_under_permuted_labels(made: Scene) -> None:
    rows, failed = swapped(made, kind="null")
    assert failed == []
    assert [(r["host"], r["condition"]) for r in rows] == [
        (h, c) for h in range(4) for c in ("baseline", "aligned", "non_aligned")
    ]
    at = dict(zip(made.peaks.example.tolist(), made.peaks.position.tolist(), strict=True))
    taken = [r["source_example"] for r in rows if r["source_example"] is not None]
    assert {r["host_example"] for r in rows} | set(taken) == set(at)  # twelve roles in twelve images
    for row in rows:
        assert (row["kind"], row["status"], row["position"]) == ("null", "ok", at[row["host_example"]])
        assert row["effect"] is not None
        assert row["effect_sd"] is None
        assert row["picture"] is None
        if row["condition"] != "baseline":
            assert (row["source_cluster"] == row["cluster"]) == (row["condition"] == "aligned")


def keyed(rows: list[dict[str, Any]]) -> dict[tuple[int, int, str], dict[str, Any]]:
    return {(r["neuron"], r["host"], r["condition"]): r for r in rows}


@pytest.mark.parametrize("kind", ["real", "null"])
def test_neither_cut_nor_order_nor_micro_batch_changes_a_row(made: Scene, kind: str) -> None:
    made = noisy(made)
    together = keyed(swapped(made, (A_ALONE, A_OR_B), kind=kind)[0])
    others = [
        keyed(swapped(made, (A_OR_B, A_ALONE), kind=kind)[0]),
        keyed(swapped(made, (A_ALONE,), kind=kind)[0]) | keyed(swapped(made, (A_OR_B,), kind=kind)[0]),
        keyed(swapped(made, (A_ALONE, A_OR_B), detectors(3), kind=kind)[0]),
    ]
    order = np.random.default_rng(0).permutation(len(made.examples.example))
    turned = made._replace(examples=Examples(*(x[order] for x in made.examples)))
    others.append(keyed(swapped(turned, (A_ALONE, A_OR_B), kind=kind)[0]))
    measured = ("response", "response_at_peak", "baseline", "effect", "effect_at_peak", "effect_sd")
    for other in others:
        assert other.keys() == together.keys()
        for key, row in together.items():
            for name, known in row.items():
                if name in measured and known is not None:
                    assert other[key][name] == pytest.approx(known, rel=1e-5, abs=1e-6)
                else:
                    assert other[key][name] == known


def test_another_seed_draws_others(made: Scene) -> None:
    sets = [
        {(r["host_example"], r["source_example"]) for r in swapped(made, chosen=settings(seed=s))[0]} for s in (0, 1)
    ]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 2


# --- What cannot be swapped -----------------------------------------------------------------------------------------


def test_a_window_larger_than_the_image_is_cut_and_flagged(made: Scene) -> None:
    rows, failed = swapped(made, layer=LAYER | {"swap_side_px": 500})
    assert failed == []
    assert {r["reduced"] for r in rows} == {True}
    assert max(max(r["x1"] - r["x0"], r["y1"] - r["y0"]) for r in rows) == 25
    assert max(r["box_frac"] for r in rows) <= 0.16


def test_a_box_that_leaves_no_room_costs_two_conditions_alone(made: Scene) -> None:
    middle = GRID * 7 + 7  # its box is the whole image but 2 px at each side
    examples = made.examples._replace(position=np.full(16, middle))
    chosen = settings(swap={"max_frac": 0.95})
    rows, failed = swapped(made._replace(examples=examples), layer=LAYER | {"swap_side_px": 60}, chosen=chosen)
    assert failed == []
    for row in rows:
        if row["condition"] in ("shuffled_position", "ablate_elsewhere"):
            assert (row["status"], row["reason"]) == ("not_swappable", NO_ROOM)
            assert sick(row)
            assert row["source_example"] is row["place_x0"] is row["picture"] is None
            with pytest.raises(DataError, match="no room"):
                redraw(row, made.views(chosen), FILL)
        else:
            assert row["status"] == "ok"
            assert row["effect"] is not None


def test_a_box_over_the_whole_image_is_a_swap_of_images(made: Scene) -> None:
    middle = GRID * 7 + 7
    examples = made.examples._replace(position=np.full(16, middle))
    layer, chosen = LAYER | {"swap_side_px": 200}, settings(swap={"max_frac": 1.0})
    made = made._replace(examples=examples)
    rows, _ = swapped(made, layer=layer, chosen=chosen)
    assert {(r["x0"], r["y0"], r["x1"], r["y1"], r["box_frac"], r["reduced"]) for r in rows} == {
        (0, 0, PX, PX, 1.0, True)
    }
    for row in rows:
        if row["condition"] == "aligned":
            np.testing.assert_array_equal(redraw(row, made.views(chosen), FILL), made.pictures[row["source_example"]])


def test_at_a_corner_sizes_follow_the_clipped_box(made: Scene) -> None:
    examples = made.examples._replace(position=np.zeros(16, dtype=np.int64))
    rows, _ = swapped(made._replace(examples=examples))
    for row in rows:
        assert [row[c] for c in ("x0", "y0", "x1", "y1")] == [0, 0, 12, 12]
        assert row["status"] == "ok"
        if row["place_x0"] is not None:
            assert (row["place_x1"] - row["place_x0"], row["place_y1"] - row["place_y0"]) == (12, 12)
            assert max(row["place_x0"], row["place_y0"]) >= 12
        if row["condition"] == "random_place":
            assert (row["source_x1"] - row["source_x0"], row["source_y1"] - row["source_y0"]) == (12, 12)


def reasons(rows: list[dict[str, Any]], condition: str) -> Counter[tuple[str, str | None]]:
    return Counter((r["status"], r["reason"]) for r in rows if r["condition"] == condition)


def test_a_cluster_of_one_serves_once_as_donor() -> None:
    made = scene(A_OR_B, [REDS, GREENS[:1]])
    rows, _ = swapped(made)
    assert {r["cluster"] for r in rows} == {0}
    assert reasons(rows, "non_aligned") == {
        ("ok", None): 1,
        ("not_swappable", "no example of another cluster is left"): 3,
    }
    given = [r for r in rows if r["condition"] == "non_aligned" and r["status"] == "ok"]
    assert [(r["source_example"], r["source_cluster"]) for r in given] == [(8, 1)]
    assert all(r["status"] == "ok" for r in rows if r["condition"] != "non_aligned")


def test_a_neuron_of_one_cluster_has_no_other() -> None:
    rows, failed = swapped(scene(A_OR_B, [REDS]))
    assert failed == []
    assert reasons(rows, "non_aligned") == {("not_swappable", "the neuron has no other cluster"): 4}
    assert all(r["status"] == "ok" for r in rows if r["condition"] != "non_aligned")
    null, _ = swapped(scene(A_OR_B, [REDS]), kind="null")
    assert reasons(null, "non_aligned") == {("not_swappable", "the neuron has no other cluster"): 4}


@pytest.mark.parametrize("kind", ["real", "null"])
def test_a_neuron_without_examples_has_no_row(made: Scene, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    nobody = made._replace(examples=Examples(*(x[:0] for x in made.examples)))
    assert swapped(nobody, kind=kind) == ([], [])
    assert list(recwarn) == []


def test_without_neurons_there_is_an_empty_table(made: Scene) -> None:
    assert swapped(made, ()) == ([], [])


def test_clusters_without_two_members_have_no_host() -> None:
    assert swapped(scene(A_OR_B, [REDS[:1], GREENS[:1]])) == ([], [])


def test_without_random_images_two_conditions_are_lost(made: Scene) -> None:
    rows, failed = swapped(made._replace(peaks=Peaks(*(x[:0] for x in made.peaks))))
    assert failed == []
    why = "there is no random image beside the hosts"
    for condition in SWAP_CONDITIONS:
        lost = condition in ("random", "random_place")
        assert reasons(rows, condition) == {("not_swappable", why) if lost else ("ok", None): 4}


def test_fewer_random_images_than_hosts_serve_again(made: Scene) -> None:
    rows, _ = swapped(made._replace(peaks=Peaks(*(x[:3] for x in made.peaks))))
    drawn = [r["source_example"] for r in rows if r["condition"] == "random"]
    assert sorted(Counter(drawn).values()) == [1, 1, 2]
    assert {r["status"] for r in rows} == {"ok"}


def test_where_the_neuron_does_not_fire_a_patch_is_taken_anywhere(made: Scene) -> None:
    silent = made.peaks._replace(position=np.full(12, NONE))
    chosen = settings(swap={"n_hosts": 8})
    rows, _ = swapped(made._replace(peaks=silent), chosen=chosen)
    corners = [(r["source_x0"], r["source_y0"]) for r in rows if r["condition"] == "random"]
    assert len(set(corners)) > 4
    assert {r["status"] for r in rows if r["condition"] in ("random", "random_place")} == {"ok"}
    assert swapped(made._replace(peaks=silent), kind="null") == ([], [])


# --- What fails -----------------------------------------------------------------------------------------------------


def test_a_host_that_cannot_be_read_has_no_condition_and_costs_the_others_nothing(made: Scene) -> None:
    healthy = keyed(swapped(made)[0])
    bad = healthy[A_OR_B, 1, "host"]["host_example"]
    rows, failed = swapped(made, unreadable=(bad,))
    assert failed == [(None, "image", bad, "cut short")]
    for key, row in keyed(rows).items():
        if row["host_example"] == bad:
            assert (row["status"], row["reason"]) == ("failed", f"image {bad} cannot be read: cut short")
            assert sick(row)
            assert row["baseline"] is row["picture"] is None
            with pytest.raises(DataError, match="cut short"):
                redraw(row, made.views(settings(), (bad,)), FILL)
        else:
            assert row == pytest.approx(healthy[key])


@pytest.mark.parametrize("condition", ["aligned", "non_aligned", "random"])
def test_a_donor_that_cannot_be_read_costs_its_conditions_alone(made: Scene, condition: str) -> None:
    healthy = keyed(swapped(made)[0])
    bad = healthy[A_OR_B, 2, condition]["source_example"]
    rows, failed = swapped(made, unreadable=(bad,))
    assert failed == [(None, "image", bad, "cut short")]
    lost = set()
    for key, row in keyed(rows).items():
        if row["source_example"] == bad:
            assert (row["status"], row["reason"]) == ("failed", f"image {bad} cannot be read: cut short")
            assert sick(row)
            lost.add(row["condition"])
        else:
            assert row == pytest.approx(healthy[key])
    assert condition in lost


def test_nothing_can_be_read(made: Scene) -> None:
    everything = tuple(range(len(made.pictures)))
    rows, failed = swapped(made, (A_ALONE, A_OR_B), unreadable=everything)
    assert {r["status"] for r in rows} == {"failed"}
    touched = {r[c] for r in rows for c in ("host_example", "source_example")} - {None}
    assert [f[2] for f in failed] == sorted(touched)


@pytest.mark.parametrize("at_peak", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_response_that_is_not_finite_costs_its_row_alone(made: Scene, bad: float, at_peak: bool) -> None:
    healthy = keyed(swapped(made)[0])
    made = made._replace(pictures=[p.copy() for p in made.pictures])
    shows = healthy[A_OR_B, 0, "random"]["source_example"]
    for i in made.peaks.example.tolist():
        made.pictures[i][..., 2] = 7 + (i == shows)

    def answer(views: NDArray[np.uint8], response: Tensor) -> Tensor:
        marked = torch.from_numpy((views[..., 2] == 8).any((1, 2)))
        return torch.where(marked, torch.tensor(bad), response)

    rows, failed = swapped(made, subject=Watched(detectors(), answer, at_peak))
    assert failed == []
    for key, row in keyed(rows).items():
        if row["source_example"] == shows:
            assert (row["status"], row["reason"]) == ("failed", "the response is not finite")
            assert sick(row)
            assert row["effect_at_peak"] is row["effect_sd"] is None
            assert row["baseline"] == pytest.approx(20 / 255)
        else:
            assert row["status"] == "ok"
            assert row["effect"] == pytest.approx(healthy[key]["effect"])


@pytest.mark.parametrize(("spread", "known"), [(0.0, False), (1e-7, False), (1e-4, True)])
def test_a_neuron_that_is_constant_but_for_rounding_has_no_deviation(made: Scene, spread: float, known: bool) -> None:
    activation = 3.0 * (1 + spread * np.arange(16) / 16)
    rows, _ = swapped(made._replace(examples=made.examples._replace(activation=activation)))
    for row in rows:
        assert row["effect"] is not None
        assert row["effect_sd"] == (pytest.approx(row["effect"] / activation.std()) if known else None)


def test_without_a_baseline_there_is_no_effect(made: Scene) -> None:
    def answer(views: NDArray[np.uint8], response: Tensor) -> Tensor:
        grey = (views == np.array([100, 100, 100])).all(-1)
        only_fill = torch.from_numpy((grey | (views == FILL).all(-1)).all((1, 2)))
        return torch.where(only_fill, torch.tensor(torch.nan), response)

    rows, _ = swapped(made, subject=Watched(detectors(), answer))
    for row in rows:
        assert row["status"] == ("failed" if row["condition"] == "baseline" else "ok")
        assert row["baseline"] is row["effect"] is row["effect_at_peak"] is row["effect_sd"] is None
        assert (row["response"] is None) == (row["condition"] == "baseline")


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_the_first_host_of_each_cluster_is_pictured(made: Scene) -> None:
    chosen = settings()
    rows, _ = swapped(made, (A_ALONE, A_OR_B), chosen=chosen)
    for row in rows:
        assert (row["picture"] is not None) == (row["host"] in (0, 2))
        if row["picture"] is not None:
            drawn = Image.open(io.BytesIO(row["picture"]))
            assert (drawn.format, drawn.size) == ("JPEG", (64, 64))
            again = redraw(row, made.views(chosen), FILL)
            assert np.abs(np.asarray(drawn).astype(int) - again).mean() < 8
    plain, _ = swapped(made, chosen=settings(extract={"thumbnails": False}))
    assert {r["picture"] for r in plain} == {None}


# --- Views and fill -------------------------------------------------------------------------------------------------


def test_each_image_is_decoded_once_as_the_subject_sees_it(made: Scene) -> None:
    chosen = settings()
    wide = [np.concatenate([p, 255 - p], axis=1) for p in made.pictures]
    probe = FakeProbe(wide, ["x"] * len(wide), unreadable=(3,))
    views = Views(probe, chosen)
    for _ in range(3):
        np.testing.assert_array_equal(views.get(2), view(wide[2], PX, chosen.subject.resize))
        assert views.get(3) == "cut short"
    assert probe.n_reads == {2: 1, 3: 3}, "what cannot be read now may be readable later"


def test_views_that_were_not_asked_for_lately_are_let_go(made: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyray.psi.swap._VIEWS_BYTES", 3 * 3 * PX**2)
    probe = made.probe()
    views = Views(probe, settings())
    for example in (0, 1, 2, 0, 3, 0, 1):
        views.get(example)
    assert probe.n_reads == {0: 1, 1: 2, 2: 1, 3: 1}


def test_the_fill_is_the_mean_colour_of_distinct_images() -> None:
    pictures = [*noise_pictures(5, 9), np.zeros((4, 7, 3), dtype=np.uint8), np.full((3, 3, 3), 255, dtype=np.uint8)]
    pictures[5][..., 0] = 200
    probe = FakeProbe(pictures, ["x"] * 7, unreadable=(1,))
    rows, _ = index(probe, range(7))
    fill = fill_colour(rows, images_of(["x"] * 7, distinct=[0, 2, 4, 5]))
    kept = [pictures[i].reshape(-1, 3).mean(0) for i in (0, 2, 4, 5)]
    assert fill.dtype == np.uint8
    np.testing.assert_array_equal(fill, np.round(np.mean(kept, axis=0)))


def test_science_without_swap_is_a_mistake(made: Scene) -> None:
    with pytest.raises(ValueError, match=r"science\.swap"):
        swap(detectors(), made.views(science()), science(), LAYER, [], "real", FILL)


def test_composing_does_not_touch_the_host() -> None:
    host, donor = noise_pictures(2, PX)
    before = host.copy()
    out = compose("aligned", host, [0, 0, 20, 30], FILL, (donor, [10, 10, 25, 20]))
    np.testing.assert_array_equal(host, before)
    np.testing.assert_array_equal(out[30:], host[30:])
    np.testing.assert_array_equal(out[:, 20:], host[:, 20:])
    expected = Image.fromarray(donor).crop((10, 10, 25, 20)).resize((20, 30), Image.Resampling.BILINEAR)
    assert int(np.abs(out[:30, :20].astype(int) - np.asarray(expected)).max()) <= 2
