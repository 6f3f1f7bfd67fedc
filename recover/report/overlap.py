"""Measured items that stand in the text of the run itself: what the plan found, in words and as a table."""

from __future__ import annotations

from recover.report import words
from recover.report.data import Overlap, OverlapRecord, RunData
from recover.report.tables import Table

USED_FOR = {"prune": "what pruning is chosen by", "train": "what recovery learns from"}
EXAMPLE = 120  # characters of a text in the table


def sentence(found: Overlap) -> str:
    """How many items of a task stand in which text, and what that means; for the terminal, the limits and the card."""
    counts = [(found["same"], "word for word"), (found["near"], "nearly so")]
    (first, how), *others = [(count, how) for count, how in counts if count]
    more = "".join(f", {count:,} more {how}" for count, how in others)
    return (
        f"task {found['task']}: {first:,} of {found['items']:,} measured items stand in {found['field']} "
        f"({found['source']}) {how}{more}; that text is {USED_FOR[found['field'].split('.')[0]]}, so the task says "
        "little of items that are new to the model"
    )


def lines(record: OverlapRecord) -> list[str]:
    """What `plan/overlap.json` says, for the terminal."""
    if record["found"]:
        return [sentence(found) for found in record["found"]]
    texts = sum(record["looked_at"].values())
    return [f"measured items were looked for in {texts:,} texts that the run is made with: none stands there"]


def table(data: RunData) -> Table | None:
    """Items of tasks that stand in the text of the run, with an example of each task and text."""
    rows = [
        (
            found["task"],
            f"{found['field']}, {found['source']}",
            *_example(found),
            words.count(found["items"]),
            words.count(found["same"]),
            words.count(found["near"]),
        )
        for found in data["overlap"] or ()
    ]
    if not rows:
        return None
    names = ("task", "stands in", "an item", "what stands there", "items", "word for word", "nearly so")
    caption = (
        "Measured items that stand in the text that this run was made with, found by their words alone: word for word, "
        "or with 60% of their runs of five words in common, numbers set aside. What is measured on them may be "
        "remembered and not known. The same question in other words is not found."
    )
    title = "Measured items in the text of this run"
    return Table(title, caption, tuple((name, "") for name in names), rows, numbers=4)


def _example(found: Overlap) -> tuple[str, str]:
    first = (found["examples"] or [{"item": "–", "text": "–"}])[0]
    return _short(first["item"]), _short(first["text"])


def _short(text: str) -> str:
    text = " ".join(words.clean(text).split())
    return text[:EXAMPLE].rstrip() + " …" if len(text) > EXAMPLE else text
