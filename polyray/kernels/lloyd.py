"""Lloyd's iterations of many runs on many small sets at once, with sums that are exact.

Which question it answers: *which vectors end up together, from these seeds?* Place in the flow: under
`kernels.cluster`. The Gram matrices are rounded to a fixed point so coarse that sums over members are exact in
whatever order a library, a batch or a device takes them, so that a set's result depends on nothing but itself.

Source: Lloyd 1982, "Least squares quantization in PCM", written in inner products.
"""

import math

import torch
from jaxtyping import Int64
from torch import Tensor


def fixed_point(x: Tensor, largest: Tensor, spare: int) -> Tensor:
    """Rounds each set's matrix, in place, to a fixed point: a sum of 2^spare of its entries is exact.

    Nothing then depends on the order in which a library adds them up. The unit is 2^(spare − 53) (float32: 24) of the
    power of two above the set's largest entry.
    """
    _, exponent = torch.frexp(largest)
    # The last digit of a number as large as the carry is the unit: adding it drops everything below.
    carry = torch.ldexp(torch.full_like(largest, 1.5), exponent + (max(spare, 2) - 1)).to(x.dtype)[:, None, None]
    return x.add_(carry).sub_(carry)


def spare_bits(n: int) -> int:
    """Bits by which a sum of n numbers is longer than they are."""
    return math.ceil(math.log2(max(n, 2)))


class Runs:
    """Where the clusters of all runs (a restart of a k) are among the columns of one matrix of memberships.

    Runs are ordered by descending k, so that the runs that have a cluster j are the first `widths[j]`. Columns are
    ordered by cluster, then run: no column is wasted on a cluster that its run does not have, and a reduction over
    the clusters of a run is a few elementwise operations on contiguous blocks.
    """

    def __init__(self, ks: range, n_init: int) -> None:
        self.ks = ks
        self.n_init = n_init
        self.n_runs = len(ks) * n_init
        self.widths = [n_init * sum(k > j for k in ks) for j in range(ks[-1])]
        self.columns = [sum(self.widths[:j]) for j in range(ks[-1])]

    def ks_of_runs(self, device: torch.device) -> Int64[Tensor, " runs"]:
        return torch.tensor([k for k in reversed(self.ks) for _ in range(self.n_init)], device=device)

    def per_column(self, of_run: Tensor) -> Tensor:
        """[G, runs] repeated for every cluster that each run has: [G, columns]."""
        return torch.cat([of_run[:, :width] for width in self.widths], dim=1)


