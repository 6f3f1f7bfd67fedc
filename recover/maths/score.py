"""Is a written answer right, and how sure is the mean of many: pure functions on text and numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
