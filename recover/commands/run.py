"""Commands on runs: those that run the stages of a recipe, all of them or up to one, and those that read run folders.

`cli.py` gives them their place and their errors.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from recover.base import console, dist, products
from recover.base.artifacts import plain, read_json, write_text
from recover.base.errors import ArtifactError, RecipeError, RecoverError
from recover.config import yaml_values
from recover.config.base import field_paths
from recover.config.recipe import Recipe, load_recipe
from recover.report import verdict
from recover.report.collect import collect
from recover.report.data import CHANGED, ComparedRun
from recover.report.verdict import headline_words
from recover.run import stages
from recover.run.directory import RunDirectory, StageState

OVERRIDE_HELP = (
    "Fields to set over the recipe: [bold]prune.count=3[/bold] [bold]train.lr=1e-3[/bold] "
    "[bold]train.data.0.share=2[/bold] (dotted path, list index from 0, value as YAML)."
)
RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="YAML file of one complete run, such as `recover init` writes, or embedded:quickstart.",
        show_default=False,
    ),
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
Untimed = Annotated[
    bool, typer.Option("--untimed", help="Do not time a step and a text on this machine: say a floor, from arithmetic.")
]


def _run(
    recipe: Path,
    overrides: list[str] | None,
    runs: Path,
    until: str,
    start: str | None = None,
    *,
    timed: bool = False,
) -> None:
    loaded = load_recipe(recipe, overrides or [])
    stages.run(loaded, runs, until=until, start=start, timed=timed)
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


def plan(
    recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("checkpoints"), untimed: Untimed = False
) -> None:
    """Check a recipe and say what it will cost: sizes, memory, and time on this machine.

    For the time a step, a text and a probe are timed on a few blocks with random weights, or on a small model itself.
    Nothing is written. Of a run that is there it says which stages would be done again, and why.
    """
    _run(recipe, overrides, runs, "plan", timed=not untimed)


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


Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of run directories.")]
COLUMNS = ("run", "model", "pruned", "done", "when", "dense", "pruned to", "recovered to", "size")


NO_RUN = "runs are in checkpoints/, or where --runs said; `recover quickstart` makes one"


def list_(folder: Folder = Path("checkpoints")) -> None:
    """List the runs of a folder, the newest first: what is done, and generation of dense, pruned and recovered."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; {NO_RUN}")
    runs = sorted(filter(_is_run, folder.iterdir()), key=lambda path: path.name)
    if not runs:
        raise ArtifactError(f"{folder}: holds no run; `recover quickstart` makes one")
    rows = sorted((_row(RunDirectory(path)) for path in runs), key=lambda row: row[4], reverse=True)
    console.table(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} in {folder}", COLUMNS, rows)
    console.say("[dim]generation; recover show RUN says more, recover compare RUN RUN puts runs side by side[/dim]")


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and RunDirectory(path).is_run


def _row(run: RunDirectory) -> tuple[Any, ...]:
    """What its files say; of a run with a broken file, that."""
    name = run.root.name
    try:
        recipe = yaml_values.read(run.recipe)
        wanted = _wanted(recipe)
        stamps = [stamp for stage in wanted if (stamp := run.done(stage))]
        found = [_generation(folder / "measure.json") for folder in (run.dense, run.before, run.after)]
    except RecoverError as error:
        return (name, str(error), "", "", "", None, None, None, None)
    last = max((stamp["finished"] for stamp in stamps), default="")
    when = datetime.fromisoformat(last).astimezone().strftime("%Y-%m-%d %H:%M") if last else ""
    done = "all" if len(stamps) == len(wanted) else f"{len(stamps)} of {len(wanted)}"
    weights = sum(path.stat().st_size for path in run.deploy.glob("*.safetensors"))
    source = str((recipe.get("model") or {}).get("source", ""))
    return (name, Path(source).name, _pruning(recipe), done, when, *found, console.size(weights) if weights else None)


def _wanted(recipe: dict[str, Any]) -> tuple[str, ...]:
    """The stages that the tree of a recipe asks for, which may be one of another version."""
    return stages.names(deploy=bool((recipe.get("deploy") or {}).get("quantize")))


def _generation(path: Path) -> str | None:
    if not path.is_file():
        return None
    value = (read_json(path).get("headline") or {}).get("generation")
    return headline_words("generation", value) if isinstance(value, int | float) else None


def _pruning(recipe: dict[str, Any]) -> str:
    """The kind, and the first field that says how much."""
    cfg = dict(recipe.get("prune") or {})
    amount = next((f"{cfg[name]}" for name in ("count", "blocks", "sites", "mlp", "pattern") if _says(cfg, name)), "")
    return f"{cfg.get('kind', '')} {amount or cfg.get('sparsity') or ''}".strip()


