"""What is only shown or measured asks for no training: epochs are measured again from their adapters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import MASKED, QUICKSTART, SMALL, begun, finished, run

from recover.base.artifacts import read_json, read_jsonl
from recover.config.recipe import load_recipe
from recover.report.collect import collect
from recover.run import stage_work, stages
from recover.run.directory import RunDirectory

*TWO, FEW = MASKED  # of two epochs, measured on few items
MORE = "measure.limit=4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory, *MASKED)


@pytest.fixture(scope="module")
def otherwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, measured on more items from the start."""
    runs = tmp_path_factory.mktemp("otherwise")
    begun(tmp_path_factory, runs, *MASKED)
    return run(runs, *TWO, MORE, until="after").root


@pytest.fixture
def there(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A copy of the run, in a program that must not train."""
    monkeypatch.setattr(stage_work.training, "train", refuse)
    return RunDirectory(shutil.copytree(whole, tmp_path / whole.name))


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("trained again")


def again(directory: RunDirectory, *overrides: str, until: str = "after") -> None:
    run(directory.root.parent, *TWO, *(overrides or (FEW,)), until=until)


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What was measured, without how long it took."""
    tasks = {name: {k: v for k, v in task.items() if "seconds" not in k} for name, task in record["tasks"].items()}
    return {"tasks": tasks, "headline": record["headline"]}


def test_other_rules_of_measuring_train_nothing_and_give_what_a_run_by_them_gives(
    there: RunDirectory, otherwise: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, exported = there.done("train"), there.done("export")
    again(there, MORE, until="report")
    said = capsys.readouterr().out
    assert "measure.limit: 2 -> 4" in said and "epoch 2, measured again from its adapter" in said
    assert there.done("train") == trained
    other = RunDirectory(otherwise)
    mine, theirs = read_jsonl(there.epochs_again), read_jsonl(other.epochs)
    assert [each["epoch"] for each in mine] == [1, 2]
    for one, two in zip(mine, theirs, strict=True):
        assert figures(one["measure"]) == figures(two["measure"]) and one["score"] == two["score"]
    assert there.best() == {**other.best(), "epochs": other.best()["epochs"]}
    for folder in ("dense", "before", "after"):
        one, two = (figures(read_json(root / folder / "measure.json")) for root in (there.root, otherwise))
        assert one == two
    data = collect(there.root)
    for one, two in zip(data["epochs"], collect(otherwise)["epochs"], strict=True):
        assert one["drift"]["kl"] == pytest.approx(two["drift"]["kl"], rel=1e-3)
    assert [epoch["items"]["stories"] for epoch in data["epochs"]] == [4, 4] and data["mixed"] == []
    if there.carried() != {**(exported or {})["fingerprint"]["carried"]}:
        assert there.done("export") != exported  # its card and record hold the new figures
    assert read_json(there.deploy / "recover.json")["headlines"] == {
        name: headline for name, headline in there.carried().items() if name != "epoch"
    }
    again(there, MORE)
    assert "measured again" not in capsys.readouterr().out
    again(there, FEW)
    assert not there.epochs_again.exists() and there.done("train") == trained
    assert [epoch["items"]["stories"] for epoch in collect(there.root)["epochs"]] == [2, 2]


def test_the_epoch_that_is_best_by_the_new_rules_is_kept_and_exported(
    there: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, scores = stage_work.measure, iter([0.25, 0.75])
    first = there.best()["epoch"]

    def scored(*args: Any, limit: int | None = None, **options: Any) -> Any:
        record, texts = measure(*args, limit=limit, **options)
        if limit is not None:  # of an epoch
            better = next(scores) if first == 1 else 1 - next(scores)
            record["headline"]["generation"] = better
        return record, texts

    monkeypatch.setattr(stage_work, "measure", scored)
    exported = there.done("export")
    again(there, "measure.limit=3", until="report")
    assert there.best()["epoch"] == 3 - first and there.done("export") != exported
    assert read_json(there.deploy / "recover.json")["kept"]["epoch"] == 3 - first


@pytest.mark.parametrize(
    ("overrides", "redone"),
    [
        (("measure.batch_size=7", "probe.batch_size=3", "train.save_steps=3"), set()),
        (("train.gradient_checkpointing=true", "train.loss.chunk=64"), set()),
        (("measure.samples=5",), {"dense", "before", "after"}),
        (("probe.samples=3",), {"before", "after"}),
        (("measure.tasks=[embedded:stories, embedded:facts]",), {"dense", "before", "after"}),
        (("train.lr=1e-3",), {"train", "after", "export"}),
        (("export.dtype=bfloat16",), {"export"}),
    ],
)
def test_a_field_makes_stale_what_it_makes(whole: Path, overrides: tuple[str, ...], redone: set[str]) -> None:
    directory = RunDirectory(whole)
    recipe = load_recipe(QUICKSTART, [*SMALL, *TWO, FEW, *overrides])
    reasons = {
        stage: directory.stale_reason(stage, stages.fingerprint(stage, recipe, directory))
        for stage in stages.names(deploy=False)
        if not stages.OF[stage].always
    }
    assert {stage for stage, reason in reasons.items() if reason} == redone, reasons


def test_more_samples_are_shown_without_training_and_without_a_new_export(there: RunDirectory) -> None:
    exported = there.done("export")
    again(there, FEW, "measure.samples=1", until="report")
    assert len(read_json(there.after / "measure.json")["tasks"]["stories"]["samples"]) == 1
    assert there.done("export") == exported and not there.epochs_again.exists()
    assert collect(there.root)["mixed"] == []


def test_a_lost_record_is_measured_again_without_training(there: RunDirectory) -> None:
    names, trained = ("dense/generations.json", "before/probe.jsonl"), there.done("train")
    for name in names:
        (there.root / name).unlink()
    again(there)
    assert all((there.root / name).exists() for name in names) and there.done("train") == trained


def test_an_adapter_that_is_gone_is_not_chosen_and_is_named(
    there: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(there.train / f"epoch-{3 - there.best()['epoch']}")
    again(there, MORE)
    assert "cannot be measured again and is not chosen from" in capsys.readouterr().err
    assert [each["epoch"] for each in there.best()["epochs"]] == [there.best()["epoch"]]


def test_a_measurement_that_was_stopped_goes_on(there: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    count: Callable[[list[Any]], int] = len
    measured, called = stage_work._measured_epoch, []

    def stopped_at_the_second(*words: Any) -> Any:
        called.append(1)
        if count(called) == 2:
            raise KeyboardInterrupt
        return measured(*words)

    monkeypatch.setattr(stage_work, "_measured_epoch", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        again(there, MORE)
    assert [each["epoch"] for each in read_jsonl(there.epochs_again)] == [1] and not there.best_again.exists()
    assert [epoch["items"]["stories"] for epoch in collect(there.root)["epochs"]] == [2, 2]
    again(there, MORE)
    assert count(called) == 3 and [each["epoch"] for each in read_jsonl(there.epochs_again)] == [1, 2]


def test_a_run_of_an_earlier_version_is_not_trained_again_for_what_that_noted_otherwise(whole: Path, tmp_path) -> None:
    there = RunDirectory(shutil.copytree(whole, tmp_path / whole.name))
    path = there.folder("train") / "DONE.json"
    stamp = read_json(path)
    dense = (there.done("dense") or {})["fingerprint"]
    del stamp["made"], stamp["digest"]
    stamp["fingerprint"] |= {"measure": dense["measure"], "probe.samples": 2}
    stamp["fingerprint"]["inputs"] = {**dense["inputs"], "/a/task.yaml": "a" * 64}
    stamp["fingerprint"]["stages"]["dense"] = "2026-01-01"
    path.write_text(json.dumps(stamp))
    recipe = load_recipe(QUICKSTART, [*SMALL, *TWO, MORE])
    assert there.stale_reason("train", stages.fingerprint("train", recipe, there)) is None
    stamp["fingerprint"]["train"]["lr"] = 7
    path.write_text(json.dumps(stamp))
    assert there.stale_reason("train", stages.fingerprint("train", recipe, there)) == "train.lr: 7 -> 0.01"
