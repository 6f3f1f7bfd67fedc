# pyright: reportMissingImports=false, reportIndexIssue=false
"""What is between two products, as Triton kernels: read once, and written once.

RMSNorm, the gate of an MLP and rotary embedding round where the stock modules round, so that in bfloat16 too values are
the stock ones but for the order of a sum (norms) and the last bits of an exponential (gates); rotary is equal to the
bit, forward and backward. Gradients of norms and gates are formed in fp32 and rounded once.

Of a pass over one token a row: attention, its cache, gates, draws. Each gives equal bits for equal calls, and for a row
whatever the other rows are: a row is summed up by one program, in one order. Attention reads a row's own keys alone,
not those of the longest row.

Import this module on a GPU only; `recover.kernels.fused` is what others call.

Shapes: M rows, D width, B batch, H heads, T tokens, C columns of a head. Of a pass over one token a row: B rows, H
key-value heads, G query heads that share one, K columns of the cache, d, v sizes of a head's keys and values, N columns
of a matrix, V vocabulary.
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


COLUMNS, WARPS = 64, 4  # of the cache that a program of attention holds at once, and its warps
NUMBERS = 4096  # logits that a program holds at once
LOWEST = -1e30  # below every score, and finite: a difference of two is no NaN


def attend(
    query_BHGd: Tensor, keys_BHKd: Tensor, values_BHKv: Tensor, added_B11K: Tensor | None, last_B: Tensor, scale: float
) -> Tensor:
    """softmax(scale q k^T + added) v over the columns 0 to `last_B` of each row, (B, H, G, v), contiguous."""
    batch, heads, groups, size = query_BHGd.shape
    out_BHGv = query_BHGd.new_empty(batch, heads, groups, values_BHKv.shape[-1])
    added = query_BHGd if added_B11K is None else added_B11K
    with torch.cuda.device_of(query_BHGd):
        _attend_kernel[(batch, heads)](
            query_BHGd,
            keys_BHKd,
            values_BHKv,
            added,
            last_B,
            out_BHGv,
            scale,
            *query_BHGd.stride()[:3],
            *keys_BHKd.stride()[:3],
            *values_BHKv.stride()[:3],
            added.stride(0) if len(added) == batch else 0,
            ADDED=added_B11K is not None,
            HEADS=heads,
            GROUPS=groups,
            SIZE=size,
            VALUE=values_BHKv.shape[-1],
            G=max(triton.next_power_of_2(groups), 16),
            D=max(triton.next_power_of_2(size), 16),
            E=max(triton.next_power_of_2(values_BHKv.shape[-1]), 16),
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            num_stages=2,
        )
    return out_BHGv


def put(key_BHd: Tensor, value_BHv: Tensor, keys_BHKd: Tensor, values_BHKv: Tensor, at_B: Tensor) -> None:
    """Write a key and a value of each row into its column `at_B` of the cache."""
    batch, heads, size = key_BHd.shape
    wide = max(triton.next_power_of_2(max(size, value_BHv.shape[-1])), 16)
    with torch.cuda.device_of(key_BHd):
        _put_kernel[(batch,)](
            key_BHd,
            value_BHv,
            keys_BHKd,
            values_BHKv,
            at_B,
            *key_BHd.stride(),
            *value_BHv.stride(),
            *keys_BHKd.stride(),
            *values_BHKv.stride(),
            HEADS=heads,
            SIZE=size,
            VALUE=value_BHv.shape[-1],
            H=triton.next_power_of_2(heads),
            D=wide,
            num_warps=4,
        )


def gated_rows(gate_MN: Tensor, up_MN: Tensor) -> Tensor:
    """silu(gate) * up, both steps rounded, of parts of wider matrices: rows need not follow one another in memory."""
    rows, width = gate_MN.shape
    out_MN, block = gate_MN.new_empty(rows, width), 1024
    with torch.cuda.device_of(gate_MN):
        _gated_rows_kernel[(rows, triton.cdiv(width, block))](
            gate_MN, up_MN, out_MN, gate_MN.stride(0), up_MN.stride(0), width, BLOCK=block, num_warps=4
        )
    return out_MN


def draw(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """As `recover.text.decode.drawn`: the same tokens, up to rounding at ties."""
    logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    batch, vocabulary = logits_BV.shape
    token_B = torch.empty(batch, dtype=torch.long, device=logits_BV.device)
    with torch.cuda.device_of(logits_BV):
        _draw_kernel[(batch,)](
            logits_BV,
            logits_BV.stride(0),
            key_B2,
            place_B,
            token_B,
            vocabulary,
            1.0 / temperature,
            top_p,
            CUT=top_p < 1,
            LOWEST=LOWEST,
            BLOCK=min(NUMBERS, max(triton.next_power_of_2(vocabulary), 16)),
            num_warps=8,
        )
    return token_B


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, added_ptr, last_ptr, out_ptr, scale,
    q_row, q_head, q_group, k_row, k_head, k_column, v_row, v_head, v_column, added_row,
    ADDED: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group, size, value, column = tl.arange(0, G), tl.arange(0, D), tl.arange(0, E), tl.arange(0, COLUMNS)
    q_at = q_ptr + row * q_row + head * q_head + group[:, None] * q_group + size[None, :]
    q = tl.load(q_at, mask=(group < GROUPS)[:, None] & (size < SIZE)[None, :], other=0.0)
    k_at = k_ptr + row * k_row + head * k_head + column[:, None] * k_column + size[None, :]
    v_at = v_ptr + row * v_row + head * v_head + column[:, None] * v_column + value[None, :]
    seen = tl.load(last_ptr + row).to(tl.int32) + 1
    highest = tl.full([G], -1e30, tl.float32)
    below = tl.zeros([G], tl.float32)
    out = tl.zeros([G, E], tl.float32)
    for first in range(0, seen, COLUMNS):
        inside = first + column < seen
        k = tl.load(k_at, mask=inside[:, None] & (size < SIZE)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if ADDED:
            more = tl.load(added_ptr + row * added_row + first + column, mask=inside, other=0.0).to(tl.float32)
            score += more[None, :]
        score = tl.where(inside[None, :], tl.maximum(score, -1e30), -1e30)
        now = tl.maximum(highest, tl.max(score, 1))
        p = tl.where(inside[None, :], tl.exp(score - now[:, None]), 0.0)
        kept = tl.exp(highest - now)
        v = tl.load(v_at, mask=inside[:, None] & (value < VALUE)[None, :], other=0.0)
        below = below * kept + tl.sum(p, 1)
        out = out * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = now
        k_at += COLUMNS * k_column
        v_at += COLUMNS * v_column
    out = (out / below[:, None]).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + ((row * HEADS + head) * GROUPS + group[:, None]) * VALUE + value[None, :]
    tl.store(out_at, out, mask=(group < GROUPS)[:, None] & (value < VALUE)[None, :])


@triton.jit
def _put_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, at_ptr,
    key_row, key_head, key_size, value_row, value_head, value_size,
    keys_row, keys_head, keys_column, keys_size, values_row, values_head, values_column, values_size,
    HEADS: tl.constexpr, SIZE: tl.constexpr, VALUE: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, size = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    at = tl.load(at_ptr + row).to(tl.int64)
    inside = (head < HEADS) & (size < SIZE)
    key = tl.load(key_ptr + row * key_row + head * key_head + size * key_size, mask=inside)
    tl.store(keys_ptr + row * keys_row + head * keys_head + at * keys_column + size * keys_size, key, mask=inside)
    inside = (head < HEADS) & (size < VALUE)
    value = tl.load(value_ptr + row * value_row + head * value_head + size * value_size, mask=inside)
    values_at = values_ptr + row * values_row + head * values_head + at * values_column + size * values_size
    tl.store(values_at, value, mask=inside)


@triton.jit
def _gated_rows_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + column, (active * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mixed(x):
    """32 bits, each of which depends on all of x."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _waits(first, second, token):
    """Numbers of the exponential distribution, one a token."""
    bits = _mixed(_mixed(token.to(tl.uint32) * 0x9E3779B1 + first) ^ second)
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.where(u < 1e-3, u * (1.0 + u * (0.5 + u * 0.33333334)), -tl.log(1.0 - u))


