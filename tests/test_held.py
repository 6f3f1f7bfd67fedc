"""The dense weights are read once a process, and every twin of them is as if they had been read for it."""

from __future__ import annotations

import pytest
import torch
from small_run import QUICKSTART
from tiny import FAMILIES, ids, tiny

from recover.config.recipe import Lora, load_recipe
from recover.models import load
from recover.models.arch import blocks_of
from recover.models.plan import Plan, load_plan, save_plan
from recover.models.twin import Held, Twin, _sums
from recover.run import context as benches
from recover.run import stage_work
from recover.run.context import RunContext
from recover.run.directory import RunDirectory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_held_weights_is_the_model_and_shares_them(family):
    kept = Held(tiny(family))
    expected = kept.model(ids()).logits
    twin = Twin(kept.again(), Plan("depth", 6, (2, 4)))
    twin.add_lora(Lora(rank=2))
    again = kept.again()
    assert torch.equal(again(ids()).logits, expected) and torch.equal(kept.model(ids()).logits, expected)
    with twin.dense() as dense:
        assert torch.equal(dense(ids()).logits, expected)
    assert not torch.equal(twin.model(ids()).logits, expected)
    assert type(again) is type(kept.model) and type(blocks_of(again)[0]) is type(blocks_of(kept.model)[0])
    assert again.config is not kept.model.config and again.generation_config is not kept.model.generation_config
    here, there = dict(kept.model.named_parameters()), dict(again.named_parameters())
    assert here.keys() == there.keys() and all(here[name] is there[name] for name in here)
    assert all(block is not other for block, other in zip(blocks_of(again), blocks_of(kept.model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_changed_weight_is_noticed_and_named(dtype):
    kept = Held(tiny("llama").to(dtype))
    assert kept.changed() == []
    weight = kept.model.model.layers[3].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(9.0, dtype=dtype))
    assert kept.changed() == ["model.layers.3.mlp.up_proj.weight"]
    with torch.no_grad():
        weight.copy_(before)
    assert kept.changed() == []


def test_weights_that_are_no_whole_number_of_eight_bytes_or_lie_across_them_count_too():
    model = torch.nn.Module()
    base = torch.arange(40.0, dtype=torch.bfloat16)
    shapes = {"odd": base[:7].clone(), "shifted": base[1:9], "turned": base.view(8, 5).T, "scalar": base[3]}
    for name, value in shapes.items():
        model.register_parameter(name, torch.nn.Parameter(value))
    before = _sums(model)
    assert _sums(model) == before
    for name in shapes:
        with torch.no_grad():
            flat = getattr(model, name)
            flat.view(-1)[-1:].add_(1) if flat.is_contiguous() else flat[-1, -1].add_(1)
        assert _sums(model)[name] != before[name], name
        before = _sums(model)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    found: list[str] = []
    read = load.load_model
    for module in (benches, stage_work):
        monkeypatch.setattr(module, "load_model", lambda cfg, **more: (found.append(cfg.source), read(cfg, **more))[1])
    return found


@pytest.fixture
def made(tmp_path) -> RunContext:
    """A context whose prune stage is done: blocks 3 and 7 dropped."""
    recipe = load_recipe(QUICKSTART)
    directory = RunDirectory(tmp_path)
    save_plan(Plan("depth", 12, (3, 7)), {}, directory.prune)
    return RunContext(recipe, directory)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def test_every_view_is_made_of_one_reading(made, reads):
    dense = logits(made.dense().model)
    pruned = logits(made.pruned().model)
    twin = made.lend()
    twin.add_lora(made.recipe.train.lora)  # what training does to it
    assert torch.equal(logits(made.stock()), dense) and torch.equal(logits(made.pruned().model), pruned)
    assert made.pruned() is not twin and torch.equal(logits(made.dense().model), dense)
    assert reads == ["embedded:fable-2m"]
    alone = Twin(load.load_model(made.recipe.model), *load_plan(made.directory.prune))
    assert torch.equal(logits(alone.model), pruned)


def test_weights_that_something_changed_are_read_anew(made, reads, capsys):
    before = logits(made.pruned().model)
    with torch.no_grad():
        made.lend().base.lm_head.weight[0, 0] += 1.0
    assert torch.equal(logits(made.pruned().model), before)
    assert len(reads) == 2 and "1 dense weights in memory have changed, such as" in capsys.readouterr().err


def test_several_processes_do_not_hold_weights_past_a_training(made, reads, monkeypatch):
    made.pruned()
    monkeypatch.setattr(benches.dist, "world_size", lambda: 2)
    made.lend()
    monkeypatch.setattr(benches.dist, "world_size", lambda: 1)
    made.pruned()
    assert len(reads) == 2
