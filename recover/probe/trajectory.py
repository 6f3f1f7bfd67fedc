"""Prompts as token ids, and the greedy trajectory of a view from each of them, with a KV cache.

Left padding; positions follow the attention mask, so that a prompt reads the same in any batch.

Shapes: B batch, T prompt tokens, S decoding steps, N scored positions (to each text's end), D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from recover.errors import DataError
from recover.models.arch import base_of
from recover.probe.views import States, View, hidden_states, running


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of one forward: `prompts` are their numbers in the whole list, `mask_BT` is 0 on padding."""

    prompts: tuple[int, ...]
    ids_BT: Tensor
    mask_BT: Tensor


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Greedy tokens from each prompt; `scored_BS` is true up to and including the end token, or to the last step.

    `cached_ND` are the states after the final norm from which the scored tokens were read, decoding with the cache.
    """

    batch: Batch
    tokens_BS: Tensor
    scored_BS: Tensor
    cached_ND: Tensor

    def tokens(self) -> list[list[int]]:
        """The scored tokens of each prompt."""
        return [row[keep].tolist() for row, keep in zip(self.tokens_BS, self.scored_BS, strict=True)]


def encode(tokenizer: Any, prompts: list[str] | list[list[int]]) -> list[list[int]]:
    """Token ids of each prompt, as a user's turn where the tokenizer has a chat template; ids are taken as they are.

    Raises:
        DataError: there is no prompt, or one without tokens.
    """
    if not prompts:
        raise DataError(
            "probe: no prompts. Set probe.prompts to a JSONL file with a `prompt` column, or add a generate task"
        )
    ids = [prompt if isinstance(prompt, list) else _encode_text(tokenizer, prompt) for prompt in prompts]
    for number, row in enumerate(ids):
        if not row:
            raise DataError(f"probe: prompt {number} has no tokens: {prompts[number]!r}. Remove it from the prompts")
    return ids


def _encode_text(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own


def batches_of(ids: list[list[int]], view: View, *, size: int, steps: int) -> list[Batch]:
    """Left-padded batches in the order of the prompts.

    Raises:
        DataError: a prompt and `steps` tokens do not fit the model's context, or an id is outside its vocabulary.
    """
    config = base_of(view.model).config
    for number, row in enumerate(ids):
        if len(row) + steps > config.max_position_embeddings:
            raise DataError(
                f"probe: prompt {number} has {len(row)} tokens; with {steps} decoding steps that is more than the "
                f"{config.max_position_embeddings} positions of the model. Shorten it, or lower probe.steps"
            )
        if max(row) >= config.vocab_size or min(row) < 0:
            raise DataError(
                f"probe: prompt {number} holds a token outside 0..{config.vocab_size - 1}: "
                "the tokenizer belongs to another model"
            )
    device = next(view.model.parameters()).device
    return [_pad(start, ids[start : start + size], device) for start in range(0, len(ids), size)]


def _pad(first: int, rows: list[list[int]], device: torch.device) -> Batch:
    length = max(map(len, rows))
    ids = [[0] * (length - len(row)) + row for row in rows]  # which id pads is of no matter: the mask hides it
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return Batch(
        tuple(range(first, first + len(rows))), torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    )


def end_tokens(view: View, tokenizer: Any) -> list[int]:
    """Ids that end a text, as the model's generation config and the tokenizer name them."""
    named = getattr(base_of(view.model).generation_config, "eos_token_id", None)
    ends = [*(named if isinstance(named, list) else [named]), getattr(tokenizer, "eos_token_id", None)]
    return sorted({end for end in ends if end is not None})


def positions(mask_BT: Tensor) -> Tensor:
    """The place of each token in its own text: padding on the left does not count."""
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


def greedy(view: View, batch: Batch, *, steps: int, ends: list[int]) -> Trajectory:
    """Up to `steps` most likely tokens, one cached forward each; no penalty, whatever the generation config says."""
    stop = torch.tensor(ends, device=batch.ids_BT.device)
    ids_BT, mask_BT = batch.ids_BT, batch.mask_BT
    alive_B = torch.ones(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    cache, tokens, scored, states = None, [], [], []
    with running(view) as model, hidden_states(view, lambda h_BTD: h_BTD[:, -1], with_blocks=False) as seen:
        while len(tokens) < steps and alive_B.any():
            place_BT = positions(mask_BT)[:, -ids_BT.shape[1] :]
            output = model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=place_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            token_B, cache = output.logits[:, -1].argmax(-1), output.past_key_values
            tokens.append(token_B)
            scored.append(alive_B)
            states.append(seen.final_ND)
            alive_B = alive_B & ~torch.isin(token_B, stop)
            ids_BT, mask_BT = token_B[:, None], torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)
    scored_BS = torch.stack(scored, 1)
    return Trajectory(batch, torch.stack(tokens, 1), scored_BS, torch.stack(states, 1)[scored_BS])


def along(view: View, trajectory: Trajectory, *, with_blocks: bool = True) -> States:
    """The view's states at each scored position of any view's trajectory, by one full forward without a cache."""
    batch, tokens_BS, scored_BS = trajectory.batch, trajectory.tokens_BS, trajectory.scored_BS
    ids_BT = torch.cat([batch.ids_BT, tokens_BS[:, :-1]], 1)
    mask_BT = torch.cat([batch.mask_BT, torch.ones_like(tokens_BS[:, :-1])], 1)
    first = batch.ids_BT.shape[1] - 1  # the last token of the prompt predicts the first of the trajectory

    def select(h_BTD: Tensor) -> Tensor:
        return h_BTD[:, first:][scored_BS]

    with running(view) as model, hidden_states(view, select, with_blocks=with_blocks) as seen:
        model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions(mask_BT), use_cache=False, logits_to_keep=1
        )
    return seen
