"""Commands that run the stages of a recipe, all of them or up to one. `cli.py` gives them their place and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recover.base import dist
from recover.base.errors import RecipeError
from recover.config.base import field_paths
from recover.config.recipe import Recipe, load_recipe

OVERRIDE_HELP = (
    "Fields to set over the recipe: [bold]prune.count=3[/bold] [bold]train.lr=1e-3[/bold] "
    "[bold]train.data.0.share=2[/bold] (dotted path, list index from 0, value as YAML)."
)
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file of one complete run.", show_default=False)
]


def _fields(incomplete: str) -> list[str]:
    """For a shell: the fields of a recipe that begin so."""
    paths = (path.replace("train.data.", "train.data.0.") for path in field_paths(Recipe))
    return sorted({f"{path}=" for path in paths if path.startswith(incomplete)})


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help=OVERRIDE_HELP, show_default=False, autocompletion=_fields),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of run directories; this run writes to RUNS/<name>.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="STAGE",
        help="Do this stage and all after it again: plan, dense, prune, before, train, after, export, deploy (where it "
        "is asked for) or report.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do every stage again, whatever is done.")]


def _run(recipe: Path, overrides: list[str] | None, runs: Path, until: str, start: str | None = None) -> None:
    loaded = load_recipe(recipe, overrides or [])
    from recover.run import stages

    stages.run(loaded, runs, until=until, start=start)
    # Only after success: with a failure on one process, taking the group down would wait for the others.
    dist.stop()


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("checkpoints"),
    start: From = None,
    fresh: Fresh = False,
) -> None:
    """Do all stages of a recipe: plan, dense, prune, before, train, after, export, report.

    With deploy.quantize a stage deploy comes before the report: a quantized GGUF file, measured.
    What is done and still fits the recipe is skipped; a training that was stopped goes on where it was.
    """
    if fresh and start is not None:
        raise RecipeError("--fresh does every stage again, --from only some: give one of them")
    _run(recipe, overrides, runs, "report", "plan" if fresh else start)


def quickstart(overrides: Overrides = None, runs: Runs = Path("checkpoints"), fresh: Fresh = False) -> None:
    """Do the whole job on the small model that ships with the package: CPU, offline, minutes."""
    _run(Path("embedded:quickstart"), overrides, runs, "report", "plan" if fresh else None)


def plan(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Check a recipe and say what it will cost, before any weight is loaded.

    Nothing is written. Of a run that is there it says which stages would be done again, and why.
    """
    _run(recipe, overrides, runs, "plan")


def prune(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to pruning: which blocks or weights go, and the scores behind it."""
    _run(recipe, overrides, runs, "prune")


def probe(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to the diagnosis of the pruned model: drift in three spaces, tasks, where texts diverge."""
    _run(recipe, overrides, runs, "before")


def train(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to recovery: LoRA distillation from the dense model, generation measured after each epoch."""
    _run(recipe, overrides, runs, "train")


def export(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to the exported checkpoint, verified in a fresh process; stock tools load it."""
    _run(recipe, overrides, runs, "export")


COMMANDS = {
    run: (
        "recover run recipes/quickstart.yaml",
        "recover run recipes/quickstart.yaml prune.count=3 train.lr=1e-3",
        "recover run recipes/quickstart.yaml name=mine 'prune={kind: depth, blocks: [3, 4]}'",
        "recover run recipes/quickstart.yaml --from train",
        "recover run recipes/quickstart.yaml deploy.quantize=q8_0 deploy.beside=dense",
        "accelerate launch --config_file launch/zero2.yaml -m recover run recipes/quickstart.yaml",
    ),
    quickstart: (
        "recover quickstart",
        "recover quickstart prune.count=3 name=three",
    ),
    plan: (
        "recover plan recipes/quickstart.yaml",
        "recover plan recipes/quickstart.yaml prune.count=3",
    ),
    prune: (
        "recover prune recipes/quickstart.yaml",
        "recover prune recipes/quickstart.yaml prune.count=3",
    ),
    probe: (
        "recover probe recipes/quickstart.yaml",
        "recover probe recipes/quickstart.yaml probe.steps=64",
    ),
    train: (
        "recover train recipes/quickstart.yaml",
        "recover train recipes/quickstart.yaml train.epochs=5",
    ),
    export: (
        "recover export recipes/quickstart.yaml",
        "recover export recipes/quickstart.yaml export.dtype=bfloat16",
    ),
}
