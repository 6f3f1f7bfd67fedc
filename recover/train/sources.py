"""Sources of text, read row by row, and turned into token ids with the part that is to be learnt marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from recover.base import console
from recover.base.errors import DataError
from recover.config.recipe import GivenText
from recover.distill.distiller import Batch
from recover.text.prompts import (
    THOUGHTS,
    EmptyMessage,
    Prompt,
    asking,
    encode_prompt,
    holds_messages,
    ids_of,
    read_messages,
    rendered,
)
from recover.text.read import DataSet, EmptyColumn, Row, listed, say_once
from recover.text.rows import prompt_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_ROWS = 20_000  # of given text, before any weight is loaded; of those behind, only that columns hold something


EMPTY = (EmptyColumn, EmptyMessage)  # what a row raises that may be left out


@dataclass(frozen=True)
class Sample:
    """A token sequence, and for each token 1 if it is to be learnt (completion) or 0 (prompt)."""

    ids: list[int]
    mask: list[int]

    def scored(self, scored: str) -> int:
        """How many tokens carry loss: those marked, or all; the first token has nothing that predicts it."""
        return len(self.ids) - 1 if scored == "all" else sum(self.mask[1:])

    def cut(self, length: int) -> Sample:
        """The first `length` tokens."""
        return Sample(self.ids[:length], self.mask[:length])


class SampleRow(TypedDict):
    """A row of `build_dataset`; where the pruned model is to write, with the row's `number` and its `writer`."""

    input_ids: Sequence[int]
    completion_mask: Sequence[int]
    number: NotRequired[int]
    writer: NotRequired[int]


Collate = Callable[[Sequence[SampleRow]], Batch]  # of rows of `build_dataset`


def read_rows(source: str, split: str = "train", subset: str | None = None) -> Sequence[Row]:
    """All rows of a file (`rows_at` says of which kinds), of a data set, or of a blend (`blend:math`).

    `embedded:NAME` is a shipped file.

    Raises:
        DataError: it cannot be read, a line is no JSON object (by file and line), or there is no row.
    """
    rows = prompt_rows(source, subset=subset, split=split)
    if not rows:
        raise DataError(f"{source}: no rows; expected at least one")
    return rows


def _say_tools(source: str, rows: Sequence[Row], column: str) -> None:
    """Say it where conversations name tools that the model could call: nothing here gives them to a template."""
    names = [name for name in ("tools", "functions") if rows[0].value.get(name) and rows[0].value.get(column)]
    if names:
        say_once(
            f"{source}: column '{names[0]}' is not given to the chat template; conversations are written without what "
            "tools there are"
        )


def read_prompts(
    source: str, split: str = "train", subset: str | None = None, *, column: str | None = None, strict: bool = False
) -> list[Row]:
    """Rows with a `prompt`: a text, or the messages of a conversation that the assistant is to go on with.

    It stands in `column`; by default in `prompt`, or in `messages`, whose last answer of the assistant is left away.
    Rows that hold nothing there are left out and counted; `strict` refuses them.

    Raises:
        DataError: a row has no such column, or another type in it; by file and line; or no row is left.
    """
    rows: list[Row] = []
    empty: list[str] = []
    read = read_rows(source, split, subset)
    _say_tools(source, read, column or "messages")
    for row in read:
        try:
            rows.append(Row(row.where, {**row.value, "prompt": _prompt(row, column)}))
        except EMPTY as error:
            if strict:
                raise
            empty.append(str(error))
    if not rows:
        raise DataError(f"{source}: no row holds a prompt; {empty[0]}")
    say_left_out(source, empty)
    return rows


def _prompt(row: Row, column: str | None) -> Prompt:
    name = column or ("messages" if "prompt" not in row.value and "messages" in row.value else "prompt")
    value = row.value.get(name)
    if holds_messages(in_text := listed(value)):  # a sheet has them as JSON
        value = in_text
    if not isinstance(value, list) or not value:
        return row.column(name)
    return asking(value, row.where, name)


def say_left_out(source: str, reasons: Sequence[str]) -> None:
    """How many rows were left out, with the first of the reasons; said once."""
    if reasons:
        rows = f"{len(reasons):,} rows" if len(reasons) > 1 else "1 row"
        say_once(f"{source}: {rows} left out ({reasons[0]})")


def samples_of(row: Row, cfg: GivenText, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sample]:
    """What one row of given text holds: a conversation, a prompt with its completion, or a text in pieces of `length`.

    Conversations and prompts go through the chat template where the tokenizer has one. A row that holds nothing, or no
    token to learn within `length`, gives none; with `cfg.strict` it is refused.

    Raises:
        DataError: a column is missing or of the wrong shape, by file and line.
    """
    try:
        found = _samples(row, cfg, tokenizer, length)
    except EMPTY:
        if cfg.strict:
            raise
        return []
    if cfg.strict and not found:
        raise DataError(
            f"{row.where}: no token to learn within train.length {length}: shorten it, raise train.length, or "
            "leave 'strict' out"
        )
    return found


