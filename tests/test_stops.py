"""Strings that end a text: found wherever tokens cut them, by the table as in the text itself."""

import random

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from words import word_tokenizer

from recover.base.errors import DataError
from recover.text import generate as generation
from recover.text.decode import Stops, pieces
from recover.text.generate import generate


def pairs_tokenizer():
    """Tokens of one to three letters of a small alphabet, so that a string is cut in many ways."""
    letters = "abc\n"
    tokens = [*letters, *(x + y for x in letters for y in letters), "abc", "ca\n", "bab"]
    core = Tokenizer(models.WordLevel({"<s>": 0, **{token: n + 1 for n, token in enumerate(tokens)}}, unk_token="<s>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"), ["", *tokens]


@pytest.mark.parametrize("strings", [("ab",), ("abab", "b\n"), ("aab", "ab\n", "cc"), ("\n\n", "a"), ("abcabc",)])
def test_the_table_ends_a_text_with_the_token_that_completes_a_string(strings):
    tokenizer, tokens = pairs_tokenizer()
    stops, numbers = Stops(tokenizer, strings, len(tokens) + 3), random.Random(0)  # embeddings are padded
    assert stops.table_AV.shape[1] == len(tokens) + 3
    seen = 0
    for _ in range(400):
        ids = [numbers.randrange(len(tokens)) for _ in range(12)]
        texts = ["".join(tokens[token] for token in ids[: count + 1]) for count in range(12)]
        first = next((n for n, text in enumerate(texts) if any(each in text for each in strings)), None)
        assert stops.ended(ids) == (ids if first is None else ids[: first + 1])
        seen += first is not None
    assert seen > 10


def test_the_first_string_in_a_text_cuts_it():
    stops = Stops(byte_tokenizer(), ("\n\n", "def "), 256)
    assert stops.cut("a\n\ndef f") == "a" and stops.cut("def f\n\n") == "" and stops.cut("a\nde f") is None


@pytest.mark.parametrize(("strings", "unless"), [(("ab",), "ca"), (("\n\n", "a"), "bb"), (("cc",), "abc")])
def test_what_comes_before_the_strings_lets_a_text_go_on(strings, unless):
    tokenizer, tokens = pairs_tokenizer()
    stops, numbers = Stops(tokenizer, strings, len(tokens), unless=unless), random.Random(1)
    freed = ended = 0
    for _ in range(600):
        ids = [numbers.randrange(len(tokens)) for _ in range(12)]
        text = "".join(tokens[token] for token in ids)
        ends = [place + len(each) for each in strings if (place := text.find(each)) >= 0]
        free = text.find(unless) + len(unless) if unless in text else len(text) + 1
        if ends and min(ends) <= free:
            assert stops.cut(text) == text[: min(text.find(each) for each in strings if each in text[:free])]
            assert len("".join(tokens[token] for token in stops.ended(ids))) >= min(ends)
            assert len("".join(tokens[token] for token in stops.ended(ids)[:-1])) < min(ends)
            ended += 1
        else:
            assert stops.cut(text) is None and stops.ended(ids) == ids
            freed += bool(ends)
    assert freed > 10 and ended > 10
    assert Stops(tokenizer, ("\n```",), len(tokens), unless="```").unless is None


def test_pieces_are_what_tokens_add_to_a_text():
    tokenizer = byte_tokenizer()
    found = pieces(tokenizer, 260)
    assert len(found) == 260 and found[:3] == [""] * 3 and found[256:] == [""] * 4
    for token in tokenizer("x = 1\n")["input_ids"]:
        assert found[token] == tokenizer.decode([token])


@pytest.mark.parametrize("way", ["slots", "plain"])
@torch.no_grad()
def test_texts_end_where_a_string_begins(monkeypatch, way):
    model, tokenizer = tiny(), byte_tokenizer()
    prompts = [f"prompt {number}" for number in range(12)]
    whole = generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=12)
    common = max("".join(each.text for each in whole), key="".join(each.text for each in whole).count)
    if way == "plain":
        monkeypatch.setattr(generation, "fits", lambda model: False)
    found = generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=5, stop=[common, "never there"])
    for before, after in zip(whole, found, strict=True):
        if common not in before.text:
            assert after == before
            continue
        assert after.ended and after.text == before.text[: before.text.index(common)]
        assert after.ids == before.ids[: len(after.ids)] and str(tokenizer.decode(after.ids)).endswith(common)


@torch.no_grad()
def test_a_string_that_the_table_does_not_see_cuts_ids_too(monkeypatch):
    model, tokenizer = tiny(), byte_tokenizer()
    whole = generate(model, tokenizer, ["a prompt"], max_new_tokens=24, batch_size=1)[0]
    assert len(whole.text) > 12
    common = whole.text[8:10]
    monkeypatch.setattr("recover.text.decode.pieces", lambda tokenizer, vocabulary: [""] * vocabulary)
    found = generate(model, tokenizer, ["a prompt"], max_new_tokens=24, batch_size=1, stop=[common])[0]
    assert found.ended and found.text == whole.text[: whole.text.index(common)]
    assert found.ids == whole.ids[: len(found.ids)] and len(found.ids) < len(whole.ids)
    held = [str(tokenizer.decode(ids)) for ids in (found.ids[:-1], found.ids)]
    assert common not in held[0] and common in held[1]


def test_what_cannot_be_looked_for_is_named():
    for strings in (["a", ""], ["x" * 300]):
        with pytest.raises(DataError, match=r"stop: \d strings of \d+ characters"):
            Stops(word_tokenizer(), strings, 256)
