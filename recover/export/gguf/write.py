"""A checkpoint folder as one GGUF file that llama.cpp runs: weights, metadata, tokenizer; whole, or not there.

Shapes: O out features (H heads x 2 halves x P pairs), I in features.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

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
from recover.export.gguf.importance import Importance
from recover.export.gguf.vocabulary import add_vocabulary, vocabulary
from recover.maths.divergence import all_finite
from recover.models.arch import experts_of, kv_heads_of
from recover.models.source import INDEX, WEIGHTS, explained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

# dtype -> (name of the tensor type, number of the file type) in GGUF
DTYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}
# Each rounded to nearest on a grid of its own for 32 weights of a row, without calibration, as llama.cpp's own.
GRIDS = {"q8_0": ("Q8_0", 7), "q5_1": ("Q5_1", 9), "q5_0": ("Q5_0", 8), "q4_1": ("Q4_1", 3), "q4_0": ("Q4_0", 2)}
# Grids for 256 weights, themselves on grids of 32 or 16, which ggml's own code finds.
BY_GGML = {"q4_k": ("Q4_K", 14), "q5_k": ("Q5_K", 16), "q6_k": ("Q6_K", 18)}
# Files of two of these: most matrices, and head and others that lose most. Which ones is llama.cpp's rule.
MIXED = {"q4_k_m": ("q4_k", 15), "q5_k_m": ("q5_k", 17)}
MATRICES = GRIDS | BY_GGML
KINDS = DTYPES | MATRICES | {name: (MATRICES[most][0], number) for name, (most, number) in MIXED.items()}
QUANTIZED = ("q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0")  # of a file, the finest first
NEED_GGML = frozenset({"q6_k", *MIXED})
ALIKE = "q8_0"  # its grid is set by the largest weight, whatever the others are multiplied with
ENDS = ("token_embd.weight", "output.weight")
FINE, FINER_K = "q8_0", "q6_k"  # of embedding and head, which lose most: llama.cpp keeps them finer too
VALUES = ("attn_v.weight", "attn_qkv.weight")
SENSITIVE = (*VALUES, "ffn_down.weight", "ffn_down_exps.weight")  # finer in some blocks of a mixed file
# Of a matrix whose rows are not made of whole grids, as llama.cpp has it; else WIDE.
NARROWER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
WIDE = "float16"
EIGHT, BLOCKS_OF_70B = 8, 80  # experts, blocks: what llama.cpp knows a size of model by
EXPERTS_END, ROUTER_END = "_exps.weight", "ffn_gate_inp.weight"
# package -> the file of it in which ggml is
GGML_IN = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/*ggml-base*"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file. `load` reads it when it is written, so that one at a time is in memory.

    `importance`: mean squares of its input channels, (E, I), that weigh what is rounded; None: all alike.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]
    importance: np.ndarray | None = None


def write_gguf(folder: Path, out: Path, dtype: str | None = None, importance: Importance | None = None) -> Path:
    """Write the checkpoint in `folder` to `out`, one tensor in memory at a time; `dtype` None is the checkpoint's own.

    Matrices are cast once to `dtype` (a key of KINDS); vectors are float32, which is all that llama.cpp takes there,
    and routers, which choose.
    Of a quantized one embedding and head are q8_0, and matrices with rows that no grid divides float16; of one with a
    k, types are those of llama.cpp's quantizer. With `importance` ggml rounds by it the matrices that were measured.
    What was under `out` is replaced in one rename.

    Raises:
        ExportError: a family, rope, activation, bias or tokenizer that this writer or llama.cpp does not have, by name;
            tensors missing or left over; values not finite in `dtype`; a type with a k, or `importance`, without ggml's
            code; importance of another model, or for a type that has no use of it.
        ModelError: the folder is no whole checkpoint.
        ArtifactError: the file could not be written.
    """
    if out.suffix != ".gguf":
        raise ExportError(f"{out}: expected a file name that ends in .gguf")
    config = read_config(folder)
    dtype = dtype or str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in (*DTYPES, *QUANTIZED):
        known = ", ".join((*DTYPES, *QUANTIZED))
        raise ExportError(f"{folder}: {dtype} has no GGUF form here; expected one of {known}")
    if importance is not None and not weighs(dtype):
        raise ExportError(f"{dtype} is rounded without importance: leave it out, or take a type below 8 bits")
    require_ggml(dtype, weighed=importance is not None)
    warn_of_older_readers(config)
    entries = _entries(folder, config, dtype)
    writer = _writer(folder, config, dtype)
    if importance is not None:
        entries = [dataclasses.replace(each, importance=importance.of(each.name, each.shape)) for each in entries]
        weighed = sum(entry.importance is not None for entry in entries)
        if not weighed:
            raise ExportError(f"{folder}: the importance holds none of its matrices: it was measured on another model")
        _say_importance(writer, importance, weighed)
    with _whole(out, sum(_nbytes(entry) for entry in entries)) as scratch:
        _write(writer, entries, scratch)
    return out


def quantized_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weights of a checkpoint, quantized to each type that is written here.

    Raises as `write_gguf` does for a checkpoint that it does not write.
    """
    config = read_config(folder)
    return {kind: sum(map(_nbytes, _entries(folder, config, kind))) for kind in QUANTIZED}


