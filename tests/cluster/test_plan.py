"""Units: every item once, keys that mean the same work in every run, and none that depends on the execution half."""

import math
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyray.cluster.dispatch import Dispatcher, Policy, Unit
from polyray.cluster.plan import (
    CLUSTER_NEURONS,
    DRAWS,
    EMBED_PATCHES,
    INDEX_IMAGES,
    MINE_IMAGES,
    MINE_TOKENS,
    PLANTING,
    STAGES,
    SWAP_IMAGES,
    SWAPPING,
    Shape,
    Sweep,
    Work,
    document_works,
    draw_works,
    embed_works,
    fixed_works,
    scored_sizes,
    stages,
    swap_works,
    works,
)
from polyray.columns import table
from polyray.config import Config, parse_config
from polyray.models.layers import LayerInfo
from polyray.records import Receipt, record_name
from polyray.schema import NULL_KINDS, SHARED_LAYER
from polyray.store import Store

FIXED = [stage for stage in STAGES if stage not in ("embed", "draw")]
ODD_LAYERS = ["layer4.2/conv1", "a b", "ü", "%2F", "layer=3", "..", "x/y/z"]

layer_names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
counts = st.dictionaries(
    layer_names.filter(lambda name: name != SHARED_LAYER), st.integers(1, 200), min_size=1, max_size=4
)


def config(B: int = 1000, swap: dict[str, Any] | None = None, **execution: Any) -> Config:
    return parse_config(
        {
            "science": {
                "subject": {"name": "efficientnet_lite0"},
                "probe": {"kind": "generated"},
                "encoder": {"kind": "standin"},
                "calibrate": {"B": B},
                "swap": {} if swap is None else swap,
            },
            "execution": execution,
        }
    )


def shape(n_images: int, n_neurons: dict[str, int], B: int = 1000) -> Shape:
    return Shape(config(B).science, n_images, n_neurons)


def covered(units: Iterable[Work]) -> Counter[tuple[Any, ...]]:
    """How often each item (of a stage, layer, kind and size) is covered."""
    return Counter((w.stage, w.layer, w.kind, w.n_used, i) for w in units for i in w.items)


def once(items: Iterable[tuple[Any, ...]]) -> Counter[tuple[Any, ...]]:
    return Counter(dict.fromkeys(items, 1))


# Every item once


@given(st.integers(0, 5000), counts)
def test_fixed_units_cover_every_item_once(n_images: int, n_neurons: dict[str, int]) -> None:
    planned = shape(n_images, n_neurons)
    for stage, step in (("index", INDEX_IMAGES), ("mine", MINE_IMAGES)):
        units = fixed_works(stage, planned)
        assert covered(units) == once((stage, None, None, None, i) for i in range(n_images))
        assert all(len(w.items) <= step for w in units)
        assert len(units) == math.ceil(n_images / step)
    assert covered(fixed_works("cluster", planned)) == once(
        ("cluster", layer, None, None, i) for layer, n in n_neurons.items() for i in range(n)
    )
    for stage in ("window", "merge", "calibrate"):
        assert [w.layer for w in fixed_works(stage, planned)] == list(n_neurons)
    for stage in ("extract", "summarise", "effects"):
        assert fixed_works(stage, planned) == [Work(stage)]


@given(st.lists(st.integers(0, 2 * MINE_TOKENS) | st.integers(0, 9), max_size=600))
def test_units_of_documents_cover_each_once_and_are_bounded(n_tokens: list[int]) -> None:
    units = document_works(n_tokens)
    assert [i for w in units for i in w.items] == list(range(len(n_tokens)))
    for w in units:
        held = sum(n_tokens[i] for i in w.items)
        assert len(w.items) == 1 or held <= MINE_TOKENS
        assert len(w.items) <= MINE_IMAGES
        last = w.items.stop == len(n_tokens)
        assert last or len(w.items) == MINE_IMAGES or held + n_tokens[w.items.stop] > MINE_TOKENS, "it has no room left"


@given(counts, st.integers(2, 256), st.none() | st.integers(1, 250), st.integers(0, 60))
def test_swap_units_cover_every_swapped_neuron_once(
    n_neurons: dict[str, int], n_hosts: int, most: int | None, n_null: int
) -> None:
    swap = {"n_hosts": n_hosts, "n_neurons": most, "n_null": n_null}
    units = fixed_works("swap", Shape(config(swap=swap).science, 10, n_neurons))
    swapped = {layer: min(n, most or n) for layer, n in n_neurons.items()}
    assert covered(units) == once(
        ("swap", layer, kind, None, i)
        for layer, n in swapped.items()
        for kind, size in (("real", n), ("null", min(n, n_null)))
        for i in range(size)
    )
    for unit in units:
        n_shown = len(unit.items) * n_hosts * {"real": 7, "null": 3}[str(unit.kind)]
        assert n_shown <= SWAP_IMAGES or len(unit.items) == 1


