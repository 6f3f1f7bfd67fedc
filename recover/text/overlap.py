"""Whether a text holds what a measured item asks: in the same words, or nearly so with numbers set aside.

An item is in a text if most runs of five words of the one are also in the other. Every number counts as the same word,
since problems are often made from others by new numbers. Runs that many items of a task share are its template, and do
not count. This is looked for by words alone: the same question in other words, or in another language, is not found.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

RUN = 5  # words
NEAR = 0.6  # share of an item's runs that stand in a text, from which on it is nearly there
FEWEST = 8  # runs of a text that is shorter than an item: below, it is too short to tell
TEMPLATE = 0.05  # share of a task's items in which a run may stand, and at least 2 items
EXAMPLES = 3  # of each task and source
SHOWN = 300  # characters of an example
SIGNS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Han, which are written without spaces
WORD = re.compile(rf"\d+(?:[.,]\d+)*|[{SIGNS}]|[^\W\d_{SIGNS}]+")

Run = tuple[str, ...]


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
