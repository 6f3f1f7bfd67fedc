"""Attention of ours in the place of the stock one, and rotary positions of each row in the place of those of a batch.

A pass over one token a row (`attend`): its keys and values stay where they are, and equal passes give equal bits.
transformers before 5.24 copies every key and value once for each query head that shares it whenever there is a mask, at
every step: two fifths of a step's time on a GPU. Here query heads that share a key-value head are rows of one query.
cuDNN's kernel for a single query row, torch's first choice on recent GPUs, adds up in another order each time, so that
equal runs write different texts; with several it repeats itself, and where no heads are shared it is left out.

Sequences packed into one row, one after the other (`attend_packed`): each token sees its own sequence alone. No token
is padding, and a row of any sequences with so many tokens has one shape. On a GPU in half precision, torch's flash
attention takes where sequences start; elsewhere each sequence is attended by itself.

Rotary positions whose frequencies go by the length of a text (`by_rows`: longrope, dynamic). Stock code takes the
largest position of the whole batch, so that what a row gives depends on the rows beside it, and `dynamic` also keeps in
mind the longest batch before. Here each text has what it has alone, in a fresh model.

Legend: B rows, H key-value heads, G query heads that share one, K columns of the cache, d, v sizes of a head's keys
and values. Of a packed row: T tokens, S sequences, H query heads, K key-value heads. Of positions: T tokens, F
frequencies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from recover.kernels import fused
from recover.models.arch import ARCHS
from recover.models.switched import named_as

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
        out_BHGv = fused.kernels().attend(query_BHGd, key, value, attention_mask, _last_B, scale)
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


PACKED_NAME = "recover_packed"
WIDEST_PACKED = 256  # of a head, that flash attention takes
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
    """What to have attend by PACKED_NAME; empty where attention does more than `attend_packed` knows.

    So with a softcap, dropout or sinks.
    """
    configs = configs_of(model)
    row = ARCHS.get(configs[0].model_type) if configs else None
    if row is not None and not row.packs:
        return []
    capped = any(getattr(config, "attn_logit_softcapping", None) is not None for config in configs)
    drops = any(getattr(config, "attention_dropout", None) for config in configs)
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    return [] if capped or drops or sinks else configs


def attend_packed(
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
    if query.is_cuda and query.dtype in HALF and query.shape[-1] == value.shape[-1] <= WIDEST_PACKED:
        q_THd, k_TKd, v_TKd = (each[0].transpose(0, 1) for each in (query, key, value))
        return _Flash.apply(q_THd, k_TKd, v_TKd, cu_seq_lens_q, max_length_q, scale, window)[None], None  # type: ignore[index]
    sizes = [size for size in cu_seq_lens_q.diff().tolist() if size]
    # Split, not sliced: the gradient of each slice would be as large as the row.
    each = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    return torch.cat([_alone(q, k, v, scale, window) for q, k, v in each], dim=2).transpose(1, 2), None


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


AttentionInterface.register(PACKED_NAME, attend_packed)
AttentionMaskInterface.register(PACKED_NAME, _no_mask)


LONGROPE, DYNAMIC = "longrope", "dynamic"


def by_rows(model: nn.Module) -> None:
    """Let rotary embeddings that go by the length go by that of each row. Others, and a second call, change nothing."""
    for module in _going_by_length(model):
        if not isinstance(module, _ByRows):
            module.__class__ = _class_by_rows(type(module))


def goes_by_length(model: nn.Module) -> bool:
    """Whether a token's states depend on how long the text before and behind it is, besides on what it says."""
    return bool(_going_by_length(model))


@contextmanager
def learning_from_rows(model: nn.Module) -> Iterator[None]:
    """Inside, backward is right for rows that are padded and come with a mask, of a model that needs one.

    cuDNN's attention is torch's first choice under a mask on recent GPUs. Its backward gave NaN for rows of 95 to 222
    tokens padded to 576, with a finite loss (cuDNN 9.19, torch 2.11, H200); torch's other kernels gave finite gradients
    for the same rows. Checkpointed blocks run forward again in backward, so this goes around both.
    """
    with sdpa_kernel(REPEATABLE) if goes_by_length(model) else nullcontext():
        yield


def read_anew_at(model: PreTrainedModel) -> int | None:
    """The length of a text at which stock generation reads it anew, as keys of shorter ones do not fit; else None.

    So Phi-3 does with longrope: up to this many tokens are read with the short factors, one more with the long ones.
    """
    config = model.config.get_text_config()
    switch = getattr(config, "original_max_position_embeddings", None)
    own = "prepare_inputs_for_generation" in {name for kind in _kinds(model) for name in vars(kind)}
    return (
        switch if own and switch and any(_types(module) == {LONGROPE} for module in _going_by_length(model)) else None
    )


