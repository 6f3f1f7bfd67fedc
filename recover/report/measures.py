"""Three columns - dense, pruned, recovered - for every measure, and the headline figures behind the verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from recover.config.tasks import KINDS, USES, Figure
from recover.report import words
from recover.report.data import Cell, Headline, Json, MeasureRecord, MeasureRow, Records, Task, UseFigure
from recover.report.verdict import share_of


def rows(records: Records) -> list[MeasureRow]:
    """One row a task and metric, in the order of the tasks; a cell is None where the model was not measured.

    A metric that no model has is left out; `kept` is the share of dense, above chance if that is known, for main
    figures of which more is better.
    """
    found = []
    for name, kind in _tasks(records).items():
        for metric in _metrics(records, name, kind):
            cells = {model: _cell(record, name, metric) for model, record in records.items()}
            if not any(cells.values()):
                continue
            items = next((task.get("items") for record in records.values() if (task := _task(record, name))), None)
            chance = words.finite((_task(records["dense"], name) or {}).get("chance")) or 0.0
            kept = {model: _kept(cells[model], cells["dense"], metric, chance) for model in ("pruned", "recovered")}
            row = {"task": name, "kind": kind, "items": items, **asdict(metric), **cells, "kept": kept}
            found.append(cast(MeasureRow, row))
    return found


def _metrics(records: Records, name: str, kind: str) -> list[Figure]:
    """Those of the kind, and behind the first of them the task's other readings of the same texts, and pass@k.

    Of pass@k the smallest and the largest k.
    """
    first, *rest = KINDS[kind].figures if kind in KINDS else (None,)
    readings, ks = (_parts(records, name, part) for part in ("also", "pass_at_k"))
    also = [
        Figure(f"also.{each}", f"exact match, {each}", "percent", "higher", meaning=f"the same texts, read by {each}")
        for each in readings
    ]
    ends = [k for k in sorted(map(int, ks)) if k in (min(map(int, ks)), max(map(int, ks)))]
    drawn = [
        Figure(f"pass_at_k.{k}", f"pass@{k}, sampled", "percent", "higher", meaning=f"one of {k} drawn texts is right")
        for k in ends
    ]
    return [*([first] if first else []), *also, *drawn, *rest]


def _parts(records: Records, name: str, part: str) -> list[str]:
    return list({key: None for record in records.values() for key in (_task(record, name) or {}).get(part) or ()})


def _tasks(records: Records) -> dict[str, str]:
    """Name -> kind of every task that some model was measured on."""
    return {name: task["kind"] for record in records.values() if record for name, task in record["tasks"].items()}


def _task(record: MeasureRecord | None, name: str) -> Task | None:
    return ((record or {}).get("tasks") or {}).get(name)


def _cell(record: MeasureRecord | None, name: str, metric: Figure) -> Cell | None:
    task = _task(record, name)
    if task is None:
        return None
    part, _, inner = metric.key.partition(".")
    if inner:  # a figure of a part of the record
        found = cast(Json, (task.get(part) or {}).get(inner) or {})
        value = words.finite(found.get("exact_match", found.get("value")))
        return None if value is None else {"value": value, "interval": _interval(found)}
    value = words.finite(task.get(metric.key))
    if value is None:
        return None
    return {"value": value, "interval": _interval(task) if metric.main else None}


def _interval(task: Task | Json) -> list[float] | None:
    bounds = [words.finite(bound) for bound in task.get("interval95") or ()]
    return [bound for bound in bounds if bound is not None] if len(bounds) == 2 and None not in bounds else None


def _kept(cell: Cell | None, dense: Cell | None, metric: Figure, chance: float) -> float | None:
    if cell is None or dense is None or not metric.main or metric.better != "higher" or dense["value"] <= chance:
        return None
    return share_of(cell["value"], dense["value"], chance)


def headline(records: Records) -> dict[str, Headline | None]:
    """Per model: {use: {value, interval, chance, tasks, items} | None, "perplexity": f | None}; None = not measured."""
    return {model: None if record is None else _headline(record) for model, record in records.items()}


def _headline(record: MeasureRecord) -> Headline:
    means: dict[str, UseFigure | None] = {}
    for use in USES:
        tasks = {name: task for name, task in record["tasks"].items() if _use(task) == use}
        means[use] = _mean_of_tasks(tasks)
    perplexity = words.finite((record.get("headline") or {}).get("perplexity"))
    return cast(Headline, {**means, "perplexity": perplexity})


def _main(task: Task) -> float | None:
    """The main figure of the task's kind."""
    return words.finite(task.get(KINDS[task["kind"]].main.key))


def _use(task: Task) -> str | None:
    """None for a kind of no use, and for one that a package made known that is not loaded here."""
    return KINDS[task["kind"]].use if task["kind"] in KINDS else None


def _mean_of_tasks(tasks: dict[str, Task]) -> UseFigure | None:
    """Mean over tasks, each weighing the same. Items of different tasks are independent: half-widths add as squares."""
    values = {name: value for name, task in tasks.items() if (value := _main(task)) is not None}
    if not values:
        return None
    n, mean = len(values), sum(values.values()) / len(values)
    bounds = {name: _interval(tasks[name]) for name in values}
    known = [(values[name], bound) for name, bound in bounds.items() if bound]
    interval = None
    if len(known) == n:
        below = sum((value - bound[0]) ** 2 for value, bound in known) ** 0.5 / n
        above = sum((bound[1] - value) ** 2 for value, bound in known) ** 0.5 / n
        interval = [max(0.0, mean - below), min(1.0, mean + above)]
    chances = [words.finite(tasks[name].get("chance")) for name in values]
    chance = None if None in chances else sum(c for c in chances if c is not None) / n
    items = sum(tasks[name].get("items") or 0 for name in values)
    return {"value": mean, "interval": interval, "chance": chance, "tasks": sorted(values), "items": items}
