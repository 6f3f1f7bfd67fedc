"""Modules that show one of a twin's two views: linear layers in the pruned one, blocks and sublayers that are closed.

A linear layer shows the pruned view through a mask, or with a weight of its own; W is never changed.
Masked: y = x ((W + s B A) * keep)^T + bias. The naive form keeps the masked weight of every layer alive for backward, a
second copy of the model. Here the effective weight is made again in backward, and masks are packed, 1 bit a weight.
Own: a weight of the dense shape (rewritten) or a smaller one (sliced). What pruning leaves as it was is shared with the
dense view; only what it rewrites is held twice.

A closed block or sublayer does nothing to the residual stream, and is not run. A closed block hands its input on; a
closed sublayer gives 0, which the block adds (norms behind a sublayer, as in Gemma and OLMo 2, turn 0 into 0). Either
equals the model without it, bit for bit.

Shapes: O out features, I in features, R rank, M input rows (all leading dimensions of x as one); B batch, T tokens, D
width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from recover.base.errors import ModelError
from recover.models.arch import Arch, cache_among, cache_name, kind_in, linears_of, mixture_in, modules_in
from recover.models.site import SUBLAYERS, Site, Sublayer, whole_blocks
from recover.models.stored_weights import original


@dataclasses.dataclass
class Switch:
    """Which view a twin shows. One object, read by every switched module at each forward."""

    dense: bool = False
    fold: bool = False  # keep the effective weights between forward passes, while gradients are off
    teaching: bool = False  # the dense view is shown for a training step to learn from
    writing: bool = False  # texts are being written
    kernels: bool = True  # training and writing may use fused kernels, where there are some
    # Stock blocks return tuples (Granite in transformers 5.3): an open block finds out, None until then.
    tuples: bool | None = None

    def fused(self, training: bool) -> bool:
        """Whether a module runs for training or writes, so that fused kernels may. What judges is stock, to the bit.

        By the module's own training flag in the pruned view: checkpointing runs it again in backward, when nothing but
        that says so. The dense view has all flags off.
        """
        return self.kernels and (self.writing or (self.teaching if self.dense else training))


class Factors(NamedTuple):
    """A low-rank update s B A."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


