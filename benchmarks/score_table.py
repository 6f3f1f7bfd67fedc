"""How well each score orders plans as they hurt: rank correlations with their intervals, and the table of them.

Shapes: P plans, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SCORES = ("kl", "variance", "perplexity", "taylor", "angular", "block_influence")
USES = ("generation", "choice")
RESAMPLES = 2000
FEWEST = 5  # plans of a group to correlate over


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{group: {plans, use: {score: {spearman, interval95, minus_kl95}}}}, without groups that are too small."""
    found = {}
    for group, members in _groups(rows):
        uses = [use for use in USES if all(row[use] is not None for row in members)]
        found[group] = {"plans": len(members)} | {use: _correlated(members, use) for use in uses}
    return found


def _groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for group, names in {"single": ("single",), "set": ("set",), "all": ("single", "set")}.items():
        members = [row for row in rows if row["group"] in names]
        if len(members) >= FEWEST:
            yield group, members


def _correlated(members: list[dict[str, Any]], use: str) -> dict[str, Any]:
    lost_P = -np.array([row[use] for row in members])
    drawn_RP = np.random.default_rng(0).integers(len(members), size=(RESAMPLES, len(members)))
    results, resampled = {}, {}
    for name in members[0]["scores"]:
        score_P = np.array([row["scores"][name] for row in members])
        resampled[name] = np.array([spearman(score_P[drawn_P], lost_P[drawn_P]) for drawn_P in drawn_RP])
        results[name] = {
            "spearman": spearman(score_P, lost_P),
            "interval95": _middle(resampled[name]),
            "minus_kl95": _middle(resampled[name] - resampled["kl"]),
        }
    return results


def _middle(values: np.ndarray) -> list[float]:
    return [float(edge) for edge in np.nanpercentile(values, [2.5, 97.5])]


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Pearson's correlation of ranks, equal values sharing their mean rank; NaN where one side is constant."""
    a, b = _ranks(np.asarray(x)), _ranks(np.asarray(y))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place]


def markdown(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [f"{result['measured']} of {result['plans']} plans measured.\n"]
    for group, found in result["groups"].items():
        uses = [use for use in USES if use in found]
        lines += [f"| {group} ({found['plans']} plans) | " + " | ".join(f"{use} | minus kl" for use in uses) + " |"]
        lines += ["|---|" + "---:|" * (2 * len(uses))]
        for name in found[uses[0]] if uses else {}:
            each = [found[use][name] for use in uses]
            cells = [f"{one['spearman']:.2f} {_span(one['interval95'])} | {_span(one['minus_kl95'])}" for one in each]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    texts = [name for name in next((row["scores"] for row in rows if row["scores"]), {}) if name.startswith("kl")]
    lines += [
        f"| what goes | chosen by | generation | choice | {' | '.join(texts)} |",
        "|---|---|---:|---:|" + "---:|" * len(texts),
    ]
    several = sorted((row for row in rows if row["group"] == "set"), key=lambda row: -(row["generation"] or 0))
    for row in [row for row in rows if row["group"] == "dense"] + several:
        named = ", ".join(map(str, row["blocks"])) or "nothing"
        cells = ["–" if row[use] is None else f"{row[use]:.1%}" for use in USES]
        cells += [f"{row['scores'][name]:.3f}" if row["scores"] else "0" for name in texts]
        lines.append(f"| {named} | {', '.join(row['why'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _span(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"
