"""The text of a recovery: written by the dense model or given, cut to the token budget, in the order it is trained on.

The whole budget is made of fresh text: an "epoch" of recovery is one part in `epochs` of it, between two
measurements of generation, and no pass over the same text again (unless a given source is too short for its share:
then it repeats, with a warning). Text that the pruned model is to write has rows that hold its place.

The order is random, in whole steps. Where rows are padded, like lengths come together; where they are packed, rows hold
about equally many tokens and need hardly any padding: a step that is recorded for a GPU has a size, which the longest
row decides. Of 32 random sequences the longest row of a training is some 15% longer than the mean. The sizes that
packed rows are filled up to stand here as well: where they are recorded, each size costs something of its own.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
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
    for index in console.track(order, f"reading {source.source}", unit="rows"):
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


WINDOW_STEPS = 8  # optimizer steps whose sequences are sorted by length: less padding, still a random order
TOLERANCE = 16  # tokens by which packed rows may differ: sizes are multiples of 64


def training_order(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    starts: Mapping[int, float] | None = None,
    *,
    packed: int | None = None,
) -> list[int]:
    """A random order of whole steps; up to `batch_size - 1` sequences are left out.

    `starts`: sequence -> part of the steps that it comes after. Sequences of a step are alike in length; or, if
    `packed` is given, steps hold about equally many tokens, and so does each row of so many sequences, a divisor of
    `batch_size`, as far as that goes within its step (`evened`); which sequences a step holds does not depend on it.

    Raises:
        DataError: sequences without a start do not fill the steps before it.
    """
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    order = order[: len(order) - len(order) % batch_size]
    window = WINDOW_STEPS * batch_size
    arranged: list[int] = []
    for part in _order_parts(order, batch_size, starts or {}, generator):
        if packed is not None:
            # Steps first: which sequences one holds must not depend on how it is cut into rows.
            even = evened(part, lengths, batch_size)
            for start in range(0, len(even), batch_size):
                arranged += evened(even[start : start + batch_size], lengths, packed)
            continue
        for start in range(0, len(part), window):
            by_length = sorted(part[start : start + window], key=lambda index: lengths[index])
            steps = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
            generator.shuffle(steps)
            arranged += [index for step in steps for index in step]
    return arranged


def _order_parts(
    order: list[int], batch_size: int, starts: Mapping[int, float], generator: random.Random
) -> list[list[int]]:
    """`order` cut into whole steps at each start; what starts later is moved behind it."""
    steps, parts = len(order) // batch_size, []
    for start, end in pairwise([*sorted({0.0, *starts.values()}), 1.0]):
        size = (math.ceil(end * steps) - math.ceil(start * steps)) * batch_size
        part = [index for index in order if starts.get(index, 0.0) <= start][:size]
        if len(part) < size:
            raise DataError(
                f"train.data: {len(part)} sequences are there for the steps between {start:.0%} and {end:.0%} of the "
                f"training, {size} are needed: let text of kind 'pruned' start earlier, or give it a smaller share"
            )
        gone = set(part)
        order = [index for index in order if index not in gone]
        generator.shuffle(order)  # else what had to wait would come all at once
        parts.append(part)
    return parts


def evened(order: Sequence[int], lengths: Sequence[int], count: int) -> list[int]:
    """`order`, cut into rows of `count` sequences, with sequences swapped until rows hold about equally many tokens.

    The longest and the shortest row swap the two sequences that bring them closest to each other, again and again.
    Where no swap does, the row that is further from the mean stays as it is: one sequence may be longer than other
    rows. Random orders stay random but for the rows' sums; the same arguments give the same order.
    """
    rows = np.asarray(order, dtype=np.int64).reshape(-1, count)
    if count == 1 or len(rows) < 2:
        return rows.flatten().tolist()
    held = np.asarray(lengths, dtype=np.int64)[rows]
    totals = held.sum(1)
    mean, open_rows = totals.mean(), np.ones(len(rows), dtype=bool)
    while True:
        longest = int(np.where(open_rows, totals, -1).argmax())
        shortest = int(np.where(open_rows, totals, totals.max() + 1).argmin())
        apart = totals[longest] - totals[shortest]
        if apart <= TOLERANCE or open_rows.sum() < 2:
            return rows.flatten().tolist()
        moved = held[longest][:, None] - held[shortest][None, :]
        one, other = np.unravel_index(np.abs(2 * moved - apart).argmin(), moved.shape)
        by = moved[one, other]
        if not 0 < by < apart:
            open_rows[longest if totals[longest] - mean >= mean - totals[shortest] else shortest] = False
            continue
        # The sum of squares of all rows falls, so this ends.
        for values in (rows, held):
            values[longest, one], values[shortest, other] = values[shortest, other], values[longest, one]
        totals[longest] -= by
        totals[shortest] += by


MULTIPLE = 64  # sizes are multiples of this: what matrix units take without a rest
RECORDING = 12  # recording one size takes as long as about so many steps


def row_sizes(totals: Sequence[int]) -> tuple[int, ...]:
    """Of rows of so many tokens: the sizes to fill them up to, at the least cost in all.

    The cost is what is filled up, and for each size that is used what it takes to record a step: `RECORDING` steps.
    """
    counts = Counter(-(-total // MULTIPLE) * MULTIPLE for total in totals)
    sizes = sorted(counts)
    # best[k]: least cost of the rows up to sizes[k - 1], and the number of sizes before the last one used.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(sizes) + 1):
        size, rows, options = sizes[end - 1], 0, []
        for start in range(end - 1, -1, -1):
            rows += counts[sizes[start]]
            options.append((best[start][0] + (rows + RECORDING) * size, start))
        best.append(min(options))
    chosen, end = [], len(sizes)
    while end:
        chosen.append(sizes[end - 1])
        end = best[end][1]
    return tuple(reversed(chosen))


def filled(total: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(size, most that may be filled up): the first of the ascending `sizes` that holds `total`, past them a multiple.

    The second number depends on the size alone.
    """
    place = bisect_left(sizes, total)
    if place < len(sizes):
        return sizes[place], sizes[place] - (sizes[place - 1] if place else 0)
    return -(-total // MULTIPLE) * MULTIPLE, MULTIPLE
