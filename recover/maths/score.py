"""Is a written answer right, how sure is the mean of many, and is a change between two measurements more than noise.

Pure functions on text and numbers. The last part compares two measurements of the same items.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, log2, sqrt

import numpy as np

RESAMPLES = 2000
CUT = 10  # nDCG@10, as retrieval benchmarks have it
_NUMBER = re.compile(r"[$€£]?(-?)[$€£]?(\d[\d,]*)(?:\.(\d+))?%?")


def extract(text: str, pattern: str | None, take: str = "last") -> str | None:
    """The last match of `pattern`, or the first; without a pattern the whole text; None where there is none.

    Of a pattern with groups it is the first of them that holds something. The last match by default, because an answer
    that is reasoned out ends with its result.
    """
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    if not matches:
        return None
    match = matches[-1 if take == "last" else 0]
    return next(filter(None, match.groups()), None) if match.re.groups else match[0]


def normal(text: str) -> str:
    """Text as it is compared: case, outer punctuation, runs of white space and ways to write a number do not count."""
    text = " ".join(text.casefold().split()).strip(" .,;:!?\"'*`")
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    sign, whole, fraction = number.groups()
    fraction = (fraction or "").rstrip("0")
    return sign + whole.replace(",", "") + (f".{fraction}" if fraction else "")


def without(text: str, ignore: Sequence[str]) -> str:
    """Text as it is compared by letter: what the patterns match is taken out, one after the other, and case is gone."""
    for pattern in ignore:
        text = re.sub(pattern, "", text)
    return text.lower()


def is_right(
    answer: str | None, targets: Sequence[str], *, contains: bool = False, ignore: Sequence[str] | None = None
) -> bool:
    """Whether the answer equals one of the targets or, with `contains`, holds one as a run of whole words.

    Compared as `normal` has them or, given `ignore`, as `without`.
    """
    if answer is None:
        return False
    found, *wanted = (normal(each) if ignore is None else without(each.strip(), ignore) for each in (answer, *targets))
    if contains:
        return any(re.search(rf"(?<!\w){re.escape(target)}(?!\w)", found) for target in wanted)
    return found in wanted


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; never called without values, since a task has at least one item."""
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def interval95(values: Sequence[float]) -> list[float]:
    """95% interval of the mean over items, [low, high]: Wilson's where each is right or wrong, else by bootstrap.

    Resampling items that are all right can only give 100% again; Wilson's interval (1927) keeps its width there: n of n
    right leave [n / (n + 3.84), 1].
    """
    array_N = np.asarray(values, dtype=np.float64)
    if np.isin(array_N, (0.0, 1.0)).all():
        return wilson95(int(array_N.sum()), len(array_N))
    drawn_RN = np.random.default_rng(0).integers(len(array_N), size=(RESAMPLES, len(array_N)))
    low, high = np.percentile(array_N[drawn_RN].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def wilson95(right: int, items: int) -> list[float]:
    """The shares p for which `right` of `items` lies within 1.96 standard errors, sqrt(p (1 - p) / items), of p."""
    share, z2 = right / items, 1.959964**2
    middle = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = sqrt(z2 * (share * (1 - share) / items + z2 / (4 * items**2))) / (1 + z2 / items)
    return [0.0 if right == 0 else middle - half, 1.0 if right == items else middle + half]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p10, p50 and p90."""
    array_N = np.asarray(values, dtype=np.float64)
    p10, p50, p90 = np.percentile(array_N, [10, 50, 90])
    return {"mean": float(array_N.mean()), "p10": float(p10), "p50": float(p50), "p90": float(p90)}


def pass_at(k: int, right: int, drawn: int) -> float:
    """Chance that of k texts, drawn without return from `drawn` of which `right` are right, one or more are right.

    The unbiased estimate of pass@k of Chen et al., "Evaluating Large Language Models Trained on Code", for one prompt.
    """
    return 1.0 - comb(drawn - right, k) / comb(drawn, k)


def ndcg(gains: Sequence[float]) -> float:
    """nDCG@10 of documents as ranked, by the gain of each: `cumulated_gain`, over that of the best ranking.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", with linear gain.
    """
    return cumulated_gain(gains) / cumulated_gain(sorted(gains, reverse=True))


def cumulated_gain(gains: Sequence[float]) -> float:
    """Sum of gain / log2(1 + rank) over the first ten."""
    return sum(gain / log2(1 + rank) for rank, gain in enumerate(gains[:CUT], 1))


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
