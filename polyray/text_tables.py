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
        (("first_document", i32, "first document of the range"), ("token", i32, "token id"), ("count", i64, "how often")),
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
)
