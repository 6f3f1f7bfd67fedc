"""From a hidden state to logits, and from a gradient with respect to logits back: for pruning, probing and training.

Logits are fp32 straight out of the product, also for half precision weights. Rounded to bf16, they would drown a small
drift (both views round on their own), and cost a gradient the more, the closer the pruned model is to the dense one.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
        return head if head.weight_VD.is_cuda else head._replace(weight_VD=_wide(head.weight_VD))

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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 out of the accumulator (fp64 stays fp64)."""
    common = torch.promote_types(a.dtype, b.dtype)
    if a.is_cuda and common not in (torch.float32, torch.float64):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(common, torch.float32)
    return torch.mm(a.to(wide), b.to(wide))
