"""What people give by mistake, and that `plan` says what is meant, before any weight is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import faulty
import pytest
from byte_tokenizer import byte_tokenizer
from tiny import tiny
from transformers import AutoTokenizer
from transformers.utils import logging
from typer.testing import CliRunner, Result

from recover.cli import app
from recover.config.recipe import Model
from recover.models import load
from recover.run.directory import RunDirectory
from recover.text.read import unread

RECIPE = """
name: mine
model: {source: ./model}
prune: {kind: depth, count: 1, calibration: {data: text.jsonl, samples: 2, length: 16}}
train:
  {tokens: 400, epochs: 1, length: 64, batch_size: 4, data: [{kind: dense, prompts: prompts.jsonl, max_new_tokens: 32}]}
measure: {tasks: [task.yaml], max_new_tokens: 8}
"""
TASK = 'name: qa\nkind: generate\ndata: qa.jsonl\nprompt: "{question}"\n'
ROWS = {
    "text": {"text": "some words to read again"},
    "prompts": {"prompt": "say a word"},
    "qa": {"question": "which word?", "answer": "this"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    tiny("qwen3").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "my.yaml").write_text(RECIPE)
    (folder / "task.yaml").write_text(TASK)
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    return folder


@pytest.fixture
def mine(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "user"))


def plan(folder: Path, *overrides: str) -> Result:
    return call("plan", str(folder / "my.yaml"), "--untimed", "--runs", str(folder / "runs"), *overrides)


def given(name: str, **columns: str) -> str:
    return f"train.data=[{{kind: given, source: {name}, columns: {json.dumps(columns or {'text': 'text'})}}}]"


def test_it_is_right_as_it_is(mine: Path) -> None:
    done = plan(mine)
    assert done.exit_code == 0, done.output
    assert "training time" in done.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prune.calibration.data=txt.jsonl", "txt.jsonl: no such file. Did you mean '{folder}/text.jsonl'?"),
        ("prune.calibration.column=body", "no text in column 'body', found ['text']"),
        (given("gone.jsonl"), "gone.jsonl: no such file"),
        (given("chat.jsonl"), "chat.jsonl:1: no column 'text', found ['messages']"),
        (given("chat.jsonl", messages="messages"), "messages need a chat template, and the tokenizer has none"),
        ("train.micro_batch_size=3", "train.micro_batch_size: 3 does not divide the 4 sequences"),
        ("train.lr=2e3", "train.lr: found 2000: expected at most 1; adapters train at 1e-4 to 2e-3"),
        ("train.tokens=3", "train.tokens: 3 tokens are less than 1 epochs of one step of 4 sequences"),
        ("measure.tasks=[qa.jsonl]", "qa.jsonl: data, not a task"),
    ],
)
def test_what_later_stages_would_refuse_is_refused_by_plan(
    mine: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.chdir(mine)
    done = plan(mine, override)
    assert done.exit_code in (1, 2) and said.format(folder=mine) in done.stderr, done.output
    assert "Traceback" not in done.output and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with 'gptq'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder model"),
    ],
)
def test_models_that_cannot_be_pruned_are_told_by_what_they_are(mine: Path, config: dict[str, Any], said: str) -> None:
    path = mine / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    done = plan(mine)
    assert done.exit_code == 1 and said in done.stderr, done.output


def test_a_folder_without_weights_or_tokenizer_is_told_by_plan(mine: Path) -> None:
    (mine / "model/model.safetensors").unlink()
    assert "model.safetensors: missing" in plan(mine).stderr
    for path in (mine / "model").glob("*token*"):
        path.unlink()
    assert (
        "holds no tokenizer (tokenizer.json or tokenizer.model)"
        in call("measure", str(mine / "model"), "--tasks", "embedded:facts").stderr
    )


def test_a_token_without_a_row_is_refused_where_a_text_gives_it(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    tokenizer = AutoTokenizer.from_pretrained(mine / "model")
    tokenizer.add_tokens([f"<more {number}>" for number in range(300)] + ["<image>"], special_tokens=True)
    tokenizer.save_pretrained(mine / "model")
    assert plan(mine).exit_code == 0
    (mine / "text.jsonl").write_text('{"text": "see <image> there"}\n' * 40)
    done = plan(mine)
    assert done.exit_code == 1 and "gives the token '<image>'" in done.stderr and "Traceback" not in done.output


def test_a_vocabulary_of_another_size_is_told_by_plan(mine: Path) -> None:
    path = mine / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 300}))
    done = plan(mine)
    assert done.exit_code == 1 and "vocab_size is 300 in config.json" in done.stderr and "has 256 rows" in done.stderr


def test_a_run_directory_or_an_adapter_is_no_model(mine: Path) -> None:
    (mine / "runs/a/deploy").mkdir(parents=True)
    (mine / "runs/a/recipe.yaml").write_text(RECIPE)
    said = f"a: a run directory, not a model; its checkpoint is {mine / 'runs/a/deploy'}"
    for command in (
        ["measure", str(mine / "runs/a"), "--tasks", "embedded:facts"],
        ["gguf", str(mine / "runs/a"), "x.gguf"],
    ):
        done = call(*command)
        assert done.exit_code == 1 and said in done.stderr, done.output
    (mine / "lora").mkdir()
    (mine / "lora/adapter_config.json").write_text("{}")
    assert "a LoRA adapter, not a model" in plan(mine, f"model.source={mine / 'lora'}").stderr
    assert "runs/a/recipe.yaml'?" in call("plan", str(mine / "runs/a")).stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prune.sparsity=0.5", "prune.sparsity: unknown field. Kind 'depth' takes kind, unit, count"),
        ("measure.tasks=task.yaml", "it should be a list, as [a, b]"),
        ("train.tokens=6k", "it should be a whole number"),
        ("export.max_shard_size=lots", "expected a number of KB, MB, GB or TB, such as 5GB"),
        ("name=a b", "it should be of letters, digits"),
    ],
)
def test_words_are_of_yaml_and_no_field_is_offered_in_its_own_place(mine: Path, override: str, said: str) -> None:
    done = plan(mine, override)
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert "tuple" not in done.stderr and "Did you mean 'prune.sparsity'" not in done.stderr


def test_files_among_the_folders_of_a_glob_are_passed_over(tmp_path: Path, mine: Path) -> None:
    for name in ("a", "b"):
        (mine / "runs" / name).mkdir(parents=True)
        shutil.copy(mine / "my.yaml", mine / "runs" / name / "recipe.yaml")
    (mine / "runs/README.md").write_text("what lies here")
    everything = [str(path) for path in sorted((mine / "runs").iterdir())]
    done = call("compare", *everything)
    assert done.exit_code == 0 and len(everything) == 3, done.output
    assert "not a run directory" in call("compare", everything[0]).stderr


def test_prompts_of_a_diagnosis_may_be_those_that_are_shipped(mine: Path) -> None:
    done = call(
        *("diagnose", str(mine / "model"), str(mine / "model"), "--prompts", "embedded:tasks/gone.jsonl"),
        *("--out", str(mine / "out")),
    )
    assert "embedded:tasks/gone.jsonl: not shipped with the package" in done.stderr, done.output


def test_reasons_are_without_times_and_digests(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    marks = {"prune": {"count": 1}, "stages": {"dense": "2026-01-01T00:00:00"}, "inputs": {"/a/text.jsonl": "ab" * 32}}
    run.mark_done("prune", marks)
    again = {**marks, "stages": {"dense": "2026-01-02T00:00:00"}, "inputs": {"/a/text.jsonl": "cd" * 32}}
    assert run.stale_reason("prune", again) == "dense was done again; /a/text.jsonl was changed"


def test_unread_says_why(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    gone = tmp_path / "promps.jsonl"
    assert unread(gone, FileNotFoundError()) == f"{gone}: no such file. Did you mean '{tmp_path / 'prompts.jsonl'}'?"
    assert unread(tmp_path / "zz.jsonl", FileNotFoundError()) == f"{tmp_path / 'zz.jsonl'}: no such file"
    assert unread(gone, IsADirectoryError(21, "Is a directory")) == f"{gone}: cannot be read: Is a directory"


def test_large_weights_are_announced(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Model(source=str(mine / "model"))
    load.load_model(cfg)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(load, "SAID_BYTES", 1000)
    load.load_model(cfg)
    assert "reading " in (said := capsys.readouterr().out) and said.endswith(" kB\n")


def test_a_diagnosis_is_without_bars_of_libraries(mine: Path) -> None:
    words = ["diagnose", mine / "model", mine / "model", "--prompts", mine / "prompts.jsonl"]
    words += ["--samples", 2, "--steps", 2, "--out", mine / "out"]

    def diagnosed() -> None:
        logging.enable_progress_bar()  # as in a process that has just begun
        faulty.command(*words)

    code, said = faulty.run(mine, diagnosed)
    assert code == 0 and "Loading weights" not in said and "probe.json" in said, said
