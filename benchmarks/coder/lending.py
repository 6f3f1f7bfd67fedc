"""Work that one run has done, copied into the folder of another before it starts: stages whose stamp fits, and text.

A stage is taken over only if its stamp is that which the other run would write itself (`stages.fingerprint`), so a
variant that differs in the learning rate has the dense model's figures, the pruning and the pruned model's figures
done. Text lies under a name made from all that it depends on; a run takes as much of its beginning as its own budget
asks for, and the dense model goes on where it ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from variants import common_work

from recover.base.errors import RecoverError
from recover.config.recipe import Recipe, load_recipe
from recover.run.directory import RunDirectory
from recover.run.stages import fingerprint

STAGES = ("dense", "prune", "before")
ROOM = 1.1  # of the tokens asked for: those behind `train.length` do not count

Needs = dict[tuple[str, str], int]  # (name, digest) of `common_work` -> tokens of text; 0 for a stage


def lend(recipe: Recipe, target: Path, donors: Iterable[Path]) -> list[str]:
    """Copy into `target` what it lacks and a donor has; names of stages and text files that were copied."""
    donors = [donor for donor in donors if donor != target and (donor / "recipe.yaml").exists()]
    lent = [stage for stage in STAGES if _lend_stage(stage, recipe, target, donors)]
    tokens = max((tokens for tokens in needs(recipe).values()), default=0)
    folders = [texts_of(donor) for donor in donors if text_is_written(donor) and _same_text(recipe, donor)]
    return lent + _lend_text(folders, texts_of(target), round(ROOM * tokens))


def needs(recipe: Recipe) -> Needs:
    """What the run makes or takes over, and how much of it."""
    budgets = recipe.train.budgets
    return {
        (name, digest): budgets[int(name.split()[1])] if name.startswith("text") else 0
        for name, digest in common_work(recipe).items()
    }


def lacking(wanted: Needs, stock: Needs) -> set[tuple[str, str]]:
    """What is wanted and is not there, or is text that is too short."""
    return {key for key, tokens in wanted.items() if stock.get(key, -1) < tokens}


def put_in(stock: Needs, run: Path, wanted: Needs) -> None:
    """Add to `stock` what this run has made, or taken over, of what it wanted."""
    for key, tokens in wanted.items():
        if stock.get(key, -1) < tokens and made(run, key[0]):
            stock[key] = tokens


def in_folders(folders: Iterable[Path]) -> Needs:
    """What lies in the folders of runs that an earlier call made."""
    stock: Needs = {}
    for folder in folders:
        recipe = _recipe_of(folder)
        if recipe is not None:
            put_in(stock, folder, needs(recipe))
    return stock


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
    other = _recipe_of(donor)
    theirs = {} if other is None else common_work(other)
    return any(theirs.get(name) == digest for name, digest in common_work(recipe).items() if name.startswith("text"))


def _recipe_of(run: Path) -> Recipe | None:
    """None where there is none that can be read: of another version, or of a machine where its files lay elsewhere."""
    path = run / "recipe.yaml"
    try:
        return load_recipe(path) if path.exists() else None
    except RecoverError:
        return None


def _lend_text(folders: Sequence[Path], target: Path, tokens: int) -> list[str]:
    """Of each file the beginning that holds so many tokens, from the donor that has most, where it is missing."""
    longest: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("dense-*.jsonl"))):
        known = longest.get(path.name)
        if known is None or known.stat().st_size < path.stat().st_size:
            longest[path.name] = path
    lent = []
    for name, path in sorted(longest.items()):
        beginning, there = _beginning(path, tokens), target / name
        if not there.exists() or there.stat().st_size < len(beginning):
            target.mkdir(parents=True, exist_ok=True)
            _beside(there).write_bytes(beginning)
            os.replace(_beside(there), there)
            lent.append(name)
    return lent


def _beginning(path: Path, tokens: int) -> bytes:
    """Whole lines of written text, as many as hold so many tokens; all, if they hold fewer."""
    lines, held = [], 0
    with path.open("rb") as file:
        for line in file:
            if held >= tokens:
                break
            lines.append(line)
            held += sum(len(ids) for _, ids in json.loads(line)["rows"])
    return b"".join(lines)


def _copy(source: Path, target: Path) -> None:
    """A folder, whole under its name or not at all: a half copied stage would count as done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(_beside(target), ignore_errors=True)
    shutil.copytree(source, _beside(target))
    os.replace(_beside(target), target)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def made(run: Path, work: str) -> bool:
    """Whether the run has done this piece of `common_work`, so that others can take it over."""
    if work.startswith("text"):
        return text_is_written(run)
    return RunDirectory(run).done({"prune": "before"}.get(work, work)) is not None


def texts_of(run: Path) -> Path:
    """Where the text lies that the dense model wrote for a run."""
    return RunDirectory(run).train / "data"


def text_is_written(run: Path) -> bool:
    """A first step was made, so the text for all steps is there."""
    steps = RunDirectory(run).train / "steps.jsonl"
    return steps.exists() and steps.stat().st_size > 0
