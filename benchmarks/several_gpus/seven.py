"""The whole job at a 7B shape on several GPUs, weights shared out while it trains: time and memory, stage by stage.

    python benchmarks/several_gpus/seven.py FOLDER [--shape tiny]      # the model, of random weights, 15 GB

Random weights write nothing that means anything, and every text runs to its limit: an upper bound of its cost.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job import SHARDED, Keep, Row
from launching import ENGINES, POLL_SECONDS, ROOT, Launch

from recover.base.artifacts import read_jsonl

SCRIPT = "benchmarks/several_gpus/watched.py"
RECIPE = ROOT / "recipes/quickstart.yaml"
FIELDS = ["prune.count=2", "probe.samples=8", "probe.steps=16", "train.tokens=40000", "train.epochs=1"]
FIELDS += ["train.batch_size=16", "train.data.0.max_new_tokens=64", "measure.limit=32", "measure.epoch_limit=16"]
FIELDS += ["measure.sampling=null", "measure.max_new_tokens=32"]
STAGES = 8  # of a run


def seven(out: Path, model: Path, gpus: int, go: Path | None, fields: Sequence[str], keep: Keep) -> None:
    """A row for each stage that ends on all processes. `go`: work begins when this file is there."""
    rows, launch = out / "seven.rows", Launch("gpu" if "gpu" in ENGINES else "zero2", gpus)
    files = [rows.with_name(f"{rows.name}.{rank}") for rank in range(gpus)]
    for each in files:
        each.unlink(missing_ok=True)
    after = [] if go is None else ["--after", str(go)]
    words = ["run", str(RECIPE), "--runs", str(out / "seven"), f"model.source={model}", *FIELDS, *SHARDED, *fields]
    log = out / "seven.log"
    process = launch.start([SCRIPT, *after, "--stages", str(rows), *words], log)
    kept = 0
    while True:
        ended = process.poll() is not None
        found = [read_jsonl(each) if each.exists() else [] for each in files]
        while kept < min(map(len, found)):
            ranks: list[Any] = [each[kept] for each in found]
            keep({"row": ranks[0]["stage"], "launch": f"{gpus} x {launch.engine}", "ranks": ranks})
            kept += 1
        if ended:
            break
        time.sleep(POLL_SECONDS)
    if process.returncode != os.EX_OK or kept < STAGES:
        end = log.read_text(errors="replace")[-1500:]
        keep({"row": "end", "error": f"exit code {process.returncode}, {kept} stages: {end}"})


def table(found: Sequence[Row]) -> list[str]:
    lines = [
        "| stage | seconds | GB in use on each GPU, at most | of tensors | GB of each process on the host |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['row']} | {row['error'][-300:]!r} | | | |")
            continue
        ranks = row["ranks"]
        memory = [
            ", ".join(f"{rank[name] / 1e9:.1f}" for rank in ranks) for name in ("gpu_bytes", "tensors", "host_bytes")
        ]
        ended = "" if all(rank["done"] for rank in ranks) else " (not finished)"
        lines.append(f"| {row['row']}{ended} | {max(rank['seconds'] for rank in ranks):.1f} | {' | '.join(memory)} |")
    return lines


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from stages import SHAPES, checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    checkpoint(given.shape, given.folder)


if __name__ == "__main__":
    main()
