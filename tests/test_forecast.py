"""Forecasts: the law finds what was put in, who is left out is left out, nothing is said of what is not known."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from recover import artifacts
from recover.cli import app
from recover.errors import ArtifactError
from recover.forecast import advice, law, told
from recover.forecast.known import known_runs, write_runs
from recover.forecast.runs import Run, State, from_json, making, model_name, read_run
from recover.recipe import load_recipe
from recover.trial import trial_leaf

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
TOKENS = 90_000


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def made(name: str, *, model="m", z=0.0, d=0.8, b=0.3, tokens=TOKENS, choice=0.9, kl=0.4, parameters=1000) -> Run:
    """A run by the law, to the letter: logit z at a third of the tokens, gaining d for each e-fold; KL as t^-b."""

    def at(part: float) -> State:
        folds = math.log(part * 3)
        shares = {"generation": sigmoid(z + d * folds), "choice": choice, "perplexity": sigmoid(1 + 0.1 * folds)}
        return State(round(part * tokens), kl * math.exp(-b * folds), shares)

    before = State(0, 2.0, {"generation": 0.05, "choice": choice, "perplexity": 0.5})
    return Run(
        name, model, parameters, {}, {}, tokens, before, (at(1 / 3), at(2 / 3)), at(1.0), {}, "recover run", None
    )


def several(count: int = 10, **fields) -> list[Run]:
    return [made(f"run-{i}", z=-1 + 2 * i / count, kl=0.3 + 0.02 * i, **fields) for i in range(count)]


def trial(run: Run, *, steps=50, **changes) -> advice.Trial:
    """The trial of a run whose end is not told."""
    fields = {"model": run.model, "parameters": run.parameters, "tokens": run.tokens, "steps": steps}
    return advice.Trial(**{**fields, "before": run.before, "after": run.on_the_way[0], **changes})


def test_a_law_that_was_put_in_is_found_and_forecast_exactly():
    runs = several()
    found = advice.forecast(trial(made("new", z=0.4)), runs)
    assert found["classes"]["generation"]["expected"] == pytest.approx(sigmoid(0.4 + 0.8 * math.log(3)), rel=1e-3)
    assert found["classes"]["generation"]["interval"] == pytest.approx([sigmoid(0.4 + 0.8 * math.log(3))] * 2, rel=1e-3)
    assert found["kl"]["expected"] == pytest.approx(0.4 * 3**-0.3, rel=1e-3)
    assert found["classes"]["choice"]["expected"] == 0.9
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


def test_runs_that_were_not_measured_near_the_trial_do_not_count():
    (run,) = several(1)
    assert law.trial_of(run, 1 / 3) == run.on_the_way[0] and law.trial_of(run, 0.6) == run.on_the_way[1]
    assert law.trial_of(run, 0.2) == run.on_the_way[0]
    assert law.trial_of(run, 0.1) is None
    found = advice.forecast(trial(run, after=replace(run.on_the_way[0], tokens=TOKENS // 20)), several())
    assert found["advice"] == "cannot tell" and "0 calibration runs" in found["reason"]


OUTSIDE = {
    "a KL that no run had": ({"after": {"kl": 3.0}}, "KL after the trial"),
    "a KL below all": ({"after": {"kl": 0.01}}, "KL after the trial"),
    "a share above all": ({"after": {"shares": {"generation": 0.99}}}, "generation after the trial"),
    "far more tokens": ({"tokens": 20_000_000, "after": {"tokens": 6_700_000}}, "tokens"),
    "a longer way": ({"after": {"tokens": 18_000}}, "tokens over those of the trial"),
    "text of the pruned model": ({"own_text": True}, "learnt from text of kind 'pruned'"),
    "a handful of steps": ({"steps": 3}, "steps"),
    "a model a thousand times larger": ({"parameters": 1_000_000}, "fewer than 5 calibration runs are of m"),
    "an unknown model": ({"model": "new"}, "fewer than 5 calibration runs are of new"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_nothing_is_advised_outside_of_what_was_calibrated(case):
    changes, named = OUTSIDE[case]
    inside = trial(made("new", z=0.4))
    state = replace(inside.after, **changes.get("after", {}))
    state = replace(state, shares={**inside.after.shares, **state.shares})
    asked = replace(inside, **{**changes, "after": state})
    assert advice.forecast(inside, several())["outside"] == []
    found = advice.forecast(asked, several())
    assert found["advice"] == "cannot tell" and named in found["reason"]
    assert {row["grade"] for row in found["classes"].values()} <= {"cannot tell"}


@pytest.mark.parametrize(("z", "d", "expected"), [(0.9, 1.5, "go"), (-0.9, 0.3, "no-go"), (0.9, 0.5, "cannot tell")])
def test_advice_is_read_off_the_interval_and_the_threshold(z, d, expected):
    runs = [made(str(i), z=-1 + i / 5, d=d + 0.04 * (i - 5), kl=0.3 + 0.02 * i) for i in range(11)]
    found = advice.forecast(trial(made("new", z=z)), runs)
    low, high = found["classes"]["generation"]["interval"]
    assert low < high
    assert found["advice"] == expected, found["reason"]
    told_by_hand = "go" if low >= 0.8 else "no-go" if high < 0.8 else "cannot tell"
    fit = {"go": "with care", "no-go": "no", "cannot tell": "cannot tell"}[expected]
    assert found["classes"]["generation"]["grade"] == fit
    assert expected == told_by_hand and found["thresholds"]["go"] == 0.8


def test_three_other_models_are_enough_to_speak_of_a_new_one():
    runs = [run for name in "abc" for run in several(5, model=name)]
    found = advice.forecast(trial(made("new", model="new")), runs)
    assert found["outside"] == [] and found["calibration"]["left_out"] == "model"
    assert found["classes"]["generation"]["form"] == "halfway"
    assert found["classes"]["generation"]["held"] == [15, 15]


def test_a_use_that_no_run_measured_is_named_and_not_guessed():
    asked = trial(made("new"))
    for state in ("before", "after"):
        asked = replace(asked, **{state: replace(getattr(asked, state), shares={"retrieval": 0.7})})
    found = advice.forecast(asked, several())
    assert found["classes"] == {} and "70% of dense" in found["not_forecast"]["retrieval"]
    assert found["advice"] == "cannot tell" and "Generation: not measured" in found["reason"]
    told.say(found)


def test_rows_of_the_package_are_runs_that_were_made():
    runs = known_runs()
    assert len({run.name for run in runs}) == len(runs) >= advice.RUNS
    for run in runs:
        assert run.before.tokens == 0 and run.after.tokens == run.tokens > 0
        tokens = [state.tokens for state in run.on_the_way]
        assert tokens == sorted(set(tokens)) and tokens[0] > 0 and tokens[-1] < run.tokens
        for state in (run.before, *run.on_the_way, run.after):
            assert 0 < state.kl < 20 and {"generation", "choice", "perplexity"} <= set(state.shares)
            assert all(0 <= share <= 1.6 for share in state.shares.values())
        assert run.parameters > 0 and run.command and " /" not in run.command and '"/' not in run.command
        assert run.prune["kind"] and abs(run.settings["tokens"] / run.tokens - 1) < 0.1
        assert from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_file_of_runs_is_read_as_it_was_written(tmp_path):
    write_runs(several(3), tmp_path / "runs.json")
    assert [run.name for run in known_runs(tmp_path / "runs.json")] == ["run-0", "run-1", "run-2"]
    row = several(1)[0].to_json() | {"unheard": 1}
    (tmp_path / "odd.json").write_text(json.dumps({"runs": [row]}))
    with pytest.raises(ArtifactError, match="unheard"):
        known_runs(tmp_path / "odd.json")


def run_folder(root: Path, generation=(0.1, 0.3, 0.4)) -> Path:
    """The files of a finished run, as few as there must be; dense: 50% of texts, 70% of choices (chance 20%)."""

    def record(generation: float, choice: float, perplexity: float):
        tasks = {
            "sums": {"kind": "generate", "items": 100, "exact_match": generation},
            "facts": {"kind": "choice", "items": 80, "accuracy": choice, "chance": 0.2},
        }
        return {"tasks": tasks, "headline": {"perplexity": perplexity}}

    before, half, after = generation
    files = {
        "dense/measure.json": record(0.5, 0.7, 10.0),
        "before/measure.json": record(before, 0.45, 40.0),
        "before/probe.json": {"final": {"kl": {"mean": 1.5}}},
        "after/measure.json": record(after, 0.7, 12.5),
        "after/probe.json": {"final": {"kl": {"mean": 0.25}}},
        "prune/plan.json": {"parameters_dense": 1234},
        "env.json": {"argv": ["recover", "run", "/here/recipes/x.yaml", "--runs", "/there"], "git": {"commit": "abc"}},
    }
    for name, value in files.items():
        artifacts.write_json(root / name, value)
    recipe = load_recipe(QUICKSTART).model_dump(mode="json")
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    for epoch, tokens in enumerate((5000, 10_000), start=1):
        row = {"epoch": epoch, "tokens": tokens, "measure": record(half, 0.6, 20.0), "drift": {"kl": {"mean": 0.5}}}
        artifacts.append_jsonl(root / "epochs.jsonl", row)
    return root


def test_a_run_directory_is_read_as_shares_of_dense_above_chance(tmp_path):
    run = read_run(run_folder(tmp_path))
    assert (run.model, run.parameters, run.tokens) == ("fable-2m", 1234, 10_000)
    states = [(state.tokens, state.kl, state.shares) for state in (run.before, *run.on_the_way, run.after)]
    kept = ((0.2, 0.5, 0.25), (0.6, 0.8, 0.5), (0.8, 1, 0.8))
    shares = [dict(zip(("generation", "choice", "perplexity"), row, strict=True)) for row in kept]
    expected = zip((0, 5000, 10_000), (1.5, 0.5, 0.25), map(pytest.approx, shares), strict=True)
    assert states == list(expected)
    assert (run.command, run.revision) == ("recover run recipes/x.yaml", "abc")
    assert run.made() == making(load_recipe(QUICKSTART).model_dump(mode="json"))
    assert run.items == {"generation": 100, "choice": 80}


def test_names_of_models_do_not_hang_on_where_they_lie():
    names = ("embedded:a-b", "ORG/a-b", "/some/where/a-b.Q4_1.gguf", "a-b.f16.gguf", "../x/a-b.BF16.gguf")
    assert {model_name(name) for name in names} == {"a-b"}
    assert model_name("Qwen/Qwen2.5-7B") == "Qwen2.5-7B"


def test_what_came_is_held_against_the_forecast_of_the_same_recipe_only(tmp_path, capsys):
    root = run_folder(tmp_path)
    recipe = load_recipe(QUICKSTART).model_dump(mode="json")
    classes = {
        "generation": {"expected": 0.7, "interval": [0.5, 0.9]},
        "choice": {"expected": 0.7, "interval": [0.6, 0.8]},
    }
    written = {"classes": classes, "tokens": 10_000, "recipe": {"prune": recipe["prune"]}}
    told.compare_outcome(root, recipe)  # no forecast was made
    artifacts.write_json(root / "forecast.json", written)
    told.compare_outcome(root, recipe)
    outcome = artifacts.read_json(root / "forecast.json")["outcome"]
    assert outcome["generation"] == {"kept": pytest.approx(0.8), "held": True}
    assert outcome["choice"] == {"kept": pytest.approx(1.0), "held": False}
    artifacts.write_json(root / "forecast.json", written)
    told.compare_outcome(root, {**recipe, "prune": {}})
    assert "of another recipe" in capsys.readouterr().out
    assert "outcome" not in artifacts.read_json(root / "forecast.json")


@pytest.mark.parametrize(("scheduler", "within"), [("cosine", 0.1), ("linear", 0.21), ("constant", 1e-9)])
def test_a_trial_begins_at_the_rates_of_the_recovery(tmp_path, scheduler, within):
    import torch
    from transformers import get_scheduler

    from recover.train.settings import split_batch, training_arguments

    def rates(leaf, steps: int) -> list[float]:
        args = training_arguments(leaf, split_batch(leaf, 1), steps, 0, tmp_path)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, int(args.warmup_steps), steps)
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    leaf = load_recipe(QUICKSTART, [f"recover.scheduler={scheduler}"]).recover
    whole, beginning = rates(leaf, 200), rates(trial_leaf(leaf, advice.PART), round(200 * advice.PART))
    assert len(beginning) == 40 and beginning[:11] == pytest.approx(whole[:11])
    assert beginning == pytest.approx(whole[:40], rel=within)


def test_a_part_that_is_none_is_refused(tmp_path):
    for part in ("0", "0.9"):
        result = CliRunner().invoke(app, ["forecast", str(QUICKSTART), "--runs", str(tmp_path), "--part", part])
        assert result.exit_code == 2 and "--part" in result.output + result.stderr


SMALL = ("measure.limit=4", "measure.max_new_tokens=16", "measure.sampling=null", "probe.samples=2", "probe.steps=4")
SMALL += ("recover.tokens=3000", "recover.epochs=2", "recover.batch_size=4", "prune={kind: depth, blocks: [3]}")


@pytest.mark.slow
def test_a_forecast_leaves_the_recovery_as_it_would_have_been(tmp_path, capsys):
    from recover import stages
    from recover.trial import forecast

    recipe = load_recipe(QUICKSTART, [*SMALL, "recover.data.0.batch_size=4"])
    found = forecast(recipe, tmp_path / "with")
    assert found["advice"] == "cannot tell" and found["trial_tokens"] < 1000 and found["runs"] >= advice.RUNS
    text = next((tmp_path / "with" / "quickstart" / "recover" / "data").glob("dense-*.jsonl"))
    written = text.read_text()
    forecast(recipe, tmp_path / "with")
    assert "trial    done" in capsys.readouterr().out
    one = stages.run(recipe, tmp_path / "with", until="after")
    two = stages.run(recipe, tmp_path / "without", until="after")
    assert text.read_text().startswith(written) and len(text.read_text()) > len(written)
    other = two.recover / "data" / text.name
    assert other.read_text() == text.read_text()
    for name in ("train", "score", "tokens", "drift"):
        rows = [[record[name] for record in artifacts.read_jsonl(directory.epochs)] for directory in (one, two)]
        assert rows[0] == rows[1], name
    assert "outcome" in artifacts.read_json(one.root / "forecast.json")
