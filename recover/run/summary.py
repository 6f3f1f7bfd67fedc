"""What a person is told of a measurement and of a whole run, as the report words it, and what it cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recover.base import console
from recover.config.tasks import KINDS, USES, headline_figures
from recover.report import items, words
from recover.report.data import Headline, MeasureRecord, RunData
from recover.report.verdict import DENSE_FLOOR

CUT_SHARE = 0.5  # of the dense model's texts that run into the limit: more, and it is the limit that is measured


def worded(name: str, value: float | None) -> str | None:
    """A headline figure as text, as its kind words it: mostly a percentage; None stays None."""
    if value is None:
        return None
    return words.percent(value, 1) if headline_figures()[name][1].form == "percent" else f"{value:.4g}"


def figures(headline: dict[str, float | None]) -> str:
    """The figures that were measured, in one line: `generation 5.5%, choice 81.0%, perplexity 2.046`."""
    return ", ".join(f"{name} {worded(name, value)}" for name, value in headline.items() if value is not None)


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


def table(data: RunData) -> None:
    """Print the headline figures of `recover.report.collect`, one row a model."""
    found = {model: _values(data["headline"][model]) for model in data["headline"]}
    names = [name for name in headline_figures() if any(values[name] is not None for values in found.values())]
    rows = [[model, *(worded(name, values[name]) for name in names)] for model, values in found.items()]
    console.table("headline", ["model", *names], rows)


def say(data: RunData, root: Path) -> None:
    """Print the end of a run: figures, verdict, where the model lies and where to read on."""
    table(data)
    console.say(f"[bold]{data['title']}.[/bold]")
    grades = {use: data["verdict"]["recovered"][use]["grade"] for use in USES}
    fit = [f"{use}: {grade}" for use, grade in grades.items() if grade != "not measured"]
    if fit:
        console.say(f"recovered, fit for {', '.join(fit)}")
    for found in data["overlap"] or ():
        console.warn(items.overlap_sentence(found))
    if (root / "deploy").is_dir():
        console.say(f"model:  {root / 'deploy'}")
    console.say(f"report: {root / 'report.html'} (the same as .md and .json)")


def _values(headline: Headline | None) -> dict[str, float | None]:
    found = {name: (headline or {}).get(name) for name in headline_figures()}
    return {name: value["value"] if isinstance(value, dict) else value for name, value in found.items()}
