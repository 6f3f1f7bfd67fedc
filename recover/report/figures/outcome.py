"""Pictures of what came out: dense, pruned and recovered side by side, generation by epoch, and where texts part."""

from __future__ import annotations

from recover.config import tasks
from recover.report import words
from recover.report.data import MODELS, Epoch, PageData, UseFigure
from recover.report.figures.figure import (
    Axis,
    Box,
    Canvas,
    Dots,
    Figure,
    Level,
    Line,
    Linear,
    Log,
    Mark,
    Panel,
    Scale,
    alone,
    apart,
    is_narrow,
    linear,
    panels,
)
from recover.report.run_files import Use

ROW = 40  # pixels from bar to bar
HEAD = 58  # pixels above the first bar
RING = 11.0  # radius of the ring around the epoch that is kept; names of levels stand right of it
HALF_WIDTH = 125.0  # pixels of "half by token 123"


def hero(data: PageData) -> Figure:
    """Bars of the headline figures with their intervals; perplexity, where less is better, as dots on its own scale."""
    shown: list[Use] = [use for use in tasks.USES if any(_value(data, model, use) for model in data["headline"])]
    perplexity = {model: (data["headline"][model] or {}).get("perplexity") for model in data["headline"]}
    has_perplexity = any(perplexity.values())
    title = ", ".join(data["headline"]).capitalize()
    if not shown and not has_perplexity:
        return Figure(title, "Not measured: no model has a measure.json yet.")
    number = len(shown) + int(has_perplexity)

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        height = HEAD + len(data["headline"]) * ROW + 4
        canvas = Canvas(width, height * (number if stacked else 1), _hero_label(data, shown))
        places = [(0.0, width)] * number if stacked else panels(width, number)
        for index, (left, right) in enumerate(places):
            top = index * height if stacked else 0.0
            if index < len(shown):
                _bars(canvas, data, shown[index], left, right, top)
            else:
                _perplexity(canvas, perplexity, left, right, top)
        return canvas.render()

    rows = [(use, *(_cell(_value(data, model, use)) for model in data["headline"])) for use in shown]
    if has_perplexity:
        rows.append(("perplexity", *(words.perplexity(perplexity[model]) for model in data["headline"])))
    see = "Bars are means over tasks. Thin lines are 95% intervals. The upright line in each panel is the dense level."
    if has_perplexity:
        see += " Perplexity is on a log scale; further left is better."
    return Figure(title, see, draw, ("measure", *data["headline"]), rows)


def _value(data: PageData, model: str, use: Use) -> UseFigure | None:
    return (data["headline"][model] or {}).get(use)


def _cell(figure: UseFigure | None) -> str:
    if figure is None:
        return words.NOT_MEASURED
    interval = figure["interval"]
    return words.percent(figure["value"], 1) + (
        f" [{words.percent(interval[0], 1)}, {words.percent(interval[1], 1)}]" if interval else ""
    )


def _hero_label(data: PageData, shown: list[Use]) -> str:
    told = {use: [f"{model} {_cell(_value(data, model, use))}" for model in data["headline"]] for use in shown}
    return "Bar chart. " + "; ".join(f"{use}: {', '.join(each)}" for use, each in told.items())


def _bars(canvas: Canvas, data: PageData, use: Use, left: float, right: float, top: float) -> None:
    items = next(figure["items"] for model in data["headline"] if (figure := _value(data, model, use)))
    canvas.text(left, top + 16, use.capitalize(), "panel")
    canvas.text(left, top + 35, f"{tasks.USES[use].score}, {items} items", "note")
    x = Linear(0.0, 1.0, left + 92, right - 68)
    for index, model in enumerate(data["headline"]):
        y = top + HEAD + index * ROW
        _row_label(canvas, model, left, y)
        figure = _value(data, model, use)
        canvas.rect(x.start, y, x.stop - x.start, 24, "track", radius=3)
        if figure is None:
            canvas.text(x.start + 8, y + 17, words.NOT_MEASURED, "note")
            continue
        canvas.rect(
            x.start,
            y,
            max(x(figure["value"]) - x.start, 1.5),
            24,
            f"fill-{model}",
            radius=3,
            tip=f"{model}: {_cell(figure)}",
        )
        if figure["interval"]:
            _whisker(canvas, x(figure["interval"][0]), x(figure["interval"][1]), y + 12)
        canvas.text(right, y + 17, words.percent(figure["value"], 1), "value", anchor="end")
    dense = _value(data, "dense", use)
    if dense:
        foot = top + HEAD + (len(data["headline"]) - 1) * ROW + 30
        canvas.line(x(dense["value"]), top + HEAD - 6, x(dense["value"]), foot, "reference")


