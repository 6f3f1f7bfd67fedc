"""Pictures of the other uses of a model: choosing among options, and ranking documents by embeddings."""

from __future__ import annotations

from recover.report import words
from recover.report.data import ChoiceDrift, PageData
from recover.report.drift import by_model, choice_kls
from recover.report.figures.figure import Canvas, Figure, Log, is_narrow

ROW = 52


def choices(data: PageData) -> Figure | None:
    """KL among the option tokens alone, renormalised, against KL over the whole vocabulary at the same places."""
    found = by_model(data, lambda probe: probe["choices"])
    shown = [(model, row, *kls) for model, listed in found.items() for row in listed if (kls := choice_kls(row))]
    if not shown:
        return None

    def draw(width: float) -> str:
        left = 8.0 if is_narrow(width) else 190.0
        canvas = Canvas(width, ROW * len(shown) + 62, "Dot plot. " + "; ".join(_choice_words(*row) for row in shown))
        values = [value for _, _, *pair in shown for value in pair]
        x = Log.around(values, left + 12, width - 24)
        bottom = ROW * len(shown) + 8
        for tick in x.ticks():
            canvas.line(x(tick), 8, x(tick), bottom, "grid")
        canvas.axis_x(x, bottom)
        canvas.text((x.start + x.stop) / 2, bottom + 40, "mean KL(dense ‖ model), nats", "note", anchor="middle")
        for index, (model, row, inside, outside) in enumerate(shown):
            _choice_row(canvas, model, row["task"], inside, outside, x, index * ROW + 8)
        return canvas.render()

    see = (
        "Disc: KL among the option tokens alone, renormalised. Ring: KL over the whole vocabulary at the same "
        "positions. A disc far left of its ring explains why choice can hold while generation fails: the few logits "
        "that choose moved together."
    )
    columns = ("task", "model", "KL, options", "KL, vocabulary")
    table = [(row["task"], model, words.number(inside), words.number(outside)) for model, row, inside, outside in shown]
    return Figure("The few logits that choose, and all the others", see, draw, columns, table)


def _choice_words(model: str, row: ChoiceDrift, inside: float, outside: float) -> str:
    return f"{row['task']}, {model}: KL {words.number(inside)} in options, {words.number(outside)} in the vocabulary"


def _choice_row(canvas: Canvas, model: str, task: str, inside: float, outside: float, x: Log, top: float) -> None:
    y = top + 32
    if x.start > 100:
        canvas.text(0, y + 1, task, "label")
        canvas.text(0, y + 17, model, f"note ink-{model}")
    else:
        canvas.text(x.start - 12, top + 14, f"{task}, {model}", f"note ink-{model}")
    canvas.line(x(inside), y, x(outside), y, f"stroke-{model} thin")
    canvas.dot(
        x(outside), y, 7, f"hollow stroke-{model}", tip=f"{task}, {model}, vocabulary: KL {words.number(outside)}"
    )
    canvas.dot(x(inside), y, 6, f"fill-{model} rim", tip=f"{task}, {model}, options: KL {words.number(inside)}")
