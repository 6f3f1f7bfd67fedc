"""Prompts as token ids, and the greedy trajectory of a view from each of them, with a KV cache.

Left padding; positions follow the attention mask, so that a prompt reads the same in any batch. A view reads a batch
token by token with its own cache, or on a GPU by steps that are recorded once: a step of a small model is some hundreds
of short kernels, and launching them takes ten times as long as they do. The recorded step is that of
`recover.text.decode`: slots for keys and values that stay where they are, and its masks.

Shapes: B batch, T prompt tokens, S decoding steps, K columns of the cache, N scored positions (to each text's end),
D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from recover.base.errors import DataError
from recover.models.arch import base_of, cache_in, taking_cache
from recover.models.attention import attending_by_step, configs_of
from recover.probe.views import States, View, hidden_states, running
from recover.text.decode import Recorder, may_record, steps_unseen
from recover.text.generate import end_ids
from recover.text.prompts import encode_prompt
from recover.text.stepping import Slots, fits, masks, read

Read = tuple[Tensor, Tensor]  # logits_BV of the last token, and its state after the final norm


class Reader(Protocol):
    """Reads prompts, then one token more of each text at a time."""

    def first(self, ids_BT: Tensor, mask_BT: Tensor) -> Read: ...

    def then(self, token_B: Tensor) -> Read: ...

    def close(self) -> None:
        """No token is read any more."""
        ...


def reader_of(model: Any, state: Callable[[], Tensor], steps: int) -> Reader:
    """What suits the model, the device and the texts; `state`: what the final norm gave for the last token read."""
    base: Any = base_of(model)
    return Recorded(base, state, steps) if may_record(base) and fits(base) else Stock(model, state)


def positions(mask_BT: Tensor) -> Tensor:
    """The place of each token in its own text: padding on the left does not count."""
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


class Stock:
    """As anyone decodes: the cache that the model makes, padding and all."""

    def __init__(self, model: Any, state: Callable[[], Tensor]) -> None:
        self.model, self.state = model, state
        self.cache: Any = None

    def first(self, ids_BT: Tensor, mask_BT: Tensor) -> Read:
        self.mask_BT = mask_BT
        return self._read(ids_BT)

    def then(self, token_B: Tensor) -> Read:
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(token_B), 1)], 1)
        return self._read(token_B[:, None])

    def close(self) -> None:
        self.cache = None

    def _read(self, ids_BT: Tensor) -> Read:
        output = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            position_ids=positions(self.mask_BT)[:, -ids_BT.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **taking_cache(self.model, self.cache),
        )
        self.cache = cache_in(output)
        return output.logits[:, -1], self.state()


class Recorded:
    """Prompts without their padding, in slots with room for `steps` more tokens; a step is replayed where it may be.

    What is given is overwritten by the next step.
    """

    def __init__(self, model: Any, state: Callable[[], Tensor], steps: int) -> None:
        self.model, self.state, self.steps = model, state, steps
        self.recorder = Recorder(self._step) if may_record(model) else None

    def first(self, ids_BT: Tensor, mask_BT: Tensor) -> Read:
        rows, longest = ids_BT.shape
        output, cache, _ = read(self.model, ids_BT, mask_BT, logits_to_keep=1)
        self.slots = Slots(rows, longest + self.steps, ids_BT.device)
        length_B = mask_BT.sum(-1)
        column_T = torch.arange(longest, device=ids_BT.device)
        from_BT = (column_T + longest - length_B[:, None]).clamp(max=longest - 1)  # padding goes behind the text
        cache.kv = {
            layer: (_moved(keys, from_BT), _moved(values, from_BT)) for layer, (keys, values) in cache.kv.items()
        }
        self.slots.fill(self.slots.row_B, cache)
        self.slots.position_B.copy_(length_B)
        self.key_at_1K = torch.arange(self.slots.columns, device=ids_BT.device)[None]
        self.token_B1 = ids_BT[:, -1:].clone()
        self.logits_BV, self.state_BD = output.logits[:, -1].clone(), self.state().clone()
        return self.logits_BV, self.state_BD

    def then(self, token_B: Tensor) -> Read:
        self.token_B1.copy_(token_B[:, None])
        if self.recorder is None:
            self._step()
        else:
            self.recorder.run(self.slots.columns, 1)
        return self.logits_BV, self.state_BD

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.forget()  # now, and not when the collector comes by

    def _step(self) -> None:
        at_B1 = self.slots.position_B[:, None]
        output = self.model(
            input_ids=self.token_B1,
            attention_mask=masks(self.model, at_B1, self.key_at_1K),
            position_ids=at_B1,
            use_cache=True,
            logits_to_keep=1,
            **taking_cache(self.model, self.slots),
        )
        self.logits_BV.copy_(output.logits[:, -1])
        self.state_BD.copy_(self.state())
        self.slots.position_B += 1


def _moved(read_BHTd: Tensor, from_BT: Tensor) -> Tensor:
    return read_BHTd.gather(2, from_BT[:, None, :, None].expand_as(read_BHTd))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of one forward: `prompts` are their numbers in the whole list, `mask_BT` is 0 on padding."""

    prompts: tuple[int, ...]
    ids_BT: Tensor
    mask_BT: Tensor


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Greedy tokens from each prompt; `scored_BS` is true up to and including the end token, or to the last step.

    `cached_ND` are the states after the final norm from which the scored tokens were read, decoding with the cache
    (none for a text that was given).
    """

    batch: Batch
    tokens_BS: Tensor
    scored_BS: Tensor
    cached_ND: Tensor

    def tokens(self) -> list[list[int]]:
        """The scored tokens of each prompt."""
        rows = zip(self.tokens_BS.cpu(), self.scored_BS.cpu(), strict=True)
        return [row[keep].tolist() for row, keep in rows]


def encode(tokenizer: Any, prompts: list[str] | list[list[int]]) -> list[list[int]]:
    """Token ids of each prompt, as `encode_prompt` has them; ids are taken as they are.

    Raises:
        DataError: there is no prompt, one without tokens, or one that the chat template cannot write.
    """
    if not prompts:
        raise DataError(
            "probe: no prompts. Set probe.prompts to a JSONL file with a `prompt` column, or add a generate task"
        )
    ids = [prompt if isinstance(prompt, list) else encode_prompt(tokenizer, prompt) for prompt in prompts]
    for number, row in enumerate(ids):
        if not row:
            raise DataError(f"probe: prompt {number} has no tokens: {prompts[number]!r}. Remove it from the prompts")
    return ids


def batches_of(ids: list[list[int]], view: View, *, size: int, steps: int) -> list[Batch]:
    """Left-padded batches in the order of the prompts.

    Raises:
        DataError: a prompt and `steps` tokens do not fit the model's context, or an id is outside its vocabulary.
    """
    check_ids(ids, view, steps=steps)
    device = next(view.model.parameters()).device
    return [pad(start, ids[start : start + size], device) for start in range(0, len(ids), size)]


def check_steps(ids: list[list[int]], steps: int, context: int | None) -> None:
    """Raises DataError, naming the first prompt that with `steps` more tokens is longer than the model's context."""
    for number, row in enumerate(ids):
        if context is not None and len(row) + steps > context:
            raise DataError(
                f"probe: prompt {number} has {len(row)} tokens; with probe.steps {steps} that is more than the "
                f"{context} positions of the model. Shorten it, or lower probe.steps"
            )


