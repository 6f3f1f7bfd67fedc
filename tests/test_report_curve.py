"""Laws of the training curve in a report: points hold what the steps say, and the words say what the points hold."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_page import Page
from report_run import build_run
from report_steps import steps

from recover.base.errors import ArtifactError
from recover.report.collect import collect
from recover.report.compare import compare
from recover.report.exhibits import figures
from recover.report.figures.compare import losses
from recover.report.render import render
from recover.report.training import POINTS, WINDOW, curve, learnt

RECIPE = {"train": {"loss": {"kl": 1.0, "variance": 0.5}}}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def found_in(folder: Path, lines: list[dict[str, Any]], recipe: dict[str, Any] = RECIPE) -> dict[str, Any]:
    found = curve(write(folder / "steps.jsonl", lines), recipe)
    assert found is not None
    return found


def a_run(folder: Path, lines: list[dict[str, Any]] | None = None, **loss: float) -> Path:
    run = build_run(folder)
    if lines is not None:
        write(run / "train/steps.jsonl", lines)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"]["loss"] = {"kl": 1.0, **loss}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def epochs(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rows = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    write(run / "epochs.jsonl", rows)


# What a point is.


@pytest.mark.parametrize("number", [1, 2, 31, 127, 128, 396, 5000])
def test_no_step_is_lost_in_the_points(tmp_path: Path, number: int) -> None:
    lines = steps(number, skipped=(2, 60, 61))
    found = found_in(tmp_path, lines)
    points, size = found["points"], found["steps_a_point"]
    assert points["step"] == [*range(size, number, size), number] and len(points["step"]) <= POINTS
    assert size % WINDOW == 0 if number >= 128 else size < WINDOW
    for key in ("tokens", "seconds", "lr"):
        assert points[key] == [lines[step - 1][key] for step in points["step"]]
    assert sum(points["skipped"]) == found["skipped"] == sum("loss" not in line for line in lines)


@pytest.mark.parametrize("name", ["loss", "kl", "variance"])
def test_mean_and_percentiles_are_those_of_tokens(tmp_path: Path, name: str) -> None:
    lines = steps(200, skipped=(1, 9, 150))
    found = found_in(tmp_path, lines)
    column, size = found["points"][name], found["steps_a_point"]
    scored = np.diff([0, *(line["tokens"] for line in lines)])
    tokens = np.concatenate(  # each token with the mean of its step
        [np.full(number, line.get(name, 0.0)) for line, number in zip(lines, scored, strict=True)]
    )
    ends = np.cumsum([0, *(scored[start : start + size].sum() for start in range(0, 200, size))])
    for index, (start, stop) in enumerate(itertools.pairwise(ends)):
        part = tokens[start:stop]
        assert column["mean"][index] == pytest.approx(part.mean(), rel=1e-4)
        assert column["low"][index] == pytest.approx(np.quantile(part, 0.1, method="inverted_cdf"), rel=1e-4)
        assert column["high"][index] == pytest.approx(np.quantile(part, 0.9, method="inverted_cdf"), rel=1e-4)
    assert found["ends_steps"] == 10
    last = scored[-10:].sum()
    assert found["ends"][name][1] == pytest.approx(tokens[-last:].mean(), rel=1e-4)


def test_the_highest_norm_is_never_averaged_away(tmp_path: Path) -> None:
    lines = steps(2000)
    lines[777]["grad_norm"] = 1e4
    norm = found_in(tmp_path, lines)["points"]["grad_norm"]
    assert max(norm["high"]) == 1e4 and max(norm["mean"]) < 1e4


def test_a_long_training_makes_no_large_report(tmp_path: Path) -> None:
    found = found_in(tmp_path, steps(100_000))
    assert len(found["points"]["step"]) <= POINTS and len(json.dumps(found, indent=1)) < 60_000
    assert found["steps_a_point"] == 840


def test_a_point_of_skipped_steps_alone_has_no_figures(tmp_path: Path) -> None:
    points = found_in(tmp_path, steps(200, skipped=tuple(range(9, 17))))["points"]
    assert points["skipped"][1] == 8 and points["tokens"][1] == points["tokens"][0]
    for name in ("loss", "kl", "grad_norm"):
        assert [points[name][part][1] for part in ("mean", "low", "high")] == [None] * 3


def test_terms_are_kl_and_those_with_a_weight(tmp_path: Path) -> None:
    lines = steps(20)
    loss = {"kl": 0.0, "ce": 1.0, "variance": 0.0, "jsd": 0.5}
    assert {"loss", "kl", "ce", "grad_norm"} < found_in(tmp_path, lines, {"train": {"loss": loss}})["points"].keys()
    for recipe in ({}, {"train": {}}, RECIPE):
        points = found_in(tmp_path, lines, recipe)["points"]
        assert "kl" in points and "reverse_kl" not in points and ("variance" in points) == (recipe is RECIPE)


# What is not there, or damaged.


def test_no_file_and_no_line_are_no_curve(tmp_path: Path) -> None:
    assert curve(tmp_path / "steps.jsonl", RECIPE) is None
    assert curve(write(tmp_path / "steps.jsonl", []), RECIPE) is None
    run = build_run(tmp_path, without=("train/steps.jsonl",))
    data = collect(run)
    assert data["curve"] is None and not figures(data)["training"].measured and learnt(data) == []
    assert losses(compare([run])) is None
    assert "which older runs do not have" in render(run, data)[1].read_text(encoding="utf-8")


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "steps.jsonl", steps(20))
    whole = curve(path, RECIPE)
    path.write_text(path.read_text() + '{"step": 21, "tok')
    assert curve(path, RECIPE) == whole


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": 1, "tokens": null, "seconds": 1}', "{", "\0\0"])
def test_a_damaged_line_is_named_with_what_to_do(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "steps.jsonl", steps(20))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ArtifactError, match=r"steps\.jsonl:21: .*Delete it, and the report is without"):
        curve(path, RECIPE)


def test_a_file_that_began_anew_says_so(tmp_path: Path) -> None:
    data = collect(a_run(tmp_path, steps()[100:]))
    assert data["curve"]["first_step"] == 101
    assert learnt(data)[-1] == "Of the steps before 101 no line is left."


# What the words say.


def test_words_of_a_loss_that_fell(tmp_path: Path) -> None:
    lines = [line | {"peak_memory_bytes": 2_300_000_000 + line["step"]} for line in steps()]
    data = collect(a_run(tmp_path, lines))
    first, last = data["curve"]["ends"]["loss"]
    assert learnt(data)[0] == (
        f"Loss fell from {first:.3g} to {last:.3g} per token (means over the first and the last 20 steps), "
        f"at {data['curve']['tokens_per_second']:.0f} tokens/s, peak GPU memory 2.3 GB."
    )


def test_words_of_a_loss_that_did_not_fall(tmp_path: Path) -> None:
    lines = steps()
    values = [{name: line[name] for name in ("loss", "kl")} for line in lines]
    run = a_run(tmp_path, [line | value for line, value in zip(lines, reversed(values), strict=True)])
    epochs(run, lambda row: row["train"].update(loss=0.1 * row["epoch"]))
    said = learnt(collect(run))
    assert said[0].startswith("Loss did not fall: 0.07")
    assert said[1] == "Over the last epoch loss did not fall: its mean is 0.6, that of the epoch before 0.5."
    assert len(said) == 2


def test_words_of_generation_that_fell_while_the_loss_fell_on(tmp_path: Path) -> None:
    said = learnt(collect(a_run(tmp_path)))
    assert said[1:] == [
        "After epoch 4, which is kept, loss fell on from 0.131 to 0.0714 while generation fell from 97% to 95% "
        "(on 100 items a task)."
    ]


def test_nothing_is_complained_of_where_both_went_well(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (run / "epochs.jsonl").write_text("".join((run / "epochs.jsonl").read_text().splitlines(keepends=True)[:4]))
    assert len(learnt(collect(run))) == 1


def test_words_of_generation_that_did_not_follow_at_all(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    epochs(run, lambda row: (row["measure"]["headline"].update(generation=0.05), row.update(score=0.05)))
    assert learnt(collect(run))[1] == (
        "Generation did not follow: 5.0% after the best epoch (on 100 items a task), and 13% before the training."
    )


def test_a_loss_that_falls_by_fading_is_judged_by_kl(tmp_path: Path) -> None:
    run = a_run(tmp_path, variance=0.5, variance_until=0.6)
    epochs(run, lambda row: row["train"].update(kl=0.1 * row["epoch"]))
    said = learnt(collect(run))
    assert said[0].startswith("KL fell from") and said[1].startswith("Over the last epoch KL did not fall")
    assert said[-1] == "The weight of the variance fades over 60% of the steps, and part of the loss with it."


def test_words_of_a_training_of_one_step_and_of_none_in_order(tmp_path: Path) -> None:
    one = learnt(collect(a_run(tmp_path / "one", steps(1))))
    assert "(the first and the last step)" in one[0]
    none = collect(a_run(tmp_path / "none", steps(3, skipped=(1, 2, 3))))
    assert learnt(none)[0] == "No step was in order: nothing was learnt."
    assert figures(none)["training"].wide


# The picture.


def drawn(run: Path) -> tuple[str, str]:
    figure = figures(collect(run))["training"]
    assert figure.measured and figure.columns
    return figure.wide, figure.narrow


@pytest.mark.parametrize("number", [1, 2, 20, 396])
def test_picture_is_in_both_files_whatever_the_length(tmp_path: Path, number: int) -> None:
    run = a_run(tmp_path, steps(number))
    data = collect(run)
    _, markdown, html = render(run, data)
    assert learnt(data)[0] in markdown.read_text(encoding="utf-8")
    page = Page(html.read_text(encoding="utf-8"))
    assert "figure-training" in [attributes.get("id") for attributes in page.all("figure")]


def test_picture_tells_terms_only_where_there_are_several(tmp_path: Path) -> None:
    for svg in drawn(a_run(tmp_path / "sole")):
        assert "Loss per token: KL" in svg and "reverse KL" not in svg
    for svg in drawn(a_run(tmp_path / "several", reverse_kl=0.5, ce=0.1)):
        assert "Loss per token<" in svg and all(f">{name}<" in svg for name in ("loss", "KL", "reverse KL"))
        assert ">variance<" not in svg


def test_axis_is_logarithmic_where_the_range_calls_for_it(tmp_path: Path) -> None:
    assert "log scale" in drawn(a_run(tmp_path / "wide"))[0]
    flat = [line | {"loss": 1.0 + line["step"] / 1000} for line in steps()]
    assert "log scale" not in drawn(a_run(tmp_path / "flat", flat))[0]


def test_skipped_steps_are_crossed_and_kept_epochs_ringed(tmp_path: Path) -> None:
    wide, narrow = drawn(a_run(tmp_path, steps(skipped=(40, 41, 200))))
    for svg in (wide, narrow):
        assert len(re.findall('class="cross"', svg)) == 2 * 3  # two lines each; 40 and 41 are in unlike points
        assert svg.count('class="ring"') == 1 and "kept: 97%" in svg
        assert "1 step left out" in svg
    assert 'class="cross"' not in drawn(a_run(tmp_path / "whole"))[0]


def test_picture_before_the_first_epoch(tmp_path: Path) -> None:
    run = a_run(tmp_path, steps(20))
    (run / "epochs.jsonl").unlink()
    assert "Generation" not in drawn(run)[0] and "Loss per token" in drawn(run)[0]


def test_runs_are_drawn_together_by_kl(tmp_path: Path) -> None:
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    write(runs[1] / "train/steps.jsonl", steps(200))
    figure = losses(compare(runs))
    assert figure is not None and {row[0] for row in figure.rows} == {"a", "b"}
    points = collect(runs[1])["curve"]["points"]
    expected = list(zip(points["tokens"], points["kl"]["mean"], strict=True))
    assert next(run["kl"] for run in compare(runs)["runs"] if run["name"] == "b") == expected
