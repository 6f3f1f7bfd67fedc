"""A task is one YAML file and its data: what is asked, what is right. All is checked before a model is loaded.

name: sums
kind: generate
data: ../data/sums.jsonl      # beside the YAML, or a hub data set
prompt: "{question}"          # columns in braces
target: answer                # column: what is right, a text, a number, or a list of either
answer: '-?\\d[\\d,.]*'         # the last match in the model's text is its answer
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from recover import strict_yaml
from recover.errors import DataError, RecipeError
from recover.json_lines import json_lines
from recover.problems import explain
from recover.recipe import Leaf, embedded

Row = dict[str, Any]


class TaskFile(Leaf):
    """What every kind of task names."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: str
    subset: str | None = None
    split: str = "test"
    limit: int | None = Field(None, ge=1, description="items used, the first ones; default: all")


class PromptFile(TaskFile):
    """A task that asks with a prompt, `{column}`s filled in."""

    prompt: str
    chat: Literal["auto", "never"] = Field("auto", description="auto: the chat template, if the tokenizer has one")

    @property
    def wraps(self) -> bool | None:
        """As `chat` arguments take it: None = if there is a template."""
        return None if self.chat == "auto" else False


class GenerateFile(PromptFile):
    """The model writes; its answer is the last match of `answer` (default: all of the text)."""

    kind: Literal["generate"]
    target: str = "answer"
    answer: str | None = None
    match: Literal["exact", "contains"] = "exact"
    max_new_tokens: int | None = Field(None, ge=1, description="default, and at most: the recipe's")

    @field_validator("answer")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class ChoiceFile(PromptFile):
    """The model's log-likelihood chooses among `options` (a column of lists); `target` is the right one's index."""

    kind: Literal["choice"]
    options: str = "options"
    target: str = "label"
    separator: str = Field(" ", description="between prompt and option, in plain text")


class PerplexityFile(TaskFile):
    """Nats per token of each `text`, of its first `length` tokens."""

    kind: Literal["perplexity"]
    text: str = "text"
    length: int = Field(512, ge=2)


@dataclass(frozen=True)
class Question:
    """One item of a generate task."""

    prompt: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """One item of a choice task; `label` is the index of the right option."""

    prompt: str
    options: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """A task file and its items: `Question`s, `Choice`s, or texts, by the file's kind."""

    file: GenerateFile | ChoiceFile | PerplexityFile
    items: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def kind(self) -> str:
        return self.file.kind


_FILES: dict[str, type[GenerateFile | ChoiceFile | PerplexityFile]] = {
    "generate": GenerateFile,
    "choice": ChoiceFile,
    "perplexity": PerplexityFile,
}


def load_task(source: str) -> Task:
    """Read a task and all its items from a YAML file, or `embedded:NAME`.

    Raises:
        RecipeError: there is no such file, or one of its fields is wrong.
        DataError: its data is not there, is empty, or has a row of the wrong shape; names file and line.
    """
    name = source.removeprefix("embedded:")
    path = Path(source) if name == source else embedded(name)
    file = _read_file(path)
    items = []
    for where, row in _rows(file, path.parent):
        items.append(_ITEMS[file.kind](file, row, where))
        if len(items) == file.limit:
            break
    if not items:
        raise DataError(f"{path}: its data {file.data} holds no rows, expected at least one")
    return Task(file, tuple(items))


def _read_file(path: Path) -> GenerateFile | ChoiceFile | PerplexityFile:
    tree = strict_yaml.read(path)
    model = _FILES.get(str(tree.get("kind")))
    if model is None:
        raise RecipeError(f"{path}: kind: found {tree.get('kind')!r}, expected one of {', '.join(_FILES)}")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, model, str(path), {}))) from None


def _rows(file: TaskFile, folder: Path) -> Iterator[tuple[str, Row]]:
    """("file:line" or "data set:row", row) of local JSON lines or of a hub data set."""
    if not file.data.endswith((".jsonl", ".json")):
        yield from _hub_rows(file)
        return
    path = folder / file.data
    try:
        for where, row in json_lines(path):
            if not isinstance(row, dict):
                raise DataError(f"{where}: found {type(row).__name__}, expected one JSON object a line")
            yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the items of task {file.name} cannot be read: {error}") from None


def _hub_rows(file: TaskFile) -> Iterator[tuple[str, Row]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = datasets.load_dataset(file.data, file.subset, split=file.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"task {file.name}: {file.data!r} is neither a .jsonl beside the task nor a data set that loads, "
            f"split {file.split!r}: {error}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{file.data}, row {number}", dict(row)


def _column(row: Row, name: str, where: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{where}: no column '{name}', found {', '.join(row) or 'nothing'}")
    return row[name]


def _prompt(template: str, row: Row, where: str) -> str:
    try:
        return template.format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{where}: prompt {template!r} asks for {error}, found columns {', '.join(row)}") from None


def _question(file: GenerateFile, row: Row, where: str) -> Question:
    found = _column(row, file.target, where)
    targets = tuple(str(target).strip() for target in (found if isinstance(found, list) else [found]))
    if not targets or not all(targets):
        raise DataError(f"{where}: column '{file.target}' is empty, expected the right answer or a list of them")
    return Question(_prompt(file.prompt, row, where), targets)


def _choice(file: ChoiceFile, row: Row, where: str) -> Choice:
    options, label = _column(row, file.options, where), _column(row, file.target, where)
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) and each for each in options):
        raise DataError(f"{where}: column '{file.options}': found {options!r}, expected a list of two or more texts")
    if isinstance(label, bool) or not str(label).isdecimal() or int(label) >= len(options):
        raise DataError(
            f"{where}: column '{file.target}': found {label!r}, expected the index of the right option, "
            f"0 to {len(options) - 1}"
        )
    return Choice(_prompt(file.prompt, row, where), tuple(options), int(label))


def _text(file: PerplexityFile, row: Row, where: str) -> str:
    text = _column(row, file.text, where)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: column '{file.text}': found {text!r}, expected a text")
    return text


_ITEMS: dict[str, Callable[..., Any]] = {"generate": _question, "choice": _choice, "perplexity": _text}