def _row_label(canvas: Canvas, model: str, left: float, y: float) -> None:
    canvas.text(left, y + 17, model, f"label ink-{model}")


def _whisker(canvas: Canvas, low: float, high: float, y: float) -> None:
    for css in ("halo", "whisker"):
        canvas.line(low, y, high, y, css)
        canvas.line(low, y - 5, low, y + 5, css)
        canvas.line(high, y - 5, high, y + 5, css)


def _perplexity(canvas: Canvas, perplexity: dict[str, float | None], left: float, right: float, top: float) -> None:
    canvas.text(left, top + 16, "Perplexity", "panel")
    canvas.text(left, top + 35, "log scale, lower is better", "note")
    known = [value for value in perplexity.values() if value]
    x = Log(min(known) / 1.25, max(known) * 1.25, left + 92, right - 68)
    for index, model in enumerate(perplexity):
        y, value = top + HEAD + index * ROW, perplexity[model]
        _row_label(canvas, model, left, y)
        if not value:
            canvas.text(x.start + 8, y + 17, words.NOT_MEASURED, "note")
            continue
        canvas.line(x.start, y + 12, x.stop, y + 12, "rail")
        canvas.dot(x(value), y + 12, 7, f"fill-{model} rim", tip=f"{model}: perplexity {words.perplexity(value)}")
        canvas.text(right, y + 17, words.perplexity(value), "value", anchor="end")
    if perplexity["dense"]:
        foot = top + HEAD + (len(perplexity) - 1) * ROW + 30
        canvas.line(x(perplexity["dense"]), top + HEAD - 6, x(perplexity["dense"]), foot, "reference")


def epochs(data: PageData) -> Figure:
    """Generation after each epoch against the dense and pruned levels, with the training loss beside it."""
    rows = data["epochs"]
    title = "Generation after each epoch"
    if not rows:
        return Figure(title, "Not measured: no epoch of recovery was finished.")

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        canvas = Canvas(width, 560 if stacked else 290, "Line chart: " + "; ".join(_epoch_words(row) for row in rows))
        places = [(44.0, width - 72, 0.0), (44.0, width - 8, 294.0)]
        if not stacked:
            places = [(44.0, width * 0.6, 0.0), (width * 0.6 + 108, width - 8, 0.0)]
        _epoch_generation(canvas, data, *places[0])
        _epoch_loss(canvas, rows, *places[1])
        return canvas.render()

    told = any(row["form"] is not None for row in rows)
    table = [
        (
            row["epoch"],
            words.count(row["tokens"]),
            words.percent(_epoch_score(row), 1),
            *([words.percent(row[kind], 1) for kind in ("form", "content")] if told else []),
            words.percent(row["loop_rate"], 1) + _from(row["loops_begin"]),
            words.number(row["train"].get("loss")),
            "best" if row["best"] else "",
        )
        for row in rows
    ]
    see = (
        "A falling loss does not promise better writing, so generation itself is measured after each epoch. "
        "The ring marks the epoch that is kept."
    )
    names = ("mistakes of form", "well formed, wrong", "loop rate")
    columns = ("epoch", "tokens", "generation", *(names if told else names[2:]), "loss", "")
    return Figure(title, see + _loops_of_dense(data), draw, columns, table)


def _from(token: float | None) -> str:
    return "" if token is None else f", from token {words.number(token)}"


def _loops_of_dense(data: PageData) -> str:
    """What a loop rate is to be held against."""
    rates = {
        model: [rate for row in data["mistakes"] if row["model"] == model and (rate := row["loop_rate"]) is not None]
        for model in ("dense", "pruned")
    }
    said = [f"{model} {words.percent(sum(found) / len(found), 1)}" for model, found in rates.items() if found]
    return f" Loop rate, to compare: {', '.join(said)}." if said else ""


def _epoch_score(row: Epoch) -> float | None:
    return words.finite(row["headline"].get("generation"))


def _epoch_words(row: Epoch) -> str:
    loss = words.number(row["train"].get("loss"))
    return f"epoch {row['epoch']}: generation {words.percent(_epoch_score(row))}, loss {loss}"


