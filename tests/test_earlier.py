"""Recipes and runs that say `recover` where it is `train` now: read with a word, and nothing is trained again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import MASKED, QUICKSTART, SMALL, finished, run

from recover.base import earlier
from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import RecipeError
from recover.commands import run as commands
from recover.config.recipe import dump_recipe, load_recipe
from recover.report.collect import collect
from recover.report.compare import compare
from recover.run import stage_work, stages
from recover.run.directory import RunDirectory

WORD = "'recover' is called 'train' now"


def before(value: Any, key: str = "") -> Any:
    """What an earlier version wrote in place of this: a stage, a field, the name of a file, and keys that are these."""
    if isinstance(value, dict):
        return {_name(name): each if name in ("made", "recipe") else before(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [before(each) for each in value]
    return _name(value) if key in ("stage", "field") else value


def _name(value: str) -> str:
    return re.sub(r"^train(?=$|/|\.data)", "recover", value)


def without_digest(value: Any) -> Any:
    """As stamps of earlier versions are."""
    return {key: inner for key, inner in value.items() if key != "digest"} if isinstance(value, dict) else value


def as_before(root: Path) -> Path:
    """Make of a run what the version before the new name would have left."""
    (root / "train").rename(root / "recover")
    recipe = root / "recipe.yaml"
    recipe.write_text(re.sub(r"^train:", "recover:", recipe.read_text(), flags=re.MULTILINE))
    for path in [*root.glob("*/DONE.json"), *root.glob("more/*.json"), root / "plan" / "overlap.json"]:
        path.write_text(json.dumps(without_digest(before(read_json(path)))))
    lines = [json.dumps(before(line)) for line in read_jsonl(root / "times.jsonl")]
    (root / "times.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return root


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier, "_said", set())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = shutil.copytree(finished(tmp_path_factory, *MASKED), tmp_path_factory.mktemp("whole") / "quickstart")
    stamps = {stage: read_json(root / stage / "DONE.json")["finished"] for stage in ("prune", "train")}
    (root / "more").mkdir()
    later = {
        "task": "later",
        "stages": stamps,
        "epoch": read_json(root / "train" / "best.json")["epoch"],
        "models": {},
    }
    (root / "more" / "later.json").write_text(json.dumps(later))
    return root


@pytest.fixture
def old(whole: Path, tmp_path: Path) -> Path:
    return as_before(shutil.copytree(whole, tmp_path / "runs" / whole.name))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever trains is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(stage_work.training, "train", refuse)


def test_what_is_called_a_run_of_before_is_one(old: Path) -> None:
    stamp = read_json(old / "recover" / "DONE.json")
    assert stamp["stage"] == "recover" and "recover/best.json" in stamp["files"] and "recover" in stamp["fingerprint"]
    assert "recover" in read_json(old / "after" / "DONE.json")["fingerprint"]["stages"]
    assert "\nrecover:\n" in (old / "recipe.yaml").read_text() and not (old / "train").exists()


def test_every_stage_of_it_is_done_and_training_stays(old: Path, untrained: None, capsys) -> None:
    assert {row["stage"]: row["stale"] for row in stages.status(old)} == dict.fromkeys(stages.names(deploy=False))
    stamps = {path: path.read_bytes() for path in old.glob("*/DONE.json") if path.parent.name not in ("plan", "report")}
    run(old.parent, *MASKED)
    assert {path: path.read_bytes() for path in stamps} == stamps and not (old / "train").exists()
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count(WORD) == 1 and f"{old / 'recipe.yaml'}: {WORD}" in shown


def test_a_field_that_came_later_makes_nothing_stale_unless_it_is_set(old: Path, untrained: None) -> None:
    """In stamps of before, and in what a report says of them: as if its default had been written."""
    for path in old.glob("*/DONE.json"):
        stamp = read_json(path)
        for section, field in (("recover", "weight_decay"), ("prune", "sparsity"), ("measure", "max_new_tokens")):
            stamp["fingerprint"].get(section, {}).pop(field, None)
        path.write_text(json.dumps(without_digest(stamp)))
    states = {row["stage"]: row["stale"] for row in stages.status(old)}
    asked = "max_new_tokens: 128 -> 8"  # neither what is set otherwise now, nor what has no default, is passed over
    assert asked in str(states["dense"]) and "prune.sparsity: absent -> 0.4" in str(states["prune"])
    assert "weight_decay" not in str(states)
    assert "weight_decay" not in " ".join(collect(old)["mixed"])
    recipe = load_recipe(old / "recipe.yaml", ["train.weight_decay=0.5"])
    directory = RunDirectory(old)
    assert "train.weight_decay: 0.0 -> 0.5" in str(
        directory.stale_reason("train", stages.fingerprint("train", recipe, directory))
    )


def test_stages_after_training_read_its_folder(old: Path, untrained: None) -> None:
    run(old.parent, *MASKED[:-1], "measure.limit=4", until="after")
    assert RunDirectory(old).done("after") is not None and not (old / "train").exists()
    assert RunDirectory(old).best_again.exists()  # the epochs were measured again, from their adapters


def test_a_finished_training_goes_on_in_its_folder(old: Path, capsys) -> None:
    run(old.parent, *MASKED, "recover.tokens=1200", until="recover")
    assert "train.tokens: 600 -> 1200" in " ".join(capsys.readouterr().out.split())
    assert len(read_json(old / "recover" / "training.json")["parts"]) == 2 and not (old / "train").exists()
    assert RunDirectory(old).done("train") is not None and RunDirectory(old).lost("train") is None


def test_reports_of_it_say_the_same(old: Path, whole: Path, tmp_path: Path, capsys) -> None:
    new = shutil.copytree(whole, tmp_path / whole.name)
    assert collect(old) == collect(new) and collect(old)["mixed"] == [] and collect(old)["curve"] is not None
    assert collect(old)["measured_later"] == ["later"]
    assert compare([old])["runs"] == compare([new])["runs"]
    capsys.readouterr()
    commands.show(old)
    shown = capsys.readouterr().out
    assert " train " in shown and " open " not in shown and " stale " not in shown
    commands.report([old])
    assert "| train |" in (old / "report.md").read_text()


def test_a_lost_file_of_it_is_named_and_nothing_is_trained_for_it(old: Path) -> None:
    (old / "recover" / "best.json").unlink()
    assert RunDirectory(old).lost("train") == "recover/best.json is gone"


def test_an_older_recipe_and_older_overrides_are_the_same_recipe(tmp_path: Path, capsys) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(re.sub(r"^train:", "recover:", QUICKSTART.read_text(), flags=re.MULTILINE))
    new = load_recipe(QUICKSTART, [*SMALL, "train.lr=1e-3"])
    assert capsys.readouterr().err == ""
    old = load_recipe(path, [*(each.replace("train.", "recover.") for each in SMALL), "recover.lr=1e-3"])
    assert old == new and "\ntrain:\n" in dump_recipe(old)
    assert " ".join(capsys.readouterr().err.split()).count(WORD) == 1
    with pytest.raises(RecipeError, match=r"override 'recover\.lr=-1': train\.lr: found -1"):
        load_recipe(path, ["recover.lr=-1"])


def test_a_recipe_with_both_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(QUICKSTART.read_text() + "recover:\n  tokens: 5\n")
    with pytest.raises(RecipeError, match=r"both\.yaml: found 'train' and 'recover', which is what 'train' was called"):
        load_recipe(path)


def test_a_stage_goes_by_both_names(tmp_path: Path, capsys) -> None:
    with pytest.raises(RecipeError, match="no stage 'recovers'"):
        run(tmp_path, until="recovers")
    run(tmp_path, until="plan", start="recover")
    assert f"stage: {WORD}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mine", ["recover/notes.txt", "train/notes.txt"])
def test_a_folder_of_somebody_else_is_no_training(mine: str, old: Path, tmp_path: Path) -> None:
    """By what lies in it, not by its name."""
    for root, where in ((tmp_path / "new", "train"), (old, "recover")):
        (root / mine).parent.mkdir(parents=True, exist_ok=True)
        (root / mine).write_text("mine")
        assert RunDirectory(root).train == root / where
