"""Fused operations: a linear layer with LoRA as one step of autograd, elementwise kernels; and kernels recorded as one.

A frozen linear layer with LoRA, y = x W^T + bias + s (x A^T) B^T, and the casts it needs (`lora_linear`). Made of
separate layers, the update is read and written again by a product of its own, a scaling and a sum, and in backward by
two more. Here both products add onto what W's gave (GEMM with beta = 1): a half and more of LoRA's traffic. A scaling
that is a power of two, such as the usual 2, goes into the factors, x (s A)^T and dy (s B), without rounding: then no
gradient has to be scaled, in a kernel of its own for each factor. Float32 adapters under a half-precision model are
cast all at once: two small kernels an adapter become three in all. A pass multiplies by each adapter's cast, and by the
cast times the update's scaling. Where the casts of a pass are made together, `lowered` finds them; else it makes them.
Both have the same bits.

RMSNorm, silu(gate) * up and rotary embedding are a third of the time of a step on a fast GPU when every operation reads
and writes memory on its own. `fits` says whether the kernels take some tensors; who calls them decides whether they may
run: in training, and while texts are written. What judges given text is the stock modules' to the bit. They have a
gradient, and run where there is a GPU with Triton.

What is recorded as a CUDA graph (`record`) is launched as one: it no longer waits for Python between its kernels.

Shapes: O out features, I in features, R rank, M input rows (all leading dimensions of x as one); D width, B batch,
H heads, T tokens, C columns of a head.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recover.base import zero

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
    """`recover.kernels.fused.Gate` of SiLU by kernels."""

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        return kernels().gated(gate, up)

    def backward(self, gate: Tensor, up: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if dx is None:
            return kernels().gated(gate, up), None, None
        dgate, dup, x = kernels().gated_backward(gate, up, dx, product=True, into=dx)
        return x, dgate, dup


def rotary_or(stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`stock`, which is transformers' `apply_rotary_pos_emb`, as one kernel where that takes what it is given.

    On a CPU the same in fewer passes over memory, to the bit.
    """

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 1 and _fits_rotary(q, k, cos, sin):
            if fits(q, k, cos, sin):
                return rotary(q, k, cos, sin)
            if q.device.type == "cpu" and q.dtype == k.dtype == cos.dtype == sin.dtype:
                return _PlainRotary.apply(q, k, cos, sin)  # type: ignore[return-value]
        return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply_rotary_pos_emb


def _fits_rotary(q_BHTC: Tensor, k_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> bool:
    """Whether they have the shapes that are known here, and cos and sin no gradient."""
    if not (q_BHTC.ndim == k_BHTC.ndim == 4 and cos_BTC.ndim == 3):
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


class _PlainRotary(torch.autograd.Function):
    """Neither the half that is turned nor what its gradient would be slice by slice is written out."""

    @staticmethod
    def forward(ctx, q_BHTC, k_BHTC, cos_BTC, sin_BTC):  # type: ignore[override]
        ctx.save_for_backward(cos_BTC, sin_BTC)
        return tuple(_turned(x, cos_BTC, sin_BTC) for x in (q_BHTC, k_BHTC))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHTC, dk_BHTC):  # type: ignore[override]
        cos_BTC, sin_BTC = ctx.saved_tensors  # once: a checkpointed block gives them once
        return *(_turned(dy, cos_BTC, sin_BTC, back=True) for dy in (dq_BHTC, dk_BHTC)), None, None


def _turned(x_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, *, back: bool = False) -> Tensor:
    """x cos + rotate_half(x) sin; `back`: the gradient of x, for x that of the result."""
    y_BHTC = x_BHTC * cos_BTC[:, None]
    (first, second), (one, two) = x_BHTC.chunk(2, -1), y_BHTC.chunk(2, -1)
    sin_first, sin_second = sin_BTC[:, None].chunk(2, -1)
    if back:
        one.add_(second * sin_second)
        two.sub_(first * sin_first)
    else:
        one.sub_(second * sin_first)
        two.add_(first * sin_second)
    return y_BHTC


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


class Lowered(NamedTuple):
    """A factor of an update in the dtype of the products, and the same times the scaling."""

    plain: Tensor
    scaled: Tensor


