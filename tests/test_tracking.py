"""Trackers get what a run finds, as the same run after a stop, and never end a training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking as accelerates
from small_run import DEPTH, QUICKSTART, begun, run

from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import RecipeError
from recover.config.recipe import Recipe, load_recipe
from recover.run import tracking
from recover.run.directory import RunDirectory
from recover.run.tracking import Tracking, refuse

HEADLINE = {"generation": 0.5, "choice": None}


class Notes(accelerates.GeneralTracker):
    """Keeps what it is told; breaks where it is asked to."""

    name = "notes"
    requires_logging_directory = True
    opened: ClassVar[list[Notes]] = []
    broken: str | None = None

    def __init__(self, run_name: str, logging_dir: str, **options: Any) -> None:
        super().__init__()
        self.where = (run_name, logging_dir, options)
        self.settings: dict[str, Any] = {}
        self.lines: list[tuple[int | None, dict[str, Any]]] = []
        self.ended = False

    @property
    def tracker(self) -> Notes:
        return self

    def start(self) -> None:
        if self.broken == "start":
            raise ConnectionError("no host")
        self.opened.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.broken == "log":
            raise ConnectionError("no host")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.ended = True


class Others(Notes):
    name = "others"
    opened: ClassVar[list[Notes]] = []


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Notes, Others):
        monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, kind.name, kind)
        monkeypatch.setattr(kind, "opened", [])


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "lr": 1e-3}


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path) -> None:
    assert recipe().track == ()
    quiet = Tracking(recipe(), tmp_path)
    quiet.step(1, line(1))
    quiet.epoch(1, HEADLINE, 0.1, 0.2)
    quiet.outcome(1, {"dense": HEADLINE}, tmp_path / "report.html", "now")
    quiet.finish()
    assert [*tmp_path.iterdir()] == [] and Notes.opened == []


def test_one_name_or_several() -> None:
    assert recipe("track=notes").track == ("notes",)
    assert recipe("track=[notes, others]").track == ("notes", "others")


def test_a_plan_refuses_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(("notes",))
    with pytest.raises(RecipeError, match=r"track: 'tensorbord': expected some of aim, .*tensorboard"):
        refuse(("tensorbord",))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="track: comet_ml: its package is not installed: pip install comet-ml"):
        refuse(("comet_ml",))


def test_a_run_that_goes_on_is_the_same_run_and_one_begun_anew_is_another(tmp_path: Path) -> None:
    first = Tracking(recipe("track=notes"), tmp_path)
    first.step(1, line(1))
    first.epoch(1, HEADLINE, 0.1, 0.2)
    first.finish()
    (notes,) = Notes.opened
    assert notes.where == ("recover", str(tmp_path / "track"), {}) and notes.ended
    assert notes.settings["prune.count"] == 2 and notes.settings["name"] == "quickstart"
    assert notes.lines == [
        (1, {"train/loss": 1.0, "train/lr": 1e-3}),
        (1, {"epoch/generation": 0.5, "epoch/kl": 0.1, "epoch/loss": 0.2}),
    ]
    id = read_json(tmp_path / "track" / "run.json")["id"]

    def opened_at(step: int) -> str:
        Tracking(recipe("track=notes"), tmp_path).step(step, line(step))
        return read_json(tmp_path / "track" / "run.json")["id"]

    assert opened_at(2) == id and Notes.opened[1].settings == {}
    assert opened_at(1) != id and Notes.opened[2].settings


@pytest.mark.parametrize("where", ["start", "log"])
def test_a_tracker_that_fails_is_said_and_left_out(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Notes, "broken", where)
    monkeypatch.setattr(Others, "broken", None)
    both = Tracking(recipe("track=[notes, others]"), tmp_path)
    both.step(1, line(1))
    both.step(2, line(2))
    (others,) = Others.opened
    assert [step for step, _ in others.lines] == [1, 2]
    said = capsys.readouterr()
    assert (said.out + said.err).count("track: notes: ConnectionError: no host; the run goes on without it") == 1


def test_a_report_is_sent_once_for_each_export(tmp_path: Path) -> None:
    for of in ("Monday", "Monday", "Tuesday"):
        each = Tracking(recipe("track=notes"), tmp_path)
        each.outcome(7, {"dense": HEADLINE, "recovered": HEADLINE}, tmp_path / "report.html", of)
        each.finish()
    assert len(Notes.opened) == 2
    assert Notes.opened[0].lines == [(7, {"dense/generation": 0.5, "recovered/generation": 0.5})]


def test_a_run_sends_each_step_each_epoch_and_the_outcome(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    directory = begun(tmp_path_factory, tmp_path, *DEPTH)
    run(tmp_path, *DEPTH, "track=notes")
    (notes,) = Notes.opened
    assert notes.ended
    steps = [(step, values) for step, values in notes.lines if "train/loss" in values]
    assert [step for step, _ in steps] == [each["step"] for each in read_jsonl(directory.train / "steps.jsonl")]
    epochs = [values["epoch/generation"] for _, values in notes.lines if "epoch/generation" in values]
    assert epochs == [each["score"] for each in read_jsonl(directory.epochs)]
    step, last = notes.lines[-1]
    assert step == read_json(directory.train / "best.json")["step"]
    assert last["recovered/generation"] == read_json(directory.after / "measure.json")["headline"]["generation"]
    before = {path: path.read_bytes() for path in (directory.root / "train").glob("*.json")}
    run(tmp_path, *DEPTH, "track=[]")
    assert len(Notes.opened) == 1 and all(path.read_bytes() == data for path, data in before.items())
    assert RunDirectory(directory.root).done("after") is not None


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_each_step_once_after_a_return(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3, 4), (3, 4, 5)):  # stopped at 4, gone back to the checkpoint of 2
        each = Tracking(recipe("track=tensorboard"), tmp_path)
        for step in steps:
            each.step(step, line(step))
        (tmp_path / "report.md").write_text("# Report")
        each.outcome(steps[-1], {"dense": HEADLINE}, tmp_path / "report.html", json.dumps(steps))
        each.finish()
    found = EventAccumulator(str(tmp_path / "track" / "recover"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert "report/text_summary" in found.Tags()["tensors"]
