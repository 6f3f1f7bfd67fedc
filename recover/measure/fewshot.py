"""Few-shot prompts: worked examples before the question, the same ones for every item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recover.base.errors import DataError
from recover.config.tasks import Choice, ChoiceFile, CodeFile, Fewshot, GenerateFile, Question, Row
from recover.measure.task_items import MAKERS
from recover.measure.task_rows import filled, rows_of

Asking = GenerateFile | ChoiceFile | CodeFile
Shots = list[tuple[str, str]]  # (prompt, what follows it)


def shown_before(file: Asking, path: Path) -> Callable[[Any], Any]:
    """What puts the examples of a task before the prompt of an item; without few-shot, what leaves it as it is.

    Raises:
        DataError: there are too few examples, or a row makes none; names file and line.
    """
    leaf = file.fewshot
    if leaf is None:
        return lambda item: item
    shots = _shots(file, leaf, path)

    def put(item: Any) -> Any:
        others = [(prompt, text) for prompt, text in shots if prompt != item.prompt][: leaf.number]
        if len(others) < leaf.number:
            raise DataError(
                f"{path}: fewshot: found {len(others)} examples that are not the item {item.prompt[:60]!r} itself, "
                f"expected {leaf.number}: give more rows, or lower fewshot.count"
            )
        return replace(item, prompt=_joined(leaf, others) + item.prompt)

    return put


def _joined(leaf: Fewshot, shots: Sequence[tuple[str, str]]) -> str:
    head = f"{leaf.description}{leaf.separator}" if leaf.description else ""
    return head + "".join(f"{prompt}{text}{leaf.separator}" for prompt, text in shots)


def _shots(file: Asking, leaf: Fewshot, path: Path) -> Shots:
    """One example more than is shown: an item may be among them. Of those that ask the same, the first."""
    found: dict[str, str] = {}
    for where, row in _rows(file, leaf, path):
        item = MAKERS[file.kind](file, row, where)
        found.setdefault(item.prompt, _completion(file, leaf, item, row, where))
        if len(found) > leaf.number:
            break
    return list(found.items())


def _rows(file: Asking, leaf: Fewshot, path: Path) -> Iterator[tuple[str, Row]]:
    if leaf.rows is not None:
        yield from ((f"{path}: fewshot.rows.{number}", row) for number, row in enumerate(leaf.rows))
        return
    subset, split = leaf.subset or file.subset, leaf.split or file.split
    yield from rows_of(leaf.data or file.data, path.parent, subset=subset, split=split, arguments=file.arguments)


def _completion(file: Asking, leaf: Fewshot, item: Any, row: Row, where: str) -> str:
    if leaf.completion is not None:
        return filled(leaf.completion, row, where, "fewshot.completion")
    if isinstance(file, ChoiceFile) and isinstance(item, Choice):
        return file.separator + item.options[item.label]
    assert isinstance(item, Question)
    return f" {item.targets[0]}"
