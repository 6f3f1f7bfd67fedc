"""Linear layers whose pruned view has a weight of its own, of the dense shape (rewritten) or a smaller one (sliced).

What pruning leaves as it was is shared with the dense view; only what it rewrites is held twice.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recover.models.masked_linear import Switch


class OwnLinear(nn.Linear):
    """An `nn.Linear` with a second weight for the pruned view. Made in place: its dense weight and names are untouched.

    `in_features` and `out_features` are those of the pruned view, which is what adapters are made for.
    """

    own_weight: Tensor
    own_bias: Tensor | None
    switch: Switch

    @classmethod
    def convert(cls, linear: nn.Linear, weight_OI: Tensor, bias_O: Tensor | None, switch: Switch) -> OwnLinear:
        """Turn this very module into one with an own weight; without `bias_O` the dense bias is seen in both views."""
        assert type(linear) is nn.Linear, f"a linear layer of type {type(linear)} would lose its own forward"
        own: Any = linear
        own.__class__ = cls
        own.out_features, own.in_features = weight_OI.shape
        like = linear.weight
        # Not persistent: a state dict stays the stock model's.
        own.register_buffer("own_weight", weight_OI.to(like.device, like.dtype), persistent=False)
        bias_O = linear.bias if bias_O is None else bias_O.to(like.device, like.dtype)
        own.register_buffer("own_bias", None if bias_O is None else bias_O.detach(), persistent=False)
        own.switch = switch
        return own

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + bias with the weight of the view that the switch shows."""
        if self.switch.dense:
            return F.linear(input, self.weight, self.bias)
        return F.linear(input, self.own_weight, self.own_bias)


def pruned_tensor(linear: nn.Module, cfg: str) -> Tensor:
    """`weight` or `bias` of a linear layer as the pruned view has it, before masks and adapters."""
    own = getattr(linear, f"own_{cfg}", None)
    return getattr(linear, cfg).detach() if own is None else own
