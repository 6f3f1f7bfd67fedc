"""Mixtures of experts: what a family loses is lost in the export too, and what stays is what was trained."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import byte_tokenizer
from peft import PeftModel
from tiny import MIXTURES, ids, tiny
from transformers import AutoModelForCausalLM
from twins import Distill, fill_adapters

from recover.base.artifacts import read_json
from recover.base.errors import ExportError, ModelError, PruneError, RecipeError
from recover.config import recipe
from recover.config.recipe import load_recipe, parse_recipe
from recover.export.merge import merge
from recover.export.verify import check, write_expected
from recover.export.write import write_checkpoint
from recover.models.experts import ExpertFactors, keeping, mixtures_of
from recover.models.load import describe
from recover.models.masked_lora import ExpertLora, adapted_tensors
from recover.models.plan import Plan, load_plan, save_plan
from recover.models.twin import Twin
from recover.probe.records import record_of
from recover.probe.sublayers import routing
from recover.prune import registry
from recover.prune.depth.depth import prune_depth
from recover.prune.experts import experts_cost, prune_experts
from recover.prune.sparsity import prune_magnitude, prune_wanda
from recover.report import tables, words
from recover.run import stages
from recover.run.estimate import refuse
from recover.train.checkpoints import read_adapter, write_adapter

SOME = ["qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3"]
DEPTH = {"blocks": (2, 3)}, {"unit": "mlp", "blocks": (1, 3)}, {"unit": "attention", "blocks": (3,)}


def thinned(families, ways):
    """Each family in the first way, and one family in every way; the other pairs are slow."""
    return [
        pytest.param(family, way, marks=() if way is ways[0] or family == "qwen3_moe" else pytest.mark.slow)
        for family in families
        for way in ways
    ]


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


@pytest.mark.parametrize(("family", "cut"), thinned(MIXTURES, DEPTH))
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


def batches() -> list[torch.Tensor]:
    return [ids(2, 24, seed=7), ids(1, 24, seed=8)]


def prune(model, **fields):
    cfg = recipe.Experts(calibration=recipe.Calibration(data="text"), **fields)
    return prune_experts(Twin(copy.deepcopy(model), twin_plan(model)), cfg, batches())


def without(model, kept):
    """A stock model built anew with fewer experts, their weights picked one by one: it shares no code with the twin."""
    values = model.config.to_dict()
    name = next(name for name in ("num_local_experts", "n_routed_experts", "num_experts") if name in values)
    values[name] = len(next(iter(kept.values())))
    smaller = AutoModelForCausalLM.from_config(type(model.config).from_dict(values), dtype=torch.float32).eval()
    weights = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        routed = parts[3:4] == ["mlp"] and parts[4] in ("gate", "router", "experts") and "gate_proj" not in parts
        weights[name] = torch.stack([value[e] for e in kept[int(parts[2])]]) if routed else value
    smaller.load_state_dict(weights)
    return smaller


def experts_in(model) -> int:
    """How many experts each of its mixtures has."""
    (count,) = {block.mlp.experts.num_experts for block in model.model.layers if hasattr(block.mlp, "experts")}
    return count


def some(model, left: int) -> dict[int, tuple[int, ...]]:
    """Other experts in each block, as many in each half."""
    kept = {}
    for index, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "experts"):
            half = block.mlp.experts.num_experts // 2
            first = sorted((index + n) % half for n in range(left // 2))
            kept[index] = (*first, *(half + n for n in range(left - left // 2)))
    return kept


@pytest.mark.parametrize("family", MIXTURES)
def test_routing_among_those_that_stay_is_that_of_a_model_without_the_others(family):
    dense = tiny(family)
    left = {"mixtral": 3, "olmoe": 4, "qwen3_moe": 5, "qwen3_next": 5, "deepseek_v3": 6}.get(family, 3)
    kept = some(dense, left)
    reference = without(dense, kept)
    twin = Twin(copy.deepcopy(dense), Plan("experts", 6, experts=kept))
    # The sum over a token's experts is in another order where their numbers are.
    torch.testing.assert_close(logits(twin.model), logits(reference), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(reference), logits(dense), atol=1e-2)
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))
    assert dict(twin.base.state_dict()).keys() == dict(dense.state_dict()).keys()
    for index, block in enumerate(twin.blocks):
        if hasattr(block.mlp, "experts"):
            other = reference.model.layers[index].mlp
            x = torch.randn(9, 64, generator=torch.Generator().manual_seed(index))
            found, weights, chosen = mixtures_of(twin.model)[index].router(x)
            scores, expected, places = (other.router if family == "gpt_oss" else other.gate)(x)
            gone = [expert for expert in range(found.shape[1]) if expert not in kept[index]]
            assert torch.equal(found[:, kept[index]], scores) and (found[:, gone] == -torch.inf).all()
            assert torch.equal(weights, expected) and torch.equal(chosen, torch.tensor(kept[index])[places])


def expert_output(model, block: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert gives for one token, by the matrices of a checkpoint."""
    experts = model.model.layers[block].mlp.experts
    if model.config.model_type == "gpt_oss":
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate) @ experts.down_proj[expert] + experts.down_proj_bias[
            expert
        ]
    inner = len(experts.gate_up_proj[expert]) // 2
    gate, up = experts.gate_up_proj[expert][:inner] @ x, experts.gate_up_proj[expert][inner:] @ x
    return experts.down_proj[expert] @ (F.silu(gate) * up)


