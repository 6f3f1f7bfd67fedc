"""`lr: auto`: what its trials cost, what they choose, and that the training is that of the rate they chose."""

import json
import os
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from report_run import build_run
from safetensors.torch import load_file
from tiny import tiny

from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import StopRequested, TrainingError
from recover.base.process import graceful_stop
from recover.config.defaults import prior_rate
from recover.config.recipe import Train
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.report.collect import collect
from recover.report.render import render
from recover.train import trials
from recover.train.train import train
from recover.train.trials import Trials, _best, planned


@pytest.fixture
def folder(tmp_path, monkeypatch):
    two_processes.write_text(tmp_path)
    monkeypatch.setattr(trials, "SHARE", 20.0)
    monkeypatch.setattr(trials, "STEPS", (2, 2))
    return tmp_path


def cfg(folder, **changes):
    return two_processes.cfg(folder, **{"lr": "auto", "batch_size": 4, **changes})


def go(folder, name="train", **changes):
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    path = train(twin, byte_tokenizer(), cfg(folder, **changes), folder / name, lambda epoch, _: float(epoch), seed=3)
    return load_file(path / "adapter_model.safetensors")


def recipe(tokens, **changes):
    data = [{"kind": "given", "source": "x.jsonl"}]
    return Train.model_validate({"data": data, "tokens": tokens, "batch_size": 16, "lr": "auto", **changes})


