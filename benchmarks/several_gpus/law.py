"""Float32, a tiny model: losses, gradients and parameters of several GPUs against those of one, same global batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from job import Keep
from launching import ON_GPUS, Launch

SCRIPT = "tests/two_processes.py"
SHARDED = ("plain+shards", "zero2+shards", "zero2+shards+checkpointing")
VARIANTS = ("plain", "plain:2", "zero2", "zero3", "zero3:2", "zero2+dense", *SHARDED)
# Another model is trained: LoRA behind the cut only.
AFTER_CUT = ("zero3+prefix", "plain+prefix", "zero2+shards+prefix")


def law(out: Path, processes: int, keep: Keep) -> None:
    """`processes` must divide the eight sequences of a step."""
    import two_processes

    one, several = out / "law-one", out / "law-several"
    for folder in (one, several):
        folder.mkdir(parents=True, exist_ok=True)
        two_processes.write_text(folder)
    alone = Launch("one", gpu=0).start([SCRIPT, str(one), "plain", "plain+prefix"], out / "law-one.log")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    try:
        Launch("one").run([*launcher, SCRIPT, str(several), *VARIANTS, *AFTER_CUT], out / "law.log")
    finally:  # what was done before a failure is shown all the same
        if alone.wait() != os.EX_OK:
            raise RuntimeError(f"one GPU: {(out / 'law-one.log').read_text(errors='replace')[-1500:]}")
        figures = {name: torch.load(one / f"{name}.pt") for name in ("plain", "plain+prefix")}
        for name in (*VARIANTS, *AFTER_CUT):
            base, done = figures["plain+prefix" if name in AFTER_CUT else "plain"], several / f"{name}.pt"
            if done.exists():
                keep({"row": f"{processes} x {name}"} | differences(torch.load(done), base))


def differences(found: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Largest, relative: of losses, of the norm of the gradient's difference; and of parameters, absolute."""
    losses = [abs(a - b) / abs(b) for a, b in zip(found["losses"], alone["losses"], strict=True)]
    gradients = []
    for ours, theirs in zip(found["gradients"], alone["gradients"], strict=True):
        a, b = (torch.cat([each.cpu().flatten() for each in step]) for step in (ours, theirs))
        gradients.append(float((a - b).norm() / b.norm()))
    parameters = zip(found["parameters"], alone["parameters"], strict=True)
    return {
        "steps": len(losses),
        "loss": max(losses),
        "gradient": max(gradients),
        "parameter": max(float((a.cpu() - b.cpu()).abs().max()) for a, b in parameters),
        "same_texts": found["texts"] == alone["texts"],
        "on": torch.cuda.get_device_name() if ON_GPUS else "CPU",
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| float32 | loss, relative | gradient, relative | parameters | same texts |", "|---|---:|---:|---:|---|"]
    for row in found:
        figures = f"{row['loss']:.1e} | {row['gradient']:.1e} | {row['parameter']:.1e} | {row['same_texts']}"
        lines.append(f"| {row['row']} | {figures} |")
    return lines
