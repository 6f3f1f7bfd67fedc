"""Keys and values of a batch whose rows are at different places: one cache to append to, one with a slot for each row.

Both are handed to stock models together with masks made here, so that rows of different length need no padding
between their tokens, and so that no model has to guess where a row is.

Legend: B batch, H key-value heads, T tokens of this pass, K columns of the cache, d head size, G rows of a group.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from recover.kernels import fused
from recover.models import kv_cache
from recover.models.arch import arch_of
from recover.models.rope import goes_by_length

FULL, SLIDING = "full_attention", "sliding_attention"
MASKED_BY_US = {"sdpa", "eager"}  # attention that takes a mask of (B, 1, T, K)

Mask = Tensor | dict[str, Tensor]


class Appending(Cache):
    """Holds what each block has seen, all of it (sliding windows are the mask's business); T tokens at each pass."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # no entry for a closed block

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self.kv:
            keys_BHKd, values_BHKd = self.kv[layer_idx]
            key_states = torch.cat([keys_BHKd, key_states], dim=2)
            value_states = torch.cat([values_BHKd, value_states], dim=2)
        self.kv[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def rows(self, index_G: Tensor) -> Appending:
        """A cache of these rows, each as often as it is named."""
        found = Appending()
        found.kv = {layer: (keys[index_G], values[index_G]) for layer, (keys, values) in self.kv.items()}
        return found


class Slots(Cache):
    """B slots of K columns; a decoding pass writes each row's key and value at `position_B` and sees `visible` columns.

    Memory stays where it is until `keep`, so a CUDA graph may hold it.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.columns = self.visible = columns
        self.position_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.row_B = torch.arange(rows, device=device)
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys_BHKd, values_BHKd = self.kv[layer_idx]
        key_BHd, value_BHv = key_states[:, :, 0], value_states[:, :, 0]
        if fused.fits(key_BHd, value_BHv, keys_BHKd, values_BHKd):
            fused.kernels().put(key_BHd, value_BHv, keys_BHKd, values_BHKd, self.position_B)
        else:
            keys_BHKd[self.row_B, :, self.position_B] = key_BHd
            values_BHKd[self.row_B, :, self.position_B] = value_BHv
        return keys_BHKd[:, :, : self.visible], values_BHKd[:, :, : self.visible]

    def fill(self, slot_G: Tensor, read: Appending) -> None:
        """Put prompts that were read padded on the right into slots, from column 0 on.

        Behind a row's end stands its padding: hidden until written over, and finite.
        """
        for layer, (keys_GHTd, values_GHTd) in read.kv.items():
            if layer not in self.kv:
                self.kv[layer] = (self._empty(keys_GHTd), self._empty(values_GHTd))
            for slots_BHKd, read_GHTd in zip(self.kv[layer], (keys_GHTd, values_GHTd), strict=True):
                slots_BHKd[slot_G, :, : read_GHTd.shape[2]] = read_GHTd

    def keep(self, slot_G: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self.kv = {layer: (keys[slot_G], values[slot_G]) for layer, (keys, values) in self.kv.items()}
        self.position_B = self.position_B[slot_G]
        self.row_B = self.row_B[: len(slot_G)]

    def _empty(self, like_GHTd: Tensor) -> Tensor:
        _, heads, _, size = like_GHTd.shape
        return like_GHTd.new_zeros(len(self.row_B), heads, self.columns, size)


def fits(model: PreTrainedModel) -> bool:
    """Whether these caches and masks serve the model: softmax attention in every block, full or in a sliding window."""
    config = model.config.get_text_config()
    return (
        not arch_of(model).mixer and _types(config) <= {FULL, SLIDING} and config._attn_implementation in MASKED_BY_US
    )


def _types(config: Any) -> set[str]:
    listed = getattr(config, "layer_types", None)
    if listed:
        return set(listed)
    return {SLIDING if getattr(config, "sliding_window", None) else FULL}


def masks(model: PreTrainedModel, at_BT: Tensor, key_at_BK: Tensor, is_key_BK: Tensor | None = None) -> Mask:
    """What is added to attention scores, (B, 1, T, K): 0 where a token at `at_BT` may see the key at `key_at_BK`.

    `is_key_BK`: False for padding; default: all are keys. A dict by type, as models take it, where blocks differ in it.
    """
    config = model.config.get_text_config()
    distance_BTK = at_BT[:, :, None] - key_at_BK[:, None, :]
    seen_BTK = distance_BTK >= 0
    if is_key_BK is not None:
        seen_BTK = seen_BTK & is_key_BK[:, None, :]
    types = _types(config)
    made = {FULL: seen_BTK} if FULL in types else {}
    if SLIDING in types:
        made[SLIDING] = seen_BTK & (distance_BTK < config.sliding_window)
    added = {name: _added(allowed_BTK, model.dtype) for name, allowed_BTK in made.items()}
    return added if len(added) > 1 else next(iter(added.values()))


def _added(allowed_BTK: Tensor, dtype: torch.dtype) -> Tensor:
    """The lowest number, not -inf: a row of padding that sees nothing must not become NaN."""
    added_BTK = torch.zeros(allowed_BTK.shape, dtype=dtype, device=allowed_BTK.device)
    return added_BTK.masked_fill_(~allowed_BTK, torch.finfo(dtype).min)[:, None]


def read(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> tuple[Any, Appending, Tensor]:
    """(output, cache, positions_BT) of a first pass over prompts padded on the left."""
    at_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = Appending()
    mask = masks(model, at_BT, at_BT, mask_BT.bool())
    options |= {"use_cache": True, **kv_cache.taking(model, cache)}
    output = model(input_ids=ids_BT, attention_mask=mask, position_ids=at_BT, **options)
    return output, cache, at_BT


def read_on(model: PreTrainedModel, ids_BT: Tensor, length_B: Tensor) -> tuple[Tensor, Appending]:
    """(logits_BV behind each prompt's last token, cache) of a first pass over prompts padded on the right.

    No token sees the padding behind it, so no mask is made for it, and attention stays its causal kernel.
    """
    cache, head = Appending(), cast("torch.nn.Module", model.get_output_embeddings())
    row_B = torch.arange(len(ids_BT), device=ids_BT.device)

    def last_alone(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][row_B, length_B - 1][:, None],)

    hook = head.register_forward_pre_hook(last_alone)
    options: dict[str, Any] = kv_cache.taking(model, cache)
    if goes_by_length(model):  # by that of the row, without its padding
        at_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        options["position_ids"] = torch.where(at_T < length_B[:, None], at_T, 0)
    try:
        output = model(input_ids=ids_BT, use_cache=True, **options)
    finally:
        hook.remove()
    return output.logits[:, -1], cache
