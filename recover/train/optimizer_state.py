"""What training changes, by parameter name: weights and Adam's moments, whole, whatever engine holds them.

So a checkpoint fits any number of processes and any engine: one process, DDP, DeepSpeed ZeRO-2 or ZeRO-3. Every
number is float32, and comes back to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recover.base import console, dist
from recover.base.errors import ArtifactError

MOMENTS = ("exp_avg", "exp_avg_sq")


def collect(model: nn.Module, optimizer: Any, engine: Any, applied: int) -> dict[str, Tensor]:
    """`weight/NAME`, and once a step was applied `exp_avg/NAME` and `exp_avg_sq/NAME`, on the main process.

    Others get nothing, but all must call it: ZeRO gathers. `engine` is DeepSpeed's, or None.
    """
    values: dict[str, Tensor] = {}
    kinds = ("weight", *(MOMENTS if applied else ()))
    for name, parameter in _trained(model):
        for kind in kinds:
            value = _gathered(parameter, kind) if engine is not None else _held(optimizer, parameter, kind)
            if dist.is_main():
                values[f"{kind}/{name}"] = value.detach().float().cpu().clone(memory_format=torch.contiguous_format)
    return values


def put_back(model: nn.Module, optimizer: Any, engine: Any, values: dict[str, Tensor], applied: int) -> None:
    """The inverse of `collect`; `applied` is how many steps Adam has made.

    Raises:
        ArtifactError: the values are not those of this model's adapter.
    """
    trained = _trained(model)
    _check(trained, values, applied)
    if engine is None:
        _put_into_optimizer(trained, optimizer, values, applied)
    else:
        _put_into_engine(trained, engine, values, applied)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _held(optimizer: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    if kind == "weight":
        return parameter.data
    moments = optimizer.state.get(parameter) or {}  # none: it has had no gradient yet
    return moments[kind] if kind in moments else torch.zeros_like(parameter)


def _gathered(parameter: nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    value = safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
    assert value is not None, "this parameter is not in DeepSpeed's optimizer"
    return value


def _check(trained: list[tuple[str, nn.Parameter]], values: dict[str, Tensor], applied: int) -> None:
    kinds = ("weight", *(MOMENTS if applied else ()))
    expected = {
        f"{kind}/{name}": tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trained
        for kind in kinds
    }
    found = {name: tuple(value.shape) for name, value in values.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ArtifactError(
            f"{len(wrong)} tensors are not this adapter's, such as {name}: found {found.get(name, 'none')}, "
            f"expected {expected.get(name, 'none')}"
        )


def _put_into_optimizer(
    trained: list[tuple[str, nn.Parameter]], optimizer: Any, values: dict[str, Tensor], applied: int
) -> None:
    names = {parameter: name for name, parameter in trained}
    described = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for name, parameter in trained:
            parameter.copy_(values[f"weight/{name}"])
    moments = {
        index: {"step": torch.tensor(float(applied)), **{kind: values[f"{kind}/{names[p]}"] for kind in MOMENTS}}
        for index, p in enumerate(order)
        if applied
    }
    # torch puts each where it belongs, also `step`, which some kinds of Adam want on the device.
    optimizer.load_state_dict({**described, "state": moments})


def _put_into_engine(
    trained: list[tuple[str, nn.Parameter]], engine: Any, values: dict[str, Tensor], applied: int
) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    device = dist.device()
    parameters = [parameter for _, parameter in trained]
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)), torch.no_grad():
        for name, parameter in trained:
            if not sharded or dist.is_main():
                parameter.data.copy_(values[f"weight/{name}"])
    for name, parameter in trained:
        safe_set_full_fp32_param(parameter, values[f"weight/{name}"].to(device))
    if _make_moments(engine.optimizer, applied):
        _put_moments(trained, values, device)
    elif applied:
        console.warn(
            "this version of DeepSpeed does not let Adam's moments be set: the adapters are as they were saved, "
            "the optimizer begins anew. The course will differ from that of a run that was never stopped"
        )


def _put_moments(trained: list[tuple[str, nn.Parameter]], values: dict[str, Tensor], device: torch.device) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    for kind in MOMENTS:
        for name, parameter in trained:
            safe_set_full_optimizer_state(parameter, values[f"{kind}/{name}"].to(device), kind)


def _make_moments(zero: Any, applied: int) -> bool:
    """Give ZeRO's shares of the parameters moments to write into, which Adam makes only at its first step.

    DeepSpeed has no call for it. False where its optimizer is built in a way not known here.
    """
    flat = getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(zero, "single_partition_of_fp32_groups", None)
    base = getattr(zero, "optimizer", None)
    if flat is None or base is None:
        return False
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    for share in flat:
        state = base.state[share]
        counts_plainly = isinstance(state.get("step"), int)
        state.clear()
        if applied:
            state.update({kind: torch.zeros_like(share) for kind in MOMENTS})
            count = torch.tensor(float(applied), device=share.device if on_device else "cpu")
            state["step"] = applied if counts_plainly else count
    _link(zero, bool(applied))
    return bool(applied)


def _link(zero: Any, made: bool) -> None:
    """ZeRO-2 keeps views into the moments, by parameter, from its first step on: have them made of the new ones."""
    if not hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        return
    zero._hp_optimizer_states_linked = False
    if made:
        zero._lazy_init_hp_params_optimizer_state()