def planned_bytes(config: PretrainedConfig, kind: str) -> tuple[int, int]:
    """Bytes of (embedding and head, all else) of a model that is known by its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names, sizes = tensor_names(config), {True: 0, False: 0}
    for source, parameter in model.named_parameters():
        name, shape = str(names.get(source)), tuple(parameter.shape)
        sizes[name in ENDS] += _nbytes(Entry(name, shape, _dtype(name, shape, kind, config), lambda: torch.empty(0)))
    return sizes[True], sizes[False]


def beside(kind: str) -> tuple[str, ...]:
    """The types that a file of this one is held against: those with a k only where it is one, as they need ggml."""
    return QUANTIZED if kind in NEED_GGML else tuple(GRIDS)


def nearest(sizes: dict[str, int], wanted: float) -> str:
    """The type whose weights are nearest to so many bytes; of two as near the finer one."""
    return min(sizes, key=lambda kind: (abs(sizes[kind] - wanted), -sizes[kind]))


def _writer(folder: Path, config: PretrainedConfig, dtype: str) -> gguf.GGUFWriter:
    """A writer with all metadata and no tensor yet."""
    writer = gguf.GGUFWriter(None, family_of(config).arch)
    writer.add_type("model")
    writer.add_name(_name(folder))
    writer.add_file_type(KINDS[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    with explained(f"{folder}: tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    add_vocabulary(writer, vocabulary(tokenizer, config.vocab_size, _stops(folder, config)))
    return writer


def _say_importance(writer: gguf.GGUFWriter, importance: Importance, entries: int) -> None:
    """What llama-quantize says of it in the file's metadata."""
    if importance.text:
        writer.add_string("quantize.imatrix.dataset", importance.text[0])
    writer.add_int32("quantize.imatrix.entries_count", entries)
    if importance.chunks:
        writer.add_int32("quantize.imatrix.chunks_count", importance.chunks)


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
    sources: dict[str, list[str]] = {}
    for source, name in names.items():
        sources.setdefault(name, []).append(source)
    entries = []
    for name, parts in sources.items():
        shapes = {found[source][1] for source in parts}
        if len(shapes) > 1:
            raise ExportError(f"{folder}: {parts[0]} and others like it differ in shape: {sorted(shapes)}")
        more = float(family_of(config).gemma and len(found[parts[0]][1]) == 1)
        loads = [partial(_load, found[source][0], source, _heads(config, source), more) for source in parts]
        shape = (*([len(parts)] if name.endswith(EXPERTS_END) else []), *shapes.pop())
        load = partial(_stacked, loads) if name.endswith(EXPERTS_END) else loads[0]
        entries.append(Entry(name, shape, _dtype(name, shape, dtype, config), load))
    factors = rope_factors(config)
    if factors is not None:
        entries.append(Entry("rope_freqs.weight", tuple(factors.shape), "float32", lambda: factors))
    return entries


