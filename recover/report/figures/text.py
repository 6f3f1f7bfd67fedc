"""Pictures of what decoding does to the damage: texts drawn by chance beside greedy ones, and other temperatures."""

from __future__ import annotations

from typing import Any, Literal

from recover.report import words
from recover.report.data import Drift, PageData, SampledDrift, StepDrift, TemperatureDrift
from recover.report.drift import by_model, level, mean_of
from recover.report.figures.figure import Figure, is_narrow, panels
from recover.report.figures.svg import Canvas, Linear, Log

Curve = list[tuple[int, float]]  # (decoding step, share of texts)


def sampled(data: PageData) -> Figure | None:
    """Share of texts that are still the dense model's, drawn at T = 1 from several seeds, beside the greedy one."""
    drawn = by_model(data, lambda probe: probe["sampled"])
    if not drawn:
        return None
    greedy = {model: _greedy(data["drift"][model]) for model in drawn}

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        label = "Line charts. " + " ".join(_sampled_words(model, rows) for model, rows in drawn.items())
        canvas = Canvas(width, 290 * len(drawn) if stacked else 264, label)
        places = [(44.0, width - 8)] * len(drawn) if stacked else panels(width, len(drawn), gap=40, left=44)
        steps = [step for rows in drawn.values() for row in rows for step, _ in row["diverged"]]
        for index, (model, (left, right)) in enumerate(zip(drawn, places, strict=True)):
            top = index * 290.0 if stacked else 0.0
            x, y = Linear(0, max(steps, default=0) or 1, left, right), Linear(0, 1, top + 222, top + 52)
            _share_panel(canvas, model, greedy[model], drawn[model], x, y)
        return canvas.render()

    see = (
        "Share of texts not yet parted from the dense model's. Thick: greedy. Thin: drawn at T = 1, one a seed; both "
        "models draw with the same random numbers, so what parts them is pruning and not chance. Thin lines far "
        "under the thick one: sampling exposes damage that greedy decoding hides."
    )
    columns = ("model", "texts", "KL, dense words", "KL, own words", "half parted by token", "never parted")
    return Figure("Greedy text against drawn text", see, draw, columns, _sampled_table(data, drawn))


def _greedy(drift: Drift | None) -> Curve:
    known = [(step["step"], step["free_running"]["diverged"]) for step in (drift or {"steps": []})["steps"]]
    return [(step, 1.0 - parted) for step, parted in known if parted is not None]


def _sampled_words(model: str, rows: list[SampledDrift]) -> str:
    never = [row["never"] for row in rows if row["never"] is not None]
    spread = f"{words.percent(min(never))} to {words.percent(max(never))}" if never else words.NOT_MEASURED
    return f"{model}, {len(rows)} seeds: {spread} of drawn texts never part."


def _sampled_table(data: PageData, drawn: dict[str, list[SampledDrift]]) -> list[tuple[Any, ...]]:
    table = []
    for model, rows in drawn.items():
        drift = data["drift"][model]
        if drift is None:
            continue
        greedy = drift["divergence"] or {}
        first = (greedy.get("first") or {}).get("p50")
        kl = mean_of(drift["final"].get("kl"))
        own = words.NOT_MEASURED if not drift["steps"] else words.number(_own_kl(drift["steps"]))
        never = words.percent(greedy.get("never"))
        table.append((model, "greedy", words.number(kl), own, words.number(first), never))
        for row in rows:
            figures = (mean_of(row["teacher_forced"]), mean_of(row["free_running"]), level(row["first"], "p50"))
            table.append((model, f"seed {row['seed']}", *map(words.number, figures), words.percent(row["never"])))
    return table


def _own_kl(steps: list[StepDrift]) -> float | None:
    """Mean KL on its own words, each step weighing as the prompts that reach it."""
    known = [(mean_of(step["free_running"]["kl"]), step["prompts"] or 1) for step in steps]
    weighed = [(kl, number) for kl, number in known if kl is not None]
    return sum(kl * number for kl, number in weighed) / sum(number for _, number in weighed) if weighed else None


