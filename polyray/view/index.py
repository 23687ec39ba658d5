"""Index: what the viewer sorts, filters and searches, in memory; everything else stays in the dataset.

Which question it answers: *which neurons, in which order?* Place in the flow: made from a `Catalog` when the viewer
opens a dataset, and anew when a running sweep has more. Its tables hold one narrow row a neuron and one a cluster, with
numbers in place of texts: about 150 MB for a million neurons.
"""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from polyray.report.catalog import SUMMARISED, Catalog
from polyray.schema import PRESETS
from polyray.view.columns import CATEGORICAL, STATUSES, Kind, kind_of

N_TOP_TOKENS = 6
"""Core-tokens by which a language neuron is named in lists."""

_NUMBERS = itertools.count()

_PSI = (
    "n.status AS status, n.reason AS reason, n.k, n.n_used, n.S, n.Q, n.D, "
    + ", ".join(f"n.{preset}_{c}" for preset in PRESETS for c in ("log_psi", "p"))
    + ", n.fdr_q, n.called, n.diagnosis AS diagnosis"
)
_CATEGORICAL = (
    "coalesce(p.status, CASE WHEN n.status = 'ok' AND ({not_swept}) THEN 'mined' ELSE n.status END) AS status, "
    "coalesce(p.reason, n.reason) AS reason, p.n_clusters, p.difference, p.tau, p.p, p.first, n.means[1] AS top_mean, "
    "p.diagnosis AS diagnosis, coalesce(n.tokens[1:6], []) AS tokens"
)


