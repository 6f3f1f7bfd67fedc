"""Larger pieces of GPU work: elementwise operations between products as fused kernels, and kernels recorded as a graph.

RMSNorm, silu(gate) * up and rotary embedding are a third of the time of a step on a fast GPU when every operation reads
and writes memory on its own. `fits` says whether the kernels take some tensors; who calls them decides whether they may
run: in training, and while texts are written. What judges given text is the stock modules' to the bit. They have a
gradient, and run where there is a GPU with Triton.

What is recorded as a CUDA graph (`record`) is launched as one: it no longer waits for Python between its kernels.

Shapes: D width, B batch, H heads, T tokens, C columns of a head.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 2**15  # a row of a norm is one tile
VERSION = 1  # of the values: what was computed by other ones is not mixed with theirs


@cache
def kernels() -> Any:
    """The module `recover.kernels.triton_kernels`, for who knows that its kernels are `available`."""
    from recover.kernels import triton_kernels

    return triton_kernels


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Whether there are kernels for tensors on this device."""
    return device.type in DEVICES and _has_triton()


def fits(*tensors: Tensor) -> bool:
    """Whether kernels take these together: on a device that has them, of one dtype that they know, none empty."""
    first = tensors[0]
    return (
        available(first.device)
        and first.dtype in DTYPES
        and all(each.dtype == first.dtype and each.device == first.device and each.numel() > 0 for each in tensors)
    )


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def fits_norm(x: Tensor, weight_D: Tensor) -> bool:
    """Whether `rms_norm` takes these."""
    return fits(x, weight_D) and x.shape[-1] == len(weight_D) <= WIDEST


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight * x / rms(x), rounded to x's dtype before and after the product; the weight gets no gradient."""
    if not _learns(x):
        return kernels().rms_norm(x, weight_D, epsilon, rstd=False)[0]
    return _RmsNorm.apply(x, weight_D, epsilon)  # type: ignore[return-value]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, epsilon):  # type: ignore[override]
        y, rstd_M = kernels().rms_norm(x, weight_D, epsilon, rstd=True)
        ctx.save_for_backward(x, weight_D, rstd_M)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        return kernels().rms_norm_backward(dy, *ctx.saved_tensors), None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded after each; kept for backward are gate and up alone."""
    if _learns(gate, up):
        return _Gated.apply(gate, up)  # type: ignore[return-value]
    if (gate.is_contiguous() and up.is_contiguous()) or not gate.stride(-1) == up.stride(-1) == 1:
        return kernels().gated(gate, up)
    parts_MN = (part.reshape(-1, part.shape[-1]) for part in (gate, up))  # parts of one product
    return kernels().gated_rows(*parts_MN).view(gate.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return kernels().gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):  # type: ignore[override]
        dgate, dup, _ = kernels().gated_backward(*ctx.saved_tensors, dx, product=False)
        return dgate, dup


class FusedGate:
    """`recover.kernels.lora_linear.Gate` of SiLU by kernels."""

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        return kernels().gated(gate, up)

    def backward(self, gate: Tensor, up: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if dx is None:
            return kernels().gated(gate, up), None, None
        dgate, dup, x = kernels().gated_backward(gate, up, dx, product=True, into=dx)
        return x, dgate, dup


def rotary_or(stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`stock`, which is transformers' `apply_rotary_pos_emb`, as one kernel where that takes what it is given."""

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or not _fits_rotary(q, k, cos, sin):
            return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotary(q, k, cos, sin)

    return apply_rotary_pos_emb


def _fits_rotary(q_BHTC: Tensor, k_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> bool:
    if not (fits(q_BHTC, k_BHTC, cos_BTC, sin_BTC) and q_BHTC.ndim == k_BHTC.ndim == 4 and cos_BTC.ndim == 3):
        return False
    batch, _, tokens, size = q_BHTC.shape
    shapes = [(batch, tokens, size), (1, tokens, size)]
    return (
        (k_BHTC.shape[0], *k_BHTC.shape[2:]) == shapes[0]
        and cos_BTC.shape == sin_BTC.shape
        and tuple(cos_BTC.shape) in shapes
        and size % 2 == 0
        and not _learns(cos_BTC, sin_BTC)
    )


def rotary(q_BHTC: Tensor, k_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """q cos + rotate_half(q) sin and the same of k, rounded after each step, as are their gradients."""
    if _learns(q_BHTC, k_BHTC):
        return _Rotary.apply(q_BHTC, k_BHTC, cos_BTC, sin_BTC)  # type: ignore[return-value]
    return kernels().rotate(q_BHTC, k_BHTC, cos_BTC, sin_BTC)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTC, k_BHTC, cos_BTC, sin_BTC):  # type: ignore[override]
        ctx.save_for_backward(cos_BTC, sin_BTC)
        return kernels().rotate(q_BHTC, k_BHTC, cos_BTC, sin_BTC)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHTC, dk_BHTC):  # type: ignore[override]
        return *kernels().rotate(dq_BHTC, dk_BHTC, *ctx.saved_tensors, backward=True), None, None


Value = TypeVar("Value")


def record(work: Callable[[], Value], pool: Any) -> tuple[torch.cuda.CUDAGraph, Value]:
    """A graph of the kernels that `work` launches, which do not run yet, and what it returned.

    Tensors that `work` makes lie in the memory `pool` (of `torch.cuda.graph_pool_handle`), and hold the values of the
    last replay. The same work must have run once before, at the same shapes: that sets up what a first run sets up.

    Raises:
        RuntimeError: it cannot be recorded, or there is too little memory; the device is usable after it.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: a data loader that pins memory in a thread of its own must not spoil the recording.
        with _nothing_collected(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            value = work()
    except RuntimeError:
        torch.cuda.synchronize()
        end_recording_of_draws()
        raise
    return graph, value


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A graph that anyone left to the collector and that goes during a recording breaks it, and the allocator with it.

    torch only warns ("operation not permitted when stream is capturing"), and the process aborts when it ends.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def end_recording_of_draws() -> None:
    """A recording that failed leaves the random numbers' state as if it still ran, and every draw would be an error."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
