"""Tasks: each is read from its YAML file and its data and checked before a model is loaded; then models are measured.

name: sums
kind: generate
data: ../data/sums.jsonl      # beside the YAML, or a hub data set
prompt: "{question}"          # columns in braces: {column}, {column[key]}
target: answer                # column: what is right, a text, a number, or a list of either
answer: '-?\\d[\\d,.]*'         # the last match in the model's text is its answer

What a model writes, what it chooses, what it expects; every model is measured alike:

record, generations = measure(model, tokenizer, [load_task("sums.yaml")], recipe.measure)
record["tasks"]["sums"]["exact_match"], record["headline"]["generation"]

Tasks of lm-evaluation-harness (an optional extra) are measured through its own API, for figures to compare with others.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.clock import part
from recover.base.errors import DataError, RecipeError
from recover.config import yaml_values
from recover.config.base import explain
from recover.config.named import is_task_name, read_sources, task_path
from recover.config.recipe import Measure, ending
from recover.config.tasks import KINDS, Fewshot, PromptFile, Row, TaskFile, WritingFile, headline_figures
from recover.maths.score import mean
from recover.measure.kinds.generate import longest_text
from recover.measure.model import Generations, ModelUnderTest, Record, work_of
from recover.measure.sandbox import why_no_wall
from recover.report.run_files import GreedyText, MeasureRecord
from recover.report.run_files import Task as TaskRecord
from recover.text.generate import Generation, evaluating
from recover.text.prompts import encode_prompt
from recover.text.read import EmptyColumn
from recover.text.rows import NotHad, column, described, filled, first_had, rows_of

Shots = list[tuple[str, str]]  # (prompt, what follows it)


@dataclass(frozen=True)
class Task:
    """A task file and its items, such as the `Question`s of a generate task.

    `asked`: what each item asks, without the examples of a few-shot prompt.
    """

    file: TaskFile
    items: tuple[Any, ...]
    asked: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def kind(self) -> str:
        return self.file.kind

    def without_samples(self) -> Task:
        """The task without the texts that are drawn for pass@k."""
        if not isinstance(self.file, WritingFile):
            return self
        return replace(self, file=self.file.model_copy(update={"samples": None, "sampling": None}))


def load_task(source: str) -> Task:
    """Read a task and all its items: one that goes by a name (`gsm8k`), a YAML file, or `embedded:NAME`.

    Raises:
        RecipeError: there is no such file, or one of its fields is wrong.
        DataError: its data is not there, is empty, or has a row of the wrong shape; names file and line.
    """
    path = task_path(source)
    file = _read_file(path)
    if is_task_name(source):
        console.say(f"[dim]task {file.name}: {file.about}[/dim]")
    work = work_of(file.kind)
    put = shown_before(file, path) if isinstance(file, PromptFile) else None
    items, asked, seen, empty = [], [], set(), []
    rows = rows_of(
        file.data,
        path.parent,
        subset=file.subset,
        split=file.split,
        arguments=file.arguments,
        revision=file.revision,
    )
    for where, row in rows:
        if file.once is not None:
            name = str(column(row, file.once, where))
            if name in seen:
                continue
            seen.add(name)
        try:
            item = work.make(file, row, where)
        except EmptyColumn as error:
            empty.append(str(error))
            continue
        asked.append(work.asked(file, item) if work.asked else item.prompt)
        items.append(put(item) if put else item)
        if len(items) == file.limit:
            break
    if not items:
        reason = f"; {empty[0]}" if empty else ""
        raise DataError(f"{path}: its data {file.data} holds no rows, expected at least one{reason}")
    if empty:
        rows_left = f"{len(empty):,} empty rows" if len(empty) > 1 else "1 empty row"
        console.warn(f"task {file.name}: {rows_left} left out ({empty[0]})")
    return Task(file, tuple(work.together(file, items) if work.together else items), tuple(asked))


def _read_file(path: Path) -> TaskFile:
    if ending(path.name):
        raise RecipeError(
            f"{path}: data, not a task; expected a YAML file that names it as `data: {path.name}` and says what is "
            "asked of it (docs/recipe.md, Tasks)"
        )
    tree = yaml_values.read(path)
    kind = KINDS.get(str(tree.get("kind")))
    if kind is None:
        found = f"found {tree['kind']!r}" if "kind" in tree else "is missing"
        raise RecipeError(f"{path}: kind: {found}, expected one of {', '.join(KINDS)}")
    model = kind.file
    if "sources" in tree:
        tree = _from_first_had(tree, path)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, model, str(path), {}))) from None


def _from_first_had(tree: JsonObject, path: Path) -> JsonObject:
    """The fields of a task with those of the first of its `sources` that can be had here."""
    if "data" in tree:
        raise RecipeError(f"{path}: both data and sources: the rows come from one of them; leave one out")
    rest = {name: value for name, value in tree.items() if name != "sources"}
    try:
        source = first_had(read_sources(tree["sources"], path), path.parent)
    except NotHad as error:
        raise NotHad(
            f"task {tree.get('name', path.stem)}: its data cannot be had here; {error}. Or use a file of your own: "
            f"copy {path}, and write `data: FILE` in place of its `sources`, with the columns that this file has; "
            "or leave the task out of measure.tasks",
            error.brings,
        ) from None
    given = {"data": source.data, "subset": source.subset, "split": source.split, "revision": source.revision}
    given |= {"license": source.license, "arguments": source.arguments}
    about = f"{tree.get('about', path.stem)} ({described(source)})"
    return {**rest, **{name: value for name, value in given.items() if value}, **source.fields, "about": about}


def shown_before(file: PromptFile, path: Path) -> Callable[[Any], Any]:
    """What puts the examples of a task before the prompt of an item; without few-shot, what leaves it as it is.

    Raises:
        DataError: there are too few examples, or a row makes none; names file and line.
    """
    cfg = file.fewshot
    if cfg is None:
        return lambda item: item
    shots = _shots(file, cfg, path)

    def put(item: Any) -> Any:
        others = [(prompt, text) for prompt, text in shots if prompt != item.prompt][: cfg.number]
        if len(others) < cfg.number:
            raise DataError(
                f"{path}: fewshot: found {len(others)} examples that are not the item {item.prompt[:60]!r} itself, "
                f"expected {cfg.number}: give more rows, or lower fewshot.count"
            )
        return replace(item, prompt=_joined(cfg, others) + item.prompt)

    return put


def _joined(cfg: Fewshot, shots: Sequence[tuple[str, str]]) -> str:
    head = f"{cfg.description}{cfg.separator}" if cfg.description else ""
    return head + "".join(f"{prompt}{text}{cfg.separator}" for prompt, text in shots)


def _shots(file: PromptFile, cfg: Fewshot, path: Path) -> Shots:
    """One example more than is shown: an item may be among them. Of those that ask the same, the first."""
    found: dict[str, str] = {}
    for where, row in _rows(file, cfg, path):
        try:
            item = work_of(file.kind).make(file, row, where)
        except EmptyColumn:
            continue
        found.setdefault(item.prompt, _completion(file, cfg, item, row, where))
        if len(found) > cfg.number:
            break
    return list(found.items())


def _rows(file: PromptFile, cfg: Fewshot, path: Path) -> Iterator[tuple[str, Row]]:
    if cfg.rows is not None:
        yield from ((f"{path}: fewshot.rows.{number}", row) for number, row in enumerate(cfg.rows))
        return
    subset, split = cfg.subset or file.subset, cfg.split or file.split
    revision = None if cfg.data else file.revision
    yield from rows_of(
        cfg.data or file.data, path.parent, subset=subset, split=split, arguments=file.arguments, revision=revision
    )


def _completion(file: PromptFile, cfg: Fewshot, item: Any, row: Row, where: str) -> str:
    if cfg.completion is not None:
        return filled(cfg.completion, row, where, "fewshot.completion")
    complete = work_of(file.kind).complete
    if complete is None:
        raise DataError(f"{where}: fewshot.completion is missing: a {file.kind} task has no right answer to show")
    return complete(file, item)


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


INSTALL = "pip install 'recover[eval]' (or: pip install lm-eval)"


def require_harness() -> None:
    """Raises RecipeError if the harness is not installed, before a model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"--lm-eval: lm-evaluation-harness is not installed: {INSTALL}")


