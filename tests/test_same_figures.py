"""The recorder of figures: it reads what a run wrote, leaves out what is no figure, and names each that changed."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def same_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "dev"))
    import same_figures

    return same_figures


def write_run(root, *, recovery="recover", weight=1.0, kl=0.25, seconds=3.0):
    """Some files of a run directory, and of those that are not on record."""
    (root / recovery / "checkpoints").mkdir(parents=True)
    (root / "deploy").mkdir()
    save_file({"a": torch.full((2, 3), weight), "b": torch.zeros(2)}, root / "deploy" / "model.safetensors")
    save_file({"a": torch.rand(3)}, root / "expected.safetensors")
    steps = [{"step": step, "loss": 1 / step, "kl": kl, "seconds": seconds} for step in (1, 2)]
    (root / recovery / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (root / recovery / "DONE.json").write_text(json.dumps({"finished": str(seconds)}))
    report = {"epochs": [{"score": 0.5}], "times": [seconds], "folder": str(root), "made": [{"stage": recovery}]}
    (root / "report.json").write_text(json.dumps({**report, "overlap": [{"field": f"{recovery}.data.0"}]}))


def recorded(same_figures, root):
    found = same_figures.without(str(root), same_figures.figures(root))
    return json.loads(json.dumps({"made": {"checkout": root.name, "only": ""}, "jobs": {"job": found}}))


def test_runs_that_differ_in_times_places_and_names_of_folders_are_the_same(same_figures, tmp_path, capsys):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", recovery="train", seconds=4.0)
    one, two = (recorded(same_figures, tmp_path / name) for name in ("one", "two"))
    assert sorted(one["jobs"]["job"]) == ["deploy/model.safetensors", "recover/steps.jsonl", "report.json"]
    assert one["jobs"] == two["jobs"]
    assert same_figures.compare(one, two, 10) == 0
    # Two tensors, two steps of three figures, a score, a folder, a stage and a field.
    assert "one and two: 0 of 12 figures of 1 jobs differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"kl": math.nextafter(0.25, 1)}, "job > recover/steps.jsonl > 0 > kl: 0.25 -> 0.25000000000000006"),
        ({"weight": 1 + 2**-23}, "job > deploy/model.safetensors > a: 'F32 [2, 3] "),
    ],
)
def test_a_figure_that_changed_in_its_last_bit_is_named(same_figures, tmp_path, capsys, changed, line):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", **changed)
    assert same_figures.compare(*(recorded(same_figures, tmp_path / name) for name in ("one", "two")), 10) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(line)
    assert len(said) == 1 + (2 if "kl" in changed else 1)


def test_what_one_side_has_alone_differs(same_figures, tmp_path, capsys):
    write_run(tmp_path / "one")
    old = recorded(same_figures, tmp_path / "one")
    new = copy.deepcopy(old)
    del new["jobs"]["job"]["recover/steps.jsonl"][1]
    new["jobs"]["more"] = {"failed": 1}
    assert same_figures.compare(old, new, 10) == 1
    said = capsys.readouterr().out
    assert "job > recover/steps.jsonl > 1 > loss: 0.5 -> nothing" in said
    assert "more > failed: nothing -> 1" in said


def test_a_part_is_compared_with_its_like_and_nothing_is_not_the_same(same_figures, tmp_path, capsys):
    write_run(tmp_path / "one")
    old = recorded(same_figures, tmp_path / "one")
    old["jobs"]["other"] = {"kl": 1.0}
    part = {"made": {"checkout": "part", "only": "job"}, "jobs": {"job": old["jobs"]["job"]}}
    assert same_figures.compare(old, part, 10) == 0
    assert same_figures.compare(old, {"made": {"checkout": "part", "only": "none"}, "jobs": {}}, 10) == 1
    assert "0 of 0 figures of 0 jobs" in capsys.readouterr().out


def test_no_family_meets_a_kind_of_pruning_twice_and_none_is_left_out(same_figures):
    from same_figures_jobs import CHANGES, CHECKPOINTS, KINDS, TRAININGS
    from tiny import FAMILIES

    met = {(n % len(FAMILIES), n % len(KINDS)) for n in range(CHECKPOINTS)}
    assert len(met) == CHECKPOINTS >= max(len(FAMILIES), len(KINDS), len(TRAININGS))
    assert set(CHANGES) <= set(KINDS)
