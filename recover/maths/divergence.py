"""From a hidden state to logits and back, and how far two views of a language model are apart.

Spaces: hidden state h, logit z, probability p. z = W h (`Head`). Logits are fp32 straight out of the product, also for
half precision weights, for pruning, probing and training alike. Rounded to bf16, they would drown a small drift (both
views round on their own), and cost a gradient the more, the closer the pruned model is to the dense one.

`dense` is the reference x, `pruned` is x + dx. p = softmax(z_dense / T), q = softmax(z_pruned / T), X = dz / T.
KL is KL(p || q) = KL(dense || pruned). Exact forms are the truth; the `*_predicted` ones are the second-order forms of
the paper, kept because where they fail says how far beyond second order the damage is. Formulas: docs/theory.md.

Source: He et al., "Demystifying When Pruning Works via Representation Hierarchies", arXiv 2603.24652, theorems 1 to 3.

Tensors in, tensors out, one value a row. Low-precision input is widened to float32; float64 stays float64.
Shapes: N rows or kept tokens, F features of any kind (width or vocabulary), D width, V vocabulary, K top tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOP = 5  # tokens compared by `overlap`
NEGLIGIBLE = 1e-10  # float32 logits give drift below it to a few digits at most: no ratio is made of it


def widen(x: Tensor) -> Tensor:
    """The same values in float32 or better: bf16 resolves no 1 - cos below 4e-3."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Head(NamedTuple):
    """How a model turns a hidden state into logits: softcap(scale (h W^T + bias))."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def frozen(self) -> Head:
        """The same without a gradient of its own."""
        return self._replace(
            weight_VD=self.weight_VD.detach(), bias_V=None if self.bias_V is None else self.bias_V.detach()
        )

    def ready(self) -> Head:
        """Frozen, for many calls: a CPU has no fp32 product of half precision, so its weights are widened, once."""
        head = self.frozen()
        return head if head.weight_VD.is_cuda else head._replace(weight_VD=widen(head.weight_VD))

    def logits(self, h_ND: Tensor) -> Tensor:
        """(N, V) in fp32, in fp64 for fp64 input; the same bits whether the head is `ready` or not."""
        return self.logits_and_slope(h_ND)[0]

    def logits_and_slope(self, h_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the softcap's derivative (N, V), or None if it is 1 everywhere."""
        z_NV = _product(h_ND, self.weight_VD.t())
        if self.bias_V is not None:
            z_NV += self.bias_V
        if self.scale != 1.0:
            z_NV *= self.scale
        if self.softcap is None:
            return z_NV, None
        tanh_NV = torch.tanh(z_NV / self.softcap)
        return tanh_NV * self.softcap, 1 - tanh_NV.square()

    def gradient_dtype(self, z_dtype: torch.dtype) -> torch.dtype:
        """What `pull_back` takes: the weight's dtype, where nothing comes between the product and the logits."""
        return self.weight_VD.dtype if self.softcap is None and self.scale == 1.0 else z_dtype

    def pull_back(self, g_NV: Tensor, slope_NV: Tensor | None) -> Tensor:
        """The gradient (N, D) with respect to the hidden state, from that with respect to the logits (overwritten)."""
        if slope_NV is not None:
            g_NV *= slope_NV
        if self.scale != 1.0:
            g_NV *= self.scale
        return _product(g_NV.to(self.weight_VD.dtype), self.weight_VD)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 out of the accumulator (fp64 stays fp64)."""
    common = torch.promote_types(a.dtype, b.dtype)
    if a.is_cuda and common not in (torch.float32, torch.float64):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(common, torch.float32)
    return torch.mm(a.to(wide), b.to(wide))


def centred(z_NV: Tensor) -> Tensor:
    """Logits less their mean: softmax ignores a shift z + c, the cosine of raw logits does not."""
    z_NV = widen(z_NV)
    return z_NV - z_NV.mean(-1, keepdim=True)


def one_minus_cosine(x_NF: Tensor, y_NF: Tensor) -> Tensor:
    """1 - cos(x, y), exactly 0 for equal rows and accurate near 0; a zero row against a non-zero one counts 1.

    |u - v|^2 / 2 of the unit vectors. The usual 1 - <u, v> loses everything below the rounding of 1, 6e-8 in float32;
    here rounding enters squared, about 1e-14.
    """
    return Direction.of(x_NF).drift(Direction.of(y_NF))


@dataclasses.dataclass(frozen=True)
class Direction:
    """Rows over their lengths, and which of them have none: what a cosine is made of, for rows that enter several."""

    unit_NF: Tensor
    zero_N: Tensor

    @classmethod
    def of(cls, x_NF: Tensor) -> Direction:
        """Low precision is widened."""
        x_NF = widen(x_NF)
        norm_N1 = _norm(x_NF)
        return cls(x_NF / norm_N1.clamp_min(torch.finfo(x_NF.dtype).tiny), (norm_N1 == 0).squeeze(-1))

    def drift(self, other: Direction) -> Tensor:
        """`one_minus_cosine` of the rows that both were made of."""
        drift_N = (self.unit_NF - other.unit_NF).square_().sum(-1) / 2
        return torch.where(self.zero_N ^ other.zero_N, torch.ones_like(drift_N), drift_N)


def _norm(x_NF: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_NF, dim=-1, keepdim=True)


def parallel_and_orthogonal(x_NF: Tensor, y_NF: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with a = <dx, x> / |x|^2 and b = |dx - a x| / |x|: the parts of dx = y - x along x and across it.

    Both are 0 where x is: there is nothing to measure by. In float64, as b^2 of a short x overflows in float32.
    """
    x_NF, y_NF = widen(x_NF), widen(y_NF)
    dx_NF = y_NF - x_NF
    norm_N1 = _norm(x_NF)
    norm_N1 = norm_N1.masked_fill(norm_N1 == 0, torch.inf)
    unit_NF = x_NF / norm_N1
    along_N1 = (dx_NF * unit_NF).sum(-1, keepdim=True)
    across_N1 = _norm(dx_NF - along_N1 * unit_NF)
    norm_N1 = norm_N1.double()
    return (along_N1 / norm_N1).squeeze(-1), (across_N1 / norm_N1).squeeze(-1)


