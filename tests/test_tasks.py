"""What is measured on tasks: choices and perplexity against a plain loop, scores against hand counts."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from task_folder import CHOICE, GENERATE, make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import DataError, ModelError
from recover.config.recipe import Measure, Sampling
from recover.maths.score import extract, interval95, is_right, normal, pass_at, wilson95
from recover.measure.kinds import generate as generating
from recover.measure.kinds.generate import against, shape
from recover.measure.tasks import load_task, measure
from recover.text.generate import Generation

CFG = Measure(tasks=("x",), max_new_tokens=6, batch_size=3, sampling=None, samples=2)
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def test_choice_picks_the_option_of_highest_likelihood(tmp_path):
    model, tokenizer = tiny(), word_tokenizer(bos=True)
    options = ["w7", "w8 w9", "w200 w201 w202", "w33"]
    prompts = [f"w{number} w5" for number in range(10, 22)]
    with torch.no_grad():
        scores = [
            [
                sum(
                    float(model(torch.tensor([ids])).logits[0].log_softmax(-1)[at - 1, ids[at]])
                    for at in range(3, len(ids))
                )
                for ids in (tokenizer(f"{prompt} {option}")["input_ids"] for option in options)
            ]
            for prompt in prompts
        ]
    best = [row.index(max(row)) for row in scores]
    rows = [
        {"q": prompt, "options": options, "label": label if item % 3 else (label + 1) % 4}
        for item, (prompt, label) in enumerate(zip(prompts, best, strict=True))
    ]
    record, texts = measure(model, tokenizer, [load_task(make_task(tmp_path, rows, **CHOICE))], CFG)
    task = record["tasks"]["task"]
    assert (task["kind"], task["items"], texts) == ("choice", 12, {})
    assert task["accuracy"] == pytest.approx(8 / 12) == record["headline"]["choice"]
    assert [sample["text"] for sample in task["samples"]] == [options[best[0]], options[best[1]]]
    margins = [
        row[item["label"]] - max(score for at, score in enumerate(row) if at != item["label"])
        for row, item in zip(scores, rows, strict=True)
    ]
    assert task["margin"] == pytest.approx(sum(margins) / 12, abs=1e-4)
    assert record["headline"]["generation"] is None and record["headline"]["perplexity"] is None


def test_a_model_without_preferences_is_never_right(tmp_path):
    model = tiny()
    model.lm_head.weight.data.zero_()
    rows = [{"q": "w5", "options": ["w7", "w8"], "label": label} for label in (0, 1)]
    record, _ = measure(model, word_tokenizer(), [load_task(make_task(tmp_path, rows, **CHOICE))], CFG)
    assert record["tasks"]["task"]["accuracy"] == 0.0 == record["tasks"]["task"]["margin"]


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(tmp_path, bos):
    model = tiny()
    model.lm_head.weight.data.zero_()
    path = make_task(tmp_path, [{"text": "w5 w6 w7"}, {"text": "w9 w8"}], kind="perplexity")
    record, _ = measure(model, word_tokenizer(bos=bos), [load_task(path)], CFG)
    assert record["tasks"]["task"]["tokens"] == (5 if bos else 3)
    assert record["headline"]["perplexity"] == pytest.approx(256, rel=1e-5)


def test_perplexity_is_e_to_the_mean_loss_over_all_tokens(tmp_path):
    model, tokenizer = tiny(), word_tokenizer()
    texts = ["w5 w6 w7 w8 w9 w10", "w9 w8 w7"]
    path = make_task(tmp_path, [{"body": text} for text in texts], kind="perplexity", text="body", length=4)
    record, _ = measure(model, tokenizer, [load_task(path)], CFG)
    nats, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:4]])
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert record["tasks"]["task"]["tokens"] == count == 5
    assert record["headline"]["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)


def written_by(model, prompts, *, limit=6):
    from recover.text.generate import generate

    return generate(model, word_tokenizer(), prompts, max_new_tokens=limit, batch_size=4)


def test_generate_task_counts_right_answers_and_compares_with_the_dense_texts(tmp_path):
    model, prompts = tiny(), [f"w{number} w4" for number in range(10, 18)]
    texts = written_by(model, prompts)
    rows = [
        {"q": prompt, "answer": re.findall(r"w\d+", each.text)[-1] if item < 6 else "w3 w3 w3"}
        for item, (prompt, each) in enumerate(zip(prompts, texts, strict=True))
    ]
    path = make_task(tmp_path, rows, **GENERATE, answer=r"w\d+")
    record, generations = measure(model, word_tokenizer(), [load_task(path)], CFG)
    task = record["tasks"]["task"]
    assert task["exact_match"] == 0.75 == record["headline"]["generation"] and task["items"] == 8
    assert task["agreement"] is task["first_divergence"] is task["exact_text"] is task["sampled_exact_match"] is None
    assert len(task["samples"]) == 2 and task["samples"][0]["correct"] is True
    assert generations == {
        "task": [
            {"ids": each.ids, "text": each.text, "prompt": row["q"], "expected": row["answer"]}
            for each, row in zip(texts, rows, strict=True)
        ]
    }

    same, _ = measure(model, word_tokenizer(), [load_task(path)], CFG, reference=generations, limit=5)
    assert (same["tasks"]["task"]["agreement"], same["tasks"]["task"]["exact_text"]) == (1.0, 1.0)
    assert same["tasks"]["task"]["items"] == 5 and same["tasks"]["task"]["first_divergence"] is None
    assert same["tasks"]["task"]["parting"]["never"] == 1.0

    other, _ = measure(tiny(seed=1), word_tokenizer(), [load_task(path)], CFG, reference=generations)
    assert other["tasks"]["task"]["agreement"] < 0.5 and other["tasks"]["task"]["exact_text"] == 0.0
    short = {"task": generations["task"][:3]}
    with pytest.raises(DataError, match="task task: 8 items, but the dense model's texts hold 3"):
        measure(model, word_tokenizer(), [load_task(path)], CFG, reference=short)


def test_measuring_twice_gives_the_same_record_and_json_can_hold_it(tmp_path):
    rows = [{"q": f"w{number}", "answer": "w4"} for number in range(10, 17)]
    task = load_task(make_task(tmp_path, rows, **GENERATE))
    cfg = CFG.model_copy(update={"sampling": Sampling()})
    first, second = (measure(tiny(), word_tokenizer(), [task], cfg, seed=3)[0] for _ in range(2))
    for record in (first, second):
        assert record.pop("seconds") > 0 and record.pop("tokens_per_second") > 0
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)
    assert first["tasks"]["task"]["sampled_exact_match"] is not None


def test_a_task_may_lower_the_token_limit_but_not_raise_it(tmp_path):
    for own, expected in ((2, 2), (50, 6), (None, 6)):
        path = make_task(tmp_path, [{"q": "w5", "answer": "w4"}], **GENERATE, max_new_tokens=own)
        record, _ = measure(tiny(), word_tokenizer(), [load_task(path)], CFG)
        assert record["tasks"]["task"]["length"] == expected


@pytest.mark.parametrize(("right", "drawn"), [(0, 4), (1, 4), (3, 4), (4, 4), (2, 7)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_texts_with_a_right_one(right, drawn):
    texts = [1] * right + [0] * (drawn - right)
    for k in range(1, drawn + 1):
        choices = list(itertools.combinations(texts, k))
        assert pass_at(k, right, drawn) == pytest.approx(sum(map(max, choices)) / len(choices))


def test_pass_at_k_of_the_texts_that_a_task_draws(tmp_path, monkeypatch):
    rows = [{"q": f"w{number}", "answer": "w4"} for number in (10, 11)]
    path = make_task(tmp_path, rows, **GENERATE, samples=4, sampling={"temperature": 0.5})
    asked = []

    def written(subject, file, prompts, sampling):
        asked.append((list(prompts), sampling))
        right = {2: "00", 8: "10 11 00 10".replace(" ", "")}[len(prompts)]
        return [Generation([5, 2], "w4" if each == "1" else "w5", True) for each in right]

    monkeypatch.setattr(generating, "written", written)
    task = measure(tiny(), word_tokenizer(), [load_task(path)], CFG)[0]["tasks"]["task"]
    assert asked == [(["w10", "w11"], None), (["w10", "w11"] * 4, Sampling(temperature=0.5))]
    # Of the four texts of each prompt three and one are right.
    assert {k: found["value"] for k, found in task["pass_at_k"].items()} == {"1": 0.5, "2": 0.75, "4": 1.0}
    assert task["exact_match"] == 0.0 and task["sampled_exact_match"] == 0.5
    assert task["pass_at_k"]["2"]["interval95"] == [0.5, 1.0]
    plain = measure(tiny(), word_tokenizer(), [load_task(path).without_samples()], CFG)[0]["tasks"]["task"]
    assert plain["pass_at_k"] is None is plain["sampled_exact_match"] and len(asked) == 3


def test_texts_of_the_same_prompt_are_drawn_apart_and_follow_their_numbers(monkeypatch):
    from recover.text import generate as generation

    how = {"max_new_tokens": 6, "sampling": Sampling(), "batch_size": 3}
    four = generation.generate(tiny(), word_tokenizer(), ["w10 w4"] * 4, **how)
    assert len({tuple(each.ids) for each in four}) == 4
    last = generation.generate(tiny(), word_tokenizer(), ["w10 w4"] * 2, numbers=[3, 1], **how)
    assert last == [four[3], four[1]]


def test_a_task_says_what_ends_a_text(tmp_path):
    prompts = ["w6", "w10 w4", "w11 w4"]
    whole = written_by(tiny(), prompts)
    word = whole[0].text.split()[-1]
    rows = [{"q": prompt, "answer": "w4"} for prompt in prompts]
    path = make_task(tmp_path, rows, **GENERATE, stop=[word, "never there"])
    record, generations = measure(tiny(), word_tokenizer(), [load_task(path)], CFG)
    for before, after in zip(whole, generations["task"], strict=True):
        assert after["text"] == before.text.split(word)[0]
        assert after["ids"] == before.ids[: len(after["ids"])]
    task, cut = record["tasks"]["task"], [word in each.text for each in whole]
    assert task["ended"] == sum(cut) / 3 > 0 and task["truncated"] == 3 - sum(cut)
    assert task["length"] < 6 == len(whole[0].ids)


def test_the_shape_of_texts():
    found = shape([Generation([4, 4, 4, 4, 4, 4], "", False), Generation([5, 6, 7, 2], "", True)], [1.0, 1.0])
    assert found["truncated"] == 1 == found["truncated_right"] and found["ended"] == 0.5 and found["length"] == 5.0
    assert found["repetition"] == pytest.approx((2 / 3 + 0) / 2) and found["distinct_2"] == pytest.approx((0.2 + 1) / 2)
    assert found["longest_repeat"] == 2.5


def test_mistakes_of_form_are_told_from_those_of_content(tmp_path, monkeypatch):
    texts = [
        *(("= 7", [5, 7, 2], True), ("= 8", [5, 8, 2], True), ("none", [5, 2], True), ("it is", [5, 6, 4], False)),
        *((" 3" * 30, [5] * 30, False), (" 7" * 30, [5] * 30, False), ("= 9", [4, *[5, 6] * 12], False)),
    ]
    monkeypatch.setattr(generating, "written", lambda *_: [Generation(ids, text, ended) for text, ids, ended in texts])
    rows = [{"q": "w5", "answer": "7"}] * len(texts)
    path = make_task(tmp_path, rows, **GENERATE, answer=NUMBER)
    task = measure(tiny(), word_tokenizer(), [load_task(path)], CFG)[0]["tasks"]["task"]
    assert task["mistakes"] == {"loop": 2, "endless": 1, "no_answer": 1, "content": 1}
    assert task["exact_match"] == 2 / 7 == 1 - sum(task["mistakes"].values()) / 7
    assert task["loop_rate"] == 3 / 7 and task["loop_start"] == {"mean": 1 / 3, "p10": 0.0, "p50": 0.0, "p90": 0.8}
    assert {kind: each["text"][:5] for kind, each in task["examples"].items()} == {
        "loop": " 3 3 ",
        "endless": "it is",
        "no_answer": "none",
        "content": "= 8",
    }


def test_texts_that_never_part_are_of_their_own_kind():
    same = [[1, 2, 3]] * 98
    found = against([*same, [4, 5, 6], [7, 8, 9]], [*same, [4, 9, 6], [7]])
    assert found["exact_text"] == found["parting"]["never"] == pytest.approx(0.98)
    assert found["first_divergence"] == {"mean": 1.0, "p10": 1.0, "p50": 1.0, "p90": 1.0}
    assert [found["parting"][share] for share in ("p10", "p50", "p90")] == [None] * 3
    assert found["parting"]["curve"] == [[0, 1.0], [2, pytest.approx(0.98)]]
    assert against(same, same)["first_divergence"] is None


@pytest.mark.parametrize(
    ("text", "targets", "pattern", "contains", "right"),
    [
        ("so 17 + 25 = 42.", ["42"], NUMBER, False, True),
        ("42, no: 41", ["42"], NUMBER, False, False),
        ("It costs $1,200.00", ["1200"], r"\$[\d,.]+", False, True),
        ("none", ["42"], NUMBER, False, False),
        ("  Paris. ", ["paris"], None, False, True),
        ("It is Paris, of course", ["Paris", "Lyon"], None, True, True),
        ("It is Parisian", ["Paris"], None, True, False),
        ("Lake H2O!", ["H2O"], None, True, True),
        ("the answer is (B) I think", ["b"], r"\(([A-D])\)", False, True),
    ],
)
def test_answers(text, targets, pattern, contains, right):
    assert is_right(extract(text, pattern), targets, contains=contains) is right


def test_numbers_are_compared_as_numbers():
    assert normal("1,200.50") == normal("$1200.5") == "1200.5"
    assert normal("-3.0") == "-3" != normal("3")
    assert normal("Blue  Whale!") == "blue whale"


def test_a_worked_solution_can_be_the_target(tmp_path):
    rows = [{"q": "w5", "answer": "3 + 4 = 7 #### 7"}]
    file = load_task(make_task(tmp_path, rows, **{**GENERATE, "answer": NUMBER})).file
    from recover.measure.kinds.generate import Question, rights

    assert rights(file, [Question("", (rows[0]["answer"],))], [Generation([], "it is 7", True)]) == [1.0]


def test_interval95_covers_the_mean_and_shrinks_with_items():
    values = [1.0, 0.0, 1.0, 1.0] * 25
    low, high = interval95(values)
    exact = 1.96 * math.sqrt(0.75 * 0.25 / 100)
    assert low == pytest.approx(0.75 - exact, abs=0.02) and high == pytest.approx(0.75 + exact, abs=0.02)
    assert interval95(values) == [low, high]
    shares = [0.1, 0.5, 0.9, 0.4] * 25  # not right or wrong: by bootstrap
    low, high = interval95(shares)
    exact = 1.96 * np.std(shares) / 10
    assert low == pytest.approx(0.475 - exact, abs=0.01) and high == pytest.approx(0.475 + exact, abs=0.01)


@pytest.mark.parametrize(("right", "items"), [(0, 20), (20, 20), (1, 3), (150, 200)])
def test_the_interval_of_shares_solves_wilsons_equation_and_has_width_at_the_ends(right, items):
    """Its ends are the p from which the found share is 1.96 standard errors away."""
    found = wilson95(right, items)
    for end in found:
        if 0 < end < 1:
            assert abs(right / items - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / items), rel=1e-6)
    assert 0 <= found[0] <= right / items <= found[1] <= 1 and found[1] - found[0] > 0.05
    assert found == interval95([1.0] * right + [0.0] * (items - right))


def test_items_that_do_not_fit_and_models_that_give_nan_are_refused(tmp_path):
    model, tokenizer = tiny(), word_tokenizer()
    rows = [{"q": "w5 " * 300, "options": ["w6", "w7"], "label": 0}]
    with pytest.raises(DataError, match="task long: an item has 301 tokens, the model's context is 256"):
        measure(model, tokenizer, [load_task(make_task(tmp_path, rows, name="long", **CHOICE))], CFG)
    model.lm_head.weight.data[3] = float("nan")
    path = make_task(tmp_path, [{"text": "w5 w6 w7"}], kind="perplexity")
    with pytest.raises(ModelError, match="task task: the model gives log-probabilities that are not finite"):
        measure(model, tokenizer, [load_task(path)], CFG)
    with pytest.raises(DataError, match="task one: no text has two tokens"):
        measure(model, tokenizer, [load_task(make_task(tmp_path, [{"text": "w5"}], "one", kind="perplexity"))], CFG)


TWO = """
import json, sys
sys.path.insert(0, "tests")
from tiny import tiny
from words import word_tokenizer
from recover.base import dist
from recover.measure.tasks import load_task, measure
from recover.config.recipe import Measure