@torch.no_grad()
def by_the_paper(model, block: int) -> tuple[list[float], list[int]]:
    """REAP's score and the number of tokens of each expert: token after token, expert after expert."""
    mlp = model.model.layers[block].mlp
    router, seen = mlp.router if hasattr(mlp, "router") else mlp.gate, []
    hook = router.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 64)))
    for tokens in batches():
        model(tokens)
    hook.remove()
    totals, counts = [0.0] * mlp.experts.num_experts, [0] * mlp.experts.num_experts
    for x in torch.cat(seen):
        _, weights, chosen = router(x[None])
        for weight, expert in zip(weights[0].tolist(), chosen[0].tolist(), strict=True):
            totals[expert] += weight * float(expert_output(model, block, expert, x).norm())
            counts[expert] += 1
    return [total / max(count, 1) for total, count in zip(totals, counts, strict=True)], counts


@pytest.mark.parametrize("family", SOME)
def test_reap_and_frequency_are_those_of_a_double_loop(family):
    dense, gone = tiny(family), 2
    reap, frequency = (prune(dense, count=gone, score=score) for score in ("reap", "frequency"))
    for record, other in zip(reap.plan.scores, frequency.plan.scores, strict=True):
        scores, counts = by_the_paper(dense, record["block"])
        assert record["experts"] == pytest.approx(scores, rel=1e-4) and record["tokens"] == other["tokens"] == counts
        for found, values in ((record, scores), (other, counts)):
            groups = 2 if family == "deepseek_v3" else 1
            size = len(values) // groups
            lost = set()
            for group in range(groups):
                members = range(group * size, (group + 1) * size)
                lost |= set(sorted(members, key=lambda e: (values[e], e))[: gone // groups])
            assert found["kept"] == [e for e in range(len(values)) if e not in lost]
    assert reap.plan.experts == {record["block"]: tuple(record["kept"]) for record in reap.plan.scores}


def test_kl_is_that_of_models_without_each_expert():
    """Each candidate is closed on top of what the blocks before lost, against stock models built without it."""
    dense = tiny("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    plan = prune(dense, count=1, score="kl", candidates=3).plan
    reap = prune(dense, count=3, score="reap").plan
    every = tuple(range(8))
    before = logits_of(dense)
    lost: dict[int, tuple[int, ...]] = {}
    for record in plan.scores:
        block = record["block"]
        asked = {e for e in every if e not in reap.experts[block]}
        measured = dict(record["closed"])
        assert set(measured) == asked and record["by"] == "kl"
        for expert, found in measured.items():
            closed = {0: every, 2: every, **lost, block: tuple(e for e in every if e != expert)}
            twin = Twin(copy.deepcopy(dense), twin_plan(dense))
            with keeping(twin.model, closed):
                after = logits_of(twin.model)
            kl = sum((p.exp() * (p - q)).sum(-1).sum() for p, q in zip(before, after, strict=True))
            assert found == pytest.approx(float(kl) / sum(b.numel() for b in batches()), rel=1e-3, abs=1e-7)
        least = min(measured, key=lambda e: measured[e])
        lost[block] = tuple(e for e in every if e != least)
    assert plan.experts == lost


@torch.no_grad()
def logits_of(model):
    return [model(tokens, use_cache=False).logits.double().log_softmax(-1) for tokens in batches()]


@pytest.mark.parametrize(("family", "score"), [*((family, "reap") for family in MIXTURES), ("qwen3_moe", "kl")])
def test_fewer_experts_are_trained_and_exported(family, score, tmp_path):
    dense = tiny(family)
    pruned = prune(dense, count=2, score=score)
    twin = Twin(copy.deepcopy(dense), *pruned)
    assert not torch.allclose(logits(twin.model), logits(dense), atol=1e-3)
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    stock = exported(twin, pruned, tmp_path)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)
    left = experts_in(stock)
    assert left == experts_in(dense) - 2 and set(pruned.plan.config.values()) == {left}
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("qwen3_moe", {"count": 7}, "7 of 8 experts go, which leaves 1, and a token goes through 2 .*at most 6 can go"),
        ("qwen3_moe", {"count": 9}, "9 of 8 experts go, which leaves 0"),
        ("qwen3_moe", {"share": 0.01}, r"prune.share: 0 of 8 experts go: 0.01 of them is less than one"),
        ("deepseek_v3", {"count": 3}, "from 2 groups of equal size.*give a multiple of 2"),
        ("deepseek_v3", {"count": 6}, "leaves 2, and .*at most 4 can go"),
        ("deepseek_v3", {"count": 2, "score": "kl"}, "'kl' closes one expert, and the router chooses from 2 groups"),
        ("qwen3_moe", {"count": 2, "score": "kl", "candidates": 1}, r"prune.candidates: 1: expected 2 .* to 8"),
        ("llama", {"count": 2}, "it has no mixture of experts"),
    ],
)
def test_what_a_router_cannot_do_with_is_refused_by_plan_and_pruning(family, fields, said, tmp_path):
    model = tiny(family)
    with pytest.raises(PruneError, match=said):
        prune(model, **fields)
    model.config.save_pretrained(tmp_path)
    cfg = recipe.Experts(calibration=recipe.Calibration(data="text"), **fields)
    with pytest.raises(PruneError, match=said):
        experts_cost(cfg, describe(recipe.Model(source=str(tmp_path))))


