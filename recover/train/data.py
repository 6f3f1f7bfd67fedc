"""The text of a recovery: written by the dense model or given, cut to the token budget, in the order it is trained on.

The whole budget is made of fresh text: an "epoch" of recovery is one part in `epochs` of it, between two
measurements of generation, and no pass over the same text again (unless a given source is too short for its share:
then it repeats, with a warning). Text that the pruned model is to write (`on_policy.py`) has rows that hold its place.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recover import console, dist
from recover.artifacts import append_jsonl, read_jsonl
from recover.errors import DataError
from recover.measure.prompts import encode_prompt
from recover.recipe import DenseText, GivenText, PrunedText, Recover
from recover.train.order import training_order
from recover.train.prompted import answered, in_rounds, write_together
from recover.train.sources import Row, Sample, read_prompts, read_rows, samples_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from recover.models.twin import Twin

CHUNK_BATCHES = 8  # batches that are written, and saved, at a time


def build_dataset(leaf: Recover, twin: Twin, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path) -> Dataset:
    """Rows `input_ids` and `completion_mask` in training order: whole steps, about `leaf.tokens` scored tokens.

    Each source gives its share of the tokens. Where the pruned model is to write, there are two more columns: `number`
    of the row, and `writer`, the source whose text it is to hold (-1: it holds its own). What the dense model writes is
    saved to `folder` as it is written, under a name made from all that it depends on; the same call reads it back and
    goes on from there. Same arguments, same rows.

    Raises:
        DataError: a source cannot be read or holds nothing to learn (by file and line), or there is too little for
            an epoch.
    """
    import datasets

    samples: list[Sample] = []
    writers: list[int] = []
    shares = sum(source.share for source in leaf.data)
    for number, source in enumerate(leaf.data):
        budget = round(leaf.tokens * source.share / shares)
        if isinstance(source, PrunedText):
            samples += _places(source, leaf, twin, tokenizer, seed + number, folder, budget)
        elif isinstance(source, DenseText):
            samples += _Writer(source, leaf, twin, tokenizer, seed + number, folder).write(budget)
        else:
            samples += _given(source, leaf, tokenizer, seed + number, budget)
        writers += [number if isinstance(source, PrunedText) else -1] * (len(samples) - len(writers))
    needed = leaf.batch_size * leaf.epochs
    if len(samples) < needed:
        raise DataError(
            f"recover.tokens: {leaf.tokens:,} tokens make {len(samples)} sequences; {leaf.epochs} epochs of at least "
            f"one step of {leaf.batch_size} need {needed}: raise tokens, or lower batch_size or epochs"
        )
    later = {number: source.start for number, source in enumerate(leaf.data) if isinstance(source, PrunedText)}
    starts = {index: later[number] for index, number in enumerate(writers) if number in later}
    order = training_order([len(sample.ids) for sample in samples], leaf.batch_size, seed, starts)
    columns: dict[str, Any] = {
        "input_ids": [np.asarray(samples[index].ids, dtype=np.int32) for index in order],
        "completion_mask": [np.asarray(samples[index].mask, dtype=np.int8) for index in order],
    }
    if max(writers) >= 0:
        columns |= {"number": list(range(len(order))), "writer": [writers[index] for index in order]}
    return datasets.Dataset.from_dict(columns)


def _places(
    source: PrunedText,
    leaf: Recover,
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    folder: Path,
    budget: int,
) -> list[Sample]:
    """As many samples as the dense model would need for `budget` scored tokens, judged by a first batch of its texts.

    They hold the places of texts that the pruned model has yet to write: how many they are and how long must be known
    before the first step, and the dense model's texts are what its own will come to resemble.
    """
    fields = source.model_dump(exclude={"kind", "start", "every"})
    written = _Writer(DenseText(kind="dense", **fields), leaf, twin, tokenizer, seed, folder).first_batch()
    samples: list[Sample] = []
    tokens = 0
    while tokens < budget:
        samples.append(written[len(samples) % len(written)])
        tokens += samples[-1].scored(leaf.loss.scored)
    return samples


def _given(
    source: GivenText, leaf: Recover, tokenizer: PreTrainedTokenizerBase, seed: int, budget: int
) -> list[Sample]:
    """Samples of a given source, rows in random order, until their scored tokens reach `budget`."""
    rows = read_rows(source.source, source.split)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    samples: list[Sample] = []
    tokens = skipped = 0
    for index in console.track(order, f"reading {source.source}", unit="row"):
        if tokens >= budget:
            break
        found = samples_of(rows[index], source, tokenizer, leaf.length)
        skipped += not found
        samples += found
        tokens += sum(sample.scored(leaf.loss.scored) for sample in found)
    if skipped:
        console.warn(f"{source.source}: {skipped} rows left out: no token to learn within recover.length {leaf.length}")
    if not samples:
        raise DataError(f"{source.source}: no row holds a token to learn within recover.length {leaf.length}")
    return _repeated(samples, tokens, budget, source.source, leaf.loss.scored)


def _repeated(samples: list[Sample], tokens: int, budget: int, name: str, scored: str) -> list[Sample]:
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


def fitting_prompts(source: DenseText | PrunedText, length: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The source's prompts, each of which leaves room for an answer within `length` tokens.

    Raises:
        DataError: one does not, or a row holds no prompt, by file and line.
    """
    prompts = read_prompts(source.prompts)
    for row in prompts:
        found = len(encode_prompt(tokenizer, row.value["prompt"], chat=source.chat))
        if found >= length:
            raise DataError(
                f"{row.where}: the prompt has {found} tokens, which leaves none of recover.length "
                f"{length} for an answer: shorten it or raise recover.length"
            )
    return prompts


