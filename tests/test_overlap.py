"""Measured items in the text of a run are found, by their words, counted and said."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from report_run import build_run
from small_run import QUICKSTART, SMALL
from task_folder import CHOICE, GENERATE, make_task

from recover.base.artifacts import read_json
from recover.config.recipe import load_recipe
from recover.maths.repeats import NEAR, overlaps, runs, words_of
from recover.measure.tasks import load_task
from recover.report.collect import collect
from recover.report.render import render
from recover.run import stages

ITEM = "Ann has 12 red pears in her old bag and gives 5 of them to her brother. How many pears does Ann have left?"
OTHER = "A train leaves the town at noon and drives north for three hours. How far away is it by then?"
HAN = "小明有十二个苹果，他把五个给了弟弟，又买了三个。现在小明一共有多少个苹果？"


@pytest.mark.parametrize(
    ("text", "same", "near"),
    [
        (ITEM, 1, 0),
        (ITEM.upper().replace(" ", "\n  "), 1, 0),
        (f"Solve this step by step. {ITEM} Give a number.", 1, 0),
        (f"{'Much before. ' * 300}{ITEM} And so on. {'More text. ' * 300}", 1, 0),
        (ITEM.replace("12", "40").replace("5", "7"), 0, 1),
        (ITEM.replace("How many pears does Ann have left", "What is left"), 0, 1),
        ("How many pears does Ann have left?", 0, 0),
        ("Tom has a red car.", 0, 0),
        (OTHER.replace("three", "four"), 0, 1),
        (HAN, 1, 0),
        (f"请回答：{HAN}", 1, 0),
        (HAN.replace("弟弟", "妹妹"), 0, 1),
        ("", 0, 0),
        ("?!", 0, 0),
    ],
)
def test_an_item_is_found_word_for_word_or_nearly(text, same, near):
    found = overlaps({"task": [ITEM, OTHER, HAN]}, ["Some other text.", text])
    assert [(row["same"], row["near"]) for row in found] == ([(same, near)] if same or near else [])
    for row in found:
        assert row["task"] == "task" and row["items"] == 3 and len(row["examples"]) == 1  # type: ignore[arg-type]


def test_a_template_is_no_overlap_and_an_item_of_nothing_else_must_be_the_same():
    ask = "Answer the question as briefly as you can. Write the number alone, with no words around it. Question: {}"
    items = [ask.format(f"What is {a} plus {a + 7}?") for a in range(40)]
    assert overlaps({"sums": items}, [ask.format(f"What is {a} plus {a + 9}?") for a in range(40)]) == []
    (row,) = overlaps({"sums": items}, [items[3], items[8]])
    assert (row["same"], row["near"]) == (2, 0)
    capitals = [ask.format(f"What is the capital of the old {name} country?") for name in map(str.title, "abcdefghij")]
    (row,) = overlaps({"capitals": capitals}, ["Tell me: what is the capital of the old C country, please?"])
    assert (row["same"], row["near"], row["examples"][0]["item"]) == (0, 1, capitals[2])  # type: ignore[index]


def test_tasks_are_counted_apart_and_examples_show_the_place():
    long = f"{'Nothing to see here, or there. ' * 60}{ITEM}{' Go on.' * 200}"
    rows = overlaps({"a": [ITEM, OTHER], "b": [OTHER], "c": [], "d": ["Unlike all of them."]}, [long, OTHER, long])
    assert [(row["task"], row["same"], row["near"]) for row in rows] == [("a", 2, 0), ("b", 1, 0)]
    shown = [example["text"] for example in rows[0]["examples"]]  # type: ignore[union-attr]
    assert any(ITEM in text and len(text) <= 300 for text in shown)


def test_what_is_near_is_that_of_all_pairs():
    draw = random.Random(0)
    items, texts = ([" ".join(draw.choices("abc", k=draw.randint(1, 20))) for _ in range(n)] for n in (50, 80))
    counts = Counter(run for item in items for run in runs(item))
    template = {run for run, count in counts.items() if count > 2}
    expected = set()
    for number, item in enumerate(items):
        own = runs(item) - template
        for text in texts:
            common = len(own & runs(text))
            least = min(len(own), max(8, len(runs(text) - template)))
            if words_of(text) == words_of(item) or (own and common / least >= NEAR):
                expected.add(number)
    (row,) = overlaps({"task": items}, texts)
    assert row["same"] + row["near"] == len(expected) > 5  # type: ignore[operator]


def test_examples_before_a_question_are_no_part_of_it(tmp_path):
    rows = [{"q": f"{ITEM} {word}", "answer": "7"} for word in ("one", "two", "three")]
    task = load_task(make_task(tmp_path, rows, fewshot={"count": 2}, **GENERATE))
    assert task.asked == tuple(row["q"] for row in rows) and all(ITEM in item.prompt[:200] for item in task.items)
    assert not overlaps({"task": [OTHER]}, [task.items[0].prompt])


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", ITEM), ("assistant", "7")))
SOURCES = {
    "prompts": (lambda path: {"kind": "dense", "prompts": jsonl(path, [{"prompt": OTHER}, {"prompt": ITEM}])}, 1),
    "answers in a text": (lambda path: {"kind": "given", "source": jsonl(path, [{"text": f"{ITEM} She has 7."}])}, 1),
    "prompt and completion": (
        lambda path: {
            "kind": "given",
            "source": jsonl(path, [{"p": "Ready?", "c": ITEM}]),
            "columns": {"prompt": "p", "completion": "c"},
        },
        1,
    ),
    "a plain text file": (lambda path: {"kind": "given", "source": str(_text(path.with_suffix(".txt")))}, 1),
    "nothing": (lambda path: {"kind": "dense", "prompts": jsonl(path, [{"prompt": "Hello there."}])}, 0),
}


def _text(path: Path) -> Path:
    path.write_text(f"A page of problems.\n\n{ITEM}\n\n{OTHER}\n")
    return path


def planned(tmp_path, *overrides):
    task = make_task(tmp_path, [{"q": ITEM, "answer": "7"}, {"q": "What is 2 plus 2?", "answer": "4"}], **GENERATE)
    choice = make_task(tmp_path, [{"q": OTHER, "options": ["a", "b"], "label": 0}], name="choice", **CHOICE)
    blocks = "prune={kind: depth, blocks: [3]}"
    recipe = load_recipe(QUICKSTART, [*SMALL, blocks, f"measure.tasks=[{task}, {choice}]", *overrides])
    return stages.run(recipe, tmp_path / "runs", until="dense")  # a plan alone writes nothing


@pytest.mark.parametrize("source", SOURCES)
def test_a_plan_says_which_measured_items_the_text_of_a_recovery_holds(tmp_path, capsys, source):
    make, count = SOURCES[source]
    directory = planned(tmp_path, f"train.data=[{json.dumps(make(tmp_path / 'data.jsonl'))}]")
    record, said = read_json(directory.overlap), " ".join(capsys.readouterr().err.split())
    of_task = [row for row in record["found"] if row["task"] == "task"]
    assert [row["same"] for row in of_task] == [1] * count
    assert ("task task: 1 of 2 measured items stand in train.data.0 (data." in said) == bool(count)


def test_calibration_is_looked_at_too_and_only_items_that_are_measured(tmp_path, capsys):
    path = jsonl(tmp_path / "texts.jsonl", [{"text": f"{OTHER} {'x ' * 200}"}, {"text": "What is 2 plus 2?"}])
    score = f"prune={{kind: depth, count: 1, calibration: {{data: {path}, length: 32, samples: 2}}}}"
    directory = planned(tmp_path, score)
    rows = read_json(directory.overlap)["found"]
    assert [(row["field"], row["task"], row["same"]) for row in rows] == [
        ("prune.calibration", "task", 1),
        ("prune.calibration", "choice", 1),
    ]
    assert "stand in prune.calibration (texts.jsonl) word for word; that text is what pruning" in " ".join(
        capsys.readouterr().err.split()
    )
    rows = read_json(planned(tmp_path, score, "measure.limit=1").overlap)["found"]
    assert [row["task"] for row in rows] == ["choice"]


def test_no_item_of_the_quickstart_stands_in_its_text(tmp_path, capsys):
    stages.run(load_recipe(QUICKSTART), tmp_path, until="plan")
    assert "looked for in 5,856 texts that the run is made with: none stands there" in capsys.readouterr().out


def test_a_report_shows_how_many_items_with_an_example(tmp_path):
    folder = build_run(tmp_path)
    assert collect(folder)["overlap"] is None
    (folder / "plan").mkdir(exist_ok=True)
    row = {"field": "train.data.0", "source": "q.jsonl", "task": "sums", "items": 200, "same": 150, "near": 3}
    example = {"item": "A <b>baker</b> has 14 rolls.", "text": "Once, a baker had 14 rolls.", "same": True}
    (folder / "plan/overlap.json").write_text(json.dumps({"found": [{**row, "examples": [example]}]}))
    data = collect(folder)
    assert data["overlap"] is not None and data["overlap"][0]["same"] == 150
    assert data["limits"][0].startswith("Task sums: 150 of 200 measured items stand in train.data.0 (q.jsonl) word")
    render(folder, data)
    for name in ("report.md", "report.html"):
        page = (folder / name).read_text()
        assert "Measured items that stand in the text" in page and "Once, a baker had 14 rolls." in page
        assert "150 of 200 measured items stand in" in page and "3 more nearly so" in page
    assert "<b>baker" not in (folder / "report.html").read_text()
