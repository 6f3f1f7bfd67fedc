"""The command line. It calls the stages or the report and says errors in one line; it never imports torch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from recover import __version__, console, dist
from recover.errors import ArtifactError, RecipeError, RecoverError
from recover.recipe import load_recipe
from recover.run_directory import RunDirectory

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INTERRUPTED = 130  # 128 + SIGINT, as shells say it

app = typer.Typer(
    help="Prune a language model and get its generation back.",
    epilog="[bold]Examples[/bold]\n\n"
    "  recover run recipes/quickstart.yaml            all of it, in minutes on a CPU\n\n"
    "  recover plan recipes/quickstart.yaml           what it will cost, before any weight is loaded\n\n"
    "  recover show checkpoints/quickstart            which stages are done, and what came out\n\n"
    "  accelerate launch --config_file launch/gpu.yaml -m recover run recipes/quickstart.yaml",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # plain tracebacks: they are for reports and logs
)


def examples(*lines: str) -> str:
    """The end of a help page; a blank line keeps rich from joining two commands."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


OVERRIDE_HELP = (
    "Fields to set over the recipe: [bold]prune.count=3[/bold] [bold]recover.lr=1e-3[/bold] "
    "[bold]recover.data.0.share=2[/bold] (dotted path, list index from 0, value as YAML)."
)
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file of one complete run.", show_default=False)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDE_HELP, show_default=False)]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of run directories; this run writes to RUNS/<name>.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="STAGE",
        help="Do this stage and all after it again: plan, dense, prune, before, recover, after, export or report.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do every stage again, whatever is done.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory, such as checkpoints/quickstart.")]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")]


