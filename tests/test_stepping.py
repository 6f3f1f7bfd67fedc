"""A model made ready to write: the same texts in float32, adapters and masks in its weights, nothing left behind."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_decode import prompts, texts
from tiny import FAMILIES, HYBRIDS, ids, tiny
from torch import nn
from twins import fill_adapters, masked_twin

from recover.config import recipe
from recover.kernels import fused
from recover.models.arch import arch_of, linears_of
from recover.models.lean import LeanNorm
from recover.models.plan import Plan
from recover.models.switched import MaskedLinear
from recover.models.twin import Twin
from recover.text import stepping
from recover.text.decode import write
from recover.text.generate import plain
from recover.text.stepping import by_kernels, in_few_products


@pytest.fixture
def joining(monkeypatch):
    monkeypatch.setattr(stepping, "joins", lambda device: True)


def twin_of(kind):
    if kind == "masked":
        twin = masked_twin(tiny())
    else:
        twin = Twin(tiny("llama_tied"), Plan("depth", 6, (2, 4)))  # linear layers with bias
    twin.add_lora(recipe.Lora(rank=4))
    fill_adapters(twin)
    return twin


def replaced(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def classes(model):
    return [(type(module), "switch" in vars(module)) for module in model.modules()]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HYBRIDS])
def test_a_family_writes_the_same_by_few_products(joining, family):
    model, asked = tiny(family), prompts(7)
    expected, before = texts(plain, model, asked, limit=8, rows=7), classes(model)
    with in_few_products(model):
        names = replaced(model)
        # Those that Phi-3 and GLM have joined already, or that stand alone (also in DeepSeek's attention), stay.
        arch, there = arch_of(model), linears_of(model)
        parts = [part for part in (arch.attention_linears, arch.mlp_linears) if len(part) in (3, 4)]
        joined = {name for part in parts for name in part[:-1]}
        lacking = {name.rpartition(".")[0] for name in there} if family.startswith("gemma4") else set()
        lacking = {path for path in lacking if path.endswith("attn") and f"{path}.v_proj" not in there}
        alone = sum(name.rpartition(".")[0] in lacking and name.rpartition(".")[2] in joined for name in there)
        assert len(names) == sum(name.rpartition(".")[2] in joined for name in there) - alone
    assert texts(write, model, asked, limit=8, rows=3) == expected
    assert not replaced(model) and classes(model) == before


def products_of(model, call):
    """How many matrix products of the blocks' linear layers a call makes."""
    count, linear = [], F.linear

    def counted(*args):
        count.append(1)
        return linear(*args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", counted)
        call(model)
    return len(count)


def test_one_product_serves_all_layers_of_one_input(joining):
    model = tiny()
    forward = lambda model: model(input_ids=ids())  # noqa: E731
    before = products_of(model, forward)
    with in_few_products(model):
        assert products_of(model, forward) == before - 3 * 6  # two of three, one of two


@torch.no_grad()
def test_a_layer_of_another_input_is_not_given_what_was_left_for_it(joining):
    model = tiny("llama_tied")
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    expected = [[layer(each) for layer in layers] for each in (x, other)]
    with in_few_products(model):
        found_q, found_k = layers[0](x), layers[1](other)
        mixed = [found_q, layers[1](x), layers[2](other)]
        again = [layers[0](x), layers[0](x)]
    torch.testing.assert_close(mixed, [expected[0][0], expected[0][1], expected[1][2]])
    torch.testing.assert_close([found_k, *again], [expected[1][1], expected[0][0], expected[0][0]])


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("kind", ["masked", "depth"])
@torch.no_grad()
def test_adapters_and_masks_are_in_the_weights_that_an_export_has(monkeypatch, kind, join):
    monkeypatch.setattr(stepping, "joins", lambda device: join)
    twin, text_BT = twin_of(kind), ids()
    expected, dense = twin.base(input_ids=text_BT).logits, None
    with twin.dense():
        dense = twin.base(input_ids=text_BT).logits
    kept = 6 if kind == "masked" else 4
    with in_few_products(twin.base):
        assert len(replaced(twin.base)) == 7 * kept
        torch.testing.assert_close(twin.base(input_ids=text_BT).logits, expected, atol=2e-5, rtol=1e-5)
        if kind == "masked":  # what a mask took is exactly zero
            layer = twin.base.model.layers[1].mlp.down_proj
            weight_OI = layer(torch.eye(96)).T
            assert (weight_OI[~layer.base_layer.keep] == 0).all() and (weight_OI != 0).any()
    with twin.dense(), in_few_products(twin.base):
        assert len(replaced(twin.base)) == (5 * 6 if join else 0)
        torch.testing.assert_close(twin.base(input_ids=text_BT).logits, dense, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_that_a_twin_keeps_folded_are_not_made_twice():
    twin = twin_of("masked")
    with twin.folded(), in_few_products(twin.base):
        assert not replaced(twin.base)
        twin.base(input_ids=ids())
        kept = [module.folded for module in twin.base.modules() if isinstance(module, MaskedLinear)]
        assert all(each is not None for each in kept)


def test_layers_that_do_more_than_multiply_stay(joining):
    twin = twin_of("depth")
    layers = [block.self_attn for block in twin.base.model.layers]
    layers[0].q_proj.register_forward_hook(lambda *_: None)
    layers[1].k_proj.lora_A["default"].register_forward_pre_hook(lambda *_: None)
    layers[3].v_proj.lora_B["default"].bias = nn.Parameter(torch.zeros(32))
    layers[5].o_proj.base_layer.weight.ds_id = 1  # ZeRO-3 has it
    with in_few_products(twin.base):
        names = {name for name in replaced(twin.base) if "self_attn" in name}
    for block, left in {0: "q_proj", 1: "k_proj", 3: "v_proj", 5: "o_proj"}.items():
        expected = {"q_proj", "k_proj", "v_proj", "o_proj"} - {left}
        assert {name.split(".")[-1] for name in names if f"layers.{block}." in name} == expected


def test_several_adapters_at_once_stay_as_they_are():
    twin = twin_of("depth")
    twin.model.add_adapter("second", twin.model.peft_config["default"])
    twin.base.model.layers[0].mlp.up_proj.set_adapter(["default", "second"])
    with in_few_products(twin.base):
        assert "model.layers.0.mlp.up_proj" not in replaced(twin.base)
        assert "model.layers.0.mlp.gate_proj" in replaced(twin.base)


def test_where_memory_is_short_weights_stay_apart(monkeypatch):
    twin = twin_of("depth")
    monkeypatch.setattr(stepping, "free_memory", lambda device: 1000)
    with in_few_products(twin.base):
        assert not replaced(twin.base)
    assert stepping.free_memory is not None


def test_memory_that_is_free_is_a_number_of_bytes():
    assert 2**20 < stepping.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("kind", ["plain", "depth", "masked"])
def test_kernels_may_run_inside_and_everything_is_as_before_outside(monkeypatch, kind):
    monkeypatch.setattr(fused, "available", lambda device: True)
    model = tiny() if kind == "plain" else twin_of(kind).base
    before = classes(model)
    switches: list[Any] = [module.switch for module in model.modules() if hasattr(module, "switch")]
    with pytest.raises(KeyError), by_kernels(model):
        norms: list[Any] = [module for module in model.modules() if isinstance(module, LeanNorm)]
        assert len(norms) == 13 and all(norm.switch.fused(norm.training) for norm in norms)
        raise KeyError
    assert classes(model) == before and not any(switch.writing for switch in switches)


def test_without_a_gpu_modules_stay_stock():
    model = tiny()
    before = classes(model)
    with by_kernels(model):
        assert classes(model) == before
