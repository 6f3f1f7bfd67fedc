"""Both passes of a twin and the loss, inside one forward of whatever wraps the model; on a GPU replayed as CUDA graphs.

A small model's step is thousands of small kernels. Python needs several times as long to launch them as a GPU needs to
run them. Recorded once for each shape of batch (`GraphedPasses`), they are launched as three graphs: the dense pass and
the pruned pass, from tokens to hidden states, and backward, from the gradient of the pruned view's hidden states to
that of the adapters. The head and the loss are launched as ever, because the number of scored tokens differs from batch
to batch. The dense pass does not depend on what is learnt. So the next batch's runs while the host reads the losses of
this one, makes the optimizer step and writes the log (`prepare`). Batches are packed rows, so that one recording serves
all batches of so many tokens and sequences.

Legend: B batch, T tokens (of a packed row: all of it), S sequences, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Required, TypedDict

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from recover.base import console, zero
from recover.distill.loss import distillation_loss
from recover.distill.loss_terms import TopK
from recover.kernels.fused import cast_together, record
from recover.models.arch import head_of
from recover.models.attention import (
    PACKED_NAME,
    Keywords,
    Packing,
    attending,
    goes_by_length,
    packing_configs,
    row_positions,
)
from recover.models.experts import SwitchedExperts, SwitchedRouter
from recover.models.masked_lora import SwitchedLora
from recover.models.site import Site
from recover.models.switched import MaskedLinear, OwnLinear

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


def without_mask(batch: Batch) -> Batch:
    """A right-padded batch whose mask is left out: under causal attention no token sees padding behind it.

    With a mask, attention leaves its causal kernel, and grouped KV heads are copied for each query head.
    """
    return {**batch, "attention_mask": None}


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

    def given(self, batch: Batch) -> Batch:
        """A right-padded batch as training gives it to the model: without its mask, where the model needs none."""
        return batch if self.needs_mask else without_mask(batch)

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


@dataclass(frozen=True)
class _Shape:
    """What is recorded for one shape of batch, and the memory that the graphs read and write."""

    input_ids_1T: Tensor
    packing: Packing
    h_dense_TD: Tensor
    h_pruned_TD: Tensor
    gradient_TD: Tensor
    dense: torch.cuda.CUDAGraph
    pruned: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


Key = tuple[int, int, int]  # tokens, sequences, and the tokens of the longest one at most


class GraphedPasses:
    """Steps of `distiller` by CUDA graphs; gradients are added to `.grad` of `parameters`, as backward does.

    `bring_gradients` must come before the plain backward of a batch that is not taken, too.

    The first batch of a shape is for the plain way (`takes` is False), which sets up what a recording needs; the second
    one is recorded. Values and gradients are those of the plain way, bit for bit. The model's weights must stay where
    they are in memory until `forget`.
    """

    def __init__(self, distiller: Distiller, parameters: Sequence[nn.Parameter]) -> None:
        self.distiller = distiller
        self.parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self.parameters]
        # All gradients in one piece of memory: their norm, clipping and zeroing are one kernel each.
        self.flat = torch.zeros(sum(sizes), dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        parts = self.flat.split(sizes)
        self.gradients = [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]
        self.seen: set[Key] = set()
        self.shapes: dict[Key, _Shape] = {}
        self.pool: Any = None  # one memory for all: no step needs what another shape's left there
        self.works = True
        self.prepared: Tensor | None = None  # the batch whose dense pass has run already

    def takes(self, batch: Batch) -> bool:
        """Whether `step` can take this batch; asked once for each."""
        key = _key(batch)
        if not self.works or key in self.shapes:
            return self.works
        if key not in self.seen:
            self.seen.add(key)
            return False
        self._try_to_record(batch)
        return self.works

    def prepare(self, batch: Batch) -> None:
        """Run the dense pass of the batch that comes next, if its shape is recorded; `step` of it then does without.

        The device works on while the host does other things.
        """
        shape = self.shapes.get(_key(batch))
        if shape is None or self.prepared is batch["input_ids"]:
            return
        packing = packing_of(batch)
        shape.input_ids_1T.copy_(batch["input_ids"], non_blocking=True)
        shape.packing.position_ids.copy_(packing.position_ids, non_blocking=True)
        shape.packing.starts_S.copy_(packing.starts_S, non_blocking=True)
        shape.dense.replay()
        self.prepared = batch["input_ids"]

    def step(self, batch: Batch, scale: Tensor) -> ModelOutput:
        """The sums that `Distiller.run` gives; the gradient is that of `loss * scale`. The device is not waited for."""
        shape = self.shapes[_key(batch)]
        rows_N, labels_N = rows_scored(batch)
        self.prepare(batch)
        self.prepared = None
        shape.pruned.replay()
        h_pruned_TD = shape.h_pruned_TD.requires_grad_()
        sums = self.distiller.loss(
            self.distiller.twin.base,
            h_pruned_TD.index_select(0, rows_N),
            shape.h_dense_TD.index_select(0, rows_N),
            labels_N,
        )
        (gradient_TD,) = torch.autograd.grad(scaled(sums["loss"], scale), h_pruned_TD)
        shape.gradient_TD.copy_(gradient_TD)
        self.bring_gradients()
        shape.backward.replay()
        return sums

    def forget(self) -> None:
        """Let go of all that is recorded, and of its memory."""
        self.shapes.clear()
        self.pool = self.prepared = None

    def bring_gradients(self) -> None:
        """Have every `.grad` be a view of `flat`, where graphs and backward add to it; all zero where there is none."""
        if all(parameter.grad is None for parameter in self.parameters):
            self.flat.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            if parameter.grad is not gradient:
                raise AssertionError("a gradient came from elsewhere")

    def _try_to_record(self, batch: Batch) -> None:
        try:
            try:
                self.shapes[_key(batch)] = self._record(batch)
            except RuntimeError:
                # A backward graph of before that somebody still holds is bound to another stream, which spoils it.
                gc.collect()
                self.pool = self.pool if self.shapes else None  # one that no graph uses may not be used again
                self.shapes[_key(batch)] = self._record(batch)
        except RuntimeError as error:
            self.forget()
            self.works = False
            reason = str(error).splitlines()[0]
            console.warn(f"training goes on without CUDA graphs, slower for a small model: {reason}")

    def _record(self, batch: Batch) -> _Shape:
        self.bring_gradients()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        input_ids_1T = batch["input_ids"].clone()
        given = packing_of(batch)
        packing = Packing(given.position_ids.clone(), given.starts_S.clone(), given.longest)
        distiller, model = self.distiller, self.distiller.twin.base
        dense, states = record(lambda: distiller.dense_pass(model, input_ids_1T, packing), self.pool)
        pruned, h_pruned_TD = record(
            lambda: distiller.pruned_pass(model, input_ids_1T, packing, states.prefix_BTD), self.pool
        )
        gradient_TD = torch.zeros_like(h_pruned_TD)

        def add_gradients() -> None:
            found = torch.autograd.grad(h_pruned_TD, self.parameters, gradient_TD)
            self.flat += torch.cat([gradient.flatten() for gradient in found])

        backward, _ = record(add_gradients, self.pool)
        return _Shape(input_ids_1T, packing, states.h_ND, h_pruned_TD.detach(), gradient_TD, dense, pruned, backward)


def _key(batch: Batch) -> Key:
    packing = packing_of(batch)
    return batch["input_ids"].shape[1], len(packing.starts_S), packing.longest
