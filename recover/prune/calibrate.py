"""Calibration: text cut into equal samples.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import DataError, PruneError
from recover.config.recipe import TEXTS, Calibration, ending
from recover.text.prompts import (
    EmptyMessage,
    Prompt,
    asking,
    encode_prompt,
    holds_messages,
    ids_of,
    read_messages,
    rendered,
)
from recover.text.read import DataSet, Row, listed, say_once
from recover.text.rows import prompt_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOOKED_AT = 5_000  # prompts, before any is answered
FEWEST, MOST = 8, 256  # prompts that are answered at once

Write = Callable[[list[Prompt]], list[list[int]]]  # prompts -> the ids of each with its answer


def calibration_batches(
    cfg: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    write: Write | None = None,
    *,
    texts: Sequence[str] | None = None,
    context: int | None = None,
) -> list[LongTensor]:
    """Up to `cfg.samples` samples of `cfg.length` tokens, in batches (B, T); the same seed gives the same ones.

    Documents are shuffled, joined by EOS and cut; every sample starts with BOS where the tokenizer puts one (models
    trained with a BOS have unlike activations without). With `cfg.answer` a document is a prompt and its answer by
    `write`; prompts that leave it no room in a model of this `context` are passed over. `texts`: the documents, in
    place of those in `cfg.data`.
    Warns when the text gives fewer samples; raises DataError when it is shorter than one sample.
    """
    if (cfg.answer is None) != (write is None):
        raise AssertionError("answers are asked for, and nothing writes them")
    bos = _bos(tokenizer)
    body = cfg.length - len(bos)
    documents = _shuffled(read_texts(cfg) if texts is None else texts, seed)
    if write is not None:
        documents = (prompt for prompt in documents if _excess(cfg, tokenizer, prompt, context) is None)
    ids = _joined(cfg, tokenizer, cfg.samples * body, write, documents)
    count = min(cfg.samples, len(ids) // body)
    found = f"calibration.data {cfg.data}: {len(ids):,} tokens in all"
    if count == 0:
        raise DataError(f"{found}, one sample needs {cfg.length}. Give more text or a smaller calibration.length")
    if count < cfg.samples:
        console.warn(f"{found}: {count} samples of {cfg.length} and not calibration.samples: {cfg.samples}")
    samples = torch.tensor([bos + ids[i * body : (i + 1) * body] for i in range(count)], dtype=torch.long)
    return list(samples.split(cfg.batch_size))  # type: ignore[arg-type]


def check_asked(
    cfg: Calibration, tokenizer: PreTrainedTokenizerBase, context: int | None, section: str = "prune"
) -> None:
    """Say how many prompts leave no room for `cfg.answer` tokens in the model's context; they will be left out.

    Of a large data set the first thousands are looked at. Raises DataError where no prompt is left, and with
    `cfg.strict` for the first that would be left out.
    """
    prompts = list(islice(read_texts(cfg), LOOKED_AT))
    asked = [(number, prompt) for number, prompt in enumerate(prompts) if _holds(prompt)]
    found = ((number, _excess(cfg, tokenizer, prompt, context)) for number, prompt in asked)
    long = [f"prompt {number}, {reason}" for number, reason in found if reason is not None]
    if long and (cfg.strict or len(long) == len(asked)):
        raise DataError(
            f"{section}.calibration.answer: {cfg.answer} tokens after {long[0]} of {cfg.data}"
            f"{'' if cfg.strict else ', and after every other one'}: lower it, or give shorter prompts"
            f"{', or leave strict out' if cfg.strict else ''}"
        )
    if long:
        say_once(
            f"calibration.data {cfg.data}: {len(long):,} of {len(prompts):,} prompts left out, which leave no room for "
            f"calibration.answer ({long[0]})"
        )


def _excess(cfg: Calibration, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, context: int | None) -> str | None:
    """Why there is no room for an answer to this prompt in the model's context; None if there is."""
    if context is None or cfg.answer is None:
        return None
    tokens = len(encode_prompt(tokenizer, prompt))
    return f"of {tokens} tokens, where the context is {context}" if tokens + cfg.answer > context else None


def _holds(document: Prompt) -> bool:
    return bool(document) and not (isinstance(document, str) and document.isspace())


