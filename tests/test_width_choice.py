"""Width: which units go, by the papers' formulas; sizes, rounding, and what is refused before anything is cut."""

from __future__ import annotations

import copy

import pytest
import torch
from narrow import NARROWED, batches, case, cfg, logits, prune, silenced, widths
from tiny import tiny

from recover.base.errors import PruneError, RecipeError
from recover.config import recipe
from recover.config.recipe import parse_recipe
from recover.models.arch import linears_of
from recover.models.load import describe
from recover.models.plan import Plan
from recover.models.switched import OwnLinear
from recover.models.twin import Twin
from recover.prune.width import Outgoing, highest, prune_width, unit_scores, width_weights
from recover.run.estimate import estimate, refuse, warnings


@pytest.mark.parametrize("by", ["activation", "fluctuation"])
def test_the_lowest_by_the_papers_formulas_go(by):
    dense = tiny("qwen2")
    plan, masks, weights = prune(dense, mlp=0.5, kv_groups=1, score=by)
    twin = Twin(copy.deepcopy(dense), plan, masks, weights)
    assert plan.config["intermediate_size"] == 48
    torch.testing.assert_close(logits(twin.model), logits(silenced(dense, by, 48)), rtol=1e-4, atol=1e-5)
    records = plan.scores
    assert [(r["block"], r["part"]) for r in records] == [(b, p) for b in range(6) for p in ("attention", "mlp")]
    assert all(r["by"] == by and 0 < r["share_of_score"] <= 0.5 for r in records)


def test_a_unit_that_outputs_a_constant_fluctuates_least_and_is_not_least_active():
    linear = torch.nn.Linear(4, 3)
    x = torch.tensor([[[5.0, 1.0, 0.5, 0.0], [5.0, -1.0, 0.1, 0.5]]])
    model = _Fed(linear, x, x)
    scores = {
        by: unit_scores(model, {"last": Outgoing(linear, 4)}, [torch.zeros(1, 2)], by)["last"]  # type: ignore[arg-type]
        for by in ("activation", "fluctuation")
    }
    assert int(scores["activation"].argmax()) == 0 and float(scores["fluctuation"][0]) == 0.0
    torch.testing.assert_close(scores["activation"], torch.tensor([5.0, 1.0, 0.3, 0.25]).double())


def test_fluctuation_does_not_drown_in_a_large_mean():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 400, 2, generator=generator) * torch.tensor([0.01, 0.02]) + 1000.0
    linear = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(linear.weight)
    place = {"last": Outgoing(linear, 2)}
    both = _Fed(linear, x[:1], x[1:])
    score = unit_scores(both, place, [torch.zeros(1, 2)] * 2, "fluctuation")["last"]  # type: ignore[arg-type]
    torch.testing.assert_close(score, x.double().flatten(0, 1).var(0), rtol=2e-3, atol=0)


class _Fed(torch.nn.Module):
    """A model whose linear sees these inputs, one a pass."""

    device = torch.device("cpu")

    def __init__(self, linear: torch.nn.Linear, *x: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.passes = linear, iter(x)

    def forward(self, **_: object) -> torch.Tensor:
        return self.linear(next(self.passes))


def test_exact_counts_and_ties_go_by_index():
    assert highest(torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0]), 3).tolist() == [2, 3, 4]
    assert highest(torch.zeros(5), 2).tolist() == [3, 4]
    assert highest(torch.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("dense", "fields", "left"),
    [
        (96, {"mlp": 0.25}, 72),
        (96, {"mlp": 0.4}, 56),
        (96, {"mlp": 0.4, "multiple": 1}, 58),
        (96, {"mlp": 0.25, "multiple": 64}, 64),
        (512, {"mlp": 0.3}, 352),
        (1536, {"mlp": 0.3}, 1088),
        (14336, {"mlp": 0.25}, 10752),
        (96, {"kv_groups": 1}, 96),
    ],
)
def test_neurons_left_are_rounded(dense, fields, left):
    assert cfg(**fields).neurons(dense) == left


