"""Settings, probe sets, subjects and spaces for the tests of the PSI stages."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyray.config import Science, parse_config
from polyray.errors import DataError
from polyray.models.layers import LayerInfo
from polyray.models.readouts import Readouts
from polyray.models.vision import Subject, load_subject
from polyray.probes.images import ProbeSet
from polyray.psi.mine import Images
from polyray.psi.space import Space

EDGE_LAYERS = ["stem", "mid", "edges", "capped", "signed"]


def science(**sections: Any) -> Science:
    """Small settings: EdgeNet on 10 × 8 drawn images of 64 px; keyword arguments change sections or single values."""
    raw: dict[str, Any] = {
        "subject": {
            "factory": "networks:edge_net",
            "weights": "none",
            "input_px": 64,
            "layers": EDGE_LAYERS,
            "micro_batch": 16,
        },
        "probe": {"kind": "generated", "n_classes": 10, "n_per_class": 8, "image_px": 64},
        "encoder": {"kind": "standin"},
        "mine": {"K": 24, "K_keep": 30, "k_min": 12},
        "extract": {"n_sample": 8},
        "embed": {"n_pool": 40},
        "cluster": {"k_range": [2, 4]},
        "calibrate": {"B": 60, "n_bootstrap": 200},
    }
    for name, value in sections.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) and name in raw else value
    return parse_config({"science": raw}).science


class FakeProbe(ProbeSet):
    """Pictures in memory; counts how often each was read, and refuses those that are to be unreadable."""

    kind = "fake"
    name = "pictures in memory"

    def __init__(
        self, pictures: Sequence[NDArray[np.uint8]], labels: Sequence[str], unreadable: Iterable[int] = ()
    ) -> None:
        self.pictures = pictures
        self.labels = list(labels)
        self.names = [f"picture {i}" for i in range(len(pictures))]
        self.notes = []
        self.unreadable = set(unreadable)
        self.n_reads: Counter[int] = Counter()

    def read(self, example: int) -> NDArray[np.uint8]:
        self.n_reads[example] += 1
        if example in self.unreadable:
            raise DataError("cut short")
        return self.pictures[example]

    def digest(self) -> str:
        return "0" * 64


def noise_pictures(n: int, px: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Random pictures, all different."""
    return list(np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8))


def images_of(labels: Sequence[str], distinct: Iterable[int] | None = None) -> Images:
    """What `distinct_images` gives for these labels; all images are distinct unless said otherwise."""
    names = sorted(set(labels))
    kept = range(len(labels)) if distinct is None else distinct
    return Images(np.array(list(kept)), np.array([names.index(x) for x in labels]), names)


class FakeSubject:
    """A subject whose responses are a matrix: image i is the one whose first pixel holds i (below 65,536)."""

    def __init__(self, responses: dict[str, NDArray[np.float32]]) -> None:
        self.by_layer = {name: torch.from_numpy(r) for name, r in responses.items()}

    def responses(self, views: NDArray[np.uint8], names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        at = torch.from_numpy(views[:, 0, 0, 0].astype(np.int64) * 256 + views[:, 0, 0, 1])
        return {n: (self.by_layer[n][at], torch.zeros(len(at), self.by_layer[n].shape[1]).long()) for n in names}


def numbered_pictures(n: int, px: int = 8) -> list[NDArray[np.uint8]]:
    """Pictures of one colour whose first two channels hold their number."""
    return [np.full((px, px, 3), (i // 256, i % 256, 0), dtype=np.uint8) for i in range(n)]


def layer_info(name: str = "layer", width: int = 3, **fields: Any) -> LayerInfo:
    """A layer of one position in an image of 8 px, with other fields as given."""
    known: dict[str, Any] = {
        "depth": 0,
        "layout": "nchw",
        "grid_h": 1,
        "grid_w": 1,
        "activation": None,
        "ranked_by": "response",
        "positive_only": False,
        "receptive_px": 8,
        "center_x_px": 4.0,
        "center_y_px": 4.0,
        "stride_px": 8.0,
    }
    return LayerInfo(name=name, width=width, **{**known, **fields})


def layer_row(info: LayerInfo, swap_side_px: int) -> dict[str, Any]:
    """A row of `layers`, as far as swaps read it."""
    geometry = ("layout", "grid_h", "grid_w", "center_x_px", "center_y_px", "stride_px")
    return {"layer": info.name, "swap_side_px": swap_side_px} | {c: getattr(info, c) for c in geometry}


def subject_of(module: nn.Module, input_px: int, micro_batch: int = 4) -> Subject:
    """A network of the test's own as a subject that takes RGB in [0, 1] as it is."""
    module = module.eval().requires_grad_(False)
    return Subject(
        module=module,
        readouts=Readouts(module, (3, input_px, input_px)),
        input_px=input_px,
        micro_batch=micro_batch,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        dtype=torch.float32,
        device=torch.device("cpu"),
        digest="0" * 64,
        trained=False,
        notes=[],
    )


def edge_subject(settings: Science) -> Subject:
    """EdgeNet, as a sweep loads it."""
    return load_subject(settings.subject, settings.numerics)


def unit(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows of length 1."""
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def space_of(
    geometry: NDArray[np.floating],
    label: NDArray[np.int64],
    vocabulary: NDArray[np.floating],
    text: NDArray[np.floating] | None = None,
    n_pool: int | None = None,
) -> Space:
    """A space of patches 0, 10, 20, …, of which the first n_pool (by default all) are the pool."""
    n, d = geometry.shape
    n_pool = n if n_pool is None else n_pool
    return Space(
        ids=10 * np.arange(n),
        geometry=geometry.astype(np.float16),
        text=None if text is None else text.astype(np.float16),
        good=np.ones(n, dtype=bool),
        center=np.zeros(d, dtype=np.float32),
        scale=np.ones(d, dtype=np.float32),
        pool=np.arange(n_pool),
        pool_label=label[:n_pool],
        prompts=[f"prompt {i}" for i in range(len(vocabulary))],
        vocabulary=torch.from_numpy(unit(vocabulary).astype(np.float32)),
    )


def concepts(
    n: int, n_concepts: int, d: int = 12, noise: float = 0.6, n_prompts: int = 30, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Vectors around concept centres, class labels that mostly follow the concepts, and prompts' vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_concepts, d))
    concept = rng.integers(0, n_concepts, n)
    label = np.where(rng.random(n) < 0.3, rng.integers(0, n_concepts, n), concept)
    return centres[concept] + noise * rng.normal(size=(n, d)), label, rng.normal(size=(n_prompts, d))


def column(rows: pa.Table, name: str) -> NDArray[Any]:
    """A column as NumPy, nulls as NaN."""
    return rows[name].to_numpy()
