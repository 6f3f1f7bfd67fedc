"""Both passes of a twin and the loss, inside one forward of whatever wraps the model.

Legend: B batch, T tokens, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Required, TypedDict

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from recover.base import zero
from recover.distill.loss import distillation_loss
from recover.distill.loss_terms import TopK
from recover.kernels.lora_linear import cast_together
from recover.models.arch import head_of
from recover.models.attention import PACKED_NAME, Keywords, Packing, attending, packing_configs
from recover.models.experts import SwitchedExperts, SwitchedRouter
from recover.models.linears import MaskedLinear, OwnLinear
from recover.models.masked_lora import SwitchedLora
from recover.models.rope import goes_by_length, row_positions
from recover.models.site import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from recover.config.recipe import Loss
    from recover.models.twin import Twin

IGNORED = -100  # a label that carries no loss, as everywhere in transformers


class Batch(TypedDict, total=False):
    """What a collator makes of rows and a step takes: rows padded on the right, or one packed row with `packing`.

    `scored`: as `scored_rows` gives it. `states`: what is known of the dense view, or of a teacher.
    """

    input_ids: Required[Tensor]
    labels: Required[Tensor]
    attention_mask: Tensor | None
    packing: tuple[Tensor, Tensor, int]
    scored: tuple[Tensor, Tensor]
    states: Callable[[], DenseStates | TopK]


def packing_of(batch: Batch) -> Packing:
    """How the sequences of a packed batch lie."""
    if "packing" not in batch:
        raise AssertionError("a batch that is not packed")
    return Packing(*batch["packing"])


def scored_rows(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(rows_N, labels_N): positions in the flat (B * T) order whose next token carries loss, and those next tokens.

    The position before a scored token is the one that predicts it, so column 0 of the labels never counts.
    """
    next_BT = torch.full_like(labels_BT, IGNORED)
    next_BT[:, :-1] = labels_BT[:, 1:]
    next_M = next_BT.flatten()
    rows_N = (next_M != IGNORED).nonzero().squeeze(1)
    return rows_N, next_M[rows_N]


def rows_scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """What `scored_rows` gives of this batch, where it was not found before."""
    return batch.get("scored") or scored_rows(batch["labels"])


def scored_tokens(labels_BT: Tensor) -> Tensor:
    """How many tokens of a batch carry loss, as a tensor on its device: what a sum of losses is divided by."""
    return (labels_BT[:, 1:] != IGNORED).sum()


def scaled(loss: Tensor, scale: Tensor) -> Tensor:
    """loss * scale, for backward; of a loss that is not finite every gradient is NaN, which nobody has to wait for."""
    return loss * (scale + 0.0 * loss.detach())


def without_mask(batch: Batch, *, needed: bool = False) -> Batch:
    """A right-padded batch as training gives it to a model: under causal attention no token sees padding behind it.

    With a mask, attention leaves its causal kernel, and grouped KV heads are copied for each query head. `needed`: it
    is kept, for a model that goes by how long each row is.
    """
    return batch if needed else {**batch, "attention_mask": None}


@dataclass(frozen=True)
class DenseStates:
    """What a step needs of the dense view: `h_ND` after the final norm at the scored rows, in the flat (B * T) order.

    `prefix_BTD`: what the last block that both views share put out (anything where there is padding); None: unknown.
    """

    h_ND: Tensor
    prefix_BTD: Tensor | None = None

    def to(self, device: torch.device) -> DenseStates:
        """On this device."""
        prefix_BTD = None if self.prefix_BTD is None else self.prefix_BTD.to(device, non_blocking=True)
        return DenseStates(self.h_ND.to(device, non_blocking=True), prefix_BTD)


