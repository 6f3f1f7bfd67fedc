"""Data of others: what unpacks without end, leads out of its file or its folder, or would have something opened."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from recover.base.errors import DataError
from recover.text import data_gate
from recover.text.data_gate import FREE, TIMES
from recover.text.read import rows_at

ROWS = [{"text": "Olga carries"}, {"text": "81 roses."}]
OFFSETS = struct.pack("<3i", 0, 12, 21)


def refused(source: Path, words: str, **options: Any) -> None:
    with pytest.raises(DataError, match=words) as raised:
        [row.value for row in rows_at(str(source), **options)]
    assert source.name in str(raised.value) and len(str(raised.value)) < 1000


def packed(path: Path, size: int, unit: bytes) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(size // len(unit)):
            file.write(unit)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "list.json.gz"])
def test_a_gzip_file_unpacks_to_its_bound_and_no_further(tmp_path: Path, name: str) -> None:
    begin = {"rows.jsonl.gz": b"", "rows.csv.gz": b"text\n", "list.json.gz": b"[\n"}[name]
    path = packed(
        tmp_path / name, 2**25, (b" " * 2**16 if name == "rows.csv.gz" else b'{"text": "a"}' + b" " * 2**16) + b"\n"
    )
    path.write_bytes(gzip.compress(begin) + path.read_bytes())
    assert path.stat().st_size < FREE / TIMES
    refused(path, r"unpacks to more than 16,777,216 bytes.*unpack it, and give it as JSONL")


def test_a_gzip_file_of_one_line_is_no_row(tmp_path: Path) -> None:
    path = packed(tmp_path / "rows.jsonl.gz", 2**26, b" " * 2**20)
    with path.open("ab") as file:  # noise, so that the file may unpack to so much
        file.write(gzip.compress(random.Random(0).randbytes(2**20)))
    refused(path, r"rows\.jsonl\.gz:1: a line of more than 33,554,432 characters; expected one row a line")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.csv", "rows.tsv"])
def test_a_line_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(data_gate, "LONGEST_LINE", 1000)
    sheet = name.endswith("sv")
    for length, taken in ((980, True), (1100, False)):
        cell = "a" * length
        (tmp_path / name).write_text(f"text\n{cell}\n" if sheet else json.dumps({"text": cell}))
        if taken:
            assert [row.value for row in rows_at(str(tmp_path / name))] == [{"text": cell}]
        else:
            refused(tmp_path / name, rf":{2 if sheet else 1}: a line of more than 1,000 characters")


def test_a_cell_over_many_lines_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_gate, "LONGEST_LINE", 1000)
    (tmp_path / "rows.csv").write_text('text\n"' + "abc\n" * 500 + '"\n')
    refused(tmp_path / "rows.csv", r"not a sheet: line \d+: field larger than field limit \(1000\)")


def test_a_json_file_of_one_value_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_gate, "LONGEST_JSON", 1000)
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}] * 50))
    assert len(rows_at(str(tmp_path / "list.json"))) == 50
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}] * 100))
    refused(tmp_path / "list.json", r"one JSON value of more than 1,000 characters; save it as JSONL")


DEEP = {
    "lists": "[" * 101 + "]" * 101,
    "objects": '{"a":' * 150 + "1" + "}" * 150,
    "unclosed": "[" * 100_000,
    "a number": "1" * 5000,
}


@pytest.mark.parametrize("what", DEEP)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "list.json"])
def test_json_that_python_cannot_hold_is_refused_by_line(tmp_path: Path, what: str, name: str) -> None:
    text = f'{{"text": "a", "x": {DEEP[what]}}}'
    (tmp_path / name).write_text(f"[{text}]" if name == "list.json" else f'{{"text": "a"}}\n{text}\n')
    refused(tmp_path / name, r":\d+: not JSON \(.*(deep|digits|Expecting)")


def test_lists_as_deep_as_rows_have_them_are_taken(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(90):
        value = [value]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"x": value, "wide": [[]] * 1000}))
    assert rows_at(str(tmp_path / "rows.jsonl"))[0].value["x"] == value


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    return folder


def flipped(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (struct.pack("<3i", 0, 2**30, 2**30 + 9), "[Oo]ffset"),
        (struct.pack("<3i", 0, -5, 21), "[Oo]ffset"),
        (struct.pack("<3i", 0, 22, 21), "[Oo]ffset"),
    ],
)
@pytest.mark.parametrize("kind", ["file.arrow", "stream.arrow", "saved", "folder"])
def test_offsets_that_lead_out_of_a_file_are_refused(tmp_path: Path, kind: str, new: bytes, words: str) -> None:
    """Arrow itself believes them, and ends the process or gives other memory as text."""
    source = tmp_path / kind
    if kind == "saved":
        saved(source)
        file = next(source.glob("*.arrow"))
    else:
        file = source / "train.arrow" if kind == "folder" else source
        file.parent.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(ROWS)
        with (ipc.new_file if kind == "file.arrow" else ipc.new_stream)(str(file), table.schema) as writer:
            writer.write_table(table)
    assert [row.value for row in rows_at(str(source))] == ROWS
    flipped(file, OFFSETS, new)
    refused(source, words)


def test_text_of_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    flipped(next(saved(tmp_path / "saved").glob("*.arrow")), b"Olga", b"\xff\xfe\xfd\xfc")
    refused(tmp_path / "saved", "UTF8|UTF-8")


def small(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(table, path, compression="zstd")
    else:
        with ipc.new_file(str(path), table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    assert path.stat().st_size < 2**20
    return path


HUGE: dict[str, tuple[str, Callable[[], Any]]] = {
    "one text a million times": (".arrow", lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 10**6), ["a" * 1000])),
    "one text in parquet": (".parquet", lambda: pa.array(["a" * 1000]).take(pa.array([0] * 10**5))),
    "zeros": (".arrow", lambda: pa.array(["\0" * 2**20] * 70)),
    "nulls without a byte": (".arrow", lambda: pa.nulls(2**31 - 1)),
    "a list of them": (".arrow", lambda: pa.ListArray.from_arrays(pa.array([0, 2**30], pa.int32()), pa.nulls(2**30))),
    "texts over one another": (".arrow", lambda: pa.array(["a" * 100] * 3, pa.string_view())),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_table_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    ending, make = HUGE[what]
    if what == "one text in parquet":
        monkeypatch.setattr(data_gate, "FREE", 2**20)
    path = small(tmp_path / f"rows{ending}", pa.table({"text": make()}))
    refused(path, r"unpacks to more than|Arrow's type string_view")


def test_an_ordinary_table_takes_what_its_values_take() -> None:
    columns = {
        "text": (["ab", "cde", None], 24 + 5),
        "number": ([1, 2, None], 24),
        "list": ([["ab"], [], ["c", "d"]], 24 + 24 + 4),
        "struct": ([{"a": "xy", "b": 1}] * 3, 24 + 24 + 24 + 6),
        "flag": ([True, False, None], 24),
    }
    for values, bytes_taken in columns.values():
        array: Any = pa.array(values)
        assert data_gate.taken(array) == bytes_taken
        assert data_gate.taken(array.slice(3)) == 0
    texts: Any = pa.array(["ab", "ab", "cde"]).dictionary_encode()
    assert data_gate.taken(texts) == 24 + 7


def test_a_parquet_file_whose_footer_claims_terabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    claimed = SimpleNamespace(num_row_groups=1, row_group=lambda _: SimpleNamespace(total_byte_size=2**42))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "metadata", claimed)
        refused(path, "unpacks to more than 16,777,216 bytes")
    assert len(rows_at(str(path))) == 2


def with_media(path: Path, where: str) -> Path:
    """A parquet file that asks `datasets` to open a picture for each of its rows."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = datasets.Features(
        {"picture": datasets.Image(), "sounds": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    )
    schema = pa.schema(
        [("picture", picture), ("sounds", pa.list_(picture)), ("text", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features.to_dict()}})},
    )
    opened = {"bytes": None, "path": where}
    parquet.write_table(pa.Table.from_pylist([{"picture": opened, "sounds": [opened], "text": "a"}], schema), path)
    return path