@pytest.mark.parametrize("family", SOME)
def test_the_cost_of_a_plan_is_what_goes(family, tmp_path):
    dense = tiny(family)
    dense.config.save_pretrained(tmp_path)
    cfg = recipe.Experts(calibration=recipe.Calibration(data="text"), count=2)
    cost, plan = experts_cost(cfg, describe(recipe.Model(source=str(tmp_path)))), prune(dense, count=2).plan
    assert cost.unstored == plan.parameters_dense - plan.parameters_pruned and cost.gone == 0


def test_experts_of_a_plan_have_to_fit():
    dense = tiny("qwen3_moe")
    kept = some(dense, 4)
    for wrong, said in (
        ({**kept, 0: (1, 2, 3)}, "expected the same of each block"),
        ({**kept, 1: (0, 1, 2, 3)}, "this model has some in"),
        ({**kept, 0: (0, 2, 1, 5)}, "expected numbers from 0 to 7, ascending"),
        ({**kept, 0: (0, 1, 2, 8)}, "expected numbers from 0 to 7, ascending"),
        (dict.fromkeys(kept, (3,)), "2 at least"),
    ):
        with pytest.raises(ModelError, match=said):
            Twin(copy.deepcopy(dense), Plan("experts", 6, experts=wrong))
    assert Plan.from_json(json.loads(json.dumps(Plan("experts", 6, experts=kept).to_json()))).experts == kept


PARTS = (("router",), ("experts",), ("linears", "experts", "router"))


