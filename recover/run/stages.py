"""The stages of a run, in order; each reads files, writes files, and is done when its stamp is written last.

    plan -> dense -> prune -> before -> train -> after -> export (-> deploy) -> report

`run` skips what is done and says why a stage is not: the field of the recipe, or the input, that changed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from recover.base import console, dist, earlier, hub, provenance
from recover.base.artifacts import JsonObject, write_json
from recover.base.clock import Clock, note, stage_clock
from recover.base.console import quiet_libraries
from recover.base.errors import ArtifactError, RecipeError
from recover.base.process import graceful_stop
from recover.config.recipe import Recipe, load_recipe
from recover.run.directory import NOT_DONE, SHOWN_DIGITS, RunDirectory, StageState
from recover.run.input_digests import digests, repositories

if TYPE_CHECKING:
    from recover.run.context import RunContext


@dataclass(frozen=True)
class Stage:
    """One stage: `fields` of the recipe and the stages whose files it `reads` are all that it is made from.

    `always`: seconds of work, done again at every run, so that it is never out of date. `carries`: figures of other
    stages, and the epoch that is kept, go into what it writes; these themselves count, and not when they were made.
    """

    name: str
    fields: tuple[str, ...]
    reads: tuple[str, ...] = ()
    always: bool = False
    carries: bool = False

    def run(self, context: RunContext) -> None:
        """Do the work; raises what its function in `stage_work.py` raises."""
        from recover.run.stage_work import WORK  # with torch, which `status` has no need of

        WORK[self.name](context)


# In their order. Training reads nothing that measuring alone depends on: it measures after each epoch, and where that
# is done in another way later, stage `after` measures the epochs again from their adapters.
TABLE = (
    Stage("plan", ("name", "seed", "model", "prune", "probe", "train", "measure", "export", "deploy"), always=True),
    Stage("dense", ("seed", "model", "measure")),
    Stage("prune", ("seed", "model", "prune")),
    Stage("before", ("seed", "model", "prune", "probe", "measure"), reads=("dense", "prune")),
    Stage("train", ("seed", "model", "prune", "train"), reads=("prune",)),
    Stage("after", ("seed", "model", "prune", "probe", "measure", "train"), reads=("dense", "prune", "train")),
    Stage("export", ("seed", "name", "model", "prune", "train", "export"), reads=("prune", "train"), carries=True),
    Stage("deploy", ("seed", "model", "measure", "deploy"), reads=("dense", "export")),
    Stage("report", ("name",), reads=("dense", "prune", "before", "train", "after", "export", "deploy"), always=True),
)
OF = {stage.name: stage for stage in TABLE}
STAGES = tuple(OF)


def asked(recipe: Recipe) -> tuple[str, ...]:
    """The stages of this recipe, in their order: `deploy` only where it is asked for."""
    return names(deploy=recipe.deploy.quantize is not None)


def names(*, deploy: bool) -> tuple[str, ...]:
    """The stages of a recipe that asks for stage `deploy`, or of one that does not."""
    return tuple(stage for stage in STAGES if stage != "deploy" or deploy)


UP_TO_DATE = "always brought up to date"
# What changed where a finished training is lengthened (`train/checkpoints.py` decides).
LENGTHENS = re.compile(r"(train\.(tokens|epochs): \S+ -> \S+(; )?)+")
PLAIN = (NOT_DONE, UP_TO_DATE)  # reasons that go without saying


def run(
    recipe: Recipe, root: Path, *, until: str = "report", start: str | None = None, timed: bool = False
) -> RunDirectory:
    """Bring the run up to date through stage `until`, and give back its directory.

    A stage that is done and not stale is skipped; from `start` on every stage is done again. Until `plan`, nothing is
    written: the recipe is checked, what it will cost is said, and which stages of a run that is there would be done.
    `timed`: there, what the run's steps and texts take is timed on this machine; else its time is a floor.

    Raises:
        RecoverError: one of its kinds, by what went wrong; stages that were done stay done.
        ArtifactError: a file that training stands on went lost after it; `start` says to do it all again.
    """
    until, start = earlier.stage(until), None if start is None else earlier.stage(start)
    order = asked(recipe)
    for stage in filter(None, (until, start)):
        if stage not in STAGES:
            raise RecipeError(f"no stage {stage!r}; stages are {', '.join(STAGES)}")
        if stage not in order:
            raise RecipeError(f"stage {stage!r} is not of this recipe: ask for it, such as deploy.quantize=q8_0")
    began = time.perf_counter()
    quiet_libraries()
    dist.start()
    # After `quiet_libraries`, which sets what libraries read at import.
    from recover.run.stage_work import RunContext

    libraries = time.perf_counter() - began
    directory = RunDirectory(root / recipe.name)
    if until == STAGES[0]:
        pin(recipe, directory)
        _only_plan(RunContext(recipe, directory), libraries if timed else None)
        return directory
    with graceful_stop(), directory.lock() if dist.is_main() else nullcontext():
        to_do = order[: order.index(until) + 1]
        if "export" in to_do and dist.is_main():
            directory.refuse_foreign_deploy()
        pin(recipe, directory, anew=start == STAGES[0])
        if dist.is_main():
            note_commits(directory)
        anew = () if start is None else order[order.index(start) :]
        context = RunContext(recipe, directory)
        if "export" in to_do:
            context.exports = lambda: _marks_and_reason("export", context, "export" in anew)[1] is not None
        try:
            for stage in to_do:
                _bring_up_to_date(stage, context, forced=stage in anew, before=libraries if stage == STAGES[0] else 0.0)
        finally:
            context.aside.close()
            context.tracking.finish()
    return directory


def pin(recipe: Recipe, directory: RunDirectory, *, anew: bool = False) -> None:
    """Have every process read of the hub the commits that this run has on record, and the hub's of now of the others.

    `anew`: of all of them those of now.
    """
    wanted = repositories(recipe.model_dump(mode="json"))
    hub.forget()
    hub.pin(dist.on_main(lambda: _commits(wanted, directory, anew=anew)))


def _commits(wanted: list[hub.Repository], directory: RunDirectory, *, anew: bool) -> dict[str, str]:
    recorded = {} if anew else directory.commits_on_record()
    hub.pin({str(each): recorded[str(each)] for each in wanted if str(each) in recorded})
    for each in wanted:
        with suppress(hub.NoCommit):  # who reads it says so, with the field's name
            found, now = hub.commit(each), hub.newest(each) if str(each) in recorded else None
            if now is not None and now != found:
                console.warn(
                    f"{each}: has moved on to commit {now[:SHOWN_DIGITS]}; this run stays with {found[:SHOWN_DIGITS]}, "
                    "which it began with. For the new one: recover run RECIPE --fresh"
                )
    return hub.pinned(wanted)


def note_commits(directory: RunDirectory) -> None:
    """Put on record which commits of the hub this run reads, if it reads any."""
    if hub.pinned() != directory.commits_on_record():
        write_json(directory.commits, hub.pinned())


def _only_plan(context: RunContext, libraries: float | None) -> None:
    """Check, and say what a run would do; nothing is written: the folder may hold a finished run of another recipe.

    `libraries`: seconds that they took to load; None: nothing is timed.
    """
    from recover.run.stage_work import checked, say_time

    dist.on_main(context.directory.refuse_foreign)
    found = checked(context, timed=libraries is not None)
    order = [stage for stage in asked(context.recipe) if not OF[stage].always]
    there = dist.on_main(lambda: [_planned(stage, context) for stage in order] if context.directory.is_run else [])
    if libraries is not None:
        say_time(context, found["estimate"], libraries, {stage: _left(what, why) for stage, what, why in there})
    if dist.is_main() and there:
        console.table(f"{context.directory.root}: what a run would do", ["stage", "what", "why"], there)


def _left(what: str, why: str) -> float:
    """The share of a stage that is still to be done: nothing of one that is kept, the rest of a longer training."""
    if what == "kept":
        return 0.0
    more = re.search(r"train\.tokens: (\d+) -> (\d+)", why) if LENGTHENS.fullmatch(why) else None
    return max(0.0, 1 - int(more[1]) / int(more[2])) if more is not None and int(more[1]) < int(more[2]) else 1.0


def _planned(stage: str, context: RunContext) -> list[str]:
    """A row for a stage of a run that is there: kept, to do, or again, and why."""
    reason = context.directory.stale_reason(stage, fingerprint(stage, context.recipe, context.directory))
    if reason is None:
        return [stage, "kept", ""]
    return [stage, "to do", ""] if reason == NOT_DONE else [stage, "again", reason]


def _bring_up_to_date(stage: str, context: RunContext, *, forced: bool, before: float) -> None:
    """Do the stage if need be. `before`: seconds that libraries took to load, which are put on its account."""
    # Decided on one process: the others must not read a stamp that is just being written.
    marks, reason = dist.on_main(lambda: _marks_and_reason(stage, context, forced))
    order = asked(context.recipe)
    place = f"{order.index(stage) + 1}/{len(order)}"
    if reason is None:
        console.say(f"[dim]{place} {stage:8}[/dim] done")
        return
    console.heading(f"{place} {stage}{'' if reason in PLAIN else f', again: {reason}'}")
    if stage == "train" and reason not in PLAIN:
        goes_on = LENGTHENS.fullmatch(reason) is not None
        console.say(
            "Training goes on where it ended, if more is asked for and its last checkpoint is there."
            if goes_on
            else "This replaces the recovery made before; with another name (name=OTHER) both are kept."
        )
    if stage == "train" and forced and dist.is_main():
        context.directory.forget_training()
    if dist.is_main():
        context.directory.unmark(stage)
    with _timed(stage, context.directory.root, before) as clock:
        OF[stage].run(context)
        dist.barrier()
        if dist.is_main():
            context.directory.mark_done(stage, marks, provenance.environment())
    if stage != "report":  # whose last lines are the outcome of the run
        console.say(f"[dim]{stage} took {console.duration(clock.seconds)}[/dim]")


@contextmanager
def _timed(stage: str, root: Path, before: float) -> Iterator[Clock]:
    """Put on record what the stage takes, also where it ends early."""
    done = False
    clock = Clock()
    try:
        with stage_clock() as clock:
            yield clock
        done = True
    finally:
        if before:
            clock.seconds += before
            clock.parts["loading libraries"] = clock.parts.get("loading libraries", 0.0) + before
        if dist.is_main():
            with nullcontext() if done else suppress(ArtifactError):  # what ended the stage says more
                note(root, stage, clock, done=done)


def _marks_and_reason(stage: str, context: RunContext, forced: bool) -> tuple[JsonObject, str | None]:
    marks = fingerprint(stage, context.recipe, context.directory)
    if OF[stage].always:
        return marks, UP_TO_DATE
    if forced:
        return marks, "asked for"
    reason = context.directory.stale_reason(stage, marks)
    if reason is not None and reason == context.directory.lost(stage):
        _refuse_training_again(stage, reason, context.directory)
    return marks, reason


def _refuse_training_again(stage: str, lost: str, directory: RunDirectory) -> None:
    """A file that went lost does not make hours of training be done again, unless that is asked for."""
    if directory.done("train") is not None and (stage == "train" or stage in OF["train"].reads):
        raise ArtifactError(
            f"{directory.root}: {lost}, and the training that is done stands on it. Put the file back, or do this "
            f"stage and all after it again, training too: recover run RECIPE --from {stage}"
        )


def fingerprint(stage: str, recipe: Recipe, directory: RunDirectory) -> JsonObject:
    """All that a stage is made from: recipe leaves, digests of input files, and which run of each stage it reads."""
    resolved = recipe.model_dump(mode="json")
    leaves = {cfg: reduce(lambda tree, name: tree[name], cfg.split("."), resolved) for cfg in OF[stage].fields}
    stamps = {name: directory.finished(name) for name in OF[stage].reads}
    carried = {"carried": directory.carried()} if OF[stage].carries else {}
    return {**leaves, **carried, "inputs": digests(leaves), "stages": stamps}


def status(root: Path) -> list[StageState]:
    """For each stage of a run directory: done or not, when, and why it is stale against its own recipe."""
    directory = RunDirectory(root)
    recipe = load_recipe(directory.recipe)
    hub.pin(directory.commits_on_record())
    rows: list[StageState] = []
    for stage in asked(recipe):
        stamp = directory.done(stage)
        reason = None if OF[stage].always else directory.stale_reason(stage, fingerprint(stage, recipe, directory))
        finished = None if stamp is None else stamp["finished"]
        rows.append({"stage": stage, "done": stamp is not None, "finished": finished, "stale": reason})
    return rows
