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


def _shots(file: Asking, cfg: Fewshot, path: Path) -> Shots:
    """One example more than is shown: an item may be among them. Of those that ask the same, the first."""
    found: dict[str, str] = {}
    for where, row in _rows(file, cfg, path):
        item = MAKERS[file.kind](file, row, where)
        found.setdefault(item.prompt, _completion(file, cfg, item, row, where))
        if len(found) > cfg.number:
            break
    return list(found.items())


def _rows(file: Asking, cfg: Fewshot, path: Path) -> Iterator[tuple[str, Row]]:
    if cfg.rows is not None:
        yield from ((f"{path}: fewshot.rows.{number}", row) for number, row in enumerate(cfg.rows))
        return
    subset, split = cfg.subset or file.subset, cfg.split or file.split
    yield from rows_of(cfg.data or file.data, path.parent, subset=subset, split=split, arguments=file.arguments)


def _completion(file: Asking, cfg: Fewshot, item: Any, row: Row, where: str) -> str:
    if cfg.completion is not None:
        return filled(cfg.completion, row, where, "fewshot.completion")
    if isinstance(file, ChoiceFile) and isinstance(item, Choice):
        return file.separator + item.options[item.label]
    assert isinstance(item, Question)
    return f" {item.targets[0]}"
