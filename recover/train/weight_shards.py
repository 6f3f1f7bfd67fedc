"""Frozen weights held once by all processes of a machine: each keeps a share of every block, blocks are gathered ahead.

What ZeRO-3 and FSDP do with weights, without what only trained ones need: nothing is reduced, written back, converted.
A block's weights lie in one piece of memory, so gathering it takes the host a few calls; while a block computes, the
next one is under way. Values are those of whole weights to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from recover import dist
from recover.train.shares import ALIGNED, Shares, Work, shares_of

Pass = Literal["dense", "forward", "backward"]


class WeightShards:
    """From here on, on every process, the blocks' frozen matrices are there only while their block computes.

    All processes must build it together, run the same blocks in the same order, and call its methods together: a
    gathering waits for all. Vectors, parameters that are trained, and what blocks share with others, stay whole.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        uses = Counter(id(parameter) for block in blocks for parameter in set(block.parameters()))
        own = [_matrices(block, uses) for block in blocks]
        self._shares = shares_of([_starts(each)[-1] for each in own], dist.device())
        self._blocks = blocks
        self._flats = [_Flat(block, each, self._shares) if each else None for block, each in enumerate(own)]
        self._shares.publish()
        self._order: dict[tuple[int, Pass], int] = {}  # which block was needed after which
        self._now: tuple[int, Pass] | None = None
        self._handles: list[Any] = []
        self._watch()

    @property
    def bytes_elsewhere(self) -> int:
        """Of this process's shares, the memory that torch's own count leaves out."""
        return self._shares.bytes_elsewhere

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every process holds all weights, and may run what it likes, alone."""
        self._gather_all()
        try:
            yield
        finally:
            for flat in filter(None, self._flats):
                flat.release()
            self._watch()

    def end(self) -> None:
        """All weights whole again, for good."""
        self._gather_all()
        self._shares.close()

    def _gather_all(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now = None
        for flat in filter(None, self._flats):
            flat.gather()
            flat.wait()

    def _watch(self) -> None:
        for number, block in enumerate(self._blocks):
            if self._flats[number] is not None:
                self._handles.append(block.register_forward_pre_hook(self._before(number)))
                self._handles.append(block.register_forward_hook(self._behind(number)))

    def _before(self, number: int) -> Any:
        def hook(block: Any, _inputs: Any) -> None:
            if _runs(block):
                self._need(number, "forward" if torch.is_grad_enabled() else "dense")

        return hook

    def _behind(self, number: int) -> Any:
        def hook(block: Any, _inputs: Any, output: Any) -> None:
            h_BTD = output[0] if isinstance(output, tuple) else output
            if _runs(block) and h_BTD.requires_grad:
                # The gradient of what a block puts out is the first that its backward sees.
                h_BTD.register_hook(lambda _gradient: self._need(number, "backward"))

        return hook

    @torch.no_grad()
    def _need(self, number: int, kind: Pass) -> None:
        """Block `number` is about to compute: have it here, what came after it last time under way, and no other."""
        now = self._now
        if now == (number, "backward") and kind == "forward":
            return  # checkpointing runs it again
        if now is not None:
            self._order[now] = number
        self._now = (number, kind)
        following = self._order.get(self._now)
        for other, flat in enumerate(self._flats):
            # Freed in the order of the stream: what was launched on these weights before still finds them.
            if flat is not None and other not in (number, following):
                flat.release()
        for wanted in (number, following):
            flat = None if wanted is None else self._flats[wanted]
            if flat is not None:
                flat.gather()
        here = self._flats[number]
        assert here is not None
        here.wait()


class SharedOut(TrainerCallback):
    """Shares the weights out when the engine is built: those that it copies to other processes must be there."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.share_out_weights()


class _Flat:
    """Matrices of one block in one piece of memory that comes and goes; the parameters are views of it throughout.

    So what autograd has saved of them (views too) is right again as soon as the memory is back.
    """

    def __init__(self, block: int, parameters: Sequence[nn.Parameter], shares: Shares) -> None:
        self._block, self._shares = block, shares
        self._work: Work | None = None
        self._bytes = shares.members * shares.mine[block].nbytes
        self._flat = torch.zeros(self._bytes, dtype=torch.uint8, device=parameters[0].device)
        for parameter, start in zip(parameters, _starts(parameters), strict=False):
            place = self._flat[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            place.copy_(parameter.detach())
            parameter.data = place
        shares.mine[block].copy_(self._flat.chunk(shares.members)[shares.member])
        self._here = True
        self.release()

    def gather(self) -> None:
        """Have the weights come, if they are not here or on their way."""
        if not self._here:
            self._flat.untyped_storage().resize_(self._bytes)
            self._work = self._shares.gather(self._block, self._flat)
            self._here = True

    def wait(self) -> None:
        """What is launched from here on finds the weights."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def release(self) -> None:
        """Give their memory back."""
        if self._here:
            self.wait()
            self._flat.untyped_storage().resize_(0)
            self._here = False


def _runs(block: Any) -> bool:
    return block.switch.dense or not block.closed


def _matrices(block: nn.Module, uses: Counter[int]) -> list[nn.Parameter]:
    """What is shared out of a block."""
    return [
        parameter
        for parameter in dict.fromkeys(block.parameters())
        if not parameter.requires_grad and parameter.dim() > 1 and uses[id(parameter)] == 1
    ]


def _starts(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Where in a block's memory each begins, in bytes, and where the last one ends."""
    sizes = (-(-parameter.nbytes // ALIGNED) * ALIGNED for parameter in parameters)
    return list(accumulate(sizes, initial=0))