def around_seeds(gram: Tensor, seeds: Tensor, runs: Runs, wanted: Tensor) -> Tensor:
    """Memberships [G, columns, n] of the clusters around the vectors that are the seeds."""
    n_sets, n, _ = gram.shape
    column = [seeds[:, None, :, j].expand(-1, w // runs.n_init, -1).flatten(1) for j, w in enumerate(runs.widths)]
    at = torch.cat(column, dim=1)  # [G, columns]
    norm = gram.diagonal(dim1=1, dim2=2)
    rows = (at + n * torch.arange(n_sets, device=gram.device)[:, None]).flatten()
    score = gram.reshape(-1, n).index_select(0, rows).view(n_sets, at.shape[1], n)
    score.sub_(0.5 * norm.gather(1, at)[:, :, None])
    _assign(score, torch.empty_like(score[:, : runs.n_runs]), norm, wanted, runs)
    return score


def iterate(gram: Tensor, member: Tensor, runs: Runs, wanted: Tensor, max_iter: int) -> tuple[Tensor, Tensor]:
    """Lloyd iterations in the Gram matrix's precision; sets of which no vector moves any more drop out.

    Args:
        gram: fixed-point Gram matrices [G, n, n], entries at most 1.
        member: 1 where a vector is in a cluster, else 0, [G, columns, n].
        runs: what the columns are.
        wanted: whether the set has enough distinct vectors for the k of the column's run, [G, columns].
        max_iter: most iterations.

    Returns:
        Memberships [G, columns, n] and inertia [G, runs].
    """
    n_sets, _, n = member.shape
    norm = gram.diagonal(dim1=1, dim2=2).contiguous()
    final = torch.empty_like(member)
    inertia = torch.empty(n_sets, runs.n_runs, dtype=torch.float64, device=gram.device)
    active = torch.arange(n_sets, device=gram.device)
    # float64 holds sums of products exactly as well. The CPU adds a row up in the same order in every batch, so that
    # it can do without; a GPU does not.
    precise = torch.float64 if gram.is_cuda else gram.dtype
    # Fresh memory costs more than the arithmetic on it: the large tensors take turns.
    score, product, spare = torch.empty_like(member), torch.empty_like(member), torch.empty_like(gram)
    best = torch.empty_like(member[:, : runs.n_runs])
    count = member.sum(2)  # [A, columns]
    for iteration in range(max_iter):
        share = count.clamp(min=1.0).reciprocal_()
        torch.bmm(member, gram, out=score)
        within = torch.mul(member, score, out=product).sum(2, dtype=precise)
        half = within.mul_(share).mul_(share).mul_(0.5).masked_fill_(count == 0, torch.inf).to(score.dtype)
        # <x, c> − |c|² / 2: the larger, the nearer is centre c.
        score.mul_(share[:, :, None]).sub_(half[:, :, None])
        count = _assign(score, best, norm, wanted, runs)
        member, old = score, member
        still = torch.mul(old, member, out=product).sum((1, 2)) == n * runs.n_runs
        if iteration == max_iter - 1:
            still = torch.ones_like(still)
        done = torch.nonzero(still).flatten()
        if len(done):
            where = active[done]
            final[where] = member[done]
            inertia[where] = norm[done].double().sum(1)[:, None] - 2 * best[done].sum(2, dtype=torch.float64)
            left = torch.nonzero(~still).flatten()
            n_left = len(left)
            if not n_left:
                break
            active, norm, count, wanted = active[left], norm[left], count[left], wanted[left]
            spare, gram = gram, torch.index_select(gram, 0, left, out=spare[:n_left])
            old, member = member, torch.index_select(member, 0, left, out=old[:n_left])
            product, best = product[:n_left], best[:n_left]
        score = old[: len(member)]
    return final, inertia


def _assign(score: Tensor, best: Tensor, norm: Tensor, wanted: Tensor, runs: Runs) -> Tensor:
    """Turns scores into memberships in place, and puts the largest score of every run and vector into `best`.

    Returns:
        Sizes of the clusters [G, columns].
    """
    blocks = score.split(runs.widths, dim=1)
    best.copy_(blocks[0])
    for block in blocks[1:]:
        part = best[:, : block.shape[1]]
        torch.maximum(part, block, out=part)
    for block in blocks:
        block.eq_(best[:, : block.shape[1]])
    count = score.sum(2)
    odd = (count.sum(1) != score.shape[2] * runs.n_runs) | ((count == 0) & wanted).any(1)
    where = torch.nonzero(odd).flatten()
    if len(where):  # a set in a hundred
        member = score[where]
        count[where] = _repair(member, norm[where, None] - 2 * best[where], wanted[where], runs)
        score[where] = member
    return count


def _repair(member: Tensor, residual: Tensor, wanted: Tensor, runs: Runs) -> Tensor:
    """Settles in place what is rare: of equally near centres the first wins, and clusters that ran empty are refilled.

    An empty cluster is given the vector farthest from its own centre, unless that is alone in its cluster.

    Returns:
        Sizes of the clusters [G, columns].
    """
    blocks = member.split(runs.widths, dim=1)
    taken = torch.zeros_like(residual)
    for block in blocks:
        part = taken[:, : block.shape[1]]
        block.mul_(1 - part)
        part.add_(block)
    # float32 leaves about this much where a vector is its own centre; float64 takes whatever is farthest.
    least = 2.0**-12 if member.dtype == torch.float32 else -torch.inf
    for _ in blocks:
        count = member.sum(2)
        empty = (count == 0) & wanted
        if not bool(empty.any()):
            break
        which = torch.full(residual.shape[:2], -1, device=member.device)
        company = torch.zeros_like(residual)
        for j in reversed(range(len(blocks))):
            c, w = runs.columns[j], runs.widths[j]
            which[:, :w].masked_fill_(empty[:, c : c + w], j)
            company[:, :w].addcmul_(blocks[j], count[:, c : c + w, None])
        distance, farthest = residual.masked_fill(company < 2, -torch.inf).max(2)
        sets, run = torch.nonzero((which >= 0) & (distance > least), as_tuple=True)
        if not len(sets):
            break
        vector, cluster = farthest[sets, run], which[sets, run]
        residual[sets, run, vector] = -torch.inf  # where it is now it stays
        for j, (c, w) in enumerate(zip(runs.columns, runs.widths, strict=True)):
            has = run < w
            member[sets[has], c + run[has], vector[has]] = (cluster[has] == j).to(member.dtype)
    return member.sum(2)
