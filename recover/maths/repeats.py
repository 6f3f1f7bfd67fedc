"""What a text repeats, counted on runs of tokens or of words: itself, another model's text, what a measured item asks.

A pruned model's text falls apart: it loops, or it leaves the dense model's text. On lists of token ids:
repetition([5, 6, 5, 6, 5, 6], n=2)   # 0.6: three of the five pairs were seen before
first_divergence([7, 8, 9], [7, 8, 1])  # 2

A text holds what a measured item asks (`overlaps`): in the same words, or nearly so with numbers set aside. An item is
in a text if most runs of five words of the one are also in the other. Every number counts as the same word, since
problems are often made from others by new numbers. Runs that many items of a task share are its template, and do not
count. This is looked for by words alone: the same question in other words, or in another language, is not found.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Ids = Sequence[int]
Run = tuple[str, ...]  # of words

CURVE_POINTS = 64  # of `parting`
LOOP_TURNS, LOOP_TOKENS = 3, 24  # a text ends in a loop: so often the same run of tokens, so many tokens in all

RUN = 5  # words
NEAR = 0.6  # share of an item's runs that stand in a text, from which on it is nearly there
FEWEST = 8  # runs of a text that is shorter than an item: below, it is too short to tell
TEMPLATE = 0.05  # share of a task's items in which a run may stand, and at least 2 items
EXAMPLES = 3  # of each task and source
SHOWN = 300  # characters of an example
SIGNS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Han, which are written without spaces
WORD = re.compile(rf"\d+(?:[.,]\d+)*|[{SIGNS}]|[^\W\d_{SIGNS}]+")


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


def words_of(text: str) -> list[str]:
    """The words and numbers of a text in lower case; punctuation and white space do not count."""
    return WORD.findall(text.casefold())


def runs(text: str) -> frozenset[Run]:
    """Every run of five words, `#` for each number; a shorter text is one run."""
    return _runs(words_of(text))


def _runs(words: Sequence[str]) -> frozenset[Run]:
    plain = ["#" if word[0].isdigit() else word for word in words]
    if len(plain) < RUN:
        return frozenset([tuple(plain)])
    return frozenset(zip(*(plain[at:] for at in range(RUN)), strict=False))


@dataclass
class _Met:
    """The text that comes nearest to an item; `same`: it holds the item in the same words."""

    share: float = 0.0
    same: bool = False
    text: str = ""


@dataclass
class Measured:
    """The items of a task, and how near the texts that were looked at come to each."""

    name: str
    items: Sequence[str]
    met: list[_Met] = field(init=False)

    def __post_init__(self) -> None:
        self.met = [_Met() for _ in self.items]
        words = [words_of(item) for item in self.items]
        self._whole = [" ".join(each) for each in words]
        self._equal: dict[str, list[int]] = defaultdict(list)
        for number, whole in enumerate(self._whole):
            self._equal[whole].append(number)
        found = [_runs(each) for each in words]
        counts = Counter(run for item in found for run in item)
        most = max(2, TEMPLATE * len(self.items))
        self._template = {run for run, count in counts.items() if count > most}
        self._own = [len(item - self._template) for item in found]
        self._with: dict[Run, list[int]] = defaultdict(list)
        for number, item in enumerate(found):
            for run in item - self._template:
                self._with[run].append(number)

    def look_at(self, text: str, whole: str, found: frozenset[Run]) -> None:
        """Note what this text, with its words in one line and its runs, holds of the items."""
        for number in self._equal.get(whole, ()):
            if not self.met[number].same:
                self.met[number] = _Met(1.0, True, text)
        common = self._with.keys() & found
        if not common:
            return
        own = max(FEWEST, len(found - self._template))
        for number, count in Counter(number for run in common for number in self._with[run]).items():
            share, met = count / min(self._own[number], own), self.met[number]
            same = share >= 1.0 and f" {self._whole[number]} " in f" {whole} "
            if (same, share) > (met.same, met.share):
                self.met[number] = _Met(share, same, text)

    def record(self) -> dict[str, object]:
        """{task, items, same, near, examples}; `near` does not count those that are the same."""
        found = sorted((met for met in enumerate(self.met) if met[1].share >= NEAR), key=lambda met: -met[1].share)
        return {
            "task": self.name,
            "items": len(self.items),
            "same": sum(met.same for _, met in found),
            "near": sum(not met.same for _, met in found),
            "examples": [
                {"item": self.items[number][:SHOWN], "text": _around(met.text, self.items[number]), "same": met.same}
                for number, met in found[:EXAMPLES]
            ],
        }


def overlaps(tasks: Mapping[str, Sequence[str]], texts: Iterable[str]) -> list[dict[str, object]]:
    """Of each task with items in `texts`: {task, items, same, near, examples: [{item, text, same}]}.

    `same`: items that stand in a text in the same words; `near`: others of which 60% of the runs of words do.
    """
    measured = [Measured(name, items) for name, items in tasks.items() if items]
    for text in texts:
        words = words_of(text)
        if not words:
            continue
        whole, found = " ".join(words), _runs(words)
        for task in measured:
            task.look_at(text, whole, found)
    return [record for task in measured if (record := task.record())["same"] or record["near"]]


def _around(text: str, item: str) -> str:
    """Of a long text, the place where the item's first words stand."""
    if len(text) <= SHOWN:
        return text
    first = [re.escape(word) for word in words_of(item)[:2]]
    there = re.search(r"\W+".join(first), text, re.IGNORECASE) if first else None
    start = 0 if there is None else max(0, there.start() - 20)
    return text[start : start + SHOWN]
