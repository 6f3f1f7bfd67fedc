"""Seconds of stages and their parts: they add up, stopped calls count, and the report has them as a table."""

from __future__ import annotations

import shutil
from contextlib import contextmanager, nullcontext

import pytest
from report_run import build_run
from small_run import MASKED, QUICKSTART, SMALL, Here, brief, finished, run

from recover.base import artifacts
from recover.base import clock as clocks
from recover.base.clock import OTHER, Clock, note, part, spent, stage_clock
from recover.config.recipe import load_recipe
from recover.report.collect import collect
from recover.report.render import render
from recover.run import stage_work, stages


@pytest.fixture
def wait(monkeypatch):
    """Lets the clock go on by so many seconds."""
    now = [100.0]

    def forward(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(clocks, "_clock", lambda: now[0])
    return forward


def test_a_part_inside_another_counts_as_its_own_and_all_add_up(wait):
    @part("writing")
    def write(seconds: float) -> None:
        wait(seconds)

    with stage_clock() as clock:
        wait(1)
        with part("measuring"):
            wait(2)
            write(4)
            wait(8)
        write(16)
        wait(32)
    assert clock.parts == {OTHER: 33.0, "measuring": 10.0, "writing": 20.0}
    assert clock.seconds == sum(clock.parts.values()) == 63.0


def test_a_part_that_fails_is_counted_and_closed(wait):
    with pytest.raises(ValueError), stage_clock() as clock:
        with part("training"):
            wait(3)
            raise ValueError
    assert clock.parts == {OTHER: 0.0, "training": 3.0} and clock.seconds == 3.0
    with stage_clock() as again:
        wait(1)
    assert again.parts == {OTHER: 1.0}


def test_outside_of_a_stage_and_of_one_inside_another_nothing_goes_astray(wait):
    with part("measuring"):
        wait(5)
    with stage_clock() as outer:
        wait(1)
        with part("training"), stage_clock() as inner:
            wait(2)
    assert inner.parts == {OTHER: 2.0} and inner.seconds == 2.0
    assert outer.seconds == 3.0


def test_calls_that_were_stopped_count_and_earlier_ones_of_a_done_stage_do_not(tmp_path):
    assert spent(tmp_path) == []
    note(tmp_path, "plan", Clock(1.0, {OTHER: 1.0}), done=True)
    note(tmp_path, "train", Clock(9.0, {"training": 9.0}), done=True)
    note(tmp_path, "train", Clock(4.0, {"training": 3.0, OTHER: 1.0}), done=False)
    note(tmp_path, "plan", Clock(2.0, {OTHER: 2.0}), done=True)
    note(tmp_path, "train", Clock(2.0, {"measuring": 2.0}), done=True)
    assert spent(tmp_path) == [
        {"stage": "plan", "seconds": 2.0, "parts": {OTHER: 2.0}, "calls": 1},
        {"stage": "train", "seconds": 6.0, "parts": {"training": 3.0, OTHER: 1.0, "measuring": 2.0}, "calls": 2},
    ]


def test_the_most_memory_of_a_stage_is_its_own(tmp_path):
    with stage_clock() as first:
        held = bytearray(96 * 2**20)
        del held
    with stage_clock() as second:
        pass
    if "process" not in first.memory:
        pytest.skip("this system does not tell a process's peak anew")
    assert first.memory["process"] >= second.memory["process"] + 60 * 2**20
    with stage_clock() as outer:
        held = bytearray(96 * 2**20)
        del held
        with stage_clock() as inner:
            pass
    assert outer.memory["process"] >= inner.memory["process"] + 60 * 2**20
    note(tmp_path, "train", Clock(1.0, {}, {"process": 5, "gpu": 9}), done=False)
    note(tmp_path, "train", Clock(1.0, {}, {"process": 7, "gpu": 2}), done=True)
    assert spent(tmp_path)[0].get("memory") == {"process": 7, "gpu": 9}


def test_the_report_has_the_memory_beside_the_time(tmp_path):
    root = build_run(tmp_path)
    note(root, "plan", Clock(1.0, {OTHER: 1.0}), done=True)
    note(root, "train", Clock(2.0, {OTHER: 2.0}, {"process": 3 * 10**9, "gpu": 5 * 10**9}), done=True)
    markdown = render(root, collect(root))[1].read_text()
    assert "Where the time and the memory went" in markdown and "| GPU memory at most |" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| train |"))
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["3 GB", "5 GB"]
    row = next(line for line in markdown.splitlines() if line.startswith("| all |"))
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["3 GB", "5 GB"]


def test_the_report_has_a_table_of_it(tmp_path):
    root = build_run(tmp_path)
    assert "Where the time went" not in render(root, collect(root))[1].read_text()
    note(root, "plan", Clock(1.0, {"checking inputs": 0.96, OTHER: 0.04}), done=True)
    note(root, "train", Clock(8.0, {"training": 8.0}), done=False)
    note(root, "train", Clock(1100.0, {"training": 60.0, OTHER: 1000.0, "writing text": 40.0}), done=True)
    note(root, "report", Clock(5.0, {OTHER: 5.0}), done=True)
    data = collect(root)
    assert [row["stage"] for row in data["times"]] == ["plan", "train", "report"]
    paths = render(root, data)
    markdown, page = (path.read_text() for path in paths[1:])
    assert "| plan | 1.0 s | checking inputs 1.0 s | " in markdown
    assert "| train (2 calls) | 1,108 s | training 68 s, writing text 40 s, other 1,000 s | " in markdown
    assert "| all | 1,109 s | – | " in markdown and "| report |" not in markdown
    assert 'id="table-times"' in page and "training 68 s, writing text 40 s" in page


def test_a_run_says_where_its_time_went(tmp_path_factory, tmp_path, monkeypatch):
    root = shutil.copytree(finished(tmp_path_factory, *MASKED), tmp_path / "quickstart")
    found = {row["stage"]: row for row in spent(root)}
    assert list(found) == ["plan", "dense", "prune", "before", "train", "after", "export", "report"]
    assert {"loading libraries", "checking inputs", OTHER} <= found["plan"]["parts"].keys()
    assert "reading weights" in found["dense"]["parts"] and "reading weights" not in found["before"]["parts"]
    assert {"probing", "measuring", "writing text", OTHER} <= found["before"]["parts"].keys()
    assert "pruning" in found["prune"]["parts"]
    for row in found.values():
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()), abs=0.01)

    def stopped(bench) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(stage_work.WORK, "before", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *MASKED, until="before", start="before")
    again = {row["stage"]: row for row in spent(root)}
    assert again["before"]["calls"] == 1 and again["before"]["seconds"] < found["before"]["seconds"]


