"""Rows that hold nothing, and prompts that are too long, are left out and counted; `strict` refuses them."""

import json

import pytest
from byte_tokenizer import byte_tokenizer
from task_folder import make_task
from test_conversation import ADDED, chatty
from tiny import tiny

from recover.base.errors import DataError
from recover.config.recipe import Calibration, DenseText, GivenText, Train
from recover.measure.tasks import load_task
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.prune.calibrate import calibration_batches
from recover.train.data import build_dataset
from recover.train.sources import check_given, read_prompts
from recover.train.written_text import fitting_prompts


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return {"role": "assistant", "content": content}


def dense(path, **options):
    return DenseText(kind="dense", prompts=path, **options)


PROMPTS = [
    {"prompt": "ok"},
    {"prompt": "x" * 40},
    {"prompt": ""},
    {"prompt": None},
    {"prompt": "y" * 33},
    {"prompt": "z"},
]


def test_prompts_that_are_too_long_or_empty_are_left_out_and_counted(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", PROMPTS)
    found = fitting_prompts(dense(path), 32, byte_tokenizer())
    assert [row.value["prompt"] for row in found] == ["ok", "z"]
    assert fitting_prompts(dense(path), 32, byte_tokenizer()) == found
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("p.jsonl: 2 rows left out") == 2 and said.count("the prompt has 40 tokens") == 1  # said once each
    assert "p.jsonl:3: column 'prompt' must hold str, not empty" in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (PROMPTS[:2], r"p\.jsonl:2: the prompt has 40 tokens, which leaves none of train\.length 32"),
        (PROMPTS[2:3], r"p\.jsonl:1: column 'prompt' must hold str, not empty"),
    ],
)
def test_strict_refuses_the_first_prompt_that_would_be_left_out(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        fitting_prompts(dense(jsonl(tmp_path / "p.jsonl", rows), strict=True), 32, byte_tokenizer())


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"prompts are too long; .*p\.jsonl:1: the prompt has 40 tokens"):
        fitting_prompts(dense(jsonl(tmp_path / "p.jsonl", PROMPTS[1:2])), 32, byte_tokenizer())
    with pytest.raises(DataError, match=r"no row holds a prompt; .*p\.jsonl:1"):
        read_prompts(jsonl(tmp_path / "p.jsonl", PROMPTS[2:3]))
    given = GivenText(kind="given", source=jsonl(tmp_path / "t.jsonl", [{"text": " "}, {"text": None}]))
    with pytest.raises(DataError, match=r"no row holds a token to learn .*t\.jsonl:1"):
        check_given(given, byte_tokenizer(), 32)


def test_a_wrong_type_and_a_missing_column_are_still_refused_wherever_they_stand(tmp_path):
    rows = [{"text": "a"}] * 60
    for wrong, message in (({"text": 5}, "must hold str, not empty; found int"), ({"body": "a"}, "no column 'text'")):
        path = jsonl(tmp_path / "t.jsonl", [*rows, wrong])
        with pytest.raises(DataError, match=rf"t\.jsonl:61: .*{message}"):
            check_given(GivenText(kind="given", source=path), byte_tokenizer(), 32)


@pytest.mark.parametrize("columns", [{"text": "text"}, {"prompt": "p", "completion": "c"}, {"messages": "m"}])
def test_empty_rows_of_given_text_are_left_out_in_plan_and_in_training(tmp_path, capsys, columns):
    def row(text):
        return {"text": text, "p": "q", "c": text, "m": [user("q"), answer(text)]}

    path = jsonl(tmp_path / "t.jsonl", [row("" if index == 30 else f"ab {index}") for index in range(60)])
    given = {"kind": "given", "source": path, "columns": columns}
    tokenizer = chatty(ADDED)
    check_given(GivenText.model_validate(given), tokenizer, 64)
    said = " ".join(capsys.readouterr().err.split())
    assert "t.jsonl: 1 row left out" in said and "t.jsonl:31: " in said
    cfg = Train.model_validate({"epochs": 1, "tokens": 10_000, "length": 64, "batch_size": 4, "data": [given]})
    build_dataset(cfg, Twin(tiny(), Plan("depth", 6, (2,))), tokenizer, 0, tmp_path / "data")
    assert "1 rows left out" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match=r"t\.jsonl:31: "):
        check_given(GivenText.model_validate({**given, "strict": True}), tokenizer, 64)