def check_ids(ids: list[list[int]], view: View, *, steps: int) -> None:
    """Raises DataError, naming the first prompt that with `steps` more tokens is too long, or has a token too high."""
    config = base_of(view.model).config
    check_steps(ids, steps, config.max_position_embeddings)
    for number, row in enumerate(ids):
        if max(row) >= config.vocab_size or min(row) < 0:
            raise DataError(
                f"probe: prompt {number} holds a token outside 0..{config.vocab_size - 1}: "
                "the tokenizer belongs to another model"
            )


def pad(first: int, rows: list[list[int]], device: torch.device) -> Batch:
    """The rows as one batch, padded on the left; `first` is the number of the first one."""
    length = max(map(len, rows))
    ids = [[0] * (length - len(row)) + row for row in rows]  # which id pads is of no matter: the mask hides it
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return Batch(
        tuple(range(first, first + len(rows))), torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    )


def end_tokens(view: View, tokenizer: Any) -> list[int]:
    """Ids that end a text, as the model's generation config and the tokenizer name them."""
    return end_ids(base_of(view.model), tokenizer)


def greedy(view: View, batch: Batch, *, steps: int, ends: list[int]) -> Trajectory:
    """Up to `steps` most likely tokens, one cached forward each; no penalty, whatever the generation config says."""
    return _decode(view, batch, steps, ends, lambda z_BV, step: z_BV.argmax(-1))


def sampled(view: View, batch: Batch, *, steps: int, ends: list[int], seed: int) -> Trajectory:
    """As `greedy`, but tokens are drawn from softmax(z), by noise that depends on seed, prompt and step alone.

    So equal views write equal texts, near views nearly equal ones, and batches and processes make no difference.
    (argmax of z + Gumbel noise is a draw from softmax(z).)
    """

    def draw(z_BV: Tensor, step: int) -> Tensor:
        noise_BV = torch.stack([_exponential(seed, prompt, step, z_BV.shape[-1]) for prompt in batch.prompts])
        return (z_BV.float() - noise_BV.to(z_BV.device).log()).argmax(-1)

    return _decode(view, batch, steps, ends, draw)


