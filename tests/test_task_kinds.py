"""A kind of task is one record: what is registered is read, measured, told and reported, and nothing else names it."""

import importlib
import json

import pytest
import toy_kind
from report_page import rewrite
from report_run import build_run
from task_folder import make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import RecipeError
from recover.commands import measure as measuring
from recover.config.recipe import Measure
from recover.config.tasks import KINDS, USES, Figure, TaskKind, headline_figures, register
from recover.export.write import _table
from recover.measure.model import Work, work_of
from recover.measure.tasks import load_task, measure
from recover.report import verdict
from recover.report.collect import collect
from recover.report.render import render

CFG = Measure(tasks=("x",), max_new_tokens=8, batch_size=4, sampling=None)
ROWS = [{"q": f"w{number}"} for number in range(5, 9)]


@pytest.fixture
def toy(monkeypatch):
    for table, name in ((USES, "stamina"), (KINDS, "long")):
        monkeypatch.setitem(table, name, None)  # which monkeypatch takes away again
        del table[name]
    register(toy_kind.USE)
    register(toy_kind.KIND)


def test_a_kind_from_outside_is_measured_and_told(tmp_path, toy, capsys):
    path = make_task(tmp_path, ROWS, kind="long", prompt="{q}", tokens=4, fewshot={"count": 2})
    task = load_task(path)
    assert task.items[0].prompt == "w6 and so on\n\nw7 and so on\n\nw5"
    record, texts = measure(tiny(), word_tokenizer(), [task], CFG)
    found = record["tasks"]["task"]
    assert found["long"] == record["headline"]["stamina"] == sum(len(each["ids"]) >= 4 for each in texts["task"]) / 4
    assert record["headline"] | {"stamina": None} == dict.fromkeys([*USES, "perplexity"])
    measuring.say({"model": "m", "dtype": "float32", **record})
    assert "long texts" in capsys.readouterr().out
    assert verdict.headline_line({"generation": None, "stamina": 0.5}) == "stamina 50.0%"
    assert "| stamina (long texts) | 50.0% | 25.0% |" in _table(
        {"dense": {"stamina": 0.5}, "pruned": {"stamina": 0.25}}
    )


def test_a_kind_from_outside_is_reported_with_its_own_verdict(tmp_path, toy):
    run = build_run(tmp_path)
    for folder, value in (("dense", 0.8), ("before", 0.2), ("after", 0.78)):
        long = {"kind": "long", "items": 9, "long": value, "interval95": [value - 0.01, value + 0.01], "samples": []}
        rewrite(run / folder / "measure.json", lambda record, long=long: record["tasks"].update(openings=long))
    data = collect(run)
    assert data["headline"]["dense"]["stamina"]["value"] == 0.8
    assert [data["verdict"][model]["stamina"]["grade"] for model in ("pruned", "recovered")] == ["no", "yes"]
    (row,) = [row for row in data["measures"] if row["task"] == "openings"]
    assert (row["label"], row["pruned"]["value"], row["kept"]["pruned"]) == ("texts that are long", 0.2, 0.25)
    render(run, data)
    page = (run / "report.md").read_text()
    assert "| stamina | **no** – " in page and "texts that are long" in page
    assert "Can it go on?" in (run / "report.html").read_text()


def test_a_run_with_a_kind_that_is_not_known_here_is_reported_without_its_figures(tmp_path):
    run = build_run(tmp_path)
    rewrite(run / "dense" / "measure.json", lambda record: record["tasks"].update(x={"kind": "unheard", "items": 1}))
    data = collect(run)
    render(run, data)
    assert data["headline"]["dense"]["generation"] and not [row for row in data["measures"] if row["task"] == "x"]


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
def test_every_kind_has_its_work_and_one_main_figure(kind):
    assert kind.file.model_fields["kind"].annotation.__args__ == (kind.name,)
    assert isinstance(importlib.import_module(kind.work).WORK, Work)
    assert [figure.main for figure in kind.figures] == [True] + [False] * (len(kind.figures) - 1)
    assert kind.use is not None or work_of(kind.name).pooled is not None, "a headline figure needs a way to be made"
    assert headline_figures()[kind.headline][1].main


def test_names_that_are_taken_and_uses_that_are_not_known_are_refused(tmp_path):
    figure = (Figure("x", "x", "percent", "higher", main=True),)
    with pytest.raises(ValueError, match="TaskKind 'choice': there is one of that name"):
        register(TaskKind("choice", toy_kind.LongFile, "toy_kind", "x", figure))
    with pytest.raises(ValueError, match="use 'stamina': expected one of generation, choice, retrieval"):
        register(toy_kind.KIND)
    with pytest.raises(RecipeError, match="kind: found 'long', expected one of generate, choice, code"):
        load_task(make_task(tmp_path, ROWS, kind="long", prompt="{q}"))
    assert json.dumps([*KINDS]) == '["generate", "choice", "code", "instructions", "retrieval", "perplexity"]'