def learnt(twin: Twin, parts) -> Twin:
    """Whatever is trained, moved at random, and the same whatever ran before: peft begins with draws of its own."""
    torch.manual_seed(5)
    twin.add_lora(recipe.Lora(rank=3, parts=parts))
    generator = torch.Generator().manual_seed(5)
    for parameter in twin.model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return twin


@pytest.mark.parametrize(("family", "parts"), thinned(SOME, PARTS[::-1]))
def test_routers_and_experts_learn_and_are_exported(family, parts, tmp_path):
    dense = tiny(family)
    pruned = prune(dense, count=2)
    twin = Twin(copy.deepcopy(dense), *pruned)
    before = logits(twin.model)
    twin.add_lora(recipe.Lora(rank=3, parts=parts))
    torch.testing.assert_close(logits(twin.model), before, rtol=1e-5, atol=1e-5)  # nothing is learnt yet
    twin = learnt(Twin(copy.deepcopy(dense), *pruned), parts)
    assert not torch.allclose(logits(twin.model), before, atol=1e-2)
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))
    stock = exported(twin, pruned, tmp_path)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("parts", [("shared",), ("linears", "experts", "router", "shared")], ids="+".join)
@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "glm4_moe", "qwen3_moe"])
def test_shared_experts_and_plain_mlps_learn_and_are_exported(family, parts, tmp_path):
    """Their linears are called as matrices of experts were once, and are not taken for those."""
    dense = tiny(family)
    pruned = prune(dense, count=2)
    twin = learnt(Twin(copy.deepcopy(dense), *pruned), parts)
    names = {name.removesuffix(".weight") for name in adapted_tensors(twin.base)}
    beside = {name for name, module in dense.named_modules() if type(module) is torch.nn.Linear and ".mlp." in name}
    beside -= {name for name in beside if name.endswith("shared_expert_gate")}
    assert beside and beside == {
        name for name in names if ".mlp." in name and not re.search(r"\.(experts|gate)\b", name)
    }
    assert any(".experts." in name for name in names) == ("experts" in parts)
    assert any(".self_attn." in name for name in names) == ("linears" in parts)
    assert not torch.allclose(logits(twin.model), logits(Twin(copy.deepcopy(dense), *pruned).model), atol=1e-2)
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))
    stock = exported(twin, pruned, tmp_path)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)
    write_adapter(twin.model, tmp_path / "adapter")
    again = Twin(copy.deepcopy(dense), *pruned)
    read_adapter(again.add_lora(recipe.Lora(rank=3, parts=parts)), tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(twin.model))


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_mixture_without_shared_experts_has_no_such_part(family, tmp_path):
    with pytest.raises(ModelError, match=r"no block that learns has shared experts; leave 'shared' out"):
        Twin(tiny(family), Plan.none(6)).add_lora(recipe.Lora(parts=("linears", "shared")))
    tiny(family).save_pretrained(tmp_path)
    asked = parse_recipe(
        {
            "name": "shared",
            "model": {"source": str(tmp_path)},
            "prune": {"kind": "experts", "count": 1, "calibration": {"data": "org/text", "length": 64}},
            "train": {
                "data": [{"kind": "dense", "prompts": "embedded:prompts"}],
                "length": 64,
                "lora": {"parts": ["linears", "shared"]},
            },
            "measure": {"tasks": ["embedded:sums"]},
        },
        "my.yaml",
    )
    with pytest.raises(RecipeError, match=r"train.lora.parts: .*shared.*has neither"):
        refuse(asked, describe(asked.model))


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_those_of_the_weights_themselves(family):
    """Of A and B by the chain rule, from the gradient of a stock model's matrices with the update in them."""
    dense = tiny(family)
    kept = some(dense, 6 if family == "deepseek_v3" else 3)
    name = "num_experts" if family == "qwen3_next" else "num_local_experts"
    left = {type(dense.config).attribute_map.get(name, name): len(kept[max(kept)])}
    twin = learnt(Twin(copy.deepcopy(dense), Plan("experts", 6, experts=kept, config=left)), ("experts", "router"))
    twin.model(ids()).logits.square().sum().backward()
    stock = merge(twin, torch.float32).requires_grad_()
    stock(ids()).logits.square().sum().backward()
    block = max(kept)
    mlp, other = twin.base.model.layers[block].mlp, stock.model.layers[block].mlp
    router, taught = (each.router if family == "gpt_oss" else each.gate for each in (mlp, other))
    grads = router.modules_to_save["default"].weight.grad
    torch.testing.assert_close(grads[list(kept[block])], taught.weight.grad, rtol=2e-3, atol=2e-3)
    assert not grads[[e for e in range(len(grads)) if e not in kept[block]]].any()
    layer = mlp.experts
    while hasattr(layer, "parameter_name"):
        weight = getattr(other.experts, layer.parameter_name).grad
        weight = weight.transpose(1, 2) if family == "gpt_oss" else weight
        factors, a = layer.factors(), layer.lora_A["default"].weight.grad.unflatten(0, (layer.num_experts, -1))
        b = layer.lora_B["default"].weight.grad.unflatten(1, (-1, layer.num_experts))
        for place, expert in enumerate(kept[block]):
            expected = factors.scaling * factors.b_EOR[expert].T @ weight[place]
            torch.testing.assert_close(a[expert], expected, rtol=2e-3, atol=2e-3)
            expected = factors.scaling * weight[place] @ factors.a_ERI[expert].T
            torch.testing.assert_close(b[..., expert], expected, rtol=2e-3, atol=2e-3)
        layer = layer.base_layer


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_adapter_is_read_again_and_by_peft_alone(family, tmp_path):
    dense = tiny(family)
    twin = learnt(Twin(copy.deepcopy(dense), twin_plan(dense)), PARTS[-1])
    write_adapter(twin.model, tmp_path)
    again = Twin(copy.deepcopy(dense), twin_plan(dense))
    read_adapter(again.add_lora(recipe.Lora(rank=3, parts=PARTS[-1])), tmp_path)
    assert torch.equal(logits(again.model), logits(twin.model))
    if family == "qwen3_moe":
        alone = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path)
        torch.testing.assert_close(logits(alone), logits(twin.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lost", ["one expert", "all"])
def test_a_lost_update_of_an_expert_is_noticed(lost, monkeypatch):
    twin = learnt(Twin(tiny("qwen3_moe"), Plan.none(6)), ("experts",))
    whole = ExpertLora.factors

    def without_one(layer):
        a_ERI, b_EOR, scaling = whole(layer)
        b_EOR = b_EOR.clone()
        b_EOR[5 if lost == "one expert" else slice(None)] = 0
        return ExpertFactors(a_ERI, b_EOR, scaling)

    monkeypatch.setattr(ExpertLora, "factors", without_one)
    with pytest.raises(ExportError, match=rf"expert {5 if lost == 'one expert' else 0} is off by .* an update is lost"):
        merge(twin, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr("recover.export.merge.expert_factors", lambda layer: {})
    with pytest.raises(ExportError, match="were learnt and are in no exported tensor"):
        merge(twin, torch.float32)


@pytest.mark.parametrize("parts", [("experts",), ("linears", "router")])
def test_a_model_without_experts_has_no_such_parts(parts):
    with pytest.raises(ModelError, match=r"lora.parts: .* no block that learns has experts; use \[linears\]"):
        Twin(tiny("llama"), Plan.none(6)).add_lora(recipe.Lora(parts=parts))


def test_routing_counts_each_token_once_for_each_of_its_experts():
    dense = tiny("deepseek_v3")
    pruned = prune(dense, count=2)
    twin = learnt(Twin(copy.deepcopy(dense), *pruned), ("router",))
    rows = [ids(1, tokens, seed=tokens)[0].tolist() for tokens in (9, 17)]
    found = routing(twin, rows)
    stock = merge(twin, torch.float32)
    assert [record.block for record in found] == [2, 3, 4, 5]
    for record in found:
        for model, given in ((dense, record.dense), (stock, record.pruned)):
            seen = []
            hook = model.model.layers[record.block].mlp.gate.register_forward_hook(
                lambda _m, _a, out, s=seen: s.append(out[2])
            )
            for row in rows:
                model(torch.tensor([row]))
            hook.remove()
            kept = range(8) if model is dense else pruned.plan.experts[record.block]
            chosen = [kept[place] for places in seen for place in places.flatten().tolist()]
            assert given == [chosen.count(expert) for expert in range(8)] and sum(given) == 2 * 26
    assert record_of(found[0].to_json()) == found[0] and routing(Twin(tiny("llama"), Plan.none(6)), rows) == []


def test_the_report_says_which_experts_went_and_who_does_the_work():
    plan = {"blocks": 2, "kind": "experts", "modules": [], "dropped": [], "experts": {"1": [0, 1, 3]}, "sparsity": None}
    plan["scores"] = [
        {"block": 1, "by": "reap", "experts": [1.0, 2.0, 1.0, 4.0], "tokens": [1, 1, 1, 1], "kept": [0, 1, 3]}
    ]
    routed = [{"block": 1, "dense": [4, 4, 4, 4], "pruned": [8, 8, 0, 0]}]
    data = {"plan": plan, "drift": {"pruned": {"routing": routed}, "recovered": None}}
    assert tables.removed(data).rows == [("block 1", "2", "12.5%")]
    work = tables.experts(data)
    assert work.rows == [("block 1", "25.0%", "4.0 of 4", "0", "50.0%", "2.0 of 3", "1")]
    assert [model for _, model in work.columns] == ["", *3 * ["dense"], *3 * ["pruned"]]
    assert (
        words.plan_subject(plan) == "Removing 1 of 4 experts of every mixture"
        and words.plan_short(plan) == "1 of 4 experts"
    )
    nothing = {"plan": None, "drift": {"pruned": None, "recovered": None}}
    assert tables.removed(nothing) is None and tables.experts(nothing) is None


@pytest.mark.slow
def test_a_whole_run_of_a_mixture(tmp_path):
    tokenizer = byte_tokenizer()
    sizes = {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    tiny("qwen3_moe", **sizes).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    calibration = "{data: 'embedded:tasks/calibration.jsonl', samples: 4, length: 64}"
    changes = [
        "measure.limit=3",
        "measure.max_new_tokens=8",
        "measure.sampling=null",
        "probe.samples=2",
        "probe.steps=3",
    ]
    changes += ["train.tokens=600", "train.epochs=2", "train.batch_size=4", "train.length=400"]
    changes += ["train.data.0.max_new_tokens=8", f"model.source={tmp_path / 'dense'}"]
    changes += [f"prune={{kind: experts, share: 0.25, score: kl, calibration: {calibration}}}"]
    changes += ["train.lora.parts=[linears, experts, router]"]
    recipe_file = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    directory = stages.run(load_recipe(recipe_file, changes), tmp_path / "runs")
    assert read_json(directory.verify)["ok"]
    config = read_json(directory.deploy / "config.json")
    assert config["num_experts"] == config["num_local_experts"] == 6
    assert config["output_router_logits"] is False  # trl would have it said
    assert "## Who does the work" in (directory.root / "report.md").read_text()


def masked(model, kind, **fields):
    twin = Twin(copy.deepcopy(model), twin_plan(model))
    if kind == "magnitude":
        return prune_magnitude(twin, recipe.Magnitude(**fields), [])
    return prune_wanda(twin, recipe.Wanda(calibration=recipe.Calibration(data="text"), **fields), batches())


def stored_matrix(model, name: str, expert: int) -> torch.Tensor:
    """(O, I) of one expert, from the model's parameters."""
    weight = dict(model.named_parameters())[name][expert]
    return weight.T if model.config.model_type == "gpt_oss" else weight


@pytest.mark.parametrize(("family", "parts"), thinned(SOME, [("linears", "experts", "router"), ("linears",)]))
def test_masks_on_experts_are_trained_and_exported(family, parts, tmp_path):
    dense = tiny(family)
    pruned = masked(dense, "wanda", pattern="2:4")
    twin = Twin(copy.deepcopy(dense), *pruned)
    assert not torch.allclose(logits(twin.model), logits(dense), atol=1e-2)
    twin = learnt(Twin(copy.deepcopy(dense), *pruned), parts)
    twin.model(ids()).logits.square().sum().backward()
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))
    stock = exported(twin, pruned, tmp_path)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)
    for name in (name for name, _ in stock.named_parameters() if ".experts." in name and "bias" not in name):
        for expert in range(experts_in(dense)):
            alive = (stored_matrix(stock, name, expert) != 0).unflatten(1, (-1, 4)).sum(-1)
            assert (alive == 2).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_magnitude_keeps_the_largest_weights_of_each_row_of_each_expert(family):
    dense = tiny(family)
    plan, masks, _ = masked(dense, "magnitude", sparsity=0.5)
    names = [name for name in masks if ".experts." in name]
    assert len(names) == 2 * sum(hasattr(block.mlp, "experts") for block in dense.model.layers)
    for name in names:
        keep = masks[name].unflatten(0, (experts_in(dense), -1))
        for expert in range(len(keep)):
            weight = stored_matrix(dense, name, expert).abs()
            kept = weight.masked_fill(~keep[expert], torch.inf).amin(1)
            assert (kept >= weight.masked_fill(keep[expert], 0).amax(1)).all()
            assert (keep[expert].sum(1) == weight.shape[1] // 2).all()
    assert plan.nonzero == plan.parameters_dense - sum(int((~keep).sum()) for keep in masks.values())


def test_wanda_ranks_an_experts_weights_by_its_own_tokens(capsys):
    """Block 0, which no pruned block comes before: norms token after token, expert after expert."""
    dense = tiny("qwen3_moe", num_experts=64)
    _, masks, _ = masked(dense, "wanda", sparsity=0.5)
    block, seen = dense.model.layers[0], []
    hook = block.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    for tokens in batches():
        dense(tokens)
    hook.remove()
    _, _, chosen = block.mlp.gate(torch.cat(seen))
    idle = 0
    for expert in range(64):
        mine = torch.cat(seen)[(chosen == expert).any(1)]
        inside = block.mlp.experts.gate_up_proj[expert] @ mine.T
        inside = F.silu(inside[:32]) * inside[32:]
        for name, x in (("gate_up_proj", mine), ("down_proj", inside.T)):
            weight = getattr(block.mlp.experts, name)[expert].abs()
            score = weight * (x.square().sum(0).sqrt() if len(mine) else 1)
            order = score.argsort(dim=1, stable=True)
            expected = torch.ones_like(score, dtype=torch.bool).scatter(1, order[:, : score.shape[1] // 2], False)
            keep = masks[f"model.layers.0.mlp.experts.{name}"].unflatten(0, (64, -1))[expert]
            assert (keep == expected).float().mean() > 0.999, (expert, name)  # ties of rounding
        idle += not len(mine)
    assert idle and f"{idle} of 64 experts saw no token: their weights are ranked by magnitude" in said(capsys)


def said(capsys) -> str:
    found = capsys.readouterr()
    return " ".join((found.out + found.err).split())


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (recipe.SparseGpt(sparsity=0.5, calibration=recipe.Calibration(data="text")), "rewrites no experts"),
        (
            recipe.Wanda(sparsity=0.5, allocation="owl", calibration=recipe.Calibration(data="text")),
            "prune.allocation: 'owl' is not measured on experts",
        ),
    ],
)
def test_what_is_not_done_to_experts_is_refused(cfg, message, tmp_path):
    dense = tiny("qwen3_moe")
    with pytest.raises(PruneError, match=message):
        registry.prune(Twin(copy.deepcopy(dense), twin_plan(dense)), cfg, batches())
    dense.config.save_pretrained(tmp_path)
    with pytest.raises(PruneError, match=message):
        registry.pruner_of(cfg).cost(cfg, describe(recipe.Model(source=str(tmp_path))))


def test_the_recipe_for_a_real_mixture_is_one():
    cfg = load_recipe(Path(__file__).parent.parent / "recipes" / "olmoe-1b-7b-experts25.yaml")
    assert isinstance(cfg.prune, recipe.Experts) and cfg.prune.removed(64) == 16
    assert cfg.train.lora.parts == ("linears", "experts", "router")
