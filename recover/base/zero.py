"""DeepSpeed's ZeRO: all that this package knows of its inside, in one file.

ZeRO-3 keeps a share of each parameter on a process and gathers it where a module needs it; ZeRO-2 shares out the
optimizer alone. `INTERNALS` lists the undocumented names that are relied on here: `tests/test_zero.py` builds engines
and says which of them is gone. DeepSpeed is optional and slow to import, so each function imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from recover.base.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch and DeepSpeed name them

# What has each name, and what breaks without it.
INTERNALS = {
    "ds_id": "a parameter that is dealt out; without it sharded weights are taken for whole ones",
    "ds_shape": "such a parameter: its whole shape; without it checkpoints are refused",
    "ds_tensor": "such a parameter: this process's share; without it frozen weights are not searched for NaN",
    "ds_active_sub_modules": "such a parameter: modules that use it now; must be empty while the hooks are off",
    "parameter_offload": "the optimizer of stage 3: holds the hooks; without it generation waits for other processes",
    "forward_hooks": "parameter_offload: handles of hooks on each module",
    "backward_hooks": "parameter_offload: handles of hooks on each module",
    "fwd_pre_hook": "parameter_offload: handle of the hook on the model that begins a forward, with a collective",
    "_register_deepspeed_module": "parameter_offload: puts the hooks of a module and those below it on",
    "fp32_partitioned_groups_flat": "the optimizer of stage 3: flat shares; without it a resume loses Adam's moments",
    "single_partition_of_fp32_groups": "the optimizer of stage 2: the same",
    "_lazy_init_hp_params_optimizer_state": "the optimizer of stage 2: makes views into the moments",
    "_hp_optimizer_states_linked": "the optimizer of stage 2: whether it has made them",
    "_invalidate_trace": "parameter_offload's coordinator: has the order of blocks learnt anew behind `outside`",
    "__compatible_ops__": "deepspeed.ops: what can be compiled; without it a CPU compiles two minutes for nothing",
}

_gathered_whole: WeakSet[Any] = WeakSet()


def dealt_out(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has dealt this parameter out over the processes."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape when it is gathered."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_share(parameter: Tensor) -> Tensor:
    """What lies on this process of it: all, or of a parameter that is dealt out a flat piece."""
    return getattr(parameter, "ds_tensor", parameter.data)


def gathered(*parameters: Tensor, changed: bool = False) -> Any:
    """Inside, parameters that are dealt out are whole; a collective. `changed`: the main process's values then hold."""
    shared = [parameter for parameter in parameters if dealt_out(parameter)]
    if not shared:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(shared, modifier_rank=0 if changed else None)


def gather_at_once(module: nn.Module) -> None:
    """Have all parameters below this module gathered together; to be called before DeepSpeed builds its engine."""
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)
    _gathered_whole.add(module)


def gathers_at_once(module: nn.Module) -> bool:
    """Whether `gather_at_once` was called for this module."""
    return module in _gathered_whole


@contextmanager
def outside(engine: Any) -> Iterator[None]:
    """Inside, the model of a ZeRO-3 engine is whole on each process, and its forward waits for no other process.

    So processes may run it unequally often, or not at all. All must enter and leave together. trl's `remove_hooks`
    leaves one hook on, that of the whole model, which compares notes with the other processes at each forward.

    Raises:
        TrainingError: this version of DeepSpeed keeps its hooks elsewhere.
    """
    with gathered(*engine.parameters()):
        offload = getattr(engine.optimizer, "parameter_offload", None)
        if offload is None:  # before the first step there is no optimizer, and nothing hooks in
            yield
            return
        begin = _take_hooks_off(offload)
        try:
            yield
        finally:
            _put_hooks_on(offload, begin)


def _take_hooks_off(offload: Any) -> Any:
    """The function of the hook that begins a forward, to be put back."""
    try:
        handle, hooks = offload.fwd_pre_hook, [*offload.forward_hooks, *offload.backward_hooks]
        begin = offload.module._forward_pre_hooks[handle.id]
        for parameter in offload.module.parameters():
            parameter.ds_active_sub_modules.clear()
    except (AttributeError, KeyError) as error:
        raise TrainingError(
            f"DeepSpeed's hooks were not found ({type(error).__name__}: {error}): this version of DeepSpeed is not "
            "known here. Install a version that `recover` names in its requirements, or train with launch/zero2.yaml"
        ) from error
    for hook in (*hooks, handle):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    return begin


def _put_hooks_on(offload: Any, begin: Any) -> None:
    """As they were: the model's own first, as it sets back what the others count."""
    offload.fwd_pre_hook = offload.module.register_forward_pre_hook(begin)
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()  # it was recorded with the hooks of before
    offload._register_deepspeed_module(offload.module)


def read_trained(parameter: Tensor, kind: str) -> Tensor:
    """A trained parameter (`weight`) or a moment of it, whole and in float32; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    value = safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
    assert value is not None, "this parameter is not in DeepSpeed's optimizer"
    return value


def write_trained(parameter: Tensor, kind: str, value: Tensor) -> None:
    """The inverse of `read_trained`; of a moment only once `make_moments` has given it a place."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def make_moments(engine: Any, applied: int) -> bool:
    """Give shares of the parameters moments to write into, which Adam makes only at its first step; whether it did.

    `applied`: steps that Adam has made; of 0 there are none. DeepSpeed has no call for it. False, too, where its
    optimizer is built in a way not known here.
    """
    import torch

    zero = engine.optimizer
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


def skip_compilation() -> None:
    """Keep DeepSpeed from compiling its shared-memory op on a CPU: two minutes, for an op that is never called."""
    import torch

    if torch.cuda.is_available():
        return
    import deepspeed.ops

    # Undocumented: where it is gone, DeepSpeed compiles as it always did.
    ops = getattr(deepspeed.ops, "__compatible_ops__", None)
    if ops is not None:
        ops["deepspeed_shm_comm"] = False


def load_whole_again() -> None:
    """Later `from_pretrained` calls of this process load whole weights, not ZeRO-3's shares."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
