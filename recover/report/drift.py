"""What figures and tables take of a probe's summary: every figure as quantiles, None where it was not measured.

Names are those of the probes: `embedding`, `logit`, `probability` are 1 - cos in the three spaces, `kl` is
KL(dense || other) in nats, `kl_predicted` is Var_p(dz) / (2 T^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from recover.report import words
from recover.report.data import (
    SPACES,
    BlockDrift,
    ChoiceDrift,
    Drift,
    Forced,
    Json,
    PageData,
    SampledDrift,
    StepDrift,
    SublayerDrift,
)
from recover.report.run_files import Quantiles, TemperatureDrift

Row = TypeVar("Row")

QUANTILES = ("mean", "p50", "p90", "p99", "max")
FINAL = (*SPACES, "kl", "reverse_kl", "kl_predicted", "top1", "top5")
STEP = ("kl", "kl_predicted", *SPACES)


def spread(value: Quantiles | None) -> Quantiles | None:
    """The quantiles, None where none was measured."""
    if value is None:
        return None
    found = {name: words.finite(value.get(name)) for name in QUANTILES}
    return found if any(x is not None for x in found.values()) else None


def final_figures(final: Json) -> dict[str, Quantiles]:
    """Drift at the last layer, T = 1, over all positions; figures that were not measured are left out."""
    figures = {name: spread(final.get(name)) for name in FINAL}
    return {name: figure for name, figure in figures.items() if figure}


def read(summary: Json) -> Drift:
    """The summary of one probe, as `probe.json` holds it."""
    return {
        "prompts": summary.get("prompts"),
        "identity": summary.get("identity"),
        "final": final_figures(summary.get("final") or {}),
        "temperatures": [
            cast(TemperatureDrift, {"temperature": row["temperature"], **final_figures(row)})
            for row in summary.get("temperatures") or ()
        ],
        "blocks": [
            _block(block) for block in summary.get("blocks") or () if block.get("lens", "final_norm") == "final_norm"
        ],
        "steps": [_step(step) for step in summary.get("steps") or ()],
        "divergence": summary.get("divergence") or None,
        "sublayers": [
            _sublayer(row) for row in summary.get("sublayers") or () if row.get("lens", "final_norm") == "final_norm"
        ],
        "sampled": [_sampled(row) for row in summary.get("sampled") or ()],
        "choices": summary.get("choices") or [],
        "retrieval": summary.get("retrieval") or [],
        "routing": summary.get("routing") or [],
    }


def _block(block: Json) -> BlockDrift:
    spaces = {name: spread(block.get(name)) for name in (*SPACES, "kl")}
    place = {"block": block["block"], "closed": bool(block.get("closed")), "by_step": block.get("by_step") or []}
    return cast(BlockDrift, {**place, **spaces})


def _sublayer(row: Json) -> SublayerDrift:
    """One sublayer closed, or replaced by the other model's, all else dense: drift right after it."""
    figures = {name: spread(row.get(name)) for name in (*SPACES, "kl", "parallel", "orthogonal")}
    site = {"block": row["block"], "part": row["part"], "counterfactual": row["counterfactual"]}
    return cast(SublayerDrift, {**site, **figures})


def _sampled(row: Json) -> SampledDrift:
    """Texts drawn from one seed: KL on either model's words over all positions, and the share that parted by step."""
    forced, free = row.get("teacher_forced") or {}, row.get("free_running") or {}
    parted = [(step["step"], words.finite((step.get("free_running") or {}).get("diverged"))) for step in row["steps"]]
    return {
        "seed": row["seed"],
        "teacher_forced": spread(forced.get("kl")),
        "free_running": spread(free.get("total")),
        "first": spread(row.get("first")),
        "never": words.finite(row.get("never")),
        "diverged": [(step, share) for step, share in parted if share is not None],
    }


def _step(step: Json) -> StepDrift:
    """Free-running KL is the probe's `total`: each view on its own words; `both`: both read the words of this model."""
    forced, free = step.get("teacher_forced") or {}, step.get("free_running") or {}
    return {
        "step": step["step"],
        "teacher_forced": cast(Forced, {name: spread(forced.get(name)) for name in STEP}),
        "free_running": {
            "kl": spread(free.get("total")),
            "both": spread(free.get("kl")),
            "diverged": words.finite(free.get("diverged")),
        },
        "prompts": forced.get("n"),
    }


def by_model(data: PageData, part: Callable[[Drift], list[Row]]) -> dict[str, list[Row]]:
    """Model -> the rows of this part of its probe, only models that have some."""
    found = {model: part(summary) for model, summary in data["drift"].items() if summary is not None}
    return {model: rows for model, rows in found.items() if rows}


def level(figure: Quantiles | None, quantile: str) -> float | None:
    """One quantile of a figure; None where it was not measured."""
    return None if figure is None else figure.get(quantile)


def mean_of(figure: Quantiles | None) -> float | None:
    """The mean, or the median where that is all there is."""
    mean = level(figure, "mean")
    return level(figure, "p50") if mean is None else mean


def choice_kls(row: ChoiceDrift) -> tuple[float, float] | None:
    """Mean KL (among the options, over the vocabulary); None where no item has options that part at one token."""
    inside, outside = (mean_of((row.get(group) or {}).get("kl")) for group in ("drift", "vocabulary"))
    return None if inside is None or outside is None else (inside, outside)
