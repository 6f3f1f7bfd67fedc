"""Blocks and sublayers that can be closed: a closed one does nothing to the residual stream, and is not run.

A closed block hands its input on; a closed sublayer gives 0, which the block adds (norms behind a sublayer, as in Gemma
and OLMo 2, turn 0 into 0). Either equals the model without it, bit for bit.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recover.base.errors import ModelError
from recover.models import kv_cache
from recover.models.arch import Arch, mixture_in
from recover.models.linears import Switch
from recover.models.site import SUBLAYERS, Site, Sublayer, whole_blocks


def make_closable(blocks: Iterable[nn.Module], arch: Arch, switch: Switch) -> None:
    """Let every block, its attention and its MLP follow `switch` and be closed; all start open. Names stay the same.

    Raises ModelError for a model that belongs to a twin, and for blocks that take no KV cache under a name known here.
    """
    for index, block in enumerate(blocks):
        attention, mlp = (_sublayer(block, arch, part) for part in SUBLAYERS)
        for module, kind in ((block, _Block), (attention, _Attention), (mlp, _Mlp)):
            stock: Any = module
            switch_class(stock, functools.partial(_closable, kind))
            stock.switch, stock.closed, stock.index = switch, False, index
        mlp.gives_scores = mixture_in(arch, block) and arch.experts is not None and arch.experts.gives_scores


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
        for part in SUBLAYERS:
            _sublayer(block, arch, part).closed = Site(index, part) in sites


def closed_sites(blocks: Any, arch: Arch) -> frozenset[Site]:
    """The sites that are closed at this moment."""
    return frozenset(
        Site(index, part)
        for index, block in enumerate(blocks)
        for part in SUBLAYERS
        if _sublayer(block, arch, part).closed
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


def _sublayer(block: nn.Module, arch: Arch, part: Sublayer) -> Any:
    return block.get_submodule(arch.attention if part == "attention" else arch.mlp)


class _Closable:
    """Goes before a stock class: runs it, unless the pruned view has it closed; then only `nothing` is given."""

    switch: Switch
    closed: bool
    index: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.switch.dense or not self.closed:
            stock: Any = super()
            return self.opened(stock.forward(hidden_states, *args, **kwargs))
        return self.nothing(hidden_states, kv_cache.among(kwargs))

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


class _Attention(_Closable):
    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        _trace(cache, h_BTD, self.index)
        return torch.zeros_like(h_BTD), None


class _Mlp(_Closable):
    gives_scores: bool

    def nothing(self, h_BTD: Tensor, cache: Any) -> Any:
        return (torch.zeros_like(h_BTD), None) if self.gives_scores else torch.zeros_like(h_BTD)


@functools.cache
def _closable(kind: type[_Closable], stock: type[nn.Module]) -> type[nn.Module]:
    if kind is not _Mlp:
        kv_cache.cache_name(stock)  # under a name unknown here, a closed one would leave no trace in the cache
    return named_as(type(kind.__name__, (kind, stock), {}), stock)


def _trace(cache: Any, h_BTD: Tensor, index: int) -> None:
    """Count a closed attention's tokens in the KV cache, at one number a token.

    transformers reads lengths and mask sizes off the first layer of each attention type; were that layer closed and
    empty, every kept layer of its type would get masks of the wrong size.
    """
    if cache is not None:
        mark_B1T1 = h_BTD[:, None, :, :1].detach()
        cache.update(mark_B1T1, mark_B1T1, index)
