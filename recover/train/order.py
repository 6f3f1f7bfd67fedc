"""The order in which sequences are trained on: random, whole steps.

Where rows are padded, like lengths come together; where they are packed, rows hold about equally many tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

from recover.base.errors import DataError
from recover.train.evening import evened

WINDOW_STEPS = 8  # optimizer steps whose sequences are sorted by length: less padding, still a random order


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
                f"recover.data: {len(part)} sequences are there for the steps between {start:.0%} and {end:.0%} of the "
                f"training, {size} are needed: let text of kind 'pruned' start earlier, or give it a smaller share"
            )
        gone = set(part)
        order = [index for index in order if index not in gone]
        generator.shuffle(order)  # else what had to wait would come all at once
        parts.append(part)
    return parts
