"""The paper's comparison in miniature: when does pruning spare choice and retrieval, and break generation?

    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/paper/paper.py --out checkpoints/paper --seconds 240
    python benchmarks/paper/paper.py --out checkpoints/paper --figures-only

He et al., "Demystifying When Pruning Works via Representation Hierarchies", arXiv 2603.24652. One process loads the
model once and shows it dense, with n attentions, MLPs or blocks dropped, with Wanda's masks, in 4 and 6 bits. Each row
measures generation, choice, retrieval and perplexity, the drift of hidden state, logits and probabilities along the
dense model's texts, and drift among the options of a choice; some rows also go block by block and along their own
texts. `rows.jsonl` grows by a row at a time: a call that finds some does the others. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from claims import claims
from drift import Texts, asked_of, choices, follow
from figures import write_figures
from plans import PROBED, Plans, Row, rows_of, showing
from table import markdown

from recover.base import console, dist, provenance
from recover.base.artifacts import append_jsonl, read_json, read_jsonl, write_json, write_text
from recover.base.errors import RecoverError
from recover.config.recipe import Recipe, load_recipe
from recover.measure.tasks import load_task, measure
from recover.models.load import load_model, load_tokenizer, ready
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.prune.calibrate import calibration_batches
from recover.train.sources import read_prompts

HERE = Path(__file__).resolve().parents[1]
SMOLLM2 = HERE / "smollm2"
RECIPE = HERE.parent / "recipes" / "smollm2-135m-drop3.yaml"
FORMERLY = {"int4": "rounded"}  # what a family was called in rows made before 6 bits stood beside 4


def main() -> None:
    began = time.monotonic()
    options = _options()
    rows_file = options.out / "rows.jsonl"
    if not options.figures_only:
        options.out.mkdir(parents=True, exist_ok=True)
        run(options, rows_file, began)
    rows = [row | {"family": FORMERLY.get(row["family"], row["family"])} for row in read_jsonl(rows_file)]
    if not rows:
        sys.exit(f"{rows_file}: no rows, nothing to draw")
    table = f"{markdown(rows)}\n{claims(rows)}"
    write_text(options.out / "paper.md", table)
    for path in write_figures(rows, options.out):
        console.say(f"wrote {path}")
    console.say(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE, help="its model, calibration, tasks and seed")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, paper.md (tables) and figures")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="such as attention-8, mlp-4, block-3, wanda-2of4")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row that would not end by then")
    parser.add_argument("--tasks", nargs="+", help="task files (default: the recipe's; with SmolLM2's, retrieval too)")
    parser.add_argument("--items", type=int, help="items of each task (default: all)")
    parser.add_argument("--samples", type=int, default=128, help="prompts that drift is followed on (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="decoding steps of each (%(default)s)")
    parser.add_argument("--prompts", type=Path, help="JSONL with a `prompt` column (default: SmolLM2's broad prompts)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields")
    parser.add_argument("--figures-only", action="store_true", help="draw what rows.jsonl holds")
    return parser.parse_args()


def run(options: argparse.Namespace, rows_file: Path, began: float) -> None:
    """Append the rows that are missing, while there is time for one more."""
    recipe = load_recipe(options.recipe, options.set)
    settings = _settings(recipe, options)
    _same_settings(options.out / "settings.json", settings)
    done = {row["row"] for row in read_jsonl(rows_file)} if rows_file.exists() else set()
    work = Work(recipe, options)
    console.say(f"model and dense texts ready after {time.monotonic() - began:.0f} s")
    longest = 0.0
    for row in rows_of(work.plans.blocks):
        if row.name in done or (options.only and row.name not in options.only and row.name != "dense"):
            continue
        if time.monotonic() - began + longest > options.seconds:
            console.warn(f"{row.name} and what follows it was left out: the time is over; call again for the others")
            return
        start = time.monotonic()
        found = work.row(row)
        append_jsonl(rows_file, found)
        longest = max(longest, time.monotonic() - start)
        console.say(_line(found))


def _settings(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    names = ("items", "samples", "steps")
    return {
        "model": recipe.model.source,
        "dtype": recipe.model.dtype,
        "tasks": [Path(task).name for task in _tasks(recipe, options)],
        "seed": recipe.seed,
    } | {name: getattr(options, name) for name in names}


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Rows of two settings must not stand in one table."""
    if path.exists() and (found := read_json(path)["settings"]) != settings:
        differing = {name: (found.get(name), value) for name, value in settings.items() if found.get(name) != value}
        sys.exit(f"{path}: its rows were made otherwise (there, here): {differing}. Give another --out")
    write_json(path, {"settings": settings, "environment": provenance.environment(), "machine": provenance.machine()})


