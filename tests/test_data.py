"""The text of a recovery: budgets, shares, exact ids, the cache, and the errors of bad sources, by file and line."""

import json

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from recover.base.errors import DataError
from recover.config.recipe import GivenText, Train
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.text.read import Row
from recover.train import written_text
from recover.train.data import TOLERANCE, build_dataset, collator, evened, training_order
from recover.train.sources import read_rows, samples_of

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def twin():
    return Twin(tiny(), Plan("depth", 6, (2, 4)))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(folder, count=40, **columns):
    source = jsonl(folder / "texts.jsonl", [{"text": "ab" * (2 + i % 9)} for i in range(count)])
    return {"kind": "given", "source": source, **columns}


def prompts(folder, count=5, **options):
    source = jsonl(folder / "prompts.jsonl", [{"prompt": f"go {i}"} for i in range(count)])
    return {"kind": "dense", "prompts": source, "max_new_tokens": 8, "batch_size": 4, **options}


def cfg(*sources, **changes):
    fields = {"epochs": 1, "tokens": 200, "length": 32, "batch_size": 4, "data": list(sources)}
    return Train.model_validate({**fields, **changes})


def scored(rows, how="completion"):
    batch = collator(0, how)([rows[index] for index in range(len(rows))])
    return int((batch["labels"][:, 1:] != -100).sum())


def build(recipe_leaf, twin, folder, seed=1):
    return build_dataset(recipe_leaf, twin, byte_tokenizer(), seed, folder / "data")


def test_the_budget_is_met_in_whole_steps(twin, tmp_path):
    rows = build(cfg(texts(tmp_path, 200), tokens=900), twin, tmp_path)
    assert len(rows) % 4 == 0
    assert 900 - 4 * 32 < scored(rows) < 900 + 32


def test_each_source_gives_its_share(twin, tmp_path):
    rows = build(cfg(texts(tmp_path, 300, share=3), prompts(tmp_path, share=1), tokens=1200), twin, tmp_path)
    from_dense = sum(sum(row["completion_mask"]) for row in rows if 0 in row["completion_mask"])
    assert from_dense / scored(rows) == pytest.approx(0.25, abs=0.08)


def test_the_same_call_gives_the_same_rows_and_another_seed_others(twin, tmp_path):
    recipe_leaf = cfg(texts(tmp_path), prompts(tmp_path))
    first, again = build(recipe_leaf, twin, tmp_path), build(recipe_leaf, twin, tmp_path)
    assert first.to_dict() == again.to_dict()
    assert first.to_dict() != build(recipe_leaf, twin, tmp_path, seed=2).to_dict()


def test_dense_text_is_the_dense_models_own_and_fresh_each_round(twin, tmp_path):
    rows = build(cfg(prompts(tmp_path, temperature=1.0), tokens=240), twin, tmp_path)
    written = [tuple(row["input_ids"]) for row in rows]
    assert len(rows) > 20 and len(set(written)) == len(written)  # 5 prompts, many rounds, no text twice
    assert all(sum(row["completion_mask"]) >= 1 for row in rows)


def test_greedy_text_is_what_the_dense_model_finds_most_likely(twin, tmp_path):
    rows = build(cfg(prompts(tmp_path, temperature=0), tokens=40, batch_size=1), twin, tmp_path)
    dense = tiny()
    for row in rows:
        ids, start = torch.tensor([row["input_ids"]]), row["completion_mask"].index(1)
        with torch.no_grad():
            best = dense(input_ids=ids).logits.argmax(-1)[0, start - 1 : -1]
        assert best.tolist() == row["input_ids"][start:]


def test_greedy_text_is_repeated_with_a_warning(twin, tmp_path, capsys):
    rows = build(cfg(prompts(tmp_path, temperature=0), tokens=160), twin, tmp_path)
    assert len({tuple(row["input_ids"]) for row in rows}) <= 5 < len(rows)
    assert "times over" in capsys.readouterr().err


def test_saved_text_is_read_and_a_torn_end_is_written_again(twin, tmp_path, monkeypatch):
    recipe_leaf = cfg(prompts(tmp_path), tokens=240)
    whole = build(recipe_leaf, twin, tmp_path).to_dict()
    (saved,) = (tmp_path / "data").iterdir()
    lines = saved.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    saved.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    calls, write = [], written_text.write_together
    monkeypatch.setattr(written_text, "write_together", lambda *a: calls.append(1) or write(*a))
    assert build(recipe_leaf, twin, tmp_path).to_dict() == whole
    assert len(calls) == len(lines) - 2
    build(recipe_leaf, twin, tmp_path)
    assert len(calls) == len(lines) - 2


