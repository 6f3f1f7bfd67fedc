"""How a share of dense, and the KL, go on from a trial to the end of the recovery: few parameters, taken from runs.

T tokens in all, t tokens of the trial; s the share of dense before recovery (s0), after the trial, at the end:

    before    s(T) = s0                         recovery changes nothing
    stays     s(T) = s(t)                       the trial has brought all that comes
    halfway   s(T) = (s(t) + 1) / 2             half of what is missing comes
    slope     z(T) = z(t) + d ln(T / t)         z = logit(s); d: the median over calibration runs
    curve     z(T) = a - c ln KL(T), c >= 0     a, c: least squares over all that is known of the runs; KL(T) by `slope`

For KL itself, `slope` is a power law in tokens, KL(T) = KL(t) (T / t)^-b, and `halfway` halves it. A median, for one
run that went astray must not bend the forecast. `CHOSEN` says which form is used: chosen once, by the errors over all
runs of the package (docs/forecast.md); to choose it anew by the few runs of each model was worse.

Every error is leave-one-out: a run is forecast by the others alone. What is said of a model that no calibration run is
of is judged by leaving out one model: its runs are forecast by runs of other models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import mean, median

from recover.forecast.runs import Run, State

FORMS = ("before", "stays", "halfway", "slope", "curve")
# Figure -> the form for a model with calibration runs of its own, and for one without: no parameters, models differ.
CHOSEN = {
    "generation": ("slope", "halfway"),
    "choice": ("slope", "halfway"),
    "retrieval": ("slope", "halfway"),  # no run measured it: as choice, which reads the same spaces
    "perplexity": ("slope", "stays"),
    "kl": ("slope", "stays"),
}
SCALED = ("slope", "curve")  # forms that move along a straight line on the scale of `there`
COVERED = 0.8  # of the runs left out, the part whose outcome an interval is made to hold
EDGE = 0.01  # shares are kept so far from 0 and 1 before the logit: less than tasks of 100 items can tell
NEAR = 2.0  # a run is used if it was measured at this part of its tokens, up to this factor


@dataclasses.dataclass(frozen=True)
class Case:
    """One figure of one run: `before` recovery, `start` after the trial, `end`; `stretch` is ln(T / t).

    `kl`: after the trial and at the end. `points`: KL and figure wherever the run was measured.
    """

    model: str
    stretch: float
    before: float
    start: float
    end: float
    kl: tuple[float, float]
    points: tuple[tuple[float, float], ...] = ()


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
        three = [x for each in (run.before, state, run.after) if (x := value(each, figure)) is not None]
        if len(three) == 3:
            passed = [(each.kl, value(each, figure)) for each in (run.before, *run.on_the_way, run.after)]
            points = tuple((kl, x) for kl, x in passed if x is not None)
            stretch = math.log(run.tokens / state.tokens)
            found.append(Case(run.model, stretch, *three, kl=(state.kl, run.after.kl), points=points))
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
    """What the case gained on that scale for each e-fold of tokens."""
    return (there(figure, case.end) - there(figure, case.start)) / case.stretch


def typical(known: Sequence[Case], figure: str) -> float:
    """The median steepness, each model weighing the same; never towards the worse: the best epoch is kept."""
    models = sorted({case.model for case in known})
    found = median(median(steepness(case, figure) for case in known if case.model == model) for model in models)
    return min(found, 0.0) if figure == "kl" else max(found, 0.0)


def curve(known: Sequence[Case], figure: str) -> tuple[float, float]:
    """(a, c) of `curve` by least squares over every point of every run; c is not below 0."""
    points = [(there("kl", kl), there(figure, share)) for case in known for kl, share in case.points]
    x, y = mean(x for x, _ in points), mean(y for _, y in points)
    square = sum((each - x) ** 2 for each, _ in points)
    c = -sum((one - x) * two for one, two in points) / square if square > 0 else 0.0
    return y + max(c, 0.0) * x, max(c, 0.0)


def predict(form: str, known: Sequence[Case], case: Case, figure: str) -> float:
    """The figure at the end, by one form; nothing of the end of `case` is looked at."""
    if form == "before":
        return case.before
    if form == "stays":
        return case.start
    if form == "halfway":
        return case.start / 2 if figure == "kl" else max(case.start, (case.start + 1) / 2)
    if form == "curve":
        a, c = curve(known, figure)
        falls = typical([dataclasses.replace(each, start=each.kl[0], end=each.kl[1]) for each in known], "kl")
        return back(figure, a - c * (there("kl", case.kl[0]) + falls * case.stretch))
    moved = back(figure, there(figure, case.start) + typical(known, figure) * case.stretch)
    # A share beyond the edges of the scale is not pulled back to them.
    return max(moved, case.start) if figure != "kl" and not EDGE < case.start < 1 - EDGE else moved


def forms(figure: str) -> tuple[str, ...]:
    """The forms that can forecast a figure."""
    return FORMS[:-1] if figure == "kl" else FORMS


def left_out(known: Sequence[Case], *, by_model: bool) -> list[tuple[Case, list[Case]]]:
    """Each case with those that may forecast it: all other runs, or (`by_model`) runs of other models; never itself."""
    pairs = [
        (case, [other for other in known if (other.model != case.model if by_model else other is not case)])
        for case in known
    ]
    return [(case, others) for case, others in pairs if others]


def miss(form: str, guess: float, case: Case, figure: str) -> float:
    """Outcome minus forecast where the interval is made: for `slope` by e-fold of tokens on its scale, for `curve` on
    its scale, else plain (of KL: ln KL)."""
    if form in SCALED:
        return (there(figure, case.end) - there(figure, guess)) / (case.stretch if form == "slope" else 1)
    return there("kl", case.end) - there("kl", guess) if figure == "kl" else case.end - guess


def moved_by(form: str, guess: float, off: float, stretch: float, figure: str) -> float:
    """The figure that was missed by `off`: the inverse of `miss`."""
    if form in SCALED:
        return back(figure, there(figure, guess) + off * (stretch if form == "slope" else 1))
    return guess * math.exp(off) if figure == "kl" else max(guess + off, 0.0)


def errors(form: str, known: Sequence[Case], figure: str, *, by_model: bool = False) -> list[float]:
    """Outcome minus forecast of every case left out: in shares; for KL of ln KL."""
    return [
        miss("plain", predict(form, others, case, figure), case, figure)
        for case, others in left_out(known, by_model=by_model)
    ]


def ends(missed: Sequence[float]) -> tuple[float, float]:
    """The span that holds `COVERED` of what was missed, and 0; the extremes where there are fewer than 9.

    Ranks are those of a conformal interval, (n + 1) alpha / 2, in between by interpolation.
    """
    ordered, last = sorted(missed), len(missed) - 1
    rank = min(max((len(ordered) + 1) * (1 - COVERED) / 2 - 1, 0.0), last / 2)
    below, part = int(rank), rank - int(rank)
    above = min(below + 1, last)
    low = ordered[below] + part * (ordered[above] - ordered[below])
    high = ordered[last - below] + part * (ordered[last - above] - ordered[last - below])
    return min(low, 0.0), max(high, 0.0)


def missed(form: str, known: Sequence[Case], figure: str, *, by_model: bool) -> list[tuple[str, float]]:
    """Model and `miss` of every case, each forecast without itself.

    A model without runs gets a form without parameters: with those, no forecast has seen its own outcome.
    """
    assert form not in SCALED or not by_model
    pairs = [(case, known) for case in known] if by_model else left_out(known, by_model=False)
    return [(case.model, miss(form, predict(form, others, case, figure), case, figure)) for case, others in pairs]


def spread(form: str, known: Sequence[Case], figure: str, *, by_model: bool) -> tuple[float, float]:
    """How far below and above its forecast an outcome may end; for a model without runs, the widest span of a model."""
    found = missed(form, known, figure, by_model=by_model)
    groups = {model for model, _ in found} if by_model else {None}
    spans = [ends([off for model, off in found if group in (None, model)]) for group in groups]
    return min(low for low, _ in spans), max(high for _, high in spans)


def expected(
    form: str, known: Sequence[Case], case: Case, figure: str, *, by_model: bool
) -> tuple[float, float, float]:
    """The figure at the end, and the lower and upper end of its interval; nothing of the end of `case` is looked at.

    A share's upper end is not above all that any run came to, nor above dense.
    """
    guess = predict(form, known, case, figure)
    offs = spread(form, known, figure, by_model=by_model)
    low, high = sorted(moved_by(form, guess, off, case.stretch, figure) for off in offs)
    if figure != "kl":
        high = min(high, max(1.0, *(each.end for each in known)))
    return guess, min(low, guess), max(high, guess)


def chance(form: str, known: Sequence[Case], case: Case, figure: str, goal: float, *, by_model: bool) -> float:
    """The chance that the share of `case` comes to `goal` or above: of calibration runs, missed as they were.

    (k + 1/2) / (n + 1) for k of n runs, so never 0 or 1 (the middle of what a conformal distribution allows); for a
    model without runs the mean over models.
    """
    guess = predict(form, known, case, figure)
    found = missed(form, known, figure, by_model=by_model)
    groups = sorted({model for model, _ in found}) if by_model else [None]
    return mean(
        _odds(
            [moved_by(form, guess, off, case.stretch, figure) >= goal for model, off in found if group in (None, model)]
        )
        for group in groups
    )


def _odds(reached: Sequence[bool]) -> float:
    return (sum(reached) + 0.5) / (len(reached) + 1)


def chances(
    form: str, known: Sequence[Case], figure: str, goal: float, *, by_model: bool
) -> list[tuple[float, float, bool]]:
    """Of every case left out: its chance, the part of the others that came to `goal`, and whether it came to it."""
    return [
        (
            chance(form, others, case, figure, goal, by_model=by_model),
            _odds([other.end >= goal for other in others]),
            case.end >= goal,
        )
        for case, others in left_out(known, by_model=by_model)
        if len(others) > 1
    ]


def held(form: str, known: Sequence[Case], figure: str, *, by_model: bool) -> tuple[int, int]:
    """Of how many cases left out the interval held the outcome, and of how many there was one.

    The case left out takes no part in its interval either: that is made of errors among the others.
    """
    hits = total = 0
    for case, others in left_out(known, by_model=by_model):
        if len(others) > 1:
            _, low, high = expected(form, others, case, figure, by_model=by_model)
            hits += low - 1e-12 <= case.end <= high + 1e-12
            total += 1
    return hits, total