def _joined(
    cfg: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    write: Write | None,
    texts: Iterator[Prompt],
) -> list[int]:
    """The documents one after the other, until there are `wanted` ids or no more documents."""
    ids: list[int] = []
    while len(ids) < wanted:
        if write is None or cfg.answer is None:
            rows = [_tokens(tokenizer, text) for text in islice(texts, 1)]
        else:
            # As many as would do if every answer were of full length: more would be written for nothing.
            some = min(max(FEWEST, (wanted - len(ids)) // cfg.answer), MOST)
            prompts = list(islice(texts, some))
            rows = [_ended(tokenizer, row) for row in write(prompts)] if prompts else []
        if not rows:
            break
        ids += chain.from_iterable(rows)
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS id as a list, empty when the tokenizer starts no text with one."""
    bos: Any = tokenizer.bos_token_id
    first: Any = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and list(first)[:1] == [bos] else []


def _tokens(tokenizer: PreTrainedTokenizerBase, document: Prompt) -> list[int]:
    """Ids of a text, or of a conversation as the chat template writes it, up to an end token."""
    text = document
    if not isinstance(text, str):
        if not tokenizer.chat_template:
            raise DataError("calibration.data: messages need a chat template, and the tokenizer has none: give texts")
        text = rendered(tokenizer, text, ask=False, what="the messages of calibration.data")
    return _ended(tokenizer, ids_of(tokenizer, text, special=False))  # a document longer than the context is cut


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    eos: Any = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]  # what a model wrote may hold it already


def _shuffled(texts: Sequence[Prompt], seed: int) -> Iterator[Prompt]:
    """Texts in an order that depends on the seed alone, read one by one (a large data set is not read whole).

    Those that hold nothing are passed over.
    """
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    return (text for index in order if _holds(text := texts[index]))


def read_texts(cfg: Calibration) -> Sequence[Prompt]:
    """The documents behind `cfg.data`, in the column `cfg.column` (a text file is one document).

    A document is a text, or the messages of a conversation; with `cfg.answer` without its last answer, which is written
    anew. Raises DataError naming the file and line, or the column, that is wrong.
    """
    try:
        rows = prompt_rows(cfg.data, subset=cfg.subset, split=cfg.split, kinds="a local text file")
    except DataError as error:
        raise DataError(f"calibration.data: {error}") from error
    if isinstance(rows, DataSet) and cfg.column not in rows.columns:
        raise DataError(
            f"calibration.data {cfg.data}: no column '{cfg.column}', found {rows.columns}: set calibration.column"
        )
    texts = _Column(rows, "text" if ending(cfg.data) in TEXTS else cfg.column, asked=cfg.answer is not None)
    if isinstance(rows, DataSet):  # as large as one likes: read where it is needed
        return texts
    documents = [*texts]
    empty = [row.where for row, document in zip(rows, documents, strict=True) if not _holds(document)]
    if empty and cfg.strict:
        raise DataError(f"{empty[0]}: holds no text for calibration: fill the row, or leave strict out")
    if empty:
        say_once(f"calibration.data {cfg.data}: {len(empty):,} of {len(documents):,} rows left out, which hold nothing")
    return documents


class _Column(Sequence):
    """One column of texts or messages, read row by row; what holds nothing is empty text."""

    def __init__(self, rows: Sequence[Row], column: str, *, asked: bool) -> None:
        self.rows, self.column, self.asked = rows, column, asked

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        text = row.value.get(self.column, self)
        if holds_messages(messages := listed(text)):
            try:
                return asking(messages, row.where, self.column) if self.asked else read_messages(messages, row.where)
            except EmptyMessage:
                return ""
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{row.where}: no text in column '{self.column}', found {sorted(row.value)}: set calibration.column"
            )
        return text or ""


def check_context(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Raise PruneError when samples are longer than the model's context: activations there mean nothing."""
    context = getattr(model.config, "max_position_embeddings", None)
    length = batches[0].shape[1] if batches else 0
    if context is not None and length > context:
        raise PruneError(f"calibration.length: {length} tokens, the model's context is {context}: give at most that")


def calibration_record(cfg: Calibration | None, batches: Sequence[Tensor]) -> JsonObject:
    """What scores were measured on, for `plan.calibration`; empty when on nothing."""
    if cfg is None:
        return {}
    samples = sum(len(ids_BT) for ids_BT in batches)
    record = {"data": cfg.data, "samples": samples, "tokens": sum(ids_BT.numel() for ids_BT in batches)}
    return record | ({"answer": cfg.answer} if cfg.answer else {})
