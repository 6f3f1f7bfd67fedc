"""Laws of the architecture table: each row names what the stock model of that type really has."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, ids, tiny
from torch import nn
from transformers import GPT2Config

from recover.base.errors import ModelError
from recover.models.arch import ARCHS, arch_of, blocks_of, final_norm_of, head_of, linears_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_names_every_part(family):
    """Every linear layer of a block is listed once; head(norm(last block)) with scale and softcap gives the logits."""
    model = tiny(family)
    arch, blocks = arch_of(model), blocks_of(model)
    assert arch is ARCHS[FAMILIES[family][0]] is arch_of(model.config) and len(blocks) == 6
    linears = linears_of(model)
    inside = {name for name, m in model.named_modules() if type(m) is nn.Linear and name != arch.head}
    assert set(linears) == inside and all(linears[name] is model.get_submodule(name) for name in inside)
    assert model.get_submodule(arch.embed) is model.get_input_embeddings()

    captured = []
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: captured.append(output))
    logits = model(ids()).logits
    hook.remove()
    weight, bias, scale, softcap = head_of(model)
    h = captured[0][0] if isinstance(captured[0], tuple) else captured[0]  # Granite in transformers 5.3
    z = scale * nn.functional.linear(final_norm_of(model)(h), weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    assert torch.allclose(z, logits, rtol=1e-6, atol=1e-6)


def test_the_parts_are_found_through_a_peft_model():
    model = tiny("phi3")
    before = linears_of(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    assert linears_of(wrapped) == before, "names are the stock model's, modules the base layers"
    assert blocks_of(wrapped) is blocks_of(model) and arch_of(wrapped) is ARCHS["phi3"]
    assert head_of(wrapped)[0] is model.lm_head.weight


def test_an_unknown_type_is_refused_with_the_row_to_add():
    with pytest.raises(ModelError, match=r"'gpt2' is not supported.*Arch\('gpt2'\)"):
        arch_of(GPT2Config())
