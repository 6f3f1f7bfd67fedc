"""What only an accelerator shows: pruning a model that stays in main memory, and writing by recorded steps."""

from __future__ import annotations

import gc

import pytest
import torch

from recover.base import console
from recover.config.recipe import Calibration, Sampling, SparseGpt, Wanda
from recover.kernels.fused import end_recording_of_draws
from recover.models.attention import attend
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.probe import trajectory
from recover.probe.compare import Comparison, Rows
from recover.probe.sublayers import transitions
from recover.probe.trajectory import Stock, batches_of, greedy
from recover.probe.views import Pair
from recover.prune import registry
from recover.text.decode import write
from recover.text.generate import plain
from tests.probe_reference import STEPS, dropping, endless
from tests.probe_reference import prompts as probed
from tests.test_decode import ending_at, prompts, texts
from tests.tiny import ids, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")

CALIBRATION = Calibration(data="embedded:calibration.txt", samples=2, length=20)


@pytest.mark.parametrize(
    "cfg",
    [
        Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION),
        Wanda(kind="wanda", pattern="4:8", calibration=CALIBRATION),
        SparseGpt(kind="sparsegpt", sparsity=0.5, calibration=CALIBRATION),
        SparseGpt(kind="sparsegpt", pattern="2:4", calibration=CALIBRATION),
    ],
    ids=lambda cfg: f"{cfg.kind}-{cfg.pattern}",
)
def test_a_model_in_main_memory_is_pruned_as_one_on_the_accelerator(cfg):
    batches = [ids(4, 20, seed=seed) for seed in (1, 2)]
    found = {}
    for place in ("cpu", "cuda"):
        model = tiny("llama").to(place)
        found[place] = registry.prune(Twin(model, Plan.none(6)), cfg, batches)
        assert {parameter.device.type for parameter in model.parameters()} == {place}
    here, there = found["cpu"], found["cuda"]
    assert here.masks.keys() == there.masks.keys()
    for name, keep_OI in here.masks.items():
        # rotary tables made on either device differ in their last bits, which may turn a near tie
        assert (keep_OI == there.masks[name]).float().mean() > 0.99, name
        assert here.plan.masks[name] == there.plan.masks[name]
    for name, weight_OI in here.weights.items():
        assert weight_OI.device.type == "cpu"
        # where a near tie turned, whole rows make up for another weight: so the middle, not the largest difference
        assert (weight_OI - there.weights[name]).abs().median() < 1e-5


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_writing_records_its_steps_anew_when_rows_are_given_up(monkeypatch, sampling):
    """Most rows end early, so steps are recorded for fewer rows; a recording that fails would only warn."""
    monkeypatch.setattr(console, "warn", pytest.fail)
    model, asked = ending_at(2.0).cuda(), prompts(96)
    found = texts(write, model, asked, limit=90, rows=96, sampling=sampling)
    assert len({len(written) for written in found.values()}) > 5
    if sampling is None:
        assert found == texts(plain, model, asked, limit=90, rows=96)


@pytest.mark.parametrize("kv_heads", [28, 4])
def test_a_step_attends_the_same_each_time(kv_heads):
    """With 28 heads of their own, cuDNN's kernel gave the same bits in 21 of 120 times (H100, torch 2.11)."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(64, 28, 1, 128), (64, kv_heads, 512, 128), (64, kv_heads, 512, 128)]
    query, key, value = (torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) for size in sizes)
    mask = torch.zeros(64, 1, 1, 512, device="cuda", dtype=torch.bfloat16)
    mask[:, :, :, 400:] = torch.finfo(mask.dtype).min
    first, _ = attend(torch.nn.Module(), query, key, value, mask)
    assert all(torch.equal(attend(torch.nn.Module(), query, key, value, mask)[0], first) for _ in range(60))
    key, value = (x.repeat_interleave(28 // kv_heads, 1).double() for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key, value, attn_mask=mask.double())
    assert (first - expected.transpose(1, 2)).norm() < 4e-3 * expected.norm()


def test_draws_go_on_behind_a_recording_that_failed():
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    end_recording_of_draws()
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def test_no_recorded_step_is_left_to_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        texts(write, ending_at(2.0).cuda(), prompts(40), limit=20, rows=40)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, torch.cuda.CUDAGraph)]
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "gemma2"])
def test_a_probe_replays_its_steps_and_writes_what_the_models_own_cache_does(family, monkeypatch):
    monkeypatch.setattr(console, "warn", pytest.fail)  # a recording that fails would only warn
    twin = dropping(endless(family).cuda())
    pair = Pair.of(twin)
    batch = batches_of(probed(), pair.dense, size=5, steps=STEPS)[0]
    found = [greedy(view, batch, steps=STEPS, ends=[]) for view in (pair.dense, pair.pruned)]
    monkeypatch.setattr(trajectory, "reader_of", lambda model, state, steps: Stock(model, state))
    for view, each in zip((pair.dense, pair.pruned), found, strict=True):
        expected = greedy(view, batch, steps=STEPS, ends=[])
        assert each.tokens() == expected.tokens()
        torch.testing.assert_close(each.cached_ND, expected.cached_ND, rtol=1e-3, atol=1e-4)


def test_the_host_waits_a_few_times_for_all_figures_of_a_batch(recwarn):
    twin = dropping(endless("llama").cuda())
    pair = Pair.of(twin)
    batch = batches_of(probed(), pair.dense, size=5, steps=STEPS)[0]
    text = greedy(pair.dense, batch, steps=STEPS, ends=[])
    found, at = transitions(pair, text, text.scored_BS), text.scored_BS.cpu().nonzero()
    comparison = Comparison(pair)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        comparison.sublayers(found, Rows(at[:, 0], at[:, 1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < len([each for each in recwarn if "synchroniz" in str(each.message)]) <= 6
