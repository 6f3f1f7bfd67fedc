"""Laws of the probe: zero for equal views, the textbook's figures for two separate models, the same for any batching.

References run prompt by prompt without padding, decode with `generate`, remove blocks physically, in float64.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from probe_reference import (
    CFG,
    DRIFT,
    DROPPED,
    NO_TOKENIZER,
    STEPS,
    dropping,
    endless,
    of,
    prompts,
    read,
    text_of,
    textbook_kl,
    two_models_and_records,
)
from tiny import ids
from torch import nn
from transformers import Cache

from recover.maths import divergence as spaces
from recover.models.arch import final_norm_of
from recover.probe.probe import _stretches, probe
from recover.probe.records import Block, Divergence, Final, Identity, Step
from recover.probe.trajectory import batches_of, end_tokens, greedy, positions
from recover.probe.views import FINAL_NORM, RAW, Lens, Pair, View


@pytest.fixture
def both():
    return two_models_and_records()


def test_final_drift_is_the_textbook_on_two_separate_models(both):
    dense, pruned, records = both
    texts = [text_of(dense, prompt) for prompt in prompts()]
    pairs = [(read(dense, p, t), read(pruned, p, t)) for p, t in zip(prompts(), texts, strict=True)]
    z, y = (torch.cat([pair[i][0] for pair in pairs]) for i in (0, 1))
    h, g = (torch.cat([pair[i][1][-1] for pair in pairs]).double() for i in (0, 1))
    cosine = nn.functional.cosine_similarity
    finals = {record.temperature: record for record in of(records, Final)}
    assert sorted(finals) == [0.5, 1.0, 2.0]
    for temperature, record in finals.items():
        p, q = ((x / temperature).softmax(-1) for x in (z, y))
        expected = {
            "embedding": 1 - cosine(h, g),
            "logit": 1 - cosine(z - z.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)),
            "logit_raw": 1 - cosine(z, y),
            "probability": 1 - cosine(p, q),
            "kl": textbook_kl(z, y, temperature),
            "reverse_kl": textbook_kl(y, z, temperature),
            "top1": (z.argmax(-1) == y.argmax(-1)).double(),
        }
        assert (record.prompts, record.positions) == (5, 5 * STEPS)
        for name, values in expected.items():
            for quantile, value in spaces.quantiles(values).items():
                assert record.metrics[name][quantile] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        ratios = spaces.probability_drift(z, y, temperature)
        expected = (ratios["var_p"] / (2 * temperature**2 * ratios["kl"])).max().item()
        assert record.metrics["kl_ratio"]["max"] == pytest.approx(expected, rel=1e-4)


def test_block_drift_is_that_of_hidden_states_of_two_separate_models(both):
    dense, pruned, records = both
    kept = [i for i in range(6) if i not in DROPPED]
    blocks = {(record.block, record.lens): record for record in of(records, Block)}
    assert len(blocks) == len(of(records, Block)) == 12
    assert {number for (number, _), record in blocks.items() if record.closed} == set(DROPPED)
    states = []
    for prompt in prompts():
        text = text_of(dense, prompt)
        states.append((read(dense, prompt, text)[1], read(pruned, prompt, text)[1]))
    for place, number in list(enumerate(kept))[:-1]:  # transformers gives the last state after the norm
        h, g = (torch.cat([pair[i][at] for pair in states]) for i, at in ((0, number), (1, place)))
        for lens in (RAW, FINAL_NORM):
            with torch.no_grad():
                h_lens, g_lens = (dense.model.norm(x) if lens == FINAL_NORM else x for x in (h, g))
                z, y = (dense.lm_head(x).double() for x in (h_lens, g_lens))
            record = blocks[number, lens]
            embedding = 1 - nn.functional.cosine_similarity(h_lens.double(), g_lens.double())
            assert record.embedding["p90"] == pytest.approx(spaces.quantiles(embedding)["p90"], rel=1e-4, abs=1e-9)
            assert record.kl["mean"] == pytest.approx(textbook_kl(z, y).mean().item(), rel=1e-4, abs=1e-9)
            by_step = textbook_kl(z, y).view(len(states), STEPS).mean(0).tolist() if lens == FINAL_NORM else []
            places = [(each["step"], each["n"]) for each in record.by_step]
            assert places == [(step, len(states)) for step in range(len(by_step))]
            assert [each["kl"] for each in record.by_step] == pytest.approx(by_step, rel=1e-4, abs=1e-9)
    last, final = blocks[5, FINAL_NORM], next(r for r in of(records, Final) if r.temperature == 1)
    for name in ("embedding", "logit", "probability", "kl"):
        assert getattr(last, name) == pytest.approx(final.metrics[name], rel=1e-5), name
    assert blocks[0, FINAL_NORM].kl["max"] == blocks[1, RAW].embedding["max"] == 0  # before the cut nothing differs


def test_long_texts_are_told_apart_in_stretches():
    kl_N, step_N = torch.arange(60, dtype=torch.float64), torch.arange(30).repeat(2)
    found = _stretches(kl_N, step_N)
    assert [each["step"] for each in found] == list(range(0, 30, 3)) and {each["n"] for each in found} == {6}
    assert found[1]["kl"] == pytest.approx((3 + 4 + 5 + 33 + 34 + 35) / 6)
    few = _stretches(kl_N[:2], torch.tensor([0, 25]))
    assert [each["step"] for each in few] == [0, 24], "empty ones are left out"


def test_free_running_drift_is_the_textbook_on_two_separate_models(both):
    dense, pruned, records = both
    own_kl, total, direct, first = [], [], [], []
    for prompt in prompts():
        text, own_text = text_of(dense, prompt), text_of(pruned, prompt)
        z, y = read(dense, prompt, text)[0], read(pruned, prompt, text)[0]
        z_own, y_own = read(dense, prompt, own_text)[0], read(pruned, prompt, own_text)[0]
        own_kl.append(textbook_kl(z_own, y_own))
        total.append(textbook_kl(z, y_own))
        direct.append(textbook_kl(z, y))
        differ = (text != own_text).nonzero()
        first.append(int(differ[0]) if len(differ) else None)
    own_kl, total, direct = (torch.stack(x) for x in (own_kl, total, direct))
    steps, divergence = of(records, Step), of(records, Divergence)[0]
    assert divergence.each == first and any(place is not None for place in first)
    assert divergence.never == pytest.approx(first.count(None) / 5)
    assert [record.step for record in steps] == list(range(STEPS))
    for record in steps:
        s, free = record.step, record.free_running
        close = {"rel": 1e-4, "abs": 1e-6}
        assert record.teacher_forced["kl"] == pytest.approx(spaces.quantiles(direct[:, s]), **close)
        assert free["kl"] == pytest.approx(spaces.quantiles(own_kl[:, s]), **close)
        assert free["total"] == pytest.approx(spaces.quantiles(total[:, s]), **close)
        assert free["gap"] == pytest.approx(spaces.quantiles(total[:, s] - direct[:, s]), **close)
        assert free["diverged"] == sum(place is not None and place <= s for place in first) / 5
        assert free["n"] == record.teacher_forced["n"] == 5
        assert sorted(record.by_temperature) == ["0.5", "2.0"]


def test_free_running_is_teacher_forced_until_the_first_token_that_differs():
    """Prompts that part at steps of their own: up to and including that step both contexts are the same."""
    twin = dropping(endless(initializer_range=0.04), (3,))
    cfg = CFG.model_copy(update={"samples": 1})
    parted = set()
    for prompt in prompts(12):
        records = probe(twin, NO_TOKENIZER, [prompt], cfg)
        first = of(records, Divergence)[0].each[0]
        parted.add(first)
        for record in of(records, Step)[: None if first is None else first + 1]:
            assert record.free_running["kl"]["max"] == pytest.approx(record.teacher_forced["kl"]["max"], rel=1e-3)
            assert record.free_running["gap"]["max"] == pytest.approx(0, abs=1e-3 * record.teacher_forced["kl"]["max"])
    assert len(parted) > 2, parted


def test_equal_views_give_exactly_zero_everywhere():
    records = probe(dropping(endless(), ()), NO_TOKENIZER, prompts(), CFG)
    for record in of(records, Final):
        for name in (*DRIFT, "kl_predicted", "probability_predicted", "embedding_predicted", "logit_predicted"):
            assert set(record.metrics[name].values()) == {0.0}, name
        assert set(record.metrics["top5"].values()) == {1.0}
        assert set(record.metrics["kl_ratio"].values()) == {None}
    for record in of(records, Block):
        assert not record.closed and all(set(getattr(record, name).values()) == {0.0} for name in DRIFT[:2])
        assert set(record.kl.values()) == set(record.probability.values()) == {0.0}
    for record in of(records, Step):
        assert set(record.teacher_forced["kl"].values()) == set(record.free_running["kl"].values()) == {0.0}
        assert set(record.free_running["gap"].values()) == {0.0} and record.free_running["diverged"] == 0
    assert of(records, Divergence)[0].each == [None] * 5
    assert of(records, Identity)[0].kl_max < 1e-9


def test_equal_views_give_exactly_zero_at_every_step_with_a_cache():
    pair = Pair.of(dropping(endless(), ()))
    batch = batches_of(prompts(3), pair.dense, size=3, steps=STEPS)[0]
    dense, pruned = (greedy(view, batch, steps=STEPS, ends=[]) for view in (pair.dense, pair.pruned))
    lens = Lens(pair.dense)
    table = spaces.probability_drift(lens.logits(dense.cached_ND), lens.logits(pruned.cached_ND), 1.0)
    assert len(table["kl"]) == 3 * STEPS and not any(value.any() for value in table.values() if value is not None)
    assert not spaces.state_drift(dense.cached_ND, pruned.cached_ND)["embedding"].any()


@pytest.mark.parametrize(
    "family", ["llama_tied", "qwen2_sliding", "gemma2", "gemma3_text", "smollm3", "granite", "lfm2"]
)
def test_cached_decoding_is_one_full_forward_in_both_views_of_every_family(family):
    """And the lens through the final norm is the model's own head: scale and softcap included."""
    model = endless(family)
    record = of(probe(dropping(model), NO_TOKENIZER, prompts(3), CFG), Identity)[0]
    assert 0 <= record.kl_max < 1e-7 and record.embedding_max < 1e-9
    lens = Lens(View.of_model("dense", model))
    states = []
    hook = final_norm_of(model).register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        logits = model(ids()).logits
        hook.remove()
        torch.testing.assert_close(lens.logits(states[0].flatten(0, 1)), logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_broken_cache_shows_as_identity_drift():
    model = endless()

    def forget(module, args, kwargs):
        if kwargs["hidden_states"].shape[1] == 1:
            (cache,) = (each for each in kwargs.values() if isinstance(each, Cache))
            cache.layers[1].keys.mul_(0.5)

    model.model.layers[1].self_attn.register_forward_pre_hook(forget, with_kwargs=True)
    record = of(probe(dropping(model), NO_TOKENIZER, prompts(2), CFG), Identity)[0]
    assert record.dense["kl"] > 1e-3 and record.pruned["kl"] > 1e-3


def test_the_end_token_is_scored_and_nothing_after_it():
    model = endless()
    texts = [text_of(model, prompt).tolist() for prompt in prompts()]
    end = texts[1][3]
    lengths = [text.index(end) + 1 if end in text else STEPS for text in texts]
    model.generation_config.eos_token_id = [end, 255]
    twin = dropping(model)
    pair = Pair.of(twin)
    assert end_tokens(pair.dense, SimpleNamespace(eos_token_id=7)) == sorted([end, 255, 7])
    cut = [
        text
        for batch in batches_of(prompts(), pair.dense, size=2, steps=STEPS)
        for text in greedy(pair.dense, batch, steps=STEPS, ends=[end]).tokens()
    ]
    assert cut == [text[:length] for text, length in zip(texts, lengths, strict=True)]
    records = probe(twin, NO_TOKENIZER, prompts(), CFG)
    assert of(records, Final)[0].positions == sum(lengths) < 5 * STEPS
    for record in of(records, Step):
        assert record.teacher_forced["n"] == sum(length > record.step for length in lengths)


def test_a_position_is_the_place_in_the_text_and_not_in_the_batch():
    """Rotary models would not show it: only differences of positions enter."""
    batch = batches_of([[5, 6], [7, 8, 9, 10]], Pair.of(dropping(endless())).dense, size=2, steps=1)[0]
    assert batch.mask_BT.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert positions(batch.mask_BT)[:, -2:].tolist() == [[0, 1], [2, 3]]
