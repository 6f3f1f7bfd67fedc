"""Log-likelihoods of given text, against a plain loop over single texts."""

import pytest
import torch
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import DataError
from recover.text.likelihood import Continuation, log_likelihoods, option_log_likelihoods, option_rows


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mistral_sliding"])
def test_log_likelihoods_equal_a_loop_over_single_texts(family):
    model = tiny(family)
    rows = [Continuation(list(range(5, 5 + length)), start) for length, start in ((9, 4), (3, 1), (14, 1), (9, 8))]
    with torch.no_grad():
        expected = []
        for row in rows:
            logp_TV = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(float(logp_TV[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids))))
    for batch_size in (1, 4):
        assert log_likelihoods(model, rows, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def options(lengths, *, start, seed):
    prompt = torch.randint(3, 250, (start,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Continuation([*prompt, *range(5 + seed, 5 + seed + length)], start) for length in lengths]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_sliding", "mistral_sliding", "smollm3"])
def test_what_options_share_is_read_once_and_changes_nothing(family, monkeypatch):
    model = tiny(family)
    groups = [
        options([1, 1, 1, 1], start=12, seed=1),
        options([4, 1, 7], start=3, seed=2),
        options([2, 5], start=17, seed=3),
    ]
    expected = [log_likelihoods(model, group, batch_size=1) for group in groups]
    for batch_size, at_once in ((1, 2**27), (64, 2**27), (64, 1)):
        monkeypatch.setattr("recover.text.likelihood.LOGITS_AT_ONCE", at_once)
        found = option_log_likelihoods(model, groups, batch_size=batch_size)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_prompt_with_options_of_one_token_is_read_once():
    model, groups, seen = tiny(), [options([1, 1, 1, 1], start=9, seed=1), options([1, 3], start=5, seed=2)], []
    forward = model.forward

    def counted(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    model.forward = counted
    option_log_likelihoods(model, groups, batch_size=64)
    assert seen == [(2, 9), (1, 2)]  # both prompts; then what the one long option has beyond its first token


def test_attention_that_our_masks_do_not_serve_reads_every_row_by_itself():
    model, groups = tiny(), [options([2, 3], start=6, seed=4)]
    expected = option_log_likelihoods(model, groups, batch_size=2)
    model.config.layer_types = ["linear_attention"]
    assert option_log_likelihoods(model, groups, batch_size=2)[0] == pytest.approx(expected[0], rel=1e-5)


def test_a_small_memory_budget_changes_nothing(monkeypatch):
    model, rows = tiny(), [Continuation(list(range(5, 20)), 1), Continuation(list(range(9, 16)), 3)]
    expected = log_likelihoods(model, rows, batch_size=2)
    monkeypatch.setattr("recover.text.likelihood.LOGITS_AT_ONCE", 1)
    assert log_likelihoods(model, rows, batch_size=2) == pytest.approx(expected, rel=1e-6)


def test_options_are_scored_in_full_and_from_the_same_token_on():
    rows = option_rows(word_tokenizer(bos=True), "w5 w6", ["w7", "w8 w9 w10"], separator=" ")
    assert rows == [Continuation([1, 5, 6, 7], 3), Continuation([1, 5, 6, 8, 9, 10], 3)]
    chat = option_rows(word_tokenizer(chat=True), "w5", ["w7 w8", "w9"], separator=" ")
    assert [row.ids[row.start :] for row in chat] == [[7, 8], [9]]


def test_a_merge_across_the_border_moves_the_start_back_for_all_options():
    """Characters are tokens, but "ab" is one: the option "b" swallows the end of the prompt, the other does not."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), bos_token="<s>", eos_token="</s>"
    )
    rows = option_rows(tokenizer, "ca", ["b", "c"], separator="")
    assert rows == [Continuation([4, 5], 1), Continuation([4, 2, 4], 1)]
    with pytest.raises(DataError, match="no token before its options"):
        option_rows(tokenizer, "a", ["b", "c"], separator="")