def _epoch_generation(canvas: Canvas, data: PageData, left: float, right: float, top: float) -> None:
    rows = data["epochs"]
    x, y = Linear(0, rows[-1]["epoch"], left, right), Linear(0, 1, top + 222, top + 36)
    canvas.text(left - 44, top + 16, "Generation", "panel")
    canvas.axis_y(y, left, right, "percent", 4)
    _epoch_axis(canvas, x, top + 222)
    for model in ("dense", "pruned"):
        level = _value(data, model, "generation")
        if level:
            canvas.line(left, y(level["value"]), right, y(level["value"]), f"stroke-{model} level")
            canvas.text(right + RING + 4, y(level["value"]) + 4, model, f"label ink-{model}")
    start = _value(data, "pruned", "generation")
    scored = [(row, score) for row in rows if (score := _epoch_score(row)) is not None]
    line = [(x(0), y(start["value"]))] if start else []
    canvas.path(line + [(x(row["epoch"]), y(score)) for row, score in scored], "stroke-recovered line")
    for row, score in scored:
        if row["best"]:
            canvas.dot(x(row["epoch"]), y(score), RING, "ring")
            canvas.text(
                x(row["epoch"]),
                y(score) + (28 if score >= (y.lo + y.hi) / 2 else -18),  # away from the lines of dense and of pruned
                f"kept: {words.percent(score)}",
                "value ink-recovered",
                anchor=_anchor(x, row["epoch"]),
            )
        canvas.dot(x(row["epoch"]), y(score), 5, "fill-recovered rim", tip=_epoch_words(row))


def _anchor(x: Linear, epoch: int) -> str:
    return "end" if epoch == x.hi else "middle"


def _epoch_axis(canvas: Canvas, x: Linear, baseline: float) -> None:
    every = max(1, round(x.hi / 10))
    for epoch in range(0, int(x.hi) + 1, every):
        canvas.line(x(epoch), baseline, x(epoch), baseline + 4, "axis")
        canvas.text(x(epoch), baseline + 18, str(epoch), "tick", anchor="middle")
    canvas.text((x.start + x.stop) / 2, baseline + 38, "epoch", "note", anchor="middle")


def _epoch_loss(canvas: Canvas, rows: list[Epoch], left: float, right: float, top: float) -> None:
    canvas.text(left - 44, top + 16, "Training loss per token", "panel")
    losses = [(row, loss) for row in rows if (loss := words.finite(row["train"].get("loss"))) is not None]
    if not losses:
        canvas.text(left, top + 60, words.NOT_MEASURED, "note")
        return
    x = Linear(0, rows[-1]["epoch"], left, right)
    y = Linear(0, max(loss for _, loss in losses) * 1.05 or 1.0, top + 222, top + 36)
    canvas.axis_y(y, left, right, "number", 4)
    _epoch_axis(canvas, x, top + 222)
    canvas.path([(x(row["epoch"]), y(loss)) for row, loss in losses], "stroke-muted line")
    for row, loss in losses:
        canvas.dot(x(row["epoch"]), y(loss), 4, "fill-muted rim", tip=_epoch_words(row))


def divergence(data: PageData) -> Figure:
    """Share of prompts whose free-running text is still the dense model's, step by step."""
    see = (
        "Share of prompts whose greedy text is still equal to the dense model's. Where a curve crosses the dashed "
        "line, half of the texts have become different."
    )
    curves = {model: _same_share(data, model) for model in data["drift"]}
    missing = "Not measured: no probe recorded free-running text."
    return _still_equal("How long texts stay equal to the dense model's", see, curves, missing)


def parting(data: PageData) -> Figure | None:
    """The same of the answers to tasks, which go on to their end: those that never part have a share of their own."""
    listed = {model: [parted["curve"] for row in data["divergence"] if (parted := row.get(model))] for model in MODELS}
    curves = {model: curve for model, each in listed.items() if (curve := _mean_curve(each))}
    if not curves:
        return None
    last = max(curve[-1][0] for curve in curves.values())
    for curve in curves.values():
        if curve[-1][0] < last:
            curve.append((last, curve[-1][1]))
    ends = [f"{model}, {words.percent(curve[-1][1], 1)}" for model, curve in curves.items()]
    see = (
        "Share of the answers to tasks that are still the dense model's, token by token; the mean over tasks. A curve "
        f"ends level at the share of answers that never leave dense's: {'; '.join(ends)}."
    )
    return _still_equal("How long answers stay the dense model's", see, curves, "")


