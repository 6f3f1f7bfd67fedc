"""Tasks in both views: choice by the options' logits, retrieval by pooled states; what a run and a diagnosis share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recover.base.clock import part
from recover.config.tasks import ChoiceFile, RetrievalFile
from recover.measure.kinds.choice import Choice
from recover.measure.kinds.retrieval import Search
from recover.measure.task_file import Task
from recover.models.twin import Twin
from recover.probe.choices import Asked, choice_drift
from recover.probe.records import Record
from recover.probe.retrieval import Query, retrieval_drift
from recover.probe.views import Pair
from recover.text.generate import context_of
from recover.text.likelihood import option_rows

KINDS = ("choice", "retrieval")


@part("probing")
def task_drift(
    twin: Twin | Pair, tokenizer: Any, tasks: Sequence[Task], *, items: int | None = None, batch_size: int = 16
) -> list[Record]:
    """The records of the choice and retrieval tasks among them, the same on every process; other kinds have none.

    `items`: of each task, the first ones; None: all; 0: no records.

    Raises:
        DataError: an item that is too long for a model.
        ModelError: logits or embeddings that are not finite, naming the item.
    """
    pair = Pair.of(twin)
    records: list[Record] = []
    for task in tasks if items != 0 else ():
        file, some = task.file, task.items[:items]
        if isinstance(file, ChoiceFile):
            asked = [_asked(tokenizer, file, item) for item in some]
            records.append(choice_drift(pair, asked, task=task.name, batch_size=batch_size))
        elif isinstance(file, RetrievalFile):
            queries = [_query(item) for item in some]
            contexts = [context_of(view.model) or file.length for view in (pair.dense, pair.pruned)]
            length = min(file.length, *contexts)
            records += retrieval_drift(pair, tokenizer, queries, task=task.name, length=length, batch_size=batch_size)
    return records


def _asked(tokenizer: Any, file: ChoiceFile, item: Choice) -> Asked:
    rows = option_rows(tokenizer, item.prompt, item.options, separator=file.separator, chat=file.wraps)
    return Asked(tuple(tuple(row.ids) for row in rows), rows[0].start, item.label)


def _query(item: Search) -> Query:
    return Query(item.query, item.documents, item.relevant)
