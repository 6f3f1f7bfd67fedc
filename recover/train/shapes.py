"""To which sizes packed rows are filled up, where each size of row costs something of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

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
