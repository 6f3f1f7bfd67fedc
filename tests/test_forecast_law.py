"""The law of forecasts: it finds what was put in, who is left out is left out, intervals and chances are honest."""

import math
import random
from dataclasses import replace
from statistics import mean

import pytest
from forecast_runs import TOKENS, made, several, sigmoid, trial
from hypothesis import given
from hypothesis import strategies as st

from recover.forecast import advice, law
from recover.forecast.runs import Run, State


def test_a_law_that_was_put_in_is_found_and_forecast_exactly():
    runs = several()
    found = advice.forecast(trial(made("new", z=0.4)), runs)
    assert found["classes"]["generation"]["expected"] == pytest.approx(sigmoid(0.4 + 0.8 * math.log(3)), rel=1e-3)
    assert found["classes"]["generation"]["interval"] == pytest.approx([sigmoid(0.4 + 0.8 * math.log(3))] * 2, rel=1e-3)
    assert found["kl"]["expected"] == pytest.approx(0.4 * 3**-0.3, rel=1e-3)
    assert found["classes"]["choice"]["expected"] == pytest.approx(0.9)
    missed = found["calibration"]["errors"]["generation"]["mean_absolute"]
    assert missed["slope"] < 1e-3 < missed["stays"]


def test_a_median_is_not_bent_by_one_run_that_went_astray():
    straight = [*several(9), made("astray", d=-3)]
    for figure, expected in (("generation", 0.8), ("kl", -0.3)):
        assert law.typical(law.cases(straight, figure, 1 / 3), figure) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", law.FORMS)
def test_what_a_left_out_run_came_to_does_not_enter_its_own_forecast(form):
    runs = several(7) + several(6, model="other", d=2.0)
    known = law.cases([replace(run, name=str(i)) for i, run in enumerate(runs)], "generation", 1 / 3)
    errors = law.errors(form, known, "generation")
    for index, case in enumerate(known):
        lost = replace(case, end=0.123, kl=(case.kl[0], 9.0), points=((9.0, 0.9), (0.1, 0.1)))
        changed = [*known[:index], lost, *known[index + 1 :]]
        moved = law.errors(form, changed, "generation")[index]
        assert moved - errors[index] == pytest.approx(0.123 - case.end, abs=1e-12)


def test_where_a_model_is_left_out_none_of_its_runs_enters():
    known = law.cases(several(4) + several(4, model="other", d=2.0), "generation", 1 / 3)
    errors = law.errors("slope", known, "generation", by_model=True)
    lost = [replace(case, end=0.01) if case.model == "m" else case for case in known]
    after = law.errors("slope", lost, "generation", by_model=True)
    for case, one, two in zip(known[:4], errors, after, strict=False):
        assert two - one == pytest.approx(0.01 - case.end, abs=1e-12)
    assert [case.model for case, _ in law.left_out(known, by_model=True)] == ["m"] * 4 + ["other"] * 4
    assert all(other.model != case.model for case, others in law.left_out(known, by_model=True) for other in others)


cases = st.builds(
    law.Case,
    model=st.sampled_from("abc"),
    stretch=st.floats(0.5, 4),
    before=st.floats(0, 1.2),
    start=st.floats(0, 1.2),
    end=st.floats(0, 1.2),
    kl=st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)),
    points=st.lists(st.tuples(st.floats(0.01, 2), st.floats(0, 1.2)), min_size=2, max_size=4).map(tuple),
)


@given(st.lists(cases, min_size=2, max_size=12), cases, st.floats(0, 0.5), st.floats(0, 2))
def test_more_at_the_trial_or_more_tokens_never_forecast_less(known, case, more, longer):
    for form in law.FORMS:
        guess = law.predict(form, known, case, "generation")
        assert law.predict(form, known, replace(case, start=case.start + more), "generation") >= guess - 1e-9
        assert law.predict(form, known, replace(case, stretch=case.stretch + longer), "generation") >= guess - 1e-9
        nearer = replace(case, kl=(case.kl[0] / (1 + more), case.kl[1]))
        assert law.predict(form, known, nearer, "generation") >= guess - 1e-9


@given(st.lists(cases, min_size=2, max_size=12), cases, st.sampled_from(["generation", "kl"]))
def test_an_interval_holds_its_forecast_and_ignores_the_end(known, case, figure):
    for form in law.forms(figure):
        found = law.expected(form, known, case, figure, by_model=False)
        guess, low, high = found
        assert low <= guess <= high and low >= 0
        assert (
            law.expected(form, known, replace(case, end=math.nan, kl=(case.kl[0], math.nan)), figure, by_model=False)
            == found
        )


