"""Laws of the counterfactuals: same input, same context, one sublayer changed, with a cache right at every step.

References are built by hand: weights set to zero, blocks called one by one on the dense model's hidden states.
"""

from __future__ import annotations

import copy

import pytest
import torch
from probe_reference import CFG, DROPPED, NO_TOKENIZER, STEPS, dropping, endless, of, prompts, text_of
from torch import nn
from twins import removed

from recover.base.errors import ModelError
from recover.maths import divergence as spaces
from recover.models.arch import arch_of, blocks_of, final_norm_of
from recover.models.site import Site
from recover.probe.probe import probe
from recover.probe.records import Sublayer
from recover.probe.sublayers import Transition, transitions, without
from recover.probe.trajectory import along, batches_of, greedy, thinned
from recover.probe.views import Pair, View

FAMILIES = ["llama", "qwen2_sliding", "gemma2", "gemma3_text", "olmo2", "phi3", "granite"]
FAMILIES += ["glm4", "starcoder2", "apertus", "phi", "cohere2", "gpt_neox", "gpt_neox_sequential", "gpt2"]


def trajectory_of(pair: Pair, count: int = 3):
    batch = batches_of(prompts(count), pair.dense, size=count, steps=STEPS)[0]
    return greedy(pair.dense, batch, steps=STEPS, ends=[])