class Index:
    """The neurons and clusters of a dataset as it was when this was made.

    Args:
        catalog: what it is made from and held in.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        run = catalog.dataset.run
        self.method = str(run["config"]["science"].get("method", "psi"))
        self.kind: Kind = kind_of(self.method)
        mined = run["provenance"].get("layers", {})
        self.planned: dict[str, int] = dict(run["provenance"].get("n_swept") or mined)
        """Neurons that the sweep is about, by layer, in order of depth."""
        self._known = list(mined)
        number = next(_NUMBERS)
        self.neurons, self.clusters = f"neurons_{number}", f"clusters_{number}"
        """Names of the index's tables, for queries; `rowid` of a neuron is its place among all, by depth and index."""
        self.layer_numbers, self._texts_table = f"layers_{number}", f"texts_{number}"
        self.is_categorical = self.kind is CATEGORICAL
        self._fill()

    def _fill(self) -> None:
        source = "core_tokens" if self.is_categorical else "neurons"
        found = [r["layer"] for r in self._catalog.rows(f"SELECT DISTINCT layer FROM {source} ORDER BY layer")]
        self.layers: list[str] = list(dict.fromkeys([*self._known, *self.planned, *found]))
        """Names of layers by their number in the index."""
        make = self._catalog.make
        make(
            f"CREATE TABLE {self.layer_numbers} AS "
            "SELECT unnest($names::VARCHAR[]) AS layer, unnest($ids::INTEGER[]) AS layer_id",
            {"names": self.layers, "ids": list(range(len(self.layers)))},
        )
        self.reasons = self._texts_of(source, "reason")
        self.diagnoses = self._texts_of("proximity" if self.is_categorical else "neuron_summary", "diagnosis")
        if self.is_categorical:
            self.reasons = list(dict.fromkeys([*self.reasons, *self._texts_of("proximity", "reason")]))
            # At the end every neuron that was swept has its row; before it, whole layers alone are known not to be.
            beside = "true" if self._catalog.dataset.is_finished else "NOT list_contains($swept::VARCHAR[], n.layer)"
            joined = (
                _CATEGORICAL.format(not_swept=beside)
                + " FROM core_tokens n LEFT JOIN proximity p USING (layer, neuron)"
            )
        else:
            verdict = (
                "SELECT layer, neuron, causal FROM effects WHERE kind = 'real' AND scope = 'neuron' AND split = 'all' "
                "AND contrast = 'aligned-random'"
            )
            joined = f"{_PSI}, v.causal FROM {SUMMARISED} n LEFT JOIN ({verdict}) v USING (layer, neuron)"
        make(
            f"CREATE TABLE {self.neurons} AS SELECT layer_id::USMALLINT AS layer_id, neuron, "
            "(list_position($statuses, status) - 1)::TINYINT AS status, "
            "(list_position($reasons, reason) - 1)::INTEGER AS reason, "
            "(list_position($diagnoses, diagnosis) - 1)::INTEGER AS diagnosis, "
            f"* EXCLUDE (layer_id, layer, neuron, status, reason, diagnosis) FROM "
            f"(SELECT n.layer, n.neuron, {joined}) JOIN {self.layer_numbers} USING (layer) ORDER BY layer_id, neuron",
            {"statuses": list(STATUSES), "reasons": self.reasons, "diagnoses": self.diagnoses}
            | ({"swept": list(self.planned)} if "$swept" in joined else {}),
        )
        self._fill_clusters()
        pa.default_memory_pool().release_unused()
        self.n_neurons = int(self.ask(f"SELECT count(*) AS n FROM {self.neurons}")[0]["n"])

    def _fill_clusters(self) -> None:
        if self.is_categorical:
            texts = "SELECT token AS id, text FROM tokens"
            self.texts: dict[int, str] = {r["id"]: r["text"] for r in self._catalog.rows(texts)}
            """Names and labels of clusters, or tokens, by their number."""
        else:
            self._catalog.make(
                f"CREATE TABLE {self._texts_table} AS SELECT text, (row_number() OVER () - 1)::INTEGER AS id FROM "
                "(SELECT name AS text FROM clusters UNION SELECT label FROM clusters) WHERE text IS NOT NULL"
            )
            self._catalog.make(
                f"CREATE TABLE {self.clusters} AS SELECT n.rowid::INTEGER AS row, cluster::SMALLINT AS cluster, size, "
                "a.id AS name, name_score::FLOAT AS name_score, b.id AS label, label_frac::FLOAT AS label_frac "
                f"FROM clusters c JOIN {self.layer_numbers} l USING (layer) "
                f"JOIN {self.neurons} n ON n.layer_id = l.layer_id AND n.neuron = c.neuron "
                f"LEFT JOIN {self._texts_table} a ON a.text = c.name "
                f"LEFT JOIN {self._texts_table} b ON b.text = c.label"
            )
            self.texts = {r["id"]: r["text"] for r in self.ask(f"SELECT id, text FROM {self._texts_table}")}
            self._catalog.make(f"DROP TABLE {self._texts_table}")
        self._folded = {i: folded(text) for i, text in self.texts.items()}

    def _texts_of(self, table: str, column: str) -> list[str]:
        query = f"SELECT DISTINCT {column} AS text FROM {table} WHERE {column} IS NOT NULL ORDER BY text"
        return [r["text"] for r in self._catalog.rows(query)]

    def drop(self) -> None:
        """Gives its memory back; nothing may ask it any more."""
        for table in (self.neurons, self.clusters, self.layer_numbers):
            self._catalog.make(f"DROP TABLE IF EXISTS {table}")

    def ask(self, query: str, values: Mapping[str, object] | Sequence[object] = ()) -> list[dict[str, Any]]:
        """The rows of a query of the index's tables."""
        return self._catalog.ask(query, values).to_pylist()

    def rows(self, query: str, values: Mapping[str, object]) -> list[dict[str, Any]]:
        """The rows of a query of the index's tables and the dataset's together."""
        if self.is_categorical:
            return self._catalog.rows(query, values)
        return self.ask(query, values)

    def numbers(self, query: str, values: Mapping[str, object] | Sequence[object] = ()) -> pa.Table:
        """The same in columns."""
        return self._catalog.ask(query, values)

    def matching(self, words: str) -> dict[int, int]:
        """Texts that hold some words, by number: 0 where they are the same, 1 where it begins with them or has a word
        that does, 2 where they stand anywhere in it. Case, accents and width do not matter."""
        wanted = folded(words)
        if not wanted:
            return {}
        found = {}
        for i, text in self._folded.items():
            if wanted in text:
                found[i] = 0 if wanted == text else 1 if (" " + text).find(" " + wanted) >= 0 else 2
        return found

    def place(self, layer: str, neuron: int) -> int | None:
        """The row of a neuron; None where there is none."""
        if layer not in self.layers:
            return None
        query = f"SELECT rowid AS row FROM {self.neurons} WHERE layer_id = ? AND neuron = ?"
        found = self.ask(query, [self.layers.index(layer), neuron])
        return int(found[0]["row"]) if found else None


def folded(text: str) -> str:
    """A text as it is compared in a search."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(bare.casefold().split())
