"""One set of weights, two views: the dense model, and the pruned one that is trained.

The pruned view is the resting state, because activation checkpointing runs the model again in backward, in whatever
view it then shows; dense is a short excursion without gradients. Both views need the dense model's memory once.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recover import recipe
from recover.errors import ModelError
from recover.models.arch import Arch, arch_of, base_of, blocks_of, linears_of
from recover.models.masked_linear import MaskedLinear, Switch

if TYPE_CHECKING:
    from peft import PeftModel

    from recover.prune.plan import Plan

# What a forward may be told beside the batch without changing what is distilled.
_OUTPUT_OPTIONS = {"return_dict", "use_cache", "output_attentions", "output_hidden_states"}


class Twin:
    """A causal LM shown pruned (at rest) or dense (inside `with twin.dense():`). Parameter names stay the stock ones.

    `model` is the causal LM, or the PeftModel around it after `add_lora` / `adopt`. The dense weights are frozen: they
    are the teacher. Raises ModelError when the plan does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, masks: dict[str, Tensor] | None = None) -> None:
        self.model: Any = model
        self.plan = plan
        self.arch: Arch = arch_of(model)
        self.switch = Switch()
        _check_fit(model, plan, masks or {})
        model.requires_grad_(False)
        linears = linears_of(model)
        for name, keep_OI in (masks or {}).items():
            MaskedLinear.convert(linears[name], keep_OI, self.switch)
        for index, block in enumerate(self.blocks):
            _switch_class(block, _closable(type(block)))
            block.switch, block.closed, block.index = self.switch, False, index
        _switch_class(model, _distilling(type(model)))
        self.close(set(plan.dropped))

    @property
    def base(self) -> PreTrainedModel:
        """The causal LM itself, without peft around it."""
        return base_of(self.model)

    @property
    def blocks(self) -> Any:
        """All blocks, closed ones too, in dense numbering (an `nn.ModuleList`)."""
        return blocks_of(self.model)

    @property
    def closed_blocks(self) -> tuple[int, ...]:
        """Blocks that the pruned view leaves out at this moment."""
        return tuple(i for i, block in enumerate(self.blocks) if block.closed)

    @contextmanager
    def dense(self) -> Iterator[PreTrainedModel]:
        """Show the untouched dense model: all blocks, no masks, no LoRA, no dropout, no gradient.

        Nests; the view and each module's training flag are restored, on exceptions too.
        """
        before, training = self.switch.dense, [module for module in self.base.modules() if module.training]
        try:
            self.switch.dense = True
            for module in training:
                module.training = False
            with torch.no_grad():
                yield self.base
        finally:
            self.switch.dense = before
            for module in training:
                module.training = True

    def close(self, blocks: Set[int]) -> None:
        """Leave out exactly these blocks in the pruned view. Raises ModelError for block 0 and for unknown blocks."""
        wrong = sorted(i for i in blocks if not 0 < i < len(self.blocks))
        if wrong:
            raise ModelError(
                f"blocks {wrong} cannot be dropped: expected blocks from 1 to {len(self.blocks) - 1} "
                "(block 0 tells the position of a token under a KV cache, and stays)"
            )
        for i, block in enumerate(self.blocks):
            block.closed = i in blocks

    @contextmanager
    def closed(self, blocks: Set[int]) -> Iterator[None]:
        """Leave out exactly these blocks instead of the plan's, for scoring candidates; restored on exceptions."""
        before = set(self.closed_blocks)
        self.close(blocks)
        try:
            yield
        finally:
            self.close(before)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Keep the masked weights between forward passes without gradients: same results, faster decoding.

        Costs one more copy of the masked layers. Weights and adapters must not change inside. No masks: no effect.
        """
        before = self.switch.fold
        self.switch.fold = True
        try:
            yield
        finally:
            self.switch.fold = before
            for module in self.base.modules() if not before else ():
                if isinstance(module, MaskedLinear):
                    module.folded = None

    def adopt(self, peft_model: PeftModel) -> PeftModel:
        """Take a PeftModel around this twin's model as `model`; its LoRA layers follow the view from now on.

        Raises ModelError for a PeftModel of another model, and for anything but plain LoRA on linear layers.
        """
        from recover.models.masked_lora import adopt_layer, lora_layers

        if base_of(peft_model) is not self.base:
            raise ModelError("the PeftModel does not wrap this twin's model; expected PeftModel(twin.base, ...)")
        for layer in lora_layers(peft_model):
            adopt_layer(layer, self.switch)
        self.model = peft_model
        return peft_model

    def add_lora(self, leaf: recipe.Lora) -> PeftModel:
        """Put LoRA on the linear layers of the kept blocks; B = 0, so nothing changes yet.

        `blocks: after_cut` leaves out the blocks before the first dropped one: both views then share them. Adapters are
        float32 whatever the model's dtype (DeepSpeed's bf16 mode casts them and keeps float32 masters).
        Raises ModelError if no block is left, or if the twin has adapters already.
        """
        from peft import LoraConfig, get_peft_model

        if self.model is not self.base:
            raise ModelError("this twin has adapters already; expected one set: load the model anew")
        blocks = self._lora_blocks(leaf)
        targets = [name for name in linears_of(self.model) if self._block_index(name) in blocks]
        config = LoraConfig(
            r=leaf.rank,
            lora_alpha=leaf.alpha or 2 * leaf.rank,  # type: ignore[arg-type]
            lora_dropout=leaf.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        return self.adopt(get_peft_model(self.base, config))  # type: ignore[arg-type]

    def _lora_blocks(self, leaf: recipe.Lora) -> set[int]:
        kept = set(self.plan.kept)
        if leaf.blocks == "all":
            return kept
        if not self.plan.dropped:
            raise ModelError("lora.blocks: 'after_cut' needs dropped blocks, and this plan drops none; use 'all'")
        after = {i for i in kept if i > self.plan.dropped[0]}
        if not after:
            raise ModelError(
                "lora.blocks: 'after_cut' leaves no block: the last blocks are the dropped ones; use 'all'"
            )
        return after

    def _block_index(self, name: str) -> int:
        match = re.match(re.escape(self.arch.blocks) + r"\.(\d+)\.", name)
        assert match, name
        return int(match[1])


def _check_fit(model: PreTrainedModel, plan: Plan, masks: dict[str, Tensor]) -> None:
    linears, blocks = linears_of(model), blocks_of(model)
    if plan.blocks != len(blocks):
        raise ModelError(f"the plan is for {plan.blocks} blocks, this model has {len(blocks)}: prune this model anew")
    differing = sorted(set(plan.masks) ^ set(masks))
    if differing:
        raise ModelError(f"the plan names {len(plan.masks)} masks, {len(masks)} are given; differing: {differing[:4]}")
    for name, keep_OI in masks.items():
        if name not in linears:
            raise ModelError(f"mask '{name}' belongs to no linear layer of this {model.config.model_type} model")
        shape = (linears[name].out_features, linears[name].in_features)
        if tuple(keep_OI.shape) != shape:
            raise ModelError(f"mask '{name}' has shape {tuple(keep_OI.shape)}, its layer {shape}")


def _switch_class(module: nn.Module, new: type) -> None:
    if hasattr(module, "switch"):
        raise ModelError("this model already belongs to a twin; load it anew, or use that twin")
    module.__class__ = new


@functools.cache
def _closable(stock: type[nn.Module]) -> type[nn.Module]:
    """The stock block class, able to hand its input on untouched. Same name: transformers matches some by name."""

    class Closable(stock):
        switch: Switch
        closed: bool
        index: int

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.switch.dense or not self.closed:
                output = super().forward(hidden_states, *args, **kwargs)
                self.switch.tuples = isinstance(output, tuple)
                return output
            _trace(kwargs.get("past_key_values"), hidden_states, self.index)
            return (hidden_states,) if self.switch.tuples else hidden_states

    return _named_as(Closable, stock)


def _trace(cache: Any, h_BTD: Tensor, index: int) -> None:
    """Count a closed block's tokens in the KV cache, at one number a token.

    transformers reads lengths and mask sizes off the first layer of each attention type; were that layer closed and
    empty, every kept layer of its type would get masks of the wrong size.
    """
    if cache is not None:
        mark_B1T1 = h_BTD[:, None, :, :1].detach()
        cache.update(mark_B1T1, mark_B1T1, index)


@functools.cache
def _distilling(stock: type[nn.Module]) -> type[nn.Module]:
    """The stock causal LM class; `forward(..., distill=d)` returns `d.run(self, input_ids=, attention_mask=, labels=)`.

    So one forward of whatever wraps the model (peft, DeepSpeed, DDP) holds both passes and the loss.
    """

    class Distilling(stock):
        # The signature comes along: generate and Trainer read it.
        @functools.wraps(stock.forward)
        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, *args: Any, distill: Any = None, **kwargs: Any
        ) -> Any:
            if distill is None:
                return super().forward(*args, **kwargs)
            assert not args, "with distill= the batch is given by name"
            batch = {name: kwargs.get(name) for name in ("input_ids", "attention_mask", "labels")}
            others = {name: v for name, v in kwargs.items() if v is not None and name not in {*batch, *_OUTPUT_OPTIONS}}
            return distill.run(self, **batch, **others)

    return _named_as(Distilling, stock)


def _named_as(new: type, stock: type) -> type:
    new.__name__, new.__qualname__, new.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return new
