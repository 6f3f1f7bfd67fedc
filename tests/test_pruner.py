"""A way to prune that is registered from outside: recipe, plan, pruning and the words of the report take it as ours."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from pydantic import Field
from small_run import QUICKSTART, SMALL
from tiny import ids, tiny

from recover.base.artifacts import read_json
from recover.base.errors import PruneError, RecipeError
from recover.config import prune as configs
from recover.config.prune import Depth, Prune, Pruning, kind_of
from recover.config.recipe import load_recipe
from recover.models.arch import blocks_of, linears_of
from recover.models.plan import MaskRecord, Plan, Pruned, load_plan
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.registry import Cost, Pruner, pruner_of, register
from recover.report import words
from recover.report.collect import collect
from recover.run import stages


class Columns(Pruning):
    """Zero the first inputs of every MLP's last linear."""

    kind: Literal["columns"] = "columns"
    share: float = Field(gt=0, le=1)


def run(twin: Twin, cfg: Columns, batches: list, journal) -> Pruned:
    masks = {}
    for name, linear in linears_of(twin.model).items():
        if name.endswith("down_proj"):
            masks[name] = torch.ones_like(linear.weight, dtype=torch.bool)
            masks[name][:, : round(cfg.share * linear.in_features)] = False
    records = {name: MaskRecord.of(keep_OI, "columns") for name, keep_OI in masks.items()}
    dense = sum(parameter.numel() for parameter in twin.model.parameters())
    left = dense - sum(record.zeros for record in records.values())
    plan = Plan(
        "columns",
        len(blocks_of(twin.model)),
        masks=records,
        parameters_dense=dense,
        parameters_pruned=dense,
        nonzero=left,
    )
    return Pruned(plan, masks, {})


def cost(cfg: Columns, model) -> Cost:
    if cfg.share == 1:
        raise PruneError("prune.share: 1 leaves no input: expected less than 1")
    gone = model.blocks * model.width * round(cfg.share * model.intermediate)
    return Cost(gone=gone, masked=True, passes=3, flops=1e9, warnings=("columns are for show",))


@pytest.fixture
def columns(monkeypatch):
    monkeypatch.setattr(registry, "PRUNERS", dict(registry.PRUNERS))
    monkeypatch.setattr(configs, "OTHERS", {})
    return register(Pruner(Columns, run, cost))


def recipe(share: float):
    return load_recipe(QUICKSTART, [*SMALL, f"prune={{kind: columns, share: {share}}}"])


def test_a_toy_is_planned_pruned_and_reported(columns, tmp_path, capsys):
    found = recipe(0.25)
    assert type(found.prune) is Columns and found.prune.share == 0.25
    directory = stages.run(found, tmp_path, until="prune")
    said = capsys.readouterr()
    assert "columns are for show" in said.err and "3 passes of calibration text" in said.out
    assert "columns: 25.0% of 12 weight matrices zero (columns)" in said.out
    figures = read_json(directory.plan / "estimate.json")
    assert figures["search_passes"] == 3 and figures["parameters_pruned"] == figures["parameters_dense"]
    assert load_recipe(directory.recipe).prune == found.prune
    plan, masks, _ = load_plan(directory.prune)
    assert plan.kind == "columns" and all(
        not keep_OI[:, 0].any() and keep_OI[:, -1].all() for keep_OI in masks.values()
    )
    reported = collect(directory.root)["plan"]
    assert words.plan_subject(reported) == "Setting 25% of the block weights to zero (columns, columns)"
    assert words.plan_short(reported) == "columns columns"


def test_what_its_cost_refuses_the_plan_refuses(columns, tmp_path):
    with pytest.raises(RecipeError, match=r"prune\.share: 1 leaves no input"):
        stages.run(recipe(1), tmp_path, until="plan")


def test_without_being_registered_it_is_an_unknown_kind():
    with pytest.raises(RecipeError, match='unknown kind "columns"'):
        recipe(0.25)


def test_a_kind_is_taken_once(columns):
    class Other(Pruning):
        kind: Literal["columns"] = "columns"

    class Nameless(Pruning):
        kind: str = "columns"

    with pytest.raises(ValueError, match="'columns' is taken by Columns"):
        register(Pruner(Other, run, cost))
    with pytest.raises(ValueError, match="Nameless: expected a field 'kind: Literal"):
        register(Pruner(Nameless, run, cost))
    assert register(columns) is columns  # the same again


@pytest.mark.parametrize("config", get_args(get_args(Prune)[0]))
def test_every_kind_of_a_recipe_has_its_pruner(config):
    cfg = config.model_construct()
    assert pruner_of(cfg).config is config and kind_of(config) in registry.PRUNERS


def test_prune_without_a_journal_is_the_run_of_the_record():
    twin, cfg = Twin(tiny(), Plan.none(6)), Depth(blocks=(2,))
    assert registry.prune(twin, cfg, list(ids(1, 8).split(1))).plan.dropped == (2,)  # type: ignore[arg-type]


LEFT = {"parameters_dense": 8, "nonzero": 6}


@pytest.mark.parametrize(
    ("plan", "summary", "subject"),
    [
        (
            Plan("low_rank", 4, weights={"a.weight": (2, 2)}, **LEFT),
            "low_rank: 1 weights rewritten",
            "Pruning (low_rank)",
        ),
        (
            Plan("both", 4, (1,), config={"head_dim": 2}, **LEFT),
            "both: blocks 1 dropped, of 4 blocks; head_dim 2",
            "Dropping 1 of 4 blocks",
        ),
    ],
)
def test_a_plan_is_said_by_what_it_changes(plan, summary, subject):
    assert plan.summary() == f"{summary}; 6 of 8 weights left (75.0%)"
    reported = {**plan.to_json(), "sparsity": 0, "patterns": [], "modules": {}}
    assert words.plan_subject(reported) == subject  # type: ignore[arg-type]
