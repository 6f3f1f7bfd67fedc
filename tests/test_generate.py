"""Generation against a loop without cache or padding: same tokens, same order, and nothing left behind in the model."""

import pytest
import torch
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import DataError
from recover.config.recipe import Sampling
from recover.text import generate as generation
from recover.text.decode import write
from recover.text.generate import evaluating, generate
from recover.text.prompts import batches_by_length, encode_prompt

PROMPTS = ["w5 w6 w7 w8 w9 w10 w11", "w30", "w40 w41 w42", "w17 w3 w3", "w9 w8 w7 w6 w5 w4 w3 w9 w8 w7 w6"]


def greedy_without_cache(model, ids, steps, end=2):
    """The definition: whole prefix again for every token, one text at a time."""
    ids, written = list(ids), []
    with torch.no_grad():
        while len(written) < steps and end not in written:
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral_sliding"])
def test_greedy_equals_the_loop_without_cache_whatever_the_batches(family):
    model, tokenizer = tiny(family), word_tokenizer()
    expected = [greedy_without_cache(model, tokenizer(prompt)["input_ids"], 12) for prompt in PROMPTS]
    for batch_size in (1, 2, 5):
        found = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
        assert [each.ids for each in found] == expected


def biased_to_end(bias):
    """A tiny model whose end token is likelier, so that texts end at different places."""
    model = tiny("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(256))
    model.lm_head.bias.data[2] = bias
    return model


def test_texts_end_with_their_end_token_and_say_so():
    model, tokenizer = biased_to_end(1.5), word_tokenizer()
    prompts = [f"w{number} w{number + 1}" for number in range(3, 40)]
    found = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=8)
    expected = [greedy_without_cache(model, tokenizer(prompt)["input_ids"], 10) for prompt in prompts]
    assert [each.ids for each in found] == expected
    assert {each.ended for each in found} == {True, False}
    assert all(each.ended == (each.ids[-1] == 2) and "</s>" not in each.text for each in found)


def test_the_end_of_turn_of_the_models_own_settings_ends_a_text_too():
    model, tokenizer = tiny("llama"), word_tokenizer()
    third = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_size=1)[0].ids[2]
    model.generation_config.eos_token_id = [third]
    found = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_size=1)[0]
    assert found.ended and found.ids[-1] == third and len(found.ids) <= 3


def test_the_models_own_sampling_habits_are_set_aside_and_given_back():
    model, tokenizer = tiny("llama"), word_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=5)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.min_new_tokens = 5.0, True, 8
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=5) == expected
    assert model.generation_config is own


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone():
    model, tokenizer = tiny("llama"), word_tokenizer()

    def sampled(seed):
        return generate(
            model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=2, sampling=Sampling(temperature=2.0), seed=seed
        )

    before = torch.get_rng_state()
    assert sampled(0) == sampled(0) != sampled(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_draws_from_the_models_own_distribution():
    """No top-k of 50, no nucleus when top_p is 1: the first tokens of many draws follow softmax(z / T)."""
    model, tokenizer = tiny("llama"), word_tokenizer()
    draws = generate(
        model,
        tokenizer,
        ["w5 w6"] * 4000,
        max_new_tokens=1,
        batch_size=4000,
        sampling=Sampling(temperature=1.5, top_p=1.0),
    )
    with torch.no_grad():
        expected_V = (model(torch.tensor([[5, 6]])).logits[0, -1] / 1.5).softmax(-1)
    found_V = torch.bincount(torch.tensor([each.ids[0] for each in draws]), minlength=256) / 4000
    chance = (expected_V * (1 - expected_V) / 4000).sqrt().sum() * (2 / torch.pi) ** 0.5  # expected absolute error
    assert (found_V - expected_V).abs().sum() < 1.3 * chance


def test_out_of_memory_what_is_left_is_written_by_fewer_at_once(monkeypatch, capsys):
    model, tokenizer = biased_to_end(1.5), word_tokenizer()
    prompts = [f"w{number} w{number + 1}" for number in range(3, 40)]
    expected = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=1)
    tried = []

    def small(model, prompts_ids, how):
        tried.append((how.rows, len(prompts_ids)))
        for number, text in enumerate(write(model, prompts_ids, how)):
            if number >= 5 and how.rows > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 MiB")
            yield text

    monkeypatch.setattr(generation, "write", small)
    assert generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=64) == expected
    assert tried == [(64, 37), (18, 32), (9, 27), (4, 22)]
    assert "27 of 37 texts by 9 at once" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(generation, "write", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=2)


