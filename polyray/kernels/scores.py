"""Q and D: do clusters follow class labels, and do their names mean different things?

Place in the flow: cluster, and every null draw. Source: arXiv 2508.16950, sections 3.4 and 3.5.
"""

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

_CHUNK_ELEMENTS = 8_000_000
"""Contingency cells in flight: bounds the working memory to about 150 MB."""


def _n_log_n(n: int, device: torch.device) -> Float64[Tensor, " m"]:
    counts = torch.arange(n + 1, dtype=torch.float64, device=device)
    return torch.xlogy(counts, counts)


def _nmi_from_sums(joint: Tensor, a: Tensor, b: Tensor, n: int) -> Tensor:
    """NMI from Σ c log c over the cells and both margins; entropy = log n − Σ c log c / n."""
    log_n = torch.log(torch.tensor(float(n), dtype=torch.float64))
    h_a, h_b = log_n - a / n, log_n - b / n
    mutual = log_n + (joint - a - b) / n
    mean = (h_a + h_b) / 2
    informative = (h_a > 1e-12) & (h_b > 1e-12)
    return torch.where(informative, mutual / mean.clamp(min=1e-12), 0.0).clamp(0.0, 1.0)


def _codes(labels: Int[Tensor, " n"]) -> tuple[Int64[Tensor, " n"], int]:
    """Labels as 0 … L−1, and L."""
    values, codes = torch.unique(labels, return_inverse=True)
    return codes, len(values)


def nmi(a: Int[Tensor, "G n"], b: Int[Tensor, "G n"]) -> Float64[Tensor, " G"]:
    """Normalised mutual information (arithmetic mean of the entropies) of two labelings of each row.

    Returns:
        0 to 1; 0 where either side has a single label (there is nothing to agree on), and for rows of length 0.
    """
    if a.shape[1] == 0:
        return torch.zeros(len(a), dtype=torch.float64, device=a.device)
    return permuted_nmi(a, b, torch.arange(a.shape[1], device=a.device)[None, :])[:, 0]


def permuted_nmi(
    clusters: Int[Tensor, "G n"], labels: Int[Tensor, "G n"], permutations: Int64[Tensor, "B n"]
) -> Float64[Tensor, "G B"]:
    """NMI of clusters and permuted labels, for every row and permutation.

    Args:
        clusters: cluster of every example.
        labels: class label of every example, any integers.
        permutations: permutations of 0 … n−1, the same for all rows.

    Returns:
        float64 [G, B] as `nmi`. Permuting the labels or the clusters gives the same distribution; the clusters are
        permuted here because they are fewer.
    """
    n_rows, n = clusters.shape
    n_draws = len(permutations)
    table = _n_log_n(n, clusters.device)
    out = torch.empty(n_rows, n_draws, dtype=torch.float64, device=clusters.device)
    inverse = torch.argsort(permutations, dim=1)  # labels[perm] against clusters = labels against clusters[inverse]
    for g in range(n_rows):
        c, n_c = _codes(clusters[g])
        y, n_y = _codes(labels[g])
        one_hot = torch.nn.functional.one_hot(y, n_y).float()  # [n, L]
        of_c, of_y = (table[torch.bincount(m)].sum() for m in (c, y))
        width = max(1, _CHUNK_ELEMENTS // (n_c * max(n, n_y)))
        for b in range(0, n_draws, width):
            member = torch.nn.functional.one_hot(c[inverse[b : b + width]], n_c).float()  # [b, n, C]
            cells = member.transpose(1, 2).reshape(-1, n) @ one_hot  # [b·C, L], whole numbers
            joint = table[cells.round().long()].view(-1, n_c * n_y).sum(1)
            out[g, b : b + width] = _nmi_from_sums(joint, of_c, of_y, n)
    return out


def center_distance(gram: Float[Tensor, "G n n"], labels: Int[Tensor, "G n"]) -> Float64[Tensor, " G"]:
    """1 − cosine between the centres of two clusters: the polysemanticity score of Dreyer et al. 2025 on 2-means.

    Args:
        gram: inner products within each set.
        labels: 0 or 1; other values belong to neither cluster.

    Returns:
        0 to 2; NaN where a cluster is empty or its centre is zero.

    Source: "Mechanistic understanding and validation of large AI models with SemanticLens" (2025), polysemanticity.
    """
    member = torch.stack([labels == 0, labels == 1], dim=1).double()  # [G, 2, n]
    inner = member @ gram.double() @ member.transpose(1, 2)
    a, b, across = inner[:, 0, 0], inner[:, 1, 1], inner[:, 0, 1]
    norm = (a.clamp(min=0) * b.clamp(min=0)).sqrt()
    return torch.where(norm > 0, 1.0 - across / norm.clamp(min=1e-300), torch.nan)


def name_clusters(
    text: Float[Tensor, "G n t"],
    labels: Int[Tensor, "G n"],
    n_clusters: int,
    vocabulary: Float[Tensor, "V t"],
    top: int = 1,
) -> tuple[Int64[Tensor, "G c top"], Float[Tensor, "G c top"]]:
    """The prompts nearest to each cluster's mean text-aligned vector.

    Args:
        text: text-aligned unit vectors of every example.
        labels: cluster of every example; negative ones belong to no cluster.
        n_clusters: number of clusters.
        vocabulary: unit text embeddings of the prompts.
        top: how many prompts, at most V.

    Returns:
        Indices into the vocabulary and their cosines, nearest first; −1 and NaN for an empty cluster. Of equal
        prompts the first wins.
    """
    member = (labels[:, None, :] == torch.arange(n_clusters, device=labels.device)[None, :, None]).to(text.dtype)
    total = member @ text  # [G, c, t]
    mean = torch.nn.functional.normalize(total, dim=-1)
    # One product a set: a single large one would round differently in batches of another size.
    cosine = torch.bmm(mean, vocabulary.to(text.dtype).T.expand(len(mean), -1, -1))
    if top == 1:
        value, index = cosine.max(-1, keepdim=True)
    else:
        index = torch.argsort(cosine, dim=-1, descending=True, stable=True)[..., :top]
        value = cosine.gather(-1, index)
    empty = (member.sum(-1) == 0)[..., None]
    return torch.where(empty, -1, index), torch.where(empty, torch.nan, value)


def name_distance(index: Int64[Tensor, "G k"], similarity: Float[Tensor, "V V"]) -> Float64[Tensor, " G"]:
    """D: mean over pairs of clusters of 1 − cosine between their names.

    Args:
        index: name of each cluster; −1 for none.
        similarity: cosines between the prompts' text embeddings.

    Returns:
        0 to 2; 0 where two clusters of the same name are all there is, or fewer than two names.
    """
    named = index >= 0
    safe = index.clamp(min=0)
    distance = 1.0 - similarity[safe[:, :, None], safe[:, None, :]].double()
    k = index.shape[1]
    upper = torch.ones(k, k, dtype=torch.bool, device=index.device).triu(1)
    pair = named[:, :, None] & named[:, None, :] & upper
    same = safe[:, :, None] == safe[:, None, :]
    total = torch.where(pair & ~same, distance, 0.0).sum((1, 2))
    return total / pair.sum((1, 2)).clamp(min=1)
