"""A code task: the model writes a program, which is run behind a wall, and its tests in another process than it.

What stands in the task's `program` up to the line of `{text}` is run as the program, what follows as its tests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recover.base import dist
from recover.config.tasks import CodeFile, Row
from recover.maths.score import interval95, mean
from recover.measure.kinds.generate import (
    OF_CODE,
    mistake,
    mistakes,
    pass_at_k,
    prompt_size,
    sampling_of,
    shape,
    written,
)
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.measure.sandbox import UNCONFINED, WALLED, Outcome, Program, run_programs
from recover.text.generate import Generation
from recover.text.rows import filled

FIELDS = re.compile(r"\{\{|\}\}|\{text\}")  # of a task's program, braces that are written twice too
FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One item of a code task; `columns` fill in the program."""

    prompt: str
    columns: Row


def _problem(file: CodeFile, row: Row, where: str) -> Problem:
    problem = Problem(filled(file.prompt, row, where), row)
    program(file, problem, "", where)
    return problem


def program(file: CodeFile, problem: Problem, text: str, where: str = "") -> Program:
    """The program of `text`, the code that a model wrote, and its tests."""
    columns = {**_joined(problem.columns), "text": text}
    return Program(*(filled(part, columns, where, "program") if part else "" for part in parts_of(file.program)))


def parts_of(template: str) -> tuple[str, str]:
    """(the program, its tests): the tests begin on the line after `{text}`; without `{text}` all is tests."""
    ends = [match.end() for match in FIELDS.finditer(template) if match[0] == "{text}"]
    if not ends:
        return "", template
    line = template.find("\n", ends[-1]) + 1 or len(template)
    return template[:line], template[line:]


def _joined(value: Any) -> Any:
    """Lists as text, one element a line, in whatever they lie."""
    if isinstance(value, dict):
        return {name: _joined(each) for name, each in value.items()}
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def measure_code(
    model: ModelUnderTest, file: CodeFile, items: Sequence[Problem], _reference: Generations | None
) -> Measured:
    """The programs, run.

    `pass_at_1`: share of problems whose one greedy program passes; `pass_at_k`: of the task's `samples`, drawn.

    Whether running such code is allowed at all is asked before (`check_allowed`).
    """
    greedy = written(model, file, [item.prompt for item in items], None)
    codes = [code_of(each.text) for each in greedy]
    confined = model.cfg.allow_code_execution != "unconfined"
    programs = [program(file, item, code) for item, code in zip(items, codes, strict=True)]
    outcomes = _run(programs, file.seconds, confined)
    passed = [float(each.passed) for each in outcomes]
    samples = _samples(items, greedy, outcomes)
    found = [
        mistake(each, outcome.passed, answered=bool(code.strip()), parses=outcome.parsed)
        for each, code, outcome in zip(greedy, codes, outcomes, strict=True)
    ]
    times, prompts = file.samples or 0, [item.prompt for item in items]
    drawn = written(model, file, prompts * times, sampling_of(model, file)) if times else []
    record = {
        "kind": "code",
        "items": len(items),
        "pass_at_1": mean(passed),
        "interval95": interval95(passed),
        "pass_at_k": pass_at_k(_passed(file, [*items] * times, drawn, confined), times) if times else None,
        "isolation": WALLED if confined else UNCONFINED,
        "each": passed,
        **shape(greedy, passed),
        **mistakes(found, samples, OF_CODE),
        "samples": samples[: model.cfg.samples],
    }
    return Measured(record, greedy, sum(len(each.ids) for each in [*greedy, *drawn]))


def _passed(file: CodeFile, items: Sequence[Problem], drawn: Sequence[Generation], confined: bool) -> list[float]:
    """1.0 where the drawn program passes, else 0.0."""
    programs = [program(file, item, code_of(each.text)) for item, each in zip(items, drawn, strict=True)]
    return [float(each.passed) for each in _run(programs, file.seconds, confined)]


def code_of(text: str) -> str:
    """The first fenced block of a text, else all of it: where a stop ends it, nothing follows."""
    fenced = FENCED.search(text)
    return fenced.group(1) if fenced else text


def _run(programs: Sequence[Program], seconds: float, confined: bool) -> list[Outcome]:
    """The outcomes, the same on every process; each runs its share on its share of the cores."""
    workers = max(1, (os.cpu_count() or 1) // dist.local_world_size())
    return dist.over(programs, lambda mine: run_programs(mine, workers=workers, seconds=seconds, confined=confined))


def _samples(items: Sequence[Problem], greedy: Sequence[Generation], outcomes: Sequence[Outcome]) -> list[Record]:
    return [
        {"prompt": item.prompt, "text": each.text, "answer": outcome.reason or "passes", "correct": outcome.passed}
        for item, each, outcome in zip(items, greedy, outcomes, strict=True)
    ]


WORK = Work(_problem, measure_code, size=prompt_size)
