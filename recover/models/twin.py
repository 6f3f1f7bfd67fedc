"""One set of weights, two views: the dense model, and the pruned one that is trained.

The pruned view is the resting state, because activation checkpointing runs the model again in backward, in whatever
view it then shows; dense is a short excursion without gradients. Both views need the dense model's memory once.

`Held` is the dense weights, read once, and twins made of them: none costs another reading, nor other memory.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel

from recover.base.errors import ModelError
from recover.config import recipe
from recover.models.arch import Arch, arch_of, as_linears, base_of, blocks_of, linears_of, site_of
from recover.models.attention import by_rows
from recover.models.experts import IN, OUT, keep_experts, make_routable, mask_experts, mixtures_of
from recover.models.lean import make_lean
from recover.models.masked_lora import adopt_copy, adopt_layer, lora_layers, targets_by_name, trained_copies
from recover.models.plan import Plan, check_fit
from recover.models.site import SUBLAYERS, Site, sites_of, whole_blocks
from recover.models.stored_weights import comes_and_goes, each_weight, stored_in
from recover.models.switched import (
    MaskedLinear,
    Switch,
    close_sites,
    closed_sites,
    make_closable,
    named_as,
    see_pruned,
    switch_class,
)

if TYPE_CHECKING:
    from peft import PeftModel

# What a forward may be told beside the batch without changing what is distilled.
_OUTPUT_OPTIONS = {"return_dict", "use_cache", "output_attentions", "output_hidden_states"}


class Twin:
    """A causal LM shown pruned (at rest) or dense (inside `with twin.dense():`). Parameter names stay the stock ones.

    `model` is the causal LM, or the PeftModel around it after `add_lora` / `adopt`. The dense weights are frozen: they
    are the teacher. Raises ModelError when the plan does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        masks: dict[str, Tensor] | None = None,
        weights: dict[str, Tensor] | None = None,
        *,
        replan: Callable[..., Twin] | None = None,
    ) -> None:
        as_linears(model)
        self.model: Any = model
        self._replan = replan
        self.plan = dataclasses.replace(plan, parallel=arch_of(model).together(model.config))
        self.arch: Arch = arch_of(model)
        self.switch = Switch()
        check_fit(model, plan, masks or {}, weights or {})
        by_rows(model)
        model.requires_grad_(False)
        see_pruned(model, masks or {}, weights or {}, self.switch)
        make_closable(self.blocks, self.arch, self.switch)
        make_routable(model, self.switch)
        keep_experts(model, plan.experts)
        mask_experts(model, masks or {})
        switch_class(model, _distilling)
        self.close(plan.sites)

    def replan(
        self, plan: Plan, masks: dict[str, Tensor] | None = None, weights: dict[str, Tensor] | None = None
    ) -> Twin:
        """Another twin of the same weights in memory, with another plan and without adapters; this one stays as it is.

        Raises ModelError when the plan does not fit the model, and for a twin that was made of a model directly, not by
        `Held.twin` or `recover.prune`.
        """
        if self._replan is None:
            raise ModelError("this twin's model is its own: expected a twin of recover.prune or of Held.twin")
        return self._replan(plan, masks, weights)

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
        """Whole blocks that the pruned view leaves out at this moment."""
        return whole_blocks(self.closed_sites)

    @property
    def closed_sites(self) -> frozenset[Site]:
        """Sublayers that the pruned view leaves out at this moment, those of whole blocks too."""
        return closed_sites(self.blocks, self.arch)

    @contextmanager
    def dense(self, *, teaching: bool = False) -> Iterator[PreTrainedModel]:
        """Show the untouched dense model: all blocks, no masks, no LoRA, no dropout, no gradient.

        Its values are the stock model's to the bit; while `teaching` a training step, or writing texts, fused kernels
        may compute them.
        Nests; the view and each module's training flag are restored, on exceptions too.
        """
        before = self.switch.dense, self.switch.teaching
        training = [module for module in modules_below(self.base) if module.training]
        try:
            self.switch.dense, self.switch.teaching = True, teaching
            set_training(training, False)
            with torch.no_grad():
                yield self.base
        finally:
            self.switch.dense, self.switch.teaching = before
            set_training(training, True)

    def close(self, what: Iterable[int | Site]) -> None:
        """Leave out exactly these blocks and sites in the pruned view; a number is a whole block.

        Raises ModelError for the attention of block 0 and for blocks that are not there.
        """
        close_sites(self.blocks, self.arch, sites_of(what))

    @contextmanager
    def closed(self, what: Iterable[int | Site]) -> Iterator[None]:
        """Leave out exactly these instead of the plan's, for scoring candidates; restored on exceptions."""
        before = self.closed_sites
        self.close(what)
        try:
            yield
        finally:
            self.close(before)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Keep the masked weights between forward passes without gradients: same results, faster decoding.

        Costs one more copy of the masked layers. Weights and adapters must not change inside. No masks, or weights that
        come and go: no effect.
        """
        if stored_in(self.base) is not None:
            yield
            return
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
        if base_of(peft_model) is not self.base:
            raise ModelError("the PeftModel does not wrap this twin's model; expected PeftModel(twin.base, ...)")
        for layer in lora_layers(peft_model):
            adopt_layer(layer, self.switch)
        for copied in trained_copies(peft_model):
            adopt_copy(copied, self.switch)
        make_lean(self.base, self.switch)
        self.model = peft_model
        return peft_model

    def add_lora(self, cfg: recipe.Lora) -> PeftModel:
        """Put LoRA on the linear layers of the kept blocks; B = 0, so nothing changes yet. Or on `lora.parts`.

        `blocks: after_cut` leaves out the blocks before the first dropped one: both views then share them. Adapters are
        float32 whatever the model's dtype (DeepSpeed's bf16 mode casts them and keeps float32 masters).
        Raises ModelError if no block is left, if a part is not there, or if the twin has adapters already.
        """
        if self.model is not self.base:
            raise ModelError("this twin has adapters already; expected one set: load the model anew")
        sites = self._lora_sites(cfg)
        linears, experts, routers = self._lora_targets(cfg, sites)
        config = LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha or 2 * cfg.rank,  # type: ignore[arg-type]
            lora_dropout=cfg.dropout,
            target_modules=linears or DUMMY_TARGET_MODULES,
            target_parameters=experts or None,
            modules_to_save=routers or None,
            task_type="CAUSAL_LM",
        )
        with targets_by_name():
            found = self.adopt(get_peft_model(self.base, config))  # type: ignore[arg-type]
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        keep_experts(self.model, self.plan.experts)  # in the routers' copies too
        return found

    def _lora_targets(self, cfg: recipe.Lora, sites: frozenset[Site]) -> tuple[list[str], list[str], list[str]]:
        """Names of linear layers (of shared experts too), of experts' matrices and of routers that learn."""
        without = tuple(f".{self.arch.mixer}.{linear}" for linear in self.arch.unadapted)
        adapted = [name for name in linears_of(self.model) if not name.endswith(without)]
        linears = [name for name in adapted if site_of(self.model, name) in sites]
        names, mixed = self.arch.experts, [block for block in mixtures_of(self.model) if Site(block, "mlp") in sites]
        if {"experts", "router", "shared"} & {*cfg.parts} and (names is None or not mixed):
            raise ModelError(f"lora.parts: {list(cfg.parts)}: no block that learns has experts; use [linears]")
        if names is None:
            return linears, [], []
        linears, shared = ([name for name in linears if site_of(self.model, name).part == part] for part in SUBLAYERS)
        if "shared" in cfg.parts and not shared:
            raise ModelError(
                f"lora.parts: {list(cfg.parts)}: no block that learns has shared experts; leave 'shared' out"
            )
        inside = [f"{self.arch.blocks}.{block}.{self.arch.mlp}" for block in mixed]
        experts = [f"{mlp}.{names.experts}.{matrix}" for mlp in inside for matrix in (IN, OUT)]
        routers = [f"{mlp}.{names.router}" for mlp in inside]
        adapted = [*(linears if "linears" in cfg.parts else []), *(shared if "shared" in cfg.parts else [])]
        return adapted, experts if "experts" in cfg.parts else [], routers if "router" in cfg.parts else []

    def _lora_sites(self, cfg: recipe.Lora) -> frozenset[Site]:
        dropped = set(self.plan.sites)
        kept = sites_of(range(self.plan.blocks)) - dropped
        if cfg.blocks == "all":
            return kept
        if not dropped:
            raise ModelError("lora.blocks: 'after_cut' needs dropped blocks, and this plan drops none; use 'all'")
        after = frozenset(site for site in kept if site > min(dropped))
        if not after:
            raise ModelError(
                "lora.blocks: 'after_cut' leaves no block: the last blocks are the dropped ones; use 'all'"
            )
        return after


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

    return named_as(Distilling, stock)


