"""Task files: what is read, and that every mistake is told by file and line."""

import gzip
import json
import sys
import types
import uuid
from pathlib import Path

import pytest
from task_folder import CHOICE, GENERATE, make_task

from recover.base.errors import DataError, RecipeError
from recover.config import yaml_values
from recover.config.tasks import KINDS
from recover.measure.kinds.choice import Choice
from recover.measure.kinds.code import program
from recover.measure.kinds.generate import Question
from recover.measure.kinds.retrieval import Search
from recover.measure.sandbox import Program
from recover.measure.tasks import load_task
from recover.text.rows import filled

CODE = {"kind": "code", "prompt": "{q}"}
RETRIEVAL = {"kind": "retrieval"}


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], GENERATE, "task.yaml: its data task.jsonl holds no rows"),
        (["{broken"], GENERATE, r"task.jsonl:1: not JSON"),
        (["[1]"], GENERATE, "task.jsonl:1: found list, expected one JSON object a line"),
        ([{"q": "w5"}], GENERATE, "task.jsonl:1: no column 'answer', found q"),
        ([{"answer": "w5"}], GENERATE, r"task.jsonl:1: prompt '\{q\}' asks for \{q\}, found columns answer"),
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
        ([{"q": "w", "a": "x", "label": 1}], {**CHOICE, "options": ["a", "b"]}, "no column 'b', found q, a, label"),
        ([{"q": "w", "options": ["a", "b"], "label": "C", "l": ["A", "B"]}], {**CHOICE, "labels": "l"}, "found 'C'"),
        ([{"q": "w"}], {**CODE, "program": "{text}{tests}"}, "task.jsonl:1: program '{text}{tests}' asks for {tests}"),
        ([{"query": "w", "documents": ["a"], "relevant": 0}], RETRIEVAL, r"expected a list of 2\+ texts"),
        ([{"query": "w", "documents": ["a", "b"], "relevant": [2]}], RETRIEVAL, "expected indices from 0 to 1"),
        ([{"query": "w", "documents": ["a", "b"], "relevant": []}], RETRIEVAL, "expected indices from 0 to 1"),
        ([{"query": " ", "documents": ["a", "b"], "relevant": 0}], RETRIEVAL, "column 'query': found ' '"),
        ([{"query": "w", "documents": "a"}], {**RETRIEVAL, "candidates": "all"}, "nothing is ranked"),
        ([{"a": {"b": 1}, "q": "w"}], {**GENERATE, "target": "a.c"}, "task.jsonl:1: no column 'a.c'"),
        ([{"q": "w", "answer": "a"}], {**GENERATE, "once": "id"}, "task.jsonl:1: no column 'id'"),
        ([{}], {**GENERATE, "data": "package:nowhere_to_be/x.jsonl"}, "pip install nowhere_to_be"),
        ([{}], {**GENERATE, "data": "package:recover/gone.jsonl"}, r"recover/gone.jsonl: no such file"),
        ([{}], {**GENERATE, "stop": "a"}, r'task.yaml: stop: found "a": it should be a list, as \[a, b\]'),
        ([{}], {**GENERATE, "stop": ["a", ""]}, "task.yaml: stop.1: found .*: it should have at least 1 character"),
        ([{}], {**CODE, "program": "{text}", "stop": ["a" * 300]}, "300 characters together, expected at most 256"),
        ([{}], {**GENERATE, "sampling": {}}, "samples is missing: set it, as samples: 8"),
        ([{}], {"kind": "sing"}, "task.yaml: kind: found 'sing', expected one of generate, choice, code, instructions"),
        ([{}], {**GENERATE, "answer": "(("}, "task.yaml: answer: not a regular expression"),
        ([{}], {**GENERATE, "data": "gone.jsonl"}, "gone.jsonl: no such file"),
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


def test_rows_of_gzip_and_parquet_are_those_of_jsonl(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"q": "w5", "answer": "w6"}, {"q": "w7", "answer": "w8"}]
    path = make_task(tmp_path, rows, **GENERATE)
    expected = load_task(path).items
    assert expected == (Question("w5", ("w6",)), Question("w7", ("w8",)))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "task.jsonl").read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("rows.jsonl.gz", "rows.parquet", "rows.arrow"):
        fields = {**GENERATE, "data": name}
        assert load_task(make_task(tmp_path, rows, "other", **fields)).items == expected
        (tmp_path / name).write_bytes(b"PAR1 no such thing")
        with pytest.raises(DataError, match=name):
            load_task(str(tmp_path / "other.yaml"))


def test_rows_inside_a_package_nested_columns_and_repeated_items(tmp_path, monkeypatch):
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('was imported')")
    docs = [
        {"id": 3, "query": "w5", "choices": ["w6", "w7"], "gold": 1},
        {"id": 4, "query": "w8", "choices": ["a", "b"], "gold": 0},
    ]
    lines = "".join(json.dumps({"doc": doc}) + "\n" for doc in (docs[0], docs[0], docs[1]))
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.syspath_prepend(str(tmp_path))
    fields = {"data": "package:some_package/requests.jsonl.gz", "once": "doc.id", "options": "doc.choices"}
    task = load_task(make_task(tmp_path, [], kind="choice", prompt="{doc[query]}:", target="doc.gold", **fields))
    assert task.items == (Choice("w5:", ("w6", "w7"), 1), Choice("w8:", ("a", "b"), 0))