def says_errors(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A user's error is one line on stderr and its exit code; anything else keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except RecoverError as error:
            console.error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return guarded


def _version(wanted: bool) -> None:
    if wanted:
        console.say(f"recover {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Typer asks for the options before the command here."""


def _run(recipe: Path, overrides: list[str] | None, runs: Path, until: str, start: str | None = None) -> None:
    loaded = load_recipe(recipe, overrides or [])
    from recover import stages

    stages.run(loaded, runs, until=until, start=start)
    # Only after success: with a failure on one process, taking the group down would wait for the others.
    dist.stop()


@app.command(
    epilog=examples(
        "recover run recipes/quickstart.yaml",
        "recover run recipes/quickstart.yaml prune.count=3 recover.lr=1e-3",
        "recover run recipes/quickstart.yaml name=mine 'prune={kind: depth, blocks: [3, 4]}'",
        "recover run recipes/quickstart.yaml --from recover",
        "accelerate launch --config_file launch/zero2.yaml -m recover run recipes/quickstart.yaml",
    )
)
@says_errors
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("checkpoints"),
    start: From = None,
    fresh: Fresh = False,
) -> None:
    """Do all stages of a recipe: plan, dense, prune, before, recover, after, export, report.

    What is done and still fits the recipe is skipped; a training that was stopped goes on where it was.
    """
    if fresh and start is not None:
        raise RecipeError("--fresh does every stage again, --from only some: give one of them")
    _run(recipe, overrides, runs, "report", "plan" if fresh else start)


@app.command(
    epilog=examples("recover plan recipes/quickstart.yaml", "recover plan recipes/quickstart.yaml prune.count=3")
)
@says_errors
def plan(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Check a recipe and say what it will cost, before any weight is loaded."""
    _run(recipe, overrides, runs, "plan")


@app.command(
    epilog=examples("recover prune recipes/quickstart.yaml", "recover prune recipes/quickstart.yaml prune.count=3")
)
@says_errors
def prune(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to pruning: which blocks or weights go, and the scores behind it."""
    _run(recipe, overrides, runs, "prune")


@app.command(
    epilog=examples("recover probe recipes/quickstart.yaml", "recover probe recipes/quickstart.yaml probe.steps=64")
)
@says_errors
def probe(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to the diagnosis of the pruned model: drift in three spaces, tasks, where texts diverge."""
    _run(recipe, overrides, runs, "before")


@app.command(
    epilog=examples("recover train recipes/quickstart.yaml", "recover train recipes/quickstart.yaml recover.epochs=5")
)
@says_errors
def train(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to recovery: LoRA distillation from the dense model, generation measured after each epoch."""
    _run(recipe, overrides, runs, "recover")


@app.command(
    epilog=examples(
        "recover export recipes/quickstart.yaml", "recover export recipes/quickstart.yaml export.dtype=bfloat16"
    )
)
@says_errors
def export(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints")) -> None:
    """Run up to the exported checkpoint, verified in a fresh process; stock tools load it."""
    _run(recipe, overrides, runs, "export")


@app.command(epilog=examples("recover report checkpoints/quickstart", "recover report checkpoints/*"))
@says_errors
def report(run_dirs: RunPaths) -> None:
    """Write report.json, report.md and report.html of finished or half-finished runs again."""
    from recover.report.collect import collect
    from recover.report.render import render

    for directory in map(_existing, run_dirs):
        render(directory.root, collect(directory.root))
        console.say(str(directory.report_html))


@app.command(epilog=examples("recover show checkpoints/quickstart"))
@says_errors
def show(run_dir: RunPath) -> None:
    """Say which stages of a run are done, why one would be done again, the best epoch, and the headline figures."""
    from recover import stages
    from recover.report.collect import collect

    directory = _existing(run_dir)
    console.table(
        str(directory.root), ["stage", "state", "finished", "why"], map(_state, stages.status(directory.root))
    )
    data = collect(directory.root)
    console.table("headline", ["model", *FIGURES], [[model, *_figures(data, model)] for model in data["headline"]])
    for epoch in data["epochs"]:
        if epoch["best"]:
            console.say(f"best epoch: {epoch['epoch']}, score {epoch['score']:.4g}, of {len(data['epochs'])}")


@app.command(
    epilog=examples(
        "recover compare checkpoints/drop2 checkpoints/drop4", "recover compare checkpoints/* --html all.html"
    )
)
@says_errors
def compare(
    run_dirs: RunPaths,
    html: Annotated[Path | None, typer.Option("--html", help="Write it as a page with a picture, too.")] = None,
) -> None:
    """Put runs side by side, best recovered generation first; tasks as a share of what the dense model reaches."""
    from recover.report import compare as comparison

    data = comparison.compare([_existing(path).root for path in run_dirs])
    columns = ["run", "generation", "after recovery", "choice", "after recovery", "perplexity", "weights", "decoding"]
    console.table("pruned, and after recovery", columns, map(_compared, data["runs"]))
    if not data["same_dense"]:
        console.warn("these runs start from different dense models: their shares have different wholes")
    if html is not None:
        console.say(str(comparison.render_compare(data, html)))


def _compared(run: dict[str, Any]) -> list[str | None]:
    kept = [run["kept"][model][use] for use in ("generation", "choice") for model in ("pruned", "recovered")]
    perplexity = run["perplexity"]["recovered"]
    return [
        run["name"],
        *(_percent(share) for share in kept),
        None if perplexity is None else f"{perplexity:.4g}",
        _percent(run["parameters"]),
        None if run["decoding"] is None else f"x{run['decoding']:.2f}",
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


FIGURES = ("generation", "choice", "retrieval", "perplexity")


def _figures(data: dict[str, Any], model: str) -> list[float | None]:
    headline = data["headline"][model] or {}
    values = (headline.get(name) for name in FIGURES)
    return [value["value"] if isinstance(value, dict) else value for value in values]


def _state(row: dict[str, Any]) -> list[str]:
    if not row["done"]:
        return [row["stage"], "open", "", ""]
    finished = datetime.fromisoformat(row["finished"]).astimezone().strftime("%Y-%m-%d %H:%M")
    return [row["stage"], "stale" if row["stale"] else "done", finished, row["stale"] or ""]


def _existing(path: Path) -> RunDirectory:
    directory = RunDirectory(path)
    if not directory.recipe.is_file():
        beside = sorted(found.parent.as_posix() for found in path.absolute().parent.glob("*/recipe.yaml"))
        there = f"; beside it are {', '.join(Path(name).name for name in beside)}" if beside else ""
        raise ArtifactError(f"{path}: not a run directory, it has no recipe.yaml{there}")
    return directory


def main() -> None:
    """Entry point of `recover` and of `python -m recover`."""
    app(prog_name="recover")
