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
                "activations at the token added up, of each neuron that is mined, by index, in units of 2^-24; 0 for "
                "neurons that are refused",
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
                "tokens left out whose mean equals that of the last one kept; null where it failed or is published",
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
    Table(
        "proximity",
        "Is a neuron's activation the higher, the nearer a token is to its taken-clusters? One row per neuron swept.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            *_STATUS,
            ("n_clusters", i32, "taken-clusters that count; null where it failed or has no layer before"),
            (
                "difference",
                f64,
                "mean dimensional proximity of the core-tokens of highest activation less lowest",
            ),
            ("h", f64, "Kruskal and Wallis's H of dimensional proximity over deciles of activation"),
            ("p", f64, "its p by permutation of the activation order, (b+1)/(n+1)"),
            ("tau", f64, "Kendall's tau-b of decile and mean dimensional proximity; above 0: the higher, the nearer"),
            ("first", f64, "share of the first principal component of the (token × cluster) matrix, 0 to 1"),
            ("agreeing", f64, "share of its loadings that have the sign that most have, 0.5 to 1"),
            ("rank", i32, "rank of the sub-dimension basis"),
            ("condition", f64, "condition number of that basis; null where it is deficient"),
            ("deciles", pa.list_(f64), "mean dimensional proximity by decile of activation, the highest first"),
            ("dimensional", pa.list_(f64), "dimensional proximity of each core-token, in their order"),
            ("diagnosis", text, "failure signatures, several separated by '; '; null where none applies"),
        ),
        ("neuron",),
    ),
    Table(
        "proximity_controls",
        "The same with one thing broken: one row per qualifying neuron and control; lists have an entry a draw.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            ("control", text, "what is broken, see categorical/controls.py"),
            ("differences", pa.list_(f64), "as proximity.difference; null entries where there is none"),
            ("p", pa.list_(f64), "as proximity.p"),
            ("first", pa.list_(f64), "as proximity.first"),
            ("deciles", pa.list_(f64), "as proximity.deciles, ten entries a draw"),
            ("qualifies", pa.list_(pa.bool_()), "whether the clusters of the draw would qualify the neuron"),
        ),
        ("neuron", "control"),
    ),
    Table(
        "clamps",
        "What follows when a neuron is held at a quantile of its own distribution: one row per neuron and quantile.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            ("quantile", f64, "0 to 1"),
            *_STATUS,
            ("value", f64, "activation at which it is held"),
            ("control", i32, "neuron of equal scale that is held in its place"),
            ("control_value", f64, "activation at which that is held"),
            ("n_contexts", i32, "contexts with one of its core-tokens"),
            ("n_positions", i32, "positions at which it is held"),
            ("targets", pa.list_(i32), "neurons of the next layer of which it is a precursor"),
            ("change", pa.list_(f64), "mean change of each target's activation there"),
            ("control_change", pa.list_(f64), "the same with the control held"),
            ("deviation", pa.list_(f64), "standard deviation of each target's activation"),
            (
                "coherence_change",
                pa.list_(f64),
                "change of the coherence of the taken-cluster that each shares",
            ),
            ("control_coherence_change", pa.list_(f64), "the same with the control held"),
            ("kl", f64, "mean KL divergence of the output distribution, in nats; null where the model has no head"),
            ("control_kl", f64, "the same with the control held"),
        ),
        ("neuron", "quantile"),
    ),
    Table(
        "categorical",
        "What all neurons come to, beside the controls: one row per layer and condition, and for the sweep.",
        (
            ("layer", text, "name of the layer; null for the whole sweep"),
            ("condition", text, "actual, or the name of a control"),
            ("n_neurons", i32, "neurons that are swept"),
            ("n", i32, "qualifying neurons with a difference in this condition"),
            ("n_groups", i32, "token groups among them"),
            *(
                (name + end, f64, what + said)
                for name, what in (
                    ("positive", "share with a positive difference"),
                    ("difference", "mean difference"),
                    ("gap", "share of positive differences of the actual neurons less that of the condition"),
                    ("remaining", "what the condition leaves of the excess of that share over one half: 1 all, 0 none"),
                    ("tau", "Kendall's tau-b of activation decile and mean dimensional proximity, pooled"),
                    ("kruskal", "share with p below 0.05"),
                    ("first", "mean share of the first component"),
                )
                for end, said in (("", ""), ("_low", ": lower end of its 95 % interval"), ("_high", ": upper end"))
            ),
            ("wilson_low", f64, "lower end of positive's interval as if neurons were independent"),
            ("wilson_high", f64, "upper end of it"),
            ("requalifying", f64, "share of neurons that would qualify by the clusters of the condition; null: actual"),
            ("verdict", text, "kept, gone, undecided or no effect, see categorical/summary.py; null: actual"),
            ("diagnosis", text, "correlation absent, where it is; else null"),
        ),
        ("layer", "condition"),
        by_layer=False,
    ),
)
