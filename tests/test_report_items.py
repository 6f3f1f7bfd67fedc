"""Items lost and won, whether recovery still rises, and the table for a paper, read off runs with known items."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser
from report_page import Page
from report_run import BLOCKS, STEPS, build_run
from typer.testing import CliRunner

from recover.base.artifacts import read_json, read_jsonl, write_json, write_jsonl
from recover.cli import app
from recover.maths.score import mcnemar
from recover.report.collect import collect
from recover.report.compare import as_csv, as_latex, compare, paper_table, render_compare
from recover.report.exhibits import key_findings
from recover.report.figures import drift
from recover.report.items import MOST
from recover.report.render import render

ITEMS = 200
HOSTILE = "<script>alert(1)</script> & | \\textbf{x}"


def right(wrong: set[int], items: int = ITEMS) -> list[float]:
    return [float(item not in wrong) for item in range(items)]


def given(root: Path, **wrong: set[int]) -> Path:
    """A run whose models have these items of `sums` wrong, with the texts of all."""
    folders = {"dense": "dense", "pruned": "before", "recovered": "after"}
    for model, folder in folders.items():
        record = read_json(root / folder / "measure.json")
        record["tasks"]["sums"]["each"] = right(wrong[model])
        write_json(root / folder / "measure.json", record)
        texts = [
            {
                "ids": [1],
                "text": f"first {item} then {'no' if item in wrong[model] else 'yes'} {HOSTILE}",
                "prompt": f"question {item} {HOSTILE}",
                "expected": f"yes {item}",
            }
            for item in range(ITEMS)
        ]
        write_json(root / folder / "generations.json", {"sums": texts})
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    wrong = {"dense": {0, 1}, "pruned": set(range(100)), "recovered": {1, 2, 3, 4}}
    return given(build_run(tmp_path / "runs"), **wrong)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (0, 6), (9, 2), (5, 7)])
def test_mcnemar_counts_all_ways_to_exchange(lost: int, won: int) -> None:
    """Reference: every way in which the items that changed could have changed, each as likely."""
    before, now = [1.0] * lost + [0.0] * won + [1.0, 0.0, 0.0], [0.0] * lost + [1.0] * won + [1.0, 0.0, 0.0]
    ways = [sum(way) for way in itertools.product((0, 1), repeat=lost + won)]
    uneven = abs(lost - won)
    p = sum(abs(2 * count - lost - won) >= uneven for count in ways) / len(ways)
    found = mcnemar(before, now)
    assert (found.lost, found.won) == (lost, won) and found.p == pytest.approx(p, abs=1e-12)


def test_items_are_counted_and_shown_with_where_they_part(run: Path) -> None:
    pruned, recovered = collect(run)["exchanged"]
    assert (pruned["model"], pruned["lost"], pruned["won"], pruned["right"], pruned["shown"]) == (
        "pruned",
        98,
        0,
        100,
        [],
    )
    assert pruned["p"] < 1e-9
    counts = (recovered["items"], recovered["lost"], recovered["won"], recovered["right"])
    assert counts == (ITEMS, 3, 1, 195) and recovered["p"] == pytest.approx(0.625)
    assert [(each["way"], each["item"]) for each in recovered["shown"]] == [
        ("won", 0),
        ("lost", 2),
        ("lost", 3),
        ("lost", 4),
    ]
    other = recovered["shown"][1]["other"]
    assert (other.get("before"), other.get("word"), other.get("differs_at_word")) == ("first 2 then ", "no", 3)
    assert recovered["shown"][1]["expected"] == "yes 2"
    assert recovered["each"] == [int(value) for value in right({1, 2, 3, 4})]


def test_a_run_without_texts_or_items_shows_what_it_has(run: Path, tmp_path: Path) -> None:
    assert collect(build_run(tmp_path / "older"))["exchanged"] == []
    (run / "after" / "generations.json").unlink()
    assert [row["shown"] for row in collect(run)["exchanged"]] == [[], []]
    before = read_json(run / "dense" / "generations.json")
    rows = [{name: row[name] for name in ("ids", "text")} for row in before["sums"]]  # of an earlier version
    for folder in ("dense", "after"):
        write_json(run / folder / "generations.json", {"sums": rows})
    assert {each["prompt"] for each in collect(run)["exchanged"][1]["shown"]} == {""}


def test_no_more_items_are_shown_than_fit_a_page(tmp_path: Path) -> None:
    wrong = {"dense": set(), "pruned": set(), "recovered": set(range(MOST + 5))}
    row = collect(given(build_run(tmp_path / "runs"), **wrong))["exchanged"][1]
    assert row["lost"] == MOST + 5 and len(row["shown"]) == MOST


def test_texts_of_items_are_text_on_the_page(run: Path) -> None:
    render(run, collect(run))
    html = (run / "report.html").read_text()
    page = Page(html)
    assert (
        "<script>alert(1)" not in html
        and len([each for each in page.all("details") if each.get("class") == "item"]) == 4
    )
    assert "question 2 <script>alert(1)</script>" in "".join(page.text)
    markdown = (run / "report.md").read_text()
    assert "sums, recovered | 200 | 195 | 3 | 1 | 1 |" in markdown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1100, 390])
def test_items_are_filtered(run: Path, width: int) -> None:
    render(run, collect(run))
    count = "[...document.querySelectorAll('details.item')].filter((item) => !item.hidden).length"
    set_to = "(() => {{ const e = document.querySelector('.filter [name={0}]'); e.value = '{1}'; "
    set_to += "e.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    with Browser() as browser:
        browser.open(run / "report.html", width=width)
        assert browser.evaluate(count) == 4 and browser.console == []
        for name, value, left in (("way", "lost", 3), ("text", "question 3", 1), ("way", "won", 0), ("text", "", 1)):
            browser.evaluate(set_to.format(name, value))
            assert browser.evaluate(count) == left
        assert browser.evaluate("document.querySelector('.filter output').textContent") == "1 of 4"
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("epochs", "said"),
    [
        ([60, 90], "Yes: +15.0 points"),
        ([90, 60], "No, it fell: −15.0 points"),
        ([90, 92], "Not beyond noise: +1.0 points"),
    ],
)
def test_whether_recovery_still_rises(run: Path, epochs: list[int], said: str) -> None:
    records = read_jsonl(run / "epochs.jsonl")[:2]
    for record, wrong in zip(records, epochs, strict=True):
        record["measure"]["tasks"]["sums"]["each"] = right(set(range(wrong, ITEMS)))
    write_jsonl(run / "epochs.jsonl", records)
    answers = {question: answer for question, answer, _ in key_findings(collect(run))}
    assert answers["Is recovery still rising?"].startswith(said)
    assert "of 33.4k tokens" in answers["Is recovery still rising?"]


def test_nothing_is_said_of_a_rise_that_cannot_be_known(run: Path) -> None:
    """Epochs without items, of other items, or one epoch alone."""
    assert "Is recovery still rising?" not in {question for question, _, _ in key_findings(collect(run))}
    records = read_jsonl(run / "epochs.jsonl")[:2]
    for record, items in zip(records, (ITEMS, 100), strict=True):
        record["measure"]["tasks"]["sums"]["each"] = right(set(), items)
    write_jsonl(run / "epochs.jsonl", records)
    assert "Is recovery still rising?" not in {question for question, _, _ in key_findings(collect(run))}


def test_runs_are_compared_item_by_item_with_the_best(tmp_path: Path) -> None:
    best = given(build_run(tmp_path / "a", name="best"), dense=set(), pruned=set(), recovered={1})
    worse = given(build_run(tmp_path / "b", name="worse"), dense=set(), pruned=set(), recovered={1, *range(50, 60)})
    for root, value in ((best, 0.97), (worse, 0.7)):
        record = read_json(root / "after" / "measure.json")
        record["headline"]["generation"] = record["tasks"]["sums"]["exact_match"] = value
        record["tasks"]["sums"]["interval95"] = [value - 0.03, value + 0.03]
        write_json(root / "after" / "measure.json", record)
    data = compare([worse, best])
    assert data["best"] == "best"
    (row,) = data["paired"]
    assert (row["run"], row["task"], row["lost"], row["won"]) == ("worse", "sums", 10, 0)
    assert row["p"] == pytest.approx(2 / 2**10)
    page = Page(render_compare(data, tmp_path / "comparison.html").read_text())
    assert "behind" in page.text and "0.002" in page.text


def test_a_table_for_a_paper_has_every_model_once(run: Path, tmp_path: Path) -> None:
    other = build_run(tmp_path / "second", name="drop_4%")
    columns, rows = paper_table([run, other])
    models = [(row[0], row[1]) for row in rows]
    assert models == [("tiny-drop4", model) for model in ("dense", "pruned", "recovered")] + [
        ("drop_4%", "pruned"),
        ("drop_4%", "recovered"),
    ]
    read = list(csv.DictReader(io.StringIO(as_csv(columns, rows))))
    measured = read_json(run / "after" / "measure.json")["tasks"]["sums"]
    assert float(read[2]["sums exact match"]) == measured["exact_match"]
    assert [float(read[2][f"sums exact match {end}"]) for end in ("low", "high")] == measured["interval95"]
    assert read[2]["prose perplexity low"] == ""
    latex = as_latex(columns, rows)
    assert r"drop\_4\% & pruned" in latex and latex.count(r"\midrule") == 2
    low, high = measured["interval95"]
    assert f"{100 * measured['exact_match']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in latex
    widths = {line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")}
    assert widths == {latex.partition("{tabular}{")[2].partition("}")[0].count("r") + 1}


def test_the_command_writes_both_tables(run: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "table.csv", tmp_path / "table.tex"]
    done = CliRunner().invoke(app, ["report", str(run), "--csv", str(paths[0]), "--latex", str(paths[1])])
    assert done.exit_code == 0, done.output
    assert paths[0].read_text().startswith("run,model,parameters,tokens,") and r"\toprule" in paths[1].read_text()


def test_the_map_of_blocks_and_steps_has_a_cell_for_each(tmp_path: Path) -> None:
    root = build_run(tmp_path)
    data = collect(root)
    figure = drift.block_steps(data)
    assert figure is not None
    picture = figure.wide
    cells = BLOCKS * len(range(0, STEPS, 4))
    assert picture.count("<rect") == 2 * cells == len(figure.rows)
    assert picture.count("fill-pruned shade-") == cells and "recovered, block 15, from step 44: KL" in picture
    shades = {int(found) for found in re.findall(r"fill-pruned shade-(\d)", picture)}
    assert shades <= set(range(6)) and len(shades) > 2
    for path in (root / "before" / "probe.json", root / "after" / "probe.json"):
        summary = json.loads(path.read_text())
        summary["blocks"] = [{k: v for k, v in block.items() if k != "by_step"} for block in summary["blocks"]]
        path.write_text(json.dumps(summary))
    assert drift.block_steps(collect(root)) is None, "a run of before the map has none"
