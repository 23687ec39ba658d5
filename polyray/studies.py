"""What a sweep may hold beside the census: planted neurons of known truth, causal patch swaps, and its sensitivity to
choices.

Place in the flow: part of `schema.py`, which lists all tables.
"""

import pyarrow as pa

from polyray.table import Table, f32, f64, i32, text

SWAP_CONDITIONS = (
    "host",
    "baseline",
    "aligned",
    "non_aligned",
    "random",
    "random_place",
    "shuffled_position",
    "ablate_elsewhere",
)
"""What is done to a host image, see psi/swap.py: nothing; its box filled; a donor's patch in the box; the patch of
another cluster there; the neuron's peak patch of a random image there; a random patch there; the box filled and the
aligned patch elsewhere; the box intact and an equal one elsewhere filled."""
SWAP_SHOWN = {"real": SWAP_CONDITIONS[1:], "null": ("baseline", "aligned", "non_aligned")}
"""What the subject is shown of each host of a neuron of this kind; of the host itself mining has seen the response."""
CONTRASTS = (
    "aligned-random",
    "aligned-random_place",
    "aligned-shuffled_position",
    "aligned-non_aligned",
    "non_aligned-random",
    "ablate_elsewhere-baseline",
)
"""Differences between conditions, paired by host. `aligned-shuffled_position` is at the peak position, where both have
the same background; `aligned-non_aligned` and `non_aligned-random` are tested on both sides, the others for being above
0. `ablate_elsewhere-baseline` is the specificity."""


def _place(prefix: str, what: str) -> tuple[tuple[str, pa.DataType, str], ...]:
    sides = (("x0", "left"), ("y0", "top"), ("x1", "right, exclusive,"), ("y1", "bottom, exclusive,"))
    return tuple((prefix + c, pa.int16(), f"{d} of {what}, in pixels of the subject's input") for c, d in sides)


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
        "swap_peaks",
        "Where every neuron peaks in the images from which random patches are drawn.",
        (
            ("example", i32, "image"),
            (
                "position",
                pa.list_(i32),
                "raster index of each swept neuron's peak; null where it does not fire or is not finite",
            ),
        ),
        ("example",),
    ),
    Table(
        "swaps",
        "What a neuron says of a host image after something was done to it: one row per neuron, host, condition.",
        (
            ("kind", text, "real; or null: random examples under permuted cluster labels"),
            ("neuron", i32, "index of the neuron in its layer; of a null neuron: of the one it stands beside"),
            ("host", i32, "number of the host, from 0"),
            (
                "condition",
                text,
                "host, baseline, aligned, non_aligned, random, random_place, shuffled_position or ablate_elsewhere",
            ),
            ("status", text, "ok; not_swappable: this host has no such swap; failed: it could not be done"),
            ("reason", text, "why it is not ok; else null"),
            ("host_example", i32, "image of the host"),
            ("cluster", pa.int16(), "cluster of the host"),
            ("position", i32, "raster index of the host's peak"),
            *_place("", "the host's box, around its peak"),
            ("box_frac", f64, "area of the box as a share of the image, 0 to 1"),
            ("reduced", pa.bool_(), "the box is smaller than the window asks for, because of swap.max_frac"),
            ("source_example", i32, "image that the patch is taken from; null where none is"),
            ("source_cluster", pa.int16(), "cluster of that image; null where it is none of the neuron's"),
            *_place("source_", "the patch in that image; null where none is taken"),
            *_place("place_", "where the host is changed beside its box; null where it is not"),
            ("baseline", f32, "response to the host with its box filled; null where it is not finite or was not taken"),
            ("response", f32, "response, the maximum over positions; null where it is not finite or was not taken"),
            ("response_at_peak", f32, "response at the host's peak position; null as response"),
            ("effect", f64, "response less baseline, in units of the response; null where one is missing"),
            ("effect_at_peak", f64, "the same at the host's peak position"),
            (
                "effect_sd",
                f64,
                "effect over the standard deviation of the clustered examples' responses; null where that is 0, "
                "where effect is null, and for null neurons",
            ),
            ("picture", pa.binary(), "64 px JPEG of the image shown; null but for the first host of each cluster"),
        ),
        ("kind", "neuron", "host", "condition"),
    ),
    Table(
        "effects",
        "Contrasts between conditions: one row per cluster, neuron and layer, and for the whole sweep.",
        (
            ("layer", text, "name of the layer; null for the whole sweep"),
            ("kind", text, "real; or null: random examples under permuted cluster labels"),
            ("scope", text, "cluster, neuron, layer or sweep: what the row is about"),
            ("neuron", i32, "index of the neuron in its layer; null for layer and sweep"),
            ("cluster", pa.int16(), "cluster; null but for cluster"),
            (
                "split",
                text,
                "all; of a layer or the sweep also: quartile of specific_log_psi, or share of the image in the box",
            ),
            (
                "contrast",
                text,
                "difference between two conditions, as in CONTRASTS; a share of neurons: causal, causal_specific, and "
                "of null neurons null_p05 (p below 0.05); null_small, null_ks: how far p are too small, or not uniform",
            ),
            (
                "mean",
                f64,
                "mean difference in units of the response; of a share the share, of null_small and null_ks the "
                "distance; null where n is 0",
            ),
            ("low", f64, "lower end of its 95 % interval, too narrow where n is small; null where n is below 2"),
            ("high", f64, "upper end of its 95 % interval; null where there is none"),
            (
                "mean_sd",
                f64,
                "mean difference in standard deviations of the clustered examples' responses; null for a share, null "
                "neurons, and where that is not known (all effects are 0); may rest on fewer neurons than mean",
            ),
            ("low_sd", f64, "lower end of its 95 % interval; null where there is none"),
            ("high_sd", f64, "upper end of its 95 % interval; null where there is none"),
            (
                "p",
                f64,
                "Wilcoxon's signed-rank p, see kernels/effects.py; of null_small and null_ks Kolmogorov and "
                "Smirnov's; null for a share and where n is 0",
            ),
            (
                "q",
                f64,
                "Benjamini-Hochberg q of p over rows of this kind, scope, contrast and sort of split; null without p, "
                "and of clusters with n below 5",
            ),
            ("n", i32, "differences behind the figure: hosts of a cluster or neuron; neurons of a layer or the sweep"),
            (
                "causal",
                pa.bool_(),
                "of a neuron's aligned-random: at least two of its clusters have a positive mean with q below 0.05; "
                "null where fewer than two clusters have 5 differences, and in all other rows",
            ),
            ("reason", text, "why there is no figure or no verdict; else null"),
        ),
        ("layer", "kind", "scope", "split", "contrast", "neuron", "cluster"),
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
