"""What is wrong with a written answer: its form, or what it says.

A mistake of form is a text that ends in a loop, does not end, holds no answer, or is code that does not parse; of
several the first in this order counts. What is wrong all the same is well formed: a mistake of content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recover.maths.collapse import loop_start
from recover.text.generate import Generation

LOOP, ENDLESS, NO_ANSWER, UNPARSED, CONTENT = "loop", "endless", "no_answer", "unparsed", "content"
KINDS = {"generate": (LOOP, ENDLESS, NO_ANSWER, CONTENT), "code": (LOOP, ENDLESS, NO_ANSWER, UNPARSED, CONTENT)}


def mistake(written: Generation, right: bool, *, answered: bool, parses: bool = True) -> str | None:
    """The kind of mistake that a text is, None where it is right."""
    if right:
        return None
    if loop_start(written.ids) is not None:
        return LOOP
    if not written.ended:
        return ENDLESS
    if not answered:
        return NO_ANSWER
    return CONTENT if parses else UNPARSED


def mistakes(kind: str, found: Sequence[str | None], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mistakes`: how many texts of each kind of mistake; `examples`: the first text of each, where there is one.

    `kind`: of the task; `found`: the mistake of each text, as `mistake` gives it; `samples`: what is shown of each.
    """
    return {
        "mistakes": {each: list(found).count(each) for each in KINDS[kind]},
        "examples": {each: samples[list(found).index(each)] for each in KINDS[kind] if each in found},
    }
