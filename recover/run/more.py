"""What a finished run is measured on later, beside the tasks of its recipe; nothing is trained or pruned again.

more/TASK.json   the record of each model that the run has, and what they were then
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TypedDict

from recover.base import console, dist, provenance, threads
from recover.base.artifacts import JsonObject, write_json
from recover.base.console import quiet_libraries
from recover.base.errors import ArtifactError, RecipeError
from recover.config.recipe import Recipe, load_recipe
from recover.measure import tasks as tasks_of
from recover.models.load import describe
from recover.report.collect import collect
from recover.report.render import render
from recover.report.run_files import MeasureRecord, Task
from recover.run.context import RunContext
from recover.run.directory import RunDirectory
from recover.run.input_digests import digests
from recover.run.stages import fingerprint, pin


class LaterRecord(MeasureRecord):
    """What was measured of one model, and the fields of `measure` with which that was done."""

    settings: JsonObject


class LaterTask(TypedDict):
    """more/TASK.json: one task, of each model that the run has; `stages`: when these were finished."""

    task: str
    stages: dict[str, str | None]
    epoch: int | None
    settings: JsonObject
    inputs: dict[str, str]
    models: dict[str, Task]
    environment: provenance.Environment


NEEDED = {"dense": None, "pruned": "prune", "recovered": "train"}  # model -> the stage that made it


def measure_more(directory: RunDirectory, names: list[str], fields: JsonObject) -> dict[str, LaterRecord]:
    """Measure the dense, pruned and recovered model of a run on these tasks, as its recipe has it, and report anew.

    A model whose stage is not done is left out. `fields`: of `measure`, in place of the recipe's. Model -> record.

    Raises:
        RecipeError: a task cannot be used, or has the name of one of the recipe's. ArtifactError: what the run has was
            made with another recipe than recipe.yaml, or a file of it is gone.
    """
    quiet_libraries()
    own = load_recipe(directory.recipe)
    changes = {"tasks": names, **fields}
    recipe = load_recipe(directory.recipe, [f"measure.{name}={json.dumps(value)}" for name, value in changes.items()])
    with directory.lock() if dist.is_main() else nullcontext():
        pin(recipe, directory)
        models = dist.on_main(lambda: _there(own, directory))
        context = RunContext(recipe, directory)
        model = describe(recipe.model)
        threads.chosen(model.width, model.intermediate, directory.threads())
        _check_names(context.tasks, own)
        tasks_of.check_room(context.tasks, context.tokenizer, recipe.measure, model.context)
        found = _measured(context, models)
        if dist.is_main():
            _write(found, context)
            data = collect(directory.root)
            render(directory.root, data)
            console.say(f"report: {directory.report_html}")
        dist.barrier()
    return found


def _there(recipe: Recipe, directory: RunDirectory) -> list[str]:
    """The models that the run has. ArtifactError where one is not of the recipe that recipe.yaml has."""
    found = []
    for model, stage in NEEDED.items():
        if stage is not None and directory.done(stage) is None:
            break
        reason = None if stage is None else directory.stale_reason(stage, fingerprint(stage, recipe, directory))
        if reason is not None:
            raise ArtifactError(
                f"{directory.root}: stage {stage} is not of what it would be made from now ({reason}): bring the run "
                "up to date first (recover run RECIPE)"
            )
        found.append(model)
    return found


def _check_names(tasks: list[tasks_of.Task], own: Recipe) -> None:
    tasks_of.check_names(tasks, "--tasks")
    theirs = {tasks_of.load_task(source).name for source in own.measure.tasks}
    for task in tasks:
        if task.name in theirs:
            raise RecipeError(
                f"--tasks: the run's recipe measures a task of the name {task.name!r} already: give this one another "
                "`name`, or change measure in the recipe and do the run again (nothing is trained for that)"
            )


def _measured(context: RunContext, models: list[str]) -> dict[str, LaterRecord]:
    found: dict[str, LaterRecord] = {}
    reference = None
    views = {"dense": context.dense, "pruned": context.pruned, "recovered": context.recovered}
    cfg = context.recipe.measure
    for model in models:
        console.heading(model)
        twin = views[model]()
        with nullcontext() if model == "dense" else twin.folded():
            record, texts = tasks_of.measure(
                twin.model, context.tokenizer, context.tasks, cfg, reference=reference, seed=context.recipe.seed
            )
        reference = reference or texts
        settings = {**cfg.model_dump(mode="json"), "dtype": context.recipe.model.dtype}
        found[model] = {**record, "settings": settings}
    return found


def _write(found: dict[str, LaterRecord], context: RunContext) -> None:
    """A file for each task, whatever else was measured with it."""
    directory = context.directory
    stages = {stage: directory.finished(stage) for stage in NEEDED.values() if stage}
    for task, source in zip(context.tasks, context.recipe.measure.tasks, strict=True):
        records = {model: record["tasks"][task.name] for model, record in found.items()}
        record: LaterTask = {
            "task": task.name,
            "stages": stages,
            "epoch": directory.carried()["epoch"],
            "settings": next(iter(found.values()))["settings"],
            "inputs": digests({"measure": {"tasks": [source]}}),
            "models": records,
            "environment": provenance.environment(),
        }
        write_json(directory.more / f"{task.name}.json", record)
