"""The table of `quality.py`: each variant over its seeds, and against the default seed by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crew import Row

Figure = tuple[Callable[[Row], float | None], str, bool]  # where it stands, its format, whether more is better

FIGURES: dict[str, Figure] = {
    "KL, own texts": (lambda row: row.get("kl"), ".4f", False),
    "KL, held-out text": (lambda row: row.get("held_out", {}).get("kl"), ".4f", False),
    "Var/2, held-out text": (lambda row: row.get("held_out", {}).get("variance"), ".4f", False),
    "generation": (lambda row: row["generation"], ".1%", True),
    "choice": (lambda row: row["choice"], ".1%", True),
    "perplexity": (lambda row: row["perplexity"], ".2f", False),
}


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """Mean over seeds and standard deviation; then differences to the first variant, seed by seed, on the same text."""
    if not rows:
        return "no rows yet\n"
    by_name = {name: [row for row in rows if row["variant"] == name] for name in ["dense", "pruned", *variants]}
    by_name = {name: found for name, found in by_name.items() if found}
    figures = FIGURES | {name: _task(name) for name in rows[0]["tasks"] if _adds(name, rows)}
    default = by_name.get(variants[0], [])
    return "\n".join([*_means(by_name, figures), "", *_differences(by_name, figures, default, variants)]) + "\n"


def _task(name: str) -> Figure:
    return (lambda row: row["tasks"][name]), ".1%", True


def _adds(name: str, rows: Sequence[Row]) -> bool:
    """Whether it is a share, and not one of the headline's figures over again."""
    values = [(row["tasks"][name], {row["generation"], row["choice"]}) for row in rows]
    return all(value <= 1 for value, _ in values) and any(value not in headline for value, headline in values)


def _means(by_name: dict[str, list[Row]], figures: dict[str, Any]) -> list[str]:
    lines = [f"| variant | seeds | tokens | seconds | {' | '.join(figures)} |", "|---|" + "---:|" * (len(figures) + 3)]
    for name, rows in by_name.items():
        cells = [name, str(len(rows)), _mean(rows, "tokens", ",.0f"), _mean(rows, "seconds", ".1f")]
        for read, form, _ in figures.values():
            values = [value for row in rows if (value := read(row)) is not None]
            cells.append(_spread(values, form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean(rows: Sequence[Row], key: str, form: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return format(statistics.mean(values), form) if values else ""


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def _differences(
    by_name: dict[str, list[Row]], figures: dict[str, Any], default: Sequence[Row], variants: Sequence[str]
) -> list[str]:
    """Per variant: mean [least, most] over the seeds it shares with the default, and on how many seeds it is better."""
    lines = [
        f"Difference to `{variants[0]}` of the same seed and text, mean [least, most], and how often it is better:",
        "",
        f"| variant | {' | '.join(figures)} |",
        "|---|" + "---:|" * len(figures),
    ]
    for name in variants[1:]:
        pairs = [(row, other) for row in by_name.get(name, []) if (other := _like(row, default)) is not None]
        if pairs:
            cells = [_difference(pairs, *figure) for figure in figures.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _like(row: Row, default: Sequence[Row]) -> Row | None:
    """Of the default's rows the one of the same seed that learnt from the same text; given text is every seed's."""
    return next((other for other in default if other["seed"] == row["seed"] and _may_pair(row, other)), None)


def _may_pair(row: Row, other: Row) -> bool:
    return row.get("text") in (None, other.get("text"))


def _difference(pairs: Sequence[tuple[Row, Row]], read: Callable[[Row], float | None], form: str, more: bool) -> str:
    found = [(read(row), read(other)) for row, other in pairs]
    values = [mine - theirs for mine, theirs in found if mine is not None and theirs is not None]
    if not values:
        return ""
    better = sum(value > 0 if more else value < 0 for value in values)
    least, most = (format(value, f"+{form}") for value in (min(values), max(values)))
    return f"{format(statistics.mean(values), f'+{form}')} [{least}, {most}] {better}/{len(values)}"
