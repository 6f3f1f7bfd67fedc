"""The text of a recovery: written by the dense model or given, cut to the token budget, in the order it is trained on.

The whole budget is made of fresh text: an "epoch" of recovery is one part in `epochs` of it, between two
measurements of generation, and no pass over the same text again (unless a given source is too short for its share:
then it repeats, with a warning). Text that the pruned model is to write (`on_policy.py`) has rows that hold its place.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from recover.base import console
from recover.base.errors import DataError
from recover.config.recipe import DenseText, GivenText, PrunedText, TeacherText, Train
from recover.distill.distiller import Batch, scored_rows
from recover.train.checkpoints import PartEnds
from recover.train.order import filled, training_order
from recover.train.sources import Collate, Sample, SampleRow, read_rows, samples_of
from recover.train.teacher_file import teacher_samples
from recover.train.written_text import DenseWriter, repeated

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from recover.models.twin import Twin


def build_dataset(
    cfg: Train,
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    folder: Path,
    *,
    packed: bool = False,
    parts: Sequence[PartEnds] = (),
) -> Dataset:
    """Rows `input_ids` and `completion_mask` in training order: whole steps, about `cfg.tokens` scored tokens.

    Each source gives its share of the tokens. Where the pruned model is to write, there are two more columns: `number`
    of the row, and `writer`, the source whose text it is to hold (-1: it holds its own). What the dense model writes is
    saved to `folder` as it is written, under a name made from all that it depends on; the same call reads it back and
    goes on from there. Same arguments, same rows. `packed`: the rows of each batch hold about equally many tokens
    together; else each step's rows are alike in length. `parts`: of a training that goes on behind finished ones, what
    these were (`tokens`, and the steps `ends`): their rows come first, as they were, then those of text that is new.

    Raises:
        DataError: a source cannot be read or holds nothing to learn (by file and line), or there is too little for
            an epoch.
    """
    found = _of_sources(cfg, twin, tokenizer, seed, folder)
    samples = [sample for source in found for sample in source]
    writers = [
        number if isinstance(source, PrunedText) else -1
        for number, source in enumerate(cfg.data)
        for _ in found[number]
    ]
    needed = cfg.batch_size * cfg.epochs
    if len(samples) < needed:
        raise DataError(
            f"train.tokens: {cfg.tokens:,} tokens make {len(samples)} sequences; {cfg.epochs} epochs of at least "
            f"one step of {cfg.batch_size} need {needed}: raise tokens, or lower batch_size or epochs"
        )
    starts = {index: cfg.starts[number] for index, number in enumerate(writers) if number >= 0}
    # Not by the processes, which a training that goes on may have more of: its rows must be the same.
    together = (cfg.micro_batch_size or cfg.batch_size) if packed else None
    lengths = [len(sample.ids) for sample in samples]
    order: list[int] = []
    for number, part in enumerate(parts):
        fewer = cfg.model_copy(update={"tokens": part["tokens"]})
        held = _beginnings(found, _of_sources(fewer, twin, tokenizer, seed, folder))
        order += _ordered(held, order, lengths, cfg.batch_size, seed + number, {}, together)
        del order[part["ends"][-1] * cfg.batch_size :]
    order += _ordered(range(len(samples)), order, lengths, cfg.batch_size, seed + len(parts), starts, together)
    columns: dict[str, list[Any]] = {
        "input_ids": [np.asarray(samples[index].ids, dtype=np.int32) for index in order],
        "completion_mask": [np.asarray(samples[index].mask, dtype=np.int8) for index in order],
    }
    if max(writers) >= 0:
        columns |= {"number": list(range(len(order))), "writer": [writers[index] for index in order]}
    return datasets.Dataset.from_dict(columns)


def _of_sources(
    cfg: Train, twin: Twin, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path
) -> list[list[Sample]]:
    """The samples of each source; those of a smaller budget are the first ones of a larger one's."""
    found: list[list[Sample]] = []
    for number, (source, budget) in enumerate(zip(cfg.data, cfg.budgets, strict=True), seed):
        if isinstance(source, TeacherText):
            found.append(_of_teacher(source, cfg, twin, tokenizer, number, folder))
        elif isinstance(source, GivenText):
            found.append(_given(source, cfg, tokenizer, number, budget))
        elif isinstance(source, DenseText):
            found.append(DenseWriter(source, cfg, twin, tokenizer, number, folder).write(budget))
        else:
            found.append(_places(source, cfg, twin, tokenizer, number, folder, budget))
    return found


def _beginnings(all_: list[list[Sample]], fewer: list[list[Sample]]) -> list[int]:
    """Numbers, in all samples one source after the other, of each source's first ones."""
    starts = itertools.accumulate((len(source) for source in all_), initial=0)
    return [start + at for start, source in zip(starts, fewer, strict=False) for at in range(len(source))]


def _ordered(
    held: Iterable[int],
    gone: Iterable[int],
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    starts: Mapping[int, float],
    packed: int | None,
) -> list[int]:
    """The numbers `held` that are not `gone`, in `training_order`."""
    known = {*gone}
    fresh = [index for index in held if index not in known]
    later = {at: starts[index] for at, index in enumerate(fresh) if index in starts}
    order = training_order([lengths[index] for index in fresh], batch_size, seed, later, packed=packed)
    return [fresh[at] for at in order]


