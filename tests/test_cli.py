"""The command line: help that costs nothing, errors in one line with their exit code, and what reaches the stages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import recover
from recover import cli
from recover.base import artifacts
from recover.base.errors import PruneError, StopRequested
from recover.cli import app
from recover.config import named
from recover.config.recipe import Recipe, dump_recipe, load_recipe
from recover.run import stages
from recover.run.directory import RunDirectory

COMMANDS = (
    *(
        "quickstart",
        "doctor",
        "init",
        "list",
        "run",
        "plan",
        "prune",
        "probe",
        "train",
        "export",
        "report",
        "show",
        "compare",
    ),
    *("measure", "diagnose", "teacher", "gguf"),
)
STAGE_OF = {
    "run": "report",
    "plan": "plan",
    "prune": "prune",
    "probe": "before",
    "train": "train",
    "export": "export",
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    tree = {
        "name": "small",
        "model": {"source": "org/model"},
        "prune": {"kind": "depth", "blocks": [1, 2]},
        "train": {"data": [{"kind": "dense", "prompts": "prompts.jsonl"}]},
        "measure": {"tasks": ["task.yaml"]},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path, dict[str, Any]]]:
    """What `stages.run` is called with: the stages have tests of their own, they take minutes."""
    calls: list[tuple[Recipe, Path, dict[str, Any]]] = []
    monkeypatch.setattr(stages, "run", lambda recipe, root, **how: calls.append((recipe, root, how)))
    return calls


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **env},
        cwd=Path(__file__).parent.parent,
        check=False,
    )


WITHOUT_TORCH = """
import json, sys
from recover.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["recover", *arguments]
    try:
        main()
    except SystemExit as end:
        print(json.dumps([arguments, end.code, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


def test_torch_is_not_imported_before_it_is_needed() -> None:
    cases = [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["--version"], 0),
        (["run", "none.yaml"], 2),
        (["show", "no"], 1),
    ]
    done = python("-c", WITHOUT_TORCH, json.dumps([arguments for arguments, _ in cases]))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert found == [[arguments, code, []] for arguments, code in cases], done.stderr


HEAVY = ["torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors"]
ASKED = """
import contextlib, io, json, os, sys
from recover.cli import main
heavy, asked = json.loads(sys.argv[1])
for arguments, line in asked:
    if line is not None:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        os.environ.update(words, _RECOVER_COMPLETE="complete_bash")
    sys.argv, said = ["recover", *arguments], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main()
    print(json.dumps([len(said.getvalue()), [name for name in heavy if name in sys.modules]]))
"""


def test_help_and_completion_of_no_command_import_what_takes_seconds() -> None:
    """Every command's help page first, then what a shell is offered: options of each, and values of some."""
    helps: list[tuple[list[str], str | None]] = [([name, "--help"], None) for name in cli.COMMANDS]
    valued = ("recover measure m --suite ", "recover measure m --tasks ", "recover run a.yaml train.")
    lines = [*(f"recover {name} --" for name in cli.COMMANDS), *valued]
    asked = [*helps, *(([], line) for line in lines)]
    done = python("-c", ASKED, json.dumps([HEAVY, asked]))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(asked), done.stderr
    for what, (said, imported) in zip(asked, rows, strict=True):
        assert said > 0 and imported == [], what


def test_the_list_says_of_a_command_what_the_command_says_of_itself() -> None:
    for name, listed in cli.COMMANDS.items():
        assert " ".join(cli.command(name).help.split("\n\n")[0].split()) == listed.says


def test_help_lists_the_commands() -> None:
    text = call("--help").output
    assert [command for command in COMMANDS if not re.search(rf"│ {command} ", text)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_that_parse(command: str, recipe_path: Path, asked: list[Any]) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0 and "Examples" in result.output
    lines = [line.strip() for line in result.output.partition("Examples")[2].splitlines() if line.strip()]
    assert lines and all(f"recover {command} " in f"{line} " for line in lines)
    if command in STAGE_OF:
        for line in lines:
            if not line.startswith("accelerate"):
                words = line.replace("embedded:quickstart", str(recipe_path)).split(" ", 2)[2]
                # Overrides are checked against a recipe that prunes by count.
                outcome = call(
                    command, *shlex.split(words), "prune={kind: depth, blocks: [1]}" if "count" in words else "seed=1"
                )
                assert outcome.exit_code == 0, outcome.output


def test_the_help_of_measure_names_every_suite() -> None:
    text = " ".join(call("measure", "--help").output.split())
    assert [suite for suite in named.lists().suites if not re.search(rf"together:[^.]*\b{suite}\b", text)] == []


def test_run_help_shows_how_to_override() -> None:
    text = call("run", "--help").output
    assert "recover run embedded:quickstart prune.count=3 train.lr=1e-3" in text and "KEY=VALUE" in text


@pytest.mark.parametrize(("command", "stage"), STAGE_OF.items())
def test_each_command_runs_up_to_its_stage(command: str, stage: str, recipe_path: Path, asked: list[Any]) -> None:
    assert call(command, str(recipe_path), "train.lr=1e-3", "--runs", "elsewhere").exit_code == 0
    ((recipe, root, how),) = asked
    assert recipe.train.lr == 1e-3 and root == Path("elsewhere")
    assert how == {"until": stage, "start": None, "timed": stage == "plan"}
    assert stage in stages.STAGES


def test_from_and_fresh(recipe_path: Path, asked: list[Any]) -> None:
    call("run", str(recipe_path), "--from", "train")
    call("run", str(recipe_path), "--fresh")
    assert [how["start"] for _, _, how in asked] == ["train", "plan"]
    both = call("run", str(recipe_path), "--fresh", "--from", "train")
    assert both.exit_code == 2 and "give one of them" in both.stderr and len(asked) == 2


def test_an_unknown_stage_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    result = call("run", str(recipe_path), "--from", "dens", "--runs", str(tmp_path / "runs"))
    assert result.exit_code == 2 and "error: no stage 'dens'" in result.stderr


ERRORS = [
    (PruneError("prune.count: 40 blocks, the model has 30"), 1),
    (StopRequested(15), 143),
    (StopRequested(2), 130),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[repr(error) for error, _ in ERRORS])
def test_errors_are_one_line_and_their_exit_code(
    error: BaseException, code: int, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stages, "run", fail)
    result = call("run", str(recipe_path))
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr == ("" if isinstance(error, KeyboardInterrupt) else f"error: {error}\n")
    monkeypatch.setenv("RANK", "1")
    other = call("run", str(recipe_path))
    assert other.exit_code == code and other.output == ""


def test_our_own_mistakes_keep_their_traceback(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stages, "run", fail)
    assert isinstance(call("run", str(recipe_path)).exception, ZeroDivisionError)


def test_out_of_memory_says_what_takes_less(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 MiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr("recover.run.stages.run", full)
    result = call("run", str(recipe_path))
    assert result.exit_code == 1 and "Traceback" in result.stderr
    assert "error: out of GPU memory: CUDA out of memory. Less is taken in training by" in result.stderr


def test_recipe_errors_reach_the_shell(recipe_path: Path) -> None:
    done = python("-m", "recover", "run", str(recipe_path), "prune.blcks=[1]", "train.lr=[dim]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: override 'prune.blcks=[1]': prune.blcks: unknown field. Did you mean 'blocks'?",
        "override 'train.lr=[dim]': train.lr: found [\"dim\"]: it should be a valid number",
    ]


def measured(generation: float | None) -> dict[str, Any]:
    task = {"kind": "generate", "items": 10, "exact_match": generation, "interval95": None, "samples": []}
    return {"tasks": {"sums": task}, "headline": {"generation": generation, "choice": None, "perplexity": 12.5}}


@pytest.fixture
def run_directory(recipe_path: Path, tmp_path: Path) -> RunDirectory:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n')
    (tmp_path / "task.yaml").write_text("name: sums\n")
    run = RunDirectory(tmp_path / "runs" / "small")
    recipe = load_recipe(recipe_path)
    artifacts.write_text(run.recipe, dump_recipe(recipe))
    artifacts.write_json(run.dense / "measure.json", measured(0.75))
    artifacts.write_json(run.before / "measure.json", measured(0.125))
    run.mark_done("dense", stages.fingerprint("dense", recipe, run))
    run.mark_done("prune", {**stages.fingerprint("prune", recipe, run), "seed": 7})
    for epoch, score in ((1, 0.5), (2, 0.625), (3, 0.25)):
        artifacts.append_jsonl(
            run.epochs, {"epoch": epoch, "step": epoch, "tokens": 100, "seconds": 1.0, "score": score}
        )
    return run


def test_show(run_directory: RunDirectory) -> None:
    result = call("show", str(run_directory.root))
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert re.search(r"dense +done +\d{4}-", text) and re.search(r"before +open", text)
    assert re.search(r"prune +stale +\d.* seed: 7 -> 0", text)
    assert re.search(r"dense +75\.0% .*12\.5", text) and re.search(r"pruned +12\.5% ", text)
    assert "best epoch: 2 of 3, generation 62.5%" in text


def test_compare(run_directory: RunDirectory, tmp_path: Path) -> None:
    other = run_directory.root.parent / "other"
    artifacts.write_text(other / "recipe.yaml", run_directory.recipe.read_text().replace("name: small", "name: other"))
    page = tmp_path / "all.html"
    result = call("compare", str(run_directory.root), str(other), "--html", str(page))
    mixed = "small: Stage prune was made with another recipe than recipe.yaml has now (seed: 7, and 0 in recipe.yaml)."
    assert result.exit_code == 0 and " ".join(result.stderr.split()) == f"warning: {mixed}", result.output
    assert re.search(r"small +17% +– ", result.stdout) and re.search(r"other +– +– ", result.stdout)
    assert page.exists() and str(page) in result.stdout
    artifacts.write_text(other / "recipe.yaml", (other / "recipe.yaml").read_text().replace("org/model", "org/else"))
    assert "different dense models" in call("compare", str(run_directory.root), str(other)).stderr


def test_report(run_directory: RunDirectory) -> None:
    result = call("report", str(run_directory.root))
    assert result.exit_code == 0, result.output
    assert json.loads(run_directory.report_json.read_text())["name"] == "small"
    assert run_directory.report_html.exists() and run_directory.report_md.exists()


@pytest.mark.parametrize("command", ["report", "show", "compare"])
def test_what_is_no_run_directory_is_said_with_what_is_beside_it(command: str, run_directory: RunDirectory) -> None:
    result = call(command, str(run_directory.root.parent / "smal"))
    assert result.exit_code == 1 and "not a run directory, it has no recipe.yaml; beside it are small" in result.stderr


@pytest.mark.parametrize("command", ["report", "show", "compare", "list"])
def test_before_the_first_run_each_command_says_what_makes_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(command, "checkpoints")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: checkpoints: no such folder; ") and "`recover quickstart`" in result.stderr


def test_version() -> None:
    assert call("--version").output == f"recover {recover.__version__}\n"


def test_a_folder_of_runs_is_listed_and_a_name_is_enough(
    run_directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "elsewhere" / "checkpoints"
    shutil.copytree(run_directory.root, runs / "small")
    listed = call("show", str(runs))
    assert listed.exit_code == 0 and re.search(r"small +dense, prune +before, train, after, export", listed.stdout)
    assert f"recover show {runs / 'small'}" in listed.stdout
    monkeypatch.chdir(runs.parent)
    beside = "".join(call("show").stdout.split())  # a long path is broken into lines
    assert beside == "".join(listed.stdout.split()).replace(str(runs), "checkpoints")
    assert re.search(r"dense +done", call("show", "small").stdout)
    assert call("compare", "small").exit_code == 0 and call("report", "small").exit_code == 0
    said = call("show", "smal").stderr
    assert "smal: not a run directory, it has no recipe.yaml; in checkpoints are small" in said
    said = call("report", str(runs)).stderr
    assert "it has no recipe.yaml; in it are small" in said
    recipe = runs / "small" / "recipe.yaml"
    asking = yaml.safe_load(recipe.read_text()) | {"deploy": {"quantize": "q8_0"}}
    recipe.write_text(yaml.safe_dump(asking))  # a stage that a recipe asks for is open until it is done
    assert re.search(r"train, after, export, deploy", call("show", str(runs)).stdout)


@pytest.mark.parametrize(
    ("before", "words", "said"),
    [
        ("exec 1>/dev/full", ["--version"], "error: standard output: cannot be written: No space left on device"),
        ("exec 1>/dev/full 2>/dev/full", ["--version"], ""),
        ('mkdir "$D/gone" && cd "$D/gone" && rmdir "$D/gone"', ["doctor"], "error: the working folder is gone"),
        ("export RANK=5", ["--version"], "error: RANK=5: no numbers that a launcher gives"),
        ("export WORLD_SIZE=x", ["--version"], "error: WORLD_SIZE=x: no numbers that a launcher gives"),
        ("export WORLD_SIZE=0", ["--version"], "error: WORLD_SIZE=0: no numbers that a launcher gives"),
        (":", ["show", b"caf\xe9"], "error: 'caf\\udce9': holds bytes that are no UTF-8"),
    ],
)
def test_surroundings_in_which_nothing_works_are_one_line(
    tmp_path: Path, before: str, words: list[str | bytes], said: str
) -> None:
    root = str(Path(recover.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "D": str(tmp_path)}
    shell = ["bash", "-c", f'{before}; exec "$@"', "-", sys.executable, "-P", "-m", "recover", *words]
    done = subprocess.run(shell, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == bool(said) and done.stderr.startswith(said), done