def test_all_files_that_match_in_the_order_of_their_names(tmp_path):
    for name, word in (("b", "w6"), ("a", "w5")):
        (tmp_path / f"part-{name}.jsonl").write_text(json.dumps({"text": word}))
    path = make_task(tmp_path, [], kind="perplexity", data="part-*.jsonl")
    (tmp_path / "task.jsonl").unlink()
    assert load_task(path).items == ("w5", "w6")
    with pytest.raises(DataError, match=r"none-\*.jsonl: no file matches"):
        load_task(make_task(tmp_path, [], kind="perplexity", data="none-*.jsonl"))


def test_options_in_columns_and_labels_in_letters(tmp_path):
    rows = [{"q": "w", "x": "left", "y": "right", "key": "B", "letters": ["A", "B"]}]
    path = make_task(tmp_path, rows, **CHOICE, options=["x", "y"], target="key", labels="letters")
    assert load_task(path).items == (Choice("w", ("left", "right"), 1),)


def test_generated_questions(tmp_path, monkeypatch):
    made = types.ModuleType("reasoning_gym")

    def create_dataset(name, **arguments):
        if name != "chain_sum":
            raise ValueError(f"no {name}")
        return [{"question": f"{arguments}", "answer": "4"}]

    made.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    fields = {"kind": "generate", "prompt": "{question}", "data": "reasoning_gym:chain_sum"}
    task = load_task(make_task(tmp_path, [], arguments={"size": 3}, **fields))
    assert task.items == (Question("{'size': 3, 'seed': 0}", ("4",)),)
    with pytest.raises(DataError, match=r"reasoning_gym:other, arguments \{\}: no other"):
        load_task(make_task(tmp_path, [], **{**fields, "data": "reasoning_gym:other"}))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        load_task(str(tmp_path / "task.yaml"))


def test_documents_of_all_rows_are_candidates_once(tmp_path):
    rows = [{"query": "a?", "text": "A"}, {"query": "b?", "text": "B"}, {"query": "also a?", "text": "A"}]
    path = make_task(tmp_path, rows, **RETRIEVAL, documents="text", candidates="all")
    assert [(each.documents, each.relevant) for each in load_task(path).items] == [
        (("A", "B"), (0,)),
        (("A", "B"), (1,)),
        (("A", "B"), (0,)),
    ]
    own = make_task(tmp_path, [{"query": "q", "documents": ["x", "y"], "relevant": 1}], **RETRIEVAL)
    assert load_task(own).items == (Search("q", ("x", "y"), (1,)),)


def test_a_program_has_lists_a_line_an_element(tmp_path):
    rows = [{"q": "w", "tests": ["assert f() == 1", "assert f()"]}]
    task = load_task(make_task(tmp_path, rows, **CODE, program="{text}\n{tests}"))
    nested = load_task(make_task(tmp_path, [{"d": rows[0]}], kind="code", prompt="", program="{text}\n{d[tests]}"))
    assert program(nested.file, nested.items[0], "x") == Program("x\n", "assert f() == 1\nassert f()")
    assert program(task.file, task.items[0], "def f(): ...") == Program("def f(): ...\n", "assert f() == 1\nassert f()")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "benchmarks").glob("*/tasks/*.yaml")), ids=lambda path: path.stem
)
def test_every_task_of_the_benchmarks_is_well_formed(path):
    tree = yaml_values.read(path)
    file = KINDS[tree["kind"]].file.model_validate(tree)
    assert file.name == path.stem


ROW = {
    "q": "w5",
    "n": 3,
    "Long name": "l",
    "doc": {"a": ["x", {"b": "y"}], "0": "zero"},
    "a.b": "dotted",
    "id": uuid.UUID(int=7),
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{q}?", "w5?"),
        ("{n}{Long name}{a.b}", "3ldotted"),
        ("{doc[a][0]} {doc[a][1][b]} {doc[0]}", "x y zero"),
        ("{{q}} {{{q}}}", "{q} {w5}"),
        ("{id}", "00000000-0000-0000-0000-000000000007"),
        ("no field", "no field"),
    ],
)
def test_columns_and_keys_are_filled_in(template, expected):
    assert filled(template, ROW, "here") == expected


@pytest.mark.parametrize(
    "template",
    [
        *("{q.upper}", "{id.__class__}", "{id.__init__.__globals__[os].environ[PATH]}", "{doc[a].copy}", "{id.int}"),
        *("{q:>2000000000}", "{n:>{n}}", "{q!r}", "{doc[a]!s:5}", "{}", "{0}", "{", "}", "{q", "{doc[a}", "{doc[c]}"),
        *("{doc[a][2]}", "{doc[a][b]}", "{q[0]}", "{n[0]}", "{doc[__class__]}", "{doc[a][__len__]}", "{gone}"),
    ],
)
def test_nothing_else_is_done_in_a_template(template):
    with pytest.raises(DataError, match=r"^here: prompt "):
        filled(template, ROW, "here")
