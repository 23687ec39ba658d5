"""Swap: does what a cluster shows drive the neuron?

A *host* is one of the neuron's examples. Its box B, around the peak, is filled with the probe set's mean colour
(`baseline`), or replaced by the patch of a *donor* at the donor's own peak:

    aligned            a donor of the host's cluster, into B
    non_aligned        a donor of another cluster of the same neuron, into B
    random             a random image's peak box for this neuron, into B
    random_place       a random box of that image, into B
    shuffled_position  B filled, the aligned patch at a place disjoint from B
    ablate_elsewhere   B intact, an equal box disjoint from B filled

Place in the flow: after summarise; `psi/hosts.py` says who takes part, `psi/effects.py` what it comes to. Source:
arXiv 2508.16950, section 5.3; the controls but `random` and `shuffled_position`, and the baseline, are ours.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from polyray import columns, schema
from polyray.config import Science
from polyray.errors import DataError
from polyray.models.encoders import scaled
from polyray.models.vision import Subject
from polyray.probes.images import ProbeSet, view
from polyray.psi.hosts import NONE, Examples, Ints, Peaks, Places, Roles, Window, null_examples, places, roles, window
from polyray.psi.mine import Failure, Images
from polyray.psi.thumbnails import SIDE_PX, jpeg
from polyray.schema import SWAP_SHOWN

Picture = NDArray[np.uint8]

_VIEWS_BYTES = 256 * 2**20
"""Views that an actor keeps, so that images which several neurons use are decoded once: some 1,700 at 224 px."""

_BOX = ("x0", "y0", "x1", "y1")
_ELSEWHERE = ("shuffled_position", "ablate_elsewhere")


class Views:
    """What the subject sees of the probe set's images, as long as memory allows; the last ones asked for are kept."""

    def __init__(self, probe: ProbeSet, science: Science) -> None:
        self._probe, self._input_px, self._resize = probe, science.subject.input_px, science.subject.resize
        self._most = max(1, _VIEWS_BYTES // (3 * self._input_px**2))
        self._kept: OrderedDict[int, Picture] = OrderedDict()

    def get(self, example: int) -> Picture | str:
        """The view of an image, not to be written to; or why the image cannot be read, which is tried each time."""
        found = self._kept.pop(example, None)
        if found is None:
            try:
                found = view(self._probe.read(example), self._input_px, self._resize)
            except DataError as e:
                return str(e)
        self._kept[example] = found
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found


def fill_colour(rows: pa.Table, images: Images) -> NDArray[np.uint8]:
    """The probe set's mean colour, RGB: the mean over its images of each one's mean, from the rows of `images`."""
    means = [columns.floats(rows, f"mean_{c}")[images.distinct] for c in ("red", "green", "blue")]
    return np.array([round(math.fsum(m) / len(m)) for m in means], dtype=np.uint8)


def compose(
    condition: str,
    host: Picture,
    box: Sequence[int],
    fill: NDArray[np.uint8],
    patch: tuple[Picture, Sequence[int]] | None = None,
    place: Sequence[int] | None = None,
) -> Picture:
    """The picture that a condition shows: host, baseline, or one of the six.

    Args:
        condition: one of `schema.SWAP_CONDITIONS`.
        host: what the subject sees of the host.
        box: x0, y0, x1, y1 of the host's box, in pixels, right and bottom exclusive.
        fill: RGB.
        patch: what the subject sees of the image that the patch is taken from, and its box there; resized to where it
            goes. Where the condition has one.
        place: where else the host is changed, where the condition says so.

    Returns:
        A copy; a patch that is pasted onto itself leaves every pixel as it was.
    """
    out = host.copy()
    x0, y0, x1, y1 = box
    if condition in ("baseline", "shuffled_position"):
        out[y0:y1, x0:x1] = fill
    if place is not None:
        x0, y0, x1, y1 = place
    if patch is not None:
        source, (a0, b0, a1, b1) = patch
        out[y0:y1, x0:x1] = scaled(torch.from_numpy(source[b0:b1, a0:a1]), y1 - y0, x1 - x0).numpy()
    elif condition == "ablate_elsewhere":
        out[y0:y1, x0:x1] = fill
    return out


class Neuron(NamedTuple):
    """A neuron whose patches are swapped."""

    neuron: int
    examples: Examples
    peaks: Peaks


class _Shot(NamedTuple):
    """One row of `swaps` before the subject has seen it."""

    row: dict[str, Any]
    picture: Picture | None
    """None where there is none."""
    shown: bool = True
    """Whether the subject is to see it."""


def swap(
    subject: Subject,
    views: Views,
    science: Science,
    layer: Mapping[str, Any],
    neurons: Sequence[Neuron],
    kind: str,
    fill: NDArray[np.uint8],
) -> tuple[pa.Table, list[Failure]]:
    """Shows the subject the swaps of some neurons of a layer.

    Args:
        subject: the network under study.
        views: what it sees of the probe set.
        science: the sweep's settings, with `swap`.
        layer: the layer's row of `layers`.
        neurons: scored neurons, with their clustered examples.
        kind: real; or null: random images under permuted cluster labels take the examples' place.
        fill: the colour of a filled box.

    Returns:
        Rows of `swaps`, and one failure for each image that cannot be read any more. A condition that a host has no
        room or no donor for is `not_swappable` and says why; one whose images cannot be read, or whose response is
        not finite, is `failed`. Neither costs the host its other conditions, but a host that cannot be read has none.
    """
    if science.swap is None:
        raise ValueError("science.swap is not set")
    at = window(layer, science.subject.input_px, science.swap.max_frac)
    shots: list[_Shot] = []
    unread: dict[int, str] = {}
    for n in neurons:
        examples = n.examples
        if kind == "null":
            examples = null_examples(examples, n.peaks, science.seed, layer["layer"], n.neuron)
        cast = roles(examples, n.peaks, science.swap.n_hosts, science.seed, layer["layer"], n.neuron, kind)
        where = places(examples, n.peaks, cast, layer, at, science, n.neuron, kind)
        shots += _shots(n._replace(examples=examples), cast, where, at, views, science, kind, fill, unread)
    _respond(subject, layer["layer"], shots)
    sd = {n.neuron: spread_of(n.examples.activation) for n in neurons if kind == "real"}
    _effects([s.row for s in shots], sd)
    rows = {c: [s.row.get(c) for s in shots] for c in schema.TABLES["swaps"].schema.names}
    failed: list[Failure] = [(None, "image", example, reason) for example, reason in sorted(unread.items())]
    return columns.table("swaps", rows), failed


class _Source(NamedTuple):
    """Where a patch comes from."""

    example: int
    cluster: int | None
    box: list[int]


def _shots(
    neuron: Neuron,
    cast: Roles,
    where: Places,
    at: Window,
    views: Views,
    science: Science,
    kind: str,
    fill: NDArray[np.uint8],
    unread: dict[int, str],
) -> list[_Shot]:
    """Rows of one neuron and what they show; images that cannot be read go into `unread`."""
    examples = neuron.examples
    found: list[_Shot] = []
    pictured: set[int] = set()
    for i, host in enumerate(cast.host.tolist()):
        box = where.box[i].tolist()
        host_row = {
            "kind": kind,
            "neuron": neuron.neuron,
            "host": i,
            "host_example": int(examples.example[host]),
            "cluster": int(examples.cluster[host]),
            "position": int(examples.position[host]),
            **_named("", box),
            "box_frac": (box[2] - box[0]) * (box[3] - box[1]) / science.subject.input_px**2,
            "reduced": at.reduced,
        }
        sources = _sources(i, neuron, cast, where)
        with_picture = science.extract.thumbnails and kind == "real" and host_row["cluster"] not in pictured
        pictured.add(host_row["cluster"])
        first = len(found)
        if kind == "real":
            # Mining has shown it already.
            intact = _shot(host_row, "host", None, None, views, fill, unread)
            if intact.picture is not None:
                activation = float(examples.activation[host])
                intact.row.update(response=activation, response_at_peak=activation)
            found.append(_Shot(intact.row, intact.picture if with_picture else None, shown=False))
        for condition in SWAP_SHOWN[kind]:
            place = where.elsewhere[i].tolist() if condition in _ELSEWHERE else None
            found.append(_shot(host_row, condition, sources.get(condition), place, views, fill, unread))
        for shot in found[first:] if with_picture else ():
            if shot.picture is not None:
                shot.row["picture"] = jpeg(scaled(torch.from_numpy(shot.picture), SIDE_PX, SIDE_PX).numpy())
    return found


def _sources(i: int, neuron: Neuron, cast: Roles, where: Places) -> dict[str, _Source | str]:
    """Where the patch of each condition comes from in swap i, or why there is none."""
    e, peaks = neuron.examples, neuron.peaks
    alone = (e.cluster == e.cluster[cast.host[i]]).all()

    def donor(at: int, box: Ints, nobody: str) -> _Source | str:
        return nobody if at == NONE else _Source(int(e.example[at]), int(e.cluster[at]), box.tolist())

    def drawn(box: Ints) -> _Source | str:
        at = cast.random[i]
        nobody = "there is no random image beside the hosts"
        return nobody if at == NONE else _Source(int(peaks.example[at]), None, box.tolist())

    aligned = donor(cast.aligned[i], where.aligned[i], "the cluster has no other example")
    nobody = "the neuron has no other cluster" if alone else "no example of another cluster is left"
    return {
        "aligned": aligned,
        "shuffled_position": aligned,
        "non_aligned": donor(cast.other[i], where.other[i], nobody),
        "random": drawn(where.random[i]),
        "random_place": drawn(where.random_place[i]),
    }


def _shot(
    host_row: Mapping[str, Any],
    condition: str,
    source: _Source | str | None,
    place: list[int] | None,
    views: Views,
    fill: NDArray[np.uint8],
    unread: dict[int, str],
) -> _Shot:
    """One condition of one host: its row, and the picture where there is one."""
    row: dict[str, Any] = {**host_row, "condition": condition, "status": "ok"}
    if isinstance(source, str):
        return _Shot(row | {"status": "not_swappable", "reason": source}, None)
    if place is not None and place[0] == NONE:
        reason = "there is no room for a box of this size beside the host's"
        return _Shot(row | {"status": "not_swappable", "reason": reason}, None)
    if source is not None:
        row |= {"source_example": source.example, "source_cluster": source.cluster, **_named("source_", source.box)}
    if place is not None:
        row |= _named("place_", place)
    images = [row["host_example"], *([] if source is None else [source.example])]
    seen = [views.get(image) for image in images]
    bad = {image: pixels for image, pixels in zip(images, seen, strict=True) if isinstance(pixels, str)}
    unread |= bad
    for image, why in bad.items():
        return _Shot(row | {"status": "failed", "reason": f"image {image} cannot be read: {why}"}, None)
    host, *donor = (pixels for pixels in seen if not isinstance(pixels, str))
    patch = None if source is None else (donor[0], source.box)
    return _Shot(row, compose(condition, host, [row[c] for c in _BOX], fill, patch, place))


def _respond(subject: Subject, layer: str, shots: Sequence[_Shot]) -> None:
    """Fills in the responses to what there is to show, in micro-batches across neurons and conditions."""
    shown = [(s.row, s.picture) for s in shots if s.shown and s.picture is not None]
    for first in range(0, len(shown), subject.micro_batch):
        batch = shown[first : first + subject.micro_batch]
        neuron, position = (np.array([row[c] for row, _ in batch], dtype=np.int64) for c in ("neuron", "position"))
        pictures = np.stack([picture for _, picture in batch])
        found = subject.responses_at(pictures, layer, neuron, position)
        for (row, _), response, peak in zip(batch, *(x.tolist() for x in found), strict=True):
            if math.isfinite(response) and math.isfinite(peak):
                row |= {"response": response, "response_at_peak": peak}
            else:
                row |= {"status": "failed", "reason": "the response is not finite"}


def spread_of(activation: NDArray[np.float64]) -> float | None:
    """Standard deviation of top responses; None where they agree but for float32's rounding."""
    if not len(activation):
        return None
    sd = float(activation.std())
    return sd if sd > 1e-6 * float(np.abs(activation).max()) else None


def _effects(rows: Sequence[dict[str, Any]], sd: Mapping[int, float | None]) -> None:
    """Fills in baseline and effects."""
    baselines = {(r["neuron"], r["host"]): r for r in rows if r["condition"] == "baseline"}
    for row in rows:
        baseline = baselines[row["neuron"], row["host"]]
        row["baseline"] = baseline.get("response")
        for effect, response in (("effect", "response"), ("effect_at_peak", "response_at_peak")):
            pair = row.get(response), baseline.get(response)
            row[effect] = None if pair[0] is None or pair[1] is None else pair[0] - pair[1]
        scale = sd.get(row["neuron"])
        row["effect_sd"] = row["effect"] / scale if row["effect"] is not None and scale is not None else None


def _named(prefix: str, box: Sequence[int]) -> dict[str, int]:
    return {prefix + c: v for c, v in zip(_BOX, box, strict=True)}


def redraw(row: Mapping[str, Any], views: Views, fill: NDArray[np.uint8]) -> Picture:
    """The picture of a row of `swaps` again, at full size.

    Raises:
        DataError: an image cannot be read any more, or the row shows nothing because it is not swappable.
    """
    if row["status"] == "not_swappable":
        raise DataError(f"there is no such picture: {row['reason']}.")
    images = [row[c] for c in ("host_example", "source_example") if row[c] is not None]
    seen: list[Picture] = []
    for image in images:
        pixels = views.get(image)
        if isinstance(pixels, str):
            raise DataError(f"image {image} cannot be read: {pixels}")
        seen.append(pixels)
    box, source_box, place = (
        None if row[prefix + "x0"] is None else [row[prefix + c] for c in _BOX] for prefix in ("", "source_", "place_")
    )
    patch = None if source_box is None else (seen[1], source_box)
    return compose(row["condition"], seen[0], box or [], fill, patch, place)
