"""The record of a generate task: is the answer right, how does the text look, how far is it the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recover.base.errors import DataError
from recover.config.recipe import Sampling
from recover.config.tasks import CodeFile, GenerateFile, Question, Reading
from recover.maths import collapse
from recover.maths.score import extract, interval95, is_right, mean, pass_at, quantiles
from recover.measure.mistakes import mistake, mistakes
from recover.measure.subject import Subject
from recover.text.generate import Generation

Record = dict[str, Any]
FENCE = "```"  # opens a block of code in a text
Generations = dict[str, list[dict[str, Any]]]  # task -> one {"ids", "text"} per item, greedy


def measure_writing(
    subject: Subject, file: GenerateFile, items: Sequence[Question], reference: Generations | None
) -> tuple[Record, list[Generation], int]:
    """(record, greedy texts, number of tokens written, sampled ones included).

    Raises:
        DataError: a prompt does not fit the model's context, or `reference` lacks items of this task.
    """
    dense_ids = _reference_ids(reference, file.name, len(items))
    prompts = [item.prompt for item in items]
    greedy = written(subject, file, prompts, None)
    sampling = sampling_of(subject, file)
    times = (file.samples or 1) if sampling else 0
    drawn = written(subject, file, prompts * times, sampling) if sampling else []
    drawn_right = _rights(file, [*items] * times, drawn)
    right = _rights(file, items, greedy)
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
        "also": {name: _figures(_rights(reading, items, greedy)) for name, reading in file.also.items()},
        **shape(greedy, right),
        **against(dense_ids, [each.ids for each in greedy]),
        **mistakes(file.kind, found, samples),
        "samples": samples[: subject.cfg.samples],
    }
    return record, greedy, sum(len(each.ids) for each in [*greedy, *drawn])


def sampling_of(subject: Subject, file: GenerateFile | CodeFile) -> Sampling | None:
    """How texts of this task are drawn; None: they are not."""
    own = (file.sampling or subject.cfg.sampling or Sampling()) if file.samples else None
    return own or (subject.cfg.sampling if isinstance(file, GenerateFile) else None)


def pass_at_k(right: Sequence[float], times: int) -> Record:
    """k -> {value, interval95} for k = 1, 2, 4, ... and `times`: pass@k over prompts.

    `right`: of each text drawn, all prompts once, then all of them again, `times` times.
    """
    counts = [int(sum(right[at :: len(right) // times])) for at in range(len(right) // times)]
    found = {}
    for k in sorted({times, *(2**power for power in range(times.bit_length()))}):
        values = [pass_at(k, count, times) for count in counts]
        found[str(k)] = {"value": mean(values), "interval95": interval95(values)}
    return found


def shape(texts: Sequence[Generation], right: Sequence[float]) -> Record:
    """How texts look, whatever they say: loops, length in tokens, whether they end.

    `truncated`: how many do not; `truncated_right`: how many of those count as right all the same. `loop_rate`: share
    of texts that end in a loop, and `loop_start`: the token at which it begins (quantiles), None if none does.
    """
    starts = [start for each in texts if (start := collapse.loop_start(each.ids)) is not None]
    return {
        "loop_rate": len(starts) / len(texts),
        "loop_start": quantiles(starts) if starts else None,
        "repetition": mean([collapse.repetition(each.ids) for each in texts]),
        "distinct_2": mean([collapse.distinct_n(each.ids, 2) for each in texts]),
        "longest_repeat": mean([collapse.longest_repeat(each.ids) for each in texts]),
        "ended": mean([each.ended for each in texts]),
        "length": mean([len(each.ids) for each in texts]),
        "truncated": sum(not each.ended for each in texts),
        "truncated_right": sum(bool(ok) and not each.ended for each, ok in zip(texts, right, strict=True)),
    }


def against(dense_ids: Sequence[list[int]] | None, written_ids: Sequence[list[int]]) -> Record:
    """How far texts are the dense model's, token by token; one that never parts from it parts at its end."""
    if dense_ids is None:
        return {"agreement": None, "first_divergence": None, "exact_text": None}
    pairs = list(zip(dense_ids, written_ids, strict=True))
    parted = [collapse.first_divergence(dense, written) for dense, written in pairs]
    positions = [len(written) if at is None else at for at, written in zip(parted, written_ids, strict=True)]
    return {
        "agreement": mean([collapse.agreement(dense, written) for dense, written in pairs]),
        "first_divergence": quantiles(positions),
        "exact_text": mean([at is None for at in parted]),
    }


def _reference_ids(reference: Generations | None, task: str, count: int) -> list[list[int]] | None:
    if reference is None:
        return None
    rows = reference.get(task, [])
    if len(rows) < count:
        raise DataError(f"task {task}: {count} items, but the dense model's texts hold {len(rows)}: measure it again")
    return [row["ids"] for row in rows[:count]]


def written(
    subject: Subject, file: GenerateFile | CodeFile, prompts: Sequence[str], sampling: Sampling | None
) -> list[Generation]:
    """One text per prompt, as the task file asks for it."""
    return subject.writes(
        prompts,
        max_new_tokens=min(file.max_new_tokens or subject.cfg.max_new_tokens, subject.cfg.max_new_tokens),
        sampling=sampling,
        chat=file.wraps,
        stop=file.stop,
        unless=FENCE if isinstance(file, CodeFile) else None,
        title=f"task {file.name}{', sampled' if sampling else ''}",
    )


def _figures(right: Sequence[float]) -> Record:
    return {"exact_match": mean(right), "interval95": interval95(right)}


def _rights(reading: Reading, items: Sequence[Question], written: Sequence[Generation]) -> list[float]:
    """1.0 where the answer is right, else 0.0. The pattern reads targets too, so that a worked solution can be one."""
    rights = []
    for item, each in zip(items, written, strict=True):
        targets = [extract(target, reading.answer, reading.take) or target for target in item.targets]
        answer = extract(each.text, reading.answer, reading.take)
        rights.append(float(is_right(answer, targets, contains=reading.match == "contains", ignore=reading.ignore)))
    return rights


def _samples(
    file: GenerateFile, items: Sequence[Question], written: Sequence[Generation], right: Sequence[float]
) -> list[Record]:
    return [
        {
            "prompt": item.prompt,
            "text": each.text,
            "answer": extract(each.text, file.answer, file.take),
            "expected": item.targets[0],
            "correct": bool(correct),
        }
        for item, each, correct in zip(items, written, right, strict=True)
    ]
