"""A vocabulary of SentencePiece in llama.cpp's terms: a score for each token, in the place of merges.

llama.cpp (src/llama-vocab.cpp, `llm_tokenizer_spm`) joins any two neighbours whose text is a token, that of the highest
score first. tokenizer.json lists which two are joined, in their order. Both cut texts alike where every way to make a
token of two others is listed, and those of one token follow each other: as conversions from SentencePiece have it.
"""

from __future__ import annotations

from collections.abc import Iterable

from recover.base.artifacts import JsonObject
from recover.base.errors import ExportError

BLANK = "\u2581"  # stands for a blank
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
BYTE, UNKNOWN = 6, 2  # token types of the GGUF specification
NEVER = -1e6  # score of what no merge makes


def is_sentencepiece(core: JsonObject) -> bool:
    """Whether what the vocabulary does not know is written as bytes, by tokens of their own."""
    return bool(core["model"].get("byte_fallback"))


def refuse_other_kinds(core: JsonObject) -> None:
    """Raise ExportError unless texts are cut as Gemma's: blanks become letters, and nothing else is done before."""
    normalizer, step = core["normalizer"], core["pre_tokenizer"]
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


def scores(core: JsonObject, tokens: Iterable[str]) -> list[float]:
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
