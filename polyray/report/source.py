"""Source: a dataset as the report asks it.

Place in the flow: over `catalog.py`; every section of the report gets its numbers from here, by SQL over columns or
from the records of the console's tables. Nothing of a dataset but its text is held as Python objects row by row.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from polyray.errors import StoreError
from polyray.report import swaps
from polyray.report.catalog import Catalog
from polyray.report.plain import visible
from polyray.text_tables import TEXT_TABLES

SWEEP = "whole sweep"
"""Name of the row that is of all layers."""


class Source:
    """A dataset, opened once for one report.

    Args:
        out: folder or address of the dataset.

    Raises:
        StoreError: see `Catalog`.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = str(out)
        self.catalog = Catalog(out)
        self.dataset = self.catalog.dataset
        self.run = self.dataset.run
        self.provenance: dict[str, Any] = _mapping(self.run.get("provenance"))
        self.config: dict[str, Any] = _mapping(self.run.get("config"))
        self.science: dict[str, Any] = _mapping(self.config.get("science"))
        method = self._method()
        self.is_categorical = method == "categorical"
        self.items = "documents" if method == "psi_text" else "images"
        """What the rows of the table `images` are."""
        self.layers = self._layers()
        """Names in order of depth."""

    def has(self, table: str) -> bool:
        """Whether anything was committed for a table."""
        return table in self.dataset

    def table(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> pa.Table:
        """Rows of a query.

        Raises:
            StoreError: a part of the dataset is gone or damaged.
        """
        try:
            return self.catalog.table(query, values)
        except (duckdb.Error, OSError, pa.ArrowException) as e:
            raise StoreError(
                f"cannot read {self.out!r}: {e}. A part is missing or damaged: `polyray verify` names it."
            ) from e

    def rows(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[dict[str, Any]]:
        """The same as a record for each row."""
        found: list[dict[str, Any]] = self.table(query, values).to_pylist()
        return found

    def setting(self, *keys: str) -> Any:
        """A value of the science half of the config; None where it has none."""
        node: Any = self.science
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    @property
    def alpha(self) -> str:
        """The level of q, as it is written."""
        level = self.setting("calibrate", "alpha")
        return "α" if level is None else f"{level:g}"

    @cached_property
    def swapped(self) -> list[dict[str, Any]]:
        """Records of the patch swaps."""
        return swaps.records(self.dataset) if self.has("effects") else []

    def in_order(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows by depth of their layer, the sweep (None) last."""
        depth = {name: i for i, name in enumerate(self.layers)}
        return sorted(rows, key=lambda r: (r["layer"] is None, depth.get(r["layer"], len(depth)), str(r["layer"])))

    def _method(self) -> str:
        asked = self.science.get("method")
        if isinstance(asked, str):
            return asked
        return "categorical" if any(t.name in self.dataset for t in TEXT_TABLES) else "psi"

    def _layers(self) -> list[str]:
        if self.has("layers"):
            return [r["layer"] for r in self.rows("SELECT layer FROM layers ORDER BY depth, layer")]
        known = self.provenance.get("layers")
        if isinstance(known, dict):
            return [str(name) for name in known]
        table = next((t for t in ("neurons", "proximity", "core_tokens") if self.has(t)), None)
        found = [] if table is None else self.rows(f"SELECT DISTINCT layer FROM {table}")
        return sorted((r["layer"] for r in found), key=_natural)


def layer_name(layer: str | None) -> str:
    """A layer as it is shown; None is the whole sweep."""
    return SWEEP if layer is None else visible(layer)


def _natural(name: str) -> tuple[str, int, str]:
    head, _, last = name.rpartition(".")
    return (head, int(last), "") if last.isdecimal() else (name, -1, "")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
