"""Laws of the name under which a model takes its KV cache: its own, whatever wraps it, and not one that it swallows."""

from __future__ import annotations

import warnings

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from cached import cache_of, cached
from tiny import FAMILIES, ids, tiny
from torch import nn
from transformers.utils import generic
from transformers.utils.deprecation import deprecate_kwarg

from recover.base.errors import ModelError
from recover.config.recipe import Lora, Probe
from recover.measure.speed import compare_speed
from recover.models.arch import CACHE_NAMES, cache_among, cache_in, cache_name, taking_cache
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.probe.probe import probe
from recover.text.decode import Writing, write
from recover.text.likelihood import Continuation, option_log_likelihoods


class New(nn.Module):
    def forward(self, x, cache=None, **kwargs):
        return x


class Old(nn.Module):
    def forward(self, x, past_key_values=None, **kwargs):
        return x


class Renamed(nn.Module):
    @deprecate_kwarg("past_key_values", "99.0", new_name="cache")
    def forward(self, x, cache=None, **kwargs):
        return x


class Neither(nn.Module):
    def forward(self, x, memory=None, **kwargs):
        return x


class Heir(Old):
    """Takes what its parent takes."""


@pytest.mark.parametrize(("kind", "name"), [(New, "cache"), (Renamed, "cache"), (Old, "past_key_values")])
def test_the_name_is_told_by_the_signature(kind, name):
    assert cache_name(kind) == name and taking_cache(kind(), 7) == {name: 7}
    assert cache_name(Heir) == "past_key_values"


def test_a_model_without_a_known_name_is_refused_before_it_swallows_a_cache():
    with pytest.raises(ModelError, match=r"test_kv_cache\.Neither: its forward takes x, memory, kwargs; expected"):
        taking_cache(Neither(), None)


def test_attention_whose_cache_nothing_here_would_find_is_refused():
    model = tiny()
    attention = model.model.layers[2].self_attn
    attention.__class__ = type("Hiding", (type(attention),), {"forward": Neither.forward})
    with pytest.raises(ModelError, match="Hiding: its forward takes x, memory"):
        Twin(model, Plan("depth", 6, (2,)))


def test_a_closed_attention_finds_the_cache_under_either_name():
    for name in CACHE_NAMES:
        assert cache_among({"attention_mask": None, name: 7}) == 7
    assert cache_among({"cache": None}) is None and cache_among({}) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_models_and_what_wraps_them_take_the_cache_that_they_give(family):
    model = tiny(family)
    output = model(ids(), use_cache=True)
    (name,) = cached(output)
    assert cache_in(output) is cache_of(output)
    twin = Twin(model, Plan("depth", 6, (2, 4)))
    wrapped = twin.add_lora(Lora(rank=2))
    for each in (tiny(family), twin.base, wrapped):
        assert list(taking_cache(each, None)) == [name]
        cache = cache_of(each(ids(), use_cache=True))
        each(ids()[:, :1], use_cache=True, **taking_cache(each, cache))
        assert cache.get_seq_length() == ids().shape[1] + 1
    assert cache_in(wrapped(ids(), use_cache=False)) is None


def test_nothing_here_uses_a_name_that_is_deprecated(monkeypatch):
    def complain(message, *args):
        raise AssertionError(message)

    monkeypatch.setattr(generic.logger, "warning_once", complain)
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    model = twin.add_lora(Lora(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        list(write(twin.base, [[5, 6, 7], [8, 9]], Writing(limit=4, ends=(2,), pad=0, rows=2)))
        rows = [Continuation([5, 6, 7, 8], 2), Continuation([5, 6, 9, 9], 2)]
        option_log_likelihoods(model, [rows], batch_size=2)
        compare_speed(tiny(), tiny(), torch.device("cpu"), batch_size=1, prompt_length=8, steps=2)
        probe(twin, byte_tokenizer(), [[5, 6, 7], [8, 9]], Probe(steps=3))
        model.generate(input_ids=ids(), max_new_tokens=3)
