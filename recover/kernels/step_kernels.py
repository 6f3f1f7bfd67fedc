# pyright: reportMissingImports=false, reportIndexIssue=false
"""What a pass over one token a row does between products, as Triton kernels: attention, its cache, gates, draws.

Each gives equal bits for equal calls, and for a row whatever the other rows are: a row is summed up by one program, in
one order. Attention reads a row's own keys alone, not those of the longest row.

Import this module on a GPU only; `recover.kernels.fused` is what others call.

Legend: B rows, H key-value heads, G query heads that share one, K columns of the cache, d, v sizes of a head's keys and
values, N columns of a matrix, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
