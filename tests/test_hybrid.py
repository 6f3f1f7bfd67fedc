"""Blocks that keep a state in the place of keys and values: what is decoded step by step, padded or pruned is what one
pass over the whole text gives."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from cached import cached
from narrow import prune as narrowed
from probe_reference import endless
from safetensors.torch import load_file, save_file
from test_load import cfg
from test_packing import WEIGHTS, rows, twin_of
from test_probe_sublayers import trajectory_of
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
from recover.models.arch import arch_of, blocks_of, cache_in, linears_in, linears_of, lone_of, modules_in
from recover.models.load import describe, load_model
from recover.models.plan import Plan
from recover.models.site import Site
from recover.models.twin import Twin
from recover.probe.sublayers import transitions, without
from recover.probe.trajectory import along
from recover.probe.views import Pair, View
from recover.prune import registry
from recover.prune.stream import residual_stream
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
@pytest.mark.parametrize("prompt", [1, pytest.param(3, marks=pytest.mark.slow), 11])
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
    kept = cache_in(cache).layers
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


LONE = "nemotron_h"  # Mamba-2, Mamba-2, attention, Mamba-2, MLP, attention
IS = ("attention", "attention", "attention", "attention", "mlp", "attention")


def test_where_a_block_is_one_sublayer_the_other_does_nothing_to_the_stream():
    twin = Twin(tiny(LONE), Plan.none(6))
    assert lone_of(twin.model) == IS
    h = residual_stream(twin, ids(2, 16), {1, 4})
    still = {point for point in range(12) if torch.equal(h[point], h[point + 1])}
    absent = {2 * block + (part == "attention") for block, part in enumerate(IS)}
    assert still == absent | {2, 9}
    with torch.no_grad():
        whole = tiny(LONE)(input_ids=ids(2, 16), use_cache=False, output_hidden_states=True).hidden_states
    h = residual_stream(twin, ids(2, 16))
    assert all(torch.equal(h[2 * block], whole[block]) for block in range(6))


@pytest.mark.parametrize("site", [Site(1, "attention"), Site(4, "mlp"), Site(5, "attention")])
def test_a_probe_closes_the_one_sublayer_of_a_block(site):
    dense = endless(LONE)
    zeroed = copy.deepcopy(dense)
    (last,) = linears_in(blocks_of(zeroed)[site.block], arch_of(zeroed), site.part)[-1:]
    blocks_of(zeroed)[site.block].get_submodule(last).weight.data.zero_()
    pair = Pair.of_models(dense, zeroed)
    trajectory = trajectory_of(pair)
    found = transitions(pair, trajectory, trajectory.scored_BS)
    assert [*found] == [Site(block, part) for block, part in enumerate(IS)]
    torch.testing.assert_close(found[site].replaced_ND, found[site].before_ND, rtol=0, atol=1e-6)
    others = [transition for key, transition in found.items() if key != site]
    assert all(torch.equal(other.after_ND, other.replaced_ND) for other in others)
    assert all(torch.equal(found[a].after_ND, found[b].before_ND) for a, b in itertools.pairwise(found))
    view, reference = without(pair.dense, site), View.of_model("zeroed", zeroed)
    torch.testing.assert_close(
        along(view, trajectory).final_ND, along(reference, trajectory).final_ND, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ModelError, match=f"{'mlp' if site.part == 'attention' else 'attention'}:{site.block}"):
        without(pair.dense, Site(site.block, "mlp" if site.part == "attention" else "attention"))


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"unit": "mlp", "count": 1}, {4}),
        ({"unit": "attention", "count": 3}, None),
        ({"unit": "sublayer", "count": 2, "score": "angular"}, None),
        ({"unit": "sublayer", "sites": ("attention:3", "mlp:4")}, {3, 4}),
        ({"unit": "attention", "blocks": (1, 2)}, {1, 2}),
        ({"unit": "block", "blocks": (1, 4)}, {1, 4}),
    ],
)
def test_with_its_one_sublayer_a_block_goes(fields, gone, tmp_path):
    model = tiny(LONE)
    model.save_pretrained(tmp_path)
    drop = Depth(calibration=Calibration(data="text"), **fields)
    plan, _, _ = registry.prune(Twin(copy.deepcopy(model), Plan.none(6)), drop, [ids(2, 16)])
    assert set(plan.dropped) == (gone or set(plan.dropped)) and len(plan.dropped) == drop.units
    assert not plan.dropped_attention and not plan.dropped_mlp and len(plan.kept) == len(plan.packed)
    merged: Any = merge(Twin(copy.deepcopy(model), plan), torch.float32)
    kinds = [model.config.layers_block_type[block] for block in plan.kept]
    assert merged.config.layers_block_type == kinds and merged.config.num_hidden_layers == len(kinds)
    assert plan.parameters_pruned == plan.nonzero == merged.num_parameters()
    if fields.get("unit") == "attention":
        assert all(IS[block] == "attention" for block in plan.dropped)
    if drop.listed is not None or gone:
        expected = plan.parameters_dense - plan.parameters_pruned
        assert registry.pruner_of(drop).cost(drop, describe(cfg(tmp_path))).unstored == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"unit": "mlp", "blocks": (3,)}, r"prune.blocks: mlp:3: block 3 is one sublayer, attention"),
        ({"unit": "sublayer", "sites": ("attention:4",)}, r"prune.sites: attention:4: block 4 is one sublayer, mlp"),
        ({"unit": "mlp", "count": 2}, r"drop at most 1"),
        ({"unit": "pair", "count": 1}, r"one sublayer in each"),
    ],
)
def test_a_sublayer_that_a_block_is_not_is_refused_in_the_plan_too(fields, said, tmp_path):
    model = tiny(LONE)
    model.save_pretrained(tmp_path)
    drop = Depth(calibration=Calibration(data="text"), **fields)
    with pytest.raises(PruneError, match=said):
        registry.prune(Twin(model, Plan.none(6)), drop, [ids(2, 16)])
    with pytest.raises(PruneError, match=said):
        registry.pruner_of(drop).cost(drop, describe(cfg(tmp_path)))


@pytest.mark.parametrize(("blocks", "before"), [((2,), "1.mixer.out_proj"), ((5,), "4.mixer.down_proj")])
def test_a_cut_is_repaired_in_the_last_sublayer_that_there_is(blocks, before):
    model = tiny(LONE)
    drop = Depth(blocks=blocks, repair="rescale", calibration=Calibration(data="text"))
    text: Any = [ids(8, 32)]
    plan, masks, weights = registry.prune(Twin(copy.deepcopy(model), Plan.none(6)), drop, text)
    (cut,) = plan.repair["cuts"]
    assert cut["kept"] and [*weights] == [f"model.layers.{before}.weight"]
    fit = torch.stack([row for at, row in enumerate(text[0]) if at % 4 != 3])
    dense = residual_stream(Twin(copy.deepcopy(model), Plan.none(6)), fit)
    repaired = residual_stream(Twin(copy.deepcopy(model), plan, masks, weights), fit, plan.sites)
    point = 2 * blocks[0] + 2
    error = (dense[point] - repaired[point]).double().square().sum(-1).mean()
    assert cut["error_after"] == pytest.approx(float(error), rel=1e-4) and cut["error_after"] < cut["error_before"]


def test_nemotron_h_is_read_as_it_was_published(tmp_path):
    """Kinds of blocks as a text of one letter each, and names of the first release."""
    model = tiny(LONE)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layers_block_type"]
    config |= {"hybrid_override_pattern": "MM*M-*", "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "backbone.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "backbone.embeddings.weight" in renamed and "backbone.layers.2.mixer.q_proj.weight" in renamed
    loaded = load_model(cfg(tmp_path))
    assert torch.equal(loaded(ids()).logits, model(ids()).logits) and describe(cfg(tmp_path)).lone == IS
    config["hybrid_override_pattern"] = "MM*ME*"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="mixtures of experts without a gate"):
        describe(cfg(tmp_path))
