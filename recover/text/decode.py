"""Texts decoded in slots: a row that ends costs no more, or makes room for the next; a GPU replays a recorded step.

The reference is transformers' own `generate` (`plain` in generate.py): the same ids, in another order of work.

The next token is the likeliest, or drawn by numbers that only its text and its place in it decide. A draw from p is the
token with the largest p / e, e ~ Exp(1) for each (the exponential race). The e are a hash of the text's key, the
token's place in the text, and the token. So a text that is drawn depends neither on the rows beside it nor on the
device (up to rounding at ties), nothing is asked of the host, and nothing has to be sorted: where p is cut to a
nucleus, the winner is the first winner that stands in it, among ever likelier tokens.

Strings that end a text (`Stops`) are found while it is written, by a table that a GPU reads, token after token. A text
is cut by `cut`, on the text itself; the table only ends the writing in time. It follows, over the characters of each
token, how much of which string the text ends with (Knuth, Morris and Pratt, all strings at once). Where a tokenizer
writes a character in several tokens, a string with that character is not seen by the table: such a text goes on to its
end or limit, and is cut all the same. With `unless` (a code fence), a text that holds that before any of the strings is
neither ended nor cut by them.

Legend: B rows (slots), T tokens of a prompt, K columns of the cache, V vocabulary, S tokens to write, G rows of a
group, E end tokens, A states of the table.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recover.base import console, zero
from recover.base.errors import DataError, ModelError
from recover.config.recipe import Sampling
from recover.config.tasks import STOP_CHARACTERS
from recover.kernels import fused
from recover.kernels.fused import record
from recover.models.arch import taking_cache
from recover.models.attention import attending_by_step, configs_of
from recover.models.stored_weights import comes_and_goes
from recover.text.prompts import batches_by_length, right_pad
from recover.text.stepping import Slots, fits, masks, read_on, stepping

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

    Raises ModelError for a model that these caches and masks do not serve (`stepping.fits`).
    """
    if not fits(model):
        raise ModelError(
            f"{type(model).__name__} does not write in slots: it keeps a state, or attends in a way of its own. "
            "Expected softmax attention in every block, in full or in a sliding window: call generate.plain"
        )
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
        self.recorder = Recorder(self._step) if may_record(model) else None
        if self.device.type == "cuda" and any(map(comes_and_goes, model.parameters())):
            _say_no_graphs()
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
                **taking_cache(self.model, self.slots),
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


@functools.cache  # once
def _say_no_graphs() -> None:
    console.say(
        "[dim]texts are written kernel by kernel, and each token reads every block: the weights come and go "
        "(model.offload, model.load_in, train.shard_weights). The more texts at once, the less each costs[/dim]"
    )


def may_record(model: PreTrainedModel) -> bool:
    """Whether a step may be replayed as a CUDA graph: on a GPU, where all weights stay (ZeRO-3 deals them out)."""
    return model.device.type == "cuda" and not any(
        zero.dealt_out(parameter) or comes_and_goes(parameter) for parameter in model.parameters()
    )


class Recorder:
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


Draw = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits_BV, key_B2, place_B -> token_B

GOLDEN, OTHER, WORD = 0x9E3779B1, 0x85EBCA77, 0xFFFFFFFF


def greedy(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor) -> Tensor:
    """The likeliest token, of equal ones the first."""
    return logits_BV.argmax(-1)


def nucleus(temperature: float, top_p: float) -> Draw:
    """Draws from softmax(z / temperature), cut to the tokens before which likelier ones hold less than `top_p` of it.

    So to the fewest tokens that hold `top_p`, and those as likely as the last of them.
    """

    def draw(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor) -> Tensor:
        if fused.available(logits_BV.device) and logits_BV.dtype in fused.DTYPES:
            return fused.kernels().draw(logits_BV, key_B2, place_B, temperature, top_p)
        return drawn(logits_BV, key_B2, place_B, temperature, top_p)

    return draw


