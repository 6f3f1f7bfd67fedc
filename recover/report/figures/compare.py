"""Pictures of a comparison: what each run kept, for what, and how it came there along the tokens of distillation."""

from __future__ import annotations

from collections.abc import Mapping

from recover.config import tasks
from recover.report import verdict, words
from recover.report.data import CHANGED, Changed, ComparedRun, Comparison
from recover.report.figures.figure import (
    Axis,
    Box,
    Canvas,
    Dots,
    Figure,
    Line,
    Linear,
    Mark,
    Panel,
    Points,
    Scale,
    alone,
    apart,
    decades,
    is_narrow,
    linear,
    panels,
)
from recover.report.run_files import Use

ROW = 46


def share_cell(run: ComparedRun, model: Changed, use: Use) -> tuple[str, float | None, str]:
    """(wording, share, grade) of what a model of a run keeps of a use."""
    share = run["kept"][model][use]
    grade = run["grades"][model][use]
    return (grade, None, "") if share is None else (verdict.share(share), share, grade)


def ways(data: Comparison) -> Figure:
    """For each run, the way from pruned to recovered, as a share of dense."""
    runs = data["runs"]
    uses: list[Use] = [
        use for use in tasks.USES if any(run["kept"][model][use] is not None for run in runs for model in CHANGED)
    ]
    title = "From pruned to recovered, as a share of dense"
    if not uses:
        return Figure(title, "Not measured: no run has both a dense and a pruned measure.")
    top = max(run["kept"][model][use] or 0.0 for run in runs for model in CHANGED for use in uses)

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        height = 44 + ROW * len(runs) + 36
        label = "Dot plot. " + " ".join(run["summary"] for run in runs)
        canvas = Canvas(width, height * (len(uses) if stacked else 1), label)
        places = [(0.0, width)] * len(uses) if stacked else panels(width, len(uses), gap=40)
        for index, (use, (left, right)) in enumerate(zip(uses, places, strict=True)):
            x = Linear(0.0, max(1.05, top * 1.05), left, right - 12)
            _panel(canvas, runs, use, x, index * height if stacked else 0.0)
        return canvas.render()

    see = (
        "Each line is one run: the small dot is the pruned model, the large dot the recovered one. The dashed line is "
        "dense. A line that runs to the left: recovery made this use worse."
    )
    shares = [f"{use}, {model}" for use in uses for model in CHANGED]
    table = [(run["name"], *(share_cell(run, model, use)[0] for use in uses for model in CHANGED)) for run in runs]
    return Figure(title, see, draw, ("run", *shares), table, CHANGED)


def _panel(canvas: Canvas, runs: list[ComparedRun], use: Use, x: Linear, top: float) -> None:
    base = top + 40 + ROW * len(runs)
    canvas.text(x.start, top + 16, use.capitalize(), "panel")
    for tick in x.ticks(5):
        canvas.line(x(tick), top + 34, x(tick), base, "grid")
        canvas.text(x(tick), base + 18, words.percent(tick, 0), "tick", anchor="middle" if tick else "start")
    canvas.line(x(1.0), top + 30, x(1.0), base, "reference")
    for index, run in enumerate(runs):
        y = top + 40 + ROW * index + 28
        before, after = (run["kept"][model][use] for model in CHANGED)
        canvas.text(x.start, y - 12, run["name"], "note")
        if before is not None and after is not None:
            canvas.line(x(before), y, x(after), y, "stroke-recovered line")
        for model, share, radius in (("pruned", before, 5), ("recovered", after, 7)):
            if share is not None:
                tip = f"{run['name']}, {model}: {use} {verdict.share(share)} of dense"
                canvas.dot(x(max(share, 0.0)), y, radius, f"fill-{model} rim", tip=tip)
        if before is None and after is None:
            canvas.text(x.start, y + 4, run["grades"]["recovered"][use], "note")


