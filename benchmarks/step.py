"""A whole training step: recover's against two plain models, at the same tokens, in one run.

    python benchmarks/step.py --out step.json        # 7B shape; one CUDA GPU with 140 GB, two to three minutes
    python benchmarks/step.py --shape 0.5B --batch 32 --length 288 --only 0 1 2 --out x.json
    python benchmarks/step.py --tiny --out x.json    # CPU, seconds: shows that all rows compute the same, not how fast

Qwen2.5-7B's shape, or another's (`--shape`), with random weights in bfloat16 (logits as peaked as a trained model's),
random tokens, every one but the first scored; 28 dense blocks, a student of 20 (blocks 16 to 23 dropped), LoRA of rank
16 on all seven linears, KL.
A step is both passes, the loss, backward, clipping and AdamW. Plain: the student is a stock model of 20 blocks with
peft, the teacher another one, full logits. Where states are known, what `train.cache` reads from disk stands in
pinned host memory.

Time: median over repetitions on the device's clock, after a warm-up. Share: FLOPs that the row's own passes need
(causal attention halved, nothing counted twice for checkpointing) over the time, of the rate of a bare bf16 product
measured in the same run. Peak: most that tensors took, the weights among it. `KL` and `gradient`: of the first step, to
be equal in rows of one student; the gradient is that of LoRA behind the cut, whose A is the same in all rows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from step_cost import SHAPES, SMALL, flops, matrix_rate, seconds, shares
from step_models import RANK, Bench, Built
from torch import Tensor, nn

PEERS = {"trl": "trl's", "liger_kernel": "Liger's"}  # package -> word of the rows that need it

# What is left as transformers and peft have it, for what recover's own way is worth.
STOCK = {
    "eager kernels": ("kernels",),
    "stock blocks and LoRA, inputs copied": ("blocks", "adapters", "inputs"),
}


@dataclass(frozen=True)
class Row:
    """`passes`: blocks that run dense, forward and backward; `student`: rows of one student must agree."""

    name: str
    student: str
    passes: tuple[int, int, int]
    build: Callable[[], Built]


def rows_of(bench: Bench) -> list[Row]:
    """The first is what ratios are to; those that matter most come first, as time may end."""
    first, end = bench.shape.dropped
    cut, all_, after = range(first, end), bench.shape.blocks, bench.shape.blocks - end
    kept = all_ - len(cut)
    plain, ours = bench.plain, bench.recover
    whole, short, known = (all_, kept, kept), (all_, after, after), (0, after, after)
    rows = [
        Row("plain", "cut", whole, lambda: plain("kl", dropped=cut)),
        Row("recover", "cut", whole, lambda: ours(dropped=cut)),
        Row("recover, packed, CUDA graphs", "cut", whole, lambda: bench.graphed(dropped=cut)),
        Row("recover, after the cut", "cut", short, lambda: ours(dropped=cut, blocks="after_cut")),
        Row(
            "recover, after the cut, states and prefix known",
            "cut",
            known,
            lambda: ours(dropped=cut, blocks="after_cut", known="all"),
        ),
        Row("recover, states known", "cut", (0, kept, kept), lambda: ours(dropped=cut, known="dense")),
        *(
            Row(
                f"recover{what}, {name}",
                "cut",
                passes,
                lambda known=known, stock=stock: ours(dropped=cut, known=known, stock=stock),
            )
            for what, known, passes in (("", "nothing", whole), (", states known", "dense", (0, kept, kept)))
            for name, stock in STOCK.items()
        ),
        Row("plain, Liger's fused loss", "cut", whole, lambda: plain("liger", dropped=cut)),
        Row("plain, trl's GKD loss", "cut", whole, lambda: plain("trl", dropped=cut)),
        Row("plain, nothing dropped", "whole", (all_, all_, all_), lambda: plain("kl", dropped=())),
        Row("recover, nothing dropped", "whole", (all_, all_, all_), lambda: ours(dropped=())),
        Row("plain, checkpointed", "cut", whole, lambda: plain("kl", dropped=cut, checkpointing=True)),
        Row("recover, checkpointed", "cut", whole, lambda: ours(dropped=cut, checkpointing=True)),
    ]
    absent = [word for package, word in PEERS.items() if importlib.util.find_spec(package) is None]
    absent += [PEERS["liger_kernel"]] if bench.device.type == "cpu" else []
    return [row for row in rows if not any(word in row.name for word in absent)]


def measured(bench: Bench, row: Row, repeats: int, *, profile: bool) -> dict[str, Any]:
    """One row; one that fails is a result too, and printed."""
    cuda = bench.device.type == "cuda"
    result: dict[str, Any] = {"row": row.name, "student": row.student}
    started = time.monotonic()
    try:
        built = row.build()
        trained = [parameter for parameter in built.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)

        def step() -> Tensor:
            loss = built.pass_and_back(bench.ids_BT)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        result |= first_step(bench, built)
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [seconds(step, cuda) for _ in range(repeats)]
        result["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        result["seconds"], result["times"] = statistics.median(times), times
        result["tokens_per_second"] = bench.ids_BT.numel() / result["seconds"]
        result["flops"] = flops(bench.shape, bench.ids_BT.shape, RANK, row.passes)
        result["profile"] = shares(step) if profile and cuda else None
    except (RuntimeError, ValueError, TypeError) as error:
        result["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        traceback.print_exc()
    result["wall_seconds"] = time.monotonic() - started
    return result


def first_step(bench: Bench, built: Built) -> dict[str, float]:
    """KL of the batch, and the norm of LoRA's gradient behind the cut."""
    _, end = bench.shape.dropped
    after = bench.shape.blocks - end
    by_block: dict[int, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(2)
    for name, parameter in built.model.named_parameters():
        if "lora_" in name:
            block = int(name.split(".layers.")[1].split(".")[0])
            by_block.setdefault(block, []).append(parameter)
    behind = [parameter for block in sorted(by_block)[-after:] for parameter in by_block[block]]
    with torch.no_grad():  # the same A in all rows, however peft came to its own
        for parameter in behind:
            if bool((parameter != 0).any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    loss = built.pass_and_back(bench.ids_BT)
    square = sum(float(each.grad.float().square().sum()) for each in behind if each.grad is not None)
    built.model.zero_grad(set_to_none=True)
    return {"kl": float(loss.detach()), "gradient": square**0.5}


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def markdown(found: dict[str, Any]) -> str:
    rows = found["rows"]
    base = next((row["seconds"] for row in rows if "seconds" in row), None)
    lines = [
        f"{found['machine']}\n",
        "| step | x plain | tokens/s | ms | peak GB | share of the matrix rate | KL | gradient |",
        "|---|" + "---:|" * 7,
    ]
    for row in rows:
        if "error" in row or base is None:
            lines.append(f"| {row['row']} | {row.get('error', '')} | | | | | | |")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        share = row["flops"] / row["seconds"] / found["matrix_rate"]
        lines.append(
            f"| {row['row']} | {base / row['seconds']:.2f} | {row['tokens_per_second']:,.0f} "
            f"| {row['seconds'] * 1e3:,.1f} | {peak} | {share:.0%} | {row['kl']:.5g} | {row['gradient']:.5g} |"
        )
    for row in rows:
        if row.get("profile"):
            lines += ["", f"{row['row']}: ms of GPU time in a step", *row["profile"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape in float32 on the CPU")
    parser.add_argument("--shape", choices=list(SHAPES), default="7B", help="of the model (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="their tokens (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="recover's loss.chunk (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this")
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="these rows, from 0")
    parser.add_argument("--profile", nargs="*", type=int, metavar="N", help="where the time goes, of these rows or all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if device.type == "cpu":
        options.batch, options.length = 2, 48
    bench = Bench(
        SHAPES[options.shape] if device.type == "cuda" else SMALL, device, options.batch, options.length, options.chunk
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    found: dict[str, Any] = {"rows": [], "matrix_rate": matrix_rate(device)}
    for number, row in enumerate(rows_of(bench)):
        if time.monotonic() - started > options.seconds or number not in (options.only or [number]):
            continue
        profile = options.profile is not None and number in (options.profile or [number])
        found["rows"].append(measured(bench, row, options.repeats, profile=profile))
        clear()
        found["machine"] = (
            f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; {options.batch} x "
            f"{options.length} tokens; bare product {found['matrix_rate'] / 1e12:.0f} TFLOP/s"
        )
        options.out.write_text(json.dumps(found, indent=1))
        print(f"{time.monotonic() - started:4.0f} s: {row.name}", flush=True)
    found["matrix_rate_after"] = matrix_rate(device)
    options.out.write_text(json.dumps(found, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
