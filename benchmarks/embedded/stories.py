"""Market stories with a worked solution: text that is right only if fifty tokens in a row are right.

A story starts with a number of goods; four to six events add or take some; the solution works through them line by
line. The number of events, not the size of the numbers, is what makes it hard: one slip anywhere spoils the answer.
"""

import random
import re
from typing import NamedTuple

SHE = (
    "Mara",
    "Nora",
    "Lena",
    "Rosa",
    "Ida",
    "Tilda",
    "Anna",
    "Clara",
    "Edith",
    "Hanna",
    "Olga",
    "Zoe",
    "Flora",
    "Greta",
    "Vera",
)
HE = (
    "Ivo",
    "Sam",
    "Otto",
    "Hugo",
    "Leo",
    "Paul",
    "Karl",
    "Emil",
    "Oscar",
    "Felix",
    "Bruno",
    "Max",
    "Tom",
    "Jonas",
    "Anton",
)
GOODS = (
    "figs",
    "plums",
    "eggs",
    "shells",
    "candles",
    "buttons",
    "apples",
    "lemons",
    "roses",
    "herrings",
    "loaves",
    "stamps",
    "coins",
    "beads",
    "walnuts",
    "feathers",
    "onions",
    "pearls",
    "bells",
    "marbles",
    "cakes",
    "carrots",
    "letters",
    "ribbons",
)
TRADES = (
    "baker",
    "miller",
    "sailor",
    "weaver",
    "potter",
    "fisher",
    "tailor",
    "gardener",
    "smith",
    "cook",
    "piper",
    "shepherd",
)
PLACES = (
    "the harbour",
    "the old mill",
    "the river",
    "the castle",
    "the market",
    "the village",
    "the bridge",
    "the island",
    "the forest",
    "the meadow",
    "the town gate",
    "the lighthouse",
)
OPENINGS = (
    "{name} has {n} {goods}.",
    "At dawn {name} carries {n} {goods} to {place}.",
    "{name} the {trade} owns {n} {goods}.",
    "One wet morning {name} packs {n} {goods}.",
    "{name} comes to {place} with {n} {goods}.",
    "Near {place} {name} counts {n} {goods}.",
    "Long ago {name} the {trade} kept {n} {goods}.",
)
GAINS = (
    "{They} finds {n}.",
    "{They} buys {n} more.",
    "A friend brings {n}.",
    "{They} wins {n} in a game.",
    "{Their} aunt sends {n}.",
    "A sailor trades {n} for a song.",
    "The tide leaves {n}.",
    "The king gives {n}.",
    "{They} makes {n}.",
    "A stranger adds {n}.",
    "{n} fall from a cart.",
    "A child returns {n}.",
    "{They} borrows {n}.",
    "The wind blows in {n}.",
    "The post brings {n}.",
)
LOSSES = (
    "{They} sells {n}.",
    "A crow steals {n}.",
    "{They} loses {n}.",
    "{They} gives away {n}.",
    "A goat eats {n}.",
    "{n} roll into the river.",
    "The rain spoils {n}.",
    "The miller buys {n}.",
    "{They} drops {n}.",
    "A thief takes {n}.",
    "{They} hides {n}.",
    "A fox runs off with {n}.",
    "The tax is {n}.",
    "{They} lends {n}.",
    "{n} sink in the mud.",
)
DOUBLES = ("A wizard doubles them.", "By magic they double.")
ENDINGS = (  # question, first line of the solution, last line
    ("How many {goods} has {name} now?", "{name} begins with {n}.", "So {name} has {n} {goods}."),
    ("How many {goods} are left?", "At first there are {n}.", "There are {n} {goods} left."),
    ("Count the {goods}.", "We count from {n}.", "That makes {n} {goods}."),
    ("What does {name} take home?", "It starts with {n}.", "{name} takes home {n} {goods}."),
)
MOST = 199  # no count goes beyond it
_ANSWER = re.compile(r"(\d+) \w+(?: left)?\.\s*$")


class Story(NamedTuple):
    """`prompt` ends with a line end; `prompt + solution` is the whole text; `answer` is the final number as text."""

    prompt: str
    solution: str
    answer: str


def story(rng: random.Random, events: tuple[int, int] = (4, 6)) -> Story:
    """A fresh story whose number of events lies in `events`, both ends included."""
    name, they = rng.choice([(name, "She") for name in SHE] + [(name, "He") for name in HE])
    words = {
        "name": name,
        "They": they,
        "Their": "Her" if they == "She" else "His",
        "goods": rng.choice(GOODS),
        "trade": rng.choice(TRADES),
        "place": rng.choice(PLACES),
    }
    start = count = rng.randint(10, 99)
    tale, work = [rng.choice(OPENINGS)], []
    tale[0] = tale[0].format(n=start, **words)
    gains, losses = rng.sample(GAINS, len(GAINS)), rng.sample(LOSSES, len(LOSSES))
    for _ in range(rng.randint(*events)):
        sentence, step = _event(rng, count, gains, losses)
        tale.append(sentence.format(**words))
        work.append(f"{count}{step:+d}={count + step}")
        count += step
    question, first, last = rng.choice(ENDINGS)
    prompt = " ".join([*tale, question.format(**words)]) + "\n"
    solution = "\n".join([first.format(n=start, **words), *work, last.format(n=count, **words)])
    return Story(prompt, solution, str(count))


def _event(rng: random.Random, count: int, gains: list[str], losses: list[str]) -> tuple[str, int]:
    """One sentence, taken off its list with its number filled in, and the change that it makes to `count`."""
    if count <= MOST // 2 and rng.random() < 0.06:
        return rng.choice(DOUBLES), count
    gain = rng.random() < 0.5
    if count < 12:
        gain = True
    if count > MOST - 12:
        gain = False
    step = rng.randint(2, min(99, MOST - count if gain else count - 2))
    sentence = (gains if gain else losses).pop().replace("{n}", str(step))
    return sentence, step if gain else -step


def answer_of(text: str) -> str | None:
    """The number that a written solution ends with, or None if its last line is not one."""
    found = _ANSWER.search(text)
    return found.group(1) if found else None
