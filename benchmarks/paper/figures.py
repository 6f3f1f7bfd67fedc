"""The figures of the benchmark, as SVG files, from its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drawing import Panel, apart, canvas_for, end_labels, frame, grid, key, standalone
from table import NAMES, ordered, title, uses

from recover.base.artifacts import write_text
from recover.report.figures.figure import Canvas, Linear, Log

Row = dict[str, Any]

COUNTED = {"attention": "Attention dropped", "mlp": "MLP dropped", "block": "Whole blocks dropped"}
USES = {"generate": ("generation", "orange"), "choice": ("choice", "teal"), "retrieval": ("retrieval", "blue")}
SPACES = {"embedding": ("h", "teal"), "logit": ("z", "blue"), "probability": ("p", "orange")}
FAMILY_COLOURS = {"attention": "blue", "mlp": "orange", "block": "teal", "wanda": "purple", "rounded": "grey"}
SHORT = {"wanda-50": "50%", "wanda-4of8": "4:8", "wanda-2of4": "2:4", "int4": "4 bits", "int6": "6 bits"}
WAYS = {  # what the dense view and the other one have read
    "forced": ("teal", "both on the dense text"),
    "own": ("blue", "both on the pruned text"),
    "total": ("orange", "each on its own text"),
}
OPTION_KEY = {
    "attention": "attentions dropped",
    "mlp": "MLPs dropped",
    "block": "blocks dropped",
    "wanda": "Wanda",
    "rounded": "rounded to nearest",
}
SMALLEST = 1e-6  # what is below is drawn as zero
DOTTED = 12  # points of a line that are dots too; of more the line is enough


def write_figures(rows: list[Row], out: Path) -> list[Path]:
    """Every figure for which there are rows; returns the files."""
    rows = ordered(rows)
    figures: dict[str, Callable[[list[Row]], Canvas | None]] = {
        "scores": scores,
        "spaces": spaces,
        "blocks": blocks,
        "steps_kl": lambda rows: steps(rows, "kl", "KL", "Var_p(dz) / 2"),
        "steps_probability": lambda rows: steps(rows, "probability", "1 − cos p", "Var_r(dz) / 2"),
        "options": options,
    }
    written = []
    for name, draw in figures.items():
        canvas = draw(rows)
        if canvas is not None:
            write_text(out / f"{name}.svg", standalone(canvas))
            written.append(out / f"{name}.svg")
    return written


def _series(rows: list[Row], family: str) -> list[Row]:
    """The dense row and those of one family, by count."""
    return [row for row in rows if row["family"] in ("dense", family)]


def scores(rows: list[Row]) -> Canvas | None:
    """Choice, retrieval and generation against what is dropped, and under masks and 4 bits."""
    families = [family for family in COUNTED if len(_series(rows, family)) > 1]
    others = [row for row in rows if row["row"] in SHORT]
    panels = grid(len(families) + bool(others), 2, 210, left=48, right=118)
    if not panels:
        return None
    canvas = canvas_for(panels, "Generation, choice and retrieval against the number of dropped sublayers or blocks")
    for panel, family in zip(panels, families, strict=False):
        series = _series(rows, family)
        x, y = Linear(0, series[-1]["count"], panel.left, panel.right), Linear(0, 1, panel.bottom, panel.top)
        frame(
            canvas, panel, x, y, (COUNTED[family], f"{NAMES[family]} dropped (of {_blocks(rows)})", "score"), "percent"
        )
        labels = _chance(canvas, panel, rows[0], y)
        points = {kind: [(x(row["count"]), uses(row)[kind]) for row in series] for kind in uses(series[0])}
        _score_lines(canvas, panel, points, y, labels)
    if others:
        _weights_panel(canvas, panels[-1], rows, others)
    return canvas


def _blocks(rows: list[Row]) -> str:
    """How many blocks the model has, from the drift through them."""
    lengths = [len(row["drift"]["blocks"]) for row in rows if row["drift"].get("blocks")]
    return f"{lengths[0]}" if lengths else "all"


def _chance(canvas: Canvas, panel: Panel, row: Row, y: Linear) -> list[tuple[float, str, str]]:
    """A line where a choice by chance would be, and its label."""
    chances = [record["chance"] for record in row["tasks"].values() if record["kind"] == "choice"]
    if not chances:
        return []
    level = y(sum(chances) / len(chances))
    canvas.line(panel.left, level, panel.right, level, "stroke-teal thin dashed")
    return [(level, "choice by chance", "soft small")]


def _score_lines(
    canvas: Canvas, panel: Panel, points: dict[str, list[Any]], y: Linear, labels: list[tuple[float, str, str]]
) -> None:
    for kind, line in points.items():
        name, colour = USES[kind]
        canvas.area(
            [(x, y(high)) for x, (_, _, high) in line], [(x, y(low)) for x, (_, low, _) in line], f"wash-{colour}"
        )
        canvas.path([(x, y(value)) for x, (value, _, _) in line], f"stroke-{colour} line")
        for x, (value, _, _) in line:
            canvas.dot(x, y(value), 3.5, f"fill-{colour} rim", tip=f"{name} {value:.1%}")
        labels.append((y(line[-1][1][0]), name, colour))
    end_labels(canvas, panel.right + 10, labels, panel.top, panel.bottom)


def _weights_panel(canvas: Canvas, panel: Panel, rows: list[Row], others: list[Row]) -> None:
    """One column for each way to change weights; dense first."""
    shown = [rows[0], *others] if rows[0]["family"] == "dense" else others
    x, y = Linear(-0.5, len(shown) - 0.5, panel.left, panel.right), Linear(0, 1, panel.bottom, panel.top)
    canvas.text(panel.left, panel.top - 26, "Weights set to zero (Wanda) or rounded", "panel")
    canvas.text(panel.left, panel.top - 9, "score", "note")
    canvas.axis_y(y, panel.left, panel.right, "percent")
    labels = _chance(canvas, panel, rows[0], y)
    for place, row in enumerate(shown):
        canvas.text(x(place), panel.bottom + 17, SHORT.get(row["row"], "dense"), "tick", anchor="middle")
        for shift, (kind, (value, low, high)) in enumerate(uses(row).items()):
            at, colour = x(place) + 14 * (shift - 1), USES[kind][1]
            canvas.line(at, y(low), at, y(high), f"stroke-{colour} thin")
            canvas.dot(at, y(value), 4, f"fill-{colour} rim", tip=f"{USES[kind][0]} {value:.1%}")
    labels += [(y(value), *USES[kind]) for kind, (value, _, _) in uses(shown[-1]).items()]
    end_labels(canvas, panel.right + 10, labels, panel.top, panel.bottom)


def spaces(rows: list[Row]) -> Canvas | None:
    """Drift at the last layer in three spaces, against what is dropped."""
    families = [family for family in COUNTED if len(_series(rows, family)) > 1]
    if not families:
        return None
    panels = grid(len(families), 3, 210, left=52, right=40)
    canvas = canvas_for(panels, "Drift at the last layer in three spaces against the number of dropped units")
    final = {family: [row for row in _series(rows, family) if row["count"]] for family in families}
    values = [row["drift"]["final"][space]["mean"] for series in final.values() for row in series for space in SPACES]
    for panel, family in zip(panels, families, strict=True):
        x = Linear(0, final[family][-1]["count"], panel.left, panel.right)
        y = Log.around(values, panel.bottom, panel.top, SMALLEST)
        frame(canvas, panel, x, y, (COUNTED[family], f"{NAMES[family]} dropped", "1 − cos to dense, mean"), "number")
        lines = {
            space: [(row["count"], row["drift"]["final"][space]["mean"]) for row in final[family]] for space in SPACES
        }
        _space_lines(canvas, panel, lines, x, y)
    return canvas


def blocks(rows: list[Row]) -> Canvas | None:
    """Drift at the output of every block in three spaces, one panel a plan; dropped blocks are shaded."""
    probed = [row for row in rows if row["drift"].get("blocks")]
    if not probed:
        return None
    panels = grid(len(probed), 3, 190, left=52, right=40)
    canvas = canvas_for(panels, "Drift at the output of each block in three spaces")
    values = [block[space]["mean"] for row in probed for block in row["drift"]["blocks"] for space in SPACES]
    for panel, row in zip(panels, probed, strict=True):
        found = row["drift"]["blocks"]
        x = Linear(0, found[-1]["block"], panel.left, panel.right)
        y = Log.around(values, panel.bottom, panel.top, SMALLEST)
        for block in row["dropped"] if row["count"] else ():
            step = x(1) - x(0)
            canvas.rect(x(block) - step / 2, panel.top, step, panel.bottom - panel.top, "gone")
        frame(canvas, panel, x, y, (_dropped(row), "block", "1 − cos to dense, mean"), "number")
        lines = {space: [(block["block"], block[space]["mean"]) for block in found] for space in SPACES}
        _space_lines(canvas, panel, lines, x, y)
    return canvas


def _dropped(row: Row) -> str:
    return f"{title(row)} dropped" if row["count"] else title(row)


def _space_lines(
    canvas: Canvas, panel: Panel, lines: dict[str, list[tuple[int, float]]], x: Linear, y: Linear | Log
) -> None:
    labels = []
    for space, line in lines.items():
        name, colour = SPACES[space]
        canvas.path([(x(at), y(value)) for at, value in line], f"stroke-{colour} line")
        for at, value in line if len(line) <= DOTTED else ():
            canvas.dot(x(at), y(value), 2.5, f"fill-{colour}", tip=f"{space} {value:.3g} at {at}")
        labels.append((y(line[-1][1]), name, colour))
    end_labels(canvas, panel.right + 10, labels, panel.top, panel.bottom)


def steps(rows: list[Row], metric: str, words: str, predictor: str) -> Canvas | None:
    """One metric and its second-order predictor against the decoding step, on the dense text and on each view's own."""
    probed = [row for row in rows if row["drift"].get("steps", {}).get("total")]
    if not probed:
        return None
    panels = grid(len(probed), 3, 190, left=52, right=16, above=30)
    canvas = canvas_for(panels, f"{words} and {predictor} against the decoding step")
    entries = [(f"stroke-{colour} line", what) for colour, what in WAYS.values()]
    key(canvas, 20, [*entries, ("axis thin dashed", f"{predictor} of each")])
    names = metric, f"{metric}_predicted"
    beside = f"{words}, mean over texts{', nats' if metric == 'kl' else ''}"
    values = [
        value for row in probed for way in WAYS for name in names for value in row["drift"]["steps"][way][name]["mean"]
    ]
    for panel, row in zip(panels, probed, strict=True):
        found = row["drift"]["steps"]
        x = Linear(0, max(len(found[way]["n"]) for way in WAYS) - 1, panel.left, panel.right)
        y = Log.around(values, panel.bottom, panel.top, SMALLEST)
        frame(canvas, panel, x, y, (_dropped(row), "decoding step", beside), "number")
        for way, (colour, _) in WAYS.items():
            for name, style in ((names[1], "thin dashed"), (names[0], "line")):
                line = found[way][name]["mean"]
                canvas.path([(x(at), y(value)) for at, value in enumerate(line)], f"stroke-{colour} {style}")
    return canvas


