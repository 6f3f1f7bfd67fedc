"""The distillation loss, over hidden states and the shared head, without ever holding all logits.

Legend: N scored tokens, C tokens of one chunk, D width, V vocabulary.

The head is frozen, so the gradient with respect to a hidden state can be formed in the forward pass, chunk by chunk of
tokens: three products (dense logits, pruned logits, gradient times W), between them one elementwise pass over both
logits, and nothing is kept for backward but the gradient (N, D). A gradient of W is never formed. The formulas stand in
`loss_terms`; on a GPU `loss_kernel` is their fused form. Logits are those of `maths/head.py`, fp32 straight out of the
product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recover.base import memory
from recover.distill.loss_terms import TERMS, Lost, focused, loss_terms
from recover.distill.loss_topk import TopK, topk_terms
from recover.maths.head import Head

if TYPE_CHECKING:
    from recover.config.recipe import Loss


@dataclass(frozen=True)
class LossSums:
    """Sums over the scored tokens, to be divided once, by the tokens of the whole optimizer step.

    Only `total` carries gradient. `focus`: of what positions are weighted by, before the division by its mean.
    """

    total: Tensor
    kl: Tensor
    variance: Tensor
    reverse_kl: Tensor
    ce: Tensor
    focus: Tensor
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
    if weights.ce > 0 and labels_N is None:
        raise ValueError("loss.ce has a weight, so the labels of the scored tokens are needed")
    head = Head(head_VD, bias_V, scale, softcap).frozen()
    dense = h_dense_ND if isinstance(h_dense_ND, TopK) else h_dense_ND.detach()
    with torch.autocast(h_pruned_ND.device.type, enabled=False):
        sums = _ChunkedLoss.apply(h_pruned_ND, dense, head, weights, labels_N, chunk, focus_mean)
    tokens = torch.full((), len(h_pruned_ND), device=h_pruned_ND.device, dtype=torch.int64)
    return LossSums(*sums, tokens=tokens)


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradient in one visit of the tokens: since W is frozen, no logit has to live until backward."""

    @staticmethod
    def forward(ctx, h_pruned_ND, h_dense_ND, head, weights, labels_N, chunk, focus_mean):
        # Kept wide: backward multiplies it, and rounding to bf16 both before and after would double the error.
        wide = torch.promote_types(h_pruned_ND.dtype, torch.float32)
        sums_6 = torch.zeros(len(TERMS), dtype=torch.float64, device=h_pruned_ND.device)
        gradient_ND = torch.empty_like(h_pruned_ND, dtype=wide) if ctx.needs_input_grad[0] else None
        step = rows_at_once(chunk, head.weight_VD)
        for start in range(0, len(h_pruned_ND), step):
            rows = slice(start, start + step)
            labels_C = None if labels_N is None else labels_N[rows]
            into_CD = None if gradient_ND is None else gradient_ND[rows]
            sums_6 += _chunk_sums(h_pruned_ND[rows], h_dense_ND[rows], head, weights, labels_C, into_CD, focus_mean)
        ctx.save_for_backward(gradient_ND)
        ctx.dtype = h_pruned_ND.dtype
        out = tuple(value.clone() for value in sums_6.to(wide))
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
    """Sums of TERMS over one chunk; writes `gradient_CD`. A function of its own so that no two chunks' logits live."""
    y_CV = None if isinstance(h_dense_CD, TopK) else head.logits(h_dense_CD)
    z_CV, slope_CV = head.logits_and_slope(h_pruned_CD)
    dtype = None if gradient_CD is None else head.gradient_dtype(z_CV.dtype)
    lost = None
    if isinstance(h_dense_CD, TopK):
        values_6C, g_CV = topk_terms(z_CV, h_dense_CD, labels_C, weights, dtype)
    else:
        values_6C, g_CV, lost = _terms_for(z_CV)(y_CV, z_CV, labels_C, weights, dtype)
    weight_C = focused(values_6C, weights, focus_mean)
    if gradient_CD is not None and g_CV is not None:
        gradient_CD.copy_(head.pull_back(g_CV, slope_CV))
        if lost is not None:  # put back: the product takes no more than bf16, and few tokens carry most of a gradient
            gradient_CD.addcmul_(head.weight_VD[lost.column_C].to(gradient_CD.dtype), lost.error_C[:, None])
        if weight_C is not None:
            gradient_CD.mul_(weight_C[:, None])
    return values_6C.sum(dim=1, dtype=torch.float64)


def rows_at_once(chunk: int, weight_VD: Tensor) -> int:
    """At most `chunk`; on a GPU as many as suit its multiprocessors."""
    if not weight_VD.is_cuda:
        return chunk
    processors = torch.cuda.get_device_properties(weight_VD.device).multi_processor_count
    return memory.rows_for(chunk, weight_VD.shape[1], processors)


def _terms_for(z_CV: Tensor) -> Callable[..., tuple[Tensor, Tensor | None, Lost | None]]:
    """The formulas, as one fused kernel where there is one: a GPU with Triton, and fp32."""
    if z_CV.is_cuda and z_CV.dtype is torch.float32 and _has_triton():
        from recover.distill.loss_kernel import fused_loss_terms

        return fused_loss_terms
    return lambda *arguments: (*loss_terms(*arguments), None)


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
