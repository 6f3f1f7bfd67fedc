"""Texts decoded in slots: a row that ends costs no more, or makes room for the next; a GPU replays a recorded step.

The reference is transformers' own `generate` (`plain` in generate.py): the same ids, in another order of work.

Legend: B rows (slots), T tokens of a prompt, K columns of the cache, V vocabulary, S tokens to write, G rows of a
group, E end tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recover.base import console, zero
from recover.config.recipe import Sampling
from recover.kernels import fused
from recover.kernels.recording import record
from recover.models import kv_cache
from recover.models.step_attention import attending_by_step, configs_of
from recover.text.drawing import Draw, greedy, keys, nucleus
from recover.text.kv import Slots, masks, read_on
from recover.text.prompts import batches_by_length, right_pad
from recover.text.stepping import stepping
from recover.text.stops import Stops

REFILL = 8  # a group of prompts is read when 1/8 of the rows are free: reading few at a time is slow
PROMPT_TOKENS_AT_ONCE = 2**16  # of padded prompts read in one pass
RECORDING = 32  # steps; to record one takes as long
VISIBLE_STEP = 256  # columns; a graph sees a multiple of it, an eager step what it needs


@dataclass(frozen=True)
class Writing:
    """How texts are written: at most `limit` tokens each, up to one of `ends`, `rows` at a time; greedy or sampled.

    Sampled texts follow `seed` and the text's number: `numbers` of the prompts, by default their places. A text also
    ends with the token that completes one of `stops`.
    """

    limit: int
    ends: tuple[int, ...]
    pad: int
    rows: int
    sampling: Sampling | None = None
    seed: int = 0
    numbers: tuple[int, ...] | None = None
    stops: Stops | None = None

    @property
    def draw(self) -> Draw:
        """What chooses the next token."""
        return greedy if self.sampling is None else nucleus(self.sampling.temperature, self.sampling.top_p)


def refills(device: torch.device) -> bool:
    """Whether rows that ended are filled again at once. A step on a GPU takes as long with few rows as with many; on a
    CPU time goes with the rows, so there they are given up, and the next prompts wait until all have ended."""
    return device.type == "cuda"


def steps_unseen(device: torch.device) -> int:
    """Steps taken before it is asked which rows ended: to ask a GPU, one has to wait for it."""
    return 8 if device.type == "cuda" else 1


def write(
    model: PreTrainedModel, prompts_ids: Sequence[Sequence[int]], how: Writing
) -> Iterator[tuple[int, list[int]]]:
    """(item, ids written, the end token with them) of each prompt, as texts end; longest prompts first.

    Ids do not depend on `rows`, nor on what stands in the other rows (up to rounding at ties).
    """
    if prompts_ids:
        yield from _Writer(model, prompts_ids, how).texts()


class _Writer:
    """The slots, what stands in each, and the prompts that wait."""

    def __init__(self, model: PreTrainedModel, prompts_ids: Sequence[Sequence[int]], how: Writing) -> None:
        self.model, self.prompts_ids, self.how, self.device = model, prompts_ids, how, model.device
        self.waiting = deque(batches_by_length([len(ids) for ids in prompts_ids], len(prompts_ids))[0])
        self.configs = configs_of(model)
        self.end_E = torch.tensor(how.ends, dtype=torch.long, device=self.device)
        self.stop_AV = how.stops.to(self.device) if how.stops else None
        self.recorder = _Recorder(self._step) if may_record(model) else None
        # A kernel reads of each row what the row has; else all rows are read up to the longest.
        self.reads_rows = bool(self.configs) and fused.available(self.device) and model.dtype in fused.DTYPES
        self._open()

    def _open(self) -> None:
        """Empty slots for the prompts that wait, the first of which is the longest."""
        rows, longest = min(self.how.rows, len(self.waiting)), len(self.prompts_ids[self.waiting[0]])
        self.items: list[int | None] = [None] * rows
        self.steps = 0  # so far
        self.reach: list[int] = [0] * rows  # prompt length less the steps before it: + steps, a bound of the position
        self.slots = Slots(rows, longest + self.how.limit, self.device)
        self.token_B = torch.full((rows,), self.how.pad, device=self.device)
        self.count_B = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.done_B = torch.ones(rows, dtype=torch.bool, device=self.device)
        self.key_B2 = torch.zeros(rows, 2, dtype=torch.long, device=self.device)
        self.state_B = torch.zeros(rows, dtype=torch.long, device=self.device)  # of the strings that end a text
        # The last column is a bin.
        self.written_BS = torch.full((rows, self.how.limit + 1), self.how.pad, device=self.device)

    def texts(self) -> Iterator[tuple[int, list[int]]]:
        try:
            with stepping(self.model):
                yield from self._texts()
        finally:
            if self.recorder:
                # Now, and not when the collector comes by, which may be in the middle of another writer's recording.
                self.recorder.forget()
                self.recorder = None  # which knows a method of this: the cache would wait for the collector

    def _texts(self) -> Iterator[tuple[int, list[int]]]:
        ended: list[tuple[int, list[int]]] = []
        while True:
            live = sum(item is not None for item in self.items)
            free = len(self.items) - live
            if live == 0 and not self.waiting:
                yield from ended
                return
            if live == 0 and not refills(self.device):
                self._open()
                self._read_group(len(self.items))
            elif self.waiting and refills(self.device) and free * REFILL >= len(self.items):
                self._read_group(free)
            else:
                self._shrink(live)
                self._advance()
            # The device has work to do while the last texts are taken.
            yield from ended
            ended = list(self._ended())

    def _read_group(self, free: int) -> None:
        """Read as many waiting prompts as there are free slots and memory, and write their first token."""
        longest = len(self.prompts_ids[self.waiting[0]])
        count = min(free, len(self.waiting), max(1, PROMPT_TOKENS_AT_ONCE // longest))
        group = [self.waiting.popleft() for _ in range(count)]
        slots = [slot for slot, item in enumerate(self.items) if item is None][:count]
        for slot, item in zip(slots, group, strict=True):
            self.items[slot], self.reach[slot] = item, len(self.prompts_ids[item]) - self.steps
        # A prompt that several texts begin with is read once.
        prompts = list(dict.fromkeys(tuple(self.prompts_ids[item]) for item in group))
        place = {prompt: number for number, prompt in enumerate(prompts)}
        length_G = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        logits_GV, cache = read_on(self.model, right_pad(prompts, self.how.pad, self.device), length_G)
        if len(prompts) < len(group):
            index_G = torch.tensor([place[tuple(self.prompts_ids[item])] for item in group], device=self.device)
            cache, logits_GV, length_G = cache.rows(index_G), logits_GV[index_G], length_G[index_G]
        slot_G = torch.tensor(slots, device=self.device)
        self.slots.fill(slot_G, cache)
        numbers = self.how.numbers or range(len(self.prompts_ids))
        key_G2 = keys(self.how.seed, [numbers[item] for item in group], self.device)
        token_G = self.how.draw(logits_GV, key_G2, torch.zeros_like(length_G))
        self.slots.position_B[slot_G], self.key_B2[slot_G] = length_G, key_G2
        self.token_B[slot_G], self.written_BS[slot_G, 0], self.count_B[slot_G] = token_G, token_G, 1
        state_G = self._moved(torch.zeros_like(token_G), token_G)
        self.state_B[slot_G] = state_G
        self.done_B[slot_G] = self._ends(token_G, state_G) | (self.how.limit == 1)

    def _shrink(self, live: int) -> None:
        """Give up rows that nothing will fill any more; where that means to record anew, more rarely."""
        to_fill = self.waiting and refills(self.device)
        if to_fill or live * (4 if self.recorder else 4 / 3) > len(self.items):
            return
        if self.recorder and self._left() < RECORDING:
            return
        slots = [slot for slot, item in enumerate(self.items) if item is not None]
        slot_G = torch.tensor(slots, device=self.device)
        self.slots.keep(slot_G)
        self.items, self.reach = [self.items[slot] for slot in slots], [self.reach[slot] for slot in slots]
        self.token_B, self.count_B, self.done_B = self.token_B[slot_G], self.count_B[slot_G], self.done_B[slot_G]
        self.written_BS, self.key_B2 = self.written_BS[slot_G], self.key_B2[slot_G]
        self.state_B = self.state_B[slot_G]
        if self.recorder:
            self.recorder.forget()

    def _left(self) -> int:
        """Steps that texts may still take, at most."""
        lengths = [bound + self.steps - len(self.prompts_ids[item]) for item, bound in self._standing()]
        return self.how.limit - 1 - min(lengths)

    def _standing(self) -> list[tuple[int, int]]:
        """Items that are being written, each with its `reach`."""
        return [(item, bound) for item, bound in zip(self.items, self.reach, strict=True) if item is not None]

    def _advance(self) -> None:
        steps = steps_unseen(self.device)
        self.steps += steps
        needed = min(max(bound for _, bound in self._standing()) + self.steps, self.slots.columns)
        if self.recorder is None:
            self.slots.visible = needed
            for _ in range(steps):
                self._step()
        else:
            if not self.reads_rows:
                self.slots.visible = min(-(-needed // VISIBLE_STEP) * VISIBLE_STEP, self.slots.columns)
            self.recorder.run(self.slots.visible, steps)

    def _step(self) -> None:
        """One token more in every row that is not done; done rows stand still, whatever is computed for them."""
        at_B1 = self.slots.position_B[:, None]
        key_at_1K = torch.arange(self.slots.visible, device=self.device)[None]
        with attending_by_step(self.configs, self.slots.position_B if self.reads_rows else None):
            logits_BV = self.model(
                input_ids=self.token_B[:, None],
                attention_mask=masks(self.model, at_B1, key_at_1K),
                position_ids=at_B1,
                use_cache=True,
                logits_to_keep=1,
                **kv_cache.taking(self.model, self.slots),
            ).logits[:, -1]
        token_B = self.how.draw(logits_BV, self.key_B2, self.count_B).masked_fill(self.done_B, self.how.pad)
        bin_B = self.count_B.masked_fill(self.done_B, self.how.limit)
        self.written_BS.scatter_(1, bin_B[:, None], token_B[:, None])
        self.count_B += ~self.done_B
        self.slots.position_B += ~self.done_B
        if self.stop_AV is not None:
            self.state_B.copy_(self._moved(self.state_B, token_B))
        self.done_B |= self._ends(token_B, self.state_B) | (self.count_B >= self.how.limit)
        self.slots.position_B.clamp_(max=self.slots.columns - 1)
        self.token_B.copy_(token_B)

    def _moved(self, state_B: Tensor, token_B: Tensor) -> Tensor:
        """How far rows have come in the strings that end a text, one token later."""
        return state_B if self.stop_AV is None else self.stop_AV[state_B, token_B].long()

    def _ends(self, token_B: Tensor, state_B: Tensor) -> Tensor:
        ends_B = (token_B[:, None] == self.end_E).any(-1)
        return ends_B if self.how.stops is None else ends_B | (state_B == self.how.stops.found)

    def _ended(self) -> Iterator[tuple[int, list[int]]]:
        done, items = self.done_B.tolist(), list(self.items)
        slots = [slot for slot, item in enumerate(items) if item is not None and done[slot]]
        if not slots:
            return
        counts, rows = self.count_B[slots].tolist(), self.written_BS[slots].tolist()
        for slot, count, row in zip(slots, counts, rows, strict=True):
            item, self.items[slot] = items[slot], None
            assert item is not None
            yield item, row[:count]


def may_record(model: PreTrainedModel) -> bool:
    """Whether a step may be replayed as a CUDA graph: on a GPU, with all weights at home (not dealt out by ZeRO-3)."""
    return model.device.type == "cuda" and not any(map(zero.dealt_out, model.parameters()))


class _Recorder:
    """Replays one step for each width of the cache that is seen: small models are then bound by work, not by Python."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # one memory for all graphs: none needs what another left there
        self.records = True

    def run(self, visible: int, steps: int) -> None:
        if self.records and visible not in self.graphs:
            self._record(visible)
            steps -= 1
        for _ in range(steps):
            if self.records:
                self.graphs[visible].replay()
            else:
                self.step()

    def _record(self, visible: int) -> None:
        """Take one step for real, which sets up what a first run sets up, and record the next without taking it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            self.graphs[visible], _ = record(self.step, self.pool)
        except RuntimeError as error:
            console.warn(f"decoding goes on without a CUDA graph, several times slower: {str(error).splitlines()[0]}")
            self.records = False

    def forget(self) -> None:
        """The rows have moved, or are done: nothing recorded holds. In new memory, should there be a next recording, as
        a pool that no graph uses may not be used again."""
        self.graphs.clear()
        self.pool = None
