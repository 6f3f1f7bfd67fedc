# pyright: reportMissingImports=false, reportIndexIssue=false
"""`loss_terms` as one Triton kernel for fp32 logits: every row is read twice and its gradient written once.

Legend: C tokens of one chunk, V vocabulary. One program takes one row. The first visit finds, for every lane of a tile
on its own, the running maximum and the sums that depend on it (online softmax: Milakov and Gimelshein 2018), and so the
normalisers and the means of u under p, q and r. The second visit, from the row's end, where the cache still holds what
the first one read last, forms values and gradient. JSD needs one more, as its gradient needs a mean of log q/m.

Names are those of the table in `loss_terms`. Import this module on a GPU only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from recover.distill.loss_terms import FUSED, Lost

if TYPE_CHECKING:
    from recover.config.loss import Loss

BLOCK = 1024  # elements of a row that a program holds at once; measured on an H200, as are the two below
WARPS = 8
MEASURES = {"kl": 1, "disagreement": 2, "entropy": 3}  # of `loss.focus`, as the kernel knows them; 0: none
STAGES = tl.constexpr(4)  # tiles on their way from memory at a time


def fused_loss_terms(
    y_CV: Tensor, z_CV: Tensor, labels_C: Tensor | None, weights: Loss, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Lost | None]:
    """What `loss_terms` gives of the terms in FUSED, to fp32 rounding, for fp32 logits with contiguous rows on a GPU.

    For a `dtype` below fp32 also what each row's gradient lost most by rounding: of a peaked row, about half of it all.
    """
    rows, vocabulary = y_CV.shape
    values_RC = torch.empty(2 + len(FUSED), rows, dtype=torch.float32, device=y_CV.device)
    g_CV = None if dtype is None else torch.empty(rows, vocabulary, dtype=dtype, device=y_CV.device)
    rounded = g_CV is not None and g_CV.dtype is not torch.float32
    lost_C = torch.empty(rows, dtype=torch.float32, device=y_CV.device)
    column_C = torch.empty(rows, dtype=torch.int64, device=y_CV.device)
    with torch.cuda.device_of(y_CV):
        _terms_kernel[(rows,)](
            y_CV,
            z_CV,
            y_CV if labels_C is None else labels_C,
            values_RC,
            y_CV if g_CV is None else g_CV,
            lost_C,
            column_C,
            rows,
            vocabulary,
            y_CV.stride(0),
            z_CV.stride(0),
            vocabulary,
            1.0 / weights.temperature,
            weights.temperature,
            weights.kl,
            weights.variance,
            weights.variance_r,
            weights.reverse_kl,
            weights.jsd,
            weights.jsd_beta,
            weights.ce,
            GRADIENT=g_CV is not None,
            ROUNDED=rounded,
            LABELS=labels_C is not None,
            PLAIN=weights.temperature == 1.0,
            SQUARED=weights.variance_r > 0,
            JSD=weights.jsd > 0,
            FOCUS=0 if weights.focus is None else MEASURES[weights.focus.by],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return values_RC, g_CV, Lost(lost_C, column_C) if rounded else None


@triton.jit
def _tile(y_row, z_row, tile, vocabulary, inverse_t, BLOCK: tl.constexpr):
    """Columns of a tile, y / T and u; behind the row's end y is too low to count, and u is 0."""
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    y = tl.load(y_row + column, mask=inside, other=0.0)
    z = tl.load(z_row + column, mask=inside, other=0.0)
    u = (z - y) * inverse_t
    return column, inside, tl.where(inside, y * inverse_t, -1e30), tl.where(inside, z * inverse_t, -1e30), u


@triton.jit
def _online(x, top, total):
    """A lane's new maximum and sum of e^(x - maximum), what old sums shrink by, and what x counts for."""
    step = x - top
    e = tl.exp(-tl.abs(step))
    shrink = tl.where(step > 0, e, 1.0)
    weight = tl.where(step > 0, 1.0, e)
    return tl.maximum(top, x), total * shrink + weight, shrink, weight


@triton.jit
def _over_lanes(top, total):
    """The row's maximum and sum, and what each lane's sums count for in it."""
    row_top = tl.max(top, 0)
    share = tl.exp(top - row_top)
    return row_top, tl.sum(total * share, 0), share