def _stacked(loads: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The matrices of all experts of a block."""
    return torch.stack([load() for load in loads])


def _dtype(name: str, shape: tuple[int, ...], dtype: str, config: PretrainedConfig) -> str:
    """The type of one tensor in a file of type `dtype`."""
    if len(shape) == 1 or name.endswith(ROUTER_END):
        return "float32"
    if dtype in DTYPES:
        return dtype
    if dtype in NEED_GGML:
        dtype = _with_k(name, dtype, config)
    elif name in ENDS:
        dtype = FINE
    if shape[-1] % _grid(dtype)[0]:
        dtype = NARROWER.get(dtype, WIDE)
    return WIDE if shape[-1] % _grid(dtype)[0] else dtype


def _with_k(name: str, dtype: str, config: PretrainedConfig) -> str:
    """The type of one matrix in a file with a k, as llama.cpp's quantizer chooses it (src/llama-quant.cpp).

    Mixtures of eight experts have finer keys, values and outputs of attention, whose matrices are small beside theirs;
    so have models of 80 blocks their values, which it takes for Llama 70B.
    """
    most, _ = MIXED.get(dtype, (dtype, 0))
    if experts_of(config)[0] == EIGHT:
        if name.endswith((*VALUES, "attn_k.weight")):
            return FINE
        if dtype == "q4_k_m" and name.endswith("attn_output.weight"):
            return "q5_k"
    if dtype in MIXED and _is_finer(name, config):
        return FINER_K
    return "q5_k" if most == "q4_k" and name.endswith(VALUES) and _taken_for_70b(config) else most


def _taken_for_70b(config: PretrainedConfig) -> bool:
    arch, shared = family_of(config).arch, kv_heads_of(config) != config.num_attention_heads
    return config.num_hidden_layers == BLOCKS_OF_70B and (arch == "qwen2" or (arch == "llama" and shared))


def _is_finer(name: str, config: PretrainedConfig) -> bool:
    """Whether a matrix of a mixed file is FINER_K: the head; values and down projections of some blocks.

    These are the first and the last eighth of the blocks, and each third one between.
    """
    if name in ENDS:
        return name == ENDS[1] or config.tie_word_embeddings
    blocks, eighth = config.num_hidden_layers, config.num_hidden_layers // 8
    if not name.endswith(SENSITIVE):
        return False
    block = int(name.split(".")[1])
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def _grid(dtype: str) -> tuple[int, int]:
    """(weights that share a grid, bytes that they take)."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[KINDS[dtype][0]]]


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


def _load(path: Path, source: str, heads: int | None, more: float) -> Tensor:
    """The tensor, by so much `more` (Gemma's norms), its rows as llama.cpp has them."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(source)
    tensor = tensor.float() + more if more else tensor
    return tensor if heads is None else _neighbours(tensor, heads)


def _neighbours(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered: row p and row p + half of a rotary pair become rows 2p and 2p + 1."""
    halves_H2PI = weight_OI.unflatten(0, (heads, 2, -1))
    return halves_H2PI.transpose(1, 2).reshape(weight_OI.shape)


def _data(entry: Entry) -> np.ndarray:
    """The tensor's bytes as numpy has them: bfloat16, which it does not have, as 16-bit integers."""
    if entry.dtype in MATRICES:
        exact = _data(dataclasses.replace(entry, dtype="float32"))
        kind = gguf.GGMLQuantizationType[MATRICES[entry.dtype][0]]
        if entry.dtype in BY_GGML or (entry.importance is not None and weighs(entry.dtype)):
            return _by_ggml(exact, kind, entry.importance)
        return gguf.quants.quantize(exact, kind)
    cast = entry.load().to(getattr(torch, entry.dtype)).contiguous()
    if not all_finite(cast):
        raise ExportError(
            f"{entry.name}: not finite in {entry.dtype}: write bfloat16 or float32, or look at the weights"
        )
    return (cast.view(torch.int16) if cast.dtype == torch.bfloat16 else cast).numpy()


def _by_ggml(weight_OI: np.ndarray, kind: gguf.GGMLQuantizationType, importance: np.ndarray | None) -> np.ndarray:
    """The bytes of each row, (O, I) or of experts (E, O, I), as `ggml_quantize_chunk` gives them."""
    library = _ggml()
    assert library is not None, "asked for by `require_ggml`"
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    columns = weight_OI.shape[-1]
    exact_EOI = np.ascontiguousarray(weight_OI, dtype=np.float32).reshape(-1, *weight_OI.shape[-2:])
    packed = np.empty((*weight_OI.shape[:-1], columns // weights * size), dtype=np.uint8)
    packed_E = packed.reshape(len(exact_EOI), -1)
    for expert, (exact_OI, into) in enumerate(zip(exact_EOI, packed_E, strict=True)):
        by = None if importance is None else importance[expert].ctypes.data
        rows = len(exact_OI)
        written = library.ggml_quantize_chunk(int(kind), exact_OI.ctypes.data, into.ctypes.data, 0, rows, columns, by)
        if written != into.nbytes:
            expected = f"expected {into.nbytes:,}: take another version of it"
            raise ExportError(f"ggml wrote {written:,} bytes of a matrix, {expected}")
    return packed


def weighs(dtype: str) -> bool:
    """Whether the matrices of a file of this type can be rounded by importance."""
    return (dtype in MATRICES or dtype in MIXED) and dtype != ALIKE


def require_ggml(dtype: str, *, weighed: bool = False) -> None:
    """Raises ExportError for a type that ggml's own code makes, where no package that is installed brings it.

    `weighed`: by importance, which takes ggml for every type.
    """
    if (weighed or dtype in NEED_GGML) and _ggml() is None:
        what, instead = (" rounded by importance", " without importance") if dtype not in NEED_GGML else ("", "")
        raise ExportError(
            f"{dtype}{what} is made by llama.cpp's own code, which is not installed: pip install 'recover[gguf]' "
            f"(xllamacpp; or llama-cpp-python), or take one of {', '.join(GRIDS)}{instead}"
        )


@cache
def _ggml() -> ctypes.CDLL | None:
    """The library of an installed package that has ggml's quantization; the package itself is not imported."""
    for package, pattern in GGML_IN.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(folder).glob(pattern)):
                with contextlib.suppress(OSError, AttributeError):
                    library = ctypes.CDLL(str(path))
                    function = library.ggml_quantize_chunk
                    pointer, count = ctypes.c_void_p, ctypes.c_int64
                    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
                    function.restype = ctypes.c_size_t
                    return library
    return None


def _nbytes(entry: Entry) -> int:
    weights, size = _grid(entry.dtype)
    return math.prod(entry.shape) // weights * size


def _write(writer: gguf.GGUFWriter, entries: list[Entry], path: Path) -> None:
    for entry in entries:
        kind = gguf.GGMLQuantizationType[KINDS[entry.dtype][0]]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.int16), _nbytes(entry), raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in console.track(entries, "gguf", unit="tensors"):
            writer.write_tensor_data(_data(entry))
    finally:
        writer.close()


@contextlib.contextmanager
def _whole(out: Path, size: int) -> Iterator[Path]:
    """A file beside `out` that takes its name, synced, when all went well, and is gone otherwise."""
    artifacts.refuse_place(out)
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