@pytest.mark.parametrize(("until", "expected"), [("report", ["begun", "measured", "gone"]), ("after", ["measured"])])
def test_the_process_that_verifies_loads_its_libraries_while_the_recovered_model_is_measured(
    until, expected, tmp_path_factory, tmp_path, monkeypatch
):
    shutil.copytree(finished(tmp_path_factory, *MASKED), tmp_path / "quickstart")
    noted = []

    @contextmanager
    def process():
        noted.append("begun")
        try:
            yield
        finally:
            noted.append("gone")

    def measured(*_) -> None:
        noted.append("measured")
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_work, "fresh_process", process)
    monkeypatch.setattr(stage_work, "_probe_and_measure", measured)
    with pytest.raises(KeyboardInterrupt):
        stages.run(load_recipe(QUICKSTART, [*SMALL, *MASKED]), tmp_path, until=until, start="after")
    assert noted == expected


def test_a_verifying_process_that_was_killed_while_it_waited_is_begun_anew(tmp_path_factory, tmp_path, monkeypatch):
    shutil.copytree(finished(tmp_path_factory, *MASKED), tmp_path / "quickstart")

    class Killed(Here):
        def poll(self) -> int:
            return -9

    begun = []
    with brief():
        processes = iter([Killed(), Here()])
        monkeypatch.setattr(stage_work, "fresh_process", lambda: nullcontext(begun.append("one") or next(processes)))
        directory = stages.run(load_recipe(QUICKSTART, [*SMALL, *MASKED]), tmp_path, until="export", start="export")
    assert len(begun) == 2 and artifacts.read_json(directory.verify)["ok"]


def test_no_process_is_begun_to_verify_an_export_that_stays(tmp_path_factory, tmp_path, monkeypatch):
    """The figures of another probe are not in it."""
    shutil.copytree(finished(tmp_path_factory, *MASKED), tmp_path / "quickstart")
    stamps = [tmp_path / "quickstart" / stage / "DONE.json" for stage in ("after", "deploy")]
    before, begun = [stamp.read_text() for stamp in stamps], []
    with brief():
        monkeypatch.setattr(stage_work, "fresh_process", lambda: nullcontext(begun.append("one") or Here()))
        stages.run(load_recipe(QUICKSTART, [*SMALL, *MASKED, "probe.steps=3"]), tmp_path, until="export")
    same = [stamp.read_text() == text for stamp, text in zip(stamps, before, strict=True)]
    assert begun == [] and same == [False, True]
