"""Many variants of one recipe, a few at a time on each GPU, each a run of its own; one row each as it ends.

    python benchmarks/coder/fetch.py && python benchmarks/coder/make_tasks.py
    python benchmarks/coder/experiments.py recipes/qwen2.5-coder-0.5b-drop2.yaml --out checkpoints/coder --table first
    python benchmarks/coder/experiments.py recipes/qwen2.5-coder-0.5b-drop2.yaml --out checkpoints/coder \\
        --only drop2+1M drop2+1M@1 drop4+1M+lr4e-4 --gpus 2 --beside 2 --limit-seconds 560
    python benchmarks/coder/experiments.py recipes/qwen2.5-coder-0.5b-drop2.yaml --out checkpoints/coder --show

A variant is names of variants.yaml joined by +: the fields that they set, in that order, then those of --set. It is
run with each of --seeds, or with seed N where it ends in @N. A run goes up to --until (default: after, the recovered
model's figures; report: the exported model too). What several runs have in common is done once: a run that would make
what a running one is just making waits for it, and takes it over (lending.py). Of text, a smaller budget takes the
beginning of a larger one's.

Rows go to results.jsonl as runs end: variant, overrides, seed, figures of dense, pruned and recovered and of each
epoch, tokens, seconds. A run that failed or was stopped has a row too, with what it got to; the same command goes on
with it. No run is started in less time than the quickest one took; what runs when the time is over is stopped between
two steps. Seconds are those of runs that share the GPU (`beside`): compare them, do not quote them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lending import Needs, in_folders, lacking, lend, needs, put_in
from rows import kept, markdown, read_row
from variants import Known, Variant

from recover.base.errors import RecoverError
from recover.config.recipe import Recipe
from recover.models.source import locate

GRACE_SECONDS = 20.0  # to end between two steps
POLL_SECONDS = 0.5
DONE, FAILED, STOPPED = "done", "failed", "stopped"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.run_one:
        return run_one(options)
    results = options.results or options.out / "results.jsonl"
    rows = read_rows(results)
    failed = 0
    if not options.show:
        options.out.mkdir(parents=True, exist_ok=True)
        failed = Experiments(options, results, rows).run(wanted(options))
        rows = read_rows(results)
    table = markdown([row for row in rows if row["status"] == DONE])
    results.with_suffix(".md").write_text(table)
    print(table)
    return 1 if failed else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="the base of all variants")
    parser.add_argument("--out", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--results", type=Path, help="rows as they come (default: OUT/results.jsonl)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME+NAME", help="variants, in this order")
    parser.add_argument("--table", nargs="+", default=[], help="variants of these tables of variants.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--beside", type=int, default=2, help="runs at a time on a GPU (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that runs are spread over (default: %(default)s)")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="leave nothing running after this")
    parser.add_argument("--until", default="after", help="last stage of each run (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields of every variant")
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoints that a finished run could resume from"
    )
    parser.add_argument("--show", action="store_true", help="run nothing: the table of the rows that there are")
    parser.add_argument("--run-one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def wanted(options: argparse.Namespace) -> list[Variant]:
    """Every variant that was asked for with every seed, once, seed by seed."""
    known = Known()
    names = list(options.only)
    for table in options.table:
        if table not in known.tables:
            raise SystemExit(f"--table {table}: not in {known.path}; known: {', '.join(known.tables)}")
        names += known.tables[table]
    if not names:
        raise SystemExit(f"nothing to run: give --only or --table ({', '.join(known.tables)})")
    more = tuple(options.set)
    variants = [known.variant(name, options.recipe, seed, more) for seed in options.seeds for name in names]
    return list(dict.fromkeys(variants))


def run_one(options: argparse.Namespace) -> int:
    """In a process of its own: the run of one variant, up to the stage that was asked for."""
    from recover.run import stages

    variant = Known().variant(options.run_one, options.recipe, options.seeds[0], tuple(options.set))
    try:
        stages.run(variant.recipe(options.recipe), options.out, until=options.until)
    except RecoverError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, the last one of each run."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return list({row["run"]: row for row in map(json.loads, lines)}.values())


@dataclass
class Running:
    """A run in its process."""

    variant: Variant
    folder: Path
    needs: Needs
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float
    lent: list[str]
    gpu: int


class Experiments:
    """Runs in their processes, `beside` at a time; a row for each that ends."""

    def __init__(self, options: argparse.Namespace, results: Path, rows: Sequence[dict[str, Any]]) -> None:
        self.options, self.results = options, results
        self.started = time.monotonic()
        self.running: list[Running] = []
        self.quickest = min((row["seconds"] for row in rows if row["status"] == DONE), default=0.0)
        self.done = {(row["run"], tuple(row["overrides"]), row["until"]) for row in rows if row["status"] == DONE}
        self.failed = 0
        self.stock = in_folders(path for path in sorted(options.out.iterdir()) if path.is_dir())

    def run(self, variants: Sequence[Variant]) -> int:
        """All of them, or what of them is done in time; how many failed."""
        waiting = [each for each in variants if (each.run, each.overrides, self.options.until) not in self.done]
        recipes = {each: each.recipe(self.options.recipe) for each in waiting}  # what is wrong is said before any run
        if recipes:
            locate(next(iter(recipes.values())).model)  # a GGUF file is converted by one process, not by all
        late: list[Variant] = []
        try:
            while (waiting or self.running) and self.left > 0:
                if waiting and self.left < self.quickest:
                    self._say(f"{self.left:.0f} s left, and the quickest run took {self.quickest:.0f}: none is started")
                    waiting, late = [], waiting
                for variant in self._ready(waiting, recipes):
                    waiting.remove(variant)
                    self._start(variant, recipes[variant])
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            self._stop()
        for variant in [*waiting, *late]:
            self._say(f"{variant.run}: not started")
        return self.failed

    @property
    def left(self) -> float:
        """Seconds."""
        return self.options.limit_seconds - (time.monotonic() - self.started)

    def _ready(self, waiting: Sequence[Variant], recipes: dict[Variant, Recipe]) -> list[Variant]:
        """The next ones that may start now: nothing that they need is just being made by another."""
        for run in self.running:
            put_in(self.stock, run.folder, run.needs)
        making = {each for run in self.running for each in lacking(run.needs, self.stock)}
        found = []
        for variant in waiting:
            if len(self.running) + len(found) >= self.options.beside * self.options.gpus:
                break
            missing = lacking(needs(recipes[variant]), self.stock)
            if not missing & making:
                found.append(variant)
                making |= missing
        return found

    def _start(self, variant: Variant, recipe: Recipe) -> None:
        folder, log = self.options.out / variant.run, self.options.out / f"{variant.run}.log"
        folder.mkdir(parents=True, exist_ok=True)
        busy = {run.folder for run in self.running}
        donors = [path for path in sorted(self.options.out.iterdir()) if path.is_dir()]
        lent = lend(recipe, folder, sorted(donors, key=lambda path: path in busy))
        command = [sys.executable, __file__, str(self.options.recipe), "--out", str(self.options.out)]
        command += ["--run-one", variant.name, "--seeds", str(variant.seed), "--until", self.options.until]
        if self.options.set:
            command += ["--set", *self.options.set]
        gpu = min(range(self.options.gpus), key=[run.gpu for run in self.running].count)
        alone = {"CUDA_VISIBLE_DEVICES": str(gpu)} if self.options.gpus > 1 else {}
        file = log.open("ab")
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **alone}
        )
        self.running.append(Running(variant, folder, needs(recipe), process, file, time.monotonic(), lent, gpu))
        where = f" on GPU {gpu}" if alone else ""
        self._say(f"{variant.run}: started{where}" + (f", with {', '.join(lent)} of others" if lent else ""))

    def _collect(self) -> None:
        for run in list(self.running):
            code = run.process.poll()
            if code is not None:
                self.running.remove(run)
                self._keep(run, DONE if code == 0 else FAILED, code)

    def _keep(self, run: Running, status: str, code: int | None) -> None:
        """Write the row of a run that ended."""
        run.log.close()
        put_in(self.stock, run.folder, run.needs)
        seconds = time.monotonic() - run.started
        row = {
            "variant": run.variant.name,
            "pruning": run.variant.pruning,
            "run": run.variant.run,
            "seed": run.variant.seed,
            "status": status,
            "overrides": run.variant.overrides,
            "until": self.options.until,
            "exit_code": code,
            "seconds": round(seconds, 1),
            "beside": self.options.beside,
            "gpu": run.gpu,
            "lent": run.lent,
            **read_row(run.folder),
        }
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if status == DONE:
            self.quickest = min(self.quickest or seconds, seconds)
            if not self.options.keep:
                shutil.rmtree(run.folder / "train" / "checkpoints", ignore_errors=True)
        elif status == FAILED:
            self.failed += 1
            print(_tail(self.options.out / f"{run.variant.run}.log"), flush=True)
        self._say(f"{run.variant.run}: {status} in {seconds:.0f} s{_in_words(row)}")

    def _stop(self) -> None:
        """Ask what still runs to end between two steps."""
        for run in self.running:
            run.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for run in self.running:
            try:
                run.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()
            self._keep(run, STOPPED, run.process.returncode)
        self.running = []

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.started:5.0f} s  {line}", flush=True)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _in_words(row: dict[str, Any]) -> str:
    """Tasks of the furthest view, and the share of dense generation kept."""
    view = next((name for name in ("recovered", "pruned", "dense") if name in row), None)
    if view is None:
        return ""
    tasks = ", ".join(f"{name} {task['value']:.3g}" for name, task in row[view]["tasks"].items())
    share = kept(row, view)
    return f"; {view}: {tasks}" + ("" if share is None else f", {share:.0%} of dense generation kept")


if __name__ == "__main__":
    sys.exit(main())
