"""Masks and rewritten weights against references written differently: full forwards and loops."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import HYBRIDS, MIXTURES, ids, tiny
from twins import fill_adapters

from recover.base.errors import PruneError
from recover.config import recipe
from recover.config.recipe import Calibration, Magnitude, SparseGpt, Wanda
from recover.export.merge import merge
from recover.models.arch import as_linears, blocks_of, linears_of
from recover.models.plan import MaskRecord, Plan, load_plan, save_plan
from recover.models.twin import Twin
from recover.prune import stream
from recover.prune.matrices import keep_n_m
from recover.prune.sparsity import fractions_by, owl_fractions, prune_magnitude, prune_sparsegpt, prune_wanda
from recover.prune.stream import Stream, norms, squares

CALIBRATION = Calibration(data="given", samples=5, length=24, batch_size=2)
FAMILIES = ["llama_tied", "mistral_sliding", "qwen2_sliding", "gemma2", "gemma3_text", "phi3", "smollm3", "granite"]
FAMILIES += ["glm4", "starcoder2", "apertus", "ministral3", "granite_swa", "phi", "cohere2", "gpt_neox", "gpt2"]
FAMILIES += sorted(HYBRIDS - {*MIXTURES})  # experts: test_experts


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(ids(5, 24, seed=3).split(2))


def dense_twin(model) -> Twin:
    return Twin(model, Plan.none(len(blocks_of(model))))


def sparse(**fields) -> SparseGpt:
    return SparseGpt(kind="sparsegpt", calibration=CALIBRATION, **({"sparsity": 0.5} | fields))


@torch.no_grad()
def inputs_of(model, batches) -> dict[str, torch.Tensor]:
    """Inputs (N, I) of every linear layer in a full forward: the slow way."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, linear in linears_of(model).items()
    ]
    for ids_BT in batches:
        model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, 1) for x in xs]) for name, xs in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_full_forward_with_the_blocks_so_far_pruned(family, batches):
    model = tiny(family)
    reference, twin = copy.deepcopy(model), dense_twin(model)
    as_linears(reference)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    walk = Stream(twin, batches)
    for index in range(6):
        expected = inputs_of(reference, batches)
        with walk.resident(index) as linears:
            found = norms(walk.measure(index, squares))
            halved = {name: linear.weight * (linear.weight.abs() > 0.05) for name, linear in linears.items()}
            walk.advance(index, halved)
        assert found.keys() == linears.keys() and len(linears) in (2, 4, 5, 6, 7, 8, 9)
        for name, norm_I in found.items():
            torch.testing.assert_close(norm_I, expected[name].norm(dim=0), rtol=1e-4, atol=1e-5)
            reference.get_submodule(name).weight.data.copy_(halved[name])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert twin.closed_sites == frozenset()


def test_a_pass_goes_through_each_block_once_or_twice_and_not_through_all(batches):
    twin, runs = dense_twin(tiny()), [0] * 6
    for index, block in enumerate(twin.blocks):
        block.mlp.gate_proj.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    prune_wanda(twin, Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION), batches)
    # one token to see what an output looks like (block 0), then 3 batches measured, 3 passed on (not after the last)
    assert runs == [7, 6, 6, 6, 6, 3]


