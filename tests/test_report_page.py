"""The files of a report: self-contained, accessible, and nothing that a model wrote is ever run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from report_page import Page, rewrite
from report_run import build_run

from recover.report import words
from recover.report.collect import collect
from recover.report.compare import compare
from recover.report.compare_page import render_compare
from recover.report.figures import DRAWINGS, figures
from recover.report.render import render


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


def test_every_figure_has_a_caption_a_label_and_its_numbers(html: str) -> None:
    found = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(found) == len(DRAWINGS)
    for figure in found:
        caption = re.search(r"<figcaption>(.+?)</figcaption>", figure, re.DOTALL)
        assert caption and len(caption.group(1)) > 30
        labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', figure)
        assert len(labels) == 2  # one for a page, one for a telephone
        assert re.search(r"<table.*<td", figure, re.DOTALL)


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


def test_compare_orders_by_recovered_generation_and_keeps_unfinished_runs(tmp_path: Path) -> None:
    good = build_run(tmp_path, name="good")
    poor = build_run(tmp_path, name="poor")
    rewrite(poor / "after/measure.json", lambda record: record["tasks"]["sums"].update(exact_match=0.4))
    open_ = build_run(tmp_path, name="open", without=("after/measure.json", "after/probe.json", "epochs.jsonl"))
    data = compare([open_, poor, good])
    assert [run["name"] for run in data["runs"]] == ["good", "poor", "open"]
    assert data["best"] == "good" and data["same_dense"]
    json.dumps(data, allow_nan=False)
    path = render_compare(data, tmp_path / "compare.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("figure")) == 1 and "not measured" in "".join(page.text)


def test_compare_of_nothing_measured_names_no_winner(tmp_path: Path) -> None:
    data = compare([build_run(tmp_path, without=("dense/measure.json", "before/measure.json", "after/measure.json"))])
    assert data["best"] is None
    Page(render_compare(data, tmp_path / "compare.html").read_text(encoding="utf-8"))
