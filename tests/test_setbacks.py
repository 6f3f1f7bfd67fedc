"""A recovery that makes something worse says so at once and in the report, with intervals; noise is not spoken of."""

import json

import numpy as np
import pytest
from report_run import build_run
from small_run import QUICKSTART, TEXT

from recover.base.artifacts import read_jsonl
from recover.config.recipe import load_recipe
from recover.maths.score import of_means, of_ratio
from recover.report.collect import collect
from recover.report.render import render
from recover.report.training import advice, setback_sentence, setbacks
from recover.run import stages


def rights(right, items):
    return [1.0] * right + [0.0] * (items - right)


def epoch(number=1, *, generation=(50, 100), choice=(80, 100), nats=3.0, kl=0.2, texts=40, seed=0, score=None):
    spread = np.random.default_rng(seed).normal(0, 0.05, texts)
    measure = {
        "tasks": {
            "sums": {"kind": "generate", "each": rights(*generation)},
            "facts": {"kind": "choice", "each": rights(*choice)},
            "prose": {"kind": "perplexity", "each": [[(nats + each) * 20, 20] for each in spread]},
        }
    }
    drift = {"each": [[(kl + each / 10) * 30, 30] for each in spread]}
    return {"epoch": number, "measure": measure, "drift": drift, "score": score}


def test_the_interval_of_means_is_that_of_paired_items_and_of_tasks_alike():
    draw = np.random.default_rng(1)
    pairs = [(draw.random(n) < 0.6, draw.random(n) < 0.4) for n in (400, 50)]
    change = of_means([(list(map(float, before)), list(map(float, now))) for before, now in pairs])
    resampled = []
    for _ in range(4000):
        drawn = [draw.integers(len(before), size=len(before)) for before, _ in pairs]
        resampled.append(
            np.mean([now[at].mean() - before[at].mean() for (before, now), at in zip(pairs, drawn, strict=True)])
        )
    assert change is not None and change.items == 450
    assert change.value == pytest.approx(np.mean([now.mean() - before.mean() for before, now in pairs]))
    assert [change.low, change.high] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.01)


def test_the_interval_of_a_ratio_is_that_of_whole_texts():
    draw = np.random.default_rng(2)
    counts = draw.integers(10, 200, 80)
    before = [[float(n * (3 + draw.normal(0, 0.4))), int(n)] for n in counts]
    now = [[nats + n * draw.normal(0.02, 0.1), n] for nats, n in before]
    change = of_ratio(before, now)
    difference, n = np.array([b[0] - a[0] for a, b in zip(before, now, strict=True)]), np.array(counts)
    drawn = draw.integers(80, size=(4000, 80))
    ends = np.percentile(difference[drawn].sum(1) / n[drawn].sum(1), [2.5, 97.5])
    assert change is not None and change.value == pytest.approx(difference.sum() / n.sum())
    assert [change.low, change.high] == pytest.approx(ends, abs=0.004)


def test_two_measurements_of_models_that_are_equal_are_seldom_called_different():
    draw = np.random.default_rng(3)
    false = 0
    for _ in range(400):
        before, now = (list((draw.random(100) < 0.5).astype(float)) for _ in range(2))
        change = of_means([(before, now)])
        false += change is not None and change.fell
    assert false <= 20  # 2.5% are expected


def test_few_items_that_changed_are_noise_however_alike_they_changed():
    change = of_means([(rights(100, 100), rights(95, 100))])
    assert change is not None and change.high < 0 and not change.fell
    change = of_means([(rights(100, 100), rights(94, 100))])
    assert change is not None and change.fell
    assert of_means([]) is None and of_means([([1.0], [0.0])]) is None and of_ratio([[1.0, 2]], [[2.0, 2]]) is None


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({}, []),
        ({"generation": (20, 100)}, ["generation"]),
        ({"generation": (48, 100)}, []),
        ({"generation": (90, 100), "choice": (95, 100), "nats": 2.0, "kl": 0.01}, []),
        ({"choice": (60, 100)}, ["choice"]),
        ({"nats": 3.2}, ["perplexity"]),
        ({"nats": 3.005, "seed": 4}, []),
        ({"kl": 0.3}, ["kl"]),
        (
            {"generation": (0, 100), "choice": (0, 100), "nats": 5.0, "kl": 2.0},
            ["generation", "choice", "perplexity", "kl"],
        ),
    ],
)
def test_what_is_worse_than_pruned_beyond_noise_is_found(now, found):
    assert [each["figure"] for each in setbacks(epoch(**now), epoch(0), [])] == found