def _share_panel(canvas: Canvas, model: str, greedy: Curve, rows: list[SampledDrift], x: Linear, y: Linear) -> None:
    canvas.text(x.start - 44, y.stop - 34, model.capitalize(), f"panel ink-{model}")
    canvas.text(x.start - 44, y.stop - 16, f"thick: greedy · thin: {len(rows)} seeds", "note")
    canvas.axis_y(y, x.start, x.stop, "percent", 4)
    canvas.axis_x(x, y.start, "count")
    canvas.text((x.start + x.stop) / 2, y.start + 36, "tokens written", "note", anchor="middle")
    for row in rows:
        canvas.path([(x(step), y(1.0 - parted)) for step, parted in row["diverged"]], f"stroke-{model} thin")
        for step, parted in row["diverged"]:
            tip = f"{model}, seed {row['seed']}, token {step}: {words.percent(1.0 - parted)} still equal dense"
            canvas.dot(x(step), y(1.0 - parted), 4, "hit", tip=tip)
    canvas.path([(x(step), y(share)) for step, share in greedy], f"stroke-{model} line thick")


def temperatures(data: PageData) -> Figure | None:
    """Mean drift at the last layer at each temperature of the softmax: the same logits, read hotter or colder."""
    found = by_model(data, lambda probe: probe["temperatures"])
    if len({row["temperature"] for rows in found.values() for row in rows}) < 2:
        return None

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        label = "Line charts. " + " ".join(_temperature_words(model, rows) for model, rows in found.items())
        canvas = Canvas(width, 580 if stacked else 264, label)
        places = [(50.0, width - 12)] * 2 if stacked else panels(width, 2, gap=40, left=50)
        for index, (figure, (left, right)) in enumerate(zip(TEMPERATURE_PANELS, places, strict=True)):
            _temperature_panel(canvas, found, figure, left, right, index * 290.0 if stacked else 0.0)
        return canvas.render()

    see = (
        "The same logits through softmax(z / T). Temperature divides a logit's change and at the same time spreads "
        "probability over more tokens, so damage may grow or shrink with it: look which way the lines lean before "
        "choosing a temperature for decoding. Mean over tokens on the dense model's words."
    )
    columns = ("T", *(f"{model}, {name}" for model in found for name in ("mean KL", "mean 1 − cos")))
    every = sorted({row["temperature"] for rows in found.values() for row in rows})
    by = {model: {row["temperature"]: row for row in rows} for model, rows in found.items()}
    table = [
        (
            f"{t:g}",
            *(words.number(mean_of(by[m].get(t, {}).get(name))) for m in found for name in TEMPERATURE_PANELS),
        )
        for t in every
    ]
    return Figure("Hotter or colder", see, draw, columns, table, tuple(found))


def _temperature_words(model: str, rows: list[TemperatureDrift]) -> str:
    return f"{model}: " + ", ".join(
        f"KL {words.number(mean_of(row.get('kl')))} at T = {row['temperature']:g}" for row in rows
    )


TEMPERATURE_PANELS: dict[Literal["kl", "probability"], tuple[str, str]] = {
    "kl": ("KL", "KL(dense ‖ model), nats, log scale"),
    "probability": ("Probability", "1 − cos of softmax(z / T), log scale"),
}


def _temperature_panel(
    canvas: Canvas,
    found: dict[str, list[TemperatureDrift]],
    figure: Literal["kl", "probability"],
    left: float,
    right: float,
    top: float,
) -> None:
    title, note = TEMPERATURE_PANELS[figure]
    rows = [row for listed in found.values() for row in listed]
    values = [value for row in rows if (value := mean_of(row.get(figure))) is not None]
    hot = [row["temperature"] for row in rows]
    x, y = Log(min(hot), max(hot), left + 14, right - 14), Log.around(values, top + 222, top + 52)
    canvas.text(left - 50, top + 18, title, "panel")
    canvas.text(left - 50, top + 36, note, "note")
    canvas.axis_y(y, left, right)
    for temperature in sorted(set(hot)):
        canvas.text(x(temperature), top + 239, f"{temperature:g}", "tick", anchor="middle")
    canvas.text((left + right) / 2, top + 258, "temperature", "note", anchor="middle")
    for model, listed in found.items():
        known = [
            (row["temperature"], value)
            for row in sorted(listed, key=lambda row: row["temperature"])
            if (value := mean_of(row.get(figure))) is not None
        ]
        canvas.path([(x(t), y(value)) for t, value in known], f"stroke-{model} line")
        for t, value in known:
            tip = f"{model}, T = {t:g}: {words.number(value)}"
            canvas.dot(x(t), y(value), 4.5, f"fill-{model} rim", tip=tip)
