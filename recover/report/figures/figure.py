"""What a figure is: a heading, what to see in it, a drawing for each width, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WIDE, NARROW = 960.0, 360.0


@dataclass(frozen=True)
class Figure:
    """`draw(width)` gives SVG for a page (WIDE) or a telephone (NARROW); `columns` and `rows` are its numbers.

    `see` is the caption: what to look for and what it means. A figure without `draw` was not measured, and `see`
    says why.
    """

    title: str
    see: str
    draw: Callable[[float], str] | None = None
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    legend: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        return self.draw is not None

    @property
    def wide(self) -> str:
        return self.draw(WIDE) if self.draw else ""

    @property
    def narrow(self) -> str:
        return self.draw(NARROW) if self.draw else ""


def is_narrow(width: float) -> bool:
    """Panels are stacked and labels shortened below this width."""
    return width < 600


def panels(width: float, number: int, *, gap: float = 56.0, left: float = 0.0) -> list[tuple[float, float]]:
    """(left, right) of `number` panels side by side, each with `left` pixels kept free for its axis."""
    each = (width - gap * (number - 1)) / number
    return [(k * (each + gap) + left, k * (each + gap) + each) for k in range(number)]
