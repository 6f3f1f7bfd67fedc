"""The ways to write texts that `generate.py` times: recover's, and transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

from recover.text import decode
from recover.text.decode import Writing, write
from recover.text.generate import plain
from recover.text.prompts import batches_by_length, left_pad

Texts = dict[int, list[int]]
Variant = Callable[[Any, Sequence[list[int]], Writing], Texts]


def plain_generate(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """Padded batches, each until its last row ends."""
    return dict(plain(model, prompts_ids, how))


def slots(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """What recover uses."""
    return dict(write(model, prompts_ids, how))


def slots_unrecorded(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """The same, every step run from Python."""
    with mock.patch.object(decode, "may_record", lambda model: False):
        return slots(model, prompts_ids, how)


def slots_stock_attention(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """The same, with attention as this version of transformers has it."""
    with mock.patch.object(decode, "configs_of", lambda model: []):
        return slots(model, prompts_ids, how)


def slots_stock_modules(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """The same, with norms, gates, rotary embedding and products as transformers has them."""
    with mock.patch.object(decode, "stepping", lambda model: nullcontext()):
        return slots(model, prompts_ids, how)


def static_cache(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """transformers' static cache, whose step it compiles by itself on a GPU."""
    texts: Texts = {}
    for batch in batches_by_length([len(ids) for ids in prompts_ids], how.rows):
        ids_BT, mask_BT = left_pad([prompts_ids[item] for item in batch], how.pad, model.device)
        output_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, cache_implementation="static", **_greedy(how)
        )
        rows = output_BT[:, ids_BT.shape[1] :].tolist()
        texts |= {item: _cut(row, how.ends) for item, row in zip(batch, rows, strict=True)}
    return texts


def continuous_batching(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """transformers' paged cache, rows filled again."""
    from transformers import GenerationConfig

    if model.device.type != "cuda":
        raise ValueError("needs a GPU")
    attention = model.config._attn_implementation
    try:
        settings = GenerationConfig(**_greedy(how))
        found = model.generate_batch(inputs=[list(ids) for ids in prompts_ids], generation_config=settings)
    finally:
        model.set_attn_implementation(attention)
    outputs = sorted(found.values(), key=lambda each: int(str(each.request_id).rsplit("_", 1)[-1]))
    if len(outputs) != len(prompts_ids):
        raise RuntimeError(f"{len(outputs)} of {len(prompts_ids)} texts came back")
    return {item: _cut(list(each.generated_tokens), how.ends) for item, each in enumerate(outputs)}


def _greedy(how: Writing) -> dict[str, Any]:
    return {
        "max_new_tokens": how.limit,
        "do_sample": False,
        "eos_token_id": list(how.ends),
        "pad_token_id": how.pad,
        "use_cache": True,
    }


def _cut(row: list[int], ends: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


PAIR: dict[str, Variant] = {"transformers generate": plain_generate, "recover": slots}
OTHERS: dict[str, Variant] = {
    "recover, transformers' attention": slots_stock_attention,
    "recover, transformers' modules": slots_stock_modules,
    "recover, no CUDA graph": slots_unrecorded,
    "transformers static cache": static_cache,
    "transformers continuous batching": continuous_batching,  # last: out of time, its thread may go on
}