def test_a_template_that_refuses_a_late_row_is_found_by_plan(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ADDED
    rows = [{"m": [user(f"{index}"), answer("yes")]} for index in range(60)]
    rows.append({"m": [{"role": "system", "content": "brief"}, user("q"), answer("yes")]})
    given = GivenText(kind="given", source=jsonl(tmp_path / "t.jsonl", rows), columns={"messages": "m"})
    with pytest.raises(DataError, match=r"t\.jsonl:61 \(TemplateError: no system role\)"):
        check_given(given, chatty(template), 64)


def test_empty_texts_of_a_perplexity_task_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"text": text} for text in ("", "a", " \n", "b", None)]
    assert load_task(make_task(tmp_path, rows, kind="perplexity")).items == ("a", "b")
    said = " ".join(capsys.readouterr().err.split())
    assert "3 empty rows left out" in said and "task.jsonl:1" in said
    with pytest.raises(DataError, match=r"holds no rows.*task\.jsonl:1: column 'text': found nothing"):
        load_task(make_task(tmp_path, rows[:1], kind="perplexity"))


def test_empty_documents_leave_no_trace_in_calibration(tmp_path):
    texts = ["abcdefgh", "ijklmnop"]
    cfg = Calibration(data=jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts]), samples=1, length=18)
    plain = calibration_batches(cfg, byte_tokenizer(), 0)[0].tolist()
    jsonl(tmp_path / "t.jsonl", [{"text": text} for text in ("", *texts, " ", None)])
    (row,) = calibration_batches(cfg, byte_tokenizer(), 0)[0].tolist()
    assert sorted(row) == sorted(plain[0])


def test_the_last_answer_of_a_conversation_is_written_anew(tmp_path):
    turns = [{"role": "system", "content": "brief"}, user("one"), answer("1"), user("two"), answer("2")]
    asked = "<system>brief<end><user>one<end><assistant>1<end><user>two<end><assistant>"
    rows = [{"messages": turns}, {"messages": turns[:-1]}, {"prompt": turns[:-1], "completion": [turns[-1]]}]
    path = jsonl(tmp_path / "m.jsonl", [*rows, {"prompt": "plain"}])
    tokenizer = chatty(ADDED)
    data = {"kind": "dense", "prompts": path, "max_new_tokens": 8, "batch_size": 4}
    cfg = Train.model_validate({"epochs": 1, "tokens": 60, "length": 120, "batch_size": 2, "data": [data]})
    written = build_dataset(cfg, Twin(tiny(), Plan("depth", 6, (2,))), tokenizer, 0, tmp_path / "data")
    prompts = {
        tokenizer.decode(
            [token for token, bit in zip(row["input_ids"], row["completion_mask"], strict=True) if not bit]
        )
        for row in written
    }
    assert prompts == {asked, "<user>plain<end><assistant>"}
    again = build_dataset(cfg, Twin(tiny(), Plan("depth", 6, (2,))), tokenizer, 0, tmp_path / "data")
    assert again.to_dict() == written.to_dict()  # read back from what was saved
    renamed = jsonl(tmp_path / "r.jsonl", [{"talk": turns}])
    (row,) = fitting_prompts(dense(renamed, column="talk"), 120, tokenizer)
    assert row.value["prompt"] == turns[:-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [answer("1")]}, r"m\.jsonl:1: column 'messages' holds answers of the assistant alone"),
        ({"messages": ["x"]}, r"m\.jsonl:1: a message must be an object"),
        ({"messages": [user(3)]}, r"m\.jsonl:1: message 0 \(user\): found content 3"),
        ({"text": "x"}, r"m\.jsonl:1: no column 'prompt'"),
    ],
)
def test_messages_that_ask_nothing_are_refused_by_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        fitting_prompts(dense(jsonl(tmp_path / "m.jsonl", [row])), 64, chatty(ADDED))


def test_messages_without_a_template_are_refused_by_line(tmp_path):
    path = jsonl(tmp_path / "m.jsonl", [{"messages": [user("a")]}])
    for tokenizer, options in ((byte_tokenizer(), {}), (chatty(ADDED), {"chat": False})):
        with pytest.raises(DataError, match=r"m\.jsonl:1: messages need a chat template"):
            fitting_prompts(dense(path, **options), 64, tokenizer)
