"""Pictures of a comparison that go along the tokens of distillation: generation, and KL on the text learnt from."""

from __future__ import annotations

from typing import Any

from recover.report import words
from recover.report.figures.figure import Figure, is_narrow
from recover.report.figures.svg import Canvas, Linear, Log, apart


def names_at_edge(canvas: Canvas, ends: dict[str, tuple[float, float]], right: float) -> None:
    """Names at the right edge, each tied to its point, none over another."""
    heights = apart([y for _, y in ends.values()], 15)
    for (name, (x, y)), height in zip(ends.items(), heights, strict=True):
        canvas.line(x + 8, y, right + 6, height, "grid")
        canvas.text(right + 9, height + 4, name if len(name) < 17 else f"{name[:15]}…", "note")


def courses(data: dict[str, Any]) -> Figure | None:
    """Generation after each epoch against the tokens spent, all runs in one panel."""
    lines = {run["name"]: _course(run) for run in data["runs"]}
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    most = max(tokens for line in lines.values() for tokens, _ in line)

    def draw(width: float) -> str:
        canvas = Canvas(width, 290, "Line chart. " + "; ".join(_course_words(*item) for item in lines.items()))
        x, y = Linear(0, most, 44, width - 120), Linear(0, 1, 236, 18)
        canvas.axis_y(y, 44, x.stop, "percent")
        canvas.axis_x(x, 236, "count", 4 if is_narrow(width) else 6)
        canvas.text((x.start + x.stop) / 2, 276, "tokens of distillation", "note", anchor="middle")
        names_at_edge(canvas, {name: (x(line[-1][0]), y(line[-1][1])) for name, line in lines.items()}, x.stop)
        for name, line in lines.items():
            canvas.path([(x(tokens), y(score)) for tokens, score in line], "stroke-recovered line")
            for number, (tokens, score) in enumerate(line):
                css = "fill-recovered rim" if number else "fill-pruned rim"
                tip = f"{name}, {words.count(tokens)} tokens: generation {words.percent(score)}"
                canvas.dot(x(tokens), y(score), 4.5, css, tip=tip)
        return canvas.render()

    see = (
        "Generation itself, not its share of dense, measured after each epoch; the first dot is the pruned model. A "
        "line that still climbs at its end was stopped early. Epochs may be measured on fewer items than the end."
    )
    table = [
        (name, words.count(tokens), words.percent(score, 1)) for name, line in lines.items() for tokens, score in line
    ]
    return Figure("courses", "What the tokens brought", see, draw, ("run", "tokens", "generation"), table)


def _course(run: dict[str, Any]) -> list[tuple[float, float]]:
    kept, dense = run["kept"]["pruned"]["generation"], run["dense"]["generation"]
    start = [(0.0, kept * dense)] if kept is not None and dense is not None else []
    return start + [(tokens, score) for tokens, score in run["epochs"] if tokens is not None and score is not None]


def _course_words(name: str, line: list[tuple[float, float]]) -> str:
    tokens, score = line[-1]
    return f"{name}: from {words.percent(line[0][1])} to {words.percent(score)} in {words.count(tokens)} tokens"


def losses(data: dict[str, Any]) -> Figure | None:
    """KL on the text that is trained on against the tokens spent: the one term that every training records."""
    lines = {run["name"]: run["kl"] for run in data["runs"] if len(run["kl"]) > 1}
    if not lines:
        return None
    most = max(line[-1][0] for line in lines.values())
    levels = [kl for line in lines.values() for _, kl in line]

    def draw(width: float) -> str:
        canvas = Canvas(width, 290, "Line chart. " + "; ".join(_kl_words(*item) for item in lines.items()))
        x, y = Linear(0, most, 50, width - 120), Log.around(levels, 236, 18)
        canvas.axis_y(y, 50, x.stop)
        canvas.axis_x(x, 236, "count", 4 if is_narrow(width) else 6)
        canvas.text((x.start + x.stop) / 2, 276, "tokens of distillation", "note", anchor="middle")
        names_at_edge(canvas, {name: (x(line[-1][0]), y(line[-1][1])) for name, line in lines.items()}, x.stop)
        for name, line in lines.items():
            canvas.path([(x(tokens), y(kl)) for tokens, kl in line], "stroke-recovered thin")
            for tokens, kl in line:
                tip = f"{name}, {words.count(tokens)} tokens: KL {words.number(kl)}"
                canvas.dot(x(tokens), y(kl), 4.5, "hit", tip=tip)
        return canvas.render()

    see = (
        "Mean KL(dense ‖ pruned) per token, in nats, log scale, on the text that each run learns from. Only "
        "runs of the same text, dense model and temperature can be set side by side. A lower line need not write "
        "better: that is the picture above."
    )
    table = [(name, words.count(tokens), words.number(kl)) for name, line in lines.items() for tokens, kl in line]
    return Figure("losses", "How KL fell in training", see, draw, ("run", "tokens", "KL"), table)


def _kl_words(name: str, line: list[list[float]]) -> str:
    (_, first), (tokens, last) = line[0], line[-1]
    return f"{name}: KL from {words.number(first)} to {words.number(last)} in {words.count(tokens)} tokens"
