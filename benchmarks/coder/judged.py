"""One run's texts, item by item: which are right, what they answer, how long they stay the dense model's.

Verdicts are those of measure.json where `measure.samples` covers all items. Answers of `generate` tasks are read off
the texts once more otherwise; programs are never run again, so a code task then has no verdicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows import VIEWS

from recover.base.artifacts import loads
from recover.config.tasks import GenerateFile
from recover.config.yaml_values import read as read_yaml
from recover.maths.repeats import first_divergence
from recover.maths.score import extract, is_right, normal
from recover.measure.tasks import Task, load_task

TASKS = Path(__file__).resolve().parent / "tasks"
Row = dict[str, Any]


@dataclass
class Judged:
    """`right` and `answers`: view -> task -> one for each item; `ids`: the same of texts, in tokens."""

    row: Row
    right: dict[str, dict[str, list[bool]]] = field(default_factory=dict)
    answers: dict[str, dict[str, list[str | None]]] = field(default_factory=dict)
    ids: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    drift: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's."""
        return self.row["run"]

    def both(self, task: str, view: str = "recovered") -> tuple[list[bool], list[bool]] | None:
        """(dense, this view) of the same items, None where one of them has no verdicts."""
        dense, other = (self.right.get(name, {}).get(task) for name in ("dense", view))
        return None if dense is None or other is None or len(dense) != len(other) else (dense, other)

    @property
    def writing(self) -> list[str]:
        """The tasks that both views wrote for."""
        return [task for task in self.ids.get("dense", {}) if task in self.ids.get("recovered", {})]

    def parts_at(self, task: str) -> list[tuple[int, bool]]:
        """Of each text (tokens until it differs from dense's, whether it never does)."""
        found = []
        for dense, own in zip(self.ids["dense"][task], self.ids["recovered"][task], strict=True):
            at = first_divergence(dense, own)
            found.append((len(own) if at is None else at, at is None))
        return found

    def length(self, view: str) -> float | None:
        """Mean tokens of a text, tasks alike."""
        means = [sum(map(len, self.ids[view][task])) / len(self.ids[view][task]) for task in self.writing]
        return sum(means) / len(means) if means else None


def judged(folder: Path, row: Row) -> Judged:
    """What lies in a run's folder; views that were not measured, or not brought along, are left out."""
    found = Judged(row)
    tasks = _tasks(folder)
    for view, part in VIEWS.items():
        measured, texts = (_json(folder / part / name) for name in ("measure.json", "generations.json"))
        if measured is None:
            continue
        texts = texts or {}
        found.ids[view] = {name: [each["ids"] for each in written] for name, written in texts.items()}
        found.right[view], found.answers[view] = {}, {}
        for name, record in measured["tasks"].items():
            right, answers = _verdicts(record, texts.get(name), tasks.get(name))
            if right is not None:
                found.right[view][name] = right
            if answers is not None:
                found.answers[view][name] = answers
    probe = _json(folder / "after" / "probe.json")
    if probe and probe.get("final"):
        final = probe["final"]
        found.drift = {f"kl {name}": final["kl"][name] for name in ("mean", "p90", "p99")}
        found.drift["top1"] = final["top1"]["mean"]
    return found


def _verdicts(record: Row, written: list[Row] | None, task: Task | None) -> tuple[Any, Any]:
    samples = record.get("samples") or []
    told = [bool(each["correct"]) for each in samples] if samples and len(samples) == record["items"] else None
    if written is None or task is None:
        return told, None
    file = task.file
    assert isinstance(file, GenerateFile)
    answers = [extract(each["text"], file.answer, file.take) for each in written]
    right = told or [
        is_right(
            answer,
            [extract(target, file.answer, file.take) or target for target in item.targets],
            contains=file.match == "contains",
            ignore=file.ignore,
        )
        for answer, item in zip(answers, task.items, strict=False)
    ]
    return right, _plain(answers)


def _plain(answers: list[str | None]) -> list[str | None]:
    return [None if answer is None else normal(answer) for answer in answers]


def _tasks(folder: Path) -> dict[str, Task]:
    """The run's generate tasks by name; a file of another machine is looked up in tasks/ by its own name."""
    recipe = read_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").exists() else {}
    found = {}
    for path in recipe.get("measure", {}).get("tasks", ()):
        here = path if path.startswith("embedded:") or Path(path).exists() else str(TASKS / Path(path).name)
        task = load_task(here)
        if isinstance(task.file, GenerateFile):
            found[task.name] = task
    return found


def _json(path: Path) -> Any:
    return loads(path.read_bytes()) if path.exists() else None
