"""How a share of dense, and the KL, go on from a trial to the end of the recovery: at most one parameter, from runs.

T tokens in all, t tokens of the trial; s the share of dense before recovery (s0), after the trial, at the end:

    before    s(T) = s0                     recovery changes nothing
    stays     s(T) = s(t)                   the trial has brought all that comes
    halfway   s(T) = (s(t) + 1) / 2         half of what is missing comes
    slope     z(T) = z(t) + d ln(T / t)     z = logit(s); d: the median over calibration runs

For KL, `slope` is a power law in tokens, KL(T) = KL(t) (T / t)^-b, and `halfway` halves it. A median, for one run that
went astray must not bend the forecast. `CHOSEN` says which form serves which figure: the least wrong one.

Every error is leave-one-out: a run is forecast by the others alone. What is said of a model that no calibration run is
of is judged by leaving out one model: its runs are forecast by runs of other models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import median

from recover.forecast.runs import Run, State

FORMS = ("before", "stays", "halfway", "slope")
# Figure -> the form for a model that has calibration runs, and for one that has none.
CHOSEN = {
    "generation": ("slope", "halfway"),
    "choice": ("before", "before"),
    "retrieval": ("before", "before"),
    "perplexity": ("slope", "stays"),
    "kl": ("slope", "stays"),
}
COVERED = 0.8  # of the runs left out, the part whose outcome an interval is made to hold
EDGE = 0.01  # shares are kept so far from 0 and 1 before the logit: less than tasks of 100 items can tell
NEAR = 2.0  # a run is used if it was measured at this part of its tokens, up to this factor


@dataclasses.dataclass(frozen=True)
class Case:
    """One figure of one run: `before` recovery, `start` after the trial, `end`; `stretch` is ln(T / t)."""

    model: str
    stretch: float
    before: float
    start: float
    end: float


def value(state: State, figure: str) -> float | None:
    """KL, or the share of a use."""
    return state.kl if figure == "kl" else state.shares.get(figure)


def trial_of(run: Run, part: float) -> State | None:
    """Where the run stood closest to `part` of its tokens; None if it was not measured near enough."""

    def away(state: State) -> float:
        return abs(math.log(state.tokens / run.tokens / part))

    state = min(run.on_the_way, key=away)
    return state if away(state) <= math.log(NEAR) + 1e-9 else None


def cases(runs: Sequence[Run], figure: str, part: float) -> list[Case]:
    """The figure of every run that has it before, at about `part` of its tokens, and at the end."""
    found = []
    for run in runs:
        state = trial_of(run, part)
        if state is None:
            continue
        three = [value(each, figure) for each in (run.before, state, run.after)]
        if None not in three:
            found.append(Case(run.model, math.log(run.tokens / state.tokens), *(x for x in three if x is not None)))
    return found


def there(figure: str, x: float) -> float:
    """The figure on the scale of `slope`: ln KL, or the logit of a share kept `EDGE` away from 0 and 1."""
    if figure == "kl":
        return math.log(max(x, 1e-9))
    s = min(max(x, EDGE), 1 - EDGE)
    return math.log(s / (1 - s))


def back(figure: str, z: float) -> float:
    """The way back from that scale."""
    return math.exp(z) if figure == "kl" else 1 / (1 + math.exp(-z))


def steepness(case: Case, figure: str) -> float:
    """What the case gained on the scale of `slope` for each e-fold of tokens."""
    return (there(figure, case.end) - there(figure, case.start)) / case.stretch


def typical(known: Sequence[Case], figure: str) -> float:
    """The median steepness, each model weighing the same; never towards the worse: the best epoch is kept."""
    models = sorted({case.model for case in known})
    found = median(median(steepness(case, figure) for case in known if case.model == model) for model in models)
    return min(found, 0.0) if figure == "kl" else max(found, 0.0)


def predict(form: str, known: Sequence[Case], case: Case, figure: str) -> float:
    """The figure at the end, by one form; `case.end` is not looked at, and `known` by `slope` alone."""
    if form == "before":
        return case.before
    if form == "stays":
        return case.start
    if form == "halfway":
        return case.start / 2 if figure == "kl" else max(case.start, (case.start + 1) / 2)
    moved = back(figure, there(figure, case.start) + typical(known, figure) * case.stretch)
    # A share beyond the edges of the scale is not pulled back to them.
    return max(moved, case.start) if figure != "kl" and not EDGE < case.start < 1 - EDGE else moved


def left_out(known: Sequence[Case], *, by_model: bool) -> list[tuple[Case, list[Case]]]:
    """Each case with those that may forecast it: all other runs, or (`by_model`) runs of other models; never itself."""
    pairs = [
        (case, [other for other in known if (other.model != case.model if by_model else other is not case)])
        for case in known
    ]
    return [(case, others) for case, others in pairs if others]


def miss(form: str, guess: float, case: Case, figure: str) -> float:
    """Outcome minus forecast where the interval is made: for `slope` by e-fold of tokens on its scale, else plain."""
    if form == "slope":
        return (there(figure, case.end) - there(figure, guess)) / case.stretch
    return math.log(max(case.end, 1e-9) / max(guess, 1e-9)) if figure == "kl" else case.end - guess


def moved_by(form: str, guess: float, off: float, stretch: float, figure: str) -> float:
    """The figure that was missed by `off`: the inverse of `miss`."""
    if form == "slope":
        return back(figure, there(figure, guess) + off * stretch)
    return guess * math.exp(off) if figure == "kl" else max(guess + off, 0.0)


def errors(form: str, known: Sequence[Case], figure: str, *, by_model: bool = False) -> list[float]:
    """Outcome minus forecast of every case left out: in shares; for KL of ln KL."""
    return [
        miss("plain", predict(form, others, case, figure), case, figure)
        for case, others in left_out(known, by_model=by_model)
    ]


def ends(missed: Sequence[float]) -> tuple[float, float]:
    """The span that holds `COVERED` of what was missed, and 0; the extremes where there are fewer than 9.

    Ranks are those of a conformal interval, (n + 1) alpha / 2: one more outcome falls inside as often as is said.
    """
    ordered = sorted(missed)
    cut = max(math.floor((len(ordered) + 1) * (1 - COVERED) / 2 + 1e-9) - 1, 0)
    return min(ordered[cut], 0.0), max(ordered[-1 - cut], 0.0)


def spread(form: str, known: Sequence[Case], figure: str, *, by_model: bool) -> tuple[float, float]:
    """How far below and above its forecast an outcome may end; for a model without runs the widest span of any model.

    Such a model gets a form without parameters: with those, no run's forecast has seen its own outcome.
    """
    assert form != "slope" or not by_model
    missed: dict[str, list[float]] = {}
    for case, others in [(case, known) for case in known] if by_model else left_out(known, by_model=False):
        group = case.model if by_model else ""
        missed.setdefault(group, []).append(miss(form, predict(form, others, case, figure), case, figure))
    spans = [ends(each) for each in missed.values()]
    return min(low for low, _ in spans), max(high for _, high in spans)


def expected(
    form: str, known: Sequence[Case], case: Case, figure: str, *, by_model: bool
) -> tuple[float, float, float]:
    """The figure at the end, and the lower and upper end of its interval. `case.end` is not looked at."""
    guess = predict(form, known, case, figure)
    offs = spread(form, known, figure, by_model=by_model)
    low, high = sorted(moved_by(form, guess, off, case.stretch, figure) for off in offs)
    return guess, min(low, guess), max(high, guess)


def held(form: str, known: Sequence[Case], figure: str, *, by_model: bool) -> tuple[int, int]:
    """Of how many cases left out the interval held the outcome, and of how many there was one.

    The case left out takes no part in its interval: that is made of errors among the others.
    """
    hits = total = 0
    for case, others in left_out(known, by_model=by_model):
        if len(others) > 1:
            _, low, high = expected(form, others, case, figure, by_model=by_model)
            hits += low - 1e-12 <= case.end <= high + 1e-12
            total += 1
    return hits, total
