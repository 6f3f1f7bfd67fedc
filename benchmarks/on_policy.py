"""Text of the dense model against text of the pruned model itself, at equal teacher tokens and at equal time.

    python benchmarks/on_policy.py recipes/quickstart.yaml --out checkpoints/on_policy --tokens 60000 --seeds 0 1 2
    python benchmarks/on_policy.py recipes/smollm2-135m-drop3.yaml --out checkpoints/on_policy --tokens 150000 \\
        --jobs 6 --seeds 0 1 --set measure.limit=200  # one GPU, after benchmarks/smollm2/fetch.py and make_tasks.py

One pruning for all rows; each row is one recovery of the recipe, one epoch, from the same start. An arm `0.5,16,0.2`:
half of every source of kind `dense` becomes kind `pruned` with the same prompts (drawn at --temperature), written every
16 steps, after a fifth of the steps. `off-policy, drawn` is the control: the dense model's text drawn at the same
temperature, where the recipe has another. After these, at equal tokens, come both kinds of the dense model's text at so
many tokens that they take as long as each arm. Time is that of writing and training, without measuring: seconds of the
processor on a CPU (which others may share), of the clock on a GPU: there, with --jobs, of a GPU that others share, so
take as many jobs as there are rows that need no other's seconds, and all of them run beside as many. `agreement` is the
mean share of greedily written tokens that are the dense model's. `against off-policy`: generation, item by item, means
over seeds; its 95% interval is over items, not over seeds. Several folders that hold rows are joined with --join.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from crew import Crew, Row
from quality_work import at_most

from recover.base.artifacts import write_json
from recover.config.recipe import DenseText, Recipe, Train, load_recipe
from recover.maths.score import interval95
from recover.measure.tasks import load_task, measure
from recover.models.load import load_model, load_tokenizer, ready
from recover.models.plan import Plan, load_plan, save_plan
from recover.models.source import locate
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.calibrate import calibration_batches
from recover.train.train import train

EQUAL_TIME = "equal time: "
COLUMNS = ("generation", "choice", "perplexity", "agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--join", nargs="+", type=Path, help="make no row: the table of the rows in these folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings and of the table")
    parser.add_argument("--tokens", type=int, default=60_000, help="scored tokens of a recovery (%(default)s)")
    parser.add_argument("--arms", nargs="+", default=["0.5"], metavar="SHARE[,EVERY[,START]]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--temperature", type=float, default=1.0, help="of the pruned model's text (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="workers that share the machine (%(default)s)")
    parser.add_argument("--texts-at-once", type=int, default=768, help="that a model writes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave nothing running after this")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields of every row")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.join:
        rows = [row for folder in options.join for row in json.loads((folder / "on_policy.json").read_text())]
        rows = [row for number, row in enumerate(rows) if row not in rows[:number]]  # dense and pruned are in each
        return _finish(rows, options.out)
    rows: list[Row] = []
    keep_rows(options.out, rows)

    def keep(row: Row) -> None:
        rows.append(row)
        keep_rows(options.out, rows)
        print(json.dumps(row), flush=True)

    recipe = recipe_for(options)
    locate(recipe.model)  # a GGUF file is converted by one process, not by all
    Crew(Trial, options, tasks_for(recipe.train, options)).run(options.seconds, keep)
    _finish(rows, options.out)


def recipe_for(options: argparse.Namespace) -> Recipe:
    recipe = load_recipe(options.recipe, [f"train.tokens={options.tokens}", "train.epochs=1", *options.set])
    return recipe.model_copy(update={"train": at_most(recipe.train, options.texts_at_once)})


def keep_rows(out: Path, rows: list[Row]) -> None:
    """Where a worker reads how long others took: whole at each moment."""
    write_json(out / "on_policy.json", rows)


class Task(NamedTuple):
    """The plan with what needs no training, or the row of this name and seed."""

    row: str
    seed: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return (self.row, self.seed)

    @property
    def as_long_as(self) -> tuple[str, str] | None:
        """Of a row at equal time: whose text it is, and the row that it is to take as long as."""
        if not self.row.startswith(EQUAL_TIME):
            return None
        text, arm = self.row.removeprefix(EQUAL_TIME).split(" as long as ")
        return text, arm

    @property
    def needs(self) -> set[tuple[str, int]]:
        return set() if self == PLAN else {PLAN.key, *((row, self.seed) for row in self.as_long_as or ())}


PLAN = Task("plan")


def tasks_for(cfg: Train, options: argparse.Namespace) -> list[Task]:
    """Seed by seed; workers that would wait for rows to take as long as begin with the next seed."""
    names = list(_rows(cfg, options.arms, options.temperature))
    return [PLAN, *(Task(name, seed) for seed in options.seeds for name in names)]


def _finish(rows: list[Row], out: Path) -> None:
    table = markdown(rows)
    (out / "on_policy.md").write_text(table)
    print(table)


def _rows(cfg: Train, arms: list[str], temperature: float) -> dict[str, Train]:
    """Name and config of the rows of one seed; those of equal time have their tokens still to be set."""
    off = {"off-policy": cfg}
    drawn = [
        source.model_copy(update={"temperature": temperature}) if isinstance(source, DenseText) else source
        for source in cfg.data
    ]
    if drawn != list(cfg.data):
        off["off-policy, drawn"] = cfg.model_copy(update={"data": tuple(drawn)})
    on = {f"on-policy {arm}": on_policy(cfg, arm, temperature) for arm in arms}
    equal = {f"{EQUAL_TIME}{text} as long as {arm}": dense for arm in on for text, dense in off.items()}
    return off | on | equal


def on_policy(cfg: Train, arm: str, temperature: float) -> Train:
    """The config with a share of every `dense` source turned into text of the pruned model."""
    share, *rest = map(float, arm.split(","))
    further = dict(zip(("every", "start"), rest, strict=False))
    data: list[dict[str, Any]] = []
    for source in cfg.data:
        fields = source.model_dump()
        if not isinstance(source, DenseText):
            data.append(fields)
            continue
        own = {**fields, **further, "kind": "pruned", "share": source.share * share, "temperature": temperature}
        data += [own] if share == 1 else [{**fields, "share": source.share * (1 - share)}, own]
    return Train.model_validate({**cfg.model_dump(), "data": data})


class Trial:
    """The dense model, its pruning, and what every row is measured with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.recipe = recipe = recipe_for(options)
        self.measured_by = recipe.measure.model_copy(update={"samples": 10**9, "sampling": None})  # each item's answer
        self.tokenizer = load_tokenizer(recipe.model)
        self.model = ready(load_model(recipe.model))
        self.tasks = [load_task(source) for source in recipe.measure.tasks]
        self.reference: Any = None
        self.dense_figures, self.reference = self._measure(self._dense())

    def do(self, task: Task) -> list[Row]:
        if task == PLAN:
            self._plan()
            return [{"row": "dense", **self.dense_figures}, {"row": "pruned", **self.measured(self.twin())}]
        cfg = _rows(self.recipe.train, self.options.arms, self.options.temperature)[task.row]
        if task.as_long_as is not None:
            rows = json.loads((self.out / "on_policy.json").read_text())
            took = {row["row"]: row["seconds"] for row in rows if row.get("seed") == task.seed}
            text, arm = task.as_long_as
            cfg = cfg.model_copy(update={"tokens": round(cfg.tokens * took[arm] / took[text])})
        return [{"row": task.row, "seed": task.seed, **self.recovered(cfg, task)}]

    def _dense(self) -> Twin:
        return Twin(copy.deepcopy(self.model), Plan.none(self.model.config.num_hidden_layers))

    def _plan(self) -> None:
        cfg, folder = self.recipe.prune, self.out / "prune"
        if not (folder / "plan.json").exists():
            calibration = getattr(cfg, "calibration", None)
            batches = calibration_batches(calibration, self.tokenizer, self.recipe.seed) if calibration else []
            plan, masks, weights = registry.prune(self._dense(), cfg, batches)
            save_plan(plan, masks, folder, weights)

    def twin(self) -> Twin:
        """The pruned model without adapters, as every row begins."""
        return Twin(copy.deepcopy(self.model), *load_plan(self.out / "prune"))

    def recovered(self, cfg: Train, task: Task) -> dict[str, Any]:
        """Figures after one recovery: its quality, teacher tokens and time."""
        twin, folder, context = self.twin(), self.out / "training" / f"{task.row}, seed {task.seed}", {}
        shutil.rmtree(folder, ignore_errors=True)
        ended = []

        def after_epoch(_epoch: int, found: dict[str, Any]) -> None:
            ended.append(clock())
            context.update(found)

        started = clock()
        train(twin, self.tokenizer, cfg, folder, after_epoch, task.seed)
        written = [json.loads(path.read_text()) for path in folder.glob("pruned_text/*.json")]
        return {
            **self.measured(twin),
            "tokens": context["tokens"],
            "seconds": ended[0] - started,
            "writing": sum(record["seconds"] for record in written),
            "ended": mean(record["ended"] for record in written) if written else None,
            "kl": context["train"]["kl"],
        }

    def measured(self, twin: Twin) -> dict[str, Any]:
        return self._measure(twin)[0]

    def _measure(self, twin: Twin) -> tuple[dict[str, Any], Any]:
        with twin.folded():
            record, texts = measure(
                twin.model.eval(), self.tokenizer, self.tasks, self.measured_by, reference=self.reference
            )
        right = [
            float(sample["correct"])
            for each in record["tasks"].values()
            if each["kind"] == "generate"
            for sample in each["samples"]
        ]
        agreements = [each["agreement"] for each in record["tasks"].values() if each.get("agreement") is not None]
        figures = {**record["headline"], "agreement": mean(agreements) if agreements else 1.0, "right": right}
        return figures, texts


