"""Rotary positions that go by the length of a text: a row gives what it gives alone, whatever stands beside it."""

import copy

import pytest
import torch
from tiny import ids, tiny
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from words import word_tokenizer

from recover.commands.files import teacher_rows
from recover.config.recipe import Loss, Sampling
from recover.distill.distiller import Distiller
from recover.models.attention import (
    by_rows,
    goes_by_length,
    learning_from_rows,
    read_anew_at,
    row_positions,
    text_lengths,
)
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.text.generate import generate
from recover.text.likelihood import Continuation, embeddings, log_likelihoods, option_log_likelihoods
from recover.train.data import collator, packer
from recover.train.sources import Sample

SWITCH = 24
HALF = 8  # frequencies of a head
LONG = [1.0 + 3 * number for number in range(HALF)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * HALF,
    "long_factor": LONG,
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
TYPES = {
    "phi3 longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH}),
    "llama longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "qwen3 dynamic": ("qwen3", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "gemma3 dynamic": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": DYNAMIC,
            },
            "max_position_embeddings": SWITCH,
        },
    ),
}


def pair(name):
    """A stock model and the same by rows; sharp enough for positions to decide."""
    family, fields = TYPES[name]
    stock = tiny(family, **{"initializer_range": 0.4, **fields})
    ours = copy.deepcopy(stock)
    by_rows(ours)
    return stock, ours


def fresh(model):
    """As if it had read nothing yet: `dynamic` of transformers keeps the longest text in mind."""
    return copy.deepcopy(model)


def rows_of(lengths):
    return [ids(1, length, seed=length)[0].tolist() for length in lengths]


LENGTHS = (9, SWITCH, SWITCH + 1, 41)


