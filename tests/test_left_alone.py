"""What goes on, or stays behind, when a process is killed or a disk is full."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import faulty
import pytest
from gguf_checkpoint import checkpoint, words
from strangers import contents
from tiny import tiny
from typer.testing import CliRunner

from recover import cli
from recover.base import artifacts
from recover.base.errors import ArtifactError, ExportError, ModelError
from recover.config import recipe
from recover.export import verify
from recover.export.gguf.write import write_gguf
from recover.export.write import write_checkpoint
from recover.models import source
from recover.run.directory import RunDirectory


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("handed", [False, True])
def test_the_verifying_process_ends_with_its_parent_and_writes_nothing(tmp_path: Path, handed: bool) -> None:
    out = tmp_path / "verify.json"
    out.write_text("a verdict of a later run")
    fifo = tmp_path / "plan.json"  # a read of it waits for ever, as a long check would
    os.mkfifo(fifo)
    (tmp_path / "deploy").mkdir()
    artifacts.write_manifest(tmp_path / "deploy")
    expected = tmp_path / "expected.safetensors"
    os.mkfifo(expected)
    arguments = [str(tmp_path / "deploy"), "--expected", str(expected), "--plan", str(fifo), "--out", str(out)]
    started = tmp_path / "started"

    def work() -> None:
        with verify.fresh_process() as process:
            if handed:
                assert process.stdin is not None
                process.stdin.write(json.dumps(arguments))
                process.stdin.close()
            artifacts.write_text(started, str(process.pid))
            time.sleep(60)

    parent = faulty.start(work, tmp_path / "log")
    while not started.exists():
        assert not os.waitpid(parent, os.WNOHANG)[0], (tmp_path / "log").read_text()
        time.sleep(0.02)
    time.sleep(1.0)
    os.kill(parent, signal.SIGKILL)
    faulty.end(parent)
    assert gone(int(started.read_text()), 60.0)
    assert out.read_text() == "a verdict of a later run"


def test_a_process_whose_parent_was_gone_at_the_start_ends(tmp_path: Path) -> None:
    reading, writing = os.pipe()  # nothing comes, as from a parent that is at work

    def work() -> None:
        os.dup2(reading, 0)
        sys.stdin = open(0)  # noqa: SIM115
        verify.main([verify.WAITING, "1999999"])

    try:
        assert faulty.run(tmp_path / "waits", work)[0] == verify.ORPHANED
    finally:
        os.close(reading)
        os.close(writing)


def test_what_a_killed_conversion_left_is_tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    file = write_gguf(checkpoint(tmp_path / "model"), tmp_path / "model.gguf")
    cache = tmp_path / "cache" / "gguf"
    name = f"{artifacts.sha256(file)}-{source.CONVERSION}"
    other, busy = (f"{digit * 64}-3" for digit in "ab")
    for left in (f".{name}.7.writing", f".{other}.7.writing", f".{busy}.7.writing", ".mine.7.writing"):
        (cache / left).mkdir(parents=True)
        (cache / left / "model.safetensors").write_text("half")
    (cache / "mine").mkdir()
    with source._locked(cache / f".{busy}.lock"):
        source.locate(recipe.Model(source=str(file)))
        left = [f".{busy}.7.writing", f".{busy}.lock", ".mine.7.writing", name, "mine"]
        assert sorted(path.name for path in cache.iterdir()) == left


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/none"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    file = write_gguf(recipe.embedded("fable-2m"), tmp_path / "model.gguf")
    monkeypatch.setenv("RECOVER_CACHE", cache)
    with pytest.raises(ModelError, match=rf"^{cache}/gguf: .* cannot be written .*set RECOVER_CACHE"):
        source.locate(recipe.Model(source=str(file)))


def test_a_disk_that_is_full_is_one_line_whichever_library_writes(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # fewer bytes than the weights have
    try:
        with pytest.raises(ArtifactError, match=r"^[^\n]*deploy: File too large$"):
            write_checkpoint(tiny("llama"), words(), tmp_path / "deploy", card="", record={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_an_error_is_read_out_of_a_librarys_text(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="disk full: 7 bytes to write"):
        with artifacts.explaining_libraries(tmp_path / "x", 7):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (RuntimeError("something else"), OSError(2, "no such file")):
        with pytest.raises(type(error)):
            with artifacts.explaining_libraries(tmp_path / "x", full_alone=True):
                raise error


def test_a_measurement_is_not_written_over_the_data_of_its_task(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "task.yaml").write_text("name: t\nkind: generate\ndata: rows.jsonl\n")
    for out in ("rows.jsonl", "task.yaml"):
        kept = (tmp_path / out).read_bytes()
        job = ["measure", "embedded:fable-2m", "--tasks", str(tmp_path / "task.yaml"), "--out", str(tmp_path / out)]
        done = CliRunner().invoke(cli.app, job)
        assert done.exit_code == 1 and "is to be read and to be written" in done.stderr
        assert (tmp_path / out).read_bytes() == kept


@pytest.mark.parametrize("name", ["device", "stdout", "read_only", "."])
@pytest.mark.parametrize("write", [artifacts.write_text, lambda path, _: write_gguf(recipe.embedded("fable-2m"), path)])
def test_what_is_no_file_or_read_only_is_not_replaced(
    tmp_path: Path, name: str, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts.os, "access", lambda path, _mode: path.stat().st_mode & 0o200)  # root may all
    path = tmp_path / f"{name}.gguf" if name != "." else Path(".")
    if name == "device":
        os.mkfifo(path)
    elif name == "stdout":
        path.symlink_to("/proc/self/fd/1")
    elif name == "read_only":
        path.write_text("mine")
        path.chmod(0o444)
    before = contents(tmp_path)
    with pytest.raises((ArtifactError, ExportError), match=r"is no file|is read-only|is a folder|ends in \.gguf"):
        write(path, "text")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["measure", "{model}", "--tasks", "embedded:facts", "--out", "{model}/config.json"],
        ["measure", "{model}", "--tasks", "embedded:facts", "--out", "{model}/model.safetensors"],
        ["teacher", "{model}", "{rows}", "{model}/tokenizer.json"],
        ["teacher", "{model}", "{rows}", "{notes}"],
        ["compare", "{model}", "--html", "{notes}"],
        ["report", "{model}", "--csv", "{model}/config.json"],
        ["report", "{model}", "--latex", "{rows}"],
        ["report", "{model}", "--out", "{rows}"],
    ],
)
def test_an_output_takes_the_place_of_no_model_and_of_no_file_of_another_kind(tmp_path: Path, words: list[str]) -> None:
    shutil.copytree(recipe.embedded("fable-2m"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "notes.md").write_text("mine")
    names = {"model": tmp_path / "model", "rows": tmp_path / "rows.jsonl", "notes": tmp_path / "notes.md"}
    before = contents(tmp_path)
    done = CliRunner().invoke(cli.app, [word.format(**names) for word in words])
    assert done.exit_code == 1 and "give the output another name" in done.stderr, done.output
    assert contents(tmp_path) == before


def test_a_copy_by_hard_links_keeps_its_lines_and_its_lock(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("run", "copy")]
    runs[0].mkdir()
    with RunDirectory(runs[0]).lock():
        artifacts.append_jsonl(runs[0] / "steps.jsonl", {"step": 1})
    shutil.copytree(runs[0], runs[1], copy_function=os.link)
    before = contents(runs[1])
    with RunDirectory(runs[0]).lock():
        artifacts.append_jsonl(runs[0] / "steps.jsonl", {"step": 2})
        assert contents(runs[1]) == before
        with RunDirectory(runs[1]).lock():  # another run, which nobody works on
            pass
    assert [line["step"] for line in artifacts.read_jsonl(runs[0] / "steps.jsonl")] == [1, 2]


def test_a_line_is_not_added_to_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine, without an end of line")
    (tmp_path / "times.jsonl").symlink_to("notes")
    artifacts.append_jsonl(tmp_path / "times.jsonl", {"stage": "plan"})
    assert (tmp_path / "notes").read_text() == "mine, without an end of line"
    assert artifacts.read_jsonl(tmp_path / "times.jsonl") == [{"stage": "plan"}]
