"""What came of it: a column a model - dense, pruned, recovered - for every measure, the headline figures, the verdict.

Fit for choice? for generation? for retrieval? - answered from numbers, with the number beside every answer. All
thresholds of the report are here. A grade is read off the share of the dense model's score that is kept:

    yes          kept >= 95%, and the interval rules out less than 80%
    with care    kept >= 80%, or >= 95% with an interval that reaches below 80%
    no           kept < 80%
    cannot tell  dense itself is within 5 points of nothing (of chance, where a task states its chance level)
    not measured no task of that use was run

Where a choice task states its chance level, the share kept is of what dense does above chance, on the page, in tables
and in comparisons alike; a model at chance or below keeps nothing.

What is printed of a measurement and of a whole run, and what it cannot show, is at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from recover.base import console
from recover.config import tasks
from recover.config.tasks import KINDS, USES, Figure, headline_figures
from recover.report import items, words
from recover.report.data import (
    CHANGED,
    MODELS,
    Answer,
    Cell,
    Headline,
    Json,
    Lead,
    MeasureRow,
    PageData,
    RunData,
    UseFigure,
    Verdict,
)
from recover.report.run_files import MeasureRecord, Model, Records, Task, Use


def measure_rows(records: Records) -> list[MeasureRow]:
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
            kept = {model: _kept(cells[model], cells["dense"], metric, chance) for model in cells if model != "dense"}
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
    return {model: None if record is None else _headline_of(record) for model, record in records.items()}


def _headline_of(record: MeasureRecord) -> Headline:
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


KEPT_YES = 0.95
NEAR_BYTES = 0.1  # of the deployed file's: two files count as equally large
KEPT_CARE = 0.80
DENSE_FLOOR = 0.05
LOSABLE: tuple[Use, ...] = ("choice", "retrieval")
LOST_SHOWN = 0.05  # of dense: what recovery takes from another use is told from here on

THRESHOLDS = {"yes": KEPT_YES, "with care": KEPT_CARE, "dense floor": DENSE_FLOOR}


def verdict(headline: dict[str, Headline | None]) -> Verdict:
    """{model: {use: {grade, reason, value, dense, kept, interval, certain}}, thresholds}, of each model but dense."""

    def answers(model: Model) -> dict[Use, Answer]:
        return {
            use: judge(_use_figure(headline, model, use), _use_figure(headline, "dense", use), use)
            for use in tasks.USES
        }

    found: Verdict = {"pruned": answers("pruned"), "recovered": answers("recovered"), "thresholds": THRESHOLDS}
    if "deployed" in headline:
        found["deployed"] = answers("deployed")
    if "alternative" in headline:
        found["alternative"] = answers("alternative")
    return found


def judged(data: RunData) -> list[Model]:
    """The models that have a verdict: all but dense, in the order of the page."""
    return [model for model in MODELS if model != "dense" and model in data["verdict"]]


def _use_figure(headline: dict[str, Headline | None], model: str, use: Use) -> UseFigure | None:
    return (headline.get(model) or {}).get(use)


def grade_of(kept: float, lower: float | None) -> str:
    """The grade of a share kept whose interval reaches down to `lower` (None: no interval is known)."""
    if kept >= KEPT_YES and (lower is None or lower >= KEPT_CARE):
        return "yes"
    return "with care" if kept >= KEPT_CARE else "no"


def judge(figure: UseFigure | None, dense: UseFigure | None, use: Use) -> Answer:
    """One answer for one model and use, with the figures it is read off."""
    if figure is None or dense is None:
        whom = " on this model" if dense else " on the dense model" if figure else ""
        return _no_answer("not measured", f"No {tasks.USES[use].adjective} task was run{whom}.", figure, dense)
    chance = dense["chance"] or 0.0
    if dense["value"] - chance < DENSE_FLOOR:
        level = f"chance ({words.percent(chance)})" if chance else "zero"
        reason = f"Dense itself scores {words.percent(dense['value'])}, near {level}: nothing to keep."
        return _no_answer("cannot tell", reason, figure, dense)
    kept = share_of(figure["value"], dense["value"], chance)
    interval = figure["interval"] and [share_of(bound, dense["value"], chance) for bound in figure["interval"]]
    grade = grade_of(kept, interval[0] if interval else None)
    ends = {grade_of(bound, None) for bound in interval or ()}
    return {
        "grade": grade,
        "reason": _reason(figure, dense, kept, interval, chance),
        "value": figure["value"],
        "dense": dense["value"],
        "kept": kept,
        "chance": chance,
        "interval": interval,
        "certain": ends <= {grade},
    }


def _no_answer(grade: str, reason: str, figure: UseFigure | None, dense: UseFigure | None) -> Answer:
    return {
        "grade": grade,
        "reason": reason,
        "value": figure["value"] if figure else None,
        "dense": dense["value"] if dense else None,
        "kept": None,
        "chance": None,
        "interval": None,
        "certain": True,
    }


def share_of(value: float, dense: float, chance: float) -> float:
    """What is kept of dense, above chance; from 0 on. `dense` is above `chance`."""
    return max(0.0, (value - chance) / (dense - chance))


def _reason(figure: UseFigure, dense: UseFigure, kept: float, interval: list[float] | None, chance: float) -> str:
    """The figures in one sentence, and what the interval leaves open."""
    what = f"of what dense does above chance ({words.percent(chance)})" if chance else "of dense"
    text = f"{words.percent(figure['value'], 1)} against {words.percent(dense['value'], 1)}: {share(kept)} {what}"
    if not interval:
        return f"{text}; no interval is known."
    lowest, highest = grade_of(interval[0], None), grade_of(interval[1], None)
    text += f", interval {share(interval[0])} to {share(interval[1])}"
    return f"{text}." if lowest == highest else f"{text}, which reaches from “{lowest}” to “{highest}”."


def share(kept: float) -> str:
    """A share of dense in whole percent, with a digit more where rounding would hide its side of a threshold."""
    close = any(abs(kept - threshold) < 0.01 and kept != threshold for threshold in (KEPT_YES, KEPT_CARE))
    return words.percent(kept, 1 if close else None)


def unmeasured(found: Verdict) -> list[Use]:
    """Uses that no task of the run measured on any model: they have no verdict to show."""
    return [use for use in tasks.USES if all(found[model][use]["grade"] == "not measured" for model in CHANGED)]


def title(data: RunData) -> str:
    """The finding in one line, for the top of the page."""
    pruned, recovered = (data["verdict"][model]["generation"]["kept"] for model in CHANGED)
    if pruned is None:
        answer = data["verdict"]["pruned"]["generation"]
        if answer["grade"] == "cannot tell":
            return f"Generation cannot be judged: dense itself scores {words.percent(answer['dense'])}"
        return "Generation is not measured" if data["headline"]["recovered"] else "Generation is not measured yet"
    fell = (
        f"Generation fell to {share(pruned)} of dense"
        if pruned < KEPT_YES
        else f"Generation stood at {share(pruned)} of dense"
    )
    if recovered is None:
        return fell
    if recovered - pruned >= 0.01:
        rose = "came back" if pruned < KEPT_YES <= recovered else "rose"
        return f"{fell} and {rose} to {share(recovered)}"
    same = abs(recovered - pruned) < 0.01
    return f"{fell} and stayed there" if same else f"{fell}, then {share(recovered)} after recovery"


def summary(data: RunData) -> str:
    """What was done and what it did, in one sentence made of measured figures; one more on what is served."""
    left = _what_pruning_left(data["verdict"]["pruned"])
    done = f"{words.plan_subject(data['plan'])} {left}; {_what_recovery_did(data)}."
    return " ".join(filter(None, (done, against_alternative(data))))


def against_alternative(data: PageData) -> str | None:
    """Which of the two files serves better, use by use, in words; None where there is nothing to compare."""
    served = data["served"]
    deployed, other = ((served or {"files": {}})["files"].get(model) for model in ("deployed", "alternative"))
    if served is None or deployed is None or other is None or not served["lead"]:
        return None
    ratio = other["bytes"] / deployed["bytes"]
    near = abs(ratio - 1) <= NEAR_BYTES
    files = f"the deployed file ({deployed['quantize']}, {words.size(deployed['bytes'])})"
    dense = f"dense quantized to {other['quantize']} ({words.size(other['bytes'])})"
    told = "; ".join(_lead(use, lead) for use, lead in served["lead"].items())
    at = "At about as many bytes" if near else f"At ×{ratio:.2f} the bytes, no type being nearer"
    better = {lead["better"] for lead in served["lead"].values()}
    end = " Quantizing without pruning serves better here." if near and better == {"alternative"} else ""
    return f"{at}, {dense} against {files}: {told}.{end}"


def _lead(use: Use, lead: Lead) -> str:
    sign = -1 if lead["better"] == "alternative" else 1
    low, high = sorted(sign * bound for bound in lead["interval"])
    by = f"{words.points(sign * lead['value'])} points [{words.points(low)}, {words.points(high)}]"
    if lead["better"] is None:
        return f"{use} of the two is not told apart (deployed less alternative: {by})"
    whose = "the deployed file" if lead["better"] == "deployed" else "the quantized dense model"
    return f"{use} of {whose} is better by {by}"


def _what_pruning_left(answers: dict[Use, Answer]) -> str:
    order: tuple[Use, ...] = ("choice", "generation", "retrieval")
    parts = [(use, kept) for use in order if (kept := answers[use]["kept"]) is not None]
    if not parts:
        told = any(answers[use]["grade"] == "cannot tell" for use in answers)
        return "was measured on tasks that dense itself cannot do" if told else "has not been measured yet"
    first, *others = [f"{use} at {share(kept)}" for use, kept in parts]
    return "left " + " and ".join([f"{first} of dense", *others])


def _what_recovery_did(data: RunData) -> str:
    before, after = (data["verdict"][model]["generation"] for model in CHANGED)
    if after["kept"] is None:
        if data["headline"]["recovered"] is None:
            return "recovery has not been measured yet"
        judged = "cannot be judged" if after["grade"] == "cannot tell" else "was not measured"
        return f"generation after recovery {judged}"
    return _what_became_of_generation(data, before, after) + _what_was_lost(data)


def _what_was_lost(data: RunData) -> str:
    """What recovery took from other uses: a text that feeds one use may starve another."""
    kept = [(use, *[data["verdict"][model][use]["kept"] for model in CHANGED]) for use in LOSABLE]
    lost = [
        f"{use} to {share(after)}"
        for use, before, after in kept
        if before is not None and after is not None and before - after >= LOST_SHOWN
    ]
    return f" and lowered {' and '.join(lost)}" if lost else ""


def _what_became_of_generation(data: RunData, before: Answer, after: Answer) -> str:
    tokens = data["tokens"] and words.finite(data["tokens"]["kept"])
    means = f"{words.count(tokens)} tokens of distillation" if tokens else "distillation"
    was, now = before["kept"], after["kept"] or 0.0
    to = share(now)
    if was is None:
        return f"after {means} generation stands at {to}"
    if abs(now - was) < 0.01:
        return f"{means} left generation at {to}"
    if now < was:
        return f"{means} lowered generation to {to}"
    return f"{means} brought generation back to {to}" if now >= KEPT_YES else f"{means} raised generation to {to}"


CUT_SHARE = 0.5  # of the dense model's texts that run into the limit: more, and it is the limit that is measured


def headline_words(name: str, value: float | None) -> str | None:
    """A headline figure as text, as its kind words it: mostly a percentage; None stays None."""
    if value is None:
        return None
    figure = headline_figures()[name][1]
    return words.percent(value, 1) if figure.form == "percent" else figure.worded(value)


def headline_line(headline: dict[str, float | None]) -> str:
    """The figures that were measured, in one line: `generation 5.5%, choice 81.0%, perplexity 2.05`."""
    return ", ".join(f"{name} {headline_words(name, value)}" for name, value in headline.items() if value is not None)


def blind(record: MeasureRecord) -> Iterator[str]:
    """Of a record of the dense model: a sentence for each task that cannot show what pruning loses, and why."""
    for name, task in record["tasks"].items():
        kind = KINDS[task["kind"]]
        value, chance = task.get(kind.main.key) if kind.use else None, task.get("chance") or 0.0
        if value is not None and value - chance < DENSE_FLOOR:
            near = f"chance ({chance:.0%})" if chance else "nothing"
            yield (
                f"task {name}: the dense model itself scores {words.percent(value, 1)}, near {near}, so it cannot show "
                "what pruning loses: compare the task's prompt and right answers with the texts in dense/measure.json"
            )
        elif (cut := task.get("truncated") or 0) > CUT_SHARE * task["items"]:
            yield (
                f"task {name}: {cut} of {task['items']} texts of the dense model ran into the limit of "
                "tokens: raise measure.max_new_tokens (or the task's own)"
            )


def print_headline(data: RunData) -> None:
    """Print the headline figures of `recover.report.collect`, one row a model."""
    found = {model: _headline_values(data["headline"][model]) for model in data["headline"]}
    names = [name for name in headline_figures() if any(values[name] is not None for values in found.values())]
    rows = [[model, *(headline_words(name, values[name]) for name in names)] for model, values in found.items()]
    console.table("headline", ["model", *names], rows)


def print_end(data: RunData, root: Path) -> None:
    """Print the end of a run: figures, verdict, where the model lies and where to read on."""
    print_headline(data)
    console.say(f"[bold]{data['title']}.[/bold]")
    for model in judged(data):
        grades = {use: answer["grade"] for use, answer in data["verdict"].get(model, {}).items()}
        fit = [f"{use}: {grade}" for use, grade in grades.items() if grade != "not measured"]
        if fit and model != "pruned":
            console.say(f"{model}, fit for {', '.join(fit)}")
    if told := against_alternative(data):
        console.say(told)
    for found in data["overlap"] or ():
        console.warn(items.overlap_sentence(found))
    if (root / "deploy").is_dir():
        console.say(f"model:  {root / 'deploy'}")
    for model, file in (data["served"] or {"files": {}})["files"].items():
        console.say(f"{'file' if model == 'deployed' else model}:   {root / file['path']}")
    console.say(f"report: {root / 'report.html'} (the same as .md and .json)")


def _headline_values(headline: Headline | None) -> dict[str, float | None]:
    found = {name: (headline or {}).get(name) for name in headline_figures()}
    return {name: value["value"] if isinstance(value, dict) else value for name, value in found.items()}
