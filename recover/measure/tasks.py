"""One model on several tasks: what it writes, what it chooses, what it expects; every model is measured alike.

record, generations = measure(model, tokenizer, [load_task("sums.yaml")], recipe.measure)
record["tasks"]["sums"]["exact_match"], record["headline"]["generation"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base.clock import part
from recover.base.errors import RecipeError
from recover.config.recipe import Measure
from recover.config.tasks import KINDS, headline_figures
from recover.maths.score import mean
from recover.measure.kinds.work import Generations, Record, work_of
from recover.measure.model import ModelUnderTest
from recover.measure.sandbox import why_no_wall
from recover.measure.task_file import Task, load_task

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
    subject = ModelUnderTest(model, tokenizer, cfg, seed)
    records: dict[str, Record] = {}
    texts: Generations = {}
    tokens, writing_seconds = 0, 0.0
    for task in tasks:
        items = task.items[: limit or cfg.limit]
        began = time.perf_counter()
        found = work_of(task.kind).measure(subject, task.file, items, reference)
        records[task.name] = found.record
        if found.texts is not None:
            writing_seconds, tokens = writing_seconds + time.perf_counter() - began, tokens + found.tokens
            texts[task.name] = [{"ids": each.ids, "text": each.text} for each in found.texts]
    record = {
        "tasks": records,
        "headline": headline(records),
        "seconds": time.perf_counter() - start,
        "tokens_per_second": tokens / writing_seconds if tokens else None,
    }
    return record, texts


def check_allowed(tasks: Sequence[Task], cfg: Measure) -> None:
    """Raises RecipeError if a task would run code that the model writes, and nobody has allowed that.

    Nor is it run where it is to be confined and this machine has no wall for it.
    """
    names = [task.name for task in tasks if KINDS[task.kind].runs_code]
    if not names or cfg.allow_code_execution == "unconfined":
        return
    if not cfg.allow_code_execution:
        raise RecipeError(
            f"task {names[0]}: it runs programs that the model writes, behind a wall but on this machine; to allow "
            "that, set measure.allow_code_execution: true, or give --allow-code-execution"
        )
    if why := why_no_wall():
        raise RecipeError(
            f"task {names[0]}: it runs programs that the model writes, and this machine has no wall for them ({why}): "
            "Linux namespaces are needed, which containers and some systems forbid (docs/security.md). Leave the task "
            "out, or, on a machine with nothing to lose, set measure.allow_code_execution: unconfined "
            "(--allow-code-execution-unconfined)"
        )


def headline(records: dict[str, Record]) -> dict[str, float | None]:
    """One number per use, and per kind of no use, from `record["tasks"]`; None = not measured.

    Of a use, the mean of its tasks' main figures (generation: exact match and pass@1; choice: accuracy; retrieval:
    nDCG@10); else pooled as the kind pools (perplexity: over all tokens).
    """
    return {
        name: _headline(name, [each for each in records.values() if KINDS[each["kind"]].headline == name])
        for name in headline_figures()
    }


def _headline(name: str, records: Sequence[Record]) -> float | None:
    if not records:
        return None
    pooled = work_of(name).pooled if name in KINDS and KINDS[name].use is None else None
    return pooled(records) if pooled else mean([each[KINDS[each["kind"]].main.key] for each in records])
