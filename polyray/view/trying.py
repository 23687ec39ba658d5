"""Trying: a patch of a neuron's cluster pasted into an image of one's choice, and what the neuron says of it.

Which question it answers: *which patch, which image, and what came of it?* Place in the flow: the page's side of
`serving/`: it reads what is asked about from the dataset, and has somebody else, who holds the network, answer it.
`polyray view` has nobody, and shows none of this.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyray.errors import PolyrayError
from polyray.report.catalog import Catalog
from polyray.view.asked import RefusedError

_MOST_PATCH, _MOST_EXAMPLE = 2**63 - 1, 2**31 - 1
N_HOSTS = 8
"""Top examples, and as many random images, that a page offers; any other image can be named by its number."""

NO_IMAGES = "A run over texts has no images, and so no patches to swap."


class CannotError(PolyrayError):
    """There is nobody who can answer, for a reason that stays."""


class TryAgainError(PolyrayError):
    """It was not answered, and may be the next time."""


@dataclass(frozen=True)
class Place:
    """An image, and where in it the neuron peaks."""

    example: int
    pixel_hash: str
    """Of the image that the run saw."""
    position: int | None
    """Raster index in the layer's grid; None where the dataset does not hold it."""


@dataclass(frozen=True)
class Question:
    """One swap, with all that the dataset says of it."""

    layer: Mapping[str, Any]
    """The layer's row of `layers`."""
    neuron: int
    host: Place
    donor: Place
    activation: Sequence[float]
    """Responses of the neuron's clustered examples."""


@dataclass(frozen=True)
class Seen:
    """A picture that the network was shown."""

    response: float | None
    """Maximum over positions; None where it is not finite."""
    response_at_peak: float | None
    jpeg: bytes


@dataclass(frozen=True)
class Answer:
    """What came of a swap."""

    before: Seen
    baseline: Seen
    """With the box filled."""
    after: Seen
    patch: bytes
    """JPEG of what was pasted, as it was cut out."""
    box: tuple[int, int, int, int]
    """Where: x0, y0, x1, y1."""
    source_box: tuple[int, int, int, int]
    side_px: int
    """Of the pictures."""
    position: int
    """The peak that the box lies around, as a raster index in the layer's grid."""
    sd: float | None
    """Standard deviation of the responses of the clustered examples; None where that is 0."""
    notes: tuple[str, ...]
    """What a reader of the numbers has to know."""

    def in_sd(self, start: Seen) -> float | None:
        """How much more the neuron says after than at a start, in standard deviations of its top responses."""
        if self.sd is None or self.after.response is None or start.response is None:
            return None
        return (self.after.response - start.response) / self.sd

    @property
    def change_sd(self) -> float | None:
        """After less before."""
        return self.in_sd(self.before)

    @property
    def effect_sd(self) -> float | None:
        """After less the filled box, as `swaps.effect_sd` has it."""
        return self.in_sd(self.baseline)


class Trying(Protocol):
    """Somebody who holds the network."""

    def refusal(self) -> str | None:
        """Why nothing can be asked; None where it can, or nobody knows yet."""

    def ask(self, question: Question) -> Answer:
        """The answer.

        Raises:
            CannotError: there will be none.
            TryAgainError: there was none this time.
        """


def question(catalog: Catalog, layer: str, neuron: int, patch: int, example: int) -> tuple[Question | None, list[str]]:
    """What the dataset says of a swap.

    Args:
        catalog: the dataset.
        layer: a layer.
        neuron: one of its neurons.
        patch: a patch of one of its clusters.
        example: the image that it goes to.

    Returns:
        The question and no problems; or None, and why nobody can be asked this.
    """
    at: Any = {"layer": layer, "neuron": neuron}
    wanted = ["example", "position", "patch_id", "cluster", "activation", "rank"]
    rows = sorted(catalog.at("examples", wanted, **at), key=lambda r: r["rank"])
    clustered = [r for r in rows if r["cluster"] is not None]
    donor = next((r for r in clustered if r["patch_id"] == patch), None)
    about = catalog.at("layers", layer=layer)
    problems = []
    if donor is None:
        problems.append(f"patch {patch} is in no cluster of neuron {neuron} of layer {layer!r}.")
    known = {} if donor is None else _images(catalog, [example, donor["example"]])
    if donor is not None:
        problems += [_unknown(known, e) for e in dict.fromkeys((example, donor["example"])) if not _is_ok(known, e)]
    if not about or about[0]["swap_side_px"] is None:
        problems.append(f"the dataset does not say which part of an image layer {layer!r} sees.")
    if problems or donor is None:
        return None, problems
    host = next((r for r in rows if r["example"] == example), {"position": None})
    return Question(
        about[0],
        neuron,
        Place(example, known[example]["pixel_hash"], host["position"]),
        Place(donor["example"], known[donor["example"]]["pixel_hash"], donor["position"]),
        tuple(r["activation"] for r in clustered),
    ), []


