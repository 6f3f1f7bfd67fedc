"""A kind of task from outside of the package: does the model write long texts?"""

from dataclasses import dataclass
from typing import Literal

from recover.config.tasks import Figure, PromptFile, TaskKind, Use
from recover.measure.model import Measured, Work


class LongFile(PromptFile):
    """The model writes; a text of `tokens` tokens or more is long."""

    kind: Literal["long"]
    tokens: int = 3


@dataclass(frozen=True)
class Opening:
    """One item."""

    prompt: str


def make(file, row, where):
    return Opening(row["q"])


def measure(model, file, items, reference):
    prompts = [item.prompt for item in items]
    texts = model.generate(prompts, max_new_tokens=4, sampling=None, chat=file.wraps, title=file.name)
    long = [len(each.ids) >= file.tokens for each in texts]
    record = {"kind": "long", "items": len(items), "long": sum(long) / len(long), "samples": []}
    return Measured(record, texts, sum(len(each.ids) for each in texts))


WORK = Work(make, measure, complete=lambda file, item: " and so on")
USE = Use("stamina", "long", "Can it go on?", "share of long texts")
FIGURE = Figure("long", "texts that are long", "percent", "higher", main=True)
KIND = TaskKind("long", LongFile, "toy_kind", "long texts", (FIGURE,), use="stamina")
