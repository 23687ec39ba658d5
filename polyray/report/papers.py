"""Papers: the numbers that a census is held against, each with its source.

Place in the flow: a leaf; the report shows them beside the dataset's own. They were taken on other networks, probe sets
and encoders than a census of yours, so that a difference is no failure to reproduce.
"""

PSI = "arXiv 2508.16950"
"""Null-calibrated Polysemanticity Index: ResNet-50, Tiny-ImageNet, CLIP ViT-B/32, 1,602 prompts, layer3 and layer4."""
PSI_SETTING = "ResNet-50, Tiny-ImageNet, CLIP ViT-B/32"
PSI_AUROC = "0.987 (layer4)"
PSI_DEPTH = "layer4 above layer3"
PSI_SWAP = "+0.15"
PSI_TEXT_HEAD = "about 0.21"

CATEGORICAL = "arXiv 2505.07831"
"""Categorical vector spaces of neurons: GPT2-XL, MLP layers 0 and 1."""
CATEGORICAL_SETTING = "GPT2-XL, second MLP layer"
CATEGORICAL_QUALIFY = "614 neurons"
CATEGORICAL_POSITIVE = "78.01 %"
CATEGORICAL_TAU = "0.78 to 0.85"
CATEGORICAL_FIRST = "93.5 %"