@pytest.mark.parametrize("where", ["secret.png", "http://127.0.0.1:9/x.png"])
def test_nothing_is_opened_that_a_row_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *given, **_: asked.append(given))
    source = with_media(tmp_path / "rows.parquet", where if ":" in where else str(tmp_path / where))
    assert [row.value for row in rows_at(str(source))] == [{"text": "a"}] and not asked
    assert "columns picture, sounds hold no text, and are not read" in " ".join(capsys.readouterr().err.split())


OUTSIDE = ["/etc/passwd", "../secret.jsonl", "a/../../secret.jsonl", "~/x.jsonl", "http://127.0.0.1:9/x.jsonl"]


@pytest.mark.parametrize("name", [*OUTSIDE, "zip://x.jsonl::http://127.0.0.1:9/a.zip"])
@pytest.mark.parametrize("settings", ["README.md", ".huggingface.yaml"])
def test_a_folder_whose_settings_name_files_outside_of_it_is_refused(tmp_path: Path, name: str, settings: str) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "SECRET"}\n')
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    for files in (name, [{"split": "train", "path": ["train.jsonl", name]}]):
        text = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
        (folder / settings).write_text(f"---\n{text}\n---\n" if settings == "README.md" else text)
        refused(folder, rf"set/{settings}: its data is '.*'; expected a path inside of the folder")


