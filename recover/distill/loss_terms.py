"""The formulas of the distillation loss on logits, in plain torch: any device, fp32 or fp64.

What is known of a term besides (its weight, its name, how it is logged) is a record in `recover/config/loss.py`.

Legend: N scored tokens, C tokens of one chunk, V vocabulary, K tokens known of a position, 1 a kept axis of size one.
With T the temperature, y dense and z pruned logits:

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

Against a teacher that is not at hand (`topk_terms`), of each position its k likeliest tokens are known, and no more.
All other tokens are one class, the tail, so the divergence is one over k + 1 classes. With S the known tokens, p the
teacher, q the pruned model, p_t and q_t what either gives to the tail:

    KL_k = sum_{j in S} p_j log(p_j / q_j) + p_t log(p_t / q_t)        gradient with respect to z_j:
           j in S:      q_j - p_j
           j in tail:   q_j - p_t q_j / q_t

By the log sum inequality KL_k <= KL(p || q), with equality where k = V, or where both share out the tail alike: what is
lost is p_t KL(p given tail || q given tail), and the gradient leaves the tail's own shape alone. Without the tail as a
class (renormalised over S), a pruned model that puts its mass outside of S would look perfect.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from recover.config.loss import TERMS

if TYPE_CHECKING:
    from recover.config.loss import Loss

FUSED = ("kl", "variance", "reverse_kl", "variance_r", "jsd", "ce")  # terms that `loss_kernel` forms, in its order
TOTAL, FOCUS = 0, 1  # rows of values; `focus`: the measure that `loss.focus` names, or 0


def rows() -> tuple[str, ...]:
    """Names of the rows of values (R, C): the total, `focus`, and every term; 0 where one is not computed."""
    return ("total", "focus", *FUSED, *others())


def others() -> tuple[str, ...]:
    """Terms that have no place in the fused kernel."""
    return tuple(name for name in TERMS if name not in FUSED)


def computed(weights: Loss) -> tuple[str, ...]:
    """Terms that have a value under these weights."""
    return tuple(name for name, term in TERMS.items() if term.always or weights.weight(name) > 0)


class Lost(NamedTuple):
    """Per row of a gradient the largest of its rounding errors (exact minus rounded), and the column it is in."""

    error_C: Tensor
    column_C: Tensor


@dataclass(frozen=True)
class Chunk:
    """What terms are made of: logits of some tokens from both models, and what the table above derives from them.

    `rise_CV` is q - p, without cancelling.
    """

    y_CV: Tensor
    z_CV: Tensor
    labels_C: Tensor | None
    t: float
    p_CV: Tensor
    q_CV: Tensor
    u_CV: Tensor
    x_CV: Tensor
    rise_CV: Tensor

    @classmethod
    def of(cls, y_CV: Tensor, z_CV: Tensor, labels_C: Tensor | None, t: float) -> Chunk:
        """From dense and pruned logits."""
        p_CV, y_max_C1, y_sum_C1 = softmax(y_CV / t)
        q_CV, z_max_C1, z_sum_C1 = softmax(z_CV / t)
        u_CV = (z_CV - y_CV) / t
        # Not a difference of two logsumexps, which would be rounded at the size of the logits.
        c_C1 = (z_max_C1 - y_max_C1) + torch.log(z_sum_C1 / y_sum_C1)
        x_CV = u_CV - c_C1
        rise_CV = torch.where(x_CV < 1, p_CV * torch.expm1(x_CV.clamp_max(1)), q_CV - p_CV)
        return cls(y_CV, z_CV, labels_C, t, p_CV, q_CV, u_CV, x_CV, rise_CV)


Gradient = Callable[[float], Tensor]
"""Of a weight w: w times the term's gradient by z / T (by z itself, if it is no divergence), (C, V), a new tensor."""

Formula = Callable[[Chunk, "Loss"], tuple[Tensor, Gradient]]
"""A term's value per token (C), without its weight and T^2, and its gradient, which is asked for only if it counts."""


def kl(chunk: Chunk, weights: Loss) -> tuple[Tensor, Gradient]:
    """KL(p || q)."""
    value_C = (chunk.rise_CV - chunk.p_CV * chunk.x_CV).sum(-1).clamp_min(0)
    return value_C, lambda weight: weight * chunk.rise_CV


def variance(chunk: Chunk, weights: Loss) -> tuple[Tensor, Gradient]:
    """Half the variance of u under p."""
    return _variance(chunk.p_CV, chunk.u_CV)


def reverse_kl(chunk: Chunk, weights: Loss) -> tuple[Tensor, Gradient]:
    """KL(q || p)."""
    q_CV, u_CV = chunk.q_CV, chunk.u_CV
    value_C = (q_CV * chunk.x_CV - chunk.rise_CV).sum(-1).clamp_min(0)
    return value_C, lambda weight: weight * q_CV * (u_CV - (q_CV * u_CV).sum(-1, keepdim=True))


