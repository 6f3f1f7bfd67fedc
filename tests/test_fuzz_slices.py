"""A short slice of `make fuzz`: inputs of every kind are taken, or refused by an error of ours; the laws do bite."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from report_run import build_run
from typer.testing import CliRunner

from recover.base.errors import DataError, ModelError, RecoverError
from recover.cli import app
from recover.config.recipe import Model, TeacherText, embedded
from recover.models.load import load_tokenizer
from recover.run.directory import RunDirectory
from recover.text.prompts import encode_prompt
from recover.text.read import rows_at
from recover.train.teacher_file import check_teacher

DEV = Path(__file__).parent.parent / "dev"
# Inputs of each kind: some seconds in all. `make fuzz COUNT=100000` gives more.
INPUTS = {
    **{"recipe": 150, "task": 120, "rows": 200, "config": 80, "settings": 50, "template": 70},
    **{"gguf-head": 200, "gguf": 15, "safetensors": 150, "adapter": 40, "teacher": 200, "run": 20},
}


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DEV))
    import fuzz

    return fuzz


def test_every_kind_has_a_slice(fuzz: Any) -> None:
    import fuzz_kinds

    assert INPUTS.keys() == fuzz_kinds.KINDS.keys()


@pytest.mark.parametrize("kind", INPUTS)
def test_a_slice_of_every_kind_keeps_the_laws(fuzz: Any, kind: str) -> None:
    outcome = fuzz.fuzz(kind, count=INPUTS[kind])
    assert outcome.faults == [], "\n".join(map(str, outcome.faults))
    assert outcome.inputs == INPUTS[kind] and 0 < outcome.refused < outcome.inputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
def test_a_longer_slice_of_every_kind_keeps_the_laws(fuzz: Any, kind: str) -> None:
    outcome = fuzz.fuzz(kind, seconds=60, count=None, seed=1_000_000)
    assert outcome.faults == [], "\n".join(map(str, outcome.faults))


def test_an_input_is_the_same_for_the_same_seed(fuzz: Any, tmp_path: Path) -> None:
    for name in "ab":
        fuzz.fuzz("teacher", count=1, seed=4711, keep=tmp_path / name)
    assert (tmp_path / "a" / "teacher.jsonl").read_bytes() == (tmp_path / "b" / "teacher.jsonl").read_bytes()


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a traceback": (lambda _: {}["x"], r"KeyError"),
    "a process": (lambda _: subprocess.run([sys.executable, "-c", ""]), r"subprocess\.Popen"),
    "a shell": (lambda _: os.system("true"), r"os\.system"),
    "a file outside": (lambda folder: (folder.parent.parent / "x").write_text(""), r"open .*/x"),
    "a file of the user": (lambda _: (Path.home() / "x-fuzz").open("ab"), r"open .*x-fuzz"),
    "a removal outside": (lambda folder: os.remove(folder.parent.parent / "x"), r"os\.remove"),
    "a folder outside": (lambda folder: os.mkdir(folder.parent.parent / "y"), r"os\.mkdir"),
    "code of the input": (lambda folder: compile("1", str(folder / "x.py"), "exec"), r"compile .*x\.py"),
    "a wait": (lambda _: time.sleep(60), r"takes more than"),
    "a library that swallows it": (lambda _: swallowed(), r"os\.system"),
}


def swallowed() -> None:
    with suppress(BaseException):
        os.system("true")


@pytest.mark.parametrize("what", BREAKS)
def test_what_breaks_a_law_is_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    import fuzz_kinds

    class Broken(fuzz_kinds.Kind):
        def make(self, chance: Any) -> None:
            self.put("x.py", "1")

        def work(self, chance: Any) -> None:
            BREAKS[what][0](self.folder)

    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setitem(fuzz_kinds.KINDS, "broken", Broken)
    faults = fuzz.fuzz("broken", count=1).faults
    assert faults and all(re.search(BREAKS[what][1], fault.what) for fault in faults), faults


def test_memory_that_grows_is_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import fuzz_kinds

    held: list[bytes] = []

    class Growing(fuzz_kinds.Kind):
        def make(self, chance: Any) -> None:
            pass

        def work(self, chance: Any) -> None:
            held.append(os.urandom(2**16) * 128)

    monkeypatch.setattr(fuzz, "WARM", 5)
    monkeypatch.setattr(fuzz, "GROWTH", 10 * 2**20)
    monkeypatch.setitem(fuzz_kinds.KINDS, "growing", Growing)
    assert "memory grew" in str(fuzz.fuzz("growing", count=30).faults)


def damaged_gzip(folder: Path) -> Path:
    data = bytearray(gzip.compress(b'{"prompt": "Olga carries 81 roses."}\n' * 50))
    data[20:24] = b"\xff" * 4
    (folder / "rows.jsonl.gz").write_bytes(data)
    return folder / "rows.jsonl.gz"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def table(folder: Path) -> Path:
    (folder / "rows.arrow").write_bytes(b"ARROW1\0\0" + bytes(range(256)))
    return folder / "rows.arrow"


def offsets(folder: Path) -> Path:
    """A column of texts that are said to lie gigabytes behind the file."""
    import pyarrow
    from pyarrow import ipc

    sound = pyarrow.table({"prompt": ["Olga carries", "81 roses."]})
    path = folder / "rows.arrow"
    with ipc.new_file(str(path), sound.schema) as file:
        file.write_table(sound)
    data, found = path.read_bytes(), struct.pack("<3i", 0, 12, 21)
    assert data.count(found) == 1
    path.write_bytes(data.replace(found, struct.pack("<3i", 0, 2**30, 2**30 + 9)))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (offsets, "not a table that Arrow reads"),
        (damaged_gzip, "cannot be read: Error -3 while decompressing"),
        (pipe, "is a pipe or device; expected a file"),
        (table, "not a table that Arrow reads"),
    ],
)
def test_files_of_rows_that_were_found_by_fuzzing(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(DataError, match=words):
        rows_at(str(make(tmp_path)))


@pytest.mark.parametrize("row", [{"input_ids": 5}, {"top_ids": 7}, {"completion_mask": 1}, {"input_ids": [[1]]}])
def test_a_number_where_a_teachers_row_has_a_list(tmp_path: Path, row: dict[str, Any]) -> None:
    sound = {"input_ids": [1, 5], "completion_mask": [0, 1], "top_ids": [[5, 4]], "top_logprobs": [[-0.1, -3.0]]}
    path = tmp_path / "teacher.jsonl"
    path.write_text(json.dumps(sound | row))
    with pytest.raises(DataError, match=r"teacher\.jsonl:1: expected"):
        check_teacher(
            TeacherText(kind="teacher", source=str(path)), 64, load_tokenizer(Model(source="embedded:fable-2m"))
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("before/probe.json", {"final": "x"}),
        ("dense/measure.json", {"tasks": ["x"]}),
        ("speed.json", {"dense": 1}),
        ("after/measure.json", {"headline": None, "tasks": {"a": {}}}),
    ],
)
def test_a_record_of_another_shape_is_named(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    run = build_run(tmp_path)
    for stage in ("dense", "before", "after", "export"):
        RunDirectory(run).mark_done(stage, {})
    (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | change))
    said = CliRunner().invoke(app, ["report", str(run)])
    assert said.exit_code == 1 and f"{name} is not what was written: it cannot be read as a record" in said.stderr
    assert not (run / "report.json").exists()


def test_a_tokenizer_that_loads_and_does_not_work_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded("fable-2m"), tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "long"}))
    with pytest.raises(ModelError, match="tokenizer: cannot be loaded"):
        load_tokenizer(Model(source=str(folder)))


def test_half_a_character_of_a_template_is_refused() -> None:
    tokenizer = load_tokenizer(Model(source="embedded:fable-2m"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}\ud83d"
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encode_prompt(tokenizer, "Olga carries 81 roses.")


def test_a_line_of_a_message_has_an_end() -> None:
    assert len(str(RecoverError("a" * 10**6))) < 2100
    assert str(RecoverError("a\nb")) == "a\nb"
