"""Rotary positions whose frequencies go by the length of a text (longrope, dynamic): that of each row, not of a batch.

Stock code takes the largest position of the whole batch, so that what a row gives depends on the rows beside it, and
`dynamic` also keeps in mind the longest batch before. Here each text has what it has alone, in a fresh model.

Shapes: B batch, T tokens, F frequencies.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from recover.models.switched import named_as

LONGROPE, DYNAMIC = "longrope", "dynamic"


def by_rows(model: nn.Module) -> None:
    """Let rotary embeddings that go by the length go by that of each row. Others, and a second call, change nothing."""
    for module in _going_by_length(model):
        if not isinstance(module, _ByRows):
            module.__class__ = _class_by_rows(type(module))


def goes_by_length(model: nn.Module) -> bool:
    """Whether a token's states depend on how long the text before and behind it is, besides on what it says."""
    return bool(_going_by_length(model))


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
