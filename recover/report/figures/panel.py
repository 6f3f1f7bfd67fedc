"""A panel as data: two axes and marks in the units of the figure. How it lies on the page is worked out here, once.

A mark is anything that draws itself, given the canvas and the two scales; the classes below are the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from recover.report.figures.figure import is_narrow, panels
from recover.report.figures.svg import Canvas, Linear, Log

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
