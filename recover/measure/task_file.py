"""A task is one YAML file and its data: what is asked, what is right. All is checked before a model is loaded.

name: sums
kind: generate
data: ../data/sums.jsonl      # beside the YAML, or a hub data set
prompt: "{question}"          # columns in braces: {column}, {column[key]}
target: answer                # column: what is right, a text, a number, or a list of either
answer: '-?\\d[\\d,.]*'         # the last match in the model's text is its answer
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recover.base.errors import DataError, RecipeError
from recover.config import yaml_values
from recover.config.messages import explain
from recover.config.recipe import local_path
from recover.config.tasks import FILES, AnyFile, PerplexityFile, RetrievalFile, WritingFile
from recover.measure.fewshot import shown_before
from recover.measure.task_items import MAKERS, among_all
from recover.measure.task_rows import column, rows_of

NO_TASK = {".jsonl", ".json", ".parquet", ".gz", ".arrow"}


@dataclass(frozen=True)
class Task:
    """A task file and its items: `Question`s, `Choice`s, `Problem`s, `Search`es, or texts, by the file's kind."""

    file: AnyFile
    items: tuple[Any, ...]

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
    """Read a task and all its items from a YAML file, or `embedded:NAME`.

    Raises:
        RecipeError: there is no such file, or one of its fields is wrong.
        DataError: its data is not there, is empty, or has a row of the wrong shape; names file and line.
    """
    path = local_path(source)
    file = _read_file(path)
    put = None if isinstance(file, RetrievalFile | PerplexityFile) else shown_before(file, path)
    items, seen = [], set()
    rows = rows_of(file.data, path.parent, subset=file.subset, split=file.split, arguments=file.arguments)
    for where, row in rows:
        if file.once is not None:
            name = str(column(row, file.once, where))
            if name in seen:
                continue
            seen.add(name)
        item = MAKERS[file.kind](file, row, where)
        items.append(put(item) if put else item)
        if len(items) == file.limit:
            break
    if not items:
        raise DataError(f"{path}: its data {file.data} holds no rows, expected at least one")
    if isinstance(file, RetrievalFile) and file.candidates == "all":
        items = among_all(items)
    return Task(file, tuple(items))


def _read_file(path: Path) -> AnyFile:
    if path.suffix in NO_TASK:
        raise RecipeError(
            f"{path}: data, not a task; expected a YAML file that names it as `data: {path.name}` and says what is "
            "asked of it (docs/recipe.md, Tasks)"
        )
    tree = yaml_values.read(path)
    model = FILES.get(str(tree.get("kind")))
    if model is None:
        found = f"found {tree['kind']!r}" if "kind" in tree else "is missing"
        raise RecipeError(f"{path}: kind: {found}, expected one of {', '.join(FILES)}")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, model, str(path), {}))) from None
