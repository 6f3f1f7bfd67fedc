"""What a worker of `quality.py` does: the plan, the dense model's text, and one training after the other."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crew import Row

from recover.config.recipe import DenseText, PrunedText, Recipe, Train, load_recipe

if TYPE_CHECKING:
    from recover.models.twin import Twin


@dataclass(frozen=True)
class Variant:
    """What differs from the default: recipe fields; times the recipe's learning rate; times the tokens; given text."""

    fields: tuple[str, ...] = ()
    lr: float = 1.0
    tokens: float = 1.0
    given: bool = False


def loss(**weights: float) -> tuple[str, ...]:
    return tuple(f"train.loss.{name}={weight}" for name, weight in {"kl": 0.0, **weights}.items())


def fading(weight: float) -> tuple[str, ...]:
    """KL, and beside it a variance whose weight has fallen to 0 after half of the steps."""
    return (*loss(kl=1, variance=weight), "train.loss.variance_until=0.5")


AFTER_CUT = ("train.lora.blocks=after_cut",)
VARIANTS = {
    "kl": Variant(),
    "kl + 1 var": Variant(loss(kl=1, variance=1)),
    "ce": Variant(loss(ce=1)),
    "kl, after_cut": Variant(AFTER_CUT),
    "kl, lr x2": Variant(lr=2.0),
    "kl + 3 var": Variant(loss(kl=1, variance=3)),
    "reverse_kl": Variant(loss(reverse_kl=1)),
    "jsd": Variant(loss(jsd=4)),
    "kl, after_cut, tokens x1.6": Variant(AFTER_CUT, tokens=1.6),
    "kl, lr x1.5": Variant(lr=1.5),
    "kl, lr x3": Variant(lr=3.0),
    "kl, lr x4": Variant(lr=4.0),
    "kl + 0.3 var": Variant(loss(kl=1, variance=0.3)),
    "kl, given text": Variant(given=True),
    "ce, given text": Variant(loss(ce=1), given=True),
    "kl + 1 var, after_cut": Variant((*loss(kl=1, variance=1), *AFTER_CUT)),
    "kl + 1 var -> 0": Variant(fading(1)),
    "kl + 3 var -> 0": Variant(fading(3)),
    "kl + 1 var -> 0, lr x2": Variant(fading(1), lr=2.0),
}


class Task(NamedTuple):
    """A piece of work for one worker; `needs` are kinds and seeds of tasks that must be done before."""

    kind: str  # plan, text, untrained, train
    seed: int = 0
    variant: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return (self.kind, self.seed)

    @property
    def needs(self) -> set[tuple[str, int]]:
        if self.kind == "untrained":
            return {("plan", 0)}
        if self.kind != "train":
            return set()
        written = set() if VARIANTS[self.variant].given else {("text", self.seed)}
        return {("plan", 0)} | written


def tasks_for(options: argparse.Namespace, rows: Sequence[Row]) -> list[Task]:
    """All work that has no row yet, in the order in which it is to be done."""
    done = {(row["variant"], row["seed"]) for row in rows if row["tokens_asked"] in (None, options.tokens)}
    trains = [Task("train", seed, name) for seed in range(options.seeds) for name in options.only]
    trains = [task for task in trains if (task.variant, task.seed) not in done]
    untrained = [] if ("pruned", 0) in done else [Task("untrained")]
    if not trains and not untrained:
        return []
    seeds = sorted({task.seed for task in trains if not VARIANTS[task.variant].given})
    return [Task("plan"), *(Task("text", seed) for seed in seeds), *untrained, *trains]


def recipe_for(options: argparse.Namespace, variant: Variant, seed: int) -> Recipe:
    base = load_recipe(options.recipe, options.set)
    fields = [
        *options.set,
        "train.epochs=1",
        f"train.tokens={round(options.tokens * variant.tokens)}",
        f"train.lr={base.train.lr * variant.lr}",
        f"seed={base.seed + seed}",
        "measure.sampling=null",
        *variant.fields,
    ]
    if variant.given:
        calibration = getattr(base.prune, "calibration", None)
        if calibration is None:
            sys.exit(f"{options.recipe}: its prune.calibration is the given text, and it has none")
        fields.append(f"train.data=[{{kind: given, source: {json.dumps(calibration.data)}}}]")
    recipe = load_recipe(options.recipe, fields)
    return recipe.model_copy(update={"train": at_most(recipe.train, options.texts_at_once)})


def at_most(cfg: Train, texts: int) -> Train:
    """The config with so many texts at most written at once: several workers may write at the same time."""
    data = [
        source.model_copy(update={"batch_size": min(source.batch_size, texts)})
        if isinstance(source, DenseText | PrunedText)
        else source
        for source in cfg.data
    ]
    return cfg.model_copy(update={"data": tuple(data)})


