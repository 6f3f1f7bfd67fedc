"""What the newer probes found is shown where it was recorded, and nowhere else; a diagnosis has a page of its own."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from report_page import Page, rewrite
from report_probes import BLOCKS, kl_of, probed, write_diagnosis
from report_run import build_run

from recover.base.errors import ArtifactError
from recover.report import training, words
from recover.report.collect import collect
from recover.report.exhibits import figures, half_parted, key_findings, shown_tables
from recover.report.figures import figure
from recover.report.figures import plan as figures_plan
from recover.report.render import is_diagnosis, render, render_diagnosis

NEWER = ("sublayers", "writes", "sampled", "choices")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build_run(tmp_path_factory.mktemp("runs"))
    rewrite(found / "before/probe.json", probed)
    return found


def test_nothing_stands_where_nothing_was_recorded(tmp_path: Path) -> None:
    plain = build_run(tmp_path)
    data = collect(plain)
    text = render(plain, data)[2].read_text(encoding="utf-8")
    for key in NEWER:
        assert key not in figures(data) and f"figure-{key}" not in text
    assert not {"choices-table", "retrieval", "repair", "skipped"} & set(shown_tables(data))
    assert "Choosing and ranking" not in text and "Not every step" not in text


def test_every_newer_probe_has_its_figure_and_its_numbers(run: Path) -> None:
    data = collect(run)
    found = figures(data)
    assert set(NEWER) <= set(found)
    text = render(run, data)[2].read_text(encoding="utf-8")
    page = Page(text)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {f"figure-{key}" for key in NEWER} | {"table-choices-table", "table-retrieval"} <= ids
    for number in (words.number(1.5), words.number(8.5), "12.5%", "0.0625", "0.546", "0.898", "43.8%", "77.5%"):
        assert number in "".join(page.text)


def test_sublayers_say_what_each_is_worth_and_what_stands_for_it(run: Path) -> None:
    rows = {(block, part): levels for block, part, *levels in figures(collect(run))["sublayers"].rows}
    assert len(rows) == 2 * BLOCKS
    for (block, name), (closed, replaced) in rows.items():
        part = name.lower()
        expected = [words.number(kl_of(block, part, what)) for what in ("closed", "pruned")]
        assert [closed, replaced] == expected
    assert rows[2, "Attention"][0] == rows[2, "Attention"][1] and rows[0, "MLP"][1] == "0"


def test_a_dot_of_a_dropped_sublayer_lies_on_top_of_its_bar(run: Path) -> None:
    drawing = figures(collect(run))["sublayers"].wide
    bar = next(line for line in drawing.split("<rect") if "attention of block 2 closed" in line)
    dot = next(line for line in drawing.split("<circle") if "attention of block 2, pruned&#x27;s" in line)
    assert float(bar.split(' y="')[1].split('"')[0]) == float(dot.split('cy="')[1].split('"')[0])


def test_drawn_texts_stand_beside_the_greedy_one(run: Path) -> None:
    rows = figures(collect(run))["sampled"].rows
    assert [row[:2] for row in rows] == [("pruned", "greedy"), ("pruned", "seed 0"), ("pruned", "seed 7")]
    assert rows[1][2:] == ("0.375", "1.5", "3", "13%") and rows[2][3] == "8.5"


def test_temperatures_are_drawn_where_there_are_several(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    found = figures(collect(run))["temperatures"]
    assert [row[0] for row in found.rows] == ["0.5", "1", "2"]
    for part in ("before", "after"):
        rewrite(run / part / "probe.json", lambda whole: whole.update(temperatures=whole["temperatures"][1:2]))
    assert "temperatures" not in figures(collect(run))


# What happened on the way.


@pytest.mark.parametrize(
    ("skipped", "rollbacks", "said"),
    [
        (0, 0, []),
        (1, 0, ["1 of 396 training step was not finite and left out (0.3%); it changed no weight."]),
        (40, 1, ["40 of 396 training steps were not finite", "went back to a checkpoint once"]),
        (9, 2, ["9 of 396", "2 times"]),
    ],
)
def test_skipped_steps_and_returns_are_said(tmp_path: Path, skipped: int, rollbacks: int, said: list[str]) -> None:
    run = build_run(tmp_path)
    finding = {"step": 12, "found": "the loss is not finite (kl nan)", "sequences": [89, 96], "tensors": []}
    record = {"skipped": skipped, "rollbacks": rollbacks, "findings": [finding] * skipped, "finished": True}
    (run / "train/training.json").write_text(json.dumps(record))
    data = collect(run)
    notes = training.notes(data)
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))
    for path in render(run, data)[1:]:
        text = path.read_text(encoding="utf-8")
        assert all(part in text for part in said)
        assert ("kl nan" in text) == bool(skipped)
    assert ("lower train.lr" in " ".join(notes)) == (skipped >= 4)


def test_each_cut_of_a_repair_is_listed(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    kl = {"kl_before": 0.155, "kl_after": 0.148}
    cut = {"site": "mlp:2", "dropped": ["attention:3", "mlp:3"], "error_before": 0.268, "error_after": 0.0697, **kl}
    repair = {"kind": "linear", "kept": True, **kl, "tokens_fitted": 2304, "tokens_held_out": 768}
    rewrite(run / "prune/plan.json", lambda plan: plan.update(repair=repair | {"cuts": [cut | {"kept": False}]}))
    rows = shown_tables(collect(run))["repair"].rows
    assert rows == [("MLP of block 2", "attention 3, MLP 3", "0.268", "0.0697", "0.155", "0.148", "left out")]


# The search.


def searched(unit: str) -> dict:
    """Two rounds over four blocks: in the first the MLP of block 3 goes (or block 3), in the second attention 2."""
    scores = []
    for number, gone in ((1, ("mlp", 3)), (2, ("attention", 2))):
        for block in range(1, 4):
            for part in ("attention", "mlp"):
                parts = [f"{p}:{block}" for p in ("attention", "mlp")] if unit == "block" else [f"{part}:{block}"]
                score = 0.01 * block + (0.5 if part == "mlp" else 0.0) + number
                record = {"round": number, "blocks": [block], "parts": parts, "score": score, "by": "kl"}
                scores.append(record | {"chosen": (part, block) == gone})
    return {"kind": "depth", "blocks": 4, "scores": scores, "modules": []}


def test_a_search_over_sublayers_is_drawn_by_part() -> None:
    plan = searched("sublayer") | {"dropped": [], "dropped_attention": [2], "dropped_mlp": [3]}
    lanes = figures_plan._lanes(plan)
    assert list(lanes) == ["attention", "mlp"]
    assert lanes["attention"][1] == {1: 1.01, 2: 1.02, 3: 1.03} and lanes["mlp"][2][3] == pytest.approx(2.53)
    figure = figures_plan.pruned({"plan": plan})
    assert figure.wide.count("<circle") == 12  # every candidate of both parts and rounds
    assert ">Attention<" in figure.wide and ">MLP<" in figure.wide
    fates = {block: fate for block, fate, *_ in figure.rows}
    assert fates == {0: "kept", 1: "kept", 2: "attention dropped in round 2", 3: "MLP dropped in round 1"}
    assert figure.columns[2:] == ("round 1, Attention", "round 2, Attention", "round 1, MLP", "round 2, MLP")


def test_a_search_over_blocks_has_one_lane_with_the_lowest_candidate() -> None:
    lanes = figures_plan._lanes(searched("block") | {"dropped": [2, 3]})
    assert list(lanes) == ["block"] and lanes["block"][1] == {1: 1.01, 2: 1.02, 3: 1.03}


def test_of_several_sets_that_are_carried_the_candidate_that_was_chosen_is_drawn() -> None:
    parts = ["attention:3", "mlp:3"]
    records = [
        {
            "round": 2,
            "blocks": [3],
            "parts": parts,
            "score": score,
            "by": "kl",
            "chosen": beside == 2,
            "beside": [where],
        }
        for beside, score in ((1, 0.25), (2, 0.5), (4, 0.125))
        for where in [f"mlp:{beside}"]
    ]
    assert figures_plan._lanes({"scores": records})["block"] == {2: {3: 0.5}}


# The page in short.


def test_own_words_are_judged_by_both_models_on_them_and_not_by_how_far_texts_are_apart(tmp_path: Path) -> None:
    run = build_run(tmp_path)

    def steps(whole: dict) -> None:
        for row in whole["steps"]:
            row["teacher_forced"]["kl"]["mean"] = 0.25
            row["free_running"] |= {"kl": {"mean": 0.5}, "total": {"mean": 11.0}}

    for part in ("before", "after"):
        rewrite(run / part / "probe.json", steps)
    found = {question: answer for question, answer, _ in key_findings(collect(run))}
    each = "KL 0.5 on its own words and 0.25 on dense words"
    assert found["Is it worse on its own words?"] == f"Pruned, {each}; recovered, {each}."


def test_points_are_read_off_the_figures(run: Path) -> None:
    found = {question: answer for question, answer, _ in key_findings(collect(run))}
    assert "attention of block 2" in found["Where does most damage come from?"]
    assert "0.3" in found["Where does most damage come from?"]
    assert found["What does it buy?"] == "A file ×0.80 the size; decoding ×1.28 [1.23, 1.34]."
    moved = found["Do the logits that choose move as much?"]
    assert moved == "Pruned, KL 0.0625 among the options, 2.5 over all tokens there."


def test_several_choice_tasks_count_by_their_items_and_rankings_are_named_by_task(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    rewrite(run / "after/probe.json", probed)

    def second(whole: dict) -> None:
        other = {**whole["choices"][0], "task": "more", "subspace": 70}
        none = {**other, "task": "longer", "subspace": 0, "drift": {}}
        whole["choices"] += [{**other, "drift": {"kl": {"mean": 0.5625}}}, none]
        whole["retrieval"] = [{**whole["retrieval"][0], "task": "letters"}]

    rewrite(run / "after/probe.json", second)
    data = collect(run)
    found = {question: answer for question, answer, _ in key_findings(data)}
    moved = found["Do the logits that choose move as much?"]
    assert (
        moved == "Recovered, KL 0.163 among the options, 2.5 over all tokens there."
    )  # (280 x 1/16 + 70 x 9/16) / 350
    table = shown_tables(data)["retrieval"]
    assert table.rows[0][0] == "letters, mean" and table.columns[0][0] == "task, pooling"


@pytest.mark.parametrize(
    ("each", "half"), [([1, 5, 9, None], 5), ([3, None, None, None], 3), ([4, 2], 2), ([7, 7, 1], 7)]
)
def test_half_of_all_texts_not_of_those_that_parted(each: list[int | None], half: int) -> None:
    first = {"p50": 3}  # the record's own median, over the texts that parted: all there is if fewer than half did
    assert half_parted({"prompts": len(each), "each": each, "first": first}) == half


# A diagnosis.


def test_a_diagnosis_has_a_page_of_its_own(tmp_path: Path, run: Path) -> None:
    whole = json.loads((run / "before/probe.json").read_text())
    folder = write_diagnosis(tmp_path / "pair", whole)
    assert is_diagnosis(folder) and not is_diagnosis(run) and not is_diagnosis(tmp_path)
    page = Page(render_diagnosis(folder).read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "quantized" in text and "embedded:fable-2m" in text and "/somewhere" not in text
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {f"figure-{key}" for key in (*NEWER, "blocks", "steps", "divergence", "temperatures")} <= ids
    assert {attributes["href"][1:] for attributes in page.all("a") if attributes["href"]} <= ids


def test_a_diagnosis_of_choices_alone_shows_only_those(tmp_path: Path) -> None:
    folder = write_diagnosis(tmp_path / "pair", {})
    rewrite(folder / "probe.json", lambda whole: [whole.pop(name) for name in ("sublayers", "sampled", "retrieval")])
    text = render_diagnosis(folder).read_text(encoding="utf-8")
    assert "77.5% of choices are the dense model" in text
    assert text.count("<figure") == 1 and 'id="figure-choices"' in text and "Not measured" not in text


@pytest.mark.parametrize("broken", ["[1, 2]", '{"final": 3}', "{"])
def test_a_broken_diagnosis_is_named(tmp_path: Path, broken: str) -> None:
    (tmp_path / "probe.json").write_text(broken)
    with pytest.raises(ArtifactError, match=r"probe\.json"):
        render_diagnosis(tmp_path)


# Labels that do not lie on each other.


def test_labels_are_moved_apart_and_no_further() -> None:
    draw = random.Random(3)
    for _ in range(200):
        places = [draw.uniform(0, 100) for _ in range(draw.randint(1, 7))]
        gap = draw.uniform(1, 20)
        found = figure.apart(places, gap)
        order = sorted(range(len(places)), key=lambda index: places[index])
        steps = [found[b] - found[a] for a, b in itertools.pairwise(order)]
        assert all(step >= gap - 1e-9 for step in steps)
        assert sum(found) == pytest.approx(sum(places))  # the whole is not shifted
        cost = sum((a - b) ** 2 for a, b in zip(found, places, strict=True))
        for _ in range(20):  # no other admissible placing is nearer
            moved = sorted(value + draw.gauss(0, 3) for value in found)
            for index in range(1, len(moved)):
                moved[index] = max(moved[index], moved[index - 1] + gap)
            other = sum((moved[rank] - places[index]) ** 2 for rank, index in enumerate(order))
            assert other >= cost - 1e-6
    assert figure.apart([10.0, 50.0], 15) == [10.0, 50.0]
