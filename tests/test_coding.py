"""Programs that a model wrote: run only when allowed, behind a wall, and judged by tests in another process."""

import pytest
from task_folder import make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.artifacts import write_text
from recover.base.errors import RecipeError
from recover.config.recipe import Measure
from recover.measure import sandbox
from recover.measure import tasks as measuring
from recover.measure.kinds import code as coding
from recover.measure.kinds.code import code_of
from recover.measure.sandbox import UNCONFINED, WALLED, Program, run_program, run_programs, why_no_wall
from recover.measure.tasks import load_task, measure
from recover.text.generate import Generation

CFG = Measure(tasks=("x",), max_new_tokens=3, batch_size=3, sampling=None, samples=2)
ALLOWED = CFG.model_copy(update={"allow_code_execution": True})
walled = pytest.mark.skipif(bool(why_no_wall()), reason=f"this machine has no wall: {why_no_wall()}")


@walled
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert sum(range(4)) == 6", None),
        ("open('notes', 'w').write('a'); assert open('notes').read() == 'a'", None),
        ("import math, re, heapq, collections, itertools, typing", None),
        ("import hashlib, statistics, decimal, datetime, json, sqlite3, zlib", None),
        ("import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1", None),
        ("print('\udc80')", None),
        ("import os; assert set(os.environ) <= {'LC_CTYPE'} and os.listdir() == []", None),
        ("if __name__ == '__main__': x = 1\nassert x", None),
        ("assert sum(range(4)) == 7", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "ended early, exit code 0"),
        ("import os; os._exit(0)", "ended early, exit code 0"),
        ("x = 'a' * (4 << 30)", "MemoryError"),
        ("while True: pass", "not done in 1 s"),
        ("import numpy", "No module named 'numpy'"),
        ("import torch", "No module named 'torch'"),
    ],
)
def test_what_programs_can_and_cannot_do(source, reason):
    outcome = run_program(source, seconds=1.0 if reason == "not done in 1 s" else 10.0)
    assert outcome.passed is (reason is None), outcome
    assert reason is None or reason in outcome.reason
    assert outcome.parsed is (reason != "SyntaxError")


CLASS = """
class Queue:
    def __init__(self, items): self.items = list(items)
    def put(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __iter__(self): return iter(self.items)
"""


@walled
@pytest.mark.parametrize(
    ("source", "tests", "reason"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", None),
        ("def f(x): return x + 1", "assert f(1) == 3", "AssertionError"),
        ("def f(x): return x + 1", "assert f(1) == 3, 'one and one'", "AssertionError: one and one"),
        ("def f(x): return x + 1", "def check(it):\n    assert it(x=1) == 2\ncheck(f)", None),
        ("def f(x): x.sort()", "a = [2, 1]\nassert f(a) is None and a == [1, 2]", None),
        ("def f(x, by): return sorted(x, key=by)", "assert f([1, 2], lambda n: -n) == [2, 1]", None),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2]", None),
        (
            "def f(): return (1, {'a': {2}}, b'c', 2**70, 1.5, None, 1j)",
            "assert f()[1:5] == ({'a': {2}}, b'c', 2**70, 1.5)",
            None,
        ),
        ("def f(x): raise ValueError('no')", "try: f(1)\nexcept ValueError as e: assert str(e) == 'no'", None),
        ("import math\ndef f(x): return x", "assert math.isclose(f(0.1), 0.1)", None),
        ("def sum(x): return x[0]", "assert sum([5, 6]) == 5", None),
        (CLASS, "q = Queue([1])\nassert len(q.put(2)) == 2 and q == Queue((1, 2)) and list(q) == [1, 2]", None),
        (CLASS, "assert Queue([1]) == [1]", "AssertionError"),
        ("x = 1", "assert f(1)", "NameError: name 'f' is not defined"),
        ("def f(x): return x", "assert f(object())", "TypeError: the tests hand the program a object"),
        ("def f(x): return x", "assert f(1) == 1\nraise SystemExit(0)", "SystemExit"),
    ],
)
def test_tests_ask_the_program_from_another_process(source, tests, reason):
    outcome = run_program(source, tests)
    assert outcome.passed is (reason is None), outcome
    assert reason is None or reason in outcome.reason


@walled
@pytest.mark.parametrize("tests", ["f()", "assert f is None, f.words"])
def test_what_a_program_says_of_its_failure_is_text_that_files_take(tests, tmp_path):
    source = "def f(): raise ValueError('\\udc80' + 'a' * 999)\nf.words = '\\udc80' * 999"
    reason = run_program(source, tests).reason
    write_text(tmp_path / "reason", reason)
    assert "\\udc80" in reason and len(reason) == 300


@walled
def test_what_a_program_leaves_is_gone_with_it():
    wrote, looks = Program("open('a', 'w').write('b')"), Program("import os; assert os.listdir() == []")
    assert all(each.passed for each in run_programs([wrote, looks, wrote, looks], workers=1))


@walled
def test_the_order_of_programs_is_kept():
    sources = [f"import time; time.sleep({0.2 if n % 2 else 0}); assert {n} % 3" for n in range(6)]
    outcomes = run_programs([Program(each) for each in sources], workers=3)
    assert [each.passed for each in outcomes] == [n % 3 > 0 for n in range(6)]


