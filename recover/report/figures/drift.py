"""Pictures of the damage: per block in three spaces, along the text, and for the other uses of a model.

How far the predictors hold stands here, what decoding makes of the damage (texts drawn by chance beside greedy ones,
and other temperatures), and what becomes of a choice among options.
"""

from __future__ import annotations

from typing import Any, Literal

from recover.report import words
from recover.report.data import BlockDrift, ChoiceDrift, Drift, PageData, SampledDrift, Space, StepDrift
from recover.report.drift import SPACES, by_model, choice_kls, level, mean_of
from recover.report.figures.figure import (
    Axis,
    Band,
    Box,
    Canvas,
    Columns,
    Dots,
    Figure,
    Line,
    Linear,
    Log,
    Mark,
    Panel,
    Scale,
    decades,
    is_narrow,
    linear,
    log,
    row_of,
)
from recover.report.run_files import TemperatureDrift

SPACE_TITLES = {"embedding": "Embedding", "logit": "Logit", "probability": "Probability"}
SPACE_NOTES = {"embedding": "hidden state h", "logit": "z = W h, centred", "probability": "softmax(z)"}
LEVELS = (0.03, 0.1, 0.3, 1.0, 3.0)  # nats at which a colour deepens
IDENTICAL = 1e-10  # below it, 1 - cos is rounding


def blocks(data: PageData) -> Figure:
    """1 - cos at the output of every block, in three spaces, before and after recovery; dropped blocks are marked."""
    title = "Drift block by block, in three spaces"
    curves = by_model(data, lambda probe: probe["blocks"])
    if not curves:
        return Figure(title, "Not measured: no probe recorded the blocks.")
    whole = words.plan_gone(data["plan"], "attention") & words.plan_gone(data["plan"], "mlp")
    dropped = whole | {row["block"] for rows in curves.values() for row in rows if row["closed"]}
    last = max(max(row["block"] for rows in curves.values() for row in rows), *dropped, 1)
    tops = [
        v
        for rows in curves.values()
        for row in rows
        for space in SPACES
        for q in ("mean", "p99")
        if (v := level(row[space], q)) is not None
    ]

    def draw(width: float) -> str:
        shown = [_block_panel(curves, space, dropped, last, tops) for space in SPACES]
        return row_of(width, _block_words(curves, dropped), shown, height=272, gap=18)

    see = (
        "Distance (1 − cosine) from the dense model after each block, log scale. The line is the mean over tokens. The "
        "band reaches up to the worst 1% of tokens: a few broken tokens break a text, and a median hides them."
    )
    if dropped:
        see += " Shaded columns are dropped blocks."
    if "recovered" in curves:
        see += " Adapters also change the blocks before the first dropped one."
    table = [
        (
            row["block"],
            model,
            "dropped" if row["block"] in dropped else "",
            *(words.number(mean_of(row[space])) for space in SPACES),
        )
        for model, rows in curves.items()
        for row in rows
    ]
    return Figure(title, see, draw, ("block", "model", "", *SPACES), table, tuple(curves))


def _block_words(curves: dict[str, list[BlockDrift]], dropped: set[int]) -> str:
    ends = [
        f"{model}: " + ", ".join(f"{space} {words.number(mean_of(rows[-1][space]))}" for space in SPACES)
        for model, rows in curves.items()
    ]
    gone = f" Dropped blocks: {', '.join(map(str, sorted(dropped)))}." if dropped else ""
    return "Line charts of mean drift by block. At the last block, " + "; ".join(ends) + "." + gone


