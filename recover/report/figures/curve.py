"""The picture of a training: loss over tokens, what generation made of it, norm of the gradient and learning rate."""

from __future__ import annotations

from typing import Any, cast

from recover.config.loss import TERMS
from recover.report import words
from recover.report.data import Band, Curve, Epoch, PageData, Points
from recover.report.figures.figure import Canvas, Figure, Linear, Log, apart, is_narrow
from recover.report.training import label, learnt, weights

WIDE_RANGE = 10.0  # highest over lowest mean from which an axis is a log one
MARGIN = 68.0  # pixels left of a panel, for the values of its axis
EDGE = 20.0  # pixels right of it, for half of the last value below it
COLUMNS = ("step", "tokens", "seconds", "lr", "skipped")  # of the points that are no bands
PLAIN = "thin dotted"  # line of a term whose package is not there
Place = tuple[float, float, float, float]  # left, right, top, baseline


def training(data: PageData) -> Figure:
    """Loss and its terms per token, generation at the ends of epochs, gradient norm and learning rate, over tokens."""
    title = "How training went"
    found = data["curve"]
    if found is None:
        return Figure(title, "Not measured: there is no train/steps.jsonl, which older runs do not have.")
    points, drawn = found["points"], _terms(data)
    scores = [row for row in data["epochs"] if _score(row) is not None]

    def draw(width: float) -> str:
        places = _places(width, strip=bool(scores), names=bool(drawn))
        label = " ".join(["Line charts over the tokens of the training.", *learnt(data), *map(_epoch_words, scores)])
        canvas = Canvas(width, max(place[3] for place in places.values()) + 46, label)
        most = max(points["tokens"][-1], *(row["tokens"] or 0 for row in data["epochs"]), 1)
        for name, place in places.items():
            x = Linear(0, most, place[0], place[1])
            _uprights(canvas, data, x, place)
            _axis(canvas, x, place, labelled=name in ("loss", "lr") or (name == "grad_norm" and is_narrow(width)))
            PANELS[name](canvas, data, x, place)
        return canvas.render()

    columns, table = _table(points)
    return Figure(title, " ".join([*learnt(data), *_how_to_read(data, bool(scores))]), draw, columns, table)


def _curve(data: PageData) -> Curve:
    found = data["curve"]
    assert found is not None, "drawn only where there is one"
    return found


def _band_of(points: Points, name: str) -> Band:
    return cast(Band, points.get(name))


def _how_to_read(data: PageData, scores: bool) -> list[str]:
    size = _curve(data)["steps_a_point"]
    found = []
    if size > 1:
        found.append(
            f"Each point is the mean over {size:,} steps. The band holds the middle 80% of them; for norms, all of "
            "them."
        )
    if scores:
        found.append(
            "Upright lines are ends of epochs; the ring marks the one that is kept. A loss may fall where generation "
            "does not."
        )
    if _curve(data)["skipped"]:
        found.append("Crosses are steps that were left out.")
    return found


def _terms(data: PageData) -> list[str]:
    """Terms to be told from the loss: where it has one alone, they are the same but for a factor."""
    weighted = weights(data["recipe"])
    return [name for name in weighted if name in _curve(data)["points"] and len(weighted) > 1]


def _score(row: Epoch) -> float | None:
    return words.finite(row["headline"].get("generation")) if words.finite(row["tokens"]) is not None else None


def _epoch_words(row: Epoch) -> str:
    loss = words.number(row["train"].get("loss"))
    tokens = words.count(row["tokens"])
    return f"Epoch {row['epoch']}, {tokens} tokens: generation {words.percent(_score(row))}, mean loss {loss}."


def _places(width: float, *, strip: bool, names: bool) -> dict[str, Place]:
    """Panels of loss below generation, and of norm and rate beside them; on a telephone one below the other."""
    narrow = is_narrow(width)
    right = (width if narrow else width * 0.64) - (92.0 if names else EDGE)
    found: dict[str, Place] = {"generation": (MARGIN, right, 36.0, 106.0)} if strip else {}
    top = 166.0 if strip else 36.0
    found["loss"] = (MARGIN, right, top, 330.0)
    if narrow:
        return {**found, "grad_norm": (MARGIN, width - EDGE, 418.0, 510.0), "lr": (MARGIN, width - EDGE, 598.0, 690.0)}
    left = width * 0.64 + 12.0 + MARGIN
    return {**found, "grad_norm": (left, width - EDGE, 36.0, 146.0), "lr": (left, width - EDGE, 206.0, 330.0)}


def _head(canvas: Canvas, place: Place, title: str, note: str = "") -> None:
    canvas.text(place[0] - MARGIN, place[2] - 20, title, "panel")
    canvas.text(place[1], place[2] - 20, note, "note", anchor="end")