def pack(keep_OI: Tensor) -> Tensor:
    """The mask as a row of uint8, 8 entries a byte, first entry in the highest bit (as `numpy.packbits`)."""
    flat = keep_OI.flatten().to(torch.uint8)
    eights = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (eights << _shifts(keep_OI.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The bool mask of `shape` that `pack` was given."""
    count = 1
    for size in shape:
        count *= size
    bits = packed.unsqueeze(-1).bitwise_right_shift(_shifts(packed.device)).bitwise_and_(1)
    return bits.view(torch.bool).flatten()[:count].view(shape)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def effective_weight(weight_OI: Tensor | None, keep_packed: Tensor, factors: Factors | None = None) -> Tensor:
    """(W + s B A) * keep with every masked entry exactly 0: W's dtype without factors, float32 or wider with them.

    The one expression that training, generation and merge share: a merge in float32, cast once, is what was trained.
    """
    if factors is None:
        assert weight_OI is not None, "neither a weight nor factors"
        return weight_OI.masked_fill(~unpack(keep_packed, weight_OI.shape), 0)
    wide = torch.promote_types(factors.a_RI.dtype, torch.float32)
    low_rank_OI = (factors.b_OR.to(wide) @ factors.a_RI.to(wide)).mul_(factors.scaling)
    if weight_OI is not None:
        low_rank_OI = weight_OI + low_rank_OI
    return low_rank_OI.masked_fill_(~unpack(keep_packed, low_rank_OI.shape), 0)


class _MaskedLoraLinear(torch.autograd.Function):
    """Saves its inputs only; W gets no gradient (it is the dense model's, and frozen)."""

    @staticmethod
    def forward(ctx, x, weight_OI, keep_packed, a_RI, b_OR, scaling, bias_O):  # type: ignore[override]
        ctx.save_for_backward(x, weight_OI, keep_packed, a_RI, b_OR)
        ctx.scaling = scaling
        factors = None if a_RI is None else Factors(a_RI, b_OR, scaling)
        # Autocast would round W + s B A before the mask; merge does not, and the two must agree.
        with torch.autocast(x.device.type, enabled=False):
            weight = effective_weight(weight_OI, keep_packed, factors).to(x.dtype)
            return F.linear(x, weight, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight_OI, keep_packed, a_RI, b_OR = ctx.saved_tensors
        factors = None if a_RI is None else Factors(a_RI, b_OR, ctx.scaling)
        dx = da_RI = db_OR = dbias_O = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ effective_weight(weight_OI, keep_packed, factors).to(dy.dtype)
            dy_MO = dy.flatten(0, -2)
            if factors is not None and (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
                da_RI, db_OR = _factor_gradients(dy_MO, x.flatten(0, -2), keep_packed, factors)
            if ctx.needs_input_grad[6]:
                dbias_O = dy_MO.sum(0)
        return dx, None, None, da_RI, db_OR, None, dbias_O


def _factor_gradients(dy_MO: Tensor, x_MI: Tensor, keep_packed: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    a_RI, b_OR, scaling = factors
    wide = torch.promote_types(a_RI.dtype, torch.float32)
    dweight_OI = (dy_MO.T @ x_MI.to(dy_MO.dtype)).to(wide)
    dweight_OI = dweight_OI.masked_fill_(~unpack(keep_packed, dweight_OI.shape), 0).mul_(scaling)
    da_RI = b_OR.to(wide).T @ dweight_OI
    db_OR = dweight_OI @ a_RI.to(wide).T
    return da_RI.to(a_RI.dtype), db_OR.to(b_OR.dtype)


def masked_lora_linear(
    x: Tensor,
    weight_OI: Tensor | None,
    keep_packed: Tensor,
    a_RI: Tensor | None,
    b_OR: Tensor | None,
    scaling: float = 1.0,
    bias_O: Tensor | None = None,
) -> Tensor:
    """Equal to `F.linear(x, (weight + scaling * b @ a) * keep, bias)`, as are the gradients of x, a, b, bias.

    Nothing of the weight's size but the weight itself is kept for backward; `weight` gets no gradient. Without `a` and
    `b` the update is left out; without `weight` only the masked update is applied (LoRA dropout needs the two apart).
    """
    return _MaskedLoraLinear.apply(x, weight_OI, keep_packed, a_RI, b_OR, scaling, bias_O)  # type: ignore[return-value]


class MaskedLinear(nn.Linear):
    """An `nn.Linear` that a switch shows dense or masked. Made in place: weight, bias and their names are untouched."""

    keep_packed: Tensor
    own_weight: Tensor | None
    switch: Switch
    folded: Tensor | None

    @classmethod
    def convert(cls, linear: nn.Linear, keep_OI: Tensor, switch: Switch, own_OI: Tensor | None = None) -> MaskedLinear:
        """Turn this very module into a masked one; on a masked one, replace its mask.

        With `own_OI` the pruned view has that weight under its mask and not the dense one (SparseGPT rewrites weights).
        """
        if type(linear) not in (nn.Linear, cls):
            raise AssertionError(f"a linear layer of type {type(linear)} would lose its own forward")
        if not (keep_OI.dtype == torch.bool and keep_OI.shape == (linear.out_features, linear.in_features)):
            raise AssertionError(keep_OI.shape)
        masked: Any = linear
        masked.__class__ = cls
        # Not persistent: a state dict stays the stock model's.
        masked.register_buffer("keep_packed", pack(keep_OI).to(linear.weight.device), persistent=False)
        own_OI = None if own_OI is None else own_OI.to(linear.weight.device, linear.weight.dtype)
        masked.register_buffer("own_weight", own_OI, persistent=False)
        masked.switch, masked.folded = switch, None
        return masked

    @property
    def seen(self) -> Tensor:
        """The weight (O, I) that the pruned view has under its mask, before adapters."""
        return self.weight if self.own_weight is None else self.own_weight

    @property
    def keep(self) -> Tensor:
        """The mask, bool (O, I), true = survives."""
        return unpack(self.keep_packed, (self.out_features, self.in_features))

    def forward(self, input: Tensor, factors: Factors | None = None) -> Tensor:
        """x W^T in the dense view, x ((W + s B A) * keep)^T in the pruned one; plus bias in both."""
        if self.switch.dense:
            return F.linear(input, self.weight, self.bias)
        if self.switch.fold and not torch.is_grad_enabled():
            if self.folded is None:
                self.folded = effective_weight(self.seen, self.keep_packed, factors).to(input.dtype)
            return F.linear(input, self.folded, self.bias)
        a_RI, b_OR, scaling = factors or (None, None, 1.0)
        return masked_lora_linear(input, self.seen, self.keep_packed, a_RI, b_OR, scaling, self.bias)


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
        if type(linear) is not nn.Linear:
            raise AssertionError(f"a linear layer of type {type(linear)} would lose its own forward")
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


def pruned_tensor(linear: nn.Module, name: str) -> Tensor:
    """`weight` or `bias` of a linear layer as the pruned view has it, before masks and adapters.

    Of a model that is held in few bits, dense values are those of its files. Weights that come and go must be here.
    """
    own = getattr(linear, f"own_{name}", None)
    if own is not None:
        return own
    tensor = getattr(linear, name)
    return original(tensor).to(tensor.device)


def see_pruned(
    model: PreTrainedModel, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], switch: Switch
) -> None:
    """Let the linear layers follow `switch`: `masks` by layer name, `weights` (and biases) by parameter name."""
    linears = linears_of(model)
    for name, keep_OI in masks.items():
        if name in linears:  # else a matrix of experts: `models/experts.py`
            MaskedLinear.convert(linears[name], keep_OI, switch, weights.get(f"{name}.weight"))
    for parameter, weight_OI in weights.items():
        name, _, cfg = parameter.rpartition(".")
        if cfg == "weight" and name not in masks:
            OwnLinear.convert(linears[name], weight_OI, weights.get(f"{name}.bias"), switch)


def make_closable(blocks: Iterable[nn.Module], arch: Arch, switch: Switch) -> None:
    """Let every block, its attention and its MLP follow `switch` and be closed; all start open. Names stay the same.

    Raises ModelError for a model that belongs to a twin, and for blocks that take no KV cache under a name known here.
    """
    for index, block in enumerate(blocks):
        parts = [(module, KINDS[kind_in(block, arch, name)]) for _, name, module in _sublayers(block, arch)]
        attends = any(kind is _Attention for _, kind in parts)
        for module, kind in ((block, _Block if attends else _MixingBlock), *parts):
            stock: Any = module
            switch_class(stock, functools.partial(_closable, kind))
            stock.switch, stock.closed, stock.index = switch, False, index
            scores = arch.experts is not None and arch.experts.gives_scores and mixture_in(arch, block)
            stock.gives_scores = kind is _Mlp and scores


def close_sites(blocks: Any, arch: Arch, sites: frozenset[Site]) -> None:
    """Close exactly these sites. Raises ModelError for the attention of block 0 and for blocks that are not there."""
    wrong = sorted({site.block for site in sites if not 0 <= site.block < len(blocks) or site == Site(0, "attention")})
    if wrong:
        raise ModelError(
            f"blocks {wrong} cannot be dropped: expected blocks from 1 to {len(blocks) - 1} "
            "(the attention of block 0 tells the position of a token under a KV cache, and stays)"
        )
    whole = set(whole_blocks(sites))
    for index, block in enumerate(blocks):
        block.closed = index in whole
        for part, _, module in _sublayers(block, arch):
            module.closed = Site(index, part) in sites


def closed_sites(blocks: Any, arch: Arch) -> frozenset[Site]:
    """The sites that are closed at this moment; of a block that is one sublayer, both are if that is."""
    return frozenset(
        Site(index, part)
        for index, block in enumerate(blocks)
        for part in SUBLAYERS
        if next((module.closed for own, _, module in _sublayers(block, arch) if own == part or arch.lone))
    )


def switch_class(module: nn.Module, knowing: Callable[[type], type]) -> None:
    """Give the module a class that knows the twin's views, made of its own. Raises ModelError if it has one already."""
    if hasattr(module, "switch"):
        raise ModelError("this model already belongs to a twin; load it anew, or use that twin")
    module.__class__ = knowing(type(module))


def named_as(new: type, stock: type) -> type:
    """The new class under the stock one's name: transformers matches some by name."""
    new.__name__, new.__qualname__, new.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return new


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that its forward comes from, behind what closing put before it."""
    return next(one for one in type(module).__mro__ if "forward" in vars(one) and not issubclass(one, _Closable))


def _sublayers(block: nn.Module, arch: Arch) -> list[tuple[Sublayer, str, Any]]:
    """Every module of a block's sublayers, with the sublayer and its name."""
    return [(part, name, block.get_submodule(name)) for part in SUBLAYERS for name in modules_in(block, arch, part)]


class _Closable:
    """Goes before a stock class: runs it, unless the pruned view has it closed; then only `nothing` is given."""

    switch: Switch
    closed: bool
    index: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.switch.dense or not self.closed:
            stock: Any = super()
            return self.opened(stock.forward(hidden_states, *args, **kwargs))
        return self.nothing(hidden_states, cache_among(kwargs, args))

    def opened(self, output: Any) -> Any:
        return output

    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        raise NotImplementedError


class _Block(_Closable):
    def opened(self, output: Any) -> Any:
        self.switch.tuples = isinstance(output, tuple)
        return output

    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        _trace(cache, h_BTD, self.index)
        return (h_BTD,) if self.switch.tuples else h_BTD


class _MixingBlock(_Block):
    """Without attention: what it leaves in a cache is a state, which says nothing of lengths."""

    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        return (h_BTD,) if self.switch.tuples else h_BTD


class _Attention(_Closable):
    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        _trace(cache, h_BTD, self.index)
        return torch.zeros_like(h_BTD), None


class _Mixer(_Closable):
    """Run as where nothing is trained: a fused kernel for training takes the weights of its linear layers itself, past
    adapters and masks. Gradients are the same, and a mixer has no dropout."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        flags = vars(self)
        training, flags["training"] = flags["training"], False
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            flags["training"] = training

    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        return torch.zeros_like(h_BTD)


class _Mlp(_Closable):
    gives_scores: bool

    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        return (torch.zeros_like(h_BTD), None) if self.gives_scores else torch.zeros_like(h_BTD)


KINDS: dict[str, type[_Closable]] = {"mixer": _Mixer, "attention": _Attention, "mlp": _Mlp}


@functools.cache
def _closable(kind: type[_Closable], stock: type[nn.Module]) -> type[nn.Module]:
    if kind is not _Mlp:
        cache_name(stock)  # under a name unknown here, a closed one would leave no trace in the cache
    return named_as(type(kind.__name__, (kind, stock), {}), stock)


def _trace(cache: Any, h_BTD: Tensor, index: int) -> None:
    """Count a closed attention's tokens in the KV cache, at one number a token.

    transformers reads lengths and mask sizes off the first layer of each attention type; were that layer closed and
    empty, every kept layer of its type would get masks of the wrong size.
    """
    if cache is not None:
        mark_B1T1 = h_BTD[:, None, :, :1].detach()
        cache.update(mark_B1T1, mark_B1T1, index)