def _block_panel(
    curves: dict[str, list[BlockDrift]], space: Space, dropped: set[int], last: int, tops: list[float]
) -> Panel:
    marks: list[Mark] = []
    for model, rows in curves.items():
        line = [(each["block"], mean) for each in rows if (mean := mean_of(each[space])) is not None]
        upper = [(each["block"], high) for each in rows if (high := level(each[space], "p99")) is not None]
        if len(upper) == len(line):
            # In a very skewed drift the mean lies above p99: the band is then empty, not upside down.
            band = [(block, max(high, mean)) for (block, high), (_, mean) in zip(upper, line, strict=True)]
            marks.append(Band(band, line, f"wash-{model}"))
        tips = [f"{model}, block {block}: {space} drift {words.number(value)} (mean)" for block, value in line]
        dots = [(block, value, tip) for (block, value), tip in zip(line, tips, strict=True)]
        marks += [Line(line, f"stroke-{model} line"), Dots(dots, 3.5, f"fill-{model} rim")]
    return Panel(
        Axis(linear(0, last), "count", min(6, last), "block", inset=8),
        Axis(decades(tops, IDENTICAL)),
        marks,
        under=[Columns([(block, f"block {block} was dropped") for block in dropped], "gone")],
        title=SPACE_TITLES[space],
        note=SPACE_NOTES[space],
    )


STRETCH = 22.0  # pixels from one stretch of steps to the next in the map


def block_steps(data: PageData) -> Figure | None:
    """KL after each block in each stretch of decoding steps, a cell each; a map a model."""
    curves = by_model(data, lambda probe: [row for row in probe["blocks"] if row["by_step"]])
    if not curves:
        return None
    firsts = sorted({each["step"] for rows in curves.values() for row in rows for each in row["by_step"]})
    last = max(row["block"] for rows in curves.values() for row in rows)
    cells = {
        model: {(row["block"], each["step"]): (each["kl"], each["n"]) for row in rows for each in row["by_step"]}
        for model, rows in curves.items()
    }

    def draw(width: float) -> str:
        height = sum(STRETCH * len(firsts) + 66 for _ in cells)
        canvas = Canvas(width, height, _map_words(cells, firsts))
        top = 0.0
        for model, found in cells.items():
            _step_map(canvas, top, model, found, firsts, last)
            top += STRETCH * len(firsts) + 66
        return canvas.render()

    see = (
        "Each cell is the mean KL(dense ‖ model) read off the stream after one block (across), in one stretch of "
        "decoding steps (down), both models reading dense's words. A stronger colour means more: from "
        f"{', '.join(f'{least:g}' for least in LEVELS)} nats on. Rows alike: the damage does not grow along the text."
    )
    table = [
        (model, step, block, words.number(kl), words.count(count))
        for model, found in cells.items()
        for (block, step), (kl, count) in sorted(found.items(), key=lambda cell: (cell[0][1], cell[0][0]))
    ]
    columns = ("model", "from step", "block", "KL", "positions")
    return Figure("Where along depth and text", see, draw, columns, table)