def trade(data: Comparison) -> Figure | None:
    """Generation against choice, and against what is stored: which run gives which use, and for how much."""
    runs = data["runs"]
    kept = {run["name"]: [run["kept"][model] for model in CHANGED] for run in runs}
    choice = {name: _places([(share["choice"], share["generation"]) for share in pair]) for name, pair in kept.items()}
    stored = {
        run["name"]: _places([(run["parameters"], share["generation"]) for share in kept[run["name"]]]) for run in runs
    }
    shown = [
        (name, what, places)
        for name, what, places in (("Against choice", "choice", choice), ("Against weights", "weights", stored))
        if any(place for pair in places.values() for place in pair)
    ]
    if not shown:
        return None

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        label = "Scatter plots of generation kept. " + " ".join(run["summary"] for run in runs)
        canvas = Canvas(width, 330 * (len(shown) if stacked else 1), label)
        places = [(44.0, width)] * len(shown) if stacked else panels(width, len(shown), gap=40, left=44)
        for index, ((title, what, points), (left, right)) in enumerate(zip(shown, places, strict=True)):
            _scatter(canvas, title, what, points, left, right, index * 330.0 if stacked else 0.0)
        return canvas.render()

    see = (
        "Upwards: generation kept. To the right: choice kept (first panel) and weights stored (second), as shares of "
        "dense. Each run goes from its ring (pruned) to its disc (recovered). Best is the upper right of the first "
        "panel and the upper left of the second."
    )
    columns = ("run", "weights", "choice, pruned", "choice, recovered", "generation, pruned", "generation, recovered")
    table = [
        (
            run["name"],
            words.percent(run["parameters"]),
            *(share_cell(run, model, use)[0] for use in ("choice", "generation") for model in CHANGED),
        )
        for run in runs
    ]
    return Figure("What is kept, for what", see, draw, columns, table, CHANGED)


Place = tuple[float, float]


def _places(points: list[tuple[float | None, float | None]]) -> list[Place | None]:
    return [(a, b) if a is not None and b is not None else None for a, b in points]


def _scatter(
    canvas: Canvas, title: str, what: str, places: dict[str, list[Place | None]], left: float, right: float, top: float
) -> None:
    known = [place for pair in places.values() for place in pair if place is not None]
    low = min(0.9, *(a for a, _ in known)) - 0.02
    x = Linear(low, max(1.0, *(a for a, _ in known)) + 0.01, left, right - 110)
    y = Linear(0.0, max(1.05, *(b for _, b in known)), top + 270, top + 32)
    canvas.text(left - 44, top + 16, title, "panel")
    canvas.axis_y(y, left, x.stop, "percent")
    canvas.axis_x(x, top + 270, "percent", 5)
    canvas.text((x.start + x.stop) / 2, top + 308, f"{what}, share of dense", "note", anchor="middle")
    canvas.line(left, y(1.0), x.stop, y(1.0), "reference")
    canvas.line(x(1.0), y.start, x(1.0), y.stop, "reference")
    for name, (before, after) in places.items():
        if before and after:
            canvas.line(x(before[0]), y(before[1]), x(after[0]), y(after[1]), "stroke-muted thin")
        if before:
            canvas.dot(
                x(before[0]), y(before[1]), 5, "hollow stroke-pruned", tip=f"{name}, pruned: {_at(what, before)}"
            )
        if after:
            canvas.dot(
                x(after[0]), y(after[1]), 6.5, "fill-recovered rim", tip=f"{name}, recovered: {_at(what, after)}"
            )
    ends = {name: last for name, (before, after) in places.items() if (last := after or before)}
    names_at_edge(canvas, {name: (x(a), y(b)) for name, (a, b) in ends.items()}, x.stop)


def _at(what: str, point: Place) -> str:
    return f"{what} {verdict.share(point[0])}, generation {verdict.share(point[1])}"


def names_at_edge(canvas: Canvas, ends: dict[str, tuple[float, float]], right: float) -> None:
    """Names at the right edge, each tied to its point, none over another."""
    heights = apart([y for _, y in ends.values()], 15)
    for (name, (x, y)), height in zip(ends.items(), heights, strict=True):
        canvas.line(x + 8, y, right + 6, height, "grid")
        canvas.text(right + 9, height + 4, name if len(name) < 17 else f"{name[:15]}…", "note")


