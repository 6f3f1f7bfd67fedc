"""All pictures of one report, in the order in which a reader meets them."""

from __future__ import annotations

from typing import Any

from recover.report import figures_drift, figures_outcome, figures_plan
from recover.report.figure import Figure

DRAWINGS = (
    figures_outcome.hero,
    figures_outcome.epochs,
    figures_plan.pruned,
    figures_drift.blocks,
    figures_drift.steps,
    figures_outcome.divergence,
    figures_drift.predictors,
)


def figures(data: dict[str, Any]) -> dict[str, Figure]:
    """Key -> figure, from what `collect` gave; a figure without data says why it has none."""
    drawn = [drawing(data) for drawing in DRAWINGS]
    return {figure.key: figure for figure in drawn}