def _samples(row: Row, cfg: GivenText, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sample]:
    columns = cfg.columns
    if "messages" in columns:
        samples = [_conversation(row, _held(row, "messages", columns["messages"]), tokenizer)]
    elif "prompt" in columns and "completion" in columns:
        prompt, completion = (_held(row, name, columns[name]) for name in ("prompt", "completion"))
        samples = [_completion(row, prompt, completion, tokenizer)]
    elif "text" in columns:
        samples = _pieces(row.column(columns["text"]), tokenizer, length)
    else:
        raise DataError(
            f"{cfg.source}: columns {sorted(columns)} name nothing to learn from; "
            "expected 'text', 'messages', or 'prompt' and 'completion'"
        )
    return [cut for sample in samples if (cut := sample.cut(length)).scored("completion") > 0]


def check_given(cfg: GivenText, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Look at all rows, before any weight is loaded, and say how many will be left out.

    Raises:
        DataError: as `samples_of`; or no row is left.
    """
    rows = read_rows(cfg.source, cfg.split, cfg.subset)
    if "messages" in cfg.columns:
        _say_tools(cfg.source, rows, cfg.columns["messages"])
    left_out: list[str] = []
    for index in console.track(range(len(rows)), f"checking {cfg.source}", unit="rows"):
        if index >= CHECKED_ROWS and isinstance(rows, DataSet):
            break  # of the hub, as many as one likes
        if index >= CHECKED_ROWS:
            try:
                for name, column in cfg.columns.items():
                    _held(rows[index], name, column)
            except EMPTY as error:
                if cfg.strict:
                    raise
                left_out.append(str(error))
        elif not samples_of(rows[index], cfg, tokenizer, length):
            left_out.append(_why(rows[index], cfg, tokenizer, length))
    if len(left_out) == len(rows):
        raise DataError(f"{cfg.source}: no row holds a token to learn within train.length {length}; {left_out[0]}")
    say_left_out(cfg.source, left_out)


def _why(row: Row, cfg: GivenText, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    try:
        samples_of(row, cfg.model_copy(update={"strict": True}), tokenizer, length)
    except DataError as error:
        return str(error)
    return row.where


def _held(row: Row, name: str, column: str) -> Any:
    """What a row holds of a kind of text: messages are a list; a prompt or a completion may be one, too."""
    if name in ("prompt", "completion") and holds_messages(found := listed(row.value.get(column))):
        return found
    return row.column(column, list if name == "messages" else str)


def _completion(row: Row, prompt: Prompt, completion: Prompt, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """A completion behind its prompt, which alone is learnt; either may be messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return _answer(row, prompt, completion, tokenizer)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else [*completion]
    return _conversation(row, [*asked, *said], tokenizer, first=len(asked))


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sample]:
    ids: list[Any] = ids_of(tokenizer, text, special=True)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [Sample(piece, [1] * len(piece)) for piece in pieces]


def _answer(row: Row, prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Sample:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(row, messages, tokenizer)
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids: list[Any] = ids_of(tokenizer, completion, special=False)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Sample(prompt_ids + ids, [0] * len(prompt_ids) + [1] * len(ids))


def _conversation(row: Row, value: list[Any], tokenizer: PreTrainedTokenizerBase, first: int = 0) -> Sample:
    """Every answer of the assistant is learnt; only the last one where the template later shows earlier ones anew.

    `first`: the message from which on answers are learnt.
    """
    messages = read_messages(value, row.where)
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where}: messages need a chat template, and the tokenizer has none: use 'prompt' and 'completion'"
        )
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    if not answers or answers[0] == 0:
        raise DataError(f"{row.where}: a conversation needs an assistant's answer after another's message")
    texts = _turns(row, messages, answers, tokenizer) or _turns(row, messages, answers[-1:], tokenizer)
    if texts is None:
        raise DataError(
            f"{row.where}: the chat template does not show a conversation as the prompt followed by the answer"
            f"{_clash(messages)}"
        )
    ids: list[int] = []
    mask: list[int] = []
    for turn, text in enumerate(texts):
        piece = ids_of(tokenizer, text, special=False)
        ids += piece
        mask += [turn % 2] * len(piece)
    return Sample(ids, mask)


def _clash(messages: list[Any]) -> str:
    """Why, where thoughts are the reason."""
    if not any(THOUGHTS[0] in (message["content"] or "") for message in messages if message["role"] == "assistant"):
        return ""
    return (
        f": the answer holds thoughts ({THOUGHTS[0]}), and the template, which is asked for none (enable_thinking: "
        "false, as in every measurement), writes an empty block of them into the prompt: take the thoughts out of "
        "the answers"
    )


def _turns(row: Row, messages: list[Any], answers: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """The rendered text cut around each answer: prompt, answer, prompt, answer, ...; None if it does not nest."""
    ends = [""]
    for answer in answers:
        for upto, ask in ((answer, True), (answer + 1, False)):
            ends.append(rendered(tokenizer, messages[:upto], ask=ask, what=f"the conversation of {row.where}"))
    if any(not later.startswith(earlier) for earlier, later in pairwise(ends)):
        return None
    return [later[len(earlier) :] for earlier, later in pairwise(ends)]