def drawn(logits_BV: Tensor, key_B2: Tensor, place_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """token_B; `key_B2`: two words of 32 bits in int64, `place_B`: of the token in its text."""
    z_BV = logits_BV.float() * (1.0 / temperature)
    score_BV = z_BV - waits(key_B2, place_B, z_BV.shape[1]).log()
    if top_p < 1:
        sorted_BV = z_BV.softmax(-1).sort(-1, descending=True)
        before_BV = sorted_BV.values.cumsum(-1) - sorted_BV.values
        last_B1 = (before_BV < top_p).sum(-1, keepdim=True) - 1
        least_B1 = z_BV.gather(1, sorted_BV.indices.gather(1, last_B1))
        score_BV = score_BV.masked_fill(z_BV < least_B1, float("-inf"))
    return score_BV.argmax(-1)


def waits(key_B2: Tensor, place_B: Tensor, vocabulary: int) -> Tensor:
    """Numbers of the exponential distribution, (B, V) in float32, the same for the same key and place."""
    first_B = _mixed(_mixed((place_B * GOLDEN + key_B2[:, 0]) & WORD) ^ key_B2[:, 1])
    second_B = _mixed((first_B + OTHER) & WORD)
    token_V = torch.arange(vocabulary, device=key_B2.device)
    bits_BV = _mixed(_mixed((token_V * GOLDEN + first_B[:, None]) & WORD) ^ second_B[:, None])
    u_BV = bits_BV.float() * 2.0**-32 + 2.0**-33
    small_BV = u_BV * (1.0 + u_BV * (0.5 + u_BV * 0.33333334))
    return torch.where(u_BV < 1e-3, small_BV, -(1.0 - u_BV).log())


def keys(seed: int, numbers: Sequence[int], device: torch.device) -> Tensor:
    """(B, 2): a key for each of these texts, unlike for unlike numbers and seeds."""
    found = []
    for number in numbers:
        word = _spread(_spread(seed & 0xFFFFFFFFFFFFFFFF) ^ number)
        found.append((word & WORD, word >> 32))
    return torch.tensor(found, dtype=torch.long, device=device).view(-1, 2)


def _mixed(x: Tensor) -> Tensor:
    """32 bits in int64, each of which depends on all of x."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def _spread(word: int) -> int:
    """64 bits, each of which depends on all of the word."""
    whole = 0xFFFFFFFFFFFFFFFF
    word = (word + 0x9E3779B97F4A7C15) & whole
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & whole
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & whole
    return word ^ (word >> 31)


_pieces: WeakKeyDictionary[Any, dict[int, list[str]]] = WeakKeyDictionary()


class Stops:
    """How tokens lead from state to state; 0 is the beginning, `found` the state behind the end of a string."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], vocabulary: int, *, unless: str | None = None) -> None:
        """`unless`: a text that holds this before any of the strings goes on; passed over where a string holds it.

        Raises DataError for an empty string, and for strings that are too long together.
        """
        if not all(strings) or sum(map(len, strings)) > STOP_CHARACTERS:
            raise DataError(
                f"stop: {len(strings)} strings of {sum(map(len, strings))} characters; expected at most "
                f"{STOP_CHARACTERS} characters together, and no empty string"
            )
        self.strings = tuple(strings)
        self.unless = None if unless is None or any(unless in each for each in strings) else unless
        self.table_AV = _table(self.strings, pieces(tokenizer, vocabulary), self.unless)
        self.found = len(self.table_AV) - 1

    def cut(self, text: str) -> str | None:
        """The text up to the first of the strings in it, None if it holds none, or `unless` before them."""
        free = -1 if self.unless is None else text.find(self.unless)
        bound = text if free < 0 else text[: free + len(self.unless or "")]
        places = [place for place in (bound.find(each) for each in self.strings) if place >= 0]
        return text[: min(places)] if places else None

    def ended(self, ids: Sequence[int]) -> list[int]:
        """The ids up to the one that ends the first string, as the table sees it; all of them if none does."""
        state = 0
        for place, token in enumerate(ids):
            state = int(self.table_AV[state, token])
            if state == self.found:
                return list(ids[: place + 1])
        return list(ids)

    def to(self, device: torch.device) -> Tensor:
        """The table, (A, V) of int16."""
        return torch.from_numpy(self.table_AV).to(device)


def pieces(tokenizer: Any, vocabulary: int) -> list[str]:
    """What each token adds to a text that goes on; nothing for special tokens and those that are none.

    Remembered: to decode each token of a large vocabulary takes seconds.
    """
    kept = _pieces.setdefault(tokenizer, {})
    if vocabulary not in kept:
        kept[vocabulary] = _decoded(tokenizer, vocabulary)
    return kept[vocabulary]


def _decoded(tokenizer: Any, vocabulary: int) -> list[str]:
    special, known = set(tokenizer.all_special_ids), len(tokenizer)
    # Behind another token: some tokenizers leave a space out at the beginning of a text.
    anchor = next(token for token in range(known) if token not in special and tokenizer.decode([token]).strip())
    before = tokenizer.decode([anchor])
    plain = [token for token in range(min(known, vocabulary)) if token not in special]
    found = [""] * vocabulary
    texts = tokenizer.batch_decode([[anchor, token] for token in plain], skip_special_tokens=True)
    for token, text in zip(plain, texts, strict=True):
        found[token] = text[len(before) :] if text.startswith(before) else ""
    return found


def _table(strings: Sequence[str], tokens: Sequence[str], unless: str | None) -> np.ndarray:
    """(A, V): the state behind a token, int16."""
    watched = [*strings, *([unless] if unless else [])]
    states = _prefixes(watched)
    number = {prefix: state for state, prefix in enumerate(states)}
    free, found = len(states), len(states) + 1  # neither is left again
    letters = {letter: index for index, letter in enumerate(sorted({each for text in watched for each in text}))}
    other = len(letters)  # every letter that is in no string
    by_letter = np.zeros((found + 1, other + 1), dtype=np.int16)
    by_letter[free], by_letter[found] = free, found
    for prefix, state in number.items():
        for letter, index in letters.items():
            text = prefix + letter
            if any(text.endswith(each) for each in strings):
                by_letter[state, index] = found
            elif unless and text.endswith(unless):
                by_letter[state, index] = free
            else:
                by_letter[state, index] = _longest_end(text, number)
    table_AV = np.tile(np.arange(found + 1, dtype=np.int16)[:, None], (1, len(tokens)))
    longest = max(map(len, tokens), default=0)
    letters_VL = np.full((len(tokens), longest), other, dtype=np.int16)
    lengths_V = np.array([len(token) for token in tokens])
    for index, token in enumerate(tokens):
        letters_VL[index, : len(token)] = [letters.get(letter, other) for letter in token]
    order = np.argsort(-lengths_V, kind="stable")
    for place in range(longest):
        here = order[: int((lengths_V > place).sum())]
        table_AV[:, here] = by_letter[table_AV[:, here], letters_VL[here, place][None]]
    return table_AV


def _prefixes(strings: Sequence[str]) -> list[str]:
    """Beginnings of the strings, the empty one first, none whole."""
    found = {text[:length] for text in strings for length in range(len(text))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _longest_end(text: str, number: dict[str, int]) -> int:
    """The state of the longest end of this text that a string begins with."""
    return next(number[text[start:]] for start in range(len(text) + 1) if text[start:] in number)
