"""Both passes of a distillation step and their backward, replayed as CUDA graphs.

A small model's step is thousands of small kernels. Python needs several times as long to launch them as a GPU needs to
run them. Recorded once for each shape of batch, they are launched as three graphs: the dense pass and the pruned pass,
from tokens to hidden states, and backward, from the gradient of the pruned view's hidden states to that of the
adapters. The head and the loss are launched as ever, because the number of scored tokens differs from batch to batch.

The dense pass does not depend on what is learnt. So the next batch's runs while the host reads the losses of this one,
makes the optimizer step and writes the log (`prepare`).

Batches are packed rows, so that one recording serves all batches of so many tokens and sequences.

Legend: T tokens of the row, S sequences, N scored tokens, D width.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from recover.base import console
from recover.distill.distiller import Batch, Distiller, packing_of, rows_scored, scaled
from recover.kernels.recording import record
from recover.models.attention import Packing


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
