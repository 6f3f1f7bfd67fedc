"""One process under DeepSpeed ZeRO-3, every parameter sharded: gradients of a twin against those without DeepSpeed.

    python tests/zero3_twin.py

Prints one line a case. Dense excursion, masks and LoRA factors must be gathered inside the one engine-wrapped forward.
"""

from __future__ import annotations

import os

os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from tiny import FAMILIES, ids, tiny
from twins import Distill, fill_adapters, masked_twin

from recover.base import zero
from recover.config import recipe
from recover.models.masked_lora import hooked, lora_layers
from recover.models.plan import Plan
from recover.models.stored_weights import gather_by_block
from recover.models.twin import Twin

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def make(masked: bool, reentrant: bool | None, blocks: str, family: str) -> Twin:
    twin = masked_twin(tiny(family)) if masked else Twin(tiny(family), Plan("depth", 6, (2, 4)))
    twin.add_lora(recipe.Lora.model_validate({"rank": 4, "blocks": blocks}))
    fill_adapters(twin)
    twin.model.train()
    if reentrant is not None:
        twin.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        twin.model.enable_input_require_grads()
    return twin


def adapters(twin: Twin) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in twin.model.named_parameters() if p.requires_grad}


def check(masked: bool, reentrant: bool | None, blocks: str = "all", family: str = "llama") -> None:
    plain, sharded = (make(masked, reentrant, blocks, family) for _ in range(2))
    gather_by_block(sharded)
    plain.model(input_ids=ids(), distill=Distill(plain))["loss"].backward()
    optimizer = torch.optim.AdamW(adapters(sharded).values(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=sharded.model, optimizer=optimizer, config=CONFIG)
    assert all(p.numel() == 0 for p in sharded.model.parameters()), "a parameter is not sharded"
    assert not any(map(hooked, lora_layers(sharded.model))), "a layer is gathered by itself"
    worst = 0.0
    for step in range(3):  # the second step runs along the trace that the first one recorded
        engine.backward(engine(input_ids=ids(), distill=Distill(sharded))["loss"])
        if step == 0:
            expected = {name: p.grad for name, p in adapters(plain).items()}
            for name, p in adapters(sharded).items():
                difference = (safe_get_full_grad(p) - expected[name]).abs().max() / expected[name].abs().max()
                assert difference < 1e-5, (name, difference)  # nor may it be NaN
                worst = max(worst, difference.item())
        engine.step()
    print(f"{family} masked={masked} reentrant={reentrant} blocks={blocks}: gradients within {worst:.1e}", flush=True)


if __name__ == "__main__":
    zero.skip_compilation()
    deepspeed.init_distributed("gloo")
    for masked, blocks in ((False, "all"), (False, "after_cut"), (True, "all")):
        for reentrant in (None, False, True):
            check(masked, reentrant, blocks)
    for family in FAMILIES:
        check(masked=False, reentrant=None, family=family)