@pytest.mark.parametrize(
    ("tokens", "row", "count"),
    [
        (1_000_000, 200, 0),
        (3_000_000, 200, 0),
        (4_000_000, 200, 3),
        (10_000_000, 200, 5),
        (200_000, 30, 0),
        (600_000, 30, 3),
    ],
)
def test_trials_stay_within_a_twentieth_of_the_tokens_and_learn_nothing_that_they_are_judged_on(tokens, row, count):
    scored = [row + at % 7 - 3 for at in range(tokens // row)]
    plan = planned(recipe(tokens), 896, scored)
    assert len(plan.rates) == count
    if not count:
        assert plan.tokens == 0 and "without trials" in plan.why and f"{tokens / 20:,.0f}" in plan.why
        return
    learnt = plan.steps * 16
    assert plan.steps >= 16 and len(plan.judged) >= 8 and min(plan.judged) >= learnt
    spent = count * (sum(scored[:learnt]) + sum(scored[at] for at in plan.judged))
    assert plan.tokens == spent and 0.6 * tokens / 20 < spent <= 1.02 * tokens / 20
    assert plan.prior in plan.rates and plan.rates == tuple(sorted(plan.rates))
    assert all(high == pytest.approx(2 * low) for low, high in zip(plan.rates, plan.rates[1:], strict=False))


def test_rows_that_repeat_judge_no_trial_that_learnt_them():
    scored = [200] * 50_000
    texts = [at % 1000 for at in range(50_000)]
    plan = planned(recipe(10_000_000), 896, scored, texts)
    assert plan.rates and not {*texts[: plan.steps * 16]} & {texts[at] for at in plan.judged}
    plan = planned(recipe(10_000_000), 896, scored, [at % 10 for at in range(50_000)])
    assert not plan.rates and "other rows to judge them on" in plan.why


def test_rows_that_the_pruned_model_is_yet_to_write_are_in_no_trial():
    scored = [200] * 1000 + [0] + [200] * 49_000
    plan = planned(recipe(10_000_000), 896, scored)
    assert max(plan.judged) < 1000
    assert (
        "the pruned model writes text from row 4 of" in planned(recipe(10_000_000), 896, [200] * 3 + [0] * 50_000).why
    )


def test_the_prior_is_what_three_models_took():
    """Width, alpha, and the rates that did best in docs/results.md, within a factor of two."""
    for width, alpha, best in ((112, 64, 1e-3), (576, 64, 1.4e-3), (896, 128, 2e-4)):
        assert 0.5 <= prior_rate(width, alpha) / best <= 2
    assert prior_rate(896, 512) == pytest.approx(prior_rate(896, 128) / 4)


def trial(rate, kl, perplexity=20.0, spread=0.0):
    wave = [1 if at % 2 else -1 for at in range(16)]
    return {
        "lr": rate,
        "kl": kl,
        "each": [] if kl is None else [(100 * (kl + spread * each), 100) for each in wave],
        "perplexity": perplexity,
        "perplexity_each": [(100 * perplexity / 10, 100) for _ in wave],
    }


PLAN = Trials(1e-3, (5e-4, 1e-3, 2e-3), 20, (), 1, "why")


@pytest.mark.parametrize(
    ("found", "chosen", "reason"),
    [
        ([trial(5e-4, 0.3), trial(1e-3, 0.2), trial(2e-3, 0.25)], 1e-3, "lowest KL"),
        ([trial(5e-4, 0.201, spread=0.05), trial(1e-3, 0.2), trial(2e-3, 0.4)], 5e-4, "equal within noise"),
        ([trial(5e-4, 0.2001, 21.0, spread=0.05), trial(1e-3, 0.2, 20.0), trial(2e-3, 0.9)], 1e-3, "lowest perplexity"),
        ([trial(5e-4, 0.3), trial(1e-3, None), trial(2e-3, None)], 5e-4, ""),
    ],
)
def test_the_rate_is_chosen_by_kl_then_perplexity_then_the_lowest(found, chosen, reason):
    rate, why = _best(found, PLAN)
    assert rate == chosen and reason in why


def test_trials_that_all_diverge_ask_for_a_rate():
    with pytest.raises(TrainingError, match=r"train\.lr: auto: each of the trials, from 0\.0005 to 0\.002"):
        _best([trial(rate, None) for rate in PLAN.rates], PLAN)


def test_the_training_is_to_the_bit_that_of_the_chosen_rate(folder, capsys):
    ours = go(folder, tokens=1200)
    record = read_json(folder / "train" / "trials.json")
    assert len(record["trials"]) == 5 and record["chosen"] in [each["lr"] for each in record["trials"]]
    assert f"lr: auto: {record['chosen']:.3g}" in capsys.readouterr().out
    steps = read_jsonl(folder / "train" / "steps.jsonl")
    assert max(step["lr"] for step in steps) == record["chosen"]
    theirs = go(folder, "given", tokens=1200, lr=record["chosen"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (folder / "given" / "trials.json").exists()


def test_trials_that_are_stopped_go_on_behind_those_that_are_done(folder, monkeypatch):
    straight = go(folder, "straight")
    made, trial = [], trials.Bench.trial

    def stopped_in_the_third(bench, rate):
        made.append(rate)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return trial(bench, rate)

    monkeypatch.setattr(trials.Bench, "trial", stopped_in_the_third)
    with pytest.raises(StopRequested), graceful_stop():
        go(folder)
    assert len(read_json(folder / "train" / "trials.json")["trials"]) == 2
    found = go(folder)
    assert made[2:] == [made[2], *made[3:]] and len(made) == 6  # the third again, and two more
    assert all(torch.equal(found[name], straight[name]) for name in straight)
    one, two = (read_json(folder / name / "trials.json") for name in ("straight", "train"))
    assert [each["each"] for each in one["trials"]] == [each["each"] for each in two["trials"]]
    assert one["chosen"] == two["chosen"]  # equal seeds choose alike
    made.clear()
    go(folder)
    assert made == []  # a training that begins anew has the rate already


def test_a_trial_makes_the_steps_of_a_training(folder, monkeypatch):
    """Against the trainer, which shares neither loop nor optimizer with it: the same rate throughout, no warm-up."""
    monkeypatch.setattr(trials, "_shape", lambda _step, _steps: 1.0)
    monkeypatch.setattr(trials, "STEPS", (4, 4))
    caught = {}
    judge = trials.Bench._judge

    def catch(bench, found):
        rate = bench.plan.rates[len(caught)]
        caught[rate] = [parameter.detach().clone() for parameter in bench.trained]
        judge(bench, found)

    monkeypatch.setattr(trials.Bench, "_judge", catch)
    fields = {"loss": {"kl": 1.0, "ce": 0.1}, "max_grad_norm": 0.01, "micro_batch_size": 2}
    go(folder, **fields)
    rate = list(caught)[-1]
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    first_four = {}

    class Stop(Exception):
        pass

    from recover.train.trainer import RecoverTrainer

    log = RecoverTrainer.log_step

    def after_four(trainer):
        log(trainer)
        if trainer.state.global_step == 4:
            first_four["adapter"] = [parameter.detach().clone() for parameter in trainer.trained]
            raise Stop

    monkeypatch.setattr(RecoverTrainer, "log_step", after_four)
    given = cfg(folder, lr=rate, scheduler="constant", warmup=0.0, **fields)
    with pytest.raises(Stop):
        train(twin, byte_tokenizer(), given, folder / "given", lambda *_: None, seed=3)
    for ours, theirs in zip(caught[rate], first_four["adapter"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    moved = max(float((a - b).abs().max()) for a, b in zip(caught[rate], next(iter(caught.values())), strict=True))
    assert moved > 1e-3  # the rates of two trials are told apart by far more


def test_a_trial_falls_to_zero():
    shape = [trials._shape(step, 40) for step in range(40)]
    assert shape[:4] == [0.25, 0.5, 0.75, 1.0] and shape[4:] == sorted(shape[4:], reverse=True)
    assert 0 < shape[-1] < 0.01 and [trials._shape(step, 1) for step in range(1)] == [1.0]


def test_a_rate_that_diverges_is_not_chosen_and_is_shown(folder, monkeypatch, capsys):
    step = trials.Bench.step
    monkeypatch.setattr(
        trials.Bench, "step", lambda bench, at, adam: step(bench, at, adam) and adam.param_groups[0]["lr"] < 4e-3
    )
    go(folder)
    record = read_json(folder / "train" / "trials.json")
    assert record["trials"][-1]["kl"] is None and record["chosen"] != record["trials"][-1]["lr"]
    assert "trials of learning rates" in capsys.readouterr().out


@pytest.mark.parametrize("reason", [None, "5% of train.tokens"])
def test_the_report_has_the_table_of_trials(tmp_path, reason):
    run = build_run(tmp_path)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("lr: 0.0002", "lr: auto"))
    found = [] if reason else [trial(5e-4, 0.31), trial(1e-3, 0.22), trial(2e-3, None)]
    rest = {"chosen": 1e-3, "reason": reason or "lowest KL", "why": reason or "3 trials of 20 steps"}
    (run / "train" / "trials.json").write_text(json.dumps({"trials": found, **rest}))
    render(run, collect(run))
    text = (run / "report.md").read_text()
    assert "Trials of learning rates" in text and "0.001, taken" in text
    assert (reason or "Taken: lowest KL") in text and ("not finite" in text) == (reason is None)


def test_a_rate_that_is_given_shows_no_trials_of_before(tmp_path):
    run = build_run(tmp_path)
    (run / "train" / "trials.json").write_text(json.dumps({"trials": [], "chosen": 1e-3, "reason": "x"}))
    assert collect(run)["rate_trials"] is None