def other_weights(model, seed: int = 7):
    """A model of the same shape whose every matrix is a little off."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


def tensors(found: dict[Site, Transition]) -> dict[str, torch.Tensor]:
    return {f"{site} {name}": value for site, each in found.items() for name, value in vars(each).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_at_every_step_gives_what_one_full_forward_gives(family):
    # Gemma 2 takes its softmax in float32, where float64's mask of a padded row overflows
    dense, rounding = (endless(family), 1e-4) if family == "gemma2" else (endless(family).double(), 1e-9)
    pair = Pair.of_models(dense, other_weights(dense))
    trajectory = trajectory_of(pair)
    whole = transitions(pair, trajectory, trajectory.scored_BS)
    for chunk in (1, 5):
        found = transitions(pair, trajectory, trajectory.scored_BS, chunk=chunk)
        torch.testing.assert_close(tensors(found), tensors(whole), rtol=rounding, atol=rounding)


def test_equal_models_replace_every_sublayer_by_itself_exactly_with_a_cache_too():
    dense = endless()
    pair = Pair.of_models(dense, copy.deepcopy(dense))
    trajectory = trajectory_of(pair)
    for chunk in (None, 1):
        for transition in transitions(pair, trajectory, trajectory.scored_BS, chunk=chunk).values():
            assert torch.equal(transition.after_ND, transition.replaced_ND)
            assert not torch.equal(transition.after_ND, transition.before_ND)


@pytest.mark.parametrize(("family", "norm"), [("phi", "input_layernorm"), ("gpt_neox", "post_attention_layernorm")])
def test_an_mlp_beside_attention_is_replaced_at_the_input_of_the_block(family, norm):
    """Where both read one input, what stands behind another MLP is dense attention plus that MLP of that input."""
    dense = endless(family)
    other = other_weights(dense)
    pair = Pair.of_models(dense, other)
    trajectory = trajectory_of(pair)
    for chunk in (None, 3):
        found = transitions(pair, trajectory, trajectory.scored_BS, chunk=chunk)
        for number, block in enumerate(blocks_of(other)):
            attention, mlp = found[Site(number, "attention")], found[Site(number, "mlp")]
            with torch.no_grad():
                expected = mlp.before_ND + block.mlp(block.get_submodule(norm)(attention.before_ND))
            torch.testing.assert_close(mlp.replaced_ND, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(mlp.replaced_ND, mlp.after_ND, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_sublayers_add_up_to_the_model(family):
    dense = endless(family)
    pair = Pair.of_models(dense, other_weights(dense))
    trajectory = trajectory_of(pair)
    found = transitions(pair, trajectory, trajectory.scored_BS)
    for number in range(6):
        attention, mlp = found[Site(number, "attention")], found[Site(number, "mlp")]
        assert torch.equal(attention.after_ND, mlp.before_ND)
        if number:
            assert torch.equal(attention.before_ND, found[Site(number - 1, "mlp")].after_ND)
    with torch.no_grad():
        last_ND = final_norm_of(dense)(found[Site(5, "mlp")].after_ND)
    torch.testing.assert_close(last_ND, along(pair.dense, trajectory).final_ND)


def zeroed(model, site: Site):
    """The reference: the last matrix of the sublayer is zero, so it adds nothing."""
    model = copy.deepcopy(model)
    arch = arch_of(model)
    inside, linears = {"attention": (arch.attention, arch.attention_linears), "mlp": (arch.mlp, arch.mlp_linears)}[
        site.part
    ]
    last = blocks_of(model)[site.block].get_submodule(f"{inside}.{linears[-1]}")
    last.weight.data.zero_()
    if last.bias is not None:
        last.bias.data.zero_()
    return model


OTHERS = (Site(3, "attention"), Site(2, "mlp"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site", [Site(0, "attention"), Site(5, "mlp"), *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_closed_is_really_closing_that_sublayer_at_every_step_with_a_cache(family, site):
    dense = endless(family)
    view, reference = without(View.of_model("dense", dense), site), View.of_model("zeroed", zeroed(dense, site))
    batch = batches_of(prompts(3), reference, size=3, steps=STEPS)[0]
    expected = greedy(reference, batch, steps=STEPS, ends=[])
    found = greedy(view, batch, steps=STEPS, ends=[])
    assert found.tokens() == expected.tokens()
    torch.testing.assert_close(found.cached_ND, expected.cached_ND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        along(view, expected).final_ND, along(reference, expected).final_ND, rtol=1e-5, atol=1e-5
    )
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in dense.modules())


def test_the_closed_counterfactual_is_the_stream_of_the_model_with_that_sublayer_closed():
    dense = endless()
    for site in (Site(3, "attention"), Site(4, "mlp")):
        pair = Pair.of_models(dense, zeroed(dense, site))
        trajectory = trajectory_of(pair)
        found = transitions(pair, trajectory, trajectory.scored_BS)
        torch.testing.assert_close(found[site].replaced_ND, found[site].before_ND, rtol=0, atol=1e-6)
        others = [transition for key, transition in found.items() if key != site]
        assert all(torch.equal(other.after_ND, other.replaced_ND) for other in others)


def test_the_replaced_sublayer_is_given_the_dense_input_and_context():
    """By hand, one text: the other model's own modules, called on the dense model's hidden states."""
    dense = endless()
    other = other_weights(dense)
    prompt = prompts(1)[0]
    text = text_of(dense, prompt)
    ids = torch.tensor([prompt + text.tolist()])[:, :-1]
    pair = Pair.of_models(dense, other)
    trajectory = trajectory_of(pair, 1)
    found = transitions(pair, trajectory, trajectory.scored_BS)
    with torch.no_grad():
        states = dense.model(ids, output_hidden_states=True).hidden_states
        place = torch.arange(ids.shape[1])[None]
        rotary = dense.model.rotary_emb(states[0], place)
        for number in (0, 3):
            own, theirs, h_1TD = dense.model.layers[number], other.model.layers[number], states[number]
            mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            a = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": place}
            middle = h_1TD + own.self_attn(own.input_layernorm(h_1TD), **a)[0]
            attention = h_1TD + theirs.self_attn(theirs.input_layernorm(h_1TD), **a)[0]
            mlp = middle + theirs.mlp(theirs.post_attention_layernorm(middle))
            first = len(prompt) - 1
            for part, expected in (("attention", attention), ("mlp", mlp)):
                torch.testing.assert_close(
                    found[Site(number, part)].replaced_ND, expected[0, first:], rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("as_twin", [True, False])
def test_dropped_blocks_count_as_closed_and_the_others_as_unchanged(as_twin):
    dense = endless()
    kept = [number for number in range(6) if number not in DROPPED]
    pair = Pair.of(dropping(dense)) if as_twin else Pair.of_models(dense, removed(dense, DROPPED), kept)
    trajectory = trajectory_of(pair)
    for site, transition in transitions(pair, trajectory, trajectory.scored_BS).items():
        expected = transition.before_ND if site.block in DROPPED else transition.after_ND
        assert torch.equal(transition.replaced_ND, expected), site


def test_records_are_the_textbook_of_both_counterfactuals_through_both_lenses():
    dense = endless().double()
    pair = Pair.of_models(dense, other_weights(dense))
    cfg = CFG.model_copy(update={"samples": 3, "batch_size": 3})
    records = {
        (r.block, r.part, r.counterfactual, r.lens): r for r in of(probe(pair, NO_TOKENIZER, prompts(3), cfg), Sublayer)
    }
    assert len(records) == 6 * 2 * 2 * 2
    trajectory = trajectory_of(pair)
    found = transitions(pair, trajectory, trajectory.scored_BS)
    cosine = nn.functional.cosine_similarity
    for site in (Site(1, "attention"), Site(4, "mlp")):
        for what, changed in (("closed", found[site].before_ND), ("pruned", found[site].replaced_ND)):
            for lens in ("final_norm", "raw"):
                with torch.no_grad():
                    h, g = (dense.model.norm(x) if lens == "final_norm" else x for x in (found[site].after_ND, changed))
                    p, q = (dense.lm_head(x).softmax(-1) for x in (h, g))
                record = records[(*site, what, lens)]
                kl = (p * (p.log() - q.log())).sum(-1)
                a = ((g - h) * h).sum(-1) / h.square().sum(-1)
                across = (g - h - a[:, None] * h).norm(dim=-1) / h.norm(dim=-1)
                for name, value in {
                    "kl": kl,
                    "probability": 1 - cosine(p, q),
                    "embedding": 1 - cosine(h, g),
                    "parallel": a,
                    "orthogonal": across,
                }.items():
                    expected = spaces.quantiles(value)
                    assert getattr(record, name) == pytest.approx(expected, rel=1e-8, abs=1e-10), name


def test_layer_figures_take_at_most_so_many_positions_and_all_of_them_if_there_are_fewer():
    mark = torch.zeros(3, 7, dtype=torch.bool)
    mark[0, :5] = mark[2, 1:] = True
    assert torch.equal(thinned(mark, 11), mark) and torch.equal(thinned(mark, 100), mark)
    few = thinned(mark, 4)
    assert few.sum() == 4 and not (few & ~mark).any() and few[0].any() and few[2].any()
    cfg = CFG.model_copy(update={"layer_positions": 3})
    pair = Pair.of(dropping(endless()))
    full = probe(pair, NO_TOKENIZER, prompts(), CFG)
    thin = probe(pair, NO_TOKENIZER, prompts(), cfg)
    assert len(full) == len(thin)
    assert [r.metrics for r in thin if r.probe == "final"] == [r.metrics for r in full if r.probe == "final"]


def test_a_sublayer_that_gives_nan_is_named():
    dense = endless()
    other = copy.deepcopy(dense)
    other.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="prompt 0, decoding step 0: the pruned view"):
        probe(Pair.of_models(dense, other), NO_TOKENIZER, prompts(2), CFG)


def test_a_block_that_is_not_there_cannot_be_closed():
    with pytest.raises(ModelError, match="attention:9: the dense view has the blocks"):
        without(View.of_model("dense", endless()), Site(9, "attention"))
