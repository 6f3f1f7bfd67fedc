"""Work that one run has done, copied into the folder of another before it starts: stages whose stamp fits, and text.

A stage is taken over only if its stamp is that which the other run would write itself (`stages.fingerprint`), so a
variant that differs in the learning rate has the dense model's figures, the pruning and the pruned model's figures
done. Text lies under a name made from all that it depends on; the dense model goes on where it ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from variants import common_work

from recover.base.errors import RecoverError
from recover.config.recipe import Recipe, load_recipe
from recover.run.directory import RunDirectory
from recover.run.stages import fingerprint

STAGES = ("dense", "prune", "before")
TEXT = "recover/data"


def lend(recipe: Recipe, target: Path, donors: Iterable[Path]) -> list[str]:
    """Copy into `target` what it lacks and a donor has; names of stages and text files that were copied."""
    donors = [donor for donor in donors if donor != target and (donor / "recipe.yaml").exists()]
    lent = [stage for stage in STAGES if _lend_stage(stage, recipe, target, donors)]
    for donor in donors:
        if text_is_written(donor) and _same_text(recipe, donor):
            lent += _lend_text(donor / TEXT, target / TEXT)
    return lent


def _lend_stage(stage: str, recipe: Recipe, target: Path, donors: Iterable[Path]) -> bool:
    directory = RunDirectory(target)
    if directory.folder(stage).exists():
        return False
    wanted = fingerprint(stage, recipe, directory)
    for donor in donors:
        if RunDirectory(donor).stale_reason(stage, wanted) is None:
            _copy(RunDirectory(donor).folder(stage), directory.folder(stage))
            return True
    return False


def _same_text(recipe: Recipe, donor: Path) -> bool:
    """Whether the dense model writes for both from the same source of text."""
    try:
        theirs = common_work(load_recipe(donor / "recipe.yaml"))
    except RecoverError:  # of another version, or of a machine where its files lay elsewhere
        return False
    return any(theirs.get(name) == digest for name, digest in common_work(recipe).items() if name.startswith("text"))


def _lend_text(source: Path, target: Path) -> list[str]:
    """Every file that is missing, or shorter than the donor's."""
    lent = []
    for path in sorted(source.glob("dense-*.jsonl")):
        there = target / path.name
        if not there.exists() or there.stat().st_size < path.stat().st_size:
            _copy(path, there)
            lent.append(path.name)
    return lent


def _copy(source: Path, target: Path) -> None:
    """Whole under its name or not at all: a half copied stage would count as done."""
    beside = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
    else:
        shutil.copyfile(source, beside)
    os.replace(beside, target)


def made(run: Path, work: str) -> bool:
    """Whether the run has done this piece of `common_work`, so that others can take it over."""
    if work.startswith("text"):
        return text_is_written(run)
    return RunDirectory(run).done({"prune": "before"}.get(work, work)) is not None


def text_is_written(run: Path) -> bool:
    """A first step was made, so the text for all steps is there."""
    steps = run / "recover" / "steps.jsonl"
    return steps.exists() and steps.stat().st_size > 0
