"""The training curve: `train/steps.jsonl`, a line for each optimizer step, thinned to what a picture can show."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import cast

from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.config.loss import TERMS
from recover.report.data import Curve, Json, Points
from recover.report.words import finite

POINTS = 120  # at most; report.json stays small, however long the training
WINDOW = 8  # steps whose text is sorted by length (train/data.py): a point of fewer shows long text as high loss
LEAST = 16  # points, before a point may stand for more steps than one
ENDS = 0.05  # share of the scored steps at either end that "from" and "to" are means over
BAND = (0.1, 0.9)  # quantiles
BANDS = {"grad_norm": (0.0, 1.0)}  # up to the highest, since one outlier there is worth seeing

Line = Json  # of the file, with its `weight`


def curve(path: Path, recipe: Json) -> Curve | None:
    """What a training's picture is drawn from; None where there is no file (older runs have none), or no line in it.

    A point stands for `steps_a_point` consecutive lines, the last one for what is left; there are at most POINTS, and
    in a training of 128 steps or more each but the last stands for a multiple of 8. `points` holds their columns:
    `step`, the last of the point; `tokens` scored and `seconds` trained up to its end; its `lr`; and how many of the
    point's steps were `skipped`. Loss, terms and `grad_norm` are {mean, low, high} over the steps that were not, null
    where none is left. Of loss and terms a step weighs as many tokens as it scored, so that the mean is that per token;
    low and high are the tenth and the ninetieth percentile, weighed alike. Of the norm each step weighs the same, and
    low and high are its lowest and highest.

    `ends`: for loss and terms, the means per token over the first and the last `ends_steps` scored steps. Terms are KL
    and those that the recipe gives a weight. Raises ArtifactError if the file is damaged.
    """
    lines = _lines(path)
    if not lines:
        return None
    names = ["loss", *(name for name in terms(recipe) if any(name in line for line in lines))]
    scored = [line for line in lines if not _skipped(line)]
    size = _steps_a_point(len(lines))
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    number = max(1, round(ENDS * len(scored)))
    ends = {name: [_mean(_values(part, name)) for part in (scored[:number], scored[-number:])] for name in names}
    tokens, seconds = lines[-1]["tokens"], lines[-1]["seconds"]
    return {
        "first_step": lines[0]["step"],
        "last_step": lines[-1]["step"],
        "skipped": len(lines) - len(scored),
        "steps_a_point": size,
        "points": _columns(groups, [*names, "grad_norm"]),
        "ends": ends,
        "ends_steps": number,
        "tokens_per_second": _short(tokens / seconds) if seconds > 0 else None,
        "peak_memory_bytes": max((finite(line.get("peak_memory_bytes")) or 0 for line in lines), default=0) or None,
    }


def terms(recipe: Json) -> list[str]:
    """KL, by which trainings of different losses compare, and the recorded terms that the recipe gives a weight."""
    return list({"kl": None, **weights(recipe)})


def weights(recipe: Json) -> dict[str, float]:
    """Terms of the recipe's loss that have a weight, recorded or not."""
    loss = (recipe.get("train") or {}).get("loss") or {}
    known = {"kl": 1.0, **loss, **(loss.get("terms") or {})}
    names = (*TERMS, *(name for name in loss.get("terms") or {} if name not in TERMS))
    return {name: weight for name in names if (weight := finite(known.get(name)))}


def _lines(path: Path) -> list[Line]:
    """The steps in order, each with `weight`, the tokens that it scored."""
    if not path.is_file():
        return []
    advice = "Delete it, and the report is without the training curve"
    try:
        lines = artifacts.read_jsonl(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}. {advice}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or any(finite(line.get(key)) is None for key in ("step", "tokens", "seconds")):
            raise ArtifactError(f"{path}:{number}: expected an object with step, tokens and seconds. {advice}")
    _weigh(lines)
    return lines


def _steps_a_point(steps: int) -> int:
    return WINDOW * math.ceil(steps / (WINDOW * POINTS)) if steps >= WINDOW * LEAST else max(1, steps // LEAST)


def _weigh(lines: list[Line]) -> None:
    before = 0.0
    for number, line in enumerate(lines):
        # A file that was damaged begins anew behind the first step: its first line weighs as the steps before it.
        line["weight"] = max(line["tokens"] - before, 0.0) if number else line["tokens"] / max(line["step"], 1)
        before = line["tokens"]


def _skipped(line: Line) -> bool:
    """A step whose loss or gradient was not finite has no loss in its line."""
    return finite(line.get("loss")) is None


def _columns(groups: list[list[Line]], names: list[str]) -> Points:
    """Of each group of lines one point, column by column."""
    found: Json = {key: [group[-1][key] for group in groups] for key in ("step", "tokens", "seconds")}
    found["lr"] = [finite(group[-1].get("lr")) for group in groups]
    found["skipped"] = [sum(map(_skipped, group)) for group in groups]
    for name in names:
        known = [_values(group, name) for group in groups]
        low, high = BANDS.get(name, BAND)
        found[name] = {
            "mean": [_mean(pairs) for pairs in known],
            "low": [_quantile(pairs, low) for pairs in known],
            "high": [_quantile(pairs, high) for pairs in known],
        }
    return cast(Points, found)


def _values(lines: list[Line], name: str) -> list[tuple[float, float]]:
    """(value, what it weighs) of the steps that were not skipped, lowest value first."""
    known = [line for line in lines if not _skipped(line) and finite(line.get(name)) is not None]
    return sorted((line[name], 1.0 if name == "grad_norm" else line["weight"]) for line in known)


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return _short(sum(value * weight for value, weight in pairs) / total) if total > 0 else None


def _quantile(pairs: list[tuple[float, float]], share: float) -> float | None:
    """The lowest value up to which lies this share of the weight."""
    total = sum(weight for _, weight in pairs)
    if total <= 0:
        return None
    sums = itertools.accumulate(weight for _, weight in pairs)
    reached = (value for (value, _), so_far in zip(pairs, sums, strict=True) if so_far >= share * total)
    return _short(next(reached, pairs[-1][0]))


def _short(value: float) -> float:
    """Five significant digits: more than a picture shows, at half the size."""
    return float(f"{value:.5g}")
