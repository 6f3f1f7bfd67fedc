"""What recover did not write it does not remove or replace: not in a folder of others, nor in one of its own."""

import json
from pathlib import Path

import pytest
import strangers
import torch
from byte_tokenizer import byte_tokenizer
from tiny import tiny
from typer.testing import CliRunner

from recover import cli
from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.base.products import begin_diagnosis, is_diagnosis
from recover.config.recipe import dump_recipe, load_recipe
from recover.export.write import write_checkpoint
from recover.run.directory import RunDirectory
from recover.train.checkpoints import Asked, Checkpoints, begin, discard_texts, note

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
MODEL = "embedded:fable-2m"


def call(*arguments: str | Path):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = strangers.fill(tmp_path / "runs" / "theirs")
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(QUICKSTART, ["name=theirs"])))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Olga carries 81 roses."}) + "\n")
    return folder


def commands(folder: Path) -> dict[str, list[str | Path]]:
    """Every command of the program, aimed at the folder."""
    recipe, there = folder / "recipe.yaml", ["--runs", folder.parent]
    prompts = ["--prompts", folder / "prompts.jsonl"]
    return {
        **{name: [name, recipe, *there] for name in ("plan", "run", "prune", "probe", "train", "export")},
        "run --fresh": ["run", recipe, *there, "--fresh"],
        "report": ["report", folder],
        "show": ["show", folder],
        "compare": ["compare", folder],
        "measure": ["measure", MODEL, "--tasks", folder / "prompts.jsonl", "--out", folder / "prompts.jsonl"],
        "diagnose": ["diagnose", MODEL, MODEL, *prompts, "--out", folder],
        "teacher": ["teacher", MODEL, folder / "prompts.jsonl", folder / "prompts.jsonl"],
        "families": ["families"],
        "quickstart": ["quickstart", "--runs", folder.parent, "name=theirs"],
        "init": ["init", MODEL, "--out", recipe],
        "list": ["list", folder],
        "doctor": ["doctor"],
        "gguf": ["gguf", folder / "deploy", folder / "deploy" / "model.safetensors"],
    }


def test_every_command_is_tried() -> None:
    assert {words[0] for words in commands(Path("/x")).values()} == set(cli.COMMANDS)


@pytest.mark.parametrize("name", commands(Path("/x")))
def test_no_command_changes_a_byte_of_a_folder_of_others(foreign: Path, name: str) -> None:
    before = strangers.contents(foreign.parent)
    result = call(*commands(foreign)[name])
    assert strangers.contents(foreign.parent) == before
    if name not in ("show", "compare", "families", "doctor"):  # which only read
        assert result.exit_code in (1, 2) and "Error" not in result.output, result.output


@pytest.mark.parametrize("only", [("recipe.yaml",), ("env.json", "recipe.yaml"), (".x.1.tmp",), (".lock",)])
def test_a_folder_that_only_looks_a_bit_like_a_run_is_refused(tmp_path: Path, only: tuple[str, ...]) -> None:
    folder = strangers.fill(tmp_path / "mine", only)
    before = strangers.contents(folder)
    with pytest.raises(ArtifactError, match=r"mine: found .*, and nothing that says that this is a run of ours"):
        with RunDirectory(folder).lock():
            pass
    assert strangers.contents(folder) == before


def test_a_new_an_empty_and_an_interrupted_folder_are_taken(tmp_path: Path) -> None:
    for name in ("new", "empty", "interrupted"):
        folder = tmp_path / name
        if name != "new":
            folder.mkdir()
        if name == "interrupted":
            (folder / ".lock").write_text("4711\n")
            (folder / ".RUN.json.4711.tmp").write_text("{")
        with RunDirectory(folder).lock():
            assert (folder / "RUN.json").is_file()
        assert RunDirectory(folder).is_run
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "RUN.json"]


