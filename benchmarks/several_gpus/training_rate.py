"""One whole `recover` of a 7B shape with random weights, in each process of a launch: seconds a step, and memory.

    python benchmarks/several_gpus/training_rate.py --out rate.json
    accelerate launch --config_file launch/zero2.yaml benchmarks/several_gpus/training_rate.py --out rate.json

The model is that of `benchmarks/step.py` (Qwen2.5-7B's shape, blocks 16 to 23 of 28 dropped, LoRA of rank 16, KL; or
another `--shape`), but nothing is called by hand here: text from a file, trl's trainer, the engine, clipping, AdamW,
checkpoints. Each process has `--batch` sequences of `--length` tokens at once, one micro-step a step.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import string
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the models of benchmarks/step.py

from byte_tokenizer import byte_tokenizer
from step_cost import SHAPES
from step_models import RANK, Bench
from step_profile import StepProfile
from two_processes import caught_by

from recover.base import dist
from recover.base.artifacts import read_jsonl, write_json
from recover.config.recipe import Train
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.checkpoints import STEPS
from recover.train.train import train

WARM_UP = 4  # steps that are not counted
PROFILED = 2  # and these, at the end


class Counted(TrainerCallback):
    """Memory is counted from the steps on that are; building and dealing out the model is not among them."""

    engine = None  # for `caught_by`

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def write_text(path: Path, sequences: int, length: int) -> None:
    """Rows that are `length` tokens each of the byte tokenizer, its end token included, and all different."""
    letters = random.Random(1)
    rows = ("".join(letters.choices(string.ascii_lowercase + " ", k=length - 1)) for _ in range(sequences))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def cfg(options: argparse.Namespace, folder: Path) -> Train:
    sequences = options.batch * dist.world_size()
    text = folder / "text.jsonl"
    steps = WARM_UP + options.steps + PROFILED * options.profile
    dist.on_main(lambda: write_text(text, sequences * steps, options.length))
    cache = {"none": None, "dense": {"folder": str(folder / "states")}}
    cache["prefix"] = {"folder": str(folder / "states"), "prefix": True}
    return Train.model_validate(
        {
            "data": [{"kind": "given", "source": str(text)}],
            "epochs": 1,
            "tokens": sequences * steps * (options.length - 1),
            "length": options.length,
            "batch_size": sequences,
            "micro_batch_size": options.batch,
            "lora": {"rank": RANK, "blocks": options.blocks},
            "loss": {"chunk": options.chunk},
            "gradient_checkpointing": options.checkpointing,
            "cache": cache[options.cache],
            "shard_weights": options.shard_weights,
        }
    )


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7B", help="of the model (%(default)s)")
    parser.add_argument("--blocks", choices=["all", "after_cut"], default="all", help="where LoRA goes")
    parser.add_argument("--cache", choices=["none", "dense", "prefix"], default="none", help="states read from disk")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--shard-weights", action="store_true", help="train.shard_weights")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a process (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="their tokens (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="recover's loss.chunk (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="that are counted (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="two steps more, and where process 0 spends their time")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: shows that it runs, not how fast")
    return parser


def main() -> None:
    options = parser_of().parse_args()
    dist.start()
    found = measured(options)
    if dist.is_main():
        write_json(options.out, found)
    dist.stop()
    dist.leave(0)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One training, by all processes together; its figures, on the main one."""
    if options.tiny:
        options.shape, options.batch, options.length = "tiny", 2, 48
    started = time.monotonic()
    folder = Path(dist.broadcast(tempfile.mkdtemp(prefix="rate-")))
    bench = Bench(SHAPES[options.shape], dist.device(), options.batch, options.length, options.chunk)
    first, end = bench.shape.dropped
    twin = Twin(bench.dense(), Plan("depth", bench.shape.blocks, tuple(range(first, end))))
    profile = StepProfile(WARM_UP + options.steps + 1)
    contexts: list[dict[str, Any]] = []

    def after_epoch(_epoch: int, context: dict[str, Any]) -> None:
        contexts.append(context)

    with caught_by(Counted()), caught_by(profile) if options.profile and dist.is_main() else nullcontext():
        train(twin, byte_tokenizer(), cfg(options, folder), folder / "run", after_epoch, seed=0)
    peaks = dist.gather([contexts[-1]["peak_memory_bytes"] or 0])
    if not dist.is_main():
        return {}
    steps = read_jsonl(folder / "run" / STEPS)
    shutil.rmtree(folder)
    more = {"profile": profile.found, "wall_seconds": time.monotonic() - started}
    return figures(steps, peaks, options) | more


def figures(steps: list[dict[str, Any]], peaks: list[int], options: argparse.Namespace) -> dict[str, Any]:
    times = [after["seconds"] - before["seconds"] for before, after in pairwise(steps)][WARM_UP - 1 :][: options.steps]
    seconds, tokens = statistics.median(times), options.batch * options.length * dist.world_size()
    return {
        "processes": dist.world_size(),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "times": times,
        "peak_bytes": peaks,
        "losses": [line["loss"] for line in steps],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