def _uprights(canvas: Canvas, data: PageData, x: Linear, place: Place) -> None:
    for row in data["epochs"]:
        if words.finite(row["tokens"]) is not None:
            canvas.line(x(row["tokens"] or 0), place[2], x(row["tokens"] or 0), place[3], "axis faint")


def _axis(canvas: Canvas, x: Linear, place: Place, *, labelled: bool) -> None:
    if labelled:
        canvas.axis_x(x, place[3], "count", 5 if place[1] - place[0] > 400 else 3)
        canvas.text((x.start + x.stop) / 2, place[3] + 36, "tokens scored", "note", anchor="middle")


def _scale(means: list[float], bounds: list[float], place: Place) -> Linear | Log:
    """By powers of ten where the means span a wide range, else from zero; all bounds are inside."""
    known = means or [1.0]
    if min(known) > 0 and max(known) / min(known) > WIDE_RANGE:
        positive = [*known, *(bound for bound in bounds if bound > 0)]
        tight = Log(min(positive) / 1.2, max(positive) * 1.2, place[3], place[2])
        return tight if len(tight.ticks()) > 1 else Log.around(positive, place[3], place[2])
    return Linear(0, max(*known, *bounds, 0.0) * 1.05 or 1.0, place[3], place[2])


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _generation(canvas: Canvas, data: PageData, x: Linear, place: Place) -> None:
    """From the pruned model through the ends of epochs, beside the level of dense."""
    y = Linear(0, 1, place[3], place[2])
    level = {
        model: ((data["headline"][model] or {}).get("generation") or {}).get("value") for model in ("dense", "pruned")
    }
    _head(canvas, place, "Generation", "" if level["dense"] is None else "dashed: dense")
    canvas.axis_y(y, place[0], place[1], "percent", 2)
    if level["dense"] is not None:
        canvas.line(place[0], y(level["dense"]), place[1], y(level["dense"]), "stroke-dense level")
    rows = [row for row in data["epochs"] if _score(row) is not None]
    start = [] if level["pruned"] is None else [(x(0), y(level["pruned"]))]
    line = [(x(row["tokens"] or 0), y(_score(row) or 0.0)) for row in rows]
    canvas.path([*start, *line], "stroke-recovered line")
    for at in start:
        canvas.dot(*at, 4.5, "fill-pruned rim", tip=f"pruned: generation {words.percent(level['pruned'])}")
    for row, at in zip(rows, line, strict=True):
        if row["best"]:
            canvas.dot(*at, 10, "ring")
            _kept(canvas, row, at, x, y)
        canvas.dot(*at, 4.5, "fill-recovered rim", tip=_epoch_words(row))


def _kept(canvas: Canvas, row: Epoch, at: tuple[float, float], x: Linear, y: Linear) -> None:
    """Right of the ring, where the line is level if at all; left where there is no room."""
    score = _score(row) or 0.0
    fits = at[0] + 84 <= x.stop
    height = at[1] + (28 if score >= 0.5 else -16)  # away from the lines of dense and of pruned
    text = f"kept: {words.percent(score)}"
    canvas.text(at[0] + (6 if fits else -6), height, text, "value ink-recovered", anchor="start" if fits else "end")


def _loss(canvas: Canvas, data: PageData, x: Linear, place: Place) -> None:
    points, drawn = _curve(data)["points"], _terms(data)
    loss = points["loss"]
    means = [value for name in ("loss", *drawn) for value in _known(_band_of(points, name)["mean"])]
    y = _scale(means, _known(loss["low"]) + _known(loss["high"]), place)
    scale = "nats, log scale" if isinstance(y, Log) else "nats"
    _head(canvas, place, f"Loss per token{_sole(data)}", scale)
    canvas.axis_y(y, place[0], place[1], "number", 4)
    for name in drawn:
        canvas.path(_line(points, name, x, y), f"stroke-muted {TERMS[name].style if name in TERMS else PLAIN}")
    _band(canvas, points, "loss", x, y, "recovered")
    _hits(canvas, points, ("loss", *drawn), x, y)
    _crosses(canvas, points, x, place[3])
    _names(canvas, points, drawn, y, place[1])


def _sole(data: PageData) -> str:
    """Which term the loss is, where it is one alone."""
    names = [label(name) for name in weights(data["recipe"])]
    return f": {names[0]}" if len(names) == 1 else ""


def _line(points: Points, name: str, x: Linear, y: Linear | Log) -> list[tuple[float, float]]:
    pairs = zip(points["tokens"], _band_of(points, name)["mean"], strict=True)
    return [(x(tokens), y(mean)) for tokens, mean in pairs if mean is not None]


