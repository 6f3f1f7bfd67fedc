"""The files of a report: self-contained, accessible, and nothing that a model wrote is ever run."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from report_page import Page, rewrite
from report_probes import probed, write_diagnosis
from report_run import build_run

from recover.commands.run import compare as compare_command
from recover.commands.run import report
from recover.report import words
from recover.report.collect import collect
from recover.report.compare import compare, ranking, render_compare
from recover.report.exhibits import EXHIBITS, Exhibit, figures, made
from recover.report.figures.figure import Axis, Canvas, Columns, Dots, Figure, Panel, linear, row_of
from recover.report.render import render, render_diagnosis


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = build_run(tmp_path_factory.mktemp("runs"))
    return render(run, collect(run))[2].read_text(encoding="utf-8")


def test_json_holds_the_whole_and_values_without_number_are_not_measured(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    empty = dict.fromkeys(("mean", "p50", "p90", "p99", "max"))

    def no_numbers(summary: dict) -> None:
        summary["final"]["kl"] |= {"p50": None}
        summary["blocks"][5]["logit"] = empty
        summary["steps"][3]["teacher_forced"]["kl"] = empty
        summary["steps"][-1]["free_running"] |= {"total": empty, "diverged": None}

    rewrite(run / "before/probe.json", no_numbers)
    rewrite(run / "after/measure.json", lambda record: record["tasks"]["prose"].update(perplexity=None))
    data = collect(run)
    paths = render(run, data)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert json.loads(paths[0].read_text(), parse_constant=lambda name: pytest.fail(name)) == data
    for path in paths[1:]:
        text = re.sub(r"<(script|style)>.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", text), path
        assert "not measured" in text


def test_jsonable_leaves_no_nan_and_no_lone_surrogate() -> None:
    value = words.jsonable({"a": [math.nan, (1, -math.inf)], 3: "x\ud800", "b": True})
    assert value == {"a": [None, [1, None]], "3": "x?", "b": True}
    json.dumps(value, allow_nan=False).encode()


def test_page_is_self_contained_and_small(html: str) -> None:
    assert len(html.encode()) < 1.5e6
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "data", "poster", "action", "background"):
            assert name not in attributes, (tag, attributes)
        if "href" in attributes:
            assert tag == "a" and (attributes["href"] or "").startswith("#"), (tag, attributes)
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html


def test_every_link_leads_somewhere_and_ids_are_unique(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for attributes in page.all("a")]
    assert targets and {(target or "")[1:] for target in targets} <= set(ids)
    labels = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(labels) <= set(ids)


def test_every_figure_has_a_caption_a_label_and_its_numbers(tmp_path: Path, html: str) -> None:
    run = build_run(tmp_path)
    found = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(found) >= sum(found.measured for found in figures(collect(run)).values()) > 6
    for figure in found:
        caption = re.search(r"<figcaption>(.+?)</figcaption>", figure, re.DOTALL)
        assert caption and len(caption.group(1)) > 30
        labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', figure)
        assert len(labels) == 2  # one for a page, one for a telephone
        assert re.search(r"<table.*<td", figure, re.DOTALL)


def test_a_figure_is_one_row_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function and a row: the page, Markdown and the diagnosis show it, in the section that the row names."""
    run = build_run(tmp_path)

    def toy(data: dict) -> Figure:
        def draw(width: float) -> str:
            return Canvas(width, 40, f"toy of {data['name']}").render()

        return Figure("A toy", "See how it is drawn.", draw, ("what", "much"), [("this", "0.4217")])

    monkeypatch.setattr("recover.report.exhibits.EXHIBITS", [*EXHIBITS, Exhibit("damage", "toy", toy, numbers=True)])
    _, markdown, page = render(run, collect(run))
    damage = page.read_text().split('<h2 id="damage">')[1].split("</section>")[0]
    assert damage.index('id="figure-blocks"') < damage.index('id="figure-toy"')
    assert f'aria-label="toy of {run.name}"' in damage and "0.4217" in damage
    assert "| this | 0.4217 |" in markdown.read_text()
    diagnosis = write_diagnosis(run.parent / "toy-diagnosis", json.loads((run / "before/probe.json").read_text()))
    assert 'id="figure-toy"' in render_diagnosis(diagnosis).read_text()


