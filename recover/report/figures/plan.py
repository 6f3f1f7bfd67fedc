"""Pictures of parts of the model: what was pruned by which scores, and what single sublayers are worth.

Of a pruning: the scores that chose the blocks, or the share of zeros in every linear layer. Of sublayers taken one at a
time, all else dense: what each is worth, and what it writes into the stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from recover.config.prune import DEPTH_SCORES, DepthScore
from recover.report import words
from recover.report.data import PageData, Plan, SublayerDrift
from recover.report.drift import by_model, mean_of
from recover.report.figures.figure import (
    Axis,
    Bars,
    Canvas,
    Dots,
    Figure,
    Line,
    Linear,
    Log,
    Mark,
    Panel,
    Scale,
    apart,
    decades,
    is_narrow,
    linear,
    row_of,
)
from recover.report.run_files import Score

_MODULE = re.compile(r"^(?:.*\.)?(\d+)\.(.+)$")  # block number and the site inside it, from a module's name
SHADES = 5
CELL = 30  # pixels from one layer to the next
LANE, GAP = 220.0, 26.0  # height of one panel of scores, and what lies between two


def pruned(data: PageData) -> Figure:
    """Scores per block for a depth plan, a map of zeros for masks."""
    plan = data["plan"]
    if not plan:
        return Figure("What was pruned", "Not measured: nothing was pruned yet.")
    if plan["modules"]:
        return _sparsity_map(plan)
    if words.plan_sites(plan):
        return _depth(plan)
    if plan.get("experts"):
        return Figure("What was pruned", f"Every mixture lost {words.plan_experts(plan)}: the table says which.")
    if plan.get("config"):
        return Figure("What was pruned", f"Every block is narrower, by the same measure: {words.plan_sizes(plan)}.")
    return Figure("What was pruned", "The plan drops no block and no weight.")


Cells = dict[tuple[str, int], float]  # (layer, block) -> share of zeros
Rounds = dict[int, dict[int, float]]  # round -> block -> score
LANES = {"block": "", "attention": "Attention", "mlp": "MLP"}


def _lane(record: Score) -> str:
    """What a candidate is made of: attentions alone, MLPs alone, or (whole blocks, runs of both) the block."""
    parts = {str(part).partition(":")[0] for part in record.get("parts") or ()}
    return parts.pop() if len(parts) == 1 and parts <= set(LANES) else "block"


def _lanes(plan: Plan) -> dict[str, Rounds]:
    """Lane -> rounds, the lowest score of a block's candidates. A candidate of several blocks counts at its first.

    In a search that carries several sets a block has a candidate on top of each: the one that was chosen is shown.
    """
    found: dict[str, Rounds] = {}
    for record in plan.get("scores") or ():
        score = words.finite(record.get("score"))
        if score is not None and record.get("blocks") and record.get("round"):
            scores = found.setdefault(_lane(record), {}).setdefault(record["round"], {})
            block = record["blocks"][0]
            scores[block] = min(score, scores.get(block, score))
    for record in [record for record in plan.get("scores") or () if record.get("chosen") and record.get("beside")]:
        if record["score"] is not None:
            found[_lane(record)][record["round"]][record["blocks"][0]] = record["score"]
    return {lane: found[lane] for lane in LANES if lane in found}


def _chosen(plan: Plan) -> dict[tuple[str, int], int]:
    """(lane, block) -> the round that chose it."""
    return {
        (_lane(record), block): record["round"]
        for record in plan.get("scores") or ()
        if record.get("chosen")
        for block in record["blocks"]
    }


def _depth(plan: Plan) -> Figure:
    title = f"Which of {plan['blocks']} blocks were dropped"
    if not plan["dropped"] or words.plan_gone(plan, "attention") != words.plan_gone(plan, "mlp"):
        title = f"Which sublayers of {plan['blocks']} blocks were dropped"
    elif len(plan["dropped"]) > 1:
        title = f"Which {len(plan['dropped'])} of {plan['blocks']} blocks were dropped"
    lanes, chosen = _lanes(plan), _chosen(plan)
    scores = [score for rounds in lanes.values() for found in rounds.values() for score in found.values()]

    def draw(width: float) -> str:
        height = 86.0 + (LANE + GAP) * len(lanes)
        canvas = Canvas(width, height, f"Dropped: {words.plan_sites(plan)}, of {plan['blocks']} blocks")
        x = Linear(-0.5, plan["blocks"] - 0.5, 50, width - (8 if is_narrow(width) else 70))
        for index, (lane, rounds) in enumerate(lanes.items()):
            y = Log.around(scores, (index + 1) * (LANE + GAP) - 16, index * (LANE + GAP) + (34 if LANES[lane] else 16))
            canvas.text(0, index * (LANE + GAP) + 16, LANES[lane], "panel")
            _score_lines(canvas, lane, rounds, chosen, x, y)
        _strip(canvas, plan, x, height - 76)
        return canvas.render()

    columns, table = _depth_table(plan, lanes, chosen)
    return Figure(title, _depth_words(plan, lanes), draw, columns, table)


def _depth_words(plan: Plan, lanes: dict[str, Rounds]) -> str:
    see = "Crossed cells were dropped; the model runs the others in order."
    if not lanes:
        return see
    by = next((by for record in plan["scores"] if (by := record.get("by")) and record["round"]), None)
    unit = "block" if list(lanes) == ["block"] else "sublayer"
    meaning = DEPTH_SCORES.get(str(by), DepthScore(str(by), "")).says(unit)
    several = len({number for rounds in lanes.values() for number in rounds}) > 1
    lines = "Each line is one round of the search" if several else "The line is the one round of the search"
    beside = (
        " Attention and MLP have a panel each, on one scale: a round drops the lowest point of the two."
        if len(lanes) > 1
        else ""
    )
    return f"{lines}: {meaning}, lower is cheaper. Discs mark the {unit} each round dropped.{beside} {see}"


def _depth_table(
    plan: Plan, lanes: dict[str, Rounds], chosen: dict[tuple[str, int], int]
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    named = [
        (f"round {n}{f', {LANES[lane]}' if LANES[lane] else ''}", found)
        for lane, rounds in lanes.items()
        for n, found in rounds.items()
    ]
    table = [
        (
            block,
            _fate(plan, block, chosen),
            *(words.number(found[block]) if block in found else "–" for _, found in named),
        )
        for block in range(plan["blocks"])
    ]
    return ("block", "", *(name for name, _ in named)), table


def _fate(plan: Plan, block: int, chosen: dict[tuple[str, int], int]) -> str:
    gone = [part for part in ("attention", "mlp") if block in words.plan_gone(plan, part)]
    if not gone:
        return "kept"
    what = "" if len(gone) == 2 else f"{'MLP' if gone == ['mlp'] else 'attention'} "
    rounds = sorted({number for (_, at), number in chosen.items() if at == block})
    when = " and ".join(map(str, rounds))
    return f"{what}dropped{f' in round {when}' if when else ''}"


def _strip(canvas: Canvas, plan: Plan, x: Linear, top: float) -> None:
    """One cell a block, attention above MLP, numbered; what is dropped is hollow and crossed out."""
    each = x(1) - x(0)
    gap = min(4.0, each / 6)
    for block in range(plan["blocks"]):
        left = x(block - 0.5) + gap / 2
        lost = [part for part in ("attention", "mlp") if block in words.plan_gone(plan, part)]
        halves = [(part, offset, 14) for part, offset in (("attention", 0), ("mlp", 16))]
        for part, offset, height in halves if len(lost) == 1 else [("block", 0, 30)]:
            gone = bool(lost) and part in (*lost, "block")
            tip = f"block {block}{'' if part == 'block' else f', {part}'}: {'dropped' if gone else 'kept'}"
            css = "cell-gone" if gone else "cell-kept"
            canvas.rect(left, top + offset, each - gap, height, css, radius=min(4, each / 5), tip=tip)
            if gone:
                canvas.marker(left + (each - gap) / 2, top + offset + height / 2, min(6, each / 4, height / 3), "cross")
        if block % _every(x) == 0:
            canvas.text(left + (each - gap) / 2, top + 48, str(block), "tick", anchor="middle")
    canvas.text((x.start + x.stop) / 2, top + 68, "block", "note", anchor="middle")


def _score_lines(
    canvas: Canvas, lane: str, rounds: Rounds, chosen: dict[tuple[str, int], int], x: Linear, y: Log
) -> None:
    canvas.axis_y(y, x.start, x.stop)
    shown = list(rounds)
    for index, number in enumerate(shown):
        scores = rounds[number]
        strength = 1 + round((SHADES - 1) * index / max(len(shown) - 1, 1)) if len(shown) > 1 else SHADES
        line = [(x(block), y(score)) for block, score in sorted(scores.items())]
        canvas.path(line, f"stroke-pruned thin shade-{strength}")
        for block, score in scores.items():
            picked = chosen.get((lane, block)) == number
            css = "fill-pruned rim" if picked else f"fill-pruned shade-{strength}"
            tip = (
                f"round {number}, {'' if lane == 'block' else f'{LANES[lane]} of '}block {block}: {words.number(score)}"
            )
            canvas.dot(x(block), y(score), 6 if picked else 2.2, css, tip=tip)
    if x.stop + 60 < canvas.width:
        named = shown if len(shown) <= 6 else [shown[0], shown[-1]]
        places = apart([y(rounds[number][max(rounds[number])]) for number in named], 14)
        for number, place in zip(named, places, strict=True):
            canvas.text(x(max(rounds[number])) + 10, place + 4, f"round {number}", "tick")


def _sparsity_map(plan: Plan) -> Figure:
    cells: Cells = {}
    for module in plan["modules"]:
        match = _MODULE.match(module["module"])
        site, block = (match.group(2), int(match.group(1))) if match else (module["module"], 0)
        cells[site, block] = module["sparsity"]
    low, high = min(cells.values()), max(cells.values())
    label = f"Map of zeros per linear layer, from {words.percent(low)} to {words.percent(high)}"
    span = f"from {words.percent(low, 1)} to {words.percent(high, 1)}"
    see = f"Share of weights that are zero in each linear layer: {span}, a stronger colour means more zeros."
    table = [(block, site, words.percent(share, 1)) for (site, block), share in cells.items()]
    columns = ("block", "layer", "zeros")
    return Figure("Where the zeros are", see, lambda width: _draw_cells(cells, label, width), columns, table)


def _draw_cells(cells: Cells, label: str, width: float) -> str:
    """A row a layer, a column a block."""
    sites = list(dict.fromkeys(site for site, _ in cells))
    last, bottom = max(block for _, block in cells), CELL * len(sites)
    left = 92.0 if is_narrow(width) else 130.0
    canvas = Canvas(width, bottom + 48, label)
    x = Linear(-0.5, last + 0.5, left, width)
    for index, site in enumerate(sites):
        canvas.text(left - 8, index * CELL + 19, site.rpartition(".")[2], "tick", anchor="end")
        for block in range(last + 1):
            if (site, block) in cells:
                _cell(canvas, x, index * CELL, site, block, cells[site, block])
    for block in range(0, last + 1, _every(x)):
        canvas.text(x(block), bottom + 18, str(block), "tick", anchor="middle")
    canvas.text((x.start + x.stop) / 2, bottom + 40, "block", "note", anchor="middle")
    return canvas.render()


def _cell(canvas: Canvas, x: Linear, top: float, site: str, block: int, share: float) -> None:
    each = x(1) - x(0)
    css, tip = f"fill-pruned shade-{_shade(share)}", f"block {block}, {site}: {words.percent(share, 1)} zeros"
    canvas.rect(x(block - 0.5) + 1, top + 2, each - 2, CELL - 4, css, radius=2, tip=tip)
    if each >= 36:
        canvas.text(x(block), top + 19, words.percent(share, 0), "inside", anchor="middle")


def _every(x: Linear) -> int:
    """Of so many blocks one has its number below it, so that numbers stay apart."""
    return max(1, -(-18 // max(int(x(1) - x(0)), 1)))


def _shade(share: float) -> int:
    """1 (few zeros) to SHADES (all)."""
    return min(SHADES, 1 + int(share * SHADES))


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

    values = [value for levels in (closed, *replaced.values()) for value in levels.values()]

    def draw(width: float) -> str:
        label = "Dot plots by block. " + " ".join(_worst(model, levels) for model, levels in replaced.items())
        shown = [
            Panel(
                _blocks_axis(last),
                Axis(decades(values, NOTHING)),
                _worths(part, closed, replaced, words.plan_gone(data["plan"], part)),
                title=PART_NAMES[part],
            )
            for part in PARTS
        ]
        return row_of(width, label, shown, gap=24)

    see = (
        "One sublayer of the dense model is changed at a time, and KL is measured right after it, log scale. Bars: the "
        "sublayer is removed. Dots: it is replaced by the other model's. A dot at the top of its bar: the replacement "
        "does none of the work. Far below: it does nearly all of it. On the zero line: it is the dense sublayer."
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


def _blocks_axis(last: int) -> Axis:
    return Axis(linear(-0.5, last + 0.5), label="block", ticks=range(0, last + 1, max(1, -(-(last + 1) // 12))))


def _worths(part: str, closed: Levels, replaced: dict[str, Levels], gone: set[int]) -> list[Mark]:
    bars = [
        (block, value, "bar-gone" if block in gone else "bar", _closed_words(part, block, value, block in gone))
        for (of, block), value in closed.items()
        if of == part
    ]
    found: list[Mark] = [Bars(bars)]
    for model, levels in replaced.items():
        dots = [
            (block, value, f"{part} of block {block}, {model}'s: KL {words.number(value)}")
            for (of, block), value in levels.items()
            if of == part
        ]
        found.append(_fitting(dots, f"fill-{model} rim"))
    return found


def _closed_words(part: str, block: int, value: float, gone: bool) -> str:
    return f"{part} of block {block} closed: KL {words.number(value)}{', dropped' if gone else ''}"


def _fitting(dots: Sequence[tuple[float, float, str]], css: str) -> Mark:
    """Dots that are smaller where blocks are many."""

    def draw(canvas: Canvas, x: Scale, y: Scale) -> None:
        Dots(dots, min(4.5, max(2.5, (x(1) - x(0)) * 0.2)), css)(canvas, x, y)

    return draw


def writes(data: PageData) -> Figure | None:
    """How far the stream would be from the dense state without a sublayer's contribution: along it, and across it."""
    found = by_model(data, lambda probe: probe["sublayers"])
    rows = next(iter(found.values()), [])
    along, across = (_levels(rows, "closed", figure) for figure in ("parallel", "orthogonal"))
    if not across:
        return None
    last = max(block for _, block in across)

    highest = max(0.0, *across.values(), *(abs(value) for value in along.values()))

    def draw(width: float) -> str:
        (part, block), most = max(across.items(), key=lambda item: item[1])
        label = f"Line charts by block. Most is written by the {part} of block {block}: {words.number(most)} across."
        shown = [
            Panel(
                _blocks_axis(last),
                Axis(linear(0, highest * 1.05)),
                _written(name, along, across),
                title=PART_NAMES[name],
                note="solid: across · dashed: along",
            )
            for name in PARTS
        ]
        return row_of(width, label, shown, gap=24)

    see = (
        "One sublayer is removed: how much of the dense model's hidden state is then missing, as a share of its "
        "length. Across: the direction changes, and so may the prediction. Along: only the length changes, and the "
        "final norm undoes most of that. Low on both lines: this sublayer is cheap to lose."
    )
    columns = ("block", "sublayer", "across", "along")
    table = [
        (block, PART_NAMES[part], words.number(value), words.number(along.get((part, block))))
        for (part, block), value in sorted(across.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return Figure("What each sublayer adds to the hidden state", see, draw, columns, table)


def _written(part: str, along: Levels, across: Levels) -> list[Mark]:
    found: list[Mark] = []
    for levels, css, name in ((along, "line dashed", "along"), (across, "line", "across")):
        points = [(block, abs(value)) for (of, block), value in sorted(levels.items()) if of == part]
        tips = [(block, value, f"{part} of block {block}: {words.number(value)} {name}") for block, value in points]
        found += [Line(points, f"stroke-dense {css}"), Dots(tips, 3.5, "fill-dense rim")]
    return found
