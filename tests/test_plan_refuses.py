"""All that can be known without weights is refused by a plan, with the full path of the field."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from byte_tokenizer import byte_tokenizer
from tiny import tiny

from recover.base.errors import RecoverError
from recover.config.recipe import load_recipe
from recover.run import stages
from recover.run.context import RunContext, calibration
from recover.run.directory import RunDirectory

CONTEXT = 64
GENERATE = "name: {name}\nkind: generate\ndata: rows.jsonl\nprompt: '{{question}}'\n{more}"
CHOICE = "name: pick\nkind: choice\ndata: rows.jsonl\nprompt: '{question}'\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on a model of 64 positions, whose tokenizer gives a token a letter; its longest prompt has 40."""
    folder = tmp_path_factory.mktemp("user")
    tiny("llama", max_position_embeddings=CONTEXT).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    row = {"question": "q" * 40, "answer": "7", "options": ["a", "b" * 20], "label": 0, "prompt": "p" * 30}
    short = {**row, "question": "why?", "prompt": "p"}
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in (short, row)))
    (folder / "text.jsonl").write_text("".join(f"{json.dumps({'text': 'some words ' * 3})}\n" for _ in range(20)))
    (folder / "task.yaml").write_text(GENERATE.format(name="task", more=""))
    (folder / "own.yaml").write_text(GENERATE.format(name="own", more="max_new_tokens: 30\n"))
    (folder / "same.yaml").write_text(GENERATE.format(name="task", more=""))
    (folder / "pick.yaml").write_text(CHOICE)
    recipe = {
        "name": "small",
        "model": {"source": "./model"},
        "prune": {"kind": "depth", "count": 1, "calibration": {"data": "./text.jsonl", "samples": 2, "length": 16}},
        "probe": {"steps": 4},
        "train": {
            "tokens": 400,
            "epochs": 1,
            "batch_size": 4,
            "length": 48,
            "data": [{"kind": "dense", "prompts": "./rows.jsonl", "max_new_tokens": 8}],
        },
        "measure": {"tasks": ["./task.yaml", "./pick.yaml"], "max_new_tokens": 16},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def plan(folder: Path, *overrides: str) -> None:
    stages.run(load_recipe(folder / "my.yaml", overrides), folder / "runs", until="plan")


def test_it_is_right_as_it_is(made: Path) -> None:
    plan(made)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prune.calibration.length=65"], "prune.calibration.length: 65 tokens, the model's context is 64"),
        (
            ["prune.calibration.answer=40"],
            "prune.calibration.answer: 40 tokens after prompt 0, of 33 tokens, where the context is 64 of "
            "{folder}/text.jsonl, and after every other one",
        ),
        (["probe.steps=25"], "probe: prompt 1 has 40 tokens; with probe.steps 25"),
        (["measure.max_new_tokens=25"], "with measure.max_new_tokens 25 that exceeds the model's context of 64"),
        (
            ["measure.tasks=[own.yaml]", "measure.max_new_tokens=64"],
            "with max_new_tokens of the task, 30, that exceeds the model's context of 64",
        ),
        (
            ["measure.tasks=[long.yaml, pick.yaml]"],
            "task pick: the prompt '{q}' has 68 tokens with the longest option, the model's context is 64",
        ),
        (["measure.tasks=[task.yaml, same.yaml]"], "measure.tasks: more than one task is called 'task'"),
        (
            ["train.data.0.max_new_tokens=64"],
            "train.data.0: {folder}/rows.jsonl: 2 of 2 prompts are too long; {folder}/rows.jsonl:1: the prompt has 1 "
            "tokens; with max_new_tokens 64 of the source that exceeds the model's context of 64",
        ),
        (
            ["train.data.0.max_new_tokens=35", "train.data.0.strict=true"],
            "train.data.0: {folder}/rows.jsonl:2: the prompt has 30 tokens; with max_new_tokens 35 of the source",
        ),
        (["train.length=65"], "train.length: 65 tokens, the model's context is 64"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.chdir(made)
    question = "q" * 48
    if "long.yaml" in overrides[0]:
        row = {"question": question, "options": ["a", "b" * 19], "label": 0}
        (made / "long.jsonl").write_text(f"{json.dumps(row)}\n")
        (made / "long.yaml").write_text(CHOICE.replace("rows.jsonl", "long.jsonl"))
        overrides = ["measure.tasks=[task.yaml, long.yaml]"]
    with pytest.raises(RecoverError) as error:
        plan(made, *overrides)
    assert said.format(folder=made, q=question) in str(error.value)


def test_a_prompt_without_room_for_its_answer_is_left_out(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt too long among many stops no run: of calibration and of a source of text alike."""
    monkeypatch.chdir(made)
    rows = [{"text": text, "prompt": text} for text in (*["why?"] * 11, "why?" * 12, " ")]
    (made / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = ["prune.calibration.data=asked.jsonl", "prune.calibration.answer=30"]
    text = ["train.data.0.prompts=asked.jsonl", "train.data.0.max_new_tokens=30"]
    plan(made, *asked, *text)
    said = " ".join(capsys.readouterr().err.split())
    assert "asked.jsonl: 1 of 13 prompts left out, which leave no room for calibration.answer (prompt 11, of 48" in said
    assert "asked.jsonl: 1 of 13 rows left out, which hold nothing" in said
    assert "the prompt has 48 tokens, which leaves none of train.length 48" in said or "exceeds the" in said
    context = RunContext(load_recipe(made / "my.yaml", [*asked, *text]), RunDirectory(tmp_path))
    batches = calibration(context)
    assert batches and not any(ids_BT.shape[1] > CONTEXT for ids_BT in batches)
    with pytest.raises(RecoverError, match=r"asked\.jsonl:13: holds no text for calibration"):
        plan(made, *asked, *text, "prune.calibration.strict=true")


def test_items_beyond_the_limit_do_not_count(made: Path) -> None:
    plan(made, "measure.limit=1", "measure.max_new_tokens=40", "probe.samples=1")


@pytest.mark.parametrize(("tokens", "fits"), [(24, True), (25, False)])
def test_the_last_position_may_be_used(made: Path, tokens: int, fits: bool) -> None:
    if fits:
        plan(made, f"measure.max_new_tokens={tokens}")
        return
    with pytest.raises(RecoverError, match=r"measure\.max_new_tokens 25"):
        plan(made, f"measure.max_new_tokens={tokens}")


def test_another_vocabulary_than_that_of_the_weights_is_refused_before_they_are_read(
    made: Path, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes((made / "model" / name).read_bytes())
    config = json.loads((made / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(RecoverError, match=r"vocab_size is 300 in config\.json, and .*\.weight has 256 rows"):
        plan(made, f"model.source={tmp_path / 'model'}")


@pytest.mark.slow  # such a Python compiles all libraries anew; the next test holds the law
def test_nothing_of_it_is_skipped_by_python_that_skips_asserts(made: Path) -> None:
    job = ["plan", str(made / "my.yaml"), "--runs", str(made / "runs"), "prune.calibration.length=65"]
    done = subprocess.run([sys.executable, "-O", "-m", "recover", *job], capture_output=True, text=True)
    assert done.returncode == 2 and "prune.calibration.length: 65 tokens" in done.stderr, done.stderr


# Asserts that tell types; every other promise is kept by a plain `if`, which `python -O` does not skip.
NARROWING = re.compile(r"assert (isinstance\(|match, |not args|not return_outputs|transformers\.|.* is not None\b)")


def test_no_promise_of_the_library_is_an_assert() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in sorted((Path(__file__).parent.parent / "recover").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r"\s*assert ", line) and not NARROWING.match(line.strip())
    ]
    assert found == []
