"""What the figures share: a canvas that is a file of its own in both themes, a grid of panels, labels that part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from recover.report.figures.figure import Canvas, Linear, Log

WIDTH = 960.0
COLOURS = {  # on light paper, on dark
    "blue": ("#1d5fd1", "#8ab4ff"),
    "orange": ("#d4511b", "#ff8b5c"),
    "teal": ("#0b857a", "#3cc9b6"),
    "purple": ("#8443c4", "#c79bf2"),
    "grey": ("#64748b", "#9aa8bb"),
}
PLAIN = {
    "paper": ("#fcfbf9", "#14171a"),
    "ink": ("#1d2329", "#e8e6e1"),
    "soft": ("#59636e", "#a0a8b0"),
    "hair": ("#e5e1da", "#31373d"),
}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
RULES = """
text { font-family: FONT; font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums }
.panel { font-weight: 600; font-size: 15px } .tick { fill: var(--soft); font-size: 12px }
.note { fill: var(--soft); font-size: 12.5px }
.paper { fill: var(--paper) } .grid { stroke: var(--hair) } .axis { stroke: var(--soft) } .gone { fill: var(--hair) }
.grid.dashed, .dashed { stroke-dasharray: 5 4 } .line { fill: none; stroke-width: 2; stroke-linejoin: round }
.thin { fill: none; stroke-width: 1.3 } .rim { stroke: var(--paper); stroke-width: 1.2 }
.ink-soft { fill: var(--soft) } .small { font-size: 12px }
.diagonal { stroke: var(--soft); stroke-dasharray: 3 3 }
"""


@dataclass(frozen=True)
class Panel:
    """The plotting area of one panel, in pixels; `index` counts from the upper left."""

    left: float
    right: float
    top: float
    bottom: float
    index: int


def grid(count: int, columns: int, height: float, *, left: float, right: float, above: float = 0) -> list[Panel]:
    """`count` panels of `height`, row by row, with room for an axis, a title, and labels on the right."""
    each, head, foot = WIDTH / columns, 46.0, 48.0
    found = []
    for index in range(count):
        x, y = (index % columns) * each, above + (index // columns) * (height + head + foot)
        found.append(Panel(x + left, x + each - right, y + head, y + head + height, index))
    return found


def canvas_for(panels: Sequence[Panel], label: str) -> Canvas:
    """A canvas that holds the panels, on paper of its own: a page behind it may be of either theme."""
    canvas = Canvas(WIDTH, max(panel.bottom for panel in panels) + 48, label)
    canvas.rect(0, 0, canvas.width, canvas.height, "paper")
    return canvas


def frame(
    canvas: Canvas, panel: Panel, x: Linear | Log, y: Linear | Log, words: tuple[str, str, str], form: str
) -> None:
    """Title, axes and their names: `words` are title, name of x, name of y."""
    title, below, beside = words
    canvas.text(panel.left, panel.top - 26, title, "panel")
    canvas.text(panel.left, panel.top - 9, beside, "note")
    canvas.axis_y(y, panel.left, panel.right, form)
    if isinstance(x, Log):
        canvas.axis_x(x, panel.bottom)
    else:
        canvas.axis_x(x, panel.bottom, "count", min(8, max(1, int(x.hi))))
    canvas.text((panel.left + panel.right) / 2, panel.bottom + 36, below, "note", anchor="middle")


def end_labels(canvas: Canvas, x: float, labels: list[tuple[float, str, str]], top: float, bottom: float) -> None:
    """(y, words, colour) at the right end of lines, moved apart where they would cover each other."""
    places = apart([y for y, _, _ in labels], 14.0, top, bottom)
    for place, (_, words, colour) in zip(places, labels, strict=True):
        canvas.text(x, place + 4, words, f"ink-{colour}")


def apart(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """The places, each `gap` from its neighbours at least, as near to where they were as one pass each way brings."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    for before, after in pairwise(order):
        found[after] = max(found[after], found[before] + gap)
    limit = bottom
    for index in reversed(order):
        found[index] = max(min(found[index], limit), top)
        limit = found[index] - gap
    return found


def key(canvas: Canvas, y: float, entries: Sequence[tuple[str, str]], x: float = 48.0) -> None:
    """A line of samples, (classes of the line, words), for what is the same in every panel."""
    for css, words in entries:
        canvas.line(x, y, x + 26, y, css)
        canvas.text(x + 33, y + 4, words, "note")
        x += 33 + 6.7 * len(words) + 26


def standalone(canvas: Canvas) -> str:
    """SVG as a file: it brings its colours, for light and for dark."""
    size = f'xmlns="http://www.w3.org/2000/svg" width="{canvas.width:.0f}" height="{canvas.height:.0f}" '
    body = canvas.render().replace("<svg ", f"<svg {size}", 1)
    head, _, rest = body.partition(">")
    return f"{head}><style>{_style()}</style>{rest}\n"


def _style() -> str:
    named = {**PLAIN, **COLOURS}
    light, dark = ("; ".join(f"--{name}: {pair[side]}" for name, pair in named.items()) for side in (0, 1))
    rules = [f"svg {{ {light} }}", f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"]
    for name in COLOURS:
        rules.append(f".stroke-{name} {{ stroke: var(--{name}) }} .fill-{name}, .ink-{name} {{ fill: var(--{name}) }}")
        rules.append(f".wash-{name} {{ fill: var(--{name}); fill-opacity: .13 }}")
    return RULES.replace("FONT", FONT.replace('"', "'")) + "\n".join(rules)
