"""A model that is never whole in memory: blocks are read from its files one by one, into the store that holds them.

What is checked is what `load.py` checks of any model: names and sizes against the config, then every number as it is
read. A store's model is on the device where it computes from the beginning: it is not moved afterwards.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from recover.base import dist
from recover.base.errors import ModelError
from recover.models.arch import blocks_of
from recover.models.shares import Machine, MachineMemory, Shared, sees_peers
from recover.models.stored_weights import matrices_of, store
from recover.models.stores import Bits, Files, HostMemory, Quantized, Store
from recover.models.switched import as_linears
from recover.models.wrapper import remember, wrapped_of

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
    if value.is_floating_point() and value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
        raise ModelError(f"{folder}: {name} holds NaN or infinite values: fetch the model again, or load in float32")
    return value
