"""What recovers best at equal tokens: losses, learning rates, where LoRA goes, which text; several seeds, one table.

    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/quality.py recipes/smollm2-135m-drop3.yaml --out checkpoints/quality --jobs 6 --seconds 380
    python benchmarks/quality.py recipes/smollm2-135m-drop3.yaml --out checkpoints/quality --table

A star and no full cross: each variant differs from the first, `kl`, in one thing, a few in two. All train for one
epoch, on the same text per seed, from the same plan. A seed decides the text that the dense model writes, its order and
the adapters' beginnings; the pairs of a table row share all three. Adam does not see a loss's scale but for clipping,
so `jsd` is taken four times over: near the dense model it is a quarter of KL. Given text is that of the calibration,
all of it scored; where it holds fewer tokens than asked for it is read again, which the worker's log says.

`after_cut` trains on as many tokens in less time, so it stands twice: at equal tokens, and with the tokens that took
about equal time. Seconds are those of one of `--jobs` workers that share the GPU: compare them, do not quote them.

Rows go to rows.jsonl as they come; what stands there is not done again. Seed by seed, so that a cut leaves whole seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from quality_table import markdown, read_rows
from quality_work import VARIANTS, Row, Task, tasks_for, worker

from recover.models.source import locate
from recover.recipe import load_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    rows_file = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        run_all(tasks_for(options, read_rows(rows_file)), options, rows_file)
    table = markdown(read_rows(rows_file), list(VARIANTS))
    (options.out / "quality.md").write_text(table)
    print(table)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, the plan, texts and logs")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=150_000, help="scored tokens of a training (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="workers that share the GPU (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave nothing running after this")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields of every training")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    return parser.parse_args(arguments)


class Crew:
    """Workers, each with one task at a time; tasks whose needs are met go out in their order."""

    def __init__(self, options: argparse.Namespace, tasks: list[Task]) -> None:
        spawning: Any = multiprocessing.get_context("spawn")
        self.waiting, self.done = tasks, set()
        self.failed: list[str] = []
        self.workers: dict[Connection, Any] = {}
        self.busy: dict[Connection, Task | None] = {}  # None: still loading
        for number in range(min(options.jobs, len(tasks))):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=worker, args=(theirs, options, number))
            process.start()
            theirs.close()
            self.workers[ours], self.busy[ours] = process, None

    def hand_out(self) -> None:
        for connection in [each for each in self.workers if each not in self.busy]:
            ready = next((task for task in self.waiting if task.needs <= self.done), None)
            if ready is None:
                return
            self.waiting.remove(ready)
            self.busy[connection] = ready
            connection.send(ready)

    def collect(self, seconds: float) -> list[Row]:
        """Rows that came within so many seconds."""
        rows = []
        for each in wait(list(self.busy), seconds):
            connection: Any = each
            task = self.busy.pop(connection)
            try:
                found, error = connection.recv()
            except EOFError:
                found, error = [], f"worker ended with exit code {self.workers.pop(connection).exitcode}"
            rows += found
            if error is not None:
                self.failed.append(f"{task}: {error}")
                print(self.failed[-1], flush=True)
            elif task is not None:
                self.done.add((task.kind, task.seed))
        return rows

    def stop(self) -> None:
        for process in self.workers.values():
            process.terminate()
        for process in self.workers.values():
            process.join(10)


def run_all(tasks: list[Task], options: argparse.Namespace, rows_file: Path) -> None:
    if not tasks:
        return
    started = time.monotonic()
    locate(load_recipe(options.recipe, options.set).model)  # a GGUF file is converted by one process, not by all
    crew = Crew(options, tasks)
    try:
        while time.monotonic() - started < options.seconds:
            crew.hand_out()
            if not crew.busy:
                break
            for row in crew.collect(min(1.0, options.seconds)):
                with rows_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{time.monotonic() - started:5.0f} s: {row['variant']}, seed {row['seed']}", flush=True)
    finally:
        crew.stop()
    print(f"{len(crew.waiting) + len(crew.busy)} tasks not done, {len(crew.failed)} failed", flush=True)


if __name__ == "__main__":
    main()
