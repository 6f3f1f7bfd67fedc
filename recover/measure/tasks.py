"""One model on several tasks: what it writes, what it chooses, what it expects; every model is measured alike.

record, generations = measure(model, tokenizer, [load_task("sums.yaml")], recipe.measure)
record["tasks"]["sums"]["exact_match"], record["headline"]["generation"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base.clock import part
from recover.base.errors import RecipeError
from recover.config.recipe import Measure
from recover.config.tasks import ChoiceFile, CodeFile, PerplexityFile, RetrievalFile
from recover.maths.score import mean
from recover.measure.coding import measure_code
from recover.measure.judging import measure_choice, measure_perplexity, perplexity
from recover.measure.retrieving import measure_retrieval
from recover.measure.subject import Subject
from recover.measure.task_file import Task, load_task
from recover.measure.writing import Generations, Record, measure_writing
from recover.text.generate import Generation

__all__ = ["Task", "check_allowed", "headline", "load_task", "measure"]


@part("measuring")
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    cfg: Measure,
    *,
    reference: Generations | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Record, Generations]:
    """The record of all tasks and the greedy texts, the same on every process; items are dealt out among processes.

    `model`: in whatever view it is in. `reference`: greedy texts of the dense model, as returned here; against them
    agreement and first divergence are counted. `limit`: items of each task, the first ones; default: `cfg.limit`.

    Raises:
        DataError: an item does not fit the model's context, or `reference` lacks items of a task.
        RecipeError: a task would run code, which the config does not allow.
    """
    start = time.perf_counter()
    check_allowed(tasks, cfg)
    subject = Subject(model, tokenizer, cfg, seed)
    records: dict[str, Record] = {}
    texts: Generations = {}
    tokens, writing_seconds = 0, 0.0
    for task in tasks:
        items = task.items[: limit or cfg.limit]
        began = time.perf_counter()
        records[task.name], written = _measured(subject, task, items, reference)
        if written is not None:
            greedy, count = written
            writing_seconds, tokens = writing_seconds + time.perf_counter() - began, tokens + count
            texts[task.name] = [{"ids": each.ids, "text": each.text} for each in greedy]
    record = {
        "tasks": records,
        "headline": headline(records),
        "seconds": time.perf_counter() - start,
        "tokens_per_second": tokens / writing_seconds if tokens else None,
    }
    return record, texts


def check_allowed(tasks: Sequence[Task], cfg: Measure) -> None:
    """Raises RecipeError if a task would run code that the model writes, and nobody has allowed that."""
    for task in tasks:
        if task.kind == "code" and not cfg.allow_code_execution:
            raise RecipeError(
                f"task {task.name}: it runs programs that the model writes, locked away but on this machine; to allow "
                "that, set measure.allow_code_execution: true, or give --allow-code-execution"
            )


def _measured(
    subject: Subject, task: Task, items: Sequence[Any], reference: Generations | None
) -> tuple[Record, tuple[list[Generation], int] | None]:
    """(record, (greedy texts, tokens written) if it writes) of one task."""
    file = task.file
    if isinstance(file, ChoiceFile):
        return measure_choice(subject, file, items), None
    if isinstance(file, PerplexityFile):
        return measure_perplexity(subject, file, items), None
    if isinstance(file, RetrievalFile):
        return measure_retrieval(subject, file, items), None
    if isinstance(file, CodeFile):
        record, greedy, count = measure_code(subject, file, items)
    else:
        record, greedy, count = measure_writing(subject, file, items, reference)
    return record, (greedy, count)


def headline(records: dict[str, Record]) -> dict[str, float | None]:
    """One number per use, from `record["tasks"]`; None = not measured.

    generation: mean exact match and pass@1; choice: mean accuracy; retrieval: mean nDCG@10; perplexity: pooled.
    """
    expected = [each for each in records.values() if each["kind"] == "perplexity"]
    tokens = sum(each["tokens"] for each in expected)
    nats = sum(each["nats_per_token"] * each["tokens"] for each in expected)
    return {
        "generation": _mean_of(records, {"generate": "exact_match", "code": "pass_at_1"}),
        "choice": _mean_of(records, {"choice": "accuracy"}),
        "retrieval": _mean_of(records, {"retrieval": "score"}),
        "perplexity": perplexity(nats / tokens) if tokens else None,
    }


def _mean_of(records: dict[str, Record], keys: dict[str, str]) -> float | None:
    values = [each[keys[each["kind"]]] for each in records.values() if each["kind"] in keys]
    return mean(values) if values else None
