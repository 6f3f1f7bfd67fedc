"""`recover forecast`: what a recovery will probably bring, before it is paid for. `cli.py` gives it its place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recover.base import dist
from recover.base.errors import RecipeError
from recover.commands.run import Overrides, RecipePath, Runs
from recover.config.recipe import load_recipe
from recover.forecast.advice import PART

LEAST, MOST = 0.02, 0.5
EXAMPLES = (
    "recover forecast recipes/quickstart.yaml",
    "recover forecast recipes/quickstart.yaml prune.count=4 --part 0.3",
    "recover forecast recipes/my.yaml prune.count=4 --calibrate checkpoints/drop2 --calibrate checkpoints/drop3",
)
Part = Annotated[float, typer.Option("--part", help="Tokens of the trial, as a part of the recipe's.")]
Calibrate = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibrate", metavar="RUN_DIR", help="A finished run of your own to calibrate on, too; may be repeated."
    ),
]


def forecast(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("checkpoints"),
    part: Part = PART,
    calibrate: Calibrate = None,
) -> None:
    """Say what recovery will probably bring: prune, a short trial, go, no-go or cannot tell.

    The trial is kept apart from the recovery, which reads the text again that was written for it.
    """
    if not LEAST <= part <= MOST:
        raise RecipeError(f"--part: found {part:g}, expected {LEAST:g} to {MOST:g} of the recipe's tokens")
    loaded = load_recipe(recipe, overrides or [])
    from recover.forecast import told
    from recover.run import trial

    found = trial.forecast(loaded, runs, part=part, calibration=calibrate or ())
    if dist.is_main():
        told.say(found)
    dist.stop()