def _exponential(seed: int, prompt: int, step: int, size: int) -> Tensor:
    key = hashlib.sha256(f"{seed} {prompt} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    return torch.empty(size).exponential_(generator=generator)


def _decode(
    view: View, batch: Batch, steps: int, ends: list[int], choose: Callable[[Tensor, int], Tensor]
) -> Trajectory:
    device = batch.ids_BT.device
    stop, asks = torch.tensor(ends, device=device), steps_unseen(device)
    alive_B = torch.ones(len(batch.ids_BT), dtype=torch.bool, device=device)
    tokens, scored, states = [], [], []
    with running(view) as model, hidden_states(view, lambda h_BTD: h_BTD[:, -1]) as seen, ExitStack() as stack:
        reader = reader_of(model, lambda: seen.final_ND, steps)  # by how the model attends of itself
        stack.callback(reader.close)
        stack.enter_context(attending_by_step(configs_of(model)))
        while len(tokens) < steps and (len(tokens) % asks or alive_B.any()):
            logits_BV, h_BD = reader.then(tokens[-1]) if tokens else reader.first(batch.ids_BT, batch.mask_BT)
            tokens.append(choose(logits_BV, len(tokens)))
            scored.append(alive_B)
            states.append(h_BD.clone())
            alive_B = alive_B & ~torch.isin(tokens[-1], stop)
    scored_BS = torch.stack(scored, 1)
    read = int(scored_BS.any(0).sum())  # steps beyond were taken before it was asked whether any text goes on
    scored_BS, tokens_BS = scored_BS[:, :read], torch.stack(tokens[:read], 1)
    return Trajectory(batch, tokens_BS, scored_BS, torch.stack(states[:read], 1)[scored_BS])


def given(rows: list[list[int]], first: int, device: torch.device, *, starts: list[int] | None = None) -> Trajectory:
    """Texts as they are; each token from `starts` on is scored, by default each after the first one.

    `first`: the number of the first text in the whole list.
    """
    starts = starts or [1] * len(rows)
    ends = [row[start:] for row, start in zip(rows, starts, strict=True)]
    length = max(map(len, ends))
    tokens = [end + [0] * (length - len(end)) for end in ends]  # causal: what stands behind is not read
    scored = [[True] * len(end) + [False] * (length - len(end)) for end in ends]
    batch = pad(first, [row[:start] for row, start in zip(rows, starts, strict=True)], device)
    return Trajectory(
        batch, torch.tensor(tokens, device=device), torch.tensor(scored, device=device), torch.empty(0, device=device)
    )


def whole(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """(ids_BT, mask_BT) of prompt and trajectory, less its last token: no further one is predicted from it."""
    batch, tokens_BS = trajectory.batch, trajectory.tokens_BS
    ids_BT = torch.cat([batch.ids_BT, tokens_BS[:, :-1]], 1)
    return ids_BT, torch.cat([batch.mask_BT, torch.ones_like(tokens_BS[:, :-1])], 1)


def marked(trajectory: Trajectory, mark_BS: Tensor) -> Tensor:
    """The columns of `whole` from which the tokens marked are predicted, as a mask (B, T)."""
    before = trajectory.batch.ids_BT.shape[1] - 1  # the last token of the prompt predicts the first of the trajectory
    return torch.cat([mark_BS.new_zeros(len(mark_BS), before), mark_BS], 1)


def rows_of(mark_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes the marked rows out of a (B, T, D), text by text; where they are is asked once."""
    at_N = mark_BT.flatten().nonzero().squeeze(-1)
    return lambda h_BTD: h_BTD.flatten(0, 1)[at_N]


def thinned(mark_BS: Tensor, count: int) -> Tensor:
    """At most `count` of the positions marked, evenly spread."""
    places = mark_BS.flatten().nonzero().squeeze(-1)
    if len(places) <= count:
        return mark_BS
    chosen = places[torch.linspace(0, len(places) - 1, count, dtype=torch.float64).round().long().to(places.device)]
    return torch.zeros_like(mark_BS.flatten()).index_fill_(0, chosen, True).view_as(mark_BS)


def along(view: View, trajectory: Trajectory, *, blocks_BS: Tensor | None = None) -> States:
    """The view's states at each scored position of any view's trajectory, by one full forward without a cache.

    `blocks_BS`: the positions at which states of the blocks are kept too.
    """
    ids_BT, mask_BT = whole(trajectory)
    final = rows_of(marked(trajectory, trajectory.scored_BS))
    of_blocks = None if blocks_BS is None else rows_of(marked(trajectory, blocks_BS))
    with running(view) as model, hidden_states(view, final, of_blocks=of_blocks) as seen:
        model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions(mask_BT), use_cache=False, logits_to_keep=1
        )
    return seen
