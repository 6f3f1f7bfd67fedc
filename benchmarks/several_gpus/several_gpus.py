"""recover on several GPUs of one machine, with the files under launch/ as they are: parts, each with its table.

    python benchmarks/several_gpus/several_gpus.py law speed --out OUT
    python benchmarks/several_gpus/several_gpus.py whole deaths --beside --out OUT
    python benchmarks/several_gpus/several_gpus.py turns --out OUT
    python benchmarks/several_gpus/seven.py MODEL
    python benchmarks/several_gpus/several_gpus.py seven --model MODEL --out OUT
    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/several_gpus/several_gpus.py seeds moved kills --out OUT

law     float32, tiny: losses, gradients, parameters against one GPU at the same global batch
speed   a 7B shape with random weights: tokens a second, memory, efficiency, LoRA everywhere and behind the cut
seeds   SmolLM2 from the dense model to the verified export on one GPU, several seeds
moved   the first of these runs from its recovery on, under each file of launch/: losses, KL and generation against one
        GPU's; stopped on several and taken on by one, and the other way round
kills   one of the processes is killed in the middle of a step, many times
whole   float32, the embedded model: what is pruned, probed, written, learnt and exported against one GPU
deaths  one of the processes is killed while weights are read, blocks pruned, text written, in a step, in the export
turns   rates of a 7B and a 0.5B shape, whose launches load their libraries together and then take turns
seven   the whole job at a 7B shape with random weights: time and memory of each stage and GPU

On a machine without GPUs the processes compute on its CPU (ZeRO-2 and ZeRO-3 only): with `--tiny`, to see that it runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import job as jobs
import kills
import law
import seven
import speed
import torch
import turns
import whole
import whole_kills
from launching import ENGINES, ON_GPUS, OVER, ROOT, end_all

from recover.base.artifacts import write_json, write_text

SMOLLM2 = ["train.tokens=150000", "train.epochs=2", "measure.sampling=null", "probe.samples=32"]
SMOLLM2 += ["train.data.0.batch_size=512", "train.data.1.batch_size=512"]  # several runs share a GPU
EMBEDDED = ["train.tokens=20000", "train.epochs=2", "train.save_steps=5", "measure.sampling=null"]
TINY = ["train.tokens=6000", "train.epochs=2", "train.batch_size=4", "measure.limit=4", "measure.sampling=null"]
TINY += ["measure.max_new_tokens=24", "probe.samples=2", "probe.steps=4", "train.save_steps=5"]
TINY += ["prune={kind: depth, blocks: [3]}"]
WHOLE = ["train.tokens=8000", "train.epochs=2", "train.save_steps=3", "measure.sampling=null", "measure.limit=16"]
WHOLE += ["measure.max_new_tokens=32", "probe.samples=4", "probe.steps=8"]
WHOLE_TINY = ["train.tokens=1200", "train.epochs=2", "train.batch_size=4", "train.save_steps=2", "measure.limit=4"]
WHOLE_TINY += ["measure.sampling=null", "measure.max_new_tokens=16", "probe.samples=2", "probe.steps=4"]
WHOLE_TINY += ["prune.calibration.samples=4", "prune.calibration.length=64", "train.data.0.max_new_tokens=24"]
PARTS = ("law", "speed", "seeds", "moved", "kills", "whole", "deaths", "turns", "seven")
QUICKSTART = ROOT / "recipes/quickstart.yaml"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="folder of run directories and logs (default: in --out)")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2, help="processes (%(default)s)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="of speed and kills")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/smollm2-135m-drop3.yaml", help="of the job")
    parser.add_argument("--seeds", type=int, default=3, help="of the job on one GPU (%(default)s)")
    parser.add_argument(
        "--named", default="", help="only variants of moved, or places of deaths, in whose name this regex is found"
    )
    parser.add_argument("--training-only", action="store_true", help="seeds and moved end with their recovery")
    parser.add_argument("--trials", type=int, default=3, help="kills of each engine (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row of speed after this")
    parser.add_argument("--model", type=Path, help="of seven: the folder that seven.py made")
    parser.add_argument("--go", type=Path, help="of turns and seven: load libraries, and wait for this file")
    parser.add_argument("--beside", action="store_true", help="parts beside one another; not for speed")
    parser.add_argument("--tiny", action="store_true", help="everything small: shows that it runs")
    return parser.parse_args(arguments)


class Parts:
    """What each part does with the options, and how its rows are shown."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.scratch = options, (options.scratch or options.out / "scratch").resolve()
        self.more = ["--tiny"] if options.tiny else []
        fields = WHOLE_TINY if options.tiny else WHOLE
        self.whole = whole.Whole(QUICKSTART, fields, self.scratch / "whole", options.gpus)

    def job(self) -> jobs.Job:
        recipe, fields = (QUICKSTART, TINY) if self.options.tiny else (self.options.recipe.resolve(), SMOLLM2)
        command = "train" if self.options.training_only else "run"
        return jobs.Job(recipe, fields, self.scratch / "job", self.options.gpus, command)

    def do(self, part: str, keep: jobs.Keep) -> None:
        options = self.options
        if part == "law":
            law.law(self.scratch, options.gpus, keep)
        elif part == "speed":
            speed.speed(self.scratch, options.gpus, options.engines, options.seconds, self.more, keep)
        elif part == "seeds":
            self.job().seeds(options.seeds, keep)
        elif part == "moved":
            self.job().moved(options.named, keep)
        elif part == "whole":
            whole.whole(self.whole, keep)
        elif part == "deaths":
            whole_kills.whole_kills(self.whole, options.named, keep)
        elif part == "turns":
            turns.turns(self.scratch, options.gpus, options.engines, options.go, self.more, keep)
        elif part == "seven":
            fields = WHOLE_TINY if options.tiny else ["model.dtype=bfloat16"]
            seven.seven(self.scratch, options.model.resolve(), options.gpus, options.go, fields, keep)
        else:
            fields = TINY if options.tiny else EMBEDDED
            job = jobs.Job(QUICKSTART, fields, self.scratch / "kills", options.gpus, "train")
            kills.kills(job, options.trials, options.engines, keep)

    def run(self, part: str) -> bool:
        """True if no row failed; rows are written as they come, as time may end."""
        table = TABLES.get(part, jobs.table)
        started = time.monotonic()
        record: dict[str, Any] = {"machine": machine(self.options.gpus), "problem": None, "rows": []}
        lock = threading.Lock()

        def shown() -> str:
            lines = [f"{part}, {record['machine']}", "", *(table(record["rows"]) if record["rows"] else [])]
            text = "\n".join([*lines, *([record["problem"]] if record["problem"] else [])]) + "\n"
            write_text(self.options.out / f"{part}.md", text)
            return text

        def keep(row: jobs.Row) -> None:
            with lock:
                if OVER.is_set():
                    return  # what was ended from outside is no result
                record["rows"].append(row)
                record["seconds"] = time.monotonic() - started
                write_json(self.options.out / f"{part}.json", record)
                shown()

        try:
            self.do(part, keep)
        except Exception as error:  # the other parts may still be of use
            if OVER.is_set():
                return False
            record["problem"] = f"{type(error).__name__}: {error}"
            write_json(self.options.out / f"{part}.json", record)
        with lock:
            print(shown(), flush=True)
        return record["problem"] is None and not any("error" in row or "problem" in row for row in record["rows"])


TABLES = {"law": law.table, "speed": speed.table, "kills": kills.table, "whole": whole.table}
TABLES |= {"deaths": whole_kills.table, "turns": turns.table, "seven": seven.table}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stopped)
    parts = Parts(options)
    with ThreadPoolExecutor(len(options.parts) if options.beside else 1) as pool:
        fine = list(pool.map(parts.run, options.parts))
    raise SystemExit(0 if all(fine) else 1)


def stopped(number: int, _frame: Any) -> None:
    """The time is over: rows are written, and what still runs would be in the way of what comes next."""
    end_all()
    os._exit(128 + number)


def machine(gpus: int) -> str:
    name = f"{gpus} x {torch.cuda.get_device_name()}" if ON_GPUS else f"CPU ({platform.processor() or 'unknown'})"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
