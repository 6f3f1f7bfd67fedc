"""The formulas of the distillation loss on logits, in plain torch: any device, fp32 or fp64.

Legend: C tokens of one chunk, V vocabulary, 1 a kept axis of size one. With T the temperature, y dense and z pruned
logits:

    p = softmax(y / T)    q = softmax(z / T)    r = p^2 / sum p^2    u = (z - y) / T    x = log q/p = u - c
    m = beta p + (1 - beta) q    g = log q/m    a = log m/p = x - g

| term        | value per token                                            | gradient with respect to z / T |
|-------------|------------------------------------------------------------|--------------------------------|
| kl          | KL(p || q) = sum q - p - p x                               | q - p = p expm1(x)             |
| variance    | Var_p(z - y) / (2 T^2) = sum p (u - E_p u)^2 / 2           | p (u - E_p u)                  |
| variance_r  | Var_r(z - y) / (2 T^2) = sum r (u - E_r u)^2 / 2           | r (u - E_r u)                  |
| reverse_kl  | KL(q || p) = sum q x - (q - p)                             | q (u - E_q u)                  |
| jsd         | beta KL(p || m) + (1 - beta) KL(q || m)                    | (1 - beta) q (g - E_q g)       |
| ce (T = 1)  | -log softmax(z)[label]                    | softmax(z) - onehot(label)  (w.r.t. z itself)   |

All but ce are multiplied by T^2 in the total (Hinton, Vinyals, Dean 2015, section 2), so that a gradient's size does
not depend on T; the values beside it are the plain ones. Near the dense model KL and reverse KL are Var_p / 2 and JSD
is beta (1 - beta) of it. Formulas: arXiv 2603.24652 (theorem 2 for Var_r, 3 for Var_p); JSD: Lin 1991.

What is kept from cancelling. q - p is the difference of nearly equal numbers, and the better the pruned model gets, the
more of it a subtraction would lose: it comes from expm1. KL is a sum over q - p - p x and not over -p x, which is the
same (sum q = sum p), but has no negative term, and c enters it only to second order. Where x is large, p may have
underflowed and q not: there q - p is as it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recover.config.recipe import Loss

TERMS = ("total", "kl", "variance", "reverse_kl", "ce", "focus")  # focus: the measure that `loss.focus` names, or 0


class Lost(NamedTuple):
    """Per row of a gradient the largest of its rounding errors (exact minus rounded), and the column it is in."""

    error_C: Tensor
    column_C: Tensor


def loss_terms(
    y_CV: Tensor, z_CV: Tensor, labels_C: Tensor | None, weights: Loss, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Per token the values of TERMS (6, C), and unless `dtype` is None the total's gradient by z (C, V), in it.

    Equals the table above. Values of divergences are never negative, and 0 with a gradient of 0 where y equals z.
    """
    t = weights.temperature
    p_CV, y_max_C1, y_sum_C1 = _softmax(y_CV / t)
    q_CV, z_max_C1, z_sum_C1 = _softmax(z_CV / t)
    u_CV = (z_CV - y_CV) / t
    # Not a difference of two logsumexps, which would be rounded at the size of the logits.
    c_C1 = (z_max_C1 - y_max_C1) + torch.log(z_sum_C1 / y_sum_C1)
    x_CV = u_CV - c_C1
    rise_CV = torch.where(x_CV < 1, p_CV * torch.expm1(x_CV.clamp_max(1)), q_CV - p_CV)
    kl_C = (rise_CV - p_CV * x_CV).sum(-1).clamp_min(0)
    reverse_C = (q_CV * x_CV - rise_CV).sum(-1).clamp_min(0)
    variance_C, by_variance_CV = _variance(p_CV, u_CV)
    divergence_C = weights.kl * kl_C + weights.variance * variance_C + weights.reverse_kl * reverse_C
    # T^2 of the convention, 1/T of the chain rule: T is left
    g_CV = weights.kl * rise_CV + weights.variance * by_variance_CV
    if weights.reverse_kl > 0:
        g_CV += weights.reverse_kl * q_CV * (u_CV - (q_CV * u_CV).sum(-1, keepdim=True))
    if weights.variance_r > 0:
        variance_r_C, by_variance_CV = _variance(_softmax(2 / t * y_CV)[0], u_CV)
        divergence_C = divergence_C + weights.variance_r * variance_r_C
        g_CV += weights.variance_r * by_variance_CV
    if weights.jsd > 0:
        jsd_C, by_jsd_CV = _jsd(p_CV, q_CV, x_CV, weights.jsd_beta)
        divergence_C = divergence_C + weights.jsd * jsd_C
        g_CV += weights.jsd * by_jsd_CV
    g_CV *= t
    ce_C = torch.zeros_like(kl_C)
    if labels_C is not None:
        ce_C = _cross_entropy(z_CV, labels_C, g_CV, weights.ce)
    total_C = t * t * divergence_C + weights.ce * ce_C
    focus_C = _focus(weights.focus.by, kl_C, rise_CV, p_CV) if weights.focus is not None else torch.zeros_like(kl_C)
    values_6C = torch.stack([total_C, kl_C, variance_C, reverse_C, ce_C, focus_C])
    return values_6C, None if dtype is None else g_CV.to(dtype)