def test_intervals_hold_new_runs_about_as_often_as_they_say():
    draw = random.Random(0)

    def run(index: int) -> Run:
        return made(str(index), z=draw.gauss(0, 0.5), d=max(draw.gauss(1.0, 0.5), 0.0))

    inside = []
    for _ in range(300):
        (case,) = law.cases([run(0)], "generation", 1 / 3)
        known = law.cases([run(index) for index in range(1, 20)], "generation", 1 / 3)
        _, low, high = law.expected("slope", known, case, "generation", by_model=False)
        inside.append(low <= case.end <= high)
    assert mean(inside) == pytest.approx(law.COVERED, abs=0.06)


def test_a_chance_counts_the_runs_whose_error_would_reach_the_goal():
    """By hand: `stays` on ends 0.1 below, at, 0.1, 0.2 and 0.3 above the trial."""
    (case,) = law.cases([made("new")], "choice", 1 / 3)
    known = [replace(case, start=0.5, end=0.5 + off) for off in (-0.1, 0.0, 0.1, 0.2, 0.3)]
    for start, reached in ((0.45, 0), (0.55, 1), (0.75, 3), (0.95, 5)):
        given = law.chance("stays", known, replace(case, start=start), "choice", 0.8, by_model=False)
        assert given == pytest.approx((reached + 0.5) / 6)
    two = [*known, replace(case, model="other", start=0.5, end=0.9)]
    given = law.chance("stays", two, replace(case, start=0.55), "choice", 0.8, by_model=True)
    assert given == pytest.approx((1.5 / 6 + 1.5 / 2) / 2)


@given(st.lists(cases, min_size=3, max_size=12), cases, st.floats(0.1, 1), st.floats(0, 0.5), st.booleans())
def test_a_chance_is_never_certain_and_falls_as_the_goal_rises(known, case, goal, more, by_model):
    form = "halfway" if by_model else "slope"
    found = law.chance(form, known, case, "generation", goal, by_model=by_model)
    assert 0 < found < 1
    assert law.chance(form, known, case, "generation", goal + more, by_model=by_model) <= found


def test_chances_are_kept_about_as_often_as_they_say_and_tell_more_than_the_base_rate():
    draw = random.Random(1)

    def run(index: int) -> Run:
        return made(str(index), z=draw.gauss(0, 1.0), d=max(draw.gauss(1.2, 0.5), 0.0))

    known = law.cases([run(index) for index in range(80)], "generation", 1 / 3)
    found = law.chances("slope", known, "generation", 0.8, by_model=False)
    for low, high in ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0)):
        inside = [(said, came) for said, _, came in found if low <= said < high]
        assert len(inside) > 10
        assert mean(came for _, came in inside) == pytest.approx(mean(said for said, _ in inside), abs=0.15)
    assert mean((said - came) ** 2 for said, _, came in found) < 0.6 * mean(
        (rate - came) ** 2 for _, rate, came in found
    )


def test_a_case_left_out_has_no_say_in_its_own_chance():
    known = law.cases(several(6, d=0.5) + several(6, d=1.5), "generation", 1 / 3)
    found = law.chances("slope", known, "generation", 0.8, by_model=False)
    for index, case in enumerate(known):
        changed = [*known[:index], replace(case, end=0.0), *known[index + 1 :]]
        moved = law.chances("slope", changed, "generation", 0.8, by_model=False)[index]
        assert moved[:2] == found[index][:2] and moved[2] is False


def test_a_curve_that_was_put_in_is_found():
    def run(name: str, kl: float) -> Run:
        def state(tokens: int, kl: float) -> State:
            return State(tokens, kl, {"generation": sigmoid(-1.2 - 1.7 * math.log(kl))})

        way = (state(TOKENS // 3, kl), state(TOKENS * 2 // 3, kl * 2**-0.3))
        return replace(made(name), before=state(0, 2 * kl), on_the_way=way, after=state(TOKENS, kl * 3**-0.3))

    known = law.cases([run(str(i), 0.2 + 0.05 * i) for i in range(5)], "generation", 1 / 3)
    assert law.curve(known, "generation") == pytest.approx((-1.2, 1.7), rel=1e-6)
    (case,) = law.cases([run("new", 0.33)], "generation", 1 / 3)
    assert law.predict("curve", known, case, "generation") == pytest.approx(case.end, rel=1e-6)