def _step_map(
    canvas: Canvas,
    top: float,
    model: str,
    found: dict[tuple[int, int], tuple[float, int]],
    firsts: list[int],
    last: int,
) -> None:
    canvas.text(0, top + 14, model.capitalize(), f"panel ink-{model}")
    left, top = 46.0, top + 24
    x = Linear(-0.5, last + 0.5, left, canvas.width)
    for row, step in enumerate(firsts):
        canvas.text(left - 8, top + row * STRETCH + 15, str(step), "tick", anchor="end")
        for block in range(last + 1):
            if (block, step) not in found:
                continue
            kl, _ = found[block, step]
            tip = f"{model}, block {block}, from step {step}: KL {words.number(kl)}"
            css = f"fill-{model} shade-{sum(kl >= least for least in LEVELS)}"
            each = x(1) - x(0)
            canvas.rect(x(block - 0.5) + 0.5, top + row * STRETCH + 1, each - 1, STRETCH - 2, css, radius=2, tip=tip)
    below = top + len(firsts) * STRETCH
    gap = max(1, -(-18 // max(int(x(1) - x(0)), 1)))
    for block in range(0, last + 1, gap):
        canvas.text(x(block), below + 16, str(block), "tick", anchor="middle")
    canvas.text((x.start + x.stop) / 2, below + 34, "block; down: decoding steps", "note", anchor="middle")


def _map_words(cells: dict[str, dict[tuple[int, int], tuple[float, int]]], firsts: list[int]) -> str:
    """The map in a sentence: where each model's largest KL is, and whether the last rows are worse than the first."""
    told = []
    for model, found in cells.items():
        (block, step), (kl, _) = max(found.items(), key=lambda cell: cell[1][0])
        ends = [[kl for (_, at), (kl, _) in found.items() if at == edge] for edge in (firsts[0], firsts[-1])]
        first, last = (words.number(sum(row) / len(row)) if row else words.NOT_MEASURED for row in ends)
        largest = f"largest KL {words.number(kl)} after block {block} from step {step}"
        told.append(f"{model}: {largest}; mean over blocks {first} at first, {last} at the end")
    return f"Map of KL by block and decoding step. {'; '.join(told)}."


def steps(data: PageData) -> Figure:
    """KL along the text: on the dense model's own words, and on the words each model writes itself."""
    title = "KL to the dense model along the text"
    curves = by_model(data, lambda probe: probe["steps"])
    if not curves:
        return Figure(title, "Not measured: no probe recorded decoding steps.")
    lines = {
        model: {way: _kl_line(rows, way) for way in ("teacher_forced", "free_running")}
        for model, rows in curves.items()
    }
    values = [value for ways in lines.values() for line in ways.values() for _, value in line]
    if not values:
        return Figure(title, "Not measured: the probe recorded no KL per step.")

    last = max(step for ways in lines.values() for line in ways.values() for step, _ in line) or 1

    def draw(width: float) -> str:
        label = "Line charts. " + "; ".join(_kl_words(*item) for item in lines.items())
        return row_of(width, label, [_kl_panel(*item, last, values) for item in lines.items()], height=272, gap=34)

    see = (
        "Solid: both models read the dense model's words, so this is the direct error of pruning. Dashed: each model "
        "reads its own words. The dashed line rises where the texts part. Its height says that they are different, "
        "not that they are bad. Mean KL(dense ‖ model) in nats, log scale."
    )
    table = [
        (step, *(words.number(dict(ways[way]).get(step)) for ways in lines.values() for way in ways))
        for step in sorted({step for ways in lines.values() for line in ways.values() for step, _ in line})
    ]
    columns = (
        "step",
        *(
            f"{model}, {'dense words' if way == 'teacher_forced' else 'own words'}"
            for model, ways in lines.items()
            for way in ways
        ),
    )
    return Figure(title, see, draw, columns, table)


def _kl_line(rows: list[StepDrift], way: Literal["teacher_forced", "free_running"]) -> list[tuple[int, float]]:
    known = [(row["step"], mean_of(row[way]["kl"])) for row in rows]
    return [(step, value) for step, value in known if value is not None]


def _kl_words(model: str, ways: dict[str, list[tuple[int, float]]]) -> str:
    names = {"teacher_forced": "on dense words", "free_running": "on its own words"}
    means = [f"{names[way]} {words.number(sum(v for _, v in line) / len(line))}" for way, line in ways.items() if line]
    return f"{model}, mean KL {' and '.join(means)}"


def _kl_panel(model: str, ways: dict[str, list[tuple[int, float]]], last: int, values: list[float]) -> Panel:
    direct, own = ways["teacher_forced"], ways["free_running"]
    marks: list[Mark] = [Band(own, direct, f"wash-{model}")] if len(direct) == len(own) else []
    for way, css in (("teacher_forced", "line"), ("free_running", "line dashed")):
        name = way.replace("_", "-")
        tips = [(step, kl, f"{model}, step {step}, {name}: KL {words.number(kl)}") for step, kl in ways[way]]
        marks += [Line(ways[way], f"stroke-{model} {css}"), Dots(tips, 5, "hit")]
    return Panel(
        Axis(linear(0, last), "count", 6, "decoding step"),
        Axis(decades(values)),
        marks,
        title=model.capitalize(),
        note="solid: dense words · dashed: own words",
        colour=model,
    )


def predictors(data: PageData) -> Figure:
    """The paper's second-order predictor of KL against exact KL, one dot a decoding step."""
    title = "Can the cheap predictor be trusted?"
    dots = {model: _predicted(rows) for model, rows in by_model(data, lambda probe: probe["steps"]).items()}
    dots = {model: pairs for model, pairs in dots.items() if pairs}
    if not dots:
        return Figure(title, "Not measured: the probe recorded no predicted KL beside the exact one.")
    values = [value for pairs in dots.values() for _, *pair in pairs for value in pair]

    marks: list[Mark] = [_exact]
    for model, pairs in dots.items():
        tips = [
            (exact, guess, f"{model}, step {step}: exact {words.number(exact)}, predicted {words.number(guess)}")
            for step, exact, guess in pairs
        ]
        marks.append(Dots(tips, 4.5, f"fill-{model} rim soft"))
    label = "Scatter plot. " + "; ".join(_ratio_words(*item) for item in dots.items())
    x = Axis(decades(values), about=6, label="exact KL(dense ‖ model), nats", below=38)
    panel = Panel(x, Axis(decades(values)), marks)

    def draw(width: float) -> str:
        side = min(width - 60, 420.0)
        canvas = Canvas(width, side + 64, label)
        panel.draw(canvas, Box(56, 56 + side, 14, 14 + side), 56)
        if not is_narrow(width):
            _ratio_notes(canvas, dots, side + 110)
        return canvas.render()

    see = (
        "Var/(2T²) approximates KL to second order and is cheap to compute. A dot on the line: the approximation "
        "holds. Above the line: it overstates the damage. Below: it misses part of the damage."
    )
    table = [
        (step, model, words.number(exact), words.number(predicted))
        for model, pairs in dots.items()
        for step, exact, predicted in pairs
    ]
    return Figure(title, see, draw, ("step", "model", "exact KL", "Var/(2T²)"), table, tuple(dots))


def _exact(canvas: Canvas, x: Scale, y: Scale) -> None:
    """The line on which a predictor is exact. Its words lie where the line has left 110 pixels below the top."""
    canvas.line(x.start, y.start, x.stop, y.stop, "reference")
    canvas.text(x.stop, y.stop + 110 + 24, "predictor = exact", "note", anchor="end")


def _predicted(rows: list[StepDrift]) -> list[tuple[int, float, float]]:
    known = [
        (row["step"], mean_of(row["teacher_forced"]["kl"]), mean_of(row["teacher_forced"]["kl_predicted"]))
        for row in rows
    ]
    return [
        (step, exact, predicted)
        for step, exact, predicted in known
        if exact and predicted and min(exact, predicted) > 1e-8
    ]


def _ratios(pairs: list[tuple[int, float, float]]) -> list[float]:
    return sorted(predicted / exact for _, exact, predicted in pairs)


def _ratio_words(model: str, pairs: list[tuple[int, float, float]]) -> str:
    ratios = _ratios(pairs)
    middle, highest = words.number(ratios[len(ratios) // 2]), words.number(ratios[-1])
    return f"{model}: predicted over exact KL is {middle} at the median, {highest} at most"


def _ratio_notes(canvas: Canvas, dots: dict[str, list[tuple[int, float, float]]], left: float) -> None:
    """The median ratio in large type beside the plot, where a page is wide enough."""
    for index, (model, pairs) in enumerate(dots.items()):
        ratios, y = _ratios(pairs), 70 + index * 150
        canvas.text(left, y, model.capitalize(), f"panel ink-{model}")
        canvas.text(left, y + 46, f"×{words.number(ratios[len(ratios) // 2])}", f"big ink-{model}")
        canvas.text(left, y + 72, "predicted over exact KL, median step", "note")
        canvas.text(
            left,
            y + 92,
            f"from ×{words.number(ratios[0])} to ×{words.number(ratios[-1])} over {len(ratios)} steps",
            "note",
        )


Curve = list[tuple[int, float]]  # (decoding step, share of texts)


def sampled(data: PageData) -> Figure | None:
    """Share of texts that are still the dense model's, drawn at T = 1 from several seeds, beside the greedy one."""
    drawn = by_model(data, lambda probe: probe["sampled"])
    if not drawn:
        return None
    greedy = {model: _greedy_shares(data["drift"][model]) for model in drawn}

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


def _greedy_shares(drift: Drift | None) -> Curve:
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