def _places(
    source: PrunedText,
    cfg: Train,
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
    fields = source.model_dump(include={*DenseText.model_fields} - {"kind"})
    written = DenseWriter(DenseText(kind="dense", **fields), cfg, twin, tokenizer, seed, folder).first_batch()
    samples: list[Sample] = []
    tokens = 0
    while tokens < budget:
        samples.append(written[len(samples) % len(written)])
        tokens += samples[-1].scored(cfg.loss.scored)
    return samples


def _given(source: GivenText, cfg: Train, tokenizer: PreTrainedTokenizerBase, seed: int, budget: int) -> list[Sample]:
    """Samples of a given source, rows in random order, until their scored tokens reach `budget`."""
    rows = read_rows(source.source, source.split, source.subset)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    samples: list[Sample] = []
    tokens = skipped = 0
    for index in console.track(order, f"reading {source.source}", unit="row"):
        if tokens >= budget:
            break
        found = samples_of(rows[index], source, tokenizer, cfg.length)
        skipped += not found
        samples += found
        tokens += sum(sample.scored(cfg.loss.scored) for sample in found)
    if skipped:
        console.warn(f"{source.source}: {skipped} rows left out: no token to learn within train.length {cfg.length}")
    if not samples:
        raise DataError(f"{source.source}: no row holds a token to learn within train.length {cfg.length}")
    return repeated(samples, tokens, budget, source.source, cfg.loss.scored)


def _of_teacher(
    source: TeacherText, cfg: Train, twin: Twin, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path
) -> list[Sample]:
    """Samples of a teacher's file, in random order, until their scored tokens reach `cfg.tokens`."""
    samples = teacher_samples(source, cfg.length, twin.base.config.vocab_size, tokenizer, folder)
    random.Random(seed).shuffle(samples)
    tokens = 0
    for number, sample in enumerate(samples):
        if tokens >= cfg.tokens:
            return samples[:number]
        tokens += sample.scored(cfg.loss.scored)
    return repeated(samples, tokens, cfg.tokens, source.source, cfg.loss.scored)


def tokens_at_once(rows: Dataset, micro: int) -> list[int]:
    """Tokens of each batch of `micro` rows."""
    lengths = pc.call_function("list_value_length", [rows.data.column("input_ids")]).to_numpy()
    return [int(lengths[start : start + micro].sum()) for start in range(0, len(lengths), micro)]


def collator(pad: int, scored: str) -> Collate:
    """Rows of `build_dataset` to right-padded `input_ids`, `attention_mask` and `labels` (-100 where no loss is)."""

    def collate(rows: Sequence[SampleRow]) -> Batch:
        sizes_B = np.array([len(row["input_ids"]) for row in rows])
        held_BT = np.arange(sizes_B.max()) < sizes_B[:, None]
        ids, labels = _joined(rows, scored)
        input_ids_BT = np.full(held_BT.shape, pad, dtype=np.int64)
        labels_BT = np.full(held_BT.shape, -100, dtype=np.int64)
        input_ids_BT[held_BT], labels_BT[held_BT] = ids, labels
        return {
            "input_ids": torch.from_numpy(input_ids_BT),
            "attention_mask": torch.from_numpy(held_BT.astype(np.int64)),
            "labels": torch.from_numpy(labels_BT),
        }

    return collate


def packer(pad: int, scored: str, longest: int, sizes: Sequence[int] = ()) -> Collate:
    """Rows of `build_dataset`, none over `longest` tokens, to one packed row: `input_ids`, `labels` and `packing`.

    With `sizes` the row is filled up to one of them (`filled`), by sequences of padding; of equal size, rows of equally
    many sequences have equal shapes.
    """

    def collate(rows: Sequence[SampleRow]) -> Batch:
        ends_S = np.cumsum([len(row["input_ids"]) for row in rows])
        total = int(ends_S[-1])
        size, most = filled(total, sizes) if sizes else (total, 0)
        padding = [min(total + longest * number, size) for number in range(1, -(-most // longest) + 1)]
        starts_S = np.concatenate([[0], ends_S, padding]).astype(np.int32)
        input_ids_T = np.full(size, pad, dtype=np.int64)
        labels_T = np.full(size, -100, dtype=np.int64)
        input_ids_T[:total], labels_T[:total] = _joined(rows, scored)
        labels_T[starts_S[: len(rows)]] = -100  # nothing stands before a first token that could predict it
        positions_T = np.arange(size) - np.repeat(starts_S[:-1], np.diff(starts_S))
        positions_T[total:] = 0  # a rotary embedding that goes by the largest position goes by the text alone
        packing = torch.from_numpy(positions_T)[None], torch.from_numpy(starts_S), longest
        return {
            "input_ids": torch.from_numpy(input_ids_T)[None],
            "labels": torch.from_numpy(labels_T)[None],
            "packing": packing,
        }

    return collate


def _joined(rows: Sequence[SampleRow], scored: str) -> tuple[Any, Any]:
    """Tokens and labels of all rows, one after the other."""
    ids = np.concatenate([row["input_ids"] for row in rows])
    if scored == "all":
        return ids, ids
    return ids, np.where(np.concatenate([row["completion_mask"] for row in rows]).astype(bool), ids, -100)


def with_scored(collate: Collate) -> Collate:
    """As `collate`, with `scored`: what `scored_rows` finds, found before the batch is on a device that would wait."""

    def collated(rows: Sequence[SampleRow]) -> Batch:
        batch = collate(rows)
        return {**batch, "scored": scored_rows(batch["labels"])}

    return collated
