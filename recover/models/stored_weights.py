"""Frozen matrices of blocks, each there only while its block computes; where they lie meanwhile is a store's business.

What ZeRO-3, FSDP and offloading do with weights, without what only trained ones need: nothing is reduced or written
back. Of a block, what comes and goes lies in one piece of the device's memory, which is filled while the block in front
of it computes: the order of blocks is learnt from the passes. So two blocks are there at a time, and whatever runs a
model sees whole weights: masks, closed blocks, both views of a twin, adapters, checkpointing. Code that reads weights
outside of a block's call says so (`present`, `each_weight`). Stores are in `stores.py`.

Then how weights are shared out for a training alone (`share_out`), how ZeRO-3 is told to gather, and how a model is
read that is never whole in memory (`from_files`): block by block from its files, into the store. What is checked is
what `load.py` checks of any model: names and sizes against the config, then every number as it is read. Such a model is
on the device where it computes from the beginning: it is not moved afterwards.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import accelerate
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from recover.base import dist, zero
from recover.base.errors import ModelError
from recover.maths.divergence import all_finite
from recover.models.arch import as_linears, base_of, blocks_of, modules_in
from recover.models.site import SUBLAYERS
from recover.models.stores import (
    Bits,
    Files,
    HostMemory,
    Machine,
    MachineMemory,
    Quantized,
    Read,
    Shared,
    Store,
    Work,
    laid_out,
    padded,
    sees_peers,
)
from recover.models.wrapper import remember, wrapped_of

Pass = Literal["dense", "forward", "backward"]
# Of a safetensors header; what else there is, is no number of a model's weights.
KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


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


def store_of(offload: str, load_in: Bits | None, device: torch.device) -> Store:
    """What a recipe's `model.offload` and `model.load_in` ask for. Raises ModelError where a package is missing.

    Main memory is shared between the processes of a machine, unless one is alone: all must call it together.
    """
    if load_in is not None:
        return Quantized(device, load_in, in_host=offload == "cpu")
    if offload == "disk":
        return Files(device)
    return HostMemory(device) if dist.alone() else MachineMemory(device)


def shared_store(device: torch.device) -> Store | None:
    """Shares of all processes of a machine, of which each may read at any time; None where GPUs cannot.

    All must call it together.
    """
    if device.type != "cuda":
        return MachineMemory(device)
    machine = Machine()
    return Shared(machine, device) if sees_peers(device, machine.members) else None


class Mapped:
    """Tensors of safetensors files, as views of the files themselves: what is not looked at takes no memory.

    The system reads pages when they are looked at, and gives them up when memory is short. To be read, not written to.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """`files`: the file of each tensor. The files are known to be whole (`check_weights`)."""
        self._files = dict(files)
        self._opened: dict[Path, tuple[mmap.mmap, dict[str, Any], int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        memory, header, start = self._open(path)
        entry = header[name]
        first, end = entry["data_offsets"]
        if entry["dtype"] not in KINDS:
            raise ModelError(f"{path}: {name} is stored as {entry['dtype']}; expected one of {', '.join(KINDS)}")
        kind = KINDS[entry["dtype"]]
        if (start + first) % kind.itemsize:  # of files whose header was not padded
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        numbers = (end - first) // kind.itemsize
        if not numbers:
            return torch.empty(entry["shape"], dtype=kind)
        with warnings.catch_warnings():  # of memory that cannot be written, which nobody does
            warnings.simplefilter("ignore", UserWarning)
            return torch.frombuffer(memory, dtype=kind, count=numbers, offset=start + first).view(entry["shape"])

    def _open(self, path: Path) -> tuple[mmap.mmap, dict[str, Any], int]:
        if path not in self._opened:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                self._opened[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), header, 8 + size
        return self._opened[path]


def sources_of(meta: PreTrainedModel, files: Mapping[str, Path]) -> dict[str, str] | None:
    """For each tensor of the model its name in the files; None where transformers makes some out of several."""
    wrapped = wrapped_of(meta)
    if wrapped is not None:
        return dict(wrapped.text)
    known, mapping = meta.state_dict(), get_model_conversion_mapping(meta)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for source in files:
        name, by = rename_source_key(source, renamings, converters, meta.base_model_prefix, known)
        if name not in known and source in known:
            name, by = source, None
        if by is not None:
            return None
        found[name] = source
    return found


def from_files(meta: PreTrainedModel, folder: Path, files: Mapping[str, Path], place: Store) -> PreTrainedModel | None:
    """The model whose names, sizes and dtypes `meta` has, its blocks' matrices in the store, all else on its device.

    None where its tensors are not in the files one by one. Raises ModelError for numbers that are not finite.
    """
    sources = sources_of(meta, files)
    if sources is None:
        return None
    mapped = Mapped(files)
    made = empty_like(meta)
    turned = as_linears(made)

    def value(name: str) -> Tensor | None:
        if name not in sources:
            return None
        found = finite(folder, name, mapped[sources[name]])
        return found.T if name in turned else found

    fill(made, place, value, {name: each.dtype for name, each in meta.state_dict().items()})
    left = [name for name, each in made.named_parameters() if each.is_meta]
    if left:
        raise ModelError(f"{folder}: {left[0]} and {len(left) - 1} more are not in the weights")
    return made


def empty_like(meta: PreTrainedModel) -> PreTrainedModel:
    """Another model of its class and config, whose parameters have no memory, and whose buffers are real."""
    kind: Any = type(meta)
    with accelerate.init_empty_weights():  # buffers are made by the constructor, as anywhere else
        made = kind._from_config(meta.config, dtype=meta.dtype, attn_implementation=meta.config._attn_implementation)
    made.generation_config = meta.generation_config
    remember(made, wrapped_of(meta))
    return made.requires_grad_(False).eval()


def fill(
    made: PreTrainedModel,
    place: Store | None,
    value: Callable[[str], Tensor | None],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Give a model without memory its weights: blocks' matrices in the store, all else on its device, frozen.

    Without a store, all on this `device`.
    `value(name)`: of any dtype, anywhere, and asked for one at a time; None of what is tied to another tensor.
    """
    stored: set[int] = set()
    if place is not None:
        device = place.device
        stored = {id(each) for block in matrices_of(list(blocks_of(made))) for each in block}
    names: dict[int, str] = {}
    for path, module in made.named_modules():
        for name, parameter in list(module._parameters.items()):
            full = f"{path}.{name}" if path else name
            if parameter is None:
                continue
            if id(parameter) in stored:
                empty = torch.empty(1, dtype=dtypes[full], device=device).expand(parameter.shape)
                module._parameters[name] = held = nn.Parameter(empty, requires_grad=False)
                names[id(held)] = full
            elif (found := value(full)) is not None:
                # A copy: what is read may be a view of a file.
                found = found.to(device, dtypes[full], copy=True)
                module._parameters[name] = nn.Parameter(found, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                found = value(f"{path}.{name}" if path else name)
                found = buffer if found is None else found.to(buffer.dtype, copy=True)
                module._buffers[name] = found.to(device)
    made.tie_weights()

    def read(parameter: nn.Parameter) -> Tensor:
        found = value(names[id(parameter)])
        assert found is not None, "a matrix of a block is tied to another"
        return found

    if place is not None:
        store(made, place, read)


def finite(folder: Path, name: str, value: Tensor) -> Tensor:
    """The same values. Raises ModelError naming the folder and the tensor where one is not finite."""
    if not all_finite(value):
        raise ModelError(f"{folder}: {name} holds NaN or infinite values: fetch the model again, or load in float32")
    return value
