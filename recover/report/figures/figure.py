"""What a figure is, what it is drawn on, and its panels.

A `Figure` is a heading, what to see in it, a drawing for each width, and the same numbers as a table.

A `Canvas` writes SVG for an HTML page: colours are classes of the page's stylesheet, so both themes share it. Every
text and attribute is escaped here; nothing else in the package builds SVG by hand.

A `Panel` is data: two axes and marks in the units of the figure. How it lies on the page is worked out here, once. A
mark is anything that draws itself, given the canvas and the two scales; the classes at the end are the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from recover.report import words

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


Point = tuple[float, float]


@dataclass(frozen=True)
class Linear:
    """Maps lo..hi onto pixels start..stop."""

    lo: float
    hi: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.lo) / ((self.hi - self.lo) or 1.0) * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside lo..hi, `about` of them."""
        span = (self.hi - self.lo) or 1.0
        step = 10.0 ** math.floor(math.log10(span / about))
        step *= next(k for k in (1, 2, 5, 10) if span / (step * k) <= about)
        first = math.ceil(self.lo / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.hi / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Log:
    """Maps lo..hi onto pixels start..stop by powers of ten; what is not above `lo` sits on `start`, the line 'zero'."""

    lo: float
    hi: float
    start: float
    stop: float
    zero: bool = False

    @classmethod
    def around(cls, values: Iterable[float], start: float, stop: float, smallest: float = 1e-8) -> Log:
        """From the decade below every value to just above; one decade more if a value is zero or under `smallest`."""
        found = list(values)
        positive = [value for value in found if value > smallest]
        zero = len(positive) < len(found)
        lo = math.floor(math.log10(min(positive, default=1e-3)) + 1e-9) - int(zero)
        hi = max(max(positive, default=1.0) * 1.2, 10.0 ** (lo + 1 + int(zero)))
        return cls(10.0**lo, hi, start, stop, zero)

    def __call__(self, value: float) -> float:
        share = math.log10(max(value, self.lo) / self.lo) / math.log10(self.hi / self.lo)
        return self.start + share * (self.stop - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        """Powers of ten; the lowest is left out when it stands for zero."""
        lo, hi = math.ceil(math.log10(self.lo) - 1e-9), math.floor(math.log10(self.hi) + 1e-9)
        every = max(1, math.ceil((hi - lo) / about))
        return [10.0**k for k in range(lo + int(self.zero), hi + 1) if (hi - k) % every == 0]


@dataclass
class Canvas:
    """Collects shapes; `render` gives one `<svg>` element that fills its container's width."""

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list)

    def _add(self, tag: str, css: str, inside: str = "", **attributes: object) -> None:
        written = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items()
        )
        self.parts.append(f'<{tag} class="{escape(css)}"{written}>{inside}</{tag}>')

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def rect(
        self, x: float, y: float, width: float, height: float, css: str, *, radius: float = 0, tip: str = ""
    ) -> None:
        self._add("rect", css, _title(tip), x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), rx=radius)

    def dot(self, x: float, y: float, radius: float, css: str, *, tip: str = "") -> None:
        self._add("circle", css, _title(tip), cx=x, cy=y, r=radius)

    def text(self, x: float, y: float, content: str, css: str = "tick", *, anchor: str = "start") -> None:
        self._add("text", css, escape(content), x=x, y=y, text_anchor=anchor)

    def path(self, points: Sequence[Point], css: str) -> None:
        """A line through the points (nothing for fewer than two)."""
        if len(points) > 1:
            self._add("path", css, d="M" + "L".join(f"{_value(x)} {_value(y)}" for x, y in points))

    def area(self, upper: Sequence[Point], lower: Sequence[Point], css: str) -> None:
        """The surface between two lines over the same x."""
        if len(upper) > 1:
            self._add(
                "path", css, d="M" + "L".join(f"{_value(x)} {_value(y)}" for x, y in [*upper, *reversed(lower)]) + "Z"
            )

    def marker(self, x: float, y: float, size: float, css: str) -> None:
        """A cross."""
        self.line(x - size, y - size, x + size, y + size, css)
        self.line(x - size, y + size, x + size, y - size, css)

    def axis_y(self, scale: Linear | Log, left: float, right: float, form: str = "number", about: int = 5) -> None:
        """Hairlines across the panel with their values on the left."""
        for tick in scale.ticks(about):
            y = scale(tick)
            self.line(left, y, right, y, "grid")
            self.text(left - 7, y + 4, axis_label(tick, form), "tick", anchor="end")
        if isinstance(scale, Log) and scale.zero:
            self.line(left, scale.start, right, scale.start, "grid dashed")
            self.text(left - 7, scale.start + 4, "zero", "tick", anchor="end")

    def axis_x(self, scale: Linear | Log, baseline: float, form: str = "number", about: int = 6) -> None:
        """Values under the panel."""
        for tick in scale.ticks(about):
            self.line(scale(tick), baseline, scale(tick), baseline + 4, "axis")
            self.text(scale(tick), baseline + 17, axis_label(tick, form), "tick", anchor="middle")

    def render(self) -> str:
        size = f'viewBox="0 0 {_value(self.width)} {_value(self.height)}"'
        return f'<svg {size} role="img" aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'