def text_id(folder: Path) -> str:
    """Of the beginning of each text in a folder, which is what trainings of all budgets learn from."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            digest.update(file.readline())
    return digest.hexdigest()[:12]


class Workbench:
    """The dense model, loaded once, and what the tasks of one process do with copies of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from recover.base.console import quiet_libraries
        from recover.measure.tasks import load_task
        from recover.models.load import load_model, load_tokenizer, ready

        quiet_libraries()
        self.options, self.texts = options, options.out / "text"
        self.recipe = recipe_for(options, Variant(), 0)
        self.tokenizer = load_tokenizer(self.recipe.model)
        self.model = ready(load_model(self.recipe.model))
        self.tasks = [load_task(source) for source in self.recipe.measure.tasks]
        self.trajectories: Any = None

    def do(self, task: Task) -> list[Row]:
        work = {"plan": self.plan, "text": self.text, "untrained": self.untrained, "train": self.train}
        return work[task.kind](task)

    def twin(self, *, planned: bool = True) -> Twin:
        """A fresh one, of a copy: nothing that a training did to a model reaches the next."""
        from recover.models.plan import Plan, load_plan
        from recover.models.twin import Twin

        model = copy.deepcopy(self.model)
        return Twin(model, *load_plan(self.options.out / "prune")) if planned else Twin(model, Plan.none(self.blocks))

    @property
    def blocks(self) -> int:
        return self.model.config.num_hidden_layers

    def plan(self, _task: Task) -> list[Row]:
        from recover.models.plan import save_plan
        from recover.prune import registry
        from recover.prune.calibrate import calibration_batches

        cfg, folder = self.recipe.prune, self.options.out / "prune"
        if not (folder / "plan.json").exists():
            calibration = getattr(cfg, "calibration", None)
            batches = calibration_batches(calibration, self.tokenizer, self.recipe.seed) if calibration else []
            plan, masks, weights = registry.prune(self.twin(planned=False), cfg, batches)
            save_plan(plan, masks, folder, weights)
        return []

    def text(self, task: Task) -> list[Row]:
        """Written once per seed, enough for the variant that takes most: trainings find it under the same name."""
        from recover.train.data import build_dataset

        most = max(VARIANTS[name].tokens for name in self.options.only if not VARIANTS[name].given)
        recipe = recipe_for(self.options, Variant(tokens=most), task.seed)
        build_dataset(recipe.train, self.twin(planned=False), self.tokenizer, recipe.seed, self.texts_of(task.seed))
        return []

    def texts_of(self, seed: int) -> Path:
        """The folder of what the dense model wrote for this seed."""
        return self.texts / f"seed-{seed}"

    def untrained(self, _task: Task) -> list[Row]:
        twin = self.twin()
        with twin.dense():
            dense = self.measured(twin.base)
        common = {"seed": 0, "tokens_asked": None}
        return [{"variant": "dense", **common, **dense}, {"variant": "pruned", **common, **self.figures(twin)}]

    def train(self, task: Task) -> list[Row]:
        from recover.train.train import train

        recipe = recipe_for(self.options, VARIANTS[task.variant], task.seed)
        twin, found = self.twin(), {}

        def after_epoch(_epoch: int, context: dict[str, Any]) -> float | None:
            found.update(context | self.figures(twin))
            return found["generation"]

        folder = self.options.out / "runs" / f"{task.variant}, seed {task.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        texts = self.texts_of(task.seed)
        (folder / "data").symlink_to(texts.resolve())
        train(twin, self.tokenizer, recipe.train, folder, after_epoch, recipe.seed)
        shutil.rmtree(folder)
        named = {"variant": task.variant, "seed": task.seed, "tokens_asked": self.options.tokens}
        learnt = None if VARIANTS[task.variant].given else text_id(texts)
        return [{**named, "text": learnt, "jobs": self.options.jobs, **found}]

    def figures(self, twin: Twin) -> Row:
        """Of the pruned view: what `measured` gives, KL along the dense model's own texts, losses on held-out text."""
        from recover.probe.probe import dense_trajectories, final_drift

        cfg, prompts = self.recipe.probe, self.prompts()
        if self.trajectories is None:  # the dense model's, so the same for every twin
            self.trajectories = dense_trajectories(twin, self.tokenizer, prompts, cfg)
        with twin.folded():
            drift = final_drift(twin, self.tokenizer, prompts, cfg, trajectories=self.trajectories)
            return {"kl": drift["kl"]["mean"], "held_out": self.held_out(twin), **self.measured(twin.model)}

    def prompts(self) -> list[str]:
        lists = [[item.prompt for item in task.items] for task in self.tasks if task.kind == "generate"]
        return [prompt for several in zip(*lists, strict=False) for prompt in several][: self.recipe.probe.samples]

    def measured(self, model: Any) -> Row:
        from recover.config.tasks import KINDS
        from recover.measure.tasks import measure

        record, _ = measure(model, self.tokenizer, self.tasks, self.recipe.measure, seed=self.recipe.seed)
        each = {name: task[KINDS[task["kind"]].main.key] for name, task in record["tasks"].items()}
        return {**record["headline"], "tasks": each}

    def held_out(self, twin: Twin) -> Row:
        """Means per token of every term of the loss over the texts of the perplexity tasks."""
        import torch

        from recover.config.recipe import Loss
        from recover.distill.distiller import Distiller
        from recover.text.generate import evaluating
        from recover.text.prompts import text_ids
        from recover.train.data import collator

        device, chunk = twin.base.device, self.recipe.train.loss.chunk
        pad: Any = self.tokenizer.pad_token_id
        collate, distiller = collator(pad, "all"), Distiller(twin, Loss(chunk=chunk))
        chosen = [task for task in self.tasks if task.kind == "perplexity"]
        texts = [(task.file, text) for task in chosen for text in task.items[: self.recipe.measure.limit]]
        rows = []
        for file, text in texts:
            ids = text_ids(self.tokenizer, text, special=True)[: getattr(file, "length", 512)]
            rows.append({"input_ids": ids, "completion_mask": [1] * len(ids)})
        sums: dict[str, float] = {}
        with torch.no_grad(), evaluating(twin.model):
            for start in range(0, len(rows), self.recipe.train.batch_size):
                batch = collate(rows[start : start + self.recipe.train.batch_size])
                found = twin.model(**{name: value.to(device) for name, value in batch.items()}, distill=distiller)
                for name in ("kl", "variance", "reverse_kl", "ce", "tokens"):
                    sums[name] = sums.get(name, 0.0) + float(found[name])
        tokens = sums.pop("tokens")
        return {name: value / tokens for name, value in sums.items()}