def test_settings_that_repeat_themselves_without_end_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    names = "abcdefghijklmnopqrstuvwxyz"
    bomb = "".join(f"  {b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
    text = f"x:\n  a: &a [../../secret]\n{bomb}configs:\n- config_name: default\n  data_files: *z\n"
    (folder / "README.md").write_text(f"---\n{text}---\n")
    refused(folder, "its data is '../../secret'")


@pytest.mark.parametrize("name", ["train.zip", "train.tar", "train.jsonl.xz", "train.tgz"])
def test_archives_in_a_folder_are_not_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "set" / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=r"an archive, which would be unpacked unseen; unpack it, or take it away"):
        rows_at(str(tmp_path / "set"))


def test_a_packed_file_in_a_folder_has_the_same_bound(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert [row.value for row in rows_at(str(tmp_path / "set"))] == [{"text": "a"}]
    packed(tmp_path / "set" / "train.jsonl.gz", 2**27, b" " * 2**20)
    with pytest.raises(DataError, match=r"train\.jsonl\.gz: unpacks to more than"):
        rows_at(str(tmp_path / "set"))


@pytest.mark.parametrize("name", ["pictures.png", "data.xml", "fasta.fa"])
def test_a_folder_of_something_else_than_rows_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text("<a/>")
    refused(tmp_path / "set", r"set: holds files that `datasets` reads as '\w+'; expected json, csv, parquet")


def test_a_data_set_of_a_hub_may_name_files_of_the_hub_alone() -> None:
    def builder(*files: str) -> Any:
        made: Any = type("Json", (), {"__module__": "datasets.packaged_modules.json.json"})()
        made.config = SimpleNamespace(data_files={"train": list(files)})
        return made

    data_gate.check_builder(builder("hf://datasets/a/b@0f3c/x.jsonl"), "a/b", "hf://datasets/")
    for name in ("/etc/passwd", "https://example.org/x.jsonl"):
        with pytest.raises(DataError, match=r"a/b: its settings name '.*', which is no file of it"):
            data_gate.check_builder(builder("hf://datasets/a/b@0f3c/x.jsonl", name), "a/b", "hf://datasets/")


@pytest.mark.parametrize("name", ["../elsewhere/data.arrow", "/etc/passwd", 5, None])
def test_a_saved_data_set_reads_files_of_its_own_folder(tmp_path: Path, name: Any) -> None:
    saved(tmp_path / "elsewhere")
    state = saved(tmp_path / "set") / "state.json"
    settings = json.loads(state.read_text())
    settings["_data_files"][0]["filename"] = name
    state.write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"state\.json: its data is .*; expected a file in its folder"):
        rows_at(str(tmp_path / "set"))


def test_a_split_of_a_saved_data_set_is_a_folder_in_it(tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere")
    splits: Any = datasets.DatasetDict
    splits(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
    with pytest.raises(DataError, match=r"a split '\.\./elsewhere'; expected the name of a folder in it"):
        rows_at(str(tmp_path / "set"), split="../elsewhere")