def _mean_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of falling steps, each weighing the same, wherever one of them falls."""
    known = [curve for curve in curves if curve]
    places = sorted({token for curve in known for token, _ in curve})
    return [(token, sum(_level(curve, token) for curve in known) / len(known)) for token in places]


def _level(curve: list[tuple[int, float]], token: int) -> float:
    return next((share for at, share in reversed(curve) if at <= token), 1.0)


def _still_equal(title: str, see: str, curves: dict[str, list[tuple[int, float]]], missing: str) -> Figure:
    """Curves of the share of texts that are still equal, by the number of tokens."""
    curves = {model: curve for model, curve in curves.items() if curve}
    if not curves:
        return Figure(title, missing)
    last = max(step for curve in curves.values() for step, _ in curve) or 1
    label = "Line chart: " + "; ".join(_curve_words(model, curve) for model, curve in curves.items())

    def draw(width: float) -> str:
        x = Axis(linear(0, last), "count", 6, "tokens written", below=40)
        marks: list[Mark] = [Level(0.5), _names(curves), *_lines(curves, width)]
        panel = Panel(x, Axis(linear(0, 1), "percent", 4), marks)
        return alone(width, 300, label, panel, Box(44, width - 84, 20, 240))

    steps = sorted({step for curve in curves.values() for step, _ in curve})
    table = [(step, *(_share_at(curve, step) for curve in curves.values())) for step in steps]
    return Figure(title, see, draw, ("token", *curves), table)


def _share_at(curve: list[tuple[int, float]], step: int) -> str:
    share = dict(curve).get(step)
    return words.percent(share if share is not None else _level(curve, step), 1)


def _names(curves: dict[str, list[tuple[int, float]]]) -> Mark:
    """Each model's name at the end of its curve, none over another."""

    def draw(canvas: Canvas, x: Scale, y: Scale) -> None:
        ends = apart([y(curve[-1][1]) for curve in curves.values()], 16)
        for model, end in zip(curves, ends, strict=True):
            canvas.text(x.stop + 8, end + 4, model, f"label ink-{model}")

    return draw


def _lines(curves: dict[str, list[tuple[int, float]]], width: float) -> list[Mark]:
    halves = {model: half for model, curve in curves.items() if (half := _half(curve)) is not None}
    found: list[Mark] = []
    for index, (model, curve) in enumerate(curves.items()):
        found.append(Line(curve, f"stroke-{model} line"))
        if model in halves:
            found.append(_half_mark(model, halves, index, width))
        tips = [
            (at, same, f"{model}, token {at}: {words.percent(same)} of prompts still equal dense") for at, same in curve
        ]
        found.append(Dots(tips, 6, "hit"))
    return found


def _half_mark(model: str, halves: dict[str, int], index: int, width: float) -> Mark:
    """Where half of the texts have parted. The words lie right of the line, and of another's that would cross them;
    left where a narrow window would cut them off.
    """
    half = halves[model]

    def draw(canvas: Canvas, x: Scale, y: Scale) -> None:
        canvas.line(x(half), y(0), x(half), y(0.5), f"stroke-{model} level")
        near = max(x(other) for other in halves.values() if 0 <= x(other) - x(half) < HALF_WIDTH) + 8
        at, side = (near, "start") if near + HALF_WIDTH <= width else (x(half) - 8, "end")
        text = f"half by token {half}"
        canvas.text(at, y(0.5) - 7 - 18 * index, text, f"value ink-{model}", anchor=side)

    return draw


def _same_share(data: PageData, model: str) -> list[tuple[int, float]]:
    steps = (data["drift"][model] or {}).get("steps") or []
    known = [(step["step"], step["free_running"]["diverged"]) for step in steps]
    return [(step, 1.0 - diverged) for step, diverged in known if diverged is not None]


def _half(curve: list[tuple[int, float]]) -> int | None:
    """The first token by which half of the texts have parted."""
    return next((step for step, share in curve if share <= 0.5), None)


def _curve_words(model: str, curve: list[tuple[int, float]]) -> str:
    half = _half(curve)
    where = f"half of the texts have parted by token {half}" if half is not None else "more than half never part"
    return f"{model}: {where}, {words.percent(curve[-1][1])} are equal at the end"
