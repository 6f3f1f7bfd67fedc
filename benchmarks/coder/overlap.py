"""Whether a prompt asks what a measured item asks: the same words, or nearly the same, numbers set aside.

Two texts are near where one's runs of five words are mostly the other's too: |A & B| / min(|A|, |B|) is 0.6 or more.
Every number counts as the same word, since problems are often made from others by new numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from recover.maths.repeats import NEAR, runs


class Measured:
    """Measured items, and which of them a prompt comes too near."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items = [runs(item) for item in items]
        self._equal = set(self.items)
        self._with: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, item in enumerate(self.items):
            for run in item:
                self._with[run].append(number)

    def equal(self, prompt: str) -> bool:
        """Whether the prompt has the runs of an item and no other."""
        return runs(prompt) in self._equal

    def nearest(self, prompt: str) -> float:
        """The share of common runs with the nearest item: 0 to 1."""
        asked = runs(prompt)
        common = Counter(number for run in asked for number in self._with.get(run, ()))
        shares = (count / min(len(asked), len(self.items[number])) for number, count in common.items())
        return max(shares, default=0.0)

    def apart(self, prompts: Sequence[str]) -> tuple[list[str], int, int]:
        """(prompts that are far from every item, how many were equal to one, how many were only near one)."""
        kept, equal, near = [], 0, 0
        for prompt in prompts:
            if self.equal(prompt):
                equal += 1
            elif self.nearest(prompt) >= NEAR:
                near += 1
            else:
                kept.append(prompt)
        return kept, equal, near
