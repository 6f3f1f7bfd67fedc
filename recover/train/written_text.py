"""Text that models write for a recovery, after prompts, round after round.

train/data/dense-<fingerprint>.jsonl   a line for each chunk: its number, and [prompt, ids] of each text
train/pruned_text/1-000032.json   of source 1, written before step 33: [row, prompt, ids as trained on], what is owed

The dense model's is saved as it is written. The pruned model writes while it is trained, for the steps that come next:
on-policy distillation. What is learnt from the dense model's text is learnt in the dense model's contexts. When the
pruned model writes, it reads its own, errors and all; here it is taught what the dense model would do there (Agarwal et
al., GKD, arXiv 2306.13649). Texts are written for `every` steps at once, by the model as it is before the first of
them: so they are at most `every - 1` steps old.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.artifacts import append_jsonl, read_json, read_jsonl, write_json
from recover.base.errors import ArtifactError, DataError
from recover.config.recipe import DenseText, PrunedText, Sampling, Train
from recover.distill.distiller import Batch
from recover.maths.repeats import loop
from recover.models.stored_weights import each_weight
from recover.text.generate import context_of, generate
from recover.text.prompts import Prompt, encode_prompt
from recover.text.read import Row
from recover.train.checkpoints import PRUNED_TEXT, discard_texts
from recover.train.sources import Collate, Sample, SampleRow, read_prompts, say_left_out

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recover.models.twin import Twin

CHUNK_BATCHES = 8  # batches that are written, and saved, at a time


class DenseWriter:
    """Text that the dense model writes from prompts, round after round, each round with other random draws."""

    def __init__(
        self, source: DenseText, cfg: Train, twin: Twin, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path
    ) -> None:
        self.source, self.cfg, self.twin, self.tokenizer, self.seed = source, cfg, twin, tokenizer, seed
        self.prompts = fitting_prompts(source, cfg.length, tokenizer, context_of(twin.model))
        self.path = folder / f"dense-{self._fingerprint()}.jsonl"

    def write(self, budget: int) -> list[Sample]:
        """Samples with at least `budget` scored tokens; what an earlier call saved is read, not written again."""
        samples: list[Sample] = []
        tokens = chunk = 0
        saved = self._saved()
        while tokens < budget:
            if self._exhausted(len(samples)):
                return repeated(samples, tokens, budget, self.source.prompts, self.cfg.loss.scored)
            if chunk < len(saved):
                rows = saved[chunk]["rows"]
            else:
                title = f"dense model writes ({tokens:,} of {budget:,} tokens)"
                rows = self._write_chunk(self._next_prompts(len(samples), tokens, budget), chunk, title)
            for row in rows:
                samples.append(self._sample(*row))
                tokens += samples[-1].scored(self.cfg.loss.scored)
                if tokens >= budget:
                    break  # a large batch may have written far more than was asked for
            chunk += 1
        return samples

    def first_batch(self) -> list[Sample]:
        """What `write` begins with."""
        saved = self._saved()
        rows = saved[0]["rows"] if saved else self._write_chunk(self._next_prompts(0, 0, 1), 0, "dense model writes")
        return [self._sample(*row) for row in rows]

    def _saved(self) -> list[Any]:
        return dist.on_main(lambda: read_jsonl(self.path) if self.path.exists() else [])

    def _exhausted(self, written: int) -> bool:
        """Greedy text is the same in every round, so there is only one."""
        return self.source.temperature == 0 and written >= len(self.prompts)

    def _next_prompts(self, written: int, tokens: int, budget: int) -> list[Row]:
        """The next prompts in the endless row of rounds: as many as the budget seems to need, a few batches at most."""
        size = self.source.batch_size
        if written:
            size = min(CHUNK_BATCHES * size, max(1, round((budget - tokens) * written / tokens)))
        chosen = in_rounds(self.prompts, written, size, self.seed)
        return chosen[: len(self.prompts) - written] if self.source.temperature == 0 else chosen

    def _write_chunk(self, prompts: list[Row], chunk: int, title: str) -> list[list[Any]]:
        """[prompt, ids] of each prompt, written by all processes together and saved by the main one."""
        texts = [row.value["prompt"] for row in prompts]
        with self.twin.dense() as dense:
            written = write_together(dense, self.tokenizer, texts, self.source, (self.seed, chunk), title)
        rows = [[text, ids] for text, ids in zip(texts, written, strict=True)]
        dist.on_main(lambda: append_jsonl(self.path, {"chunk": chunk, "rows": rows}))
        return rows

    def _sample(self, prompt: Prompt, ids: list[int]) -> Sample:
        """The ids that were generated, not their text tokenised again: the two often differ."""
        return answered(self._encode(prompt), ids).cut(self.cfg.length)

    def _encode(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, chat=self.source.chat)

    def _fingerprint(self) -> str:
        """Of all that the text depends on, the dense weights among it."""
        described = {
            "source": self.source.model_dump(
                mode="json", exclude={"share", "prompts", "subset", "split", "column", "strict"}
            ),
            "prompts": [self._encode(row.value["prompt"]) for row in self.prompts],
            "seed": self.seed,
            "weights": weights_fingerprint(self.twin),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def repeated(samples: list[Sample], tokens: int, budget: int, name: str, scored: str) -> list[Sample]:
    """The samples again and again until `budget` scored tokens, with a warning if that is more than once."""
    if tokens < budget:
        console.warn(
            f"{name}: holds {tokens:,} tokens to learn, its share is {budget:,}: read {budget / tokens:.1f} times over"
        )
    once = len(samples)
    while tokens < budget:
        sample = samples[len(samples) % once]
        samples.append(sample)
        tokens += sample.scored(scored)
    return samples


def weights_fingerprint(twin: Twin) -> str:
    """Hash of names, shapes and some values of every dense weight: tells models apart without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in each_weight(twin.base):
        if not parameter.requires_grad:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu().clone()
            plain = name.replace(".base_layer", "").replace(".original_module", "")  # the same with adapters on it
            digest.update(f"{plain}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def fitting_prompts(
    source: DenseText | PrunedText, length: int, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[Row]:
    """The source's prompts, each of which leaves room for an answer within `length` tokens.

    And for one of `source.max_new_tokens` within the model's `context`, where that is known. Rows without a prompt, or
    with one that is too long, are left out and counted; `source.strict` refuses them, and so do lengths that more than
    half of the prompts do not fit.

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
        if found >= length:
            too_long.append(
                f"{row.where}: the prompt has {found} tokens, which leaves none of train.length {length} for an "
                "answer: shorten it or raise train.length"
            )
        elif context is not None and found + source.max_new_tokens > context:
            too_long.append(
                f"{row.where}: the prompt has {found} tokens; with max_new_tokens {source.max_new_tokens} of the "
                f"source that exceeds the model's context of {context}: lower it, or shorten the prompt"
            )
        else:
            prompts.append(row)
            continue
        if source.strict:
            raise DataError(too_long[0])
    if len(too_long) > len(prompts):
        count = len(too_long) + len(prompts)
        raise DataError(f"{source.prompts}: {len(too_long):,} of {count:,} prompts are too long; {too_long[0]}")
    say_left_out(source.prompts, too_long)
    return prompts


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


class Numbers(TypedDict):
    """A batch whose text may not be written yet: the numbers of its rows."""

    numbers: Tensor


class Fitted(TypedDict):
    """Texts that fit the tokens planned: (row, prompt, ids as trained on); `owed`: tokens that are left over."""

    rows: list[tuple[int, Prompt, list[int]]]
    tokens: int
    tokens_written: int
    owed: int


class Written(Fitted):
    """A file of `pruned_text`: what the pruned model of training `fingerprint` wrote before step `step` + 1.

    `longest`: tokens an answer may have; `ended`, `looping`: shares of the answers that end by themselves, in a loop.
    """

    fingerprint: str
    step: int
    longest: int
    ended: float
    looping: float
    seconds: float


Write = Callable[[Sequence[str], PrunedText, tuple[int, ...], str], list[list[int]]]
"""What the pruned model, as it is now, writes after prompts: as `written_text.write_together`."""

SHORT = 0.02  # a smaller part of the tokens that is missing in the end is not worth a warning


class OnPolicy:
    """Puts the pruned model's own text into the rows of `build_dataset` that hold its place, step by step.

    How many rows there are, and so steps and learning rates, is as planned; all texts up to a step hold at most as many
    scored tokens as was planned up to there: else the longest are cut. A stopped training reads what it had written
    again, one that went back to a checkpoint writes anew what came after it.
    """

    def __init__(
        self,
        cfg: Train,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        seed: int,
        folder: Path,
        fingerprint: str,
        collate: Collate,
        context: int | None = None,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.writers: list[int] = list(rows["writer"])
        self.sources = {
            number: _OwnText(source, number, cfg, tokenizer, rows, seed, folder / PRUNED_TEXT, fingerprint, context)
            for number, source in enumerate(cfg.data)
            if isinstance(source, PrunedText)
        }

    @staticmethod
    def numbers(rows: Sequence[SampleRow]) -> Numbers:
        """The collator to fetch batches with: loaders fetch ahead, when the text is not yet written."""
        return {"numbers": torch.tensor([row.get("number") for row in rows])}

    def fill(self, batches: Sequence[Numbers], step: int, write: Write) -> list[Batch]:
        """The batches that the numbers stand for, when `step` steps are made. All processes must call it.

        What `write` raises goes through: nothing of the step is done then.
        """
        for source in self.sources.values():
            source.reach(step, write)
        return [self.collate([self._row(number) for number in batch["numbers"].tolist()]) for batch in batches]

    def _row(self, number: int) -> SampleRow:
        writer = self.writers[number]
        if writer < 0:
            return cast(SampleRow, self.rows[number])
        sample = self.sources[writer].texts[number]
        return {"input_ids": sample.ids, "completion_mask": sample.mask}


class _OwnText:
    """What one source has the pruned model write; `texts` holds those of the present window, by row."""

    def __init__(
        self,
        source: PrunedText,
        number: int,
        cfg: Train,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        seed: int,
        folder: Path,
        fingerprint: str,
        context: int | None,
    ) -> None:
        self.source, self.number, self.cfg, self.tokenizer = source, number, cfg, tokenizer
        self.seed, self.folder, self.fingerprint = seed + number, folder, fingerprint
        self.prompts = fitting_prompts(source, cfg.length, tokenizer, context)
        # In training order: the texts that were planned for.
        self.planned = {
            row: Sample(rows[row]["input_ids"], rows[row]["completion_mask"])
            for row, writer in enumerate(rows["writer"])
            if writer == number
        }
        self.steps = len(rows) // cfg.batch_size
        self.first = min(self.planned, default=0) // cfg.batch_size
        self.window: int | None = None
        self.texts: dict[int, Sample] = {}

    def reach(self, step: int, write: Write) -> None:
        """Have the texts of the window that `step` lies in: those at hand, those saved, or new ones."""
        window = (step - self.first) // self.source.every
        if window == self.window:
            return
        if self.window is not None and window < self.window:
            dist.on_main(lambda: self._forget_after(window))
        places = self._places(window)
        rows = self._saved_or_written(window, places, step, write)["rows"] if places else []
        self.window = window
        self.texts = {row: self._sample(prompt, ids) for row, prompt, ids in rows}

    def _saved_or_written(self, window: int, places: list[int], step: int, write: Write) -> Written:
        return dist.on_main(lambda: self._saved(window)) or self._write(window, places, step, write)

    def _places(self, window: int) -> list[int]:
        """Rows of the window that hold a place."""
        start = (self.first + window * self.source.every) * self.cfg.batch_size
        end = start + self.source.every * self.cfg.batch_size
        return [row for row in self.planned if start <= row < end]

    def _write(self, window: int, places: list[int], step: int, write: Write) -> Written:
        began = time.perf_counter()
        before = sum(row < places[0] for row in self.planned)
        rows = in_rounds(self.prompts, before, len(places), self.seed)
        prompts = [row.value["prompt"] for row in rows]
        longest = self.source.longest_at(step / self.steps)
        source = self.source.model_copy(update={"max_new_tokens": longest})
        title = f"pruned model writes for steps {step + 1}-{step + self.source.every}"
        written = write(prompts, source, (self.seed, window), title)
        ended = sum(len(ids) < longest for ids in written)
        looping = sum(loop(ids) is not None for ids in written)
        if self.source.cut_loops:
            written = [without_loop(ids) for ids in written]
        record: Written = {
            "fingerprint": self.fingerprint,
            "step": step,
            "longest": longest,
            "ended": ended / len(written),
            "looping": looping / len(written),
            "seconds": time.perf_counter() - began,
            **self._fitted(window, places, prompts, written),
        }
        dist.on_main(lambda: write_json(self._path(window), record))
        if places[-1] == max(self.planned):
            self._say_what_is_missing(record["owed"])
        return record

    def _fitted(self, window: int, places: list[int], prompts: list[Prompt], written: list[list[int]]) -> Fitted:
        """The texts cut to the tokens planned up to here, long ones where such were planned, and tokens left over."""
        scored = self.cfg.loss.scored
        earlier = dist.on_main(lambda: self._saved(window - 1)) if window > 0 else None
        budget = sum(self.planned[row].scored(scored) for row in places) + (earlier["owed"] if earlier else 0)
        samples = [self._sample(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]
        samples = cut_to(samples, budget, scored)
        by_length = sorted(range(len(samples)), key=lambda index: len(samples[index].ids))
        by_place = sorted(places, key=lambda row: len(self.planned[row].ids))
        rows = [
            (row, prompts[index], written[index][: sum(samples[index].mask)])
            for row, index in zip(by_place, by_length, strict=True)
        ]
        tokens = sum(sample.scored(scored) for sample in samples)
        return {"rows": rows, "tokens": tokens, "tokens_written": sum(map(len, written)), "owed": budget - tokens}

    def _sample(self, prompt: Prompt, ids: list[int]) -> Sample:
        return answered(encode_prompt(self.tokenizer, prompt, chat=self.source.chat), ids).cut(self.cfg.length)

    def _say_what_is_missing(self, owed: int) -> None:
        planned = sum(sample.scored(self.cfg.loss.scored) for sample in self.planned.values())
        if owed > SHORT * planned:
            console.warn(
                f"train.data.{self.number}: the pruned model's texts were shorter than the dense model's: {owed:,} "
                f"of {planned:,} tokens are missing"
            )

    def _path(self, window: int) -> Path:
        return self.folder / f"{self.number}-{self.first + window * self.source.every:06d}.json"

    def _saved(self, window: int) -> Written | None:
        path = self._path(window)
        try:
            record: Written | None = read_json(path) if path.exists() else None
        except ArtifactError as error:
            console.warn(f"{error}; the model as it is now writes that text")
            return None
        return record if record is not None and record["fingerprint"] == self.fingerprint else None

    def _forget_after(self, window: int) -> None:
        """What was written after a moment that was gone back to was written by another model."""
        last = self._path(max(window, 0)).name if window >= 0 else ""
        discard_texts(self.folder, str(self.number), after=last)


def without_loop(ids: list[int]) -> list[int]:
    """A text that ends in a loop, up to the first token of the second turn: the one by which it goes round again.

    Turns after that are read off the ones before, by the dense model too, and would be most of what is learnt.
    """
    found = loop(ids)
    return ids if found is None else ids[: sum(found) + 1]


def cut_to(samples: Sequence[Sample], budget: int, scored: str) -> list[Sample]:
    """The samples with the longest answers cut, all to one length, so that at most `budget` tokens are scored.

    A token of each answer is left, even where that is more than `budget`.
    """

    def cut(longest: int) -> list[Sample]:
        return [sample.cut(sample.mask.count(0) + longest) for sample in samples]

    limits = range(1, max(sum(sample.mask) for sample in samples) + 1)
    fitting = bisect_right(limits, budget, key=lambda limit: sum(sample.scored(scored) for sample in cut(limit)))
    return cut(max(fitting, 1))
