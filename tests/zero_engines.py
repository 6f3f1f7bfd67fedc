"""One process, an engine of stage 3 and one of stage 2: prints `has NAME` for each name of `zero.INTERNALS` found.

python tests/zero_engines.py
"""

from __future__ import annotations

import os

os.environ.update(
    MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu"
)

from typing import Any

import deepspeed
import torch

from recover.base import zero


def engine_of(stage: int) -> Any:
    """Two layers in a block that is gathered at once; the second one is trained."""
    model: Any = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
    model[0][0].requires_grad_(False)
    if stage == 3:
        zero.gather_at_once(model[0])
        assert zero.gathers_at_once(model[0]) and not zero.gathers_at_once(model)
    optimizer = torch.optim.AdamW(model[0][1].parameters(), lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine) -> None:
    asking = torch.ones(1, 4, requires_grad=True)  # else a block gathered at once gives no gradients
    engine.backward(engine(asking).sum())
    engine.step()


def hooks(engine) -> dict[str, int]:
    """How many hooks each module has, without the engine's own two, which keep time and wait for nobody."""
    own = {engine.module_forward_pre_hook.id, engine.module_forward_post_hook.id}
    return {
        name: len({*module._forward_pre_hooks, *module._forward_hooks} - own)
        for name, module in engine.module.named_modules()
    }


def check_parameters(engine) -> None:
    """Dealt out, and whole where they are gathered."""
    frozen = engine.module[0][0].weight
    for name in ("ds_id", "ds_shape", "ds_tensor", "ds_active_sub_modules"):
        say(frozen, name)
    assert zero.dealt_out(frozen) and frozen.numel() == 0
    assert zero.whole_shape(frozen) == (4, 4) and zero.own_share(frozen).numel() == 16
    with zero.gathered(frozen):
        assert frozen.shape == (4, 4)


def check_outside(engine) -> None:
    """No hook is left inside, all are back behind, and training goes on along a trace made anew."""
    offload, before = engine.optimizer.parameter_offload, hooks(engine)
    say(engine.optimizer, "parameter_offload")
    for name in ("forward_hooks", "backward_hooks", "fwd_pre_hook", "_register_deepspeed_module"):
        say(offload, name)
    say(offload.get_param_coordinator(), "_invalidate_trace")
    assert any(before.values())
    for _ in range(3):
        with zero.outside(engine):
            assert not any(hooks(engine).values()), "a hook is left: a forward may wait for other processes"
            whole = [parameter.detach().clone() for parameter in engine.module.parameters()]
            expected = torch.ones(1, 4) @ whole[0].T + whole[1]
            torch.testing.assert_close(engine.module(torch.ones(1, 4)), expected @ whole[2].T + whole[3])
        assert hooks(engine) == before
        step(engine)
        step(engine)


def check_moments(engine) -> None:
    """What is written into the optimizer is what is read from it, and the next step starts from there."""
    trained = engine.module[0][1].weight
    assert zero.make_moments(engine, 7)
    for number, kind in enumerate(("weight", *zero.MOMENTS)):
        value = torch.arange(16.0).reshape(4, 4) + number
        zero.write_trained(trained, kind, value)
        torch.testing.assert_close(zero.read_trained(trained, kind), value)
    with zero.gathered(*engine.module.parameters()):
        frozen = engine.module[0][0]
        gradient = (torch.ones(1, 4) @ frozen.weight.T + frozen.bias).expand(4, 4)  # of a sum of outputs, by weight
    step(engine)
    expected = 0.9 * (torch.arange(16.0).reshape(4, 4) + 1) + 0.1 * gradient
    torch.testing.assert_close(zero.read_trained(trained, "exp_avg"), expected)
    assert not zero.make_moments(engine, 0)  # there are none before the first step


def say(owner: object, name: str) -> None:
    if hasattr(owner, name):
        print("has", name, flush=True)


if __name__ == "__main__":
    zero.skip_compilation()
    if deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm") is False:
        say(deepspeed.ops, "__compatible_ops__")
    deepspeed.init_distributed("gloo")
    third = engine_of(3)
    check_parameters(third)
    step(third)
    check_outside(third)
    say(third.optimizer, "fp32_partitioned_groups_flat")
    check_moments(third)
    second = engine_of(2)
    step(second)
    for name in ("single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state"):
        say(second.optimizer, name)
    say(second.optimizer, "_hp_optimizer_states_linked")
    check_moments(second)
