"""Text that the pruned model writes while it is trained, for the steps that come next: on-policy distillation.

What is learnt from the dense model's text is learnt in the dense model's contexts. When the pruned model writes, it
reads its own, errors and all; here it is taught what the dense model would do there (Agarwal et al., GKD, arXiv
2306.13649). Texts are written for `every` steps at once, by the model as it is before the first of them: so they are
at most `every - 1` steps old. Files, one for each writing:

train/pruned_text/1-000032.json   of source 1, written before step 33: [row, prompt, ids as trained on], what is owed
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.artifacts import read_json, write_json
from recover.base.errors import ArtifactError
from recover.config.recipe import PrunedText, Train
from recover.distill.distiller import Batch
from recover.maths.collapse import loop
from recover.text.prompts import Prompt, encode_prompt
from recover.train.checkpoints import PRUNED_TEXT, discard_texts
from recover.train.sources import Collate, Sample, SampleRow
from recover.train.written_text import answered, fitting_prompts, in_rounds

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
