"""Greedy or sampled text from any causal LM, order kept, the model left as it was found.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recover.base import console
from recover.base.clock import part
from recover.base.errors import DataError
from recover.config.recipe import Sampling
from recover.models.attention import goes_by_length, read_anew_at
from recover.text.decode import Stops, Writing, write
from recover.text.prompts import Prompt, batches_by_length, encode_prompt, left_pad
from recover.text.stepping import fits

REST = 7919  # on the seed of what is written after a text was read anew: other draws than before


@dataclass(frozen=True)
class Generation:
    """What a model wrote. `ids` hold the end token (or stop string) when it `ended`, else it ran into the limit."""

    ids: list[int]
    text: str
    ended: bool


@part("writing text")
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    chat: bool | None = None,
    stop: Sequence[str] = (),
    unless: str | None = None,
    title: str = "generate",
) -> list[Generation]:
    """One text per prompt, in the order of the prompts: greedy, or sampled from `seed`.

    Texts do not depend on how prompts fall into batches (up to rounding at ties); sampled ones follow the seed and the
    prompt's place, or its number in `numbers`. The model's own generation settings (repetition penalty, top-k, ...) are
    set aside: what is measured is the model. Written in slots (`decode.write`) where the model's cache allows it, else
    by transformers' `generate` (`plain`), where sampled texts do depend on batches.
    `chat`: wrap prompts in the chat template; None = if the tokenizer has one. Where `batch_size` texts at once do not
    fit the GPU's memory, what is left is written by half as many, with a warning.

    `stop`: a text ends where one of these strings begins; its `ids` hold the string. Not so where `unless` comes first.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens` in the model's context, or `stop` holds an empty string.
    """
    prompts_ids = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    _check_room(model, prompts, prompts_ids, max_new_tokens, title)
    inner: Any = stock(model)
    how = writing(inner, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size, sampling=sampling, seed=seed)
    if stop:
        size = inner.get_input_embeddings().num_embeddings
        how = replace(how, stops=Stops(tokenizer, stop, size, unless=unless))
    how = replace(how, numbers=tuple(range(len(prompts)) if numbers is None else numbers))
    written: dict[int, Generation] = {}
    with torch.no_grad(), evaluating(inner), _forked_random_state(inner):
        torch.manual_seed(seed + (min(numbers) if numbers else 0))  # for `plain`: no two processes draw alike
        texts = _with_keys_that_fit(inner, prompts_ids, how)
        for item, ids in console.track(texts, title, total=len(prompts), unit="texts"):
            written[item] = _generation(tokenizer, ids, how)
    return [written[item] for item in range(len(prompts))]


def _with_keys_that_fit(model: Any, prompts_ids: list[list[int]], how: Writing) -> Iterator[tuple[int, list[int]]]:
    """(item, ids) as texts end. Where the model reads a text anew at some length, those that get there go on from it.

    One row at a time where neither our caches nor padding serve the model.
    """
    ours = fits(model)
    if not ours and goes_by_length(model):
        how = replace(how, rows=1)
    writer, switch = write if ours else plain, read_anew_at(model) if ours else None
    # Of each item: the tokens that it may have before it is read anew.
    room = {item: _room(len(ids), how.limit, switch) for item, ids in enumerate(prompts_ids)}
    first = [item for item, left in room.items() if left < how.limit]
    others = [item for item, left in room.items() if left == how.limit]
    yield from _of_some(writer, model, {item: prompts_ids[item] for item in others}, how)
    begun: dict[int, list[int]] = {}
    limit = max((room[item] for item in first), default=0)
    for item, ids in _of_some(writer, model, {item: prompts_ids[item] for item in first}, replace(how, limit=limit)):
        ids = ids[: room[item]]
        if len(ids) < room[item] or ids[-1] in how.ends:
            yield item, ids
        else:
            begun[item] = ids
    if not begun:
        return
    rest = replace(how, limit=how.limit - min(room[item] for item in begun), seed=how.seed + REST)
    longer = {item: prompts_ids[item] + ids for item, ids in begun.items()}
    for item, ids in _of_some(writer, model, longer, rest):
        yield item, [*begun[item], *ids[: how.limit - room[item]]]


def _room(length: int, limit: int, switch: int | None) -> int:
    """Tokens that are written after a prompt of this length before the text is longer than `switch`, or all."""
    return limit if switch is None or length > switch else min(limit, switch - length + 1)


def _of_some(writer: Any, model: Any, prompts: dict[int, list[int]], how: Writing) -> Iterator[tuple[int, list[int]]]:
    """As `writer`, of items by number, as memory allows."""
    items, numbers = list(prompts), how.numbers or ()
    numbered = replace(how, numbers=tuple(numbers[item] for item in items))
    for place, ids in _as_memory_allows(writer, model, [prompts[item] for item in items], numbered):
        yield items[place], ids


def _generation(tokenizer: PreTrainedTokenizerBase, ids: list[int], how: Writing) -> Generation:
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    cut = how.stops.cut(text) if how.stops else None
    if how.stops is None or cut is None:
        return Generation(ids, text, ids[-1] in how.ends)
    return Generation(_shortest(tokenizer, ids, how.stops), cut, True)


def _shortest(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Stops) -> list[int]:
    """The fewest ids whose text holds a stop, found by bisection: what holds one does so with more ids too."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        held = stops.cut(str(tokenizer.decode(ids[:middle], skip_special_tokens=True))) is not None
        low, high = (low, middle) if held else (middle + 1, high)
    return ids[:low]


def _as_memory_allows(writer: Any, model: Any, prompts_ids: list[list[int]], how: Writing) -> Iterator[Any]:
    """As `writer`; out of memory it begins again with half as many rows, without the texts that have ended."""
    left, numbers = dict(enumerate(prompts_ids)), how.numbers or ()
    while left:
        items = list(left)
        try:
            numbered = replace(how, numbers=tuple(numbers[item] for item in items))
            for place, ids in writer(model, [left[item] for item in items], numbered):
                del left[items[place]]
                yield items[place], ids
        except torch.OutOfMemoryError:
            if how.rows == 1:
                raise
        if left:  # what the failed attempt held is free only here, behind its exception
            how = replace(how, rows=max(1, min(how.rows, len(items)) // 2))
            console.warn(f"out of GPU memory: {len(left):,} of {len(prompts_ids):,} texts by {how.rows} at once")
            gc.collect()
            torch.cuda.empty_cache()


def writing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Writing:
    """How this model's texts are written: plain greedy, or plain nucleus sampling."""
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else (ends or [0])[0]
    return Writing(max_new_tokens, tuple(ends), pad, batch_size, sampling, seed)


def plain(
    model: PreTrainedModel, prompts_ids: Sequence[Sequence[int]], how: Writing
) -> Iterator[tuple[int, list[int]]]:
    """As `write`, by transformers' own `generate` in padded batches: for models whose cache is not ours to keep."""
    inner: Any = model
    for batch in batches_by_length([len(ids) for ids in prompts_ids], how.rows):
        ids_BT, mask_BT = left_pad([prompts_ids[item] for item in batch], how.pad, model.device)
        with _generating_by(model, _settings(how)):
            output_BT = inner.generate(input_ids=ids_BT, attention_mask=mask_BT)
        for item, ids in zip(batch, _until_end(output_BT[:, ids_BT.shape[1] :].tolist(), how.ends), strict=True):
            yield item, how.stops.ended(ids) if how.stops else ids


def _check_room(
    model: PreTrainedModel, prompts: Sequence[Prompt], prompts_ids: list[list[int]], max_new_tokens: int, title: str
) -> None:
    context = context_of(model)
    for prompt, ids in zip(prompts, prompts_ids, strict=True):
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"{title}: the prompt {prompt[:60]!r} has {len(ids)} tokens; with max_new_tokens {max_new_tokens} that "
                f"exceeds the model's context of {context}: shorten the prompt, or lower max_new_tokens"
            )


def stock(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel (its LoRA layers stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def context_of(model: Any) -> int | None:
    """Positions that the model was made for, or None if its config names no limit."""
    return getattr(stock(model).config.get_text_config(), "max_position_embeddings", None)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a text: the tokenizer's EOS and those of the model's generation settings (end of turn)."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = named if isinstance(named, list) else [named]
    return sorted({token for token in [*listed, getattr(tokenizer, "eos_token_id", None)] if isinstance(token, int)})


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every module is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _settings(how: Writing) -> GenerationConfig:
    """Top-k, whose default in transformers is 50, is off."""
    drawn: dict[str, Any] = {"do_sample": False}
    if how.sampling is not None:
        drawn = {"do_sample": True, "temperature": how.sampling.temperature, "top_p": how.sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=how.limit, eos_token_id=list(how.ends) or None, pad_token_id=how.pad, use_cache=True, **drawn
    )


@contextmanager
def _generating_by(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Our settings in place of the model's: `generate` fills every field left unset from the model's own."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _forked_random_state(model: PreTrainedModel) -> Iterator[None]:
    """Sampling leaves the random state of the run untouched: training goes on as if nothing had been measured."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _until_end(rows: list[list[int]], ends: Sequence[int]) -> Iterator[list[int]]:
    """Rows cut after their first end token; what follows it is padding."""
    for row in rows:
        end = next((position for position, token in enumerate(row) if token in ends), None)
        yield row if end is None else row[: end + 1]