@pytest.mark.parametrize("stage", ["plan", "dense", "export"])
def test_a_run_of_an_earlier_version_is_known_by_its_stamps(tmp_path: Path, stage: str) -> None:
    run = RunDirectory(tmp_path / "old")
    run.mark_done(stage, {"seed": 0})
    run.recipe.write_text("name: old\n")
    with run.lock():
        assert (run.root / "RUN.json").is_file()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    with RunDirectory(tmp_path / "run").lock():
        pass
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").symlink_to(target)
    with pytest.raises(ArtifactError), RunDirectory(tmp_path / "run").lock():
        pass
    assert target.read_text() == "precious"


def test_files_of_others_in_a_run_of_ours_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.lock():
        pass
    theirs = (
        "notes.tmp",
        ".notes.tmp",
        ".x.12.tmp",
        "src/.y.tmp",
        ".src.replaced/z",
        "train/.mine.tmp",
        "prune/a.tmp",
    )
    strangers.fill(tmp_path, theirs)
    strangers.fill(tmp_path, (".recipe.yaml.12.tmp", "train/.epoch-2.tmp/a", "prune/.plan.json.9.tmp"))
    before = strangers.contents(tmp_path)
    with run.lock():
        pass
    left = {name for name in strangers.contents(tmp_path) if name != ".lock"}
    gone = {".recipe.yaml.12.tmp", "train/.epoch-2.tmp", "train/.epoch-2.tmp/a", "prune/.plan.json.9.tmp"}
    assert before.keys() - left - {".lock"} == gone


def published(folder: Path, **files: str) -> Path:
    beside = folder.with_name("new")
    for name, text in files.items():
        artifacts.write_text(beside / name, text)
    artifacts.publish(beside, folder, keep_edited=True)
    return folder


def test_files_of_others_in_a_replaced_folder_are_kept_beside_it(tmp_path: Path, capsys) -> None:
    deploy = published(tmp_path / "deploy", card="a", config="b")
    (deploy / "mine.txt").write_text("mine")
    (deploy / "below").mkdir()
    (deploy / "below" / "photo").write_text("photo")
    (deploy / "card").write_text("edited")
    published(deploy, card="c", config="d")
    artifacts.check_manifest(deploy)
    assert (deploy / "card").read_text() == "c"
    kept = strangers.contents(tmp_path / "deploy.kept")
    assert kept == {"mine.txt": b"mine", "below": b"", "below/photo": b"photo", "card": b"edited"}
    said = " ".join(capsys.readouterr().err.split())
    assert "mine.txt" in said and "is now in" in said
    (deploy / "more.txt").write_text("more")
    published(deploy, card="e")
    assert strangers.contents(tmp_path / "deploy.kept") == kept
    assert strangers.contents(tmp_path / "deploy.kept-2") == {"more.txt": b"more"}
    published(deploy, card="f")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deploy", "deploy.kept", "deploy.kept-2"]


def test_a_folder_whose_manifest_is_gone_is_kept_whole(tmp_path: Path) -> None:
    deploy = strangers.fill(tmp_path / "deploy", ("a.txt", "b/c.txt"))
    before = strangers.contents(deploy)
    published(deploy, card="c")
    assert strangers.contents(tmp_path / "deploy.kept") == before


def test_a_deploy_of_others_is_refused_before_any_stage(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "quickstart")
    with run.lock():
        pass
    strangers.fill(run.deploy, ("model.gguf",))
    before = strangers.contents(run.deploy)
    result = call("run", QUICKSTART, "--runs", tmp_path)
    assert result.exit_code == 1 and "no MANIFEST.json" in " ".join(result.output.split()), result.output
    assert strangers.contents(run.deploy) == before and not run.recipe.exists()


