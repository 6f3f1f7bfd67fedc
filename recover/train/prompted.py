"""What a model writes after prompts, round after round of them, all processes together."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recover.base import dist
from recover.base.errors import DataError
from recover.config.recipe import DenseText, PrunedText, Sampling
from recover.text.generate import generate
from recover.text.prompts import Prompt, encode_prompt
from recover.text.read import Row
from recover.train.sources import Sample, read_prompts, say_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fitting_prompts(source: DenseText | PrunedText, length: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The source's prompts, each of which leaves room for an answer within `length` tokens.

    Rows without a prompt, or with one that is too long, are left out and counted; `source.strict` refuses them, and so
    does a length that more than half of the prompts do not fit.

    Raises:
        DataError: the chat template cannot write a prompt, by file and line; or most are too long.
    """
    prompts: list[Row] = []
    too_long: list[str] = []
    rows = read_prompts(source.prompts, source.split, source.subset, column=source.column, strict=source.strict)
    for row in rows:
        try:
            found = len(encode_prompt(tokenizer, row.value["prompt"], chat=source.chat))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if found < length:
            prompts.append(row)
            continue
        too_long.append(
            f"{row.where}: the prompt has {found} tokens, which leaves none of recover.length {length} for an answer: "
            "shorten it or raise recover.length"
        )
        if source.strict:
            raise DataError(too_long[0])
    if len(too_long) > len(prompts):
        count = len(too_long) + len(prompts)
        raise DataError(f"{source.prompts}: {len(too_long):,} of {count:,} prompts are too long; {too_long[0]}")
    say_left_out(source.prompts, too_long)
    return prompts


def check_answers(
    prompts: Sequence[Row],
    source: DenseText | PrunedText,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> None:
    """Raises DataError where an answer of full length to one of the prompts would exceed the model's context.

    `number`: of the source among `recover.data`.
    """
    for row in prompts:
        found = len(encode_prompt(tokenizer, row.value["prompt"], chat=source.chat))
        if context is not None and found + source.max_new_tokens > context:
            raise DataError(
                f"recover.data.{number}.max_new_tokens: {source.max_new_tokens} tokens after the prompt of "
                f"{row.where}, which has {found}, exceed the model's context of {context}: lower it, or leave that "
                "prompt out"
            )


def in_rounds(prompts: Sequence[Row], first: int, count: int, seed: int) -> list[Row]:
    """`count` prompts from number `first` on, of an endless row of rounds, each of all prompts in another order."""
    chosen: list[Row] = []
    while len(chosen) < count:
        turn, position = divmod(first + len(chosen), len(prompts))
        order = list(range(len(prompts)))
        random.Random(seed * 7919 + turn).shuffle(order)
        chosen += [prompts[index] for index in order[position : position + count - len(chosen)]]
    return chosen


def write_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    source: DenseText | PrunedText,
    seed: tuple[int, ...],
    title: str,
) -> list[list[int]]:
    """The ids that the model writes after each prompt, dealt out to all processes and gathered on each."""
    drawn = Sampling(temperature=source.temperature, top_p=source.top_p) if source.temperature else None
    mine = dist.everywhere(
        lambda: generate(
            model,
            tokenizer,
            dist.shard(prompts),
            max_new_tokens=source.max_new_tokens,
            batch_size=source.batch_size,
            sampling=drawn,
            seed=one_seed(*seed, dist.rank()),
            chat=source.chat,
            title=title,
        )
    )
    return dist.gather([generation.ids for generation in mine])


def answered(prompt_ids: list[int], ids: list[int]) -> Sample:
    """A prompt with what was written after it, which is learnt."""
    return Sample(prompt_ids + ids, [0] * len(prompt_ids) + [1] * len(ids))


def one_seed(*parts: int) -> int:
    """One seed out of several numbers, unlike for unlike numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
