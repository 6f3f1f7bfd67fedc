"""One model on several tasks: what it writes, what it chooses, what it expects; every model is measured alike.

record, generations = measure(model, tokenizer, [load_task("sums.yaml")], recipe.measure)
record["tasks"]["sums"]["exact_match"], record["headline"]["generation"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import console
from recover.base.clock import part
from recover.base.errors import DataError, RecipeError
from recover.config.recipe import Measure
from recover.config.tasks import KINDS, WritingFile, headline_figures
from recover.maths.score import mean
from recover.measure.model import Generations, ModelUnderTest, Record, work_of
from recover.measure.sandbox import why_no_wall
from recover.measure.task_file import Task, load_task
from recover.measure.texts import longest_text
from recover.report.data import GreedyText, MeasureRecord
from recover.report.data import Task as TaskRecord
from recover.text.generate import Generation
from recover.text.prompts import encode_prompt

__all__ = [
    "Task",
    "check_allowed",
    "check_names",
    "check_room",
    "headline",
    "load_task",
    "longest_item",
    "longest_text",
    "measure",
]

SHORTEST = 16  # tokens of a text: less is no measurement of writing
NORMALIZED = 2  # tokens of a byte at most: a tokenizer may write a character out before it cuts


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
) -> tuple[MeasureRecord, Generations]:
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
            texts[task.name] = [_written(each, item) for each, item in zip(found.texts, items, strict=True)]
    record: MeasureRecord = {
        "tasks": cast(dict[str, TaskRecord], records),
        "headline": headline(records),
        "seconds": time.perf_counter() - start,
        "tokens_per_second": tokens / writing_seconds if tokens else None,
    }
    return record, texts


def _written(text: Generation, item: Any) -> GreedyText:
    """A row of `Generations`, with what was asked, so that an item can be looked at without its task."""
    expected = getattr(item, "targets", None)  # a kind may have no text that is the right one
    right = expected[0] if expected else None
    return {"ids": text.ids, "text": text.text, "prompt": item.prompt, "expected": right}


def check_names(tasks: Sequence[Task], where: str) -> None:
    """Raises RecipeError if two tasks have one name: a record holds one of them. `where`: the field, or the option."""
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{where}: more than one task is called {twice[0]!r}: give each a name of its own")


def check_room(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, cfg: Measure, context: int | None) -> None:
    """Raises DataError for the longest item of the first task of which one does not fit into `context` tokens.

    With what is written after it, if anything is; of the items that `cfg.limit` leaves.
    """
    if context is None:
        return
    for task in tasks:
        tokens, item = longest_item(task, tokenizer, cfg, context)
        new = longest_text(task.file, cfg)
        if item is None or tokens + new <= context:
            continue
        what = f"task {task.name}: the prompt {item.prompt[:60]!r} has {tokens:,} tokens"
        if not new:
            raise DataError(f"{what} with the longest option, the model's context is {context:,}: shorten it")
        own = isinstance(task.file, WritingFile) and task.file.max_new_tokens == new < cfg.max_new_tokens
        field = f"max_new_tokens of the task, {new:,}," if own else f"measure.max_new_tokens {new:,}"
        raise DataError(
            f"{what}; with {field} that exceeds the model's context of {context:,}: shorten the prompt, or lower "
            f"{'max_new_tokens' if own else 'measure.max_new_tokens'}"
        )


def fitted(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, cfg: Measure, context: int | None) -> Measure:
    """The config with texts as long as the longest prompt leaves room for in `context`, where that is less.

    Where that is next to nothing it stays as it is, for `check_room` to refuse.
    """
    writing = [task for task in tasks if isinstance(task.file, WritingFile)]
    left = [] if context is None else [context - longest_item(task, tokenizer, cfg, context)[0] for task in writing]
    room = min(left, default=cfg.max_new_tokens)
    if not SHORTEST <= room < cfg.max_new_tokens:
        return cfg
    console.say(
        f"texts are written to {room} tokens at most: the longest prompt leaves no more of the model's context of "
        f"{context} (--max-new-tokens)"
    )
    return cfg.model_copy(update={"max_new_tokens": room})


def longest_item(task: Task, tokenizer: PreTrainedTokenizerBase, cfg: Measure, context: int) -> tuple[int, Any]:
    """(tokens, item) of the item that the model reads most of; (0, None) where none could fail to fit `context`.

    Texts that are far too short for that are not looked at: a token has a byte at least.
    """
    size = work_of(task.kind).size
    if size is None:
        return 0, None
    beside = NORMALIZED * len(encode_prompt(tokenizer, "a", chat=getattr(task.file, "wraps", None)))
    room = context - longest_text(task.file, cfg) - beside
    longer = [item for item in task.items[: cfg.limit] if NORMALIZED * _bytes(item) > room]
    found = [(size(tokenizer, task.file, item), item) for item in longer]
    return max(found, key=lambda each: each[0], default=(0, None))


def _bytes(item: Any) -> int:
    return len(item.prompt.encode()) + max((len(each.encode()) for each in getattr(item, "options", ())), default=0)


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
