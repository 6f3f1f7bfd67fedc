"""Pruning a model that stays in main memory while an accelerator works on one block of it at a time."""

from __future__ import annotations

import pytest
import torch

from recover.models.twin import Twin
from recover.prune.methods import PRUNERS
from recover.prune.plan import Plan
from recover.recipe import Calibration, SparseGpt, Wanda
from tests.tiny import ids, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")

CALIBRATION = Calibration(data="embedded:calibration.txt", samples=2, length=20)


@pytest.mark.parametrize(
    "leaf",
    [
        Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION),
        Wanda(kind="wanda", pattern="4:8", calibration=CALIBRATION),
        SparseGpt(kind="sparsegpt", sparsity=0.5, calibration=CALIBRATION),
        SparseGpt(kind="sparsegpt", pattern="2:4", calibration=CALIBRATION),
    ],
    ids=lambda leaf: f"{leaf.kind}-{leaf.pattern}",
)
def test_a_model_in_main_memory_is_pruned_as_one_on_the_accelerator(leaf):
    batches = [ids(4, 20, seed=seed) for seed in (1, 2)]
    found = {}
    for place in ("cpu", "cuda"):
        model = tiny("llama").to(place)
        found[place] = PRUNERS[leaf.kind](Twin(model, Plan.none(6)), leaf, batches)
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
