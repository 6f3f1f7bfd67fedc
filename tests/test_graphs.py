"""Training steps replayed as CUDA graphs are those that are launched kernel by kernel, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from test_packing import PACKED, rows
from tiny import tiny
from twins import masked_twin

from recover.base import console
from recover.config.recipe import Lora, Loss
from recover.distill import distiller as distiller_module
from recover.distill.distiller import Distiller, GraphedPasses
from recover.models.attention import PACKED_NAME, attending
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.data import packer, with_scored

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")

COLLATE = with_scored(packer(0, "completion", 40, (64, 128)))
LENGTHS = ((23, 9, 1, 30), (9, 9, 9, 30), (30, 30, 30, 30), (40, 3, 33, 30))  # of the first two and last two one shape


def batch(number: int) -> dict[str, Any]:
    made = COLLATE(rows(LENGTHS[number % 4]))
    return send_to_device(made, "cuda")


def twin_of(family: str = "llama", what: Any = "all") -> Twin:
    model = tiny(family).cuda().to(torch.bfloat16)
    twin = masked_twin(model) if what == "masked" else Twin(model, Plan("depth", 6, (3, 4)))
    torch.manual_seed(0)
    twin.add_lora(Lora(rank=4, blocks="all" if what == "masked" else what))
    twin.model.cuda().train()
    return twin


def twin_with_experts_adapted(family: str) -> Twin:
    twin = Twin(tiny(family).cuda().to(torch.bfloat16), Plan("depth", 6, (3, 4)))
    torch.manual_seed(0)
    twin.add_lora(Lora(rank=4, parts=("linears", "experts", "router")))
    twin.model.cuda().train()
    return twin


def trained_of(twin: Twin) -> list[Any]:
    return [parameter for parameter in twin.model.parameters() if parameter.requires_grad]


def launched(twin: Twin, distiller: Distiller, made: dict[str, Any], scale: torch.Tensor) -> torch.Tensor:
    with attending(distiller.packs, PACKED_NAME):
        sums = twin.model(**made, distill=distiller)
        (sums["loss"] * scale).backward()
    return values(sums)


def values(sums: Any) -> torch.Tensor:
    return torch.stack([sums[name].detach().float() for name in ("loss", "kl", "variance", "ce")])


def steps(twin: Twin, *, graphed: bool) -> list[torch.Tensor]:
    """Sums, and adapters after each step, of eight steps of two shapes; every third step has two micro-batches."""
    optimizer = torch.optim.AdamW(trained_of(twin), lr=1e-2)
    distiller = Distiller(twin, Loss(variance=0.5))
    graphs = GraphedPasses(distiller, trained_of(twin)) if graphed else None
    found, recorded, scale = [], 0, torch.tensor(0.01, device="cuda")
    for number in range(8):
        for micro in range(2 if number % 3 == 2 else 1):
            made = batch(number + micro)
            if graphs is not None and graphs.takes(made):
                recorded += 1
                found.append(values(graphs.step(made, scale)))
            else:
                if graphs is not None:
                    graphs.bring_gradients()
                found.append(launched(twin, distiller, made, scale))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found += [parameter.detach().clone() for parameter in trained_of(twin)]
    assert recorded == (0 if graphs is None else 8)
    return found


# granite_swa attends eagerly, for which transformers makes a mask out of a number in main memory: no graph holds that.
RECORDED = [family for family in PACKED if family != "granite_swa"]


@pytest.mark.parametrize(
    ("family", "what"), [*((family, "all") for family in RECORDED), ("llama", "after_cut"), ("llama", "masked")]
)
def test_replayed_steps_are_the_launched_ones(monkeypatch, family: str, what: Any):
    monkeypatch.setattr(console, "warn", pytest.fail)
    plain, replayed = (steps(twin_of(family, what), graphed=graphed) for graphed in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_steps_of_mixtures_are_recorded_with_their_experts(monkeypatch, family: str):
    monkeypatch.setattr(console, "warn", pytest.fail)
    plain, replayed = (steps(twin_with_experts_adapted(family), graphed=graphed) for graphed in (False, True))
    for one, other in zip(plain, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2)


def test_a_batch_prepared_ahead_and_one_that_was_not_are_the_same():
    found: dict[bool, list[float]] = {False: [], True: []}
    for ahead, kls in found.items():
        twin = twin_of()
        distiller = Distiller(twin, Loss())
        graphs = GraphedPasses(distiller, trained_of(twin))
        batches = [batch(0), batch(1), batch(0), batch(1)]
        assert not graphs.takes(batches[0])
        graphs.bring_gradients()
        launched(twin, distiller, batches[0], torch.ones((), device="cuda"))
        assert graphs.takes(batches[1])
        for made, coming in pairwise([*batches, batch(2)]):
            kls.append(graphs.step(made, torch.ones((), device="cuda"))["kl"].item())
            if ahead:
                graphs.prepare(coming)
    assert found[False] == found[True] and len(set(found[True])) == 2


def test_casts_made_at_once_are_those_of_each_adapter_in_a_recording_too(monkeypatch):
    monkeypatch.setattr(console, "warn", pytest.fail)
    at_once = steps(twin_of(), graphed=True)
    monkeypatch.setattr(distiller_module, "cast_together", lambda *_, **__: nullcontext())
    assert all(torch.equal(one, other) for one, other in zip(at_once, steps(twin_of(), graphed=True), strict=True))


def test_what_cannot_be_recorded_is_said_once_and_trained_the_plain_way(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    twin = twin_of()
    block: Any = twin.blocks[2]
    block.register_forward_hook(lambda _module, inputs, _output: inputs[0].sum().item() and None)
    distiller = Distiller(twin, Loss())
    graphs = GraphedPasses(distiller, trained_of(twin))
    assert [graphs.takes(batch(0)) for _ in range(4)] == [False] * 4
    assert len(said) == 1 and "CUDA graphs" in said[0]
    assert launched(twin, distiller, batch(0), torch.ones((), device="cuda")).isfinite().all()


def test_equal_trainings_end_in_equal_bits():
    """Flash attention's backward adds up in any order unless it is told not to."""
    first, second = (steps(twin_of(), graphed=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
