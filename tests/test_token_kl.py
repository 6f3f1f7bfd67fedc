"""KL at each token of the dense model's texts, of items lost and won: against a plain forward, and as it is shown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from task_folder import make_task
from tiny import tiny
from words import word_tokenizer

from recover.measure.tasks import load_task
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.probe import tasks as probing
from recover.probe.tasks import pieces_of, tokens_of_changed
from recover.report.items import END, LEVELS, runs_of_tokens

ROWS = [{"q": f"w{n} w{n + 1} w3"[: 6 + 3 * (n % 2)], "answer": "w1"} for n in range(1, 7)]
IDS = [[7, 9, 4], [5], [], [6, 6, 6, 6, 8], [4, 5], [9, 9, 9]]
DENSE, OTHER = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def task(tmp_path, **fields):
    return load_task(make_task(tmp_path, ROWS, kind="generate", prompt="{q}", **fields))


def by_hand(twin, tokenizer, prompt, ids):
    """KL of the two views at each token of `ids`, from full forwards of one text at a time."""
    prompt_ids = tokenizer(prompt).input_ids
    rows = torch.tensor([[*prompt_ids, *ids]])
    places = range(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(ids))
    with torch.no_grad():
        with twin.dense():
            dense = twin.model(rows).logits[0].double().log_softmax(-1)
        other = twin.model(rows).logits[0].double().log_softmax(-1)
    return [float((dense[at].exp() * (dense[at] - other[at])).sum()) for at in places]


def test_each_token_has_the_kl_of_a_plain_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "TEXTS_AT_ONCE", 2)
    tokenizer = word_tokenizer()
    twin = Twin(tiny("llama").eval(), Plan("depth", tiny("llama").config.num_hidden_layers, (1,)))
    found = tokens_of_changed(twin, tokenizer, task(tmp_path), (DENSE, OTHER), IDS)
    assert list(found) == [0, 3, 5], "those that are right on both sides, wrong on both, or without a text are left out"
    for item, tokens in found.items():
        expected = by_hand(twin, tokenizer, ROWS[item]["q"], IDS[item])
        assert [kl for _, kl in tokens] == pytest.approx(expected, rel=1e-4, abs=1e-7) and max(expected) > 1e-4
        assert "".join(piece for piece, _ in tokens) == tokenizer.decode(IDS[item], skip_special_tokens=True)


def test_so_many_items_and_tokens_are_read_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "TEXTS", 1)
    monkeypatch.setattr(probing, "TOKENS", 2)
    twin = Twin(tiny("llama").eval(), Plan("depth", tiny("llama").config.num_hidden_layers, (1,)))
    found = tokens_of_changed(twin, word_tokenizer(), task(tmp_path), (DENSE, OTHER), IDS)
    assert {item: len(tokens) for item, tokens in found.items()} == {0: 2, 3: 2}, "the first lost one, the first won"


def test_tasks_that_do_not_write_have_none(tmp_path):
    rows = [{"q": "w1", "options": ["w2", "w3"], "label": 0}]
    choice = load_task(make_task(tmp_path, rows, kind="choice", prompt="{q}"))
    twin = Twin(tiny("llama").eval(), Plan("depth", tiny("llama").config.num_hidden_layers, (1,)))
    assert tokens_of_changed(twin, word_tokenizer(), choice, ([1.0], [0.0]), [[4]]) == {}


def test_a_letter_of_several_tokens_is_given_to_its_last():
    parts = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b"", 5: b"b"}
    fake = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: b"".join(parts[each] for each in ids).decode("utf-8", "replace")
    )
    assert pieces_of(fake, [1, 2, 3, 4, 5]) == ["a", "", "é", "", "b"]
    assert pieces_of(fake, [1, 2]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_tokens_are_shown_in_runs_by_level():
    kls = [["So ", 0.0], ["it ", 0.01], ["is", 0.03], [" 5", 9.5], ["", 1.2]]
    assert runs_of_tokens(kls) == [("So it ", 0, ""), ("is", 1, "KL 0.03"), (" 5", 5, "KL 9.5"), (END, 4, "KL 1.2")]
    assert runs_of_tokens([["a", 0.0], ["", 0.0]]) == [("a", 0, "")] and runs_of_tokens(None) == []
    assert sorted(LEVELS) == list(LEVELS) and len(LEVELS) == 5
    long = runs_of_tokens([["word ", 0.0]] * 2000)
    assert long[-1] == (" …", 0, "") and sum(len(text) for text, *_ in long) <= 1202
