"""SparseGPT: weights are removed column after column, and those to the right make up for what is lost.

Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, section 3 and algorithm 1.

Shapes: O out features (of all layers that share an input), I in features, C columns of one lazy block, G of one choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recover.base import console
from recover.base.errors import PruneError
from recover.prune.scores import keep_highest, keep_n_m

COLUMNS = 128  # weights to the right of a lazy block learn of its errors at its end
DAMPING = (0.01, 0.1, 1.0)  # shares of the Hessian's mean diagonal, the next where one does not do

Choose = Callable[[int, Tensor], Tensor]  # first column, scores (G, O) -> which go (G, O)


def inverse_factor(hessian_II: Tensor, where: str) -> Tensor:
    """Upper U (fp32) with U^T U = (H + damping)^-1; damping grows, with a warning, until that exists.

    One factorization in place of the paper's three (inverse by Cholesky, Cholesky of the inverse): with rows and
    columns in reverse order H = L L^T gives H = R R^T, R upper, and U = R^-1. Raises PruneError if no damping does.
    """
    mean = hessian_II.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1.0)  # nothing seen: any damping leaves the weights as they are
    for share in DAMPING:
        reversed_II = hessian_II.flip(0, 1)
        reversed_II.diagonal().add_(mean * share)
        lower_II, failed = torch.linalg.cholesky_ex(reversed_II)
        del reversed_II
        if int(failed) == 0:
            upper_II = lower_II.flip(0, 1)
            del lower_II
            eye_II = torch.eye(len(upper_II), dtype=upper_II.dtype, device=upper_II.device)
            inverse_II = torch.linalg.solve_triangular(upper_II, eye_II, upper=True)
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
                _columns(block_CO, error_CO, scale_GO, factor_CC, first)
        block_CO.masked_fill_(gone_CO, 0)
        if end < columns:
            weight_IO[end:].addmm_(factor_II[start:end, end:].T, error_CO, alpha=-1)
    return ~gone_IO


def _columns(block_CO: Tensor, error_CO: Tensor, scale_GO: Tensor, factor_CC: Tensor, first: int) -> None:
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
        _columns(block_CO, error_CO, scale_CO, factor_CC, 0)  # loads the kernels, which recording may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _columns(block_CO, error_CO, scale_CO, factor_CC, 0)
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
