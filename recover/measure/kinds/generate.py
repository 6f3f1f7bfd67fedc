"""A generate task: is the answer right, how does the text look, how far is it the dense model's?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recover.base import console
from recover.base.errors import DataError
from recover.base.signals import TooSlow, within
from recover.config.tasks import GenerateFile, Reading, Row
from recover.maths.score import extract, interval95, is_right, mean
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.measure.texts import (
    OF_TEXT,
    against,
    mistake,
    mistakes,
    pass_at_k,
    prompt_size,
    sampling_of,
    shape,
    written,
)
from recover.text.generate import Generation
from recover.text.rows import column, filled

SECONDS = 10.0  # for a pattern on one text


@dataclass(frozen=True)
class Question:
    """One item of a generate task."""

    prompt: str
    targets: tuple[str, ...]


def _question(file: GenerateFile, row: Row, where: str) -> Question:
    found = column(row, file.target, where)
    targets = tuple(str(target).strip() for target in (found if isinstance(found, list) else [found]))
    if not targets or not all(targets):
        raise DataError(f"{where}: column '{file.target}' is empty, expected the right answer or a list of them")
    return Question(filled(file.prompt, row, where), targets)


def measure_generate(
    model: ModelUnderTest, file: GenerateFile, items: Sequence[Question], reference: Generations | None
) -> Measured:
    """The greedy texts judged, and those that are drawn, where any are.

    Raises:
        DataError: a prompt does not fit the model's context, or `reference` lacks items of this task.
    """
    dense_ids = _reference_ids(reference, file.name, len(items))
    prompts = [item.prompt for item in items]
    greedy = written(model, file, prompts, None)
    sampling = sampling_of(model, file)
    times = (file.samples or 1) if sampling else 0
    drawn = written(model, file, prompts * times, sampling) if sampling else []
    drawn_right = rights(file, [*items] * times, drawn)
    right = rights(file, items, greedy)
    samples = _samples(file, items, greedy, right)
    found = [
        mistake(each, sample["correct"], answered=bool((sample["answer"] or "").strip()))
        for each, sample in zip(greedy, samples, strict=True)
    ]
    record = {
        "kind": "generate",
        "items": len(items),
        "exact_match": mean(right),
        "interval95": interval95(right),
        "sampled_exact_match": mean(drawn_right) if drawn else None,
        "pass_at_k": pass_at_k(drawn_right, times) if file.samples else None,
        "also": {name: _figures(rights(reading, items, greedy)) for name, reading in file.also.items()},
        **shape(greedy, right),
        **against(dense_ids, [each.ids for each in greedy]),
        **mistakes(found, samples, OF_TEXT),
        "each": right,
        "samples": samples[: model.cfg.samples],
    }
    return Measured(record, greedy, sum(len(each.ids) for each in [*greedy, *drawn]))


def _reference_ids(reference: Generations | None, task: str, count: int) -> list[list[int]] | None:
    if reference is None:
        return None
    rows = reference.get(task, [])
    if len(rows) < count:
        raise DataError(f"task {task}: {count} items, but the dense model's texts hold {len(rows)}: measure it again")
    return [row["ids"] for row in rows[:count]]


def _figures(right: Sequence[float]) -> Record:
    return {"exact_match": mean(right), "interval95": interval95(right)}


def rights(reading: Reading, items: Sequence[Question], texts: Sequence[Generation]) -> list[float]:
    """1.0 where the answer is right, else 0.0. The pattern reads targets too, so that a worked solution can be one."""
    rights = []
    for item, each in zip(items, texts, strict=True):
        targets = [_read(target, reading) or target for target in item.targets]
        answer = _read(each.text, reading)
        rights.append(float(is_right(answer, targets, contains=reading.match == "contains", ignore=reading.ignore)))
    return rights


def _read(text: str, reading: Reading) -> str | None:
    """The answer in a text; none, with a warning, where the pattern needs longer than any text is worth."""
    try:
        with within(SECONDS):
            return extract(text, reading.answer, reading.take)
    except TooSlow as error:
        console.warn(f"answer {reading.answer!r}: {error} on a text of {len(text):,} characters, which counts as wrong")
        return None


def _samples(
    file: GenerateFile, items: Sequence[Question], texts: Sequence[Generation], right: Sequence[float]
) -> list[Record]:
    return [
        {
            "prompt": item.prompt,
            "text": each.text,
            "answer": _read(each.text, file),
            "expected": item.targets[0],
            "correct": bool(correct),
        }
        for item, each, correct in zip(items, texts, right, strict=True)
    ]


def _complete(_file: GenerateFile, item: Question) -> str:
    return f" {item.targets[0]}"


WORK = Work(_question, measure_generate, complete=_complete, size=prompt_size)
