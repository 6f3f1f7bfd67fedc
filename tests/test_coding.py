"""Programs that a model wrote: run only when allowed, locked away, and judged by their tests."""

import os

import pytest
from task_folder import make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import RecipeError
from recover.config.recipe import Measure
from recover.measure.kinds import code as coding
from recover.measure.kinds.code import code_of
from recover.measure.sandbox import NOT_ISOLATED, isolation, run_program, run_programs
from recover.measure.tasks import load_task, measure
from recover.text.generate import Generation

CFG = Measure(tasks=("x",), max_new_tokens=3, batch_size=3, sampling=None, samples=2)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert sum(range(4)) == 6", None),
        ("open('notes', 'w').write('a'); assert open('notes').read() == 'a'", None),
        ("import math, re, heapq, collections, itertools, typing", None),
        ("print('\udc80')", None),
        ("assert sum(range(4)) == 7", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "ended early, exit code 0"),
        ("import os; os._exit(0)", "ended early, exit code 0"),
        ("x = 'a' * (4 << 30)", "MemoryError"),
        ("while True: pass", "not done in 1 s"),
        ("import time; time.sleep(60)", "not done in 1 s"),
        ("import socket; socket.socket()", "PermissionError: socket"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess"),
        ("import os; os.system('true')", "PermissionError: os.system"),
        ("import os; os.fork()", "PermissionError: os.fork"),
        ("open('big', 'wb').write(b'a' * (1 << 25))", "File too large"),
        ("import numpy", "No module named 'numpy'"),
        ("import os; assert not os.environ.get('HOME') and os.listdir() == ['program.py']", None),
    ],
)
def test_what_programs_can_and_cannot_do(source, reason):
    outcome = run_program(source, seconds=1.0)
    assert outcome.passed is (reason is None), outcome
    assert reason is None or reason in outcome.reason


def test_nothing_outside_is_written_or_removed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    attempts = [
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'r+').write('gone')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.open({str(kept)!r}, os.O_RDWR | os.O_TRUNC)",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ]
    outcomes = run_programs(attempts, workers=2, seconds=5.0)
    assert not any(each.passed for each in outcomes) and kept.read_text() == "here"
    assert os.listdir(tmp_path) == ["kept"]


def test_output_without_end_fills_no_memory():
    assert not run_program("while True: print('a' * 1000000)", seconds=5.0).passed


def test_the_order_of_programs_is_kept():
    sources = [f"import time; time.sleep({0.2 if n % 2 else 0}); assert {n} % 3" for n in range(6)]
    assert [each.passed for each in run_programs(sources, workers=3)] == [n % 3 > 0 for n in range(6)]


@pytest.mark.skipif(isolation()[0] == NOT_ISOLATED, reason="this machine allows no network namespace")
def test_the_network_is_cut_off_below_python_too():
    source = "names = open('/proc/self/net/dev').read()\nassert 'eth' not in names, names"
    assert run_program(source).passed


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("    return 1", "    return 1"),
        ("Sure:\n```python\ndef f():\n    return 1\n```\nIt works.", "def f():\n    return 1\n"),
        ("```\nx = 1", "x = 1"),
    ],
)
def test_the_code_in_a_text(text, code):
    assert code_of(text) == code


def code_task(folder):
    rows = [{"q": "w5", "test": "assert one() == 1"}, {"q": "w6", "test": "assert one() == 2"}]
    return load_task(make_task(folder, rows, kind="code", prompt="{q}", program="{text}\n{test}"))


def test_code_runs_only_when_that_is_allowed(tmp_path):
    with pytest.raises(RecipeError, match=r"task task: it runs programs .* measure.allow_code_execution: true"):
        measure(tiny(), word_tokenizer(), [code_task(tmp_path)], CFG)


def test_pass_at_1_is_the_share_of_programs_whose_tests_pass(tmp_path, monkeypatch):
    texts = [Generation([5, 2], "def one(): return 1", True), Generation([6, 7, 8], "def one(): return 1", False)]
    monkeypatch.setattr(coding, "written", lambda *_: texts)
    cfg = CFG.model_copy(update={"allow_code_execution": True})
    record, generations = measure(tiny(), word_tokenizer(), [code_task(tmp_path)], cfg)
    task = record["tasks"]["task"]
    assert (task["kind"], task["pass_at_1"], task["truncated"], task["truncated_right"]) == ("code", 0.5, 1, 0)
    assert record["headline"]["generation"] == 0.5 and len(generations["task"]) == 2
    assert [each["answer"] for each in task["samples"]] == ["passes", "AssertionError"]
    assert task["isolation"] == isolation()[0]


def test_pass_at_k_of_the_programs_that_a_task_draws(tmp_path, monkeypatch):
    def written(subject, file, prompts, sampling):
        right = {1: "0", 4: "0100"}[len(prompts)]
        return [Generation([5, 2], f"def one(): return {each}", True) for each in right]

    monkeypatch.setattr(coding, "written", written)
    cfg = CFG.model_copy(update={"allow_code_execution": True})
    rows = [{"q": "w5", "test": "assert one() == 1"}]
    path = make_task(tmp_path, rows, kind="code", prompt="{q}", program="{text}\n{test}", samples=4)
    task = measure(tiny(), word_tokenizer(), [load_task(path)], cfg)[0]["tasks"]["task"]
    assert {k: found["value"] for k, found in task["pass_at_k"].items()} == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert task["pass_at_1"] == 0.0 and task["mistakes"]["content"] == 1


def test_programs_that_do_not_parse_are_told_from_those_that_are_wrong(tmp_path, monkeypatch):
    texts = [
        *(("def one(): return 1", [5, 2], True), ("def one(): return 3", [5, 2], True), ("def one(:", [5, 2], True)),
        *(("", [2], True), ("def one(:", [5] * 30, False), ("def one(:", [5, 6, 7], False)),
        ("def one(): return 1", [5] * 30, False),
        ("raise SyntaxError('said, but it parses')", [5, 2], True),
    ]
    monkeypatch.setattr(coding, "written", lambda *_: [Generation(ids, text, ended) for text, ids, ended in texts])
    cfg = CFG.model_copy(update={"allow_code_execution": True})
    rows = [{"q": "w5", "test": "assert one() == 1"}] * len(texts)
    path = make_task(tmp_path, rows, kind="code", prompt="{q}", program="{text}\n{test}")
    task = measure(tiny(), word_tokenizer(), [load_task(path)], cfg)[0]["tasks"]["task"]
    assert task["mistakes"] == {"loop": 1, "endless": 1, "no_answer": 1, "unparsed": 1, "content": 2}
    assert task["pass_at_1"] == 2 / 8 and task["loop_rate"] == 2 / 8 and task["loop_start"]["p50"] == 0
    assert task["examples"]["unparsed"]["text"] == "def one(:" and "Error" in task["examples"]["unparsed"]["answer"]
    assert task["examples"]["content"]["text"] == "def one(): return 3"


def test_a_model_writes_its_programs(tmp_path):
    cfg = CFG.model_copy(update={"allow_code_execution": True})
    record, generations = measure(tiny(), word_tokenizer(), [code_task(tmp_path)], cfg)
    assert record["tasks"]["task"]["pass_at_1"] == 0.0 and len(generations["task"][0]["ids"]) == 3
