"""An attention and an MLP that go together, so that a stored block goes with them.

`pairing.pack_sites` lets an MLP join the attention right before it, in what is left, and joins nothing else: what is
left takes (its sublayers) - (its attentions with an MLP right behind) blocks. With p attentions and p MLPs gone from L
blocks, 2 (L - p) sublayers are left, and they take L - p blocks exactly if an MLP is right behind each attention: if
attention and MLP alternate as in a stock model. So one attention and one MLP save a block exactly if they are
neighbours: those of one block, or an MLP and the attention of the next block. Any others leave two MLPs in a row in one
place and two attentions in another. What alternates still does without two neighbours, so pairs can go one by one, also
two that became neighbours because all between them went before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

from recover.models.site import Site, sites_of

Pair = tuple[Site, ...]  # in the order in which the model runs them


def pairs_of(blocks: int, closed: Collection[Site] = frozenset()) -> list[Pair]:
    """Every two neighbours of what is left once pairs are `closed`, in order; the attention of block 0 is in none."""
    left = sorted(sites_of(range(blocks)) - set(closed))
    return list(pairwise(left[1:]))


def lowest_apart(pairs: Sequence[Pair], scores: Sequence[float], count: int) -> list[int]:
    """Indices, ascending, of the `count` pairs of lowest total score of which no two share a site; on ties the first.

    `pairs` in order, so that only a pair and the next one can share a site. Raises ValueError if there are too few.
    """
    # best[k]: (total, indices) of k pairs among those seen; `skipping`: the same without the last one seen.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(math.inf, ())] * count]
    skipping = best
    for index, score in enumerate(scores):
        free = skipping if index and set(pairs[index - 1]) & set(pairs[index]) else best
        taken = [(total + score, (*chosen, index)) for total, chosen in free[:-1]]
        extended = [best[0], *(min(old, new, key=_total) for old, new in zip(best[1:], taken, strict=True))]
        best, skipping = extended, best
    total, chosen = best[count]
    if total == math.inf:
        raise ValueError(f"no {count} of {len(pairs)} pairs are apart")
    return list(chosen)


def _total(found: tuple[float, tuple[int, ...]]) -> float:
    return found[0]