@triton.jit
def _rise(p, q, x):
    """(q - p, q - p - p x), both without cancelling: by e^x's series where x is small, else as they stand."""
    series = 0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))
    excess = tl.where(tl.abs(x) < 0.25, p * x * x * series, (q - p) - p * x)
    return excess + p * x, excess


@triton.jit
def _log_ratio(a, b):
    """log a/b, exactly 0 if they are equal: the GPU's quotient of two equal numbers need not be 1."""
    s = (a - b) / (a + b)
    series = 2.0 * s * (1.0 + s * s * (1 / 3 + s * s * (1 / 5 + s * s * (1 / 7))))
    return tl.where(tl.abs(s) < 0.1, series, tl.log(a / b))


@triton.jit
def _log1p(x):
    """log(1 + x) to fp32 rounding, for x > -1 (Kahan's correction of what 1 + x rounds off)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _log_mixture(p, q, x, beta):
    """(log m/p, log q/m) for m = beta p + (1 - beta) q; e^-|x| is all that is exponentiated."""
    small = -tl.abs(x)
    rise, _ = _rise(1.0, tl.exp(small), small)
    part = tl.where(x < 0, 1.0 - beta, beta)
    log = _log1p(part * rise)
    return tl.where(x < 0, log, x + log), tl.where(x < 0, x - log, -log)


@triton.jit
def _terms_kernel(
    y_ptr,
    z_ptr,
    labels_ptr,
    values_ptr,
    g_ptr,
    lost_ptr,
    column_ptr,
    rows,
    vocabulary,
    y_stride,
    z_stride,
    g_stride,
    inverse_t,
    t,
    w_kl,
    w_variance,
    w_variance_r,
    w_reverse,
    w_jsd,
    beta,
    w_ce,
    GRADIENT: tl.constexpr,
    ROUNDED: tl.constexpr,
    LABELS: tl.constexpr,
    PLAIN: tl.constexpr,
    SQUARED: tl.constexpr,
    JSD: tl.constexpr,
    FOCUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y_row, z_row, g_row = y_ptr + row * y_stride, z_ptr + row * z_stride, g_ptr + row * g_stride
    tiles = tl.cdiv(vocabulary, BLOCK)

    zeros = tl.zeros([BLOCK], tl.float32)
    y_top, z_top, zt_top = zeros - 1e30, zeros - 1e30, zeros - 1e30
    p_sum, q_sum, pu_sum, qu_sum, r_sum, ru_sum, plain_sum = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for tile in tl.range(0, tiles, num_stages=STAGES):
        column, inside, y, z, u = _tile(y_row, z_row, tile, vocabulary, inverse_t, BLOCK)
        y_top, p_sum, shrink, weight = _online(y, y_top, p_sum)
        pu_sum = pu_sum * shrink + weight * u
        if SQUARED:
            r_sum = r_sum * (shrink * shrink) + weight * weight
            ru_sum = ru_sum * (shrink * shrink) + weight * weight * u
        z_top, q_sum, shrink, weight = _online(z, z_top, q_sum)
        qu_sum = qu_sum * shrink + weight * u
        if LABELS and not PLAIN:
            zt_top, plain_sum, shrink, weight = _online(tl.where(inside, z * t, -1e30), zt_top, plain_sum)

    y_top, p_total, share = _over_lanes(y_top, p_sum)
    p_mean = tl.sum(pu_sum * share, 0) / p_total
    if SQUARED:
        r_total = tl.sum(r_sum * share * share, 0)
        r_mean = tl.sum(ru_sum * share * share, 0) / r_total
    z_top, q_total, share = _over_lanes(z_top, q_sum)
    q_mean = tl.sum(qu_sum * share, 0) / q_total
    c = (z_top - y_top) + _log_ratio(q_total, p_total)
    p_scale, q_scale = 1.0 / p_total, 1.0 / q_total
    label, ce = -1, 0.0
    if LABELS:
        label = tl.load(labels_ptr + row)
        if PLAIN:
            z1_top, z1_total = z_top, q_total
        else:
            z1_top, z1_total, share = _over_lanes(zt_top, plain_sum)
        ce = z1_top + tl.log(z1_total) - tl.load(z_row + label)

    jsd, g_mean = 0.0, 0.0
    if JSD:
        jsd_sum, g_sum = zeros, zeros
        for tile in tl.range(0, tiles, num_stages=STAGES):
            column, inside, y, z, u = _tile(y_row, z_row, tile, vocabulary, inverse_t, BLOCK)
            p, q = tl.exp(y - y_top) * p_scale, tl.exp(z - z_top) * q_scale
            a, g = _log_mixture(p, q, u - c, beta)
            g_sum += q * g
            jsd_sum += (1.0 - beta) * q * g - beta * p * a
        jsd, g_mean = tl.maximum(tl.sum(jsd_sum, 0), 0.0), tl.sum(g_sum, 0)

    kl_sum, variance_sum, reverse_sum, variance_r_sum, lost = zeros, zeros, zeros, zeros, zeros
    focus_sum, p_log = zeros, tl.log(p_total)
    lost_at = tl.zeros([BLOCK], tl.int32)
    for backwards in tl.range(0, tiles, num_stages=STAGES):
        column, inside, y, z, u = _tile(y_row, z_row, tiles - 1 - backwards, vocabulary, inverse_t, BLOCK)
        x = u - c
        p, q = tl.exp(y - y_top) * p_scale, tl.exp(z - z_top) * q_scale
        rise, excess = _rise(p, q, x)
        v = u - p_mean
        kl_sum += excess
        variance_sum += p * v * v
        reverse_sum += q * x - rise
        if FOCUS == 2:
            focus_sum += 0.5 * tl.abs(rise)
        if FOCUS == 3:
            focus_sum += p * (p_log + (y_top - y))
        gradient = w_kl * rise + w_variance * p * v + w_reverse * q * (u - q_mean)
        if SQUARED:
            weight = tl.exp(y - y_top)
            r = weight * weight / r_total
            variance_r_sum += r * (u - r_mean) * (u - r_mean)
            gradient += w_variance_r * r * (u - r_mean)
        if JSD:
            _, g = _log_mixture(p, q, x, beta)
            gradient += w_jsd * (1.0 - beta) * q * (g - g_mean)
        gradient *= t
        if LABELS:
            q1 = q if PLAIN else tl.exp(tl.where(inside, z * t, -1e30) - z1_top) / z1_total
            gradient += w_ce * (q1 - tl.where(column == label, 1.0, 0.0))
        if GRADIENT:
            stored = gradient.to(g_ptr.dtype.element_ty)
            tl.store(g_row + column, stored, mask=inside)
            if ROUNDED:
                error = tl.where(inside, gradient - stored.to(tl.float32), 0.0)
                more = tl.abs(error) > tl.abs(lost)
                lost, lost_at = tl.where(more, error, lost), tl.where(more, column, lost_at)

    if ROUNDED:
        lane = tl.arange(0, BLOCK) == tl.argmax(tl.abs(lost), 0)
        tl.store(lost_ptr + row, tl.sum(tl.where(lane, lost, 0.0), 0))
        tl.store(column_ptr + row, tl.sum(tl.where(lane, lost_at, 0), 0))
    kl, reverse = tl.maximum(tl.sum(kl_sum, 0), 0.0), tl.maximum(tl.sum(reverse_sum, 0), 0.0)
    variance, variance_r = 0.5 * tl.sum(variance_sum, 0), 0.5 * tl.sum(variance_r_sum, 0)
    divergence = w_kl * kl + w_variance * variance + w_variance_r * variance_r + w_reverse * reverse + w_jsd * jsd
    tl.store(values_ptr + row, t * t * divergence + w_ce * ce)
    tl.store(values_ptr + rows + row, kl if FOCUS == 1 else tl.sum(focus_sum, 0))
    tl.store(values_ptr + 2 * rows + row, kl)
    tl.store(values_ptr + 3 * rows + row, variance)
    tl.store(values_ptr + 4 * rows + row, reverse)
    tl.store(values_ptr + 5 * rows + row, variance_r)
    tl.store(values_ptr + 6 * rows + row, jsd)
    tl.store(values_ptr + 7 * rows + row, ce)
