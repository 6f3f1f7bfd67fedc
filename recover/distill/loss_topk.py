"""The loss against a teacher that is not at hand: of each position its k likeliest tokens are known, and no more.

Legend: N scored tokens, C tokens of one chunk, V vocabulary, K tokens known of a position, 1 a kept axis of size one.

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

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recover.distill.loss_terms import rows

if TYPE_CHECKING:
    from recover.config.loss import Loss


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
