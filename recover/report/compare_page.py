"""The page of a comparison: what each run kept, what it cost, and how it came there, as pictures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recover.base.artifacts import write_text
from recover.config.tasks import USES
from recover.report import render, speeds, verdict, words
from recover.report.compare import MODELS
from recover.report.compare_courses import courses, losses, names_at_edge
from recover.report.figures.figure import Figure, is_narrow, panels
from recover.report.figures.svg import Canvas, Linear

ROW = 46


def render_compare(data: dict[str, Any], path: Path) -> Path:
    """Write the comparison as one self-contained HTML page; gives its path."""
    html = render.environment(escape=True)
    drawn = [figure for figure in (ways(data), trade(data), courses(data), losses(data)) if figure is not None]
    view = {
        "data": data,
        "drawn": [render.drawn(figure) for figure in drawn],
        "columns": COLUMNS,
        "rows": [row(run) for run in data["runs"]],
        "speed_columns": SPEED_COLUMNS,
        "speed_rows": [speed_row(run) for run in data["runs"]],
    }
    write_text(path, render.page(html, "compare.html.j2", view))
    return path


COLUMNS = (
    *("run", "pruned", "weights", "tokens", "generation, pruned", "generation, recovered"),
    *("choice, pruned", "choice, recovered", "perplexity", "file", "decoding"),
)


def row(run: dict[str, Any]) -> list[tuple[str, float | None, str]]:
    """Cells as (wording, value to sort by, what to make of it)."""
    file = speeds.value(run["speed"], "file_bytes")
    return [
        (run["name"], None, ""),
        (run["pruned"], None, ""),
        (words.percent(run["parameters"]), run["parameters"], ""),
        (words.count(run["tokens"]), run["tokens"], ""),
        *(_share(run, model, use) for use in ("generation", "choice") for model in MODELS),
        _perplexity(run["perplexity"]),
        (f"×{file:.2f}" if file is not None else words.NOT_MEASURED, file, ""),
        _decoding(run),
    ]


def _perplexity(found: dict[str, float | None]) -> tuple[str, float | None, str]:
    """Recovered, with the way there under it."""
    way = " → ".join(words.number(found[model]) for model in ("dense", "pruned") if found[model] is not None)
    return words.number(found["recovered"]), found["recovered"], f"{way} →" if way else ""


def _decoding(run: dict[str, Any]) -> tuple[str, float | None, str]:
    """The ratio, and under it what it means where it is no gain."""
    said = speeds.gain(run["speed"], "decode_tokens_per_second")
    if run["decoding"] is None or said.startswith("×"):
        return said.partition(" [")[0], run["decoding"], ""
    return f"×{run['decoding']:.2f}", run["decoding"], said


def _share(run: dict[str, Any], model: str, use: str) -> tuple[str, float | None, str]:
    share = run["kept"][model][use]
    grade = run["grades"][model][use]
    return (grade, None, "") if share is None else (verdict.share(share), share, grade)


SPEED_COLUMNS = (
    *("run", "parameters", "file", "KV per token"),
    *("prefill, tokens/s", "prefill, ratio", "decoding, tokens/s", "decoding, ratio"),
)


def speed_row(run: dict[str, Any]) -> list[str]:
    """One run of the table of sizes and speeds, dense → deployed, both timed in one run; in words."""
    cells = [run["name"]]
    for key in ("parameters", "file_bytes", "kv_bytes_per_token", *speeds.RATES):
        cells.append(speeds.change(run["speed"], key))
        if key in speeds.RATES:
            cells.append(speeds.ratio(run["speed"], key))
    return cells


def ways(data: dict[str, Any]) -> Figure:
    """For each run, the way from pruned to recovered, as a share of dense."""
    runs = data["runs"]
    uses = [use for use in USES if any(run["kept"][model][use] is not None for run in runs for model in MODELS)]
    title = "From pruned to recovered, as a share of dense"
    if not uses:
        return Figure("compare", title, "Not measured: no run has both a dense and a pruned measure.")
    top = max(run["kept"][model][use] or 0.0 for run in runs for model in MODELS for use in uses)

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
        "Each line is one run, from the pruned model to the recovered one at the larger dot. The dashed line is dense. "
        "A line that runs to the left is a use that recovery cost."
    )
    shares = [f"{use}, {model}" for use in uses for model in MODELS]
    table = [(run["name"], *(_share(run, model, use)[0] for use in uses for model in MODELS)) for run in runs]
    return Figure("compare", title, see, draw, ("run", *shares), table, MODELS)


def _panel(canvas: Canvas, runs: list[dict[str, Any]], use: str, x: Linear, top: float) -> None:
    base = top + 40 + ROW * len(runs)
    canvas.text(x.start, top + 16, use.capitalize(), "panel")
    for tick in x.ticks(5):
        canvas.line(x(tick), top + 34, x(tick), base, "grid")
        canvas.text(x(tick), base + 18, words.percent(tick, 0), "tick", anchor="middle" if tick else "start")
    canvas.line(x(1.0), top + 30, x(1.0), base, "reference")
    for index, run in enumerate(runs):
        y = top + 40 + ROW * index + 28
        before, after = (run["kept"][model][use] for model in MODELS)
        canvas.text(x.start, y - 12, run["name"], "note")
        if before is not None and after is not None:
            canvas.line(x(before), y, x(after), y, "stroke-recovered line")
        for model, share, radius in (("pruned", before, 5), ("recovered", after, 7)):
            if share is not None:
                tip = f"{run['name']}, {model}: {use} {verdict.share(share)} of dense"
                canvas.dot(x(max(share, 0.0)), y, radius, f"fill-{model} rim", tip=tip)
        if before is None and after is None:
            canvas.text(x.start, y + 4, run["grades"]["recovered"][use], "note")


def trade(data: dict[str, Any]) -> Figure | None:
    """Generation against choice, and against what is stored: which run gives which use, and for how much."""
    runs = data["runs"]
    kept = {run["name"]: [run["kept"][model] for model in MODELS] for run in runs}
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
        "Height: generation kept. To the right: choice kept, and weights stored, as shares of dense. Each run goes "
        "from its ring (pruned) to its disc (recovered). Best is the upper right of the first panel and the upper left "
        "of the second."
    )
    columns = ("run", "weights", "choice, pruned", "choice, recovered", "generation, pruned", "generation, recovered")
    table = [
        (
            run["name"],
            words.percent(run["parameters"]),
            *(_share(run, model, use)[0] for use in ("choice", "generation") for model in MODELS),
        )
        for run in runs
    ]
    return Figure("trade", "What is kept, for what", see, draw, columns, table, MODELS)


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
