"""Head and loss, forward and gradient, beside three bare products and beside what others do: one run, one table.

    python benchmarks/loss.py --out benchmarks/out

On a GPU the shape is that of Qwen2.5-7B's head, on a CPU a tiny one. Time: median over rounds, in each of which every
case runs once, after a warm-up; its ratio is to the three products that no exact loss over a frozen head can do
without, at their fastest. Memory: peak of a call above what its inputs hold. Error: of dL/dh against float64 from the
same inputs, on some of the rows, at several distances from the dense model. Host syncs: how often a call made the host
wait for the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recover.config.recipe import Loss
from recover.distill.loss import distillation_loss, rows_at_once

Case = Callable[[Tensor, Tensor, Tensor], Tensor]  # (h_pruned_ND, h_dense_ND, head_VD) -> dL/dh_ND of the mean

FLOOR = "three products"
VARIANCE = 0.1  # weight beside KL
LOGIT_SPREAD = 5.5  # standard deviation of a logit; at 152,064 tokens the largest is about 25
CPU = {"tokens": 48, "width": 32, "vocabulary": 997, "chunks": [16, 32], "repeats": 3, "rows": 16}
GPU = {"tokens": 8192, "width": 3584, "vocabulary": 152_064, "chunks": [512, 1024, 2048], "repeats": 10, "rows": 512}
KLS = [1e-1, 3e-2, 3e-3, 3e-4, 3e-5]


@dataclass(frozen=True)
class Inputs:
    """Hidden states after the final norm, and the head; a pruned state is a dense one plus noise."""

    dense_ND: Tensor
    noise_ND: Tensor
    head_VD: Tensor

    def pruned_ND(self, size: float) -> Tensor:
        return (self.dense_ND.float() + size * self.noise_ND.float()).to(self.dense_ND.dtype)


def inputs(tokens: int, width: int, vocabulary: int, device: str, dtype: torch.dtype) -> Inputs:
    """Random, with logits as peaked as a trained model's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    head_VD = normal(vocabulary, width).mul_(LOGIT_SPREAD / width**0.5).to(dtype)
    return Inputs(normal(tokens, width).to(dtype), normal(tokens, width).to(dtype), head_VD)


def ours(chunk: int, weights: Loss) -> Case:
    def run(h_pruned_ND: Tensor, h_dense_ND: Tensor, head_VD: Tensor) -> Tensor:
        h_ND = h_pruned_ND.detach().requires_grad_()
        loss = distillation_loss(h_ND, h_dense_ND, head_VD, weights, chunk=chunk)
        return torch.autograd.grad(loss.total / len(h_ND), h_ND)[0]

    return run


def products(chunk: int) -> Case:
    """Both logits in the inputs' dtype, and something of their shape times W; no loss."""

    def run(h_pruned_ND: Tensor, h_dense_ND: Tensor, head_VD: Tensor) -> Tensor:
        parts = []
        rows = rows_at_once(chunk, head_VD)
        for pruned_CD, dense_CD in zip(h_pruned_ND.split(rows), h_dense_ND.split(rows), strict=True):
            torch.mm(dense_CD, head_VD.t())
            parts.append(torch.mm(torch.mm(pruned_CD, head_VD.t()), head_VD))
        return torch.cat(parts)

    return run


def full_logits(dtype: torch.dtype) -> Case:
    """KL as in a textbook: both sides' logits whole, in `dtype`, and autograd."""

    def run(h_pruned_ND: Tensor, h_dense_ND: Tensor, head_VD: Tensor) -> Tensor:
        h_ND = h_pruned_ND.detach().requires_grad_()
        log_q_NV = (h_ND @ head_VD.t()).to(dtype).log_softmax(-1)
        log_p_NV = (h_dense_ND @ head_VD.t()).to(dtype).log_softmax(-1)
        loss = functional.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)
        return torch.autograd.grad(loss, h_ND)[0]

    return run