def test_an_epoch_is_held_against_the_best_and_the_lowest_before_it():
    past = [epoch(1, generation=(40, 100), kl=0.1, score=0.4), epoch(2, generation=(70, 100), kl=0.15, score=0.7)]
    pruned = epoch(0, generation=(10, 100), kl=0.5)
    found = setbacks(epoch(3, generation=(50, 100), kl=0.2, score=0.5), pruned, past)
    assert [(each["figure"], each["against"]) for each in found] == [("generation", "epoch 2"), ("kl", "epoch 1")]
    assert found[0]["before"] == 0.7 and found[0]["now"] == 0.5
    assert setbacks(epoch(3, generation=(69, 100), kl=0.1, score=0.69), pruned, past) == []


def test_epochs_of_fewer_items_are_paired_with_the_first_of_them():
    pruned = epoch(0)
    pruned["measure"]["tasks"]["sums"]["each"] = [*rights(30, 50), *rights(0, 250)]
    assert setbacks(epoch(generation=(30, 50)), pruned, []) == []
    found = setbacks(epoch(generation=(10, 50)), pruned, [])
    assert [(each["before"], each["now"], each["items"]) for each in found] == [(0.6, 0.2, 50)]


def test_records_without_single_items_are_compared_with_nothing():
    old = {"measure": {"tasks": {"sums": {"kind": "generate", "exact_match": 0.9}}}, "drift": {"kl": {"mean": 0.01}}}
    assert setbacks(epoch(), old, [{**old, "epoch": 1, "score": 0.9}]) == []


def test_figures_are_said_with_the_interval_of_their_change():
    worse = epoch(generation=(20, 100), nats=3.2, kl=0.3)
    lines = [setback_sentence(each) for each in setbacks(worse, epoch(0), [])]
    assert lines == [
        "generation is worse than the pruned model's: 50.0%, now 20.0% (-30.0 points [-39.0, -21.0], 100 items)",
        "perplexity is worse than the pruned model's: 20.02, now 24.46 (+22.1% [+22.1%, +22.1%], 40 texts)",
        "KL along the dense model's own texts is worse than the pruned model's: 0.2, now 0.3 "
        "(+0.1 [+0.1, +0.1], 40 texts)",
    ]


def test_the_advice_names_fields_and_what_to_put_there():
    recipe = {"train": {"lr": 1e-3, "tokens": 200_000, "loss": {"scored": "completion"}}}
    text = " ".join(advice(setbacks(epoch(nats=4.0), epoch(0), []), recipe))
    assert "train.lr=0.0005 instead of 0.001" in text and "`train.loss.scored: all`" in text
    assert "that perplexity is measured on" in text and "More text" not in text
    text = " ".join(advice(setbacks(epoch(kl=0.4), epoch(0), []), {"train": {"loss": {"scored": "all"}}}))
    assert "scored: all" not in text and "More text" in text
    assert advice([], recipe) == []


def test_the_report_tells_it_of_the_kept_epoch_and_of_epochs_that_fell(tmp_path):
    run = build_run(tmp_path)
    rows = read_jsonl(run / "epochs.jsonl")
    ours = setbacks(epoch(4, nats=3.2), epoch(0), [])
    fell = setbacks(epoch(6, generation=(50, 100), score=0.5), epoch(0), [epoch(4, generation=(90, 100), score=0.9)])
    elsewhere = setbacks(epoch(1, choice=(40, 100)), epoch(0), [])  # mended by the epoch that is kept
    found = {4: ours, 6: fell, 1: elsewhere}
    for row in rows:
        row["setbacks"] = found.get(row["epoch"], [])
    (run / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    render(run, collect(run))
    for name in ("report.md", "report.html"):
        text = (run / name).read_text()
        assert "Epoch 4, which is kept: perplexity is worse than the pruned model&#39;s" in text.replace("'", "&#39;")
        assert "Epoch 6: generation is worse than after epoch 4: 90.0%, now 50.0%" in text
        assert "train.lr=0.0001 instead of 0.0002" in text and "choice is worse" not in text


def test_a_report_of_nothing_worse_says_nothing(tmp_path):
    run = build_run(tmp_path)
    render(run, collect(run))
    assert "worse, beyond noise" not in (run / "report.html").read_text()
    assert "is worse than" not in (run / "report.md").read_text()


def test_a_recovery_at_a_rate_far_too_high_is_told_when_its_epoch_ends(tmp_path, capsys):
    settings = ["measure.limit=24", "measure.max_new_tokens=8", "measure.sampling=null", "probe.samples=8"]
    settings += ["probe.steps=8", "probe.items=0", "probe.sublayers=false", "train.tokens=400", "train.epochs=1"]
    settings += TEXT
    settings += ["train.lr=0.3", "prune={kind: depth, blocks: [3, 11]}"]
    directory = stages.run(load_recipe(QUICKSTART, settings), tmp_path, until="train")
    (line,) = read_jsonl(directory.epochs)
    assert {"choice", "kl"} <= {each["figure"] for each in line["setbacks"]}
    error = capsys.readouterr().err
    assert "epoch 1: KL along the dense model's own texts is worse" in error
    assert "train.lr=0.002 instead of 0.3" in error