@triton.jit
def _race(z_ptr, vocabulary, inverse, first, second, floor, BLOCK: tl.constexpr, LOWEST: tl.constexpr):
    """The winner among logits above `floor` and its own logit; the largest of all, and the sum of e^(z - that)."""
    lane = tl.arange(0, BLOCK)
    best, found = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    highest, below = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + lane
        z = tl.load(z_ptr + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32) * inverse
        now = tl.maximum(highest, z)
        below = below * tl.exp(highest - now) + tl.exp(z - now)
        highest = now
        score = tl.where(z > floor, z - tl.log(_waits(first, second, token)), float("-inf"))
        better = score > best
        best, found = tl.where(better, score, best), tl.where(better, token, found)
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, found, vocabulary - 1), 0)
    most = tl.max(highest, 0)
    return winner, most, tl.sum(below * tl.exp(highest - most), 0)


@triton.jit
def _above(z_ptr, vocabulary, inverse, pivot, most, BLOCK: tl.constexpr):
    """The sum of e^(z - most) over the logits above `pivot`."""
    lane = tl.arange(0, BLOCK)
    held = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + lane
        z = tl.load(z_ptr + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32) * inverse
        held += tl.where(z > pivot, tl.exp(z - most), 0.0)
    return tl.sum(held, 0)


@triton.jit
def _draw_kernel(
    z_ptr, z_row, key_ptr, place_ptr, token_ptr, vocabulary, inverse, top_p,
    CUT: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    place = tl.load(place_ptr + row).to(tl.uint32)
    low, high = tl.load(key_ptr + row * 2).to(tl.uint32), tl.load(key_ptr + row * 2 + 1).to(tl.uint32)
    first = _mixed(_mixed(place * 0x9E3779B1 + low) ^ high)
    second = _mixed(first + 0x85EBCA77)
    winner, most, whole = _race(z_ptr, vocabulary, inverse, first, second, float("-inf"), BLOCK, LOWEST)
    if CUT:
        # The winner among the tokens of the nucleus is the first winner that is one of them.
        pivot = tl.load(z_ptr + winner).to(tl.float32) * inverse
        held = _above(z_ptr, vocabulary, inverse, pivot, most, BLOCK)
        while held >= top_p * whole:
            winner, _, _ = _race(z_ptr, vocabulary, inverse, first, second, pivot, BLOCK, LOWEST)
            pivot = tl.load(z_ptr + winner).to(tl.float32) * inverse
            held = _above(z_ptr, vocabulary, inverse, pivot, most, BLOCK)
    tl.store(token_ptr + row, winner.to(tl.int64))
