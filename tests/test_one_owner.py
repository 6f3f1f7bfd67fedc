"""A stranger's files inside a run of ours, in all its folders: every command leaves each of them, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import strangers
from small_run import MASKED, QUICKSTART, SMALL, brief, finished
from typer.testing import CliRunner

from recover import cli
from recover.base import artifacts
from recover.config import recipe
from recover.export.gguf.write import write_gguf
from recover.models import source

MODEL = "embedded:fable-2m"
TINY = (*SMALL, *MASKED)
# Beside what a run writes, with names as near to ours as can be; a file of a folder that is published anew may move.
STAY = (
    *("notes.md", ".notes.tmp", ".x.1.tmp", ".recipe.yaml.tmp.txt", "recipe.yaml.bak", "RUN.json.old", "env.json.tmp"),
    *(".git/config", ".mine.replaced/photo.jpg", ".mine.writing/a", "src/.y.7.tmp", "deploy-copy/model.safetensors"),
    *("deploy.kept/from-before.txt", "plan/notes.txt", "plan/.mine.json.7.tmp", "report/mine.html", "trial/mine.json"),
    *("dense/mine.json", "dense/.x.json.7.tmp", "dense/measure.json.bak", "before/probe-copy.jsonl", "after/a/b.txt"),
    *("prune/plan-copy.json", "prune/.x.json.7.tmp", "prune/parts/part-x.safetensors", "prune/written-mine.txt"),
    *("train/epoch-best/a", "train/epoch-1-copy/adapter_model.safetensors", "train/epoch-one.json"),
    *("train/checkpoints/notes.txt", "train/checkpoints/checkpoint-best/a", "train/pruned_text/notes.json"),
    *("train/.mine.tmp/a", "train/data/mine.txt", "train/best.json.bak", "train/steps.jsonl.gz"),
)
MAY_MOVE = ("deploy/mine.txt", "deploy/below/photo.jpg", "deploy/.x.tmp", "train/epoch-1/mine.txt")


def call(*arguments: str | Path):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def copied(folder: Path, to: Path) -> Path:
    """A copy with the times of the files: a stage looks at size and time."""
    shutil.copytree(folder, to, symlinks=True)
    for path in to.rglob("*"):
        stat = (folder / path.relative_to(to)).lstat()
        if path.is_file():
            artifacts.os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return to


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a stranger's files in every folder of it and around it."""
    runs = tmp_path_factory.mktemp("one-owner")
    copied(finished(tmp_path_factory, *MASKED), runs / "quickstart")
    strangers.fill(runs / "quickstart", (*STAY, *MAY_MOVE))
    strangers.fill(runs, (".quickstart.writing/a", ".quickstart.7.tmp", "quickstart.kept/a", ".out.json.tmp", "out.md"))
    (runs / "text.jsonl").write_text(json.dumps({"text": "Olga carries 81 roses."}) + "\n")
    (runs / "prompts.jsonl").write_text(json.dumps({"prompt": "Olga carries 81 roses."}) + "\n")
    return runs


def theirs(runs: Path) -> dict[str, str]:
    """The digest of each of a stranger's files, by name; the name alone where it may have moved."""
    found = {}
    ours = {"quickstart/" + name for name in (*STAY, *MAY_MOVE)}
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs).as_posix()
        text = path.read_bytes() if path.is_file() else b""
        if text.startswith((b"theirs: ", b'{"theirs"')) or name in ours or ("/" not in name and path.is_file()):
            meant = text.decode().partition("theirs")[2].strip(': "}\n') or name
            found[meant if meant in MAY_MOVE else name] = hashlib.sha256(text).hexdigest()
    return found


def commands(runs: Path) -> dict[str, list[str | Path]]:
    """Every command, with every way to write that it has, on a run that is done."""
    run, out = runs / "quickstart", runs / "out"
    recipe_words = [QUICKSTART, "--runs", runs, *TINY]
    return {
        **{name: [name, *recipe_words] for name in ("plan", "prune", "probe", "train", "export", "run")},
        "run --fresh": ["run", *recipe_words, "train.lr=1e-3", "--fresh"],
        "report": ["report", run],
        "show": ["show", run],
        "compare": ["compare", run, "--html", out / "page.html"],
        "measure": ["measure", run / "deploy", "--tasks", "embedded:facts", "--limit", "1", "--out", out / "m.json"],
        "diagnose": [
            *("diagnose", MODEL, run / "deploy"),
            *("--prompts", runs / "prompts.jsonl", "--steps", "2", "--out", out / "diagnosis"),
        ],
        "teacher": ["teacher", MODEL, runs / "text.jsonl", out / "t.jsonl", "--top", "4", "--length", "16"],
        "families": ["families"],
        "quickstart": ["quickstart", "--runs", runs, *TINY],
        "init": ["init", MODEL, "--out", out / "my.yaml"],
        "list": ["list", runs],
        "doctor": ["doctor"],
        "gguf": ["gguf", run / "deploy", out / "model.gguf"],
    }


def test_every_command_is_walked() -> None:
    assert {words[0] for words in commands(Path("/x")).values()} == set(cli.COMMANDS)


@pytest.mark.parametrize("name", commands(Path("/x")))
def test_a_command_leaves_every_file_of_others_in_a_run_of_ours(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runs = copied(shared, tmp_path / "runs")
    home = strangers.fill(tmp_path / "home")
    monkeypatch.chdir(home)
    before, at_home = theirs(runs), strangers.contents(home)
    assert len(before) >= len(STAY) + len(MAY_MOVE)
    with brief():
        result = call(*commands(runs)[name])
    assert result.exit_code == 0, result.output
    assert theirs(runs) == before
    assert strangers.contents(home) == at_home


def test_a_cache_folder_that_holds_a_strangers_files_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = strangers.fill(
        tmp_path / "cache",
        ("gguf/.mine.writing/a", "gguf/.mine.7.writing/a", "gguf/.abc-4.7.writing/a", "gguf/big.gguf", "gguf/.x.lock"),
    )
    left = cache / "gguf" / f".{'0' * 64}-4.7.writing"  # of a conversion that was killed
    left.mkdir()
    before = strangers.contents(cache)
    monkeypatch.setenv("RECOVER_CACHE", str(cache))
    file = write_gguf(recipe.embedded("fable-2m"), tmp_path / "m.gguf")
    source.locate(recipe.Model(source=str(file)))
    after = strangers.contents(cache)
    assert not left.exists()
    assert {name: after.get(name) for name in before if name != left.relative_to(cache).as_posix()} == {
        name: held for name, held in before.items() if name != left.relative_to(cache).as_posix()
    }


def test_a_checkpoint_written_beside_a_strangers_files_takes_none_of_their_names(tmp_path: Path) -> None:
    from byte_tokenizer import byte_tokenizer
    from tiny import tiny

    from recover.export.write import write_checkpoint

    strangers.fill(tmp_path, (".model.writing/a", ".model.tmp/a", ".model.1.tmp", "model.kept/a"))
    before = strangers.contents(tmp_path)
    for _ in range(2):
        write_checkpoint(tiny(), byte_tokenizer(), tmp_path / "model", card="card", record={})
    after = {name: held for name, held in strangers.contents(tmp_path).items() if name.partition("/")[0] != "model"}
    assert after == before