def test_only_what_was_asked_for_is_cut():
    dense = tiny()
    mlp, groups = prune(dense, mlp=0.25), prune(dense, kv_groups=1)
    assert mlp.plan.config == {"intermediate_size": 72} and not any("self_attn" in name for name in mlp.weights)
    assert groups.plan.config == {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    assert not any("mlp" in name for name in groups.weights)
    assert mlp.plan.parameters_dense - mlp.plan.parameters_pruned == 6 * 3 * 24 * 64
    assert groups.plan.parameters_dense - groups.plan.parameters_pruned == 6 * (2 * 32 * 64 + 2 * 16 * 64)


def test_the_twin_it_was_scored_on_is_left_as_it_was():
    twin = Twin(tiny(), Plan.none(6))
    before = logits(twin.model)
    prune_width(twin, cfg(mlp=0.5), batches())
    assert torch.equal(logits(twin.model), before)
    assert not any(
        isinstance(linear, OwnLinear) or linear._forward_pre_hooks for linear in linears_of(twin.model).values()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_groups": 2}, "prune.kv_groups: 2 of 2 KV groups to remove: keep at least one"),
        ({"kv_groups": 5}, "prune.kv_groups: 5 of 2"),
        ({"mlp": 0.01}, "leaves 96: expected at least one removed and one left; give a smaller prune.multiple"),
        ({"mlp": 0.9, "multiple": 64}, "prune.mlp: 0.9 of 96 neurons, in multiples of 64, leaves 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(PruneError, match=message):
        prune(tiny(), **fields)


def test_head_counts_that_no_stock_model_has_are_refused_and_the_others_named():
    """Llama's config wants heads that divide the width: of 8, only 4, 2 or 1."""
    with pytest.raises(PruneError, match=r"leaves 6 heads, and no stock llama model .*Works here: 2, 3"):
        prune(tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=8), kv_groups=1)
    prune(tiny("mistral", num_attention_heads=8, num_key_value_heads=4, head_dim=8), kv_groups=1)


@pytest.mark.parametrize(
    "wrong", [{}, {"mlp": 0}, {"mlp": 1}, {"mlp": 1.5}, {"kv_groups": 0}, {"mlp": 0.5, "multiple": 0}]
)
def test_leaves_that_say_nothing_sensible_are_refused(wrong):
    with pytest.raises(ValueError):
        cfg(**wrong)


def test_text_is_needed():
    with pytest.raises(PruneError, match="is measured on text"):
        prune_width(Twin(tiny(), Plan.none(6)), cfg(mlp=0.5), [])


def small_recipe(**prune) -> recipe.Recipe:
    text = {"data": "org/text", "length": 64}
    return parse_recipe(
        {
            "name": "narrow",
            "model": {"source": "org/model"},
            "prune": {"kind": "width", "calibration": text, **prune},
            "train": {"data": [{"kind": "dense", "prompts": "embedded:prompts"}], "length": 64},
            "measure": {"tasks": ["embedded:sums"]},
        },
        "my.yaml",
    )


@pytest.fixture
def description(tmp_path):
    tiny().save_pretrained(tmp_path)
    return describe(recipe.Model(source=str(tmp_path)))


@pytest.mark.parametrize("fields", [{"mlp": 0.25}, {"kv_groups": 1}, {"mlp": 0.4, "kv_groups": 1}])
def test_the_plan_stage_knows_the_size_before_a_weight_is_loaded(fields, description):
    found, plan = small_recipe(**fields), prune(tiny(), **fields).plan
    refuse(found, description)
    figures = estimate(found, description, rate=1e9)
    assert figures["parameters_pruned"] == plan.parameters_pruned
    own = sum(torch.Size(shape).numel() for shape in plan.weights.values())
    without = estimate(small_recipe(mlp=0.08), description, rate=1e9)["memory_bytes_per_process"]
    assert width_weights(found.prune, description) == (plan.parameters_dense - plan.parameters_pruned, own)  # type: ignore[arg-type]
    assert figures["memory_bytes_per_process"] - without == 4 * (own - 6 * 88 * 64 * 3)
    assert not any("masked" in line for line in warnings(found, description))
    assert any("of the blocks' weights go" in line for line in warnings(small_recipe(mlp=0.9), description))


@pytest.mark.parametrize("family", NARROWED)
def test_the_plan_stage_knows_what_goes_of_every_family(family, tmp_path):
    dense, pruned = case(family)
    dense.save_pretrained(tmp_path)
    found, described = small_recipe(**widths(family)), describe(recipe.Model(source=str(tmp_path)))
    refuse(found, described)
    left = estimate(found, described, rate=1e9)["parameters_pruned"]
    biases = {name: each for name, each in dense.named_parameters() if name.endswith("bias")}
    cut = sum(
        biases[name].numel() - torch.Size(shape).numel()
        for name, shape in pruned.plan.weights.items()
        if name in biases
    )
    assert left == pruned.plan.parameters_pruned + cut


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kv_groups": 2}, "keep at least one"), ({"mlp": 0.01}, "leaves 96: expected at least one")],
)
def test_the_plan_stage_refuses_what_pruning_would(fields, message, description):
    with pytest.raises(RecipeError, match=message):
        refuse(small_recipe(**fields), description)


def test_half_precision_is_cut_from_half_precision():
    plan, _, weights = prune(tiny("llama").to(torch.bfloat16), mlp=0.5, kv_groups=1, score="fluctuation")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16} and len(weights) == 6 * 7
    assert plan.weights["model.layers.0.self_attn.k_proj.weight"] == (16, 64)


@pytest.mark.parametrize(("family", "warned"), [("qwen2", True), ("llama", False), ("qwen3", False)])
def test_a_head_size_that_other_readers_may_not_read_is_warned_of(family, warned, capsys):
    prune(tiny(family), kv_groups=1)
    said = "".join(capsys.readouterr())
    assert ("rarely say 'head_dim'" in said.replace("\n", " ")) == warned
    prune(tiny(family), mlp=0.4)
    assert "56 of 96 neurons stay (41.7% go), the nearest multiple of 8" in capsys.readouterr().out.replace("\n", " ")
