"""A GGUF file written as a stock folder: config, tokenizer, and weights in float32.

transformers opens the file once for each thing that it wants of it, and the reader of the package `gguf` takes every
token of the vocabulary apart through a memory map, at some tens of microseconds each: with 150,000 tokens that is most
of the time. Here the file is opened once, and its bytes are a plain array.

The config is completed with what transformers leaves out of it; every key that shapes the model is accounted for.

Shapes: P rotary pairs of a head.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate
import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from recover.base.artifacts import JsonObject
from recover.base.errors import ModelError
from recover.models.arch import head_size_of, kv_heads_of

FREQUENCIES = "rope_freqs.weight"  # what each rotary frequency is divided by
TOLERANCE = 1e-5  # of a factor that is stored in float32
LOW, HIGH = 1.0, 4.0  # of every Llama 3.1 to 3.3; what it was trained on before is a power of two
TRAINED = [2**power for power in (13, *range(4, 21))]
# Of `ARCH.`: what the file says of its origin, of how texts are computed, or what is held against the tensors.
SAID_ELSEWHERE = (
    "context_length",
    "vocab_size",
    "feed_forward_length",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "attention.causal",
)
# Blocks of Gemma's 27B: alone in its family it divides scores by the root of width / heads, the others of a head's
# size. No key says so: llama.cpp (src/models/gemma2.cpp, gemma3.cpp) tells by the blocks; transformers takes 256.
LARGEST = {"gemma2": 46, "gemma3": 62}
OF_GEMMA = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # files of other kinds are left to what transformers knows of them


def completed(config: Any, reader: Any) -> Any:
    """`config`, as transformers reads it from the file, with head size, scaled positions and biases of the file, and
    with how Gemma scales its scores.

    Raises ModelError for a key of the file that says something else than the config, and for positions scaled in a way
    that has no words in the config.
    """
    arch = str(field(reader, "general.architecture"))
    names = {tensor.name for tensor in reader.tensors}
    if arch in LARGEST:
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if config.num_hidden_layers == LARGEST[arch] else head_size_of(config)
        _complete_gemma(config, arch, reader)
    if arch not in KNOWN:
        _refuse_scaling(config, field(reader, f"{arch}.rope.scaling.type"))
        return config
    if (size := field(reader, f"{arch}.attention.key_length")) is not None:
        config.head_dim = size
    if config.model_type == "llama":
        config.attention_bias = any(name.endswith("attn_q.bias") for name in names)
        config.mlp_bias = any(name.endswith("ffn_up.bias") for name in names)
    _scale(config, arch, reader)
    _account(config, arch, reader)
    return config


def _complete_gemma(config: Any, arch: str, reader: Any) -> None:
    """Give the config the file's window, limits of scores and logits, and positions."""
    for key, name in OF_GEMMA.items():
        if (value := field(reader, f"{arch}.{key}")) is not None:
            setattr(config, name, value)
    kind, factor = (field(reader, f"{arch}.rope.scaling.{key}") for key in ("type", "factor"))
    if arch == "gemma3" and kind == "linear" and factor:
        full = {**config.rope_parameters["full_attention"], "rope_type": "linear", "factor": float(factor)}
        config.rope_parameters = {**config.rope_parameters, "full_attention": full}


def field(reader: Any, name: str) -> Any:
    """The value under a key of the file; None where there is none."""
    found = reader.fields.get(name)
    return None if found is None else found.contents()


def _scale(config: Any, arch: str, reader: Any) -> None:
    """Give the config the file's scaled positions."""
    kind = field(reader, f"{arch}.rope.scaling.type")
    factor = field(reader, f"{arch}.rope.scaling.factor") or field(reader, f"{arch}.rope.scale_linear")
    rope = dict(config.rope_parameters)
    stored = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if kind == "linear" and factor:
        config.rope_parameters = rope | {"rope_type": "linear", "factor": float(factor)}
    elif kind not in (None, "", "none"):
        _refuse_scaling(config, kind)
    if stored is None or bool((stored.data == 1).all()):
        return
    found = None if kind == "linear" else llama3(np.array(stored.data, dtype=np.float64), rope["rope_theta"])
    if found is None:
        raise ModelError(
            f"its rotary frequencies are divided by {FREQUENCIES}, {_some(stored.data)}, which is no scaling of Llama "
            "3.1 that can be told from them, and the model would be another one. Give the checkpoint that the file was "
            "made from"
        )
    config.rope_parameters = rope | found