def _band(canvas: Canvas, points: Points, name: str, x: Linear, y: Linear | Log, colour: str) -> None:
    """The line of the means, and from low to high around it; a lone point is a dot."""
    columns = zip(points["tokens"], *(_band_of(points, name)[part] for part in ("low", "mean", "high")), strict=True)
    known = [row for row in columns if None not in row]
    # Of few unlike steps the mean per token may lie outside of the percentiles per step.
    upper = [(x(tokens), y(max(mean, high))) for tokens, _, mean, high in known]
    canvas.area(upper, [(x(tokens), y(min(low, mean))) for tokens, low, mean, _ in known], f"wash-{colour}")
    line = _line(points, name, x, y)
    canvas.path(line, f"stroke-{colour} line")
    if len(line) == 1:
        canvas.dot(*line[0], 3.5, f"fill-{colour} rim")


def _hits(canvas: Canvas, points: Points, names: tuple[str, ...], x: Linear, y: Linear | Log) -> None:
    """The figures of a point, under the pointer."""
    for index, mean in enumerate(_band_of(points, names[0])["mean"]):
        if mean is None:
            continue
        figures = [f"{_label(name)} {words.number(_band_of(points, name)['mean'][index])}" for name in names]
        low, high = (words.number(_band_of(points, names[0])[part][index]) for part in ("low", "high"))
        figures[0] += f" ({low} to {high})" if low != high else ""
        tip = f"{_steps_words(points, index)}: {', '.join(figures)}"
        canvas.dot(x(points["tokens"][index]), y(mean), 4.5, "hit", tip=tip)


def _steps_words(points: Points, index: int) -> str:
    return f"{words.count(points['tokens'][index])} tokens, step {points['step'][index]:,}"


def _crosses(canvas: Canvas, points: Points, x: Linear, baseline: float) -> None:
    for index, number in enumerate(points["skipped"]):
        if number:
            at = x(points["tokens"][index])
            canvas.marker(at, baseline - 9, 4, "cross")
            tip = f"{_steps_words(points, index)}: {number} step{'s' if number > 1 else ''} left out"
            canvas.dot(at, baseline - 9, 7, "hit", tip=tip)


def _names(canvas: Canvas, points: Points, drawn: list[str], y: Linear | Log, right: float) -> None:
    """Each line's name at its end, where there are several."""
    ends = {name: y(means[-1]) for name in ("loss", *drawn) if (means := _known(_band_of(points, name)["mean"]))}
    if not drawn:
        return
    for (name, _), height in zip(ends.items(), apart(list(ends.values()), 16), strict=True):
        css = "label ink-recovered" if name == "loss" else "note"
        canvas.text(right + 8, height + 4, label(name), css)


def _norm(canvas: Canvas, data: PageData, x: Linear, place: Place) -> None:
    points = _curve(data)["points"]
    norm = points["grad_norm"]
    y = _scale(_known(norm["mean"]), _known(norm["low"]) + _known(norm["high"]), place)
    clip = words.finite((data["recipe"].get("train") or {}).get("max_grad_norm"))
    clipped = clip is not None and y.lo < clip < y.hi
    _head(canvas, place, "Gradient norm", f"dashed: clipped to {words.number(clip)}" if clipped else "")
    if not _known(norm["mean"]):
        canvas.text(place[0], place[2] + 24, words.NOT_MEASURED, "note")
        return
    canvas.axis_y(y, place[0], place[1], "number", 3)
    _band(canvas, points, "grad_norm", x, y, "muted")
    if clip is not None and clipped:
        canvas.line(place[0], y(clip), place[1], y(clip), "reference")
    _hits(canvas, points, ("grad_norm",), x, y)


def _rate(canvas: Canvas, data: PageData, x: Linear, place: Place) -> None:
    points = _curve(data)["points"]
    rates = [(tokens, rate) for tokens, rate in zip(points["tokens"], points["lr"], strict=True) if rate is not None]
    _head(canvas, place, "Learning rate")
    if not rates:
        canvas.text(place[0], place[2] + 24, words.NOT_MEASURED, "note")
        return
    y = Linear(0, max(rate for _, rate in rates) * 1.05 or 1.0, place[3], place[2])
    canvas.axis_y(y, place[0], place[1], "number", 3)
    canvas.path([(x(tokens), y(rate)) for tokens, rate in rates], "stroke-muted line")
    for tokens, rate in rates:
        canvas.dot(
            x(tokens), y(rate), 4.5, "hit", tip=f"{words.count(tokens)} tokens: learning rate {words.number(rate)}"
        )


PANELS = {"generation": _generation, "loss": _loss, "grad_norm": _norm, "lr": _rate}


def _label(name: str) -> str:
    return "gradient norm" if name == "grad_norm" else label(name)


def _table(points: Points) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    names = [name for name in points if name not in COLUMNS]
    rows = [
        (
            f"{step:,}",
            *(words.count(points["tokens"][index]), words.number(points["seconds"][index])),
            *(words.number(_band_of(points, name)["mean"][index]) for name in names),
            *(words.number(points["lr"][index]), points["skipped"][index] or ""),
        )
        for index, step in enumerate(points["step"])
    ]
    return ("up to step", "tokens", "seconds", *(_label(name) for name in names), "learning rate", "left out"), rows
