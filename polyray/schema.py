"""What the dataset holds: every table's columns, their unit, and what a null in them means.

Which question it answers: *what does this column say?* Place in the flow: a leaf; `store.py` writes nothing that is
not described here. A missing number is a null, never 0 or −1. `VERSION` is part of every run_id.
"""

import pyarrow as pa

from polyray.studies import CONTRASTS as CONTRASTS
from polyray.studies import STUDIES
from polyray.studies import SWAP_CONDITIONS as SWAP_CONDITIONS
from polyray.studies import SWAP_SHOWN as SWAP_SHOWN
from polyray.table import Table, f32, f64, half_vector, i32, i64, text
from polyray.text_tables import TEXT_TABLES

VERSION = 4

PRESETS = ("paper", "selective", "specific")
COMPONENTS = ("S", "Q", "D")
NULL_KINDS = ("rotation", "pool", "one_concept")
PLANTED_KINDS = ("mono", "order2", "order3", "siblings", "unequal", "noise")
"""Planted neurons: one class; two or three classes far apart in text space; two near ones; two, one of them rarer; none
at all."""
PLANTED_BALANCE = 0.5
"""Least balance at which a planted neuron counts as pure in several classes: one that shows one class alone is no such
one."""
SHARED_LAYER = "_shared"
"""Value of `layer` for null draws that depend on no layer."""


_BOX = tuple(
    (c, i32, f"{d} of the box in pixels of the subject's input, or tokens of the document; right and bottom exclusive")
    for c, d in (("x0", "left"), ("y0", "top"), ("x1", "right"), ("y1", "bottom"))
)

_RAW = (
    ("S", f64, "mean silhouette of the kept clustering, −1 to 1; null where not scored"),
    ("k", pa.int16(), "number of clusters kept; null where not scored"),
    ("Q", f64, "normalised mutual information of clusters and labels, 0 to 1; null where not scored"),
    ("Q_mean", f64, "mean of Q under permuted labels; null where not scored"),
    ("Q_std", f64, "standard deviation of Q under permuted labels; null where not scored"),
    ("Q_p", f64, "one-sided (b+1)/(n+1) of Q under n = min(B, 1000) label permutations; null where not scored"),
    ("two_means", f64, "1 − cosine between the centres of two clusters, 0 to 2 (a baseline); null where not scored"),
    ("D", f64, "mean 1 − cosine between the cluster names' text embeddings; null where not scored"),
)  # fmt: skip


def _compared(component: str, preset: str) -> str:
    return "Q's permutation z" if component == "Q" and preset != "paper" else component


def _calibrated() -> tuple[tuple[str, pa.DataType, str], ...]:
    columns: list[tuple[str, pa.DataType, str]] = []
    for preset in PRESETS:
        for c in COMPONENTS:
            columns += [
                (f"{preset}_{c}_mean", f64, f"mean of {_compared(c, preset)} over the null draws of preset {preset}"),
                (f"{preset}_{c}_std", f64, f"standard deviation of {_compared(c, preset)} over the same draws"),
                (f"{preset}_{c}_z", f64, f"z of {c} against preset {preset}; 0 where the null is constant"),
                (f"{preset}_{c}_hat", f64, f"sigmoid of {preset}_{c}_z, 0 to 1"),
                (f"{preset}_{c}_p", f64, f"one-sided (b+1)/(n+1) of {c} against the n draws of preset {preset}"),
            ]
        columns += [
            (f"{preset}_log_psi", f64, "sum of log sigmoid(z) over S, Q, D; at most 0; 3 log 0.5 at chance"),
            (f"{preset}_psi", f64, "product of the three hats, 0 to 1; 0.125 at chance"),
            (f"{preset}_p", f64, "conjunctive p: the largest of the three (super-uniform under the null)"),
        ]
    return tuple(columns)