def _focus(by: str, kl_C: Tensor, rise_CV: Tensor, p_CV: Tensor) -> Tensor:
    """Per token the measure by which it counts (`loss.focus`)."""
    if by == "kl":
        return kl_C
    return torch.special.entr(p_CV).sum(-1) if by == "entropy" else 0.5 * rise_CV.abs().sum(-1)


def focused(values_6C: Tensor, weights: Loss, mean: float | None) -> Tensor | None:
    """Per token what its loss and gradient are multiplied by, None: nothing; in place, `total` is, and `focus` becomes
    the measure to its power. `mean`: of that, over tokens before; None: not known yet, so that each counts the same.
    """
    if weights.focus is None:
        return None
    total_C, focus_C = values_6C[TERMS.index("total")], values_6C[TERMS.index("focus")]
    focus_C.clamp_min_(0).pow_(weights.focus.power)
    if not mean:
        return None
    weight_C = focus_C / mean
    total_C *= weight_C
    return weight_C


def _softmax(x_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax, and the two numbers per row that it is made with: the maximum, and the sum of exp(x - maximum)."""
    max_C1 = x_CV.amax(-1, keepdim=True)
    weight_CV = (x_CV - max_C1).exp_()
    sum_C1 = weight_CV.sum(-1, keepdim=True)
    return weight_CV.div_(sum_C1), max_C1, sum_C1


def _variance(w_CV: Tensor, u_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Half the variance of u under the weights w, and its gradient by u."""
    v_CV = u_CV - (w_CV * u_CV).sum(-1, keepdim=True)
    gradient_CV = w_CV * v_CV
    return 0.5 * (gradient_CV * v_CV).sum(-1), gradient_CV


def _jsd(p_CV: Tensor, q_CV: Tensor, x_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """JSD per token, at least 0, and its gradient by z / T. log m/p and log q/m never pass through a large e^x."""
    a_CV = torch.log1p((1 - beta) * torch.expm1(x_CV.clamp_max(0)))
    g_CV = -torch.log1p(beta * torch.expm1(-x_CV.clamp_min(0)))
    a_CV, g_CV = torch.where(x_CV < 0, a_CV, x_CV - g_CV), torch.where(x_CV < 0, x_CV - a_CV, g_CV)
    qg_CV = q_CV * g_CV
    jsd_C = ((1 - beta) * qg_CV - beta * p_CV * a_CV).sum(-1).clamp_min(0)
    return jsd_C, (1 - beta) * (qg_CV - q_CV * qg_CV.sum(-1, keepdim=True))


def _cross_entropy(z_CV: Tensor, labels_C: Tensor, g_CV: Tensor, weight: float) -> Tensor:
    """Cross-entropy per token; its gradient is added to `g_CV`, unless the weight is 0."""
    log_q_CV = z_CV.log_softmax(-1)
    if weight > 0:
        minus_C1 = torch.full_like(labels_C, -1, dtype=z_CV.dtype)[:, None]
        g_CV += weight * log_q_CV.exp().scatter_add_(-1, labels_C[:, None], minus_C1)
    return -log_q_CV.gather(-1, labels_C[:, None]).squeeze(-1)
