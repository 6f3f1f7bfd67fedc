"""Whole trainings of small shapes: scored tokens a second, kernel by kernel and as CUDA graphs, in one run.

    python benchmarks/training.py --out training.json           # one CUDA GPU, three to four minutes
    python benchmarks/training.py --shapes tiny --out x.json    # CPU, seconds: shows that it runs, not how fast
    ... --shapes 0.5B --ways "CUDA graphs" --profile FOLDER      # where the time of a step goes (`training_profile.py`)

Random weights in bfloat16, blocks dropped, LoRA of rank 64 on all linears, KL. Nothing is called by hand: text from a
file, trl's trainer, clipping, AdamW, checkpoints. 32 sequences a step: a prompt of 40 to 160 tokens without loss, an
answer of some 190 tokens that is scored. Rows of one shape train on the same text from the same weights, so their
losses must agree. `--ways` takes trl's trainers too (`training_trl.py`).

`steps`: median over the steps after the first tenth. `training`: all scored tokens over the whole time of training,
recording of graphs included.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import random
import shutil
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import training_profile
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from byte_tokenizer import byte_tokenizer
from step_cost import SHAPES
from step_models import Bench
from training_profile import StepProfile

from recover.base import dist
from recover.base.artifacts import read_jsonl
from recover.config.recipe import Train
from recover.distill import distiller
from recover.kernels import fused
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train import data
from recover.train import train as training
from recover.train.checkpoints import STEPS
from recover.train.data import build_dataset

BATCH, RANK = 32, 64
COLUMNS = ("prompt", "completion")
WAYS = {"kernel by kernel": 0, "CUDA graphs": training.LARGEST_GRAPHED}
# CUDA graphs without one thing each: what it is worth. Rows by chance come in another order, so losses differ there.
WITHOUT: dict[str, list[tuple[Any, str, Any]]] = {
    "graphs, rows by chance": [(data, "evened", lambda rows, *_: list(rows))],
    "graphs, casts one by one": [
        (distiller, "cast_together", lambda *_, **__: nullcontext()),
        (fused, "_exact", lambda _scaling: False),
    ],
}
WAYS |= dict.fromkeys(WITHOUT, training.LARGEST_GRAPHED)
PEERS = ("trl's GKD", "trl's SFT, packed")


def write_text(path: Path, sequences: int, shrink: int) -> int:
    """Prompts and answers, all different; the tokens that are scored."""
    draw = random.Random(1)
    scored = 0
    with open(path, "w") as file:
        for _ in range(sequences):
            answer = min(400, max(20, round(draw.lognormvariate(5.12, 0.5)))) // shrink
            texts = [
                "".join(draw.choices(string.ascii_lowercase + " ", k=length))
                for length in (draw.randint(40, 160) // shrink, answer)
            ]
            scored += answer + 1
            file.write(json.dumps(dict(zip(COLUMNS, texts, strict=True))) + "\n")
    return scored


def cfg_of(text: Path, tokens: int) -> Train:
    return Train.model_validate(
        {
            "data": [{"kind": "given", "source": str(text), "columns": {name: name for name in COLUMNS}}],
            "epochs": 1,
            "tokens": tokens,
            "length": 640,
            "batch_size": BATCH,
            "lora": {"rank": RANK},
        }
    )


def trained(
    name: str, way: str, text: Path, tokens: int, folder: Path, *, python: bool, traced: StepProfile | None
) -> dict[str, Any]:
    """One training; its figures."""
    shape, cfg = SHAPES[name], cfg_of(text, tokens)
    bench = Bench(shape, dist.device(), 1, 1024, 2048)
    twin = Twin(bench.dense(), Plan("depth", shape.blocks, tuple(range(*shape.dropped))))
    if way in PEERS:
        import training_trl

        rows = build_dataset(cfg, twin, byte_tokenizer(), 0, folder)
        del twin
        return training_trl.trained(bench, way, rows, BATCH, RANK, len(rows) // BATCH, folder)
    contexts: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tracer = cProfile.Profile() if python else None
    with ExitStack() as stack:
        for where, what, instead in [(training, "LARGEST_GRAPHED", WAYS[way]), *WITHOUT.get(way, [])]:
            stack.enter_context(patch.object(where, what, instead))
        stack.enter_context(traced.watched() if traced else nullcontext())
        if tracer:
            tracer.enable()
        training.train(twin, byte_tokenizer(), cfg, folder, lambda _epoch, context: contexts.append(context), seed=0)
        if tracer:
            tracer.disable()
            out = io.StringIO()
            pstats.Stats(tracer, stream=out).sort_stats("cumulative").print_stats(70)
            pstats.Stats(tracer, stream=out).sort_stats("tottime").print_stats(30)
            print(out.getvalue())
    steps = read_jsonl(folder / STEPS)
    times = [after["seconds"] - before["seconds"] for before, after in pairwise(steps)][len(steps) // 10 :]
    context = contexts[-1]
    return {
        "steps": context["tokens"] / len(steps) / statistics.median(times),
        "training": context["tokens"] / context["seconds"],
        "step_seconds": statistics.median(times),
        "seconds": context["seconds"],
        "tokens": context["tokens"],
        "peak_bytes": context["peak_memory_bytes"],
        "losses": [line["loss"] for line in steps],
    }


def markdown(found: dict[str, Any]) -> str:
    lines = [
        f"{found['machine']}\n",
        "| shape | way | x | scored tokens/s, steps | training | ms a step | peak GB | first loss | last loss |",
        "|---|---|" + "---:|" * 7,
    ]
    for row in found["rows"]:
        base = next(other for other in found["rows"] if other["shape"] == row["shape"])
        peak = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else ""
        lines.append(
            f"| {row['shape']} | {row['way']} | {row['steps'] / base['steps']:.2f} | {row['steps']:,.0f} "
            f"| {row['training']:,.0f} | {row['step_seconds'] * 1e3:,.1f} | {peak} "
            f"| {row['losses'][0]:.6f} | {row['losses'][-1]:.6f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["135M", "0.5B", "1.5B"])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *PEERS], default=[*WAYS][:2])
    parser.add_argument("--steps", type=int, default=100, help="of each training (%(default)s)")
    parser.add_argument("--python", action="store_true", help="also print where Python spends its time")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="trace steps of each training; tables go to FOLDER, and are shown",
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="training-"))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found: dict[str, Any] = {
        "machine": f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; {options.steps} steps",
        "rows": [],
    }
    started = time.monotonic()
    text = folder / "text.jsonl"
    tokens = write_text(text, options.steps * BATCH, shrink=8 if "tiny" in options.shapes else 1)
    for shape in options.shapes:
        for way in options.ways:
            run = folder / f"{shape}-{way}".replace(" ", "-")
            traced = None
            if options.profile and way in WAYS:
                traced = StepProfile(options.steps // 2, dist.device().type)
            row = trained(shape, way, text, tokens, run, python=options.python, traced=traced)
            if traced:
                path = training_profile.write(options.profile, run.name, traced.text())
                print(f"{path}\n{path.read_text()}")
            found["rows"].append({"shape": shape, "way": way, **row})
            options.out.write_text(json.dumps(found, indent=1))
            print(f"{time.monotonic() - started:4.0f} s: {shape}, {way}: {row['steps']:,.0f} tokens/s", flush=True)
            shutil.rmtree(run)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    shutil.rmtree(folder)
    print(markdown(found))


if __name__ == "__main__":
    main()
