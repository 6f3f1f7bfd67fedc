"""Decoding in slots: the ids of transformers' own `generate`, whatever the rows, refills and families."""

import gc

import pytest
import torch
from tiny import FAMILIES, HYBRIDS, tiny
from twins import fill_adapters

from recover.base.errors import ModelError
from recover.config import recipe
from recover.kernels import fused
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.text import decode, stepping
from recover.text.decode import Writing, write
from recover.text.generate import plain


def ending_at(bias, family="llama"):
    """A tiny model whose end token is likelier, so that rows end at different steps."""
    model = tiny(family)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(256))
    model.lm_head.bias.data[2] = bias
    return model


def prompts(count, longest=14):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def texts(writer, model, prompts_ids, **how):
    return dict(writer(model, prompts_ids, Writing(ends=(2,), pad=0, **how)))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HYBRIDS])
def test_slots_write_the_ids_of_plain_generate(family):
    model, asked = tiny(family), prompts(11)
    expected = texts(plain, model, asked, limit=10, rows=11)
    assert stepping.fits(model)
    for rows in (1, 3, 11) if family == "llama" else (3,):
        assert texts(write, model, asked, limit=10, rows=rows) == expected


@pytest.mark.parametrize("family", sorted(HYBRIDS))
def test_slots_refuse_a_model_that_keeps_a_state(family):
    with pytest.raises(ModelError, match=r"keeps a state.*call generate\.plain"):
        texts(write, tiny(family), prompts(2), limit=2, rows=2)


@pytest.mark.parametrize(("at_once", "refills"), [(2**16, True), (1, True), (2**16, False), (1, False)])
def test_rows_that_end_make_room_or_are_given_up(monkeypatch, at_once, refills):
    monkeypatch.setattr(decode, "PROMPT_TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(decode, "refills", lambda device: refills)
    model, asked = ending_at(1.5), prompts(60)
    expected = texts(plain, model, asked, limit=12, rows=60)
    lengths = {len(ids) for ids in expected.values()}
    assert len(lengths) > 5 and max(lengths) == 12
    passes, forward = [], model.forward

    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    model.forward = counted
    assert texts(write, model, asked, limit=12, rows=8) == expected
    decoded = [shape[0] for shape in passes if shape[1] == 1]
    order = sorted(expected, key=lambda item: -len(asked[item]))
    longest = [max(len(expected[item]) for item in order[at : at + 8]) for at in range(0, 60, 8)]
    if at_once > 1:  # what plain batches of 8 cost: steps where rows are filled again, rows where they are given up
        assert len(decoded) < 0.8 * sum(longest) if refills else sum(decoded) < 0.8 * 8 * sum(longest)


def test_a_limit_of_one_token_and_no_end_token():
    model, asked = tiny(), prompts(5)
    found = dict(write(model, asked, Writing(limit=1, ends=(), pad=0, rows=2)))
    assert found == {item: ids[:1] for item, ids in texts(plain, model, asked, limit=3, rows=5).items()}


def test_a_pruned_twin_with_adapters_writes_as_plain_generate_does():
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    twin.add_lora(recipe.Lora(rank=4))
    fill_adapters(twin)
    asked = prompts(9)
    with twin.folded():
        expected = texts(plain, twin.base, asked, limit=8, rows=9)
        assert texts(write, twin.base, asked, limit=8, rows=4) == expected
        with twin.dense():
            assert texts(write, twin.base, asked, limit=8, rows=4) != expected


def test_slots_with_eager_attention():
    model, asked = tiny("gemma2"), prompts(6)
    expected = texts(plain, model, asked, limit=6, rows=6)
    model.set_attn_implementation("eager")
    assert stepping.fits(model) and texts(write, model, asked, limit=6, rows=4) == expected


def test_attention_that_our_masks_do_not_serve_is_left_to_transformers():
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    assert not stepping.fits(model)
    model.config._attn_implementation = "sdpa"
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not stepping.fits(model)


class Replayed:
    """A recorder as on a GPU: it looks at ended rows only every few steps, and the rows may not move unannounced."""

    last = None

    def __init__(self, step):
        self.step, self.seen = step, set()
        Replayed.last = self

    def run(self, visible, steps):
        self.seen.add(visible)
        for _ in range(steps):
            self.step()

    def forget(self):
        self.seen.clear()


def test_steps_that_the_host_does_not_see_change_no_text(monkeypatch):
    model, asked = ending_at(1.5), prompts(40)
    expected = texts(plain, model, asked, limit=12, rows=40)
    monkeypatch.setattr(decode, "may_record", lambda model: True)
    monkeypatch.setattr(decode, "Recorder", Replayed)
    monkeypatch.setattr(decode, "VISIBLE_STEP", 4)
    monkeypatch.setattr(decode, "steps_unseen", lambda device: 5)
    monkeypatch.setattr(decode, "refills", lambda device: True)
    given_up, keep = [], stepping.Slots.keep
    monkeypatch.setattr(
        stepping.Slots, "keep", lambda self, slot_G: (given_up.append(len(slot_G)), keep(self, slot_G))[1]
    )
    assert texts(write, model, asked, limit=12, rows=8) == expected
    assert Replayed.last.seen == set() and not given_up  # to record anew takes longer than what is left
    monkeypatch.setattr(decode, "RECORDING", 2)
    assert texts(write, model, asked, limit=12, rows=8) == expected and given_up


def test_a_prompt_that_several_texts_begin_with_is_read_once():
    model, asked = ending_at(1.5), prompts(4)
    asked = [asked[number % 4] for number in range(14)]
    expected = texts(plain, model, asked, limit=8, rows=14)
    passes, forward = [], model.forward

    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    model.forward = counted
    assert texts(write, model, asked, limit=8, rows=14) == expected
    assert passes[0][0] == 4 and passes[1][0] == 14


def test_what_a_writer_recorded_goes_when_its_reader_leaves(monkeypatch):
    """And not when the garbage collector comes by, which breaks a recording that is being made."""
    monkeypatch.setattr(decode, "may_record", lambda model: True)
    monkeypatch.setattr(decode, "Recorder", Replayed)
    asked = prompts(4)
    with torch.no_grad():
        reader = write(ending_at(1.5), asked, Writing(rows=2, limit=12, ends=(2,), pad=0))
        next(reader)
    assert Replayed.last.seen
    reader.close()
    assert not Replayed.last.seen


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_waits_for_a_recording(collects):
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(KeyError), fused._nothing_collected():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_a_writers_cache_goes_with_it_and_does_not_wait_for_the_collector(monkeypatch):
    monkeypatch.setattr(decode, "may_record", lambda model: True)
    monkeypatch.setattr(decode, "Recorder", Replayed)
    model, asked = ending_at(1.5), prompts(4)
    texts(write, model, asked, limit=4, rows=4)
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        texts(write, model, asked, limit=4, rows=4)
        Replayed.last = None
        assert not [thing for thing in gc.get_objects() if isinstance(thing, stepping.Slots)]
    finally:
        (gc.enable if before else gc.disable)()
