"""What a pass over one token a row stands on: its keys and values, and a model made ready for it.

Keys and values are those of a batch whose rows are at different places: one cache to append to, one with a slot for
each row. Both are handed to stock models together with masks made here, so that rows of different length need no
padding between their tokens, and so that no model has to guess where a row is.

A model is made ready to write texts (`stepping`) by fewer, larger products, and fused kernels between them; undone
afterwards. Writing is many passes over one token a row, with weights that stay. So what is done to a weight in every
pass is done once: adapters are added to it, masks laid on it, in float32 and rounded once, as in an export. What is
written is then what the exported model writes. Weights that multiply the same input (query, key and value; gate and up)
become one. In float32 texts are those of the model as it was; in half precision they may part from it at near ties.

Legend: B batch, H key-value heads, T tokens of this pass, K columns of the cache, d head size, G rows of a group, O out
features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from recover.base import main_memory, zero
from recover.kernels import fused
from recover.models.arch import arch_of, taking_cache
from recover.models.attention import goes_by_length
from recover.models.lean import make_lean
from recover.models.masked_lora import MaskedLora, SwitchedLora, base_parameters, hooked
from recover.models.stored_weights import comes_and_goes
from recover.models.switched import Factors, MaskedLinear, OwnLinear, Switch, effective_weight

FULL, SLIDING = "full_attention", "sliding_attention"
MASKED_BY_US = {"sdpa", "eager"}  # attention that takes a mask of (B, 1, T, K)

Mask = Tensor | dict[str, Tensor]


class Appending(Cache):
    """Holds what each block has seen, all of it (sliding windows are the mask's business); T tokens at each pass."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # no entry for a closed block

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.kv:
            keys_BHKd, values_BHKd = self.kv[layer_idx]
            key_states = torch.cat([keys_BHKd, key_states], dim=2)
            value_states = torch.cat([values_BHKd, value_states], dim=2)
        self.kv[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def rows(self, index_G: Tensor) -> Appending:
        """A cache of these rows, each as often as it is named."""
        found = Appending()
        found.kv = {layer: (keys[index_G], values[index_G]) for layer, (keys, values) in self.kv.items()}
        return found


class Slots(Cache):
    """B slots of K columns; a decoding pass writes each row's key and value at `position_B` and sees `visible` columns.

    Memory stays where it is until `keep`, so a CUDA graph may hold it.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.columns = self.visible = columns
        self.position_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.row_B = torch.arange(rows, device=device)
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys_BHKd, values_BHKd = self.kv[layer_idx]
        key_BHd, value_BHv = key_states[:, :, 0], value_states[:, :, 0]
        if fused.fits(key_BHd, value_BHv, keys_BHKd, values_BHKd):
            fused.kernels().put(key_BHd, value_BHv, keys_BHKd, values_BHKd, self.position_B)
        else:
            keys_BHKd[self.row_B, :, self.position_B] = key_BHd
            values_BHKd[self.row_B, :, self.position_B] = value_BHv
        return keys_BHKd[:, :, : self.visible], values_BHKd[:, :, : self.visible]

    def fill(self, slot_G: Tensor, read: Appending) -> None:
        """Put prompts that were read padded on the right into slots, from column 0 on.

        Behind a row's end stands its padding: hidden until written over, and finite.
        """
        for layer, (keys_GHTd, values_GHTd) in read.kv.items():
            if layer not in self.kv:
                self.kv[layer] = (self._empty(keys_GHTd), self._empty(values_GHTd))
            for slots_BHKd, read_GHTd in zip(self.kv[layer], (keys_GHTd, values_GHTd), strict=True):
                slots_BHKd[slot_G, :, : read_GHTd.shape[2]] = read_GHTd

    def keep(self, slot_G: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self.kv = {layer: (keys[slot_G], values[slot_G]) for layer, (keys, values) in self.kv.items()}
        self.position_B = self.position_B[slot_G]
        self.row_B = self.row_B[: len(slot_G)]

    def _empty(self, like_GHTd: Tensor) -> Tensor:
        _, heads, _, size = like_GHTd.shape
        return like_GHTd.new_zeros(len(self.row_B), heads, self.columns, size)


def fits(model: PreTrainedModel) -> bool:
    """Whether these caches and masks serve the model: softmax attention in every block, full or in a sliding window."""
    config = model.config.get_text_config()
    return (
        not arch_of(model).mixer and _types(config) <= {FULL, SLIDING} and config._attn_implementation in MASKED_BY_US
    )


def _types(config: Any) -> set[str]:
    listed = getattr(config, "layer_types", None)
    if listed:
        return set(listed)
    return {SLIDING if getattr(config, "sliding_window", None) else FULL}


def masks(model: PreTrainedModel, at_BT: Tensor, key_at_BK: Tensor, is_key_BK: Tensor | None = None) -> Mask:
    """What is added to attention scores, (B, 1, T, K): 0 where a token at `at_BT` may see the key at `key_at_BK`.

    `is_key_BK`: False for padding; default: all are keys. A dict by type, as models take it, where blocks differ in it.
    """
    config = model.config.get_text_config()
    distance_BTK = at_BT[:, :, None] - key_at_BK[:, None, :]
    seen_BTK = distance_BTK >= 0
    if is_key_BK is not None:
        seen_BTK = seen_BTK & is_key_BK[:, None, :]
    types = _types(config)
    made = {FULL: seen_BTK} if FULL in types else {}
    if SLIDING in types:
        made[SLIDING] = seen_BTK & (distance_BTK < config.sliding_window)
    added = {name: _added(allowed_BTK, model.dtype) for name, allowed_BTK in made.items()}
    return added if len(added) > 1 else next(iter(added.values()))


def _added(allowed_BTK: Tensor, dtype: torch.dtype) -> Tensor:
    """The lowest number, not -inf: a row of padding that sees nothing must not become NaN."""
    added_BTK = torch.zeros(allowed_BTK.shape, dtype=dtype, device=allowed_BTK.device)
    return added_BTK.masked_fill_(~allowed_BTK, torch.finfo(dtype).min)[:, None]


def read(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> tuple[Any, Appending, Tensor]:
    """(output, cache, positions_BT) of a first pass over prompts padded on the left."""
    at_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = Appending()
    mask = masks(model, at_BT, at_BT, mask_BT.bool())
    options |= {"use_cache": True, **taking_cache(model, cache)}
    output = model(input_ids=ids_BT, attention_mask=mask, position_ids=at_BT, **options)
    return output, cache, at_BT


def read_on(model: PreTrainedModel, ids_BT: Tensor, length_B: Tensor) -> tuple[Tensor, Appending]:
    """(logits_BV behind each prompt's last token, cache) of a first pass over prompts padded on the right.

    No token sees the padding behind it, so no mask is made for it, and attention stays its causal kernel.
    """
    cache, head = Appending(), cast("torch.nn.Module", model.get_output_embeddings())
    row_B = torch.arange(len(ids_BT), device=ids_BT.device)

    def last_alone(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][row_B, length_B - 1][:, None],)

    hook = head.register_forward_pre_hook(last_alone)
    options: dict[str, Any] = taking_cache(model, cache)
    if goes_by_length(model):  # by that of the row, without its padding
        at_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        options["position_ids"] = torch.where(at_T < length_B[:, None], at_T, 0)
    try:
        output = model(input_ids=ids_BT, use_cache=True, **options)
    finally:
        hook.remove()
    return output.logits[:, -1], cache


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
    """Whether its weight is here, and stays: not dealt out by ZeRO-3, nor one that comes and goes."""
    weight = layer.weight
    return not zero.dealt_out(weight) and not weight.is_meta and not comes_and_goes(weight)


def _seen(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the view has them, adapters and masks among them."""
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
    return main_memory.free()


def _dense(module: Any) -> bool:
    return getattr(getattr(module, "switch", None), "dense", False)


def _switch(model: nn.Module) -> Switch | None:
    """Of the twin that the model belongs to, if it does."""
    found = (getattr(module, "switch", None) for module in model.modules())
    return next((each for each in found if isinstance(each, Switch)), None)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
