"""A run's record is true: what only looks changes nothing, and a report says what each stage was made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_run import build_run
from small_run import QUICKSTART, TEXT

from recover.base.artifacts import read_json
from recover.commands import run as commands
from recover.config.recipe import load_recipe
from recover.report.collect import collect
from recover.report.compare import compare
from recover.report.render import render
from recover.run import stages
from recover.run.directory import RunDirectory

VERSIONS = {"recover": "0.1.0", "versions": {"torch": "2.13.0", "transformers": "5.24.0"}, "machine": None}
DONE = ("dense", "prune", "before", "train", "after", "export")


def stamped(root: Path, **changes: dict[str, Any]) -> RunDirectory:
    """A finished run whose stages were made with one recipe; `changes` by stage: parts of its stamp."""
    run = RunDirectory(build_run(root))
    recipe = yaml.safe_load(run.recipe.read_text())
    times: dict[str, Any] = {}
    for stage in DONE:
        fields = {name: recipe[name] for name in stages.OF[stage].fields if name in recipe}
        inputs = {"/data/sums.jsonl": "a" * 64, "/data/model.safetensors": "70000000 bytes, changed 7"}
        marks = {**fields, "inputs": inputs, "stages": {name: times[name] for name in stages.OF[stage].reads}}
        change = changes.get(stage, {})
        run.mark_done(stage, {**marks, **change.get("fingerprint", {})}, {**VERSIONS, **change.get("made", {})})
        times[stage] = read_json(run.folder(stage) / "DONE.json")["finished"]
    return run


def contents(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in root.rglob("*")
    }


def test_a_run_of_one_recipe_is_not_mixed_and_says_what_each_stage_was_made_with(tmp_path: Path) -> None:
    run = stamped(tmp_path)
    data = collect(run.root)
    assert data["mixed"] == []
    assert [stage["stage"] for stage in data["made"]] == list(DONE)
    dense = data["made"][0]
    assert dense["recipe"]["model"] == {"source": "embedded:model", "dtype": "float32"} and dense["differs"] == []
    assert dense["versions"] == {"recover": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"}
    assert dense["inputs"]["/data/sums.jsonl"] == "a" * 64
    render(run.root, data)
    for page in (run.report_md, run.report_html):
        text = page.read_text()
        assert "aaaaaaaaaaaa" in text and "a" * 13 not in text.replace("&#", "")
        assert "torch 2.13.0, transformers 5.24.0" in text and "do not belong together" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"after": {"fingerprint": {"prune": {"kind": "depth", "count": 7, "score": "kl"}}}},
            "Stage after was made with another recipe than recipe.yaml has now (prune.count: 7, and 4 in recipe.yaml).",
        ),
        (
            {stage: {"fingerprint": {"seed": 3}} for stage in DONE},
            "Stage dense, prune, before, train, after and export was made with another recipe than recipe.yaml has "
            "now (seed: 3, and 0 in recipe.yaml).",
        ),
        (
            {"after": {"fingerprint": {"stages": {"dense": "2020-01-01", "prune": None, "train": None}}}},
            "Stage after was made from an earlier dense, which was done again since.",
        ),
        (
            {"after": {"fingerprint": {"inputs": {"/data/sums.jsonl": "b" * 64}}}},
            "/data/sums.jsonl was changed within this run: dense, prune, before, train and export read one, and "
            "after another.",
        ),
        (
            {"export": {"made": {"versions": {"torch": "2.14.0", "transformers": "5.24.0"}}}},
            "Stages were made with different versions of torch (2.13.0: dense, prune, before, train and after; "
            "2.14.0: export).",
        ),
    ],
)
def test_what_is_mixed_is_said_aloud_by_every_reader(tmp_path: Path, capsys, changes, said) -> None:
    run = stamped(tmp_path, **changes)
    data = collect(run.root)
    assert data["mixed"] == [said]
    assert compare([run.root])["apart"] == [f"tiny-drop4: {said}"]
    commands.report([run.root])
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown
    assert said in run.report_md.read_text() and said.split(" (")[0] in run.report_html.read_text()


def test_a_stamp_of_an_earlier_version_says_what_it_knows(tmp_path: Path) -> None:
    run = stamped(tmp_path)
    path = run.folder("dense") / "DONE.json"
    old = {key: value for key, value in read_json(path).items() if key not in ("made", "digest")}
    path.write_text(json.dumps(old))
    data = collect(run.root)
    assert data["made"][0]["versions"] == {"recover": None} and data["mixed"] == []


def test_a_plan_writes_nothing_neither_into_a_finished_run_nor_anew(tmp_path: Path, capsys) -> None:
    stamped(tmp_path)
    before = contents(tmp_path)
    changed = load_recipe(QUICKSTART, ["name=tiny-drop4", "prune.count=3", "measure.limit=2"])
    stages.run(changed, tmp_path, until="plan")
    assert contents(tmp_path) == before
    shown = " ".join(capsys.readouterr().out.split())
    assert "what a run would do" in shown and "prune.count: 4 -> 3" in shown
    stages.run(load_recipe(QUICKSTART, [*TEXT, "name=new", "measure.limit=2"]), tmp_path, until="plan")
    assert not (tmp_path / "new").exists()


def test_show_and_compare_write_nothing(tmp_path: Path) -> None:
    run = stamped(tmp_path)
    run.recipe.write_text(QUICKSTART.read_text().replace("quickstart", "tiny-drop4"))
    before = contents(tmp_path)
    commands.show(run.root)
    commands.compare([run.root])
    assert contents(tmp_path) == before


def test_a_run_in_the_hands_of_another_process_can_be_planned(tmp_path: Path) -> None:
    run = stamped(tmp_path)
    with run.lock():
        stages.run(load_recipe(QUICKSTART, ["name=tiny-drop4", "measure.limit=2"]), tmp_path, until="plan")