def harness(model: Any, tokenizer: Any, names: Sequence[str], cfg: Measure, *, include: Path | None = None) -> Record:
    """{"results": as the harness gives them, "rows": for a table, "versions"} of its tasks, on a loaded model.

    Greedy or by likelihood as each task says; no chat template. `include`: a folder with further tasks.

    Raises:
        RecipeError: the harness is not installed, or has no task of a name.
        DataError: the data of a task cannot be had.
    """
    require_harness()
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    # Decorators of the harness hide what these two take.
    wrapper: Any = HFLM
    evaluate: Any = lm_eval.simple_evaluate
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise RecipeError(f"--lm-eval: the harness has no task {unknown[0]!r}: see `lm-eval ls tasks`")
    try:
        with evaluating(model):
            found = evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=cfg.batch_size),
                tasks=list(names),
                limit=cfg.limit,
                task_manager=manager,
                bootstrap_iters=0,
            )
    except (OSError, ValueError) as error:
        raise DataError(f"--lm-eval {','.join(names)}: {' '.join(str(error).split())[:400]}") from error
    return {
        "results": found["results"],
        "rows": _harness_rows(found),
        "versions": {"lm_eval": metadata.version("lm_eval"), "tasks": found.get("versions")},
    }


def _harness_rows(found: Record) -> list[tuple[str, list[Any]]]:
    """(task, [items, metric, value, interval, chance]) of each metric."""
    rows = []
    for name, result in found["results"].items():
        items = (found.get("n-samples") or {}).get(name, {}).get("effective")
        for key, value in result.items():
            metric, _, how = key.partition(",")
            if how and isinstance(value, int | float) and not metric.endswith("_stderr"):
                words = metric if how == "none" else f"{metric} ({how})"
                rows.append((name, [items, words, f"{value:.4g}", None, None]))
    return rows
