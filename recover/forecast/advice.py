"""Go, no-go or cannot tell: the forecast of one run, with all thresholds and the figures behind each answer.

go           the lower end of the interval of generation is at least 80% of dense (`with care` of the report)
no-go        its upper end is below that
cannot tell  the interval reaches over both sides, or the run is outside of what was calibrated

Beside the three words stands the chance of 80%, which tells more where most runs end near it (docs/forecast.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from recover.forecast import law
from recover.forecast.runs import Run, State
from recover.report import words
from recover.report.measures import USES
from recover.report.verdict import KEPT_CARE, KEPT_YES, grade_of

PART = 0.2  # of the tokens are the trial's, where nothing else is asked for
GO = KEPT_CARE
RUNS = 5  # fewer calibration runs than this and nothing is said
OWN_RUNS = 5  # so many runs of the same model, and only they are looked at
MODELS = 3  # of a model without runs nothing is said from fewer other models than this: what one gains, another may not
STEPS = 10  # a trial of fewer optimizer steps says nothing
# By how much a run may lie outside of the calibration runs: factors; for the share of generation a difference.
ROOM = {"kl": 1.5, "stretch": 1.25, "parameters": 10.0, "tokens": 10.0}
SHARE_ROOM = 0.1
THRESHOLDS: dict[str, Any] = {
    "go": GO,
    "yes": KEPT_YES,
    "with care": KEPT_CARE,
    "covered": law.COVERED,
    "runs": RUNS,
    "own runs": OWN_RUNS,
    "models": MODELS,
    "steps": STEPS,
    "near": law.NEAR,
    "room": {**ROOM, "generation": SHARE_ROOM},
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that is to be forecast: where it stood `before`, `after` its trial of `steps`, and its whole budget."""

    model: str
    parameters: int
    tokens: int
    steps: int
    before: State
    after: State
    own_text: bool = False  # it learns from text of the pruned model, which no calibration run is known to have done

    @property
    def part(self) -> float:
        """Tokens of the trial over those of the recovery."""
        return self.after.tokens / self.tokens

    def case(self, figure: str) -> law.Case:
        """The figure as the law takes it; its end is not known."""
        before, after = law.value(self.before, figure), law.value(self.after, figure)
        assert before is not None and after is not None
        return law.Case(self.model, -math.log(self.part), before, after, math.nan, kl=(self.after.kl, math.nan))


def forecast(trial: Trial, runs: Sequence[Run]) -> dict[str, Any]:
    """What recovery will probably keep of dense, by use, with intervals, what that is calibrated on, and advice."""
    near = [run for run in runs if law.trial_of(run, trial.part) is not None]
    own = [run for run in near if (run.model, run.parameters) == (trial.model, trial.parameters)]
    seen = len(own) >= OWN_RUNS
    basis = own if seen else near
    why_not = outside(trial, basis, seen=seen)
    classes, unknown = {}, {}
    for use in USES:
        answer = _answer(trial, basis, use, seen=seen, trusted=not why_not)
        (unknown if isinstance(answer, str) else classes)[use] = answer
    advice, reason = _advice(classes.get("generation"), unknown.get("generation"), why_not)
    return {
        "advice": advice,
        "reason": reason,
        "classes": classes,
        "not_forecast": unknown,
        **{name: _figure(trial, basis, name, seen=seen) for name in ("perplexity", "kl")},
        "runs": len(basis),
        "trial_tokens": trial.after.tokens,
        "tokens": trial.tokens,
        "before": dataclasses.asdict(trial.before),
        "trial": {**dataclasses.asdict(trial.after), "steps": trial.steps},
        "calibration": {
            "models": sorted({run.model for run in basis}),
            "same_model": seen,
            "names": [run.name for run in basis],
            "left_out": "run" if seen else "model",
            "chance": brier(basis, trial.part, by_model=not seen),
            "errors": {figure: errors(basis, trial.part, figure, by_model=not seen) for figure in law.CHOSEN},
        },
        "outside": why_not,
        "thresholds": THRESHOLDS,
    }


def outside(trial: Trial, runs: Sequence[Run], *, seen: bool) -> list[str]:
    """In which ways the run is unlike all calibration runs, in words; empty if it is within their range."""
    if trial.steps < STEPS:
        return [f"the trial has {trial.steps} steps, fewer than {STEPS}: give it a larger --part"]
    if len(runs) < RUNS:
        return [
            f"{len(runs)} calibration runs were measured at about {words.percent(trial.part)} of their tokens, "
            f"fewer than {RUNS}"
        ]
    models = sorted({run.model for run in runs})
    if not seen and len(models) < MODELS:
        return [
            f"fewer than {OWN_RUNS} calibration runs are of {trial.model}, and those of {len(models)} models "
            f"({', '.join(models)}) say too little of another: add finished runs of your own (--calibrate)"
        ]
    starts = [state for run in runs if (state := law.trial_of(run, trial.part))]
    ranges = {
        "kl": (trial.after.kl, [state.kl for state in starts], "KL after the trial"),
        "stretch": (
            1 / trial.part,
            [run.tokens / state.tokens for run, state in zip(runs, starts, strict=True)],
            "tokens over those of the trial",
        ),
        "parameters": (float(trial.parameters), [float(run.parameters) for run in runs], "parameters"),
        "tokens": (float(trial.tokens), [float(run.tokens) for run in runs], "tokens"),
    }
    found = ["recover.data: no calibration run learnt from text of kind 'pruned'"] if trial.own_text else []
    for name, (here, there, label) in ranges.items():
        low, high = min(there) / ROOM[name], max(there) * ROOM[name]
        if not low <= here <= high:
            found.append(_beyond(label, words.number(here), words.number(min(there)), words.number(max(there))))
    share, kept = trial.after.shares.get("generation"), [state.shares.get("generation") for state in starts]
    known = [value for value in kept if value is not None]
    if share is not None and known and not min(known) - SHARE_ROOM <= share <= max(known) + SHARE_ROOM:
        ends = (words.percent(min(known)), words.percent(max(known)))
        found.append(_beyond("generation after the trial", words.percent(share), *ends))
    return found


