"""Rates of several shapes, one launch for each launch file: libraries of all are loaded first, then they take turns.

    accelerate launch --config_file launch/gpu.yaml benchmarks/several_gpus/rates.py --rows ROWS --after TURN 0.5B 7B

A row is a shape of training_rate.py, and behind a + what is set: `7B+shards` (train.shard_weights), `0.5B+kernels`
(kernel by kernel, where one GPU would replay CUDA graphs).
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from training_rate import measured, parser_of

from recover.base import dist
from recover.base.artifacts import append_jsonl
from recover.train import train as training

POLL_SECONDS = 0.02
STEPS = {"7B": 8}  # that are counted; of smaller shapes MORE
MORE = 20


def one_row(row: str, *, tiny: bool) -> dict[str, Any]:
    shape, *more = row.split("+")
    options = parser_of().parse_args(["--out", "none", "--shape", shape, "--steps", str(STEPS.get(shape, MORE))])
    options.tiny, options.shard_weights = tiny, "shards" in more
    largest = 0 if "kernels" in more else training.LARGEST_GRAPHED
    with patch.object(training, "LARGEST_GRAPHED", largest):
        return measured(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL, a line as each row ends")
    parser.add_argument("--launch", required=True, help="what this launch is called in ROWS")
    parser.add_argument("--after", type=Path, required=True, help="wait for this file")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: shows that it runs, not how fast")
    parser.add_argument("wanted", nargs="+")
    given = parser.parse_args()
    while not given.after.exists():
        time.sleep(POLL_SECONDS)
    dist.start()
    for row in given.wanted:
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        try:
            found = one_row(row, tiny=given.tiny)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        failed = any(dist.gather(["error" in found]))
        if dist.is_main():
            line = {"row": f"{given.launch}, {row}", "launch": given.launch, "what": row, "before_bytes": before}
            append_jsonl(given.rows, line | found)
        if failed:
            break  # what a failure leaves behind, the next row would meet
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    dist.stop()
    dist.leave(0)


if __name__ == "__main__":
    main()
