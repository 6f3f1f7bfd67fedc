"""Easy word sums, one or two steps; the first two numbers of a held-out sum never stand together in a training sum."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Tom", "Anna", "Sam", "Lily", "Ben", "Maya", "Jack", "Emma", "Leo", "Nina", "Max", "Sara", "Omar", "Ruth")
THINGS = ("apples", "books", "stickers", "marbles", "coins", "cards", "pencils", "shells", "stamps", "cookies", "balls")
PLACES = ("box", "bag", "basket", "drawer", "jar")


@dataclass(frozen=True)
class Template:
    """A way to ask; `answer` takes the numbers a and b (and c) that stand in `text`."""

    text: str
    answer: Callable[[int, int, int], int]


def _plus(a: int, b: int, _c: int) -> int:
    return a + b


def _minus(a: int, b: int, _c: int) -> int:
    return a - b


def _times(a: int, b: int, _c: int) -> int:
    return a * b


PLUS = (
    Template("What is {a} plus {b}?", _plus),
    Template("What is {a} + {b}?", _plus),
    Template("What is the sum of {a} and {b}?", _plus),
    Template("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", _plus),
    Template("There are {a} {things} in one {place} and {b} in another. How many {things} are there in total?", _plus),
    Template("{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {name} read?", _plus),
)
MINUS = (
    Template("What is {a} minus {b}?", _minus),
    Template("{name} has {a} {things} and gives away {b}. How many {things} does {name} have left?", _minus),
    Template("A {place} holds {a} {things}. {name} takes out {b}. How many {things} are left in the {place}?", _minus),
)
TIMES = (
    Template("What is {a} times {b}?", _times),
    Template("There are {a} bags with {b} {things} in each. How many {things} are there in total?", _times),
)
TWO_STEPS = (
    Template("What is {a} + {b} + {c}?", lambda a, b, c: a + b + c),
    Template("What is {a} + {b} - {c}?", lambda a, b, c: a + b - c),
    Template(
        "{name} has {a} {things}, buys {b} more and gives away {c}. How many {things} does {name} have now?",
        lambda a, b, c: a + b - c,
    ),
)
# (ways to ask, smallest and largest a and b, weight)
KINDS = ((PLUS, 1, 14, 5), (MINUS, 1, 14, 3), (TIMES, 2, 9, 3), (TWO_STEPS, 1, 9, 1))
ASK = " Answer with a number."  # without it the model talks more and is right less often
HELD_OUT_PERCENT = 35


def is_held_out(a: int, b: int) -> bool:
    """Whether the unordered pair of numbers belongs to the held-out sums; about a third of all pairs do."""
    low, high = sorted((a, b))
    return random.Random(low * 1000 + high).randrange(100) < HELD_OUT_PERCENT


def make_sums(count: int, *, held_out: bool, seed: int) -> list[dict[str, str]]:
    """`count` distinct questions with answers, on pairs of numbers of one side only; the same for the same seed."""
    chooser = random.Random(seed)
    questions: dict[str, str] = {}
    while len(questions) < count:
        templates, low, high, _ = chooser.choices(KINDS, weights=[kind[3] for kind in KINDS])[0]
        template = chooser.choice(templates)
        a, b = chooser.randint(low, high), chooser.randint(low, high)
        if templates is MINUS:
            a, b = max(a, b), min(a, b)
        c = chooser.randint(2, 5)
        answer = template.answer(a, b, c)
        if is_held_out(a, b) != held_out or answer <= 0:
            continue
        name, things, place = chooser.choice(NAMES), chooser.choice(THINGS), chooser.choice(PLACES)
        question = template.text.format(a=a, b=b, c=c, name=name, things=things, place=place) + ASK
        questions[question] = str(answer)
    return [{"question": question, "answer": answer} for question, answer in questions.items()]
