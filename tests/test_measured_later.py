"""`recover measure`: of a checkpoint, with options as in a recipe; of a run, tasks beside those of its recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from small_run import run
from tiny import tiny
from typer.testing import CliRunner

from recover import cli
from recover.base.artifacts import read_json
from recover.config.recipe import Measure
from recover.report.collect import collect
from recover.run.directory import RunDirectory

ONE = (
    *("prune={kind: depth, blocks: [3]}", "train.epochs=1", "probe.sublayers=false", "measure.limit=2"),
    *("measure.tasks=[embedded:facts]", "probe.prompts=embedded:tasks/prompts.jsonl"),
)
MORE = "name: {name}\nkind: generate\ndata: rows.jsonl\nprompt: '{{question}}'\n"


def call(*arguments: object):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), *ONE, until="after").root


@pytest.fixture
def there(whole: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(whole, tmp_path / whole.name))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": f"Olga has {n} roses.", "answer": str(n), "text": f"Olga has {n} roses."} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("roses", "facts"):
        (tmp_path / f"{name}.yaml").write_text(MORE.format(name=name))
    (tmp_path / "words.yaml").write_text("name: words\nkind: perplexity\ndata: rows.jsonl\n")
    return tmp_path


def test_a_task_is_added_to_a_finished_run_without_training(there: RunDirectory, tasks: Path) -> None:
    stamps = {stage: there.done(stage) for stage in ("dense", "prune", "before", "train", "after")}
    before: Any = collect(there.root)
    done = call("measure", there.root, "--tasks", tasks / "roses.yaml", tasks / "words.yaml", "--limit", 3)
    assert done.exit_code == 0, done.output
    assert {stage: there.done(stage) for stage in stamps} == stamps
    data = read_json(there.report_json)
    row = next(row for row in data["measures"] if row["task"] == "roses" and row["main"])
    assert all(row[model] is not None for model in ("dense", "pruned", "recovered")) and row["items"] == 3
    agreement = next(row for row in data["measures"] if row["task"] == "roses" and row["key"] == "agreement")
    assert agreement["dense"] is None and agreement["pruned"] is not None
    # The recipe measured choice alone: its verdict stays, and uses that nobody measured are measured now.
    for model in ("dense", "pruned", "recovered"):
        assert data["headline"][model]["choice"] == before["headline"][model]["choice"]
        assert before["headline"][model]["generation"] is None
        assert data["headline"][model]["generation"]["tasks"] == ["roses"]
        assert before["headline"][model]["perplexity"] is None and data["headline"][model]["perplexity"] > 1
    assert data["measured_later"] == ["roses", "words"] and data["mixed"] == []
    assert any("Measured later" in line and "roses, words" in line for line in data["limits"])
    record = read_json(there.more / "roses.json")
    assert record["settings"]["max_new_tokens"] == 8 and record["settings"]["limit"] == 3
    assert str(tasks / "rows.jsonl") in record["inputs"] and record["environment"]["versions"]["torch"]
    # The same figures as by a checkpoint of its own.
    alone = call(
        "measure", "embedded:fable-2m", "--tasks", tasks / "roses.yaml", "--limit", 3, "--out", tasks / "o.json"
    )
    assert alone.exit_code == 0, alone.output
    assert read_json(tasks / "o.json")["tasks"]["roses"]["exact_match"] == record["models"]["dense"]["exact_match"]


def test_what_was_measured_on_an_earlier_recovery_is_left_out_and_named(there: RunDirectory, tasks: Path) -> None:
    assert call("measure", there.root, "--tasks", tasks / "words.yaml", "--limit", 1).exit_code == 0
    path = there.folder("train") / "DONE.json"
    stamp = {key: value for key, value in read_json(path).items() if key != "digest"}
    path.write_text(json.dumps({**stamp, "finished": "2030-01-01T00:00:00"}))
    data = collect(there.root)
    assert data["measured_later"] == [] and "words" not in {row["task"] for row in data["measures"]}
    assert any(line.startswith("Task words was measured later, on an earlier state") for line in data["mixed"])


def test_what_cannot_be_added_is_refused_before_a_model_is_read(there: RunDirectory, tasks: Path) -> None:
    said = call("measure", there.root, "--tasks", tasks / "facts.yaml")
    assert said.exit_code == 2 and "measures a task of the name 'facts' already" in said.stderr
    said = call("measure", there.root, "--tasks", tasks / "roses.yaml", "--dtype", "bfloat16")
    assert said.exit_code == 2 and "--dtype" in said.stderr and "is a run directory" in said.stderr
    said = call("measure", there.root, "--tasks", tasks / "roses.yaml", tasks / "roses.yaml")
    assert "--tasks: more than one task is called 'roses'" in said.stderr
    said = call("measure", there.root, "--tasks", tasks / "gone.yaml")
    assert "gone.yaml" in said.stderr and "no such file" in said.stderr.lower()
    recipe = there.recipe.read_text()
    there.recipe.write_text(recipe.replace("seed: 0", "seed: 7"))
    said = call("measure", there.root, "--tasks", tasks / "roses.yaml")
    assert said.exit_code == 1 and "stage prune is not of what it would be made from now (seed: 0 -> 7)" in said.stderr
    assert not there.more.exists()


def test_a_run_that_is_not_trained_yet_has_two_models(there: RunDirectory, tasks: Path) -> None:
    there.unmark("train")
    done = call("measure", there.root, "--tasks", tasks / "words.yaml", "--limit", 1)
    assert done.exit_code == 0, done.output
    assert list(read_json(there.more / "words.json")["models"]) == ["dense", "pruned"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model with a context of 64 and no tokenizer of its own, and one for it elsewhere."""
    tiny("llama", max_position_embeddings=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path


def measured(small: Path, tasks: Path, *options: object):
    return call("measure", small / "model", "--tokenizer", small / "words", "--tasks", tasks / "roses.yaml", *options)


def test_a_tokenizer_may_be_named_and_texts_are_fitted_to_the_context(small: Path, tasks: Path) -> None:
    done = measured(small, tasks, "--out", small / "out.json")
    assert done.exit_code == 0, done.output
    room = 64 - len("Olga has 0 roses.")
    assert f"texts are written to {room} tokens at most" in " ".join(done.output.split())
    settings = read_json(small / "out.json")["settings"]
    assert settings["max_new_tokens"] == room
    named = {"max_new_tokens": room, "tasks": settings["tasks"], "sampling": None}
    assert settings == Measure.model_validate({**settings, **named}).model_dump(mode="json")


def test_what_is_asked_for_is_not_changed_but_refused(small: Path, tasks: Path) -> None:
    done = measured(small, tasks, "--max-new-tokens", 60)
    assert done.exit_code == 1 and "exceeds the model's context of 64" in done.stderr
    assert call("measure", small / "model", "--tasks", tasks / "roses.yaml").exit_code == 1
    done = measured(small, tasks, "--attention", "flash")
    assert done.exit_code == 2 and "--attention: found 'flash'" in done.stderr


def test_defaults_are_those_of_a_recipe(tasks: Path) -> None:
    out = tasks / "o.json"
    assert call("measure", "embedded:fable-2m", "--tasks", tasks / "words.yaml", "--out", out).exit_code == 0
    plain = Measure(tasks=(str(tasks / "words.yaml"),), sampling=None).model_dump(mode="json")
    assert read_json(out)["settings"] == plain and plain["max_new_tokens"] == 128