def llama3(factor_P: np.ndarray, base: float) -> JsonObject | None:
    """Parameters of Llama 3.1's scaling that divide the frequencies by these factors; None where none do.

    Long waves are divided by the largest factor, short ones by 1; between, the share is a straight line in the
    frequency, from `low_freq_factor` to `high_freq_factor` waves in the text that the model was trained on before.
    """
    largest = float(factor_P.max())
    if not np.isfinite(factor_P).all() or float(factor_P.min()) < 1 or largest <= 1:
        return None
    frequency_P = base ** -(np.arange(len(factor_P)) / len(factor_P))
    between_P = (factor_P > 1 + TOLERANCE) & (factor_P < largest * (1 - TOLERANCE))
    tried = [(LOW, HIGH, trained) for trained in TRAINED]
    if between_P.sum() >= 2:
        share_P = (1 / factor_P[between_P] - 1 / largest) / (1 - 1 / largest)
        slope, start = np.polyfit(frequency_P[between_P], share_P, 1)
        if start < 0 < slope:  # with the first of the three at its usual value: only their ratios show
            high = LOW * (1 - 1 / start)
            tried.append((LOW, round(high, 4), round(slope * 2 * math.pi * (high - LOW))))
    for low, high, trained in tried:
        share_P = ((trained * frequency_P / (2 * math.pi) - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / (share_P + (1 - share_P) / largest), factor_P, rtol=TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    return None


def _account(config: Any, arch: str, reader: Any) -> None:
    """Raise ModelError for the first key of `ARCH.` that the config contradicts, or has no words for."""
    said = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads_of(config),
        "attention.key_length": head_size_of(config),
        "attention.value_length": head_size_of(config),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_size_of(config),
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    for name in reader.fields:
        key = name.removeprefix(f"{arch}.")
        if key == name or key in SAID_ELSEWHERE:
            continue
        value = field(reader, name)
        if key not in said or not _equal(value, said[key]):
            of = f"and {said[key]} as transformers reads the file" if key in said else "for which it has no words"
            raise ModelError(
                f"{name} is {_some(value)}, {of}, and the model would be another one. Give the checkpoint that the "
                "file was made from"
            )


def _equal(value: Any, said: Any) -> bool:
    if isinstance(value, list):
        return all(_equal(each, said) for each in value)
    numbers = isinstance(value, int | float) and isinstance(said, int | float)
    return math.isclose(value, said, rel_tol=1e-6) if numbers else value == said


def _some(values: Any) -> str:
    shown = [f"{value:g}" for value in np.asarray(values).ravel()[:4]] if not isinstance(values, str) else [values]
    return ", ".join(shown) + (", ..." if np.size(values) > 4 else "")


def _refuse_scaling(config: Any, scaling: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    taken = rope.get("full_attention", rope).get("rope_type", "default")
    if scaling not in (None, "", "none") and taken == "default":
        raise ModelError(
            f"its rotary positions are scaled ('{scaling}'), which is not taken over from a GGUF file, and the model "
            "would be another one. Give the checkpoint that the file was made from"
        )


def write_stock(path: Path, folder: Path, *, shown: Path) -> None:
    """Write the model and tokenizer of the file, which lies `alone`, to the folder; errors name it as `shown`.

    Raises ModelError for tensors as `check_tensors`; else whatever the libraries raise.
    """
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _opened_once():
        check_tensors(path, shown)
        reader = gguf.GGUFReader(path)
        config = completed(AutoConfig.from_pretrained(**where), reader)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=torch.float32, output_loading_info=True
        )
        read, info = loaded
        if info["missing_keys"]:  # for families whose names `check_tensors` does not know
            names = sorted(map(str, info["missing_keys"]))
            raise ModelError(f"{shown}: lacks {len(names)} tensors of its model, such as {names[0]}: fetch it again")
        _plain(read).save_pretrained(folder)
        tokenizer = split_and_checked(AutoTokenizer.from_pretrained(**where), reader, shown)
        tokenizer.save_pretrained(folder)


def _plain(read: Any) -> Any:
    """The same weights in a model that was never quantized.

    transformers flags what it reads from a GGUF: `save_pretrained` would raise, and peft and trainers branch on the
    flag.
    """
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    with accelerate.init_empty_weights():  # no random numbers for weights that are there
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain


@contextmanager
def _opened_once() -> Iterator[None]:
    """Inside, every `gguf.GGUFReader` of a file is the first one of that file, and so are its lists of names."""
    stock: Any = gguf.GGUFReader
    opened: dict[str, Any] = {}

    class Plain(stock):
        """What the reader cuts out of `data`, it cuts out of an array: cutting a memory map is ten times slower."""

        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, mapped: Any) -> None:
            self._array = mapped.view(type=np.ndarray)

    def reader(path: Any, mode: str = "r") -> Any:
        if str(path) not in opened:
            opened[str(path)] = Plain(path, mode)
        return opened[str(path)]

    names = gguf.get_tensor_name_map
    # transformers looks both up there each time; it makes the names of a whole model anew for each of its modules.
    gguf.GGUFReader, gguf.get_tensor_name_map = reader, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = stock, names


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
            f"{shown}: lacks {len(missing)} tensors of its model ({_few(missing)}), of {len(expected)}; it holds "
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
            f"{shown}: {len(left)} tensors would be left out ({_few(left)}), and the model would be another one. Give "
            "the checkpoint that the file was made from"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _expected(path: Path, reader: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The shape of each tensor that the model needs, by its name in the file, and whether all of them are named."""
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


MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
DEEPEST = 4  # arrays inside arrays
MOST_DIMENSIONS = 4


def check_head(path: Path, shown: Path) -> None:
    """Walk the head once; raise ModelError (the file named as `shown`) with the byte at which it is unsound."""
    if path.stat().st_size < 24:
        raise ModelError(f"{shown}: {path.stat().st_size} bytes, too short for the head of a GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data, shown).all()


class _Walk:
    def __init__(self, data: mmap.mmap, shown: Path) -> None:
        self.data, self.shown, self.at, self.end = data, shown, 0, len(data)

    def all(self) -> None:
        if self.data[:4] != MAGIC:
            raise self.unsound(f"begins with {self.data[:4]!r}", f"{MAGIC!r}: no GGUF file")
        self.at = 4
        version = self.number("<I")
        if version not in VERSIONS:
            raise self.unsound(f"version {version}", f"one of {VERSIONS}, little-endian")
        tensors, keys = self.count(24, "tensors"), self.count(13, "keys")
        for _ in range(keys):
            self.text("a key")
            self.value(self.number("<I"), 0)
        for _ in range(tensors):
            self.text("a tensor's name")
            dimensions = self.number("<I")
            if dimensions > MOST_DIMENSIONS:
                raise self.unsound(f"a tensor of {dimensions} dimensions", f"at most {MOST_DIMENSIONS}")
            self.skip(8 * dimensions + 12, "a tensor's shape and place")

    def value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self.text("a text")
        elif kind == ARRAY and depth < DEEPEST:
            inner = self.number("<I")
            length = self.count(SIZES.get(inner, 8), "values")
            if inner in SIZES:
                self.skip(SIZES[inner] * length, "an array")
            else:
                for _ in range(length):
                    self.value(inner, depth + 1)
        elif kind in SIZES:
            self.skip(SIZES[kind], "a value")
        else:
            raise self.unsound(f"a value of type {kind}", "a type of GGUF, arrays not nested deeper than 4")

    def text(self, what: str) -> None:
        self.skip(self.count(1, f"bytes of {what}"), what)

    def count(self, size: int, what: str) -> int:
        """A count of things that take at least `size` bytes each."""
        count = self.number("<Q")
        if count * size > self.end - self.at:
            raise self.unsound(f"{count:,} {what}", f"no more than the {self.end - self.at:,} bytes left can hold")
        return count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form), "a number")
        return struct.unpack_from(form, self.data, start)[0]

    def skip(self, size: int, what: str) -> None:
        if size > self.end - self.at:
            raise self.unsound(f"the end of the file in {what}", "the rest of the head")
        self.at += size

    def unsound(self, found: str, expected: str) -> ModelError:
        return ModelError(f"{self.shown}: byte {self.at}: found {found}; expected {expected}. Fetch the file again")


TOKENS, MERGES, SCORES, KIND, PRE = (
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "model", "pre")
)
SPM, BLANK = "llama", "▁"  # SentencePiece's BPE, whose merges are told by scores; the letter that stands for a blank
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LARGE = 4096  # tokens of a vocabulary that has whole words of common English
WORD = 0.6  # tokens a letter: more, and the words of the vocabulary are not used
TEXT = (
    "The people of the small town came together in the old house by the river. They had been there before, and they "
    "knew that the water would rise again with the first warm days of the year."
)
WAY_OUT = "Try another version of transformers (5.24 is the one that most is tried with)"


def split_and_checked(tokenizer: Any, reader: Any, shown: Path) -> Any:
    """The tokenizer with the splitting of the file, and without tokens that the file does not have.

    Raises ModelError where its vocabulary, its merges or its tokens of a text are not those of the file.
    """
    tokenizer = _without_strangers(tokenizer, field(reader, TOKENS))
    _split_digits(tokenizer, field(reader, PRE))
    _check(tokenizer, reader, shown)
    return tokenizer


def _without_strangers(tokenizer: Any, tokens: list[str]) -> Any:
    """Without the default tokens of its class (`<|endoftext|>`), which got ids past the end of the file's vocabulary.

    They are named in the class alone: a text would get an id that has no row in the embedding.
    """
    known = set(tokens)
    strange = {name for name in NAMED if getattr(tokenizer, name, None) not in (None, *known)}
    added = {token for token, index in tokenizer.get_vocab().items() if index >= len(tokens)}
    if not strange and not added:
        return tokenizer
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < len(tokens)]
    core["model"]["vocab"] = _short(core["model"]["vocab"], len(tokens))
    if core["model"].get("unk_token") not in (None, *known):
        core["model"]["unk_token"] = None
    named = {name: getattr(tokenizer, name) for name in NAMED if name not in strange}

    rest = {"chat_template": tokenizer.chat_template, "padding_side": tokenizer.padding_side}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        **{name: token for name, token in named.items() if token is not None},
        **{name: value for name, value in rest.items() if value is not None},
    )


def _short(vocabulary: Any, length: int) -> Any:
    if isinstance(vocabulary, dict):
        return {token: index for token, index in vocabulary.items() if index < length}
    return vocabulary[:length]


def _split_digits(tokenizer: Any, name: Any) -> None:
    """Undo what transformers forgets of a GGUF: that texts are split as `tokenizer.ggml.pre` names it.

    SmolLM's tokenizer splits off every digit first. Without, blanks and newlines before a digit get other tokens than
    the model was trained on (found by comparing with llama.cpp; transformers pull request 42908).
    """
    if name == "smollm":
        splitter = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = splitter


def _check(tokenizer: Any, reader: Any, shown: Path) -> None:
    tokens, merges = field(reader, TOKENS), field(reader, MERGES)
    found = tokenizer.get_vocab()
    unlike = [token for index, token in enumerate(tokens) if found.get(token, index) != index]
    lost = [token for token in tokens if token not in found]
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    problem = None
    if unlike or lost or len(found) > len(tokens):
        names = [*unlike, *lost, *(token for token in found if found[token] >= len(tokens))]
        problem = f"{len(names)} tokens are not those of the file, such as {names[0]!r}"
    elif merges and core["type"] == "BPE" and [_pair(merge) for merge in core["merges"]] != list(map(_pair, merges)):
        problem = f"it has {len(core['merges'])} merges, and not the {len(merges)} of the file in their order"
    elif field(reader, KIND) == SPM and ids not in (expected := _by_scores(tokens, field(reader, SCORES) or [])):
        problem = f"it cuts {len(TEXT)} letters of English into {len(ids)} tokens, its scores into {len(expected[0])}"
    elif len(tokens) > LARGE and len(ids) > WORD * len(TEXT):
        problem = f"it cuts {len(TEXT)} letters of English into {len(ids)} tokens, so that words are not used"
    elif tokenizer.decode(ids).strip() != TEXT:
        problem = f"a text comes back as {tokenizer.decode(ids)[:60]!r}..."
    if problem:
        import transformers

        raise ModelError(
            f"{shown}: its tokenizer ('{field(reader, KIND)}') was converted wrongly by transformers "
            f"{transformers.__version__}: {problem}. {WAY_OUT}, or give the checkpoint that the file was made from"
        )


def _by_scores(tokens: list[str], scores: list[float]) -> tuple[list[int], list[int]]:
    """Ids of `TEXT` by SentencePiece's rule, without and with a blank in front: of all neighbours that are a token
    together, those of the highest score are joined first, on ties the leftmost, until there are none.
    """
    score = dict(zip(tokens, scores, strict=False))
    index = {token: number for number, token in enumerate(tokens)}
    found = []
    for prefix in ("", BLANK):
        parts = list(prefix + TEXT.replace(" ", BLANK))
        while True:
            joined = [(score[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in score]
            if not joined:
                break
            at = -max(joined)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found.append([index.get(part, -1) for part in parts])
    return found[0], found[1]


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)