def _says(cfg: dict[str, Any], name: str) -> bool:
    return plain(cfg.get(name)) not in (None, "unstructured")


PAGES = (".html", ".htm")  # endings of a page
RUNS = Path("checkpoints")  # where runs are written by default
RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run directory, such as checkpoints/quickstart, its name, or a folder of runs."),
]
Folders = Annotated[
    list[Path], typer.Argument(metavar="FOLDER...", help="Run directories, or folders that `recover diagnose` wrote.")
]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")]


def report(
    run_dirs: Folders,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The page that compares several runs, replaced when it is there; default: beside them."
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the main figures of all runs as a table, too.")
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option("--latex", help="Write that table for LaTeX (booktabs), too; replaced when it is there."),
    ] = None,
) -> None:
    """Write the report of each run again, finished or not, and a comparison of several; of a diagnosis, its page."""
    from recover.report.render import is_diagnosis, is_page, render, render_diagnosis

    for path, endings in ((out, PAGES), (csv, (".csv", ".tsv", ".txt")), (latex, (".tex", ".txt"))):
        if path is not None:
            products.refuse_other_kind(path, *endings)
    roots = []
    for path in _folders(run_dirs):
        if is_diagnosis(path):
            console.say(str(render_diagnosis(path)))
            continue
        directory = _existing(path)
        if not directory.is_run:
            raise ArtifactError(
                f"{path}: has a recipe.yaml, and nothing that says that recover made this folder; a report would "
                "replace files in it. Expected a run directory"
            )
        _say_lost(directory)
        data = collect(directory.root)
        for line in data["mixed"]:
            console.warn(f"{directory.root}: {line}")
        render(directory.root, data)
        console.say(str(directory.report_html))
        roots.append(directory.root)
    if len(roots) > 1:
        beside = roots[0].parent / "comparison.html"
        if out is None and beside.exists() and not is_page(beside):
            raise ArtifactError(f"{beside}: is there and is no page of recover's; say with --out where to write")
        _compare_page(roots, out or beside)
    _paper_table(roots, csv, latex)


def _compare_page(roots: list[Path], path: Path) -> None:
    from recover.report.compare import compare, render_compare

    data = compare(roots)
    for line in data["apart"]:
        console.warn(line)
    console.say(str(render_compare(data, path)))


def _paper_table(roots: list[Path], csv: Path | None, latex: Path | None) -> None:
    from recover.report.compare import as_csv, as_latex, paper_table

    if (csv or latex) and not roots:
        raise RecipeError("--csv, --latex: a table of runs; a diagnosis has none")
    for path, written in ((csv, as_csv), (latex, as_latex)):
        if path is not None:
            write_text(path, written(*paper_table(roots)))
            console.say(str(path))


def _say_lost(directory: RunDirectory) -> None:
    """Warn of each stage of which a file is gone or changed that is shown here."""
    for stage in products.NAMES:
        lost = directory.lost(stage, shown=True)
        if lost is not None:
            again = "" if stage == "plan" else f" --from {stage}"  # a plan is made anew at every run
            console.warn(
                f"{directory.root}: {lost}; what is shown is what is there. Put the file back, or do the stage again: "
                f"recover run RECIPE{again}"
            )


def show(run_dir: RunPath = RUNS) -> None:
    """Say which stages of a run are done, why one would be done again, the best epoch, and the headline figures.

    Of a folder of runs: which there are.
    """
    if (runs := _runs_in(run_dir)) and not (run_dir / "recipe.yaml").is_file():
        console.table(str(run_dir), ["run", "done", "open"], [_listed(run) for run in runs])
        console.say(f"of one of them: recover show {runs[0].root}")
        return
    directory = _existing(run_dir)
    with products.taken_apart(directory.root):
        _say_lost(directory)
        rows = [_state(row) for row in stages.status(directory.root)]
        console.table(str(directory.root), ["stage", "state", "finished", "why"], rows)
        data = collect(directory.root)
        for line in data["mixed"]:
            console.warn(line)
        verdict.print_headline(data)
        for epoch in data["epochs"]:
            if epoch["best"]:
                score = verdict.headline_words("generation", epoch["score"])
                console.say(f"best epoch: {epoch['epoch']} of {len(data['epochs'])}, generation {score}")
        for line in data["foretold"]:
            console.say(line)


