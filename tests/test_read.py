"""The one reader of rows: a path that is there is that file, in every format; mistakes are told by file and line."""

import csv
import gzip
import json
import shutil

import datasets
import pyarrow as pa
import pytest
from byte_tokenizer import byte_tokenizer
from pyarrow import ipc, parquet
from task_folder import GENERATE, make_task
from test_conversation import ADDED, chatty

from recover.base.errors import DataError, RecipeError
from recover.config.recipe import Calibration, DenseText, GivenText
from recover.measure.tasks import load_task
from recover.prune.calibrate import calibration_batches, read_texts
from recover.text.read import matching, rows_at
from recover.train.sources import check_given, read_prompts, read_rows

ROWS = [{"text": "Größe, 7 €", "prompt": "one\ntwo"}, {"text": 'a "b", c\t', "prompt": "p"}]


def sheet(path, opened=open, delimiter=","):
    with opened(path, "wt", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text", "prompt"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def arrow(path, writer):
    table = pa.Table.from_pylist(ROWS)
    with writer(path, table.schema) as stream:
        stream.write_table(table)


def lines(path, opened=open):
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


WRITERS = {
    "rows.jsonl": lines,
    "rows.JSONL": lines,
    "rows.ndjson": lines,
    "rows.json": lines,
    "rows.jsonl.gz": lambda path: lines(path, gzip.open),
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "list.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": sheet,
    "rows.csv.gz": lambda path: sheet(path, gzip.open),
    "rows.tsv": lambda path: sheet(path, delimiter="\t"),
    "rows.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "stream.arrow": lambda path: arrow(path, ipc.new_stream),
    "file.arrow": lambda path: arrow(path, ipc.new_file),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_everywhere(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source = str(tmp_path / name)
    assert [row.value for row in read_rows(source)] == ROWS
    assert [row.value["prompt"] for row in read_prompts(source)] == [row["prompt"] for row in ROWS]
    assert [*read_texts(Calibration(data=source))] == [row["text"] for row in ROWS]
    task = make_task(tmp_path, [], kind="perplexity", data=name, split="train")
    (tmp_path / "task.jsonl").unlink()
    assert load_task(task).items == tuple(row["text"] for row in ROWS)


def test_an_object_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=1))
    assert [row.value for row in rows_at(str(tmp_path / "one.json"))] == [ROWS[0]]


FOLDERS = ["v[1]", "[ab]", "a*b", "what?", "é日本 x", "[!1]"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "t.txt"])
def test_an_existing_path_is_that_file_whatever_its_letters(tmp_path, folder, name):
    for place, word in ((folder, "mine"), ("v1", "other"), ("a", "other"), ("axb", "other"), ("whats", "other")):
        path = tmp_path / place / name
        path.parent.mkdir()
        if name.endswith("txt"):
            path.write_text(word)
        elif name.endswith("parquet"):
            parquet.write_table(pa.table({"text": [word]}), path)
        else:
            path.write_text(json.dumps({"text": word}) if name.endswith("jsonl") else f"text\n{word}\n")
    source = str(tmp_path / folder / name)
    assert [row.value["text"] for row in read_rows(source)] == ["mine"]
    assert [*read_texts(Calibration(data=source))] == ["mine"]
    task = make_task(tmp_path / folder, [], kind="perplexity", data=name)
    assert load_task(task).items == ("mine",)
    assert load_task(make_task(tmp_path, [], kind="perplexity", data=f"{folder}/{name}")).items == ("mine",)


def test_a_pattern_stands_for_files_behind_the_folders_that_are_there(tmp_path):
    for place in ("v[1]", "v1"):
        (tmp_path / place).mkdir()
        for part in ("b", "a"):
            (tmp_path / place / f"part-{part}.jsonl").write_text(json.dumps({"text": place + part}))
    found = [row.value["text"] for row in rows_at(str(tmp_path / "v[1]" / "part-*.jsonl"))]
    assert found == ["v[1]a", "v[1]b"]
    assert matching(tmp_path / "v[1]" / "part-[a].jsonl") == []
    assert matching(tmp_path / "v*" / "part-a.jsonl") == sorted(tmp_path / v / "part-a.jsonl" for v in ("v1", "v[1]"))
    with pytest.raises(DataError, match=r"none-\*\.jsonl: no file matches"):
        rows_at(str(tmp_path / "v[1]" / "none-*.jsonl"))


