"""One model on several tasks: what it writes, what it chooses, what it expects; every model is measured alike.

record, generations = measure(model, tokenizer, [load_task("sums.yaml")], recipe.measure)
record["tasks"]["sums"]["exact_match"], record["headline"]["generation"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.measure.judging import measure_choice, measure_perplexity, perplexity
from recover.measure.score import mean
from recover.measure.subject import Subject
from recover.measure.task_file import ChoiceFile, PerplexityFile, Task, load_task
from recover.measure.writing import Generations, Record, measure_writing
from recover.recipe import Measure

__all__ = ["Task", "headline", "load_task", "measure"]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    leaf: Measure,
    *,
    reference: Generations | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Record, Generations]:
    """The record of all tasks and the greedy texts, the same on every process; items are dealt out among processes.

    `model`: in whatever view it is in. `reference`: greedy texts of the dense model, as returned here; against them
    agreement and first divergence are counted. `limit`: items of each task, the first ones; default: `leaf.limit`.

    Raises:
        DataError: an item does not fit the model's context, or `reference` lacks items of a task.
    """
    start = time.perf_counter()
    subject = Subject(model, tokenizer, leaf, seed)
    records: dict[str, Record] = {}
    texts: Generations = {}
    tokens, writing_seconds = 0, 0.0
    for task in tasks:
        items = task.items[: limit or leaf.limit]
        if isinstance(task.file, ChoiceFile):
            records[task.name] = measure_choice(subject, task.file, items)
        elif isinstance(task.file, PerplexityFile):
            records[task.name] = measure_perplexity(subject, task.file, items)
        else:
            began = time.perf_counter()
            records[task.name], written, count = measure_writing(subject, task.file, items, reference)
            writing_seconds, tokens = writing_seconds + time.perf_counter() - began, tokens + count
            texts[task.name] = [{"ids": each.ids, "text": each.text} for each in written]
    record = {
        "tasks": records,
        "headline": headline(records),
        "seconds": time.perf_counter() - start,
        "tokens_per_second": tokens / writing_seconds if tokens else None,
    }
    return record, texts


def headline(records: dict[str, Record]) -> dict[str, float | None]:
    """One number per kind of `record["tasks"]`: mean exact match, mean accuracy, pooled perplexity; None = no such."""
    written = [each["exact_match"] for each in records.values() if each["kind"] == "generate"]
    chosen = [each["accuracy"] for each in records.values() if each["kind"] == "choice"]
    expected = [each for each in records.values() if each["kind"] == "perplexity"]
    tokens = sum(each["tokens"] for each in expected)
    nats = sum(each["nats_per_token"] * each["tokens"] for each in expected)
    return {
        "generation": mean(written) if written else None,
        "choice": mean(chosen) if chosen else None,
        "perplexity": perplexity(nats / tokens) if tokens else None,
    }
