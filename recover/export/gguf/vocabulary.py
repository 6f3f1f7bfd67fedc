"""A tokenizer in llama.cpp's terms, or refused with the part that llama.cpp does not have.

llama.cpp knows byte-level BPE (`gpt2`) with a fixed list of named pre-tokenizers, and SentencePiece. The name of a
pre-tokenizer is found from what the tokenizer does, not from what it is called: a wrong name still runs, and splits
some texts otherwise than in training.

A vocabulary of SentencePiece has a score for each token, in the place of merges: llama.cpp (src/llama-vocab.cpp,
`llm_tokenizer_spm`) joins any two neighbours whose text is a token, that of the highest score first. tokenizer.json
lists which two are joined, in their order. Both cut texts alike where every way to make a token of two others is
listed, and those of one token follow each other: as conversions from SentencePiece have it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import ExportError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

# Splitting rules, as tokenizer.json spells them, applied one after the other.
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

# (rules, whether a whole piece is looked up before it is merged: `ignore_merges`) -> name in llama.cpp
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",  # OLMo 2
    ((QWEN2,), False): "qwen2",
}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the GGUF specification
PIECES = "default"  # name of the pre-tokenizer of SentencePiece, which has none
STOPS = ("eos", "eot", "eom")  # llama.cpp ends a text at any of the three

BLANK = "\u2581"  # stands for a blank
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
NEVER = -1e6  # score of what no merge makes


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer; `tokens` and `types` have one entry a row of the embedding."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]  # of SentencePiece, which has no merges
    special: dict[str, int]  # bos, pad, unk, and of STOPS what there is
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, stops: Sequence[int]) -> Vocabulary:
    """Everything of `tokenizer` that llama.cpp reads, for an embedding of `rows` rows; texts end at one of `stops`.

    NFC normalization (Qwen) is left out, as llama.cpp has none: texts in NFC, which almost all are, do not change.
    Raises ExportError for a vocabulary that is no BPE of bytes or of SentencePiece, a pre-tokenizer that llama.cpp does
    not have, ids without a row, and special tokens around a text that are not one BOS before or one EOS after it.
    """
    core = _core(tokenizer)
    pieces = _of_pieces(core)
    _refuse_other_kinds(core)
    tokens, types = _tokens(tokenizer, core, rows)
    add_bos, add_eos = _around(tokenizer)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    template: Any = tokenizer.chat_template
    return Vocabulary(
        pre=PIECES if pieces else _pre_tokenizer(core),
        tokens=tokens,
        types=types,
        merges=[] if pieces else merges,
        scores=_scores(core, tokens) if pieces else [],
        special=_special(tokenizer, stops),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def add_vocabulary(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    """Put the vocabulary into the metadata of a GGUF file."""
    writer.add_tokenizer_model("llama" if words.scores else "gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(False)
    else:
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
    model, normalizer = core["model"], _normalizer(core)
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer: its vocabulary is a {model['type']}; GGUF is written for BPE only")
    for part in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model[part]:
            raise ExportError(f"tokenizer: its BPE has {part} {model[part]!r}, which llama.cpp does not have")
    if not model["merges"]:
        raise ExportError("tokenizer: its BPE has no merges, and llama.cpp loads no vocabulary without")
    if _of_pieces(core):
        _refuse_other_pieces(core)
    elif normalizer is not None and normalizer["type"] != "NFC":
        raise ExportError(f"tokenizer: it normalizes texts ({normalizer['type']}), which llama.cpp does not do")


def _pre_tokenizer(core: JsonObject) -> str:
    rules, whole_first = _rules(core["pre_tokenizer"]), bool(core["model"].get("ignore_merges", False))
    if (found := PRE_TOKENIZERS.get((rules, whole_first))) is not None:
        return found
    if (name := PRE_TOKENIZERS.get((rules, not whole_first))) is not None:
        raise ExportError(
            f"tokenizer: its 'ignore_merges' is {whole_first}, and llama.cpp's pre-tokenizer '{name}' has "
            f"{not whole_first}: some words would be other tokens"
        )
    raise ExportError(
        f"tokenizer: it splits texts by {list(rules)}, for which no pre-tokenizer of llama.cpp is known here; "
        f"known are {', '.join(PRE_TOKENIZERS.values())}"
    )


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
        if _of_pieces(core) and token in BYTES:
            types[index] = BYTE
    for added in core["added_tokens"]:
        if added["id"] >= rows:
            continue
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            console.warn(f"gguf: token {added['content']!r} takes blanks or words around it; llama.cpp does not")
    unknown = core["model"]["unk_token"] if _of_pieces(core) else None
    if unknown is not None and (index := tokenizer.get_vocab().get(unknown, rows)) < rows:
        types[index] = UNKNOWN
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


def _of_pieces(core: JsonObject) -> bool:
    """Whether what the vocabulary does not know is written as bytes, by tokens of their own.

    transformers 5.17 says `byte_fallback` of every tokenizer that it reads from a GGUF file; without tokens of bytes it
    has no effect.
    """
    return bool(core["model"].get("byte_fallback")) and not BYTES.isdisjoint(core["model"]["vocab"])


def _normalizer(core: JsonObject) -> JsonObject | None:
    """What is done to a text first; None where nothing is."""
    step = core["normalizer"]
    return None if step is not None and step.get("normalizers") == [] else step


def _refuse_other_pieces(core: JsonObject) -> None:
    """Raise ExportError unless texts are cut as Gemma's: blanks become letters, and nothing else is done before."""
    normalizer, step = _normalizer(core), core["pre_tokenizer"]
    if normalizer != {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}:
        raise ExportError(
            f"tokenizer: a SentencePiece BPE (with byte fallback) that changes texts by {normalizer}; GGUF is written "
            f"for one that makes each blank '{BLANK}' and puts none before a text, as Gemma's"
        )
    if step is not None and not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
        raise ExportError(
            f"tokenizer: a SentencePiece BPE (with byte fallback) that splits texts by {step['type']}; expected no "
            "such step, as llama.cpp has none"
        )
    if missing := sorted(BYTES - core["model"]["vocab"].keys()):
        raise ExportError(f"tokenizer: its vocabulary lacks the token of a byte, {missing[0]}: llama.cpp needs all 256")


def _scores(core: JsonObject, tokens: Iterable[str]) -> list[float]:
    """The score of each of these tokens: how many are made before it, less than 0.

    Raises ExportError where llama.cpp would cut some text otherwise than these merges do, by a token.
    """
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in core["model"]["merges"]]
    made = [first + second for first, second in merges]
    order = {token: -float(rank) for rank, token in enumerate(dict.fromkeys(made))}
    begun: set[str] = set()
    for before, token in zip(["", *made], made, strict=False):
        if token != before and token in begun:
            raise ExportError(
                f"tokenizer: it makes '{token}' at two places of its merges, and llama.cpp has one score for a token"
            )
        begun.add(token)
    apart = {added["content"] for added in core["added_tokens"]} | BYTES
    known, listed = core["model"]["vocab"].keys() - apart, set(merges)
    for token in known:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise ExportError(
                    f"tokenizer: '{pair[0]}' and '{pair[1]}' are not joined by its merges, and llama.cpp joins any two "
                    f"whose text is a token, '{token}': some texts would be other tokens"
                )
    return [order.get(token, NEVER) for token in tokens]