def test_a_sweep_has_the_stages_that_it_asks_for() -> None:
    science = config().science
    without = science.model_copy(update={"swap": None})
    assert [s for s in STAGES if s not in stages(science)] == list(PLANTING)
    assert [s for s in stages(science) if s not in stages(without)] == list(SWAPPING)
    assert swap_works(Shape(without, 10, {"a": 3})) == []


@given(st.dictionaries(layer_names, st.integers(0, 10_000), max_size=4))
def test_embed_units_cover_every_patch_once_and_the_vocabulary(n_patches: dict[str, int]) -> None:
    first, *rest = embed_works(n_patches)
    assert first == Work("embed", kind="vocabulary")
    assert covered(rest) == once(("embed", layer, None, None, i) for layer, n in n_patches.items() for i in range(n))
    assert all(len(w.items) <= EMBED_PATCHES for w in rest)


@given(counts, st.integers(1, 2000), st.data())
def test_draw_units_cover_every_draw_and_null_neuron_once(
    n_neurons: dict[str, int], B: int, data: st.DataObject
) -> None:
    possible = st.lists(st.sampled_from([100, 80, 64, 51]), unique=True)
    sizes = {layer: sorted(data.draw(possible), reverse=True) for layer in n_neurons}
    found = draw_works(shape(10, n_neurons, B), sizes)
    (text,) = [w for w in found if w.start is None]
    assert text == Work("draw", SHARED_LAYER, "shuffle_text")
    every = {n for layer in sizes.values() for n in layer}
    wanted = [("draw", SHARED_LAYER, "rotation", n, i) for n in every for i in range(B)]
    wanted += [
        ("draw", layer, kind, n, i)
        for layer, needed in sizes.items()
        for kind in ("pool", "one_concept")
        for n in needed
        for i in range(B)
    ]
    wanted += [
        ("draw", layer, f"null_{kind}", None, i)
        for layer, n in n_neurons.items()
        for kind in NULL_KINDS
        for i in range(n)
    ]
    assert covered(w for w in found if w.start is not None) == once(wanted)
    assert all(len(w.items) <= DRAWS for w in found if w.start is not None)


def test_permuted_coordinates_are_drawn_only_where_asked_for() -> None:
    raw = {"factory": "networks:edge_net"}
    for asked in (False, True):
        settings = parse_config(
            {
                "science": {
                    "subject": raw,
                    "probe": {"kind": "generated"},
                    "encoder": {"kind": "standin"},
                    "calibrate": {"B": 300} | ({"permute_dims": True} if asked else {}),
                }
            }
        )
        found = draw_works(Shape(settings.science, 10, {"a": 3}), {"a": [100, 80]})
        permuted = [(w.n_used, w.start, w.stop) for w in found if w.kind == "permute_dims"]
        expected = [(n, a, b) for n in (100, 80) for a, b in ((0, 256), (256, 300))]
        assert permuted == (expected if asked else [])


# Keys


@given(st.integers(1, 3000), counts, st.integers(1, 600))
def test_keys_are_unique_over_the_whole_sweep(n_images: int, n_neurons: dict[str, int], B: int) -> None:
    planned = shape(n_images, n_neurons, B)
    units = [w for stage in FIXED for w in fixed_works(stage, planned)]
    units += embed_works({layer: 30 * n for layer, n in n_neurons.items()})
    units += draw_works(planned, {layer: [100, 80] for layer in n_neurons})
    keys = [w.key for w in units]
    assert len(set(keys)) == len(keys)
    assert len({record_name(key) for key in keys}) == len(keys)
    assert all(key.split("/")[0] == w.stage for key, w in zip(keys, units, strict=True))
    # The dispatcher, which refuses keys that come twice and weights that are not positive, takes them.
    Dispatcher((Unit(w.key, w.weight, w.layer) for w in units), Policy(max_actors=1))


def test_keys_say_stage_layer_kind_size_and_range() -> None:
    """Keys are part of what is stored: another spelling would do every unit of an old OUT again."""
    assert Work("extract").key == "extract"
    assert Work("window", "layer4").key == "window/layer4"
    assert Work("mine", start=0, stop=256).key == "mine/0000000-0000256"
    assert Work("cluster", "layer4", start=64, stop=128).key == "cluster/layer4/0000064-0000128"
    assert Work("draw", "layer4", "pool", 80, 256, 512).key == "draw/layer4/pool/n80/0000256-0000512"
    assert Work("draw", SHARED_LAYER, "shuffle_text").key == "draw/_shared/shuffle_text"
    assert Work("embed", kind="vocabulary").key == "embed/vocabulary"


@pytest.mark.parametrize("layer", ODD_LAYERS)
def test_layer_of_any_name_is_one_segment_of_its_key(layer: str) -> None:
    stage, segment = Work("merge", layer).key.split("/")
    assert (stage, unquote(segment)) == ("merge", layer)


