"""Stores that the processes of a machine hold together: in main memory, or each matrix with one of their GPUs."""

from __future__ import annotations

import importlib.util
import mmap
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from recover.base import console, dist
from recover.models.stores import Beside, HostMemory, Read, Work, laid_out, let_go, padded


class MachineMemory(HostMemory):
    """In main memory, once for all processes of a machine: each reads some of the matrices, and all copy from it.

    Nobody waits for anybody once it is filled, so a process may run what it likes, alone. All must build it together.
    """

    kind = "main memory, once for all processes of the machine"

    def take(self, blocks: Sequence[Sequence[nn.Parameter]], read: Read) -> list[list[nn.Parameter]]:
        machine = Machine()
        if machine.members != dist.local_world_size():  # machines of unlike numbers of processes
            return super().take(blocks, read)
        sizes = [sum(map(padded, matrices)) for matrices in blocks]
        whole = _common_memory(sum(sizes), machine)
        self._memory = list(whole.split(sizes))
        mine = {id(matrix) for block in _deal_out(blocks, machine.members) for matrix in block[machine.member]}

        def fill() -> None:
            for memory, matrices in zip(self._memory, blocks, strict=True):
                for place, matrix in zip(laid_out(memory, matrices), matrices, strict=True):
                    if id(matrix) in mine:
                        place.copy_(read(matrix))
                    let_go(matrix)

        dist.everywhere(fill)  # one that cannot read its share must not leave the others waiting
        self._pinned.add(whole)
        return [list(matrices) for matrices in blocks]


def _common_memory(size: int, machine: Machine) -> Tensor:
    """So many bytes, the same memory in every process of the machine. It goes when the last of them lets it go."""
    path, descriptor = "", -1
    if machine.member == 0:
        descriptor = os.memfd_create("weights")  # no file system has to have room for it
        os.ftruncate(descriptor, max(1, size))
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    paths: list[Any] = [None] * machine.members
    torch.distributed.all_gather_object(paths, path, group=machine.group)
    if machine.member:
        descriptor = os.open(paths[0], os.O_RDWR)
    memory = mmap.mmap(descriptor, max(1, size))
    torch.distributed.barrier(machine.group)  # all have opened it
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class Shared:
    """With the processes of a machine: each owns some of every block's matrices, which stay in place; others come."""

    exact, fixed, kind = True, False, "other processes"

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self.device, self._machine = device, machine
        self._mine: list[nn.Parameter] = []
        self._sizes: list[list[int]] = []  # [block][owner]

    @property
    def bytes_elsewhere(self) -> int:
        return self._shares.bytes_elsewhere

    def take(self, blocks: Sequence[Sequence[nn.Parameter]], read: Read) -> list[list[nn.Parameter]]:
        machine = self._machine
        owned = _deal_out(blocks, machine.members)
        layout = [[sum(map(padded, matrices)) for matrices in block] for block in owned]
        member = machine.member
        self._shares = machine.shares(layout, self.device)
        self._sizes = [[0 if owner == member else size for owner, size in enumerate(block)] for block in layout]
        for number, block in enumerate(owned):
            for place, matrix in zip(laid_out(self._shares.mine(number), block[member]), block[member], strict=True):
                place.copy_(read(matrix))
                matrix.data = place
                self._mine.append(matrix)
        return [
            [matrix for owner, matrices in enumerate(block) if owner != member for matrix in matrices]
            for block in owned
        ]

    def publish(self) -> None:
        self._shares.publish()

    def gather(self, block: int, room: Tensor, places: Sequence[Tensor]) -> Work:
        sizes = self._sizes[block]
        parts = {owner: part for owner, part in enumerate(room.split(sizes)) if sizes[owner]}
        return self._shares.gather(block, parts)

    def close(self) -> None:
        for matrix in self._mine:  # out of the memory that others read, which ends
            matrix.data = matrix.data.clone()
        self._shares.close()


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


Layout = Sequence[Sequence[int]]  # [block][member]: bytes of the matrices that this member owns in this block


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
        if device.type == "cuda" and sees_peers(device, self.members):
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
        self._beside = Beside(device)

    def mine(self, block: int) -> Tensor:
        return self._of[self._member][block]

    def publish(self) -> None:
        self._meet()

    def gather(self, block: int, places: Mapping[int, Tensor]) -> Work:
        def read() -> None:
            for member, theirs in self._of.items():
                if member in places:
                    places[member].copy_(theirs[block], non_blocking=True)

        return self._beside.do(read)

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


def sees_peers(device: torch.device, members: int) -> bool:
    """Whether every GPU of the machine can read every other's memory; each process answers for its own."""
    # Multicast is not needed, and not all machines may use it.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    others = [torch.device("cuda", number) for number in range(members) if number != device.index]
    seen = all(number.index < torch.cuda.device_count() for number in others) and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )
    known = importlib.util.find_spec("torch.distributed._symmetric_memory") is not None  # torch does not promise it
    return all(dist.gather([seen and known]))