def drift_of_parts(a_N: Tensor, b_N: Tensor) -> Tensor:
    """1 - (1 + a) / sqrt((1 + a)^2 + b^2): theorem 1 in exact form, free of cancellation for a > -1."""
    along_N, length_N = 1 + a_N, torch.hypot(1 + a_N, b_N)
    return torch.where(along_N > 0, b_N.square() / (length_N * (length_N + along_N)), 1 - along_N / length_N)


def predicted_drift(x_NF: Tensor, y_NF: Tensor) -> Tensor:
    """b^2 / 2, theorem 1: 1 - cos to second order; blind to the parallel part (4x over at a = 1)."""
    return parallel_and_orthogonal(x_NF, y_NF)[1].square() / 2


def log_probabilities(z_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T)."""
    return torch.log_softmax(widen(z_NV) / temperature, dim=-1)


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) in nats: exactly 0 for equal rows, never negative, finite while the log probabilities are.

    sum p (e^d - 1 - d) with d = log q - log p: equal to the textbook sum p (log p - log q), as p and q each sum to 1.
    Every term is >= 0, so nothing cancels, and an error in either normaliser enters squared.
    """
    return _divergence(log_p_NV.exp(), log_q_NV.exp(), log_q_NV - log_p_NV)


def reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(q || p): what the pruned view says that the dense one would not."""
    return kl(log_q_NV, log_p_NV)


def _divergence(p_NV: Tensor, q_NV: Tensor, d_NV: Tensor) -> Tensor:
    small_NV = d_NV.clamp_max(1).expm1_().sub_(d_NV).mul_(p_NV)  # in place: on a CPU, half the time is memory
    # Beyond d = 1 by way of q = p e^d: e^d alone overflows in float32 where p underflows, and 0 * inf is NaN.
    large_NV = (q_NV - p_NV).addcmul_(p_NV, d_NV, value=-1)
    return torch.where(d_NV > 1, large_NV, small_NV).clamp_min_(0).sum(-1)


def weighted_variance(weight_NV: Tensor, x_NV: Tensor) -> Tensor:
    """sum w (x - sum w x)^2, for weights that sum to 1."""
    mean_N1 = (weight_NV * x_NV).sum(-1, keepdim=True)
    return (weight_NV * (x_NV - mean_N1).square()).sum(-1)


def var_p(log_p_NV: Tensor, dz_NV: Tensor) -> Tensor:
    """Var_p(dz): 2 T^2 KL to second order (theorem 3)."""
    return weighted_variance(log_p_NV.exp(), dz_NV)


def var_r(log_p_NV: Tensor, dz_NV: Tensor) -> Tensor:
    """Var_r(dz) with r = p^2 / sum p^2: 2 T^2 (1 - cos(p, q)) to second order (theorem 2)."""
    return weighted_variance(torch.softmax(2 * log_p_NV, dim=-1), dz_NV)


def kl_of_shift(log_p_NV: Tensor, x_NV: Tensor) -> Tensor:
    """-E_p[X] + log E_p[e^X]: theorem 3 in exact form, KL(p || q) from X = dz / T alone."""
    return torch.logsumexp(log_p_NV + x_NV, dim=-1) - (log_p_NV.exp() * x_NV).sum(-1)


def cosine_of_shift(log_p_NV: Tensor, x_NV: Tensor) -> Tensor:
    """E_r[e^X] / sqrt(E_r[e^2X]): theorem 2 in exact form, cos(p, q) from X = dz / T alone."""
    log_r_NV = torch.log_softmax(2 * log_p_NV, dim=-1)
    return (torch.logsumexp(log_r_NV + x_NV, -1) - torch.logsumexp(log_r_NV + 2 * x_NV, -1) / 2).exp()


def agreement(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(top-1, top-5): 1 where both rank the same token first, and the share of common tokens among the first TOP."""
    k = min(TOP, z_dense_NV.shape[-1])
    first_NK, second_NK = z_dense_NV.topk(k, -1).indices, z_pruned_NV.topk(k, -1).indices
    common_N = (first_NK[:, :, None] == second_NK[:, None, :]).any(-1).double().mean(-1)
    return (z_dense_NV.argmax(-1) == z_pruned_NV.argmax(-1)).double(), common_N


