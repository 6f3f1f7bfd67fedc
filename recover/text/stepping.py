"""A model made ready to write texts: fewer, larger products, and fused kernels between them; undone afterwards.

Writing is many passes over one token a row, with weights that stay. So what is done to a weight in every pass is done
once: adapters are added to it, masks laid on it, in float32 and rounded once, as in an export. What is written is then
what the exported model writes. Weights that multiply the same input (query, key and value; gate and up) become one.

In float32 texts are those of the model as it was; in half precision they may part from it at near ties.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recover.base import zero
from recover.kernels import fused
from recover.models.lean import make_lean
from recover.models.linears import Factors, MaskedLinear, OwnLinear, Switch, effective_weight

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one input
SHARE = 0.25  # of the memory that is free, at most, goes to weights made for writing


@contextmanager
def stepping(model: nn.Module) -> Iterator[None]:
    """Inside, the model writes faster: by kernels where there are some, with weights made ready where memory allows.

    Weights, adapters, masks and the view must not change inside. Modules, names and parameters are restored.
    """
    with by_kernels(model), in_few_products(model):
        yield


@contextmanager
def by_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, norms, gates and rotary embedding are fused kernels, as in training; without a GPU, nothing happens."""
    if not fused.available(_device(model)):
        yield
        return
    before = [(module, type(module), "switch" in vars(module)) for module in model.modules()]
    switch = _switch(model) or Switch()
    writing, switch.writing = switch.writing, True
    try:
        make_lean(model, switch)
        yield
    finally:
        switch.writing = writing
        for module, kind, switched in before:
            if type(module) is not kind:
                module.__class__ = kind
                if not switched:
                    del module.switch


@contextmanager
def in_few_products(model: nn.Module) -> Iterator[None]:
    """Inside, adapters and masks are part of the weights; on a GPU, products of one input are one product."""
    device = _device(model)
    groups = [group for group in _groups(model) if joins(device) or any(each.made for each in group.members)]
    if not groups or sum(group.bytes for group in groups) > SHARE * free_memory(device):
        yield
        return
    products = []
    try:
        with torch.no_grad():
            for group in groups:
                products.append(_Product.of(group))
        yield
    finally:
        for product in products:
            product.leave()


def joins(device: torch.device) -> bool:
    """Whether one product of a larger matrix beats several: on a GPU, where a small one leaves most of it idle."""
    return device.type == "cuda"


class _Member(NamedTuple):
    """A linear layer; `made`: its weight is not what a parameter holds."""

    linear: Any
    made: bool
    like: Tensor  # the dense weight


class _Group(NamedTuple):
    members: list[_Member]

    @property
    def bytes(self) -> int:
        return sum(
            each.linear.out_features * each.linear.in_features * each.like.element_size() for each in self.members
        )


