"""`recover measure`: any checkpoint on any tasks, by itself or under a launcher."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_folder import CHOICE, GENERATE, make_task
from tiny import tiny
from typer.testing import CliRunner
from words import word_tokenizer

from recover.cli import app

ROOT = Path(__file__).parent.parent


def call(*arguments):
    return CliRunner().invoke(app, ["measure", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def folder(tmp_path):
    """A checkpoint stored in bfloat16."""
    tiny().to(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def paths(tmp_path):
    written = [{"q": f"w{n} w4", "answer": "w300"} for n in range(10, 15)]
    chosen = [{"q": f"w{n}", "options": ["w6 w7", "w8"], "label": n % 2} for n in range(5)]
    sought = [{"query": "w5 w6", "documents": ["w9", "w5 w6"], "relevant": 1}]
    read = [{"text": "w5 w6 w7"}]
    return [
        make_task(tmp_path, written, "written", **GENERATE),
        make_task(tmp_path, chosen, "chosen", **CHOICE),
        make_task(tmp_path, sought, "sought", kind="retrieval"),
        make_task(tmp_path, read, "read", kind="perplexity"),
    ]


def test_all_kinds_of_tasks_after_one_option(folder, paths, tmp_path):
    result = call(
        folder, "--tasks", *paths, "--limit", 4, "--max-new-tokens", 5, "--out", tmp_path / "new" / "out.json"
    )
    assert result.exit_code == 0, result.output
    for words in ("written", "exact match", "0.0%", "chosen", "accuracy", "50.0%", "sought", "nDCG@10", "perplexity"):
        assert words in result.stdout
    assert "task written: 4 of 4 texts ran into the limit of tokens; 0 of them count as right" in result.stderr
    assert "task written: 0 of 4 right, 4 do not end" in result.stdout
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    assert record["dtype"] == "bfloat16" and record["settings"]["limit"] == 4
    assert set(record["tasks"]) == {"written", "chosen", "sought", "read"}
    assert record["tasks"]["written"]["items"] == 4 and record["tasks"]["written"]["truncated"] == 4
    assert set(record["headline"]) == {"generation", "choice", "retrieval", "perplexity"}
    assert {"versions", "machine"} <= set(record["environment"])


def test_the_same_figures_from_float32_where_that_is_asked_for(folder, paths, tmp_path):
    out = tmp_path / "out.json"
    assert call(folder, "--tasks", paths[3], "--dtype", "float32", "--out", out).exit_code == 0
    record = json.loads(out.read_text())
    from recover.config.recipe import Measure
    from recover.measure.tasks import load_task, measure

    model = tiny()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected, _ = measure(model, word_tokenizer(), [load_task(paths[3])], Measure(tasks=("x",)))
    assert record["headline"]["perplexity"] == pytest.approx(expected["headline"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: give --tasks gsm8k task.yaml ..., --suite standard, or --lm-eval"),
        (["written.yaml"], "written.yaml: found after the model; tasks are named after --tasks"),
        (["--tasks", "gone.yaml"], "gone.yaml: No such file"),
        (["--tasks", "written.yaml", "written.yaml"], "more than one task is called 'written'"),
        (["--tasks", "written.yaml", "--dtype", "float8"], "--dtype: found 'float8', expected one of float32"),
        (["--tasks", "written.yaml", "--limit", "0"], "--limit: found 0"),
        (["--tasks", "code.yaml"], "task code: it runs programs that the model writes"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, folder, paths, tmp_path, monkeypatch):
    make_task(tmp_path, [{"q": "w5"}], "code", kind="code", prompt="{q}", program="{text}")
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    result = call(folder, *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_code_is_run_where_that_is_asked_for(folder, tmp_path):
    path = make_task(tmp_path, [{"q": "w5"}], "code", kind="code", prompt="{q}", program="assert True")
    result = call(folder, "--tasks", path, "--allow-code-execution", "--max-new-tokens", 3)
    assert result.exit_code == 0 and "pass@1" in result.stdout and "100.0%" in result.stdout


def test_the_harness_is_asked_for_by_name_or_said_how_to_get(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    result = call(folder, "--lm-eval", "arc_easy,gsm8k")
    assert result.exit_code == 2 and "pip install 'recover[eval]'" in result.stderr


LAUNCHED = """
import sys
from recover.cli import main
sys.argv = ["recover", "measure", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_two_processes_write_the_record_of_one(folder, paths, tmp_path):
    from test_dist import launch

    call(folder, "--tasks", *paths, "--dtype", "float32", "--max-new-tokens", 5, "--out", tmp_path / "one.json")
    arguments = ["--tasks", *paths, "--dtype", "float32", "--max-new-tokens", "5", "--out", str(tmp_path / "two.json")]
    for process in launch("-c", LAUNCHED, str(folder), *arguments, CUDA_VISIBLE_DEVICES=""):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["environment"]["processes"] == 2
    assert two["headline"] == pytest.approx(one["headline"], rel=1e-5)
    assert two["tasks"]["written"] == one["tasks"]["written"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra 'eval'")
def test_the_harness_finds_the_same_figures():
    script = ROOT / "benchmarks" / "lm_eval_agreement.py"
    done = subprocess.run(
        [sys.executable, str(script), "--limit", "40"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    rows = [line for line in done.stdout.splitlines() if "facts" in line or "stories" in line]
    assert len(rows) == 4 and all(line.rstrip().endswith("0.0000") for line in rows), done.stdout + done.stderr
