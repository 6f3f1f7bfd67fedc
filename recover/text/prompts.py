"""Prompts as ids: the chat template where there is one, BOS where the tokenizer adds it, padding on the left.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase

from recover.base.errors import DataError
from recover.models.vocabulary import refuse_past
from recover.text.conversation import Message, rendered

Prompt = str | list[Message]  # what a user says, or a conversation that the assistant is to go on with


def uses_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts are wrapped in the chat template: as asked; None = if the tokenizer has one.

    Raises:
        DataError: asked for, but there is no template.
    """
    if chat and not tokenizer.chat_template:
        raise DataError("chat: true, but the tokenizer has no chat template: leave 'chat' out, or give one that has")
    return bool(tokenizer.chat_template) if chat is None else chat


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool | None = None) -> str:
    """The prompt up to where the model begins to write, as text.

    Templates that offer a train of thought are asked for none: it would fill the token limit before the answer.

    Raises:
        DataError: the chat template cannot write it, or there is none for messages.
    """
    wraps = uses_chat(tokenizer, chat)
    if isinstance(prompt, str):
        what = f"the prompt {prompt[:60]!r}"
        return rendered(tokenizer, [{"role": "user", "content": prompt}], ask=True, what=what) if wraps else prompt
    if not wraps:
        raise DataError("messages need a chat template, and none is used: give 'prompt' as text")
    return rendered(tokenizer, prompt, ask=True, what="the messages")


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Ids of a text, as the tokenizer gives them; `special`: with the special tokens that it puts around a text.

    Raises:
        DataError: one of them has no row in the embedding of the model, or the tokenizer gives up.
    """
    try:  # verbose=False: a text longer than the context is no mistake here
        ids = list(cast("list[int]", tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust: no Exception to Python
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the text {text[:60]!r} ({len(text):,} characters): the tokenizer gives up ({reason}); take the text out, "
            "or give another tokenizer"
        ) from None
    refuse_past(tokenizer, ids, text)
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Ids of a text; `special`: with the special tokens that the tokenizer puts before it, but never an end token.

    A chat template has written its special tokens already.

    Raises:
        DataError: nothing at all to begin with (an empty text and no BOS), or as `ids_of`.
    """
    ids = ids_of(tokenizer, text, special=special)
    if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [cast("int", tokenizer.bos_token_id)]
    if not ids:
        raise DataError(f"the text {text!r} has no tokens, and the tokenizer has no BOS to begin with")
    return ids


KEPT = 100_000  # prompts of one tokenizer whose ids are remembered, some hundred bytes each

_encoded: WeakKeyDictionary[Any, dict[tuple[str, bool | None, str], array[int]]] = WeakKeyDictionary()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool | None = None) -> list[int]:
    """Ids of the prompt up to where the model begins to write.

    Remembered: a run asks for those of a prompt when it checks, writes, scores and trains, and a template takes longer
    than a tokenizer.
    """
    kept, key = _encoded.setdefault(tokenizer, {}), (_known_by(prompt), chat, str(tokenizer.chat_template))
    if key in kept:
        return kept[key].tolist()
    is_chat = uses_chat(tokenizer, chat)
    ids = text_ids(tokenizer, prompt_text(tokenizer, prompt, chat=chat), special=not is_chat)
    if len(kept) < KEPT:
        kept[key] = array("i", ids)
    return ids


def _known_by(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else f"\0{json.dumps(prompt)}"


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BT, mask_BT), every row ending in the last column."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BT, mask_BT


def right_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> torch.Tensor:
    """ids_BT, every row beginning in the first column."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Item numbers in batches of like length, longest first: little padding, and memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