@walled
def test_the_other_programs_are_run_when_the_process_that_runs_them_is_ended(monkeypatch):
    run = sandbox.Keeper.run

    def killed(self, program, **limits):
        if program.text == "killed":
            self.process.kill()
            self.process.wait()
        return run(self, program, **limits)

    monkeypatch.setattr(sandbox.Keeper, "run", killed)
    found = run_programs([Program("x = 1"), Program("killed"), Program("x = 1")], workers=1)
    assert [each.passed for each in found] == [True, False, True]
    assert "the process that runs programs is gone" in found[1].reason


def test_without_a_wall_programs_run_in_folders_of_their_own_if_that_is_asked_for():
    wrote, looks = Program("open('a', 'w').write('b')"), Program("import os; assert os.listdir() == []")
    assert all(each.passed for each in run_programs([wrote, looks], workers=1, confined=False))
    assert "not done in 1 s" in run_program("while True: pass", seconds=1.0, confined=False).reason


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


def test_where_there_is_no_wall_code_is_refused_or_run_unconfined_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "why_no_wall", lambda: "OSError: [Errno 1] namespaces: Operation not permitted")
    monkeypatch.setattr(coding, "written", lambda *_: [Generation([5, 2], "def one(): return 1", True)] * 2)
    said = r"task task: .* this machine has no wall for them \(OSError: .*namespaces.*docs/security.md.*: unconfined"
    with pytest.raises(RecipeError, match=said):
        measure(tiny(), word_tokenizer(), [code_task(tmp_path)], ALLOWED)
    cfg = CFG.model_copy(update={"allow_code_execution": "unconfined"})
    task = measure(tiny(), word_tokenizer(), [code_task(tmp_path)], cfg)[0]["tasks"]["task"]
    assert (task["pass_at_1"], task["isolation"]) == (0.5, UNCONFINED)


def test_a_system_that_is_not_linux_has_no_wall(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert why_no_wall.__wrapped__() == "this system is darwin, not Linux"


@walled
def test_pass_at_1_is_the_share_of_programs_whose_tests_pass(tmp_path, monkeypatch):
    texts = [Generation([5, 2], "def one(): return 1", True), Generation([6, 7, 8], "def one(): return 1", False)]
    monkeypatch.setattr(coding, "written", lambda *_: texts)
    record, generations = measure(tiny(), word_tokenizer(), [code_task(tmp_path)], ALLOWED)
    task = record["tasks"]["task"]
    assert (task["kind"], task["pass_at_1"], task["truncated"], task["truncated_right"]) == ("code", 0.5, 1, 0)
    assert record["headline"]["generation"] == 0.5 and len(generations["task"]) == 2
    assert [each["answer"] for each in task["samples"]] == ["passes", "AssertionError"]
    assert task["isolation"] == WALLED


@walled
def test_pass_at_k_of_the_programs_that_a_task_draws(tmp_path, monkeypatch):
    def written(subject, file, prompts, sampling):
        right = {1: "0", 4: "0100"}[len(prompts)]
        return [Generation([5, 2], f"def one(): return {each}", True) for each in right]

    monkeypatch.setattr(coding, "written", written)
    rows = [{"q": "w5", "test": "assert one() == 1"}]
    path = make_task(tmp_path, rows, kind="code", prompt="{q}", program="{text}\n{test}", samples=4)
    task = measure(tiny(), word_tokenizer(), [load_task(path)], ALLOWED)[0]["tasks"]["task"]
    assert {k: found["value"] for k, found in task["pass_at_k"].items()} == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert task["pass_at_1"] == 0.0 and task["mistakes"]["content"] == 1


@walled
def test_programs_that_do_not_parse_are_told_from_those_that_are_wrong(tmp_path, monkeypatch):
    texts = [
        *(("def one(): return 1", [5, 2], True), ("def one(): return 3", [5, 2], True), ("def one(:", [5, 2], True)),
        *(("", [2], True), ("def one(:", [5] * 30, False), ("def one(:", [5, 6, 7], False)),
        ("def one(): return 1", [5] * 30, False),
        ("raise SyntaxError('said, but it parses')", [5, 2], True),
    ]
    monkeypatch.setattr(coding, "written", lambda *_: [Generation(ids, text, ended) for text, ids, ended in texts])
    rows = [{"q": "w5", "test": "assert one() == 1"}] * len(texts)
    path = make_task(tmp_path, rows, kind="code", prompt="{q}", program="{text}\n{test}")
    task = measure(tiny(), word_tokenizer(), [load_task(path)], ALLOWED)[0]["tasks"]["task"]
    assert task["mistakes"] == {"loop": 1, "endless": 1, "no_answer": 1, "unparsed": 1, "content": 2}
    assert task["pass_at_1"] == 2 / 8 and task["loop_rate"] == 2 / 8 and task["loop_start"]["p50"] == 0
    assert task["examples"]["unparsed"]["text"] == "def one(:" and "Error" in task["examples"]["unparsed"]["answer"]
    assert task["examples"]["content"]["text"] == "def one(): return 3"


@walled
def test_a_model_writes_its_programs(tmp_path):
    record, generations = measure(tiny(), word_tokenizer(), [code_task(tmp_path)], ALLOWED)
    assert record["tasks"]["task"]["pass_at_1"] == 0.0 and len(generations["task"][0]["ids"]) == 3