def compare(
    run_dirs: RunPaths,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write it as a page with a picture, too; replaced when it is there.")
    ] = None,
) -> None:
    """Put runs side by side, best recovered generation first; tasks as a share of what the dense model reaches."""
    from recover.report import compare as page

    if html is not None:
        products.refuse_other_kind(html, *PAGES)
    data = page.compare([_existing(path).root for path in _folders(run_dirs)])
    columns = ["run", "generation", "after recovery", "choice", "after recovery", "perplexity", "weights"]
    with products.taken_apart(run_dirs[0].parent):
        console.table("pruned, and after recovery", columns, map(_compared, data["runs"]))
        console.table("dense → deployed", page.SPEED_COLUMNS, map(page.speed_row, data["runs"]))
    if ranking := page.ranking(data):
        console.say(f"{ranking}.")
    for line in data["apart"]:
        console.warn(line)
    if html is not None:
        console.say(str(page.render_compare(data, html)))


def _compared(run: ComparedRun) -> list[str | None]:
    kept = [run["kept"][model][use] for use in ("generation", "choice") for model in CHANGED]
    perplexity = run["perplexity"]["recovered"]
    return [
        run["name"],
        *(None if share is None else verdict.share(share) for share in kept),
        None if perplexity is None else console.perplexity(perplexity),
        _percent(run["parameters"]),
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _state(row: StageState) -> list[str]:
    if row["finished"] is None:
        return [row["stage"], "open", "", ""]
    finished = datetime.fromisoformat(row["finished"]).astimezone().strftime("%Y-%m-%d %H:%M")
    return [row["stage"], "stale" if row["stale"] else "done", finished, row["stale"] or ""]


def _folders(paths: list[Path]) -> list[Path]:
    """What a shell makes of `checkpoints/*` holds files, too: they are passed over where there is a folder."""
    return [path for path in paths if not path.is_file()] or paths


def _existing(path: Path) -> RunDirectory:
    """The run in this folder, or of this name in the folder where runs are written by default."""
    directory = next(
        (run for run in map(RunDirectory, (path, RUNS / path)) if run.recipe.is_file()), RunDirectory(path)
    )
    if not directory.recipe.is_file():
        inside, beside = _runs_in(path), _runs_in(path.absolute().parent) or _runs_in(RUNS)
        there = ", ".join(run.root.name for run in inside or beside)
        where = "in it are" if inside else "beside it are" if _runs_in(path.absolute().parent) else f"in {RUNS} are"
        what = "not a run directory, it has no recipe.yaml" if there or path.is_dir() else "no such folder"
        raise ArtifactError(f"{path}: {what}; {f'{where} {there}' if there else NO_RUN}")
    return directory


def _runs_in(folder: Path) -> list[RunDirectory]:
    return [RunDirectory(found.parent) for found in sorted(folder.glob("*/recipe.yaml"))]


def _listed(run: RunDirectory) -> list[str]:
    """A row of the list of runs: its name, the stages that are done, and those that are not."""
    try:
        recipe = yaml_values.read(run.recipe)
    except RecoverError:
        recipe = {}  # what is done can be said without
    names = [stage for stage in _wanted(recipe) if not stages.OF[stage].always]
    done = [stage for stage in names if run.done(stage) is not None]
    return [run.root.name, ", ".join(done) or "–", ", ".join(stage for stage in names if stage not in done) or "–"]


COMMANDS = {
    run: (
        "recover run embedded:quickstart",
        "recover run embedded:quickstart prune.count=3 train.lr=1e-3",
        "recover run embedded:quickstart name=mine 'prune={kind: depth, blocks: [3, 4]}'",
        "recover run embedded:quickstart --from train",
        "recover run embedded:quickstart deploy.quantize=q8_0 deploy.beside=dense",
        "accelerate launch --config_file launch/zero2.yaml -m recover run embedded:quickstart",
    ),
    quickstart: (
        "recover quickstart",
        "recover quickstart prune.count=3 name=three",
    ),
    plan: (
        "recover plan embedded:quickstart",
        "recover plan embedded:quickstart prune.count=3",
    ),
    prune: (
        "recover prune embedded:quickstart",
        "recover prune embedded:quickstart prune.count=3",
    ),
    probe: (
        "recover probe embedded:quickstart",
        "recover probe embedded:quickstart probe.steps=64",
    ),
    train: (
        "recover train embedded:quickstart",
        "recover train embedded:quickstart train.epochs=5",
    ),
    export: (
        "recover export embedded:quickstart",
        "recover export embedded:quickstart export.dtype=bfloat16",
    ),
    list_: ("recover list", "recover list checkpoints"),
    report: (
        "recover report checkpoints/quickstart",
        "recover report checkpoints/drop2 checkpoints/drop4 checkpoints/wanda",
        "recover report checkpoints/drop2 checkpoints/drop4 --csv table.csv --latex table.tex",
        "recover report my-diagnosis",
    ),
    show: ("recover show checkpoints/quickstart", "recover show quickstart", "recover show"),
    compare: (
        "recover compare checkpoints/drop2 checkpoints/drop4",
        "recover compare checkpoints/* --html all.html",
    ),
}