def state_drift(h_dense_ND: Tensor, h_pruned_ND: Tensor) -> dict[str, Tensor]:
    """Drift of hidden states, in float64 (rows are short): exact and predicted 1 - cos."""
    h_dense_ND, h_pruned_ND = h_dense_ND.double(), h_pruned_ND.double()
    return {
        "embedding": one_minus_cosine(h_dense_ND, h_pruned_ND),
        "embedding_predicted": predicted_drift(h_dense_ND, h_pruned_ND),
    }


def logit_drift(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> dict[str, Tensor]:
    """Drift of logits: `logit` is of centred logits, `logit_raw` as the paper has it."""
    centred_dense_NV, centred_pruned_NV = centred(z_dense_NV), centred(z_pruned_NV)
    top1_N, top5_N = agreement(z_dense_NV, z_pruned_NV)
    return {
        "logit": one_minus_cosine(centred_dense_NV, centred_pruned_NV),
        "logit_predicted": predicted_drift(centred_dense_NV, centred_pruned_NV),
        "logit_raw": one_minus_cosine(z_dense_NV, z_pruned_NV),
        "top1": top1_N,
        "top5": top5_N,
    }


def probability_drift(z_dense_NV: Tensor, z_pruned_NV: Tensor, temperature: float) -> dict[str, Tensor]:
    """Drift of probabilities at one temperature: KL both ways, 1 - cos(p, q), both variances of dz, and predictions."""
    log_p_NV, log_q_NV = log_probabilities(z_dense_NV, temperature), log_probabilities(z_pruned_NV, temperature)
    dz_NV = widen(z_pruned_NV) - widen(z_dense_NV)
    var_p_N, var_r_N = var_p(log_p_NV, dz_NV), var_r(log_p_NV, dz_NV)
    return {
        "kl": kl(log_p_NV, log_q_NV),
        "kl_predicted": var_p_N / (2 * temperature**2),
        "reverse_kl": reverse_kl(log_p_NV, log_q_NV),
        "probability": one_minus_cosine(log_p_NV.exp(), log_q_NV.exp()),
        "probability_predicted": var_r_N / (2 * temperature**2),
        "var_p": var_p_N,
        "var_r": var_r_N,
    }


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Logits in the three forms that `lens_drift` is made of: for a place that is held against several others."""

    log_p_NV: Tensor
    p_NV: Tensor
    logit: Direction
    probability: Direction

    @classmethod
    def of(cls, z_NV: Tensor) -> Distribution:
        """At T = 1."""
        log_p_NV = log_probabilities(z_NV)
        p_NV = log_p_NV.exp()
        return cls(log_p_NV, p_NV, Direction.of(centred(z_NV)), Direction.of(p_NV))

    def drift(self, other: Distribution) -> dict[str, Tensor]:
        """`lens_drift` of the logits of both, these being the dense ones."""
        return {
            "logit": self.logit.drift(other.logit),
            "probability": self.probability.drift(other.probability),
            "kl": _divergence(self.p_NV, other.p_NV, other.log_p_NV - self.log_p_NV),
        }


def lens_drift(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> dict[str, Tensor]:
    """The part of logit and probability drift (T = 1) that is followed through the blocks: the cheapest figures."""
    return Distribution.of(z_dense_NV).drift(Distribution.of(z_pruned_NV))


def stream_drift(h_dense_ND: Tensor, h_changed_ND: Tensor) -> dict[str, Tensor]:
    """Drift at one place of the residual stream, in float64: 1 - cos, and its parts along and across the dense state.

    With `lens_drift` of the logits there, the figures of a sublayer.
    """
    h_dense_ND, h_changed_ND = h_dense_ND.double(), h_changed_ND.double()
    parallel_N, orthogonal_N = parallel_and_orthogonal(h_dense_ND, h_changed_ND)
    return {
        "embedding": one_minus_cosine(h_dense_ND, h_changed_ND),
        "parallel": parallel_N,
        "orthogonal": orthogonal_N,
    }


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither a NaN nor an infinity, at the price of a sum.

    A sum with one among its summands is not finite. A sum may also overflow, and then each value is looked at.
    """
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def ratio(predicted_N: Tensor, exact_N: Tensor) -> Tensor:
    """predicted / exact, over the rows whose exact drift is more than rounding (their number may be 0)."""
    meant_N = exact_N > NEGLIGIBLE
    return predicted_N[meant_N] / exact_N[meant_N]


def quantiles(values_N: Tensor | Sequence[float]) -> dict[str, float | None]:
    """mean, p50, p90, p99 and max (linear interpolation), each None where there is no value: damage is in the tail."""
    values_N = torch.as_tensor(values_N, dtype=torch.float64).detach().flatten()
    if not len(values_N):
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    if not torch.isfinite(values_N).all():
        raise AssertionError("a non-finite value reached a summary: it must be refused where it arises")
    p50, p90, p99, largest = torch.quantile(values_N, values_N.new_tensor([0.5, 0.9, 0.99, 1.0])).tolist()
    return {"mean": values_N.mean().item(), "p50": p50, "p90": p90, "p99": p99, "max": largest}
