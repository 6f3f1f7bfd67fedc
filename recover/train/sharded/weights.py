"""Frozen weights held once by all processes of a machine: each owns some of every block's, and the others' come ahead.

What ZeRO-3 and FSDP do with weights, without what only trained ones need: nothing is reduced, written back, converted.
What a process owns stays in place; the rest of a block lies in one piece of memory, which comes while the block in
front of it computes, for a few calls of the host. Values are those of whole weights to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from recover.base import dist
from recover.train.sharded.transport import Machine, Shares, Work

Pass = Literal["dense", "forward", "backward"]

ALIGNED = 256  # bytes: where a matrix may begin, as allocators have it


class WeightShards:
    """From here on, on every process, the frozen matrices of others are there only while their block computes.

    All processes must build it together, run the same blocks in the same order, and call its methods together: a
    gathering may wait for all. Vectors, parameters that are trained, and what blocks share with others, stay whole.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        machine = Machine()
        owned = _deal_out(_matrices(blocks), machine.members)
        layout = [[_bytes(matrices) for matrices in block] for block in owned]
        self._blocks = blocks
        self._shares: Shares = machine.shares(layout, dist.device())
        self._weights = [_Block(number, each, machine.member, self._shares) for number, each in enumerate(owned)]
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
            for weights in self._weights:
                weights.release()
            self._watch()

    def end(self) -> None:
        """All weights whole again, for good."""
        self._gather_all()
        for weights in self._weights:
            weights.keep()
        self._shares.close()

    def _gather_all(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now = None
        for weights in self._weights:
            weights.gather()
            weights.wait()

    def _watch(self) -> None:
        for number, block in enumerate(self._blocks):
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
        for other, weights in enumerate(self._weights):
            # Freed in the order of the stream: what was launched on these weights before still finds them.
            if other not in (number, following):
                weights.release()
        self._weights[number].gather()
        if following is not None:
            self._weights[following].gather()
        self._weights[number].wait()


class SharedOut(TrainerCallback):
    """Shares the weights out once the engine is built, which copies them to other processes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.shards = WeightShards(self.trainer.distiller.twin.blocks)


class _Block:
    """The matrices of one block, by owner: this process's stay, the others' are views of memory that comes and goes.

    Views throughout: so what autograd has saved of them (views too) is right again as soon as the memory is back.
    """

    def __init__(self, number: int, owned: Sequence[Sequence[nn.Parameter]], member: int, shares: Shares) -> None:
        self._number, self._shares = number, shares
        self._mine = owned[member]
        self._work: Work | None = None
        _move(self._mine, shares.mine(number))
        sizes = [0 if owner == member else _bytes(matrices) for owner, matrices in enumerate(owned)]
        self._bytes = sum(sizes)
        self._away = torch.empty(self._bytes, dtype=torch.uint8, device=shares.mine(number).device)
        places = self._away.split(sizes)
        for owner, matrices in enumerate(owned):
            if owner != member:
                _move(matrices, places[owner])
        self._places = {owner: places[owner] for owner, size in enumerate(sizes) if size}
        self._here = True
        self.release()

    def gather(self) -> None:
        """Have the others' matrices come, if they are not here or on their way."""
        if not self._here:
            self._away.untyped_storage().resize_(self._bytes)
            self._work = self._shares.gather(self._number, self._places)
            self._here = True

    def wait(self) -> None:
        """What is launched from here on finds them."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def release(self) -> None:
        """Give their memory back."""
        if self._here:
            self.wait()
            self._away.untyped_storage().resize_(0)
            self._here = False

    def keep(self) -> None:
        """Out of the memory that others read, which ends."""
        for parameter in self._mine:
            parameter.data = parameter.data.clone()


def _runs(block: Any) -> bool:
    return block.switch.dense or not block.closed


def _matrices(blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """What is shared out of each block."""
    uses = Counter(id(parameter) for block in blocks for parameter in set(block.parameters()))
    return [
        [
            parameter
            for parameter in dict.fromkeys(block.parameters())
            if not parameter.requires_grad and parameter.dim() > 1 and uses[id(parameter)] == 1
        ]
        for block in blocks
    ]


def _deal_out(matrices: Sequence[Sequence[nn.Parameter]], members: int) -> list[list[list[nn.Parameter]]]:
    """[block][member]: what each owns; the largest of a block first, to whom has least so far. The same on all."""
    loads = [0] * members
    found = []
    for block in matrices:
        owned: list[list[nn.Parameter]] = [[] for _ in range(members)]
        for matrix in sorted(block, key=lambda matrix: -matrix.nbytes):
            owner = loads.index(min(loads))
            owned[owner].append(matrix)
            loads[owner] += matrix.nbytes
        found.append(owned)
    return found


def _padded(matrix: Tensor) -> int:
    return -(-matrix.nbytes // ALIGNED) * ALIGNED


def _bytes(matrices: Sequence[Tensor]) -> int:
    return sum(map(_padded, matrices))


def _move(matrices: Sequence[nn.Parameter], memory: Tensor) -> None:
    """Let the matrices lie there from here on."""
    start = 0
    for matrix in matrices:
        place = memory[start : start + matrix.nbytes].view(matrix.dtype).view(matrix.shape)
        place.copy_(matrix.detach())
        matrix.data = place
        start += _padded(matrix)
