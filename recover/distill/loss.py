"""The distillation loss, over hidden states and the shared head, without ever holding all logits.

Legend: N scored tokens, C tokens of one chunk, D width, V vocabulary. With T the temperature, y dense and z pruned
logits:

    p = softmax(y / T)    q = softmax(z / T)    u = (z - y) / T    v = u - E_p[u]    KL = log E_p[e^v]

| term             | value per token          | gradient with respect to z / T      |
|------------------|--------------------------|-------------------------------------|
| kl               | KL(p || q)               | q - p                               |
| variance         | Var_p(z - y) / (2 T^2)   | p v                                 |
| reverse_kl       | KL(q || p)               | q (v - KL - reverse_kl)             |
| ce (T = 1)       | -log softmax(z)[label]   | softmax(z) - onehot(label)  (w.r.t. z) |

The first three are multiplied by T^2 in the total (Hinton, Vinyals, Dean 2015, section 2), so that a gradient's
size does not depend on T; the sums reported beside it are the plain values of the table. Formulas: arXiv 2603.24652
(theorem 3 for the variance).

Why q - p is formed from expm1: it is the difference of nearly equal numbers, and the better the pruned model gets,
the more of it a subtraction would lose. For the same reason logits are fp32 straight out of the product, also for
bf16 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recover.recipe import Loss

TERMS = ("total", "kl", "variance", "reverse_kl", "ce")


@dataclass(frozen=True)
class LossSums:
    """Sums over the scored tokens, to be divided once, by the tokens of the whole optimizer step.

    Only `total` carries gradient.
    """

    total: Tensor
    kl: Tensor
    variance: Tensor
    reverse_kl: Tensor
    ce: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Head:
    """How a model turns a hidden state into logits: softcap(scale (h W^T + bias)). Frozen."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_CD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits in fp32 (fp64 for fp64 input), and the softcap's derivative, or None if it is 1 everywhere."""
        z_CV = _product(h_CD, self.weight_VD.t())
        if self.bias_V is not None:
            z_CV += self.bias_V
        if self.scale != 1.0:
            z_CV *= self.scale
        if self.softcap is None:
            return z_CV, None
        tanh_CV = torch.tanh(z_CV / self.softcap)
        return tanh_CV * self.softcap, 1 - tanh_CV.square()

    def gradient_dtype(self, z_dtype: torch.dtype) -> torch.dtype:
        """What `pull_back` takes: the weight's dtype, where nothing comes between the product and the logits."""
        return self.weight_VD.dtype if self.softcap is None and self.scale == 1.0 else z_dtype

    def pull_back(self, g_CV: Tensor, slope_CV: Tensor | None) -> Tensor:
        """The gradient with respect to the hidden state, from that with respect to the logits (overwritten)."""
        if slope_CV is not None:
            g_CV *= slope_CV
        if self.scale != 1.0:
            g_CV *= self.scale
        return torch.mm(g_CV.to(self.weight_VD.dtype), self.weight_VD)


