"""Mixtures of experts: what a family loses is lost in the export too, and what stays is what was trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny import MIXTURES, ids, tiny
from transformers import AutoModelForCausalLM
from twins import Distill, fill_adapters

from recover.config import recipe
from recover.export.merge import merge
from recover.export.verify import check, write_expected
from recover.export.write import write_checkpoint
from recover.models.plan import load_plan, save_plan
from recover.models.twin import Twin
from recover.prune.depth.depth import prune_depth

DEPTH = {"blocks": (2, 3)}, {"unit": "mlp", "blocks": (1, 3)}, {"unit": "attention", "blocks": (3,)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=ids(2, 24), use_cache=False).logits


def exported(twin: Twin, pruned, tmp_path, dtype=torch.float32):
    """The checkpoint, verified, and read by the stock class."""
    merged = merge(twin, dtype)
    save_plan(pruned.plan, pruned.masks, tmp_path / "prune", pruned.weights)
    assert load_plan(tmp_path / "prune").plan == pruned.plan
    write_expected(tmp_path / "expected.safetensors", twin, merged, ids(2, 24))
    folder = write_checkpoint(merged, byte_tokenizer(), tmp_path / "deploy", card="# card", record={"seed": 0})
    record = check(folder, tmp_path / "expected.safetensors", tmp_path / "prune" / "plan.json")
    assert record["ok"], record["problems"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert stock.num_parameters() == pruned.plan.parameters_pruned == record["parameters"]
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = stock.generate(ids(1, 9), use_cache=True, **greedy)
    assert torch.equal(with_cache, stock.generate(ids(1, 9), use_cache=False, **greedy))
    return stock


@pytest.mark.parametrize("cut", DEPTH, ids=lambda cut: cut.get("unit", "block"))
@pytest.mark.parametrize("family", MIXTURES)
def test_less_depth_is_trained_and_exported(family, cut, tmp_path):
    """Also where some blocks have a plain MLP: which they are in the export is said in the family's own words."""
    dense = tiny(family)
    pruned = prune_depth(Twin(copy.deepcopy(dense), twin_plan(dense)), recipe.Depth(**cut), [])
    twin = Twin(copy.deepcopy(dense), *pruned)
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    twin.model.train()
    twin.model(input_ids=ids(), labels=ids(), distill=Distill(twin))["loss"].backward()
    trained = {name for name, each in twin.model.named_parameters() if each.grad is not None and each.grad.any()}
    assert trained == {name for name, each in twin.model.named_parameters() if each.requires_grad} != set()
    twin.model.eval()
    stock = exported(twin, pruned, tmp_path)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)
    mixed = [hasattr(block.mlp, "experts") for block in dense.model.layers]
    sources = [packed.source if packed.mlp is None else packed.mlp for packed in pruned.plan.packed]
    assert [hasattr(block.mlp, "experts") for block in stock.model.layers] == [mixed[block] for block in sources]


def twin_plan(model):
    from recover.models.plan import Plan

    return Plan.none(model.config.num_hidden_layers)


def test_what_a_router_computes_in_float32_stays_so(tmp_path):
    """GLM's and DeepSeek's routers are read in float32 whatever the dtype: rounded, they would choose others."""
    dense = tiny("deepseek_v3")
    for block in dense.model.layers[2:]:
        block.mlp.gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(1))
    dense.to(torch.bfloat16)
    for block in dense.model.layers[2:]:
        block.mlp.gate.float()
        block.mlp.gate.weight.data.add_(1e-4)
    pruned = prune_depth(Twin(copy.deepcopy(dense), twin_plan(dense)), recipe.Depth(blocks=(3,)), [])
    stock = exported(Twin(copy.deepcopy(dense), *pruned), pruned, tmp_path, torch.bfloat16)
    for here, there in ((2, 2), (3, 4), (4, 5)):
        router, own = stock.model.layers[here].mlp.gate, dense.model.layers[there].mlp.gate
        assert router.weight.dtype == torch.float32 and torch.equal(router.weight, own.weight)
        assert torch.equal(router.e_score_correction_bias, own.e_score_correction_bias)


def test_older_readers_find_how_many_experts_there_are(tmp_path):
    dense = tiny("qwen3_moe")
    pruned = prune_depth(Twin(copy.deepcopy(dense), twin_plan(dense)), recipe.Depth(blocks=(1,)), [])
    exported(Twin(copy.deepcopy(dense), *pruned), pruned, tmp_path)
    values = json.loads((tmp_path / "deploy" / "config.json").read_text())
    assert values["num_experts"] == values["num_local_experts"] == 8
    assert values["mlp_only_layers"] == [] and values["decoder_sparse_step"] == 1
