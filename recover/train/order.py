"""The order in which sequences are trained on: random, whole steps.

Where rows are padded, like lengths come together; where they are packed, rows hold about equally many tokens and
need hardly any padding: a step that is recorded for a GPU has a size, which the longest row decides. Of 32 random
sequences the longest row of a training is some 15% longer than the mean. The sizes that packed rows are filled up to
stand here as well: where they are recorded, each size costs something of its own.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from recover.base.errors import DataError

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
    for part in _parts(order, batch_size, starts or {}, generator):
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


def _parts(order: list[int], batch_size: int, starts: Mapping[int, float], generator: random.Random) -> list[list[int]]:
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