def certified(plan, masks, weights, pattern) -> None:
    assert plan.masks == {name: MaskRecord.of(keep_OI, pattern) for name, keep_OI in masks.items()}
    assert plan.weights == {name: tuple(weight.shape) for name, weight in weights.items()}
    assert weights.keys() == {f"{name}.weight" for name in masks}
    for name, keep_OI in masks.items():
        assert not weights[f"{name}.weight"][~keep_OI].any(), name


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", None), ("1:3", None), ("3:16", None)])
def test_sparsegpt_beats_wanda_in_the_last_hidden_state_and_holds_its_certificates(pattern, sparsity, batches):
    model = tiny(hidden_size=96, intermediate_size=96, num_attention_heads=4)
    text = list(ids(24, 40, seed=5).split(8))
    cfg = sparse(pattern=pattern, sparsity=sparsity)
    plan, masks, weights = prune_sparsegpt(dense_twin(copy.deepcopy(model)), cfg, text)
    certified(plan, masks, weights, pattern)
    assert masks.keys() == linears_of(model).keys() and plan.kind == "sparsegpt"
    if cfg.n_m:
        n, m = cfg.n_m
        assert all((keep.reshape(-1, m).sum(1) == n).all() for keep in masks.values())
    else:
        assert all(int((~keep).sum()) == round(0.6 * keep.numel()) for keep in masks.values())
    wanda = prune_wanda(
        dense_twin(copy.deepcopy(model)),
        Wanda(kind="wanda", pattern=pattern, sparsity=sparsity, calibration=CALIBRATION),
        text,
    )

    def error(name, weight) -> float:
        x_NI = inputs_of(model, text)[name]
        return float((x_NI @ (weight - linears_of(model)[name].weight).T).detach().square().sum())

    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):  # same input in both
        masked = linears_of(model)[name].weight * wanda.masks[name]
        assert error(name, weights[f"{name}.weight"]) < error(name, masked)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 5), (7, 16), (5, 33), (40, 100)])
def test_any_n_of_m_against_a_loop_with_ties(n, m):
    score_OI = torch.randint(0, 4, (3, 2 * m), generator=torch.Generator().manual_seed(m)).float()
    keep_OI = keep_n_m(score_OI, n, m)
    for row, start in itertools.product(range(3), (0, m)):
        group = score_OI[row, start : start + m].tolist()
        order = sorted(range(m), key=lambda index: (group[index], index))
        assert {i for i in range(m) if not keep_OI[row, start + i]} == set(order[: m - n])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "4:4"}, "N < M"),
        ({"pattern": "5:4"}, "N < M"),
        ({"pattern": "0:4"}, "N < M"),
        ({"pattern": "two:four"}, "N < M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 fixes sparsity at 0.5, found 0.6"),
        ({"sparsity": 0}, "greater than 0"),
        ({"sparsity": 1}, "less than 1"),
        ({"sparsity": 1.5}, "less than 1"),
        ({}, "'sparsity' is needed"),
        ({"pattern": "2:4", "allocation": "owl"}, "owl needs pattern: unstructured, found 2:4"),
        ({"pattern": "2:4", "allocation": "outliers"}, "outliers needs pattern: unstructured, found 2:4"),
        ({"sparsity": 0.05, "allocation": "kl"}, r"spread 0\.08 leaves \(0, 1\): give a smaller 'spread'"),
        ({"sparsity": 0.15, "allocation": "owl"}, r"twice spread 0\.08 leaves \(0, 1\): give a smaller 'spread'"),
    ],
)
def test_patterns_and_ratios_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Wanda(kind="wanda", calibration=CALIBRATION, **fields)
    assert Wanda(kind="wanda", calibration=CALIBRATION, pattern="1:4", sparsity=0.75).fraction == 0.75


def test_spread_keeps_the_mean_and_the_bounds():
    found = fractions_by([0.1, 0.2, 0.6, 0.3], [10, 10, 10, 30], 0.7, 0.08)
    assert sum(f * s for f, s in zip(found, [10, 10, 10, 30], strict=True)) / 60 == pytest.approx(0.7, abs=1e-12)
    assert max(abs(f - 0.7) for f in found) == pytest.approx(0.08) and found[2] < found[3] < found[1] < found[0]
    assert fractions_by([1.0, 1.0], [2, 2], 0.5, 0.1) == [0.5, 0.5]


def published(ratios, sparsity, spread):
    """Densities as OWL's own code has them: from 0 to twice lambda by the outlier ratios, moved to the mean density."""
    ratios = np.array(ratios)
    scaled = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 2 * spread
    return 1 - (scaled - scaled.mean() + 1 - sparsity)