def clock() -> float:
    """Seconds of work: of this process on a CPU, of the wall with a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def markdown(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, +- their standard deviation; generation also against the recipe's own text."""
    lines = [
        "| text | seeds | teacher tokens | seconds | " + " | ".join(COLUMNS) + " | against off-policy |",
        "|---|" + "---:|" * (4 + len(COLUMNS)),
    ]
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row for row in rows if row["row"] == name]
        cells = [
            _spread([row.get(key) for row in same], form) for key, form in (("tokens", ",.0f"), ("seconds", ".0f"))
        ]
        cells += [_spread([row[key] for row in same], ".2f" if key == "perplexity" else ".1%") for key in COLUMNS]
        cells.append(_against([row for row in rows if row["row"] == "off-policy"], same))
        lines.append(f"| {name} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _against(reference: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """How much more of the items is right, over the seeds that both have, with its interval."""
    seeds = {row.get("seed") for row in reference} & {row.get("seed") for row in rows}
    if not seeds or rows[0]["row"] == "off-policy":
        return ""
    mine, theirs = (
        [mean(item) for item in zip(*(row["right"] for row in some if row.get("seed") in seeds), strict=True)]
        for some in (rows, reference)
    )
    gains = [after - before for after, before in zip(mine, theirs, strict=True)]
    low, high = interval95(gains)
    return f"{mean(gains):+.1%} [{low:+.1%}, {high:+.1%}]"


def _spread(values: list[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    return f"{mean(found):{form}}" + (f" +- {stdev(found):{form}}" if len(found) > 1 else "")


if __name__ == "__main__":
    main()
