"""The distillation loss, over hidden states and the shared head, without ever holding all logits.

Legend: N scored tokens, C tokens of one chunk, D width, V vocabulary.

The head is frozen, so the gradient with respect to a hidden state can be formed in the forward pass, chunk by chunk of
tokens: three products (dense logits, pruned logits, gradient times W), between them one elementwise pass over both
logits, and nothing is kept for backward but the gradient (N, D). A gradient of W is never formed. The formulas stand in
`loss_terms`; on a GPU `loss_kernel` is their fused form. Logits are those of `Head`, fp32 straight out of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from recover.base import memory
from recover.config.loss import TERMS
from recover.distill.loss_terms import (
    FOCUS,
    TOTAL,
    Chunk,
    Lost,
    TopK,
    added_up,
    computed,
    focused,
    loss_terms,
    others,
    rounded,
    rows,
    topk_terms,
)
from recover.maths.divergence import Head

if TYPE_CHECKING:
    from recover.config.loss import Loss


@dataclass(frozen=True)
class LossSums:
    """Sums over the scored tokens, to be divided once, by the tokens of the whole optimizer step.

    Only `total` carries gradient. `focus`: of what positions are weighted by, before the division by its mean. `terms`:
    of each that has a value under the weights, without weight and T^2.
    """

    total: Tensor
    focus: Tensor
    terms: dict[str, Tensor]
    tokens: Tensor


def distillation_loss(
    h_pruned_ND: Tensor,
    h_dense_ND: Tensor | TopK,
    head_VD: Tensor,
    weights: Loss,
    *,
    labels_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 2048,
    focus_mean: float | None = None,
) -> LossSums:
    """Sums of the loss over N tokens; its gradient reaches `h_pruned_ND` and nothing else (the head is frozen).

    Equals, without holding (N, V): softmax both sides' logits, apply the table of `loss_terms`, add up. `chunk` is how
    many tokens' logits are held at most; the result does not depend on it. Nothing waits for the device. Hidden states
    are those after the final norm, of scored rows only: a row that is not to be scored must be left out, not masked.
    N may be 0. In place of the dense hidden states there may stand what a teacher gave the likeliest tokens.
    `focus_mean`: what the weights of `loss.focus` are divided by; None: each is 1.
    """
    names = computed(weights)
    needing = [TERMS[name].field for name in names if TERMS[name].labels and weights.weight(name) > 0]
    if needing and labels_N is None:
        raise ValueError(f"loss.{needing[0]} has a weight, so the labels of the scored tokens are needed")
    head = Head(head_VD, bias_V, scale, softcap).frozen()
    dense = h_dense_ND if isinstance(h_dense_ND, TopK) else h_dense_ND.detach()
    with torch.autocast(h_pruned_ND.device.type, enabled=False):
        total, focus, *sums = _ChunkedLoss.apply(h_pruned_ND, dense, head, weights, labels_N, chunk, focus_mean)
    tokens = torch.full((), len(h_pruned_ND), device=h_pruned_ND.device, dtype=torch.int64)
    return LossSums(total, focus, dict(zip(names, sums, strict=True)), tokens)


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradient in one visit of the tokens: since W is frozen, no logit has to live until backward."""

    @staticmethod
    def forward(ctx, h_pruned_ND, h_dense_ND, head, weights, labels_N, chunk, focus_mean):
        # Kept wide: backward multiplies it, and rounding to bf16 both before and after would double the error.
        wide = torch.promote_types(h_pruned_ND.dtype, torch.float32)
        names = rows()
        sums_R = torch.zeros(len(names), dtype=torch.float64, device=h_pruned_ND.device)
        gradient_ND = torch.empty_like(h_pruned_ND, dtype=wide) if ctx.needs_input_grad[0] else None
        step = rows_at_once(chunk, head.weight_VD)
        for start in range(0, len(h_pruned_ND), step):
            part = slice(start, start + step)
            labels_C = None if labels_N is None else labels_N[part]
            into_CD = None if gradient_ND is None else gradient_ND[part]
            sums_R += _chunk_sums(h_pruned_ND[part], h_dense_ND[part], head, weights, labels_C, into_CD, focus_mean)
        ctx.save_for_backward(gradient_ND)
        ctx.dtype = h_pruned_ND.dtype
        sums_R = sums_R.to(wide)
        out = tuple(sums_R[row].clone() for row in (TOTAL, FOCUS, *map(names.index, computed(weights))))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx, upstream, *_):
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * upstream).to(ctx.dtype), None, None, None, None, None, None


