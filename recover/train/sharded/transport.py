"""Where the frozen matrices of sharded blocks lie, and how a process comes to those that others have.

Each matrix has one owner, where it stays in place; `Shares` brings a block's other matrices.

`PeerMemory`, GPUs of one machine that see each other's memory: each copies what it needs when it needs it, by its copy
engines, which take no multiprocessor from what computes, and waits for no other process: frozen weights never change.
`Collective`, everywhere else: broadcasts, for which all processes must come.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from recover.base import console, dist

Layout = Sequence[Sequence[int]]  # [block][member]: bytes of the matrices that this member owns in this block


class Work(Protocol):
    """What is under way."""

    def wait(self) -> Any:
        """What is launched from here on finds it done (a CPU waits here, a GPU in its stream)."""
        ...


class Shares(Protocol):
    """One process's hold on what all have. `bytes_elsewhere`: its own memory that torch does not count."""

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
