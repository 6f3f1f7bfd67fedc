"""All pictures of one report, in the order in which a reader meets them."""

from __future__ import annotations

from typing import Any

from recover.report.figures import curve as figures_curve
from recover.report.figures import drift as figures_drift
from recover.report.figures import outcome as figures_outcome
from recover.report.figures import plan as figures_plan
from recover.report.figures import sublayers as figures_sublayers
from recover.report.figures import text as figures_text
from recover.report.figures import use as figures_use
from recover.report.figures.figure import Figure

DRAWINGS = (
    figures_outcome.hero,
    figures_outcome.epochs,
    figures_curve.training,
    figures_plan.pruned,
    figures_drift.blocks,
    figures_drift.steps,
    figures_outcome.divergence,
    figures_drift.predictors,
)
# Only where a probe has recorded them: an empty place would ask the reader for nothing.
EXTRA = (
    figures_sublayers.worth,
    figures_sublayers.writes,
    figures_text.sampled,
    figures_text.temperatures,
    figures_use.choices,
)


def figures(data: dict[str, Any]) -> dict[str, Figure]:
    """Key -> figure, from what `collect` gave. One of DRAWINGS without data says why; EXTRA are left out."""
    drawn = [drawing(data) for drawing in (*DRAWINGS, *EXTRA)]
    return {figure.key: figure for figure in drawn if figure is not None}
