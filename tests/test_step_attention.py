"""Attention of one token a row: transformers' values, whatever heads are shared, and its own function for all else."""

import pytest
import torch
from tiny import FAMILIES, ids, tiny
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recover.config import recipe
from recover.models import attention
from recover.models.arch import attending, cache_in, taking_cache
from recover.models.attention import NAME, attend, attending_by_step, configs_of
from recover.models.plan import Plan
from recover.models.twin import Twin


class Heads(nn.Module):
    """What transformers' function asks an attention module for."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def heads(groups, tokens=1, columns=7, value_size=8):
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 2 * groups, tokens, 8), (3, 2, columns, 8), (3, 2, columns, value_size)]
    return Heads(groups), *(torch.randn(size, generator=generator) for size in sizes)


def mask(kind, columns=7):
    seen = torch.arange(columns) <= torch.tensor([2, 6, 4])[:, None]
    seen = seen[:, None, None]
    return {"none": None, "bool": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, -1e30)}[kind]


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("value_size", "scaling"), [(8, None), (5, 0.7)])
def test_values_are_those_of_transformers(groups, kind, value_size, scaling):
    module, *tensors = heads(groups, value_size=value_size)
    expected, _ = sdpa_attention_forward(module, *tensors, mask(kind), scaling=scaling)
    found, weights = attend(module, *tensors, mask(kind), scaling=scaling, dropout=0.0)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() and weights is None


def test_what_is_more_than_a_step_is_left_to_transformers(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **more: asked.append(more))
    module, *tensors = heads(2)
    attend(module, *tensors, mask("added"), softcap=30.0)
    attend(module, *tensors, mask("added").expand(3, 4, 1, 7), scaling=0.5)  # another mask for each head
    attend(*heads(2, tokens=3), None, is_causal=True)
    assert asked == [{"softcap": 30.0, "scaling": None}, {"scaling": 0.5}, {"is_causal": True, "scaling": None}]
    attend(module, *tensors, mask("added"), softcap=None)
    assert len(asked) == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_every_block_attends_by_it_and_gives_the_same_logits(monkeypatch, family, padded):
    """Also with a mask of two dimensions, which transformers makes by the name of the attention."""
    model, text_BT = tiny(family), ids(2, 12)
    mask_BT = torch.ones_like(text_BT)
    mask_BT[0, :4] = 0 if padded else 1
    steps = []

    def counted(*args, **others):
        steps.append(args[1].shape[2])
        return attend(*args, **others)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, counted)

    def decoded():
        at_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
        options = {"use_cache": True, **taking_cache(model, None)}
        read = model(text_BT[:, :-1], attention_mask=mask_BT[:, :-1], position_ids=at_BT[:, :-1], **options)
        options |= taking_cache(model, cache_in(read))
        step = model(text_BT[:, -1:], attention_mask=mask_BT, position_ids=at_BT[:, -1:], **options)
        return torch.cat([read.logits, step.logits], 1)[mask_BT.bool()]

    with torch.no_grad():
        expected = decoded()
        assert steps == []
        with attending_by_step(configs_of(model)):
            found = decoded()
    torch.testing.assert_close(found, expected)
    blocks = len(attending(model)) if configs_of(model) else 0  # some are eager, or let it not be replaced
    assert steps == [11] * blocks + [1] * blocks
    eager = {"gemma2", "granite_swa", "gpt_oss", "stablelm", "stablelm_parallel"}
    assert blocks or family in eager | {"qwen3_5_text", "qwen3_next", "falcon_h1", "nemotron_h"}


def test_outside_and_after_an_error_models_attend_as_before():
    twin = Twin(tiny(), Plan("depth", 6, (2,)))
    twin.add_lora(recipe.Lora(rank=2))
    configs = configs_of(twin.model)
    assert [id(config) for config in configs] == [id(twin.base.config)]
    with pytest.raises(KeyError), attending_by_step(configs):
        assert twin.base.config._attn_implementation == NAME
        raise KeyError
    assert twin.base.config._attn_implementation == "sdpa"


def test_other_attention_stays():
    model = tiny()
    model.set_attn_implementation("eager")
    assert configs_of(model) == []
    model.set_attn_implementation("sdpa")
    model._supports_attention_backend = False
    assert configs_of(model) == []