def test_a_folder_that_datasets_would_take_for_a_pattern_is_refused(tmp_path):
    for place in ("v[1]", "v1"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train.jsonl").write_text('{"text": "a"}\n')
    assert [row.value for row in rows_at(str(tmp_path / "v1"))] == [{"text": "a"}]
    with pytest.raises(DataError, match=r"v\[1\].*name its files instead"):
        rows_at(str(tmp_path / "v[1]"))


@pytest.fixture
def configured(tmp_path):
    """A data set of two configurations, as wikitext and c4 are."""
    folder = tmp_path / "set"
    for name in ("small", "large"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({"text": name, "prompt": name, "answer": "1", "q": "1"}))
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return str(folder)


def test_a_configuration_can_be_named_wherever_a_data_set_is(tmp_path, configured):
    assert [*read_texts(Calibration(data=configured, subset="large"))] == ["large"]
    given = GivenText(kind="given", source=configured, subset="small")
    check_given(given, byte_tokenizer(), 32)
    dense = DenseText(kind="dense", prompts=configured, subset="large")
    assert [row.value["prompt"] for row in read_prompts(dense.prompts, dense.split, dense.subset)] == ["large"]
    task = make_task(tmp_path, [], kind="perplexity", data=configured, subset="small", split="train")
    assert load_task(task).items == ("small",)


@pytest.mark.parametrize(("subset", "said"), [(None, "has several configurations: set 'subset'"), ("medium", "medium")])
def test_a_configuration_that_is_missing_is_asked_for(configured, subset, said):
    with pytest.raises(DataError, match=f"{said}.*small"):
        read_texts(Calibration(data=configured, subset=subset))


def test_a_folder_gives_its_own_rows_whatever_another_of_its_name_held(tmp_path, configured):
    """`datasets` by itself goes by the names of folder and configuration alone."""
    other = tmp_path / "elsewhere" / "set"
    shutil.copytree(configured, other)
    (other / "small" / "train.jsonl").write_text(json.dumps({"text": "other"}))
    assert [row.value["text"] for row in rows_at(configured, subset="small")] == ["small"]
    assert [row.value["text"] for row in rows_at(str(other), subset="small")] == ["other"]
    (other / "small" / "train.jsonl").write_text(json.dumps({"text": "changed"}))
    assert [row.value["text"] for row in rows_at(str(other), subset="small")] == ["changed"]


def test_a_row_that_cannot_be_read_in_a_folder_is_told_by_its_cause(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"text": "a"})] * 1000
    (tmp_path / "set" / "train.jsonl").write_text("\n".join([*rows[:500], "[1]", *rows[500:]]))
    with pytest.raises(DataError, match=r"set: cannot be read as a data set, split 'train': .*JSON parse error"):
        rows_at(str(tmp_path / "set"))