def _chunk_sums(
    h_pruned_CD: Tensor,
    h_dense_CD: Tensor | TopK,
    head: Head,
    weights: Loss,
    labels_C: Tensor | None,
    gradient_CD: Tensor | None,
    focus_mean: float | None,
) -> Tensor:
    """Sums of `rows()` over one chunk; writes `gradient_CD`. On its own, so that no two chunks' logits live at once."""
    known = h_dense_CD if isinstance(h_dense_CD, TopK) else head.logits(h_dense_CD)
    z_CV, slope_CV = head.logits_and_slope(h_pruned_CD)
    dtype = None if gradient_CD is None else head.gradient_dtype(z_CV.dtype)
    lost = None
    if isinstance(known, TopK):
        values_RC, g_CV = topk_terms(z_CV, known, labels_C, weights, dtype)
    else:
        values_RC, g_CV, lost = _terms(known, z_CV, labels_C, weights, dtype)
    weight_C = focused(values_RC, weights, focus_mean)
    if gradient_CD is not None and g_CV is not None:
        gradient_CD.copy_(head.pull_back(g_CV, slope_CV))
        if lost is not None:  # put back: the product takes no more than bf16, and few tokens carry most of a gradient
            gradient_CD.addcmul_(head.weight_VD[lost.column_C].to(gradient_CD.dtype), lost.error_C[:, None])
        if weight_C is not None:
            gradient_CD.mul_(weight_C[:, None])
    return values_RC.sum(dim=1, dtype=torch.float64)


def rows_at_once(chunk: int, weight_VD: Tensor) -> int:
    """At most `chunk`; on a GPU as many as suit its multiprocessors."""
    if not weight_VD.is_cuda:
        return chunk
    processors = torch.cuda.get_device_properties(weight_VD.device).multi_processor_count
    return memory.rows_for(chunk, weight_VD.shape[1], processors)


def _terms(
    y_CV: Tensor, z_CV: Tensor, labels_C: Tensor | None, weights: Loss, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Lost | None]:
    """The formulas, as one fused kernel where there is one: a GPU with Triton, and fp32."""
    if z_CV.is_cuda and z_CV.dtype is torch.float32 and _has_triton():
        from recover.distill.loss_kernel import fused_loss_terms

        return with_others(fused_loss_terms, y_CV, z_CV, labels_C, weights, dtype)
    return (*loss_terms(y_CV, z_CV, labels_C, weights, dtype), None)


def with_others(
    fused: Callable[..., tuple[Tensor, Tensor | None, Lost | None]],
    y_CV: Tensor,
    z_CV: Tensor,
    labels_C: Tensor | None,
    weights: Loss,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Lost | None]:
    """What `fused` gives, together with the terms that have no place in it, which are added in plain torch."""
    more = [name for name in computed(weights) if name in others()]
    if not more:
        values_RC, g_CV, lost = fused(y_CV, z_CV, labels_C, weights, dtype)
        return F.pad(values_RC, (0, 0, 0, len(others()))) if others() else values_RC, g_CV, lost
    values_RC, g_CV, _ = fused(y_CV, z_CV, labels_C, weights, None if dtype is None else z_CV.dtype)
    chunk = Chunk.of(y_CV, z_CV, labels_C, weights.temperature)
    values, more_CV = added_up(chunk, weights, more, gradient=dtype is not None)
    values_RC[TOTAL] += values["total"]
    zero_C = torch.zeros_like(values["total"])
    values_RC = torch.cat([values_RC, torch.stack([values.get(name, zero_C) for name in others()])])
    if g_CV is None or dtype is None:
        return values_RC, None, None
    return values_RC, *rounded(g_CV if more_CV is None else g_CV.add_(more_CV), dtype)


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