def _tokens_axis(most: float, width: float) -> Axis:
    return Axis(linear(0, most), "count", 4 if is_narrow(width) else 6, "tokens of distillation", below=40)


def _names(lines: Mapping[str, Points]) -> Mark:
    """Each run's name at the right edge, tied to the end of its line."""

    def draw(canvas: Canvas, x: Scale, y: Scale) -> None:
        ends = {name: (x(line[-1][0]), y(line[-1][1])) for name, line in lines.items()}
        names_at_edge(canvas, ends, x.stop)

    return draw


def courses(data: Comparison) -> Figure | None:
    """Generation after each epoch against the tokens spent, all runs in one panel."""
    lines = {run["name"]: _course(run) for run in data["runs"]}
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    most = max(tokens for line in lines.values() for tokens, _ in line)

    label = "Line chart. " + "; ".join(_course_words(*item) for item in lines.items())
    marks: list[Mark] = [_names(lines)]
    for name, line in lines.items():
        tips = [
            (tokens, score, f"{name}, {words.count(tokens)} tokens: generation {words.percent(score)}")
            for tokens, score in line
        ]
        marks += [Line(line, "stroke-recovered line"), Dots(tips[:1], 4.5, "fill-pruned rim")]
        marks.append(Dots(tips[1:], 4.5, "fill-recovered rim"))

    def draw(width: float) -> str:
        panel = Panel(_tokens_axis(most, width), Axis(linear(0, 1), "percent"), marks)
        return alone(width, 290, label, panel, Box(44, width - 120, 18, 236))

    see = (
        "Generation itself, not its share of dense, measured after each epoch; the first dot is the pruned model. A "
        "line that still climbs at its end was stopped early. Epochs may be measured on fewer items than the end."
    )
    table = [
        (name, words.count(tokens), words.percent(score, 1)) for name, line in lines.items() for tokens, score in line
    ]
    return Figure("What the tokens brought", see, draw, ("run", "tokens", "generation"), table)


def _course(run: ComparedRun) -> list[tuple[float, float]]:
    pruned = run["pruned_generation"]
    start = [(0.0, pruned)] if pruned is not None else []
    return start + [(tokens, score) for tokens, score in run["epochs"] if tokens is not None and score is not None]


def _course_words(name: str, line: list[tuple[float, float]]) -> str:
    tokens, score = line[-1]
    return f"{name}: from {words.percent(line[0][1])} to {words.percent(score)} in {words.count(tokens)} tokens"


def losses(data: Comparison) -> Figure | None:
    """KL on the text that is trained on against the tokens spent: the one term that every training records."""
    lines = {run["name"]: run["kl"] for run in data["runs"] if len(run["kl"]) > 1}
    if not lines:
        return None
    most = max(line[-1][0] for line in lines.values())
    levels = [kl for line in lines.values() for _, kl in line]

    label = "Line chart. " + "; ".join(_kl_words(*item) for item in lines.items())
    marks: list[Mark] = [_names(lines)]
    for name, line in lines.items():
        tips = [(tokens, kl, f"{name}, {words.count(tokens)} tokens: KL {words.number(kl)}") for tokens, kl in line]
        marks += [Line(line, "stroke-recovered thin"), Dots(tips, 4.5, "hit")]

    def draw(width: float) -> str:
        panel = Panel(_tokens_axis(most, width), Axis(decades(levels)), marks)
        return alone(width, 290, label, panel, Box(50, width - 120, 18, 236))

    see = (
        "Mean KL(dense ‖ pruned) per token, in nats, log scale, on the text that each run learns from. Only "
        "runs of the same text, dense model and temperature can be set side by side. A lower line need not write "
        "better: that is the picture above."
    )
    table = [(name, words.count(tokens), words.number(kl)) for name, line in lines.items() for tokens, kl in line]
    return Figure("How KL fell in training", see, draw, ("run", "tokens", "KL"), table)


def _kl_words(name: str, line: list[tuple[float, float]]) -> str:
    (_, first), (tokens, last) = line[0], line[-1]
    return f"{name}: KL from {words.number(first)} to {words.number(last)} in {words.count(tokens)} tokens"
