"""What recovery was expected to bring before it was paid for: go or no-go, in words; nothing without a forecast."""

from __future__ import annotations

from typing import Any

from recover.report import verdict, words
from recover.report.figures.figure import Figure, is_narrow
from recover.report.figures.svg import Canvas, Linear

ADVICE = {"go": "go", "no-go": "no-go", "cannot tell": "cannot tell"}
USES = ("generation", "choice", "retrieval")
ROW = 44
TOP = 1.2  # shares of dense beyond this are drawn at the edge


def forecast(data: dict[str, Any]) -> dict[str, Any] | None:
    """{"word", "lines", "figure" or None} for the template, from `data["forecast"]`; None where there is none."""
    found = data.get("forecast")
    if not found:
        return None
    lines = [str(found["reason"])] if found.get("reason") else []
    lines += [line for line in (_basis(found), _not_forecast(found), _other_recipe(data)) if line]
    return {
        "word": ADVICE.get(str(found.get("advice")), str(found.get("advice"))),
        "lines": lines,
        "figure": drawing(data),
    }


def drawing(data: dict[str, Any]) -> Figure | None:
    """For each use, the interval and the expected share of dense, and what was measured afterwards."""
    classes = data["forecast"].get("classes") or {}
    shown = [
        use for use in (*USES, *sorted(set(classes) - set(USES))) if words.finite(_row(classes, use).get("expected"))
    ]
    if not shown:
        return None
    measured = {use: None if _other_recipe(data) else _measured(data, use) for use in shown}
    rows = {use: _row(classes, use) for use in shown}

    def draw(width: float) -> str:
        left = 8.0 if is_narrow(width) else 120.0
        label = "Interval plot. " + "; ".join(_words(use, rows[use], measured[use]) for use in shown)
        canvas = Canvas(width, ROW * len(shown) + 46, label)
        x = Linear(0.0, TOP, left, width - 20)
        bottom = ROW * len(shown) + 6
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            canvas.line(x(tick), 4, x(tick), bottom, "grid")
            canvas.text(x(tick), bottom + 18, words.percent(tick, 0), "tick", anchor="middle" if tick else "start")
        canvas.line(x(1.0), 2, x(1.0), bottom, "reference")
        for index, use in enumerate(shown):
            _draw_use(canvas, use, rows[use], measured[use], x, 6.0 + index * ROW)
        return canvas.render()

    see = "Bar: the interval of the forecast; tick: what was expected."
    title = "Forecast, shares of dense"
    if any(share is not None for share in measured.values()):
        see += " Disc: what was measured afterwards; outside its bar, the forecast did not hold for this run."
        title = "Forecast and outcome, shares of dense"
    table = [
        (
            use,
            words.percent(rows[use]["expected"]),
            _interval(rows[use].get("interval")),
            words.percent(measured[use]),
            rows[use].get("reason") or "–",
        )
        for use in shown
    ]
    columns = ("use", "expected", "interval", "measured", "why")
    return Figure("forecast", title, see, draw, columns, table)


def _row(classes: dict[str, Any], use: str) -> dict[str, Any]:
    return classes.get(use) or {}


def _measured(data: dict[str, Any], use: str) -> float | None:
    return (data["verdict"]["recovered"].get(use) or {}).get("kept")


def _words(use: str, row: dict[str, Any], measured: float | None) -> str:
    came = "" if measured is None else f", measured {verdict.share(measured)}"
    return f"{use}: expected {words.percent(row['expected'])}, interval {_interval(row.get('interval'))}{came}"


def _draw_use(canvas: Canvas, use: str, row: dict[str, Any], measured: float | None, x: Linear, top: float) -> None:
    def at(share: float) -> float:
        return x(min(max(share, 0.0), TOP))

    y = top + 24
    if x.start > 100:
        canvas.text(0, y + 5, use.capitalize(), "label")
    else:
        canvas.text(x.start, top + 10, use.capitalize(), "note")
    tip = _words(use, row, measured)
    bounds = [bound for bound in map(words.finite, row.get("interval") or ()) if bound is not None]
    if len(bounds) == 2:
        canvas.rect(at(bounds[0]), y - 8, at(bounds[1]) - at(bounds[0]), 16, "bar", radius=3, tip=tip)
    canvas.line(at(row["expected"]), y - 11, at(row["expected"]), y + 11, "whisker")
    if measured is not None:
        canvas.dot(at(measured), y, 6.5, "fill-recovered rim", tip=tip)


def _interval(bounds: Any) -> str:
    if not bounds or len(bounds) != 2:
        return words.NOT_MEASURED
    return " to ".join(words.percent(bound) for bound in bounds)


def _basis(found: dict[str, Any]) -> str:
    """What the forecast rests on."""
    parts = []
    if words.finite(found.get("runs")):
        parts.append(f"{words.count(found['runs'])} earlier run{'' if found['runs'] == 1 else 's'}")
    if words.finite(found.get("trial_tokens")):
        parts.append(f"a trial of {words.count(found['trial_tokens'])} tokens")
    return f"It rests on {' and '.join(parts)}." if parts else ""


def _not_forecast(found: dict[str, Any]) -> str:
    """Uses of which nothing was said, with the reason; one sentence for uses of one reason."""
    why: dict[str, list[str]] = {}
    for use, reason in (found.get("not_forecast") or {}).items():
        why.setdefault(str(reason), []).append(use)
    return " ".join(f"No forecast of {' and '.join(uses)}: {reason}." for reason, uses in why.items())


def _other_recipe(data: dict[str, Any]) -> str:
    """Said where the forecast was made for other leaves of the recipe than those of this run."""
    asked = data["forecast"].get("recipe") or {}
    other = sorted(leaf for leaf, value in asked.items() if data["recipe"].get(leaf) != value)
    return f"It was made for another recipe ({', '.join(other)}): no outcome is set beside it." if other else ""
