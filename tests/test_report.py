"""The report says what the files say: nothing invented, nothing hidden, nothing that a model wrote is ever run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from report_page import Page, rewrite
from report_probes import probed
from report_run import BLOCKS, DROPPED, STEPS, build_run

from recover.base.errors import ArtifactError
from recover.base.products import taken_apart
from recover.commands.run import compare as compare_command
from recover.config.tasks import KINDS
from recover.measure.sandbox import UNCONFINED, WALLED
from recover.report import drift, items, tables, verdict, words
from recover.report.collect import CONSEQUENCES, collect, side_by_side
from recover.report.compare import compare
from recover.report.data import RunData
from recover.report.exhibits import figures
from recover.report.figures import figure, outcome
from recover.report.render import fence, render, table_cell

EVERYTHING = (
    *("env.json", "plan/estimate.json", "dense/measure.json", "before/measure.json", "after/measure.json"),
    *("prune/plan.json", "before/probe.json", "before/probe.jsonl", "after/probe.json", "after/probe.jsonl"),
    *("epochs.jsonl", "verify.json", "speed.json", "deploy/recover.json"),
    "train/steps.jsonl",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs"))


# What the numbers say.


def test_summary_is_made_of_the_measured_figures(run: Path) -> None:
    data = collect(run)
    assert data["summary"] == (
        "Dropping 4 of 16 blocks left choice at 96% of dense and generation at 13%; "
        "134k tokens of distillation brought generation back to 97%."
    )
    assert data["title"] == "Generation fell to 13% of dense and came back to 97%"


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (0.13, "left generation at 13%"),
        (0.05, "lowered generation to 5.1%"),
        (0.50, "raised generation to 51%"),
        (0.99, "brought generation back to 100%"),
    ],
)
def test_summary_does_not_praise_a_recovery_that_did_not_happen(tmp_path: Path, after: float, said: str) -> None:
    run = build_run(tmp_path)

    def set_score(record: dict) -> None:
        record["tasks"]["sums"] |= {"exact_match": after, "interval95": [after, after]}

    rewrite(run / "after/measure.json", set_score)
    assert collect(run)["summary"].endswith(f"134k tokens of distillation {said}.")


@pytest.mark.parametrize(
    ("value", "interval", "grade", "certain"),
    [
        (0.96, [0.955, 0.97], "yes", True),
        (0.96, [0.90, 0.99], "yes", False),
        (0.96, [0.70, 1.00], "with care", False),  # the interval does not rule out 'no'
        (0.95, None, "yes", True),
        (0.9499, [0.94, 0.9499], "with care", True),
        (0.80, [0.80, 0.85], "with care", True),
        (0.7999, [0.75, 0.7999], "no", True),
        (0.70, [0.50, 0.90], "no", False),
        (0.0, [0.0, 0.0], "no", True),
    ],
)
def test_grades_at_their_thresholds(value: float, interval: list | None, grade: str, certain: bool) -> None:
    figure = {"value": value, "interval": interval, "chance": None}
    dense = {"value": 1.0, "interval": [1.0, 1.0], "chance": None}
    answer = verdict.judge(figure, dense, "generation")
    assert (answer["grade"], answer["certain"]) == (grade, certain)
    assert f"{100 * value:.1f}% against 100.0%" in answer["reason"]


def test_half_a_recovery_does_not_come_back_and_intervals_are_explained(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    rewrite(
        run / "before/measure.json", lambda record: record["tasks"]["sums"].update(exact_match=0.0, interval95=[0, 0])
    )
    rewrite(run / "after/measure.json", lambda record: record["tasks"]["sums"].update(exact_match=0.66))
    data = collect(run)
    assert data["title"] == "Generation fell to 0% of dense and rose to 67%"
    assert any("Wilson's where an item is right or wrong, else by bootstrap" in line for line in data["limits"])


def test_generation_is_the_mean_of_texts_and_programs(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    code = {"kind": "code", "items": 10, "pass_at_1": 0.2, "interval95": [0.05, 0.5], "samples": []}
    rewrite(run / "dense/measure.json", lambda record: record["tasks"].update(humaneval=code))
    data = collect(run)
    found = data["headline"]["dense"]["generation"]
    sums = next(row for row in data["measures"] if row["task"] == "sums" and row["main"])
    assert found["tasks"] == ["humaneval", "sums"] and found["value"] == pytest.approx(
        (0.2 + sums["dense"]["value"]) / 2
    )
    assert any(row["task"] == "humaneval" and row["key"] == "pass_at_1" for row in data["measures"])


@pytest.mark.parametrize(
    ("isolation", "said"),
    [
        (WALLED, "(humaneval) were run behind Linux namespaces: no network"),
        (
            UNCONFINED,
            "(humaneval) were run unconfined: with limits of time and memory only. They could change any file",
        ),
    ],
)
def test_the_page_says_where_programs_ran(tmp_path: Path, isolation: str, said: str) -> None:
    run = build_run(tmp_path)
    assert not any("Programs" in line for line in collect(run)["limits"])
    code = {"kind": "code", "items": 10, "pass_at_1": 0.2, "interval95": [0.05, 0.5], "isolation": isolation}
    rewrite(run / "dense/measure.json", lambda record: record["tasks"].update(humaneval=code))
    data = collect(run)
    assert sum(said in line for line in data["limits"]) == 1
    _, markdown, page = render(run, data)
    assert said in page.read_text() and said in markdown.read_text()


def test_nothing_to_keep_is_no_verdict() -> None:
    figure = {"value": 0.26, "interval": None, "chance": 0.25}
    assert verdict.judge(figure, {**figure, "value": 0.28}, "choice")["grade"] == "cannot tell"
    without_chance = {"value": 0.01, "interval": None, "chance": None}
    assert verdict.judge(without_chance, {**without_chance, "value": 0.02}, "generation")["grade"] == "cannot tell"


def test_chance_is_taken_off_where_it_is_known() -> None:
    pruned, dense = ({"value": value, "interval": None, "chance": 0.25} for value in (0.55, 0.65))
    answer = verdict.judge(pruned, dense, "choice")
    assert answer["kept"] == pytest.approx(0.30 / 0.40)
    assert answer["grade"] == "no"
    guessing = verdict.judge({**pruned, "value": 0.2, "interval": [0.1, 0.3]}, dense, "choice")
    assert guessing["kept"] == 0.0 and guessing["interval"] == [0.0, pytest.approx(0.05 / 0.40)]


def test_a_share_of_dense_is_one_figure_wherever_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Choice by chance 25%: 62.1 of 64.5% are 96.3% as they stand, and 93.9%, 94, of what dense does above chance."""
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    for run in runs:
        for folder in ("dense", "before", "after"):
            rewrite(run / folder / "measure.json", lambda record: record["tasks"]["facts"].update(chance=0.25))
    data = collect(runs[0])
    said = verdict.share((0.621 - 0.25) / (0.645 - 0.25))
    assert said == "94%" == verdict.share(data["verdict"]["pruned"]["choice"]["kept"])
    row = next(row for row in data["measures"] if row["task"] == "facts" and row["main"])
    assert verdict.share(row["kept"]["pruned"]) == said and f"choice at {said} of dense" in data["summary"]
    render(runs[0], data)
    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert f"<b>{said}</b> of dense, above chance" in page and "96" not in re.findall(r"(\d+)[.\d]*% of dense", page)
    found = compare(runs)
    assert verdict.share(found["runs"][0]["kept"]["pruned"]["choice"]) == said
    compare_command(runs)
    assert said in capsys.readouterr().out


