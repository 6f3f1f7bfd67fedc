"""Task files: what is read, and that every mistake is told by file and line."""

import json

import pytest
from task_folder import CHOICE, GENERATE, make_task

from recover.errors import DataError, RecipeError
from recover.measure.task_file import load_task


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], GENERATE, "task.yaml: its data task.jsonl holds no rows"),
        (["{broken"], GENERATE, r"task.jsonl:1: not JSON"),
        (["[1]"], GENERATE, "task.jsonl:1: found list, expected one JSON object a line"),
        ([{"q": "w5"}], GENERATE, "task.jsonl:1: no column 'answer', found q"),
        ([{"answer": "w5"}], GENERATE, r"task.jsonl:1: prompt '\{q\}' asks for 'q', found columns answer"),
        ([{"q": "w5", "answer": " "}], GENERATE, "task.jsonl:1: column 'answer' is empty"),
        ([{"q": "w5", "answer": []}], GENERATE, "task.jsonl:1: column 'answer' is empty"),
        ([{"q": "w", "options": "ab", "label": 0}], CHOICE, "column 'options': found 'ab', expected a list of two"),
        ([{"q": "w", "options": ["a"], "label": 0}], CHOICE, "expected a list of two or more texts"),
        ([{"q": "w", "options": ["a", ""], "label": 0}], CHOICE, "expected a list of two or more texts"),
        ([{"q": "w", "options": ["a", "b"], "label": 2}], CHOICE, "'label': found 2, expected the index .* 0 to 1"),
        ([{"q": "w", "options": ["a", "b"], "label": -1}], CHOICE, "found -1, expected the index"),
        ([{"q": "w", "options": ["a", "b"], "label": True}], CHOICE, "found True, expected the index"),
        ([{"text": 5}], {"kind": "perplexity"}, "task.jsonl:1: column 'text': found 5, expected a text"),
        ([{}], {**GENERATE, "limt": 3}, r"task.yaml: limt: unknown field. Did you mean 'limit'"),
        ([{}], {"kind": "sing"}, "task.yaml: kind: found 'sing', expected one of generate, choice, perplexity"),
        ([{}], {**GENERATE, "answer": "(("}, "task.yaml: answer: not a regular expression"),
        ([{}], {**GENERATE, "data": "gone.jsonl"}, "gone.jsonl: the items of task task cannot be read"),
    ],
)
def test_errors_name_file_and_line(tmp_path, rows, fields, message):
    path = make_task(tmp_path, rows, **fields)
    with pytest.raises(DataError if rows != [{}] else (DataError, RecipeError), match=message):
        load_task(path)


def test_a_missing_or_broken_task_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"gone\.yaml: No such file"):
        load_task(str(tmp_path / "gone.yaml"))
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(RecipeError, match=r"bad\.yaml:\d+:\d+: "):
        load_task(str(tmp_path / "bad.yaml"))


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    rows = [json.dumps({"text": "w5\u2028w6\x85w7"}, ensure_ascii=False), "", json.dumps({"text": "w8"})]
    assert load_task(make_task(tmp_path, rows, kind="perplexity")).items == ("w5\u2028w6\x85w7", "w8")


def test_limit_takes_the_first_items(tmp_path):
    rows = [{"q": f"w{number}", "answer": number} for number in range(5, 15)]
    task = load_task(make_task(tmp_path, rows, **GENERATE, limit=4))
    assert [item.targets for item in task.items] == [("5",), ("6",), ("7",), ("8",)]
