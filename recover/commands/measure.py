"""`recover measure`: any checkpoint on any tasks, without a recipe; one record says all that is needed to repeat it.

Of a run directory, its models are measured on tasks beside those of its recipe; nothing is trained or pruned again.

more/TASK.json   the record of each model that the run has, and what they were then
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, get_args

from recover.base import console, dist, hub, process, provenance
from recover.base.artifacts import JsonObject, read_json, write_json
from recover.base.console import quiet_libraries
from recover.base.errors import ArtifactError, RecipeError
from recover.config.base import Dtype, checked, option
from recover.config.recipe import Measure, Model, Recipe, load_recipe
from recover.config.tasks import KINDS
from recover.measure import tasks as tasks_of
from recover.models.load import check_fit, describe, load_any, load_tokenizer
from recover.models.source import context_named, stored_dtype
from recover.report.collect import collect
from recover.report.render import render
from recover.report.run_files import MeasureRecord, Task
from recover.run.context import RunContext
from recover.run.directory import RunDirectory
from recover.run.input_digests import digests
from recover.run.stages import asked, fingerprint, pin

Record = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Our task files, the harness's task names, and where tasks of its kind lie that it does not know."""

    tasks: tuple[str, ...]
    harness: tuple[str, ...] = ()
    include: Path | None = None


def measure_run(
    folder: Path, names: list[str], theirs: tuple[str, ...], about: dict[str, str], fields: dict[str, Any]
) -> Record:
    """Measure a run's models on more tasks, and write its report again; the records by model."""
    if theirs or about:
        given = "--lm-eval" if theirs else option(next(iter(about)))
        raise RecipeError(
            f"{given}: {folder} is a run directory, whose models are measured as its recipe has them: leave it out, "
            f"or measure its checkpoint, {folder / 'deploy'}"
        )
    record = measure_more(RunDirectory(folder), names, fields)
    for model, measured in record.items():
        say({**measured, "model": f"{folder}, {model}", "dtype": measured["settings"]["dtype"]})
    return record


def measure_checkpoint(
    source: str, wanted: Wanted, cfg: Measure, *, dtype: str | None = None, fit: bool = False, **about: str
) -> Record:
    """The record of a checkpoint (hub id, folder, GGUF, embedded:NAME); tasks are read before any weight is.

    The same on every process of a launch. `fit`: texts are as long as the longest prompt leaves of the model's context,
    where that is less than `cfg.max_new_tokens`. `about`: other fields of the model.

    Raises:
        RecipeError, DataError, ModelError: a task, the model, or an item cannot be used; the harness is not installed.
    """
    quiet_libraries()
    tasks = [tasks_of.load_task(name) for name in wanted.tasks]
    tasks_of.check_names(tasks, "--tasks")
    tasks_of.check_allowed(tasks, cfg)
    if wanted.harness:
        tasks_of.require_harness()
    chosen = model_cfg(source, dtype, **about)
    tokenizer = load_tokenizer(chosen)
    context = context_named(chosen)
    cfg = tasks_of.fitted(tasks, tokenizer, cfg, context) if fit else cfg
    tasks_of.check_room(tasks, tokenizer, cfg, context)
    model = load_any(chosen)
    settings = model.config.get_text_config()
    process.choose_threads(
        settings.hidden_size, getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size
    )
    check_fit(model, tokenizer)
    record: Record = {"model": source, "dtype": chosen.dtype, "settings": cfg.model_dump(mode="json")}
    record["commits"] = hub.pinned()
    if tasks:
        record |= tasks_of.measure(model, tokenizer, tasks, cfg)[0]
    if wanted.harness:
        record["lm_eval"] = dist.on_main(
            lambda: tasks_of.harness(model, tokenizer, wanted.harness, cfg, include=wanted.include)
        )
    return record


def model_cfg(source: str, dtype: str | None, **about: str) -> Model:
    """The model in the dtype that was asked for, else in the one its config names; `about`: its other fields."""
    known = get_args(Dtype)
    if dtype is not None and dtype not in known:
        raise RecipeError(f"--dtype: found {dtype!r}, expected one of {', '.join(known)}")
    cfg = checked(Model, option, source=source, **about)
    return cfg.model_copy(update={"dtype": dtype or stored_dtype(cfg)})


