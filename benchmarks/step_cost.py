"""What a step of `step.py` must compute, and where its time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TOP = 12  # kernels listed

# The first group with a word that the kernel's name holds.
GROUPS = {
    "attention": ("flash", "fmha", "attention", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk"),
    "recover's loss": ("_terms_kernel",),
    "softmax and KL": ("softmax", "kl_div", "jsd"),
    "copies": ("memcpy", "memset", "copy"),
    "optimizer": ("multi_tensor", "adam"),
    "elementwise and the rest": ("",),
}


@dataclass(frozen=True)
class Shape:
    """`dropped`: first block that goes, and the one behind the last."""

    blocks: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    dropped: tuple[int, int]

    def config(self) -> dict[str, int]:
        return {
            "num_hidden_layers": self.blocks,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
        }


SEVEN = Shape(blocks=28, width=3584, intermediate=18_944, heads=28, kv_heads=4, vocabulary=152_064, dropped=(16, 24))
# SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B.
TENTH = Shape(blocks=30, width=576, intermediate=1536, heads=9, kv_heads=3, vocabulary=49_152, dropped=(18, 24))
HALF = Shape(blocks=24, width=896, intermediate=4864, heads=14, kv_heads=2, vocabulary=151_936, dropped=(15, 17))
ONE_AND_A_HALF = Shape(
    blocks=28, width=1536, intermediate=8960, heads=12, kv_heads=2, vocabulary=151_936, dropped=(20, 22)
)
SMALL = Shape(blocks=6, width=64, intermediate=160, heads=4, kv_heads=2, vocabulary=512, dropped=(3, 5))

SHAPES = {"135M": TENTH, "0.5B": HALF, "1.5B": ONE_AND_A_HALF, "7B": SEVEN, "tiny": SMALL}


def flops(shape: Shape, batch: tuple[int, ...], rank: int, passes: tuple[int, int, int]) -> float:
    """Floating-point operations of a step: blocks run (dense, forward, backward), head twice forward and once back.

    Weights are frozen, so backward is the product with the input's gradient alone, and all three of LoRA's.
    """
    sequences, length = batch
    tokens = sequences * length
    kv = shape.width * shape.kv_heads // shape.heads
    weights = 2 * shape.width * (shape.width + kv) + 3 * shape.width * shape.intermediate
    adapter = rank * (2 * 2 * shape.width + 2 * (shape.width + kv) + 3 * (shape.width + shape.intermediate))
    attention = 2 * length * shape.width  # per token: two products, causal
    dense, forward, backward = passes
    head = 3 * 2 * sequences * (length - 1) * shape.width * shape.vocabulary
    blocks = dense * (2 * weights + attention) + forward * (2 * weights + 2 * adapter + attention)
    blocks += backward * (2 * weights + 4 * adapter + 2 * attention)
    return float(tokens * blocks + head)


def shares(step: Callable[[], Any]) -> list[str]:
    """Lines of a table: milliseconds of one step by group of kernels, and its longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [(each.key, each.self_device_time_total / 1e3, each.count) for each in found.key_averages()]
    groups = dict.fromkeys(GROUPS, 0.0)
    for name, milliseconds, _ in kernels:
        groups[group_of(name)] += milliseconds
    longest = sorted(kernels, key=lambda each: -each[1])[:TOP]
    return [
        *(f"- {name}: {milliseconds:.1f}" for name, milliseconds in groups.items()),
        *(f"- {milliseconds:.1f} ({count} x) `{name[:90]}`" for name, milliseconds, count in longest),
    ]


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next(group for group, words in GROUPS.items() if any(word in name for word in words))


def seconds(step: Callable[[], Any], cuda: bool) -> float:
    if not cuda:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a bare product of random values."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, b), cuda) for _ in range(10))
