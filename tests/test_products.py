"""A stage is done while the files that it wrote are there as they were written; what reads a checkpoint checks it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import MASKED, QUICKSTART, SMALL, brief, finished
from typer.testing import CliRunner

from recover import cli
from recover.base import products
from recover.base.artifacts import read_json, write_manifest
from recover.base.errors import ArtifactError
from recover.run import stages
from recover.run.directory import RunDirectory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory, *MASKED)


@pytest.fixture
def there(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "runs" / whole.name)


def flip(path: Path) -> None:
    """One bit of the last byte, with size and time as before."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def states(root: Path) -> dict[str, str | None]:
    return {row["stage"]: row["stale"] for row in stages.status(root)}


def call(*arguments: str | Path):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def again(root: Path):
    with brief():
        return call("run", QUICKSTART, "--runs", root.parent, *SMALL, *MASKED)


def test_an_untouched_copy_is_done(there: Path) -> None:
    assert set(states(there).values()) == {None}
    finished = read_json(there / "train" / "DONE.json")["finished"]
    assert again(there).exit_code == 0
    assert read_json(there / "train" / "DONE.json")["finished"] == finished


FILES = [
    ("dense", "dense/generations.json"),
    ("dense", "dense/measure.json"),
    ("prune", "prune/plan.json"),
    ("prune", "prune/masks.safetensors"),
    ("before", "before/probe.jsonl"),
    ("train", "train/best.json"),
    ("train", "train/epoch-1/adapter_model.safetensors"),
    ("train", "epochs.jsonl"),
    ("after", "after/measure.json"),
    ("export", "deploy/model.safetensors"),
    ("export", "deploy/config.json"),
    ("export", "deploy/MANIFEST.json"),
    ("export", "verify.json"),
    ("export", "speed.json"),
]


@pytest.mark.parametrize(("stage", "name"), FILES)
@pytest.mark.parametrize(("change", "word"), [(Path.unlink, products.GONE), (flip, products.CHANGED)])
def test_a_stage_whose_file_went_lost_is_not_done(
    there: Path, stage: str, name: str, change: Callable[[Path], None], word: str
) -> None:
    change(there / name)
    assert states(there)[stage] == f"{name} {word}"
    said = call("report", there).stderr
    assert f"{name} {word}" in said and f"--from {stage}" in said


@pytest.mark.parametrize(("stage", "name"), FILES[2:4] + FILES[5:8])
def test_training_is_not_done_again_for_a_lost_file_without_a_word(there: Path, stage: str, name: str) -> None:
    before = (there / "train" / "DONE.json").read_bytes()
    (there / name).unlink()
    done = again(there)
    assert done.exit_code == 1
    assert f"{name} is gone" in done.stderr and f"--from {stage}" in done.stderr
    assert (there / "train" / "DONE.json").read_bytes() == before


def test_a_damaged_checkpoint_is_written_again_and_nothing_before(there: Path) -> None:
    after = (there / "after" / "DONE.json").read_bytes()
    right = (there / "deploy" / "model.safetensors").read_bytes()
    flip(there / "deploy" / "model.safetensors")
    done = again(there)
    assert done.exit_code == 0, done.output
    assert "export, again: deploy/model.safetensors is not what was written" in done.output
    assert (there / "deploy" / "model.safetensors").read_bytes() == right
    assert (there / "after" / "DONE.json").read_bytes() == after


def test_what_reads_a_checkpoint_of_ours_checks_every_byte_of_it(there: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Olga carries 81 roses."}) + "\n")
    deploy = there / "deploy"
    readers = {
        "gguf": ["gguf", deploy, tmp_path / "out.gguf"],
        "measure": ["measure", deploy, "--tasks", "embedded:facts", "--limit", "2"],
        "diagnose": ["diagnose", "embedded:fable-2m", deploy, "--prompts", prompts, "--out", tmp_path / "drift"],
    }
    (deploy / "README.md").write_text("my own words")
    (deploy / "mine.txt").write_text("my own file")
    assert call(*readers["gguf"]).exit_code == 0
    flip(deploy / "model.safetensors")
    for words in readers.values():
        done = call(*words)
        assert done.exit_code == 1, done.output
        assert "model.safetensors: is not what was written" in done.stderr
        assert "--from export" in done.stderr and "delete MANIFEST.json" in done.stderr
    (deploy / "MANIFEST.json").unlink()
    assert call(*readers["gguf"]).exit_code == 0


SHOWN = ["env.json", "plan/estimate.json", "plan/overlap.json", "train/steps.jsonl"]


@pytest.mark.parametrize("name", SHOWN)
def test_a_file_that_is_shown_and_that_no_stage_reads_is_named(there: Path, name: str) -> None:
    path = there / name
    path.write_text(path.read_text() + " ")
    for command in ("show", "report"):
        assert f"{name} is not what was written" in call(command, there).stderr
    assert set(states(there).values()) == {None}
    training = (there / "train" / "DONE.json").read_bytes()
    assert again(there).exit_code == 0
    assert (there / "train" / "DONE.json").read_bytes() == training
    assert ("is not what was written" in call("show", there).stderr) == (name == "train/steps.jsonl")


@pytest.mark.parametrize("stage", ["dense", "prune", "train", "after", "deploy"])
def test_a_stamp_with_another_bit_is_named_and_nothing_is_done_for_it(there: Path, stage: str) -> None:
    path = there / stage / "DONE.json"
    path.write_text(path.read_text().replace("tokenizer", "tokenizes", 1))  # an input that nobody reads any more
    for words in (["show", there], ["report", there], ["run", there / "recipe.yaml", "--runs", there.parent]):
        done = call(*words)
        assert done.exit_code == 1 and f"{path}: is not what was written" in done.stderr, done.output


def test_an_edited_card_leaves_the_export_done(there: Path) -> None:
    (there / "deploy" / "README.md").write_text("my own words")
    assert states(there)["export"] is None


def test_large_files_are_known_by_size_and_time_unless_every_byte_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "ALWAYS_HASHED", 10)
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "plan.json").write_text("{'a': 'long plan'}")
    directory = RunDirectory(tmp_path)
    directory.mark_done("prune", {})
    flip(tmp_path / "prune" / "plan.json")
    assert directory.lost("prune") is None
    entries = read_json(tmp_path / "prune" / "DONE.json")["files"]
    assert products.lost(tmp_path, entries, every_byte=True) == "prune/plan.json is not what was written"
    os.utime(tmp_path / "prune" / "plan.json", (1, 1))
    assert directory.lost("prune") == "prune/plan.json is not what was written"


def test_a_stamp_of_an_earlier_version_lists_no_files_and_is_as_good(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.mark_done("dense", {})
    stamp = read_json(tmp_path / "dense" / "DONE.json")
    del stamp["files"], stamp["digest"]
    (tmp_path / "dense" / "DONE.json").write_text(json.dumps(stamp))
    assert directory.lost("dense") is None and directory.stale_reason("dense", {}) is None


def test_a_missing_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"x\.json: no such file.*--from STAGE"):
        read_json(tmp_path / "x.json")


def test_a_folder_of_others_with_a_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    write_manifest(tmp_path)
    products.check_checkpoint(tmp_path, "mend")
    (tmp_path / "a.json").write_text("{ }")
    with pytest.raises(ArtifactError, match=r"a\.json: is not what was written.*: mend"):
        products.check_checkpoint(tmp_path, "mend")
    (tmp_path / "MANIFEST.json").write_text('{"files": ["a.json"]}')
    products.check_checkpoint(tmp_path, "mend")
