"""Small tales in which a thing goes from hand to hand; who holds it at the end is a choice among four people."""

import random
from typing import NamedTuple

from facts import with_article
from stories import HE, PLACES, SHE, TRADES

THINGS = ("lamp", "ring", "drum", "map", "crown", "flute", "kite", "book", "key", "sword", "clock", "mirror")
LOOKS = ("old", "red", "blue", "golden", "tiny", "broken", "magic", "silver", "green", "heavy")
SKIES = (
    "It rains over {place}.",
    "The moon hangs over {place}.",
    "Snow falls on {place}.",
    "A warm wind blows from {place}.",
    "Fog lies on {place}.",
    "Bells ring at {place}.",
)
OPENINGS = (
    "{a} the {trade} has a {look} {thing}.",
    "In {place} {a} finds a {look} {thing}.",
    "{a} makes a {look} {thing}.",
    "From the sea {a} brings a {look} {thing}.",
)
PASSES = (
    "{a} gives the {thing} to {b}.",
    "{a} sells the {thing} to {b}.",
    "{a} hands the {thing} to {b}.",
    "{a} sends the {thing} to {b}.",
    "For a song {a} leaves the {thing} to {b}.",
)
PAUSES = (
    "{a} laughs.",
    "{a} sings at {place}.",
    "{a} sleeps.",
    "{a} walks to {place}.",
    "{a} drinks tea.",
    "{a} is glad.",
)
ASKS = (
    "The {thing} is now with",
    "In the end the {thing} belongs to",
    "Who has the {thing}? It is",
    "At last the {thing} stays with",
)


class Tale(NamedTuple):
    """`prompt` ends where the holder's name begins; `people` are the options; `holder` is the right one."""

    prompt: str
    people: tuple[str, ...]
    holder: str

    @property
    def text(self) -> str:
        """The whole tale."""
        return f"{self.prompt} {self.holder}."


def tale(rng: random.Random) -> Tale:
    """A fresh tale with four people and two or three passes."""
    people = tuple(rng.sample(SHE + HE, 4))
    words = {"thing": rng.choice(THINGS), "look": rng.choice(LOOKS), "trade": rng.choice(TRADES)}

    def say(choices: tuple[str, ...], **names: str) -> str:
        return with_article(rng.choice(choices).format(place=rng.choice(PLACES), **words, **names))

    holder, others = people[0], list(people[1:])
    lines = [say(SKIES), say(OPENINGS, a=holder)]
    for receiver in others[: rng.randint(2, 3)]:
        if rng.random() < 0.4:
            lines.append(say(PAUSES, a=rng.choice(people)))
        lines.append(say(PASSES, a=holder, b=receiver))
        holder = receiver
    if holder != people[-1]:
        lines.append(say(PAUSES, a=people[-1]))
    return Tale(" ".join([*lines, say(ASKS)]), people, holder)