_STATUS = (
    ("status", text, "ok, excluded or failed"),
    ("reason", text, "why it was excluded, failed or not calibrated; else null"),
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        Table(
            "images",
            "One row per image of the probe set, or document of the corpus: what all tables call an image.",
            (
                ("example", i32, "index of the image in the probe set"),
                ("name", text, "file name or row of the image in its probe set"),
                ("label", text, "class label"),
                *_STATUS,
                ("width_px", i32, "width as decoded, or tokens of the document; null where unreadable"),
                ("height_px", i32, "height as decoded, 1 of a document; null where unreadable"),
                (
                    "pixel_hash",
                    text,
                    "BLAKE2 of the decoded RGB pixels, or of the document's text without regard to case and spacing; "
                    "null where unreadable",
                ),
                ("mean_red", f64, "mean of the decoded pixels' red, 0 to 255; null where unreadable and of a document"),
                ("mean_green", f64, "of their green"),
                ("mean_blue", f64, "of their blue"),
            ),
            ("example",),
            by_layer=False,
        ),
        Table(
            "layers",
            "One row per layer that is swept.",
            (
                ("layer", text, "name of the layer"),
                ("depth", i32, "order in the forward pass, from 0"),
                ("n_neurons", i32, "neurons that are swept"),
                ("width", i32, "neurons that the layer has"),
                ("layout", text, "nchw, nhwc, tokens or vector"),
                ("grid_h", i32, "positions from top to bottom"),
                ("grid_w", i32, "positions from left to right; null where they are the tokens of a document"),
                ("activation", text, "function the read-out ends in; null where it is linear"),
                ("ranked_by", text, "response, or pre_activation where the activation saturates"),
                ("window", text, "effective or theoretical; of documents: before or around the peak"),
                ("side_px", i32, "side of the embedded box in pixels of the subject's input, or tokens of a snippet"),
                ("swap_side_px", i32, "side of the swapped box in pixels of the subject's input; null of documents"),
                ("receptive_px", i32, "side of the theoretical receptive field; null where it is the whole image"),
                ("center_x_px", f64, "centre of the box of position (0, 0), horizontally"),
                ("center_y_px", f64, "centre of the box of position (0, 0), vertically"),
                ("stride_px", f64, "pixels between neighbouring positions"),
            ),
            ("layer",),
            by_layer=False,
        ),
        Table(
            "mine_parts",
            "What one range of images contributes: one row per neuron.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                ("n_images", i32, "images whose response was finite"),
                ("n_nonfinite", i32, "images whose response was NaN or infinite"),
                ("n_positive", i32, "images with response above 0"),
                ("total", f64, "sum of the finite responses"),
                ("total_sq", f64, "sum of the squares of the finite responses"),
                ("minimum", f32, "smallest finite response; null where there is none"),
                ("maximum", f32, "largest finite response; null where there is none"),
                ("n_equal_cut", i32, "images of the range, left out, whose response equals the last one kept"),
                ("bins", pa.list_(i32), "counts of responses in the fixed bins of kernels.topk"),
                ("example", pa.list_(i32), "images kept, best first; with mine.band all images that count"),
                ("response", pa.list_(f32), "their responses, descending"),
                ("position", pa.list_(i32), "raster index of their peak positions"),
            ),
            ("neuron",),
        ),
        Table(
            "mined",
            "Top examples over the whole probe set: one row per neuron.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                *_STATUS,
                (
                    "n_tied_at_cut",
                    i32,
                    "images whose response equals that of the K-th; 1 without ties; null with mine.band",
                ),
                (
                    "example",
                    pa.list_(i32),
                    "images kept (at most K_keep), best first; with mine.band in order of hash",
                ),
                ("response", pa.list_(f32), "their responses, descending; with mine.band in no order"),
                ("position", pa.list_(i32), "raster index of their peak positions"),
            ),
            ("neuron",),
        ),
        Table(
            "histograms",
            "Distribution of every neuron's responses over the probe set.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                ("n_images", i32, "images whose response was finite"),
                ("n_nonfinite", i32, "images whose response was NaN or infinite"),
                ("positive_frac", f64, "share of images with response above 0; null without a finite response"),
                ("mean", f64, "mean response; null without a finite response"),
                ("std", f64, "standard deviation of the response; null without a finite response"),
                ("minimum", f32, "smallest finite response; null where there is none"),
                ("maximum", f32, "largest finite response; null where there is none"),
                ("bins", pa.list_(i32), "counts of responses in the fixed bins of kernels.topk"),
            ),
            ("neuron",),
        ),
        Table(
            "pool_peaks",
            "Where a random neuron of the layer peaks in each image drawn for the pool.",
            (
                ("example", i32, "image"),
                ("neuron", i32, "uniformly drawn neuron of the layer"),
                ("position", i32, "raster index of its peak in the image"),
            ),
            ("example",),
        ),
        Table(
            "pool",
            "Patches that stand for the layer: distinct images, each at the peak of a random neuron.",
            (
                ("pool_idx", i32, "index in the pool"),
                ("example", i32, "image"),
                ("neuron", i32, "neuron whose peak was taken"),
                ("position", i32, "raster index of the peak"),
                ("label", text, "class label of the image"),
                ("patch_id", i64, "patch"),
            ),
            ("pool_idx",),
        ),
        Table(
            "patches",
            "Every distinct (image, box) once, filed under the first layer that needs it.",
            (("patch_id", i64, "identity of the patch in the sweep"), ("example", i32, "image"), *_BOX),
            ("patch_id",),
        ),
        Table(
            "embeddings",
            "What the encoder gives for every patch, as it comes (not normalised).",
            (
                ("patch_id", i64, "patch"),
                ("geometry", half_vector, "vector for S and the clusters"),
                ("text", half_vector, "text-aligned vector for names and D; null where it is the geometry vector"),
            ),
            ("patch_id",),
        ),
        Table(
            "vocabulary",
            "The prompts that clusters are named by.",
            (
                ("prompt_idx", i32, "index of the prompt"),
                ("prompt", text, "the prompt as listed"),
                ("embedding", pa.list_(f32), "unit text embedding"),
            ),
            ("prompt_idx",),
            by_layer=False,
        ),
        Table(
            "examples",
            "The examples that a neuron keeps: one row per neuron and rank.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                ("rank", i32, "0 is the largest response; with mine.band: the smallest hash"),
                ("example", i32, "image"),
                ("activation", f32, "response by which the image was ranked"),
                ("position", i32, "raster index of the peak"),
                *_BOX,
                ("label", text, "class label of the image"),
                ("patch_id", i64, "patch"),
                ("cluster", pa.int16(), "cluster, from 0; null where the example is beyond those clustered"),
            ),
            ("neuron", "rank"),
        ),
        Table(
            "clusters",
            "The clusters of every scored neuron.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                ("cluster", pa.int16(), "from 0, largest first"),
                ("size", i32, "examples in the cluster"),
                ("name", text, "prompt nearest to the mean of the text-aligned vectors"),
                ("name_score", f64, "cosine of the name with that mean, −1 to 1"),
                ("names", pa.list_(text), "the five nearest prompts, nearest first"),
                ("label", text, "most frequent class label"),
                ("label_frac", f64, "share of the cluster with that label"),
                ("prototypes", pa.list_(i64), "patches nearest to the cluster's centre, nearest first"),
                ("thumbnails", pa.list_(pa.binary()), "64 px JPEGs of the prototypes; null where switched off"),
                (
                    "snippets",
                    pa.list_(text),
                    "texts of the prototypes, the peak between « and »; null of images and where switched off",
                ),
            ),
            ("neuron", "cluster"),
        ),
        Table(
            "scores",
            "Raw scores, before calibration, of neurons and of null neurons.",
            (
                ("kind", text, "real, or the kind of null neuron: rotation, pool, one_concept"),
                ("neuron", i32, "index of the neuron in its layer; of a null neuron: of the neuron it stands beside"),
                *_STATUS,
                ("n_used", i32, "examples clustered"),
                ("n_labels", i32, "distinct labels among them"),
                *_RAW,
            ),
            ("kind", "neuron"),
        ),
        Table(
            "nulls",
            "Null draws, each scored as a neuron is; drawn once for what they depend on.",
            (
                ("kind", text, "rotation, pool, one_concept or shuffle_text; permute_dims where asked for"),
                ("n_used", i32, "examples in the draw; null for shuffle_text"),
                ("draw", i32, "index of the draw"),
                ("S", f64, "mean silhouette of the kept clustering; null for shuffle_text"),
                ("k", pa.int16(), "number of clusters kept; for shuffle_text: number of names"),
                ("Q", f64, "NMI of clusters and labels; null but for pool and one_concept"),
                ("Q_z", f64, "z of Q under permuted labels; null but for pool and one_concept"),
                ("D", f64, "name distance of the kept clusters; of random names for shuffle_text; else null"),
            ),
            ("kind", "n_used", "k", "draw"),
        ),
        Table(
            "neurons",
            "One row per neuron: raw, null mean and std, z, hat, p of each component, log_psi of each preset.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                ("status", text, "ok, excluded or failed"),
                ("reason", text, "why it was excluded or failed, or is ok but has no p; else null"),
                ("ranked_by", text, "response, or pre_activation where the activation saturates"),
                ("n_examples", i32, "examples that count; null where the neuron could not be mined"),
                (
                    "n_tied_at_cut",
                    i32,
                    "images whose response equals that of the K-th; 1 without ties; null with mine.band",
                ),
                ("n_used", i32, "examples clustered; null where not scored"),
                ("n_labels", i32, "distinct labels among them; null where not scored"),
                *_RAW,
                *_calibrated(),
            ),
            ("neuron",),
        ),
        Table(
            "null_neurons",
            "Null neurons of each kind beside the scored neurons (one for each anchor at most), calibrated alike.",
            (
                ("kind", text, "rotation, pool or one_concept"),
                ("neuron", i32, "index of the neuron that it stands beside"),
                ("n_used", i32, "examples clustered"),
                *_RAW,
                *_calibrated(),
            ),
            ("kind", "neuron"),
        ),
        Table(
            "neuron_summary",
            "What needs the whole sweep: one row per neuron.",
            (
                ("neuron", i32, "index of the neuron in its layer"),
                (
                    "q",
                    f64,
                    "q of specific_p over all calibrated neurons, as calibrate.fdr says; null without p",
                ),
                ("called", pa.bool_(), "q below alpha; null where q is"),
                ("diagnosis", text, "named pattern, several separated by '; '; null where none applies"),
            ),
            ("neuron",),
        ),
        Table(
            "layer_summary",
            "What holds for a layer, one row per figure.",
            (
                ("layer", text, "name of the layer; null for the whole sweep"),
                ("metric", text, "what the figure is"),
                ("preset", text, "preset; null where it does not apply"),
                ("null_kind", text, "kind of null neuron; null where it does not apply"),
                ("score", text, "log_psi or an ablation (S, Q, D, S*Q); null where it does not apply"),
                ("value", f64, "the figure; null where it cannot be computed"),
                ("low", f64, "lower end of the 95 % interval; null where there is none"),
                ("high", f64, "upper end of the 95 % interval; null where there is none"),
                ("n", i32, "neurons behind the figure"),
            ),
            ("layer", "metric", "preset", "null_kind", "score"),
            by_layer=False,
        ),
        *STUDIES,
        *TEXT_TABLES,
        Table(
            "failures",
            "Everything that cost itself a row.",
            (
                ("stage", text, "stage"),
                ("unit", text, "unit of work"),
                ("layer", text, "layer; null where it does not apply"),
                ("item", text, "image, patch or neuron"),
                ("item_id", i64, "its index or id"),
                ("reason", text, "what happened"),
            ),
            ("stage", "unit", "item", "item_id"),
            by_layer=False,
        ),
    )
}
