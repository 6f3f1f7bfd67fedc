"""Where frozen matrices lie while their block does not compute: in main memory, in files, in few bits, with other GPUs.

A `Store` holds the matrices of all blocks and fills a block's piece of the device's memory when it is asked to, beside
what the device computes. Values are those it was given, to the bit; those of `Quantized` are as near as its bits allow.
Two are held together by the processes of a machine: `MachineMemory`, and `Shared`, each matrix with one of their GPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from recover.base import console, dist
from recover.base.errors import ModelError

ALIGNED = 256  # bytes: where a matrix may begin, as allocators have it

# Numbers that share a scale. A row each: in rows of another length, bitsandbytes 0.50 on a CPU loses what is left over.
NF4 = 64

Read = Callable[[nn.Parameter], Tensor]  # the values of a matrix, on any device
Bits = Literal["4bit", "8bit"]


class Work(Protocol):
    """What is under way."""

    def wait(self) -> Any:
        """What is launched from here on finds it done (a CPU waits here, a GPU in its stream)."""
        ...


class Store(Protocol):
    """Holds matrices of blocks, and brings them back. `device`: where blocks compute.

    `bytes_elsewhere`: memory of that device which torch does not count. `exact`: whether values are the very ones that
    were read; `fixed`: whether nothing in this process could change them. `kind`: where they are, in words.
    """

    device: torch.device
    exact: bool
    fixed: bool
    kind: str

    @property
    def bytes_elsewhere(self) -> int:
        """As above."""
        ...

    def take(self, blocks: Sequence[Sequence[nn.Parameter]], read: Read) -> list[list[nn.Parameter]]:
        """Hold all these; of each block those that come and go, in the order in which they are to lie. Called once."""
        ...

    def publish(self) -> None:
        """Everything is taken: from here on it may be asked for."""
        ...

    def gather(self, block: int, room: Tensor, places: Sequence[Tensor]) -> Work:
        """Begin to bring a block's matrices to their places in `room` (bytes), once what was launched before ended."""
        ...

    def close(self) -> None:
        """Nothing is asked for any more."""
        ...


