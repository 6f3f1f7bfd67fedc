"""What a matrix loses, and how the rest of it makes up for that. Nothing here knows of a model.

Scores and masks of single weights: ties are broken by index, so a mask depends on the scores alone.

SparseGPT (`rewrite`): weights are removed column after column, and those to the right make up for what is lost.
Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, section 3 and algorithm 1.

Optimal Brain Surgeon (`compensate`): units of inputs are removed, and all others make up for them. With X the inputs on
calibration text and H = X^T X + damping, removing the inputs S while the rest of W is free costs at least
tr(W_S (H^-1_SS)^-1 W_S^T) of squared error in the layer's output, and the rest is best at
W - W_S (H^-1_SS)^-1 H^-1_S: . Both are exact for the inputs seen; no text is run again.
Source: Hassibi and Stork, "Second order derivatives for network pruning" (1993); for whole units of a transformer
Kurtic et al., "ZipLM", arXiv 2302.04089, section 3.

Shapes: O out features (of all layers that share an input), I in features, G groups of M consecutive inputs or what is
chosen at once, C columns of one lazy block or inputs of a unit, U units, S removed inputs, K kept units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recover.base import console
from recover.base.errors import PruneError

RANKED_BY_PAIRS = 32  # groups of N:M up to this size are ranked by comparing each pair, in M passes over the scores


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


COLUMNS = 128  # weights to the right of a lazy block learn of its errors at its end
DAMPING = (0.01, 0.1, 1.0)  # shares of the Hessian's mean diagonal, the next where one does not do

Choose = Callable[[int, Tensor], Tensor]  # first column, scores (G, O) -> which go (G, O)


def damped_inverse(hessian_II: Tensor, where: str, *, factor: bool = False) -> Tensor:
    """(H + damping)^-1 in fp32, or with `factor` its upper factor U: U^T U = (H + damping)^-1.

    Damping grows, with a warning, until that exists. U takes one factorization in place of the paper's three (inverse
    by Cholesky, Cholesky of the inverse): with rows and columns in reverse order H = L L^T gives H = R R^T, R upper,
    and U = R^-1. Raises PruneError if no damping does.
    """
    mean = hessian_II.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1.0)  # nothing seen: any damping leaves the weights as they are
    for share in DAMPING:
        damped_II = hessian_II.flip(0, 1) if factor else hessian_II.clone()
        damped_II.diagonal().add_(mean * share)
        found_II, failed = torch.linalg.cholesky_ex(damped_II)
        del damped_II
        if int(failed) == 0:
            if factor:
                found_II = found_II.flip(0, 1)
                eye_II = torch.eye(len(found_II), dtype=found_II.dtype, device=found_II.device)
                inverse_II = torch.linalg.solve_triangular(found_II, eye_II, upper=True)
            else:
                inverse_II = torch.cholesky_inverse(found_II)
            if bool(inverse_II.sum().isfinite()):
                return inverse_II
        if share != DAMPING[-1]:
            console.warn(f"{where}: the Hessian with damping {share} cannot be inverted; ten times as much is tried")
    found = f"the Hessian of its inputs cannot be inverted, even with damping {DAMPING[-1]}"
    raise PruneError(f"{where}: {found}. Use more calibration text, or model.dtype: float32")


def rewrite(
    weight_IO: Tensor, factor_II: Tensor, choose: Choose, *, group: int, step: int, replays: Replays | None = None
) -> Tensor:
    """Prune `weight_IO` (fp32, transposed: a column of W is a row here) in place and give the mask (I, O).

    Left to right: w_i goes where chosen, with error e = w_i / U_ii, and every w_j to the right becomes
    w_j - e U_ij; `choose` sees the scores (w_i / U_ii)^2 of the next `group` columns as they then are. Beyond `step`
    columns, errors are applied at once. `group` divides `step`. `replays` make it faster on a CUDA device.
    """
    if step % group:
        raise AssertionError((step, group))
    columns = len(weight_IO)
    gone_IO = torch.zeros_like(weight_IO, dtype=torch.bool)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block_CO, gone_CO = weight_IO[start:end], gone_IO[start:end]
        factor_CC = factor_II[start:end, start:end]
        inverse_C1 = factor_CC.diagonal().reciprocal().unsqueeze(1)
        error_CO = torch.empty_like(block_CO)
        for first in range(0, end - start, group):
            chosen = slice(first, min(first + group, end - start))
            gone_CO[chosen] = choose(start + first, (block_CO[chosen] * inverse_C1[chosen]).square())
            scale_GO = gone_CO[chosen] * inverse_C1[chosen]
            if replays is not None and group == end - start:
                replays.columns(block_CO, error_CO, scale_GO, factor_CC)
            else:
                _correct_columns(block_CO, error_CO, scale_GO, factor_CC, first)
        block_CO.masked_fill_(gone_CO, 0)
        if end < columns:
            weight_IO[end:].addmm_(factor_II[start:end, end:].T, error_CO, alpha=-1)
    return ~gone_IO


def _correct_columns(block_CO: Tensor, error_CO: Tensor, scale_GO: Tensor, factor_CC: Tensor, first: int) -> None:
    """Take the error of each column in turn off those to its right; two kernels a column, nothing else."""
    rows, errors, factors = block_CO.unbind(), error_CO.unbind(), factor_CC.unbind()
    for column, scale_O in enumerate(scale_GO.unbind(), first):
        torch.mul(rows[column], scale_O, out=errors[column])
        block_CO[column + 1 :].addr_(factors[column][column + 1 :], errors[column], alpha=-1)


class Replays:
    """`_columns` as CUDA graphs, one a shape: launching its kernels from Python takes longer than they do."""

    def __init__(self) -> None:
        self.recorded: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    def columns(self, block_CO: Tensor, error_CO: Tensor, scale_CO: Tensor, factor_CC: Tensor) -> None:
        """As `_columns` for a whole lazy block."""
        given = (block_CO, error_CO, scale_CO, factor_CC)
        shape = (block_CO.shape[0], block_CO.shape[1])
        if shape not in self.recorded:
            self.recorded[shape] = self._record(given)
        graph, held = self.recorded[shape]
        for place, tensor in zip(held, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        block_CO.copy_(held[0])
        error_CO.copy_(held[1])

    def _record(self, given: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        held = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in given)
        block_CO, error_CO, scale_CO, factor_CC = held
        _correct_columns(block_CO, error_CO, scale_CO, factor_CC, 0)  # loads the kernels, which recording may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _correct_columns(block_CO, error_CO, scale_CO, factor_CC, 0)
        return graph, held


def choose_n_m(n: int, m: int) -> Choose:
    """Of each row's next `m` columns all but the `n` highest go."""
    return lambda _start, score_GO: ~keep_n_m(score_GO.T, n, m).T


