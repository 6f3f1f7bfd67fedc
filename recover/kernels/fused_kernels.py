# pyright: reportMissingImports=false, reportIndexIssue=false
"""RMSNorm, the gate of an MLP and rotary embedding as Triton kernels: what is between two products, read once.

They round where the stock modules round, so that in bfloat16 too values are the stock ones but for the order of a sum
(norms) and the last bits of an exponential (gates); rotary is equal to the bit, forward and backward. Gradients of
norms and gates are formed in fp32 and rounded once.

Import this module on a GPU only; `recover.kernels.fused` is what others call.

Shapes: M rows, D width, B batch, H heads, T tokens, C columns of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # that one program holds at once, where rows are shorter; measured on an H200


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float, *, rstd: bool) -> tuple[Tensor, Tensor | None]:
    """weight * x / rms(x) over the last dimension, and 1 / rms of each row (M,) in fp32 if `rstd`."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    rows, block, held, warps = _tiles(x.numel() // width, width)
    rstd_M = torch.empty(rows, dtype=torch.float32, device=x.device) if rstd else None
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(rows, held),)](
            x,
            weight_D,
            y,
            y if rstd_M is None else rstd_M,
            rows,
            width,
            epsilon,
            SAVED=rstd,
            ROWS=held,
            BLOCK=block,
            num_warps=warps,
        )
    return y, rstd_M


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd_M: Tensor) -> Tensor:
    """The gradient of x, of a norm whose weight is frozen."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, width = torch.empty_like(x), x.shape[-1]
    rows, block, held, warps = _tiles(len(rstd_M), width)
    with torch.cuda.device_of(x):
        _norm_backward_kernel[(triton.cdiv(rows, held),)](
            dy, x, weight_D, rstd_M, dx, rows, width, ROWS=held, BLOCK=block, num_warps=warps
        )
    return dx


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both steps rounded."""
    gate, up = gate.contiguous(), up.contiguous()
    x, block = torch.empty_like(gate), 1024
    with torch.cuda.device_of(gate):
        _gated_kernel[(triton.cdiv(gate.numel(), block),)](gate, up, x, gate.numel(), BLOCK=block, num_warps=4)
    return x