class Distiller:
    """`model(..., distill=distiller)` is the distillation loss of the twin's pruned view against its dense view.

    Blocks that both views share in front of the first difference (a dropped block, a mask or an adapter) run once:
    their output in the dense pass is what the pruned pass goes on from. Build it after the adapters are on.
    """

    def __init__(self, twin: Twin, cfg: Loss) -> None:
        self.twin = twin
        self.cfg = self.weights = cfg  # as the recipe has it, and as it is where the training stands
        self.focus_mean: float | None = None  # what weights of `loss.focus` are divided by, where it is known
        self.shared_blocks = _shared_blocks(twin)
        self.packs = packing_configs(twin.base)  # empty: batches must not be packed
        self.adapters = _unmasked_adapters(twin)
        self.needs_mask = goes_by_length(twin.base)  # of rows that are padded, to know how long each is

    def stand_at(self, share: float, focus_mean: float | None = None) -> None:
        """From here on the weights are those that hold after this part of a training's steps.

        `focus_mean`: the mean per token of the sums `focus` up to here.
        """
        self.focus_mean = focus_mean
        self.weights = self.cfg.at(share)

    def run(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        states: Callable[[], DenseStates | TopK] | None = None,
        scored: tuple[Tensor, Tensor] | None = None,
        packing: tuple[Tensor, Tensor, int] | None = None,
    ) -> ModelOutput:
        """Sums over the scored tokens: `loss` (the only one with gradient), `tokens`, `focus` and each term's.

        Only rows that `labels` score reach the head; what stands in the others changes neither value nor gradient.
        `states` gives what is known of the dense view, on any device, asked for when it is needed: then the dense pass
        is left out, and with a prefix the shared blocks too. Equal to the bit if `dense_states` of this batch made it.
        Or it gives what another teacher said of the scored rows. `scored`: what `scored_rows` gives, where it is known;
        without it, a GPU is waited for. `packing`: the fields of a Packing, of sequences that lie in one row; no label
        may score a sequence's first token.
        """
        rows_N, labels_N = scored or scored_rows(labels)
        batch = _batch(input_ids, attention_mask, packing)
        with self._passes(model, packing):
            known = self._dense_pass(model, batch, rows_N) if states is None else states().to(input_ids.device)
            teacher, prefix_BTD = (known, None) if isinstance(known, TopK) else (known.h_ND, known.prefix_BTD)
            if len(teacher) != len(rows_N):
                raise AssertionError("the states of another batch")
            h_pruned_ND = self._pruned_pass(model, batch, rows_N, prefix_BTD)
        return self.loss(model, h_pruned_ND, teacher, labels_N)

    def dense_pass(self, model: PreTrainedModel, input_ids: Tensor, packing: Packing) -> DenseStates:
        """The dense view's states at all T positions of a packed row, scored or not; no gradient."""
        with self._passes(model, packing):
            return self._dense_pass(model, _batch(input_ids, None, packing), None)

    def pruned_pass(
        self, model: PreTrainedModel, input_ids: Tensor, packing: Packing, prefix_1TD: Tensor | None
    ) -> Tensor:
        """h_TD of the pruned view after the final norm, at all T positions of a packed row, with gradient.

        `prefix_1TD`: as `dense_pass` of the same batch gives it.
        """
        with self._passes(model, packing):
            return self._pruned_pass(model, _batch(input_ids, None, packing), None, prefix_1TD)

    @contextmanager
    def _passes(self, model: nn.Module, packing: Any) -> Iterator[None]:
        """Around both passes."""
        with _half_precision_adapters(model), attending(self.packs if packing is not None else (), PACKED_NAME):
            yield

    def dense_states(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        packing: tuple[Tensor, Tensor, int] | None = None,
    ) -> DenseStates:
        """The dense pass of a batch alone: what `run` computes itself where it is given no `states`."""
        rows_N, _ = scored_rows(labels)
        with self._passes(model, packing):
            return self._dense_pass(model, _batch(input_ids, attention_mask, packing), rows_N)

    def loss(
        self, model: PreTrainedModel, h_pruned_ND: Tensor, teacher: Tensor | TopK, labels_N: Tensor
    ) -> ModelOutput:
        """Sums as `run` gives them, from the hidden states of the scored rows, or from a teacher's likeliest tokens."""
        # Gathered before the weight is touched: at a first touch of a weight that ZeRO-3 has shared out, DeepSpeed
        # would take it for a parameter of the whole model, and gather it in every backward too.
        head: Any = model.get_output_embeddings()
        with zero.gathered(*head.parameters(recurse=False)):
            weight_VD, bias_V, scale, softcap = head_of(model)
            sums = distillation_loss(
                h_pruned_ND,
                teacher,
                weight_VD,
                self.weights,
                labels_N=labels_N,
                bias_V=bias_V,
                scale=scale,
                softcap=softcap,
                chunk=self.cfg.chunk,
                focus_mean=self.focus_mean,
            )
        return ModelOutput(loss=sums.total, **sums.terms, focus=sums.focus, tokens=sums.tokens)

    def _dense_pass(self, model: Any, batch: Keywords, rows_N: Tensor | None) -> DenseStates:
        caught: list[Tensor] = []
        with self.twin.dense(teaching=True), self._last_shared_block(caught.append):
            h_ND = _hidden_states(model, batch, rows_N)
        return DenseStates(h_ND, caught[0] if caught else None)

    def _pruned_pass(self, model: Any, batch: Keywords, rows_N: Tensor | None, prefix_BTD: Tensor | None) -> Tensor:
        """h_ND after the final norm, with gradient, from where the two views part."""
        with cast_together(*self.adapters, dtype=model.dtype):
            return self._from_the_difference(model, batch, rows_N, prefix_BTD)

    def _from_the_difference(
        self, model: Any, batch: Keywords, rows_N: Tensor | None, prefix_BTD: Tensor | None
    ) -> Tensor:
        if self.shared_blocks == 0:
            return _hidden_states(model, batch, rows_N)
        shared, after = self.twin.blocks[: self.shared_blocks], self.twin.blocks[self.shared_blocks]
        for block in shared:
            block.gradient_checkpointing = False  # nothing in them is to be run again in backward
        # Neither reentrant checkpointing nor ZeRO-3, where it gathers blocks as a whole, gives all gradients to a block
        # none of whose inputs asks for one.
        wanted = getattr(after, "gradient_checkpointing", False) or any(map(zero.gathers_at_once, self.twin.blocks))
        # A hook on the last shared block, not on the first one after it: checkpointing runs that one again in backward,
        # when hooks and closed blocks are as they were, but from the input it was given here.
        if prefix_BTD is None:
            with _detached(shared[0]), self._last_shared_block(lambda h: h.detach().requires_grad_(wanted)):
                return _hidden_states(model, batch, rows_N)
        prefix_BTD = prefix_BTD.detach().requires_grad_(wanted)
        skipped: set[int | Site] = {*self.twin.closed_sites, *range(1, self.shared_blocks)}
        with self.twin.closed(skipped), self._last_shared_block(lambda _h: prefix_BTD):
            # By hand: as a site it may not be, which is for the KV cache, and here is none.
            shared[0].closed = self.twin.switch.tuples is not None
            return _hidden_states(model, batch, rows_N)

    @contextmanager
    def _last_shared_block(self, use: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, what the last shared block puts out is given to `use`, and replaced by what that returns, if any."""
        if self.shared_blocks == 0:
            yield
            return

        def hook(_block: nn.Module, _inputs: Any, output: Any) -> Any:
            new = use(output[0] if isinstance(output, tuple) else output)
            return (new,) if new is not None and isinstance(output, tuple) else new

        handle = self.twin.blocks[self.shared_blocks - 1].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _detached(block: nn.Module) -> Iterator[None]:
    """Inside, no gradient is asked for in front of this block (with checkpointing, embeddings would ask for one)."""
    handle = block.register_forward_pre_hook(lambda _block, inputs: (inputs[0].detach(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _shared_blocks(twin: Twin) -> int:
    """How many blocks, from the first on, are the same in both views whatever the adapters learn."""
    for index, block in enumerate(twin.blocks):
        pruned = any(isinstance(module, MaskedLinear | OwnLinear) for module in block.modules())
        trained = any(parameter.requires_grad for parameter in block.parameters())
        routed = any(isinstance(module, SwitchedRouter) and module.keep_K is not None for module in block.modules())
        routed |= any(isinstance(module, SwitchedExperts) and module.masks for module in block.modules())
        if pruned or routed or trained or any(site.block == index for site in twin.closed_sites):
            return index
    return 0  # nothing differs anywhere: no block to go on from


def _unmasked_adapters(twin: Twin) -> tuple[list[Tensor], float]:
    """Factors of updates that are not seen through a mask, and their scaling: of those that have the commonest one."""
    found: dict[float, list[Tensor]] = {}
    for layer in twin.base.modules():
        if type(layer) is SwitchedLora:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    factors = layer._factors(name)
                    found.setdefault(factors.scaling, []).extend((factors.a_RI, factors.b_OR))
    scaling = max(found, key=lambda each: len(found[each]), default=1.0)
    return found.get(scaling, []), scaling


def _hidden_states(model: Any, batch: Keywords, rows_N: Tensor | None) -> Tensor:
    """Rows of the hidden state after the final norm, None: all; the head is not run."""
    h_MD = model.base_model(**batch).last_hidden_state.flatten(0, 1)
    return h_MD if rows_N is None else h_MD.index_select(0, rows_N)


def _batch(input_ids: Tensor, attention_mask: Tensor | None, packing: tuple[Tensor, Tensor, int] | None) -> Keywords:
    """What the model is called with."""
    if packing is not None:
        return {"input_ids": input_ids, **Packing(*packing).keywords()}
    batch: Keywords = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    return batch if attention_mask is None else {**batch, "position_ids": row_positions(attention_mask)}


def _half_precision_adapters(model: nn.Module) -> Any:
    """Under a half-precision model, multiply by the float32 adapters in its dtype; they stay float32 for the optimizer.

    Done here and not by the trainer, so that it is the same with DeepSpeed (which switches autocast off) and without.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)