def test_layer_called_like_a_kind_makes_another_key() -> None:
    assert Work("embed", "vocabulary", start=0, stop=5).key != Work("embed", kind="vocabulary").key


def test_keys_sort_in_order_of_range() -> None:
    keys = [w.key for w in fixed_works("mine", shape(100_000, {"a": 1}))]
    assert keys == sorted(keys)


# The same units in every run


def test_units_are_the_same_whatever_the_execution_half(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {},
        {"bundle_s": 0.1, "subject": {"max": 7, "in_flight": 9}, "scoring": {"min": 2, "num_cpus": 0.5}},
        {"address": "10.0.0.1:6379", "encoder": {"num_gpus": 1, "memory_gb": 3}},
    ]
    info = layer_info("a", 100)
    planned = []
    for execution in others:
        swept = Sweep(config(**execution), "out", 700, (info,), {"a": np.arange(100)}, {}, {})
        units = [w for stage in FIXED for w in works(stage, swept.shape, Store(tmp_path / "none"))]
        units += draw_works(swept.shape, {"a": [100]})
        planned.append(units)
    assert planned[0] == planned[1] == planned[2]


def test_units_survive_the_way_to_an_actor() -> None:
    for work in [Work("extract"), Work("draw", "ü/x", "pool", 80, 0, 5), *fixed_works("mine", shape(300, {"a": 1}))]:
        again = pickle.loads(pickle.dumps(work))
        assert again == work
        assert again.key == work.key


def test_weight_is_the_number_of_items() -> None:
    assert Work("mine", start=5, stop=9).weight == 4
    assert Work("window", "a").weight == 1


def test_unit_without_range_or_layer_says_which_unit_it_is() -> None:
    with pytest.raises(ValueError, match="window/a"):
        _ = Work("window", "a").items
    with pytest.raises(ValueError, match="extract"):
        _ = Work("extract").of_layer
    with pytest.raises(ValueError, match="draw"):
        fixed_works("draw", shape(1, {"a": 1}))


def test_every_stage_has_an_actor_and_kinds_are_not_started_over_and_over() -> None:
    kinds = list(STAGES.values())
    started = [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
    assert started == ["subject", "encoder", "scoring", "subject"], "swaps are of clusters: the subject comes again"


# What earlier stages committed


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "out")
    made.create_or_resume({"seed": 0}, {"torch": "2", "device_class": "cpu"}, {})
    made.acquire()
    return made


def commit(store: Store, unit: str, name: str, layer: str, columns: dict[str, Any]) -> None:
    part = store.write_part(name, unit, table(name, columns), layer)
    store.commit(Receipt(unit, [part], 1.0, "here", unit.split("/")[0]))


def test_embed_and_draw_follow_what_is_committed(store: Store) -> None:
    layers = {"a/1": 70, "b": 3}
    box = {c: [0, 0, 0] for c in ("x0", "y0", "x1", "y1")}
    commit(store, "extract", "patches", "a/1", {"patch_id": [1, 5, 9], "example": [0, 0, 1], **box})
    planned = shape(300, layers, B=300)
    assert works("embed", planned, store) == embed_works({"a/1": 3, "b": 0})
    raw = dict.fromkeys(("S", "Q", "Q_mean", "Q_std", "Q_p", "two_means", "D"), [0.5] * 4)
    commit(
        store,
        "cluster/a%2F1/0000000-0000064",
        "scores",
        "a/1",
        {
            "kind": ["real", "real", "real", "pool"],
            "neuron": [0, 1, 2, 0],
            "status": ["ok", "ok", "excluded", "ok"],
            "reason": [None, None, "too few examples", None],
            "n_used": [80, 100, 64, 51],
            "n_labels": [3] * 4,
            "k": [2] * 4,
            **raw,
        },
    )
    # Neither excluded neurons nor null neurons ask for draws of their size.
    assert scored_sizes(store, "a/1") == [100, 80]
    assert scored_sizes(store, "b") == []
    assert works("draw", planned, store) == draw_works(planned, {"a/1": [100, 80], "b": []})


# Which neurons


def layer_info(name: str, width: int) -> LayerInfo:
    return LayerInfo(name, 0, width, "nchw", 2, 2, "relu", "response", True, 3, 0.5, 0.5, 2.0)


def test_units_are_of_the_neurons_that_are_swept() -> None:
    infos = [layer_info("a", 4), layer_info("b", 9)]
    swept = Sweep(config(), "out", 5, tuple(infos), {"a": np.arange(4), "b": np.array([2, 7])}, {}, {})
    assert swept.n_neurons == 6
    assert swept.shape.n_neurons == {"a": 4, "b": 2}
    # Units of a layer count places among the chosen neurons, not the neurons' numbers.
    assert [(w.layer, list(w.items)) for w in fixed_works("cluster", swept.shape)] == [
        ("a", [0, 1, 2, 3]),
        ("b", [0, 1]),
    ]
    assert CLUSTER_NEURONS >= 4
