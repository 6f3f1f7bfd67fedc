"""A perplexity task: what the model expects of whole texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recover.base.errors import DataError
from recover.config.tasks import PerplexityFile, Row
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.text.generate import context_of
from recover.text.likelihood import Continuation
from recover.text.prompts import text_ids
from recover.text.read import EmptyColumn
from recover.text.rows import column

TOKEN_CHARACTERS = 4  # of a token of English, about


def _text(file: PerplexityFile, row: Row, where: str) -> str:
    text = "" if row.get(file.text, "") is None else column(row, file.text, where)
    if isinstance(text, str) and not text.strip():
        raise EmptyColumn(f"{where}: column '{file.text}': found nothing, expected a text")
    if not isinstance(text, str):
        raise DataError(f"{where}: column '{file.text}': found {text!r}, expected a text")
    return text


def measure_perplexity(
    model: ModelUnderTest, file: PerplexityFile, texts: Sequence[str], _reference: Generations | None = None
) -> Measured:
    """Record of a perplexity task: nats per token, pooled over all texts, each cut at `length` tokens and the context.

    If the tokenizer puts a BOS first, every token of a text is scored, the first one given BOS; if it does not, the
    first token of a text is only context. `tokens` counts the scored ones.

    Raises:
        DataError: no text has two tokens.
    """
    length = min(file.length, context_of(model.model) or file.length)
    texts_ids = [text_ids(model.tokenizer, text, special=True)[:length] for text in texts]
    rows = [Continuation(ids, 1) for ids in texts_ids if len(ids) > 1]
    if not rows:
        raise DataError(f"task {file.name}: no text has two tokens, so nothing can be predicted")
    tokens = sum(row.tokens for row in rows)
    each = [-score for score in model.score(rows, title=f"task {file.name}")]
    nats = math.fsum(each) / tokens
    record = {
        "kind": "perplexity",
        "items": len(rows),
        "tokens": tokens,
        "nats_per_token": nats,
        "perplexity": perplexity(nats),
        "each": [[nats, row.tokens] for nats, row in zip(each, rows, strict=True)],
    }
    return Measured(record)


def perplexity(nats: float) -> float:
    """e^nats, held at e^700: beyond, neither a float nor JSON can hold it."""
    return math.exp(min(nats, 700.0))


def _pooled(records: Sequence[Record]) -> float:
    """Perplexity of all tokens of all tasks together."""
    nats = sum(record["nats_per_token"] * record["tokens"] for record in records)
    return perplexity(nats / sum(record["tokens"] for record in records))


def _asked(file: PerplexityFile, text: str) -> str:
    """About as much of a text as is scored."""
    return text[: file.length * TOKEN_CHARACTERS]


WORK = Work(_text, measure_perplexity, pooled=_pooled, asked=_asked)
