"""Pictures of sublayers taken one at a time, all else dense: what each is worth, and what it writes into the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from recover.report import words
from recover.report.data import PageData, SublayerDrift
from recover.report.drift import by_model, mean_of
from recover.report.figures.figure import (
    Axis,
    Bars,
    Canvas,
    Dots,
    Figure,
    Line,
    Mark,
    Panel,
    Scale,
    decades,
    linear,
    row_of,
)

PARTS = ("attention", "mlp")
PART_NAMES = {"attention": "Attention", "mlp": "MLP"}
NOTHING = 1e-8  # nats; a sublayer that is the dense one itself changes nothing

Levels = dict[tuple[str, int], float]  # (part, block) -> mean figure


def _levels(rows: list[SublayerDrift], counterfactual: str, figure: Literal["kl", "parallel", "orthogonal"]) -> Levels:
    return {
        (row["part"], row["block"]): value
        for row in rows
        if row["counterfactual"] == counterfactual and (value := mean_of(row[figure])) is not None
    }


def worth(data: PageData) -> Figure | None:
    """KL right behind each sublayer: closed (what it is worth), and with the other model's in its place."""
    found = by_model(data, lambda probe: probe["sublayers"])
    replaced = {model: _levels(rows, "pruned", "kl") for model, rows in found.items()}
    closed = next((levels for rows in found.values() if (levels := _levels(rows, "closed", "kl"))), {})
    if not closed and not any(replaced.values()):
        return None
    last = max(block for levels in (closed, *replaced.values()) for _, block in levels)

    values = [value for levels in (closed, *replaced.values()) for value in levels.values()]

    def draw(width: float) -> str:
        label = "Dot plots by block. " + " ".join(_worst(model, levels) for model, levels in replaced.items())
        shown = [
            Panel(
                _blocks_axis(last),
                Axis(decades(values, NOTHING)),
                _worths(part, closed, replaced, words.plan_gone(data["plan"], part)),
                title=PART_NAMES[part],
            )
            for part in PARTS
        ]
        return row_of(width, label, shown, gap=24)

    see = (
        "One sublayer of the dense model is changed at a time, and KL is measured right after it, log scale. Bars: the "
        "sublayer is removed. Dots: it is replaced by the other model's. A dot at the top of its bar: the replacement "
        "does none of the work. Far below: it does nearly all of it. On the zero line: it is the dense sublayer."
    )
    columns = ("block", "sublayer", "KL if closed", *(f"KL with {model}'s" for model in replaced))
    table = [
        (block, PART_NAMES[part], *(words.number(levels.get((part, block))) for levels in (closed, *replaced.values())))
        for part, block in sorted(closed or next(iter(replaced.values())), key=lambda at: (at[1], at[0]))
    ]
    legend = ("dense, closed", *replaced)
    return Figure("Which sublayers carry the damage", see, draw, columns, table, legend)


def _worst(model: str, levels: Levels) -> str:
    if not levels or max(levels.values()) <= NOTHING:
        return f"{model}: no sublayer differs from the dense one."
    (part, block), value = max(levels.items(), key=lambda item: item[1])
    return f"{model}: the largest KL is {words.number(value)}, from the {PART_NAMES[part]} of block {block}."


def _blocks_axis(last: int) -> Axis:
    return Axis(linear(-0.5, last + 0.5), label="block", ticks=range(0, last + 1, max(1, -(-(last + 1) // 12))))


def _worths(part: str, closed: Levels, replaced: dict[str, Levels], gone: set[int]) -> list[Mark]:
    bars = [
        (block, value, "bar-gone" if block in gone else "bar", _closed_words(part, block, value, block in gone))
        for (of, block), value in closed.items()
        if of == part
    ]
    found: list[Mark] = [Bars(bars)]
    for model, levels in replaced.items():
        dots = [
            (block, value, f"{part} of block {block}, {model}'s: KL {words.number(value)}")
            for (of, block), value in levels.items()
            if of == part
        ]
        found.append(_fitting(dots, f"fill-{model} rim"))
    return found


def _closed_words(part: str, block: int, value: float, gone: bool) -> str:
    return f"{part} of block {block} closed: KL {words.number(value)}{', dropped' if gone else ''}"


def _fitting(dots: Sequence[tuple[float, float, str]], css: str) -> Mark:
    """Dots that are smaller where blocks are many."""

    def draw(canvas: Canvas, x: Scale, y: Scale) -> None:
        Dots(dots, min(4.5, max(2.5, (x(1) - x(0)) * 0.2)), css)(canvas, x, y)

    return draw


def writes(data: PageData) -> Figure | None:
    """How far the stream would be from the dense state without a sublayer's contribution: along it, and across it."""
    found = by_model(data, lambda probe: probe["sublayers"])
    rows = next(iter(found.values()), [])
    along, across = (_levels(rows, "closed", figure) for figure in ("parallel", "orthogonal"))
    if not across:
        return None
    last = max(block for _, block in across)

    highest = max(0.0, *across.values(), *(abs(value) for value in along.values()))

    def draw(width: float) -> str:
        (part, block), most = max(across.items(), key=lambda item: item[1])
        label = f"Line charts by block. Most is written by the {part} of block {block}: {words.number(most)} across."
        shown = [
            Panel(
                _blocks_axis(last),
                Axis(linear(0, highest * 1.05)),
                _written(name, along, across),
                title=PART_NAMES[name],
                note="solid: across · dashed: along",
            )
            for name in PARTS
        ]
        return row_of(width, label, shown, gap=24)

    see = (
        "One sublayer is removed: how much of the dense model's hidden state is then missing, as a share of its "
        "length. Across: the direction changes, and so may the prediction. Along: only the length changes, and the "
        "final norm undoes most of that. Low on both lines: this sublayer is cheap to lose."
    )
    columns = ("block", "sublayer", "across", "along")
    table = [
        (block, PART_NAMES[part], words.number(value), words.number(along.get((part, block))))
        for (part, block), value in sorted(across.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return Figure("What each sublayer adds to the hidden state", see, draw, columns, table)


def _written(part: str, along: Levels, across: Levels) -> list[Mark]:
    found: list[Mark] = []
    for levels, css, name in ((along, "line dashed", "along"), (across, "line", "across")):
        points = [(block, abs(value)) for (of, block), value in sorted(levels.items()) if of == part]
        tips = [(block, value, f"{part} of block {block}: {words.number(value)} {name}") for block, value in points]
        found += [Line(points, f"stroke-dense {css}"), Dots(tips, 3.5, "fill-dense rim")]
    return found
