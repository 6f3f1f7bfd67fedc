"""What a kind of task does with a model, as against what its file may say (`recover.config.tasks.TaskKind`).

Each module of a kind has one `WORK`; `work_of` finds it by the kind's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recover.base.artifacts import JsonObject
from recover.config.tasks import KINDS, Row
from recover.measure.model import ModelUnderTest
from recover.report.data import GreedyText
from recover.text.generate import Generation

# Of one task: figures by the keys of the kind's `figures`, `kind`, `items`, `samples`; and `each`, the main figure of
# each item (perplexity: nats and tokens of each text), by which two models are compared item by item.
Record = JsonObject
Generations = dict[str, list[GreedyText]]  # task -> one per item


@dataclass(frozen=True)
class Measured:
    """The record of one task; of one that writes also its greedy texts, and the tokens written in all."""

    record: Record
    texts: Sequence[Generation] | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Work:
    """How items of a kind are made and measured. `file` is the kind's file model throughout.

    `make(file, row, where)`: one item; raises DataError, which names `where`. An item of a task that asks with a prompt
    is a dataclass with a `prompt`.
    `measure(model, file, items, reference)`: `reference` holds the dense model's greedy texts, or is None.
    `complete(file, item)`: what follows the prompt in a few-shot example; None: the task file has to say it.
    `together(items)`: what becomes of the items when all are read.
    `size(tokenizer, file, item)`: tokens of the item that the model reads before it writes; None: items are cut to fit.
    `pooled(records)`: the headline figure of several tasks of this kind, where the kind has one of its own.
    `asked(file, item)`: the text that tells an item from others; None: its prompt.
    """

    make: Callable[[Any, Row, str], Any]
    measure: Callable[[ModelUnderTest, Any, Sequence[Any], Generations | None], Measured]
    complete: Callable[[Any, Any], str] | None = None
    together: Callable[[Any, list[Any]], list[Any]] | None = None
    pooled: Callable[[Sequence[Record]], float] | None = None
    size: Callable[[Any, Any, Any], int] | None = None
    asked: Callable[[Any, Any], str] | None = None


def work_of(kind: str) -> Work:
    """The `WORK` of a kind that is registered."""
    found = importlib.import_module(KINDS[kind].work).WORK
    assert isinstance(found, Work)
    return found
