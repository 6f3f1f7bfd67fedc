"""How a pruned model's text falls apart, counted on lists of token ids: it loops, or it leaves the dense model's text.

repetition([5, 6, 5, 6, 5, 6], n=2)   # 0.6: three of the five pairs were seen before
first_divergence([7, 8, 9], [7, 8, 1])  # 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Ids = Sequence[int]

CURVE_POINTS = 64  # of `parting`
LOOP_TURNS, LOOP_TOKENS = 3, 24  # a text ends in a loop: so often the same run of tokens, so many tokens in all


def ngrams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    """Every run of `n` consecutive ids, in order; none when the text is shorter than `n`."""
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def repetition(ids: Ids, n: int = 4) -> float:
    """Share of the n-grams that occurred before in the same text: 0 = none, towards 1 = a loop. Short texts give 0.

    The complement of `distinct_n` (seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training").
    """
    return 1.0 - distinct_n(ids, n)


def distinct_n(ids: Ids, n: int = 2) -> float:
    """Distinct n-grams over all n-grams of one text: 1 = nothing repeats; texts shorter than `n` give 1."""
    grams = ngrams(ids, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(ids: Ids) -> int:
    """Length in tokens of the longest run that occurs twice, overlaps included: m tokens of a loop of k give m - k.

    If a run occurs twice so does each shorter one, so the length is found by bisection.
    """
    low, high = 0, max(len(ids) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repetition(ids, middle) > 0 else (low, middle - 1)
    return low


def loop_start(ids: Ids) -> int | None:
    """Where the loop begins in which a text ends: a position, from 0; None if it does not end in one."""
    found = loop(ids)
    return None if found is None else found[0]


def loop(ids: Ids) -> tuple[int, int] | None:
    """(start, period) of the loop in which a text ends: its first position, and the tokens of a turn; None: in none.

    A loop is a run of tokens that stands three times or more, one after the other, over 24 tokens or more in all; its
    last turn may be cut. Of several the one of the shortest turn is taken. A text with an end token ends in none.
    """
    for period in range(1, len(ids) // LOOP_TURNS + 1):
        span = max(LOOP_TURNS, -(-LOOP_TOKENS // period)) * period
        first = len(ids) - period
        while first > 0 and ids[first - 1] == ids[first - 1 + period]:
            first -= 1
        if len(ids) - first >= span:
            return first, period
    return None


def first_divergence(a: Ids, b: Ids) -> int | None:
    """Position of the first token that differs, or None if the two texts are equal.

    If one is the beginning of the other, they part where the shorter one ends.
    """
    for position, (token_a, token_b) in enumerate(zip(a, b, strict=False)):
        if token_a != token_b:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def parting(positions: Sequence[int | None]) -> dict[str, Any]:
    """When texts leave others, of `first_divergence` of each pair; None is a text that never does.

    {never: share that never part; p10, p50, p90: the token by which this share of all texts have parted, None where
    fewer do; curve: [token, share of all that is still equal behind it] wherever it falls, from [0, 1.0] on}.

    Raises:
        ValueError: no texts.
    """
    if not positions:
        raise ValueError("no texts, expected at least one")
    parted = sorted(position for position in positions if position is not None)
    count = len(positions)
    curve = [[0, 1.0]]
    for place, position in enumerate(parted, 1):
        if position + 1 == curve[-1][0]:
            curve.pop()
        curve.append([position + 1, 1.0 - place / count])
    thinned = curve[:: -(-len(curve) // CURVE_POINTS)]
    quantiles = {f"p{share}": _by_then(parted, share * count / 100) for share in (10, 50, 90)}
    return {
        "never": 1.0 - len(parted) / count,
        **quantiles,
        "curve": thinned if thinned[-1] == curve[-1] else [*thinned, curve[-1]],
    }


def _by_then(parted: Sequence[int], wanted: float) -> int | None:
    """The token by which so many have parted."""
    place = max(1, math.ceil(wanted - 1e-9))
    return parted[place - 1] if place <= len(parted) else None


def agreement(a: Ids, b: Ids) -> float:
    """Share of positions with the same token, out of the longer text's positions; two empty texts agree fully."""
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0