def _beyond(label: str, here: str, low: str, high: str) -> str:
    return f"{label}: {here}, calibration runs have {low} to {high}"


def _answer(trial: Trial, basis: Sequence[Run], use: str, *, seen: bool, trusted: bool) -> dict[str, Any] | str:
    """The forecast of one use, or why there is none."""
    before, after = trial.before.shares.get(use), trial.after.shares.get(use)
    if before is None or after is None:
        return "not measured, or dense itself is near nothing"
    known = law.cases(basis, use, trial.part)
    if len(known) < RUNS:
        return f"{words.percent(after)} of dense after the trial; {len(known)} calibration runs measured it"
    form = _form(use, seen=seen)
    case = trial.case(use)
    kept, low, high = law.expected(form, known, case, use, by_model=not seen)
    chance = law.chance(form, known, case, use, GO, by_model=not seen) if trusted else None
    hits, total = law.held(form, known, use, by_model=not seen)
    tested = f"that held the outcome of {hits} of {total} calibration runs left out" if total else "not tested"
    return {
        "expected": kept,
        "interval": [low, high],
        "grade": _grade(low, high) if trusted else "cannot tell",
        "before": before,
        "trial": after,
        "form": form,
        "runs": len(known),
        "held": [hits, total],
        "chance": chance,
        "reason": (
            f"{words.percent(before)} of dense before, {words.percent(after)} after the trial; expected "
            f"{words.percent(kept)}, interval {words.percent(low)} to {words.percent(high)}, {tested}."
        ),
    }


def _grade(low: float, high: float) -> str:
    """The grade that the whole interval has, `with care` also where it reaches `yes`; else it cannot be told."""
    worst, best = grade_of(low, None), grade_of(high, None)
    return "cannot tell" if worst == "no" != best else worst


def _form(figure: str, *, seen: bool) -> str:
    return law.CHOSEN[figure][0 if seen else 1]


def _figure(trial: Trial, basis: Sequence[Run], figure: str, *, seen: bool) -> dict[str, Any] | None:
    """KL, or the share of perplexity: no verdict hangs on it."""
    known = law.cases(basis, figure, trial.part)
    if law.value(trial.after, figure) is None or law.value(trial.before, figure) is None or len(known) < RUNS:
        return None
    case = trial.case(figure)
    form = _form(figure, seen=seen)
    kept, low, high = law.expected(form, known, case, figure, by_model=not seen)
    return {"before": case.before, "trial": case.start, "expected": kept, "interval": [low, high], "form": form}


def errors(runs: Sequence[Run], part: float, figure: str, *, by_model: bool) -> dict[str, Any]:
    """Mean absolute error of each form over runs left out, in shares (of KL: in ln KL), and the form in use."""
    known = law.cases(runs, figure, part)
    found = {form: law.errors(form, known, figure, by_model=by_model) for form in law.forms(figure)}
    return {
        "form": _form(figure, seen=not by_model),
        "runs": len(law.left_out(known, by_model=by_model)),
        "mean_absolute": {form: mean(map(abs, missed)) if missed else None for form, missed in found.items()},
    }


def brier(runs: Sequence[Run], part: float, *, by_model: bool) -> dict[str, Any]:
    """How good chances were for runs left out: the mean square of chance less outcome (0 or 1) for generation.

    `base_rate`: that of saying for each run how many of the others came to the goal.
    """
    form, known = _form("generation", seen=not by_model), law.cases(runs, "generation", part)
    found = law.chances(form, known, "generation", GO, by_model=by_model)
    if not found:
        return {"runs": 0, "brier": None, "base_rate": None}
    return {
        "runs": len(found),
        "brier": mean((said - came) ** 2 for said, _, came in found),
        "base_rate": mean((rate - came) ** 2 for _, rate, came in found),
    }


def _advice(answer: dict[str, Any] | None, unknown: str | None, why_not: list[str]) -> tuple[str, str]:
    if why_not:
        return "cannot tell", f"Outside of what was calibrated: {'; '.join(why_not)}."
    if answer is None:
        return "cannot tell", f"Generation: {unknown}."
    low, high = answer["interval"]
    goal = words.percent(GO)
    span = f"generation is expected at {words.percent(answer['expected'])} of dense, interval {words.percent(low)} to "
    span += f"{words.percent(high)}"
    chance = f"Chance of {goal} or more: {words.percent(answer['chance'])}."
    if low >= GO:
        return "go", f"{span}: all of it at or above {goal}. {chance}"
    if high < GO:
        return "no-go", f"{span}: all of it below {goal}. {chance} Prune less, or give more tokens."
    return "cannot tell", f"{span}, on both sides of {goal}. {chance}"