def test_what_was_not_measured_takes_no_card(run: Path) -> None:
    render(run, collect(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="card"') == 2 and "verdict on retrieval" not in page
    assert "Not measured: retrieval." in page
    assert "| retrieval |" not in (run / "report.md").read_text() and "Not measured: retrieval." in (
        run / "report.md"
    ).read_text(encoding="utf-8")


def test_words_are_explained_where_they_stand(run: Path) -> None:
    data = collect(run)
    assert all(row["meaning"] for row in data["measures"])
    ours = [kind for kind in KINDS.values() if kind.work.startswith("recover.")]
    assert ours and all(figure.meaning for kind in ours for figure in kind.figures)
    render(run, data)
    page = (run / "report.html").read_text(encoding="utf-8")
    measured, damage = (page.split(f'<h2 id="{key}"')[1].split("<h2 ")[0] for key in ("measures", "damage"))
    assert "<dt>exact match</dt>" in measured and "<dt>kept</dt>" in measured and "<dt>KL</dt>" in damage
    assert "- exact match: " in (run / "report.md").read_text(encoding="utf-8")


def test_a_fault_of_our_own_is_not_called_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(NameError), taken_apart(tmp_path):
        undefined  # noqa: B018, F821
    with pytest.raises(ArtifactError, match="not what was written"), taken_apart(tmp_path):
        raise TypeError("a number where a table is expected")


def test_retrieval_is_never_pretended(run: Path) -> None:
    data = collect(run)
    for model in ("pruned", "recovered"):
        assert data["verdict"][model]["retrieval"]["grade"] == "not measured"
    assert any("Retrieval was not measured" in line for line in data["limits"])


def test_headline_interval_of_several_tasks_is_narrower_than_of_each(tmp_path: Path) -> None:
    run = build_run(tmp_path)

    def twice(record: dict) -> None:
        record["tasks"]["sums again"] = record["tasks"]["sums"] | {"exact_match": 0.33, "interval95": [0.27, 0.39]}

    rewrite(run / "before/measure.json", twice)
    figure = collect(run)["headline"]["pruned"]["generation"]
    assert figure["value"] == pytest.approx((0.13 + 0.33) / 2)
    assert figure["interval"][1] - figure["value"] == pytest.approx(math.hypot(0.05, 0.06) / 2)


def test_best_epoch_is_the_first_of_the_highest_score(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    lines = (run / "epochs.jsonl").read_text().splitlines()
    again = json.loads(lines[2]) | {"score": 0.97}  # epoch 3, written again by a resumed run, now as good as epoch 4
    (run / "epochs.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    epochs = collect(run)["epochs"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in epochs if row["best"]] == [3]


def test_drift_keeps_the_last_layers_tail_and_one_lens(tmp_path: Path) -> None:
    run = build_run(tmp_path)

    def with_raw_lens(summary: dict) -> None:
        summary["blocks"] += [block | {"lens": "raw"} for block in summary["blocks"]]

    rewrite(run / "before/probe.json", with_raw_lens)
    found = collect(run)["drift"]["pruned"]
    assert [row["block"] for row in found["blocks"]] == list(range(BLOCKS))
    assert {row["block"] for row in found["blocks"] if row["closed"]} == set(DROPPED)
    assert len(found["steps"]) == STEPS
    assert found["final"]["kl"]["p99"] > found["final"]["kl"]["p50"] > 0
    assert [row["temperature"] for row in found["temperatures"]] == [0.5, 1.0, 2.0]


# What is not there.


@pytest.mark.parametrize("missing", EVERYTHING)
def test_any_missing_file_is_said_and_nothing_breaks(tmp_path: Path, missing: str) -> None:
    run = build_run(tmp_path, without=(missing,))
    data = collect(run)
    paths = render(run, data)
    Page(paths[2].read_text(encoding="utf-8"))
    named = {gap["file"] for gap in data["missing"]}
    optional = {"env.json", "plan/estimate.json", "before/probe.jsonl", "after/probe.jsonl", "deploy/recover.json"}
    optional |= {"train/steps.jsonl"}  # older runs have none
    assert named == set() if missing in optional else named == {missing}


def test_a_run_that_has_only_its_recipe(tmp_path: Path) -> None:
    run = build_run(tmp_path, without=EVERYTHING)
    data = collect(run)
    assert data["title"] == "Generation is not measured yet"
    assert data["summary"] == "Pruning has not been measured yet; recovery has not been measured yet."
    assert data["headline"] == {"dense": None, "pruned": None, "recovered": None}
    assert not any(figure.measured for figure in figures(data).values())
    text = render(run, data)[2].read_text(encoding="utf-8")
    assert "Not measured" in text
    assert not Page(text).all("svg")


def test_unfinished_run_shows_no_figure_of_the_recovered_model(tmp_path: Path) -> None:
    run = build_run(tmp_path, without=("after/measure.json", "after/probe.json", "epochs.jsonl"))
    data = collect(run)
    assert data["summary"].endswith("generation at 13%; recovery has not been measured yet.")
    assert all(row["recovered"] is None and row["kept"]["recovered"] is None for row in data["measures"])
    assert "97%" not in render(run, data)[1].read_text(encoding="utf-8").split("## What was measured")[0]


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run directory"):
        collect(tmp_path)


@pytest.mark.parametrize("file", ["dense/measure.json", "prune/plan.json", "recipe.yaml", "train/steps.jsonl"])
def test_corrupt_file_is_named(tmp_path: Path, file: str) -> None:
    run = build_run(tmp_path)
    (run / file).write_text('{"a": [1, \n')
    with pytest.raises(ArtifactError, match=file.replace(".", r"\.")):
        collect(run)


def test_a_record_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    (run / "speed.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"speed\.json: expected a JSON object, found list"):
        collect(run)


# Texts side by side.


@pytest.mark.parametrize(
    ("dense", "other", "index", "parts"),
    [
        ("a b c", "a b c", None, ("a b c", "", "")),
        ("a b c", "a x c", 1, ("a ", "x", " c")),
        ("a b c", "a b", 2, ("a b", "", "")),
        ("a b", "a  b\nc", 2, ("a  b\n", "c", "")),
        ("", "a", 0, ("", "a", "")),
        ("", "", None, ("", "", "")),
    ],
)
def test_first_word_that_differs(dense: str, other: str, index: int | None, parts: tuple[str, str, str]) -> None:
    assert words.first_difference(dense, other) == index
    assert words.split_at_word(other, index) == parts
    assert "".join(parts) == other


def test_texts_are_matched_by_prompt_not_by_place() -> None:
    def record(*samples: tuple[str, str]) -> dict:
        listed = [{"prompt": prompt, "text": text, "correct": True} for prompt, text in samples]
        return {"tasks": {"t": {"kind": "generate", "samples": listed}}}

    rows = side_by_side({"dense": record(("p", "1"), ("q", "2")), "pruned": record(("q", "3")), "recovered": None})
    assert [(row["prompt"], row["pruned"] and row["pruned"]["text"]) for row in rows] == [("p", None), ("q", "3")]


def test_mistakes_are_counted_and_one_of_each_is_shown(run: Path) -> None:
    data = collect(run)
    assert [(row["model"], row["right"], row["mistakes"]["loop"]) for row in data["mistakes"]] == [
        ("dense", 198, 0),
        ("pruned", 26, 131),
        ("recovered", 193, 0),
    ]
    assert [(each["model"], each["mistake"]) for each in data["examples"]] == [
        ("dense", "content"),
        *(("pruned", kind) for kind in ("loop", "endless", "no_answer", "content")),
        *(("recovered", kind) for kind in ("no_answer", "content")),
    ]
    assert data["examples"][1]["text"].startswith("14 + 25 = 14 + 25")
    epochs = [(row["form"], row["content"], row["loops_begin"]) for row in data["epochs"]]
    assert epochs[0] == (0.14, 0.4, 12.0) and epochs[5] == (0.04, 0.06, 17.0)
    assert [row["loop_rate"] for row in data["epochs"]] == [0.2 / epoch for epoch in range(1, 7)]
    (rate,) = (row for row in data["measures"] if row["key"] == "loop_rate")
    assert (rate["dense"]["value"], rate["pruned"]["value"]) == (0.0, 131 / 200)
    found = items.mistakes_table(data)
    assert found is not None and "does not parse" not in [name for name, _ in found.columns]
    assert found.rows[1] == ("sums", "pruned", "200", "26", "131", "25", "6", "12", "65.5%", "12")
    render(run, data)
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    for written in (page, text):
        assert "a text of pruned that ends in a loop" in written and "formed and wrong" in written
    assert "| 6 | 200k | 95.0% | 4.0% | 6.0% | 3.3%, from token 17 |" in text
    assert "Loop rate, to compare: dense 0.0%, pruned 65.5%." in text
    fails = "Dense, 0.0% of answers by form, 1.0% by content; pruned, 81.0% of answers by form (65.5% loop), 6.0% by"
    assert f"Do answers fail by form or by content? {fails}" in text


def test_other_readings_of_the_same_texts_stand_beside_the_first(tmp_path: Path) -> None:
    folder = build_run(tmp_path)
    also = {"flexible": {"exact_match": 0.5, "interval95": [0.4, 0.6]}}
    drawn = {"pass_at_k": {k: {"value": int(k) / 10, "interval95": [0.0, 1.0]} for k in ("1", "2", "8")}}
    for part in ("dense", "before"):
        rewrite(folder / part / "measure.json", lambda record: record["tasks"]["sums"].update(also=also, **drawn))
    rows = [row for row in collect(folder)["measures"] if row["task"] == "sums"]
    labels = ["exact match", "exact match, flexible", "pass@1, sampled", "pass@8, sampled", "exact match, sampled"]
    assert [row["label"] for row in rows[:5]] == labels and rows[3]["dense"]["value"] == 0.8
    assert rows[1]["pruned"] == {"value": 0.5, "interval": [0.4, 0.6]} and rows[1]["recovered"] is None


def test_texts_that_never_leave_dense_have_a_share_of_their_own(tmp_path: Path) -> None:
    folder = build_run(tmp_path)
    data = collect(folder)
    row = ("sums", "0.0%", "4", "11", "11.0%", "78.0%", "never", "never", "91.0%")
    found = tables.divergence(data)
    assert found is not None and found.rows == [row]
    figure = outcome.parting(data)
    assert figure is not None and "pruned, 0.0%; recovered, 78.0%" in figure.see
    assert figure.rows[0] == (0, "100.0%", "100.0%") and figure.rows[-1] == (41, "0.0%", "78.0%")
    render(folder, data)
    page = (folder / "report.html").read_text()
    assert 'id="figure-parting"' in page and ">never</td>" in page

    for part in ("before", "after"):  # as an earlier version wrote it
        rewrite(folder / part / "measure.json", lambda record: [record["tasks"]["sums"].pop("parting")])
    older = collect(folder)
    found = tables.divergence(older)
    assert found is not None and found.rows == [row]
    assert outcome.parting(older) is None


def test_runs_that_counted_no_mistakes_have_no_table_of_them(tmp_path: Path) -> None:
    folder = build_run(tmp_path)
    for part in ("dense", "before", "after"):
        rewrite(folder / part / "measure.json", lambda record: [record["tasks"]["sums"].pop("mistakes")])
        rewrite(folder / part / "measure.json", lambda record: [record["tasks"]["sums"].pop("examples")])
    data = collect(folder)
    assert data["mistakes"] == [] == data["examples"]
    assert all(path.is_file() for path in render(folder, data))
    assert "One mistake of each kind" not in (folder / "report.html").read_text()


# Words and pictures.


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.percent(None), "not measured"),
        (words.percent(math.nan), "not measured"),
        (words.percent(0.0), "0%"),
        (words.percent(0.004), "0.4%"),
        (words.percent(0.9949), "99.5%"),
        (words.percent(1.0), "100%"),
        (words.number(0), "0"),
        (words.number(12345.6), "12,346"),
        (words.number(2.4e-7), "2.4×10⁻⁷"),
        (words.number(math.inf), "not measured"),
        (words.count(200_000), "200k"),
        (words.count(1_600_000), "1.6M"),
        (words.size(105_600_000), "106 MB"),
        (words.duration(320), "5 min 20 s"),
        (words.duration(7300), "2 h 2 min"),
        (words.machine({"gpus": [{"name": "H200"}, {"name": "H200"}]}), "2 × H200"),
        (verdict.share(0.9466), "94.7%"),  # never rounded over a threshold
        (verdict.share(0.97), "97%"),
        (table_cell("a|b\nc"), "a\\|b c"),
        (fence("x ```` y"), "`````text\nx ```` y\n`````"),
    ],
)
def test_wording(shown: str, expected: str) -> None:
    assert shown == expected


def test_log_scale_holds_zero_and_every_value() -> None:
    values = [0.0, 3e-12, 2e-4, 0.7]
    scale = figure.Log.around(values, 200.0, 10.0)
    assert scale.zero and scale(0.0) == scale(3e-12) == 200.0
    places = [scale(value) for value in values]
    assert places == sorted(places, reverse=True) and min(places) >= 10.0
    assert scale(1e-4) < 200.0 and all(10.0 <= scale(tick) < 200.0 for tick in scale.ticks())


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1.0), (0.0, 47.0), (0.0, 0.07), (-0.5, 15.5), (3.0, 3.0)])
def test_linear_ticks_are_few_round_and_inside(lo: float, hi: float) -> None:
    ticks = figure.Linear(lo, hi, 0.0, 100.0).ticks(5)
    assert len(ticks) <= 6 and all(lo - 1e-9 <= tick <= hi + 1e-9 for tick in ticks)