def test_chat_template_is_used_when_there_is_one():
    plain, chat = word_tokenizer(bos=True), word_tokenizer(bos=True, chat=True)
    assert encode_prompt(plain, "w5 w6") == [1, 5, 6]
    assert encode_prompt(chat, "w5 w6") == [250, 5, 6, 251, 252]
    assert encode_prompt(chat, "w5 w6", chat=False) == [1, 5, 6]
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(plain, "w5", chat=True)


def test_a_prompt_without_room_is_named():
    with pytest.raises(DataError, match=r"task x: the prompt 'w3 w3.*has 250 tokens.*context of 256"):
        generate(tiny(), word_tokenizer(), ["w4", "w3 " * 250], max_new_tokens=8, batch_size=2, title="task x")


def test_an_empty_prompt_begins_with_bos_and_no_prompts_give_no_texts():
    model, tokenizer = tiny(), word_tokenizer()
    found = generate(model, tokenizer, [""], max_new_tokens=3, batch_size=1)
    assert found[0].ids == greedy_without_cache(model, [1], 3)
    assert generate(model, tokenizer, [], max_new_tokens=3, batch_size=4) == []


def test_dropout_is_off_while_measuring_and_every_module_keeps_its_mode():
    model = tiny().train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_a_peft_model_writes_with_its_adapter():
    from peft import LoraConfig, get_peft_model

    tokenizer = word_tokenizer()
    before = generate(tiny(), tokenizer, PROMPTS, max_new_tokens=6, batch_size=5)
    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    found = generate(adapted, tokenizer, PROMPTS, max_new_tokens=6, batch_size=5)
    expected = [greedy_without_cache(adapted.eval(), tokenizer(prompt)["input_ids"], 6) for prompt in PROMPTS]
    assert [each.ids for each in found] == expected != [each.ids for each in before]


def test_batches_hold_every_item_once_and_go_from_long_to_short():
    lengths = [3, 9, 1, 9, 4]
    batches = batches_by_length(lengths, 2)
    assert [[lengths[item] for item in batch] for batch in batches] == [[9, 9], [4, 3], [1]]
    assert sorted(item for batch in batches for item in batch) == list(range(5))


def test_ids_of_a_prompt_are_remembered_by_tokenizer_and_template(monkeypatch):
    from byte_tokenizer import byte_tokenizer

    from recover.text import prompts

    tokenizer, other = byte_tokenizer(), byte_tokenizer(bos=True)
    asked: list[str] = []
    encode = prompts.text_ids
    monkeypatch.setattr(prompts, "text_ids", lambda *given, **how: (asked.append(given[1]), encode(*given, **how))[1])
    first = prompts.encode_prompt(tokenizer, "ab")
    first.append(7)  # the caller's own
    assert prompts.encode_prompt(tokenizer, "ab") == first[:-1] and asked == ["ab"]
    assert prompts.encode_prompt(other, "ab") == [1, *first[:-1]] and len(asked) == 2
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    chat = prompts.encode_prompt(tokenizer, "ab")
    assert tokenizer.decode(chat) == "<ab>" and chat == prompts.encode_prompt(tokenizer, "ab")
    assert prompts.encode_prompt(tokenizer, "ab", chat=False) == first[:-1] and len(asked) == 4
    monkeypatch.setattr(prompts, "KEPT", 0)
    assert prompts.encode_prompt(tokenizer, "cd") == prompts.encode_prompt(tokenizer, "cd") and len(asked) == 6
