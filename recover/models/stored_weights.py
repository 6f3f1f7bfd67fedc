"""Frozen matrices of blocks, each there only while its block computes; where they lie meanwhile is a store's business.

What ZeRO-3, FSDP and offloading do with weights, without what only trained ones need: nothing is reduced or written
back. Of a block, what comes and goes lies in one piece of the device's memory, which is filled while the block in front
of it computes: the order of blocks is learnt from the passes. So two blocks are there at a time, and whatever runs a
model sees whole weights: masks, closed blocks, both views of a twin, adapters, checkpointing. Code that reads weights
outside of a block's call says so (`present`, `each_weight`). Stores are in `stores.py` and `shares.py`.

Then how weights are shared out for a training alone (`share_out`), and how ZeRO-3 is told to gather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from recover.base import dist, zero
from recover.models.arch import base_of, blocks_of, modules_in
from recover.models.shares import Machine, Shared
from recover.models.site import SUBLAYERS
from recover.models.stores import Read, Store, Work, laid_out, padded

Pass = Literal["dense", "forward", "backward"]


class StoredWeights:
    """From here on the frozen matrices of these blocks are in `store`, and with the model while their block computes.

    `read(parameter)` gives the values that the store is to hold; default: what the parameter holds. Vectors, parameters
    that are trained, and what blocks share with others, stay whole. Copies of the modules around the same parameters
    (`Held.again`) come and go with them. Where a store's gathering waits for other processes (`Collective`), all must
    build it together, run the same blocks in the same order, and call its methods together.
    """

    def __init__(self, blocks: Sequence[nn.Module], store: Store, read: Read | None = None) -> None:
        self._blocks, self._store = blocks, store
        self.read = read
        moving = store.take(matrices_of(blocks), read or (lambda parameter: parameter.detach()))
        self._weights = [_Block(self, number, each, store) for number, each in enumerate(moving)]
        store.publish()
        self._order: dict[tuple[int, Pass], int] = {}  # which block was needed after which
        self._now: tuple[int, Pass] | None = None
        self._held: Counter[int] = Counter()  # by `present`
        self._whole = False
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(number))
            block.register_forward_hook(self._behind(number))

    @property
    def bytes_elsewhere(self) -> int:
        """Of the device's memory, what the store takes and torch's own count leaves out."""
        return self._store.bytes_elsewhere

    @property
    def kind(self) -> str:
        """Where the weights are, in words."""
        return self._store.kind

    @property
    def fixed(self) -> bool:
        """Whether nothing in this process could change the weights."""
        return self._store.fixed

    @property
    def exact(self) -> bool:
        """Whether the model has the very values that were read."""
        return self._store.exact

    @contextmanager
    def present(self, *numbers: int) -> Iterator[None]:
        """Inside, these blocks' weights are here, whatever runs."""
        self._held.update(numbers)
        try:
            for number in numbers:
                self._weights[number].gather()
            for number in numbers:
                self._weights[number].wait()
            yield
        finally:
            self._held.subtract(numbers)
            for number in numbers:
                if not (self._held[number] or self._whole):
                    self._weights[number].release()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, all weights are here, and a process may run what it likes, alone."""
        self._gather_all()
        try:
            yield
        finally:
            self._whole = False
            for weights in self._weights:
                weights.stays = False
                weights.release()

    def end(self) -> None:
        """All weights whole again, for good."""
        self._gather_all()
        self._store.close()

    def _gather_all(self) -> None:
        self._whole, self._now = True, None
        for weights in self._weights:
            weights.gather()
            weights.wait()
            weights.stays = True

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
        if self._whole:
            return
        now = self._now
        if now == (number, "backward") and kind == "forward":
            kind = "backward"  # checkpointing runs it again
        elif now is not None:
            self._order[now] = number
        self._now = (number, kind)
        following = self._order.get(self._now)
        for other, weights in enumerate(self._weights):
            # Freed in the order of the stream: what was launched on these weights before still finds them.
            if other not in (number, following) and not self._held[other]:
                weights.release()
        self._weights[number].gather()
        if following is not None:
            self._weights[following].gather()
        self._weights[number].wait()


class _Block:
    """What of a block comes and goes: views of one piece of memory that comes and goes.

    Views throughout: so what autograd has saved of them (views too) is right again as soon as the memory is back.
    """

    def __init__(self, owner: StoredWeights, number: int, matrices: Sequence[nn.Parameter], store: Store) -> None:
        self.owner, self._number, self._store = owner, number, store
        self._work: Work | None = None
        self._bytes = sum(map(padded, matrices))
        self._room = torch.empty(self._bytes, dtype=torch.uint8, device=store.device)
        self._places = laid_out(self._room, matrices)
        for matrix, place in zip(matrices, self._places, strict=True):
            matrix.data = place
            matrix.stored = self  # type: ignore[attr-defined]
        self._here, self.stays = True, False
        self.release()

    @property
    def number(self) -> int:
        """The block's."""
        return self._number

    def gather(self) -> None:
        """Have the matrices come, if they are not here or on their way."""
        if not self._here:
            self._room.untyped_storage().resize_(self._bytes)
            self._work = self._store.gather(self._number, self._room, self._places)
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
            self._room.untyped_storage().resize_(0)
            self._here = False