class Work:
    """The loaded model, what it is measured with, and the dense model's texts."""

    def __init__(self, recipe: Recipe, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(recipe.model)
        calibration = getattr(recipe.prune, "calibration", None)
        if calibration is None:
            sys.exit(f"{options.recipe}: its prune.calibration is what rows are scored on, and it has none")
        model = ready(load_model(recipe.model))
        self.twin = Twin(model, Plan.none(model.config.num_hidden_layers))
        self.plans = Plans(self.twin, calibration, calibration_batches(calibration, self.tokenizer, recipe.seed))
        changes = {"sampling": None, "samples": 0, "batch_size": options.batch_size, "limit": options.items}
        self.cfg, self.seed = recipe.measure.model_copy(update=changes), recipe.seed
        self.tasks = [load_task(source) for source in _tasks(recipe, options)]
        choice = next((task for task in self.tasks if task.kind == "choice"), None)
        self.asked = asked_of(self.tokenizer, choice, options.items) if choice else []
        self.texts = Texts(
            self.twin,
            self.tokenizer,
            _prompts(recipe, options, self.tasks)[: options.samples],
            steps=options.steps,
            batch_size=options.batch_size,
        )
        self.dense_file = options.out / "dense.json"

    def row(self, row: Row) -> dict[str, Any]:
        """Everything that is measured of one row."""
        seconds: dict[str, float] = {}
        pruned = _timed(seconds, "prune", lambda: self.plans.pruned(row))
        with showing(self.twin, pruned):
            measured = _timed(seconds, "measure", self._measured)
            drift = _timed(seconds, "drift", lambda: follow(self.twin, self.texts, whole=row.name in PROBED))
            asked = _timed(seconds, "choice", self._choices)
        plan = pruned.plan
        return {
            "row": row.name,
            "family": row.family,
            "count": row.count,
            "dropped": sorted({site.block for site in plan.sites}),
            "nonzero": plan.nonzero / plan.parameters_dense if plan.parameters_dense else 1.0,
            **measured,
            "drift": drift,
            "choice": asked,
            "seconds": seconds,
        }

    def _measured(self) -> dict[str, Any]:
        """Headline and tasks; the first row's texts, the dense model's, are what the others' are compared with."""
        reference = read_json(self.dense_file) if self.dense_file.exists() else None
        record, texts = measure(
            self.twin.model, self.tokenizer, self.tasks, self.cfg, reference=reference, seed=self.seed
        )
        if reference is None:
            write_json(self.dense_file, texts)
        return {"headline": record["headline"], "tasks": record["tasks"]}

    def _choices(self) -> dict[str, Any] | None:
        return choices(self.twin, self.asked, batch_size=self.options.batch_size) if self.asked else None


def _tasks(recipe: Recipe, options: argparse.Namespace) -> list[str]:
    """The tasks asked for, else the recipe's and SmolLM2's retrieval beside its own."""
    beside = [str(SMOLLM2 / "tasks" / "passages.yaml")] if _is_smollm2(recipe) else []
    return options.tasks or [*recipe.measure.tasks, *beside]


def _is_smollm2(recipe: Recipe) -> bool:
    return any(Path(source).parent == SMOLLM2 / "tasks" for source in recipe.measure.tasks)


def _prompts(recipe: Recipe, options: argparse.Namespace, tasks: list[Any]) -> list[str]:
    """Prompts with long answers, so that late steps have texts left."""
    broad = SMOLLM2 / "data" / "broad_prompts.jsonl"
    path = options.prompts or (broad if _is_smollm2(recipe) else recipe.probe.prompts)
    if path is not None:
        return [row.column("prompt") for row in read_prompts(str(path))]
    return [item.prompt for task in tasks if task.kind == "generate" for item in task.items]


def _timed(seconds: dict[str, float], name: str, work: Any) -> Any:
    start = time.monotonic()
    found = work()
    seconds[name] = round(time.monotonic() - start, 2)
    return found


def _line(row: dict[str, Any]) -> str:
    figures = {name: value for name, value in row["headline"].items() if value is not None}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"{row['row']}: {shown}, KL {row['drift']['final']['kl']['mean']:.4g}; seconds {row['seconds']}"


if __name__ == "__main__":
    dist.start()
    try:
        main()
    except RecoverError as error:
        sys.exit(str(error))
    finally:
        dist.stop()
    dist.leave(0)
