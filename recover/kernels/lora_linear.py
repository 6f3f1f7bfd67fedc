"""A frozen linear layer with LoRA as one step of autograd, y = x W^T + bias + s (x A^T) B^T, and the casts it needs.

Made of separate layers, the update is read and written again by a product of its own, a scaling and a sum, and in
backward by two more. Here both products add onto what W's gave (GEMM with beta = 1): a half and more of LoRA's traffic.

A scaling that is a power of two, such as the usual 2, goes into the factors, x (s A)^T and dy (s B), without rounding:
then no gradient has to be scaled, in a kernel of its own for each factor.

Float32 adapters under a half-precision model are cast all at once: two small kernels an adapter become three in all. A
pass multiplies by each adapter's cast, and by the cast times the update's scaling. Where the casts of a pass are made
together, `lowered` finds them; else it makes them. Both have the same bits.

Shapes: O out features, I in features, R rank, M input rows (all leading dimensions of x as one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recover.base import zero


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
