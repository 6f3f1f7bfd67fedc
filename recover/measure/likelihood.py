"""Log-likelihood of given text under a model: options of a choice, and whole texts for perplexity.

Legend: B batch, T tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover import console
from recover.errors import DataError, ModelError
from recover.measure.generate import context_of, evaluating, stock
from recover.measure.prompts import batches_by_length, left_pad, prompt_text, text_ids, uses_chat

LOGITS_AT_ONCE = 2**27  # elements of a (rows x scored tokens x vocabulary) tensor: 512 MiB in fp32


@dataclass(frozen=True)
class Continuation:
    """Ids of which those from `start` on are scored, each given all before it; `start` is at least 1."""

    ids: list[int]
    start: int

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.start


def option_rows(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str], *, separator: str, chat: bool | None = None
) -> list[Continuation]:
    """Prompt + option, one row per option, scored over the option's full text.

    All options of a prompt are scored from the same token on: the first one where a row leaves the prompt's own ids
    (a tokenizer may merge the prompt's end with the option's beginning). `separator` stands between the two in plain
    text; white space that ends the prompt is moved to the option, as its tokens would be. In a chat the option is the
    assistant's answer.
    """
    is_chat = uses_chat(tokenizer, chat)
    text = prompt_text(tokenizer, prompt, chat=chat)
    context = text if is_chat else text.rstrip()
    between = "" if is_chat else text[len(context) :] or separator
    prompt_ids = text_ids(tokenizer, context, special=not is_chat)
    rows = [text_ids(tokenizer, context + between + option, special=not is_chat) for option in options]
    start = min(_common(prompt_ids, row) for row in rows)
    if start < 1:
        raise DataError(f"the prompt {prompt[:60]!r} has no token before its options, and the tokenizer adds no BOS")
    return [Continuation(row, start) for row in rows]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def log_likelihoods(
    model: PreTrainedModel, rows: Sequence[Continuation], *, batch_size: int, title: str = "score"
) -> list[float]:
    """Sum of log p(token | all before it) over each row's scored tokens, in nats, in the order of the rows.

    Rows are padded on the left, so that scored tokens are the last ones and only their logits are computed; logits go
    to fp32 one row at a time.

    Raises:
        DataError: a row is longer than the model's context.
        ModelError: the model gives no finite probabilities.
    """
    _check_context(model, rows, title)
    model = stock(model)
    sums: dict[int, float] = {}
    batches = [
        part
        for batch in batches_by_length([len(row.ids) for row in rows], batch_size)
        for part in _within_memory(batch, rows, model.config.get_text_config().vocab_size)
    ]
    with torch.no_grad(), evaluating(model):
        for batch in console.track(batches, title, unit="batch"):
            sums.update(zip(batch, _batch_sums(model, [rows[item] for item in batch]), strict=True))
    if not all(map(math.isfinite, sums.values())):
        raise ModelError(f"{title}: the model gives log-probabilities that are not finite; its weights may hold NaN")
    return [sums[item] for item in range(len(rows))]


def _within_memory(batch: list[int], rows: Sequence[Continuation], vocabulary: int) -> list[list[int]]:
    """The batch in parts whose logits stay within LOGITS_AT_ONCE, of one row at least."""
    widest = max(rows[item].tokens for item in batch) + 1
    size = max(1, LOGITS_AT_ONCE // (widest * vocabulary))
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _batch_sums(model: PreTrainedModel, rows: list[Continuation]) -> list[float]:
    widest = max(row.tokens for row in rows)
    ids_BT, mask_BT = left_pad([row.ids for row in rows], 0, model.device)
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)  # a plain forward would count the padding
    logits_BNV = model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, logits_to_keep=widest + 1, use_cache=False
    ).logits[:, :-1]
    target_BN = ids_BT[:, ids_BT.shape[1] - widest :]
    sums = []
    for logits_NV, target_N, row in zip(logits_BNV, target_BN, rows, strict=True):
        scored = slice(widest - row.tokens, None)
        sums.append(-torch.nn.functional.cross_entropy(logits_NV[scored].float(), target_N[scored], reduction="sum"))
    return torch.stack(sums).tolist()


def _check_context(model: PreTrainedModel, rows: Sequence[Continuation], title: str) -> None:
    context = context_of(model)
    longest = max((len(row.ids) for row in rows), default=0)
    if context is not None and longest > context:
        raise DataError(f"{title}: an item has {longest} tokens, the model's context is {context}: shorten it")
