"""Attention of a pass over one token a row: its keys and values stay where they are, and equal passes give equal bits.

transformers before 5.24 copies every key and value once for each query head that shares it whenever there is a mask,
at every step: two fifths of a step's time on a GPU. Here query heads that share a key-value head are rows of one query.

cuDNN's kernel for a single query row, torch's first choice on recent GPUs, adds up in another order each time, so that
equal runs write different texts; with several it repeats itself, and where no heads are shared it is left out.

Legend: B rows, H key-value heads, G query heads that share one, K columns of the cache, d, v sizes of a head's keys
and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recover.kernels import fused

NAME, STOCK = "recover_step", "sdpa"
WIDEST = 256  # of a head, for the kernel
REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Where modules of this model look up how they attend, once each: of those that use SDPA and let it be replaced."""
    modules = [module for module in model.modules() if hasattr(module, "config")]
    if not all(getattr(module, "_supports_attention_backend", True) for module in modules):
        return []
    found: dict[int, Any] = {id(module.config): module.config for module in modules}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) == STOCK]


_last_B: Tensor | None = None  # of the pass that runs now, see `attending_by_step`


@contextmanager
def attending(configs: Sequence[PretrainedConfig], name: str) -> Iterator[None]:
    """Inside, modules of these configs attend by what is registered with transformers as `name`."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, stock in zip(configs, before, strict=True):
            config._attn_implementation = stock


@contextmanager
def attending_by_step(configs: Sequence[PretrainedConfig], last_B: Tensor | None = None) -> Iterator[None]:
    """Inside, modules of these configs attend by `attend`.

    `last_B`: the last column of the cache that a row may see; what lies behind is hidden by the mask too, but need not
    be read. A GPU then has a kernel of our own.
    """
    global _last_B
    before, _last_B = _last_B, last_B
    try:
        with attending(configs, NAME):
            yield
    finally:
        _last_B = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(B, 1, HG, v) of query (B, HG, 1, d), key (B, H, K, d), value (B, H, K, v); mask (B, 1, 1, K), None: all is seen.

    What is more than one token a row, or asks for more (`softcap`, `position_bias`, sinks as `s_aux`), is transformers'
    own.
    """
    more = any(others.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if query.shape[2] != 1 or (attention_mask is not None and attention_mask.shape[1] != 1) or more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    rows, heads = key.shape[:2]
    query_BHGd = query.reshape(rows, heads, -1, query.shape[-1])
    if _last_B is not None and _fits(query_BHGd, key, value, attention_mask, _last_B):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_BHGv = fused.step_kernels().attend(query_BHGd, key, value, attention_mask, _last_B, scale)
        return out_BHGv.view(rows, 1, -1, value.shape[-1]), None
    alone = query.is_cuda and query_BHGd.shape[2] == 1
    with sdpa_kernel(REPEATABLE) if alone else nullcontext():
        out_BHGv = nn.functional.scaled_dot_product_attention(
            query_BHGd, key, value, attn_mask=attention_mask, scale=scaling
        )
    return out_BHGv.reshape(rows, 1, -1, value.shape[-1]), None


def _fits(query_BHGd: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, last_B: Tensor) -> bool:
    """Whether the kernel takes these."""
    rows, size = len(query_BHGd), max(key.shape[-1], value.shape[-1])
    plain = all(each.stride(-1) == 1 for each in (query_BHGd, key, value))
    if not (fused.fits(query_BHGd, key, value) and plain and rows == len(last_B) and size <= WIDEST):
        return False
    return mask is None or (
        mask.is_floating_point() and mask.shape[1:3] == (1, 1) and len(mask) in (1, rows) and mask.stride(-1) == 1
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # else a mask of two dimensions would be dropped without a word
