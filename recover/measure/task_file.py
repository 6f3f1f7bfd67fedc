"""A task is one YAML file and its data: what is asked, what is right. All is checked before a model is loaded.

name: sums
kind: generate
data: ../data/sums.jsonl      # beside the YAML, or a hub data set
prompt: "{question}"          # columns in braces: {column}, {column[key]}
target: answer                # column: what is right, a text, a number, or a list of either
answer: '-?\\d[\\d,.]*'         # the last match in the model's text is its answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import DataError, RecipeError
from recover.config import yaml_values
from recover.config.messages import explain
from recover.config.named import is_task_name, read_sources, task_path
from recover.config.paths import ending
from recover.config.tasks import KINDS, Fewshot, PromptFile, Row, TaskFile, WritingFile
from recover.measure.model import work_of
from recover.text.named import NotHad, described, first_had
from recover.text.read import EmptyColumn
from recover.text.rows import column, filled, rows_of

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
            f"copy {path}, and write `data: FILE` in place of its `sources`, with the columns that this file has",
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
