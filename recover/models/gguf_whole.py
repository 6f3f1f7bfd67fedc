"""Whether a GGUF file holds every tensor of its model and no other: transformers draws at random what a file lacks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recover.base.errors import ModelError
from recover.models.gguf_head import check_head
from recover.models.gguf_settings import FREQUENCIES, completed, field

LISTED = 3  # tensors named in a message
FEW_BLOCKS = 256  # are soon built, so that what the file lacks of them can be named


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers takes adapters and generation settings from beside a GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.absolute())
        yield link


def check_tensors(path: Path, shown: Path) -> None:
    """Hold the file's tensors against those of the model that its metadata describes; weights are not read.

    Raises ModelError naming the tensors (and the file as `shown`): missing, of another size, of no part of the model.
    """
    import gguf

    check_head(path, shown)
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    try:
        expected, every = _expected(path, reader)
    except ModelError as error:
        raise ModelError(f"{shown}: {error}") from None
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(
            f"{shown}: lacks {len(missing)} tensors of its model ({_some(missing)}), of {len(expected)}; it holds "
            f"{len(found)}. Fetch the file again; of a file in several parts, join them first (gguf-split --merge)"
        )
    unlike = [name for name in expected if math.prod(map(int, found[name].shape)) != math.prod(expected[name])]
    if unlike:
        name = unlike[0]
        raise ModelError(
            f"{shown}: {name} has shape {list(map(int, reversed(found[name].shape)))}, and {list(expected[name])} by "
            f"the file's metadata as transformers reads them ({len(unlike)} such tensors). Fetch the file again, or "
            "give the checkpoint that it was made from"
        )
    left = sorted(name for name in found.keys() - expected.keys() if name != FREQUENCIES)
    if left and every:
        raise ModelError(
            f"{shown}: {len(left)} tensors would be left out ({_some(left)}), and the model would be another one. Give "
            "the checkpoint that the file was made from"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _expected(path: Path, reader: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The shape of each tensor that the model needs, by its name in the file, and whether all of them are named."""
    import gguf

    arch = str(field(reader, "general.architecture"))
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = field(reader, f"{arch}.block_count")
    if blocks is not None and not (isinstance(blocks, int) and 0 < blocks <= max(FEW_BLOCKS, len(reader.tensors))):
        raise ModelError(f"{arch}.block_count is {blocks}, and the file holds {len(reader.tensors)} tensors")
    if arch not in known or blocks is None:
        return {}, False  # transformers says what it does not know
    config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config = completed(config, reader)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = gguf.get_tensor_name_map(known[arch], blocks)
    shapes: dict[str, tuple[int, ...]] = {}
    every = True
    for name, parameter in model.named_parameters():
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        every = every and there is not None and there not in shapes
        if there is not None:
            shapes[there] = tuple(parameter.shape)
    return shapes, every
