"""Prompts as ids: the chat template where there is one, BOS where the tokenizer adds it, padding on the left.

A conversation is written by the chat template: every text of a message is in what is written, or it is refused.

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

from recover.base.artifacts import whole_characters
from recover.base.errors import DataError, StopRequested
from recover.base.process import TooSlow
from recover.models.tokenizers import bounded, refuse_past, too_long

Message = dict[str, Any]

THOUGHTS = "<think>", "</think>"
PARTS = "'type':'text'", '"type":"text"'
PLAIN = "or ask without it (chat: false of a source, chat: never of a task)"


SHARED = ": ShareGPT's form; call 'from' role and 'value' content, and human user, gpt assistant"


class EmptyMessage(DataError):
    """A message holds nothing: its row may be left out."""


def read_messages(value: Any, where: str) -> list[Message]:
    """The messages of a row, each content one text (None beside calls of tools); fields that hold null are left out.

    Raises:
        EmptyMessage: a message holds no text and calls no tool.
        DataError: it is no list of messages, or holds more than text; names `where`.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: found {value!r:.80}, expected a list of messages with 'role' and 'content'")
    return [_message(message, number, where) for number, message in enumerate(value)]


def holds_messages(value: Any) -> bool:
    """Whether a value is meant as messages: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def asking(value: list[Any], where: str, column: str) -> list[Message]:
    """The messages of a row up to where the assistant is to answer: without the answers that they end in.

    Raises:
        DataError: as `read_messages`; or nobody asks. Names `where`.
    """
    ends = [isinstance(each, dict) and each.get("role") == "assistant" for each in value]
    kept = len(value) - (ends[::-1].index(False) if False in ends else len(value))
    if not kept:
        raise DataError(f"{where}: column '{column}' holds answers of the assistant alone: nobody asks for one")
    return read_messages(value[:kept], where)


def _message(message: Any, number: int, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        shared = isinstance(message, dict) and {"from", "value"} <= message.keys()
        raise DataError(
            f"{where}: a message must be an object with 'role' and 'content', found {message!r:.80}"
            f"{SHARED if shared else ''}"
        )
    kept = {key: value for key, value in message.items() if value is not None}  # tables fill up with null
    content, said = message["content"], f"{where}: message {number} ({message['role']})"
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": type(part).__name__} for part in content]
        other = next((part for part in parts if not isinstance(part.get("text"), str)), None)
        if other is not None:
            raise DataError(f"{said}: found a part of type {str(other.get('type'))[:40]!r}, expected text alone")
        content = "".join(part["text"] for part in parts)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{said}: found content {content!r:.80}, expected a text")
    if not (content or "").strip() and not kept.get("tool_calls"):
        raise EmptyMessage(f"{said}: content holds nothing, expected a text")
    return {**kept, "content": content}


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool, what: str = "a conversation"
) -> str:
    """The conversation as the chat template writes it; `ask`: up to where the assistant begins to answer.

    Every use of a chat template goes through here: what is measured, probed and learnt then begins with the same text,
    on every day (`bounded`).
    A template that cannot write plain content, or loses it, is given the content as a list of one part.

    Raises:
        DataError: the template raises, takes or writes more than `bounded` and `too_long` let it, or leaves the text of
            a message out; names `what`.
    """
    _refuse_named(tokenizer)
    forms = [[*messages], [_as_parts(message) for message in messages]]
    if any(message.get("content") is None for message in messages):
        forms.insert(1, [{**message, "content": message.get("content") or ""} for message in messages])
    problems: list[str] = []
    for form in forms:
        try:
            with bounded():
                text = str(
                    tokenizer.apply_chat_template(
                        form, tokenize=False, add_generation_prompt=ask, enable_thinking=False
                    )
                )
        except StopRequested:
            raise
        except (TooSlow, MemoryError, OverflowError) as error:
            problems.append(f"({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            break
        except Exception as error:  # whatever a template of others raises, or calls for
            problems.append(f"({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            continue
        if (wrong := too_long(text, form)) is not None:
            problems.append(f"(it {wrong})")
            break
        if not whole_characters(text):
            problems.append("(it writes half of a surrogate pair, which is no character)")
            continue
        lost = left_out(messages, text)
        if lost is None:
            return text
        problems.append(f"(it leaves out {lost})")
    # Of a message that only calls tools, the second form is the one that most templates can write.
    reason = problems[min(1, len(problems) - 1)] if len(forms) > 2 else problems[0]
    raise DataError(f"the tokenizer's chat template cannot write {what} {reason}; {_way_out(messages, reason)}")


def _refuse_named(tokenizer: PreTrainedTokenizerBase) -> None:
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            f"the tokenizer has chat templates named {', '.join(sorted(templates))} and no default one: save the one "
            f"that is meant as chat_template.jinja in the folder of the model, {PLAIN}"
        )


def _as_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message.get("content") or ""}]}


def left_out(messages: Sequence[Message], text: str) -> str | None:
    """Which text of a message, or tool that it calls, is not in what a template wrote; None if all are.

    White space may differ, and the thoughts of answers but the last may be gone. A system message may stand anywhere,
    all others in their order.
    """
    written, place = _packed(text), 0
    if any(mark in written for mark in PARTS) and not any(mark in _packed(str(messages)) for mark in PARTS):
        return "what a list of parts is, and writes it out as one"
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        said = f"message {number} ({message['role']})"
        for call in message.get("tool_calls") or ():
            name = (call.get("function") or call).get("name") if isinstance(call, dict) else None
            if isinstance(name, str) and "".join(name.split()) not in written:
                return f"the call of {name!r} in {said}"
        if message["role"] == "assistant" and number < len(messages) - 1:
            content = content.split(THOUGHTS[1])[-1]
        forms = [content, *(json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (True, False))]
        start = 0 if message["role"] == "system" else place
        ends = [at + len(form) for form in map(_packed, forms) if (at := written.find(form, start)) >= 0]
        if not ends:
            return f"the text of {said}, {content[:60]!r}"
        place = place if message["role"] == "system" else ends[0]
    return None


def _packed(text: str) -> str:
    return "".join(text.split())


def _way_out(messages: Sequence[Message], problem: str) -> str:
    answer = messages[-1].get("content") or ""
    if THOUGHTS[1] in answer and problem.startswith("(it leaves out"):
        return f"it does not show the thoughts ({THOUGHTS[0]}) of an answer: take them out of the data"
    roles = {message["role"] for message in messages}
    if "system" in roles:
        return "if it takes no system message, put its text before the first user's; or mend the template"
    if "system" in problem:
        return f"give messages that begin with a system one, mend the template, {PLAIN}"
    return f"mend it, {PLAIN}"


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
