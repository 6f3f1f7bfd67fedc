"""Probe summaries in the one shape that pictures and tables draw: every figure a full set of quantiles or None.

Names are those of the probes: `embedding`, `logit`, `probability` are 1 - cos in the three spaces, `kl` is
KL(dense || other) in nats, `kl_predicted` is Var_p(dz) / (2 T^2).
"""

from __future__ import annotations

from typing import Any

from recover.report import words

QUANTILES = ("mean", "p50", "p90", "p99", "max")
SPACES = ("embedding", "logit", "probability")
FINAL = (*SPACES, "kl", "reverse_kl", "kl_predicted", "top1", "top5")
STEP = ("kl", "kl_predicted", *SPACES)


def spread(value: Any) -> dict[str, float | None] | None:
    """Quantiles as they are; a bare number stands for all of them; None where nothing was measured."""
    if isinstance(value, dict):
        found = {name: words.finite(value.get(name)) for name in QUANTILES}
        return found if any(x is not None for x in found.values()) else None
    x = words.finite(value)
    return None if x is None else dict.fromkeys(QUANTILES, x)


def final_figures(final: dict[str, Any]) -> dict[str, Any]:
    """Drift at the last layer, T = 1, over all positions; figures that were not measured are left out."""
    figures = {name: spread(final.get(name)) for name in FINAL}
    return {name: figure for name, figure in figures.items() if figure}


def normalise(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of one probe; of the two lenses, the one with the final norm."""
    return {
        "prompts": summary.get("prompts"),
        "identity": summary.get("identity"),
        "final": final_figures(summary.get("final") or {}),
        "temperatures": [
            {"temperature": row["temperature"], **final_figures(row)} for row in summary.get("temperatures") or ()
        ],
        "blocks": [
            _block(block) for block in summary.get("blocks") or () if block.get("lens", "final_norm") == "final_norm"
        ],
        "steps": [_step(step) for step in summary.get("steps") or ()],
        "divergence": summary.get("divergence") or None,
    }


def _block(block: dict[str, Any]) -> dict[str, Any]:
    spaces = {name: spread(block.get(name)) for name in (*SPACES, "kl")}
    return {"block": block["block"], "closed": bool(block.get("closed")), **spaces}


def _step(step: dict[str, Any]) -> dict[str, Any]:
    """Free-running KL is the probe's `total`: each view on its own words, so direct and compounded error together."""
    forced, free = step.get("teacher_forced") or {}, step.get("free_running") or {}
    return {
        "step": step["step"],
        "teacher_forced": {name: spread(forced.get(name)) for name in STEP},
        "free_running": {"kl": spread(free.get("total")), "diverged": words.finite(free.get("diverged"))},
        "prompts": forced.get("n"),
    }
