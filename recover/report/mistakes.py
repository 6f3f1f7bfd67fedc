"""What is wrong with what the models write: how many texts of which kind of mistake, and one of each to look at."""

from __future__ import annotations

from recover.report import words
from recover.report.data import Example, MeasureRecord, Mistakes, Model, PageData, Records, Task
from recover.report.tables import Table

# kind of mistake in a record -> (column, heading of its example)
NAMES = {
    "loop": ("loop", "ends in a loop"),
    "endless": ("no end", "does not end"),
    "no_answer": ("no answer", "holds no answer"),
    "unparsed": ("does not parse", "does not parse"),
    "content": ("well formed, wrong", "is well formed and wrong"),
}
FORM = ("loop", "endless", "no_answer", "unparsed")


def counted(records: Records) -> list[Mistakes]:
    """One row a task that writes and model: {task, model, items, right, mistakes: {kind: n}, loop_rate, loop_start}."""
    rows = []
    for name, model, task in _writing(records):
        counts = {kind: n for kind in NAMES if isinstance(n := (task.get("mistakes") or {}).get(kind), int)}
        if not counts:
            continue
        rows.append(
            {
                "task": name,
                "model": model,
                "items": task["items"],
                "right": task["items"] - sum(counts.values()),
                "mistakes": counts,
                "loop_rate": words.finite(task.get("loop_rate")),
                "loop_start": task.get("loop_start"),
            }
        )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: tasks.index(row["task"]))  # models stay in order


def examples(records: Records) -> list[Example]:
    """One text of each kind of mistake of each model: {task, model, mistake, prompt, expected, text}."""
    found = []
    for name, model, task in _writing(records):
        for kind in NAMES:
            sample = (task.get("examples") or {}).get(kind)
            if sample is None:
                continue
            expected, answer = sample.get("expected"), sample.get("answer")
            found.append(
                {
                    "task": name,
                    "model": model,
                    "mistake": kind,
                    "prompt": words.clean(sample.get("prompt", "")),
                    "text": words.beginning(words.clean(sample.get("text") or "")),
                    "expected": None if expected is None else words.clean(expected),
                    "answer": None if answer is None else words.clean(answer),
                }
            )
    return found


def _writing(records: Records) -> list[tuple[str, Model, Task]]:
    """(name, model, record) of each task whose texts are told apart by their mistakes, whatever its kind."""
    return [
        (name, model, task)
        for model, record in records.items()
        for name, task in ((record or {}).get("tasks") or {}).items()
        if task.get("mistakes") is not None
    ]


def loop_rate(measured: MeasureRecord) -> float | None:
    """Mean over the tasks that write, each weighing the same; None where no record has it."""
    tasks = (measured.get("tasks") or {}).values()
    rates = [rate for task in tasks if (rate := words.finite(task.get("loop_rate"))) is not None]
    return sum(rates) / len(rates) if rates else None


def shares(measured: MeasureRecord) -> tuple[float, float] | None:
    """Of all texts of a record, the share that is a mistake of form, and the share well formed and wrong.

    The mean over tasks, each weighing the same; None where no record tells them apart.
    """
    tasks = (measured.get("tasks") or {}).values()
    counts = [(found, task["items"]) for task in tasks if (found := task.get("mistakes")) and task["items"]]
    if not counts:
        return None
    form = [sum(found.get(kind, 0) for kind in FORM) / items for found, items in counts]
    content = [found.get("content", 0) / items for found, items in counts]
    return sum(form) / len(counts), sum(content) / len(counts)


def loops_begin(measured: MeasureRecord) -> float | None:
    """The token before which half of the loops begin, the mean over tasks with loops; None without any."""
    starts = [(task.get("loop_start") or {}).get("p50") for task in (measured.get("tasks") or {}).values()]
    known = [start for start in starts if start is not None]
    return sum(known) / len(known) if known else None


def table(data: PageData) -> Table | None:
    """Mistakes of form beside mistakes of content, each text counted once."""
    rows = data["mistakes"]
    if not rows:
        return None
    kinds = [kind for kind in NAMES if any(kind in row["mistakes"] for row in rows)]
    cells = [
        (
            row["task"],
            row["model"],
            words.count(row["items"]),
            words.count(row["right"]),
            *("–" if kind not in row["mistakes"] else words.count(row["mistakes"][kind]) for kind in kinds),
            words.percent(row["loop_rate"], 1),
            words.number((row["loop_start"] or {}).get("p50")) if row["loop_start"] else "–",
        )
        for row in rows
    ]
    caption = (
        "Each greedy text is counted once: as right, by its first mistake of form, or as well formed and wrong. If "
        "form came back and content did not, look at the text that training used. Loop rate: share of all texts that "
        "end in a run of tokens repeated at least three times over at least 24 tokens. Half of these loops begin "
        "before the token in the last column."
    )
    columns = ("task", "model", "items", "right", *(NAMES[kind][0] for kind in kinds), "loop rate", "loops begin at")
    return Table("Mistakes of form and of content", caption, tuple((each, "") for each in columns), cells, numbers=2)
