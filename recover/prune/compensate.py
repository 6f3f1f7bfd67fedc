"""Units of a linear's inputs are removed, and the others make up for them: Optimal Brain Surgeon.

With X the inputs on calibration text and H = X^T X + damping, removing the inputs S while the rest of W is free costs
at least tr(W_S (H^-1_SS)^-1 W_S^T) of squared error in the layer's output, and the rest is best at
W - W_S (H^-1_SS)^-1 H^-1_S: . Both are exact for the inputs seen; no text is run again.

Source: Hassibi and Stork, "Second order derivatives for network pruning" (1993); for whole units of a transformer
Kurtic et al., "ZipLM", arXiv 2302.04089, section 3.

Shapes: O out features, I in features, U units, C inputs of a unit, S removed inputs, K kept units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recover.base.errors import PruneError

ROUNDS = 32  # in which units go, each with scores of what is left then
DAMPING = 0.01  # of the mean of H's diagonal, as in SparseGPT


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

    `gram_II`: X^T X of the inputs, fp32, on the device to compute on. Raises PruneError where H has no inverse.
    """
    dense_OI = weight_OI.detach().to(gram_II.device, torch.float32)
    inverse_II = _inverse(gram_II, where)
    new_OI = dense_OI.clone()
    stay_U = torch.ones(units, dtype=torch.bool, device=gram_II.device)
    if kept_K is not None:
        stay_U.fill_(False)[kept_K.to(stay_U.device)] = True
        _remove((~stay_U).nonzero().squeeze(1), new_OI, inverse_II, units)
    else:
        for count in _rounds(units - left):
            score_U = _scores(new_OI, inverse_II, units).masked_fill_(~stay_U, torch.inf)
            gone_G = torch.argsort(score_U, stable=True)[:count]
            _remove(gone_G, new_OI, inverse_II, units)
            stay_U[gone_G] = False
    plain_OI = dense_OI * stay_U.repeat_interleave(dense_OI.shape[1] // units)
    whole = _square(dense_OI, gram_II)
    errors = [_square(found_OI - dense_OI, gram_II) / whole if whole else 0.0 for found_OI in (new_OI, plain_OI)]
    return Compensated(stay_U.nonzero().squeeze(1).cpu(), new_OI, *errors)


def _inverse(gram_II: Tensor, where: str) -> Tensor:
    """(X^T X + damping)^-1 in fp32."""
    mean = gram_II.diagonal().mean()
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(torch.where(mean > 0, mean * DAMPING, 1.0))
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        found = "the Gram matrix of its inputs cannot be inverted"
        raise PruneError(f"{where}: {found}. Use more calibration text, or model.dtype: float32")
    return torch.cholesky_inverse(lower_II)


def _rounds(gone: int) -> list[int]:
    """How many units go in each round; the same in each, at least one."""
    rounds = min(ROUNDS, gone)
    return [gone * (number + 1) // rounds - gone * number // rounds for number in range(rounds)]


def _scores(weight_OI: Tensor, inverse_II: Tensor, units: int) -> Tensor:
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


def _remove(gone_G: Tensor, weight_OI: Tensor, inverse_II: Tensor, units: int) -> None:
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


def _square(weight_OI: Tensor, gram_II: Tensor) -> float:
    """||W X||^2."""
    return float(((weight_OI @ gram_II) * weight_OI).sum(dtype=torch.float64))
