"""Weights shared out: what is there when, in what order it is asked for, and that nothing else changes.

Between processes: tests/test_two_processes.py.
"""

import itertools
import json

import pytest
import torch
from tiny import tiny

from recover.base import dist
from recover.base.errors import RecipeError, TrainingError
from recover.config.recipe import Lora, Train
from recover.config.train import refuse_sharding_twice
from recover.models import stored_weights as weight_shards
from recover.models.plan import Plan
from recover.models.stored_weights import share_out
from recover.models.twin import Twin

IDS = torch.arange(24).view(2, 12) % 256


class Beside:
    """Stands for `Machine`, for members that are twins of one process: what one owns, the others copy."""

    def __init__(self, members):
        self.members, self.member, self.memory = members, -1, {}

    def __call__(self):
        self.member += 1
        return self

    def shares(self, layout, device):
        mine = [torch.empty(block[self.member], dtype=torch.uint8) for block in layout]
        self.memory[self.member] = mine
        return Copies(self.memory, mine)


class Copies:
    bytes_elsewhere = 0

    def __init__(self, memory, mine):
        self.memory, self.own = memory, mine

    def mine(self, block):
        return self.own[block]

    def gather(self, block, places):
        for member, place in places.items():
            place.copy_(self.memory[member][block])
        return self

    def wait(self):
        pass

    publish = close = wait


def shared_out(monkeypatch, *, dropped, members=2, **lora):
    """The first of so many twins, and its shards; the others hold the rest of its weights."""
    monkeypatch.setattr(weight_shards, "Machine", Beside(members))
    twins = [twin_with_lora(*dropped, **lora) for _ in range(members)]
    shards = [share_out(twin.blocks) for twin in twins]
    return twins[0], shards[0]


def twin_with_lora(*dropped, **lora):
    twin = Twin(tiny(), Plan("depth", 6, dropped))
    torch.manual_seed(0)
    twin.add_lora(Lora(rank=4, **lora))
    twin.model.train()
    return twin


def matrices(block):
    return [parameter for parameter in block.parameters() if not parameter.requires_grad and parameter.dim() == 2]


def here(twin):
    """Numbers of the blocks whose weights are all in memory."""
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
        own = getattr(weight_shards._Block, name)

        def method(weights, own=own, name=name):
            before = weights._here
            own(weights)
            if weights._here != before:
                seen.append((name, weights._number))

        monkeypatch.setattr(weight_shards._Block, name, method)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize(("dropped", "blocks"), [((2, 4), "all"), ((2, 3), "after_cut"), ((), "all")])
def test_values_and_gradients_are_those_of_whole_weights(monkeypatch, dropped, blocks, checkpointing, members):
    expected = twin_with_lora(*dropped, blocks=blocks)
    found, _ = shared_out(monkeypatch, dropped=dropped, blocks=blocks, members=members)
    assert here(found) == []
    for _ in range(3):  # nothing is known of the order in the first
        for a, b in zip(step(expected, checkpointing), step(found, checkpointing), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert len(here(found)) <= 2


def test_two_blocks_at_most_are_there_and_the_next_one_comes_before_it_is_needed(monkeypatch, watched):
    twin, _ = shared_out(monkeypatch, dropped=(2, 4))
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


def test_closed_blocks_are_not_gathered(monkeypatch, watched):
    twin, _ = shared_out(monkeypatch, dropped=(2, 4))
    watched.clear()
    for _ in range(2):
        twin.model(IDS).logits.sum().backward()
    assert {number for event, number in watched if event == "gather"} == {0, 1, 3, 5}


def test_whole_and_back(monkeypatch):
    before = {name: value.clone() for name, value in twin_with_lora(2, 4).base.state_dict().items()}
    twin, shards = shared_out(monkeypatch, dropped=(2, 4))
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


def test_each_matrix_of_a_block_has_one_owner_and_all_own_about_as_much(monkeypatch):
    """Matrices that are not trained, and that one block alone has."""
    monkeypatch.setattr(weight_shards, "Machine", Beside(2))
    twins = [twin_with_lora(2) for _ in range(2)]
    for twin in twins:
        twin.blocks[3].mlp.up_proj.base_layer.weight = twin.blocks[1].mlp.up_proj.base_layer.weight
        share_out(twin.blocks)
    gone = [
        {name for name, value in twin.model.named_parameters() if not value.untyped_storage().nbytes()}
        for twin in twins
    ]
    frozen = {name for name, value in twins[0].model.named_parameters() if not value.requires_grad}
    tied = ".1.mlp.up_proj.base_layer.weight"
    alone = {name for name in frozen if ".layers." in name and "norm" not in name and tied not in name}
    assert not gone[0] & gone[1]
    assert gone[0] | gone[1] == alone
    sizes = [sum(twins[0].model.get_parameter(name).numel() for name in each) for each in gone]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero3_and_shards_are_refused_together(stage, tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    cfg = Train.model_validate({"data": [{"kind": "given", "source": "x.jsonl"}], "shard_weights": True})
    assert dist.zero_stage() == stage
    if stage == 2:
        refuse_sharding_twice(cfg)
        return
    with pytest.raises(TrainingError, match=r"shard_weights.*zero2\.yaml"):
        refuse_sharding_twice(cfg)


def test_the_plan_refuses_it_too(monkeypatch):
    from recover.run import estimate

    cfg = Train.model_validate({"data": [{"kind": "given", "source": "x.jsonl"}], "shard_weights": True})
    monkeypatch.setattr(dist, "zero_stage", lambda: 3)
    with pytest.raises(RecipeError, match="shard_weights"):
        estimate._refuse_training(cfg)
