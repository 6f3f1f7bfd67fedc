"""LoRA layers that know the twin's two views: off in the dense view, inside the mask in the pruned one.

peft builds its ordinary layers; `adopt_layer` then switches their class in place. So names, files and merging stay
peft's, and an adapter read back by `PeftModel.from_pretrained` becomes ours too (peft's registration of custom layers,
marked experimental, is not written into adapter files and would miss it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper, transformers_weight_conversion
from torch import Tensor, nn

from recover.base.errors import ModelError
from recover.kernels.fused import lora_linear
from recover.models.experts import ExpertFactors, SwitchedExperts, SwitchedRouter
from recover.models.switched import Factors, MaskedLinear, OwnLinear, Switch, effective_weight, masked_lora_linear


class SwitchedLora(lora.Linear):
    """A peft LoRA layer that is its base layer alone in the dense view.

    (`disable_adapter()` would do, but toggles requires_grad of every adapter on each use.)
    """

    switch: Switch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer in the dense view, with the update in the pruned one: in one step where `foldable` says so."""
        if self.switch.dense:
            return self.base_layer(x)
        factors = None if args or kwargs else self.foldable(x)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        return lora_linear(x, *base_parameters(self), *factors)

    def foldable(self, x: Tensor) -> Factors | None:
        """The factors if all that peft's forward would do is a frozen linear layer and one update in x's dtype.

        Else none: dropout, several adapters, weights that are trained, hooks that wait for one of the layers (as those
        of ZeRO-3 do, where it gathers layer by layer), and dtypes that meet only by peft's casts.
        """
        base: Any = self.base_layer
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or type(base) not in (nn.Linear, OwnLinear):
            return None
        lora_a, lora_b, dropout = (part[names[0]] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        if not isinstance(dropout, nn.Identity) or lora_b.bias is not None:
            return None
        if any(map(hooked, (base, lora_a, lora_b))):
            return None
        frozen = not any(each.requires_grad for each in base.parameters())
        factors = self._factors(names[0])
        return factors if frozen and _one_dtype(x, base.weight.dtype, factors) else None

    def _factors(self, adapter: str) -> Factors:
        lora_a: Any = self.lora_A[adapter]
        lora_b: Any = self.lora_B[adapter]
        return Factors(lora_a.weight, lora_b.weight, self.scaling[adapter])

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


class ExpertLora(lora.layer.ParamWrapper):
    """LoRA on a matrix of every expert; peft puts one around the other where both matrices of an expert have it.

    An expert's update is applied to that expert's tokens. (peft adds all updates to all weights, a copy of them each
    time, which autograd would keep.)
    """

    switch: Switch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts alone in the dense view, with the updates in the pruned one."""
        experts = cast(SwitchedExperts, self.get_base_layer())
        factors = None if self.switch.dense else expert_factors(self)
        return experts(x, *args, **kwargs, factors=factors)

    def factors(self) -> ExpertFactors | None:
        """The active adapter's factors, or none if it is disabled; raises ModelError if several are active."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        if len(names) > 1:
            raise ModelError(f"adapters {names} are active at once on experts; expected one: delete the others")
        layers: Any = self.lora_A[names[0]], self.lora_B[names[0]]
        a, b = (layer.weight for layer in layers)  # (E R, I) and (O, R E), as peft has them
        a_ERI = a.unflatten(0, (self.num_experts, -1))
        b_EOR = b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
        return ExpertFactors(a_ERI, b_EOR, self.scaling[names[0]])


def expert_factors(layer: Any) -> dict[str, ExpertFactors]:
    """The updates around experts, by the name of the matrix that each is of."""
    found: dict[str, ExpertFactors] = {}
    while isinstance(layer, ExpertLora):
        if (factors := layer.factors()) is not None:
            found[layer.parameter_name] = factors
        layer = layer.base_layer
    return found


class TrainedCopy(ModulesToSaveWrapper):
    """A router that learns, in the pruned view, beside the one that it was, which the dense view has."""

    switch: Switch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the view's router gives."""
        return (self.original_module if self.switch.dense else self.seen())(*args, **kwargs)

    def seen(self) -> nn.Module:
        """The module of the pruned view."""
        name = next(iter(self.active_adapters), None)
        return self.original_module if self.disable_adapters or name is None else self.modules_to_save[name]


def base_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias below a LoRA layer, as the pruned view has them."""
    base: Any = layer.base_layer
    return (base.own_weight, base.own_bias) if isinstance(base, OwnLinear) else (base.weight, base.bias)


def hooked(layer: Any) -> bool:
    """Whether a call of this layer does more than its class's forward."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__


def _one_dtype(x: Tensor, weight: torch.dtype, factors: Factors) -> bool:
    """Whether x and W are in the dtype that the products would be in, adapters being cast by autocast or in it too."""
    if x.dtype != weight:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype == torch.get_autocast_dtype(x.device.type)
    return all(factor.dtype == x.dtype for factor in (factors.a_RI, factors.b_OR))


@contextmanager
def targets_by_name() -> Iterator[None]:
    """Inside, peft puts LoRA on what is named, as it is.

    Else it takes a linear layer called as a matrix of experts was in transformers 4 for that: `gate_proj` of a shared
    expert would become LoRA on all experts.
    """
    stock = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = stock


def adopt_layer(layer: Any, switch: Switch) -> None:
    """Make a LoRA layer of peft follow `switch`; raises ModelError for a LoRA variant that the twin cannot switch."""
    kind = type(layer)
    if kind is lora.layer.ParamWrapper and isinstance(layer.get_base_layer(), SwitchedExperts):
        layer.__class__, layer.switch = ExpertLora, switch
        return
    if kind not in (lora.Linear, SwitchedLora, MaskedLora) or layer.lora_variant:
        raise ModelError(f"LoRA layer of type {kind.__name__} is not supported; expected plain LoRA on linears")
    layer.__class__ = MaskedLora if isinstance(layer.base_layer, MaskedLinear) else SwitchedLora
    layer.switch = switch


def adopt_copy(wrapper: Any, switch: Switch) -> None:
    """Make a module that peft trains in another's place follow `switch`; ModelError for what is no router."""
    copies = list(wrapper.modules_to_save.values())
    if not all(isinstance(copy, SwitchedRouter) for copy in copies):
        raise ModelError(f"{type(copies[0]).__name__} is trained as a whole; expected LoRA, or routers of experts")
    wrapper.__class__, wrapper.switch = TrainedCopy, switch
    for copy in copies:
        copy.switch = switch


def trained_copies(model: nn.Module) -> list[nn.Module]:
    """Every module below `model` of which peft trains a copy."""
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def adapted_tensors(model: nn.Module) -> list[str]:
    """The stock names of all tensors below `model` that adapters change, or of which a copy is trained."""
    found: list[str] = []
    for name, module in model.named_modules():
        plain = name.replace(".base_layer", "")
        if isinstance(module, lora.layer.ParamWrapper):
            found.append(f"{plain}.{module.parameter_name}")
        elif isinstance(module, lora.LoraLayer | ModulesToSaveWrapper):
            found.append(f"{plain}.weight")
    return found


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """Every LoRA layer below `model`."""
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
