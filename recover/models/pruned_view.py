"""Linear layers of a model made to show what a plan says in the pruned view: masks, rewritten and sliced weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from recover.base.errors import ModelError
from recover.models.arch import blocks_of, linears_of
from recover.models.masked_linear import MaskedLinear, Switch
from recover.models.own_linear import OwnLinear

if TYPE_CHECKING:
    from recover.models.plan import Plan


def see_pruned(
    model: PreTrainedModel, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], switch: Switch
) -> None:
    """Let the linear layers follow `switch`: `masks` by layer name, `weights` (and biases) by parameter name."""
    linears = linears_of(model)
    for name, keep_OI in masks.items():
        MaskedLinear.convert(linears[name], keep_OI, switch, weights.get(f"{name}.weight"))
    for parameter, weight_OI in weights.items():
        name, _, cfg = parameter.rpartition(".")
        if cfg == "weight" and name not in masks:
            OwnLinear.convert(linears[name], weight_OI, weights.get(f"{name}.bias"), switch)


def check_fit(model: PreTrainedModel, plan: Plan, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ModelError unless plan, masks and weights belong to this model and to each other."""
    linears, blocks = linears_of(model), blocks_of(model)
    if plan.blocks != len(blocks):
        raise ModelError(f"the plan is for {plan.blocks} blocks, this model has {len(blocks)}: prune this model anew")
    for what, planned, given in (("masks", plan.masks, masks), ("weights", plan.weights, weights)):
        differing = sorted(set(planned) ^ set(given))
        if differing:
            raise ModelError(
                f"the plan names {len(planned)} {what}, {len(given)} are given; differing: {differing[:4]}"
            )
    for name, keep_OI in masks.items():
        if name not in linears:
            raise ModelError(f"mask '{name}' belongs to no linear layer of this {model.config.model_type} model")
        shape = (linears[name].out_features, linears[name].in_features)
        if tuple(keep_OI.shape) != shape:
            raise ModelError(f"mask '{name}' has shape {tuple(keep_OI.shape)}, its layer {shape}")
    for parameter, weight in weights.items():
        name = parameter.rpartition(".")[0]
        if name not in linears or f"{name}.weight" not in weights:
            raise ModelError(f"weight '{parameter}' belongs to no linear layer of this {model.config.model_type} model")
        _check_shape(parameter, weight, linears[name], masked=name in masks)


def _check_shape(parameter: str, weight: Tensor, linear: object, *, masked: bool) -> None:
    """A rewritten weight has the dense shape, a sliced one is smaller; under a mask it is rewritten."""
    dense = tuple(getattr(linear, parameter.rpartition(".")[2]).shape)
    found = tuple(weight.shape)
    larger = len(found) != len(dense) or any(new > old for new, old in zip(found, dense, strict=False))
    if larger or (masked and found != dense):
        raise ModelError(f"weight '{parameter}' has shape {found}, its layer {dense}")
