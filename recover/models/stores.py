"""Where frozen matrices lie while their block does not compute: in main memory, in files, in few bits.

A `Store` holds the matrices of all blocks and fills a block's piece of the device's memory when it is asked to, beside
what the device computes. Values are those it was given, to the bit; those of `Quantized` are as near as its bits allow.
Stores that several processes hold together are in `shares.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from recover.base import console
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
