"""A choice task: which of the given options the model expects most, nothing of its own written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from recover.base import console
from recover.base.errors import DataError
from recover.config.tasks import ChoiceFile, Row
from recover.maths.score import interval95, mean
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.text.likelihood import option_rows
from recover.text.read import listed
from recover.text.rows import column, filled


@dataclass(frozen=True)
class Choice:
    """One item of a choice task; `label` is the index of the right option."""

    prompt: str
    options: tuple[str, ...]
    label: int


def _choice(file: ChoiceFile, row: Row, where: str) -> Choice:
    if isinstance(file.options, str):
        options, name = listed(column(row, file.options, where)), file.options
    else:
        options, name = [column(row, each, where) for each in file.options], ", ".join(file.options)
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(each, str) and each for each in options):
        raise DataError(f"{where}: column '{name}': found {options!r}, expected a list of two or more texts")
    label = _label(file, row, where)
    if isinstance(label, bool) or not str(label).isdecimal() or int(label) >= len(options):
        raise DataError(
            f"{where}: column '{file.target}': found {label!r}, expected the index of the right option, "
            f"0 to {len(options) - 1}"
        )
    return Choice(filled(file.prompt, row, where), tuple(options), int(label))


def _label(file: ChoiceFile, row: Row, where: str) -> Any:
    """The target, or its place among `labels`."""
    found = column(row, file.target, where)
    if file.labels is None:
        return found
    labels = listed(column(row, file.labels, where))
    if not isinstance(labels, list) or found not in labels:
        raise DataError(f"{where}: column '{file.target}': found {found!r}, expected one of {labels!r}")
    return labels.index(found)


def measure_choice(
    model: ModelUnderTest, file: ChoiceFile, items: Sequence[Choice], _reference: Generations | None = None
) -> Measured:
    """Record of a choice task, by the sum of log p over each option's full text; normalised = per byte of the option.

    An option is chosen only if it beats every other one: a model for which all options are equal is never right.

    Raises:
        DataError: an item does not fit the model's context.
    """
    scores = _option_scores(model, file, items)
    per_byte = [
        [score / len(option.encode()) for score, option in zip(row, item.options, strict=True)]
        for row, item in zip(scores, items, strict=True)
    ]
    if twice := sum(item.options.count(item.options[item.label]) > 1 for item in items):
        many = f"{twice} of {len(items)} items"
        console.warn(f"task {file.name}: {many} hold the right option twice, and no model can be right there")
    margins = [margin(row, item.label) for row, item in zip(scores, items, strict=True)]
    right = [float(each > 0) for each in margins]
    record = {
        "kind": "choice",
        "items": len(items),
        "accuracy": mean(right),
        "interval95": interval95(right),
        "accuracy_normalised": mean([margin(row, item.label) > 0 for row, item in zip(per_byte, items, strict=True)]),
        "chance": mean([1 / len(item.options) for item in items]),
        "margin": mean(margins),
        "each": right,
        "samples": _samples(items, scores)[: model.cfg.samples],
    }
    return Measured(record)


def margin(scores: Sequence[float], label: int) -> float:
    """Nats by which the right option beats the best wrong one; negative or 0 if it does not."""
    return scores[label] - max(score for option, score in enumerate(scores) if option != label)


def _option_scores(model: ModelUnderTest, file: ChoiceFile, items: Sequence[Choice]) -> list[list[float]]:
    """Per item one log-likelihood per option, in nats."""
    groups = [
        option_rows(model.tokenizer, item.prompt, item.options, separator=file.separator, chat=file.wraps)
        for item in items
    ]
    return model.score_options(groups, title=f"task {file.name}")


def _samples(items: Sequence[Choice], scores: Sequence[Sequence[float]]) -> list[Record]:
    return [
        {
            "prompt": item.prompt,
            "text": item.options[row.index(max(row))],
            "expected": item.options[item.label],
            "correct": margin(row, item.label) > 0,
        }
        for item, row in zip(items, scores, strict=True)
    ]


def _complete(file: ChoiceFile, item: Choice) -> str:
    return file.separator + item.options[item.label]


def _size(tokenizer: PreTrainedTokenizerBase, file: ChoiceFile, item: Choice) -> int:
    rows = option_rows(tokenizer, item.prompt, item.options, separator=file.separator, chat=file.wraps)
    return max(len(row.ids) for row in rows)


WORK = Work(_choice, measure_choice, complete=_complete, size=_size)