def test_panels_lie_side_by_side_and_below_one_another_on_a_telephone() -> None:
    dots, column = Dots([(0, 0, "low"), (10, 1, "high")], 3, "dot"), Columns([(5, "gone")], "gone")
    panel = Panel(Axis(linear(0, 10)), Axis(linear(0, 1)), [dots], under=[column], title="One", colour="pruned")

    def places(width: float) -> list[tuple[float, ...]]:
        drawing = row_of(width, "two", [panel, panel], height=264, gap=20)
        assert drawing.index('class="gone"') < drawing.index('class="grid"') < drawing.index('class="dot"')
        assert drawing.count('class="panel ink-pruned"') == 2 and "<title>high</title>" in drawing
        found = re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', drawing)
        return [tuple(map(float, place)) for place in found]

    assert places(960) == [(50, 222), (470, 52), (540, 222), (960, 52)]
    assert places(360) == [(50, 222), (352, 52), (50, 512), (352, 342)]


def test_no_two_figures_or_tables_share_an_anchor(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    anchors = [(type(found), each.key) for each, found in made(collect(run)).items()]
    assert len(anchors) == len(set(anchors)) > 8


def pages(folder: Path) -> dict[str, str]:
    """One page of each kind, everything on them that can be there."""
    runs = [build_run(folder, name=name) for name in ("one", "other")]
    rewrite(runs[0] / "before/probe.json", probed)
    paths = {"report": render(runs[0], collect(runs[0]))[2]}
    paths["comparison"] = render_compare(compare(runs), folder / "comparison.html")
    whole = json.loads((runs[0] / "before/probe.json").read_text())
    paths["diagnosis"] = render_diagnosis(write_diagnosis(folder / "pair", whole))
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


@pytest.fixture(scope="module")
def every_page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pages(tmp_path_factory.mktemp("pages"))


KINDS = ("report", "comparison", "diagnosis")


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_can_be_read_aloud(every_page: dict[str, str], kind: str) -> None:
    page = Page(every_page[kind])
    assert page.all("html")[0]["lang"] == "en" and len(page.all("main")) == len(page.all("h1")) == 1
    first = next((tag, attributes) for tag, attributes in page.tags if tag in ("a", "button"))
    assert first == ("a", {"class": "skip", "href": "#main"}) and page.all("main")[0]["id"] == "main"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels)), levels
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "href"):
        named = {(attributes[name] or "").removeprefix("#") for _, attributes in page.tags if name in attributes}
        assert named <= set(ids), named - set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_has_a_caption_and_named_rows_and_columns(every_page: dict[str, str], kind: str) -> None:
    found = re.findall(r"<table.*?</table>", every_page[kind], re.DOTALL)
    assert found
    for table in found:
        assert re.search(r"<caption[^>]*>.{10,}?</caption>", table, re.DOTALL), table[:200]
        heads = re.findall(r"<th\b([^>]*)>(.*?)</th>", table.split("</thead>")[0], re.DOTALL)
        assert heads and all('scope="col"' in attributes and name.strip() for attributes, name in heads)
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("</thead>")[1], re.DOTALL):
            assert row.startswith('<th scope="row">') and len(re.findall(r"<t[hd]\b", row)) == len(heads)


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_says_what_to_see(every_page: dict[str, str], kind: str) -> None:
    for figure in re.findall(r"<figure.*?</figure>", every_page[kind], re.DOTALL):
        assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{12,}"', figure)) == 2
        assert re.search(r"<figcaption>.{30,}?</figcaption>", figure, re.DOTALL) and "<td" in figure
    bare = Page(every_page[kind]).all("svg")
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in bare)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "least"),
    [("ink", 7.0), ("soft", 4.5), ("dense", 4.5), ("pruned", 4.5), ("recovered", 4.5), ("focus", 3.0)],
)
def test_text_stands_out_in_both_themes(html: str, ink: str, least: float, theme: int) -> None:
    pairs = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", html)
    palette = {name: (light, dark)[theme] for name, light, dark in pairs}
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("paper", "card"):
        assert contrast(palette[ink], palette[ground]) >= least, (ink, ground)


