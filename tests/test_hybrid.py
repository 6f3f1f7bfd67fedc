"""Blocks that keep a state in the place of keys and values: what is decoded step by step, padded or pruned is what one
pass over the whole text gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cached import cached
from narrow import prune as narrowed
from test_load import cfg
from test_packing import WEIGHTS, rows, twin_of
from tiny import HYBRIDS, ids, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM
from twins import fill_adapters

from recover.base.errors import ModelError, PruneError
from recover.base.memory import kv_bytes_per_token
from recover.config.recipe import Calibration, Depth, Lora
from recover.distill.distiller import Distiller
from recover.export.merge import merge
from recover.measure import speed
from recover.models.arch import arch_of, blocks_of, linears_of, modules_in
from recover.models.kv_cache import given_by
from recover.models.load import describe, load_model
from recover.models.plan import Plan
from recover.models.site import Site
from recover.models.twin import Twin
from recover.prune import registry
from recover.text.decode import Writing
from recover.text.generate import plain
from recover.text.likelihood import Continuation, log_likelihoods
from recover.train.data import collator

FAMILIES = sorted(HYBRIDS)
# A mixer, an attention, an MLP and a whole block go; another mixer and another attention stay.
GONE: Any = (Site(1, "attention"), Site(2, "attention"), Site(4, "mlp"), 3)


def pruned(family: str) -> Twin:
    twin = Twin(tiny(family), Plan("depth", 6, GONE))
    twin.add_lora(Lora(rank=3))
    fill_adapters(twin)
    twin.model.eval()
    return twin


@torch.no_grad()
def by_steps(model: Any, ids_BT: Tensor, prompt: int) -> Tensor:
    """Logits of every position: those of the prompt from one pass, each later one from a token and the cache."""
    out = model(input_ids=ids_BT[:, :prompt], use_cache=True)
    logits, before = [out.logits], cached(out)
    for at in range(prompt, ids_BT.shape[1]):
        out = model(input_ids=ids_BT[:, at : at + 1], use_cache=True, **before)
        logits, before = [*logits, out.logits], cached(out)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_of_several_kinds_and_a_closed_one_leaves_no_state(family):
    twin = pruned(family)
    arch, blocks = arch_of(twin.base), blocks_of(twin.base)
    kinds = {tuple(modules_in(block, arch, "attention")) for block in blocks}
    assert any(arch.mixer in kind for kind in kinds)
    cache = cached(twin.model(input_ids=ids(1, 6), use_cache=True))
    (kept,) = cache.values()
    for index in (1, 3):
        states = getattr(kept.layers[index], "conv_states", {0: None})
        assert states[0] is None, "a mixer that is closed is not run"
    assert kept.get_seq_length() == 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 3, 11])
def test_the_state_carried_token_by_token_is_that_of_one_pass_without_a_cache(family, prompt):
    """Of both views, and of the merged model: stock code computes the two in different ways (a chunk, a recurrence)."""
    twin, text = pruned(family), ids(2, 20)

    def agree(model: Any) -> Tensor:
        with torch.no_grad():
            whole = model(input_ids=text, use_cache=False).logits
        steps = by_steps(model, text, prompt)
        torch.testing.assert_close(steps, whole, rtol=1e-3, atol=2e-4)
        assert torch.equal(steps.argmax(-1), whole.argmax(-1))
        return whole

    trained = agree(twin.model)
    with twin.dense() as dense:
        assert not torch.allclose(agree(dense), trained, atol=1e-2)
    torch.testing.assert_close(agree(merge(twin, torch.float32)), trained, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_rows_that_are_padded_together_are_those_of_rows_alone(family):
    twin = pruned(family)
    asked = [ids(1, length, seed=length)[0].tolist() for length in (3, 9, 14, 5)]
    with torch.no_grad():
        together = dict(plain(twin.base, asked, Writing(limit=10, ends=(2,), pad=0, rows=4)))
        alone = dict(plain(twin.base, asked, Writing(limit=10, ends=(2,), pad=0, rows=1)))
        for item, prompt in enumerate(asked):
            text = list(prompt)
            for token in alone[item]:
                assert int(twin.base(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()) == token
                text.append(token)
    assert together == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_of_rows_that_are_padded_together_are_those_of_rows_alone(family):
    model = tiny(family)
    asked = [Continuation(ids(1, length, seed=length)[0].tolist(), 2) for length in (3, 9, 14, 5)]
    together, alone = (log_likelihoods(model, asked, batch_size=size) for size in (4, 1))
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_has_the_losses_and_gradients_of_its_rows_alone(family):
    """Padding stands behind the tokens: what is recurrent has not come to it yet."""

    def learned(batches: list[list[dict[str, Any]]]) -> tuple[Tensor, Tensor]:
        twin, total = twin_of(family), torch.zeros(())
        for batch in batches:
            sums = twin.model(**{**collator(0, "completion")(batch), "attention_mask": None}, distill=distiller(twin))
            sums["loss"].backward()
            total = total + sums["loss"].detach()
        return total, torch.cat([each.grad.flatten() for each in twin.model.parameters() if each.grad is not None])

    def distiller(twin: Twin) -> Distiller:
        return Distiller(twin, WEIGHTS)

    together, expected = rows(), [[row] for row in rows()]
    loss, gradient = learned([together])
    loss_alone, gradient_alone = learned(expected)
    assert float(loss) == pytest.approx(float(loss_alone), rel=1e-4)
    assert (gradient - gradient_alone).norm() < 1e-3 * gradient_alone.norm() and gradient.norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_kinds_of_the_blocks_that_are_left(family):
    twin = pruned(family)
    merged = merge(twin, torch.float32)
    arch = arch_of(merged)
    kinds = [modules_in(block, arch, "attention") for block in blocks_of(twin.base)]
    assert [modules_in(block, arch, "attention") for block in blocks_of(merged)] == [
        kinds[packed.source] for packed in twin.plan.packed
    ]
    stored = sum(parameter.numel() for parameter in merged.parameters())
    assert len(linears_of(merged)) < len(linears_of(twin.base)) and stored < twin.base.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_knows_parameters_and_cache_of_a_hybrid(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    described = describe(cfg(tmp_path))
    assert described.parameters == model.num_parameters() and described.intermediate == 96 and described.beside == 0
    cache = model(ids(1, 7), use_cache=True)
    kept = given_by(cache).layers
    grown = sum(layer.keys.numel() + layer.values.numel() for layer in kept if getattr(layer, "keys", None) is not None)
    assert kv_bytes_per_token(described, 1) * 7 == speed.kv_bytes_per_token(model.config, 1) * 7 == grown


def test_the_neurons_of_lfm2_are_those_that_its_class_computes(tmp_path):
    """Its published configs name two thirds more, to be rounded; an export names what there is."""
    sizes = {"block_auto_adjust_ff_dim": True, "intermediate_size": 144, "block_multiple_of": 32}
    model = tiny("lfm2", **sizes)
    model.save_pretrained(tmp_path / "dense")
    dense = load_model(cfg(tmp_path / "dense"))
    assert torch.equal(dense(ids()).logits, model(ids()).logits)
    assert describe(cfg(tmp_path / "dense")).intermediate == dense.config.intermediate_size == 96
    plan = narrowed(dense, mlp=0.4)
    merge(Twin(dense, *plan), torch.float32).save_pretrained(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.model.layers[0].feed_forward.w1.out_features == plan.plan.config["intermediate_size"] == 56


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_attention_stays(family):
    """It tells how many tokens a cache has."""
    model = tiny(family)
    arch = arch_of(model)
    attending = [
        i for i, block in enumerate(blocks_of(model)) if arch.attention in modules_in(block, arch, "attention")
    ]
    if attending[0] == 0:
        pytest.skip("attention of block 0 stays anyway")
    with pytest.raises(ModelError, match="no attention is left"):
        Twin(copy.deepcopy(model), Plan("depth", 6, tuple(Site(block, "attention") for block in attending)))
    drop = Depth(kind="depth", count=4, unit="attention", calibration=Calibration(data="text"), score="kl")
    batches: Any = [ids(2, 16)]
    plan, _, _ = registry.prune(Twin(copy.deepcopy(model), Plan.none(6)), drop, batches)
    assert len(plan.dropped_attention) == 4 and set(attending) - set(plan.dropped_attention)
    with pytest.raises(PruneError, match="drop at most 4"):
        registry.prune(Twin(model, Plan.none(6)), drop.model_copy(update={"count": 5}), batches)
