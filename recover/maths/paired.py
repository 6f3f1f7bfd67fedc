"""How much a figure changed between two measurements of the same items, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_CHANGED = 6  # items: if fewer changed, no exact sign test reaches 5%
Z95 = 1.959964


@dataclass(frozen=True)
class Change:
    """`value` = now - before, with its 95% interval over items that are paired; `changed`: items that differ at all."""

    value: float
    low: float
    high: float
    items: int
    changed: int

    @property
    def rose(self) -> bool:
        """Whether it is higher now beyond noise."""
        return self.low > 0 and self.changed >= LEAST_CHANGED

    @property
    def fell(self) -> bool:
        """Whether it is lower now beyond noise."""
        return self.high < 0 and self.changed >= LEAST_CHANGED


def of_means(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Change | None:
    """Change of the mean over tasks, each weighing the same, of the mean over its items; None with one item or none.

    `pairs`: of each task (before, now), equally long, an item at the same place. The interval is the normal one of
    paired differences, drawn task by task.
    """
    differences = [np.asarray(now, dtype=np.float64) - np.asarray(before) for before, now in pairs if len(before) > 1]
    if not differences or len(differences) < len(pairs):
        return None
    value = float(np.mean([each.mean() for each in differences]))
    variance = sum(each.var(ddof=1) / len(each) for each in differences) / len(differences) ** 2
    return _change(value, variance, differences)


def of_ratio(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> Change | None:
    """Change of sum / count, pooled over items that are each [sum, count]; None with one item or none.

    The interval is that of a ratio estimate: of the differences of sums about what their counts let expect.
    """
    if len(before) < 2 or len(before) != len(now):
        return None
    sums_N, counts_N = np.asarray(before, dtype=np.float64).T
    difference_N = np.asarray(now, dtype=np.float64)[:, 0] - sums_N
    value = float(difference_N.sum() / counts_N.sum())
    residual_N = difference_N - value * counts_N
    items = len(residual_N)
    variance = float((residual_N**2).sum()) * items / (items - 1) / counts_N.sum() ** 2
    return _change(value, variance, [difference_N])


def _change(value: float, variance: float, differences: Sequence[np.ndarray]) -> Change:
    half = Z95 * float(np.sqrt(variance))
    items = sum(map(len, differences))
    return Change(value, value - half, value + half, items, sum(int(np.count_nonzero(each)) for each in differences))


@dataclass(frozen=True)
class Exchange:
    """Of items right or wrong: `lost` were right before alone, `won` are now alone; `p` of McNemar's exact test."""

    lost: int
    won: int
    p: float


def mcnemar(before: Sequence[float], now: Sequence[float]) -> Exchange:
    """Whether two measurements of the same items, an item at the same place, differ in more than chance exchanges.

    `p` is the probability of an exchange at least as uneven if an item that changed were as likely lost as won: the
    two-sided binomial test (McNemar 1947, in its exact form). Values above one half count as right.
    """
    was, is_now = np.asarray(before) > 0.5, np.asarray(now) > 0.5
    lost, won = int((was & ~is_now).sum()), int((~was & is_now).sum())
    changed = lost + won
    tail = sum(math.comb(changed, k) for k in range(min(lost, won) + 1))
    return Exchange(lost, won, min(1.0, 2 * tail / 2**changed))