@pytest.mark.parametrize("name", TYPES)
def test_a_row_alone_is_stock_and_beside_others_it_is_the_same(name):
    stock, ours = pair(name)
    assert goes_by_length(ours) and type(ours.model.rotary_emb).__name__ == type(stock.model.rotary_emb).__name__
    rows = rows_of(LENGTHS)
    with torch.no_grad():
        alone = [fresh(stock)(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        longest = max(map(len, rows))
        for left in (True, False):
            padded = [[0] * (longest - len(row)) + row if left else row + [0] * (longest - len(row)) for row in rows]
            mask_BT = torch.tensor([[int(token > 0) for token in row] for row in padded])
            found = ours(
                torch.tensor(padded), attention_mask=mask_BT, position_ids=row_positions(mask_BT), use_cache=False
            ).logits
            for row_TV, mask_T, expected_TV in zip(found, mask_BT.bool(), alone, strict=True):
                torch.testing.assert_close(row_TV[mask_T], expected_TV, rtol=1e-4, atol=1e-4)
        again = ours(torch.tensor([rows[0]]), use_cache=False).logits[0]  # nothing is kept in mind
        torch.testing.assert_close(again, alone[0], rtol=1e-5, atol=1e-5)
        together = stock(torch.tensor(padded), attention_mask=mask_BT, position_ids=row_positions(mask_BT)).logits
        assert (together[0, : len(rows[0])] - alone[0]).abs().max() > 0.01, "nothing to tell the two apart by"


def test_frequencies_are_those_of_transformers_for_each_length():
    _, ours = pair("llama dynamic")
    rotary = ours.model.rotary_emb
    for length in (5, SWITCH, SWITCH + 1, 100):
        cos_1TC, _ = rotary(torch.zeros(1), torch.arange(length)[None])
        inverse_F, _ = ROPE_INIT_FUNCTIONS["dynamic"](ours.config, torch.device("cpu"), seq_len=torch.tensor(length))
        expected_TF = (torch.arange(length)[:, None].float() * inverse_F).cos()
        torch.testing.assert_close(cos_1TC[0, :, :HALF], expected_TF, rtol=1e-5, atol=1e-5)


def test_other_models_are_left_as_they_are():
    for family in ("llama", "gemma3_text", "phi3"):
        model = tiny(family)
        kind = type(model.model.rotary_emb)
        by_rows(model)
        assert type(model.model.rotary_emb) is kind and not goes_by_length(model) and read_anew_at(model) is None
    _, ours = pair("phi3 longrope")
    kind = type(ours.model.rotary_emb)
    by_rows(ours)
    assert type(ours.model.rotary_emb) is kind
    assert read_anew_at(ours) == SWITCH and read_anew_at(pair("llama longrope")[1]) is None


def test_a_text_is_as_long_as_its_positions_rise():
    position_BT = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0], [7, 8, 9, 10, 0, 1]])
    expected = [[1, 1, 4, 4, 4, 4], [3, 3, 3, 1, 1, 1], [11, 11, 11, 11, 2, 2]]
    assert text_lengths(position_BT).tolist() == expected
    assert row_positions(torch.tensor([[0, 1, 1], [1, 1, 0]])).tolist() == [[0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("name", ["phi3 longrope", "llama longrope"])
def test_texts_are_those_of_stock_alone_past_the_switch_too(name):
    """Phi-3 reads a text anew when it gets that long, other classes do not."""
    stock, ours = pair(name)
    tokenizer, limit = word_tokenizer(), 22
    prompts = [" ".join(f"w{3 + (7 * number) % 200}" for number in range(length)) for length in (2, 5, 20, 24, 25, 40)]
    expected = []
    for prompt in prompts:
        row = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        expected.append(fresh(stock).generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :])
    for batch_size in (1, 3, 8):
        found = generate(ours, tokenizer, prompts, max_new_tokens=limit, batch_size=batch_size)
        assert [each.ids for each in found] == [row.tolist() for row in expected]
    drawn = [
        generate(ours, tokenizer, prompts, max_new_tokens=limit, batch_size=size, sampling=Sampling(top_p=1.0), seed=5)
        for size in (1, 8)
    ]
    assert [each.ids for each in drawn[0]] == [each.ids for each in drawn[1]]


def test_likelihoods_and_embeddings_do_not_depend_on_the_batch():
    stock, ours = pair("phi3 longrope")
    rows = [Continuation(row, 1) for row in rows_of(LENGTHS)]
    with torch.no_grad():
        expected = []
        for row in rows:
            logp_TV = fresh(stock)(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
            expected.append(float(logp_TV[:-1].gather(1, torch.tensor(row.ids[1:])[:, None]).sum()))
    for size in (1, 4):
        assert log_likelihoods(ours, rows, batch_size=size) == pytest.approx(expected, rel=1e-4)
    groups = [
        [Continuation([*row.ids[: SWITCH - 2], *range(5, 5 + more)], SWITCH - 2) for more in (1, 2, 4)]
        for row in rows[2:]
    ]
    one_by_one = [log_likelihoods(ours, group, batch_size=1) for group in groups]
    for found, alone in zip(option_log_likelihoods(ours, groups, batch_size=8), one_by_one, strict=True):
        assert found == pytest.approx(alone, rel=1e-4)
    texts = [" ".join(f"w{number}" for number in range(5, 5 + length)) for length in (6, 30)]
    alone = [embeddings(ours, word_tokenizer(), [text], length=64, batch_size=1)[0] for text in texts]
    for found, vector in zip(embeddings(ours, word_tokenizer(), texts, length=64, batch_size=2), alone, strict=True):
        assert found == pytest.approx(vector, abs=1e-5)


def test_training_scores_a_sequence_alike_packed_padded_and_alone():
    _, ours = pair("phi3 longrope")
    twin = Twin(ours, Plan("depth", 6, (2,)))
    distiller = Distiller(twin, Loss(kl=1.0))
    assert distiller.needs_mask and distiller.packs
    rows = [{"input_ids": row, "completion_mask": [1] * len(row)} for row in rows_of((9, SWITCH + 9))]
    alone = [float(distiller.run(twin.model, **collator(0, "completion")([row])).loss) for row in rows]
    padded = collator(0, "completion")(rows)
    assert float(distiller.run(twin.model, **padded).loss) == pytest.approx(sum(alone), rel=1e-4)
    packed = packer(0, "completion", 64)(rows)
    found = distiller.run(twin.model, packed["input_ids"], None, packed["labels"], packing=packed["packing"])
    assert float(found.loss) == pytest.approx(sum(alone), rel=1e-4)


def test_padded_rows_with_a_mask_are_learnt_without_the_kernel_that_gave_nan():
    before, seen = torch.backends.cuda.cudnn_sdp_enabled(), {}
    for name, model in (("by rows", pair("phi3 longrope")[1]), ("plain", tiny("llama"))):
        with learning_from_rows(model):
            seen[name] = torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert seen == {"by rows": False, "plain": before}


def test_a_mask_is_given_to_models_that_need_one_alone():
    batch = collator(0, "completion")(
        [{"input_ids": row, "completion_mask": [1] * len(row)} for row in rows_of((5, 9))]
    )
    for model, needed in ((pair("phi3 longrope")[1], True), (tiny("llama"), False)):
        given = Distiller(Twin(model, Plan("depth", 6, (2,))), Loss(kl=1.0)).given(batch)
        assert (given["attention_mask"] is batch["attention_mask"]) is needed and given["labels"] is batch["labels"]
        assert needed or given["attention_mask"] is None


def test_a_teacher_says_the_same_of_a_row_beside_a_longer_one():
    _, ours = pair("phi3 longrope")
    samples = [Sample(row, [1] * len(row)) for row in rows_of((9, SWITCH + 9))]
    both, single = teacher_rows(ours, samples, 4), [teacher_rows(ours, [sample], 4)[0] for sample in samples]
    for one, other in zip(both, single, strict=True):
        torch.testing.assert_close(one.top.logp_NK, other.top.logp_NK, rtol=1e-4, atol=1e-4)
