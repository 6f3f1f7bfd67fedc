"""Weights shared out: what is there when, in what order it is asked for, and that nothing else changes.

Between processes: tests/test_two_processes.py.
"""

import itertools
import json

import pytest
import torch
import torch.distributed
from tiny import tiny

from recover import dist
from recover.errors import RecipeError, TrainingError
from recover.models.twin import Twin
from recover.prune.plan import Plan
from recover.recipe import Lora, Recover
from recover.train import weight_shards
from recover.train.settings import refuse_sharding_twice
from recover.train.weight_shards import WeightShards

IDS = torch.arange(24).view(2, 12) % 256


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.stop()


def twin_with_lora(*dropped, **lora):
    twin = Twin(tiny(), Plan("depth", 6, dropped))
    torch.manual_seed(0)
    twin.add_lora(Lora(rank=4, **lora))
    twin.model.train()
    return twin


def matrices(block):
    return [parameter for parameter in block.parameters() if not parameter.requires_grad and parameter.dim() == 2]


def here(twin):
    """Numbers of the blocks whose weights are in memory."""
    return [
        number
        for number, block in enumerate(twin.blocks)
        if all(parameter.untyped_storage().nbytes() for parameter in matrices(block))
    ]


def step(twin, checkpointing=False):
    """Dense logits, then loss and gradients of the pruned view."""
    if checkpointing:
        twin.base.gradient_checkpointing_enable({"use_reentrant": False})
    with twin.dense():
        teacher = twin.model(IDS).logits
    twin.model.zero_grad()
    loss = (twin.model(IDS).logits - teacher).square().mean()
    loss.backward()
    return teacher, loss.detach(), [p.grad.clone() for p in twin.model.parameters() if p.requires_grad]


@pytest.fixture
def watched(monkeypatch):
    """(event, block) as the blocks' memory comes and goes."""
    seen = []
    for name in ("gather", "release"):
        own = getattr(weight_shards._Flat, name)

        def method(flat, own=own, name=name):
            before = flat._here
            own(flat)
            if flat._here != before:
                seen.append((name, flat._block))

        monkeypatch.setattr(weight_shards._Flat, name, method)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dropped", "blocks"), [((2, 4), "all"), ((2, 3), "after_cut"), ((), "all")])
def test_values_and_gradients_are_those_of_whole_weights(one_process, dropped, blocks, checkpointing):
    expected, found = (twin_with_lora(*dropped, blocks=blocks) for _ in range(2))
    WeightShards(found.blocks)
    assert here(found) == []
    for _ in range(3):  # nothing is known of the order in the first
        for a, b in zip(step(expected, checkpointing), step(found, checkpointing), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert len(here(found)) <= 2


def test_two_blocks_at_most_are_there_and_the_next_one_comes_before_it_is_needed(one_process, watched):
    twin = twin_with_lora(2, 4)
    WeightShards(twin.blocks)
    step(twin)
    watched.clear()
    needed, there = [], []
    for number, block in enumerate(twin.blocks):
        block.self_attn.register_forward_pre_hook(lambda *_, number=number: needed.append((number, here(twin))))
        block.mlp.down_proj.register_full_backward_hook(lambda *_, number=number: there.append((number, here(twin))))
    step(twin)
    dense, kept = list(range(6)), [0, 1, 3, 5]
    assert [number for number, _ in needed] == dense + kept
    assert [number for number, _ in there] == kept[::-1]
    order = [*needed, *there]
    for (number, held), (following, _) in itertools.pairwise(order):
        assert held == sorted({number, following})
    # Each once a pass; what ends a pass is there when the next one begins with it.
    assert [number for event, number in watched if event == "gather"] == [1, 2, 3, 4, 5, 0, 1, 3, 5, 3, 1, 0]


def test_closed_blocks_are_not_gathered(one_process, watched):
    twin = twin_with_lora(2, 4)
    WeightShards(twin.blocks)
    watched.clear()
    for _ in range(2):
        twin.model(IDS).logits.sum().backward()
    assert {number for event, number in watched if event == "gather"} == {0, 1, 3, 5}


def test_whole_and_back(one_process):
    twin = twin_with_lora(2, 4)
    before = {name: value.clone() for name, value in twin.base.state_dict().items()}
    shards = WeightShards(twin.blocks)
    step(twin)
    with shards.whole():
        assert here(twin) == list(range(6))
        for name, value in twin.base.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert here(twin) == []
    step(twin)
    shards.end()
    assert here(twin) == list(range(6))
    for name, value in twin.base.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    step(twin)


def test_what_is_shared_out(one_process):
    """Matrices of one block alone that are not trained."""
    twin = twin_with_lora(2)
    twin.blocks[3].mlp.up_proj.base_layer.weight = twin.blocks[1].mlp.up_proj.base_layer.weight
    WeightShards(twin.blocks)
    gone = {name for name, parameter in twin.model.named_parameters() if not parameter.untyped_storage().nbytes()}
    frozen = {name for name, parameter in twin.model.named_parameters() if not parameter.requires_grad}
    assert gone == {
        name for name in frozen if ".layers." in name and "norm" not in name and ".1.mlp.up_proj" not in name
    } - {name for name in frozen if ".3.mlp.up_proj" in name}


@pytest.mark.parametrize("stage", [2, 3])
def test_zero3_and_shards_are_refused_together(stage, tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    leaf = Recover.model_validate({"data": [{"kind": "given", "source": "x.jsonl"}], "shard_weights": True})
    assert dist.zero_stage() == stage
    if stage == 2:
        refuse_sharding_twice(leaf)
        return
    with pytest.raises(TrainingError, match=r"shard_weights.*zero2\.yaml"):
        refuse_sharding_twice(leaf)


def test_the_plan_refuses_it_too(monkeypatch):
    from recover import estimate

    leaf = Recover.model_validate({"data": [{"kind": "given", "source": "x.jsonl"}], "shard_weights": True})
    monkeypatch.setattr(dist, "zero_stage", lambda: 3)
    with pytest.raises(RecipeError, match="shard_weights"):
        estimate._refuse_training(leaf)