def variance_r(chunk: Chunk, weights: Loss) -> tuple[Tensor, Gradient]:
    """Half the variance of u under r."""
    return _variance(softmax(2 / chunk.t * chunk.y_CV)[0], chunk.u_CV)


def jsd(chunk: Chunk, weights: Loss) -> tuple[Tensor, Gradient]:
    """JSD per token, at least 0. log m/p and log q/m never pass through a large e^x."""
    beta, x_CV, q_CV = weights.jsd_beta, chunk.x_CV, chunk.q_CV
    a_CV = torch.log1p((1 - beta) * torch.expm1(x_CV.clamp_max(0)))
    g_CV = -torch.log1p(beta * torch.expm1(-x_CV.clamp_min(0)))
    a_CV, g_CV = torch.where(x_CV < 0, a_CV, x_CV - g_CV), torch.where(x_CV < 0, x_CV - a_CV, g_CV)
    qg_CV = q_CV * g_CV
    value_C = ((1 - beta) * qg_CV - beta * chunk.p_CV * a_CV).sum(-1).clamp_min(0)
    return value_C, lambda weight: weight * ((1 - beta) * (qg_CV - q_CV * qg_CV.sum(-1, keepdim=True)))


def ce(chunk: Chunk, weights: Loss) -> tuple[Tensor, Gradient]:
    """Cross-entropy on the text itself, at temperature 1; 0 where its tokens are not known."""
    z_CV, labels_C = chunk.z_CV, chunk.labels_C
    if labels_C is None:
        return torch.zeros_like(z_CV[:, 0]), lambda weight: torch.zeros_like(z_CV)
    log_q_CV = z_CV.log_softmax(-1)

    def gradient(weight: float) -> Tensor:
        minus_C1 = torch.full_like(labels_C, -1, dtype=z_CV.dtype)[:, None]
        return weight * log_q_CV.exp().scatter_add_(-1, labels_C[:, None], minus_C1)

    return -log_q_CV.gather(-1, labels_C[:, None]).squeeze(-1), gradient


