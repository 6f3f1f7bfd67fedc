"""The tokenizer of a GGUF file, held against the file's own vocabulary after transformers converted it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from recover.base.errors import ModelError
from recover.models.gguf_settings import field

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
    from tokenizers import Tokenizer

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
    from transformers import PreTrainedTokenizerFast

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
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

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