def axis_label(tick: float, form: str) -> str:
    """Short wording of an axis value."""
    if form == "percent":
        return words.percent(tick, 0)
    if form == "number" and tick and not 0.001 <= abs(tick) < 10_000:
        exponent = math.log10(abs(tick))
        if abs(exponent - round(exponent)) < 1e-9:
            return words.number(tick).removeprefix("1.0×")
    return words.shown(tick, form)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places in their order, moved as little as keeps each `gap` from the next; of equal ones the first is higher.

    Pool adjacent violators: places minus their rank times the gap must not fall.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    pools: list[tuple[float, int]] = []  # (sum, number) of what moves together
    for rank, index in enumerate(order):
        total, number = places[index] - rank * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / number:
            before, members = pools.pop()
            total, number = total + before, number + members
        pools.append((total, number))
    level = [total / number for total, number in pools for _ in range(number)]
    found = dict(zip(order, (start + rank * gap for rank, start in enumerate(level)), strict=True))
    return [found[index] for index in range(len(places))]


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def _value(value: object) -> str:
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise AssertionError("a shape lies at no finite place")
        return f"{value:.1f}".removesuffix(".0")
    return escape(str(value))


Scale = Linear | Log
Mark = Callable[[Canvas, Scale, Scale], None]
Points = Sequence[tuple[float, float]]

HEAD, FOOT = 52.0, 42.0  # pixels of title and note above a panel, of ticks and axis label below it
HEIGHT, STACKED = 264.0, 290.0  # of a row of panels, of each panel on a telephone


def linear(lo: float, hi: float) -> Callable[[float, float], Scale]:
    return lambda start, stop: Linear(lo, hi, start, stop)


def log(lo: float, hi: float) -> Callable[[float, float], Scale]:
    return lambda start, stop: Log(lo, hi, start, stop)


def decades(values: Iterable[float], smallest: float = 1e-8) -> Callable[[float, float], Scale]:
    """By powers of ten around the values; what is not above `smallest` lies on the line 'zero'."""
    found = list(values)
    return lambda start, stop: Log.around(found, start, stop, smallest)


@dataclass(frozen=True)
class Axis:
    """`scale(start, stop)` maps values onto pixels, `inset` pixels from either end.

    `ticks` are where the values go, if not at `about` round ones; `label` lies `below` pixels under the axis.
    """

    scale: Callable[[float, float], Scale]
    form: str = "number"
    about: int = 5
    label: str = ""
    inset: float = 0.0
    ticks: Sequence[float] | None = None
    below: float = 36.0


@dataclass(frozen=True)
class Box:
    """Where a panel's plot lies, in pixels."""

    left: float
    right: float
    top: float
    bottom: float