def test_text_of_another_model_is_not_taken(twin, tmp_path):
    recipe_leaf = cfg(prompts(tmp_path))
    build(recipe_leaf, twin, tmp_path)
    build(recipe_leaf, Twin(tiny(seed=1), Plan("depth", 6, (2, 4))), tmp_path)
    build(recipe_leaf, Twin(tiny(), Plan("depth", 6, (1,))), tmp_path)  # another pruning of the same dense model
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_short_sources_repeat_with_a_warning(twin, tmp_path, capsys):
    rows = build(cfg(texts(tmp_path, 3), tokens=200), twin, tmp_path)
    assert scored(rows) > 150 and "times over" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["completion", "all"])
def test_labels_are_the_completion_or_all(how):
    rows = [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [9, 10], "completion_mask": [0, 1]},
    ]
    batch = collator(0, how)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    expected = (
        [[-100, -100, 7, 8], [-100, 10, -100, -100]] if how == "completion" else [[5, 6, 7, 8], [9, 10, -100, -100]]
    )
    assert batch["labels"].tolist() == expected


@given(st.lists(st.integers(1, 99), max_size=200), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_order_is_whole_steps_without_repeats(lengths, batch_size, seed):
    order = training_order(lengths, batch_size, seed)
    assert len(order) == len(lengths) // batch_size * batch_size
    assert len(set(order)) == len(order) and set(order) <= set(range(len(lengths)))


@given(st.lists(st.integers(1, 99), max_size=200), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_order_for_packed_rows_is_whole_steps_without_repeats(lengths, rows, together, seed):
    order = training_order(lengths, rows * together, seed, packed=together)
    assert len(order) == len(lengths) // (rows * together) * rows * together
    assert sorted(order) == sorted(training_order(lengths, rows * together, seed))
    assert order == training_order(lengths, rows * together, seed, packed=together)


@pytest.mark.parametrize(("together", "apart"), [(32, TOLERANCE), (8, 100)])
def test_packed_rows_hold_equally_many_tokens_and_stay_random_otherwise(together, apart):
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.lognormal(5.1, 0.5, 3200), 20, 640).astype(int).tolist()
    order = training_order(lengths, 32, 7, packed=together)
    rows = np.array(order).reshape(-1, 32)
    whole = np.array(training_order(lengths, 32, 7, packed=32)).reshape(-1, 32)
    assert (np.sort(rows) == np.sort(whole)).all()  # steps are the same however they are cut into rows
    totals = np.array(lengths)[order].reshape(-1, together).sum(1)
    assert totals.max() - totals.min() <= apart
    loose = np.random.default_rng(2).permutation(lengths).reshape(-1, together).sum(1)
    assert np.ptp(loose) > 10 * np.ptp(totals)  # what it would be by chance alone
    within = np.array(lengths)[order].reshape(-1, together).std(1).mean()
    assert within == pytest.approx(np.std(lengths), rel=0.15)  # short and long ones lie together, as before


def test_a_sequence_longer_than_other_rows_leaves_those_even():
    lengths = [1000, *range(10, 41)]
    order = evened(range(32), lengths, 4)
    totals = sorted(np.array(lengths)[order].reshape(-1, 4).sum(1))
    assert totals[-1] == 1000 + 10 + 11 + 12 and totals[-2] - totals[0] <= TOLERANCE


def sample(value, columns, tokenizer=None, length=64):
    source = GivenText(kind="given", source="x.jsonl", columns=columns, strict=True)
    return samples_of(Row("x.jsonl:7", value), source, tokenizer or byte_tokenizer(), length)


def shown(one, tokenizer=None):
    """Text of the prompt and of what is learnt."""
    tokenizer = tokenizer or byte_tokenizer()
    parts = [[token for token, bit in zip(one.ids, one.mask, strict=True) if bit == side] for side in (0, 1)]
    return tuple(tokenizer.decode(part) for part in parts)


def test_prompt_and_completion():
    (one,) = sample({"q": "2+2=", "a": "4"}, {"prompt": "q", "completion": "a"})
    assert shown(one) == ("2+2=", "4</s>")


def test_texts_are_cut_into_pieces_and_learnt_whole():
    pieces = sample({"t": "abcdefghij"}, {"text": "t"}, byte_tokenizer(bos=True), 5)
    assert [shown(piece)[1] for piece in pieces] == ["<s>abcd", "efghi", "j</s>"]


def chatty():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def test_every_answer_of_a_conversation_is_learnt():
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so?"), ("assistant", "ok")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (one,) = sample({"m": messages}, {"messages": "m"}, chatty(), 200)
    assert shown(one) == ("<user>hi</s><assistant><user>so?</s><assistant>", "yo</s>ok</s>")


def test_prompts_go_through_the_chat_template():
    (one,) = sample({"q": "hi", "a": "yo"}, {"prompt": "q", "completion": "a"}, chatty(), 200)
    assert shown(one) == ("<user>hi</s><assistant>", "yo</s>")


@pytest.mark.parametrize("as_json", [False, True], ids=["lists", "JSON text"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([("user", "hi"), ("assistant", "yo"), ("user", "so?")], [("assistant", "ok")]),
        ([("user", "hi"), ("assistant", "yo"), ("user", "so?")], "ok"),
    ],
)
def test_prompt_and_completion_may_be_messages_and_the_completion_is_learnt(prompt, completion, as_json):
    def held(side):
        found = [{"role": role, "content": content} for role, content in side] if isinstance(side, list) else side
        return json.dumps(found) if as_json and isinstance(found, list) else found

    row = {"q": held(prompt), "a": held(completion)}
    (one,) = sample(row, {"prompt": "q", "completion": "a"}, chatty(), 200)
    assert shown(one) == ("<user>hi</s><assistant>yo</s><user>so?</s><assistant>", "ok</s>")


@pytest.mark.parametrize(
    ("value", "columns", "message"),
    [
        ({"x": 1}, {"text": "t"}, r"x.jsonl:7: no column 't', found \['x'\]"),
        ({"t": ""}, {"text": "t"}, r"x.jsonl:7: column 't' must hold str, not empty"),
        ({"t": 3}, {"text": "t"}, r"x.jsonl:7: column 't' must hold str"),
        ({"q": "a"}, {"prompt": "q"}, r"expected 'text', 'messages', or 'prompt' and 'completion'"),
        ({"m": [{"role": "user", "content": "a"}]}, {"messages": "m"}, r"x.jsonl:7: messages need a chat template"),
        ({"m": ["a"]}, {"messages": "m"}, r"x.jsonl:7: a message must be an object"),
    ],
)
def test_a_wrong_row_is_named(value, columns, message):
    with pytest.raises(DataError, match=message):
        sample(value, columns)


def test_a_conversation_without_an_answer_is_named():
    with pytest.raises(DataError, match="needs an assistant's answer"):
        sample({"m": [{"role": "user", "content": "a"}]}, {"messages": "m"}, chatty())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', r"s.jsonl:2: not JSON"),
        (b'{"text": "a"}\n[1]\n', r"s.jsonl:2: found list, expected one JSON object a line \(JSONL\)"),
        (b"\n\n", r"s.jsonl: no rows"),
        (b'{"text": "\xff"}\n', r"s.jsonl: not UTF-8 text"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(path))


def test_byte_order_marks_blank_lines_and_crlf_are_taken(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [row.value["text"] for row in read_rows(str(path))] == ["a", "b"]


def test_text_and_parquet_files_are_taken(tmp_path):
    import datasets

    (tmp_path / "t.txt").write_text("one\ntwo\n")
    assert read_rows(str(tmp_path / "t.txt"))[0].value["text"] == "one\ntwo\n"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "t.parquet"))
    rows = read_rows(str(tmp_path / "t.parquet"))
    assert len(rows) == 2 and rows[1].value["text"] == "b" and rows[1].where.endswith("t.parquet, row 1")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        read_rows(str(tmp_path / "missing.jsonl"))


def test_a_prompt_without_room_for_an_answer_is_named(twin, tmp_path):
    path = jsonl(tmp_path / "long.jsonl", [{"prompt": "ok"}, {"prompt": "x" * 40}])
    with pytest.raises(DataError, match=r"long.jsonl:2: the prompt has 40 tokens"):
        build(cfg({"kind": "dense", "prompts": path, "strict": True, "max_new_tokens": 8}), twin, tmp_path)


def test_rows_without_anything_to_learn_are_counted_or_refused(twin, tmp_path, capsys):
    columns = {"columns": {"prompt": "p", "completion": "c"}}
    rows = [{"p": "x" * 50, "c": "y"}] + [{"p": "x", "c": "yes"}] * 30
    given_text = {"kind": "given", "source": jsonl(tmp_path / "r.jsonl", rows), **columns}
    build(cfg(given_text, tokens=120), twin, tmp_path)
    assert "1 rows left out" in capsys.readouterr().err
    given_text["source"] = jsonl(tmp_path / "r2.jsonl", rows[:1])
    with pytest.raises(DataError, match="no row holds a token to learn"):
        build(cfg(given_text), twin, tmp_path)
