"""All texts and held-out items of the embedded model, from fixed seeds. Pure Python: no torch, no files, no network.

Held-out is decided by the prompt alone: bucket 0 of a hash of it is never trained on. So no seed, no order and no
number of workers can leak an item into the training text.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from facts import RELATIONS, with_article
from stories import Story, story
from tales import Tale, tale

BUCKETS = 8
T = TypeVar("T")


class Choice(NamedTuple):
    """`options` continue `prompt` and begin with a space; `answer` is the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The prompt with its right continuation."""
        return self.prompt + self.options[self.answer]


def held_out(prompt: str) -> bool:
    """Whether `prompt` belongs to the held-out bucket, which training never sees."""
    return hashlib.sha256(prompt.encode()).digest()[0] % BUCKETS == 0


def draw(make: Callable[[random.Random], T], rng: random.Random, *, held: bool) -> T:
    """The next thing that `make` gives whose `.prompt` is on the wanted side."""
    while True:
        thing = make(rng)
        if held_out(thing.prompt) == held:
            return thing


def ask(template: str, subject: str) -> str:
    """The sentence with its subject, starting with a capital."""
    sentence = with_article(template.format(s=subject))
    return sentence[0].upper() + sentence[1:]


def all_facts() -> list[tuple[str, str, tuple[str, ...]]]:
    """Every (prompt, answer, other answers of the relation): each fact in each way of asking it."""
    rows = []
    for relation in RELATIONS:
        for subject, answer in relation.pairs:
            others = tuple(other for other in relation.answers if other != answer and other != subject)
            rows += [(ask(template, subject), answer, others) for template in relation.asks]
    return rows


def trained_facts() -> list[str]:
    """The full sentences that training may use."""
    return [f"{prompt} {answer}." for prompt, answer, _ in all_facts() if not held_out(prompt)]


def fact_items(seed: int) -> list[Choice]:
    """All held-out facts as four-way choices, in an order and with distractors fixed by `seed`."""
    rng = random.Random(f"facts-{seed}")
    rows = [row for row in all_facts() if held_out(row[0])]
    rng.shuffle(rows)
    return [_choice(rng, prompt, answer, others) for prompt, answer, others in rows]


def tale_item(rng: random.Random, one: Tale) -> Choice:
    """A tale as a choice among its four people."""
    return _choice(rng, one.prompt, one.holder, tuple(person for person in one.people if person != one.holder))


def _choice(rng: random.Random, prompt: str, answer: str, others: tuple[str, ...]) -> Choice:
    options = [answer, *rng.sample(others, 3)]
    rng.shuffle(options)
    return Choice(prompt, tuple(f" {option}." for option in options), options.index(answer))


def held_out_stories(seed: int, count: int) -> list[Story]:
    """Fresh stories that training never sees."""
    rng = random.Random(f"stories-{seed}")
    return [draw(story, rng, held=True) for _ in range(count)]


def held_out_tales(seed: int, count: int) -> list[Choice]:
    """Fresh tales that training never sees, as choices."""
    rng = random.Random(f"tales-{seed}")
    return [tale_item(rng, draw(tale, rng, held=True)) for _ in range(count)]


def documents(seed: int | str, *, stories: float = 0.25, tales: float = 0.1) -> Iterator[tuple[str, str]]:
    """An endless train-side stream of (prompt, rest): a share of stories, a share of tales, the others facts.

    Shares count documents, not tokens: a story is about ten times as long as a fact.
    """
    rng = random.Random(f"documents-{seed}")
    facts = [(prompt, f" {answer}.") for prompt, answer, _ in all_facts() if not held_out(prompt)]
    while True:
        kind = rng.random()
        if kind < stories:
            one = draw(story, rng, held=False)
            yield one.prompt, one.solution
        elif kind < stories + tales:
            one = draw(tale, rng, held=False)
            yield one.prompt, f" {one.holder}."
        else:
            yield rng.choice(facts)
