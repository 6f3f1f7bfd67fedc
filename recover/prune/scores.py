"""Pruning scores and the masks they give; ties are broken by index, so a mask depends on the scores alone.

Shapes: N tokens, D width, O out features, I in features, G groups of M consecutive inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recover.base.errors import PruneError

RANKED_BY_PAIRS = 32  # groups of N:M up to this size are ranked by comparing each pair, in M passes over the scores


def cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """cos(a, b) of each row within [-1, 1], in fp64 (in bf16 every 1 - cos near 0 is 0); a zero row gives 0."""
    a_ND, b_ND = a_ND.double(), b_ND.double()
    norms_N = a_ND.norm(dim=-1) * b_ND.norm(dim=-1)
    return ((a_ND * b_ND).sum(-1) / norms_N.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)


def angular_distance(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """arccos(cos(h_in, h_out)) / pi of each row, in [0, 1]; a span of blocks is scored by the mean over tokens.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2. They
    look at the last token of each sample only; the mean over all tokens is steadier on the few samples used here.
    """
    return cosine(h_in_ND, h_out_ND).acos() / math.pi


def block_influence(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """1 - cos(h_in, h_out) of each row, in [0, 2]; a block is scored by the mean over tokens.

    Source: Men et al., "ShortGPT", arXiv 2403.03853, equation 1.
    """
    return 1 - cosine(h_in_ND, h_out_ND)


def magnitude_score(weight_OI: Tensor) -> Tensor:
    """|W|, in fp32."""
    return weight_OI.float().abs()


def wanda_score(weight_OI: Tensor, norm_I: Tensor) -> Tensor:
    """|W_oi| * ||x_i||, in fp32, where ||x_i|| is the L2 norm of input feature i over all calibration tokens.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, equation
    1; scores are compared within an output row (section 3), which `keep_unstructured` and `keep_n_m` do.
    """
    return weight_OI.float().abs() * norm_I.float()


def keep_unstructured(score_OI: Tensor, fraction: float) -> Tensor:
    """A mask (true = survives) with exactly round(fraction * I) zeros in every output row.

    The lowest scores go, on ties the lowest index.
    """
    return keep_highest(score_OI, round(fraction * score_OI.shape[1]))


def keep_highest(score_OI: Tensor, gone: int) -> Tensor:
    """A mask with exactly `gone` zeros in every row: the lowest scores, on ties the lowest index.

    Selection and not sorting, and nothing waits for the device: a threshold a row, then ties by counting.
    """
    if gone == 0:
        return torch.ones_like(score_OI, dtype=torch.bool)
    if score_OI.shape[0] == 1:  # one long row: a parallel sort beats the selection, which runs row by row
        threshold_O1 = score_OI.sort(dim=1).values[:, gone - 1 : gone]
    else:
        threshold_O1 = score_OI.kthvalue(gone, dim=1, keepdim=True).values
    below_OI = score_OI < threshold_O1
    tied_OI = score_OI == threshold_O1
    room_O1 = gone - below_OI.sum(1, keepdim=True, dtype=torch.int32)
    return ~(below_OI | (tied_OI & (tied_OI.cumsum(1, dtype=torch.int32) <= room_O1)))


def keep_n_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """A mask that keeps exactly `n` of every `m` consecutive inputs: the highest scores, on ties the highest index.

    Raises PruneError when `m` does not divide the number of inputs.
    """
    out_features, in_features = score_OI.shape
    if in_features % m:
        raise PruneError(f"pattern {n}:{m} needs whole groups of {m} inputs, found {in_features}: use 'unstructured'")
    score_OGM = score_OI.reshape(out_features, in_features // m, m)
    if m > RANKED_BY_PAIRS:
        return keep_highest(score_OGM.reshape(-1, m), m - n).reshape(out_features, in_features)
    rank_OGM = torch.zeros_like(score_OGM, dtype=torch.uint8)  # how many of its group an entry beats
    for other in range(m):
        score_OG1 = score_OGM[..., other : other + 1]
        rank_OGM += score_OGM > score_OG1
        rank_OGM[..., other + 1 :] += score_OGM[..., other + 1 :] == score_OG1
    return (rank_OGM >= m - n).reshape(out_features, in_features)