class _Writer:
    """Text that the dense model writes from prompts, round after round, each round with other random draws."""

    def __init__(
        self, source: DenseText, leaf: Recover, twin: Twin, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path
    ) -> None:
        self.source, self.leaf, self.twin, self.tokenizer, self.seed = source, leaf, twin, tokenizer, seed
        self.prompts = fitting_prompts(source, leaf.length, tokenizer)
        self.path = folder / f"dense-{self._fingerprint()}.jsonl"

    def write(self, budget: int) -> list[Sample]:
        """Samples with at least `budget` scored tokens; what an earlier call saved is read, not written again."""
        samples: list[Sample] = []
        tokens = chunk = 0
        saved = self._saved()
        while tokens < budget:
            if self._exhausted(len(samples)):
                return _repeated(samples, tokens, budget, self.source.prompts, self.leaf.loss.scored)
            if chunk < len(saved):
                rows = saved[chunk]["rows"]
            else:
                title = f"dense model writes ({tokens:,} of {budget:,} tokens)"
                rows = self._write_chunk(self._next_prompts(len(samples), tokens, budget), chunk, title)
            for row in rows:
                samples.append(self._sample(*row))
                tokens += samples[-1].scored(self.leaf.loss.scored)
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

    def _sample(self, prompt: str, ids: list[int]) -> Sample:
        """The ids that were generated, not their text tokenised again: the two often differ."""
        return answered(self._encode(prompt), ids).cut(self.leaf.length)

    def _encode(self, prompt: str) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, chat=self.source.chat)

    def _fingerprint(self) -> str:
        """Of all that the text depends on, the dense weights among it."""
        described = {
            "source": self.source.model_dump(mode="json", exclude={"share", "prompts"}),
            "prompts": [self._encode(row.value["prompt"]) for row in self.prompts],
            "seed": self.seed,
            "weights": weights_fingerprint(self.twin),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(twin: Twin) -> str:
    """Hash of names, shapes and some values of every dense weight: tells models apart without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in twin.base.named_parameters():
        if not parameter.requires_grad:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
            plain = name.replace(".base_layer", "")  # the same with adapters on it
            digest.update(f"{plain}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def collator(pad: int, scored: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Rows of `build_dataset` to right-padded `input_ids`, `attention_mask` and `labels` (-100 where no loss is)."""
    import torch

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        input_ids_BT = torch.full((len(rows), longest), pad)
        attention_mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        labels_BT = torch.full((len(rows), longest), -100)
        for number, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
            learnt = torch.as_tensor(row["completion_mask"], dtype=torch.bool) | (scored == "all")
            input_ids_BT[number, : len(ids)] = ids
            attention_mask_BT[number, : len(ids)] = 1
            labels_BT[number, : len(ids)] = ids.masked_fill(~learnt, -100)
        return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}

    return collate
