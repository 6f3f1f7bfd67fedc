"""Where the shares of sharded weights lie, and how a process comes to the whole of a block.

`PeerMemory`, GPUs of one machine that see each other's memory: each copies what it needs when it needs it, by its copy
engines, which take no multiprocessor from what computes, and waits for no other process: frozen weights never change.
`Collective`, everywhere else: an all-gather, for which all processes must come.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from recover import console, dist

ALIGNED = 256  # bytes: where a weight or a share may begin, as allocators have it


class Work(Protocol):
    """What is under way."""

    def wait(self) -> Any:
        """What is launched from here on finds it done (a CPU waits here, a GPU in its stream)."""
        ...


class Shares(Protocol):
    """`mine[n]`: this process's share of block n, as bytes, to be written before `publish`.

    `members` processes have one, this one is number `member`. `bytes_elsewhere`: memory that torch does not count.
    """

    members: int
    member: int
    bytes_elsewhere: int

    @property
    def mine(self) -> Sequence[Tensor]: ...

    def publish(self) -> None:
        """All processes have written their shares: from here on they may be gathered."""
        ...

    def gather(self, block: int, whole: Tensor) -> Work:
        """Begin to fill `whole` with all shares of a block, once what was launched before has ended."""
        ...

    def close(self) -> None:
        """No process gathers any more."""
        ...


def shares_of(sizes: Sequence[int], device: torch.device) -> Shares:
    """Shares of blocks of so many bytes, among the processes of one machine. All processes must call it."""
    group = _machine_group()
    parts = [-(-size // (ALIGNED * group.size())) * ALIGNED for size in sizes]
    if device.type == "cuda" and _sees_peers(device, group):
        found, problem = None, ""
        try:
            found = PeerMemory(parts, device, group)
        except RuntimeError as error:  # containers may forbid it
            problem = str(error).splitlines()[0]
        problems = dist.gather([problem])
        if found is not None and not any(problems):
            return found
        console.say(f"GPUs cannot read one another's memory ({next(filter(None, problems))}): weights are all-gathered")
    return Collective(parts, device, group)


class Collective:
    def __init__(self, parts: Sequence[int], device: torch.device, group: Any) -> None:
        self._group = group
        self.members, self.member, self.bytes_elsewhere = group.size(), group.rank(), 0
        self.mine = torch.empty(sum(parts), dtype=torch.uint8, device=device).split(list(parts))

    def publish(self) -> None:
        pass

    def gather(self, block: int, whole: Tensor) -> Work:
        return _all_gather(whole, self.mine[block], group=self._group, async_op=True)

    def close(self) -> None:
        torch.distributed.destroy_process_group(self._group)


class PeerMemory:
    def __init__(self, parts: Sequence[int], device: torch.device, group: Any) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._group = group
        self.members, self.member, self.bytes_elsewhere = group.size(), group.rank(), sum(parts)
        mine = symmetric.empty(sum(parts), dtype=torch.uint8, device=device)
        handle: Any = symmetric.rendezvous(mine, group.group_name)
        self.mine = mine.split(list(parts))
        # Each begins with its neighbour, so that not all read from one at a time; its own comes last.
        self._order = [(self.member + step) % self.members for step in range(1, self.members + 1)]
        self._all = {peer: handle.get_buffer(peer, mine.shape, mine.dtype).split(list(parts)) for peer in self._order}
        self._stream: Any = torch.cuda.Stream(device)

    def publish(self) -> None:
        self._meet()

    def gather(self, block: int, whole: Tensor) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        places = whole.chunk(self.members)
        with torch.cuda.stream(self._stream):
            for peer in self._order:
                places[peer].copy_(self._all[peer][block], non_blocking=True)
            return _InStream(self._stream.record_event())

    def close(self) -> None:
        self._meet()
        self._all.clear()
        torch.distributed.destroy_process_group(self._group)

    def _meet(self) -> None:
        torch.cuda.synchronize()
        torch.distributed.barrier(self._group, device_ids=[dist.local_rank()])


class _InStream:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def _machine_group() -> Any:
    """The processes of this machine (between machines, reading weights would set the pace), or all, if they differ."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or dist.world_size())
    alike = set(dist.gather([local])) == {local} and dist.world_size() % local == 0
    group, _ = torch.distributed.new_subgroups(group_size=local if alike else dist.world_size(), timeout=dist.TIMEOUT)
    return group


def _sees_peers(device: torch.device, group: Any) -> bool:
    """Whether every GPU of the group can read every other's memory; each process answers for its own."""
    # Multicast is not needed, and not all machines may use it.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    others = [torch.device("cuda", number) for number in range(group.size()) if number != device.index]
    seen = all(number.index < torch.cuda.device_count() for number in others) and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )
    known = importlib.util.find_spec("torch.distributed._symmetric_memory") is not None  # torch does not promise it
    return all(dist.gather([seen and known]))


def _all_gather(whole: Tensor, share: Tensor, **options: Any) -> Any:
    """By its name in this torch: the old one warns where there is a new one."""
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    return getattr(torch.distributed, name)(whole, share, **options)