def padded(matrix: Tensor) -> int:
    """Bytes from the beginning of a matrix to where the next one may begin."""
    return -(-matrix.nbytes // ALIGNED) * ALIGNED


def laid_out(memory: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Views of this memory (bytes), one for each matrix, of its dtype and shape."""
    starts = accumulate(map(padded, matrices), initial=0)
    return [
        memory[start : start + matrix.nbytes].view(matrix.dtype).view(matrix.shape)
        for start, matrix in zip(starts, matrices, strict=False)
    ]


class Beside:
    """Work beside what the device computes, once what was launched before has ended; on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def do(self, work: Callable[[], Any]) -> Work:
        if self._stream is None:
            work()
            return _Done()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            return _InStream(self._stream.record_event())


class _InStream:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class _Done:
    def wait(self) -> None:
        pass


class HostMemory:
    """In main memory, of which a GPU reads by its copy engines (pinned, where the system allows it)."""

    exact, fixed, kind, bytes_elsewhere = True, False, "main memory", 0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._beside = Beside(device)
        self._memory: list[Tensor] = []
        self._pinned = _Pinned(device)

    def take(self, blocks: Sequence[Sequence[nn.Parameter]], read: Read) -> list[list[nn.Parameter]]:
        for matrices in blocks:
            memory = torch.empty(sum(map(padded, matrices)), dtype=torch.uint8)
            for place, matrix in zip(laid_out(memory, matrices), matrices, strict=True):
                place.copy_(read(matrix))
                let_go(matrix)
            self._memory.append(self._pinned.add(memory))
        return [list(matrices) for matrices in blocks]

    def publish(self) -> None:
        pass

    def gather(self, block: int, room: Tensor, places: Sequence[Tensor]) -> Work:
        return self._beside.do(lambda: room.copy_(self._memory[block], non_blocking=True))

    def close(self) -> None:
        self._pinned.close()
        self._memory.clear()


def let_go(matrix: nn.Parameter) -> None:
    """Its memory on the device is free; shape and dtype stay."""
    matrix.data = matrix.data.new_empty(1).expand(matrix.shape)


class _Pinned:
    """Main memory that a GPU copies from by itself. Pinned in place: torch's own has sizes of powers of two."""

    def __init__(self, device: torch.device) -> None:
        self._works, self._memory = device.type == "cuda", []

    def add(self, memory: Tensor) -> Tensor:
        """The same memory (bytes), pinned; where the system forbids it, as it was, said once."""
        if self._works and len(memory):
            cudart: Any = torch.cuda.cudart()
            failed = int(cudart.cudaHostRegister(memory.data_ptr(), len(memory), 0))
            if failed:
                self._works = False
                console.warn(f"main memory cannot be pinned (CUDA error {failed}): it is copied from more slowly")
            else:
                self._memory.append(memory)
        return memory

    def close(self) -> None:
        """No copy is under way."""
        while self._memory:
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(self._memory.pop().data_ptr())

    def __del__(self) -> None:
        if self._memory and not sys.is_finalizing():
            torch.cuda.synchronize()
            self.close()


class Files:
    """In the model's own files, which the system keeps in memory as far as there is room, and reads again else.

    What is read is taken as it is stored, by one thread, and becomes the model's dtype on its way; a GPU is given it
    through two pieces of pinned memory.
    """

    exact, fixed, kind, bytes_elsewhere = True, True, "its files", 0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sources: list[list[Tensor]] = []
        self._reader = ThreadPoolExecutor(1, "blocks from files")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned = _Pinned(device)
        self._stages: deque[tuple[Tensor, Any]] = deque()  # pinned memory, and when what was copied from it has ended

    def take(self, blocks: Sequence[Sequence[nn.Parameter]], read: Read) -> list[list[nn.Parameter]]:
        """`read` gives views of the files."""
        for matrices in blocks:
            self._sources.append([read(matrix) for matrix in matrices])
            for matrix in matrices:
                let_go(matrix)
        if self._stream is not None:
            most = max((sum(map(padded, matrices)) for matrices in blocks), default=0)
            for _ in range(2):
                self._stages.append((self._pinned.add(torch.empty(most, dtype=torch.uint8)), None))
        return [list(matrices) for matrices in blocks]

    def publish(self) -> None:
        pass

    def gather(self, block: int, room: Tensor, places: Sequence[Tensor]) -> Work:
        sources = self._sources[block]
        if self._stream is None:
            return _Read(self._reader.submit(_copy_all, places, sources))
        self._stream.wait_stream(torch.cuda.current_stream())
        return _Read(self._reader.submit(self._through_pinned, room, places, sources))

    def _through_pinned(self, room: Tensor, places: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        memory, ended = self._stages.popleft()
        if ended is not None:
            ended.synchronize()
        _copy_all(laid_out(memory, places), sources)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            room.copy_(memory[: len(room)], non_blocking=True)
            ended = self._stream.record_event()
        self._stages.append((memory, ended))
        return ended

    def close(self) -> None:
        self._reader.shutdown()
        self._stages.clear()
        self._pinned.close()
        self._sources.clear()


def _copy_all(places: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for place, source in zip(places, sources, strict=True):
            place.copy_(source)


class _Read:
    """Of a thread that gives an event of a GPU, or nothing."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self) -> None:
        ended = self._future.result()
        if ended is not None:
            torch.cuda.current_stream().wait_event(ended)


class _Packed(NamedTuple):
    """A matrix in few bits, and what belongs to it."""

    values: Tensor
    scales: Any  # of NF4 bitsandbytes' state; of int8 (rows, 1) in float32


class Quantized:
    """In 4 bits (NF4, blocks of 64 with scales in 8 bits, by bitsandbytes) or in 8 (int8, a scale a row).

    On the device, or but for scales in main memory (`in_host`). A block is unpacked into the model's dtype when it is
    needed. Source of NF4 and of scales in few bits: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3.
    """

    exact, fixed, bytes_elsewhere = False, False, 0

    def __init__(self, device: torch.device, bits: Bits, *, in_host: bool = False) -> None:
        self.device, self.bits = device, bits
        self.kind = f"{bits.removesuffix('bit')} bits" + (", in main memory" if in_host else "")
        self._in_host = in_host and device.type == "cuda"
        self._beside, self._pinned = Beside(device), _Pinned(device)
        self._functional = bitsandbytes_functional() if bits == "4bit" else None
        self._packed: list[list[_Packed]] = []

    def take(self, blocks: Sequence[Sequence[nn.Parameter]], read: Read) -> list[list[nn.Parameter]]:
        with torch.no_grad():
            for matrices in blocks:
                packed = []
                for matrix in matrices:
                    packed.append(self._pack(read(matrix).to(self.device, matrix.dtype)))
                    let_go(matrix)
                self._packed.append(packed)
        return [list(matrices) for matrices in blocks]

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return sum(each.nbytes for block in self._packed for packed in block for each in _tensors_of(packed))

    def publish(self) -> None:
        pass

    def gather(self, block: int, room: Tensor, places: Sequence[Tensor]) -> Work:
        def unpack() -> None:
            for packed, place in zip(self._packed[block], places, strict=True):
                self._unpack(packed, place)

        return self._beside.do(unpack)

    def close(self) -> None:
        self._pinned.close()
        self._packed.clear()

    def _pack(self, matrix: Tensor) -> _Packed:
        if self._functional is not None:
            flat = torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % NF4))
            values, scales = self._functional.quantize_4bit(
                flat.view(-1, NF4), blocksize=NF4, quant_type="nf4", compress_statistics=True
            )
        else:
            wide_OI = matrix.reshape(-1, matrix.shape[-1]).float()
            scales = wide_OI.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
            values = (wide_OI / scales).round_().to(torch.int8)
        if self._in_host:
            shape, kind = values.shape, values.dtype
            values = self._pinned.add(values.cpu().flatten().view(torch.uint8)).view(kind).view(shape)
        return _Packed(values, scales)

    def _unpack(self, packed: _Packed, place: Tensor) -> None:
        values = packed.values.to(place.device, non_blocking=True)
        if self._functional is None:
            torch.mul(values, packed.scales, out=place.view(-1, place.shape[-1]))
        elif place.is_cuda and place.numel() % NF4 == 0:
            self._functional.dequantize_4bit(values, packed.scales, out=place.view(-1, NF4))
        else:  # a CPU has no such kernel
            unpacked = self._functional.dequantize_4bit(values, packed.scales)
            place.view(-1).copy_(unpacked.view(-1)[: place.numel()])


def _tensors_of(packed: _Packed) -> list[Tensor]:
    scales = packed.scales
    if isinstance(scales, Tensor):
        return [packed.values, scales]
    inner = scales.state2
    return [packed.values, scales.absmax, *([] if inner is None else [inner.absmax])]  # their code is one for all


def bitsandbytes_functional() -> Any:
    """The module that packs and unpacks; raises ModelError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.load_in: weights are quantized by the package 'bitsandbytes', which is not installed: "
            "pip install 'recover[quantized]'"
        )
    return importlib.import_module("bitsandbytes.functional")


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
