"""recover on several GPUs of one machine, with the files under launch/ as they are: four parts, each with its table.

    python benchmarks/several_gpus/several_gpus.py law speed --out OUT
    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/several_gpus/several_gpus.py job kills --out OUT --beside

law     float32, tiny: losses, gradients, parameters against one GPU at the same global batch
speed   a 7B shape with random weights: tokens a second, memory, efficiency, LoRA everywhere and behind the cut
job     SmolLM2 from the dense model to the verified export: losses, KL and generation against one GPU over seeds;
        stopped on several and taken on by one, and the other way round
kills   one of the processes is killed in the middle of a step, many times

On a machine without GPUs the processes compute on its CPU (ZeRO-2 and ZeRO-3 only): with `--tiny`, to see that it runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import job as jobs
import kills
import law
import speed
import torch
from launching import ON_GPUS, ROOT

from recover.artifacts import write_json

SMOLLM2 = ["recover.tokens=150000", "recover.epochs=2", "measure.sampling=null", "probe.samples=32"]
EMBEDDED = ["recover.tokens=60000", "recover.epochs=2", "recover.save_steps=5", "measure.sampling=null"]
TINY = ["recover.tokens=6000", "recover.epochs=2", "recover.batch_size=4", "measure.limit=4", "measure.sampling=null"]
TINY += ["measure.max_new_tokens=24", "probe.samples=2", "probe.steps=4", "recover.save_steps=5"]
TINY += ["prune={kind: depth, blocks: [3]}"]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["law", "speed", "job", "kills"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2, help="processes (%(default)s)")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/smollm2-135m-drop3.yaml", help="of the job")
    parser.add_argument("--seeds", type=int, default=3, help="of the job on one GPU (%(default)s)")
    parser.add_argument("--trials", type=int, default=3, help="kills of each engine (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row of speed after this")
    parser.add_argument("--beside", action="store_true", help="parts beside one another; not for speed")
    parser.add_argument("--tiny", action="store_true", help="everything small: shows that it runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    options.out = options.out.resolve()
    scratch = options.out / "scratch"
    quickstart = ROOT / "recipes/quickstart.yaml"

    def whole_job() -> list[dict[str, Any]]:
        recipe, fields = (quickstart, TINY) if options.tiny else (options.recipe, SMOLLM2)
        job = jobs.Job(recipe.resolve(), fields, scratch / "job", options.gpus)
        return [*job.seeds(options.seeds), *job.moved()]

    def all_kills() -> list[dict[str, Any]]:
        job = jobs.Job(quickstart, TINY if options.tiny else EMBEDDED, scratch / "kills", options.gpus)
        return kills.kills(job, options.trials)

    more = ["--tiny"] if options.tiny else []
    parts: dict[str, tuple[Callable[[], list[dict[str, Any]]], Callable[[Any], list[str]]]] = {
        "law": (lambda: law.law(scratch, options.gpus), law.table),
        "speed": (lambda: speed.speed(scratch, options.gpus, options.seconds, more), speed.table),
        "job": (whole_job, jobs.table),
        "kills": (all_kills, kills.table),
    }

    def part(name: str) -> bool:
        work, table = parts[name]
        started = time.monotonic()
        try:
            found, problem = work(), None
        except Exception as error:  # the other parts may still be of use
            found, problem = [], f"{type(error).__name__}: {error}"
        record = {"machine": machine(options.gpus), "seconds": time.monotonic() - started, "problem": problem}
        write_json(options.out / f"{name}.json", {**record, "rows": found})
        lines = [f"{name}, {record['machine']}, {record['seconds']:.0f} s", "", *(table(found) if found else [])]
        text = "\n".join([*lines, *([problem] if problem else [])]) + "\n"
        (options.out / f"{name}.md").write_text(text)
        print(text, flush=True)
        return problem is None and not any("error" in row for row in found)

    with ThreadPoolExecutor(len(options.parts) if options.beside else 1) as pool:
        fine = list(pool.map(part, options.parts))
    sys.stdout.flush()
    os._exit(0 if all(fine) else 1)


def machine(gpus: int) -> str:
    name = f"{gpus} x {torch.cuda.get_device_name()}" if ON_GPUS else f"CPU ({platform.processor() or 'unknown'})"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
