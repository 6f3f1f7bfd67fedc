"""A checkpoint folder as one GGUF file that llama.cpp runs: weights, metadata, tokenizer; whole, or not there.

Shapes: O out features (H heads x 2 halves x P pairs), I in features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from recover.base import artifacts, console
from recover.base.errors import ExportError
from recover.export.gguf.family import (
    add_sizes,
    family_of,
    read_config,
    rope_factors,
    tensor_names,
    warn_of_older_readers,
)
from recover.export.gguf.vocabulary import add_vocabulary, vocabulary
from recover.models.source import INDEX, WEIGHTS, explained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

# dtype -> (name of the tensor type, number of the file type) in GGUF
DTYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file. `load` reads it when it is written, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]


def write_gguf(folder: Path, out: Path, dtype: str | None = None) -> Path:
    """Write the checkpoint in `folder` to `out`, one tensor in memory at a time; `dtype` None is the checkpoint's own.

    Matrices are cast once to `dtype` (a key of DTYPES); vectors are float32, which is all that llama.cpp takes there.
    What was under `out` is replaced in one rename.

    Raises:
        ExportError: a family, rope, activation, bias or tokenizer that this writer or llama.cpp does not have, by name;
            tensors missing or left over; values not finite in `dtype`.
        ModelError: the folder is no whole checkpoint.
        ArtifactError: the file could not be written.
    """
    if out.suffix != ".gguf":
        raise ExportError(f"{out}: expected a file name that ends in .gguf")
    config = read_config(folder)
    dtype = dtype or str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"{folder}: {dtype} has no GGUF form here; expected one of {', '.join(DTYPES)}")
    warn_of_older_readers(config)
    entries = _entries(folder, config, dtype)
    writer = _writer(folder, config, dtype)
    with _whole(out, sum(_nbytes(entry) for entry in entries)) as scratch:
        _write(writer, entries, scratch)
    return out


def _writer(folder: Path, config: PretrainedConfig, dtype: str) -> gguf.GGUFWriter:
    """A writer with all metadata and no tensor yet."""
    writer = gguf.GGUFWriter(None, family_of(config).arch)
    writer.add_type("model")
    writer.add_name(_name(folder))
    writer.add_file_type(DTYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    with explained(f"{folder}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    add_vocabulary(writer, vocabulary(tokenizer, config.vocab_size, _stops(folder, config)))
    return writer


def _name(folder: Path) -> str:
    """The recipe's name where the folder is an export of ours, else the folder's."""
    record = folder / "recover.json"
    named: artifacts.JsonObject = artifacts.read_json(record) if record.is_file() else {}
    return named.get("recipe", {}).get("name") or folder.resolve().name


def _stops(folder: Path, config: PretrainedConfig) -> list[int]:
    """Ids at which `generate` ends a text, the first of them its end-of-text token."""
    stops = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        said = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        stops = stops if said is None else said
    return list(stops) if isinstance(stops, list | tuple) else [stops] if isinstance(stops, int) else []


def _entries(folder: Path, config: PretrainedConfig, dtype: str) -> list[Entry]:
    """Every tensor of the file, from the headers of the weights alone. Raises ExportError for missing and left-over."""
    found = {name: (path, shape) for path in _weight_files(folder) for name, shape in _shapes(path).items()}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # llama.cpp, too, takes the embedding where there is no head
    names = tensor_names(config)
    _refuse_unequal(folder, config, set(names), set(found))
    entries = []
    for source, name in names.items():
        path, shape = found[source]
        load = partial(_load, path, source, _heads(config, source))
        entries.append(Entry(name, shape, dtype if len(shape) > 1 else "float32", load))
    factors = rope_factors(config)
    if factors is not None:
        entries.append(Entry("rope_freqs.weight", tuple(factors.shape), "float32", lambda: factors))
    return entries


def _refuse_unequal(folder: Path, config: PretrainedConfig, expected: set[str], found: set[str]) -> None:
    if missing := sorted(expected - found):
        raise ExportError(f"{folder}: the weights lack {missing[0]} ({len(missing)} such tensors)")
    if left := sorted(found - expected):
        arch = family_of(config).arch
        raise ExportError(f"{folder}: llama.cpp's '{arch}' has no place for {left[0]} ({len(left)} such tensors)")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(artifacts.read_json(folder / INDEX)["weight_map"].values()))]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _heads(config: PretrainedConfig, source: str) -> int | None:
    """How many heads the rows of this tensor must be reordered in; None for a tensor that stays as it is."""
    if not family_of(config).neighbours:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(source.split(".")[-2])


def _load(path: Path, source: str, heads: int | None) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(source)
    return tensor if heads is None else _neighbours(tensor, heads)


def _neighbours(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered: row p and row p + half of a rotary pair become rows 2p and 2p + 1."""
    halves_H2PI = weight_OI.unflatten(0, (heads, 2, -1))
    return halves_H2PI.transpose(1, 2).reshape(weight_OI.shape)


def _data(entry: Entry) -> np.ndarray:
    """The tensor's bytes as numpy has them: bfloat16, which it does not have, as 16-bit integers."""
    cast = entry.load().to(getattr(torch, entry.dtype)).contiguous()
    if not cast.isfinite().all():
        raise ExportError(
            f"{entry.name}: not finite in {entry.dtype}: write bfloat16 or float32, or look at the weights"
        )
    return (cast.view(torch.int16) if cast.dtype == torch.bfloat16 else cast).numpy()


def _nbytes(entry: Entry) -> int:
    size = 4 if entry.dtype == "float32" else 2
    for extent in entry.shape:
        size *= extent
    return size


def _write(writer: gguf.GGUFWriter, entries: list[Entry], path: Path) -> None:
    for entry in entries:
        kind = gguf.GGMLQuantizationType[DTYPES[entry.dtype][0]]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.int16), _nbytes(entry), raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in console.track(entries, "gguf", unit="tensor"):
            writer.write_tensor_data(_data(entry))
    finally:
        writer.close()


@contextlib.contextmanager
def _whole(out: Path, size: int) -> Iterator[Path]:
    """A file beside `out` that takes its name, synced, when all went well, and is gone otherwise."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}{artifacts.TEMPORARY}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, out)
    except OSError as error:
        raise artifacts.explained(error, out, size) from error
    finally:
        scratch.unlink(missing_ok=True)