def options(rows: list[Row]) -> Canvas | None:
    """Drift among the option tokens against drift over the vocabulary at the same place, one point a row."""
    asked = [row for row in rows if row["choice"] and row["choice"]["subspace"] and row["family"] != "dense"]
    if not asked:
        return None
    panels = grid(2, 2, 330, left=60, right=56)
    canvas = canvas_for(panels, "Drift within the answer options against drift over the whole vocabulary")
    for panel, (metric, words) in zip(panels, (("kl", "KL, nats"), ("probability", "1 − cos(p, q)")), strict=True):
        at = {
            row["row"]: tuple(row["choice"][part][metric]["mean"] for part in ("vocabulary", "drift")) for row in asked
        }
        values = [value for pair in at.values() for value in pair]
        x, y = Log.around(values, panel.left, panel.right), Log.around(values, panel.bottom, panel.top)
        heads = (f"{words}, mean over items", f"over the vocabulary: {words}", "among the options, renormalised")
        frame(canvas, panel, x, y, heads, "number")
        canvas.line(panel.left, panel.bottom, panel.right, panel.top, "diagonal")
        share = 0.3 * (panel.right - panel.left), 0.3 * (panel.bottom - panel.top)
        canvas.text(panel.left + share[0] - 8, panel.bottom - share[1], "equal", "note", anchor="end")
        _option_points(canvas, panel, asked, {name: (x(a), y(b)) for name, (a, b) in at.items()})
    return canvas


