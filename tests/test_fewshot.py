"""Few-shot prompts, and texts read as lm-evaluation-harness reads them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from task_folder import CHOICE, GENERATE, make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import DataError, RecipeError
from recover.config.recipe import Measure
from recover.measure.kinds import generate as generating
from recover.measure.tasks import load_task, measure
from recover.run.input_digests import digests
from recover.text.generate import Generation

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
ROWS = [{"q": f"w{number}?", "answer": f"w{number + 100}"} for number in range(5, 15)]


def gsm8k(folder, rows, examples):
    """The task that the reference shows, with these rows."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "flexible" in block)
    for name, lines in (("gsm8k_test", rows), ("gsm8k_train", examples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    path = folder / "gsm8k.yaml"
    path.write_text(text)
    return str(path)


def prompts_of(path):
    return [item.prompt for item in load_task(path).items]


def test_examples_stand_before_each_question_as_the_harness_has_them(tmp_path):
    examples = [{"question": f"Q{n}?", "answer": f"So {n}.\n#### {n}"} for n in range(7)]
    shown = [f"Question: Q{n}?\nAnswer: So {n}.\n#### {n}\n\n" for n in range(7)]
    asked = [{"question": "How many?", "answer": "#### 3"}, examples[2], examples[6]]
    prompts = prompts_of(gsm8k(tmp_path, asked, examples))
    assert prompts[0] == "".join(shown[:5]) + "Question: How many?\nAnswer:"
    assert prompts[1] == "".join([*shown[:2], *shown[3:6]]) + "Question: Q2?\nAnswer:"
    assert prompts[2] == "".join(shown[:5]) + "Question: Q6?\nAnswer:"


def test_examples_from_the_tasks_own_rows_are_never_the_item_itself(tmp_path):
    prompts = prompts_of(make_task(tmp_path, [*ROWS, ROWS[0]], **GENERATE, fewshot={"count": 2, "separator": " | "}))
    assert prompts[0] == "w6? w106 | w7? w107 | w5?" == prompts[-1]
    assert prompts[1] == "w5? w105 | w7? w107 | w6?"
    assert set(prompts[2:-1]) == {f"w5? w105 | w6? w106 | w{number}?" for number in range(7, 15)}


def test_examples_in_the_task_file_and_of_other_kinds(tmp_path):
    shots = {"rows": [{"q": "a", "answer": "b"}, {"q": "c", "answer": ["d", "e"]}], "description": "Words."}
    assert prompts_of(make_task(tmp_path, ROWS[:1], **GENERATE, fewshot=shots)) == ["Words.\n\na b\n\nc d\n\nw5?"]
    rows = [{"q": f"w{n}", "options": ["x", "y"], "label": n % 2} for n in range(3)]
    (first, *_) = load_task(make_task(tmp_path, rows, **CHOICE, separator=": ", fewshot={"count": 2})).items
    assert (first.prompt, first.options, first.label) == ("w1: y\n\nw2: x\n\nw0", ("x", "y"), 0)
    code = {"kind": "code", "prompt": "def {q}", "program": "{text}"}
    shots = {"rows": [{"q": "f", "body": "pass"}], "completion": ": {body}", "separator": "\n"}
    assert prompts_of(make_task(tmp_path, [{"q": "g"}], **code, fewshot=shots)) == ["def f: pass\ndef g"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fewshot": {"count": 10}}, "task.yaml: fewshot: found 9 examples that are not the item 'w5.' itself"),
        ({"fewshot": {"rows": [{"q": "a"}]}}, "task.yaml: fewshot.rows.0: no column 'answer', found q"),
        ({"fewshot": {"completion": "{b}"}}, r"task.jsonl:1: fewshot.completion '\{b\}' asks for \{b\}"),
        ({"fewshot": {"rows": []}}, "found 0 rows, expected 1 or more"),
        ({"fewshot": {"rows": [{}], "data": "x"}}, "both rows and data"),
        ({"fewshot": {"data": "gone.jsonl"}}, "gone.jsonl: no such file"),
        ({"fewshot": {"shots": 3}}, "fewshot.shots: unknown field"),
        ({"kind": "code", "program": "{text}", "fewshot": {}}, "fewshot.completion is missing"),
        ({"also": {"a b": {}}}, "also"),
        ({"ignore": ["("]}, "ignore: not a regular expression: '\\('"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, fields, message):
    with pytest.raises((DataError, RecipeError), match=message):
        load_task(make_task(tmp_path, ROWS, **{**GENERATE, **fields}))


def test_the_file_of_the_examples_is_a_file_that_a_stage_stands_on(tmp_path):
    path = gsm8k(tmp_path, [{"question": "a", "answer": "1"}], [{"question": "b", "answer": "2"}] * 6)
    before = digests({"tasks": [path]})
    assert [Path(name).name for name in before] == ["gsm8k.yaml", "gsm8k_test.jsonl", "gsm8k_train.jsonl"]
    (tmp_path / "gsm8k_train.jsonl").write_text("")
    assert digests({"tasks": [path]}) != before


# (text, right answer, strict match, flexible match): verdicts of lm-evaluation-harness 0.4.13 on its task gsm8k.
VERDICTS = [
    ("5 * 3 = 15.\n#### 15", "15", True, True),
    ("5 * 3 = 15.\n#### 15.", "15", True, True),
    ("It is 15", "15", False, True),
    ("#### 15 or #### 16", "15", True, False),
    ("#### 16 or #### 15", "15", False, True),
    ("#### $15", "15", False, True),
    ("It costs $15.00", "15", False, False),
    ("#### 15.00", "15", False, False),
    ("#### 1500", "1,500", True, True),
    ("#### 1,500", "1500", True, True),
    ("#### -4", "-4", True, True),
    ("So 12-4", "4", False, False),
    ("He has 4", "4", False, True),
    ("He has 4 , and that is all.", "4", False, True),
    ("#### 4 %", "4", True, True),
    ("####4", "4", False, True),
    ("I do not know.", "4", False, False),
    ("", "4", False, False),
]


def test_texts_are_read_as_the_harness_reads_them(tmp_path, monkeypatch):
    rows = [{"question": f"{n}", "answer": f"1 + 1 = 2.\n#### {right}"} for n, (_, right, *_) in enumerate(VERDICTS)]
    task = load_task(gsm8k(tmp_path, rows, [{"question": f"e{n}", "answer": "1"} for n in range(6)]))
    monkeypatch.setattr(generating, "written", lambda *_: [Generation([5, 2], text, True) for text, *_ in VERDICTS])
    cfg = Measure(tasks=("x",), sampling=None, samples=len(VERDICTS))
    record = measure(tiny(), word_tokenizer(), [task], cfg)[0]["tasks"]["gsm8k"]
    assert [sample["correct"] for sample in record["samples"]] == [strict for _, _, strict, _ in VERDICTS]
    assert record["exact_match"] == sum(strict for _, _, strict, _ in VERDICTS) / len(VERDICTS)
    flexible = [flexible for _, _, _, flexible in VERDICTS]
    assert record["also"]["flexible"]["exact_match"] == sum(flexible) / len(VERDICTS)
    (reading,) = task.file.also.values()
    items = list(task.items)
    assert generating.rights(reading, items, [Generation([], text, True) for text, *_ in VERDICTS]) == flexible


def test_the_reference_is_the_harness_own_task():
    """Where the harness is installed: the stops and expressions of its task file are those of our page."""
    lm_eval = pytest.importorskip("lm_eval")
    theirs = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (ours,) = (yaml.safe_load(block) for block in blocks if "flexible" in block)
    assert ours["stop"] == theirs["generation_kwargs"]["until"]
    assert sorted(ours["ignore"]) == sorted(theirs["metric_list"][0]["regexes_to_ignore"])
    assert ours["fewshot"]["count"] == theirs["num_fewshot"]
