"""Width: the narrowed view is the dense model with units silenced, and what is exported is that view."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from cached import cache_of
from narrow import MLP_ONLY, NARROWED, case, logits, prune, silenced, width_twin
from peft import get_peft_model
from tiny import FAMILIES, MIXTURES, ids, only, tiny
from transformers import AutoModelForCausalLM
from twins import Distill, fill_adapters, stepwise

from recover.base.errors import PruneError
from recover.config import recipe
from recover.export.merge import merge
from recover.export.verify import check, write_expected
from recover.export.write import write_checkpoint
from recover.measure.speed import kv_bytes_per_token
from recover.models.arch import ARCHS
from recover.models.plan import load_plan, save_plan
from recover.models.twin import Twin
from recover.text.decode import Writing, write
from recover.text.generate import plain

# One of each way that linear layers, biases and sizes are named in an export.
NAMED_OTHERWISE = {
    *("llama", "qwen2", "phi3", "glm4", "nemotron", "stablelm_parallel", "gpt_neox", "gpt2"),
    *("lfm2", "granitemoehybrid", "falcon_h1", "gemma4_text"),
}


@pytest.mark.parametrize("family", NARROWED)
def test_the_pruned_view_is_the_dense_model_with_units_silenced(family):
    dense, twin = case(family)[0], width_twin(family)
    # 0.6 * 96 = 57.6 neurons, the nearest multiple of 8 is 56
    neurons = 0 if family in MIXTURES else 40
    reference = silenced(dense, neurons=neurons, groups=0 if family in MLP_ONLY else 1)
    torch.testing.assert_close(logits(twin.model), logits(reference), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(twin.model), logits(dense), atol=1e-2)
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))
    assert dict(twin.base.state_dict()).keys() == dict(dense.state_dict()).keys()


@pytest.mark.parametrize("family", NARROWED)
def test_both_views_are_right_with_a_cache(family):
    twin, tokens = width_twin(family), ids(2, 20)
    mask = torch.ones_like(tokens)
    torch.testing.assert_close(stepwise(twin.model, tokens, mask), logits(twin.model, tokens), rtol=1e-4, atol=1e-4)
    with twin.dense() as model:
        torch.testing.assert_close(stepwise(model, tokens, mask), logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", only(NARROWED, NAMED_OTHERWISE))
def test_trained_merged_and_reloaded_is_the_pruned_view(family, tmp_path):
    twin = width_twin(family)
    untrained = logits(twin.model)
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    assert not torch.allclose(logits(twin.model), untrained, atol=1e-2)
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(case(family)[0]))
    merged = merge(twin, torch.float32)
    save_plan(twin.plan, {}, tmp_path / "prune", case(family)[1].weights)
    write_expected(tmp_path / "expected.safetensors", twin, merged, ids(2, 24))
    folder = write_checkpoint(merged, byte_tokenizer(), tmp_path / "deploy", card="# card", record={"seed": 0})
    record = check(folder, tmp_path / "expected.safetensors", tmp_path / "prune" / "plan.json")
    assert record["ok"], record["problems"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)
    assert stock.num_parameters() == twin.plan.parameters_pruned == record["parameters"]
    assert case(family)[0].num_parameters() == twin.plan.parameters_dense
    assert {name: getattr(stock.config, name) for name in twin.plan.config} == twin.plan.config
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = stock.generate(ids(1, 9), use_cache=True, **greedy)
    assert torch.equal(with_cache, stock.generate(ids(1, 9), use_cache=False, **greedy))


def test_every_family_has_a_case_and_some_keep_their_groups():
    assert {row.model_type for row in ARCHS.values() if row.kv_groups_stay} == {
        FAMILIES[family][0] for family in MLP_ONLY
    }
    for family in MLP_ONLY:
        with pytest.raises(
            PruneError,
            match=rf"prune.kv_groups: {FAMILIES[family][0]} keeps its KV groups: .*Use (prune.mlp alone|another)",
        ):
            prune(tiny(family), kv_groups=1)


@pytest.mark.parametrize("family", MIXTURES)
def test_neurons_of_experts_are_not_cut(family):
    with pytest.raises(PruneError, match=r"prune.mlp: the MLPs of .* are mixtures of experts.*prune.kind: experts"):
        prune(tiny(family), mlp=0.4)


def test_biases_are_sliced_too():
    dense, (_, _, weights) = tiny("qwen2"), prune(tiny("qwen2"), kv_groups=1)
    for name in ("q_proj", "k_proj", "v_proj"):
        whole = dense.model.layers[2].self_attn.get_submodule(name)
        cut = f"model.layers.2.self_attn.{name}"
        weight, bias = weights[f"{cut}.weight"], weights[f"{cut}.bias"]
        rows = [int((whole.weight == row).all(1).nonzero()) for row in weight]
        assert torch.equal(bias, whole.bias[rows]) and len(bias) == len(whole.bias) // 2


def test_the_kv_cache_shrinks_with_the_groups():
    twin = width_twin("llama")
    merged = merge(twin, torch.float32)
    assert kv_bytes_per_token(merged.config, 4) * 2 == kv_bytes_per_token(tiny().config, 4) == 2 * 6 * 2 * 16 * 4
    with torch.no_grad():
        cache = cache_of(twin.model(input_ids=ids(), use_cache=True))
    assert cache.layers[0].keys.shape == (2, 1, 20, 16)


def test_a_plan_comes_back_from_disk(tmp_path):
    dense, pruned = case("llama")
    save_plan(pruned.plan, {}, tmp_path, pruned.weights)
    twin = Twin(copy.deepcopy(dense), *load_plan(tmp_path))
    assert torch.equal(logits(twin.model), logits(width_twin("llama").model)) and twin.plan == pruned.plan


def test_wrong_sizes_in_an_export_are_found(tmp_path):
    twin = width_twin("qwen2")
    merged = merge(twin, torch.float32)
    plan = dataclasses.replace(twin.plan, config={**twin.plan.config, "num_key_value_heads": 2})
    save_plan(plan, {}, tmp_path / "prune", case("qwen2")[1].weights)
    write_expected(tmp_path / "expected.safetensors", twin, merged, ids(2, 24))
    folder = write_checkpoint(merged, byte_tokenizer(), tmp_path / "deploy", card="# card", record={"seed": 0})
    record = check(folder, tmp_path / "expected.safetensors", tmp_path / "prune" / "plan.json")
    assert record["problems"] == ["config.json: num_key_value_heads is 1, the plan says 2"]


def test_gradients_are_those_of_the_narrow_model_alone():
    """Distilling in the twin, against a stock narrow model with peft's own LoRA beside a second, dense model."""
    twin = width_twin("qwen2")
    narrow = merge(twin, torch.float32)
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    stock = get_peft_model(narrow, copy.deepcopy(twin.model.peft_config["default"]))
    factors = {name: weight for name, weight in twin.model.named_parameters() if "lora_" in name}
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(factors[name].data)
    tokens, mask = ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    twin.base(input_ids=tokens, attention_mask=mask, distill=Distill(twin))["loss"].backward()
    target = logits(case("qwen2")[0], tokens)
    (stock(tokens, attention_mask=mask).logits - target).square().sum().backward()
    assert factors and len(factors) == 6 * 7 * 2
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(factors[name].grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale)


@torch.no_grad()
def test_decoding_in_slots_writes_what_plain_generation_writes():
    twin, how = width_twin("gemma2"), {"limit": 8, "ends": (2,), "pad": 0}
    asked = [ids(1, length)[0].tolist() for length in (3, 9, 14, 6)]
    expected = dict(plain(twin.model, asked, Writing(**how, rows=4)))
    assert dict(write(twin.model, asked, Writing(**how, rows=2))) == expected