def choose_share(fraction: float, inputs: int, sizes: list[int]) -> Choose:
    """Of each layer (`sizes` are their numbers of rows) the lowest of the group's scores, in all rows together.

    round(fraction * O * I) entries of a layer in all, spread evenly over the groups.
    """

    def choose(start: int, score_GO: Tensor) -> Tensor:
        gone = []
        for score in score_GO.split(sizes, dim=1):
            total = round(fraction * inputs * score.shape[1])
            count = total * (start + len(score)) // inputs - total * start // inputs
            gone.append(~keep_highest(score.reshape(1, -1), count).view(score.shape))
        return torch.cat(gone, dim=1)

    return choose


ROUNDS = 32  # in which units go, each with scores of what is left then


class Compensated(NamedTuple):
    """Which units stay (K, ascending), the whole weight (O, I) with zeros at the inputs that go, and the squared error.

    `error` and `error_plain` are shares of the output's own square, with what is left rewritten and as it was.
    """

    kept_K: Tensor
    weight_OI: Tensor
    error: float
    error_plain: float


@torch.no_grad()
def compensate(
    weight_OI: Tensor, gram_II: Tensor, units: int, left: int, kept_K: Tensor | None = None, where: str = ""
) -> Compensated:
    """Of `units` equal runs of inputs `left` stay: these, or with `kept_K` None those that cost most to remove.

    `gram_II`: X^T X of the inputs, fp32, on the device to compute on. Raises PruneError as `damped_inverse` does.
    """
    dense_OI = weight_OI.detach().to(gram_II.device, torch.float32)
    inverse_II = damped_inverse(gram_II, where)
    new_OI = dense_OI.clone()
    stay_U = torch.ones(units, dtype=torch.bool, device=gram_II.device)
    if kept_K is not None:
        stay_U.fill_(False)[kept_K.to(stay_U.device)] = True
        _remove_units((~stay_U).nonzero().squeeze(1), new_OI, inverse_II, units)
    else:
        for count in _rounds(units - left):
            score_U = _unit_scores(new_OI, inverse_II, units).masked_fill_(~stay_U, torch.inf)
            gone_G = torch.argsort(score_U, stable=True)[:count]
            _remove_units(gone_G, new_OI, inverse_II, units)
            stay_U[gone_G] = False
    plain_OI = dense_OI * stay_U.repeat_interleave(dense_OI.shape[1] // units)
    whole = _output_square(dense_OI, gram_II)
    errors = [_output_square(found_OI - dense_OI, gram_II) / whole if whole else 0.0 for found_OI in (new_OI, plain_OI)]
    return Compensated(stay_U.nonzero().squeeze(1).cpu(), new_OI, *errors)


def _rounds(gone: int) -> list[int]:
    """How many units go in each round; the same in each, at least one."""
    rounds = min(ROUNDS, gone)
    return [gone * (number + 1) // rounds - gone * number // rounds for number in range(rounds)]


def _unit_scores(weight_OI: Tensor, inverse_II: Tensor, units: int) -> Tensor:
    """(U,) What removing each unit alone costs, if all others make up for it."""
    weight_UOC = weight_OI.unflatten(1, (units, -1)).transpose(0, 1)
    size = weight_UOC.shape[2]
    if size == 1:
        return weight_OI.square().sum(0) / inverse_II.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
    blocks_UCC = torch.stack([inverse_II[at : at + size, at : at + size] for at in range(0, units * size, size)])
    # Of units that are gone, rows and columns of the inverse are zero: their scores are not looked at.
    blocks_UCC.diagonal(dim1=1, dim2=2).clamp_min_(torch.finfo(torch.float32).tiny)
    solved_UCO = torch.linalg.solve(blocks_UCC, weight_UOC.transpose(1, 2))
    return (weight_UOC.transpose(1, 2) * solved_UCO).sum((1, 2))


def _remove_units(gone_G: Tensor, weight_OI: Tensor, inverse_II: Tensor, units: int) -> None:
    """Take units out in place: the rest of the weight makes up for them, and H^-1 becomes the inverse for the rest."""
    if not len(gone_G):
        return
    size = weight_OI.shape[1] // units
    at_S = (gone_G.unsqueeze(1) * size + torch.arange(size, device=gone_G.device)).flatten()
    rows_SI = inverse_II[at_S]
    factor_SS = torch.linalg.cholesky(rows_SI[:, at_S])
    solved_SI = torch.cholesky_solve(rows_SI, factor_SS)
    weight_OI -= weight_OI[:, at_S] @ solved_SI
    inverse_II -= rows_SI.T @ solved_SI
    weight_OI[:, at_S] = 0
    inverse_II[at_S] = 0
    inverse_II[:, at_S] = 0


def _output_square(weight_OI: Tensor, gram_II: Tensor) -> float:
    """||W X||^2."""
    return float(((weight_OI @ gram_II) * weight_OI).sum(dtype=torch.float64))
