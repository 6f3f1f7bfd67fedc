"""What is shown, and what is recorded of where it ran."""

import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import recover
from recover.base import artifacts, console, provenance
from recover.base.errors import PruneError
from recover.report import words
from recover.run.stage_work import _plan_rows


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console, "_clock", lambda: self.now)

    def items(self, count: int, seconds: float) -> Any:
        for item in range(count):
            self.now += seconds
            yield item


def test_short_loops_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track(Clock(monkeypatch).items(10, 0.1), "short")) == list(range(10))
    assert capsys.readouterr() == ("", "")


def test_long_loops_say_count_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = Clock(monkeypatch).items(10, 2.0)
    assert sum(1 for _ in console.track(items, "long [a/b]", total=10, unit="samples")) == 10
    assert capsys.readouterr().err.splitlines() == [
        "long [a/b]: 3/10 samples, 0.5 samples/s, 14 s left",
        "long [a/b]: 6/10 samples, 0.5 samples/s, 8.0 s left",
        "long [a/b]: 9/10 samples, 0.5 samples/s, 2.0 s left",
        "long [a/b]: 10/10 samples, 0.5 samples/s, took 20 s",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_loops_in_loops_share_one_live_display_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), Clock(monkeypatch)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    for _ in console.track(clock.items(3, 2.0), "outer", total=3):
        for inner in console.track(clock.items(5, 2.0), "inner"):
            if inner == 3:
                break
    with pytest.raises(PruneError):
        for _ in console.track(clock.items(3, 2.0), "failing"):
            raise PruneError("inside")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "outer: 3/3 it, 0.1 it/s, took 30 s" in plain and plain.count("inner: 3 it") == 3
    assert console._shown == []


def test_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert len(list(console.track(Clock(monkeypatch).items(10, 2.0), "long"))) == 10
    console.say("a")
    console.heading("b")
    console.warn("c")
    console.error("d")
    console.table("e", ["f"], [["g"]])
    assert capsys.readouterr() == ("", "")


def test_text_comes_out_as_it_went_in(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    console.say(f"[dim]styled[/dim] {long}")
    console.say("not markup: [/INST] :smile:")
    console.heading("[b]")
    console.warn("[c]")
    console.table("[d]", ["[e]", "n"], [["[f]", 1234567], [None, 0.123456]])
    out, err = capsys.readouterr()
    console.table("a title that is longer than what stands below it", ["n"], [[1]])
    assert capsys.readouterr().out.startswith("a title that is longer than what stands below it\n")
    assert out.startswith(f"styled {long}\nnot markup: [/INST] :smile:\n\n[b]\n") and err == "warning: [c]\n"
    assert all(text in out for text in ("[d]", "[e]", "[f]", "1,234,567", "0.1235", "–"))


def test_names_in_brackets_come_out_as_they_went_in(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "a[bold red]b/report.html",
        "[link=http://127.0.0.1]x[/link]",
        "[/]",
        r"a\[dim ]",
        "[#1]",
        "[@click=x]y",
    ):
        console.say(f"[dim]wrote[/dim] {name}")
        assert capsys.readouterr().out == f"wrote {name}\n"


def test_durations_are_said_as_people_do() -> None:
    assert [console.duration(seconds) for seconds in (0.44, 12.4, 59.7, 200, 7500)] == [
        "0.4 s", "12 s", "1 min 0 s", "3 min 20 s", "2 h 5 min",
    ]  # fmt: skip


def test_plan_and_report_say_the_same_of_one_file() -> None:
    sizes = {0: "0 B", 950: "950 B", 999_600: "1 MB", 84_400_000: "84.4 MB", 3_087_467_144: "3.09 GB", 2e12: "2 TB"}
    for size, said in sizes.items():
        assert console.size(size) == words.size(size) == said
    figures = dict.fromkeys(("cache_bytes", "search_passes", "search_seconds", "teacher_tokens", "training_seconds"), 0)
    figures |= dict.fromkeys(
        ("parameters_dense", "parameters_pruned", "memory_bytes_per_process", "host_memory_bytes"), 0
    )
    figures |= dict.fromkeys(("active_dense", "active_pruned"), 0)
    kinds = {"file_dtype_dense": "float32", "file_dtype_pruned": "bfloat16"}
    rows = _plan_rows({**figures, "file_bytes_dense": 3_087_467_144, "file_bytes_pruned": 84_400_000, **kinds})
    assert ["file", "3.09 GB, float32", "84.4 MB, bfloat16"] in rows


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_revision_is_of_this_checkout_and_of_no_other(tmp_path: Path) -> None:
    package, vendored = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, vendored):
        folder.mkdir(parents=True)
    assert provenance.git_revision(package) is None
    git(tmp_path, "init", "-q")
    (package / "a.py").write_text("")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert provenance.git_revision(package) == {"commit": commit, "changed": False}
    (package / "a.py").write_text("1")
    assert provenance.git_revision(package) == {"commit": commit, "changed": True}
    assert provenance.git_revision(vendored) is None


def test_the_environment_is_a_record() -> None:
    found = provenance.environment()
    assert json.loads(artifacts.dumps(found)) == found
    assert found["recover"] == recover.__version__ and found["versions"]["torch"] and found["processes"] == 1
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**20 and found["argv"][0] == "recover"


HOSTILE = "a\x1b]0;title\x07\x9b2J\r\x00\u202eb\ud800"
SHOWN = r"a\x1b]0;title\x07\x9b2J\x0d\x00\u202eb\ud800"


def test_control_characters_are_shown_wherever_text_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.visible("ä\tb\n漢字 🙂") == "ä\tb\n漢字 🙂"
    console.say(HOSTILE)
    console.say(f"[dim]{HOSTILE}[/dim]")
    console.heading(HOSTILE)
    console.warn(HOSTILE)
    console.error(HOSTILE)
    console.table(HOSTILE, [HOSTILE], [[HOSTILE], [Path(HOSTILE)]])
    list(console.track(Clock(monkeypatch).items(4, 2.0), HOSTILE))
    said = "".join(capsys.readouterr())
    assert said.count(SHOWN) >= 10
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", said)


def test_what_libraries_log_is_shown_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from recover.base.console import quiet_libraries

    record = logging.LogRecord("transformers", logging.WARNING, "", 0, "type %s", (HOSTILE,), None)
    quiet_libraries()
    handler = logging.getLogger("transformers").handlers[0]
    assert handler.filter(record) and record.getMessage() == f"type {SHOWN}"


def test_a_traceback_shows_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    from recover import cli

    error = KeyError(HOSTILE)
    cli._print_traceback(ValueError, ValueError(HOSTILE), error.__traceback__)
    assert f"ValueError: {SHOWN}" in capsys.readouterr().err