def _images(catalog: Catalog, examples: list[int]) -> dict[int, dict[str, Any]]:
    found = catalog.at("images", ["example", "name", "status", "reason", "pixel_hash"], example=examples)
    return {r["example"]: r for r in found}


def _is_ok(known: Mapping[int, Mapping[str, Any]], example: int) -> bool:
    return example in known and known[example]["status"] == "ok" and known[example]["pixel_hash"] is not None


def _unknown(known: Mapping[int, Mapping[str, Any]], example: int) -> str:
    if example not in known:
        return f"the probe set has no image {example}."
    return f"image {example} could not be read when the run was made: {known[example]['reason']}."


@dataclass(frozen=True)
class Tried:
    """What became of a question that a page asked."""

    status: int
    """Of the page, as HTTP counts."""
    answer: Answer | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """What the form held."""

    patch: int
    example: int


def tried(catalog: Catalog, trying: Trying, layer: str, neuron: int, query: Mapping[str, str]) -> tuple[Chosen, Tried]:
    """Asks what an address asks: `patch`, and `example` or, before it, `other`.

    Raises:
        RefusedError: they are no numbers.
    """
    other = "other" if query.get("other", "").strip() else "example"
    chosen = Chosen(_whole(query, "patch", _MOST_PATCH), _whole(query, other, _MOST_EXAMPLE))
    asked, problems = question(catalog, layer, neuron, chosen.patch, chosen.example)
    if asked is None:
        return chosen, Tried(404, None, tuple(problems))
    try:
        return chosen, Tried(200, trying.ask(asked))
    except (CannotError, TryAgainError) as e:
        return chosen, Tried(503, None, (str(e),))


def _whole(query: Mapping[str, str], key: str, most: int) -> int:
    value = query.get(key, "").strip()
    if not (value.isascii() and value.isdigit() and len(value) < 20 and int(value) <= most):
        raise RefusedError([f"{key} must be a whole number from 0 to {most}, got {value[:40]!r}."])
    return int(value)


def choices(catalog: Catalog, trying: Trying, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the form of a neuron offers.

    Args:
        catalog: the dataset.
        trying: who answers.
        found: the neuron, as `neuron.neuron` gives it.

    Returns:
        why_not (None where there is a form), patches (prototypes by cluster), top and random (images).
    """
    offered: dict[str, Any] = {"why_not": None, "patches": [], "top": [], "random": []}
    for c in found["clusters"]:
        for i, p in enumerate(c["prototypes"]):
            if p["example"] is not None:
                offered["patches"].append(
                    {"patch": p["example"]["patch_id"], "thumbnail": p["thumbnail"], "cluster": c["cluster"]}
                    | {"name": c["name"], "number": i + 1, "example": p["example"]["example"]}
                )
    if not offered["patches"]:
        return offered | {"why_not": "The neuron has no cluster whose patches could be pasted."}
    if (why_not := trying.refusal()) is not None:
        return offered | {"why_not": why_not}
    top = [e["example"] for e in found["examples"][:N_HOSTS]]
    return offered | {"top": top, "random": _random(catalog, found["layer"], found["neuron"], top)}


def _random(catalog: Catalog, layer: str, neuron: int, others: Sequence[int]) -> list[int]:
    """Images that have nothing to do with the neuron, the same ones whenever its page is opened."""
    n_images = catalog.dataset.run["provenance"].get("n_images") or 0
    drawn: dict[int, None] = {}
    for i in range(4 * N_HOSTS if n_images else 0):
        digest = hashlib.sha256(f"{neuron} {i} {layer}".encode("utf-8", "surrogatepass")).digest()
        drawn[int.from_bytes(digest[:8], "big") % n_images] = None
    wanted = [e for e in drawn if e not in others]
    known = _images(catalog, wanted)
    return [e for e in wanted if _is_ok(known, e)][:N_HOSTS]