def spread(path, rows):
    """Rows with lists as a sheet has them: as JSON."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows])
    return str(path)


def turns(number):
    said = (("system", "Be brief."), ("user", f"one {number}?"), ("assistant", "1"), ("user", "two?"))
    return [{"role": role, "content": text} for role, text in (*said, ("assistant", "2"))]


def test_lists_in_a_sheet_are_read_as_lists_wherever_one_is_asked_for(tmp_path):
    rows = [
        {"q": "which?", "options": ["a", "b"], "label": 1, "query": "x", "documents": ["d", "e"], "relevant": 0}
        | {"messages": turns(number)}
        for number in range(3)
    ]
    source = spread(tmp_path / "s.csv", rows)
    (first, *_) = load_task(make_task(tmp_path, [], kind="choice", prompt="{q}", data="s.csv")).items
    assert (first.options, first.label) == (("a", "b"), 1)
    (first, *_) = load_task(make_task(tmp_path, [], kind="retrieval", data="s.csv")).items
    assert (first.documents, first.relevant) == (("d", "e"), (0,))
    asked = [row.value["prompt"] for row in read_prompts(source)]
    assert asked == [turns(number)[:-1] for number in range(3)]
    check_given(
        GivenText(kind="given", source=source, columns={"messages": "messages"}, strict=True), chatty(ADDED), 200
    )
    task = make_task(tmp_path, [{"q": '["no list"]', "answer": "[1, 2]"}], **GENERATE)
    assert load_task(task).items[0].targets == ("[1, 2]",)  # a text stays one where a text is asked for


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.parquet"])
def test_conversations_are_calibration_text_and_prompts_of_it(tmp_path, name):
    rows = [{"messages": turns(number)} for number in range(4)]
    if name.endswith("csv"):
        spread(tmp_path / name, rows)
    elif name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Calibration(data=str(tmp_path / name), column="messages", samples=2, length=64)
    tokenizer = chatty(ADDED)
    text = "".join(
        tokenizer.decode(row) for ids_BT in calibration_batches(cfg, tokenizer, 0) for row in ids_BT.tolist()
    )
    assert "<system>Be brief.<end><user>one " in text and "<assistant>1<end><user>two?<end><assistant>2<end>" in text
    asked = []
    answered = Calibration(data=cfg.data, column="messages", samples=1, length=32, answer=4)
    calibration_batches(
        answered, tokenizer, 0, lambda prompts: [asked.append(prompt) or [5] * 40 for prompt in prompts]
    )
    assert sorted(map(str, asked)) == sorted(str(turns(number)[:-1]) for number in range(4))
    with pytest.raises(DataError, match=r"messages need a chat template, and the tokenizer has none"):
        calibration_batches(cfg, byte_tokenizer(), 0)


def test_empty_documents_of_calibration_are_counted(tmp_path, capsys):
    rows = [{"text": text} for text in ("a", "", None, " ", "b")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_texts(Calibration(data=str(tmp_path / "t.jsonl")))
    assert "t.jsonl: 3 of 5 rows left out, which hold nothing" in " ".join(capsys.readouterr().err.split())


def test_a_prompt_of_nothing_is_left_out_and_null_is_nothing(tmp_path, capsys):
    rows = [{"q": q, "more": more, "answer": "1"} for q, more in (("a", None), (None, None), ("", " "), ("b", "c"))]
    fewshot = {"count": 1}
    task = load_task(make_task(tmp_path, rows, kind="generate", prompt="Q: {q} {more}", fewshot=fewshot))
    assert task.asked == ("Q: a ", "Q: b c") and task.items[0].prompt == "Q: b c 1\n\nQ: a "
    said = " ".join(capsys.readouterr().err.split())
    assert "2 empty rows left out" in said and "task.jsonl:2: prompt 'Q: {q} {more}': the columns that it asks" in said


HALF = r'{"text": "a half: \ud83d.", "prompt": "a half: \ud83d.", "q": "\udc00", "answer": "1"}'


@pytest.mark.parametrize("name", ["s.jsonl", "s.json", "s.jsonl.gz", "list.json"])
def test_half_a_character_is_refused_by_line_wherever_rows_are_read(tmp_path, name):
    whole = HALF.replace(r"\ud83d", r"\ud83d\ude00").replace(r"\udc00", "q")
    text = f"[{whole},\n{HALF}]" if name == "list.json" else f"{whole}\n{HALF}\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    where = rf"{name}(:2|, row 1): found half of a surrogate pair at character 9 of 'a half: \\ud83d"
    for read in (read_rows, read_prompts, lambda source: read_texts(Calibration(data=source))):
        with pytest.raises(DataError, match=where):
            read(str(tmp_path / name))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        load_task(make_task(tmp_path, [], **{**GENERATE, "data": name}))


def test_half_a_character_deep_inside_and_in_a_key_is_refused(tmp_path):
    for line in (r'{"m": [{"role": "user", "content": "\udfff"}]}', r'{"\ud800": 1}'):
        (tmp_path / "s.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"s\.jsonl:1: found half"):
            read_rows(str(tmp_path / "s.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.csv", b"text\n\xe9t\xe9\n", r"s\.csv: not UTF-8 text: .*save it as UTF-8"),
        ("s.csv", '"text"\na\n'.encode("utf-16"), r"s\.csv: not UTF-8 text: UTF-16, "),
        ("s.csv", b"text,x\na,b\nc\n", r"s\.csv:3: found 1 cells, expected 2: text, x"),
        ("s.csv", b"text,text\na,b\n", r"s\.csv:1: columns .*none twice"),
        ("s.csv", b'text\n"a\n', r"s\.csv: not a sheet: line 2"),
        ("s.csv", b"", r"s\.csv:? ?.*no rows"),
        ("s.json", b'[{"text": "a"},\n{"text": }]', r"s\.json:2: not JSON"),
        ("s.json", b'{"text": "a"}\n{"text": }\n', r"s\.json:2: not JSON"),
        ("s.json", b"[1]", r"s\.json, row 0: found int, expected one JSON object"),
        ("s.parquet", b"no parquet", r"s\.parquet: cannot be read as a data set, .*not a parquet file"),
        ("s.arrow", b"no arrow", r"s\.arrow: not a table"),
        ("s.jsonl.gz", b"no gzip", r"s\.jsonl\.gz: cannot be read"),
        ("s.xml", b"<a/>", r"s\.xml: its ending says nothing of how to read it; expected one of \.jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_task_file_in_another_encoding_is_refused_by_name(tmp_path, encoding):
    path = make_task(tmp_path, [{"q": "w", "answer": "1"}], **GENERATE)
    text = (tmp_path / "task.yaml").read_text() + "# Größe\n"
    (tmp_path / "task.yaml").write_bytes(text.encode(encoding))
    with pytest.raises(RecipeError, match=r"task\.yaml: not UTF-8: .*save it as UTF-8"):
        load_task(path)


def test_a_file_that_is_gone_is_named_with_the_one_that_was_meant(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"row\.csv: no such file\. Did you mean '.*rows\.csv'"):
        rows_at(str(tmp_path / "row.csv"))
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match=r"rows\.csv: no such file$"):
        rows_at(str(tmp_path / "rows.csv"))
