"""A forecast in words on the screen, and held against what came when the recovery is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recover.base import console
from recover.base.artifacts import read_json, write_json
from recover.forecast import runs
from recover.report import words


def say(found: dict[str, Any]) -> None:
    """Print the forecast: a row a use, the advice, and what it stands on."""
    rows = [
        [
            use,
            *map(words.percent, (row["before"], row["trial"], row["expected"])),
            _span(row["interval"]),
            None if row["chance"] is None else words.percent(row["chance"]),
            row["grade"],
        ]
        for use, row in found["classes"].items()
    ]
    if (perplexity := found["perplexity"]) is not None:
        shown = map(words.percent, (perplexity[name] for name in ("before", "trial", "expected")))
        rows.append(["perplexity, dense over this", *shown, _span(perplexity["interval"]), None, None])
    if (kl := found["kl"]) is not None:
        shown = map(words.number, (kl[name] for name in ("before", "trial", "expected")))
        rows.append(["KL, nats", *shown, " – ".join(map(words.number, kl["interval"])), None, None])
    title = f"share of dense, forecast for {words.count(found['tokens'])} tokens"
    goal = f"chance of {words.percent(found['thresholds']['go'])}"
    console.table(title, ["", "before", "trial", "expected", "interval", goal, "fit"], rows)
    for use, why in found["not_forecast"].items():
        console.say(f"{use}: no forecast: {why}")
    console.say(f"[bold]{found['advice']}[/bold]: {found['reason']}")
    console.say(stands_on(found))


def stands_on(found: dict[str, Any]) -> str:
    """How many runs a forecast is calibrated on, and by how much it misses runs that are left out."""
    calibration, missed = found["calibration"], found["calibration"]["errors"]["generation"]
    off = missed["mean_absolute"][missed["form"]]
    whose = "of this model" if calibration["same_model"] else f"of other models ({', '.join(calibration['models'])})"
    if off is None:
        return f"calibrated on {found['runs']} runs {whose}"
    against = ", ".join(
        f"'{form}' by {100 * value:.0f}"
        for form, value in missed["mean_absolute"].items()
        if value is not None and form != missed["form"]
    )
    return (
        f"calibrated on {found['runs']} runs {whose}; generation of runs left out was missed by {100 * off:.0f} points "
        f"in the mean ('{missed['form']}'; {against}){_chances(calibration['chance'])}"
    )


def _chances(found: dict[str, Any]) -> str:
    """How good the chances were, after the sentence on errors."""
    if found["brier"] is None:
        return ""
    return (
        f"; Brier score of their chances {words.number(found['brier'])}, of the base rate "
        f"{words.number(found['base_rate'])} (0: always right)"
    )


def _span(interval: Sequence[float]) -> str:
    return " – ".join(map(words.percent, interval))


def compare_outcome(root: Path, recipe: dict[str, Any]) -> None:
    """Note in the run's forecast.json what came, and say it, if there is a forecast of this very recipe."""
    path = root / "forecast.json"
    if not path.exists():
        return
    found = read_json(path)
    if any(recipe[leaf] != asked for leaf, asked in found["recipe"].items()):
        console.say("forecast.json is of another recipe: not compared")
        return
    dense = read_json(root / "dense" / "measure.json")
    came = runs.read_state(root / "after", dense, found["tokens"]).shares
    outcome = {
        use: {"kept": came[use], "held": row["interval"][0] <= came[use] <= row["interval"][1]}
        for use, row in found["classes"].items()
        if use in came
    }
    write_json(path, {**found, "outcome": outcome})
    rows = []
    for use, row in outcome.items():
        forecast = found["classes"][use]
        shown = (words.percent(forecast["expected"]), _span(forecast["interval"]), words.percent(row["kept"]))
        rows.append([use, *shown, "yes" if row["held"] else "no"])
    console.table("forecast and outcome, share of dense", ["", "expected", "interval", "came", "within"], rows)