def gated_backward(
    gate: Tensor, up: Tensor, dx: Tensor, *, product: bool, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up, and `gated(gate, up)` once more if `product`. `into` holds that of up; it may be dx."""
    gate, up, dx = gate.contiguous(), up.contiguous(), dx.contiguous()
    if not (into is None or (into.is_contiguous() and into.shape == up.shape)):
        raise AssertionError("no room for the gradient of up")
    dgate, dup, block = torch.empty_like(gate), torch.empty_like(up) if into is None else into, 1024
    x = torch.empty_like(gate) if product else None
    with torch.cuda.device_of(gate):
        _gated_backward_kernel[(triton.cdiv(gate.numel(), block),)](
            gate,
            up,
            dx,
            dgate,
            dup,
            dgate if x is None else x,
            gate.numel(),
            PRODUCT=product,
            BLOCK=block,
            num_warps=4,
        )
    return dgate, dup, x


def rotate(
    q_BHTC: Tensor, k_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Query and key turned by their positions; `backward`: what the gradients of that are, given those behind it.

    Out of place, in memory the order B, T, H, C, whatever that of the inputs. `cos` and `sin` may be (1, T, C).
    """
    q_BHTC, k_BHTC, cos_BTC, sin_BTC = (
        each if each.stride(-1) == 1 else each.contiguous() for each in (q_BHTC, k_BHTC, cos_BTC, sin_BTC)
    )
    batch, heads, tokens, size = q_BHTC.shape
    out = [each.new_empty(batch, tokens, each.shape[1], size) for each in (q_BHTC, k_BHTC)]
    half = size // 2
    with torch.cuda.device_of(q_BHTC):
        _rotary_kernel[(batch * tokens,)](
            q_BHTC,
            k_BHTC,
            cos_BTC,
            sin_BTC,
            *out,
            tokens,
            half,
            *q_BHTC.stride()[:3],
            *k_BHTC.stride()[:3],
            *((each.stride(0) if len(each) == batch else 0) for each in (cos_BTC, sin_BTC)),
            cos_BTC.stride(1),
            sin_BTC.stride(1),
            BACKWARD=backward,
            Q_HEADS=heads,
            K_HEADS=k_BHTC.shape[1],
            Q_TILE=min(triton.next_power_of_2(heads), 32),
            K_TILE=min(triton.next_power_of_2(k_BHTC.shape[1]), 32),
            HALF=triton.next_power_of_2(half),
            num_warps=4,
            enable_fp_fusion=False,  # a fused product and sum would be rounded once where the stock ones are twice
        )
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


def _tiles(rows: int, width: int) -> tuple[int, int, int, int]:
    """Rows, columns of a tile, its rows, and warps."""
    block = triton.next_power_of_2(width)
    held = max(1, ELEMENTS // block)
    return rows, block, held, min(max(block * held // 512, 1), 16)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return row, column, inside, row[:, None] * width + column[None, :]


@triton.jit
def _norm_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, rows, width, epsilon, SAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, inside, at = _tile(rows, width, ROWS, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)
    normal = (x * rstd[:, None]).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, (w[None, :] * normal).to(y_ptr.dtype.element_ty), mask=inside)
    if SAVED:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _norm_backward_kernel(dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside, at = _tile(rows, width, ROWS, BLOCK)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
    normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
    w = tl.load(w_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    slope = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
    along = tl.sum(slope * normal, 1) / width
    dx = (slope - normal * along[:, None]) * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _silu(gate):
    """silu(gate), and its denominator."""
    below = 1.0 + tl.exp(-gate)
    return gate / below, below


@triton.jit
def _gated_kernel(gate_ptr, up_ptr, x_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    active, _ = _silu(gate)
    x = active.to(x_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward_kernel(
    gate_ptr, up_ptr, dx_ptr, dgate_ptr, dup_ptr, x_ptr, count, PRODUCT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dx_ptr + at, mask=inside, other=0.0).to(tl.float32)
    active, below = _silu(gate)
    sigmoid = 1.0 / below
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + at, (dx * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dx * active).to(dup_ptr.dtype.element_ty), mask=inside)
    if PRODUCT:
        x = active.to(x_ptr.dtype.element_ty).to(tl.float32) * up
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b, out_ptr):
    return (a * b).to(out_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _turn(
    x_ptr, y_ptr, head_stride, half, cos, sin, cos2, sin2,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token; cos, sin belong to the first half of a head, cos2, sin2 to the second."""
    column = tl.arange(0, HALF)
    for first in range(0, HEADS, TILE):
        head = (first + tl.arange(0, TILE)).to(tl.int64)
        inside = (head < HEADS)[:, None] & (column < half)[None, :]
        source = x_ptr + head[:, None] * head_stride + column[None, :]
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            y = _product(x, cos, y_ptr) + _product(x2, sin2, y_ptr)
            y2 = _product(x2, cos2, y_ptr) - _product(x, sin, y_ptr)
        else:
            y = _product(x, cos, y_ptr) - _product(x2, sin, y_ptr)
            y2 = _product(x2, cos2, y_ptr) + _product(x, sin2, y_ptr)
        target = y_ptr + head[:, None] * (2 * half) + column[None, :]
        tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(target + half, y2.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, half,
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, sin_batch, cos_token, sin_token,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    column = tl.arange(0, HALF)
    inside = column < half
    cos_at = cos_ptr + batch * cos_batch + token * cos_token + column
    sin_at = sin_ptr + batch * sin_batch + token * sin_token + column
    cos = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_at + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    q_row, q_out = q_ptr + batch * q_batch + token * q_token, q_out_ptr + row * Q_HEADS * (2 * half)
    k_row, k_out = k_ptr + batch * k_batch + token * k_token, k_out_ptr + row * K_HEADS * (2 * half)
    _turn(q_row, q_out, q_head, half, cos, sin, cos2, sin2, BACKWARD, Q_HEADS, Q_TILE, HALF)
    _turn(k_row, k_out, k_head, half, cos, sin, cos2, sin2, BACKWARD, K_HEADS, K_TILE, HALF)