@dataclass
class Panel:
    """`under` is drawn before the axes, `marks` after them; `title` and `note` lie above, in the colour of a model."""

    x: Axis
    y: Axis
    marks: list[Mark]
    under: list[Mark] = field(default_factory=list)
    title: str = ""
    note: str = ""
    colour: str = ""

    def draw(self, canvas: Canvas, box: Box, margin: float) -> None:
        """Title and note begin `margin` pixels left of the plot."""
        x = self.x.scale(box.left + self.x.inset, box.right - self.x.inset)
        y = self.y.scale(box.bottom, box.top)
        if self.title:
            canvas.text(box.left - margin, box.top - 34, self.title, f"panel ink-{self.colour}".removesuffix(" ink-"))
        if self.note:
            canvas.text(box.left - margin, box.top - 16, self.note, "note")
        for mark in self.under:
            mark(canvas, x, y)
        canvas.axis_y(y, box.left, box.right, self.y.form, self.y.about)
        if self.x.ticks is None:
            canvas.axis_x(x, box.bottom, self.x.form, self.x.about)
        for tick in self.x.ticks or ():
            canvas.text(x(tick), box.bottom + 17, f"{tick:g}", "tick", anchor="middle")
        if self.x.label:
            middle = (box.left + box.right) / 2
            canvas.text(middle, box.bottom + self.x.below, self.x.label, "note", anchor="middle")
        for mark in self.marks:
            mark(canvas, x, y)


def row_of(
    width: float,
    label: str,
    shown: Sequence[Panel],
    *,
    height: float = HEIGHT,
    gap: float,
    left: float = 50,
    edge: float = 8,
) -> str:
    """SVG of panels side by side, below one another on a telephone; `left` pixels are kept for each axis."""
    stacked = is_narrow(width)
    canvas = Canvas(width, STACKED * len(shown) if stacked else height, label)
    places = [(left, width - edge)] * len(shown) if stacked else panels(width, len(shown), gap=gap, left=left)
    for index, (panel, (start, stop)) in enumerate(zip(shown, places, strict=True)):
        top = index * STACKED if stacked else 0.0
        panel.draw(canvas, Box(start, stop, top + HEAD, top + height - FOOT), left)
    return canvas.render()


def alone(width: float, height: float, label: str, panel: Panel, box: Box) -> str:
    """SVG of one panel."""
    canvas = Canvas(width, height, label)
    panel.draw(canvas, box, box.left)
    return canvas.render()


@dataclass(frozen=True)
class Line:
    points: Points
    css: str

    def __call__(self, canvas: Canvas, x: Scale, y: Scale) -> None:
        canvas.path([(x(a), y(b)) for a, b in self.points], self.css)


@dataclass(frozen=True)
class Band:
    """The surface between two lines over the same x."""

    upper: Points
    lower: Points
    css: str

    def __call__(self, canvas: Canvas, x: Scale, y: Scale) -> None:
        canvas.area([(x(a), y(b)) for a, b in self.upper], [(x(a), y(b)) for a, b in self.lower], self.css)


@dataclass(frozen=True)
class Dots:
    """(x, y, what is said under the pointer) of each; of css `hit` they are there for the pointer alone."""

    points: Iterable[tuple[float, float, str]]
    radius: float
    css: str

    def __call__(self, canvas: Canvas, x: Scale, y: Scale) -> None:
        for a, b, tip in self.points:
            canvas.dot(x(a), y(b), self.radius, self.css, tip=tip)


@dataclass(frozen=True)
class Level:
    """A straight line across the panel at this y."""

    at: float
    css: str = "reference"

    def __call__(self, canvas: Canvas, x: Scale, y: Scale) -> None:
        canvas.line(x.start, y(self.at), x.stop, y(self.at), self.css)


@dataclass(frozen=True)
class Columns:
    """(x, what is said under the pointer) of columns as high as the panel, `share` of a unit of x wide."""

    places: Iterable[tuple[float, str]]
    css: str
    share: float = 1.0

    def __call__(self, canvas: Canvas, x: Scale, y: Scale) -> None:
        wide = (x(1) - x(0)) * self.share
        for at, tip in self.places:
            canvas.rect(x(at) - wide / 2, y.stop, wide, y.start - y.stop, self.css, tip=tip)


@dataclass(frozen=True)
class Bars:
    """(x, y, css, what is said under the pointer) of bars from the axis up, `share` of a unit of x wide."""

    bars: Iterable[tuple[float, float, str, str]]
    share: float = 0.64

    def __call__(self, canvas: Canvas, x: Scale, y: Scale) -> None:
        each = x(1) - x(0)
        for at, value, css, tip in self.bars:
            left, wide = x(at) - each * self.share / 2, each * self.share
            canvas.rect(left, y(value), wide, y.start - y(value), css, radius=2, tip=tip)
