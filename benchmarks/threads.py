"""Threads of torch on a CPU whose cores other programs use too: texts and training steps a second.

    python benchmarks/threads.py --out threads.json                       # some ten minutes
    python benchmarks/threads.py --busy 0 --seconds 4 --rounds 1 --out x.json

The embedded model, on the quickstart's own work: greedy texts, 128 at once, and training steps of 8 packed sequences.
Each figure is taken in a process of its own, beside `--busy` processes that do nothing but count; ways go by turns,
and the median over `--rounds` is shown. `user`: seconds of processor time a second, over all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "all cores, spinning": {"OMP_WAIT_POLICY": ""},
    "all cores, passive": {"OMP_WAIT_POLICY": "passive"},
}
WORK = ("writing", "training")
BATCH, LENGTH = 8, 130


def writing() -> Callable[[], float]:
    """Writes one batch of texts; gives how many."""
    from recover.config.recipe import Model
    from recover.measure.tasks import load_task
    from recover.models.load import load_model, load_tokenizer
    from recover.text.generate import generate

    cfg = Model(source="embedded:fable-2m")
    model, tokenizer = load_model(cfg), load_tokenizer(cfg)
    prompts = [item.prompt for item in load_task("embedded:stories").items][:128]

    def once() -> float:
        generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=128)
        return len(prompts)

    return once


def training() -> Callable[[], float]:
    """Makes one training step; gives 1."""
    import numpy as np
    import torch

    from recover.config.recipe import Lora, Loss, Model
    from recover.distill.distiller import Distiller
    from recover.models.load import load_model
    from recover.models.plan import Plan
    from recover.models.twin import Twin
    from recover.train.data import packer

    model = load_model(Model(source="embedded:fable-2m"))
    twin = Twin(model, Plan("depth", 12, (5, 7)))
    twin.add_lora(Lora(rank=32))
    twin.model.train()
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 1000, (BATCH, LENGTH))
    mask = np.arange(LENGTH) > 20
    rows = [
        {"input_ids": row[: LENGTH - 4 * index], "completion_mask": mask[: LENGTH - 4 * index]}
        for index, row in enumerate(ids)
    ]
    batch = packer(0, "completion", LENGTH)(rows)
    distiller = Distiller(twin, Loss())
    optimizer = torch.optim.AdamW([each for each in twin.model.parameters() if each.requires_grad], lr=1e-3)

    def once() -> float:
        sums = twin.model(**batch, distill=distiller)
        (sums["loss"] / sums["tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1.0

    return once


def measured(work: str, seconds: float, busy: int) -> dict[str, Any]:
    """In this process: what is done a second."""
    import torch

    once = {"writing": writing, "training": training}[work]()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        once()
        before, began, done = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter(), 0.0
        while time.perf_counter() - began < seconds:
            done += once()
        took = time.perf_counter() - began
        user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    finally:
        for other in others:
            other.kill()
            other.wait()
    return {"rate": done / took, "user": user / took, "threads": torch.get_num_threads()}


def child(work: str, way: str, busy: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measured`, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    given = {name: value for name, value in WAYS[way].items() if value}
    command = [sys.executable, __file__, "--measure", work, "--seconds", str(options.seconds)]
    command += ["--busy", str(busy)]
    done = subprocess.run(command, env={**kept, **given}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| busy processes beside | work | way | threads | a second | processor seconds a second |",
        "|---:|---|---|---:|---:|---:|",
    ]
    keys = dict.fromkeys((row["busy"], row["work"], row["way"]) for row in rows)
    for busy, work, way in sorted(keys, key=lambda key: (key[0], WORK.index(key[1]))):
        found = [row for row in rows if (row["busy"], row["work"], row["way"]) == (busy, work, way)]
        rate, user = (statistics.median(row[name] for row in found) for name in ("rate", "user"))
        lines.append(f"| {busy} | {work} | {way} | {found[0]['threads']} | {rate:,.1f} | {user:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=[*WAYS])
    parser.add_argument("--work", nargs="+", choices=WORK, default=[*WORK])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(options.measure, options.seconds, options.busy[0])))
        return
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for busy in options.busy:
            for work in options.work:
                for way in options.ways:
                    row = {"busy": busy, "work": work, "way": way, "load": os.getloadavg()[0]}
                    rows.append({**row, **child(work, way, busy, options)})
                    print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    print(markdown(rows))


if __name__ == "__main__":
    main()
