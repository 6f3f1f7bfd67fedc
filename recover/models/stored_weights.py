"""Frozen weights held once by all processes of a machine: each owns some of every block's, and the others' come ahead.

What ZeRO-3 and FSDP do with weights, without what only trained ones need: nothing is reduced, written back, converted.
What a process owns stays in place; the rest of a block lies in one piece of memory, which comes while the block in
front of it computes, for a few calls of the host. Values are those of whole weights to the bit. Then the way between
processes (`Shares`), and how ZeRO-3 is told to gather (`gather_by_block`).
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import TrainerCallback

from recover.base import console, dist, zero
from recover.models.arch import modules_in
from recover.models.site import SUBLAYERS

if TYPE_CHECKING:
    from recover.models.twin import Twin


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


Layout = Sequence[Sequence[int]]  # [block][member]: bytes of the matrices that this member owns in this block


class Work(Protocol):
    """What is under way."""

    def wait(self) -> Any:
        """What is launched from here on finds it done (a CPU waits here, a GPU in its stream)."""
        ...


class Shares(Protocol):
    """One process's hold on what all have: each matrix has one owner, where it stays in place.

    `PeerMemory`, GPUs of one machine that see each other's memory: each copies what it needs when it needs it, by its
    copy engines, which take no multiprocessor from what computes, and waits for no other process: frozen weights never
    change. `Collective`, everywhere else: broadcasts, for which all processes must come. `bytes_elsewhere`: its own
    memory that torch does not count.
    """

    bytes_elsewhere: int

    def mine(self, block: int) -> Tensor:
        """This process's matrices of a block, as bytes; to be written before `publish`."""
        ...

    def publish(self) -> None:
        """All processes have written theirs: from here on they may be gathered."""
        ...

    def gather(self, block: int, places: Mapping[int, Tensor]) -> Work:
        """Begin to bring what other members own of a block to its place, once what was launched before has ended."""
        ...

    def close(self) -> None:
        """No process gathers any more."""
        ...


class Machine:
    """The processes of this machine, among which blocks are shared out. All processes must build it together.

    Between machines, reading weights would set the pace; only where machines differ in processes is it all of them.
    """

    def __init__(self) -> None:
        local = dist.local_world_size()
        alike = set(dist.gather([local])) == {local} and dist.world_size() % local == 0
        size = local if alike else dist.world_size()
        group, _ = torch.distributed.new_subgroups(group_size=size, timeout=dist.TIMEOUT)
        self.group: Any = group
        self.members, self.member = self.group.size(), self.group.rank()

    def shares(self, layout: Layout, device: torch.device) -> Shares:
        """Memory for this layout, the same on all. All processes must call it."""
        if device.type == "cuda" and _sees_peers(device, self.members):
            found, problem = None, ""
            try:
                found = PeerMemory(layout, device, self)
            except RuntimeError as error:  # containers may forbid it
                problem = str(error).splitlines()[0]
            problems = dist.gather([problem])
            if found is not None and not any(problems):
                return found
            reason = next(filter(None, problems))
            console.say(f"GPUs cannot read one another's memory ({reason}): weights are broadcast")
        return Collective(layout, device, self)


class Collective:
    def __init__(self, layout: Layout, device: torch.device, machine: Machine) -> None:
        self._machine, self.bytes_elsewhere = machine, 0
        sizes = [block[machine.member] for block in layout]
        self._mine = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
        self._owners = [[member for member, size in enumerate(block) if size] for block in layout]

    def mine(self, block: int) -> Tensor:
        return self._mine[block]

    def publish(self) -> None:
        pass

    def gather(self, block: int, places: Mapping[int, Tensor]) -> Work:
        group, works = self._machine.group, []
        for owner in self._owners[block]:
            source = torch.distributed.get_global_rank(group, owner)
            place = places.get(owner, self._mine[block])  # the owner sends from where they lie
            works.append(torch.distributed.broadcast(place, source, group=group, async_op=True))
        return _Works(works)

    def close(self) -> None:
        torch.distributed.destroy_process_group(self._machine.group)


class PeerMemory:
    def __init__(self, layout: Layout, device: torch.device, machine: Machine) -> None:
        import torch.distributed._symmetric_memory as symmetric

        members, self._group = machine.members, machine.group
        self._member = machine.member
        totals = [sum(block[member] for block in layout) for member in range(members)]
        self.bytes_elsewhere = max(totals)  # all must allocate the same
        memory = symmetric.empty(self.bytes_elsewhere, dtype=torch.uint8, device=device)
        handle: Any = symmetric.rendezvous(memory, self._group.group_name)
        self._of: dict[int, Sequence[Tensor]] = {}
        # Each begins with its neighbour, so that not all read from one at a time.
        for member in [(self._member + step) % members for step in range(1, members + 1)]:
            whole = memory if member == self._member else handle.get_buffer(member, memory.shape, memory.dtype)
            starts = list(accumulate((block[member] for block in layout), initial=0))
            self._of[member] = [whole[start:end] for start, end in pairwise(starts)]
        self._stream: Any = torch.cuda.Stream(device)

    def mine(self, block: int) -> Tensor:
        return self._of[self._member][block]

    def publish(self) -> None:
        self._meet()

    def gather(self, block: int, places: Mapping[int, Tensor]) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for member, theirs in self._of.items():
                if member in places:
                    places[member].copy_(theirs[block], non_blocking=True)
            return _InStream(self._stream.record_event())

    def close(self) -> None:
        self._meet()
        self._of.clear()
        torch.distributed.destroy_process_group(self._group)

    def _meet(self) -> None:
        torch.cuda.synchronize()
        torch.distributed.barrier(self._group, device_ids=[dist.local_rank()])


class _Works:
    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class _InStream:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def _sees_peers(device: torch.device, members: int) -> bool:
    """Whether every GPU of the machine can read every other's memory; each process answers for its own."""
    # Multicast is not needed, and not all machines may use it.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    others = [torch.device("cuda", number) for number in range(members) if number != device.index]
    seen = all(number.index < torch.cuda.device_count() for number in others) and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )
    known = importlib.util.find_spec("torch.distributed._symmetric_memory") is not None  # torch does not promise it
    return all(dist.gather([seen and known]))


def gather_by_block(twin: Twin) -> None:
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