def liger(h_pruned_ND: Tensor, h_dense_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Liger's fused linear JSD at beta 0, which it defines as KL(dense || pruned)."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction  # pyright: ignore[reportMissingImports]

    h_ND = h_pruned_ND.detach().requires_grad_()
    loss: Any = LigerFusedLinearJSDFunction.apply(h_ND, head_VD, h_dense_ND, head_VD, None, 0.0, -100, 1.0)
    return torch.autograd.grad(loss, h_ND)[0]


def cases(chunks: Sequence[int], device: str) -> dict[str, Case]:
    found: dict[str, Case] = {f"{FLOOR}, chunk {chunk}": products(chunk) for chunk in chunks}
    for chunk in chunks:
        found[f"recover, KL + variance, chunk {chunk}"] = ours(chunk, Loss(kl=1.0, variance=VARIANCE))
    found[f"recover, KL, chunk {max(chunks)}"] = ours(max(chunks), Loss())
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger fused linear JSD, KL"] = liger
    found["full logits, KL, bf16"] = full_logits(torch.bfloat16)
    found["full logits, KL, fp32"] = full_logits(torch.float32)
    return found


def seconds(case: Case, arguments: tuple[Tensor, Tensor, Tensor]) -> float:
    """One call, on the device's own clock where it has one."""
    if not arguments[0].is_cuda:
        start = time.perf_counter()
        case(*arguments)
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    case(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(case: Case, arguments: tuple[Tensor, Tensor, Tensor]) -> int | None:
    if not arguments[0].is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case(*arguments)
    return torch.cuda.max_memory_allocated() - before


def host_syncs(case: Case, arguments: tuple[Tensor, Tensor, Tensor]) -> int | None:
    if not arguments[0].is_cuda:
        return None
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            case(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def truth(h_pruned_ND: Tensor, h_dense_ND: Tensor, head_VD: Tensor, variance: float) -> tuple[float, Tensor]:
    """(mean KL, dL/dh of the mean loss) in float64 from the same inputs: plain softmaxes, chain rule by hand."""
    head_VD = head_VD.double()
    y_NV, z_NV = h_dense_ND.double() @ head_VD.t(), h_pruned_ND.double() @ head_VD.t()
    log_p_NV, log_q_NV = y_NV.log_softmax(-1), z_NV.log_softmax(-1)
    p_NV, u_NV = log_p_NV.exp(), z_NV - y_NV
    kl = (p_NV * (log_p_NV - log_q_NV)).sum(-1).mean().item()
    v_NV = u_NV - (p_NV * u_NV).sum(-1, keepdim=True)
    g_NV = log_q_NV.exp() - p_NV + variance * p_NV * v_NV
    return kl, g_NV @ head_VD / len(h_pruned_ND)


def gradient_errors(named: dict[str, Case], data: Inputs, rows: int, kls: Sequence[float]) -> list[dict[str, Any]]:
    """Per distance, every case's |dL/dh - truth| / |truth|."""
    few = Inputs(data.dense_ND[:rows], data.noise_ND[:rows], data.head_VD)
    pilot, _ = truth(few.pruned_ND(0.05), few.dense_ND, few.head_VD, 0.0)
    found = []
    for target in kls:
        pruned_ND = few.pruned_ND(0.05 * (target / pilot) ** 0.5)
        exact = {weight: truth(pruned_ND, few.dense_ND, few.head_VD, weight) for weight in (0.0, VARIANCE)}
        row: dict[str, Any] = {"kl": exact[0.0][0], "errors": {}}
        for name, case in named.items():
            exact_ND = exact[VARIANCE if "variance" in name else 0.0][1]
            gradient_ND = case(pruned_ND, few.dense_ND, few.head_VD).double()
            row["errors"][name] = ((gradient_ND - exact_ND).norm() / exact_ND.norm()).item()
        found.append(row)
    return found


def measure(
    *, tokens: int, width: int, vocabulary: int, chunks: Sequence[int], repeats: int, rows: int, device: str
) -> dict[str, Any]:
    """Everything the table holds, and what it was measured on."""
    data = inputs(tokens, width, vocabulary, device, torch.bfloat16 if device == "cuda" else torch.float32)
    arguments = (data.pruned_ND(0.05), data.dense_ND, data.head_VD)
    named = cases(chunks, device)
    for case in named.values():
        seconds(case, arguments)
    peaks = {name: peak_bytes(case, arguments) for name, case in named.items()}
    syncs = {name: host_syncs(case, arguments) for name, case in named.items()}
    times: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(repeats):
        for name, case in named.items():
            times[name].append(seconds(case, arguments))
    losses = {name: case for name, case in named.items() if not name.startswith(FLOOR)}
    errors = gradient_errors(losses, data, rows, KLS)
    floor_seconds = min(statistics.median(times[name]) for name in named if name not in losses)
    table = [
        {
            "case": name,
            "ratio": statistics.median(times[name]) / floor_seconds,
            "seconds": statistics.median(times[name]),
            "fastest": min(times[name]),
            "slowest": max(times[name]),
            "peak_bytes": peaks[name],
            "host_syncs": syncs[name],
            "gradient_error": [row["errors"].get(name) for row in errors],
        }
        for name in named
    ]
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "shape": {"tokens": tokens, "width": width, "vocabulary": vocabulary},
        "dtype": str(data.head_VD.dtype).removeprefix("torch."),
        "repeats": repeats,
        "kls": [row["kl"] for row in errors],
        "cases": table,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table, ratio first."""
    shape = " x ".join(f"{size:,}" for size in found["shape"].values())
    kls = [f"error at KL {kl:.1e}" for kl in found["kls"]]
    head = ["x floor", "ms", "peak GB", "host syncs", *kls, "case"]
    lines = [
        f"{found['machine']}, torch {found['torch']}, {found['dtype']}, {shape} (tokens x width x vocabulary), "
        f"median of {found['repeats']}:",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---:|' * (len(head) - 1)}---|",
    ]
    for row in found["cases"]:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        syncs = "" if row["host_syncs"] is None else str(row["host_syncs"])
        errors = ["" if error is None else f"{error:.2%}" for error in row["gradient_error"]]
        cells = [f"{row['ratio']:.2f}", f"{row['seconds'] * 1e3:.1f}", peak, syncs, *errors, row["case"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = GPU if device == "cuda" else CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tokens", "width", "vocabulary", "repeats", "rows"):
        parser.add_argument(f"--{name}", type=int, default=defaults[name])
    parser.add_argument("--chunks", type=int, nargs="+", default=defaults["chunks"])
    parser.add_argument("--out", type=Path, help="folder for loss.json and loss.md")
    options = vars(parser.parse_args(arguments))
    out: Path | None = options.pop("out")
    found = measure(device=device, **options)
    print(markdown(found))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "loss.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "loss.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