def text_lengths(position_BT: Tensor) -> Tensor:
    """(B, T): of each token the length of the text that it is of, which ends where positions no longer rise by one."""
    count = position_BT.shape[1]
    last_BT = torch.ones_like(position_BT, dtype=torch.bool)
    last_BT[:, :-1] = position_BT.diff(dim=1) != 1
    at_T = torch.arange(count, device=position_BT.device)
    end_BT = torch.where(last_BT, at_T, count).flip(1).cummin(1).values.flip(1)
    return position_BT.gather(1, end_BT) + 1


def row_positions(mask_BT: Tensor) -> Tensor:
    """(B, T): places in the row's own text, whose tokens the mask marks; 0 for padding on either side."""
    return (mask_BT.long().cumsum(-1) - 1).clamp_min(0) * mask_BT.long()


def _kinds(model: PreTrainedModel) -> list[type]:
    """Its classes, down to those that all models share."""
    mro = type(model).__mro__
    return [kind for kind in mro if kind.__module__.startswith("transformers.models.")]


def _going_by_length(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _types(module) & {LONGROPE, DYNAMIC}]


def _types(module: Any) -> set[str]:
    """The types of a rotary embedding, by kinds of layer where they differ; none for any other module."""
    if "rope_type" not in vars(module):
        return set()
    found = module.rope_type
    return {_kind(each) for each in (found.values() if isinstance(found, dict) else [found])}


def _kind(rope_type: str) -> str:
    return DYNAMIC if DYNAMIC in rope_type else rope_type  # as transformers tells it


class _ByRows(nn.Module):
    """Before a stock rotary embedding: cosine and sine (B, T, 2 F) of each token by the length of its own text."""

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        this: Any = self
        rope_type = this.rope_type if layer_type is None else this.rope_type[layer_type]
        if _kind(rope_type) not in (LONGROPE, DYNAMIC):
            return super().forward(x, position_ids, **({} if layer_type is None else {"layer_type": layer_type}))
        prefix = "" if layer_type is None else f"{layer_type}_"
        length_BT1 = text_lengths(position_ids)[..., None]
        short_F = getattr(this, f"{prefix}original_inv_freq").to(x.device, torch.float)
        if rope_type == LONGROPE:
            longer_BTF, switch = _long(this, prefix, layer_type, x.device)
        else:
            longer_BTF, switch = _dynamic(this, layer_type, length_BT1)
        frequency_BTF = torch.where(length_BT1 > switch, longer_BTF, short_F)
        angle_BTF = position_ids[..., None].float() * frequency_BTF
        both_BT2F = torch.cat((angle_BTF, angle_BTF), dim=-1)
        scaling = getattr(this, f"{prefix}attention_scaling")
        return (both_BT2F.cos() * scaling).to(x.dtype), (both_BT2F.sin() * scaling).to(x.dtype)


@functools.cache
def _class_by_rows(stock: type[nn.Module]) -> type[nn.Module]:
    return named_as(type(stock.__name__, (_ByRows, stock), {}), stock)


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    found = module.config.rope_parameters
    return found if layer_type is None else found[layer_type]


def _long(module: Any, prefix: str, layer_type: str | None, device: torch.device) -> tuple[Tensor, int]:
    """The frequencies of texts beyond the length that it was first trained on, and that length."""
    switch = _parameters(module, layer_type)["original_max_position_embeddings"]
    kept = getattr(module, f"{prefix}kept_long", None)
    if kept is None or kept.device != device:
        make = ROPE_INIT_FUNCTIONS[LONGROPE]
        kept = make(module.config, device, seq_len=switch + 1, layer_type=layer_type)[0].float()
        setattr(module, f"{prefix}kept_long", kept)
    return kept, switch


def _dynamic(module: Any, layer_type: str | None, length_BT1: Tensor) -> tuple[Tensor, int]:
    """The frequencies of a text of each length, as `_compute_dynamic_ntk_parameters` of transformers has them."""
    said, config = _parameters(module, layer_type), module.config
    trained, factor = config.max_position_embeddings, said["factor"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(head * said.get("partial_rotary_factor", 1.0))
    longer_BT1 = length_BT1.clamp_min(trained)
    base_BT1 = said["rope_theta"] * ((factor * longer_BT1 / trained) - (factor - 1)) ** (size / (size - 2))
    share_F = torch.arange(0, size, 2, device=length_BT1.device, dtype=torch.int64).float() / size
    return 1.0 / (base_BT1**share_F), trained
