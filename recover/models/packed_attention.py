"""Causal attention over sequences packed into one row, one after the other: each token sees its own sequence alone.

No token is padding, and a row of any sequences with so many tokens has one shape. On a GPU in half precision, torch's
flash attention takes where sequences start; elsewhere each sequence is attended by itself.

Legend: T tokens of the row, S sequences, H query heads, K key-value heads, d size of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recover.models.arch import ARCHS
from recover.models.step_attention import configs_of

NAME = "recover_packed"
WIDEST = 256  # of a head, that flash attention takes
HALF = (torch.bfloat16, torch.float16)
FILLING: Any = torch.utils.deterministic  # what is new in memory, with NaN, unless told not to


Keywords = dict[str, Tensor | int | bool | None]  # of a call of a stock model


class Packing(NamedTuple):
    """How sequences lie in a row (1, T).

    `position_ids` (1, T) begin anew in each, of padding all are 0; `starts_S` (S + 1,) int32 are where they start, and
    T. A sequence may have no token. `longest`: at most so many tokens has one.
    """

    position_ids: Tensor
    starts_S: Tensor
    longest: int

    def keywords(self) -> Keywords:
        """What a stock model is called with beside the tokens, for `attend` to find."""
        starts = {"cu_seq_lens_q": self.starts_S, "max_length_q": self.longest}
        return {"position_ids": self.position_ids, "attention_mask": None, "use_cache": False, **starts}


def packing_configs(model: nn.Module) -> list[PretrainedConfig]:
    """What to have attend by NAME; empty where attention does more than `attend` knows (a softcap, dropout, sinks)."""
    configs = configs_of(model)
    row = ARCHS.get(configs[0].model_type) if configs else None
    if row is not None and not row.packs:
        return []
    capped = any(getattr(config, "attn_logit_softcapping", None) is not None for config in configs)
    drops = any(getattr(config, "attention_dropout", None) for config in configs)
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    return [] if capped or drops or sinks else configs


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, T, H, d) of query (1, H, T, d), key and value (1, K, T, d), for a model called with `Packing.keywords`."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query.is_cuda and query.dtype in HALF and query.shape[-1] == value.shape[-1] <= WIDEST:
        q_THd, k_TKd, v_TKd = (each[0].transpose(0, 1) for each in (query, key, value))
        return _Flash.apply(q_THd, k_TKd, v_TKd, cu_seq_lens_q, max_length_q, scale, window)[None], None  # type: ignore[index]
    starts = cu_seq_lens_q.tolist()
    parts = [
        _alone(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scale, window)
        for start, end in pairwise(starts)
        if end > start
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _alone(q_1HTd: Tensor, k_1KTd: Tensor, v_1KTd: Tensor, scale: float, window: int | None) -> Tensor:
    """One sequence."""
    length, mask_TT = q_1HTd.shape[2], None
    if window is not None and window < length:
        at_T = torch.arange(length, device=q_1HTd.device)
        behind_TT = at_T[:, None] - at_T
        mask_TT = (behind_TT >= 0) & (behind_TT < window)
    return nn.functional.scaled_dot_product_attention(
        q_1HTd, k_1KTd, v_1KTd, attn_mask=mask_TT, is_causal=mask_TT is None, scale=scale, enable_gqa=True
    )


class _Flash(torch.autograd.Function):
    """torch's own kernels; its public `varlen_attn` takes other arguments in each version."""

    @staticmethod
    def forward(ctx, q_THd, k_TKd, v_TKd, starts_S, longest, scale, window):  # type: ignore[override]
        behind = None if window is None else window - 1
        out_THd, *kept, _ = torch.ops.aten._flash_attention_forward(
            q_THd, k_TKd, v_TKd, starts_S, starts_S, longest, longest, 0.0, True, False,
            scale=scale, window_size_left=behind, window_size_right=None if behind is None else 0,
        )  # fmt: skip
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out_THd, starts_S, *kept)
        ctx.longest, ctx.scale, ctx.behind = longest, scale, behind
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx, d_THd):  # type: ignore[override]
        q_THd, k_TKd, v_TKd, out_THd, starts_S, lse, state, unused = ctx.saved_tensors
        with _Repeatable():
            found = torch.ops.aten._flash_attention_backward(
                d_THd, q_THd, k_TKd, v_TKd, out_THd, lse, starts_S, starts_S, ctx.longest, ctx.longest, 0.0, True,
                state, unused, scale=ctx.scale, window_size_left=ctx.behind,
                window_size_right=None if ctx.behind is None else 0,
            )  # fmt: skip
        return *found, None, None, None, None


class _Repeatable:
    """Inside, flash attention adds up in one order: equal trainings end in equal bits."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        self.warns = torch.is_deterministic_algorithms_warn_only_enabled()
        self.fills = FILLING.fill_uninitialized_memory
        FILLING.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: Any) -> None:
        torch.use_deterministic_algorithms(self.before, warn_only=self.warns)
        FILLING.fill_uninitialized_memory = self.fills


def _no_mask(*_: Any, **__: Any) -> None:
    """`attend` needs none; transformers would make one wherever positions begin anew."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