# Training flags of many modules, at every step: the ways of torch through them are slow for a small model.
def modules_below(root: nn.Module) -> list[nn.Module]:
    """`root` and every module below it, each once, in no order that means anything."""
    found: dict[nn.Module, None] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting.extend(child for child in module._modules.values() if child is not None)
    return list(found)


def set_training(modules: Iterable[nn.Module], training: bool) -> None:
    """Set the flag of these modules alone, not of those below them."""
    for module in modules:
        vars(module)["training"] = training  # `nn.Module.__setattr__` would look for parameters and modules first


def plain_modes(root: nn.Module) -> bool:
    """Whether `root.train(mode)` sets the flags below it and does nothing else."""
    return all(type(module).train is nn.Module.train for module in modules_below(root))


class Held:
    """A stock model that no twin is made of; `model` is to be run, and not to be changed.

    A model that belonged to a twin cannot be told from the classes of its modules again, so each twin is given modules
    of its own around the very tensors that were read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        as_linears(model)
        self.model = model
        self._sums = _sums(model)

    def again(self) -> PreTrainedModel:
        """The same model with modules, buffers and config of its own, and the parameters shared."""
        shared: dict[int, Any] = {id(parameter): parameter for parameter in self.model.parameters()}
        if (stored := stored_in(self.model)) is not None:
            shared[id(stored)] = stored
        return copy.deepcopy(self.model, shared)  # pyright: ignore[reportArgumentType]

    def twin(
        self, plan: Plan, masks: dict[str, Tensor] | None = None, weights: dict[str, Tensor] | None = None
    ) -> Twin:
        """A twin of these weights, which can be planned anew. Raises ModelError when the plan does not fit."""
        return Twin(self.again(), plan, masks, weights, replan=self.twin)

    def changed(self) -> list[str]:
        """Names of parameters whose bits are no longer those that were read (their sums, one number each)."""
        return [name for name, total in _sums(self.model).items() if total != self._sums[name]]


def _sums(model: nn.Module) -> dict[str, int]:
    """For each parameter its bits as integers, summed up: a pass over the weights and one transfer.

    Without those that nothing here could change, which would be read from the disk for it.
    """
    stored, pairs = stored_in(model), each_weight(model)
    if stored is not None and stored.fixed:
        pairs = (pair for pair in model.named_parameters() if not comes_and_goes(pair[1]))
    totals = {name: _sum(parameter.detach()) for name, parameter in pairs}
    return dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))


def _sum(tensor: Tensor) -> Tensor:
    """Eight bytes at a time where they can be read so: many times as fast as by twos."""
    offset = tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and tensor.nbytes % 8 == 0 and offset % 8 == 0:
        return tensor.flatten().view(torch.int64).sum()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()]).sum(dtype=torch.int64)