def comes_and_goes(parameter: Tensor) -> bool:
    """Whether the parameter may be read only while its block computes, or inside `present`."""
    block: _Block | None = getattr(parameter, "stored", None)
    return block is not None and not block.stays


def stored_in(model: nn.Module) -> StoredWeights | None:
    """Where the weights of this model lie; None: with it."""
    return getattr(base_of(model), "stored_weights", None)


def store(model: nn.Module, place: Store, read: Read | None = None) -> StoredWeights:
    """Put the blocks' frozen matrices there; `stored_in` knows it from here on."""
    base: Any = base_of(model)
    base.stored_weights = StoredWeights(list(blocks_of(model)), place, read)
    return base.stored_weights


def present(*parameters: Tensor) -> Any:
    """Inside, the values of these parameters are here, wherever their store has them else."""
    blocks = {id(block): block for each in parameters if (block := getattr(each, "stored", None)) and not block.stays}
    stack = ExitStack()
    for block in blocks.values():
        stack.enter_context(block.owner.present(block.number))
    return stack


def each_weight(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `named_parameters`, each with its values there while it is looked at, and no longer.

    An array of numpy has to be made of a copy: it keeps memory from being given back.
    """
    inside, current = ExitStack(), None
    try:
        for name, parameter in model.named_parameters():
            block = getattr(parameter, "stored", None)
            if block is not None and block is not current:
                inside.close()
                current, inside = block, present(parameter)
            yield name, parameter
    finally:
        inside.close()


def original(parameter: Tensor) -> Tensor:
    """The values as they were read, where the store has only near ones; else the parameter's, which must be here."""
    block: _Block | None = getattr(parameter, "stored", None)
    if block is None or block.owner.exact or block.owner.read is None:
        return parameter.detach()
    return block.owner.read(cast(nn.Parameter, parameter))


def share_out(blocks: Sequence[nn.Module]) -> StoredWeights:
    """Weights that every process holds whole, from here on held once by all processes of a machine."""
    return StoredWeights(blocks, Shared(Machine(), dist.device()))


class SharedOut(TrainerCallback):
    """Shares the weights out once the engine is built, which copies them to other processes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.shards = share_out(self.trainer.distiller.twin.blocks)


def _runs(block: Any) -> bool:
    switch = getattr(block, "switch", None)  # none: a stock model's
    return switch is None or switch.dense or not block.closed


def matrices_of(blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Of each block, what may come and go."""
    uses = Counter(id(parameter) for block in blocks for parameter in set(block.parameters()))
    return [
        [
            parameter
            for parameter in dict.fromkeys(block.parameters())
            if not parameter.requires_grad and parameter.dim() > 1 and uses[id(parameter)] == 1
        ]
        for block in blocks
    ]


def gather_by_block(twin: Any) -> None:
    """Have ZeRO-3 gather a whole block at once, instead of every layer and adapter by itself.

    DeepSpeed's own way is a gathering, a release and four hooks around each module. A block with LoRA has dozens, most
    of them tiny, and in a step both views run them and backward once more: the host, not the GPU, then sets the pace.

    To be called before DeepSpeed builds its engine. Blocks that are trained are gathered whole; of the others, which
    run without gradients only, each sublayer: where one is closed it is not called, and nothing is gathered.

    A block that is gathered whole gives its gradients away when its input has got one, so its input must ask for one.
    """
    arch = twin.arch
    for block in twin.blocks:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        inside = [name for part in SUBLAYERS for name in modules_in(block, arch, part)]
        parts = [block] if trained else [block.get_submodule(name) for name in inside]
        for part in parts:
            zero.gather_at_once(part)
    model: Any = twin.model
    model.enable_input_require_grads()
