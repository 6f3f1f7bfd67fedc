"""Advice: nothing is said of what is not known, and what is said is read off the interval and the threshold."""

from dataclasses import replace

import pytest
from forecast_runs import QUICKSTART, TOKENS, made, several, trial
from typer.testing import CliRunner

from recover.base import artifacts
from recover.cli import app
from recover.config.recipe import Loss, load_recipe
from recover.forecast import advice, law, told
from recover.run.trial import trial_leaf


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
    assert {row["chance"] for row in found["classes"].values()} <= {None}
    told.say(found)


@pytest.mark.parametrize(("z", "d", "expected"), [(0.9, 1.5, "go"), (-0.9, 0.3, "no-go"), (0.9, 0.5, "cannot tell")])
def test_advice_is_read_off_the_interval_and_the_threshold(z, d, expected):
    runs = [made(str(i), z=-1 + i / 5, d=d + 0.04 * (i - 5), kl=0.3 + 0.02 * i) for i in range(11)]
    found = advice.forecast(trial(made("new", z=z)), runs)
    low, high = found["classes"]["generation"]["interval"]
    assert low < high
    assert found["advice"] == expected, found["reason"]
    told_by_hand = "go" if low >= 0.8 else "no-go" if high < 0.8 else "cannot tell"
    chance = found["classes"]["generation"]["chance"]
    bounds = {"go": (0.9, 1), "no-go": (0, 0.1), "cannot tell": (0.1, 0.9)}[expected]
    assert bounds[0] < chance < bounds[1] and "Chance of 80% or more" in found["reason"]
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


def test_a_trial_fades_the_variance_as_the_whole_does():
    loss = {"kl": 1.0, "variance": 0.8, "variance_until": 0.5}
    leaf = load_recipe(QUICKSTART).recover.model_copy(update={"loss": Loss.model_validate(loss)})
    first = trial_leaf(leaf, 0.2).loss
    for step in range(40):
        assert first.at(step / 40).variance == pytest.approx(leaf.loss.at(step / 200).variance)


def test_a_part_that_is_none_is_refused(tmp_path):
    for part in ("0", "0.9"):
        result = CliRunner().invoke(app, ["forecast", str(QUICKSTART), "--runs", str(tmp_path), "--part", part])
        assert result.exit_code == 2 and "--part" in result.output + result.stderr


SMALL = ("measure.limit=4", "measure.max_new_tokens=16", "measure.sampling=null", "probe.samples=2", "probe.steps=4")
SMALL += ("recover.tokens=3000", "recover.epochs=2", "recover.batch_size=4", "prune={kind: depth, blocks: [3]}")


@pytest.mark.slow
def test_a_forecast_leaves_the_recovery_as_it_would_have_been(tmp_path, capsys):
    from recover.run import stages
    from recover.run.trial import forecast

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
