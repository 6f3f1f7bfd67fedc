"""Pictures of sublayers taken one at a time, all else dense: what each is worth, and what it writes into the stream."""

from __future__ import annotations

from typing import Literal

from recover.report import plan_text, words
from recover.report.data import PageData, SublayerDrift
from recover.report.drift import by_model, mean_of
from recover.report.figures.figure import Figure, is_narrow, panels
from recover.report.figures.svg import Canvas, Linear, Log

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

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        label = "Dot plots by block. " + " ".join(_worst(model, levels) for model, levels in replaced.items())
        canvas = Canvas(width, 580 if stacked else 264, label)
        places = [(50.0, width - 8)] * 2 if stacked else panels(width, 2, gap=24, left=50)
        values = [value for levels in (closed, *replaced.values()) for value in levels.values()]
        for index, (part, (left, right)) in enumerate(zip(PARTS, places, strict=True)):
            top = index * 290.0 if stacked else 0.0
            y = Log.around(values, top + 222, top + 48, NOTHING)
            x = Linear(-0.5, last + 0.5, left, right)
            _frame(canvas, PART_NAMES[part], x, y, last)
            _worths(canvas, part, closed, replaced, plan_text.gone(data["plan"], part), x, y)
        return canvas.render()

    see = (
        "One sublayer at a time is changed, in the dense model. Bars: KL right behind it if it is closed, what it is "
        "worth there. Dots: KL with the other model's sublayer in its place. A dot on top of its bar does nothing of "
        "the work; one far below does nearly all of it; on the zero line it is the dense one. Log scale."
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


def _frame(canvas: Canvas, title: str, x: Linear, y: Linear | Log, last: int) -> None:
    canvas.text(x.start - 50, y.stop - 32, title, "panel")
    canvas.axis_y(y, x.start, x.stop)
    every = max(1, -(-(last + 1) // 12))
    for block in range(0, last + 1, every):
        canvas.text(x(block), y.start + 17, str(block), "tick", anchor="middle")
    canvas.text((x.start + x.stop) / 2, y.start + 36, "block", "note", anchor="middle")


def _worths(
    canvas: Canvas, part: str, closed: Levels, replaced: dict[str, Levels], gone: set[int], x: Linear, y: Log
) -> None:
    each = x(1) - x(0)
    for (of, block), value in closed.items():
        if of == part:
            css = "bar-gone" if block in gone else "bar"
            tip = f"{part} of block {block} closed: KL {words.number(value)}{', dropped' if block in gone else ''}"
            canvas.rect(x(block) - each * 0.32, y(value), each * 0.64, y.start - y(value), css, radius=2, tip=tip)
    for model, levels in replaced.items():
        for (of, block), value in levels.items():
            if of == part:
                tip = f"{part} of block {block}, {model}'s: KL {words.number(value)}"
                canvas.dot(x(block), y(value), min(4.5, max(2.5, each * 0.2)), f"fill-{model} rim", tip=tip)


def writes(data: PageData) -> Figure | None:
    """How far the stream would be from the dense state without a sublayer's contribution: along it, and across it."""
    found = by_model(data, lambda probe: probe["sublayers"])
    rows = next(iter(found.values()), [])
    along, across = (_levels(rows, "closed", figure) for figure in ("parallel", "orthogonal"))
    if not across:
        return None
    last = max(block for _, block in across)

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        (part, block), most = max(across.items(), key=lambda item: item[1])
        label = f"Line charts by block. Most is written by the {part} of block {block}: {words.number(most)} across."
        canvas = Canvas(width, 580 if stacked else 264, label)
        places = [(50.0, width - 8)] * 2 if stacked else panels(width, 2, gap=24, left=50)
        values = [0.0, *across.values(), *(abs(value) for value in along.values())]
        for index, (name, (left, right)) in enumerate(zip(PARTS, places, strict=True)):
            top = index * 290.0 if stacked else 0.0
            x, y = Linear(-0.5, last + 0.5, left, right), Linear(0, max(values) * 1.05, top + 222, top + 52)
            _frame(canvas, PART_NAMES[name], x, y, last)
            canvas.text(left - 50, top + 38, "solid: across · dashed: along", "note")
            _written(canvas, name, along, across, x, y)
        return canvas.render()

    see = (
        "What is missing from the dense model's state if one sublayer is closed, as a share of that state's length: "
        "across it (the direction turns, and what is predicted may change) and along it (only its length changes, "
        "which the final norm mostly undoes). Low on both: cheap to lose at this place."
    )
    columns = ("block", "sublayer", "across", "along")
    table = [
        (block, PART_NAMES[part], words.number(value), words.number(along.get((part, block))))
        for (part, block), value in sorted(across.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return Figure("What each sublayer writes into the stream", see, draw, columns, table)


def _written(canvas: Canvas, part: str, along: Levels, across: Levels, x: Linear, y: Linear) -> None:
    for levels, css, name in ((along, "line dashed", "along"), (across, "line", "across")):
        points = [(block, abs(value)) for (of, block), value in sorted(levels.items()) if of == part]
        canvas.path([(x(block), y(value)) for block, value in points], f"stroke-dense {css}")
        for block, value in points:
            tip = f"{part} of block {block}: {words.number(value)} {name}"
            canvas.dot(x(block), y(value), 3.5, "fill-dense rim", tip=tip)
