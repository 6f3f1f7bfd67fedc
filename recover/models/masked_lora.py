"""LoRA layers that know the twin's two views: off in the dense view, inside the mask in the pruned one.

peft builds its ordinary layers; `adopt_layer` then switches their class in place. So names, files and merging stay
peft's, and an adapter read back by `PeftModel.from_pretrained` becomes ours too (peft's registration of custom layers,
marked experimental, is not written into adapter files and would miss it).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from recover.errors import ModelError
from recover.models.masked_linear import Factors, MaskedLinear, Switch, effective_weight, masked_lora_linear


class SwitchedLora(lora.Linear):
    """A peft LoRA layer that is its base layer alone in the dense view.

    (`disable_adapter()` would do, but toggles requires_grad of every adapter on each use.)
    """

    switch: Switch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer in the dense view, peft's own forward in the pruned one."""
        if self.switch.dense:
            return self.base_layer(x)
        return super().forward(x, *args, **kwargs)

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """Under autocast the input as it is: the product casts it back, and each adapter would keep a copy of its own.

        Same values: a half-precision input that peft widens to float32 comes back as it was. Unless dropout comes in
        between, which scales more exactly in float32, and gives each adapter an input of its own anyway.
        """
        plain = all(isinstance(dropout, nn.Identity) for dropout in self.lora_dropout.values())
        if plain and isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
            return x
        return super()._cast_input_dtype(x, dtype)


class MaskedLora(SwitchedLora):
    """LoRA on a MaskedLinear: x ((W + s B A) * keep)^T, so that an update never fills a pruned weight."""

    base_layer: MaskedLinear

    def factors(self) -> Factors | None:
        """The active adapter's factors, or none if adapters are disabled; raises ModelError if several are active."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) > 1:
            raise ModelError(f"adapters {names} are active at once on a masked layer; expected one: delete the others")
        if not names:
            return None
        return self._factors(names[0])

    def _factors(self, adapter: str) -> Factors:
        lora_a: Any = self.lora_A[adapter]
        lora_b: Any = self.lora_B[adapter]
        return Factors(lora_a.weight, lora_b.weight, self.scaling[adapter])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the class says; with LoRA dropout the update sees the dropped-out input, the weight the whole one."""
        if self.switch.dense:
            return self.base_layer(x)
        factors = self.factors()
        dropout = nn.Identity() if factors is None else self.lora_dropout[self.active_adapters[0]]
        if factors is None or isinstance(dropout, nn.Identity) or not self.training:
            return self.base_layer(x, factors)
        return self.base_layer(x) + masked_lora_linear(dropout(x), None, self.base_layer.keep_packed, *factors)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What peft adds to W to merge: (W + s B A) * keep - W, exactly -W where the mask is closed."""
        weight_OI = self.base_layer.weight.data
        effective_OI = effective_weight(self.base_layer.seen, self.base_layer.keep_packed, self._factors(adapter))
        return (effective_OI - weight_OI).to(weight_OI.dtype)


def adopt_layer(layer: Any, switch: Switch) -> None:
    """Make a LoRA layer of peft follow `switch`; raises ModelError for a LoRA variant that the twin cannot switch."""
    if type(layer) not in (lora.Linear, SwitchedLora, MaskedLora) or layer.lora_variant:
        raise ModelError(f"LoRA layer of type {type(layer).__name__} is not supported; expected plain LoRA on linears")
    layer.__class__ = MaskedLora if isinstance(layer.base_layer, MaskedLinear) else SwitchedLora
    layer.switch = switch


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """Every LoRA layer below `model`."""
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