def distillation_loss(
    h_pruned_ND: Tensor,
    h_dense_ND: Tensor,
    head_VD: Tensor,
    weights: Loss,
    *,
    labels_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 1024,
) -> LossSums:
    """Sums of the loss over N tokens; its gradient reaches `h_pruned_ND` and nothing else (the head is frozen).

    Equals, chunk by chunk and without holding (N, V): softmax both sides' logits, apply the table above, add up.
    The result does not depend on `chunk`. Nothing waits for the device. Hidden states are those after the final
    norm, of scored rows only: a row that is not to be scored must be left out, not masked. N may be 0.
    """
    if weights.ce > 0 and labels_N is None:
        raise ValueError("loss.ce has a weight, so the labels of the scored tokens are needed")
    head = Head(head_VD.detach(), None if bias_V is None else bias_V.detach(), scale, softcap)
    with torch.autocast(h_pruned_ND.device.type, enabled=False):
        sums = _ChunkedLoss.apply(h_pruned_ND, h_dense_ND.detach(), head, weights, labels_N, chunk)
    tokens = torch.full((), len(h_pruned_ND), device=h_pruned_ND.device, dtype=torch.int64)
    return LossSums(*sums, tokens=tokens)


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradient in one visit of the tokens: since W is frozen, no logit has to live until backward."""

    @staticmethod
    def forward(ctx, h_pruned_ND, h_dense_ND, head, weights, labels_N, chunk):
        wants_gradient = ctx.needs_input_grad[0]
        dtype = torch.promote_types(h_pruned_ND.dtype, torch.float32)
        wants = head.gradient_dtype(z_dtype=dtype) if wants_gradient else None
        terms = _terms_on(h_pruned_ND.device.type)
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=h_pruned_ND.device)
        gradient_ND = torch.empty_like(h_pruned_ND) if wants_gradient else None
        for start in range(0, len(h_pruned_ND), chunk):
            rows = slice(start, start + chunk)
            y_CV, _ = head.logits(h_dense_ND[rows])
            z_CV, slope_CV = head.logits(h_pruned_ND[rows])
            labels_C = None if labels_N is None else labels_N[rows]
            values_5C, g_CV = terms(y_CV, z_CV, labels_C, *_scalars(weights), wants)
            sums += values_5C.sum(dim=1, dtype=torch.float64)
            if gradient_ND is not None:
                gradient_ND[rows] = head.pull_back(g_CV, slope_CV)
        ctx.save_for_backward(gradient_ND)
        out = tuple(value.clone() for value in sums.to(dtype))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx, upstream, *_):
        (gradient_ND,) = ctx.saved_tensors
        # in bf16 the factor itself would be rounded by 0.2 %
        wide = torch.promote_types(gradient_ND.dtype, torch.float32)
        return (gradient_ND.to(wide) * upstream).to(gradient_ND.dtype), None, None, None, None, None


def _scalars(weights: Loss) -> tuple[float, float, float, float, float]:
    return weights.kl, weights.variance, weights.reverse_kl, weights.ce, weights.temperature


def _terms(y_CV, z_CV, labels_C, kl_weight, variance_weight, reverse_weight, ce_weight, temperature, dtype):
    """Per token the five values of TERMS (5, C), and unless `dtype` is None the total's gradient by z (C, V), in it."""
    t = temperature
    y_CV = y_CV / t
    u_CV = z_CV / t - y_CV
    log_sum_C1 = y_CV.logsumexp(-1, keepdim=True)
    log_p_CV = y_CV - log_sum_C1
    p_CV = log_p_CV.exp()
    mean_u_C1 = (p_CV * u_CV).sum(-1, keepdim=True)
    v_CV = u_CV - mean_u_C1
    rough_kl_C1 = (z_CV / t).logsumexp(-1, keepdim=True) - log_sum_C1 - mean_u_C1
    variance_C = 0.5 * (p_CV * v_CV.square()).sum(-1)
    kl_C1, rise_CV, shift_C1 = _kl(p_CV, log_p_CV, v_CV, rough_kl_C1)
    kl_C = kl_C1.squeeze(-1)
    # q - p = e^-KL (p e^v - p) + p (e^-KL - 1), with p e^v - p = rise e^shift: no two nearly equal numbers are
    # subtracted.
    difference_CV = rise_CV * (shift_C1 - kl_C1).exp() + p_CV * torch.expm1(-kl_C1)
    log_ratio_CV = v_CV - kl_C1
    q_CV = p_CV + difference_CV
    # sum of p (e^x (x - 1) + 1) with x = log q/p
    reverse_C = (q_CV * log_ratio_CV - difference_CV).sum(-1).clamp_min(0)
    total_C = t * t * (kl_weight * kl_C + variance_weight * variance_C + reverse_weight * reverse_C)
    log_q1_CV, ce_C = None, torch.zeros_like(kl_C)
    if labels_C is not None:
        log_q1_CV = z_CV - z_CV.logsumexp(-1, keepdim=True)
        ce_C = -log_q1_CV.gather(-1, labels_C[:, None]).squeeze(-1)
        total_C = total_C + ce_weight * ce_C
    values_5C = torch.stack([total_C, kl_C, variance_C, reverse_C, ce_C])
    if dtype is None:
        return values_5C, None
    # T^2 of the convention, 1/T of the chain rule
    g_CV = t * (kl_weight * difference_CV + variance_weight * p_CV * v_CV)
    if reverse_weight > 0:
        g_CV = g_CV + t * reverse_weight * q_CV * (log_ratio_CV - reverse_C[:, None])
    if labels_C is not None and log_q1_CV is not None and ce_weight > 0:
        minus_one_C1 = torch.full_like(kl_C1, -1.0)
        g_CV = g_CV + ce_weight * log_q1_CV.exp().scatter_add(-1, labels_C[:, None], minus_one_C1)
    return values_5C, g_CV.to(dtype)


def _kl(p_CV: Tensor, log_p_CV: Tensor, v_CV: Tensor, rough_kl_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL >= 0 per token as log E_p[e^v], with the two parts of p e^v - p = rise e^shift.

    Any shift gives the same; about KL itself it keeps logits as large as 1e4 from overflowing (p e^v <= e^KL), and
    where KL is small 0 loses nothing. The rough KL is a difference of large sums: to choose by, not to report.
    e^v is taken by expm1 where v is small, and through log p where it is large, as there p may have underflown.
    """
    log_pe_CV = log_p_CV + v_CV
    shift_C1 = torch.where(rough_kl_C1 > 1, rough_kl_C1, 0.0)
    small_CV = p_CV * torch.expm1(v_CV.clamp_max(1)) * (-shift_C1).exp()
    large_CV = (log_pe_CV - shift_C1).exp() - p_CV * (-shift_C1).exp()
    rise_CV = torch.where(v_CV < 1, small_CV, large_CV)
    # E_p[v] = 0: taking p v off each term changes nothing but makes every term >= 0, so that nothing cancels.
    total_C1 = (rise_CV - p_CV * v_CV * (-shift_C1).exp()).sum(-1, keepdim=True).clamp_min(0)
    kl_C1 = shift_C1 + torch.log1p(total_C1 + torch.expm1(-shift_C1))
    return kl_C1, rise_CV, shift_C1


@lru_cache
def _terms_on(device_type: str):
    """`_terms`, fused on a GPU: eager, it would move each logit through memory some twenty times instead of two."""
    return torch.compile(_terms) if device_type == "cuda" else _terms


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 out of the accumulator (fp64 stays fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b.to(a.dtype))
    if a.is_cuda:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
