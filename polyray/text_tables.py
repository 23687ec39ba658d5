"""What the dataset of a categorical sweep holds.

Place in the flow: part of `schema.py`, which lists all tables.
"""

import pyarrow as pa

from polyray.table import Table, f64, i32, i64, text

_STATUS = (
    ("status", text, "ok, excluded or failed"),
    ("reason", text, "why it is not ok; else null"),
)

TEXT_TABLES: tuple[Table, ...] = (
    Table(
        "documents",
        "One row per document of the corpus.",
        (
            ("document", i32, "index of the document in the corpus"),
            ("name", text, "file or row of the document"),
            ("label", text, "label; null where the corpus has none"),
            *_STATUS,
            ("n_tokens", i32, "tokens of the document; null where it cannot be read"),
        ),
        ("document",),
        by_layer=False,
    ),
    Table(
        "contexts",
        "What goes through the model: tokens of documents, end to end, cut to one length.",
        (
            ("first_document", i32, "first document of the unit that packed it"),
            ("context", i32, "index of the context among the unit's"),
            ("tokens", pa.list_(i32), "token ids; contexts are filled up on the right where they are shorter"),
            ("documents", pa.list_(i32), "document of each token; null for tokens that are none of the corpus"),
        ),
        ("first_document", "context"),
        by_layer=False,
    ),
    Table(
        "token_counts",
        "How often each token occurs in a range of documents.",
        (
            ("first_document", i32, "first document of the range"),
            ("token", i32, "token id"),
            ("count", i64, "how often"),
        ),
        ("first_document", "token"),
        by_layer=False,
    ),
    Table(
        "tokens",
        "Tokens that get statistics: those that occur at least core.min_count times.",
        (
            ("token", i32, "token id"),
            ("count", i64, "how often it occurs in the corpus"),
            ("text", text, "the token as text; bytes that are no UTF-8 escaped"),
        ),
        ("token",),
        by_layer=False,
    ),
    Table(
        "token_stats",
        "Sums of activations by token: one row per token.",
        (
            ("token", i32, "token id"),
            (
                "sums",
                pa.list_(i64),
                "each neuron's activations at the token added up, in units of 2^-24; 0 for neurons that are refused",
            ),
        ),
        ("token",),
    ),
    Table(
        "refused",
        "Neurons with an activation that is not finite, or too large to be added up.",
        (("neuron", i32, "index of the neuron in its layer"),),
        ("neuron",),
    ),
    Table(
        "core_tokens",
        "The tokens of highest mean activation: one row per neuron of every layer that is mined.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            *_STATUS,
            ("tokens", pa.list_(i32), "token ids, highest mean first; fewer than core.n_core where there are no more"),
            ("means", pa.list_(f64), "their mean activations, descending"),
            (
                "n_tied_at_cut",
                i32,
                "tokens left out whose mean equals that of the last one kept; null where it failed",
            ),
        ),
        ("neuron",),
    ),
    Table(
        "connections",
        "The neurons of the layer before with the largest weights: one row per neuron and precursor.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            ("rank", i32, "0 is the largest weight"),
            ("precursor", i32, "index of the neuron in the layer before"),
            ("weight", f64, "W_out of the precursor · gain of the norms between · W_in of the neuron; above 0"),
            ("gate_weight", f64, "the same by way of the neuron's gate; null where the MLP has none"),
        ),
        ("neuron", "rank"),
    ),
    Table(
        "taken_clusters",
        "Core-tokens that a neuron shares with a precursor: one row per neuron and precursor.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            ("rank", i32, "rank of the precursor"),
            ("precursor", i32, "index of the precursor in the layer before"),
            ("size", i32, "tokens shared"),
            ("p", f64, "hypergeometric p: two random sets of core-tokens share as many or more"),
            ("counted", pa.bool_(), "size reaches overlap.min_tokens"),
            ("tokens", pa.list_(i32), "the tokens shared, in the order of the neuron's core-tokens"),
        ),
        ("neuron", "rank"),
    ),
)