_together: dict[int, tuple[Tensor, float, Lowered]] = {}  # by the id of a factor, which is held


def lowered(factor: Tensor, dtype: torch.dtype, scaling: float) -> Lowered:
    """The factor and scaling * factor in this dtype, the product rounded after the cast."""
    found = _together.get(id(factor))
    if found is not None and found[1] == scaling and found[2].plain.dtype == dtype:
        return found[2]
    low = factor.detach().to(dtype)
    return Lowered(low, low if scaling == 1.0 else low * scaling)


@contextmanager
def cast_together(factors: Sequence[Tensor], scaling: float, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `lowered` finds these factors' casts, made here in one piece of memory; they must not change meanwhile.

    The memory is new each time, so what autograd saved of it stays as it was. Nests; nothing is done for factors that
    have the dtype, that are not all on one device, or that ZeRO-3 has dealt out.
    """
    before = dict(_together)
    try:
        if _fit(factors, dtype):
            _together.update(_cast(factors, scaling, dtype))
        yield
    finally:
        _together.clear()
        _together.update(before)


def _fit(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return (
        len({factor.device for factor in factors}) == 1
        and all(factor.dtype != dtype for factor in factors)
        and not any(map(zero.dealt_out, factors))
    )


@torch.no_grad()
def _cast(
    factors: Sequence[Tensor], scaling: float, dtype: torch.dtype
) -> Iterator[tuple[int, tuple[Tensor, float, Lowered]]]:
    sizes = [factor.numel() for factor in factors]
    plain = torch.empty(sum(sizes), dtype=dtype, device=factors[0].device)
    parts = [part.view_as(factor) for part, factor in zip(plain.split(sizes), factors, strict=True)]
    torch._foreach_copy_(parts, [factor.detach() for factor in factors])  # pyright: ignore[reportPrivateImportUsage]
    scaled = (plain if scaling == 1.0 else plain * scaling).split(sizes)
    for factor, low, times in zip(factors, parts, scaled, strict=True):
        yield id(factor), (factor, scaling, Lowered(low, times.view_as(factor)))


class _LoraLinear(torch.autograd.Function):
    """Saves x, x A^T and the factors as they were multiplied; W gets no gradient."""

    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, a_RI, b_OR, scaling):  # type: ignore[override]
        return _forward(ctx, x, (x,), weight_OI, bias_O, a_RI, b_OR, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        dx, dh_MR = _input_gradient(ctx, dy, saved, wanted=ctx.needs_input_grad[0])
        dx = None if dx is None else dx.view(x.shape)
        return dx, None, None, *_factor_gradients(ctx, dy, x, dh_MR, saved, wanted=(3, 4)), None


class Gate(Protocol):
    """How x is made of gate and up, and the gradients of both."""

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """x."""
        ...

    def backward(self, gate: Tensor, up: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x once more, gradient of gate, gradient of up); no gradients without dx, whose memory may be used."""
        ...


@dataclass(frozen=True)
class PlainGate:
    """x = activation(gate) * up, by autograd."""

    activation: Callable[[Tensor], Tensor]

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up

    def backward(self, gate: Tensor, up: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if dx is None:
            return self.product(gate, up), None, None
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            x = self.product(gate, up)
        dgate, dup = torch.autograd.grad(x, (gate, up), dx)
        return x.detach(), dgate, dup


class _GatedLoraLinear(torch.autograd.Function):
    """The same for an x made of gate and up: what it is made of is saved, and it is made again in backward."""

    @staticmethod
    def forward(ctx, gate, up, way, weight_OI, bias_O, a_RI, b_OR, scaling):  # type: ignore[override]
        ctx.way = way
        return _forward(ctx, way.product(gate, up), (gate, up), weight_OI, bias_O, a_RI, b_OR, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        gate, up, *saved = ctx.saved_tensors
        dx, dh_MR = _input_gradient(ctx, dy, saved, wanted=any(ctx.needs_input_grad[:2]))
        x, dgate, dup = ctx.way.backward(gate, up, None if dx is None else dx.view(gate.shape))
        return dgate, dup, None, None, None, *_factor_gradients(ctx, dy, x, dh_MR, saved, wanted=(5, 6)), None


def _without_autocast(x: Tensor) -> Any:
    """Inside, none; where there is none already, nothing is done."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _forward(
    ctx: Any,
    x: Tensor,
    made_of: tuple[Tensor, ...],
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
) -> Tensor:
    # By hand what autocast does, which would not touch a product in place.
    with _without_autocast(x):
        inside, behind = (scaling, 1.0) if _exact(scaling) else (1.0, scaling)
        low_a, low_b = lowered(a_RI, x.dtype, inside), lowered(b_OR, x.dtype, inside)
        y = F.linear(x, weight_OI, None if bias_O is None else bias_O.to(x.dtype))
        h_MR = x.reshape(-1, x.shape[-1]) @ low_a.scaled.T
        y.view(-1, y.shape[-1]).addmm_(h_MR, low_b.plain.T, alpha=behind)
    ctx.save_for_backward(*made_of, h_MR, weight_OI, low_a.plain, low_b.scaled)
    ctx.scaling, ctx.dtypes = behind, (a_RI.dtype, b_OR.dtype)
    return y


def _exact(scaling: float) -> bool:
    """Whether a product with it is exact, but for the smallest numbers: a power of two."""
    return math.frexp(scaling)[0] == 0.5


def _input_gradient(ctx: Any, dy: Tensor, saved: list[Tensor], *, wanted: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of x (M, I), if wanted, and of x A^T (M, R), before a scaling that is not in the factors."""
    _, weight_OI, a_RI, b_OR = saved
    with _without_autocast(dy):
        dy_MO = dy.reshape(-1, dy.shape[-1])
        dh_MR = dy_MO @ b_OR
        return (dy_MO @ weight_OI).addmm_(dh_MR, a_RI, alpha=ctx.scaling) if wanted else None, dh_MR


def _factor_gradients(
    ctx: Any, dy: Tensor, x: Tensor, dh_MR: Tensor, saved: list[Tensor], wanted: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Of A and B; `wanted`: which inputs they are, and none of those that need none."""
    h_MR, da_RI, db_OR = saved[0], None, None
    with _without_autocast(x):
        if ctx.needs_input_grad[wanted[0]]:
            da_RI = _scaled(ctx, _wide_product(dh_MR.T, x.reshape(-1, x.shape[-1]))).to(ctx.dtypes[0])
        if ctx.needs_input_grad[wanted[1]]:
            db_OR = _scaled(ctx, _wide_product(dy.reshape(-1, dy.shape[-1]).T, h_MR)).to(ctx.dtypes[1])
    return da_RI, db_OR


def _scaled(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient if ctx.scaling == 1.0 else gradient.mul_(ctx.scaling)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 out of the accumulator (fp64 stays fp64): a gradient that float32 adapters keep unrounded."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """Equal to `F.linear(x, weight, bias) + scaling * (x a^T) b^T`, as are the gradients of x, a and b.

    With b = 0 equal to `F.linear(x, weight, bias)` bit for bit. Computed in x's dtype, which `weight` must have, inside
    autocast too; the others are cast to it, and the gradients of a and b come in theirs. `weight` and `bias` get none.
    Beside its inputs only x a^T is kept for backward, and the casts of a and b.
    """
    if weight_OI.dtype != x.dtype:
        raise AssertionError(f"a weight of {weight_OI.dtype} on an input of {x.dtype}")
    return _LoraLinear.apply(x, weight_OI, bias_O, a_RI, b_OR, scaling)  # type: ignore[return-value]


def gated_lora_linear(
    gate: Tensor,
    up: Tensor,
    way: Gate,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
) -> Tensor:
    """`lora_linear` of `way.product(gate, up)`, bit for bit, and its gradients; kept are gate and up alone.

    Autograd by itself keeps activation(gate) and the product too: twice as much. Backward computes both again.
    """
    if not (weight_OI.dtype == gate.dtype == up.dtype):
        raise AssertionError((weight_OI.dtype, gate.dtype, up.dtype))
    return _GatedLoraLinear.apply(gate, up, way, weight_OI, bias_O, a_RI, b_OR, scaling)  # type: ignore[return-value]
