"""What a model says of a given text: its log-likelihood, of options of a choice or whole; and the text as a vector.

Legend: B batch, T tokens, N scored tokens, V vocabulary, G groups of rows with one prompt, R rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import console
from recover.base.errors import DataError, ModelError
from recover.models.arch import taking_cache
from recover.models.attention import attending_by_step, configs_of, goes_by_length
from recover.text.generate import context_of, evaluating, stock
from recover.text.prompts import batches_by_length, left_pad, prompt_text, text_ids, uses_chat
from recover.text.stepping import Appending, fits, masks, read

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
        for batch in console.track(batches, title, unit="batches"):
            sums.update(zip(batch, _batch_sums(model, [rows[item] for item in batch]), strict=True))
    _check_finite(list(sums.values()), title)
    return [sums[item] for item in range(len(rows))]


def option_log_likelihoods(
    model: PreTrainedModel, groups: Sequence[Sequence[Continuation]], *, batch_size: int, title: str = "score"
) -> list[list[float]]:
    """As `log_likelihoods`, for groups of `option_rows`: what the rows of a group share is read once.

    An option of one token costs no more than the prompt. Equal to the rows one by one, up to rounding.
    """
    if not fits(stock(model)) or goes_by_length(stock(model)):  # a prompt alone is not as in a longer text
        flat = iter(
            log_likelihoods(model, [row for group in groups for row in group], batch_size=batch_size, title=title)
        )
        return [[next(flat) for _ in group] for group in groups]
    _check_context(model, [row for group in groups for row in group], title)
    model = stock(model)
    most = max((len(group) for group in groups), default=1)
    batches = batches_by_length([group[0].start for group in groups], max(1, batch_size // most))
    sums: dict[int, list[float]] = {}
    # What an option has behind its first token is often one token.
    with torch.no_grad(), evaluating(model), attending_by_step(configs_of(model)):
        for batch in console.track(batches, title, unit="batches"):
            sums.update(zip(batch, _group_sums(model, [groups[item] for item in batch]), strict=True))
    _check_finite([each for group in sums.values() for each in group], title)
    return [sums[item] for item in range(len(groups))]


def _group_sums(model: PreTrainedModel, groups: list[Sequence[Continuation]]) -> list[list[float]]:
    ids_GT, mask_GT = left_pad([group[0].ids[: group[0].start] for group in groups], 0, model.device)
    output, cache, at_GT = read(model, ids_GT, mask_GT, logits_to_keep=1)
    first_GV = output.logits[:, -1].float().log_softmax(-1)
    rows = [(number, row) for number, group in enumerate(groups) for row in group]
    number_R = torch.tensor([number for number, _ in rows], device=model.device)
    first_R = first_GV[number_R, torch.tensor([row.ids[row.start] for _, row in rows], device=model.device)]
    sums = first_R.tolist()
    longer = [index for index, (_, row) in enumerate(rows) if row.tokens > 1]
    for part in _within_memory(longer, [row for _, row in rows], model.config.get_text_config().vocab_size):
        rest = _rest_sums(model, [rows[index][1] for index in part], number_R[part], (cache, at_GT, mask_GT))
        for index, value in zip(part, rest, strict=True):
            sums[index] += value
    found = iter(sums)
    return [[next(found) for _ in group] for group in groups]


def _rest_sums(
    model: PreTrainedModel,
    rows: list[Continuation],
    number_R: torch.Tensor,
    prompts: tuple[Appending, torch.Tensor, torch.Tensor],
) -> list[float]:
    """The sums over all scored tokens but the first, on the caches of the rows' prompts."""
    cache, at_GT, mask_GT = prompts
    tails = [torch.tensor(row.ids[row.start :]) for row in rows]
    tail_RN = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(model.device)
    step_N = torch.arange(tail_RN.shape[1] - 1, device=model.device)
    at_RN = mask_GT[number_R].sum(-1)[:, None] + step_N
    key_at = torch.cat([at_GT[number_R], at_RN], dim=1)
    is_key = torch.cat([mask_GT[number_R].bool(), torch.ones_like(at_RN, dtype=torch.bool)], dim=1)
    logits_RNV = model(
        input_ids=tail_RN[:, :-1],  # padding on the right: no token before it sees it
        attention_mask=masks(model, at_RN, key_at, is_key),
        position_ids=at_RN,
        use_cache=True,
        **taking_cache(model, cache.rows(number_R)),
    ).logits
    sums = [
        -torch.nn.functional.cross_entropy(logits_NV[: row.tokens - 1].float(), tail_N[1 : row.tokens], reduction="sum")
        for logits_NV, tail_N, row in zip(logits_RNV, tail_RN, rows, strict=True)
    ]
    return torch.stack(sums).tolist()


def _check_finite(sums: Sequence[float], title: str) -> None:
    if not all(map(math.isfinite, sums)):
        raise ModelError(f"{title}: the model gives log-probabilities that are not finite; its weights may hold NaN")


def _within_memory(batch: list[int], rows: Sequence[Continuation], vocabulary: int) -> list[list[int]]:
    """The batch in parts whose logits stay within LOGITS_AT_ONCE, of one row at least."""
    widest = max((rows[item].tokens for item in batch), default=0) + 1
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


def embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int,
    batch_size: int,
    title: str = "embed",
) -> list[np.ndarray]:
    """One float32 vector of length 1 per text: the mean over its tokens of the last hidden state, after the final norm.

    `length`: tokens read of each text.

    Raises:
        ModelError: a vector is not finite.
    """
    inner: Any = stock(model)
    length = min(length, context_of(inner) or length)
    rows = [text_ids(tokenizer, text, special=True)[:length] for text in texts]
    found: dict[int, np.ndarray] = {}
    with torch.no_grad(), evaluating(inner):
        for batch in console.track(batches_by_length(list(map(len, rows)), batch_size), title, unit="batches"):
            vectors_BD = _pooled(inner, [rows[item] for item in batch])
            if not torch.isfinite(vectors_BD).all():
                raise ModelError(
                    f"{title}: the model gives hidden states that are not finite; its weights may hold NaN"
                )
            found.update(zip(batch, vectors_BD.cpu().numpy(), strict=True))
    return [found[item] for item in range(len(texts))]


def _pooled(model: Any, rows: list[list[int]]) -> torch.Tensor:
    ids_BT, mask_BT = left_pad(rows, 0, model.device)
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    body = getattr(model, model.base_model_prefix)
    hidden_BTD = body(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False
    ).last_hidden_state
    # Padding is left out by choice, not by a factor of 0: what stands there need not be finite.
    mean_BD = hidden_BTD.float().masked_fill(~mask_BT.bool()[..., None], 0.0).sum(1) / mask_BT.sum(-1, keepdim=True)
    return torch.nn.functional.normalize(mean_BD, dim=-1)