def test_pictures_survive_one_block_one_step_one_epoch(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    for part in ("before", "after"):
        rewrite(
            run / part / "probe.json",
            lambda summary: summary.update(blocks=summary["blocks"][:1], steps=summary["steps"][:1]),
        )
    (run / "epochs.jsonl").write_text((run / "epochs.jsonl").read_text().splitlines()[0] + "\n")
    Page(render(run, collect(run))[2].read_text(encoding="utf-8"))


def test_drift_reads_what_the_probe_writes() -> None:
    from recover.probe.records import Block, Divergence, Final, Identity, Step, summary

    spread = {"mean": 0.2, "p50": 0.1, "p90": 0.4, "p99": 0.9, "max": 1.0}
    own = {**spread, "mean": 0.3}
    names = ("embedding", "logit", "probability", "kl", "reverse_kl", "kl_predicted", "top1", "top5")
    records = [
        Final(1.0, 4, 32, dict.fromkeys(names, spread)),
        *(Block(2, True, lens, spread, spread, spread, spread) for lens in ("final_norm", "raw")),
        Step(0, {"kl": spread, "kl_predicted": spread, "n": 4}, {"kl": own, "total": spread, "diverged": 0.25}, {}),
        Divergence(4, spread, 0.5, [3, None]),
        Identity(1e-12, 0.0, {"kl": 0.0}, {"kl": 1e-12}),
    ]
    found = drift.read(summary(records))
    assert set(found["final"]) == set(names)
    assert found["blocks"] == [
        {
            **{"block": 2, "closed": True, "by_step": []},
            **dict.fromkeys(("embedding", "logit", "probability", "kl"), spread),
        }
    ]
    assert found["steps"][0]["teacher_forced"]["kl_predicted"] == spread
    assert found["steps"][0]["free_running"] == {"kl": spread, "both": own, "diverged": 0.25}
    assert found["identity"]["kl_max"] == 1e-12 and found["prompts"] == 4
    assert found["temperatures"][0]["temperature"] == 1.0


@pytest.mark.parametrize("kind", ["depth", "wanda"])
def test_what_is_collected_is_what_the_types_say(tmp_path: Path, kind: str) -> None:
    """report.json has the fields of `RunData`, each of its type, whatever is missing."""
    whole, empty = (
        build_run(tmp_path, kind=kind),
        build_run(tmp_path, name="bare", kind=kind, without=tuple(CONSEQUENCES)),
    )
    for part in ("before", "after"):
        rewrite(whole / part / "probe.json", probed)
    check = TypeAdapter(RunData)
    for run in (whole, empty):
        data = collect(run)
        check.validate_python(data)
        assert set(data) == set(RunData.__annotations__)
        json.dumps(data, allow_nan=False)
    with pytest.raises(ValidationError, match="tokens"):
        check.validate_python({**collect(whole), "tokens": 3})
