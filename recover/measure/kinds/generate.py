"""A generate task: is the answer right, how does the text look, how far is it the dense model's?

How a written text looks, and what is wrong with it, is here for all kinds that write. A mistake of form is a text that
ends in a loop, does not end, holds no answer, or is code that does not parse; of several the first in this order
counts. What is wrong all the same is well formed: a mistake of content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from recover.base import console
from recover.base.errors import DataError
from recover.base.process import TooSlow, within
from recover.config.recipe import Measure, Sampling
from recover.config.tasks import CodeFile, GenerateFile, PromptFile, Reading, Row, TaskFile, WritingFile
from recover.maths import repeats
from recover.maths.repeats import loop_start
from recover.maths.score import extract, interval95, is_right, mean, pass_at, quantiles
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.text.generate import Generation
from recover.text.prompts import encode_prompt
from recover.text.rows import column, filled

FENCE = "```"  # opens a block of code in a text
LOOP, ENDLESS, NO_ANSWER, UNPARSED, CONTENT = "loop", "endless", "no_answer", "unparsed", "content"
OF_TEXT = (LOOP, ENDLESS, NO_ANSWER, CONTENT)
OF_CODE = (LOOP, ENDLESS, NO_ANSWER, UNPARSED, CONTENT)


def mistake(written: Generation, right: bool, *, answered: bool, parses: bool = True) -> str | None:
    """The kind of mistake that a text is, None where it is right."""
    if right:
        return None
    if loop_start(written.ids) is not None:
        return LOOP
    if not written.ended:
        return ENDLESS
    if not answered:
        return NO_ANSWER
    return CONTENT if parses else UNPARSED


def mistakes(found: Sequence[str | None], samples: Sequence[Record], kinds: Sequence[str]) -> Record:
    """`mistakes`: how many texts of each kind of mistake; `examples`: the first text of each, where there is one.

    `found`: the mistake of each text, as `mistake` gives it; `samples`: what is shown of each; `kinds`: of mistakes
    that these texts can have.
    """
    return {
        "mistakes": {each: list(found).count(each) for each in kinds},
        "examples": {each: samples[list(found).index(each)] for each in kinds if each in found},
    }


def longest_text(file: TaskFile, cfg: Measure) -> int:
    """Most tokens that are written after a prompt of the task; 0 where none are."""
    if not isinstance(file, WritingFile):
        return 0
    return min(file.max_new_tokens or cfg.max_new_tokens, cfg.max_new_tokens)


def prompt_size(tokenizer: PreTrainedTokenizerBase, file: PromptFile, item: Any) -> int:
    """Tokens of an item's prompt, as the model is asked it."""
    return len(encode_prompt(tokenizer, item.prompt, chat=file.wraps))


def written(
    model: ModelUnderTest, file: WritingFile, prompts: Sequence[str], sampling: Sampling | None
) -> list[Generation]:
    """One text per prompt, as the task file asks for it."""
    return model.generate(
        prompts,
        max_new_tokens=longest_text(file, model.cfg),
        sampling=sampling,
        chat=file.wraps,
        stop=file.stop,
        unless=FENCE if isinstance(file, CodeFile) else None,
        title=f"task {file.name}{', sampled' if sampling else ''}",
    )


def sampling_of(model: ModelUnderTest, file: WritingFile) -> Sampling | None:
    """How texts of this task are drawn; None: they are not."""
    own = (file.sampling or model.cfg.sampling or Sampling()) if file.samples else None
    return own or (model.cfg.sampling if isinstance(file, GenerateFile) else None)


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
    starts = [start for each in texts if (start := loop_start(each.ids)) is not None]
    return {
        "loop_rate": len(starts) / len(texts),
        "loop_start": quantiles(starts) if starts else None,
        "repetition": mean([repeats.repetition(each.ids) for each in texts]),
        "distinct_2": mean([repeats.distinct_n(each.ids, 2) for each in texts]),
        "longest_repeat": mean([repeats.longest_repeat(each.ids) for each in texts]),
        "ended": mean([each.ended for each in texts]),
        "length": mean([len(each.ids) for each in texts]),
        "truncated": sum(not each.ended for each in texts),
        "truncated_right": sum(bool(ok) and not each.ended for each, ok in zip(texts, right, strict=True)),
    }


def against(dense_ids: Sequence[list[int]] | None, written_ids: Sequence[list[int]]) -> Record:
    """How far texts are the dense model's, token by token.

    `first_divergence`: the token at which a text leaves dense's (quantiles over those that do), None if none does.
    `parting`: of all texts, as `repeats.parting` has it. `exact_text`: the share that never does.
    """
    if dense_ids is None:
        return {"agreement": None, "first_divergence": None, "parting": None, "exact_text": None}
    pairs = list(zip(dense_ids, written_ids, strict=True))
    parted = [repeats.first_divergence(dense, written) for dense, written in pairs]
    positions = [position for position in parted if position is not None]
    return {
        "agreement": mean([repeats.agreement(dense, written) for dense, written in pairs]),
        "first_divergence": quantiles(positions) if positions else None,
        "parting": repeats.parting(parted),
        "exact_text": mean([at is None for at in parted]),
    }


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
    dense_ids = reference_ids(reference, file.name, len(items))
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


def reference_ids(reference: Generations | None, task: str, count: int) -> list[list[int]] | None:
    """Tokens of the dense model's texts of a task; None without them. Raises DataError: there are too few."""
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
