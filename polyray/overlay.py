"""Variants: a dataset in which one thing is changed, laid over the dataset that it varies.

Which question it answers: *where do a variant's rows lie: in its own folder or in its base's?* Place in the flow:
between `store.py` and whoever works on a dataset that may be a variant (workers, service, progress). A variant lies in
`OUT/variants/<name>`: a store of its own, with its run.json, commits and parts, that holds only what its change made
different. What it did not do again it reads from OUT, which it never writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from polyray import files
from polyray.errors import StoreError
from polyray.store import Store

FOLDER = "variants"
"""Folder of OUT in which its variants lie."""

WRITES: dict[str, tuple[str, ...]] = {
    "merge": ("mined",),
    "embed": ("embeddings", "vocabulary", "plant_classes"),
    "embed/vocabulary": ("vocabulary",),
    "cluster": ("scores", "clusters", "examples"),
    "draw": ("nulls", "scores"),
    "calibrate": ("neurons", "null_neurons"),
    "summarise": ("neuron_summary", "layer_summary"),
    "recover": ("planted_neurons", "planted_summary"),
}
"""Tables that each step of a variant writes, beside `failures`."""


class Overlay(Store):
    """A variant's store: reads the tables that its steps write from its own folder, all others from its base.

    Args:
        out: folder of the variant.
        base: the dataset that it varies.
        steps: what the variant does again: keys of `WRITES`.
    """

    def __init__(self, out: str | Path, base: Store, steps: Iterable[str]) -> None:
        super().__init__(out)
        self.base = base
        self.steps = tuple(steps)
        self._own = {"failures"}.union(*(WRITES[step] for step in self.steps))

    def read(
        self,
        table: str,
        layer: str | None = None,
        columns: Sequence[str] | None = None,
        units: Iterable[str] | None = None,
    ) -> pa.Table:
        """Committed rows of a table, as `Store.read`: the variant's where it makes the table, else the base's."""
        if table in self._own:
            return super().read(table, layer, columns, units)
        return self.base.read(table, layer, columns, units)


def described(base: Store, steps: Iterable[str]) -> dict[str, Any]:
    """What a variant's provenance says of its base, for `opened`. The path is relative: OUT may be moved."""
    return {"base": "../..", "base_run_id": base.run_id, "steps": list(steps)}


def opened(out: str | Path) -> Store:
    """The store of a dataset; an `Overlay` where it is a variant.

    Raises:
        StoreError: the folder holds no run, or a variant's base is not the one that it was made from.
    """
    store = Store(out)
    found = store.run["provenance"].get("variant")
    if found is None:
        return store
    if not isinstance(found, Mapping) or not {"base", "base_run_id", "steps"} <= found.keys():
        raise StoreError(f"run.json of {str(store.out)!r} does not say which dataset it varies. Delete the folder.")
    base = Store(files.joined(store.out, str(found["base"])))
    if base.run_id != found["base_run_id"]:
        raise StoreError(
            f"{str(store.out)!r} varies run {found['base_run_id']}, but {str(base.out)!r} holds run {base.run_id}. "
            "Move the variant back below its own OUT, or delete it."
        )
    unknown = [step for step in found["steps"] if step not in WRITES]
    if unknown:
        raise StoreError(f"{str(store.out)!r} has the step {unknown[0]!r}, which this version does not know.")
    return Overlay(out, base, found["steps"])


def base_of(store: Store) -> Store:
    """The dataset that a store varies; the store itself where it is no variant."""
    return store.base if isinstance(store, Overlay) else store
