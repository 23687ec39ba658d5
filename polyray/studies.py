"""What a sweep may hold beside the census: planted neurons of known truth, and its sensitivity to choices.

Place in the flow: part of `schema.py`, which lists all tables.
"""

import pyarrow as pa

from polyray.table import Table, f32, f64, i32, text

_VARIANT = (
    ("variant", text, "folder of the variant in OUT/variants"),
    ("vary", text, "what is varied: K, seed, k_range, prompts, encoder, or a key of cluster or calibrate"),
    ("value", text, "the value it takes"),
)

STUDIES: tuple[Table, ...] = (
    Table(
        "plant_features",
        "What the layer that is planted on gives for the images on which probes are fitted.",
        (
            ("example", i32, "image of the fitting half"),
            ("mean", pa.list_(f32), "feature vector, mean over positions"),
            (
                "map",
                pa.list_(pa.float16()),
                "feature map, channel by channel; null but for some images",
            ),
        ),
        ("example",),
    ),
    Table(
        "plant_classes",
        "The classes of the probe set and their names' text vectors.",
        (
            ("label", text, "class label"),
            ("embedding", pa.list_(f32), "unit text vector of the label"),
        ),
        ("label",),
        by_layer=False,
    ),
    Table(
        "planted",
        "Neurons of known truth: one row per planted neuron.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            ("kind", text, "mono, order2, order3, siblings, unequal or noise"),
            ("planted_order", i32, "classes that it responds to; 0 for noise"),
            ("classes", pa.list_(text), "their labels; for unequal the rarer one last"),
            ("weight", pa.list_(f32), "weights of its three 1×1 convolutions, one after the other"),
            ("bias", pa.list_(f32), "their biases"),
        ),
        ("neuron",),
    ),
    Table(
        "planted_neurons",
        "What became of every planted neuron.",
        (
            ("neuron", i32, "index of the neuron in its layer"),
            ("kind", text, "mono, order2, order3, siblings, unequal or noise"),
            ("planted_order", i32, "classes that it responds to; 0 for noise"),
            ("classes", pa.list_(text), "their labels; for unequal the rarer one last"),
            ("k", pa.int16(), "number of clusters found; null where not scored"),
            ("purity", f64, "share of the clustered examples that are of a planted class; null for noise"),
            ("balance", f64, "share of the rarest planted class times their number, 0 to 1; null for noise"),
            ("name_hit_frac", f64, "share of cluster names nearest to a planted class's; null for noise"),
            ("status", text, "ok, excluded or failed"),
        ),
        ("neuron",),
    ),
    Table(
        "planted_summary",
        "Size, power and what was recovered, one row per figure.",
        (
            ("layer", text, "name of the layer"),
            ("metric", text, "purity, balance, name_hit_frac, p05_frac, k_frac or auroc"),
            ("kind", text, "kind of planted neuron; for auroc the positives, held against mono"),
            (
                "min_purity",
                f64,
                "least purity of the neurons counted; above 0 they need some balance too, see psi/recover.py",
            ),
            ("preset", text, "preset; null where it does not apply"),
            ("score", text, "score or p behind the figure; for k_frac the number of clusters"),
            ("value", f64, "the figure; null where there is no neuron"),
            ("low", f64, "lower end of the 95 % interval; null where there is none"),
            ("high", f64, "upper end of the 95 % interval; null where there is none"),
            ("n", i32, "neurons behind the figure; for auroc the smaller side"),
        ),
        ("layer", "metric", "kind", "min_purity", "preset", "score"),
        by_layer=False,
    ),
    Table(
        "sensitivity",
        "How far the scores depend on one choice: the sweep against its variants, one row per figure.",
        (
            *_VARIANT,
            ("layer", text, "name of the layer; null for the whole sweep"),
            ("metric", text, "what the figure is: see psi/sensitivity.py"),
            ("preset", text, "preset of a calibrated score; null for raw scores and where it does not apply"),
            ("score", text, "log_psi, or S, Q, D: z with a preset, raw without; null where it does not apply"),
            ("estimate", f64, "the figure; null where it cannot be computed"),
            ("low", f64, "lower end of the 95 % interval; null where there is none"),
            ("high", f64, "upper end of the 95 % interval; null where there is none"),
            ("n", i32, "neurons behind the figure: those that both have the score of"),
        ),
        ("variant", "layer", "metric", "preset", "score"),
        by_layer=False,
    ),
    Table(
        "sensitivity_neurons",
        "What each neuron comes to in a variant: one row per variant and neuron that it scores.",
        (
            *_VARIANT,
            ("neuron", i32, "index of the neuron in its layer"),
            ("k", pa.int16(), "number of clusters kept"),
            ("log_psi", f64, "log_psi under preset specific"),
            ("p", f64, "conjunctive p under preset specific"),
            ("D_p", f64, "p of D under preset specific"),
            ("q", f64, "q of p over the variant's scored neurons, by its calibrate.fdr"),
            ("called", pa.bool_(), "q below alpha"),
            ("adjusted_rand", f64, "of its clusters and the sweep's; null: no example is clustered in both"),
            ("diagnosis", text, "name-sensitive: prompts or encoder change whether D_p is below 0.05; else null"),
        ),
        ("variant", "neuron"),
    ),
)