def test_owl_is_spread_as_published():
    ratios, sizes = [0.4, 0.1, 2.5, 0.3, 0.2], [7] * 5
    found = owl_fractions(ratios, sizes, 0.7, 0.08)
    assert found == pytest.approx(list(published(ratios, 0.7, 0.08)))
    assert max(found) - min(found) == pytest.approx(0.16) and 0.7 - min(found) > 0.08
    uneven = owl_fractions(ratios, [1, 2, 3, 4, 5], 0.7, 0.08)
    assert sum(f * s for f, s in zip(uneven, [1, 2, 3, 4, 5], strict=True)) / 15 == pytest.approx(0.7)
    assert owl_fractions([1.0, 1.0], [2, 2], 0.5, 0.1) == [0.5, 0.5]


@pytest.mark.parametrize("allocation", ["owl", "outliers"])
def test_the_block_with_outliers_is_spared(batches, allocation):
    """OWL counts above five times the mean of the whole block, `outliers` above that of each matrix."""
    model = tiny(hidden_size=96, intermediate_size=192)
    for linear in (model.model.layers[3].mlp.up_proj, model.model.layers[3].mlp.gate_proj):
        linear.weight.data[:, :4] *= 30
    cfg = Wanda(kind="wanda", sparsity=0.5, allocation=allocation, spread=0.1, calibration=CALIBRATION)
    seen = inputs_of(model, batches)
    share = []
    for block in range(6):
        scores = [
            (linears_of(model)[name].weight.detach().abs() * x_NI.norm(dim=0)).flatten()
            for name, x_NI in seen.items()
            if name.startswith(f"model.layers.{block}.")
        ]
        together = [torch.cat(scores)] if allocation == "owl" else scores
        share.append(sum(int((s > 5 * s.mean()).sum()) for s in together) / sum(s.numel() for s in scores))
    plan, masks, _ = prune_wanda(dense_twin(model), cfg, batches)
    assert plan.calibration["importance"] == pytest.approx(share, rel=1e-3)
    fractions = plan.calibration["sparsity"]
    assert min(fractions) == fractions[3] and sum(fractions) / 6 == pytest.approx(0.5)
    expected = published(share, 0.5, 0.1) if allocation == "owl" else fractions_by(share, [1] * 6, 0.5, 0.1)
    assert fractions == pytest.approx(list(expected), abs=1e-4)
    for name, keep_OI in masks.items():
        assert ((~keep_OI).sum(1) == round(fractions[int(name.split(".")[2])] * keep_OI.shape[1])).all()


def test_kl_spares_the_block_that_matters(batches):
    model = tiny()
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        linear.weight.data *= 0.01  # block 2 does next to nothing
    plan, _, weights = prune_sparsegpt(dense_twin(copy.deepcopy(model)), sparse(allocation="kl"), batches)
    importance, fractions = plan.calibration["importance"], plan.calibration["sparsity"]
    assert min(importance) == importance[2] and max(fractions) == fractions[2] and len(weights) == 42
    uniform = Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION)
    seen = inputs_of(model, batches)
    for name, x_NI in seen.items():
        if name.startswith("model.layers.4."):
            linear = linears_of(model)[name]
            gone = round(uniform.fraction * linear.in_features)
            score_OI = linear.weight.detach().abs() * x_NI.norm(dim=0)
            order = score_OI.argsort(dim=1, stable=True)[:, :gone]
            seen[name] = linear.weight.detach().scatter(1, order, 0)
    alone = copy.deepcopy(model)
    for name, weight in seen.items():
        if name.startswith("model.layers.4."):
            linears_of(alone)[name].weight.data.copy_(weight)
    total = 0.0
    with torch.no_grad():
        for ids_BT in batches:
            p = model(input_ids=ids_BT).logits.double().log_softmax(-1)
            q = alone(input_ids=ids_BT).logits.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
    assert importance[4] == pytest.approx(total / 120, rel=1e-2)


