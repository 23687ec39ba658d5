"""Index, mine, merge: which images stand for each neuron?

Source: arXiv 2508.16950, section 3.2. Deviations: one image per group of identical pictures; ties broken by hash;
read-outs that saturate are ranked by their pre-activation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns, schema
from polyray.config import Science
from polyray.errors import DataError, StoreError
from polyray.kernels import random, topk
from polyray.models.layers import LayerInfo
from polyray.models.vision import Subject
from polyray.probes.images import ProbeSet, pixel_hash, view
from polyray.psi import pool

Failure = tuple[str | None, str, int | None, str]
"""layer, item, item_id, reason: a row of the failures table."""


def index(probe: ProbeSet, examples: range) -> tuple[pa.Table, list[Failure]]:
    """Reads a range of images once: which can be read, and which pixels they hold.

    Returns:
        Rows of `images`, and one failure for each image that cannot be read.
    """
    rows: dict[str, list[object]] = {name: [] for name in schema.TABLES["images"].schema.names}
    failed: list[Failure] = []
    for example in examples:
        reason, height, width, digest, mean = None, None, None, None, (None, None, None)
        try:
            rgb = probe.read(example)
            height, width = rgb.shape[:2]
            digest = pixel_hash(rgb)
            mean = (rgb.sum((0, 1), dtype=np.int64) / (height * width)).tolist()
        except DataError as e:
            reason = str(e)
            failed.append((None, "image", example, reason))
        for column, value in zip(
            rows,
            (
                example,
                probe.names[example],
                probe.labels[example],
                "ok" if reason is None else "failed",
                reason,
                width,
                height,
                digest,
                *mean,
            ),
            strict=True,
        ):
            rows[column].append(value)
    return columns.table("images", rows), failed


class Images(NamedTuple):
    """What the stages after `index` need to know of the probe set."""

    distinct: NDArray[np.int64]
    """Readable images, one of each group of identical pictures (the first), ascending."""
    label_of: NDArray[np.int64]
    """Class code of every image."""
    labels: list[str]
    """Class name of each code."""


def distinct_images(images: pa.Table) -> Images:
    """Readable images without repeats, from the whole `images` table in order of example.

    Raises:
        StoreError: a row is missing, so that labels would shift.
    """
    if images["example"].to_pylist() != list(range(len(images))):
        raise StoreError("the images table has gaps; `polyray verify` says what is missing.")
    hashes = images["pixel_hash"].to_pylist()
    seen: set[str] = set()
    distinct = []
    for example, h in enumerate(hashes):
        if h is not None and h not in seen:
            seen.add(h)
            distinct.append(example)
    labels = images["label"].to_pylist()
    names = sorted(set(labels))
    code = {name: i for i, name in enumerate(names)}
    return Images(np.array(distinct, dtype=np.int64), np.array([code[x] for x in labels], dtype=np.int64), names)


class Mined(NamedTuple):
    """What one range of images contributes, by layer."""

    parts: dict[str, pa.Table]
    pool_peaks: dict[str, pa.Table]
    swap_peaks: dict[str, pa.Table]
    """Empty where nothing is swapped."""
    failed: list[Failure]


def mine(
    subject: Subject,
    probe: ProbeSet,
    science: Science,
    images: Images,
    layers: Sequence[LayerInfo],
    neurons: Mapping[str, NDArray[np.int64]],
    examples: range,
) -> Mined:
    """Top examples of a range of images for every layer, in one pass.

    Args:
        subject: the network under study.
        probe: the probe set.
        science: the sweep's settings.
        images: the distinct readable images.
        layers: the layers that are swept.
        neurons: the neurons of each layer that are swept.
        examples: the range; repeats and unreadable images in it are passed over.

    Returns:
        Rows of `mine_parts`, `pool_peaks` and `swap_peaks` for each layer. An image that has become unreadable since
        it was indexed is a failure and contributes nothing.
    """
    wanted = images.distinct[(images.distinct >= examples.start) & (images.distinct < examples.stop)]
    responses: dict[str, list[torch.Tensor]] = {info.name: [] for info in layers}
    positions: dict[str, list[torch.Tensor]] = {info.name: [] for info in layers}
    done: list[int] = []
    failed: list[Failure] = []
    step = science.subject.micro_batch
    pending: list[tuple[int, NDArray[np.uint8]]] = []

    def forward() -> None:
        batch = np.stack([v for _, v in pending])
        for name, (response, position) in subject.responses(batch, [info.name for info in layers]).items():
            keep = torch.from_numpy(neurons[name])
            responses[name].append(response.cpu()[:, keep])
            positions[name].append(position.cpu()[:, keep].int())
        done.extend(e for e, _ in pending)
        pending.clear()

    for example in wanted.tolist():
        try:
            pending.append((example, view(probe.read(example), science.subject.input_px, science.subject.resize)))
        except DataError as e:
            failed.append((None, "image", example, str(e)))
        if len(pending) == step:
            forward()
    if pending:
        forward()

    n_swept = {info.name: len(neurons[info.name]) for info in layers}
    found = {
        name: pool.Responses(
            np.array(done, dtype=np.int64),
            torch.cat(responses[name]) if done else torch.zeros(0, n),
            torch.cat(positions[name]) if done else torch.zeros(0, n, dtype=torch.int32),
        )
        for name, n in n_swept.items()
    }
    return mined(found, science, images, layers, neurons, failed)


def mined(
    found: Mapping[str, pool.Responses],
    science: Science,
    images: Images,
    layers: Sequence[LayerInfo],
    neurons: Mapping[str, NDArray[np.int64]],
    failed: list[Failure],
) -> Mined:
    """Rows of a range of images, from what the neurons of each layer say of them."""
    parts: dict[str, pa.Table] = {}
    peaks: dict[str, pa.Table] = {}
    everywhere: dict[str, pa.Table] = {}
    pooled = pool.smallest_hashes(science.seed, random.POOL_IMAGE, 0, images.distinct, science.embed.n_pool)
    n_random = 0 if science.swap is None else science.swap.n_random
    swapped = pool.smallest_hashes(science.seed, random.SWAP_IMAGE, 0, images.distinct, n_random)
    for info in layers:
        name = info.name
        here = found[name]
        parts[name] = _part(here.response, here.position, here.examples, science, info, neurons[name])
        peaks[name] = pool.pool_peaks(science, info, neurons[name], here.of(pooled))
        if len(swapped):
            everywhere[name] = pool.swap_peaks(info, here.of(swapped))
    return Mined(parts, peaks, everywhere, failed)


def _part(
    response: torch.Tensor,
    position: torch.Tensor,
    ids: NDArray[np.int64],
    science: Science,
    info: LayerInfo,
    neurons: NDArray[np.int64],
) -> pa.Table:
    finite = torch.isfinite(response)
    counted = response.double().where(finite, torch.zeros((), dtype=torch.float64))
    ranked = response.where(response > 0, torch.nan) if info.positive_only else response
    top = topk.top_examples(
        ranked,
        position,
        torch.from_numpy(ids),
        # Which responses lie in a band only the whole probe set can say.
        science.mine.K_keep if science.mine.band is None else len(ids),
        science.seed,
        random.layer_word(info.name),
        torch.from_numpy(neurons),
    )
    low = response.where(finite, torch.inf).amin(0) if len(response) else torch.full((len(neurons),), torch.inf)
    high = response.where(finite, -torch.inf).amax(0) if len(response) else torch.full((len(neurons),), -torch.inf)
    bins = topk.histogram(response).numpy()
    kept = (top.example >= 0).sum(1).numpy()
    return columns.table(
        "mine_parts",
        {
            "neuron": neurons,
            "n_images": finite.sum(0).numpy(),
            "n_nonfinite": (~finite).sum(0).numpy(),
            "n_positive": ((response > 0) & finite).sum(0).numpy(),
            "total": counted.sum(0).numpy(),
            "total_sq": counted.square().sum(0).numpy(),
            "minimum": _nan_if_infinite(low.numpy()),
            "maximum": _nan_if_infinite(high.numpy()),
            "n_equal_cut": top.n_equal_cut.numpy(),
            "bins": columns.lists(bins, pa.int32()),
            "example": columns.ragged_prefix(top.example.numpy(), kept, pa.int32()),
            "response": columns.ragged_prefix(top.response.numpy(), kept, pa.float32()),
            "position": columns.ragged_prefix(top.position.numpy(), kept, pa.int32()),
        },
    )


def _nan_if_infinite(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isinf(x), np.float32(np.nan), x)


class _Running(NamedTuple):
    """What the ranges so far come to."""

    top: topk.Top
    counts: NDArray[np.float64]
    """n_images, n_nonfinite, n_positive, total, total_sq: [5, C]."""
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    bins: NDArray[np.int64]


_COUNTS = ("n_images", "n_nonfinite", "n_positive", "total", "total_sq")


def _loaded(part: pa.Table) -> _Running:
    top = topk.Top(
        example=torch.from_numpy(columns.padded(part["example"], -1)),
        response=torch.from_numpy(columns.padded(part["response"], np.nan)),
        position=torch.from_numpy(columns.padded(part["position"], -1)),
        n_equal_cut=torch.from_numpy(columns.numbers(part, "n_equal_cut").astype(np.int64)),
    )
    return _Running(
        top,
        np.stack([columns.floats(part, c) for c in _COUNTS]),
        columns.numbers(part, "minimum").astype(np.float32),
        columns.numbers(part, "maximum").astype(np.float32),
        columns.padded(part["bins"], 0).astype(np.int64),
    )


def _folded(a: _Running, b: _Running, science: Science, word: int, neurons: torch.Tensor) -> _Running:
    """Two running results as one; the order of ranges is fixed, so that sums have fixed last bits."""
    example, response, position = (torch.cat([x.T, y.T]) for x, y in zip(a.top[:3], b.top[:3], strict=True))
    top = topk.top_examples(response, position, example, science.mine.K_keep, science.seed, word, neurons)
    cut = _cut(top, science.mine.K_keep)
    left_out = sum(torch.where(_cut(x.top, science.mine.K_keep) == cut, x.top.n_equal_cut, 0) for x in (a, b))
    return _Running(
        top._replace(n_equal_cut=top.n_equal_cut + left_out),
        a.counts + b.counts,
        np.fmin(a.low, b.low),
        np.fmax(a.high, b.high),
        a.bins + b.bins,
    )


def _cut(top: topk.Top, K: int) -> torch.Tensor:
    """Response of the last of the K best examples, NaN where there are none."""
    kept = (top.example >= 0).sum(1)
    if top.response.shape[1] == 0:
        return torch.full((len(kept),), torch.nan)
    last = top.response.gather(1, (kept.clamp(max=K) - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(kept > 0, last, torch.nan)


def merge(parts: Iterable[pa.Table], science: Science, info: LayerInfo) -> tuple[pa.Table, pa.Table]:
    """Top examples and response distribution over the whole probe set.

    Args:
        parts: rows of `mine_parts` of one layer, one table a range, in order of range, the same neurons in each; taken
            one at a time, so that memory does not grow with the probe set (except by 24 bytes a neuron and image with
            `mine.band`, whose quantiles are exact).
        science: the sweep's settings.
        info: the layer.

    Returns:
        Rows of `mined` and of `histograms`. With `mine.band` the examples are those of smallest hash whose response
        lies between the two quantiles of the neuron's counting responses, ends included, in the order of their
        hashes; there is no cut at which examples could tie. A neuron is excluded with its reason when a response was
        not finite, when it never fires (`dead`), never varies (`constant`), or keeps fewer than k_min examples.
    """
    word = random.layer_word(info.name)
    band = science.mine.band
    running: _Running | None = None
    neurons = np.zeros(0, dtype=np.int64)
    counting: list[topk.Top] = []
    for part in parts:
        neurons = columns.numbers(part, "neuron").astype(np.int64)
        loaded = _loaded(part)
        if band is not None:
            counting.append(loaded.top)
            nothing = {c: getattr(loaded.top, c)[:, :0] for c in ("example", "response", "position")}
            loaded = loaded._replace(top=loaded.top._replace(**nothing))
        running = loaded if running is None else _folded(running, loaded, science, word, torch.from_numpy(neurons))
    if running is None:
        raise DataError("there is nothing to merge: the probe set has no ranges.")
    top, low, high, bins = running.top, running.low, running.high, running.bins
    n_images, n_nonfinite, n_positive, total, total_sq = running.counts
    if band is not None:
        example, response, position = (torch.cat([t[i] for t in counting], dim=1).T for i in range(3))
        top = topk.band_examples(
            response, position, example, band, science.mine.K_keep, science.seed, word, torch.from_numpy(neurons)
        )
    kept = (top.example >= 0).sum(1).numpy()
    cut = _cut(top, science.mine.K)
    tied = (top.response == cut[:, None]).sum(1)
    tied += torch.where(_cut(top, science.mine.K_keep) == cut, top.n_equal_cut, 0)

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n_images
        std = np.sqrt(np.maximum(total_sq / n_images - mean**2, 0.0))
        positive = n_positive / n_images
    reasons = [
        _reason(int(n), int(bad), int(fired), lo, hi, int(k), science.mine.k_min, info.positive_only)
        for n, bad, fired, lo, hi, k in zip(n_images, n_nonfinite, n_positive, low, high, kept, strict=True)
    ]
    mined = columns.table(
        "mined",
        {
            "neuron": neurons,
            "status": ["ok" if r is None else "excluded" for r in reasons],
            "reason": reasons,
            "n_tied_at_cut": tied.numpy() if band is None else [None] * len(neurons),
            "example": columns.ragged_prefix(top.example.numpy(), kept, pa.int32()),
            "response": columns.ragged_prefix(top.response.numpy(), kept, pa.float32()),
            "position": columns.ragged_prefix(top.position.numpy(), kept, pa.int32()),
        },
    )
    histograms = columns.table(
        "histograms",
        {
            "neuron": neurons,
            "n_images": n_images.astype(np.int64),
            "n_nonfinite": n_nonfinite.astype(np.int64),
            "positive_frac": positive,
            "mean": mean,
            "std": std,
            "minimum": low,
            "maximum": high,
            "bins": columns.lists(bins, pa.int32()),
        },
    )
    return mined, histograms


def _reason(
    n_images: int,
    n_nonfinite: int,
    n_positive: int,
    low: float,
    high: float,
    n_kept: int,
    k_min: int,
    positive_only: bool,
) -> str | None:
    """Why a neuron cannot be scored, None where it can."""
    if n_nonfinite > 0:
        return f"not finite: {n_nonfinite} responses are NaN or infinite"
    if n_images == 0:
        return "no images"
    if positive_only and n_positive == 0:
        return "dead"
    if low == high:
        return "constant"
    if n_kept < k_min:
        return f"too few examples: {n_kept} of at least {k_min}"
    return None