def say(record: Record) -> None:
    """Print one row a task, and what the figures leave out."""
    tasks: dict[str, Record] = record.get("tasks") or {}
    rows = [_row(name, task) for name, task in tasks.items()]
    rows += [[name, "lm-eval", *each] for name, each in (record.get("lm_eval") or {}).get("rows", ())]
    title = f"{record['model']}, {record['dtype']}"
    console.table(title, ["task", "kind", "items", "figure", "value", "95% interval", "chance"], rows)
    for name, task in tasks.items():
        if task.get("truncated"):
            console.warn(
                f"task {name}: {task['truncated']} of {task['items']} texts ran into the limit of tokens; "
                f"{task['truncated_right']} of them count as right (--max-new-tokens)"
            )
    for name, task in tasks.items():
        if task.get("mistakes"):
            console.say(f"task {name}: {_mistakes(task)}")
        if task.get("isolation"):
            console.say(f"task {name}: programs were run {task['isolation']}")
        if task.get("pass_at_k"):
            figures = [f"pass@{k} {found['value']:.1%}" for k, found in task["pass_at_k"].items()]
            console.say(f"task {name}, sampled: {', '.join(figures)}")
    if record.get("tokens_per_second"):
        console.say(f"{record['tokens_per_second']:,.0f} tokens/s written, {record['seconds']:,.1f} s in all")


def _row(name: str, task: Record) -> list[Any]:
    kind = KINDS[task["kind"]]
    low_high = task.get("interval95")
    interval = None if low_high is None else f"{low_high[0]:.1%} – {low_high[1]:.1%}"
    value = kind.main.worded(task[kind.main.key])
    chance = task.get("chance")
    return [name, task["kind"], task["items"], kind.words, value, interval, None if chance is None else f"{chance:.1%}"]


def _mistakes(task: Record) -> str:
    """How many texts are right, and which mistake the others are."""
    words = {"loop": "loop", "endless": "do not end", "no_answer": "hold no answer", "unparsed": "do not parse"}
    counts = {**words, "content": "well formed and wrong"}
    right = task["items"] - sum(task["mistakes"].values())
    found = [f"{task['mistakes'][kind]} {said}" for kind, said in counts.items() if task["mistakes"].get(kind)]
    return ", ".join([f"{right} of {task['items']} right", *found])


def write(record: Record, path: Path) -> None:
    """Write the record with versions and machine."""
    if dist.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "environment": provenance.environment()})
        console.say(f"wrote {path}")


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
SERVED = "deploy"  # the stage whose files are the deployed model and the alternative


def measure_more(directory: RunDirectory, names: list[str], fields: JsonObject) -> dict[str, LaterRecord]:
    """Measure every model that a run has on these tasks, as its recipe has it, and report anew.

    Dense, pruned and recovered, and the quantized files of stage deploy; a model whose stage is not done is left out.
    `fields`: of `measure`, in place of the recipe's. Model -> record.

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
        process.choose_threads(model.width, model.intermediate, directory.threads())
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
            return found
        if stage is not None:
            _check_current(stage, recipe, directory)
        found.append(model)
    if SERVED in asked(recipe) and directory.done(SERVED) is not None:
        _check_current(SERVED, recipe, directory)
        found += read_json(directory.gguf / "files.json")
    return found


def _check_current(stage: str, recipe: Recipe, directory: RunDirectory) -> None:
    reason = directory.stale_reason(stage, fingerprint(stage, recipe, directory))
    if reason is not None:
        raise ArtifactError(
            f"{directory.root}: stage {stage} is not of what it would be made from now ({reason}): bring the run "
            "up to date first (recover run RECIPE)"
        )


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
    cfg, seed = context.recipe.measure, context.recipe.seed
    files = {} if set(models) <= {*views} else read_json(context.directory.gguf / "files.json")
    for model in models:
        console.heading(model)
        if model in files:
            loaded, tokenizer = context.served(files[model])
            record, _ = tasks_of.measure(loaded, tokenizer, context.tasks, cfg, reference=reference, seed=seed)
            del loaded
        else:
            twin = views[model]()
            with nullcontext() if model == "dense" else twin.folded():
                record, texts = tasks_of.measure(
                    twin.model, context.tokenizer, context.tasks, cfg, reference=reference, seed=seed
                )
            reference = reference or texts
            del twin
        settings = {**cfg.model_dump(mode="json"), "dtype": context.recipe.model.dtype}
        found[model] = {**record, "settings": settings}
    return found


def _write(found: dict[str, LaterRecord], context: RunContext) -> None:
    """A file for each task, whatever else was measured with it."""
    directory = context.directory
    stages = {stage: directory.finished(stage) for stage in (*NEEDED.values(), SERVED) if stage}
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
