"""Columns: what the table of neurons shows, sorts and filters, for each kind of sweep.

Place in the flow: a leaf; `index.py` holds these columns in memory, `asked.py` lets an address name them, and nothing
else can be named.
"""

from dataclasses import dataclass
from typing import Literal

from polyray.schema import PRESETS

STATUSES = ("ok", "excluded", "failed", "mined")
"""Of a neuron; `mined`: of a language sweep that is not about it, but read it because it may be a precursor."""

Shown = Literal["float", "p", "count", "flag"]


@dataclass(frozen=True)
class Column:
    """One number or verdict of a neuron."""

    key: str
    """Its name in addresses."""
    title: str
    doc: str
    shown: Shown
    sql: str
    """Its column of the index; `{preset}` stands for the preset that is looked at."""
    low_first: bool = False
    """Whether small values are what one looks for."""

    def of(self, preset: str) -> str:
        """Its column under a preset."""
        return self.sql.format(preset=preset)


@dataclass(frozen=True)
class Kind:
    """What the neurons of one kind of sweep have."""

    columns: tuple[Column, ...]
    best: str
    """What the table is sorted by unless asked otherwise."""
    spread: str
    """The column whose distribution the map shows, by layer."""
    presets: tuple[str, ...]
    names: str
    """What a neuron is named by, for a heading."""

    def column(self, key: str) -> Column:
        """The column of a name; there must be one."""
        return next(c for c in self.columns if c.key == key)


PSI = Kind(
    (
        Column("log_psi", "log ψ", "sum of log sigmoid(z) over S, Q, D under the preset; at most 0", "float",
               "{preset}_log_psi"),
        Column("p", "p", "the largest of the three p under the preset", "p", "{preset}_p", low_first=True),
        Column("fdr_q", "q", "false discovery rate over all neurons, under specific", "p", "fdr_q", low_first=True),
        Column("called", "called", "q below alpha", "flag", "called"),
        Column("S", "S", "mean silhouette of the clusters, −1 to 1", "float", "S"),
        Column("Q", "Q", "mutual information of clusters and labels, 0 to 1", "float", "Q"),
        Column("D", "D", "mean distance between the clusters' names", "float", "D"),
        Column("k", "k", "number of clusters", "count", "k"),
        Column("causal", "causal", "patch swaps: at least two of its clusters drive it; – where there is no verdict",
               "flag", "causal"),
    ),
    best="-log_psi",
    spread="log_psi",
    presets=PRESETS,
    names="clusters",
)  # fmt: skip

CATEGORICAL = Kind(
    (
        Column("n_clusters", "clusters", "taken-clusters that count", "count", "n_clusters"),
        Column("difference", "difference", "proximity of the core-tokens of highest activation less lowest", "float",
               "difference"),
        Column("tau", "τ", "Kendall's tau of activation decile and proximity", "float", "tau"),
        Column("p", "p", "Kruskal and Wallis, by permutation of the activation order", "p", "p", low_first=True),
        Column("first", "first comp.", "share of the first principal component, 0 to 1", "float", "first"),
        Column("top_mean", "top mean", "mean activation at its first core-token", "float", "top_mean"),
    ),
    best="-difference",
    spread="difference",
    presets=(),
    names="core-tokens",
)  # fmt: skip


def kind_of(method: str) -> Kind:
    """The columns of a sweep by its `science.method`."""
    return CATEGORICAL if method == "categorical" else PSI