def test_a_manifest_removes_nothing_outside_its_folder(tmp_path: Path) -> None:
    strangers.fill(tmp_path, ("precious", "far/precious"))
    folder = published(tmp_path / "deploy", card="a")
    (folder / "link").symlink_to(tmp_path / "far")
    entry = {"sha256": artifacts.sha256(tmp_path / "precious"), "bytes": 1}
    names = ["../precious", str(tmp_path / "precious"), "link/precious"]
    artifacts.write_json(folder / "MANIFEST.json", {"files": dict.fromkeys(names, entry)})
    artifacts.discard(folder)
    assert (tmp_path / "precious").exists() and (tmp_path / "far" / "precious").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_deploy_that_is_a_link_stays_one(tmp_path: Path, dangling: bool) -> None:
    elsewhere, run = tmp_path / "disk" / "export", tmp_path / "run"
    run.mkdir()
    if not dangling:
        elsewhere.mkdir(parents=True)
    (run / "deploy").symlink_to(elsewhere)
    tokenizer = byte_tokenizer()
    for seed in range(2):
        model = tiny(seed=seed)
        write_checkpoint(model, tokenizer, run / "deploy", card="card", record={"seed": seed})
        assert (run / "deploy").is_symlink() and (elsewhere / "model.safetensors").is_file()
        assert json.loads((run / "deploy" / "recover.json").read_text()) == {"seed": seed}
        artifacts.check_manifest(run / "deploy")
    (elsewhere / "mine.txt").write_text("mine")
    write_checkpoint(tiny(), tokenizer, run / "deploy", card="card", record={})
    assert [path.name for path in run.iterdir()] == ["deploy"]
    assert sorted(path.name for path in elsewhere.parent.iterdir()) == ["export", "export.kept"]
    artifacts.os.replace(elsewhere, elsewhere.with_name(".export.replaced"))  # as a crash between two renames leaves it
    RunDirectory(run).settle()
    artifacts.check_manifest(run / "deploy")


def asked(name: str) -> Asked:
    """A training like no other."""
    return Asked({"of": name}, {}, lambda config: config)


def test_a_new_training_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, "one")
    begin(tmp_path, asked("one"))
    for step in (10, 20, 30, 40):
        store.save(step, {"a": torch.zeros(1)}, {"row": 0})
    artifacts.write_text(tmp_path / "epoch-1" / "adapter_model.safetensors", "x")
    artifacts.write_text(tmp_path / "pruned_text" / "0-000004.json", "{}")
    theirs = ("epoch-best/a", "epoch-1-copy/a", "checkpoints/checkpoint-best/a", "checkpoints/checkpoint-40/notes")
    strangers.fill(tmp_path, (*theirs, "checkpoints/list.txt", "pruned_text/notes.json", "pruned_text/0-copy.json"))
    begin(tmp_path, asked("another"))
    files = {name for name in strangers.contents(tmp_path) if (tmp_path / name).is_file()}
    texts = {"pruned_text/notes.json", "pruned_text/0-copy.json"}
    assert files == {"training.json", *theirs, "checkpoints/list.txt", *texts}
    Checkpoints(tmp_path, "another").save(10, {"a": torch.zeros(1)}, {"row": 0})
    note(tmp_path, "another", {}, finished=True)
    files = {name for name in strangers.contents(tmp_path) if (tmp_path / name).is_file()}
    last = {f"checkpoints/checkpoint-10/{name}" for name in ("MANIFEST.json", "state.json", "trained.safetensors")}
    assert files == {"training.json", "checkpoints.jsonl", *last, *theirs, "checkpoints/list.txt", *texts}
    discard_texts(tmp_path / "pruned_text", "0")
    assert (tmp_path / "pruned_text" / "0-copy.json").exists()


def test_a_diagnosis_is_taken_up_and_a_folder_of_others_is_not(tmp_path: Path) -> None:
    begin_diagnosis(tmp_path / "new")
    begin_diagnosis(tmp_path / "new")
    assert is_diagnosis(tmp_path / "new")
    earlier = tmp_path / "earlier" / "batches" / "texts" / "key.json"
    artifacts.write_json(earlier, {"dense": {}, "other": {}, "probe": {}, "length": 8})
    begin_diagnosis(tmp_path / "earlier")
    with RunDirectory(tmp_path / "run").lock():
        pass
    with pytest.raises(ArtifactError, match="give another --out"):
        begin_diagnosis(tmp_path / "run")


def test_a_comparison_replaces_only_a_page_of_ours(tmp_path: Path) -> None:
    from report_run import build_run

    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    page = tmp_path / "comparison.html"
    page.write_text("<html>mine</html>")
    assert call("report", *runs).exit_code == 1
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    for _ in range(2):
        assert call("report", *runs).exit_code == 0 and len(page.read_text()) > 1000