def loss_terms(
    y_CV: Tensor, z_CV: Tensor, labels_C: Tensor | None, weights: Loss, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Per token the values of `rows()` (R, C), and unless `dtype` is None the total's gradient by z (C, V), in it.

    Equals the table above. Values of divergences are never negative, and 0 with a gradient of 0 where y equals z.
    """
    chunk = Chunk.of(y_CV, z_CV, labels_C, weights.temperature)
    values, g_CV = added_up(chunk, weights, computed(weights), gradient=dtype is not None)
    if weights.focus is not None:
        values["focus"] = _focus(weights.focus.by, values["kl"], chunk.rise_CV, chunk.p_CV)
    zero_C = torch.zeros_like(values["kl"])
    values_RC = torch.stack([values.get(name, zero_C) for name in rows()])
    return values_RC, None if g_CV is None or dtype is None else g_CV.to(dtype)


def added_up(
    chunk: Chunk, weights: Loss, names: Sequence[str], *, gradient: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Value per token (C) of each of these terms and of their `total`, and the total's gradient by z if it is wanted.

    The gradient is in the logits' dtype, and None as well where no term has a weight.
    """
    values: dict[str, Tensor] = {}
    total_C, g_CV = torch.zeros_like(chunk.z_CV[:, 0]), None
    for divergence in (True, False):
        for name in names:
            if TERMS[name].divergence is not divergence:
                continue
            weight = weights.weight(name)
            values[name], gradient_of = formula(TERMS[name].formula)(chunk, weights)
            if weight > 0:
                total_C = total_C + weight * values[name]
                if gradient:
                    part_CV = gradient_of(weight)
                    g_CV = part_CV if g_CV is None else g_CV.add_(part_CV)
        if divergence:
            total_C = chunk.t * chunk.t * total_C
            # T^2 of the convention, 1/T of the chain rule: T is left
            g_CV = None if g_CV is None else g_CV.mul_(chunk.t)
    return {**values, "total": total_C}, g_CV


@cache
def formula(name: str) -> Formula:
    """By `module:function`."""
    return pkgutil.resolve_name(name)


def _focus(by: str, kl_C: Tensor, rise_CV: Tensor, p_CV: Tensor) -> Tensor:
    """Per token the measure by which it counts (`loss.focus`)."""
    if by == "kl":
        return kl_C
    return torch.special.entr(p_CV).sum(-1) if by == "entropy" else 0.5 * rise_CV.abs().sum(-1)


def focused(values_RC: Tensor, weights: Loss, mean: float | None) -> Tensor | None:
    """Per token what its loss and gradient are multiplied by, None: nothing; in place, `total` is, and `focus` becomes
    the measure to its power. `mean`: of that, over tokens before; None: not known yet, so that each counts the same.
    """
    if weights.focus is None:
        return None
    total_C, focus_C = values_RC[TOTAL], values_RC[FOCUS]
    focus_C.clamp_min_(0).pow_(weights.focus.power)
    if not mean:
        return None
    weight_C = focus_C / mean
    total_C *= weight_C
    return weight_C


def softmax(x_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax, and the two numbers per row that it is made with: the maximum, and the sum of exp(x - maximum)."""
    max_C1 = x_CV.amax(-1, keepdim=True)
    weight_CV = (x_CV - max_C1).exp_()
    sum_C1 = weight_CV.sum(-1, keepdim=True)
    return weight_CV.div_(sum_C1), max_C1, sum_C1


def _variance(w_CV: Tensor, u_CV: Tensor) -> tuple[Tensor, Gradient]:
    """Half the variance of u under the weights w."""
    v_CV = u_CV - (w_CV * u_CV).sum(-1, keepdim=True)
    gradient_CV = w_CV * v_CV
    return 0.5 * (gradient_CV * v_CV).sum(-1), lambda weight: weight * gradient_CV


def rounded(g_CV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Lost | None]:
    """A gradient in this dtype, and of a narrower one what each row lost most by rounding."""
    if g_CV.dtype is dtype:
        return g_CV, None
    stored_CV = g_CV.to(dtype)
    error_CV = g_CV - stored_CV.to(g_CV.dtype)
    column_C = error_CV.abs().argmax(-1)
    return stored_CV, Lost(error_CV.gather(-1, column_C[:, None]).squeeze(-1), column_C)


@dataclass(frozen=True)
class TopK:
    """Per position K different tokens, and the teacher's log-probabilities of them at temperature 1."""

    ids_NK: Tensor
    logp_NK: Tensor

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids_NK[rows], self.logp_NK[rows])

    def to(self, device: torch.device) -> TopK:
        """On this device."""
        return TopK(self.ids_NK.to(device, non_blocking=True), self.logp_NK.to(device, non_blocking=True))


def topk_of(logits_NV: Tensor, k: int, tokens: int | None = None) -> TopK:
    """The k likeliest of the first `tokens` tokens (default: all) of each row, the likeliest first."""
    logp_NK, ids_NK = logits_NV.log_softmax(-1)[:, :tokens].topk(k)
    return TopK(ids_NK, logp_NK)


def topk_terms(
    z_CV: Tensor, top: TopK, labels_C: Tensor | None, weights: Loss, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """As `loss_terms`, for the table above: kl is KL_k; ce is itself, and other terms are not known, and given as 0."""
    ids_CK = top.ids_NK.to(torch.int64)
    logp_CK = top.logp_NK.to(z_CV.dtype)
    lse_C1 = z_CV.logsumexp(-1, keepdim=True)
    logq_CK = z_CV.gather(-1, ids_CK) - lse_C1
    # Not 1 - sum q, which is nothing but rounding where the tail is small.
    tail_CV = z_CV.scatter(-1, ids_CK, -torch.inf)
    log_tail_q_C1 = tail_CV.logsumexp(-1, keepdim=True) - lse_C1
    p_CK = logp_CK.exp()
    tail_p_C1 = (1 - p_CK.sum(-1, keepdim=True)).clamp_min(0)
    if ids_CK.shape[-1] == z_CV.shape[-1]:
        tail_p_C1 = torch.zeros_like(tail_p_C1)  # no token is left to hold what rounding left
    known_C = (p_CK * (logp_CK - logq_CK)).sum(-1)
    log_tail_p_C1 = tail_p_C1.clamp_min(torch.finfo(z_CV.dtype).tiny).log()
    tail_C1 = torch.where(tail_p_C1 > 0, tail_p_C1 * (log_tail_p_C1 - log_tail_q_C1), 0)
    kl_C = (known_C + tail_C1.squeeze(-1)).clamp_min(0)
    # p_t q_j / q_t: the tail of the pruned model, at the teacher's mass
    target_CV = tail_p_C1 * (tail_CV - lse_C1 - log_tail_q_C1).exp().nan_to_num(0.0)
    target_CV.scatter_(-1, ids_CK, p_CK)
    q_CV = (z_CV - lse_C1).exp()
    g_CV = weights.kl * (q_CV - target_CV)
    ce_C = torch.zeros_like(kl_C)
    if labels_C is not None:
        ce_C = -(z_CV.gather(-1, labels_C[:, None]) - lse_C1).squeeze(-1)
        g_CV += weights.ce * q_CV
        g_CV.scatter_add_(-1, labels_C[:, None], torch.full_like(lse_C1, -weights.ce))
    values = {"total": weights.kl * kl_C + weights.ce * ce_C, "kl": kl_C, "ce": ce_C}
    if weights.focus is not None:
        apart_C = (p_CK - logq_CK.exp()).abs().sum(-1) + (tail_p_C1 - log_tail_q_C1.exp()).abs().squeeze(-1)
        values["focus"] = kl_C if weights.focus.by == "kl" else 0.5 * apart_C
    values_RC = torch.stack([values.get(name, torch.zeros_like(kl_C)) for name in rows()])
    return values_RC, None if dtype is None else g_CV.to(dtype)