class _Product:
    """Layers of one input: whichever is asked first computes all, the others find theirs done."""

    def __init__(self, layers: Sequence[Any], weight_OI: Tensor, bias_O: Tensor | None, sizes: list[int]) -> None:
        self.layers, self.weight_OI, self.bias_O, self.sizes = layers, weight_OI, bias_O, sizes
        self.x: Tensor | None = None
        self.parts: list[Tensor | None] = []
        for number, layer in enumerate(layers):
            layer.forward = self._asked(number)

    @classmethod
    def of(cls, group: _Group) -> _Product:
        layers = [each.linear for each in group.members]
        found = [_seen(layer) for layer in layers]
        weights, biases = [weight for weight, _ in found], [bias for _, bias in found]
        bias_O = None
        if any(bias is not None for bias in biases):
            biases = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            bias_O = torch.cat(biases)
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        return cls(layers, weight_OI, bias_O, [len(weight) for weight in weights])

    def _asked(self, number: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self.x is not x or self.parts[number] is None:
                self.parts = list(F.linear(x, self.weight_OI, self.bias_O).split(self.sizes, -1))
                self.x = x
            found, self.parts[number] = self.parts[number], None
            if all(part is None for part in self.parts):
                self.x = None
            assert found is not None
            return found

        return forward

    def leave(self) -> None:
        self.x, self.parts = None, []
        for layer in self.layers:
            del layer.forward


def _groups(model: nn.Module) -> Iterator[_Group]:
    """Layers that could share a product, and after those each layer alone whose weight would be made anew."""
    taken: set[int] = set()
    for module in model.modules():
        shut = getattr(module, "closed", False)
        if shut and not _dense(module):
            taken |= {id(inner) for inner in module.modules()}
            continue
        for names in TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            members = [_member(layer) for layer in layers if id(layer) not in taken]
            fitting = [each for each in members if each is not None]
            if len(fitting) == len(names) and len({_input(each) for each in fitting}) == 1:
                taken |= {id(inner) for layer in layers for inner in layer.modules()}  # type: ignore[union-attr]
                yield _Group(fitting)
    for module in model.modules():
        member = None if id(module) in taken else _member(module)
        if member is not None and member.made:
            taken |= {id(inner) for inner in module.modules()}
            yield _Group([member])


def _input(member: _Member) -> tuple[int, torch.dtype, torch.device]:
    return member.linear.in_features, member.like.dtype, member.like.device


def _member(layer: Any) -> _Member | None:
    """None for what is no linear layer, for one that does more than multiply, and where the weight is not at hand."""
    from recover.models.masked_lora import MaskedLora, SwitchedLora, hooked

    if type(layer) in (SwitchedLora, MaskedLora):
        base, names = layer.base_layer, [name for name in layer.active_adapters if name in layer.lora_A]
        inner = _member(base)
        if inner is None or hooked(layer):
            return None
        if layer.switch.dense or layer.disable_adapters or layer.merged or not names:
            return _Member(layer, inner.made, inner.like)
        parts = [layer.lora_A[names[0]], layer.lora_B[names[0]]]
        if len(names) > 1 or parts[1].bias is not None or any(map(hooked, parts)) or not all(map(_at_hand, parts)):
            return None
        return _Member(layer, type(layer) is SwitchedLora or not layer.switch.fold, inner.like)
    if type(layer) not in (nn.Linear, OwnLinear, MaskedLinear) or hooked(layer) or not _at_hand(layer):
        return None
    made = type(layer) is MaskedLinear and not layer.switch.dense and not layer.switch.fold
    return _Member(layer, made, layer.weight)


def _at_hand(layer: Any) -> bool:
    """Whether its weight is here: not dealt out by ZeRO-3, nor with its owner on another GPU."""
    weight = layer.weight
    return not zero.dealt_out(weight) and not weight.is_meta and weight.untyped_storage().nbytes() > 0


def _seen(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the view has them, adapters and masks among them."""
    from recover.models.masked_lora import MaskedLora, SwitchedLora, base_parameters

    if type(layer) in (SwitchedLora, MaskedLora):
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.switch.dense or layer.disable_adapters or layer.merged or not names:
            return _seen(layer.base_layer)
        factors = layer._factors(names[0])
        if type(layer) is MaskedLora:
            base = layer.base_layer
            return _masked(base, factors), base.bias
        weight_OI, bias_O = base_parameters(layer)
        wide = torch.promote_types(factors.a_RI.dtype, torch.float32)
        update_OI = (factors.b_OR.to(wide) @ factors.a_RI.to(wide)).mul_(factors.scaling)
        return update_OI.add_(weight_OI).to(weight_OI.dtype), bias_O
    if type(layer) is MaskedLinear and not layer.switch.dense:
        return _masked(layer, None), layer.bias
    if type(layer) is OwnLinear and not layer.switch.dense:
        return layer.own_weight, layer.own_bias
    return layer.weight, layer.bias


def _masked(layer: MaskedLinear, factors: Factors | None) -> Tensor:
    """The effective weight, kept by the layer where it is to keep it anyway."""
    found_OI = layer.folded
    if found_OI is None:
        found_OI = effective_weight(layer.seen, layer.keep_packed, factors).to(layer.weight.dtype)
        layer.folded = found_OI if layer.switch.fold else None
    return found_OI


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on this device may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, IndexError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _dense(module: Any) -> bool:
    return getattr(getattr(module, "switch", None), "dense", False)


def _switch(model: nn.Module) -> Switch | None:
    """Of the twin that the model belongs to, if it does."""
    found = (getattr(module, "switch", None) for module in model.modules())
    return next((each for each in found if isinstance(each, Switch)), None)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
