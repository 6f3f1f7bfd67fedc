"""The whole job on a real model: one GPU over seeds, then the same run under each file of launch/, stopped, moved.

All variants start from one run directory whose text and pruning are done, so their trainings read the same tokens in
the same order; what differs is who computes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import ENGINES, Launch, lines, until, untrained_copy

from recover.base.artifacts import read_json, read_jsonl
from recover.config.recipe import load_recipe

STOP_AFTER = 5  # steps
SHARDED = ("train.shard_weights=true",)

Row = dict[str, Any]
Keep = Callable[[Row], None]  # is given each row as it comes


@dataclass(frozen=True)
class Variant:
    """`then`: where it goes on after it was stopped; `fields`: of the recipe, over the first run's."""

    name: str
    launch: Launch
    then: Launch | None = None
    fields: tuple[str, ...] = ()


class Job:
    """The recipe with `fields` set over it, in run directories below `out`, on so many GPUs.

    `command`: "run", or "train" for runs that end with their recovery.
    """

    def __init__(self, recipe: Path, fields: Sequence[str], out: Path, gpus: int, command: str = "run") -> None:
        self.recipe, self.fields, self.out, self.gpus, self.command = recipe, list(fields), out, gpus, command
        loaded = load_recipe(recipe, self.fields)
        self.name, self.seed, self.batch = loaded.name, loaded.seed, loaded.train.batch_size

    def variants(self) -> list[Variant]:
        one = Launch("one", gpu=0)
        found = [Variant(f"{self.gpus} x {engine}", Launch(engine, self.gpus)) for engine in ENGINES]
        last, zero2 = found[-1].launch, Launch("zero2", self.gpus)
        return [
            *found,
            Variant("one GPU, again", Launch("one", gpu=self.gpus - 1)),
            Variant(
                "one GPU, cut as on several",
                one,
                fields=(f"train.micro_batch_size={self.batch // self.gpus}",),
            ),
            Variant(f"{self.gpus} x zero2, stopped, on one GPU", zero2, then=one),
            Variant(f"one GPU, stopped, {self.gpus} x {last.engine}", one, then=last),
            Variant(f"{self.gpus} x zero2, weights sharded", zero2, fields=SHARDED),
            Variant(f"one GPU, stopped, {self.gpus} x zero2, weights sharded", one, zero2, SHARDED),
        ]

    def seeds(self, seeds: int, keep: Keep) -> None:
        """Whole runs on one GPU each, beside one another."""
        from recover.models.source import locate

        locate(load_recipe(self.recipe, self.fields).model)  # a GGUF file is converted by one process, not by all

        def run(number: int) -> Row:
            where, seed = f"seed-{number}", self.seed + number
            launch = Launch("one", gpu=number % self.gpus)
            return self.done(f"one GPU, seed {seed}", where, lambda: self.go(launch, where, (f"seed={seed}",)))

        beside([lambda number=number: run(number) for number in range(seeds)], keep)

    def moved(self, named: str, keep: Keep) -> None:
        """Variants in whose names `named` is found, beside one another, from the run of the first seed."""

        def run(number: int, variant: Variant) -> Row:
            where = f"variant-{number}"
            untrained_copy(self.run_directory("seed-0"), self.run_directory(where))
            return self.done(variant.name, where, lambda: self.do(variant, where))

        keep(self.done(f"one GPU, seed {self.seed}", "seed-0", lambda: None))  # what the others are held against
        chosen = [(number, variant) for number, variant in enumerate(self.variants()) if re.search(named, variant.name)]
        beside([lambda number=number, variant=variant: run(number, variant) for number, variant in chosen], keep)

    def run_directory(self, where: str) -> Path:
        return self.out / where / self.name

    def words(self, where: str, fields: Sequence[str]) -> list[str]:
        return ["-m", "recover", self.command, str(self.recipe), "--runs", str(self.out / where), *self.fields, *fields]

    def go(self, launch: Launch, where: str, fields: Sequence[str] = ()) -> None:
        launch.run(self.words(where, fields), self.out / f"{where}.log")

    def do(self, variant: Variant, where: str) -> None:
        if variant.then is None:
            self.go(variant.launch, where, variant.fields)
            return
        steps = self.run_directory(where) / "train" / "steps.jsonl"
        process = variant.launch.start(self.words(where, variant.fields), self.out / f"{where}.log")
        if not until(lambda: lines(steps) >= STOP_AFTER, process):
            raise RuntimeError(f"{variant.name}: ended before step {STOP_AFTER}: exit code {process.poll()}")
        process.terminate()
        process.wait()
        self.go(variant.then, where, variant.fields)

    def done(self, name: str, where: str, work: Callable[[], None]) -> Row:
        try:
            work()
        except RuntimeError as error:
            return {"row": name, "error": str(error)}
        run, log = self.run_directory(where), self.out / f"{where}.log"
        kept = read_json(run / "train" / "best.json")
        return {
            "row": name,
            "steps": read_jsonl(run / "train" / "steps.jsonl"),
            "epochs": [
                {"score": epoch["score"], "kl": epoch["drift"]["kl"]["mean"], "loss": epoch["train"]["loss"]}
                for epoch in read_jsonl(run / "epochs.jsonl")
            ],
            "kept": kept["epoch"],
            "dense": read_json(run / "dense" / "measure.json")["headline"],
            "pruned": read_json(run / "before" / "measure.json")["headline"],
            "recovered": read_json(run / "after" / "measure.json")["headline"] if self.command == "run" else None,
            "verified": read_json(run / "verify.json") if self.command == "run" else None,
            "went_on": [line for line in log.read_text(errors="replace").splitlines() if "going on from" in line],
        }


def beside(work: Sequence[Callable[[], Row]], keep: Keep) -> None:
    """Each in a thread; most of the work is in processes of its own."""
    with ThreadPoolExecutor(len(work)) as pool:
        for future in as_completed([pool.submit(each) for each in work]):
            keep(future.result())


def table(found: Sequence[Row]) -> list[str]:
    """Step by step against the first row, whose text all but the other seeds' have."""
    found = sorted(found, key=lambda row: ("seed" not in row["row"], row["row"]))
    base = found[0].get("steps")
    head = "| training | first loss | largest difference of a step's loss | of its gradient's norm | last loss | KL |"
    lines = [f"{head} generation by epoch | generation | choice | perplexity |", "|---|" + "---:|" * 9]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['row']} | {row['error'][-300:]!r} | | | | | | | | |")
            continue
        steps, after = row["steps"], row["recovered"]
        same = base is not None and "seed" not in row["row"].replace(found[0]["row"], "")
        apart = [furthest(steps, base, name) for name in ("loss", "grad_norm")] if same else ["", ""]
        epochs = ", ".join(f"{epoch['score']:.1%}" for epoch in row["epochs"])
        cells = [row["row"], f"{steps[0]['loss']:.6g}", *apart, f"{steps[-1]['loss']:.4g}"]
        cells += [f"{row['epochs'][row['kept'] - 1]['kl']:.4f}", epochs]
        cells += [f"{after[name]:.4g}" if after else "" for name in ("generation", "choice", "perplexity")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def furthest(steps: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], name: str) -> str:
    if len(steps) != len(base):
        return f"{len(steps)} steps, not {len(base)}"
    return f"{max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(steps, base, strict=True)):.1e}"