dist.start()
cfg = Measure(tasks=("x",), max_new_tokens=6, batch_size=3, sampling=None, samples=2)
record, texts = measure(tiny(), word_tokenizer(), [load_task(path) for path in sys.argv[1:]], cfg)
try:
    measure(tiny(max_position_embeddings=10), word_tokenizer(), [load_task(sys.argv[1])], cfg)
except Exception as error:
    record["failure"] = f"{type(error).__name__}: {error}"
print(json.dumps([record, texts]))
dist.stop()
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does_and_fail_together(tmp_path):
    from test_dist import launch

    written = [{"q": " ".join(["w9"] * (1 + item % 5)), "answer": "w4"} for item in range(7)]  # only some are too long
    chosen = [{"q": f"w{item + 5}", "options": ["w6 w7", "w8", "w9"], "label": item % 3} for item in range(5)]
    paths = [make_task(tmp_path, written, "written", **GENERATE), make_task(tmp_path, chosen, "chosen", **CHOICE)]
    record, texts = measure(tiny(), word_tokenizer(), [load_task(path) for path in paths], CFG)
    running = launch("-c", TWO, *paths, CUDA_VISIBLE_DEVICES="")
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found, found_texts = json.loads(out.splitlines()[-1])
        assert found_texts == texts and found["headline"] == pytest.approx(record["headline"], nan_ok=True)
        assert found["failure"].startswith("DataError: task written: the prompt")
        for name, task in record["tasks"].items():
            for key, value in task.items():
                assert found["tasks"][name][key] == (
                    pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                )
