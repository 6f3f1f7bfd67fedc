"""`recover list`: the runs of a folder, the newest first. `cli.py` gives it its place and its errors."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from recover.base import console, units
from recover.base.artifacts import plain, read_json
from recover.base.errors import ArtifactError, RecoverError
from recover.config import yaml_values
from recover.report.verdict import headline_words
from recover.run.directory import RunDirectory
from recover.run.stages import STAGES

EXAMPLES = ("recover list", "recover list checkpoints")
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of run directories.")]
COLUMNS = ("run", "model", "pruned", "done", "when", "dense", "pruned to", "recovered to", "size")


def list(folder: Folder = Path("checkpoints")) -> None:
    """List the runs of a folder, the newest first: what is done, and generation of dense, pruned and recovered."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; runs are in checkpoints/, or where --runs said")
    runs = sorted(filter(_is_run, folder.iterdir()), key=lambda path: path.name)
    if not runs:
        raise ArtifactError(f"{folder}: holds no run; `recover quickstart` makes one")
    rows = sorted((_row(RunDirectory(path)) for path in runs), key=lambda row: row[4], reverse=True)
    console.table(f"{len(runs)} runs in {folder}", COLUMNS, rows)
    console.say("[dim]generation; recover show RUN says more, recover compare RUN RUN puts runs side by side[/dim]")


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and RunDirectory(path).is_run


def _row(run: RunDirectory) -> tuple[Any, ...]:
    """What its files say; of a run with a broken file, that."""
    name = run.root.name
    try:
        recipe = yaml_values.read(run.recipe)
        stamps = [stamp for stage in STAGES if (stamp := run.done(stage))]
        found = [_generation(folder / "measure.json") for folder in (run.dense, run.before, run.after)]
    except RecoverError as error:
        return (name, str(error), "", "", "", None, None, None, None)
    last = max((stamp["finished"] for stamp in stamps), default="")
    when = datetime.fromisoformat(last).astimezone().strftime("%Y-%m-%d %H:%M") if last else ""
    done = "all" if len(stamps) == len(STAGES) else f"{len(stamps)} of {len(STAGES)}"
    weights = sum(path.stat().st_size for path in run.deploy.glob("*.safetensors"))
    source = str((recipe.get("model") or {}).get("source", ""))
    return (name, Path(source).name, _pruning(recipe), done, when, *found, units.size(weights) if weights else None)


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


COMMANDS = {list: EXAMPLES}
