"""What the dataset holds: every table's columns, their unit, and what a null in them means.

Which question it answers: *what does this column say?* Place in the flow: a leaf; `store.py` writes nothing that is
not described here. A missing number is a null, never 0 or −1. `VERSION` is part of every run_id.
"""

from dataclasses import dataclass

import pyarrow as pa

VERSION = 2

PRESETS = ("paper", "selective", "specific")
COMPONENTS = ("S", "Q", "D")
NULL_KINDS = ("rotation", "pool", "one_concept")
PLANTED_KINDS = ("mono", "order2", "order3", "siblings", "unequal", "noise")
"""Planted neurons: one class; two or three classes far apart in text space; two near ones; two, one of them rarer; none
at all."""
SHARED_LAYER = "_shared"
"""Value of `layer` for null draws that depend on no layer."""


@dataclass(frozen=True)
class Table:
    """One table: its columns with their descriptions, the key that orders its rows, and how it is partitioned."""

    name: str
    doc: str
    columns: tuple[tuple[str, pa.DataType, str], ...]
    key: tuple[str, ...]
    by_layer: bool = True

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of a part file (the `layer` column lives in the folder's name)."""
        return pa.schema([pa.field(n, t, metadata={"doc": d}) for n, t, d in self.columns])


_i32, _i64, _f32, _f64, _str = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()
_half_vector = pa.list_(pa.float16())

_BOX = tuple(
    (c, pa.int16(), f"{d} of the box in pixels of the subject's input; right and bottom are exclusive")
    for c, d in (("x0", "left"), ("y0", "top"), ("x1", "right"), ("y1", "bottom"))
)

_RAW = (
    ("S", _f64, "mean silhouette of the kept clustering, −1 to 1; null where not scored"),
    ("k", pa.int16(), "number of clusters kept; null where not scored"),
    ("Q", _f64, "normalised mutual information of clusters and labels, 0 to 1; null where not scored"),
    ("Q_mean", _f64, "mean of Q under permuted labels; null where not scored"),
    ("Q_std", _f64, "standard deviation of Q under permuted labels; null where not scored"),
    ("Q_p", _f64, "one-sided (b+1)/(n+1) of Q under n = min(B, 1000) label permutations; null where not scored"),
    ("two_means", _f64, "1 − cosine between the centres of two clusters, 0 to 2 (a baseline); null where not scored"),
    ("D", _f64, "mean 1 − cosine between the cluster names' text embeddings; null where not scored"),
)  # fmt: skip


def _compared(component: str, preset: str) -> str:
    return "Q's permutation z" if component == "Q" and preset != "paper" else component


def _calibrated() -> tuple[tuple[str, pa.DataType, str], ...]:
    columns: list[tuple[str, pa.DataType, str]] = []
    for preset in PRESETS:
        for c in COMPONENTS:
            columns += [
                (f"{preset}_{c}_mean", _f64, f"mean of {_compared(c, preset)} over the null draws of preset {preset}"),
                (f"{preset}_{c}_std", _f64, f"standard deviation of {_compared(c, preset)} over the same draws"),
                (f"{preset}_{c}_z", _f64, f"z of {c} against preset {preset}; 0 where the null is constant"),
                (f"{preset}_{c}_hat", _f64, f"sigmoid of {preset}_{c}_z, 0 to 1"),
                (f"{preset}_{c}_p", _f64, f"one-sided (b+1)/(n+1) of {c} against the n draws of preset {preset}"),
            ]
        columns += [
            (f"{preset}_log_psi", _f64, "sum of log sigmoid(z) over S, Q, D; at most 0; 3 log 0.5 at chance"),
            (f"{preset}_psi", _f64, "product of the three hats, 0 to 1; 0.125 at chance"),
            (f"{preset}_p", _f64, "conjunctive p: the largest of the three (super-uniform under the null)"),
        ]
    return tuple(columns)


_VARIANT = (
    ("variant", _str, "folder of the variant in OUT/variants"),
    ("vary", _str, "what is varied: K, seed, k_range, prompts, encoder, or a key of cluster or calibrate"),
    ("value", _str, "the value it takes"),
)

_STATUS = (
    ("status", _str, "ok, excluded or failed"),
    ("reason", _str, "why it was excluded or failed; null where ok"),
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        Table(
            "images",
            "One row per image of the probe set.",
            (
                ("example", _i32, "index of the image in the probe set"),
                ("name", _str, "file name or row of the image in its probe set"),
                ("label", _str, "class label"),
                *_STATUS,
                ("width_px", _i32, "width as decoded; null where unreadable"),
                ("height_px", _i32, "height as decoded; null where unreadable"),
                ("pixel_hash", _str, "BLAKE2 of the decoded RGB pixels; null where unreadable"),
            ),
            ("example",),
            by_layer=False,
        ),
        Table(
            "layers",
            "One row per layer that is swept.",
            (
                ("layer", _str, "name of the layer"),
                ("depth", _i32, "order in the forward pass, from 0"),
                ("n_neurons", _i32, "neurons that are swept"),
                ("width", _i32, "neurons that the layer has"),
                ("layout", _str, "nchw, nhwc, tokens or vector"),
                ("grid_h", _i32, "positions from top to bottom"),
                ("grid_w", _i32, "positions from left to right"),
                ("activation", _str, "function the read-out ends in; null where it is linear"),
                ("ranked_by", _str, "response, or pre_activation where the activation saturates"),
                ("window", _str, "effective or theoretical"),
                ("side_px", _i32, "side of the embedded box in pixels of the subject's input"),
                ("swap_side_px", _i32, "side of the swapped box in pixels of the subject's input"),
                ("receptive_px", _i32, "side of the theoretical receptive field; null where it is the whole image"),
                ("center_x_px", _f64, "centre of the box of position (0, 0), horizontally"),
                ("center_y_px", _f64, "centre of the box of position (0, 0), vertically"),
                ("stride_px", _f64, "pixels between neighbouring positions"),
            ),
            ("layer",),
            by_layer=False,
        ),
        Table(
            "mine_parts",
            "What one range of images contributes: one row per neuron.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("n_images", _i32, "images whose response was finite"),
                ("n_nonfinite", _i32, "images whose response was NaN or infinite"),
                ("n_positive", _i32, "images with response above 0"),
                ("total", _f64, "sum of the finite responses"),
                ("total_sq", _f64, "sum of the squares of the finite responses"),
                ("minimum", _f32, "smallest finite response; null where there is none"),
                ("maximum", _f32, "largest finite response; null where there is none"),
                ("n_equal_cut", _i32, "images of the range, left out, whose response equals the last one kept"),
                ("bins", pa.list_(_i32), "counts of responses in the fixed bins of kernels.topk"),
                ("example", pa.list_(_i32), "images kept, best first; with mine.band all images that count"),
                ("response", pa.list_(_f32), "their responses, descending"),
                ("position", pa.list_(_i32), "raster index of their peak positions"),
            ),
            ("neuron",),
        ),
        Table(
            "mined",
            "Top examples over the whole probe set: one row per neuron.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                *_STATUS,
                (
                    "n_tied_at_cut",
                    _i32,
                    "images whose response equals that of the K-th; 1 without ties; null with mine.band",
                ),
                (
                    "example",
                    pa.list_(_i32),
                    "images kept (at most K_keep), best first; with mine.band in order of hash",
                ),
                ("response", pa.list_(_f32), "their responses, descending; with mine.band in no order"),
                ("position", pa.list_(_i32), "raster index of their peak positions"),
            ),
            ("neuron",),
        ),
        Table(
            "histograms",
            "Distribution of every neuron's responses over the probe set.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("n_images", _i32, "images whose response was finite"),
                ("n_nonfinite", _i32, "images whose response was NaN or infinite"),
                ("positive_frac", _f64, "share of images with response above 0; null without a finite response"),
                ("mean", _f64, "mean response; null without a finite response"),
                ("std", _f64, "standard deviation of the response; null without a finite response"),
                ("minimum", _f32, "smallest finite response; null where there is none"),
                ("maximum", _f32, "largest finite response; null where there is none"),
                ("bins", pa.list_(_i32), "counts of responses in the fixed bins of kernels.topk"),
            ),
            ("neuron",),
        ),
        Table(
            "pool_peaks",
            "Where a random neuron of the layer peaks in each image drawn for the pool.",
            (
                ("example", _i32, "image"),
                ("neuron", _i32, "uniformly drawn neuron of the layer"),
                ("position", _i32, "raster index of its peak in the image"),
            ),
            ("example",),
        ),
        Table(
            "pool",
            "Patches that stand for the layer: distinct images, each at the peak of a random neuron.",
            (
                ("pool_idx", _i32, "index in the pool"),
                ("example", _i32, "image"),
                ("neuron", _i32, "neuron whose peak was taken"),
                ("position", _i32, "raster index of the peak"),
                ("label", _str, "class label of the image"),
                ("patch_id", _i64, "patch"),
            ),
            ("pool_idx",),
        ),
        Table(
            "patches",
            "Every distinct (image, box) once, filed under the first layer that needs it.",
            (("patch_id", _i64, "identity of the patch in the sweep"), ("example", _i32, "image"), *_BOX),
            ("patch_id",),
        ),
        Table(
            "embeddings",
            "What the encoder gives for every patch, as it comes (not normalised).",
            (
                ("patch_id", _i64, "patch"),
                ("geometry", _half_vector, "vector for S and the clusters"),
                ("text", _half_vector, "text-aligned vector for names and D; null where it is the geometry vector"),
            ),
            ("patch_id",),
        ),
        Table(
            "vocabulary",
            "The prompts that clusters are named by.",
            (
                ("prompt_idx", _i32, "index of the prompt"),
                ("prompt", _str, "the prompt as listed"),
                ("embedding", pa.list_(_f32), "unit text embedding"),
            ),
            ("prompt_idx",),
            by_layer=False,
        ),
        Table(
            "examples",
            "The examples that a neuron keeps: one row per neuron and rank.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("rank", _i32, "0 is the largest response; with mine.band: the smallest hash"),
                ("example", _i32, "image"),
                ("activation", _f32, "response by which the image was ranked"),
                ("position", _i32, "raster index of the peak"),
                *_BOX,
                ("label", _str, "class label of the image"),
                ("patch_id", _i64, "patch"),
                ("cluster", pa.int16(), "cluster, from 0; null where the example is beyond those clustered"),
            ),
            ("neuron", "rank"),
        ),
        Table(
            "clusters",
            "The clusters of every scored neuron.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("cluster", pa.int16(), "from 0, largest first"),
                ("size", _i32, "examples in the cluster"),
                ("name", _str, "prompt nearest to the mean of the text-aligned vectors"),
                ("name_score", _f64, "cosine of the name with that mean, −1 to 1"),
                ("names", pa.list_(_str), "the five nearest prompts, nearest first"),
                ("label", _str, "most frequent class label"),
                ("label_frac", _f64, "share of the cluster with that label"),
                ("prototypes", pa.list_(_i64), "patches nearest to the cluster's centre, nearest first"),
                ("thumbnails", pa.list_(pa.binary()), "64 px JPEGs of the prototypes; null where switched off"),
            ),
            ("neuron", "cluster"),
        ),
        Table(
            "scores",
            "Raw scores, before calibration, of neurons and of null neurons.",
            (
                ("kind", _str, "real, or the kind of null neuron: rotation, pool, one_concept"),
                ("neuron", _i32, "index of the neuron in its layer; of a null neuron: of the neuron it stands beside"),
                *_STATUS,
                ("n_used", _i32, "examples clustered"),
                ("n_labels", _i32, "distinct labels among them"),
                *_RAW,
            ),
            ("kind", "neuron"),
        ),
        Table(
            "nulls",
            "Null draws, each scored as a neuron is; drawn once for what they depend on.",
            (
                ("kind", _str, "rotation, pool, one_concept or shuffle_text; permute_dims where asked for"),
                ("n_used", _i32, "examples in the draw; null for shuffle_text"),
                ("draw", _i32, "index of the draw"),
                ("S", _f64, "mean silhouette of the kept clustering; null for shuffle_text"),
                ("k", pa.int16(), "number of clusters kept; for shuffle_text: number of names"),
                ("Q", _f64, "NMI of clusters and labels; null but for pool and one_concept"),
                ("Q_z", _f64, "z of Q under permuted labels; null but for pool and one_concept"),
                ("D", _f64, "name distance of the kept clusters; of random names for shuffle_text; else null"),
            ),
            ("kind", "n_used", "k", "draw"),
        ),
        Table(
            "neurons",
            "One row per neuron: raw, null mean and std, z, hat, p of each component, log_psi of each preset.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("status", _str, "ok, excluded or failed"),
                ("reason", _str, "why it was excluded or failed, or is ok but has no p; else null"),
                ("ranked_by", _str, "response, or pre_activation where the activation saturates"),
                ("n_examples", _i32, "examples that count; null where the neuron could not be mined"),
                (
                    "n_tied_at_cut",
                    _i32,
                    "images whose response equals that of the K-th; 1 without ties; null with mine.band",
                ),
                ("n_used", _i32, "examples clustered; null where not scored"),
                ("n_labels", _i32, "distinct labels among them; null where not scored"),
                *_RAW,
                *_calibrated(),
            ),
            ("neuron",),
        ),
        Table(
            "null_neurons",
            "Null neurons of each kind beside the scored neurons (one for each anchor at most), calibrated alike.",
            (
                ("kind", _str, "rotation, pool or one_concept"),
                ("neuron", _i32, "index of the neuron that it stands beside"),
                ("n_used", _i32, "examples clustered"),
                *_RAW,
                *_calibrated(),
            ),
            ("kind", "neuron"),
        ),
        Table(
            "neuron_summary",
            "What needs the whole sweep: one row per neuron.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                (
                    "q",
                    _f64,
                    "q of specific_p over all calibrated neurons, as calibrate.fdr says; null without p",
                ),
                ("called", pa.bool_(), "q below alpha; null where q is"),
                ("diagnosis", _str, "named pattern, several separated by '; '; null where none applies"),
            ),
            ("neuron",),
        ),
        Table(
            "layer_summary",
            "What holds for a layer, one row per figure.",
            (
                ("layer", _str, "name of the layer; null for the whole sweep"),
                ("metric", _str, "what the figure is"),
                ("preset", _str, "preset; null where it does not apply"),
                ("null_kind", _str, "kind of null neuron; null where it does not apply"),
                ("score", _str, "log_psi or an ablation (S, Q, D, S*Q); null where it does not apply"),
                ("value", _f64, "the figure; null where it cannot be computed"),
                ("low", _f64, "lower end of the 95 % interval; null where there is none"),
                ("high", _f64, "upper end of the 95 % interval; null where there is none"),
                ("n", _i32, "neurons behind the figure"),
            ),
            ("layer", "metric", "preset", "null_kind", "score"),
            by_layer=False,
        ),
        Table(
            "plant_features",
            "What the layer that is planted on gives for the images on which probes are fitted.",
            (
                ("example", _i32, "image of the fitting half"),
                ("mean", pa.list_(_f32), "feature vector, mean over positions"),
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
                ("label", _str, "class label"),
                ("embedding", pa.list_(_f32), "unit text vector of the label"),
            ),
            ("label",),
            by_layer=False,
        ),
        Table(
            "planted",
            "Neurons of known truth: one row per planted neuron.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("kind", _str, "mono, order2, order3, siblings, unequal or noise"),
                ("planted_order", _i32, "classes that it responds to; 0 for noise"),
                ("classes", pa.list_(_str), "their labels; for unequal the rarer one last"),
                ("weight", pa.list_(_f32), "weights of its three 1×1 convolutions, one after the other"),
                ("bias", pa.list_(_f32), "their biases"),
            ),
            ("neuron",),
        ),
        Table(
            "planted_neurons",
            "What became of every planted neuron.",
            (
                ("neuron", _i32, "index of the neuron in its layer"),
                ("kind", _str, "mono, order2, order3, siblings, unequal or noise"),
                ("planted_order", _i32, "classes that it responds to; 0 for noise"),
                ("classes", pa.list_(_str), "their labels; for unequal the rarer one last"),
                ("k", pa.int16(), "number of clusters found; null where not scored"),
                ("purity", _f64, "share of the clustered examples that are of a planted class; null for noise"),
                ("balance", _f64, "share of the rarest planted class times their number, 0 to 1; null for noise"),
                ("name_hit_frac", _f64, "share of cluster names nearest to a planted class's; null for noise"),
                ("status", _str, "ok, excluded or failed"),
            ),
            ("neuron",),
        ),
        Table(
            "planted_summary",
            "Size, power and what was recovered, one row per figure.",
            (
                ("layer", _str, "name of the layer"),
                ("metric", _str, "purity, balance, name_hit_frac, p05_frac, k_frac or auroc"),
                ("kind", _str, "kind of planted neuron; for auroc the positives, held against mono"),
                (
                    "min_purity",
                    _f64,
                    "least purity of the neurons counted; above 0 they need some balance too, see psi/recover.py",
                ),
                ("preset", _str, "preset; null where it does not apply"),
                ("score", _str, "score or p behind the figure; for k_frac the number of clusters"),
                ("value", _f64, "the figure; null where there is no neuron"),
                ("low", _f64, "lower end of the 95 % interval; null where there is none"),
                ("high", _f64, "upper end of the 95 % interval; null where there is none"),
                ("n", _i32, "neurons behind the figure; for auroc the smaller side"),
            ),
            ("layer", "metric", "kind", "min_purity", "preset", "score"),
            by_layer=False,
        ),
        Table(
            "sensitivity",
            "How far the scores depend on one choice: the sweep against its variants, one row per figure.",
            (
                *_VARIANT,
                ("layer", _str, "name of the layer; null for the whole sweep"),
                ("metric", _str, "what the figure is: see psi/sensitivity.py"),
                ("preset", _str, "preset of a calibrated score; null for raw scores and where it does not apply"),
                ("score", _str, "log_psi, or S, Q, D: z with a preset, raw without; null where it does not apply"),
                ("estimate", _f64, "the figure; null where it cannot be computed"),
                ("low", _f64, "lower end of the 95 % interval; null where there is none"),
                ("high", _f64, "upper end of the 95 % interval; null where there is none"),
                ("n", _i32, "neurons behind the figure: those that both have the score of"),
            ),
            ("variant", "layer", "metric", "preset", "score"),
            by_layer=False,
        ),
        Table(
            "sensitivity_neurons",
            "What each neuron comes to in a variant: one row per variant and neuron that it scores.",
            (
                *_VARIANT,
                ("neuron", _i32, "index of the neuron in its layer"),
                ("k", pa.int16(), "number of clusters kept"),
                ("log_psi", _f64, "log_psi under preset specific"),
                ("p", _f64, "conjunctive p under preset specific"),
                ("D_p", _f64, "p of D under preset specific"),
                ("q", _f64, "q of p over the variant's scored neurons, by its calibrate.fdr"),
                ("called", pa.bool_(), "q below alpha"),
                ("adjusted_rand", _f64, "of its clusters and the sweep's; null: no example is clustered in both"),
                ("diagnosis", _str, "name-sensitive: prompts or encoder change whether D_p is below 0.05; else null"),
            ),
            ("variant", "neuron"),
        ),
        Table(
            "failures",
            "Everything that cost itself a row.",
            (
                ("stage", _str, "stage"),
                ("unit", _str, "unit of work"),
                ("layer", _str, "layer; null where it does not apply"),
                ("item", _str, "image, patch or neuron"),
                ("item_id", _i64, "its index or id"),
                ("reason", _str, "what happened"),
            ),
            ("stage", "unit", "item", "item_id"),
            by_layer=False,
        ),
    )
}
