"""The records of choice and perplexity tasks: what a model makes of given text, nothing of its own written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from recover.base.errors import DataError
from recover.config.tasks import Choice, ChoiceFile, PerplexityFile
from recover.maths.score import interval95, mean
from recover.measure.subject import Subject
from recover.text.generate import context_of
from recover.text.likelihood import Continuation, option_rows
from recover.text.prompts import text_ids

Record = dict[str, Any]


def measure_choice(subject: Subject, file: ChoiceFile, items: Sequence[Choice]) -> Record:
    """Record of a choice task, by the sum of log p over each option's full text; normalised = per byte of the option.

    An option is chosen only if it beats every other one: a model for which all options are equal is never right.

    Raises:
        DataError: an item does not fit the model's context.
    """
    scores = _option_scores(subject, file, items)
    per_byte = [
        [score / len(option.encode()) for score, option in zip(row, item.options, strict=True)]
        for row, item in zip(scores, items, strict=True)
    ]
    margins = [margin(row, item.label) for row, item in zip(scores, items, strict=True)]
    right = [float(each > 0) for each in margins]
    return {
        "kind": "choice",
        "items": len(items),
        "accuracy": mean(right),
        "interval95": interval95(right),
        "accuracy_normalised": mean([margin(row, item.label) > 0 for row, item in zip(per_byte, items, strict=True)]),
        "chance": mean([1 / len(item.options) for item in items]),
        "margin": mean(margins),
        "samples": _samples(items, scores)[: subject.cfg.samples],
    }


def margin(scores: Sequence[float], label: int) -> float:
    """Nats by which the right option beats the best wrong one; negative or 0 if it does not."""
    return scores[label] - max(score for option, score in enumerate(scores) if option != label)


def measure_perplexity(subject: Subject, file: PerplexityFile, texts: Sequence[str]) -> Record:
    """Record of a perplexity task: nats per token, pooled over all texts, each cut at `length` tokens and the context.

    If the tokenizer puts a BOS first, every token of a text is scored, the first one given BOS; if it does not, the
    first token of a text is only context. `tokens` counts the scored ones.

    Raises:
        DataError: no text has two tokens.
    """
    length = min(file.length, context_of(subject.model) or file.length)
    texts_ids = [text_ids(subject.tokenizer, text, special=True)[:length] for text in texts]
    rows = [Continuation(ids, 1) for ids in texts_ids if len(ids) > 1]
    if not rows:
        raise DataError(f"task {file.name}: no text has two tokens, so nothing can be predicted")
    tokens = sum(row.tokens for row in rows)
    nats = -math.fsum(subject.expects(rows, title=f"task {file.name}")) / tokens
    return {
        "kind": "perplexity",
        "items": len(rows),
        "tokens": tokens,
        "nats_per_token": nats,
        "perplexity": perplexity(nats),
    }


def perplexity(nats: float) -> float:
    """e^nats, held at e^700: beyond, neither a float nor JSON can hold it."""
    return math.exp(min(nats, 700.0))


def _option_scores(subject: Subject, file: ChoiceFile, items: Sequence[Choice]) -> list[list[float]]:
    """Per item one log-likelihood per option, in nats."""
    groups = [
        option_rows(subject.tokenizer, item.prompt, item.options, separator=file.separator, chat=file.wraps)
        for item in items
    ]
    return subject.chooses(groups, title=f"task {file.name}")


def _samples(items: Sequence[Choice], scores: Sequence[Sequence[float]]) -> list[Record]:
    return [
        {
            "prompt": item.prompt,
            "text": item.options[row.index(max(row))],
            "expected": item.options[item.label],
            "correct": margin(row, item.label) > 0,
        }
        for item, row in zip(items, scores, strict=True)
    ]