def _option_points(canvas: Canvas, panel: Panel, asked: list[Row], at: dict[str, tuple[float, float]]) -> None:
    for family, colour in FAMILY_COLOURS.items():
        series = [row for row in asked if row["family"] == family]
        if family in COUNTED:
            canvas.path([at[row["row"]] for row in series], f"stroke-{colour} thin")
        for row in series:
            canvas.dot(*at[row["row"]], 4, f"fill-{colour} rim", tip=title(row))
    ends = [row for index, row in enumerate(asked) if row["family"] not in COUNTED or _is_last(asked, index)]
    places = apart([at[row["row"]][1] for row in ends], 13.0, panel.top, panel.bottom)
    for row, place in zip(ends, places, strict=True):
        words = SHORT.get(row["row"], str(row["count"]))
        canvas.text(at[row["row"]][0] + 8, place + 4, words, f"ink-{FAMILY_COLOURS[row['family']]} small")
    there = [family for family in FAMILY_COLOURS if any(row["family"] == family for row in asked)]
    for place, family in enumerate(there):
        y = panel.top + 14 + 18 * place
        canvas.dot(panel.left + 14, y - 4, 4, f"fill-{FAMILY_COLOURS[family]}")
        canvas.text(panel.left + 24, y, OPTION_KEY[family], f"ink-{FAMILY_COLOURS[family]}")


def _is_last(asked: list[Row], index: int) -> bool:
    return index + 1 == len(asked) or asked[index + 1]["family"] != asked[index]["family"]
