"""Pictures of what decoding does to the damage: texts drawn by chance beside greedy ones, and other temperatures."""

from __future__ import annotations

from typing import Any, Literal

from recover.report import words
from recover.report.data import Drift, PageData, SampledDrift, StepDrift, TemperatureDrift
from recover.report.drift import by_model, level, mean_of
from recover.report.figures.figure import Axis, Dots, Figure, Line, Mark, Panel, decades, linear, log, row_of

Curve = list[tuple[int, float]]  # (decoding step, share of texts)


def sampled(data: PageData) -> Figure | None:
    """Share of texts that are still the dense model's, drawn at T = 1 from several seeds, beside the greedy one."""
    drawn = by_model(data, lambda probe: probe["sampled"])
    if not drawn:
        return None
    greedy = {model: _greedy(data["drift"][model]) for model in drawn}

    steps = [step for rows in drawn.values() for row in rows for step, _ in row["diverged"]]
    last = max(steps, default=0) or 1

    def draw(width: float) -> str:
        label = "Line charts. " + " ".join(_sampled_words(model, rows) for model, rows in drawn.items())
        shown = [_share_panel(model, greedy[model], rows, last) for model, rows in drawn.items()]
        return row_of(width, label, shown, gap=40, left=44)

    see = (
        "Share of texts that are still equal to the dense model's. Thick: greedy decoding. Thin: sampling at T = 1, "
        "one line a seed. Both models draw with the same random numbers, so pruning makes the difference, not chance. "
        "Thin lines far below the thick one: sampling shows damage that greedy decoding hides."
    )
    columns = ("model", "texts", "KL, dense words", "KL, own words", "half parted by token", "never parted")
    return Figure("Greedy text against sampled text", see, draw, columns, _sampled_table(data, drawn))


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


def _share_panel(model: str, greedy: Curve, rows: list[SampledDrift], last: int) -> Panel:
    marks: list[Mark] = []
    for each in rows:
        line = [(step, 1.0 - parted) for step, parted in each["diverged"]]
        name = f"{model}, seed {each['seed']}"
        tips = [(step, left, f"{name}, token {step}: {words.percent(left)} still equal dense") for step, left in line]
        marks += [Line(line, f"stroke-{model} thin"), Dots(tips, 4, "hit")]
    return Panel(
        Axis(linear(0, last), "count", 6, "tokens written"),
        Axis(linear(0, 1), "percent", 4),
        [*marks, Line(greedy, f"stroke-{model} line thick")],
        title=model.capitalize(),
        note=f"thick: greedy · thin: {len(rows)} seeds",
        colour=model,
    )


def temperatures(data: PageData) -> Figure | None:
    """Mean drift at the last layer at each temperature of the softmax: the same logits, read hotter or colder."""
    found = by_model(data, lambda probe: probe["temperatures"])
    if len({row["temperature"] for rows in found.values() for row in rows}) < 2:
        return None

    def draw(width: float) -> str:
        label = "Line charts. " + " ".join(_temperature_words(model, rows) for model, rows in found.items())
        return row_of(width, label, [_temperature_panel(found, each) for each in TEMPERATURE_PANELS], gap=40, edge=12)

    see = (
        "The same logits z, read as softmax(z / T). A higher temperature shrinks the error of each logit and spreads "
        "probability over more tokens, so the damage may shrink or grow. Choose a decoding temperature where the lines "
        "are low. Mean over tokens of the dense model's text."
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
    return Figure("Drift at other temperatures", see, draw, columns, table, tuple(found))


def _temperature_words(model: str, rows: list[TemperatureDrift]) -> str:
    return f"{model}: " + ", ".join(
        f"KL {words.number(mean_of(row.get('kl')))} at T = {row['temperature']:g}" for row in rows
    )


TEMPERATURE_PANELS: dict[Literal["kl", "probability"], tuple[str, str]] = {
    "kl": ("KL", "KL(dense ‖ model), nats, log scale"),
    "probability": ("Probability", "1 − cos of softmax(z / T), log scale"),
}


def _temperature_panel(found: dict[str, list[TemperatureDrift]], figure: Literal["kl", "probability"]) -> Panel:
    title, note = TEMPERATURE_PANELS[figure]
    lines = {
        model: [
            (each["temperature"], value)
            for each in sorted(listed, key=lambda each: each["temperature"])
            if (value := mean_of(each.get(figure))) is not None
        ]
        for model, listed in found.items()
    }
    hot = sorted({each["temperature"] for listed in found.values() for each in listed})
    marks: list[Mark] = []
    for model, line in lines.items():
        tips = [(t, value, f"{model}, T = {t:g}: {words.number(value)}") for t, value in line]
        marks += [Line(line, f"stroke-{model} line"), Dots(tips, 4.5, f"fill-{model} rim")]
    return Panel(
        Axis(log(hot[0], hot[-1]), label="temperature", inset=14, ticks=hot),
        Axis(decades(value for line in lines.values() for _, value in line)),
        marks,
        title=title,
        note=note,
    )
