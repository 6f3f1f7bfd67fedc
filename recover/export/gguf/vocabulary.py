"""The tokenizer of a checkpoint in llama.cpp's terms, or a refusal that says which part llama.cpp does not have.

llama.cpp knows byte-level BPE (`gpt2`) with a fixed list of named pre-tokenizers. The name is found from what the
tokenizer does, not from what it is called: a wrong name still runs, and splits some texts otherwise than in training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gguf

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Splitting rules, as tokenizer.json spells them, applied one after the other.
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

# rules -> (name in llama.cpp, whether it looks a whole piece up before it merges: `ignore_merges` of tokenizer.json)
PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str, bool]] = {
    (GPT2,): ("gpt-2", False),
    (DIGIT, GPT2): ("smollm", False),
    (LLAMA3,): ("llama-bpe", True),
    (QWEN2,): ("qwen2", False),
}

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of the GGUF specification
STOPS = ("eos", "eot", "eom")  # llama.cpp ends a text at any of the three


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer; `tokens` and `types` have one entry a row of the embedding."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]  # bos, pad, unk, and of STOPS what there is
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, stops: Sequence[int]) -> Vocabulary:
    """Everything of `tokenizer` that llama.cpp reads, for an embedding of `rows` rows; texts end at one of `stops`.

    NFC normalization (Qwen) is left out, as llama.cpp has none: texts in NFC, which almost all are, do not change.
    Raises ExportError for a vocabulary that is no byte-level BPE, a pre-tokenizer that llama.cpp does not have, ids
    without a row, and special tokens around a text that are not one BOS before or one EOS after it.
    """
    core = _core(tokenizer)
    _refuse_other_kinds(core)
    tokens, types = _tokens(tokenizer, core, rows)
    add_bos, add_eos = _around(tokenizer)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    template: Any = tokenizer.chat_template
    return Vocabulary(
        pre=_pre_tokenizer(core),
        tokens=tokens,
        types=types,
        merges=merges,
        special=_special(tokenizer, stops),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def add_vocabulary(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    """Put the vocabulary into the metadata of a GGUF file."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, token in words.special.items():
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    # Always said: left out, llama.cpp takes what it believes to be usual for this pre-tokenizer.
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _core(tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """The tokenizer as it is used, in the terms of tokenizer.json (a class may build other rules than its file has)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__}: not a tokenizer of the `tokenizers` library; expected one")
    return json.loads(backend.to_str())


def _refuse_other_kinds(core: JsonObject) -> None:
    model, normalizer = core["model"], core["normalizer"]
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer: its vocabulary is a {model['type']}; GGUF is written for byte-level BPE only")
    if model["byte_fallback"]:
        raise ExportError(
            "tokenizer: its vocabulary is a SentencePiece BPE (with byte fallback); "
            "GGUF is written for byte-level BPE only"
        )
    for part in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model[part]:
            raise ExportError(f"tokenizer: its BPE has {part} {model[part]!r}, which llama.cpp does not have")
    if not model["merges"]:
        raise ExportError("tokenizer: its BPE has no merges, and llama.cpp loads no vocabulary without")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ExportError(f"tokenizer: it normalizes texts ({normalizer['type']}), which llama.cpp does not do")


def _pre_tokenizer(core: JsonObject) -> str:
    rules = _rules(core["pre_tokenizer"])
    if rules not in PRE_TOKENIZERS:
        raise ExportError(
            f"tokenizer: it splits texts by {list(rules)}, for which no pre-tokenizer of llama.cpp is known here; "
            f"known are {', '.join(name for name, _ in PRE_TOKENIZERS.values())}"
        )
    name, whole_first = PRE_TOKENIZERS[rules]
    if core["model"].get("ignore_merges", False) != whole_first:
        raise ExportError(
            f"tokenizer: its 'ignore_merges' is {not whole_first}, and llama.cpp's pre-tokenizer '{name}' has "
            f"{whole_first}: some words would be other tokens"
        )
    return name


def _rules(step: JsonObject | None) -> tuple[str, ...]:
    """Regular expressions that a pre-tokenizer splits by; a step that llama.cpp cannot have is given by its type."""
    kind = "no pre-tokenizer" if step is None else step["type"]
    if step is not None and kind == "Sequence":
        return tuple(rule for inner in step["pretokenizers"] for rule in _rules(inner))
    if step is not None and kind == "Digits" and step["individual_digits"]:
        return (DIGIT,)
    if step is not None and kind == "ByteLevel" and not step["add_prefix_space"]:
        return (GPT2,) if step["use_regex"] else ()
    if step is not None and kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return (step["pattern"].get("Regex", str(step["pattern"])),)
    return (f"{kind} { ({} if step is None else {k: v for k, v in step.items() if k != 'type'}) }",)


def _tokens(tokenizer: PreTrainedTokenizerBase, core: JsonObject, rows: int) -> tuple[list[str], list[int]]:
    """Text and type for each row; rows that no token has get a name of their own, as llama.cpp needs one each."""
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    extra = {added["content"] for added in core["added_tokens"]}
    for token, index in tokenizer.get_vocab().items():
        if index >= rows and token not in extra:
            raise ExportError(f"tokenizer: token {token!r} has id {index}, the embedding has {rows} rows")
        if index >= rows:
            console.warn(f"gguf: token {token!r} has id {index}, the embedding has {rows} rows: it is left out")
            continue
        tokens[index], types[index] = token, NORMAL
    for added in core["added_tokens"]:
        if added["id"] >= rows:
            continue
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            console.warn(f"gguf: token {added['content']!r} takes blanks or words around it; llama.cpp does not")
    return tokens, types


def _special(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> dict[str, int]:
    names = ("bos", "pad", "unk", "eos")
    named: dict[str, int | None] = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    ends = [token for token in dict.fromkeys([*stops, named.pop("eos")]) if token is not None]
    if not ends:
        raise ExportError("neither the model nor its tokenizer has an end-of-text token: set the tokenizer's eos_token")
    if len(ends) > len(STOPS):
        console.warn(f"gguf: texts end at {ends}; llama.cpp has place for {len(STOPS)}, the rest is left out")
    known = {name: token for name, token in named.items() if token is not None}
    return known | dict(zip(STOPS, ends, strict=False))


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets BOS before it and EOS after it, seen from what the tokenizer does."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False)
    dressed: list[int] = tokenizer.encode("a")
    for before in ([], [tokenizer.bos_token_id]):
        for after in ([], [tokenizer.eos_token_id]):
            if dressed == before + bare + after:
                return bool(before), bool(after)
    raise ExportError(f"tokenizer: it makes {bare} to {dressed}; llama.cpp can put one BOS before and one EOS after")