@pytest.mark.parametrize("prune", [prune_wanda, prune_sparsegpt])
def test_what_cannot_work_is_said_before_hours_are_spent(prune, batches):
    def cfg(**fields):
        kind, cls = ("wanda", Wanda) if prune is prune_wanda else ("sparsegpt", SparseGpt)
        return cls(kind=kind, calibration=CALIBRATION, **fields)

    with pytest.raises(PruneError, match="no text"):
        prune(dense_twin(tiny()), cfg(sparsity=0.5), [])
    with pytest.raises(PruneError, match="300 tokens, the model's context is 256"):
        prune(dense_twin(tiny()), cfg(sparsity=0.5), [ids(1, 300)])
    with pytest.raises(PruneError, match=r"layers\.0\.mlp\.down_proj: pattern 2:4 needs whole groups of 4"):
        prune(dense_twin(tiny(intermediate_size=98)), cfg(pattern="2:4"), batches)
    model = tiny()
    model.model.embed_tokens.weight.data[ids(5, 24, seed=3)[4, 3]] = float("inf")
    twin = dense_twin(model)
    with pytest.raises(PruneError, match=r"layers\.0\.self_attn\.q_proj: sees inputs that are not finite"):
        prune(twin, cfg(sparsity=0.5), batches)
    assert twin.closed_sites == frozenset() and not model.model.layers[0]._forward_pre_hooks


def test_a_layer_that_is_never_run_is_named(batches):
    model = tiny()
    model.model.layers[2].mlp.forward = torch.zeros_like
    with pytest.raises(PruneError, match=r"layers\.2\.mlp\.gate_proj: never run"):
        prune_wanda(dense_twin(model), Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION), batches)


def test_tied_head_and_embedding_are_left_alone(batches):
    model = tiny("llama_tied")
    before = model.model.embed_tokens.weight.clone()
    plan, masks, weights = prune_sparsegpt(dense_twin(model), sparse(), batches)
    assert torch.equal(model.lm_head.weight, before) and model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("embed" in name or "lm_head" in name for name in [*masks, *weights])
    assert plan.parameters_dense == sum(parameter.numel() for parameter in model.parameters())


def test_magnitude_with_ties_counts_exactly():
    model = tiny()
    for linear in linears_of(model).values():
        linear.weight.data = linear.weight.data.mul(4).round()  # few values, many ties
    _, masks, _ = prune_magnitude(dense_twin(model), Magnitude(kind="magnitude", sparsity=0.7), [])
    assert all(((~keep).sum(1) == round(0.7 * keep.shape[1])).all() for keep in masks.values())


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", *sorted(HYBRIDS - {*MIXTURES})])
def test_sparsegpt_trained_merged_and_reloaded_is_the_pruned_view(family, tmp_path, batches):
    dense = tiny(family)
    plan, masks, weights = prune_sparsegpt(
        dense_twin(copy.deepcopy(dense)), sparse(pattern="2:4", sparsity=None), batches
    )
    save_plan(plan, masks, tmp_path / "plan", weights)
    twin = Twin(copy.deepcopy(dense), *load_plan(tmp_path / "plan"))
    tokens = ids(2, 20)
    reference = copy.deepcopy(dense)
    for name, linear in linears_of(reference).items():
        linear.weight.data.copy_(weights[f"{name}.weight"])
    with torch.no_grad():
        assert torch.equal(twin.model(input_ids=tokens).logits, reference(input_ids=tokens).logits)
        with twin.dense() as shown:
            assert torch.equal(shown(input_ids=tokens).logits, dense(input_ids=tokens).logits)
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    merged = merge(twin, torch.float32)
    merged.save_pretrained(tmp_path / "out")
    stock = type(dense).from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = twin.model(input_ids=tokens).logits
        torch.testing.assert_close(stock(input_ids=tokens).logits, expected, rtol=2e-4, atol=2e-4)
    assert not any(linears_of(stock)[name].weight[~keep].any() for name, keep in masks.items())


def test_equal_arguments_are_held_once(batches):
    walk = Stream(dense_twin(tiny("gemma2")), [*batches, batches[0]])
    first, again = walk.calls[0], walk.calls[-1]
    for block in range(6):
        assert first[block][1]["attention_mask"] is again[block][1]["attention_mask"]
    assert first[0][1]["attention_mask"] is not first[1][1]["attention_mask"]  # sliding, full
    assert stream.working_device(torch.device("meta")) == torch.device("meta")