def test_browsers_without_themes_get_the_light_one(html: str) -> None:
    plain = dict(re.findall(r"--(\w+): (#\w+);", html.split("@supports")[0]))
    light = {name: colour for name, colour, _ in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", html)}
    assert plain == light


def test_only_our_script_may_run(html: str) -> None:
    policy = next(tag for tag in Page(html).all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in (policy["content"] or "")
    assert "default-src 'none'" in (policy["content"] or "")


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></table></svg><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "```\n# not a heading\n```",
    "a | b \\| c\n\n| d |",
    "\u202eright to left\u2066",
    "nul \x00 bell \x07 lone \ud800 surrogate",
    "]]><!-- -->&lt;&amp;",
    "",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_model_writes_stays_text(tmp_path: Path, hostile: str) -> None:
    run = build_run(tmp_path)

    def poison(record: dict) -> None:
        for sample in record["tasks"]["sums"]["samples"]:
            sample |= {
                "prompt": f"{hostile} {sample['prompt']}",
                "text": hostile,
                "answer": hostile,
                "expected": hostile,
            }
        record["tasks"][f"task {hostile}"] = record["tasks"].pop("facts")

    for folder in ("dense", "before", "after"):
        rewrite(run / folder / "measure.json", poison)
    paths = render(run, collect(run))
    text = paths[2].read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search("[\x00\x07\u202e\u2066]", text)
    if hostile.startswith("<script>"):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    if "{{" in hostile:
        assert hostile in "".join(page.text)
    markdown = paths[1].read_text(encoding="utf-8")
    assert "\n# not a heading" not in re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)


def test_hostile_names_in_pictures(tmp_path: Path) -> None:
    run = build_run(tmp_path, kind="wanda")

    def poison(plan: dict) -> None:
        plan["masks"]['model.layers.3."><script>x</script>'] = {"shape": [2, 2], "zeros": 2, "pattern": "2:4"}

    rewrite(run / "prune/plan.json", poison)
    page = Page(render(run, collect(run))[2].read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1


def test_masks_are_summed_and_mapped(tmp_path: Path) -> None:
    run = build_run(tmp_path, kind="wanda")
    data = collect(run)
    assert data["plan"]["sparsity"] == pytest.approx(0.497, abs=0.003)
    assert data["summary"].startswith("Setting 50% of the block weights to zero (wanda, 2:4) left choice at 96%")
    assert any("stored as zeros" in line for line in data["limits"])
    assert figures(data)["plan"].title == "Where the zeros are"
    assert "masks" not in data["plan"]


def test_failed_verification_is_said_loudly(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    (run / "verify.json").write_text(json.dumps({"ok": False, "problems": ["logits differ by 3"]}))
    for path in render(run, collect(run))[1:]:
        assert "FAILED its verification: logits differ by 3" in path.read_text(encoding="utf-8")


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    first = [path.read_bytes() for path in render(run, collect(run))]
    assert [path.read_bytes() for path in render(run, collect(run))] == first


# Several runs.


POOR = {"exact_match": 0.4, "interval95": [0.33, 0.47]}


def test_runs_within_noise_of_one_another_are_called_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """59.0 and 58.0% of 200 items are no ranking; 40% is."""
    scores = {
        "a": {"exact_match": 0.59, "interval95": [0.521, 0.656]},
        "b": {"exact_match": 0.58, "interval95": [0.511, 0.646]},
        "c": POOR,
    }
    runs = [build_run(tmp_path, name=name) for name in scores]
    for run, score in zip(runs, scores.values(), strict=True):
        rewrite(run / "after/measure.json", lambda record, score=score: record["tasks"]["sums"].update(score))
    data = compare(runs)
    assert data["best"] is None and data["equal"] == ["a", "b"]
    assert ranking(data) == "a and b keep most generation, equal within noise"
    page = render_compare(data, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert f"<h1>{ranking(data)}</h1>" in page and page.count('class="best"') == 2
    compare_command(runs)
    assert ranking(data) in capsys.readouterr().out


def test_runs_that_keep_nothing_are_not_said_to_keep_most(tmp_path: Path) -> None:
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    for run in runs:
        score = {"exact_match": 0.0, "interval95": [0.0, 0.02]}
        rewrite(run / "after/measure.json", lambda record, score=score: record["tasks"]["sums"].update(score))
    assert ranking(compare(runs)) == ranking(compare(runs[:1])) == "No run keeps any generation"
    assert words.plan_short({"dropped": [1], "blocks": 12}) == "1 block of 12"  # pyright: ignore[reportArgumentType]


def test_names_of_levels_stand_outside_the_ring(tmp_path: Path) -> None:
    """The epoch that is kept is the last one and as good as dense: its ring reaches right of the axis."""
    data = collect(build_run(tmp_path))
    for row in data["epochs"]:
        row["best"] = row is data["epochs"][-1]
    for drawn in (figures(data)["epochs"].wide, figures(data)["epochs"].narrow):
        ((x, radius),) = re.findall(r'<circle class="ring" cx="([\d.]+)" cy="[\d.]+" r="([\d.]+)"', drawn)
        names = re.findall(r'<text class="label ink-\w+" x="([\d.]+)"', drawn)
        assert len(names) == 2 and all(float(name) > float(x) + float(radius) for name in names)


def test_compare_orders_by_recovered_generation_and_keeps_unfinished_runs(tmp_path: Path) -> None:
    good = build_run(tmp_path, name="good")
    poor = build_run(tmp_path, name="poor")
    rewrite(poor / "after/measure.json", lambda record: record["tasks"]["sums"].update(POOR))
    open_ = build_run(tmp_path, name="open", without=("after/measure.json", "after/probe.json", "epochs.jsonl"))
    data = compare([open_, poor, good])
    assert [run["name"] for run in data["runs"]] == ["good", "poor", "open"]
    assert data["best"] == "good" and data["same_dense"]
    json.dumps(data, allow_nan=False)
    path = render_compare(data, tmp_path / "compare.html")
    page = Page(path.read_text(encoding="utf-8"))
    ids = [attributes.get("id") for attributes in page.all("figure")]
    assert ids == ["figure-compare", "figure-trade", "figure-courses", "figure-losses"] and "not measured" in "".join(
        page.text
    )


def test_compare_of_nothing_measured_names_no_winner(tmp_path: Path) -> None:
    data = compare([build_run(tmp_path, without=("dense/measure.json", "before/measure.json", "after/measure.json"))])
    assert data["best"] is None
    Page(render_compare(data, tmp_path / "compare.html").read_text(encoding="utf-8"))


def test_runs_that_differ_are_not_ranked(tmp_path: Path) -> None:
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    recipe = runs[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("embedded:facts", "harder.yaml"))
    data = compare(runs)
    assert data["best"] is None and data["same_dense"] and not data["comparable"]
    assert "harder.yaml" in data["apart"][0] and "limit" not in data["apart"][0]
    assert "cannot be ranked" in render_compare(data, tmp_path / "c.html").read_text(encoding="utf-8")
    recipe.write_text(
        recipe.read_text().replace("harder.yaml", "embedded:facts").replace("embedded:model", "other/model")
    )
    data = compare(runs)
    assert data["best"] is None and not data["same_dense"] and "other/model" in data["apart"][0]


def test_a_dense_model_that_scores_differently_is_pointed_out(tmp_path: Path) -> None:
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    assert compare(runs)["apart"] == []
    rewrite(runs[1] / "dense/measure.json", lambda record: record["tasks"]["sums"].update(exact_match=0.9))
    data = compare(runs)
    assert data["best"] and data["comparable"] and "99.0% in a" in data["apart"][0]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = [run["name"] for run in compare([build_run(tmp_path / part, name="same") for part in "xy"])["runs"]]
    assert sorted(names) == ["same (x/same)", "same (y/same)"]


def test_report_of_several_runs_writes_their_comparison(tmp_path: Path) -> None:
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    report(runs)
    assert all((run / "report.html").is_file() for run in runs) and (tmp_path / "comparison.html").is_file()
    report(runs[:1], out=tmp_path / "alone.html")
    assert not (tmp_path / "alone.html").exists()
    report([*runs, write_diagnosis(tmp_path / "pair", {})], out=tmp_path / "there.html")
    assert (tmp_path / "there.html").is_file() and (tmp_path / "pair/report.html").is_file()
